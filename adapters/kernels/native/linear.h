// Linear layers that share an input: for each, y = x Wᵀ + bias (where W is packed here) and each token's LoRA term.
//
// A long segment's term is cut by rows of a for the shrink and by columns of y for the expand, so that all threads work
// on one adapter. Short segments are dealt out whole, so that each thread streams through its adapters' memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "amx_int8.h"
#include "int8.h"
#include "lora.h"
#include "parallel.h"
#include "product.h"

struct Layer {
  const void* packed;  // panels of W (product.h); null: y holds the base's product already, and nothing is rescaled
  const float* bias;   // [d_out] or null
  const Term* table;   // a term for each slot (lora.h); null: no adapters on this layer
  int64_t d_in, d_out;
  float* y;  // [tokens, d_out]
  int64_t y_stride;
  int32_t dtype;  // of packed
  int32_t unused;
};

constexpr int64_t ROWS_AT_ONCE = 128;  // of x, so that they stay near while all panels pass
constexpr int64_t SHORT = 8;           // tokens
constexpr int64_t ROWS_FOR_TILES = 8;  // from which splitting x and filling tiles is paid for
constexpr int64_t BOUND_BY_ARITHMETIC = 16;  // rows from which the base's product leaves room on the way to memory

struct Linear {
  const Layer* layers;
  int64_t count;
  const float* x;
  int64_t x_stride, tokens;
  const Segment* segments;
  int64_t num_segments;
  // What `plan` finds out:
  int64_t rank = 0, work = 0, whole_cost = 0;
  int64_t shrink_cost = 0;  // of the segments that are cut
  bool cuts = false;  // whether any segment is cut
  bool deals = false;  // whether short segments are dealt out whole
  float* shrunk = nullptr;  // [layers][tokens][rank]
  int64_t steps = 0;  // of whole numbers that a layer wants x in
  Quantised quantised = {};
  bool splits = false;  // whether a layer wants x in parts
  Parts parts = {};

  const Term* term(int64_t layer, const Segment& segment) const {
    const Term* found = layers[layer].table ? layers[layer].table + segment.slot : nullptr;
    return found && found->rank ? found : nullptr;
  }
  bool rescales(const Layer& layer, const Term& found) const { return layer.packed && found.gain; }
  int64_t length(const Segment& segment) const { return segment.end - segment.start; }
  bool whole(const Segment& segment) const { return deals && length(segment) <= SHORT; }
  float* h_of(int64_t layer) const { return shrunk + layer * tokens * rank; }

  template <typename Visit>
  void each_term(Visit visit) const {
    for (int64_t s = 0; s < num_segments; ++s)
      for (int64_t i = 0; i < count; ++i)
        if (const Term* found = term(i, segments[s])) visit(segments[s], i, *found);
  }

  int64_t cost(const Segment& segment, int64_t layer, const Term& found) const {
    return found.rank * (layers[layer].d_in + layers[layer].d_out) * (length(segment) + 2) / 3;  // memory counts too
  }

