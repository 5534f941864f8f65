// The CPU kernels against loops in double precision, for a processor that is not this one. Prints the largest relative
// error of each part. test_other_processors.py runs it.
#include <cmath>
#include <cstdio>
#include <random>
#include <tuple>
#include <vector>

#include "../adapters/kernels/native/api.cpp"

typedef std::vector<float> Floats;
static std::mt19937 generator(1);

static Floats random_floats(int64_t count) {
  Floats values(count);
  for (float& v : values) v = std::normal_distribution<float>()(generator);
  return values;
}

// NaN where either is: it must not pass for no error.
static double larger(double a, double b) { return a != a || b <= a ? a : b; }

static double dot(const float* a, const float* b, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) s += (double)a[i] * b[i];
  return s;
}

static double error_of_linear(int64_t d_in, int64_t tokens, int64_t length) {
  const int64_t d_out = 37, ranks[] = {16, 0, 5};
  Floats x = random_floats(tokens * d_in), w = random_floats(d_out * d_in);
  const Floats bias = random_floats(d_out), gain = random_floats(d_out);
  Floats y(tokens * d_out), a[3], b[3];
  std::vector<char> packed(packed_bytes(d_out, d_in, F32));
  pack(w.data(), d_out, d_in, F32, packed.data());
  Term table[3];
  for (int s = 0; s < 3; ++s) {
    a[s] = random_floats(ranks[s] * d_in + 1);
    b[s] = random_floats(ranks[s] * d_out + 1);
    table[s] = Term{a[s].data(), b[s].data(), s == 0 ? bias.data() : nullptr, 0.5f, (int32_t)ranks[s], F32, 0,
                    s == 2 ? gain.data() : nullptr, s == 2 ? bias.data() : nullptr};
  }
  std::vector<Segment> segments;
  for (int64_t t = 0; t < tokens; t += length + 1)  // a token without an adapter between two segments
    segments.push_back(Segment{(int32_t)(t % 3), (int32_t)t, (int32_t)(t + length < tokens ? t + length : tokens)});
  Layer layer{packed.data(), bias.data(), table, d_in, d_out, y.data(), d_out, F32, 0};
  linear(&layer, 1, x.data(), d_in, tokens, segments.data(), segments.size());
  std::vector<const Term*> terms(tokens, nullptr);
  for (const Segment& s : segments)
    for (int t = s.start; t < s.end; ++t) terms[t] = table[s.slot].rank ? table + s.slot : nullptr;
  double worst = 0, size = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < d_out; ++n) {
      double expected = bias[n] + dot(&x[t * d_in], &w[n * d_in], d_in);
      for (int64_t r = 0; terms[t] && r < terms[t]->rank; ++r)
        expected += 0.5 * dot(&x[t * d_in], (float*)terms[t]->a + r * d_in, d_in) * ((float*)terms[t]->b)[r * d_out + n];
      if (terms[t] && terms[t]->bias) expected += bias[n];
      if (terms[t] && terms[t]->gain) expected = expected * gain[n] + bias[n];
      worst = larger(worst, std::fabs(y[t * d_out + n] - expected));
      size = std::fmax(size, std::fabs(expected));
    }
  return worst / size;
}

// Of weights that the form holds exactly, and of inputs that it does where it wants whole numbers: mixed ones (sign 0),
// or all the largest.
static double error_of_form(int32_t form, int64_t d_in, int64_t tokens, int sign) {
  const int64_t d_out = 33, steps = steps_of(form);
  Floats x = random_floats(tokens * d_in), w(d_out * d_in), y(tokens * d_out);
  for (size_t i = 0; i < w.size(); ++i)
    w[i] = sign == 0 && i % d_in % GROUP ? (float)((int)(i * 7 % 255) - 127) : 127.f;
  for (size_t i = 0; steps && i < x.size(); ++i)
    x[i] = i % d_in % GROUP == 0 ? steps : (sign ? sign * steps : (int64_t)(i * 7919 % (2 * steps + 1)) - steps);
  std::vector<char> packed(packed_bytes(d_out, d_in, form));
  pack(w.data(), d_out, d_in, form, packed.data());
  Layer layer{packed.data(), nullptr, nullptr, d_in, d_out, y.data(), d_out, form, 0};
  linear(&layer, 1, x.data(), d_in, tokens, nullptr, 0);
  double worst = 0, size = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < d_out; ++n) {
      const double expected = dot(&x[t * d_in], &w[n * d_in], d_in);
      worst = larger(worst, std::fabs(y[t * d_out + n] - expected));
      size = larger(size, std::fabs(expected));
    }
  return worst / size;
}

