// y = x Wᵀ (+ bias) for a frozen W, packed once into panels of PANEL outputs: packed[panel][k][PANEL], and in bf16 two
// inputs side by side, packed[panel][k / 2][PANEL][2], as the processor's tiles want them (amx.h).
// One block of rows of x meets one panel in registers; the panel streams through the caches once for each block.
#pragma once

#include "parallel.h"
#include "vector.h"

constexpr int NV = VL == 4 ? 4 : 2;                        // vectors in a panel
constexpr int PANEL = NV * VL;                             // outputs in a panel
constexpr int MAX_ROWS = (REGISTERS - NV - 1) / NV;        // rows of x in a block

constexpr int SOLE_ROWS = MAX_ROWS * 3 / 4;                // a block this small is likely the first to read its panel
constexpr int64_t DISTANCE = 6144;                         // bytes between what is read and what is asked for

static inline int64_t panels_of(int64_t d_out) { return (d_out + PANEL - 1) / PANEL; }

#if defined(__AMX_BF16__)
constexpr int64_t TILE_DEPTH = 32;  // inputs in a tile
#else
constexpr int64_t TILE_DEPTH = 2;
#endif

template <typename W>
constexpr int SIDE_BY_SIDE = 1;  // inputs
template <>
constexpr int SIDE_BY_SIDE<bfloat> = 2;

// Inputs in a panel: those beyond d_in are zero.
template <typename W>
static inline int64_t depth_of(int64_t d_in) {
  return SIDE_BY_SIDE<W> == 1 ? d_in : (d_in + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
}

template <typename W>
static inline W narrow(float x);
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline bfloat narrow<bfloat>(float x) {
  return bfloat{(uint16_t)(read<uint32_t>(&x) >> 16)};
}
template <>
inline half narrow<half>(float x) {
#if defined(__ARM_NEON)
  const __fp16 h = (__fp16)x;
  return read<half>(&h);
#else
  return half{(uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)};
#endif
}

// w: [d_out, d_in] fp32 -> packed, in 16 bits by truncation: the caller makes sure that nothing is lost.
template <typename W>
static void pack_panels(const float* w, int64_t d_out, int64_t d_in, W* packed) {
  constexpr int SIDE = SIDE_BY_SIDE<W>;
  const int64_t depth = depth_of<W>(d_in);
#pragma omp parallel for
  for (int64_t panel = 0; panel < panels_of(d_out); ++panel) {
    W* to = packed + panel * depth * PANEL;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < PANEL; ++j) {
        const int64_t row = panel * PANEL + j;
        to[k / SIDE * SIDE * PANEL + j * SIDE + k % SIDE] =
            narrow<W>(row < d_out && k < d_in ? w[row * d_in + k] : 0.f);
      }
  }
}

// Vector v of what stands side by side for SIDE_BY_SIDE inputs, of which w is the first.
template <typename W>
static inline void load_inputs(const W* w, int v, vf (&inputs)[1][NV]) {
  inputs[0][v] = load(w + v * VL);
}
static inline void load_inputs(const bfloat* w, int v, vf (&inputs)[2][NV]) {
  const vi both = (vi)load((const float*)w + v * VL);
  inputs[0][v] = (vf)(both << 16);
  inputs[1][v] = (vf)(both & (int32_t)0xffff0000);
}

// Memory that will be read soon: products are bound by arithmetic once they have some rows, and leave the way to memory
// half idle. They ask for a line of it at each k: of the next panel first, then of what was added.
struct Ahead {
  static constexpr int MOST = 256;
  const char* from[MOST];
  int64_t lines[MOST];
  int count = 0, current = 0;
  const char* panel = nullptr;
  int64_t panel_lines = 0, share = 0, left = 0;  // of the next panel; for one block; for this block

  void add(const void* memory, int64_t bytes) {
    if (count < MOST) from[count] = (const char*)memory, lines[count++] = (bytes + 63) / 64;
  }
  void next_panel(const void* memory, int64_t bytes, int64_t blocks) {
    panel = (const char*)memory;
    panel_lines = (bytes + 63) / 64;
    share = (panel_lines + blocks - 1) / blocks;
  }
  void next_block() { left = share; }
  // The next lines, at most `wanted`; how many there are.
  int64_t take(int64_t wanted, const char** memory) {
    if (left && panel_lines) {
      int64_t taken = left < wanted ? left : wanted;
      taken = taken < panel_lines ? taken : panel_lines;
      *memory = panel;
      panel += taken * 64, panel_lines -= taken, left -= taken;
      return taken;
    }
    if (current == count) return 0;
    const int64_t taken = lines[current] < wanted ? lines[current] : wanted;
    *memory = from[current];
    from[current] += taken * 64;
    if (!(lines[current] -= taken)) ++current;
    return taken;
  }
};

