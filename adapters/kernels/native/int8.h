// W in 8 bits: w ≈ scale · q, one scale for each output and GROUP inputs (symmetric, round to nearest). Opt-in.
//
// x is brought to whole numbers too, by a scale for each row and group, of 8 bits where the user wants the inputs
// quantised, else of 16: then its rounding is a hundredth of what the weights' does. The processor's products of whole
// numbers do the work, mostly several in each lane. Those of 8 bits take 16 bits as a high and a low part ("planes"),
// and VNNI's one side unsigned, so that q + 128 stands for q and 128 · Σx is taken off. The sums are the same on all
// processors.
//
// A group of weights meets all rows before the next one does: it comes from memory once, and in order. The sums of all
// rows lie in the first cache meanwhile.
#pragma once

#include <type_traits>

#include "product.h"

constexpr int64_t GROUP = 64;

// Input: what x is made of. SIDE: neighbouring inputs that meet in one lane. OFFSET: what is added to q.
// products: sum + Σ w · x over these, for each lane; w from `weights`, the SIDE inputs from `spread`.
#if defined(__AVX512VNNI__)
typedef int8_t Input;
constexpr int SIDE = 4, OFFSET = 128;
static inline __m512i weights(const int8_t* q) { return _mm512_loadu_si512(q); }
static inline __m512i spread(const Input* x) { return _mm512_set1_epi32(read<int32_t>(x)); }
static inline vi products(vi sum, __m512i w, __m512i x) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, w, x); }
#elif defined(__AVX512F__)
typedef int16_t Input;
constexpr int SIDE = 2, OFFSET = 0;
static inline __m512i weights(const int8_t* q) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)q)); }
static inline __m512i spread(const Input* x) { return _mm512_set1_epi32(read<int32_t>(x)); }
static inline vi products(vi sum, __m512i w, __m512i x) { return sum + (vi)_mm512_madd_epi16(w, x); }
#elif defined(__AVXVNNI__)
typedef int8_t Input;
constexpr int SIDE = 4, OFFSET = 128;
static inline __m256i weights(const int8_t* q) { return _mm256_loadu_si256((const __m256i*)q); }
static inline __m256i spread(const Input* x) { return _mm256_set1_epi32(read<int32_t>(x)); }
static inline vi products(vi sum, __m256i w, __m256i x) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, w, x); }
#elif defined(__AVX2__)
typedef int16_t Input;
constexpr int SIDE = 2, OFFSET = 0;
static inline __m256i weights(const int8_t* q) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)q)); }
static inline __m256i spread(const Input* x) { return _mm256_set1_epi32(read<int32_t>(x)); }
static inline vi products(vi sum, __m256i w, __m256i x) { return sum + (vi)_mm256_madd_epi16(w, x); }
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int8_t Input;
constexpr int SIDE = 4, OFFSET = 0;
static inline int8x16_t weights(const int8_t* q) { return vld1q_s8(q); }
static inline int8x16_t spread(const Input* x) { return (int8x16_t)vdupq_n_s32(read<int32_t>(x)); }
static inline vi products(vi sum, int8x16_t w, int8x16_t x) { return (vi)vdotq_s32((int32x4_t)sum, w, x); }
#else
typedef int16_t Input;
constexpr int SIDE = 1, OFFSET = 0;
static inline int16x4_t weights(const int8_t* q) {
  return vget_low_s16(vmovl_s8((int8x8_t)vdup_n_s32(read<int32_t>(q))));
}
static inline int16x4_t spread(const Input* x) { return vdup_n_s16(*x); }
static inline vi products(vi sum, int16x4_t w, int16x4_t x) { return (vi)vmlal_s16((int32x4_t)sum, w, x); }
#endif

// What the compiler unrolls of a block's products: on other processors too it would run out of registers.
constexpr int UNROLLED = VL == 16 ? 16 : 1;

static inline int64_t groups_of(int64_t d_in) { return (d_in + GROUP - 1) / GROUP; }

