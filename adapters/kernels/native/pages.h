// Keys and values in KV-cache pages, one layer's, as attention.h reads them. Keys of a page are held token-last, so that
// the scores of neighbouring tokens come out as one vector:
//     keys [blocks][kv_heads][d][block_size]      values [blocks][kv_heads][block_size][v_width]
// Pages hold fp32 or, rounded, 16 bits.
#pragma once

#include <type_traits>

#include "small.h"

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
  const float *cos, *sin;  // [tokens, rotated]; null: q and k are as they are
  int64_t rope_row, rotated;  // the first `rotated` numbers of a head are rotated by halves
  Norm q_norm, k_norm;  // of each head, before the rotation
  float* out;  // [tokens, heads, v_d]
  float scale, softcap;
  int32_t causal, window;  // 0: none
  const float* bias;       // [heads, biases] added to scores by how far a key stands after its query; null: none
  int64_t biases, before;  // the first is that of a distance of -before; beyond its ends it goes on as they are
  int32_t page_dtype, unused;  // a Dtype: of keys and values in pages
};

struct Turn {  // of one token: the first d numbers of each head are rotated by halves; d 0: none
  const float *cos, *sin;
  int64_t d;
};

static inline Turn turn_of(const Attention& a, int64_t token) {
  if (!a.cos) return {};
  return {a.cos + token * a.rope_row, a.sin + token * a.rope_row, a.rotated};
}

// to = factor · x, rotated; `to` may be x.
static inline void rotate(const float* x, const Turn& turn, int64_t d, float factor, float* to) {
  const float *cos = turn.cos, *sin = turn.sin;
  const int64_t half_d = turn.d / 2;
  const float *far_x = x + half_d, *far_cos = cos + half_d, *far_sin = sin + half_d;
  int64_t i = 0;
  for (; i + VL <= half_d; i += VL) {
    const vf near = load(x + i), far = load(far_x + i);
    store(to + i, (near * load(cos + i) - far * load(sin + i)) * factor);
    store(to + half_d + i, (far * load(far_cos + i) + near * load(far_sin + i)) * factor);
  }
  for (; i < half_d; ++i) {
    const float near = x[i], far = far_x[i];
    to[i] = (near * cos[i] - far * sin[i]) * factor;
    to[i + half_d] = (far * far_cos[i] + near * far_sin[i]) * factor;
  }
  for (i = 2 * half_d; i < d; ++i) to[i] = x[i] * factor;
}

// The same of norm(x), where there is a norm.
static inline void prepare(const float* x, const Norm& norm, const Turn& turn, int64_t d, float factor, float* to) {
  if (norm.weight) normalise(x, norm.weight, norm.eps, to, d);
  rotate(norm.weight ? to : x, turn, d, factor, to);
}

// Where the pages of one sequence lie, for one key-value head. Page: float, half or bfloat.
template <typename Page>
struct Store {
  const Attention* a;
  Page *keys, *values;
  const int32_t* pages;  // null: consecutive from `first`
  int64_t first, head;

  Page* key(int64_t block, int64_t place) const {
    return keys + (page(block) * a->kv_heads + head) * a->d * a->block_size + place;
  }
  Page* value(int64_t block, int64_t place) const {
    return values + ((page(block) * a->kv_heads + head) * a->block_size + place) * a->v_width;
  }
  int64_t page(int64_t block) const { return pages ? pages[block] : first + block; }
  Page* key(int64_t position) const { return key(position / a->block_size, position % a->block_size); }
  Page* value(int64_t position) const { return value(position / a->block_size, position % a->block_size); }

  // VL keys and values each, from a position on that is a multiple of VL, as block_size is.
  void tiles(int64_t position, int64_t count, const Page** of_keys, const Page** of_values) const {
    int64_t block = position / a->block_size, place = position % a->block_size;
    for (int64_t t = 0; t < count; ++t) {
      of_keys[t] = key(block, place);
      of_values[t] = value(block, place);
      if ((place += VL) == a->block_size) place = 0, ++block;
    }
  }
};

// to[i * step] = v[i], rounded, for the first `count`.
template <typename Page>
static inline void keep_vector(vf v, int64_t count, Page* to, int64_t step) {
  if (step == 1 && count == VL) return store(to, v);
  Page rounded[VL];
  store(rounded, v);
  for (int64_t i = 0; i < count; ++i) to[i * step] = rounded[i];
}

// to[i * step] = row[i], rounded; zeros up to `width`.
template <typename Page>
static inline void keep_row(const float* row, int64_t count, int64_t width, Page* to, int64_t step) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) keep_vector(load(row + i), VL, to + i * step, step);
  for (; i < width; i += VL) {
    float rest[VL] = {};
    for (int64_t j = i; j < count && j < i + VL; ++j) rest[j - i] = row[j];
    keep_vector(load(rest), width - i < VL ? width - i : VL, to + i * step, step);
  }
}

// Keys and values of tokens [from, to) of a span go to their pages, those of one head.
template <typename Page>
static void keep(const Attention& a, const Span& span, const Store<Page>& where, int64_t from, int64_t to) {
  for (int64_t token = from; token < to; ++token) {
    const int64_t position = span.context + token - span.start;
    const float *k = a.k + token * a.k_row + where.head * a.k_head, *v = a.v + token * a.v_row + where.head * a.v_head;
    float turned[a.d];
    prepare(k, a.k_norm, turn_of(a, token), a.d, 1.f, turned);
    keep_row(turned, a.d, a.d, where.key(position), a.block_size);
    keep_row(v, a.v_d, a.v_width, where.value(position), 1);
  }
}
