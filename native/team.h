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
    while ((piece = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < count) work(piece);
    taken += COUNTER_STRIDE;
#pragma omp barrier
  }

  static constexpr int64_t COUNTER_STRIDE = 8;
};

}  // namespace jamba
#endif