// A panel is a row of these, one for each group of inputs.
struct WeightGroup {
  float scale[PANEL];
  int8_t q[GROUP / SIDE][PANEL][SIDE];
};

// w: [d_out, d_in] fp32 -> packed [panels][groups]
static void pack_groups(const float* w, int64_t d_out, int64_t d_in, WeightGroup* packed) {
  const int64_t groups = groups_of(d_in);
#pragma omp parallel for
  for (int64_t panel = 0; panel < panels_of(d_out); ++panel)
    for (int64_t g = 0; g < groups; ++g) {
      WeightGroup& group = packed[panel * groups + g];
      memset(&group, 0, sizeof group);
      const int64_t count = d_in - g * GROUP < GROUP ? d_in - g * GROUP : GROUP;
      for (int64_t j = 0; j < PANEL && panel * PANEL + j < d_out; ++j) {
        const float* row = w + (panel * PANEL + j) * d_in + g * GROUP;
        float most = 0;
        for (int64_t k = 0; k < count; ++k) most = __builtin_fabsf(row[k]) > most ? __builtin_fabsf(row[k]) : most;
        group.scale[j] = most / 127.f;
        for (int64_t k = 0; k < count; ++k) {
          const int q = most > 0 ? (int)__builtin_nearbyintf(row[k] / group.scale[j]) : 0;
          group.q[k / SIDE][j][k % SIDE] = (int8_t)(q + OFFSET);
        }
      }
    }
}

// Lines of memory that a block asks for, spread over its products: in a row they would keep it waiting for the first ones.
// What it asks for lies DISTANCE behind the group that it reads.
constexpr int64_t ASKED = GROUP / 4;  // times, for each plane of x (below)
struct Asking {
  const char* at;
  int64_t step;
  // HALF_LINES / 2 lines at each of successive calls. FEW rows only wait for them: into the first cache. With more rows
  // lines on their way there delay the loads of x: into the second.
  template <int HALF_LINES, bool FEW>
  void ask(int64_t call) {
#pragma GCC unroll 2
    for (int64_t i = HALF_LINES * call / 2; i < HALF_LINES * (call + 1) / 2; ++i, at += step)
      __builtin_prefetch(at, 0, FEW ? 3 : 2);
  }
};

// x in whole numbers, the highest plane first: [groups][planes][rows][GROUP], and for each group and row a scale and
// −OFFSET · Σx. Rows lie at a distance that the compiler knows: else it is addresses that the products wait for.
struct InputGroup {
  float scale;
  int32_t offset;
};
struct Quantised {
  Input* x;
  InputGroup* scale;
  int64_t groups, rows, steps;  // steps: the largest whole number
  static int64_t planes(int64_t steps) { return sizeof(Input) == 1 && steps > 127 ? 2 : 1; }
  static int64_t inputs(int64_t groups, int64_t rows, int64_t steps) { return groups * rows * planes(steps) * GROUP; }
  static int64_t bytes(int64_t groups, int64_t rows, int64_t steps) {
    return inputs(groups, rows, steps) * (int64_t)sizeof(Input) + groups * rows * (int64_t)sizeof(InputGroup);
  }
};

// Of x beside a W in this form; 0: x in fp32.
static inline int64_t steps_of(int32_t form) { return form == INT8_DYNAMIC ? 127 : form == INT8 ? 127 * 256 : 0; }

// Stores the lowest bits.
static inline void narrow(Input* to, vi q) {
#if defined(__ARM_FEATURE_DOTPROD)  // the compiler takes each lane by itself
  const int16x4_t half = vmovn_s32((int32x4_t)q);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(half, half));
  memcpy(to, &bytes, VL);
#else
  typedef Input Inputs __attribute__((vector_size(VL * sizeof(Input))));
  const Inputs inputs = __builtin_convertvector(q, Inputs);
  memcpy(to, &inputs, sizeof inputs);
#endif
}

