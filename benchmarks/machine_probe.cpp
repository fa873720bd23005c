// What the machine can do at this moment: multiply-adds of the widest vectors, and memory reads.
// A shared library that `calibration.py` builds for the machine it runs on.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
constexpr int CHAINS = 12;  // more than latency times throughput on any processor of today

static double now(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

static void multiply_adds(long rounds) {
  Vec x[CHAINS] = {};
  Vec a = Vec{} + 0.999f, b = Vec{} + 0.001f;
  for (long i = 0; i < rounds; i++) {
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; c++) {
      x[c] = x[c] * a + b;
      asm volatile("" : "+v"(x[c]));  // keeps every chain in its register, and in the loop
    }
  }
}

// Runs `work(thread)` on this and threads - 1 more threads, which start together.
template <class Work>
static void together(int threads, Work work) {
  std::atomic<int> ready{0};
  const auto run = [&](int thread) {
    ready.fetch_add(1);
    while (ready.load() < threads) std::this_thread::yield();
    work(thread);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; thread++) others.emplace_back(run, thread);
  run(0);
  for (auto &other : others) other.join();
}

extern "C" int probe_lanes() { return LANES; }

// Times `bursts` short loops on each of `threads` threads at once. Writes, for each thread and
// burst, the nanoseconds of one multiply-add by the clock on the wall and by the thread's own
// processor time: [threads][bursts][2].
extern "C" void probe_multiply_adds(int threads, int bursts, long rounds, double *nanoseconds) {
  together(threads, [&](int thread) {
    // A core that was idle takes a moment to reach its speed.
    const double begun = now(CLOCK_MONOTONIC);
    while (now(CLOCK_MONOTONIC) - begun < 1e-3) multiply_adds(rounds / 8);
    double *mine = nanoseconds + 2L * thread * bursts;
    for (int burst = 0; burst < bursts; burst++) {
      const double wall = now(CLOCK_MONOTONIC), own = now(CLOCK_THREAD_CPUTIME_ID);
      multiply_adds(rounds);
      const double each = 1e9 / (double(rounds) * CHAINS);
      mine[2 * burst] = (now(CLOCK_MONOTONIC) - wall) * each;
      mine[2 * burst + 1] = (now(CLOCK_THREAD_CPUTIME_ID) - own) * each;
    }
  });
}

// Reads `bytes` (a multiple of 4096 per thread) `repeats` times with `threads` threads, and returns
// the seconds of the best pass; 0 when there is no memory. Pages are large where Linux allows it.
extern "C" double probe_read(int threads, int64_t bytes, int repeats) {
  void *place = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (place == MAP_FAILED) return 0;
  madvise(place, bytes, MADV_HUGEPAGE);
  std::fill_n(static_cast<int32_t *>(place), bytes / 4, 1);
  const int64_t share = bytes / threads / 4096 * 4096;
  double best = 0;
  for (int repeat = 0; repeat < repeats; repeat++) {
    const double started = now(CLOCK_MONOTONIC);
    together(threads, [&](int thread) {
      const char *from = static_cast<const char *>(place) + thread * share;
      Vec sum[8] = {};
      for (int64_t at = 0; at < share; at += 8 * sizeof(Vec)) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
          sum[i] += *reinterpret_cast<const Vec *>(from + at + i * sizeof(Vec));
      }
      for (auto &part : sum) asm volatile("" : : "v"(part));
    });
    const double taken = now(CLOCK_MONOTONIC) - started;
    if (repeat == 0 || taken < best) best = taken;
  }
  munmap(place, bytes);
  return best * double(bytes) / double(share * threads);
}
