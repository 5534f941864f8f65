// Vectors of fp32 in the widest registers of the target, loads that widen 16-bit numbers to fp32, stores that round.
// Compiled once for each instruction set (see ../build.py); nothing here may be shared between those objects.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int VL = 16;        // fp32 lanes
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
#include <immintrin.h>
constexpr int VL = 8;
constexpr int REGISTERS = 16;
#elif defined(__ARM_NEON)
#include <arm_neon.h>
constexpr int VL = 4;
constexpr int REGISTERS = 32;
#else
#error "no vector code for this target: use the torch path"
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vu16 __attribute__((vector_size(VL * 2)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));

enum Dtype : int32_t { F32 = 0, F16 = 1, BF16 = 2 };  // places in POOL_DTYPES (contract.py)
enum Quantisation : int32_t { INT8 = 3, INT8_DYNAMIC = 4 };  // further dtypes of a packed W (int8.h)
struct half { uint16_t bits; };
struct bfloat { uint16_t bits; };

template <typename Visit>
static inline void with_type(int32_t dtype, Visit visit) {
  if (dtype == F32) visit((float*)nullptr);
  if (dtype == F16) visit((half*)nullptr);
  if (dtype == BF16) visit((bfloat*)nullptr);
}

template <typename T>
static inline T read(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

static inline vf splat(float x) { return x - (vf){}; }
static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline void store(float* p, vf v) { *(vf_any*)p = v; }

// load: widened; sum, largest: of all lanes; nearest: whole numbers, half way between two the even one.
#if defined(__AVX512F__)
static inline vf load(const half* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline vf load(const bfloat* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static inline float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
static inline float largest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
static inline vi nearest(vf v) { return (vi)_mm512_cvtps_epi32((__m512)v); }
#elif defined(__AVX2__)
static inline vf load(const half* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline vf load(const bfloat* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
static inline float sum(vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float largest(vf v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline vi nearest(vf v) { return (vi)_mm256_cvtps_epi32((__m256)v); }
#else
static inline vf load(const half* p) { return (vf)vcvt_f32_f16(vld1_f16((const __fp16*)p)); }
static inline vf load(const bfloat* p) { return (vf)vshll_n_u16(vld1_u16((const uint16_t*)p), 16); }
static inline float sum(vf v) { return vaddvq_f32((float32x4_t)v); }
static inline float largest(vf v) { return vmaxvq_f32((float32x4_t)v); }
static inline vi nearest(vf v) { return (vi)vcvtnq_s32_f32((float32x4_t)v); }
#endif

static inline float widen(float x) { return x; }
static inline float widen(bfloat x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  return read<float>(&bits);
}
static inline float widen(half x) {
#if defined(__ARM_NEON)
  __fp16 h;
  memcpy(&h, &x, 2);
  return h;
#else
  return _cvtsh_ss(x.bits);
#endif
}

// The sums of N = VL vectors (v[0], v[stride], …), as one vector: each step adds lanes of two vectors into one.
template <int N>
struct Sums {
  static inline vf of(const vf* v, int stride = 1) {
    const vf even = Sums<N / 2>::of(v, 2 * stride), odd = Sums<N / 2>::of(v + stride, 2 * stride);
    constexpr int step = VL / N;  // lanes that belong to one sum stand next to each other in groups of 2 · step
    vi low, high;
    for (int i = 0; i < VL; ++i) {
      const int block = i / (2 * step), inside = i % (2 * step);
      low[i] = (inside < step ? 0 : VL) + block * 2 * step + inside % step;
      high[i] = low[i] + step;
    }
    return __builtin_shuffle(even, odd, low) + __builtin_shuffle(even, odd, high);
  }
};
template <>
struct Sums<1> {
  static inline vf of(const vf* v, int) { return *v; }
};

static inline vf max(vf a, vf b) { return a > b ? a : b; }

// What is finite stays finite: numbers beyond `most` become that; infinity and NaN stay what they are.
static inline vf clamp(vf x, float most) {
  const vf high = splat(most), largest = splat(__FLT_MAX__);
  x = (x > high) & (x <= largest) ? high : x;
  return (x < -high) & (x >= -largest) ? -high : x;
}

// Stores of 16-bit numbers, rounded to nearest even.
static inline void store(bfloat* p, vf v) {
  const vu bits = (vu)clamp(v, 0x1.fep127f);
  const vu rounded = v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;  // a NaN stays one
  const vu16 narrow = __builtin_convertvector(rounded, vu16);
  memcpy(p, &narrow, sizeof narrow);
}
static inline void store(half* p, vf v) {
  v = clamp(v, 65504.f);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  vst1_f16((__fp16*)p, vcvt_f16_f32((float32x4_t)v));
#endif
}

// e^x within 2 units in the last place; exactly 0 below -87.3, so that a masked score has no weight at all.
static inline vf exp(vf x) {
  const vf low = splat(-87.33f), high = splat(88.37f);
  vf c = x < low ? low : x;
  c = c > high ? high : c;
  const vf shifter = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer
  vf n = (c * 1.44269504088896341f + shifter) - shifter;
  vf r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  vf y = p * (vf)power;
  return x < low ? (vf){} : y;
}

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