// One group: inputs that are not finite become zero, and the scale NaN.
static inline InputGroup quantise(const float* x, float steps, Input* high, Input* low) {
  constexpr int PARTS = GROUP / VL;
  constexpr int32_t INFINITE = 0x7f800000;
  vi most = {};  // as integers, magnitudes are in order, and what is not finite is largest
  for (int i = 0; i < PARTS; ++i) {
    const vi size = (vi)load(x + i * VL) & 0x7fffffff;
    most = size > most ? size : most;
  }
  const float highest = largest((vf)(most > INFINITE ? INFINITE + (vi){} : most));
  const bool finite = highest <= __FLT_MAX__;
  const float factor = highest <= steps * 1e-38f ? 0.f : steps / highest;  // else not finite: as good as zero
  vi total = {};
  for (int i = 0; i < PARTS; ++i) {
    vi q = nearest(load(x + i * VL) * factor) & (finite ? -1 : 0);
    total += q;
    if (low) {
      narrow(low + i * VL, q);
      q = (q + 128) >> 8;  // the low part is signed
    }
    narrow(high + i * VL, q);
  }
  const float sum_of_all = OFFSET ? sum(__builtin_convertvector(total, vf)) : 0.f;  // below 2^24: exact
  return {finite ? highest / steps : __builtin_nanf(""), -OFFSET * (int32_t)sum_of_all};
}

static inline void quantise_row(const float* x, int64_t d_in, const Quantised& to, int64_t row) {
  const int64_t planes = Quantised::planes(to.steps);
  for (int64_t g = 0; g < to.groups; ++g) {
    const int64_t count = d_in - g * GROUP;
    float padded[GROUP];
    if (count < GROUP) {
      memset(padded, 0, sizeof padded);
      memcpy(padded, x + g * GROUP, count * 4);
    }
    Input* high = to.x + (g * planes * to.rows + row) * GROUP;
    to.scale[g * to.rows + row] = quantise(count < GROUP ? padded : x + g * GROUP, (float)to.steps, high,
                                           planes == 2 ? high + to.rows * GROUP : nullptr);
  }
}

// Rows of a block of products: their sums stay in registers.
constexpr int DOT_ROWS = VL == 16 ? 12 : 6;

template <int PLANES, int ROWS, int HALF_LINES>
static inline void add_dots(const Quantised& x, int64_t row, int64_t g, const WeightGroup& group, float* sums,
                            Asking asking) {
  const Input* in = x.x + (g * PLANES * x.rows + row) * GROUP;
  const InputGroup* inputs = x.scale + g * x.rows + row;
  vi dots[ROWS][NV];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) dots[m][v] = (OFFSET && PLANES == 1 ? inputs[m].offset : 0) + (vi){};
#pragma GCC unroll 1
  for (int plane = 0; plane < PLANES; ++plane, in += x.rows * GROUP) {
    if (plane)
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) dots[m][v] <<= 8;
    const WeightGroup* here = &group;
    __asm__ volatile("" : "+r"(here));  // else the compiler loads all of them once, into registers that it has not
#pragma GCC unroll UNROLLED
    for (int64_t k = 0; k < GROUP / SIDE; ++k) {
      if (k * SIDE % 4 == 0) asking.ask<HALF_LINES, (ROWS <= 2)>(k * SIDE / 4);
      decltype(weights(nullptr)) w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = weights(here->q[k][v * VL]);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        const auto some = spread(in + m * GROUP + k * SIDE);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) dots[m][v] = products(dots[m][v], w[v], some);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* sum = sums + m * PANEL + v * VL;
      if (OFFSET && PLANES > 1) dots[m][v] += inputs[m].offset;
      const vf scaled = load(group.scale + v * VL) * __builtin_convertvector(dots[m][v], vf);
      store(sum, load(sum) + inputs[m].scale * scaled);
    }
}

