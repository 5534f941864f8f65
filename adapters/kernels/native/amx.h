// y = x Wᵀ (+ bias) by the processor's tiles (AMX), for W in bf16 (product.h) and fp32 x, as exact as in fp32: x is the
// sum of three bf16 numbers, each of the next eight bits; a product of two bf16 numbers has no error in fp32, in which
// tiles are summed. Tiles take numbers below 2^-126 for zero. Where x is infinite the parts are not numbers, nor is y.
//
// A step is TILE_DEPTH inputs. Tiles hold TILE_ROWS rows of x and one step, or one step and half a panel of W, or their
// products; two blocks of rows meet a panel at once.
#pragma once

#include "int8.h"
#include "tiles.h"

constexpr int PARTS = 3;

// x in parts: [block of rows][step][PARTS][TILE_ROWS][TILE_DEPTH]
struct Parts {
  bfloat* x;
  int64_t steps;
  int64_t rows;  // in a block, so that blocks are about equal

  static constexpr int64_t TILE = TILE_ROWS * TILE_DEPTH;
  // At most `at_once` rows, a multiple of TILE_ROWS, are multiplied at once: they begin with a block.
  static Parts of(int64_t tokens, int64_t d_in, int64_t at_once) {
    const int64_t blocks = (tokens + TILE_ROWS - 1) / TILE_ROWS;
    return Parts{nullptr, (d_in + TILE_DEPTH - 1) / TILE_DEPTH,
                 tokens > at_once ? TILE_ROWS : (tokens + blocks - 1) / blocks};
  }
  int64_t bytes(int64_t tokens) const { return (tokens + rows - 1) / rows * block_size() * sizeof(bfloat); }
  int64_t block_size() const { return steps * PARTS * TILE; }
};

#if defined(HAS_TILES)
static inline void split_row(const float* x, int64_t d_in, const Parts& parts, int64_t row) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const vi high = (vi){} + (int32_t)0xffff0000;
  bfloat* to = parts.x + row / parts.rows * parts.block_size() + row % parts.rows * TILE_DEPTH;
  for (int64_t k = 0; k < d_in; k += TILE_DEPTH, to += PARTS * Parts::TILE) {
    const int64_t count = d_in - k;
    const __mmask32 there = count >= TILE_DEPTH ? ~0u : (1u << count) - 1;
    vf left[2] = {(vf)_mm512_maskz_loadu_ps((__mmask16)there, x + k),
                  (vf)_mm512_maskz_loadu_ps((__mmask16)(there >> 16), x + k + VL)};
    for (int part = 0; part < PARTS; ++part) {
      const vf next[2] = {(vf)((vi)left[0] & high), (vf)((vi)left[1] & high)};
      _mm512_storeu_si512(to + part * Parts::TILE,
                          _mm512_permutex2var_epi16((__m512i)next[0], odd, (__m512i)next[1]));
      left[0] -= next[0], left[1] -= next[1];
    }
  }
}

constexpr int64_t W_STEP = TILE_DEPTH * PANEL;
constexpr int64_t W_LINES = W_STEP * sizeof(bfloat) / 64;
constexpr int64_t W_ROW = 2 * PANEL * sizeof(bfloat);  // bytes

// Lines of memory that will be read soon: as many as a step of W has, behind this one or, once W is near, of `ahead`.
static inline void ask_a_step(const bfloat* w, Ahead* ahead) {
  if (!ahead) {
#pragma GCC unroll 32
    for (int64_t line = 0; line < W_LINES; ++line) prefetch((const char*)w + DISTANCE + line * 64);
    return;
  }
  const char* memory;
  for (int64_t lines = W_LINES; const int64_t found = ahead->take(lines, &memory); lines -= found)
    for (int64_t line = 0; line < found; ++line) prefetch(memory + line * 64);
}

