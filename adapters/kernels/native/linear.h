// Linear layers that share an input: for each, y = x Wᵀ + bias (where W is packed here) and each token's LoRA term.
#pragma once

#include "lora.h"
#include "parallel.h"
#include "product.h"

struct Layer {
  const void* packed;  // panels of W (product.h); null: y holds the base's product already
  const float* bias;   // [d_out] or null
  const Term* table;   // a term for each slot (lora.h); null: no adapters on this layer
  int64_t d_in, d_out;
  float* y;  // [tokens, d_out]
  int64_t y_stride;
  int32_t dtype;  // of packed
  int32_t unused;
};

constexpr int64_t ROWS_AT_ONCE = 128;  // of x, so that they stay near while all panels pass

template <typename Visit>
static inline void with_type(int32_t dtype, Visit visit) {
  if (dtype == F32) visit((float*)nullptr);
  if (dtype == F16) visit((half*)nullptr);
  if (dtype == BF16) visit((bfloat*)nullptr);
}

struct Linear {
  const Layer* layers;
  int64_t count;
  const float* x;
  int64_t x_stride, tokens;
  const Segment* segments;
  int64_t num_segments;
  float* shrunk;  // [layers][tokens][h_stride]
  int64_t h_stride = 0;

  float* h_of(int64_t layer) const { return shrunk + layer * tokens * h_stride; }

  const Term* term(const Layer& layer, const Segment& segment) const {
    const Term* found = layer.table ? layer.table + segment.slot : nullptr;
    return found && found->rank ? found : nullptr;
  }

  int64_t work() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (layers[i].packed) sum += tokens * layers[i].d_in * layers[i].d_out;
      for (int64_t s = 0; s < num_segments; ++s)
        if (const Term* t = term(layers[i], segments[s]))
          sum += (segments[s].end - segments[s].start) * t->rank * (layers[i].d_in + layers[i].d_out);
    }
    return sum;
  }

  int64_t largest_rank() const {
    int64_t rank = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t s = 0; s < num_segments; ++s)
        if (const Term* t = term(layers[i], segments[s])) rank = t->rank > rank ? t->rank : rank;
    return rank;
  }

  // Units of RANK_BLOCK rows of one adapter and TOKEN_BLOCK tokens, dealt out in turn.
  void shrink_all(int thread, int threads) const {
    int64_t unit = 0;
    for (int64_t s = 0; s < num_segments; ++s) {
      const Segment& segment = segments[s];
      for (int64_t i = 0; i < count; ++i) {
        const Term* found = term(layers[i], segment);
        if (!found) continue;
        for (int64_t r = 0; r < found->rank; r += RANK_BLOCK)
          for (int64_t t = segment.start; t < segment.end; t += TOKEN_BLOCK)
            if (unit++ % threads == thread) {
              const int ranks = found->rank - r < RANK_BLOCK ? (int)(found->rank - r) : RANK_BLOCK;
              const int64_t end = t + TOKEN_BLOCK < segment.end ? t + TOKEN_BLOCK : segment.end;
              with_type(found->dtype, [&](auto* type) {
                shrink(x, x_stride, t, end, (decltype(type))found->a, layers[i].d_in, r, ranks, found->scaling, h_of(i),
                       h_stride);
              });
            }
      }
    }
  }

  void expand_all(int64_t i, int64_t first, int64_t last, int64_t from, int64_t to) const {
    const Layer& layer = layers[i];
    for (int64_t s = 0; s < num_segments; ++s) {
      const Segment& segment = segments[s];
      const int64_t start = segment.start > first ? segment.start : first;
      const int64_t end = segment.end < last ? segment.end : last;
      const Term* found = start < end ? term(layer, segment) : nullptr;
      if (found)
        with_type(found->dtype, [&](auto* type) {
          expand(h_of(i), h_stride, start, end, (decltype(type))found->b, layer.d_out, found->rank, found->bias,
                 layer.y, layer.y_stride, from, to);
        });
    }
  }

  // A thread owns the same columns in the base's product and in the LoRA term, so that y stays in its cache.
  void columns(int thread, int threads) const {
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
        if (layer.packed)
          with_type(layer.dtype, [&](auto* type) {
            multiply(x, x_stride, first, last, (decltype(type))layer.packed, layer.d_in, layer.d_out, layer.bias,
                     layer.y, layer.y_stride, from, to);
          });
        const int64_t columns_to = to * PANEL < layer.d_out ? to * PANEL : layer.d_out;
        expand_all(i, first, last, from * PANEL, columns_to);
      }
    }
  }
};