#if defined(HAS_TILES)
// Outputs of rows [first, tokens) that tiles compute otherwise than is done without them.
static int errors_of_tiles(int32_t form, int64_t d_in, int64_t tokens, int64_t first) {
  const int64_t d_out = 70, groups = groups_of(d_in), steps = steps_of(form);
  const Floats x = random_floats(tokens * d_in), w = random_floats(d_out * d_in);
  std::vector<char> packed(packed_bytes(d_out, d_in, form));
  pack(w.data(), d_out, d_in, form, packed.data());
  std::vector<Input> inputs(Quantised::inputs(groups, tokens, steps));
  std::vector<InputGroup> scales(groups * tokens);
  const Quantised quantised{inputs.data(), scales.data(), groups, tokens, steps};
  for (int64_t t = 0; t < tokens; ++t) quantise_row(&x[t * d_in], d_in, quantised, t);
  Floats by_tiles(tokens * d_out), without(tokens * d_out);
  const auto* groups_of_w = (const WeightGroup*)packed.data();
  const int64_t panels = panels_of(d_out);
  multiply_tile_dots(quantised, first, tokens, groups_of_w, d_out, nullptr, by_tiles.data(), d_out, 0, panels);
  multiply_dots(quantised, first, tokens, groups_of_w, d_out, nullptr, without.data(), d_out, 0, panels);
  int errors = 0;
  for (int64_t i = 0; i < tokens * d_out; ++i) errors += by_tiles[i] != without[i];
  return errors;
}
#endif

// Outputs that hide what is not finite in their row, or have it from another row.
static int errors_of_faults(int32_t form, int64_t d_in, int64_t tokens, int64_t place) {
  const int64_t d_out = 33, faulty = tokens / 2;
  const Floats w = random_floats(d_out * d_in);
  std::vector<char> packed(packed_bytes(d_out, d_in, form));
  pack(w.data(), d_out, d_in, form, packed.data());
  int errors = 0;
  for (const float fault : {NAN, INFINITY, -INFINITY}) {
    Floats x = random_floats(tokens * d_in), y(tokens * d_out);
    x[faulty * d_in + place] = fault;
    Layer layer{packed.data(), nullptr, nullptr, d_in, d_out, y.data(), d_out, form, 0};
    linear(&layer, 1, x.data(), d_in, tokens, nullptr, 0);
    for (int64_t i = 0; i < tokens * d_out; ++i) errors += std::isfinite(y[i]) == (i / d_out == faulty);
  }
  return errors;
}

// x in double precision as attention turns it: normed, then the first `rotated` numbers rotated by halves.
static Floats turned(const Floats& x, const Floats& weight, const Floats& cos, const Floats& sin, int64_t heads,
                     int64_t rotated) {
  const int64_t d = weight.size(), half = rotated / 2;
  Floats y(x.size());
  for (size_t row = 0; row < x.size() / d; ++row) {
    const float *from = &x[row * d], *c = &cos[row / heads * rotated], *s = &sin[row / heads * rotated];
    const double size = std::sqrt(dot(from, from, d) / d + 1e-5);
    for (int64_t i = 0; i < d; ++i) {
      const double mine = from[i] / size * weight[i];
      y[row * d + i] = mine;
      if (i >= rotated) continue;
      const int64_t other = i < half ? i + half : i - half;
      const double far = from[other] / size * weight[other];
      y[row * d + i] = mine * c[i] + (i < half ? -far : far) * s[i];
    }
  }
  return y;
}

