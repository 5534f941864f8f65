// Attention of packed sequences over KV-cache pages (pages.h): softmax(q kᵀ · scale) v, each sequence by itself, without
// masks or copies, computed in fp32. A sequence without pages gets some, of fp32, for the length of the call. Softmax is
// computed online over chunks of keys (Milakov and Gimelshein, arXiv:1805.02867).
#pragma once

#include "pages.h"
#include "parallel.h"

constexpr int QUERIES = 12;  // rows of one unit of work: a head of a token each
constexpr int CHUNK = 256;   // keys
constexpr float NONE = -__builtin_inff();

constexpr int TILES_AHEAD = 4;
constexpr int FEW = 6;  // rows that wait for memory; more are bound by arithmetic

// Scores of TILES · VL keys. ASKS: for as many tiles that are read later.
template <int ROWS, int TILES, bool ASKS, typename Page>
static inline void score(const float* q, int64_t d, const Page* const* tiles, int64_t key_step, float* scores) {
  vf acc[ROWS][TILES];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) acc[m][t] = (vf){};
  const Page *here[TILES], *later[TILES];
#pragma GCC unroll 4
  for (int t = 0; t < TILES; ++t) here[t] = tiles[t], later[t] = tiles[TILES + t];
  for (int64_t i = 0, at = 0; i < d; ++i, at += key_step) {
    vf key[TILES];
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) {
      key[t] = load(here[t] + at);
      if (ASKS) prefetch(later[t] + at);
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int t = 0; t < TILES; ++t) acc[m][t] += q[m * d + i] * key[t];
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) store(scores + m * CHUNK + t * VL, acc[m][t]);
}

