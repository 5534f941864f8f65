// Small operations between the products that would each be several passes over memory.
#pragma once

#include "vector.h"

struct Norm {
  const float* weight;  // null: no norm at all
  float eps;
  int32_t unused;
};

// y = weight · x / √(mean(x²) + eps)
static inline void normalise(const float* x, const float* weight, float eps, float* y, int64_t d) {
  vf squares = (vf){};
  int64_t i = 0;
  for (; i + VL <= d; i += VL) squares += load(x + i) * load(x + i);
  float mean = sum(squares);
  for (; i < d; ++i) mean += x[i] * x[i];
  const float factor = 1.f / __builtin_sqrtf(mean / (float)d + eps);
  for (i = 0; i + VL <= d; i += VL) store(y + i, load(weight + i) * (load(x + i) * factor));
  for (; i < d; ++i) y[i] = weight[i] * (x[i] * factor);
}

// x += delta for numbers [from, to).
static inline void add(float* x, const float* delta, int64_t from, int64_t to) {
  int64_t i = from;
  for (; i + VL <= to; i += VL) store(x + i, load(x + i) + load(delta + i));
  for (; i < to; ++i) x[i] += delta[i];
}

// x += delta, then as `normalise`.
static inline void add_and_normalise(float* x, const float* delta, const float* weight, float eps, float* y,
                                     int64_t d) {
  add(x, delta, 0, d);
  normalise(x, weight, eps, y, d);
}

enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

static inline vf activate(vf x, int32_t activation) {
  if (activation == SILU) return x / (1.f + exp(-x));
  const vf inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);  // ½x(1 + tanh z) = x / (1 + e^(−2z))
  return x / (1.f + exp(-2.f * inner));
}

static inline void gate_part(const float* gate, const float* up, float* y, int64_t from, int64_t to,
                             int32_t activation) {
  int64_t i = from;
  for (; i + VL <= to; i += VL) store(y + i, activate(load(gate + i), activation) * load(up + i));
  if (i < to) {
    float rest[VL] = {0};
    memcpy(rest, gate + i, (to - i) * 4);
    vf g = activate(load(rest), activation);
    for (int j = 0; i < to; ++i, ++j) y[i] = g[j] * up[i];
  }
}