// biased: with biases for distances of -3 ... 1. rotated: so many numbers of queries and keys, which are normed before;
// 0: neither.
static double error_of_attention(int64_t d, bool biased, int64_t rotated) {
  const int64_t tokens = 50, heads = 6, kv_heads = 2, v_d = 36;
  Floats q = random_floats(tokens * heads * d), k = random_floats(tokens * kv_heads * d);
  Floats v = random_floats(tokens * kv_heads * v_d), out(tokens * heads * v_d);
  Attention a{};
  a.kv_heads = kv_heads, a.heads = heads, a.d = d, a.v_d = v_d, a.v_width = (v_d + VL - 1) / VL * VL;
  a.block_size = 16, a.scale = rotated ? 0.03125f : 0.2f, a.causal = 1;
  a.q = q.data(), a.q_row = heads * d, a.q_head = d, a.k = k.data(), a.k_row = kv_heads * d, a.k_head = d;
  a.v = v.data(), a.v_row = kv_heads * v_d, a.v_head = v_d, a.out = out.data();
  const Floats bias = random_floats(heads * 5);
  const Floats cos = random_floats(tokens * rotated), sin = random_floats(tokens * rotated);
  const Floats q_norm = random_floats(d), k_norm = random_floats(d);
  if (biased) a.bias = bias.data(), a.biases = 5, a.before = 3;
  if (rotated) {
    a.q_norm = {q_norm.data(), 1e-5f, 0}, a.k_norm = {k_norm.data(), 1e-5f, 0};
    a.cos = cos.data(), a.sin = sin.data(), a.rope_row = a.rotated = rotated;
  }
  const Span spans[] = {{0, 20, 0, -1}, {20, 50, 0, -1}};
  attend(&a, spans, 2, nullptr);
  const Floats seen_q = rotated ? turned(q, q_norm, cos, sin, heads, rotated) : q;
  const Floats seen_k = rotated ? turned(k, k_norm, cos, sin, kv_heads, rotated) : k;
  double worst = 0;
  for (const Span& s : spans)
    for (int t = s.start; t < s.end; ++t)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < v_d; ++i) {
          double total = 0, sum = 0;
          for (int j = s.start; j <= t; ++j) {
            const double lean = biased ? bias[h * 5 + (t - j > 3 ? 0 : j - t + 3)] : 0;
            const double score = dot(&seen_q[(t * heads + h) * d], &seen_k[(j * kv_heads + h / 3) * d], d);
            const double w = std::exp((rotated ? 0.03125 : 0.2) * score + lean);
            total += w;
            sum += w * v[(j * kv_heads + h / 3) * v_d + i];
          }
          worst = larger(worst, std::fabs(out[(t * heads + h) * v_d + i] - sum / total));
        }
  return worst;
}

