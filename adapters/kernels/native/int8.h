// W in 8 bits: w ≈ scale · q, one scale for each output and GROUP inputs (symmetric, round to nearest). Opt-in.
//
// Weights only: q is widened to fp32 and everything else stays exact. With quantised inputs, x is brought to 8 bits as
// well, by a scale for each row and group, and the processor's 8-bit products (VNNI) do the work; these take x
// unsigned, so x + 128 stands for x and 128 · Σq is taken off.
#pragma once

#include "product.h"

constexpr int64_t GROUP = 64;

static inline int64_t groups_of(int64_t d_in) { return (d_in + GROUP - 1) / GROUP; }

// A panel is a row of these, one for each group of inputs.
struct WeightGroup {
  float scale[PANEL];
  int8_t q[GROUP][PANEL];
};
struct DotGroup {
  float scale[PANEL];
  int32_t offset[PANEL];  // −128 · Σq
  int8_t q[GROUP / 4][PANEL][4];
};

static inline int8_t& place(WeightGroup& group, int64_t k, int64_t j) { return group.q[k][j]; }
static inline int8_t& place(DotGroup& group, int64_t k, int64_t j) { return group.q[k / 4][j][k % 4]; }
static inline void finish(WeightGroup&) {}
static inline void finish(DotGroup& group) {
  for (int64_t j = 0; j < PANEL; ++j) {
    group.offset[j] = 0;
    for (int64_t k = 0; k < GROUP; ++k) group.offset[j] -= 128 * group.q[k / 4][j][k % 4];
  }
}

// w: [d_out, d_in] fp32 -> packed [panels][groups]
template <typename Group>
static void pack_groups(const float* w, int64_t d_out, int64_t d_in, Group* packed) {
  const int64_t groups = groups_of(d_in);
#pragma omp parallel for
  for (int64_t panel = 0; panel < panels_of(d_out); ++panel)
    for (int64_t g = 0; g < groups; ++g) {
      Group& group = packed[panel * groups + g];
      memset(&group, 0, sizeof group);
      const int64_t count = d_in - g * GROUP < GROUP ? d_in - g * GROUP : GROUP;
      for (int64_t j = 0; j < PANEL && panel * PANEL + j < d_out; ++j) {
        const float* row = w + (panel * PANEL + j) * d_in + g * GROUP;
        float most = 0;
        for (int64_t k = 0; k < count; ++k) most = __builtin_fabsf(row[k]) > most ? __builtin_fabsf(row[k]) : most;
        group.scale[j] = most / 127.f;
        for (int64_t k = 0; k < count; ++k)
          place(group, k, j) = most > 0 ? (int8_t)__builtin_nearbyintf(row[k] / group.scale[j]) : 0;
      }
      finish(group);
    }
}

static inline void put(const vf (&acc)[NV], const float* bias, float* y, int64_t columns) {
  float out[PANEL];
  for (int v = 0; v < NV; ++v) store(out + v * VL, acc[v]);
  for (int64_t j = 0; j < columns; ++j) y[j] = bias ? out[j] + bias[j] : out[j];
}

static inline vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  int32_t four;
  memcpy(&four, p, 4);
  return (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
#endif
}

// ROWS rows of fp32 x against one panel of 8-bit weights.
template <int ROWS>
static inline void weights_block(const float* x, int64_t x_stride, const WeightGroup* panel, int64_t d_in,
                                 const float* bias, float* y, int64_t y_stride, int64_t columns) {
  vf acc[ROWS][NV];
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = (vf){};
  for (int64_t g = 0; g * GROUP < d_in; ++g) {
    const WeightGroup& group = panel[g];
    const int64_t count = d_in - g * GROUP < GROUP ? d_in - g * GROUP : GROUP;
    const float* in = x + g * GROUP;
    for (int64_t k = 0; k < count; ++k) {
      if (ROWS <= 4) prefetch((const char*)group.q[k] + 2048);
      vf w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = load(group.q[k] + v * VL) * load(group.scale + v * VL);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] += in[m * x_stride + k] * w[v];
    }
  }
  for (int m = 0; m < ROWS; ++m) put(acc[m], bias, y + m * y_stride, columns);
}

// x in 8 bits: [rows][groups · GROUP] of x + 128, and a scale for each row and group.
struct Quantised {
  uint8_t* x;
  float* scale;
  int64_t groups;
};

static inline void quantise_row(const float* x, int64_t d_in, uint8_t* to, float* scales) {
  for (int64_t g = 0; g * GROUP < d_in; ++g) {
    const int64_t count = d_in - g * GROUP < GROUP ? d_in - g * GROUP : GROUP;
    float padded[GROUP] = {0};
    const float* in = x + g * GROUP;
    if (count < GROUP) in = (const float*)memcpy(padded, in, count * 4);
    vf most = (vf){}, total = (vf){};
    for (int64_t k = 0; k < GROUP; k += VL) {
      const vf v = load(in + k);
      most = max(most, max(v, -v));
      total += v;
    }
    const float highest = largest(most), check = sum(total);
    const bool finite = highest <= 3.4e38f && check == check;  // a NaN is in no maximum, but in the sum
    scales[g] = finite ? highest / 127.f : __builtin_nanf("");
    const float factor = finite && highest > 0 ? 127.f / highest : 0.f;
    const vf shifter = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer
    for (int64_t k = 0; k < GROUP; k += VL) {
      const vi q = __builtin_convertvector((load(in + k) * factor + shifter) - shifter, vi) + 128;
      for (int i = 0; i < VL; ++i) to[g * GROUP + k + i] = (uint8_t)q[i];
    }
  }
}

