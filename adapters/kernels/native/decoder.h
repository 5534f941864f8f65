// Decoder layers one after another, by one team of threads: for each layer
//     x += factor · after(o(attention(q(n), k(n), v(n)))) with n = before(x),
//     x += factor · after(down(act(gate(n)) · up(n))) with n = before(x),
// `before` and `after` being norms; and norms of each head's queries and keys. All norms but `before` may be missing.
// Nothing returns to the caller between two layers: with few rows that takes longer than what lies between the products.
// Activations lie in buffers that all layers use.
#pragma once

#include <initializer_list>
#include <new>

#include "attention.h"
#include "linear.h"
#include "small.h"

struct Residual {  // what stands around a part that is added to x
  Norm before, after;
  float factor;
  int32_t unused;
};

// Layers that share an input stand side by side. Where outputs go is set here, and what `attention` is asked, too.
struct DecoderLayer {
  Residual of_attention, of_mlp;
  Norm q_norm, k_norm;
  Layer* qkv;  // q, k and v, or one layer whose outputs are those of all three, in this order
  Layer* o;
  Layer* gate_up;  // gate and up, or one layer, likewise
  Layer* down;
  Attention* attention;  // its pages, sizes and rule
  int64_t activation;
  int32_t num_qkv, num_gate_up;
  int64_t angles;  // which of the row's; -1: queries and keys are not rotated
};

struct Angles {
  const float *cos, *sin;  // [tokens, d]
  int64_t row, d;
};

struct Row {  // what all layers are told of one packed row
  int64_t tokens;
  const Angles* angles;
  const Segment* segments;
  int64_t num_segments;
  const Span* spans;
  int64_t num_spans;
  const int32_t* pages;
};

// Buffers of one calling thread.
struct Rooms {
  Scratch plans, activations, products, pages, threads, draws;
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
      Plans& p = *new (plans + l) Plans{linear(layer.qkv, layer.num_qkv, normed, hidden),
                                        linear(layer.o, 1, layer.attention->out, layer.o->d_in),
                                        linear(layer.gate_up, layer.num_gate_up, normed, hidden),
                                        linear(layer.down, 1, layer.gate_up->y, layer.gate_up->d_out),
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

  Linear linear(const Layer* of, int64_t number, const float* in, int64_t stride) const {
    Linear made{of, number, in, stride, row.tokens, row.segments, row.num_segments};
    made.plan(threads);
    return made;
  }

  static int64_t width(const Layer* layers, int64_t number) {
    int64_t total = 0;
    for (int64_t i = 0; i < number; ++i) total += layers[i].d_out;
    return total;
  }

  // Where every output goes.
  void place(Scratch& activations) {
    int64_t qkv = 0, attended = 0, gate_up = 0;
    for (int64_t l = 0; l < count; ++l) {
      qkv = std::max(qkv, width(layers[l].qkv, layers[l].num_qkv));
      attended = std::max(attended, layers[l].o->d_in);
      gate_up = std::max(gate_up, width(layers[l].gate_up, layers[l].num_gate_up));
    }
    float* free = activations.floats(lines(row.tokens) * (2 * hidden + qkv + attended + gate_up));
    const auto take = [&](int64_t width) {
      float* taken = free;
      free += lines(row.tokens) * width;
      return taken;
    };
    normed = take(hidden), delta = take(hidden);
    float *to_qkv = take(qkv), *out = take(attended), *to_gate_up = take(gate_up);
    for (int64_t l = 0; l < count; ++l) {
      const DecoderLayer& layer = layers[l];
      put(layer.qkv, layer.num_qkv, to_qkv);
      put(layer.gate_up, layer.num_gate_up, to_gate_up);
      layer.o->y = layer.down->y = delta;
      ask(layer, out);
    }
  }

  // Outputs one after another.
  void put(Layer* layers, int64_t number, float* to) const {
    for (int64_t i = 0; i < number; to += lines(row.tokens) * layers[i++].d_out) layers[i].y = to;
  }

  void ask(const DecoderLayer& layer, float* out) const {
    Attention& a = *layer.attention;
    const Layer* qkv = layer.qkv;
    const int64_t q = a.heads * a.d, k = a.kv_heads * a.d, v = a.kv_heads * a.v_d;
    a.q = qkv->y, a.q_head = a.d, a.k_head = a.d, a.v_head = a.v_d;
    if (layer.num_qkv == 1) {
      a.k = a.q + q, a.v = a.k + k;
      a.q_row = a.k_row = a.v_row = q + k + v;
    } else {
      a.k = qkv[1].y, a.v = qkv[2].y;
      a.q_row = q, a.k_row = k, a.v_row = v;
    }
    a.q_norm = layer.q_norm, a.k_norm = layer.k_norm;
    const Angles angles = layer.angles < 0 ? Angles{} : row.angles[layer.angles];
    a.cos = angles.cos, a.sin = angles.sin, a.rope_row = angles.row, a.rotated = angles.d;
    a.out = out;
  }

  Gating gating(const DecoderLayer& layer) const {
    float* gate = layer.gate_up->y;
    const int64_t d = layer.down->d_in, stride = layer.gate_up->d_out;
    const float* up = layer.num_gate_up == 1 ? gate + d : layer.gate_up[1].y;
    return {gate, up, gate, row.tokens, d, stride, stride, (int32_t)layer.activation};
  }

  // x += factor · after(delta), one row. The product is rounded before the sum, as where layers are computed one by one.
  void take_in(const Residual& residual, float* x, float* delta) const {
    const Norm& after = residual.after;
    if (after.weight) normalise(delta, after.weight, after.eps, delta, hidden);
    if (residual.factor != 1.f) scale(delta, residual.factor, hidden);
    add(x, delta, hidden);
  }

  // Between two parts, of which either may be missing. Each thread has some rows.
  void between(const Residual* done, const Residual* next, int thread, int threads) const {
    const int64_t end = row.tokens * (thread + 1) / threads * hidden;
    for (int64_t at = row.tokens * thread / threads * hidden; at < end; at += hidden) {
      if (done) take_in(*done, x + at, delta + at);
      if (next) normalise(x + at, next->before.weight, next->before.eps, normed + at, hidden);
    }
  }

  void run(int thread, int threads, Team& team) const {
    const Residual* done = nullptr;
    for (int64_t l = 0; l < count; ++l) {
      const DecoderLayer& layer = layers[l];
      Plans& p = plans[l];
      between(done, &layer.of_attention, thread, threads);
      team.meet(threads);
      p.qkv.run(thread, threads, team);
      team.meet(threads);
      p.attention.run(thread, threads, team, &p.next, scratch + thread * thread_floats);
      team.meet(threads);
      p.o.run(thread, threads, team);
      team.meet(threads);
      between(&layer.of_attention, &layer.of_mlp, thread, threads);
      team.meet(threads);
      p.gate_up.run(thread, threads, team);
      team.meet(threads);
      gating(layer).run(thread, threads);
      team.meet(threads);
      p.down.run(thread, threads, team);
      team.meet(threads);
      done = &layer.of_mlp;
    }
    between(done, nullptr, thread, threads);
  }
};
