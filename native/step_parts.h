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

// What is fetched of a phase before it begins: as much as products fetch ahead, of the outputs that
// they take at a time.
constexpr int64_t START_ROWS = 16, START_BYTES = 384;

JAMBA_INLINE Range piece_of(int64_t whole, int64_t piece) {
  const int64_t first = piece * PIECE, last = first + PIECE;
  return {first, last < whole ? last : whole};
}

// What comes after a layer: the next one, or the head, by its first matrix and how that is cut.
struct Upcoming {
  const jamba_matrix *matrix;
  int64_t pieces;
};

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
  Upcoming upcoming;
};

// Has the first weights fetched that this thread will read in a phase of so many pieces of `size`
// outputs: while it waits for the others, nothing else is read.
inline void fetch_start(const Step &step, const jamba_matrix &matrix, int64_t pieces,
                        int64_t size = PIECE) {
  const int64_t first = step.team.first_of_run(pieces, step.team.member) * size;
  const int64_t bytes = bytes_of_row(matrix), far = bytes < START_BYTES ? bytes : START_BYTES;
  const int64_t last = first + START_ROWS < matrix.O ? first + START_ROWS : matrix.O;
  for (int64_t o = first; o < last; o++) {
    const char *row = weights_of(matrix, o);
    for (int64_t b = 0; b < far; b += 64) fetch(row + b);
  }
}

// Where the weights of a piece of `size` outputs begin; null when there is none.
JAMBA_INLINE const char *weights_of_piece(const jamba_matrix &matrix, int64_t piece,
                                          int64_t size = PIECE) {
  return piece < 0 ? nullptr : weights_of(matrix, piece * size);
}

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
  step.team.timeline.turn_to(JAMBA_NORMS);
  const int64_t D = step.model.D;
  for (int64_t m = 0; m < step.call.M; m++) {
    norm_row(step.shared.x + m * D, weight, D, (float)step.model.epsilon, step.normed + m * D);
  }
}

// x += W y for all rows, as part `part`. Calls wait() before it waits for the other threads.
template <typename Wait>
inline void add_product(Step &step, int32_t part, const jamba_matrix &matrix, const float *y,
                        const Wait &wait) {
  step.team.timeline.turn_to(part, JAMBA_CUTS_ROWS);
  const int64_t M = step.call.M, D = step.model.D;
  const Operand operand =
      prepare_operand(step.kernels, matrix, y, matrix.I, M, step.model.bfloat16, step.operand);
  step.team.timeline.turn_to(part);
  const auto work = [&](int64_t piece, int64_t next) {
    const Range range = piece_of(D, piece);
    multiply(matrix, range.first, range.last, operand, FIRST_ROWS, M, step.local, PIECE,
             weights_of_piece(matrix, next));
    for (int64_t m = 0; m < M; m++) {
      float *x = step.shared.x + m * D + range.first;
      for (int64_t i = 0; i < range.count(); i++) x[i] += step.local[m * PIECE + i];
    }
  };
  step.team.share_runs(divide_up(D, PIECE), work, wait);
}

// What the feed-forward layer reads first: which experts it needs is not known before.
inline void fetch_feed_forward(const Step &step, const jamba_layer &layer) {
  if (layer.experts == 0) {
    fetch_start(step, layer.feed_forward[0], divide_up(step.model.F, PIECE));
  } else {
    // All threads read all of it.
    for (int64_t b = 0; b < layer.router.O * bytes_of_row(layer.router); b += 64) {
      fetch(weights_of(layer.router, 0) + b);
    }
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
