// The LoRA term of one segment (tokens of one adapter): h = scaling · x aᵀ ("shrink"), y += h b + bias ("expand").
// a: [rank, d_in], b: [rank, d_out], both rank-major, in any of the pool's dtypes; all arithmetic in fp32.
// With few tokens this is a matter of memory alone: a and b stream by once, and what follows is asked for ahead.
// DoRA: where y holds the base's product too, all of it becomes gain ⊙ y + shift ("rescale"; adapters/dora.py).
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
  const float* gain;   // [d_out] or null
  const float* shift;  // [d_out] or null
};

struct Segment {  // tokens [start, end) have the adapter in `slot`
  int32_t slot, start, end;
};

constexpr int RANK_BLOCK = 4;    // rows of a in one unit of work
constexpr int TOKEN_BLOCK = 32;  // tokens in one unit of work
constexpr int TOKENS_AT_ONCE = REGISTERS >= 32 ? 4 : 2;

// h[t][r] for TOKENS tokens and RANKS rows of a. AHEAD: ask for the rows that follow these.
template <typename P, int TOKENS, int RANKS, bool AHEAD>
static inline void shrink_block(const float* x, int64_t x_stride, const P* a, int64_t d_in, float scaling, float* h,
                                int64_t h_stride) {
  constexpr int COUNT = TOKENS * RANKS;
  vf acc[COUNT];
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) acc[i] = (vf){};
  const char* ahead = (const char*)(a + RANKS * d_in);
  int64_t k = 0;
  for (; k + VL <= d_in; k += VL) {
    if (AHEAD) {
#pragma GCC unroll 8
      for (int line = 0; line < (int)(RANKS * VL * sizeof(P)); line += 64) prefetch(ahead + line);
      ahead += RANKS * VL * sizeof(P);
    }
    vf w[RANKS];
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) w[r] = load(a + r * d_in + k);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const vf in = load(x + t * x_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < RANKS; ++r) acc[t * RANKS + r] += in * w[r];
    }
  }
  float sums[COUNT];
  if constexpr (COUNT % VL == 0) {
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i += VL) store(sums + i, Sums<VL>::of(acc + i, 1));
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) sums[i] = sum(acc[i]);
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < RANKS; ++r) {
      float s = sums[t * RANKS + r];
      for (int64_t rest = k; rest < d_in; ++rest) s += x[t * x_stride + rest] * widen(a[r * d_in + rest]);
      h[t * h_stride + r] = s * scaling;
    }
}

// h[t][0 … ranks), `ranks` at most RANKS.
template <typename P, int TOKENS, int RANKS, bool AHEAD>
static inline void shrink_ranks(const float* x, int64_t x_stride, const P* a, int64_t d_in, int64_t ranks,
                                float scaling, float* h, int64_t h_stride) {
  if (ranks == RANKS)
    shrink_block<P, TOKENS, RANKS, AHEAD>(x, x_stride, a, d_in, scaling, h, h_stride);
  else if constexpr (RANKS > 1)
    shrink_ranks<P, TOKENS, RANKS - 1, AHEAD>(x, x_stride, a, d_in, ranks, scaling, h, h_stride);
}

