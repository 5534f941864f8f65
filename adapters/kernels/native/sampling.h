// The next token of rows of logits, each by its own rule and one random number. Each row is one thread's.
//
// Tokens have weights e^((x - greatest) / temperature), and without top-k and top-p they are drawn in the order of their
// numbers. With these they stand in descending order, equal ones by number: weights are counted by their leading bits,
// and only the few buckets in which something ends are sorted.
#pragma once

#include <cmath>
#include <functional>
#include <numeric>

#include "parallel.h"
#include "vector.h"

struct Draw {
  double temperature;  // 0: the greatest is taken; else its inverse is finite
  double min_p;        // 0 to 1: what has less than this share of the greatest weight is left out
  double top_p;        // above 0; of what top_k leaves, the fewest that have this share together; from 1 on: all
  double uniform;      // at least 0, below 1
  int64_t top_k;       // so many of the greatest; 0: all
};

// The greatest; NaN where there is one.
static inline float peak(const float* x, int64_t n) {
  vf most = splat(-INFINITY);
  vi wrong = (vi){};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    const vf v = load(x + i);
    most = max(most, v);
    wrong |= v != v;
  }
  float found = largest(most);
  bool bad = false;
  for (int lane = 0; lane < VL; ++lane) bad |= wrong[lane] != 0;
  for (; i < n; ++i) found = x[i] > found ? x[i] : found, bad |= x[i] != x[i];
  return bad ? NAN : found;
}

struct Weights {  // of one row
  static constexpr int64_t BLOCK = 256;
  static constexpr int SHIFT = 20, BUCKETS = (0x3f800000 >> SHIFT) + 1;  // weights are at most 1

  struct Member {
    float weight;
    int32_t token;
  };
  // So many in descending order: all of the buckets above, and the first `inside` of `bucket`; `token` is the last.
  struct Prefix {
    int64_t bucket, inside;
    double weight;
    int32_t token;
  };

  const int64_t n, blocks;
  float* const weights;
  double* const sums;  // of blocks
  float* const tops;   // the greatest of each block
  Member* const members;
  int64_t sorted = -1;  // the bucket that `members` are
  int32_t counts[BUCKETS];
  double masses[BUCKETS];

