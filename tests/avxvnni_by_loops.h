// The one AVX-VNNI instruction that the CPU kernels use, by loops. To be included before everything else, for AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVXVNNI__ 1

namespace by_loops {

inline __m256i dpbusd(__m256i sum, __m256i a, __m256i b) {
  uint8_t as[32];
  int8_t bs[32];
  int32_t sums[8];
  memcpy(as, &a, sizeof as), memcpy(bs, &b, sizeof bs), memcpy(sums, &sum, sizeof sums);
  for (int i = 0; i < 32; ++i) sums[i / 4] += as[i] * bs[i];
  return _mm256_loadu_si256((const __m256i*)sums);
}

}  // namespace by_loops

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 by_loops::dpbusd
