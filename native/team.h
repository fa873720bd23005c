// The threads of one call, working through phases: a phase is a number of independent pieces,
// taken by whoever is free, and ends when all are done.
//
// Which thread takes a piece decides nothing about its result.
#ifndef JAMBA_TEAM_H
#define JAMBA_TEAM_H

#include <stdint.h>

#include "timeline.h"

namespace jamba {

// One per thread, sharing `taken`.
struct Team {
  int64_t threads;
  int64_t member;  // which of them this is
  int64_t *taken;  // a counter for each phase and thread, a cache line apart, all zero at the start
  Timeline timeline = {};

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
    end_phase();
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
    end_phase();
  }

  // As share(), with neighbouring pieces for one thread: each has a run of them, and helps the
  // others when it is through. work(piece, next): `next` is the neighbour that the thread takes
  // then if nobody helps it, or -1. Calls wait() before it waits for the others.
  template <typename Work, typename Wait>
  inline __attribute__((always_inline)) void share_runs(int64_t count, const Work &work,
                                                        const Wait &wait) {
    for (int64_t turn = 0; turn < threads; turn++) {
      const int64_t whose = member + turn < threads ? member + turn : member + turn - threads;
      const int64_t first = first_of_run(count, whose), end = first_of_run(count, whose + 1);
      int64_t piece;
      while ((piece = first + take(whose)) < end) work(piece, piece + 1 < end ? piece + 1 : -1);
    }
    wait();
    end_phase();
  }

  // Where the run of a thread begins.
  inline __attribute__((always_inline)) int64_t first_of_run(int64_t count, int64_t whose) const {
    return count * whose / threads;
  }

  inline __attribute__((always_inline)) int64_t take(int64_t whose = 0) {
    return __atomic_fetch_add(taken + whose * COUNTER_STRIDE, 1, __ATOMIC_RELAXED);
  }

  inline __attribute__((always_inline)) void end_phase() {
    taken += COUNTER_STRIDE * threads;
    if (threads > 1) {
      const Doing doing(timeline, JAMBA_WAITS);
#pragma omp barrier
    }
  }

  static constexpr int64_t COUNTER_STRIDE = 8;
};

}  // namespace jamba
#endif
