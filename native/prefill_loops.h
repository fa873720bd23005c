// All layers of the model for many tokens. As in a step, every phase of a Team writes what only
// later phases read; unlike there, what meets weights of 16 bits or fewer is rounded to bfloat16
// where the processor multiplies that.
#ifndef JAMBA_PREFILL_LOOPS_H
#define JAMBA_PREFILL_LOOPS_H

#include "prefill_attention_loops.h"
#include "prefill_feed_forward_loops.h"
#include "prefill_mamba_loops.h"

namespace jamba::JAMBA_PATH {

struct PrefillScratch {
  int64_t weights, sums, local;  // words of each
};

inline PrefillScratch cut_prefill_scratch(const jamba_step_call &call, const TileKernels &kernels) {
  const jamba_model &model = *call.model;
  int64_t experts = 0;
  bool attends = false;
  for (int64_t i = 0; i < model.num_layers; i++) {
    if (model.layers[i].experts > experts) experts = model.layers[i].experts;
    attends = attends || model.layers[i].attends;
  }
  jamba_scan_call scan = {};
  scan.N = model.N;
  const int64_t candidates[] = {
      TILE * model.D,
      TILE * model.R,
      TILE * experts + operand_floats(TILE, model.D),
      2 * call.M * CHANNELS_OF_PIECE + scan_scratch(scan, CHANNELS_OF_PIECE / LANES),
      attends ? AttentionSizes(kernels, model).scratch_words() : 0,
      operand_floats(call.num_logits < TILE ? call.num_logits : TILE, model.D) + TILE * model.D,
  };
  int64_t local = 0;
  for (const int64_t one : candidates) local = one > local ? one : local;
  return {weight_words(MOST_OUTPUTS), sum_words(MOST_OUTPUTS), cache_line_floats(local)};
}

inline int64_t prefill_scratch(const jamba_step_call &call, const TileKernels &kernels) {
  const PrefillScratch cut = cut_prefill_scratch(call, kernels);
  return cut.weights + cut.sums + cut.local;
}

// Logits of the rows asked for: as in a step when they are few.
inline void give_logits(Prefill &prefill) {
  const jamba_step_call &call = prefill.call;
  const jamba_model &model = prefill.model;
  const int64_t D = model.D, V = model.V, count = call.num_logits;
  const float epsilon = (float)model.epsilon;
  float *const normed = prefill.local;
  Timeline &timeline = prefill.team.timeline;
  const auto norm_rows = [&](int64_t first, int64_t rows) {
    timeline.turn_to(JAMBA_NORMS);
    for (int64_t i = 0; i < rows; i++) {
      norm_row(prefill.shared.x + call.logit_rows[first + i] * D, model.final_norm_D, D, epsilon,
               normed + i * D);
    }
  };
  if (count <= TILE) {
    norm_rows(0, count);
    timeline.turn_to(JAMBA_HEAD, JAMBA_CUTS_ROWS);
    const Operand x = prepare_operand(prefill.products.kernels, model.head, normed, D, count,
                                      model.bfloat16, normed + TILE * D);
    timeline.turn_to(JAMBA_HEAD);
    prefill.team.share(divide_up(V, PIECE), [&](int64_t piece) {
      const Range range = piece_of(V, piece);
      multiply(model.head, range.first, range.last, x, FIRST_ROWS, count, call.logits + range.first,
               V);
    });
    return;
  }
  const TiledRows x = tiled(prefill, model.head, tiles_of(count), prefill.shared.inputs);
  const auto rows_of = [&](int64_t tile) {
    return count - tile * TILE < TILE ? count - tile * TILE : TILE;
  };
  prefill.team.share(tiles_of(count), [&](int64_t tile) {
    norm_rows(tile * TILE, rows_of(tile));
    timeline.turn_to(JAMBA_HEAD, JAMBA_CUTS_ROWS);
    tile_rows(x, tile, {normed, false, D}, RowsOfTile(0).rows, rows_of(tile), 0);
  });
  timeline.turn_to(JAMBA_HEAD);
  share_outputs(prefill.products, prefill.team, model.head, x, tiles_of(count),
                [&](int64_t tile, int64_t output, int64_t outputs, const float *results) {
                  store_tile(call.logits, false, V, tile * TILE, rows_of(tile), output, outputs,
                             results);
                });
}

inline void prefill(const jamba_step_call &call, const PrefillBuffers &shared,
                    const TileKernels &kernels, Team team, float *scratch) {
  const jamba_model &model = *call.model;
  const PrefillScratch cut = cut_prefill_scratch(call, kernels);
  uint32_t *const weights = (uint32_t *)scratch, *const sums = weights + cut.weights;
  Prefill mine = {call,
                  model,
                  shared,
                  team,
                  {kernels, weights, sums, team.timeline},
                  (float *)(sums + cut.sums)};

  if (kernels.begin != nullptr) kernels.begin();
  team.timeline.turn_to(JAMBA_EMBEDDING);
  mine.team.share(mine.row_tiles(), [&](int64_t tile) {
    for (int64_t i = 0; i < mine.rows_of(tile); i++) {
      const int64_t m = tile * TILE + i;
      unpack_row(model.embedding, call.ids_M[m], shared.x + m * model.D);
    }
  });
  for (int64_t i = 0; i < model.num_layers; i++) {
    const jamba_layer &layer = model.layers[i];
    const jamba_memory *memories = call.memories + i * call.B;
    (layer.attends ? prefill_attention : prefill_mamba)(mine, layer, memories);
    prefill_feed_forward(mine, layer);
  }
  if (call.num_logits > 0) give_logits(mine);
  if (kernels.end != nullptr) kernels.end();
  team.timeline.charge();
}

}  // namespace jamba::JAMBA_PATH
#endif
