// An attention layer for a few tokens: keys are taken in pieces, by whichever thread is free, and
// the pieces joined in order.
#ifndef JAMBA_STEP_ATTENTION_LOOPS_H
#define JAMBA_STEP_ATTENTION_LOOPS_H

#include "step_parts.h"

namespace jamba::JAMBA_PATH {

// Where the keys, or values, of token `position` of a sequence lie.
struct KeyCursor {
  const jamba_memory &memory;
  int64_t block = 0, first = 0;  // `first`: position at which the block begins

  // Positions are asked for in rising order.
  JAMBA_INLINE int64_t row_of(int64_t position) {
    while (position >= first + memory.blocks[block].count) first += memory.blocks[block++].count;
    return position - first;
  }
};

// Writes projected keys or values, `in` [M][PIECE], to the end of each sequence's last block.
inline void remember(const Step &step, const jamba_memory *memories, bool keys, Range range,
                     const float *in) {
  const jamba_model &model = step.model;
  const int64_t width = model.G * model.P;
  for (int64_t b = 0; b < step.call.B; b++) {
    const int64_t first = step.call.offsets[b], end = step.call.offsets[b + 1];
    const jamba_key_block &last = memories[b].blocks[memories[b].num_blocks - 1];
    void *out = (void *)(keys ? last.keys : last.values);
    for (int64_t m = first; m < end; m++) {
      const int64_t row = last.count - (end - m);
      for (int64_t i = 0; i < range.count(); i += LANES) {
        const int64_t left = lanes_left(range.count(), i);
        store_any(out, model.bfloat16, row * width + range.first + i, left,
                  load_any(in, false, m * PIECE + i, left));
      }
    }
  }
}

// Scores of one query head group with `count` keys from `position` on, at most LANES of them.
inline void score_keys(const Step &step, const float *q, KeyCursor &cursor, int64_t group,
                       int64_t heads, int64_t position, int64_t count, float *scores) {
  const jamba_model &model = step.model;
  const int64_t P = model.P, width = model.G * P;
  const void *keys[LANES];
  int64_t rows[LANES];
  for (int64_t s = 0; s < count; s++) {
    rows[s] = cursor.row_of(position + s);
    keys[s] = cursor.memory.blocks[cursor.block].keys;
  }
  for (int64_t h = 0; h < heads; h++) {
    Vec products[LANES] = {};
    for (int64_t i = 0; i < P; i += LANES) {
      const int64_t left = lanes_left(P, i);
      const Vec query = load_as<false>(q, h * P + i, left);
      for (int64_t s = 0; s < count; s++) {
        const Vec key = load_any(keys[s], model.bfloat16, rows[s] * width + group * P + i, left);
        products[s] = fma(query, key, products[s]);
      }
    }
    store_as<false>(scores, h * KEYS_OF_PIECE, count,
                    sum_each(products) * (float)model.attention_scale);
  }
}

// Adds what heads [0, HEADS) of a group take from the values of one piece, LANES of P at a time.
template <int HEADS>
inline void take_values(const Step &step, KeyCursor cursor, int64_t at, int64_t left,
                        int64_t position, int64_t count, const float *weights, float *out,
                        int64_t out_stride) {
  const jamba_model &model = step.model;
  const int64_t width = model.G * model.P;
  Vec sums[HEADS] = {};
  for (int64_t s = 0; s < count; s++) {
    const int64_t row = cursor.row_of(position + s);
    const Vec value =
        load_any(cursor.memory.blocks[cursor.block].values, model.bfloat16, row * width + at, left);
    for (int h = 0; h < HEADS; h++) {
      sums[h] = fma(set(weights[h * KEYS_OF_PIECE + s]), value, sums[h]);
    }
  }
  for (int h = 0; h < HEADS; h++) store_as<false>(out, h * out_stride, left, sums[h]);
}

// Attention of row `m` to one piece of the keys: for every head the largest score, the sum of
// weights and the weighted sum of values.
inline void attend_piece(const Step &step, const jamba_memory &memory, int64_t m, int64_t piece,
                         Range keys) {
  const jamba_model &model = step.model;
  const int64_t P = model.P, heads = model.H / model.G, size = P + 2, count = keys.count();
  float *scores = step.local;
  float *out = step.shared.partial + (m * step.shared.key_pieces + piece) * model.H * size;
  for (int64_t group = 0; group < model.G; group++) {
    const float *q = step.shared.q + (m * model.H + group * heads) * P;
    KeyCursor cursor = {memory};
    for (int64_t s = 0; s < count; s += LANES) {
      score_keys(step, q, cursor, group, heads, keys.first + s, lanes_left(count, s), scores + s);
    }
    float *group_out = out + group * heads * size;
    for (int64_t h = 0; h < heads; h++) {
      float *row = scores + h * KEYS_OF_PIECE;
      float largest = row[0];
      for (int64_t s = 1; s < count; s++) largest = row[s] > largest ? row[s] : largest;
      Vec sum = {};
      for (int64_t s = 0; s < count; s += LANES) {
        const int64_t left = lanes_left(count, s);
        Vec weight = exp_nonpositive(load_as<false>(row, s, left) - largest);
        for (int64_t l = left; l < LANES; l++) weight[l] = 0;
        store_as<false>(row, s, left, weight);
        sum = sum + weight;
      }
      group_out[h * size] = largest;
      group_out[h * size + 1] = total(sum);
    }
    for (int64_t i = 0; i < P; i += LANES) {
      const int64_t at = group * P + i, left = lanes_left(P, i);
      int64_t h = 0;
      for (; h + 4 <= heads; h += 4) {
        take_values<4>(step, {memory}, at, left, keys.first, count, scores + h * KEYS_OF_PIECE,
                       group_out + h * size + 2 + i, size);
      }
      for (; h < heads; h++) {
        take_values<1>(step, {memory}, at, left, keys.first, count, scores + h * KEYS_OF_PIECE,
                       group_out + h * size + 2 + i, size);
      }
    }
  }
}

// One head of one row: the pieces of its keys become one sum, in order.
inline void join_pieces(const Step &step, int64_t m, int64_t head, int64_t pieces) {
  const jamba_model &model = step.model;
  const int64_t P = model.P, size = P + 2, distance = model.H * size;
  const float *parts = step.shared.partial + m * step.shared.key_pieces * distance + head * size;
  float *y = step.shared.y + (m * model.H + head) * P;
  float largest = parts[0], sum = 0;
  for (int64_t j = 1; j < pieces; j++) {
    if (parts[j * distance] > largest) largest = parts[j * distance];
  }
  memset(y, 0, (size_t)P * sizeof *y);
  for (int64_t j = 0; j < pieces; j++) {
    const float *part = parts + j * distance;
    const float factor = expf(part[0] - largest);
    sum += factor * part[1];
    for (int64_t i = 0; i < P; i++) y[i] += factor * part[2 + i];
  }
  for (int64_t i = 0; i < P; i++) y[i] /= sum;
}

inline void attention_layer(Step &step, const jamba_layer &layer, const jamba_memory *memories) {
  const jamba_model &model = step.model;
  const StepBuffers &shared = step.shared;
  const int64_t M = step.call.M, queries = model.H * model.P, width = model.G * model.P;

  norm_stream(step, layer.mixer_norm_D);
  // One cut of the rows serves all three.
  const bool few = takes_few(step.kernels, layer.in_proj) &&
                   takes_few(step.kernels, layer.x_proj) && takes_few(step.kernels, layer.dt_proj);
  step.team.timeline.turn_to(JAMBA_QKV_PROJ, JAMBA_CUTS_ROWS);
  const Operand x = prepare_operand(few ? step.kernels : NO_TILES, layer.in_proj, step.normed,
                                    model.D, M, model.bfloat16, step.operand);
  const int64_t query_pieces = divide_up(queries, PIECE), key_pieces = divide_up(width, PIECE);
  const auto matrix_of = [&](int64_t piece) -> const jamba_matrix & {
    if (piece < query_pieces) return layer.in_proj;
    return piece < query_pieces + key_pieces ? layer.x_proj : layer.dt_proj;
  };
  const auto place_in = [&](int64_t piece) {
    return piece < query_pieces ? piece : (piece - query_pieces) % key_pieces;
  };
  step.team.timeline.turn_to(JAMBA_QKV_PROJ);
  const auto project = [&](int64_t piece, int64_t next) {
    const jamba_matrix &matrix = matrix_of(piece);
    const void *then = next < 0 ? nullptr : weights_of_piece(matrix_of(next), place_in(next));
    if (piece < query_pieces) {
      const Range range = piece_of(queries, piece);
      multiply(matrix, range.first, range.last, x, FIRST_ROWS, M, shared.q + range.first, queries,
               then);
      return;
    }
    const Range range = piece_of(width, place_in(piece));
    multiply(matrix, range.first, range.last, x, FIRST_ROWS, M, step.local, PIECE, then);
    remember(step, memories, piece < query_pieces + key_pieces, range, step.local);
  };
  step.team.share_runs(query_pieces + 2 * key_pieces, project, [] {});

  step.team.timeline.turn_to(JAMBA_ATTENTION);
  // Row m of sequence b sees all that came before it, and itself.
  int64_t sequence[JAMBA_STEP_ROWS], seen[JAMBA_STEP_ROWS];
  for (int64_t b = 0; b < step.call.B; b++) {
    int64_t tokens = 0;
    for (int64_t j = 0; j < memories[b].num_blocks; j++) tokens += memories[b].blocks[j].count;
    for (int64_t m = step.call.offsets[b]; m < step.call.offsets[b + 1]; m++) {
      sequence[m] = b;
      seen[m] = tokens - (step.call.offsets[b + 1] - 1 - m);
    }
  }
  step.team.share(M * shared.key_pieces, [&](int64_t task) {
    const int64_t m = task / shared.key_pieces, piece = task % shared.key_pieces;
    const int64_t first = piece * KEYS_OF_PIECE, end = first + KEYS_OF_PIECE;
    if (first < seen[m]) {
      attend_piece(step, memories[sequence[m]], m, piece, {first, end < seen[m] ? end : seen[m]});
    }
  });
  step.team.share(M * model.H, [&](int64_t task) {
    const int64_t m = task / model.H;
    join_pieces(step, m, task % model.H, divide_up(seen[m], KEYS_OF_PIECE));
  });
  add_product(step, JAMBA_O_PROJ, layer.out_proj, shared.y,
              [&] { fetch_feed_forward(step, layer); });
}

}  // namespace jamba::JAMBA_PATH
#endif