// A decoder's over sources that were kept in pages before; each has `asking` tokens. Its numbers fit into any dtype.
static double error_of_cross_attention(int64_t asking, int32_t dtype) {
  const int64_t lengths[] = {20, 7}, heads = 6, kv_heads = 2, d = 20, v_d = 36, block_size = 16;
  Attention a{};
  a.kv_heads = kv_heads, a.heads = kv_heads, a.d = d, a.v_d = v_d, a.v_width = (v_d + VL - 1) / VL * VL;
  a.block_size = block_size, a.scale = 0.2f;
  Floats keys(3 * kv_heads * d * block_size), values(3 * kv_heads * block_size * a.v_width);
  Floats q = random_floats(2 * asking * heads * d), k = random_floats(27 * kv_heads * d);
  Floats v = random_floats(27 * kv_heads * v_d), out(2 * asking * heads * v_d);
  for (Floats* numbers : {&k, &v})
    for (float& x : *numbers) x = std::round(x * 16) / 16;
  a.page_dtype = dtype;
  a.keys = keys.data(), a.values = values.data();
  a.k = k.data(), a.k_row = kv_heads * d, a.k_head = d, a.v = v.data(), a.v_row = kv_heads * v_d, a.v_head = v_d;
  const int32_t pages[] = {2, 0, 1};
  const Span sources[] = {{0, 20, 0, 0}, {20, 27, 0, 2}};
  attend(&a, sources, 2, pages);
  a.k = nullptr, a.heads = heads, a.q = q.data(), a.q_row = heads * d, a.q_head = d, a.out = out.data();
  const int32_t n = asking;
  const Span looks[] = {{0, n, 20 - n, 0}, {n, 2 * n, 7 - n, 2}};
  attend(&a, looks, 2, pages);
  double worst = 0;
  for (int64_t t = 0; t < 2 * asking; ++t)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < v_d; ++i) {
        const int64_t first = t < asking ? 0 : 20, length = lengths[t / asking];
        double total = 0, sum = 0;
        for (int64_t j = first; j < first + length; ++j) {
          const double w = std::exp(0.2 * dot(&q[(t * heads + h) * d], &k[(j * kv_heads + h / 3) * d], d));
          total += w;
          sum += w * v[(j * kv_heads + h / 3) * v_d + i];
        }
        worst = larger(worst, std::fabs(out[(t * heads + h) * v_d + i] - sum / total));
      }
  return worst;
}

static double power_below(float x) { return std::exp2(std::floor(std::log2(std::fabs(x)))); }

// In ulps above a half, of random numbers (a half's below the smallest normal one are those of that one); 1 where a
// special number is not what it should be.
template <typename Number>
static double error_of_rounding(double half_ulp) {
  const double least = half_ulp < 0x1p-8 ? 0x1p-14 : 0;
  double worst = 0;
  Number to[VL];
  for (int round = 0; round < 1000; ++round) {
    const Floats x = random_floats(VL);
    store(to, load(x.data()));
    for (int i = 0; i < VL; ++i)
      worst = larger(worst, std::fabs(widen(to[i]) - x[i]) / std::fmax(power_below(x[i]), least) - half_ulp);
  }
  const float most = half_ulp < 0x1p-8 ? 65504.f : 0x1.fep127f;
  const float special[] = {3.4e38f, -3.4e38f, INFINITY, -INFINITY, NAN, 1 + (float)half_ulp, 1 + 3 * (float)half_ulp, 0};
  const float expected[] = {most, -most, INFINITY, -INFINITY, NAN, 1, 1 + 4 * (float)half_ulp, 0};
  for (int i = 0; i < 8; ++i) {
    store(to, splat(special[i]));
    if (widen(to[0]) != expected[i] && !(std::isnan(expected[i]) && std::isnan(widen(to[0])))) worst = 1;
  }
  return worst;
}

static double error_of_gate() {
  constexpr int ROWS = 3, D = 37;
  const Floats both = random_floats(ROWS * 2 * D);
  Floats y(ROWS * D);
  gated(both.data(), &both[D], 2 * D, y.data(), ROWS, D, 0);
  double worst = 0;
  for (int i = 0; i < ROWS * D; ++i) {
    const double gate = both[i / D * 2 * D + i % D], up = both[i / D * 2 * D + D + i % D];
    worst = larger(worst, std::fabs(y[i] - gate / (1 + std::exp(-gate)) * up));
  }
  return worst;
}

// How many tokens are others than their numbers allow, up to rounding.
static int errors_of_sampling(int64_t n, const Draw& draw) {
  Floats x = random_floats(n);
  for (float& v : x) v = std::round(v * 64) / 64;
  int64_t token = -1;
  sample(x.data(), 1, n, &draw, &token);
  const float greatest = *std::max_element(x.begin(), x.end());
  std::vector<double> weights(n);
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = std::exp((x[i] - greatest) / draw.temperature);
    if (weights[i] < draw.min_p) weights[i] = 0;
    order[i] = i;
  }
  if (draw.top_k || draw.top_p < 1)
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
  if (draw.top_k) order.resize(std::min<int64_t>(n, draw.top_k));
  double all = 0, kept = 0, low = 0, high = 0;
  for (int64_t i : order) all += weights[i];
  for (int64_t i : order) {
    if (i == token) low = kept, high = kept + weights[i];
    kept += weights[i];
    if (kept >= draw.top_p * all) break;
  }
  return !(high > low && low / kept < draw.uniform + 1e-6 && high / kept > draw.uniform - 1e-6);
}

