// The AVX-512 instructions that the CPU kernels use, by loops, so that the kernels for AVX-512 run where it is not. What
// each does: Intel's Intrinsics Guide. To be included before everything else, for a target with AVX2.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>

#define __AVX512F__ 1
#if defined(VNNI_BY_LOOPS)
#define __AVX512VNNI__ 1
#endif

namespace by_loops {

template <typename Lane, typename Vector, int N = sizeof(Vector) / sizeof(Lane)>
struct Lanes {
  Lane lane[N];
  explicit Lanes(const Vector& from) { memcpy(lane, &from, sizeof from); }
};

// A vector of To, each from one lane of From.
template <typename To, typename From, typename Result, typename Vector, typename Convert>
Result each(const Vector& from, Convert convert) {
  const Lanes<From, Vector> in(from);
  To out[sizeof(Vector) / sizeof(From)];
  std::transform(std::begin(in.lane), std::end(in.lane), out, convert);
  Result result;
  static_assert(sizeof out == sizeof result);
  memcpy(&result, out, sizeof out);
  return result;
}

inline __m512i loadu_si512(const void* from) {
  __m512i result;
  memcpy(&result, from, sizeof result);
  return result;
}
inline __m512i set1_epi32(int32_t x) { return each<int32_t, int32_t, __m512i>(__m512i{}, [=](int32_t) { return x; }); }
inline __m512i slli_epi32(__m512i v, int count) {
  return each<uint32_t, uint32_t, __m512i>(v, [=](uint32_t x) { return x << count; });
}
inline __m512i cvtepu16_epi32(__m256i v) { return each<int32_t, uint16_t, __m512i>(v, [](uint16_t x) { return x; }); }
inline __m512i cvtepi8_epi16(__m256i v) { return each<int16_t, int8_t, __m512i>(v, [](int8_t x) { return x; }); }
inline __m512i cvtps_epi32(__m512 v) {
  return each<int32_t, float, __m512i>(v, [](float x) { return _mm_cvtss_si32(_mm_set_ss(x)); });
}
inline __m512 cvtph_ps(__m256i v) { return each<float, uint16_t, __m512>(v, [](uint16_t x) { return _cvtsh_ss(x); }); }
inline __m256i cvtps_ph(__m512 v, int) {
  return each<uint16_t, float, __m256i>(v, [](float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); });
}
inline float reduce_add_ps(__m512 v) {
  float sum = 0;
  for (float x : Lanes<float, __m512>(v).lane) sum += x;
  return sum;
}
inline float reduce_max_ps(__m512 v) {
  const Lanes<float, __m512> in(v);
  return *std::max_element(std::begin(in.lane), std::end(in.lane));
}
// sum + Σ a · b over the lanes of A and B that lie in one of 32 bits.
template <typename A, typename B>
inline __m512i products(__m512i sum, __m512i a, __m512i b) {
  const Lanes<A, __m512i> as(a);
  const Lanes<B, __m512i> bs(b);
  Lanes<int32_t, __m512i> sums(sum);
  constexpr int SIDE = 4 / sizeof(A);
  for (int i = 0; i < 16 * SIDE; ++i) sums.lane[i / SIDE] += (int32_t)as.lane[i] * bs.lane[i];
  return loadu_si512(sums.lane);
}
inline __m512i madd_epi16(__m512i a, __m512i b) { return products<int16_t, int16_t>(__m512i{}, a, b); }
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) { return products<uint8_t, int8_t>(sum, a, b); }

}  // namespace by_loops

#undef _mm512_cvtps_ph
#undef _mm512_slli_epi32
#define _mm512_loadu_si512 by_loops::loadu_si512
#define _mm512_set1_epi32 by_loops::set1_epi32
#define _mm512_slli_epi32 by_loops::slli_epi32
#define _mm512_cvtepu16_epi32 by_loops::cvtepu16_epi32
#define _mm512_cvtepi8_epi16 by_loops::cvtepi8_epi16
#define _mm512_cvtps_epi32 by_loops::cvtps_epi32
#define _mm512_cvtph_ps by_loops::cvtph_ps
#define _mm512_cvtps_ph by_loops::cvtps_ph
#define _mm512_reduce_add_ps by_loops::reduce_add_ps
#define _mm512_reduce_max_ps by_loops::reduce_max_ps
#define _mm512_madd_epi16 by_loops::madd_epi16
#define _mm512_dpbusd_epi32 by_loops::dpbusd_epi32