  void plan(int threads) {
    int64_t shorts = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!layers[i].packed) continue;
      work += tokens * layers[i].d_in * layers[i].d_out;
      steps = std::max(steps, steps_of(layers[i].dtype));
      splits |= tiles_granted && tokens >= ROWS_FOR_TILES && layers[i].dtype == BF16;
    }
    if (splits) parts = Parts::of(tokens, layers[0].d_in, ROWS_AT_ONCE);
    each_term([&](const Segment& segment, int64_t i, const Term& found) {
      work += length(segment) * found.rank * (layers[i].d_in + layers[i].d_out);
      rank = std::max<int64_t>(rank, found.rank);
      shorts += length(segment) <= SHORT;
    });
    deals = shorts >= 2 * threads || threads == 1;
    each_term([&](const Segment& segment, int64_t i, const Term& found) {
      if (whole(segment))
        whole_cost += cost(segment, i, found);
      else
        cuts = true;
    });
    if (cuts) each_unit([&](const Unit& unit) { shrink_cost += unit.cost(); });
  }

  // Floats that `run` needs beside its arguments, given by `use`. Its parts begin at lines of memory.
  int64_t floats() const { return shrunk_floats() + quantised_floats() + (splits ? parts.bytes(tokens) / 4 : 0); }
  int64_t shrunk_floats() const { return (count * tokens * rank + 15) / 16 * 16; }
  int64_t quantised_floats() const {
    return steps ? (Quantised::bytes(groups_of(layers[0].d_in), tokens, steps) / 4 + 15) / 16 * 16 : 0;
  }
  void use(float* room) {
    shrunk = room;
    const int64_t groups = groups_of(layers[0].d_in);
    if (steps) {
      auto* inputs = (Input*)(room + shrunk_floats());
      quantised = {inputs, (InputGroup*)(inputs + Quantised::inputs(groups, tokens, steps)), groups, tokens, steps};
    }
    parts.x = (bfloat*)(room + shrunk_floats() + quantised_floats());
  }

  struct Unit {  // of shrinking: rows [rank, rank + ranks) of one adapter's a, tokens [start, end)
    int64_t layer, start, end, rank, ranks;
    const Term& term;
    int64_t cost() const { return (end - start + 2) * ranks; }  // memory counts too
  };

  // All units that read the same tokens stand side by side.
  template <typename Visit>
  void each_unit(Visit visit) const {
    for (int64_t s = 0; s < num_segments; ++s) {
      const Segment& segment = segments[s];
      if (whole(segment)) continue;
      for (int64_t t = segment.start; t < segment.end; t += TOKEN_BLOCK)
        for (int64_t i = 0; i < count; ++i)
          if (const Term* found = term(i, segment))
            for (int64_t r = 0; r < found->rank; r += RANK_BLOCK)
              visit(Unit{i, t, std::min<int64_t>(t + TOKEN_BLOCK, segment.end), r,
                         std::min<int64_t>(RANK_BLOCK, found->rank - r), *found});
    }
  }

  // Each thread has neighbours, so that x comes to it once.
  void shrink_cut(int thread, int threads) const {
    Share mine{thread, threads, shrink_cost};
    each_unit([&](const Unit& unit) {
      if (!mine.takes(unit.cost())) return;
      with_type(unit.term.dtype, [&](auto* type) {
        shrink(x, x_stride, unit.start, unit.end, (decltype(type))unit.term.a, layers[unit.layer].d_in, unit.rank,
               unit.ranks, unit.term.scaling, h_of(unit.layer), rank);
      });
    });
  }

  void expand_cut(int64_t i, int64_t first, int64_t last, int64_t from, int64_t to) const {
    for (int64_t s = 0; s < num_segments; ++s) {
      const Segment& segment = segments[s];
      const int64_t start = segment.start > first ? segment.start : first;
      const int64_t end = segment.end < last ? segment.end : last;
      const Term* found = start < end && !whole(segment) ? term(i, segment) : nullptr;
      if (!found) continue;
      with_type(found->dtype, [&](auto* type) {
        expand(h_of(i), rank, start, end, (decltype(type))found->b, layers[i].d_out, found->rank, found->bias,
               layers[i].y, layers[i].y_stride, from, to);
      });
      if (rescales(layers[i], *found)) rescale(*found, start, end, layers[i].y, layers[i].y_stride, from, to);
    }
  }

  void base(const Layer& layer, int64_t first, int64_t last, int64_t from, int64_t to, Ahead& ahead) const {
    if (steps_of(layer.dtype)) {
      const auto multiply = tiles_granted && tokens >= ROWS_FOR_TILES ? multiply_tile_dots : multiply_dots;
      return multiply(quantised, first, last, (const WeightGroup*)layer.packed, layer.d_out, layer.bias, layer.y,
                      layer.y_stride, from, to);
    }
    if (layer.dtype == BF16 && splits)
      return multiply_tiles(parts, first, last, (const bfloat*)layer.packed, layer.d_out, layer.bias, layer.y,
                            layer.y_stride, from, to, ahead);
    with_type(layer.dtype, [&](auto* type) {
      multiply(x, x_stride, first, last, (decltype(type))layer.packed, layer.d_in, layer.d_out, layer.bias, layer.y,
               layer.y_stride, from, to, ahead);
    });
  }

  void quantise(int thread, int threads) const {
    const int64_t d_in = layers[0].d_in;
    for (int64_t t = tokens * thread / threads; t < tokens * (thread + 1) / threads; ++t)
      quantise_row(x + t * x_stride, d_in, quantised, t);
  }

  void split(int thread, int threads) const {
    for (int64_t t = tokens * thread / threads; t < tokens * (thread + 1) / threads; ++t)
      split_row(x + t * x_stride, layers[0].d_in, parts, t);
  }

  // A thread owns the same columns in the base's product and in the cut segments' term, so that y stays in its cache.
  void columns(int thread, int threads, Ahead& ahead) const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += panels_of(layers[i].d_out);
    const int64_t mine = total * thread / threads, end_of_mine = total * (thread + 1) / threads;
    for (int64_t first = 0; first < tokens; first += ROWS_AT_ONCE) {
      const int64_t last = first + ROWS_AT_ONCE < tokens ? first + ROWS_AT_ONCE : tokens;
      int64_t offset = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Layer& layer = layers[i];
        const int64_t panels = panels_of(layer.d_out);
        const int64_t from = mine > offset ? mine - offset : 0;
        const int64_t to = end_of_mine - offset < panels ? end_of_mine - offset : panels;
        offset += panels;
        if (from >= to) continue;
        if (layer.packed) base(layer, first, last, from, to, ahead);
        if (cuts) expand_cut(i, first, last, from * PANEL, to * PANEL < layer.d_out ? to * PANEL : layer.d_out);
      }
    }
  }

  // The short segments of one thread. Neighbours in memory stay together: an adapter's layers lie one after another.
  template <typename Visit>
  void each_whole(int thread, int threads, Visit visit) const {
    Share mine{thread, threads, whole_cost};
    each_term([&](const Segment& segment, int64_t i, const Term& found) {
      if (whole(segment) && mine.takes(cost(segment, i, found))) visit(segment, i, found);
    });
  }

  void stream_whole(int thread, int threads) const {
    each_whole(thread, threads, [&](const Segment& segment, int64_t i, const Term& found) {
      const Layer& layer = layers[i];
      with_type(found.dtype, [&](auto* type) {
        stream<std::remove_pointer_t<decltype(type)>>(x, x_stride, segment.start, segment.end, found, layer.d_in,
                                                      layer.d_out, h_of(i), rank, layer.y, layer.y_stride);
      });
      if (rescales(layer, found))
        rescale(found, segment.start, segment.end, layer.y, layer.y_stride, 0, layer.d_out);
    });
  }

  void run(int thread, int threads, Team& team) const {
    if (steps) quantise(thread, threads);
    if (cuts) shrink_cut(thread, threads);
    if (splits) split(thread, threads);
    if (steps || cuts || splits) team.meet(threads);
    Ahead ahead;
    if (whole_cost && tokens >= BOUND_BY_ARITHMETIC)
      each_whole(thread, threads, [&](const Segment&, int64_t i, const Term& found) {
        const int64_t size = found.dtype == F32 ? 4 : 2;
        ahead.add(found.a, found.rank * layers[i].d_in * size);
        ahead.add(found.b, found.rank * layers[i].d_out * size);
      });
    columns(thread, threads, ahead);
    if (whole_cost) {
      team.meet(threads);
      stream_whole(thread, threads);
    }
  }
};
