// Work shared between the threads that torch has: its OpenMP pool, entered by the thread that calls.
#pragma once

#include <omp.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

// A buffer that grows; one for each calling thread and purpose.
struct Scratch {
  static constexpr size_t PAGE = 1 << 16;  // at least as large as those of common systems
  void* memory = nullptr;
  size_t size = 0, used = 0;  // used: since `keep`
  float* floats(int64_t count) { return (float*)bytes(count * 4); }
  void* bytes(int64_t count) {
    const size_t wanted = ((size_t)(count > 0 ? count : 1) + PAGE - 1) / PAGE * PAGE;
    if (wanted > size) {
      free(memory);
      memory = aligned_alloc(PAGE, wanted);
      if (!memory) abort();
      size = wanted;
    }
    if (wanted > used) used = wanted;
    return memory;
  }
  // The system gets back what lies beyond `most` bytes, a multiple of PAGE, until it is used again.
  void keep(size_t most) {
    if (used > most) madvise((char*)memory + most, used - most, MADV_DONTNEED);
    used = 0;
  }
  ~Scratch() { free(memory); }
};

// Entering a parallel region costs some microseconds: less work than this is done where it is.
constexpr int64_t SMALL_WORK = 1 << 16;  // multiplications

template <typename Body>
static inline void parallel(int64_t work, Body body) {
  const int threads = omp_get_max_threads();
  if (threads == 1 || work < SMALL_WORK) return body(0, 1);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

static inline void barrier(int threads) {
  if (threads > 1) {
#pragma omp barrier
  }
}
