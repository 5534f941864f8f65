// y = x Wᵀ (+ bias) for a frozen W, packed once into panels of PANEL outputs: packed[panel][k][PANEL].
// One block of rows of x meets one panel in registers; the panel streams through the caches once for each block.
#pragma once

#include "vector.h"

constexpr int NV = VL == 4 ? 4 : 2;                        // vectors in a panel
constexpr int PANEL = NV * VL;                             // outputs in a panel
constexpr int MAX_ROWS = (REGISTERS - NV - 1) / NV;        // rows of x in a block

constexpr int SOLE_ROWS = MAX_ROWS * 3 / 4;                // a block this small is likely the first to read its panel
constexpr int64_t DISTANCE = 6144;                         // bytes between what is read and what is asked for

static inline int64_t panels_of(int64_t d_out) { return (d_out + PANEL - 1) / PANEL; }

// w: [d_out, d_in] fp32 -> packed, in 16 bits by truncation: the caller makes sure that nothing is lost.
template <typename W>
static void pack_panels(const float* w, int64_t d_out, int64_t d_in, W* packed);

template <typename W>
static inline W narrow(float x);
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline bfloat narrow<bfloat>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bfloat{(uint16_t)(bits >> 16)};
}
template <>
inline half narrow<half>(float x) {
#if defined(__ARM_NEON)
  __fp16 h = (__fp16)x;
  half y;
  memcpy(&y, &h, 2);
  return y;
#else
  return half{(uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)};
#endif
}

template <typename W>
static void pack_panels(const float* w, int64_t d_out, int64_t d_in, W* packed) {
#pragma omp parallel for
  for (int64_t panel = 0; panel < panels_of(d_out); ++panel) {
    W* to = packed + panel * d_in * PANEL;
    for (int64_t k = 0; k < d_in; ++k)
      for (int64_t j = 0; j < PANEL; ++j) {
        int64_t row = panel * PANEL + j;
        to[k * PANEL + j] = narrow<W>(row < d_out ? w[row * d_in + k] : 0.f);
      }
  }
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
template <typename W, int ROWS>
static inline void block(const float* x, int64_t x_stride, const W* panel, int64_t d_in, const float* bias, float* y,
                         int64_t y_stride, int64_t columns, Ahead& ahead) {
  constexpr int CHAINS = ROWS * NV >= 8 ? 1 : (ROWS * NV >= 4 ? 2 : 4);
  vf acc[CHAINS][ROWS][NV];
  for (int c = 0; c < CHAINS; ++c)
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < NV; ++v) acc[c][m][v] = (vf){};
  int64_t k = 0;
  if constexpr (ROWS > 4) {  // the same loop, with a request for memory in it
    const char* memory;
    while (const int64_t lines = k < d_in ? ahead.take(d_in - k, &memory) : 0)
      for (const int64_t end = k + lines; k < end; ++k, memory += 64) {
        prefetch(memory);
        vf w[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) w[v] = load(panel + k * PANEL + v * VL);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[0][m][v] += x[m * x_stride + k] * w[v];
      }
  }
  for (; k + CHAINS <= d_in; k += CHAINS) {
    if constexpr (ROWS <= SOLE_ROWS)
      for (int line = 0; line < (int)(CHAINS * PANEL * sizeof(W)); line += 64)
        prefetch((const char*)(panel + k * PANEL) + DISTANCE + line);
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      vf w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) w[v] = load(panel + (k + c) * PANEL + v * VL);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[c][m][v] += x[m * x_stride + k + c] * w[v];
    }
  }
  for (; k < d_in; ++k)
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < NV; ++v) acc[0][m][v] += x[m * x_stride + k] * load(panel + k * PANEL + v * VL);
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

// Rows [first, last) of x against panels [from, to): y[:, from · PANEL …] of the layer's output.
template <typename W>
static void multiply(const float* x, int64_t x_stride, int64_t first, int64_t last, const W* packed, int64_t d_in,
                     int64_t d_out, const float* bias, float* y, int64_t y_stride, int64_t from, int64_t to,
                     Ahead& ahead) {
  const int64_t rows = last - first, blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t panel = from; panel < to; ++panel) {
    const int64_t n = panel * PANEL, columns = d_out - n < PANEL ? d_out - n : PANEL;
    const int64_t size = d_in * PANEL * sizeof(W);
    if (blocks > 1) ahead.next_panel(packed + (panel + 1) * d_in * PANEL, panel + 1 < to ? size : 0, blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      ahead.next_block();
      const int64_t start = first + rows * b / blocks, end = first + rows * (b + 1) / blocks;
      block_of<W, MAX_ROWS>(end - start, x + start * x_stride, x_stride, packed + panel * d_in * PANEL, d_in,
                            bias ? bias + n : nullptr, y + start * y_stride + n, y_stride, columns, ahead);
    }
  }
}
