// The threads of one call, working through phases: a phase is a number of independent pieces,
// taken by whoever is free, and ends when all are done.
//
// Which thread takes a piece decides nothing about its result.
#ifndef JAMBA_TEAM_H
#define JAMBA_TEAM_H

#include <stdint.h>

namespace jamba {

// One per thread, sharing `taken`.
struct Team {
  int64_t threads;
  int64_t *taken;  // one counter for each phase, a cache line apart, all zero at the start

  // Calls work(piece) for pieces of [0, count), and returns when every thread's are done.
  template <typename Work>
  inline __attribute__((always_inline)) void share(int64_t count, const Work &work) {
    if (threads == 1) {
      for (int64_t piece = 0; piece < count; piece++) work(piece);
      return;
    }
    // A builtin: a function of <atomic> would be compiled with the flags of one instruction
    // set and might be linked into another.
    int64_t piece;
    while ((piece = take()) < count) work(piece);
    taken += COUNTER_STRIDE;
#pragma omp barrier
  }

  // As above, with work(piece, next): `next` is what the same thread will do after it, or -1. A
  // thread takes one piece before it has finished the other.
  template <typename Work>
  inline __attribute__((always_inline)) void share_ahead(int64_t count, const Work &work) {
    int64_t piece = take();
    while (piece < count) {
      const int64_t next = take();
      work(piece, next < count ? next : -1);
      piece = next;
    }
    taken += COUNTER_STRIDE;
    if (threads > 1) {
#pragma omp barrier
    }
  }

  inline __attribute__((always_inline)) int64_t take() {
    return __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
  }

  static constexpr int64_t COUNTER_STRIDE = 8;
};

}  // namespace jamba
#endif
