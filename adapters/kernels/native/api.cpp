// What Python calls (../library.py): plain C, addresses and sizes. Nothing here checks its arguments; Python does.
#include "decoder.h"
#include "sampling.h"

#define API extern "C" __attribute__((visibility("default")))

static thread_local Rooms rooms;
constexpr size_t KEPT = 4 << 20;  // bytes of each that stay from one call to the next: enough for decode steps

API int64_t packed_bytes(int64_t d_out, int64_t d_in, int32_t dtype) {
  if (steps_of(dtype)) return panels_of(d_out) * groups_of(d_in) * sizeof(WeightGroup);
  int64_t bytes = 0;
  with_type(dtype, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    bytes = panels_of(d_out) * PANEL * depth_of<W>(d_in) * sizeof(W);
  });
  return bytes;
}

API void pack(const float* w, int64_t d_out, int64_t d_in, int32_t dtype, void* packed) {
  if (steps_of(dtype)) return pack_groups(w, d_out, d_in, (WeightGroup*)packed);
  with_type(dtype, [&](auto* type) { pack_panels(w, d_out, d_in, (decltype(type))packed); });
}

// Layers that share x: [tokens, d_in]. See linear.h.
API void linear(const Layer* layers, int64_t count, const float* x, int64_t x_stride, int64_t tokens,
                const Segment* segments, int64_t num_segments) {
  if (!tokens) return;
  Linear call{layers, count, x, x_stride, tokens, segments, num_segments};
  call.plan(omp_get_max_threads());
  call.use(rooms.products.floats(call.floats()));
  parallel(call.work, [&](int thread, int threads, Team& team) { call.run(thread, threads, team); });
  rooms.keep(KEPT);
}

// Keys and values of all tokens go to their pages, then each token attends. See attention.h.
API void attend(const Attention* attention, const Span* spans, int64_t num_spans, const int32_t* pages) {
  Plan call(attention, spans, num_spans, pages, (int64_t*)rooms.plans.bytes(Plan::room(num_spans) * sizeof(int64_t)));
  call.own = rooms.pages.floats(call.temporary_floats());
  const int64_t each = call.thread_floats();
  float* scratch = rooms.threads.floats(each * omp_get_max_threads());
  int64_t next = 0;
  parallel(call.work, [&](int thread, int threads, Team& team) {
    call.run(thread, threads, team, &next, scratch + thread * each);
  });
  rooms.keep(KEPT);
}

// Decoder layers one after another: x: [tokens, hidden] becomes the last one's output. See decoder.h.
API void decode(const DecoderLayer* layers, int64_t count, const Row* row, float* x) {
  if (!row->tokens || !count) return;
  Decoder call(layers, count, *row, x, rooms, omp_get_max_threads());
  parallel(call.work, [&](int thread, int threads, Team& team) { call.run(thread, threads, team); });
  rooms.keep(KEPT);
}

API void rms_norm(const float* x, const float* weight, float eps, float* y, int64_t rows, int64_t d) {
  parallel(rows * d, [&](int thread, int threads, Team&) {
    for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; ++r)
      normalise(x + r * d, weight, eps, y + r * d, d);
  });
}

// x: [rows, d] += delta, y = norm(x)
API void add_rms_norm(float* x, const float* delta, const float* weight, float eps, float* y, int64_t rows, int64_t d) {
  parallel(rows * d, [&](int thread, int threads, Team&) {
    for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; ++r) {
      add(x + r * d, delta + r * d, d);
      normalise(x + r * d, weight, eps, y + r * d, d);
    }
  });
}

// y: [rows, d] = act(gate) · up, whose rows are `stride` apart.
API void gated(const float* gate, const float* up, int64_t stride, float* y, int64_t rows, int64_t d,
               int32_t activation) {
  const Gating call{gate, up, y, rows, d, stride, d, activation};
  parallel(rows * d * 4, [&](int thread, int threads, Team&) { call.run(thread, threads); });
}

// The next token of each row of logits: [rows, vocabulary]. See sampling.h. Its buffer stays: every step needs it.
API void sample(const float* logits, int64_t rows, int64_t vocabulary, const Draw* draws, int64_t* tokens) {
  const int64_t each = Weights::floats(vocabulary), most = omp_get_max_threads();
  float* scratch = rooms.draws.floats(each * std::min(rows, most));
  parallel(rows > 1 ? rows * vocabulary * 8 : 0, [&](int thread, int threads, Team&) {
    for (int64_t r = thread; r < rows; r += threads)  // neighbours cost the same more often than others
      tokens[r] = draw_token(logits + r * vocabulary, vocabulary, draws[r], scratch + thread * each);
  });
}

API int32_t vector_lanes() { return VL; }
API int32_t has_tiles() { return tiles_granted; }
