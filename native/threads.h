// Who the threads of a parallel region are, with OpenMP and without, and the counters of their
// phases.
#ifndef JAMBA_THREADS_H
#define JAMBA_THREADS_H

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "scratch.h"
#include "team.h"

namespace jamba {

#ifdef _OPENMP
inline int64_t team_size() { return omp_get_num_threads(); }
inline int64_t team_member() { return omp_get_thread_num(); }
#else
inline int64_t team_size() { return 1; }
inline int64_t team_member() { return 0; }
#endif

// Multiply-adds below which a second thread costs more than it saves: some microseconds.
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 17;

inline int useful_threads(int64_t threads, int64_t products) {
  return (int)std::max<int64_t>(1, std::min(threads, products / PRODUCTS_PER_THREAD));
}

// Counters for `phases` phases of at most `threads` threads, all zero.
class Counters {
 public:
  Counters(int64_t phases, int64_t threads) : memory_(floats_of(phases, threads)) {
    if (memory_.data()) std::fill_n(memory_.data(), floats_of(phases, threads), 0.0f);
  }
  int64_t *data() const { return (int64_t *)memory_.data(); }

 private:
  static int64_t floats_of(int64_t phases, int64_t threads) {
    return 2 * Team::COUNTER_STRIDE * phases * threads;
  }

  Scratch memory_;
};

}  // namespace jamba
#endif
