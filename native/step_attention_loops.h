// An attention layer for a few tokens: keys are taken in pieces, by whichever thread is free, and
// the pieces joined in order.
#ifndef JAMBA_STEP_ATTENTION_LOOPS_H
#define JAMBA_STEP_ATTENTION_LOOPS_H

#include "key_loops.h"
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

// What attention of one group of heads to one piece of the keys gives, for QUERIES heads from
// `head` on: the largest score, the sum of weights and the weighted sum of values.
template <bool HALF, int QUERIES>
inline void attend_heads(const Step &step, const KeyRun &keys, const KeyRun &values, int64_t m,
                         int64_t head, float *out) {
  const jamba_model &model = step.model;
  const int64_t P = model.P, size = P + 2, stride = arranged_floats(P);
  float *const scores = step.local, *const queries = scores + MOST_QUERIES * KEYS_OF_PIECE;
  for (int q = 0; q < QUERIES; q++) {
    arrange_query<HALF>(step.shared.q + (m * model.H + head + q) * P, P, queries + q * stride);
  }
  score_keys<HALF, QUERIES>(keys, queries, stride, (float)model.attention_scale, scores,
                            KEYS_OF_PIECE);
  for (int q = 0; q < QUERIES; q++) {
    const Weighed weighed = weigh_scores(scores + q * KEYS_OF_PIECE, keys.count);
    out[q * size] = weighed.largest;
    out[q * size + 1] = weighed.sum;
  }
  sum_values<HALF, QUERIES>(values, scores, KEYS_OF_PIECE, out + 2, size);
}

// Attention of row `m` to one piece of the keys.
template <bool HALF>
inline void attend_piece(const Step &step, const jamba_memory &memory, int64_t m, int64_t piece,
                         Range range) {
  const jamba_model &model = step.model;
  const int64_t P = model.P, heads = model.H / model.G, size = P + 2, count = range.count();
  const int64_t bytes = model.G * P * (HALF ? 2 : 4);
  const void *keys[KEYS_OF_PIECE], *values[KEYS_OF_PIECE];
  KeyCursor cursor = {memory};
  for (int64_t s = 0; s < count; s++) {
    const int64_t row = cursor.row_of(range.first + s);
    const jamba_key_block &block = memory.blocks[cursor.block];
    keys[s] = (const char *)block.keys + row * bytes;
    values[s] = (const char *)block.values + row * bytes;
  }
  float *out = step.shared.partial + (m * step.shared.key_pieces + piece) * model.H * size;
  const int64_t rows_ahead = bytes < FAR_KEYS ? FAR_KEYS / bytes : 1;
  for (int64_t head = 0, queries; head < model.H; head += queries) {
    const int64_t group = head / heads, left = (group + 1) * heads - head;
    queries = left < MOST_QUERIES ? left : MOST_QUERIES;
    // Whoever reads first asks for all of a row: later it is in the second-level cache.
    const int64_t ahead = head == 0 ? rows_ahead : 0;
    const KeyRun key_run = {keys, count, group * P, P, bytes, ahead};
    const KeyRun value_run = {values, count, group * P, P, bytes, ahead};
    for (int64_t s = 0; s < ahead && s < count; s++) fetch_bytes(values[s], bytes);
    float *const of_heads = out + head * size;
    switch (queries) {
      case 1: attend_heads<HALF, 1>(step, key_run, value_run, m, head, of_heads); break;
      case 2: attend_heads<HALF, 2>(step, key_run, value_run, m, head, of_heads); break;
#if defined(__AVX512F__)
      case 3: attend_heads<HALF, 3>(step, key_run, value_run, m, head, of_heads); break;
      case 4: attend_heads<HALF, 4>(step, key_run, value_run, m, head, of_heads); break;
#endif
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
  // Rows of one sequence read the same piece one after the other.
  step.team.share(M * shared.key_pieces, [&](int64_t task) {
    const int64_t m = task % M, piece = task / M;
    const int64_t first = piece * KEYS_OF_PIECE, end = first + KEYS_OF_PIECE;
    if (first < seen[m]) {
      const Range range = {first, end < seen[m] ? end : seen[m]};
      (model.bfloat16 ? attend_piece<true> : attend_piece<false>)(step, memories[sequence[m]], m,
                                                                  piece, range);
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