// out[m] += Σ weights[m][j] · v[j] over `count` keys, VECTORS · VL columns at once. ASKS: for what is read some tiles
// later.
template <int ROWS, int VECTORS, bool ASKS, typename Page>
static inline void weigh(const float* weights, int64_t count, const Page* const* tiles, int64_t width, int64_t column,
                         float* out) {
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) acc[m][v] = load(out + m * width + column + v * VL);
  for (int64_t first = 0; first < count; first += VL, ++tiles) {
    const Page *row = tiles[0] + column, *later = tiles[TILES_AHEAD] + column;
    const float* weight = weights + first;
    for (const float* end = weight + (count - first < VL ? count - first : VL); weight < end;
         ++weight, row += width, later += width) {
      vf value[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        value[v] = load(row + v * VL);
        if (ASKS && v * VL * sizeof(Page) % 64 == 0) prefetch(later + v * VL);
      }
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[m][v] += weight[m * CHUNK] * value[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(out + m * width + column + v * VL, acc[m][v]);
}

// scores[j] += bias of distance + j
static inline void lean(float* scores, const float* bias, int64_t biases, int64_t distance, int64_t count) {
  int64_t from = distance < 0 ? -distance : 0, to = biases - distance;
  from = from > count ? count : from;
  to = to > count ? count : (to < from ? from : to);
  for (int64_t j = 0; j < from; ++j) scores[j] += bias[0];
  for (int64_t j = from; j < to; ++j) scores[j] += bias[distance + j];
  for (int64_t j = to; j < count; ++j) scores[j] += bias[biases - 1];
}

// Scores of `tiles` vectors: softly capped, and none but those of keys [low, high).
static inline void restrict(float* scores, int64_t low, int64_t high, int64_t tiles, float softcap) {
  vf place;
  for (int i = 0; i < VL; ++i) place[i] = (float)i;
  for (int64_t first = 0; first < tiles * VL; first += VL) {
    if (low <= first && first + VL <= high && !(softcap > 0)) continue;
    vf s = load(scores + first);
    if (softcap > 0) s = softcap - 2.f * softcap / (exp(s * (2.f / softcap)) + 1.f);
    store(scores + first, (place >= (float)(low - first)) & (place < (float)(high - first)) ? s : splat(NONE));
  }
}

// Scores of a chunk become weights, in place; `factors` are for what was summed before. All rows at once, so that
// their chains of operations overlap.
template <int ROWS>
static inline void soften(float* scores, int64_t tiles, float* peak, float* total, float* factors) {
  vf highest[ROWS], sums[ROWS];
  for (int m = 0; m < ROWS; ++m) highest[m] = splat(peak[m]), sums[m] = (vf){};
  for (int64_t t = 0; t < tiles; ++t)
    for (int m = 0; m < ROWS; ++m) highest[m] = max(highest[m], load(scores + m * CHUNK + t * VL));
  float shift[ROWS];
  for (int m = 0; m < ROWS; ++m) {
    const float now = largest(highest[m]);
    shift[m] = now == NONE ? 0.f : now;  // a row that has seen nothing yet
    factors[m] = peak[m] == now ? 1.f : exp(splat(peak[m] - shift[m]))[0];
    peak[m] = now;
  }
  for (int64_t t = 0; t < tiles; ++t)
    for (int m = 0; m < ROWS; ++m) {
      const vf w = exp(load(scores + m * CHUNK + t * VL) - shift[m]);
      store(scores + m * CHUNK + t * VL, w);
      sums[m] += w;
    }
  for (int m = 0; m < ROWS; ++m) total[m] = total[m] * factors[m] + sum(sums[m]);
}

// `each` of as many rows as fit into registers with sums of VECTORS vectors, and the first of them.
template <int ROWS, int VECTORS, typename Each>
static inline void in_parts(Each each) {
  if constexpr (ROWS <= FEW || (ROWS + 1) * VECTORS < REGISTERS) {
    each(std::integral_constant<int, ROWS>(), 0);
  } else {
    each(std::integral_constant<int, ROWS / 2>(), 0);
    each(std::integral_constant<int, ROWS - ROWS / 2>(), ROWS / 2);
  }
}

// One unit: ROWS (token, head) rows of one key-value head of a span, from row `first` on. `after`: what this thread
// reads after it, [TILES_AHEAD].
template <int ROWS, typename Page>
static void attend_rows(const Attention& a, const Span& span, const Store<Page>& where, int64_t first,
                        const void* const* after, float* scratch) {
  constexpr int TILES = ROWS <= 3 ? 4 : 2;
  constexpr bool ASKS = ROWS <= FEW;
  const int64_t shared = a.heads / a.kv_heads, length = span.context + span.end - span.start, width = a.v_width;
  float* scores = scratch;                   // [ROWS][CHUNK]
  float* out = scratch + QUERIES * CHUNK;    // [ROWS][width]
  float* q = out + QUERIES * width;          // [ROWS][d]
  float peak[ROWS], total[ROWS], factors[ROWS];
  int64_t low[ROWS], high[ROWS], places[ROWS], lowest = length, highest = 0;
  for (int m = 0; m < ROWS; ++m) {
    const int64_t token = span.start + (first + m) / shared, head = where.head * shared + (first + m) % shared;
    const int64_t position = places[m] = span.context + token - span.start;
    prepare(a.q + token * a.q_row + head * a.q_head, a.q_norm, turn_of(a, token), a.d, a.scale, q + m * a.d);
    low[m] = a.window && position - a.window + 1 > 0 ? position - a.window + 1 : 0;
    high[m] = a.causal ? position + 1 : (a.window && position + a.window < length ? position + a.window : length);
    lowest = low[m] < lowest ? low[m] : lowest;
    highest = high[m] > highest ? high[m] : highest;
    peak[m] = NONE;
    total[m] = 0;
  }
  memset(out, 0, ROWS * width * 4);
  for (int64_t chunk = lowest / VL * VL; chunk < highest; chunk += CHUNK) {
    const int64_t count = highest - chunk < CHUNK ? highest - chunk : CHUNK, tiles = (count + VL - 1) / VL;
    const Page *keys[2 * CHUNK / VL + TILES_AHEAD], **values = keys + tiles;  // in the order in which they are read
    where.tiles(chunk, tiles, keys, values);
    for (int64_t t = 0, next = chunk + CHUNK; t < TILES_AHEAD; ++t, next += VL)
      values[tiles + t] = next < highest ? where.key(next) : (const Page*)after[t];
    int64_t t = 0;
    const auto score_by = [&](auto of) {
      for (; t + of.value <= tiles; t += of.value)
        in_parts<ROWS, of.value>([&](auto rows, int m) {
          score<rows.value, decltype(of)::value, ASKS>(q + m * a.d, a.d, keys + t, a.block_size,
                                                       scores + m * CHUNK + t * VL);
        });
    };
    score_by(std::integral_constant<int, TILES>());
    if constexpr (TILES > 2) score_by(std::integral_constant<int, 2>());
    score_by(std::integral_constant<int, 1>());
    for (int m = 0; m < ROWS; ++m) {
      const int64_t head = where.head * shared + (first + m) % shared;
      if (a.bias)
        lean(scores + m * CHUNK, a.bias + head * a.biases, a.biases, chunk - places[m] + a.before, count);
      restrict(scores + m * CHUNK, low[m] - chunk, high[m] - chunk, tiles, a.softcap);
    }
    soften<ROWS>(scores, tiles, peak, total, factors);
    for (int m = 0; m < ROWS; ++m)
      if (factors[m] != 1.f)
        for (int64_t i = 0; i < width; i += VL) store(out + m * width + i, load(out + m * width + i) * factors[m]);
    int64_t column = 0;
    const auto weigh_by = [&](auto of) {
      for (; column + of.value * VL <= width; column += of.value * VL)
        in_parts<ROWS, of.value>([&](auto rows, int m) {
          weigh<rows.value, decltype(of)::value, ASKS>(scores + m * CHUNK, count, values, width, column,
                                                       out + m * width);
        });
    };
    weigh_by(std::integral_constant<int, TILES>());
    weigh_by(std::integral_constant<int, 1>());
  }
  for (int m = 0; m < ROWS; ++m) {
    const int64_t token = span.start + (first + m) / shared, head = where.head * shared + (first + m) % shared;
    float* to = a.out + (token * a.heads + head) * a.v_d;
    for (int64_t i = 0; i < a.v_d; ++i) to[i] = out[m * width + i] / total[m];
  }
}

template <int ROWS, typename Page>
static void attend_some(int64_t rows, const Attention& a, const Span& span, const Store<Page>& where, int64_t first,
                        const void* const* after, float* scratch) {
  if (rows == ROWS)
    attend_rows<ROWS>(a, span, where, first, after, scratch);
  else if constexpr (ROWS > 1)
    attend_some<ROWS - 1>(rows, a, span, where, first, after, scratch);
}

// The work of one call: units of up to QUERIES rows of one head of one span.
struct Plan {
  const Attention* a;
  const Span* spans;
  int64_t num_spans;
  const int32_t* pages;
  int64_t* units;      // [num_spans + 1] the first unit of each span
  int64_t* temporary;  // [num_spans + 1] the first temporary page of each span without a cache
  float* own = nullptr;  // temporary pages: keys, then values
  int64_t blocks = 0, long_tokens = 0, work = 0;

  static int64_t room(int64_t num_spans) { return 2 * (num_spans + 1); }

  // room: for `room(num_spans)` numbers
  Plan(const Attention* a, const Span* spans, int64_t num_spans, const int32_t* pages, int64_t* room)
      : a(a), spans(spans), num_spans(num_spans), pages(pages), units(room), temporary(room + num_spans + 1) {
    units[0] = 0;
    for (int64_t s = 0; s < num_spans; ++s) {
      const int64_t n = spans[s].end - spans[s].start;
      units[s + 1] = units[s] + (a->q ? units_of_head(s) * a->kv_heads : 0);
      temporary[s] = blocks;
      if (spans[s].first_page < 0) blocks += (n + a->block_size - 1) / a->block_size;
      if (a->k && !at_once(s)) long_tokens += n;
      work += n * a->heads * (spans[s].context + n) * (a->d + a->v_d);
    }
  }

  int64_t shared() const { return a->heads / a->kv_heads; }
  int64_t units_of_head(int64_t s) const {
    return ((spans[s].end - spans[s].start) * shared() + QUERIES - 1) / QUERIES;
  }
  int64_t key_floats() const { return a->kv_heads * a->d * a->block_size; }
  int64_t block_floats() const { return key_floats() + a->kv_heads * a->block_size * a->v_width; }
  // Whether one unit has all of a head's rows: it then keeps the head's keys itself. A line of keys that one core has
  // just written is slow to read for another.
  bool at_once(int64_t s) const { return a->q && units_of_head(s) <= 1; }

  // `use` is called with the Store of one head of a span.
  template <typename Use>
  void with_store(int64_t s, int64_t head, Use use) const {
    if (spans[s].first_page < 0)
      return use(Store<float>{a, own, own + blocks * key_floats(), nullptr, temporary[s], head});
    with_type(a->page_dtype, [&](auto* type) {
      using Page = std::remove_pointer_t<decltype(type)>;
      use(Store<Page>{a, (Page*)a->keys, (Page*)a->values, pages + spans[s].first_page, 0, head});
    });
  }

  void keep_long(int thread, int threads) const {
    const int64_t mine = long_tokens * thread / threads, end_of_mine = long_tokens * (thread + 1) / threads;
    int64_t seen = 0;
    for (int64_t s = 0; s < num_spans; ++s) {
      if (at_once(s)) continue;
      const int64_t n = spans[s].end - spans[s].start;
      const int64_t from = mine > seen ? mine - seen : 0, to = end_of_mine - seen < n ? end_of_mine - seen : n;
      for (int64_t head = 0; from < to && head < a->kv_heads; ++head)
        with_store(s, head, [&](const auto& where) {
          keep(*a, spans[s], where, spans[s].start + from, spans[s].start + to);
        });
      seen += n;
    }
  }

  // Floats of the temporary pages, and of each thread's workspace.
  int64_t temporary_floats() const { return blocks * block_floats(); }
  int64_t thread_floats() const { return QUERIES * (CHUNK + a->v_width + a->d); }

  // next: the first unit that no thread has taken, zero at first; scratch: this thread's workspace. A thread takes a unit
  // while it computes another, to ask for its keys; but not of the last ones, for which other threads wait.
  void run(int thread, int threads, Team& team, int64_t* next, float* scratch) const {
    if (long_tokens) {
      keep_long(thread, threads);
      team.meet(threads);
    }
    const auto take = [&](int64_t& s) {  // a unit, and its span
      const int64_t unit = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      while (s < num_spans && unit >= units[s + 1]) ++s;
      return unit;
    };
    int64_t s = 0, unit = take(s);
    while (s < num_spans) {
      const bool ahead = unit + 2 * threads <= units[num_spans];
      int64_t next_s = s, next_unit = ahead ? take(next_s) : 0;
      const void* after[TILES_AHEAD];
      for (const void*& tile : after) tile = scratch;
      if (ahead && next_s < num_spans) first_tiles(next_s, next_unit - units[next_s], after);
      attend_unit(s, unit - units[s], after, scratch);
      if (!ahead) next_unit = take(next_s);
      s = next_s, unit = next_unit;
    }
  }

  // The first keys that a span's first row may see.
  void first_tiles(int64_t s, int64_t unit, const void** tiles) const {
    const int64_t context = spans[s].context, length = context + spans[s].end - spans[s].start;
    int64_t key = a->window && context >= a->window ? (context - a->window + 1) / VL * VL : 0;
    with_store(s, unit / units_of_head(s), [&](const auto& where) {
      for (int t = 0; t < TILES_AHEAD && key < length; ++t, key += VL) tiles[t] = where.key(key);
    });
  }

  // A head's units stand side by side, so that its keys and values stay near; the last rows, which see most where
  // attention is causal, come first.
  void attend_unit(int64_t s, int64_t unit, const void* const* after, float* scratch) const {
    const Span& span = spans[s];
    const int64_t each = units_of_head(s), first = (each - 1 - unit % each) * QUERIES;
    const int64_t left = (span.end - span.start) * shared() - first;
    with_store(s, unit / each, [&](const auto& where) {
      if (a->k && at_once(s)) keep(*a, span, where, span.start, span.end);
      attend_some<QUERIES>(left < QUERIES ? left : QUERIES, *a, span, where, first, after, scratch);
    });
  }
};
