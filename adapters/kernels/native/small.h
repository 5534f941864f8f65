// Small operations between the products that would each be several passes over memory.
#pragma once

#include <algorithm>

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

// x *= factor
static inline void scale(float* x, float factor, int64_t d) {
  int64_t i = 0;
  for (; i + VL <= d; i += VL) store(x + i, load(x + i) * factor);
  for (; i < d; ++i) x[i] *= factor;
}

// x += delta
static inline void add(float* x, const float* delta, int64_t d) {
  int64_t i = 0;
  for (; i + VL <= d; i += VL) store(x + i, load(x + i) + load(delta + i));
  for (; i < d; ++i) x[i] += delta[i];
}

enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

static inline vf activate(vf x, int32_t activation) {
  if (activation == SILU) return x / (1.f + exp(-x));
  const vf inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);  // ½x(1 + tanh z) = x / (1 + e^(−2z))
  return x / (1.f + exp(-2.f * inner));
}

// y = act(gate) · up over `count` numbers; y may be gate.
static inline void gate_row(const float* gate, const float* up, float* y, int64_t count, int32_t activation) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store(y + i, activate(load(gate + i), activation) * load(up + i));
  if (i < count) {
    float rest[VL] = {0};
    memcpy(rest, gate + i, (count - i) * 4);
    vf g = activate(load(rest), activation);
    for (int j = 0; i < count; ++i, ++j) y[i] = g[j] * up[i];
  }
}

struct Gating {  // of rows of d numbers; the next row of gate and up lies `stride` further on, that of y `y_stride`
  const float *gate, *up;
  float* y;
  int64_t rows, d, stride, y_stride;
  int32_t activation;

  void run(int thread, int threads) const {
    const int64_t end = rows * d * (thread + 1) / threads;
    for (int64_t i = rows * d * thread / threads; i < end;) {
      const int64_t row = i / d, place = i % d, count = std::min(d - place, end - i);
      gate_row(gate + row * stride + place, up + row * stride + place, y + row * y_stride + place, count, activation);
      i += count;
    }
  }
};