  static int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }
  static int64_t floats(int64_t n) { return (3 * (n + blocks_of(n)) + 15) / 16 * 16; }

  Weights(int64_t n, float* scratch)
      : n(n), blocks(blocks_of(n)), weights(scratch + 3 * blocks), sums((double*)scratch), tops(scratch + 2 * blocks),
        members((Member*)(weights + n)) {}

  // Returns their sum.
  double weigh(const float* x, float greatest, const Draw& draw) {
    const float factor = 1 / draw.temperature, least = draw.min_p;
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = std::min(n, (b + 1) * BLOCK);
      vf sum_of_block = (vf){}, top = (vf){};
      for (int64_t i = b * BLOCK; i < end; i += VL) {
        float rest[VL];
        const bool whole = i + VL <= end;
        for (int64_t j = 0; !whole && j < VL; ++j) rest[j] = i + j < end ? x[i + j] : -INFINITY;
        vf w = exp((load(whole ? x + i : rest) - greatest) * factor);
        w = w < splat(least) ? (vf){} : w;
        sum_of_block += w;
        top = max(top, w);
        store(whole ? weights + i : rest, w);
        if (!whole) memcpy(weights + i, rest, (end - i) * 4);
      }
      total += sums[b] = sum(sum_of_block);
      tops[b] = largest(top);
    }
    return total;
  }

  // The first token with which the sum exceeds `target`, in the order of their numbers.
  int32_t first_above(double target) const {
    double before = 0;
    int64_t last = 0;
    for (int64_t b = 0; b < blocks; before += sums[b++]) {
      if (before + sums[b] > target) return first_above(b, (target - before) / sums[b]);
      if (sums[b] > 0) last = b;
    }
    return first_above(last, 1);
  }

  // The same in one block, for a share of its sum, which is in fp32.
  int32_t first_above(int64_t block, double share) const {
    const int64_t start = block * BLOCK, end = std::min(n, start + BLOCK);
    double here = 0;
    const double target = share * std::accumulate(weights + start, weights + end, 0.);
    int64_t last = start;
    for (int64_t i = start; i < end; ++i) {
      if (!(weights[i] > 0)) continue;
      if ((here += weights[i]) > target) return i;
      last = i;
    }
    return last;
  }

  static int64_t bucket_of(float weight) { return read<uint32_t>(&weight) >> SHIFT; }

  template <typename Visit>
  void each_from(float least, Visit visit) const {
    constexpr int64_t STRIDE = 4 * VL;
    for (int64_t start = 0; start < n; start += STRIDE) {
      const int64_t end = std::min(n, start + STRIDE);
      const float* w = weights + start;
      if (end - start == STRIDE &&
          largest(max(max(load(w), load(w + VL)), max(load(w + 2 * VL), load(w + 3 * VL)))) < least)
        continue;
      for (int64_t i = start; i < end; ++i)
        if (weights[i] >= least) visit(i);
    }
  }

  // A weight below which no token is among the first `top_k`.
  float least_of(int64_t top_k) {
    if (top_k > blocks) return 0;
    float* copy = (float*)members;
    std::copy(tops, tops + blocks, copy);
    std::nth_element(copy, copy + top_k - 1, copy + blocks, std::greater<float>());
    return copy[top_k - 1];
  }

  // Returns all from `least` on, above 0; total: of all weights.
  Prefix count(float least, double total) {
    memset(counts, 0, sizeof counts);
    memset(masses, 0, sizeof masses);
    each_from(least, [&](int64_t i) {
      const int64_t bucket = bucket_of(weights[i]);
      ++counts[bucket];
      masses[bucket] += weights[i];
    });
    int64_t lowest = 1;
    while (!counts[lowest] && lowest < BUCKETS - 1) ++lowest;
    return {lowest, counts[lowest], total, 0};
  }

  void sort(int64_t bucket) {
    if (sorted == bucket) return;
    const uint32_t bits = bucket << SHIFT;
    Member* end = members;
    each_from(read<float>(&bits), [&](int64_t i) {
      if (bucket_of(weights[i]) == bucket) *end++ = {weights[i], (int32_t)i};
    });
    const auto before = [](const Member& a, const Member& b) {
      return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
    };
    if (!std::is_sorted(members, end, before)) std::sort(members, end, before);  // often all are equal
    sorted = bucket;
  }

  // The shortest part of `within` for whose count and weight `enough` holds; all of it where it does for none.
  template <typename Enough>
  Prefix shortest(const Prefix& within, Enough enough) {
    int64_t count = 0;
    double weight = 0;
    for (int64_t b = BUCKETS - 1; b > within.bucket; --b) {
      if (!counts[b]) continue;
      if (enough(count + counts[b], weight + masses[b])) {
        const Prefix found = search(b, counts[b], count, weight, enough);
        if (found.inside) return found;  // else rounding
      }
      count += counts[b], weight += masses[b];
    }
    const Prefix found = search(within.bucket, within.inside, count, weight, enough);
    return found.inside ? found : Prefix{within.bucket, within.inside, within.weight, members[within.inside - 1].token};
  }

  // The same among the first `size` of one bucket, after what is counted already; none: `inside` 0.
  template <typename Enough>
  Prefix search(int64_t bucket, int64_t size, int64_t count, double weight, Enough enough) {
    sort(bucket);
    for (int64_t i = 0; i < size; ++i) {
      weight += members[i].weight;
      if (enough(count + i + 1, weight)) return {bucket, i + 1, weight, members[i].token};
    }
    return {};
  }
};

// -1 for a row whose greatest number is not finite.
static int32_t draw_token(const float* x, int64_t n, const Draw& draw, float* scratch) {
  const float greatest = peak(x, n);
  if (!std::isfinite(greatest)) return -1;
  if (draw.temperature == 0) return std::find(x, x + n, greatest) - x;
  Weights weights(n, scratch);
  const double total = weights.weigh(x, greatest, draw);
  if (draw.top_k <= 0 && draw.top_p >= 1) return weights.first_above(draw.uniform * total);
  // What is below an equal share of what top_p leaves out is part of that; a little less, for sums are rounded.
  const float least = draw.top_k > 0 ? weights.least_of(draw.top_k) : 0.999 * (1 - draw.top_p) * total / n;
  Weights::Prefix kept = weights.count(std::max(least, __FLT_MIN__), total);
  if (draw.top_k > 0) kept = weights.shortest(kept, [&](int64_t count, double) { return count >= draw.top_k; });
  if (draw.top_p < 1) {
    const double goal = draw.top_p * kept.weight;
    kept = weights.shortest(kept, [&](int64_t, double weight) { return weight >= goal; });
  }
  const double target = draw.uniform * kept.weight;
  return weights.shortest(kept, [&](int64_t, double weight) { return weight > target; }).token;
}
