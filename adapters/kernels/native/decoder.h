// Decoder layers as Llama has them, one after another, by one team of threads: for each layer
//     x += o(attention(q(n), k(n), v(n))) with n = norm(x), then x += down(act(gate(n)) · up(n)) with n = norm(x)
// and norms of each head's queries and keys where there are some.
// Nothing returns to the caller between two layers: with few rows that takes longer than what lies between the products.
// Activations lie in buffers that all layers use.
#pragma once

#include <initializer_list>
#include <new>

#include "attention.h"
#include "linear.h"
#include "small.h"

// Layers that share an input stand side by side. Where outputs go is set here, and what `attention` is asked, too.
struct DecoderLayer {
  Norm first, second, q_norm, k_norm;
  Layer* qkv;            // [3]
  Layer* o;              // [1]
  Layer* gate_up;        // [2]
  Layer* down;           // [1]
  Attention* attention;  // its pages, sizes and rule
  int64_t activation;
};

struct Row {  // what all layers are told of one packed row
  int64_t tokens;
  const float *cos, *sin;  // [tokens, d]
  int64_t rope_row;
  const Segment* segments;
  int64_t num_segments;
  const Span* spans;
  int64_t num_spans;
  const int32_t* pages;
};

// Buffers of one calling thread.
struct Rooms {
  Scratch plans, activations, products, pages, threads;
  void keep(size_t most) {
    for (Scratch* each : {&plans, &activations, &products, &pages, &threads}) each->keep(most);
  }
};

struct Decoder {
  struct Plans {  // of one layer
    Linear qkv, o, gate_up, down;
    Plan attention;
    int64_t next;  // unit of attention
  };

  const DecoderLayer* layers;
  int64_t count;
  Row row;
  float* x;  // [tokens, hidden]
  int threads;
  int64_t hidden;
  Plans* plans;
  float *normed, *delta;  // [tokens, hidden]
  int64_t work = 0, thread_floats = 0;
  float* scratch = nullptr;

  Decoder(const DecoderLayer* layers, int64_t count, const Row& row, float* x, Rooms& rooms, int threads)
      : layers(layers), count(count), row(row), x(x), threads(threads), hidden(layers->o->d_out) {
    place(rooms.activations);
    const int64_t room = Plan::room(row.num_spans);
    plans = (Plans*)rooms.plans.bytes(count * (sizeof(Plans) + room * sizeof(int64_t)));
    int64_t product_floats = 0, page_floats = 0;
    for (int64_t l = 0; l < count; ++l) {
      const DecoderLayer& layer = layers[l];
      Plans& p = *new (plans + l) Plans{linear(layer.qkv, 3, normed),
                                        linear(layer.o, 1, layer.attention->out),
                                        linear(layer.gate_up, 2, normed),
                                        linear(layer.down, 1, layer.gate_up->y),
                                        Plan(layer.attention, row.spans, row.num_spans, row.pages,
                                             (int64_t*)(plans + count) + l * room),
                                        0};
      for (const Linear* each : {&p.qkv, &p.o, &p.gate_up, &p.down}) {
        work += each->work;
        product_floats = std::max(product_floats, each->floats());
      }
      work += p.attention.work;
      page_floats = std::max(page_floats, p.attention.temporary_floats());
      thread_floats = std::max(thread_floats, lines(p.attention.thread_floats()));
    }
    float *products = rooms.products.floats(product_floats), *pages = rooms.pages.floats(page_floats);
    for (int64_t l = 0; l < count; ++l) {
      Plans& p = plans[l];
      for (Linear* each : {&p.qkv, &p.o, &p.gate_up, &p.down}) each->use(products);
      p.attention.own = pages;
    }
    scratch = rooms.threads.floats(thread_floats * threads);
  }

  static int64_t lines(int64_t floats) { return (floats + 15) / 16 * 16; }

  Linear linear(const Layer* of, int64_t number, const float* in) const {
    Linear made{of, number, in, of->d_in, row.tokens, row.segments, row.num_segments};
    made.plan(threads);
    return made;
  }

  // Where every output goes.
  void place(Scratch& activations) {
    int64_t q = 0, k = 0, v = 0, attended = 0, gate = 0;
    for (int64_t l = 0; l < count; ++l) {
      q = std::max(q, layers[l].qkv[0].d_out);
      k = std::max(k, layers[l].qkv[1].d_out);
      v = std::max(v, layers[l].qkv[2].d_out);
      attended = std::max(attended, layers[l].o->d_in);
      gate = std::max(gate, layers[l].down->d_in);
    }
    float* free = activations.floats(lines(row.tokens) * (2 * hidden + q + k + v + attended + 2 * gate));
    const auto take = [&](int64_t width) {
      float* taken = free;
      free += lines(row.tokens) * width;
      return taken;
    };
    normed = take(hidden), delta = take(hidden);
    float *to_q = take(q), *to_k = take(k), *to_v = take(v), *out = take(attended), *to_gate = take(gate), *up = take(gate);
    for (int64_t l = 0; l < count; ++l) {
      const DecoderLayer& layer = layers[l];
      layer.qkv[0].y = to_q, layer.qkv[1].y = to_k, layer.qkv[2].y = to_v;
      layer.o->y = layer.down->y = delta;
      layer.gate_up[0].y = to_gate, layer.gate_up[1].y = up;
      Attention& a = *layer.attention;
      a.q = to_q, a.q_row = a.heads * a.d, a.q_head = a.d;
      a.k = to_k, a.k_row = a.kv_heads * a.d, a.k_head = a.d;
      a.v = to_v, a.v_row = a.kv_heads * a.v_d, a.v_head = a.v_d;
      a.q_norm = layer.q_norm, a.k_norm = layer.k_norm;
      a.cos = row.cos, a.sin = row.sin, a.rope_row = row.rope_row;
      a.out = out;
    }
  }

  // normed = norm(x), after x += delta where there is one; each thread has some rows.
  void normalise_rows(const Norm& norm, bool add, int thread, int threads) const {
    for (int64_t r = row.tokens * thread / threads * hidden; r < row.tokens * (thread + 1) / threads * hidden; r += hidden)
      if (add)
        add_and_normalise(x + r, delta + r, norm.weight, norm.eps, normed + r, hidden);
      else
        normalise(x + r, norm.weight, norm.eps, normed + r, hidden);
  }

  void run(int thread, int threads, Team& team) const {
    for (int64_t l = 0; l < count; ++l) {
      const DecoderLayer& layer = layers[l];
      Plans& p = plans[l];
      normalise_rows(layer.first, l > 0, thread, threads);
      team.meet(threads);
      p.qkv.run(thread, threads, team);
      team.meet(threads);
      p.attention.run(thread, threads, team, &p.next, scratch + thread * thread_floats);
      team.meet(threads);
      p.o.run(thread, threads, team);
      team.meet(threads);
      normalise_rows(layer.second, true, thread, threads);
      team.meet(threads);
      p.gate_up.run(thread, threads, team);
      team.meet(threads);
      const int64_t inner = row.tokens * layer.down->d_in;
      float* gate = layer.gate_up[0].y;
      gate_part(gate, layer.gate_up[1].y, gate, inner * thread / threads, inner * (thread + 1) / threads,
                layer.activation);
      team.meet(threads);
      p.down.run(thread, threads, team);
      team.meet(threads);
    }
    const int64_t all = row.tokens * hidden;
    add(x, delta, all * thread / threads, all * (thread + 1) / threads);
  }
};
