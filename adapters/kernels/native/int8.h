// W in 8 bits: w ≈ scale · q, one scale for each output and GROUP inputs (symmetric, round to nearest). Opt-in.
//
// The processor's 8-bit products (VNNI) do the work: x is brought to whole numbers by a scale for each row and group, of
// 8 bits where the user wants the inputs quantised too, else of 16, a high and a low part of 8 bits each ("planes"). The
// products take one side unsigned, so q + 128 stands for q and 128 · Σx is taken off. Without VNNI, q is widened to fp32
// and x stays as it is.
//
// A group of weights meets all rows before the next one does: it comes from memory once, and in order. The sums of all
// rows lie in the first cache meanwhile.
#pragma once

#include <type_traits>

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
  uint8_t q[GROUP / 4][PANEL][4];  // + 128
};

static inline void place(WeightGroup& group, int64_t k, int64_t j, int q) { group.q[k][j] = (int8_t)q; }
static inline void place(DotGroup& group, int64_t k, int64_t j, int q) {
  group.q[k / 4][j][k % 4] = (uint8_t)(q + 128);
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
          place(group, k, j, most > 0 ? (int)__builtin_nearbyintf(row[k] / group.scale[j]) : 0);
      }
    }
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

// Rows of fp32 x against 8-bit weights, widened where they are used or, for more than one block of rows, once for all.
template <bool ONCE>
struct Weights {
  typedef WeightGroup Group;
  static constexpr int PLANES = 1;
  static constexpr int ROWS = ONCE || MAX_ROWS <= 8 ? MAX_ROWS - 1 : 8;  // in a block
  const float* x;
  int64_t x_stride, d_in;
  alignas(64) float wide[ONCE ? GROUP : 1][PANEL];

  static vf widened(const WeightGroup& group, int64_t k, int v) {
    return load(group.q[k] + v * VL) * load(group.scale + v * VL);
  }

  void open(const WeightGroup& group) {
    if constexpr (ONCE) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < GROUP; ++k)
        for (int v = 0; v < NV; ++v) store(wide[k] + v * VL, widened(group, k, v));
    }
  }

  template <int ROWS, int HALF_LINES>
  void add(int64_t row, int64_t g, const WeightGroup& group, float* sums, Asking asking) const {
    vf acc[ROWS][NV];
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] = load(sums + m * PANEL + v * VL);
    const int64_t count = d_in - g * GROUP < GROUP ? d_in - g * GROUP : GROUP;
    const float* in = x + row * x_stride + g * GROUP;
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k) {
      if (k % 4 == 0) asking.ask<HALF_LINES, (ROWS <= 2)>(k / 4);
      vf w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = ONCE ? load(wide[ONCE ? k : 0] + v * VL) : widened(group, k, v);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] += in[m * x_stride + k] * w[v];
    }
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < NV; ++v) store(sums + m * PANEL + v * VL, acc[m][v]);
  }
};

// x in planes of 8 bits, the highest first: [groups][planes][rows][GROUP], and for each group and row a scale and
// −128 · Σx. Rows lie at a distance that the compiler knows: else it is addresses that the products wait for.
struct InputGroup {
  float scale;
  int32_t offset;
};
struct Quantised {
  int8_t* x;
  InputGroup* scale;
  int64_t groups, rows, planes;
  static int64_t bytes(int64_t groups, int64_t rows, int64_t planes) {
    return groups * rows * (planes * GROUP + (int64_t)sizeof(InputGroup));
  }
};

#if defined(__AVX512VNNI__)
constexpr bool HAS_DOT = true;

static inline void quantise_row(const float* x, int64_t d_in, const Quantised& quantised, int64_t row) {
  constexpr int PARTS = GROUP / VL;
  const float steps = quantised.planes == 2 ? 127.f * 256 : 127.f;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t g = 0; g * GROUP < d_in; ++g) {
    const int64_t count = d_in - g * GROUP;
    InputGroup& input = quantised.scale[g * quantised.rows + row];
    int8_t* to = quantised.x + (g * quantised.planes * quantised.rows + row) * GROUP;
    __m512 in[PARTS];
    __m512i most = _mm512_setzero_si512();  // as integers, magnitudes are in order, and what is not finite is largest
    for (int i = 0; i < PARTS; ++i) {
      const int64_t left = count - i * VL;
      in[i] = _mm512_maskz_loadu_ps(left >= VL ? 0xffff : left > 0 ? (1 << left) - 1 : 0, x + g * GROUP + i * VL);
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(in[i]), magnitude));
    }
    const int32_t bits = _mm512_reduce_max_epi32(most);
    float highest;
    memcpy(&highest, &bits, 4);
    const bool finite = bits < 0x7f800000;
    input.scale = finite ? highest / steps : __builtin_nanf("");
    const bool tiny = highest <= steps * 1e-38f;  // no finite factor: as good as zero
    const __m512 factor = _mm512_set1_ps(tiny ? 0.f : steps / highest);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < PARTS; ++i, to += VL) {
      __m512i q = _mm512_maskz_cvtps_epi32(finite ? 0xffff : 0, _mm512_mul_ps(in[i], factor));
      total = _mm512_add_epi32(total, q);
      if (quantised.planes == 2) {
        _mm_storeu_si128((__m128i*)(to + quantised.rows * GROUP), _mm512_cvtepi32_epi8(q));
        q = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);  // the low part is signed
      }
      _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(q));
    }
    input.offset = -128 * _mm512_reduce_add_epi32(total);
  }
}