template <int PLANES, int ROWS, int HALF_LINES>
static inline void add_rows(int64_t rows, const Quantised& x, int64_t row, int64_t g, const WeightGroup& group,
                            float* sums, const Asking& asking) {
  if (rows == ROWS)
    add_dots<PLANES, ROWS, HALF_LINES>(x, row, g, group, sums, asking);
  else if constexpr (ROWS > 1)
    add_rows<PLANES, ROWS - 1, HALF_LINES>(rows, x, row, g, group, sums, asking);
}

// What block b asks for, where `wanted`; what does not fit into its products, at once. The compiler must not know the
// step, or it gathers what is asked for.
template <int HALF_LINES, int PLANES>
static inline Asking asking_for(const WeightGroup& group, int64_t b, int64_t blocks, bool wanted) {
  if (!wanted) return Asking{(const char*)&group, 0};
  constexpr int64_t ALL = sizeof group / 64;
  Asking asking{(const char*)&group + DISTANCE + ALL * b / blocks * 64, 64};
  constexpr int64_t MOST = ASKED * PLANES * HALF_LINES / 2;
  for (int64_t more = ALL * (b + 1) / blocks - ALL * b / blocks - MOST; more > 0; --more) asking.ask<2, false>(0);
  return asking;
}

static inline void put(const float* sums, int64_t rows, int64_t columns, const float* bias, float* y,
                       int64_t y_stride) {
  if (columns == PANEL) {
    for (int64_t row = 0; row < rows; ++row)
      for (int v = 0; v < NV; ++v) {
        const vf s = load(sums + row * PANEL + v * VL);
        store(y + row * y_stride + v * VL, bias ? s + load(bias + v * VL) : s);
      }
    return;
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < columns; ++j)
      y[row * y_stride + j] = bias ? sums[row * PANEL + j] + bias[j] : sums[row * PANEL + j];
}

constexpr int64_t SUMMED_ROWS = 64;

template <int PLANES>
static void multiply_planes(const Quantised& x, int64_t first, int64_t last, const WeightGroup* packed, int64_t d_out,
                            const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to) {
  alignas(64) float sums[SUMMED_ROWS * PANEL];
  for (int64_t panel = from; panel < to; ++panel)
    for (int64_t start = first; start < last; start += SUMMED_ROWS) {
      const int64_t rows = last - start < SUMMED_ROWS ? last - start : SUMMED_ROWS;
      const int64_t blocks = (rows + DOT_ROWS - 1) / DOT_ROWS;
      memset(sums, 0, rows * PANEL * 4);
      for (int64_t g = 0; g < x.groups; ++g) {
        const WeightGroup& group = packed[panel * x.groups + g];
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
          const auto add = [&](auto halves) {
            const Asking asking = asking_for<halves.value, PLANES>(group, b, blocks, start == first);
            add_rows<PLANES, DOT_ROWS, halves.value>(count, x, start + row, g, group, sums + row * PANEL, asking);
          };
          constexpr int HALF_LINES = 2 * sizeof(WeightGroup) / 64 / ASKED / PLANES;
          if (blocks == 1)
            add(std::integral_constant<int, HALF_LINES>());
          else if (blocks == 2)
            add(std::integral_constant<int, HALF_LINES / 2>());
          else
            add(std::integral_constant<int, 0>());
        }
      }
      const int64_t n = panel * PANEL, columns = d_out - n < PANEL ? d_out - n : PANEL;
      put(sums, rows, columns, bias ? bias + n : nullptr, y + start * y_stride + n, y_stride);
    }
}

// Rows [first, last) of x against panels [from, to), as `multiply` of product.h.
static void multiply_dots(const Quantised& x, int64_t first, int64_t last, const WeightGroup* packed, int64_t d_out,
                          const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to) {
  if constexpr (sizeof(Input) == 1)
    if (Quantised::planes(x.steps) == 2)
      return multiply_planes<2>(x, first, last, packed, d_out, bias, y, y_stride, from, to);
  multiply_planes<1>(x, first, last, packed, d_out, bias, y, y_stride, from, to);
}
