// The feed-forward layer for a few tokens, dense or a mixture of experts: each expert that got a
// row is read once.
#ifndef JAMBA_STEP_FEED_FORWARD_LOOPS_H
#define JAMBA_STEP_FEED_FORWARD_LOOPS_H

#include "step_parts.h"

namespace jamba::JAMBA_PATH {

// Which rows go to which expert, by how much: pairs sorted by expert.
struct Pairs {
  int64_t active;    // experts that got a row
  int64_t *experts;  // [active]
  int64_t *starts;   // [active + 1]
  int64_t *rows;     // [pairs] of x
  int64_t *places;   // [pairs] 0, 1, 2, ...
  float *weights;    // [pairs]
};

// Turns a row of scores into probabilities, of which the K largest become negative: ties go to the
// first. Returns the row.
inline const float *mark_chosen(float *row, int64_t X, int64_t K) {
  float largest = row[0], sum = 0;
  for (int64_t e = 1; e < X; e++) largest = row[e] > largest ? row[e] : largest;
  for (int64_t e = 0; e < X; e++) sum += row[e] = expf(row[e] - largest);
  if (!(sum > 0)) {
    // Nothing compares with "not a number": the first K, with a weight that hides nothing.
    for (int64_t e = 0; e < X; e++) row[e] = e < K ? -INFINITY : 0;
    return row;
  }
  for (int64_t e = 0; e < X; e++) row[e] /= sum;
  for (int64_t k = 0; k < K; k++) {
    int64_t best = -1;
    for (int64_t e = 0; e < X; e++) {
      if (row[e] >= 0 && (best < 0 || row[e] > row[best])) best = e;
    }
    row[best] = -1 - row[best];
  }
  return row;
}

JAMBA_INLINE bool is_chosen(float marked) { return marked < 0; }

JAMBA_INLINE float chosen_weight(float marked) { return -1 - marked; }

// The K most probable experts of each row.
inline Pairs route(const Step &step, const jamba_layer &layer) {
  const int64_t M = step.call.M, X = layer.experts > 0 ? layer.experts : 1;
  const int64_t K = layer.experts > 0 ? step.model.K : 1, pairs = M * K;
  int64_t *lists = step.lists;
  Pairs result = {0,
                  lists,
                  lists + X,
                  lists + 2 * X + 1,
                  lists + 2 * X + 1 + pairs,
                  (float *)(lists + 2 * X + 1 + 2 * pairs)};
  for (int64_t i = 0; i < pairs; i++) result.places[i] = i;
  if (layer.experts == 0) {
    result.active = 1;
    result.experts[0] = 0;
    result.starts[0] = 0, result.starts[1] = M;
    for (int64_t m = 0; m < M; m++) result.rows[m] = m, result.weights[m] = 1;
    return result;
  }
  const Operand x = prepare_operand(step.kernels, layer.router, step.normed, step.model.D, M, false,
                                    step.operand);
  float *probability = step.local;
  multiply(layer.router, 0, X, x, FIRST_ROWS, M, probability, X);
  for (int64_t m = 0; m < M; m++) mark_chosen(probability + m * X, X, K);
  int64_t filled = 0;
  for (int64_t e = 0; e < X; e++) {
    const int64_t start = filled;
    for (int64_t m = 0; m < M; m++) {
      const float value = probability[m * X + e];
      if (is_chosen(value)) {
        result.rows[filled] = m;
        result.weights[filled++] = chosen_weight(value);
      }
    }
    if (filled > start) {
      result.experts[result.active] = e;
      result.starts[result.active++] = start;
    }
  }
  result.starts[result.active] = filled;
  return result;
}

inline void feed_forward(Step &step, const jamba_layer &layer) {
  const jamba_model &model = step.model;
  const int64_t M = step.call.M, D = model.D, F = model.F;
  norm_stream(step, layer.feed_forward_norm_D);
  Timeline &timeline = step.team.timeline;
  const int32_t part = layer.experts > 0 ? JAMBA_EXPERTS : JAMBA_MLP;
  if (layer.experts > 0) timeline.turn_to(JAMBA_ROUTER);
  const Pairs pairs = route(step, layer);
  const int64_t num_pairs = pairs.starts[pairs.active];
  const auto matrices_of = [&](int64_t a) { return layer.feed_forward + 3 * pairs.experts[a]; };

  timeline.turn_to(part, JAMBA_CUTS_ROWS);
  const Operand x = prepare_operand(step.kernels, matrices_of(0)[0], step.normed, D, M,
                                    model.bfloat16, step.operand);
  const int64_t hidden_pieces = divide_up(F, PIECE);
  timeline.turn_to(part);
  const auto rows_in = [&](int64_t task, int64_t next) {
    const int64_t a = task / hidden_pieces, start = pairs.starts[a];
    const int64_t count = pairs.starts[a + 1] - start;
    const jamba_matrix *matrices = matrices_of(a);
    const Range range = piece_of(F, task % hidden_pieces);
    float *gate = step.local, *up = gate + count * PIECE;
    const int64_t *rows = pairs.rows + start;
    const void *then =
        next < 0 ? nullptr
                 : weights_of_piece(matrices_of(next / hidden_pieces)[0], next % hidden_pieces);
    multiply(matrices[0], range.first, range.last, x, rows, count, gate, PIECE,
             weights_of(matrices[1], range.first));
    multiply(matrices[1], range.first, range.last, x, rows, count, up, PIECE, then);
    for (int64_t i = 0; i < count; i++) {
      float *out = step.shared.hidden + (start + i) * F + range.first;
      for (int64_t f = 0; f < range.count(); f += LANES) {
        const int64_t left = lanes_left(range.count(), f);
        const Vec z = load_any(gate, false, i * PIECE + f, left);
        const Vec value = load_any(up, false, i * PIECE + f, left);
        store_any(out, false, f, left, value * z * sigmoid(z));
      }
    }
  };
  step.team.share_runs(pairs.active * hidden_pieces, rows_in,
                       [&] { fetch_start(step, matrices_of(0)[2], divide_up(D, PIECE)); });

  timeline.turn_to(part, JAMBA_CUTS_ROWS);
  const Operand hidden = prepare_operand(step.kernels, matrices_of(0)[2], step.shared.hidden, F,
                                         num_pairs, model.bfloat16, step.operand);
  timeline.turn_to(part);
  const auto rows_out = [&](int64_t piece, int64_t next) {
    const Range range = piece_of(D, piece);
    for (int64_t a = 0; a < pairs.active; a++) {
      const void *then = a + 1 < pairs.active ? weights_of(matrices_of(a + 1)[2], range.first)
                                              : weights_of_piece(matrices_of(0)[2], next);
      const int64_t start = pairs.starts[a], count = pairs.starts[a + 1] - start;
      multiply(matrices_of(a)[2], range.first, range.last, hidden, pairs.places + start, count,
               step.local, PIECE, then);
      for (int64_t i = 0; i < count; i++) {
        float *out = step.shared.x + pairs.rows[start + i] * D + range.first;
        const float weight = pairs.weights[start + i];
        for (int64_t d = 0; d < range.count(); d++) out[d] += weight * step.local[i * PIECE + d];
      }
    }
  };
  step.team.share_runs(divide_up(D, PIECE), rows_out,
                       [&] { fetch_start(step, *step.upcoming.matrix, step.upcoming.pieces); });
}

}  // namespace jamba::JAMBA_PATH
#endif
