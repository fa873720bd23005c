// Softmax over long rows, as a loss needs it: what it divides by, and its slope. Lanes are
// neighbouring values of one row. Sums are float32.
#ifndef JAMBA_SOFTMAX_LOOPS_H
#define JAMBA_SOFTMAX_LOOPS_H

#include <math.h>

#include "row_ops_loops.h"

namespace jamba::JAMBA_PATH {

JAMBA_INLINE float largest_lane(Vec v) {
  float largest = v[0];
  for (int l = 1; l < LANES; l++) largest = v[l] > largest ? v[l] : largest;
  return largest;
}

// A row with a NaN gets one as its sum: the largest value passes over it, the exponential does not.
template <bool HALF>
inline void softmax_sums_as(const jamba_softmax_call &call, int64_t first, int64_t last) {
  const int64_t whole = call.V / LANES * LANES;
  for (int64_t m = first; m < last; m++) {
    const int64_t row = m * call.scores_stride;
    Vec highest = set(-INFINITY);
    for (int64_t i = 0; i < whole; i += LANES) {
      highest = maximum(load_as<HALF>(call.scores_MV, row + i, LANES), highest);
    }
    float largest = largest_lane(highest);
    if (whole < call.V) {
      const Vec rest = load_as<HALF>(call.scores_MV, row + whole, call.V - whole);
      for (int64_t l = 0; l < call.V - whole; l++) largest = rest[l] > largest ? rest[l] : largest;
    }
    const Vec top = set(largest);
    Vec sum = {};
    for (int64_t i = 0; i < whole; i += LANES) {
      sum += exp_nonpositive(load_as<HALF>(call.scores_MV, row + i, LANES) - top);
    }
    float total = sum_lanes(sum);
    if (whole < call.V) {
      const Vec rest = load_as<HALF>(call.scores_MV, row + whole, call.V - whole);
      const Vec e = exp_nonpositive(rest - top);
      for (int64_t l = 0; l < call.V - whole; l++) total += e[l];
    }
    call.largest_M[m] = largest;
    call.sum_M[m] = total;
  }
}

// In place: share exp(score - largest), less one at the target where it counts.
template <bool HALF>
inline void softmax_slopes_as(const jamba_softmax_slopes_call &call, int64_t first, int64_t last) {
  const jamba_softmax_call &in = call.forward;
  for (int64_t m = first; m < last; m++) {
    const int64_t row = m * in.scores_stride, target = call.targets_M[m];
    const Vec top = set(in.largest_M[m]), share = set(call.share_M[m]);
    const bool here = target >= 0 && target < in.V;
    const Vec at_target = here ? load_as<HALF>(in.scores_MV, row + target, 1) : Vec{};
    for (int64_t i = 0; i < in.V; i += LANES) {
      const int64_t left = lanes_left(in.V, i);
      const Vec score = load_as<HALF>(in.scores_MV, row + i, left);
      store_as<HALF>(in.scores_MV, row + i, left, exp_nonpositive(score - top) * share);
    }
    if (here) {
      const Vec slope = exp_nonpositive(at_target - top) * share - set(1.0f);
      store_as<HALF>(in.scores_MV, row + target, 1, slope);
    }
  }
}

inline void softmax_sums(const jamba_softmax_call &call, int64_t first, int64_t last) {
  if (call.bfloat16) return softmax_sums_as<true>(call, first, last);
  softmax_sums_as<false>(call, first, last);
}

inline void softmax_slopes(const jamba_softmax_slopes_call &call, int64_t first, int64_t last) {
  if (call.forward.bfloat16) return softmax_slopes_as<true>(call, first, last);
  softmax_slopes_as<false>(call, first, last);
}

}  // namespace jamba::JAMBA_PATH
#endif