template <int OF>
struct Dots {
  typedef DotGroup Group;
  static constexpr int PLANES = OF;
  static constexpr int ROWS = 12;  // in a block
  const Quantised& x;

  void open(const DotGroup&) {}

  template <int ROWS, int HALF_LINES>
  void add(int64_t row, int64_t g, const DotGroup& group, float* sums, Asking asking) const {
    const int8_t* in = x.x + (g * PLANES * x.rows + row) * GROUP;
    const InputGroup* inputs = x.scale + g * x.rows + row;
    __m512i dots[ROWS][NV];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        dots[m][v] = PLANES == 1 ? _mm512_set1_epi32(inputs[m].offset) : _mm512_setzero_si512();
#pragma GCC unroll 1
    for (int plane = 0; plane < PLANES; ++plane, in += x.rows * GROUP) {
      if (plane)
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) dots[m][v] = _mm512_slli_epi32(dots[m][v], 8);
      const DotGroup* weights = &group;
      __asm__ volatile("" : "+r"(weights));  // else the compiler loads all of them once, into registers that it has not
#pragma GCC unroll 16
      for (int64_t k = 0; k < GROUP / 4; ++k) {
        asking.ask<HALF_LINES, (ROWS <= 2)>(k);
        __m512i w[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) w[v] = _mm512_loadu_si512(weights->q[k][v * VL]);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
          int32_t four;
          memcpy(&four, in + m * GROUP + k * 4, 4);
          const __m512i spread = _mm512_set1_epi32(four);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) dots[m][v] = _mm512_dpbusd_epi32(dots[m][v], w[v], spread);
        }
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* sum = sums + m * PANEL + v * VL;
        if (PLANES > 1) dots[m][v] = _mm512_add_epi32(dots[m][v], _mm512_set1_epi32(inputs[m].offset));
        const vf scaled = load(group.scale + v * VL) * (vf)_mm512_cvtepi32_ps(dots[m][v]);
        store(sum, load(sum) + inputs[m].scale * scaled);
      }
  }
};
#else
constexpr bool HAS_DOT = false;
static inline void quantise_row(const float*, int64_t, const Quantised&, int64_t) {}
#endif

// Of x, that a product with a W in this form takes; 0: x in fp32.
static inline int64_t planes_of(int32_t form) { return form == INT8_DYNAMIC ? 1 : form == INT8 && HAS_DOT ? 2 : 0; }

template <int ROWS, int HALF_LINES, typename Product>
static inline void add_rows(const Product& product, int64_t rows, int64_t row, int64_t g,
                            const typename Product::Group& group, float* sums, const Asking& asking) {
  if (rows == ROWS)
    product.template add<ROWS, HALF_LINES>(row, g, group, sums, asking);
  else if constexpr (ROWS > 1)
    add_rows<ROWS - 1, HALF_LINES>(product, rows, row, g, group, sums, asking);
}

// What block b asks for, where `wanted`; what does not fit into its products, at once. The compiler must not know the
// step, or it gathers what is asked for.
template <int HALF_LINES, int PLANES, typename Group>
static inline Asking asking_for(const Group& group, int64_t b, int64_t blocks, bool wanted) {
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

// Rows [first, last) of x against panels [from, to), as `multiply` of product.h.
template <typename Product>
static void multiply_groups(Product& product, int64_t first, int64_t last, const typename Product::Group* packed,
                            int64_t groups, int64_t d_out, const float* bias, float* y, int64_t y_stride, int64_t from,
                            int64_t to) {
  alignas(64) float sums[SUMMED_ROWS * PANEL];
  for (int64_t panel = from; panel < to; ++panel)
    for (int64_t start = first; start < last; start += SUMMED_ROWS) {
      const int64_t rows = last - start < SUMMED_ROWS ? last - start : SUMMED_ROWS;
      const int64_t blocks = (rows + Product::ROWS - 1) / Product::ROWS;
      memset(sums, 0, rows * PANEL * 4);
      for (int64_t g = 0; g < groups; ++g) {
        const auto& group = packed[panel * groups + g];
        product.open(group);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
          const auto add = [&](auto halves) {
            const Asking asking = asking_for<halves.value, Product::PLANES>(group, b, blocks, start == first);
            add_rows<Product::ROWS, halves.value>(product, count, start + row, g, group, sums + row * PANEL, asking);
          };
          constexpr int HALF_LINES = 2 * sizeof(typename Product::Group) / 64 / ASKED / Product::PLANES;
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

static void multiply_weights(const float* x, int64_t x_stride, int64_t first, int64_t last, const WeightGroup* packed,
                             int64_t d_in, int64_t d_out, const float* bias, float* y, int64_t y_stride, int64_t from,
                             int64_t to) {
  const auto multiply_by = [&](auto product) {
    multiply_groups(product, first, last, packed, groups_of(d_in), d_out, bias, y, y_stride, from, to);
  };
  if (last - first <= Weights<false>::ROWS)
    multiply_by(Weights<false>{x, x_stride, d_in, {}});
  else
    multiply_by(Weights<true>{x, x_stride, d_in, {}});
}

static void multiply_dots(const Quantised& x, int64_t first, int64_t last, const DotGroup* packed, int64_t d_out,
                          const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to) {
#if defined(__AVX512VNNI__)
  const auto multiply_by = [&](auto product) {
    multiply_groups(product, first, last, packed, x.groups, d_out, bias, y, y_stride, from, to);
  };
  if (x.planes == 2)
    multiply_by(Dots<2>{x});
  else
    multiply_by(Dots<1>{x});
#endif
}
