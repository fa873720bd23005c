// What the layers of a step share: one thread's view of it, norms, and the way back to the stream.
#ifndef JAMBA_STEP_PARTS_H
#define JAMBA_STEP_PARTS_H

#include <math.h>

#include "products_loops.h"
#include "row_ops_loops.h"
#include "vector_math.h"

namespace jamba::JAMBA_PATH {

struct Range {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

JAMBA_INLINE Range piece_of(int64_t whole, int64_t piece) {
  const int64_t first = piece * PIECE, last = first + PIECE;
  return {first, last < whole ? last : whole};
}

// One thread's view of a step.
struct Step {
  const jamba_step_call &call;
  const jamba_model &model;
  const StepBuffers &shared;
  const TileKernels &kernels;
  Team &team;
  float *normed;   // [M][D], or what is normalised
  float *operand;  // for prepare_operand
  float *local;    // results of one piece
  int64_t *lists;  // rows of experts
};

inline void norm_row(const float *x, const float *weight, int64_t width, float epsilon, float *y) {
  if (weight == nullptr) {
    if (y != x) memcpy(y, x, (size_t)width * sizeof *y);
    return;
  }
  Vec squares = {};
  for (int64_t i = 0; i < width; i += LANES) {
    const Vec part = load_as<false>(x, i, lanes_left(width, i));
    squares = fma(part, part, squares);
  }
  const float inverse = 1.0f / sqrtf(total(squares) / (float)width + epsilon);
  for (int64_t i = 0; i < width; i += LANES) {
    const int64_t left = lanes_left(width, i);
    store_as<false>(y, i, left,
                    load_as<false>(x, i, left) * inverse * load_as<false>(weight, i, left));
  }
}

inline void norm_stream(const Step &step, const float *weight) {
  const int64_t D = step.model.D;
  for (int64_t m = 0; m < step.call.M; m++) {
    norm_row(step.shared.x + m * D, weight, D, (float)step.model.epsilon, step.normed + m * D);
  }
}

// x += W y for all rows.
inline void add_product(Step &step, const jamba_matrix &matrix, const float *y) {
  const int64_t M = step.call.M, D = step.model.D;
  const Operand operand = prepare_operand(step.kernels, matrix, y, matrix.I, M, step.operand);
  step.team.share(divide_up(D, PIECE), [&](int64_t piece) {
    const Range range = piece_of(D, piece);
    multiply(matrix, range.first, range.last, operand, FIRST_ROWS, M, step.local, PIECE);
    for (int64_t m = 0; m < M; m++) {
      float *x = step.shared.x + m * D + range.first;
      for (int64_t i = 0; i < range.count(); i++) x[i] += step.local[m * PIECE + i];
    }
  });
}

}  // namespace jamba::JAMBA_PATH
#endif
