// The feed-forward layer for many tokens: rows are put together by expert, so that each expert is
// read once and none of its rows is padded but the last tile.
#ifndef JAMBA_PREFILL_FEED_FORWARD_LOOPS_H
#define JAMBA_PREFILL_FEED_FORWARD_LOOPS_H

#include "prefill_parts.h"
#include "step_feed_forward_loops.h"

namespace jamba::JAMBA_PATH {

// The experts of one tile of rows, and by how much.
inline void choose_experts(const Prefill &prefill, const jamba_layer &layer, int64_t tile) {
  const int64_t X = layer.experts, K = prefill.model.K, D = prefill.model.D;
  const int64_t rows = prefill.rows_of(tile);
  float *const normed = prefill.shared.normed + tile * TILE * D;
  float *const probability = prefill.local, *const operand = probability + TILE * X;
  const Operand x =
      prepare_operand(prefill.products.kernels, layer.router, normed, D, rows, false, operand);
  multiply(layer.router, 0, X, x, FIRST_ROWS, rows, probability, X);
  for (int64_t i = 0; i < rows; i++) {
    const int64_t at = (tile * TILE + i) * K;
    const float *row = mark_chosen(probability + i * X, X, K);
    for (int64_t e = 0, k = 0; e < X; e++) {
      if (!is_chosen(row[e])) continue;
      prefill.shared.chosen[at + k] = e;
      prefill.shared.chosen_by[at + k++] = chosen_weight(row[e]);
    }
  }
}

// Without experts: every row, in order.
inline void group_all_rows(const Prefill &prefill) {
  const PrefillBuffers &shared = prefill.shared;
  for (int64_t m = 0; m < prefill.row_tiles() * TILE; m++) {
    shared.pair_rows[m] = m < prefill.call.M ? m : -1;
    shared.pair_weights[m] = 1;
  }
  shared.experts[0] = {0, prefill.row_tiles()};
}

// Puts the rows of each expert into tiles of its own, in order.
inline void group_rows(const Prefill &prefill, int64_t X) {
  const PrefillBuffers &shared = prefill.shared;
  const int64_t M = prefill.call.M;
  const int64_t K = prefill.model.K;
  int64_t tiles = 0;
  for (int64_t e = 0; e < X; e++) {
    int64_t filled = tiles * TILE;
    for (int64_t pair = 0; pair < M * K; pair++) {
      if (shared.chosen[pair] != e) continue;
      shared.pair_rows[filled] = pair / K;
      shared.pair_weights[filled++] = shared.chosen_by[pair];
    }
    shared.experts[e] = {tiles, tiles_of(filled - tiles * TILE)};
    tiles += shared.experts[e].tiles;
    while (filled < tiles * TILE) shared.pair_rows[filled++] = -1;
  }
}

inline int64_t used_tiles(const Prefill &prefill, int64_t experts) {
  const Expert &last = prefill.shared.experts[experts - 1];
  return last.first_tile + last.tiles;
}

// Rows of a tile of pairs; the others are empty.
inline int64_t pairs_in(const Prefill &prefill, int64_t tile) {
  int64_t count = 0;
  while (count < TILE && prefill.shared.pair_rows[tile * TILE + count] >= 0) count++;
  return count;
}

// Outputs [first, last) of gate and up for one expert's tiles of rows, multiplied and cut into
// words: sums are [output][row], and so are the words of rows that meet the next matrix.
inline void gate_rows(const Prefill &prefill, const jamba_matrix *matrices, int64_t first,
                      int64_t last, const TiledRows &x, const Expert &expert,
                      const TiledRows &hidden, const Outputs &next) {
  const int64_t output_tiles = tiles_of(last - first);
  uint32_t *const ups = prefill.products.sums;
  uint32_t *const gates = ups + sum_words(MOST_OUTPUTS / 2);
  const int64_t per_tile = TILE * inputs_in(hidden.words);
  // The last piece also clears what is left of the last tile.
  const int64_t F = prefill.model.F, end = last < F ? last : hidden.depth * per_tile;
  const bool exact = are_bytes(hidden.words);  // which need more of a row first
  for (int64_t t = 0; t < expert.tiles; t += ROW_TILES_OF_PART) {
    const int64_t left = expert.tiles - t, start = expert.first_tile + t;
    const int64_t some = left < ROW_TILES_OF_PART ? left : ROW_TILES_OF_PART;
    sum_products(prefill.products, matrices[0], first, last, x, start, some, gates,
                 {&matrices[1], first, last});
    sum_products(prefill.products, matrices[1], first, last, x, start, some, ups,
                 t + some < expert.tiles ? Outputs{} : next);
    const Doing doing(prefill.products.timeline, JAMBA_GIVES_RESULTS);
    for (int64_t r = 0; r < some; r++) {
      for (int64_t output = first; output < end; output += TILE) {
        uint32_t *words = hidden.tile(start + r, output / per_tile) +
                          output % per_tile / inputs_in(hidden.words) * TILE;
        if (output >= last) {
          if (!exact) memset(words, 0, TILE_WORDS / inputs_in(hidden.words) * sizeof *words);
          continue;
        }
        const int64_t at = (r * output_tiles + (output - first) / TILE) * TILE_WORDS;
        const float *gate = finish_tile(matrices[0], output, x, start + r, gates + at);
        float *up = finish_tile(matrices[1], output, x, start + r, ups + at);
        for (int64_t i = 0; i < TILE_WORDS; i += LANES) {
          const Vec z = load(gate + i);
          store(up + i, load(up + i) * z * sigmoid(z));
        }
        if (exact) {
          alignas(64) float turned[TILE_WORDS];
          turn((const uint32_t *)up, (uint32_t *)turned);
          store_tile(prefill.shared.wide_hidden, prefill.model.bfloat16, F, (start + r) * TILE,
                     pairs_in(prefill, start + r), output,
                     last - output < TILE ? last - output : TILE, turned);
        } else {
          join_words(hidden.words, up, words);
        }
      }
    }
  }
}

inline void prefill_feed_forward(Prefill &prefill, const jamba_layer &layer) {
  const jamba_model &model = prefill.model;
  const PrefillBuffers &shared = prefill.shared;
  const int64_t D = model.D, F = model.F, X = layer.experts;
  const int64_t pair_tiles = most_pair_tiles(prefill.call.M, model.K, X);
  const TiledRows hidden = tiled(prefill, layer.feed_forward[2], pair_tiles, shared.hidden);

  const int64_t experts = X > 0 ? X : 1;
  const int32_t part = X > 0 ? JAMBA_EXPERTS : JAMBA_MLP;
  Timeline &timeline = prefill.team.timeline;
  TiledRows x = tiled(prefill, layer.feed_forward[0], pair_tiles, shared.inputs);
  if (X == 0) {
    x = norm_inputs(prefill, layer.feed_forward_norm_D, part, layer.feed_forward[0]);
    prefill.team.share(1, [&](int64_t) { group_all_rows(prefill); });
  } else {
    prefill.team.share(prefill.row_tiles(), [&](int64_t tile) {
      timeline.turn_to(JAMBA_NORMS);
      norm_tile(prefill, layer.feed_forward_norm_D, tile, shared.normed + tile * TILE * D);
      timeline.turn_to(JAMBA_ROUTER);
      choose_experts(prefill, layer, tile);
    });
    prefill.team.share(1, [&](int64_t) { group_rows(prefill, X); });
    timeline.turn_to(part, JAMBA_CUTS_ROWS);
    prefill.team.share(used_tiles(prefill, X), [&](int64_t tile) {
      tile_rows(x, tile, {shared.normed, false, D}, shared.pair_rows + tile * TILE,
                pairs_in(prefill, tile), 0);
    });
  }

  timeline.turn_to(part);
  // Half as many outputs of two matrices; whole tiles of the words they become.
  const int64_t half = outputs_of_piece(experts * F, prefill.team.threads) / 2;
  const int64_t piece = half < 2 * TILE ? 2 * TILE : half, pieces = divide_up(F, piece);
  const auto gates_of = [&](int64_t task) -> Outputs {
    if (task < 0 || shared.experts[task / pieces].tiles == 0) return {};
    const int64_t first = task % pieces * piece, last = first + piece;
    return {layer.feed_forward + 3 * (task / pieces), first, last < F ? last : F};
  };
  prefill.team.share_ahead(experts * pieces, [&](int64_t task, int64_t next) {
    const Outputs gates = gates_of(task);
    if (gates.matrix == nullptr) return;
    gate_rows(prefill, gates.matrix, gates.first, gates.last, x, shared.experts[task / pieces],
              hidden, gates_of(next));
  });

  if (are_bytes(hidden.words)) {
    const Doing doing(timeline, JAMBA_CUTS_ROWS);
    const RowSource source = {shared.wide_hidden, (bool)model.bfloat16, F};
    prefill.team.share(used_tiles(prefill, experts), [&](int64_t tile) {
      tile_rows(hidden, tile, source, RowsOfTile(tile).rows, pairs_in(prefill, tile), 0);
    });
  }

  const int64_t outputs = outputs_of_piece(D, prefill.team.threads);
  prefill.team.share(divide_up(D, outputs), [&](int64_t index) {
    const int64_t first = index * outputs, last = first + outputs < D ? first + outputs : D;
    for (int64_t e = 0; e < experts; e++) {
      const Expert &expert = shared.experts[e];
      const jamba_matrix *const down = layer.feed_forward + 3 * e + 2;
      multiply_rows(prefill.products, *down, first, last, hidden, expert.first_tile, expert.tiles,
                    e + 1 < experts ? Outputs{down + 3, first, last} : Outputs{},
                    [&](int64_t tile, int64_t output, int64_t count, const float *results) {
                      for (int64_t i = 0; i < TILE; i++) {
                        const int64_t row = shared.pair_rows[tile * TILE + i];
                        if (row < 0) break;
                        add_row(shared.x + row * D + output, shared.pair_weights[tile * TILE + i],
                                results + i * TILE, count);
                      }
                    });
    }
  });
}

}  // namespace jamba::JAMBA_PATH
#endif
