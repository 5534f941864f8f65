// Keys and values in KV-cache pages, one layer's, as attention.h reads them. Keys of a page are held token-last, so that
// the scores of neighbouring tokens come out as one vector:
//     keys [blocks][kv_heads][d][block_size]      values [blocks][kv_heads][block_size][v_width]
// Pages hold fp32 or, rounded, 16 bits.
#pragma once

#include <type_traits>

#include "vector.h"

struct Span {  // tokens [start, end) of the row are positions `context` … of one sequence
  int32_t start, end, context;
  int32_t first_page;  // its place in the list of pages; -1: a sequence without a cache, all of it in this row
};

struct Attention {
  void* keys;
  void* values;
  int64_t kv_heads, heads, d, v_d, v_width, block_size;  // v_width: v_d rounded up to VL
  const float *q, *k, *v;  // k null: pages hold all keys already; q null: keys and values are only kept
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // distances between tokens and between heads
  const float *cos, *sin;                               // [tokens, d], rotated by halves; null: q and k are as they are
  int64_t rope_row;
  float* out;  // [tokens, heads, v_d]
  float scale, softcap;
  int32_t causal, window;  // 0: none
  const float* bias;       // [heads, biases] added to scores by how far a key stands after its query; null: none
  int64_t biases, before;  // the first is that of a distance of -before; beyond its ends it goes on as they are
  int32_t page_dtype, unused;  // a Dtype: of keys and values in pages
};

static inline void rotate(const float* x, const float* cos, const float* sin, int64_t d, float factor, float* to,
                          int64_t step) {
  const int64_t half_d = d / 2;
  if (!cos) {
    for (int64_t i = 0; i < d; ++i) to[i * step] = x[i] * factor;
    return;
  }
  for (int64_t i = 0; i < half_d; ++i) {
    to[i * step] = (x[i] * cos[i] - x[i + half_d] * sin[i]) * factor;
    to[(i + half_d) * step] = (x[i + half_d] * cos[i + half_d] + x[i] * sin[i + half_d]) * factor;
  }
}

// Where the pages of one sequence lie, for one key-value head. Page: float, half or bfloat.
template <typename Page>
struct Store {
  const Attention* a;
  Page *keys, *values;
  const int32_t* pages;  // null: consecutive from `first`
  int64_t first, head;

  int64_t page(int64_t position) const {
    const int64_t block = position / a->block_size;
    return pages ? pages[block] : first + block;
  }
  Page* key(int64_t position) const {
    return keys + (page(position) * a->kv_heads + head) * a->d * a->block_size + position % a->block_size;
  }
  Page* value(int64_t position) const {
    return values + ((page(position) * a->kv_heads + head) * a->block_size + position % a->block_size) * a->v_width;
  }
};

// to[i * step] = row[i], rounded; zeros up to `width`.
template <typename Page>
static inline void keep_row(const float* row, int64_t count, int64_t width, Page* to, int64_t step) {
  for (int64_t i = 0; i < width; i += VL) {
    const int64_t here = count - i < VL ? count - i : VL, room = width - i < VL ? width - i : VL;
    float numbers[VL] = {};
    Page rounded[VL];
    memcpy(numbers, row + i, here * 4);
    store(rounded, load(numbers));
    for (int64_t j = 0; j < room; ++j) to[(i + j) * step] = rounded[j];
  }
}

// Keys and values of tokens [from, to) of a span go to their pages, those of one head.
template <typename Page>
static void keep(const Attention& a, const Span& span, const Store<Page>& where, int64_t from, int64_t to) {
  for (int64_t token = from; token < to; ++token) {
    const int64_t position = span.context + token - span.start;
    const float *turn = a.cos ? a.cos + token * a.rope_row : nullptr, *sin = a.sin + (turn ? token * a.rope_row : 0);
    const float *k = a.k + token * a.k_row + where.head * a.k_head, *v = a.v + token * a.v_row + where.head * a.v_head;
    Page* value = where.value(position);
    if constexpr (std::is_same_v<Page, float>) {
      rotate(k, turn, sin, a.d, 1.f, where.key(position), a.block_size);
      memcpy(value, v, a.v_d * 4);
      for (int64_t i = a.v_d; i < a.v_width; ++i) value[i] = 0.f;
    } else {
      float turned[a.d];
      rotate(k, turn, sin, a.d, 1.f, turned, 1);
      keep_row(turned, a.d, a.d, where.key(position), a.block_size);
      keep_row(v, a.v_d, a.v_width, value, 1);
    }
  }
}
