// Work shared between the threads that torch has: its OpenMP pool, entered by the thread that calls.
#pragma once

#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
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

// The threads of one parallel region, and where they wait for one another.
//
// OpenMP's own barrier waits some milliseconds without giving up the processor. Where other processes want it, too, the
// thread that is waited for does not get it: a step took a hundred times as long beside two busy processes. Here who
// waits in vain sleeps, and the next time does so earlier.
class Team {
 public:
  // Returns once all `threads` have come.
  void meet(int threads) {
    if (threads == 1) return;
    const uint32_t now = meetings.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) return part(now);
    const int turns = patience.load(std::memory_order_relaxed);
    for (int i = 0; i < turns; ++i, pause())
      if (meetings.load(std::memory_order_acquire) != now) return learn(turns, true);
    learn(turns, sleep(now) < WORTH_SPINNING);
  }

 private:
  typedef std::chrono::steady_clock Clock;
  static constexpr int LEAST = 64, MOST = 8192;  // turns: some microseconds; 0.2 to 0.4 ms, by processor
  static constexpr std::chrono::microseconds WORTH_SPINNING{200};
  static inline std::atomic<int> patience{MOST};  // of all teams

  alignas(64) std::atomic<uint32_t> meetings{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;  // std's would bind the object to a new libstdc++
  pthread_cond_t parted = PTHREAD_COND_INITIALIZER;
  int sleepers = 0;

  static void learn(int turns, bool worth) {
    const int wanted = worth ? std::min(turns * 2, MOST) : std::max(turns / 4, LEAST);
    if (wanted != turns) patience.store(wanted, std::memory_order_relaxed);
  }

  // How long it was.
  Clock::duration sleep(uint32_t now) {
    const Clock::time_point start = Clock::now();
    pthread_mutex_lock(&mutex);
    ++sleepers;
    while (meetings.load(std::memory_order_relaxed) == now) pthread_cond_wait(&parted, &mutex);
    --sleepers;
    pthread_mutex_unlock(&mutex);
    return Clock::now() - start;
  }

  void part(uint32_t now) {
    arrived.store(0, std::memory_order_relaxed);
    pthread_mutex_lock(&mutex);
    meetings.store(now + 1, std::memory_order_release);
    const bool any = sleepers > 0;
    pthread_mutex_unlock(&mutex);
    if (any) pthread_cond_broadcast(&parted);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
};

// One thread's part of work that is passed piece by piece: neighbours stay together.
struct Share {
  int64_t thread, threads, all;  // all: what the pieces cost together
  int64_t passed = 0;
  // Whether the next piece belongs to it.
  bool takes(int64_t cost) {
    const int64_t middle = passed + cost / 2;
    passed += cost;
    return middle * threads / all == thread;
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
