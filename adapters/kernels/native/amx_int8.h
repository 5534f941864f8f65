// y = x Wᵀ (+ bias) by the processor's tiles (AMX), for W in 8 bits and x in whole numbers (int8.h): the same sums as
// there. A group's weights are two tiles as they lie, and a plane of a block's rows of x is one; what they give leaves
// the tiles for the scales of the group.
#pragma once

#include <algorithm>

#include "int8.h"
#include "tiles.h"

#if defined(HAS_TILES)
// One block's products with a group, a plane of x each. Tiles 0 to 3: these; 4, 5: W; 6, 7: x.
struct TileDots {
  int32_t of[2][TILE_ROWS][PANEL];
};

static_assert(GROUP / SIDE == TILE_ROWS && PANEL == 2 * VL && OFFSET == 128, "a group of W is two tiles");

static inline void load_group(const WeightGroup& group) {
  _tile_loadd(4, group.q[0][0], sizeof group.q[0]);
  _tile_loadd(5, group.q[0][VL], sizeof group.q[0]);
}

template <int PLANES>
static inline void multiply_group(const Quantised& x, int64_t g, int64_t row, TileDots& dots) {
  const Input* in = x.x + (g * PLANES * x.rows + row) * GROUP;
  _tile_zero(0);
  _tile_zero(1);
  _tile_loadd(6, in, GROUP);
  _tile_dpbsud(0, 6, 4);
  _tile_dpbsud(1, 6, 5);
  if constexpr (PLANES == 2) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(7, in + x.rows * GROUP, GROUP);
    _tile_dpbsud(2, 7, 4);
    _tile_dpbsud(3, 7, 5);
  }
  _tile_stored(0, dots.of[0][0], sizeof dots.of[0][0]);
  _tile_stored(1, dots.of[0][0] + VL, sizeof dots.of[0][0]);
  if constexpr (PLANES == 2) {
    _tile_stored(2, dots.of[1][0], sizeof dots.of[1][0]);
    _tile_stored(3, dots.of[1][0] + VL, sizeof dots.of[1][0]);
  }
}

// Into one row's sums.
template <int PLANES>
static inline void add_scaled(const TileDots& dots, int64_t m, const InputGroup& input, const WeightGroup& group,
                              float* sums) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    vi total = read<vi>(dots.of[0][m] + v * VL);
    if constexpr (PLANES == 2) total = (total << 8) + read<vi>(dots.of[1][m] + v * VL);
    const vf scaled = load(group.scale + v * VL) * __builtin_convertvector(total + input.offset, vf);
    store(sums + v * VL, load(sums + v * VL) + input.scale * scaled);
  }
}

// Lines of memory that will be read DISTANCE behind this group: `each` of them beside each of the rows, until all are
// asked for.
static inline void ask_beside(const WeightGroup& group, int64_t row, int64_t each) {
  constexpr int64_t ALL = sizeof group / 64;
  for (int64_t line = row * each; line < std::min((row + 1) * each, ALL); ++line)
    __builtin_prefetch((const char*)&group + DISTANCE + line * 64, 0, 2);
}

// Rows that meet a panel at once are blocks of `height`; the last block ends with the last row, so that it may begin in
// the block before, whose sums stand already.
template <int PLANES>
static void multiply_tile_planes(const Quantised& x, int64_t first, int64_t last, const WeightGroup* packed,
                                 int64_t d_out, const float* bias, float* y, int64_t y_stride, int64_t from,
                                 int64_t to) {
  alignas(64) float sums[SUMMED_ROWS * PANEL];
  alignas(64) TileDots dots;
  const int64_t blocks = (last - first + TILE_ROWS - 1) / TILE_ROWS, height = (last - first + blocks - 1) / blocks;
  const int64_t at_once = SUMMED_ROWS / TILE_ROWS * height;
  open_tiles(height);
  for (int64_t panel = from; panel < to; ++panel)
    for (int64_t start = first; start < last; start += at_once) {
      const int64_t end = std::min(start + at_once, last), rows = end - start;
      const int64_t lines = start == first ? (int64_t)(sizeof *packed / 64 + rows - 1) / rows : 0;
      memset(sums, 0, rows * PANEL * 4);
      for (int64_t g = 0; g < x.groups; ++g) {
        const WeightGroup& group = packed[panel * x.groups + g];
        load_group(group);
        for (int64_t row = start; row < end; row += height) {
          const int64_t block = std::min(row, last - height);
          const InputGroup* inputs = x.scale + g * x.rows + block;
          multiply_group<PLANES>(x, g, block, dots);
          for (int64_t m = row - block; m < height; ++m) {
            const int64_t place = block + m - start;
            ask_beside(group, place, lines);
            add_scaled<PLANES>(dots, m, inputs[m], group, sums + place * PANEL);
          }
        }
      }
      const int64_t n = panel * PANEL, columns = d_out - n < PANEL ? d_out - n : PANEL;
      put(sums, rows, columns, bias ? bias + n : nullptr, y + start * y_stride + n, y_stride);
    }
  close_tiles();
}

// As multiply_dots.
static void multiply_tile_dots(const Quantised& x, int64_t first, int64_t last, const WeightGroup* packed,
                               int64_t d_out, const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to) {
  const auto multiply = Quantised::planes(x.steps) == 2 ? multiply_tile_planes<2> : multiply_tile_planes<1>;
  multiply(x, first, last, packed, d_out, bias, y, y_stride, from, to);
}
#else
static void multiply_tile_dots(const Quantised&, int64_t, int64_t, const WeightGroup*, int64_t, const float*, float*,
                               int64_t, int64_t, int64_t) {}
#endif