// ROWS rows of x against one panel. Few accumulators would wait for one another: then k is split over CHAINS of them.
// Never inlined: registers just suffice, and around other code the compiler runs out of them (+30 % were seen).
template <typename W, int ROWS>
static __attribute__((noinline)) void block(const float* x, int64_t x_stride, const W* panel, int64_t d_in,
                                            const float* bias, float* y, int64_t y_stride, int64_t columns,
                                            Ahead& ahead) {
  constexpr int CHAINS = ROWS * NV >= 8 ? 1 : (ROWS * NV >= 4 ? 2 : 4);
  constexpr int SIDE = SIDE_BY_SIDE<W>;
  vf acc[CHAINS][ROWS][NV];
  for (int c = 0; c < CHAINS; ++c)
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < NV; ++v) acc[c][m][v] = (vf){};
  // Inputs k … k + SIDE, the first `count` of them, into the accumulators from `chain` on.
  const auto add = [&](int64_t k, int chain, int count) __attribute__((always_inline)) {
    vf w[SIDE][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) load_inputs(panel + k * PANEL, v, w);
#pragma GCC unroll 2
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[(chain + i) % CHAINS][m][v] += x[m * x_stride + k + i] * w[i][v];
  };
  int64_t k = 0;
  if constexpr (ROWS > 4) {  // the same loop, with a request for memory in it
    const char* memory;
    while (const int64_t lines = ahead.take((d_in - k) / SIDE * SIDE, &memory))
      for (const int64_t end = k + lines; k < end; k += SIDE, memory += 64 * SIDE) {
        for (int i = 0; i < SIDE; ++i) prefetch(memory + i * 64);
        add(k, 0, SIDE);
      }
  }
  constexpr int STEP = CHAINS > SIDE ? CHAINS : SIDE;
  for (; k + STEP <= d_in; k += STEP) {
    if constexpr (ROWS <= SOLE_ROWS)
      for (int line = 0; line < (int)(STEP * PANEL * sizeof(W)); line += 64)
        prefetch((const char*)(panel + k * PANEL) + DISTANCE + line);
#pragma GCC unroll 4
    for (int c = 0; c < STEP; c += SIDE) add(k + c, c, SIDE);
  }
  for (; k + SIDE <= d_in; k += SIDE) add(k, 0, SIDE);
  if (k < d_in) add(k, 0, 1);
  for (int m = 0; m < ROWS; ++m) {
    float out[PANEL];
    for (int v = 0; v < NV; ++v) {
      vf s = acc[0][m][v];
      for (int c = 1; c < CHAINS; ++c) s += acc[c][m][v];
      if (columns == PANEL)
        store(y + m * y_stride + v * VL, bias ? s + load(bias + v * VL) : s);
      else
        store(out + v * VL, s);
    }
    if (columns != PANEL)
      for (int64_t j = 0; j < columns; ++j) y[m * y_stride + j] = bias ? out[j] + bias[j] : out[j];
  }
}

template <typename W, int ROWS>
static inline void block_of(int64_t rows, const float* x, int64_t x_stride, const W* panel, int64_t d_in,
                            const float* bias, float* y, int64_t y_stride, int64_t columns, Ahead& ahead) {
  if (rows == ROWS)
    block<W, ROWS>(x, x_stride, panel, d_in, bias, y, y_stride, columns, ahead);
  else if constexpr (ROWS > 1)
    block_of<W, ROWS - 1>(rows, x, x_stride, panel, d_in, bias, y, y_stride, columns, ahead);
}

// All rows against one panel.
template <typename W>
static void multiply_panel(const float* x, int64_t x_stride, int64_t rows, int64_t blocks, const W* panel, int64_t d_in,
                           const float* bias, float* y, int64_t y_stride, int64_t columns, Ahead& ahead) {
  for (int64_t b = 0; b < blocks; ++b) {
    ahead.next_block();
    const int64_t start = rows * b / blocks, end = rows * (b + 1) / blocks;
    block_of<W, MAX_ROWS>(end - start, x + start * x_stride, x_stride, panel, d_in, bias, y + start * y_stride,
                          y_stride, columns, ahead);
  }
}

constexpr int64_t WIDENED_FOR = 4;  // blocks, from which a panel in bf16 is widened once, not for each of them

// A panel in fp32, [d_in][PANEL], in memory that the thread keeps; valid until it asks again.
static const float* widen_panel(const bfloat* panel, int64_t d_in) {
  static thread_local Scratch room;
  constexpr int SIDE = SIDE_BY_SIDE<bfloat>;
  float* to = room.floats(depth_of<bfloat>(d_in) * PANEL);
  for (int64_t k = 0; k < d_in; k += SIDE) {
    vf w[SIDE][NV];
    for (int v = 0; v < NV; ++v) load_inputs(panel + k * PANEL, v, w);
    for (int i = 0; i < SIDE; ++i)
      for (int v = 0; v < NV; ++v) store(to + (k + i) * PANEL + v * VL, w[i][v]);
  }
  return to;
}

// Rows [first, last) of x against panels [from, to): y[:, from · PANEL …] of the layer's output.
template <typename W>
static void multiply(const float* x, int64_t x_stride, int64_t first, int64_t last, const W* packed, int64_t d_in,
                     int64_t d_out, const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to,
                     Ahead& ahead) {
  const int64_t rows = last - first, blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
  const int64_t panel_size = depth_of<W>(d_in) * PANEL;
  x += first * x_stride, y += first * y_stride;
  for (int64_t panel = from; panel < to; ++panel) {
    const int64_t n = panel * PANEL, columns = d_out - n < PANEL ? d_out - n : PANEL;
    const W* here = packed + panel * panel_size;
    if (blocks > 1)
      ahead.next_panel(here + panel_size, panel + 1 < to ? panel_size * sizeof(W) : 0, blocks);
    const auto all = [&](const auto* w) {
      multiply_panel(x, x_stride, rows, blocks, w, d_in, bias ? bias + n : nullptr, y + n, y_stride, columns, ahead);
    };
    if constexpr (SIDE_BY_SIDE<W> > 1)
      if (blocks >= WIDENED_FOR) {
        all(widen_panel(here, d_in));
        continue;
      }
    all(here);
  }
}
