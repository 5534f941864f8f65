// Work shared between the threads that torch has: its OpenMP pool, entered by the thread that calls.
#pragma once

#include <omp.h>
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>

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

// The threads of one parallel region, and where they wait for one another.
//
// OpenMP's own barrier waits some milliseconds without giving up the processor. Where another process wants it, too, that
// is what the thread waited for does not get: a step took a hundred times as long beside two busy processes. Here who
// waits in vain sleeps, and the next time it does so earlier.
class Team {
 public:
  // Returns once all `threads` have come.
  void meet(int threads) {
    if (threads == 1) return;
    const uint32_t now = meetings.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) return part(now);
    const int turns = patience.load(std::memory_order_relaxed);
    for (int i = 0; i < turns; ++i, pause())
      if (meetings.load(std::memory_order_acquire) != now) {
        if (turns < MOST) patience.store(turns * 2, std::memory_order_relaxed);
        return;
      }
    patience.store(turns > LEAST ? turns / 4 : LEAST, std::memory_order_relaxed);
    std::unique_lock<std::mutex> lock(mutex);
    ++sleepers;
    woken.wait(lock, [&] { return meetings.load(std::memory_order_relaxed) != now; });
    --sleepers;
  }

 private:
  static constexpr int LEAST = 64, MOST = 8192;  // turns: about a microsecond; some hundred
  static inline std::atomic<int> patience{MOST};
  std::atomic<uint32_t> meetings{0};
  std::atomic<int> arrived{0};
  std::mutex mutex;
  std::condition_variable woken;
  int sleepers = 0;

  void part(uint32_t now) {
    arrived.store(0, std::memory_order_relaxed);
    std::unique_lock<std::mutex> lock(mutex);
    meetings.store(now + 1, std::memory_order_release);
    const bool any = sleepers > 0;
    lock.unlock();
    if (any) woken.notify_all();
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
};

// Entering a parallel region costs some microseconds: less work than this is done where it is.
constexpr int64_t SMALL_WORK = 1 << 16;  // multiplications

template <typename Body>
static inline void parallel(int64_t work, Body body) {
  const int threads = omp_get_max_threads();
  Team team;
  if (threads == 1 || work < SMALL_WORK) return body(0, 1, team);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads(), team);
}
