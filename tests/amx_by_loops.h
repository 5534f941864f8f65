// The processor's tiles (AMX), by loops, and the AVX-512 instructions that only they need. To be included before
// everything else, for a target with AVX2.
#pragma once

#define VNNI_BY_LOOPS
#include "avx512_by_loops.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cassert>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1

namespace by_loops {

inline __m512 maskz_loadu_ps(uint16_t mask, const void* from) {
  float out[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) memcpy(out + i, (const char*)from + 4 * i, 4);
  __m512 result;
  memcpy(&result, out, sizeof out);
  return result;
}
template <typename... Number>
__m512i set_epi16(Number... from_the_last) {
  const uint16_t numbers[] = {(uint16_t)from_the_last...};
  uint16_t out[32];
  std::reverse_copy(std::begin(numbers), std::end(numbers), out);
  return loadu_si512(out);
}
inline __m512i permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  const Lanes<uint16_t, __m512i> first(a), second(b);
  return each<uint16_t, uint16_t, __m512i>(
      index, [&](uint16_t i) { return i & 32 ? second.lane[i & 31] : first.lane[i & 31]; });
}
inline void storeu_si512(void* to, __m512i v) { memcpy(to, &v, sizeof v); }

struct Tiles {
  bool open = false;
  int rows[8], bytes[8];
  alignas(64) uint8_t data[8][16][64];

  template <typename T>
  T& at(int tile, int row, int i) {
    assert(open && row < rows[tile] && i * (int)sizeof(T) < bytes[tile]);
    return ((T*)data[tile][row])[i];
  }
};
inline thread_local Tiles tiles;

inline void tile_loadconfig(const void* from) {  // palette, first row, 14 reserved, bytes of each tile, rows of each
  const uint8_t* shapes = (const uint8_t*)from;
  assert(shapes[0] == 1 && shapes[1] == 0);
  for (int tile = 0; tile < 8; ++tile) {
    uint16_t bytes;
    memcpy(&bytes, shapes + 16 + 2 * tile, 2);
    tiles.bytes[tile] = bytes, tiles.rows[tile] = shapes[48 + tile];
    assert(tiles.bytes[tile] <= 64 && tiles.rows[tile] <= 16 && tiles.rows[tile] > 0);
  }
  tiles.open = true;
}
inline void tile_release() { tiles.open = false; }
inline void tile_zero(int tile) {
  assert(tiles.open);
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}
inline void tile_loadd(int tile, const void* from, int64_t stride) {
  tile_zero(tile);
  for (int row = 0; row < tiles.rows[tile]; ++row)
    memcpy(tiles.data[tile][row], (const char*)from + row * stride, tiles.bytes[tile]);
}
inline void tile_stored(int tile, void* to, int64_t stride) {
  assert(tiles.open);
  for (int row = 0; row < tiles.rows[tile]; ++row)
    memcpy((char*)to + row * stride, tiles.data[tile][row], tiles.bytes[tile]);
}

// c += a b for Sum, of `SIDE` neighbours in 32 bits; row k of b holds inputs k · SIDE …
template <typename Sum, typename A, typename B, typename Widen>
void tile_products(int c, int a, int b, Widen widen) {
  constexpr int SIDE = 4 / sizeof(A);
  assert(tiles.rows[c] == tiles.rows[a] && tiles.bytes[c] == tiles.bytes[b] && tiles.bytes[a] == 4 * tiles.rows[b]);
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.bytes[c] / 4; ++n)
      for (int k = 0; k < tiles.rows[b] * SIDE; ++k)
        tiles.at<Sum>(c, m, n) += widen(tiles.at<A>(a, m, k)) * widen(tiles.at<B>(b, k / SIDE, n * SIDE + k % SIDE));
}
inline void tile_dpbsud(int c, int a, int b) {
  tile_products<int32_t, int8_t, uint8_t>(c, a, b, [](int32_t x) { return x; });
}
inline void tile_dpbf16ps(int c, int a, int b) {
  tile_products<float, uint16_t, uint16_t>(c, a, b, [](uint16_t x) {
    const uint32_t bits = x & 0x7f80 ? (uint32_t)x << 16 : 0;  // too small is zero
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
  });
}

}  // namespace by_loops

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _mm512_set_epi16 by_loops::set_epi16
#define _mm512_maskz_loadu_ps by_loops::maskz_loadu_ps
#define _mm512_permutex2var_epi16 by_loops::permutex2var_epi16
#define _mm512_storeu_si512 by_loops::storeu_si512
#define _tile_loadconfig by_loops::tile_loadconfig
#define _tile_release by_loops::tile_release
#define _tile_zero by_loops::tile_zero
#define _tile_loadd by_loops::tile_loadd
#define _tile_stored by_loops::tile_stored
#define _tile_dpbsud by_loops::tile_dpbsud
#define _tile_dpbf16ps by_loops::tile_dpbf16ps
#define syscall(...) 0L  // leave to use tiles