#if defined(__AVX512VNNI__)
constexpr bool HAS_DOT = true;
template <int ROWS>
static inline void dot_block(const Quantised& x, int64_t row, const DotGroup* panel, const float* bias, float* y,
                             int64_t y_stride, int64_t columns) {
  vf acc[ROWS][NV];
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = (vf){};
  const int64_t stride = x.groups * GROUP;
  for (int64_t g = 0; g < x.groups; ++g) {
    const DotGroup& group = panel[g];
    const uint8_t* in = x.x + row * stride + g * GROUP;
    __m512i dots[ROWS][NV];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) dots[m][v] = _mm512_loadu_si512(group.offset + v * VL);
#pragma GCC unroll 4
    for (int64_t k = 0; k < GROUP / 4; ++k) {
      if (ROWS <= 4) prefetch((const char*)group.q[k] + 4096);
      if (ROWS <= 4) prefetch((const char*)group.q[k] + 4160);
      __m512i w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = _mm512_loadu_si512(group.q[k][v * VL]);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        int32_t four;
        memcpy(&four, in + m * stride + k * 4, 4);
        const __m512i spread = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) dots[m][v] = _mm512_dpbusd_epi32(dots[m][v], spread, w[v]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[m][v] += (x.scale[(row + m) * x.groups + g] * load(group.scale + v * VL)) *
                     (vf)_mm512_cvtepi32_ps(dots[m][v]);
  }
  for (int m = 0; m < ROWS; ++m) put(acc[m], bias, y + m * y_stride, columns);
}
#else
constexpr bool HAS_DOT = false;
template <int ROWS>
static inline void dot_block(const Quantised&, int64_t, const DotGroup*, const float*, float*, int64_t, int64_t) {}
#endif

constexpr int MAX_DOT_ROWS = 6;

template <int ROWS>
static inline void weights_block_of(int64_t rows, const float* x, int64_t x_stride, const WeightGroup* panel,
                                    int64_t d_in, const float* bias, float* y, int64_t y_stride, int64_t columns) {
  if (rows == ROWS)
    weights_block<ROWS>(x, x_stride, panel, d_in, bias, y, y_stride, columns);
  else if constexpr (ROWS > 1)
    weights_block_of<ROWS - 1>(rows, x, x_stride, panel, d_in, bias, y, y_stride, columns);
}

template <int ROWS>
static inline void dot_block_of(int64_t rows, const Quantised& x, int64_t row, const DotGroup* panel, const float* bias,
                                float* y, int64_t y_stride, int64_t columns) {
  if (rows == ROWS)
    dot_block<ROWS>(x, row, panel, bias, y, y_stride, columns);
  else if constexpr (ROWS > 1)
    dot_block_of<ROWS - 1>(rows, x, row, panel, bias, y, y_stride, columns);
}

// As `multiply` of product.h, of 8-bit weights.
static void multiply_weights(const float* x, int64_t x_stride, int64_t first, int64_t last, const WeightGroup* packed,
                             int64_t d_in, int64_t d_out, const float* bias, float* y, int64_t y_stride, int64_t from,
                             int64_t to) {
  constexpr int ROWS = MAX_ROWS - 2;
  const int64_t rows = last - first, blocks = (rows + ROWS - 1) / ROWS;
  for (int64_t panel = from; panel < to; ++panel) {
    const int64_t n = panel * PANEL, columns = d_out - n < PANEL ? d_out - n : PANEL;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = first + rows * b / blocks, end = first + rows * (b + 1) / blocks;
      weights_block_of<ROWS>(end - start, x + start * x_stride, x_stride, packed + panel * groups_of(d_in), d_in,
                             bias ? bias + n : nullptr, y + start * y_stride + n, y_stride, columns);
    }
  }
}

static void multiply_dots(const Quantised& x, int64_t first, int64_t last, const DotGroup* packed, int64_t d_out,
                          const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to) {
  const int64_t rows = last - first, blocks = (rows + MAX_DOT_ROWS - 1) / MAX_DOT_ROWS;
  for (int64_t panel = from; panel < to; ++panel) {
    const int64_t n = panel * PANEL, columns = d_out - n < PANEL ? d_out - n : PANEL;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = first + rows * b / blocks, end = first + rows * (b + 1) / blocks;
      dot_block_of<MAX_DOT_ROWS>(end - start, x, start, packed + panel * x.groups, bias ? bias + n : nullptr,
                                 y + start * y_stride + n, y_stride, columns);
    }
  }
}