// The same where the greatest is taken, and where there is none.
static int errors_of_greedy(int64_t n) {
  int errors = 0;
  for (int64_t place : {(int64_t)0, n / 2, n - 1})
    for (float value : {9.f, NAN, INFINITY}) {
      Floats x = random_floats(n);
      x[place] = value;
      const Draw draw{};
      int64_t token = -2;
      sample(x.data(), 1, n, &draw, &token);
      errors += token != (value == 9.f ? place : -1);
    }
  return errors;
}

int main() {
  double worst = 0;
  for (int64_t d_in : {24, 70, 576})
    for (int64_t tokens : {1, 3, 9, 40, 130})
      for (int64_t length : {1, 5, 60}) worst = larger(worst, error_of_linear(d_in, tokens, length));
  printf("linear %g\n", worst);
  for (int32_t form : {(int32_t)F16, (int32_t)BF16, (int32_t)INT8, (int32_t)INT8_DYNAMIC}) {
    worst = 0;
    for (int64_t d_in : {31, 64, 200})
      for (int64_t tokens : {1, 2, 6, 7, 12, 17, 30, 70, 135})
        for (int sign = steps_of(form) ? -1 : 0; sign <= (steps_of(form) ? 1 : 0); ++sign)
          worst = larger(worst, error_of_form(form, d_in, tokens, sign));
    printf("form%d %g\n", form, worst);
  }
  int errors = 0;
  for (int32_t form : {(int32_t)INT8, (int32_t)INT8_DYNAMIC})
    for (int64_t place : {0, 63, 64, 129})
      for (int64_t tokens : {5, 19}) errors += errors_of_faults(form, 130, tokens, place);
  printf("faults %d\n", errors);
#if defined(HAS_TILES)
  errors = !has_tiles();
  for (int32_t form : {(int32_t)INT8, (int32_t)INT8_DYNAMIC})
    for (int64_t d_in : {31, 64, 200})
      for (int64_t tokens : {1, 8, 16, 17, 31, 33, 65, 100, 128})
        for (int64_t first : {(int64_t)0, tokens / 3}) errors += errors_of_tiles(form, d_in, tokens, first);
  printf("tiles %d\n", errors);
#endif
  printf("attend %g\n", error_of_attention(20, false, 0));
  printf("biased %g\n", error_of_attention(20, true, 0));
  printf("turned %g\n", larger(error_of_attention(20, false, 20), error_of_attention(40, false, 40)));
  printf("part %g\n", larger(error_of_attention(20, false, 6), error_of_attention(80, false, 40)));
  for (int32_t dtype : {(int32_t)F32, (int32_t)F16, (int32_t)BF16})
    printf("cross%d %g\n", dtype, std::fmax(error_of_cross_attention(1, dtype), error_of_cross_attention(30, dtype)));
  printf("rounded %g\n", std::fmax(error_of_rounding<half>(0x1p-11), error_of_rounding<bfloat>(0x1p-8)));
  printf("gated %g\n", error_of_gate());
  errors = 0;
  for (int64_t n : {1, 7, 300, 3000})
    for (double uniform : {0., 0.3, 0.9})
      for (const auto& [min_p, top_p, top_k] : {std::tuple{0., 1., 0}, {0.1, 1., 0}, {0., 0.7, 0}, {0.02, 0.8, 9}})
        errors += errors_of_sampling(n, {0.8, min_p, top_p, uniform, top_k});
  for (int64_t n : {1, 7, 300}) errors += errors_of_greedy(n);
  printf("sampled %d\n", errors);
}