// sums: [2 · TILE_ROWS][PANEL]; the second half are those of the second block.
static inline void multiply_two(const bfloat* x, int64_t block_size, const bfloat* w, int64_t steps, float* sums,
                                Ahead* ahead) {
  constexpr int64_t T = Parts::TILE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, w += W_STEP, x += PARTS * T) {
    ask_a_step(w, ahead);
    _tile_loadd(4, w, W_ROW);
    _tile_loadd(5, w + PANEL, W_ROW);
    for (int part = PARTS - 1; part >= 0; --part) {
      _tile_loadd(6, x + part * T, 64);
      _tile_loadd(7, x + block_size + part * T, 64);
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + VL, PANEL * 4);
  _tile_stored(2, sums + TILE_ROWS * PANEL, PANEL * 4);
  _tile_stored(3, sums + TILE_ROWS * PANEL + VL, PANEL * 4);
}

// One block; the sums of the small parts are apart, since one sum would wait for the other.
static inline void multiply_one(const bfloat* x, const bfloat* w, int64_t steps, float* sums, Ahead* ahead) {
  constexpr int64_t T = Parts::TILE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, w += W_STEP, x += PARTS * T) {
    ask_a_step(w, ahead);
    _tile_loadd(4, w, W_ROW);
    _tile_loadd(5, w + PANEL, W_ROW);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 6, 5);
    _tile_loadd(7, x + T, 64);
    _tile_dpbf16ps(2, 7, 4);
    _tile_dpbf16ps(3, 7, 5);
    _tile_loadd(6, x + 2 * T, 64);
    _tile_dpbf16ps(2, 6, 4);
    _tile_dpbf16ps(3, 6, 5);
  }
  float* small = sums + TILE_ROWS * PANEL;
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + VL, PANEL * 4);
  _tile_stored(2, small, PANEL * 4);
  _tile_stored(3, small + VL, PANEL * 4);
  for (int64_t i = 0; i < TILE_ROWS * PANEL; i += VL) store(sums + i, load(sums + i) + load(small + i));
}

static_assert(TILE_DEPTH / 2 == TILE_ROWS, "a step of W is two tiles");

// Rows [first, last) of x against panels [from, to), as `multiply` of product.h. Tiles 0 to 3: products; 4, 5: W;
// 6, 7: x.
static void multiply_tiles(const Parts& parts, int64_t first, int64_t last, const bfloat* packed, int64_t d_out,
                           const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to, Ahead& ahead) {
  const int64_t blocks = (last - first + parts.rows - 1) / parts.rows, size = parts.block_size();
  alignas(64) float sums[2 * TILE_ROWS * PANEL];
  open_tiles(parts.rows);
  for (int64_t panel = from; panel < to; ++panel) {
    const int64_t n = panel * PANEL, columns = d_out - n < PANEL ? d_out - n : PANEL;
    const bfloat* w = packed + panel * parts.steps * W_STEP;
    const int64_t next = panel + 1 < to ? parts.steps * W_STEP * sizeof(bfloat) : 0;
    if (blocks > 2) ahead.next_panel(w + parts.steps * W_STEP, next, (blocks - 1) / 2);
    for (int64_t b = 0; b < blocks; b += 2) {
      const bfloat* x = parts.x + (first / parts.rows + b) * size;
      if (b) ahead.next_block();
      if (b + 1 < blocks)
        multiply_two(x, size, w, parts.steps, sums, b ? &ahead : nullptr);
      else
        multiply_one(x, w, parts.steps, sums, b ? &ahead : nullptr);
      for (int64_t i = 0; i < 2 && b + i < blocks; ++i) {
        const int64_t row = first + (b + i) * parts.rows, rows = last - row < parts.rows ? last - row : parts.rows;
        put(sums + i * TILE_ROWS * PANEL, rows, columns, bias ? bias + n : nullptr, y + row * y_stride + n, y_stride);
      }
    }
  }
  close_tiles();
}
#else
static inline void split_row(const float*, int64_t, const Parts&, int64_t) {}
static inline void multiply_tiles(const Parts&, int64_t, int64_t, const bfloat*, int64_t, const float*, float*, int64_t,
                                  int64_t, int64_t, Ahead&) {}
#endif
