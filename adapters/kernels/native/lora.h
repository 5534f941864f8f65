// The LoRA term of one segment (tokens of one adapter): h = scaling · x aᵀ ("shrink"), y += h b + bias ("expand").
// a: [rank, d_in], b: [rank, d_out], both rank-major, in any of the pool's dtypes; all arithmetic in fp32.
#pragma once

#include "vector.h"

struct Term {  // one row of LoraWeights.table (contract.py)
  const void* a;
  const void* b;
  const float* bias;
  float scaling;
  int32_t rank;
  int32_t dtype;
  int32_t unused;
};

struct Segment {  // tokens [start, end) have the adapter in `slot`
  int32_t slot, start, end;
};

template <typename P, int TOKENS, int RANKS>
static inline void shrink_block(const float* x, int64_t x_stride, const P* a, int64_t d_in, float scaling, float* h,
                                int64_t h_stride) {
  vf acc[TOKENS][RANKS];
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < RANKS; ++r) acc[t][r] = (vf){};
  int64_t k = 0;
  for (; k + VL <= d_in; k += VL) {
    vf w[RANKS];
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) {
      w[r] = load(a + r * d_in + k);
      if (TOKENS == 1) prefetch((const char*)(a + r * d_in + k) + 1024);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const vf in = load(x + t * x_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < RANKS; ++r) acc[t][r] += in * w[r];
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < RANKS; ++r) {
      float s = sum(acc[t][r]);
      for (int64_t rest = k; rest < d_in; ++rest) s += x[t * x_stride + rest] * widen(a[r * d_in + rest]);
      h[t * h_stride + r] = s * scaling;
    }
}

template <typename P, int TOKENS>
static inline void shrink_ranks(const float* x, int64_t x_stride, const P* a, int64_t d_in, int ranks, float scaling,
                                float* h, int64_t h_stride) {
  switch (ranks) {
    case 1: return shrink_block<P, TOKENS, 1>(x, x_stride, a, d_in, scaling, h, h_stride);
    case 2: return shrink_block<P, TOKENS, 2>(x, x_stride, a, d_in, scaling, h, h_stride);
    case 3: return shrink_block<P, TOKENS, 3>(x, x_stride, a, d_in, scaling, h, h_stride);
    case 4: return shrink_block<P, TOKENS, 4>(x, x_stride, a, d_in, scaling, h, h_stride);
  }
}

constexpr int RANK_BLOCK = 4;   // rows of a in one unit of work
constexpr int TOKEN_BLOCK = 32;  // tokens in one unit of work

// Tokens [start, end), rows [rank, rank + ranks) of a, at most RANK_BLOCK of them.
template <typename P>
static void shrink(const float* x, int64_t x_stride, int64_t start, int64_t end, const P* a, int64_t d_in, int64_t rank,
                   int ranks, float scaling, float* h, int64_t h_stride) {
  constexpr int TOKENS = REGISTERS >= 32 ? 4 : 2;
  int64_t t = start;
  for (; t + TOKENS <= end; t += TOKENS)
    shrink_ranks<P, TOKENS>(x + t * x_stride, x_stride, a + rank * d_in, d_in, ranks, scaling, h + t * h_stride + rank,
                            h_stride);
  for (; t < end; ++t)
    shrink_ranks<P, 1>(x + t * x_stride, x_stride, a + rank * d_in, d_in, ranks, scaling, h + t * h_stride + rank,
                       h_stride);
}

// TOKENS rows of y, VECTORS · VL columns of it, stay in registers while the rows of b stream by.
template <typename P, int TOKENS, int VECTORS>
static inline void expand_block(const float* h, int64_t h_stride, const P* b, int64_t d_out, int64_t rank,
                                const float* bias, float* y, int64_t y_stride) {
  vf acc[TOKENS][VECTORS];
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      acc[t][v] = load(y + t * y_stride + v * VL);
      if (bias) acc[t][v] += load(bias + v * VL);
    }
  for (int64_t r = 0; r < rank; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      const vf w = load(b + r * d_out + v * VL);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) acc[t][v] += h[t * h_stride + r] * w;
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) store(y + t * y_stride + v * VL, acc[t][v]);
}

template <typename P, int TOKENS, int VECTORS>
static inline int64_t expand_columns(const float* h, int64_t h_stride, const P* b, int64_t d_out, int64_t rank,
                                     const float* bias, float* y, int64_t y_stride, int64_t n, int64_t to) {
  for (; n + VECTORS * VL <= to; n += VECTORS * VL)
    expand_block<P, TOKENS, VECTORS>(h, h_stride, b + n, d_out, rank, bias ? bias + n : nullptr, y + n, y_stride);
  return n;
}

// Columns [from, to) of TOKENS rows of y.
template <typename P, int TOKENS>
static inline void expand_tokens(const float* h, int64_t h_stride, const P* b, int64_t d_out, int64_t rank,
                                 const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to) {
  constexpr int WIDE = (REGISTERS / 2) / TOKENS;
  int64_t n = expand_columns<P, TOKENS, WIDE>(h, h_stride, b, d_out, rank, bias, y, y_stride, from, to);
  if constexpr (WIDE > 4) n = expand_columns<P, TOKENS, 4>(h, h_stride, b, d_out, rank, bias, y, y_stride, n, to);
  if constexpr (WIDE > 1) n = expand_columns<P, TOKENS, 1>(h, h_stride, b, d_out, rank, bias, y, y_stride, n, to);
  for (; n < to; ++n)
    for (int t = 0; t < TOKENS; ++t) {
      float s = y[t * y_stride + n] + (bias ? bias[n] : 0.f);
      for (int64_t r = 0; r < rank; ++r) s += h[t * h_stride + r] * widen(b[r * d_out + n]);
      y[t * y_stride + n] = s;
    }
}

template <typename P>
static void expand(const float* h, int64_t h_stride, int64_t start, int64_t end, const P* b, int64_t d_out,
                   int64_t rank, const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to) {
  int64_t t = start;
  for (; t + 4 <= end; t += 4)
    expand_tokens<P, 4>(h + t * h_stride, h_stride, b, d_out, rank, bias, y + t * y_stride, y_stride, from, to);
  for (; t + 2 <= end; t += 2)
    expand_tokens<P, 2>(h + t * h_stride, h_stride, b, d_out, rank, bias, y + t * y_stride, y_stride, from, to);
  for (; t < end; ++t)
    expand_tokens<P, 1>(h + t * h_stride, h_stride, b, d_out, rank, bias, y + t * y_stride, y_stride, from, to);
}
