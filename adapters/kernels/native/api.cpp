// What Python calls (../library.py): plain C, addresses and sizes. Nothing here checks its arguments; Python does.
#include "attention.h"
#include "linear.h"
#include "small.h"

#define API extern "C" __attribute__((visibility("default")))

static thread_local Scratch shrunk, temporary_pages, workspace, plan;

API int64_t packed_elements(int64_t d_out, int64_t d_in) { return panels_of(d_out) * PANEL * d_in; }

API void pack(const float* w, int64_t d_out, int64_t d_in, int32_t dtype, void* packed) {
  with_type(dtype, [&](auto* type) { pack_panels(w, d_out, d_in, (decltype(type))packed); });
}

// Layers that share x: [tokens, d_in]. See linear.h.
API void linear(const Layer* layers, int64_t count, const float* x, int64_t x_stride, int64_t tokens,
                const Segment* segments, int64_t num_segments) {
  if (!tokens) return;
  Linear call{layers, count, x, x_stride, tokens, segments, num_segments, nullptr};
  const int64_t rank = call.largest_rank();
  call.h_stride = (rank + 3) / 4 * 4;
  call.shrunk = shrunk.floats(count * tokens * call.h_stride);
  parallel(call.work(), [&](int thread, int threads) {
    if (rank) {
      call.shrink_all(thread, threads);
      barrier(threads);
    }
    call.columns(thread, threads);
  });
}

// Keys and values of all tokens go to their pages, then each token attends. See attention.h.
API void attend(const Attention* attention, const Span* spans, int64_t num_spans, const int32_t* pages) {
  const Attention& a = *attention;
  const int64_t shared = a.heads / a.kv_heads;
  int64_t* units = (int64_t*)plan.floats(4 * (num_spans + 1));  // first unit of each span, and its temporary page
  int64_t *temporary = units + num_spans + 1, blocks = 0, tokens = 0, work = 0;
  units[0] = 0;
  for (int64_t s = 0; s < num_spans; ++s) {
    const int64_t n = spans[s].end - spans[s].start;
    units[s + 1] = units[s] + (n * shared + QUERIES - 1) / QUERIES * a.kv_heads;
    temporary[s] = blocks;
    if (spans[s].first_page < 0) blocks += (n + a.block_size - 1) / a.block_size;
    tokens += n;
    work += n * a.heads * (spans[s].context + n) * (a.d + a.v_d);
  }
  const int64_t key_size = a.kv_heads * a.d * a.block_size, value_size = a.kv_heads * a.block_size * a.v_width;
  float* own_keys = temporary_pages.floats(blocks * (key_size + value_size));
  float* own_values = own_keys + blocks * key_size;
  auto store_of = [&](int64_t s) {
    const bool cached = spans[s].first_page >= 0;
    return Store{attention, cached ? a.keys : own_keys, cached ? a.values : own_values,
                 cached ? pages + spans[s].first_page : nullptr, temporary[s], 0};
  };
  const int64_t each = QUERIES * (CHUNK + a.v_width + a.d);
  float* scratch = workspace.floats(each * omp_get_max_threads());
  int64_t next = 0;
  parallel(work, [&](int thread, int threads) {
    const int64_t mine = tokens * thread / threads, end_of_mine = tokens * (thread + 1) / threads;
    int64_t seen = 0;
    for (int64_t s = 0; s < num_spans; ++s) {
      const int64_t n = spans[s].end - spans[s].start;
      const int64_t from = mine > seen ? mine - seen : 0, to = end_of_mine - seen < n ? end_of_mine - seen : n;
      if (from < to) keep(a, spans[s], store_of(s), spans[s].start + from, spans[s].start + to);
      seen += n;
    }
    barrier(threads);
    int64_t s = 0;
    for (;;) {
      const int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (unit >= units[num_spans]) return;
      while (unit >= units[s + 1]) ++s;
      const int64_t rows = (spans[s].end - spans[s].start) * shared, local = unit - units[s];
      const int64_t first = local / a.kv_heads * QUERIES, left = rows - first;
      Store where = store_of(s);
      where.head = local % a.kv_heads;
      attend_some<QUERIES>(left < QUERIES ? left : QUERIES, a, spans[s], where, first, scratch + thread * each);
    }
  });
}

API void rms_norm(const float* x, const float* weight, float eps, float* y, int64_t rows, int64_t d) {
  parallel(rows * d, [&](int thread, int threads) {
    for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; ++r)
      normalise(x + r * d, weight, eps, y + r * d, d);
  });
}

// y = act(gate) · up over `count` numbers.
API void gated(const float* gate, const float* up, float* y, int64_t count, int32_t activation) {
  parallel(count * 4, [&](int thread, int threads) {
    gate_part(gate, up, y, count * thread / threads, count * (thread + 1) / threads, activation);
  });
}

API int32_t vector_lanes() { return VL; }