// A unit of work: tokens [start, end), rows [rank, rank + ranks) of a, at most RANK_BLOCK of them.
template <typename P>
static void shrink(const float* x, int64_t x_stride, int64_t start, int64_t end, const P* a, int64_t d_in, int64_t rank,
                   int64_t ranks, float scaling, float* h, int64_t h_stride) {
  int64_t t = start;
  for (; t + TOKENS_AT_ONCE <= end; t += TOKENS_AT_ONCE)
    shrink_ranks<P, TOKENS_AT_ONCE, RANK_BLOCK, false>(x + t * x_stride, x_stride, a + rank * d_in, d_in, ranks,
                                                       scaling, h + t * h_stride + rank, h_stride);
  for (; t < end; ++t)
    shrink_ranks<P, 1, RANK_BLOCK, false>(x + t * x_stride, x_stride, a + rank * d_in, d_in, ranks, scaling,
                                          h + t * h_stride + rank, h_stride);
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

// y[t] += Σ h[t][r] · b[r] over RANKS whole rows of b for TOKENS tokens; asks for the rows that follow.
template <typename P, int TOKENS, int RANKS>
static inline void expand_rows(const float* h, int64_t h_stride, const P* b, int64_t d_out, float* y,
                               int64_t y_stride) {
  const char* ahead = (const char*)(b + RANKS * d_out);
  int64_t n = 0;
  for (; n + VL <= d_out; n += VL) {
#pragma GCC unroll 8
    for (int line = 0; line < (int)(RANKS * VL * sizeof(P)); line += 64) prefetch(ahead + line);
    ahead += RANKS * VL * sizeof(P);
    vf acc[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) acc[t] = load(y + t * y_stride + n);
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) {
      const vf w = load(b + r * d_out + n);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) acc[t] += h[t * h_stride + r] * w;
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) store(y + t * y_stride + n, acc[t]);
  }
  for (; n < d_out; ++n)
    for (int r = 0; r < RANKS; ++r)
      for (int t = 0; t < TOKENS; ++t) y[t * y_stride + n] += h[t * h_stride + r] * widen(b[r * d_out + n]);
}

// Both halves for TOKENS tokens of one adapter, a and b read from end to end.
template <typename P, int TOKENS>
static inline void stream_tokens(const float* x, int64_t x_stride, const Term& term, int64_t d_in, int64_t d_out,
                                 float* h, int64_t h_stride, float* y, int64_t y_stride) {
  constexpr int RANKS = TOKENS == 1 ? 8 : 4;
  const P *a = (const P*)term.a, *b = (const P*)term.b;
  for (int64_t r = 0; r < term.rank; r += RANKS)
    shrink_ranks<P, TOKENS, RANKS, true>(x, x_stride, a + r * d_in, d_in, term.rank - r < RANKS ? term.rank - r : RANKS,
                                         term.scaling, h + r, h_stride);
  int64_t r = 0;
  for (; r + RANKS <= term.rank; r += RANKS)
    expand_rows<P, TOKENS, RANKS>(h + r, h_stride, b + r * d_out, d_out, y, y_stride);
  for (; r < term.rank; ++r) expand_rows<P, TOKENS, 1>(h + r, h_stride, b + r * d_out, d_out, y, y_stride);
  if (term.bias)
    for (int t = 0; t < TOKENS; ++t)
      for (int64_t n = 0; n < d_out; ++n) y[t * y_stride + n] += term.bias[n];
}

template <typename P>
static void stream(const float* x, int64_t x_stride, int64_t start, int64_t end, const Term& term, int64_t d_in,
                   int64_t d_out, float* h, int64_t h_stride, float* y, int64_t y_stride) {
  int64_t t = start;
  for (; t + TOKENS_AT_ONCE <= end; t += TOKENS_AT_ONCE)
    stream_tokens<P, TOKENS_AT_ONCE>(x + t * x_stride, x_stride, term, d_in, d_out, h + t * h_stride, h_stride,
                                     y + t * y_stride, y_stride);
  for (; t < end; ++t)
    stream_tokens<P, 1>(x + t * x_stride, x_stride, term, d_in, d_out, h + t * h_stride, h_stride, y + t * y_stride,
                        y_stride);
}

// Rows [start, end) of y, columns [from, to), of a term that has a gain.
static inline void rescale(const Term& term, int64_t start, int64_t end, float* y, int64_t y_stride, int64_t from,
                           int64_t to) {
  for (int64_t t = start; t < end; ++t) {
    float* row = y + t * y_stride;
    int64_t n = from;
    for (; n + VL <= to; n += VL) {
      const vf scaled = load(term.gain + n) * load(row + n);
      store(row + n, term.shift ? scaled + load(term.shift + n) : scaled);
    }
    for (; n < to; ++n) row[n] = term.gain[n] * row[n] + (term.shift ? term.shift[n] : 0.f);
  }
}
