// All layers of the model for a few tokens: what a decode step, a step of several users and the
// check of a draft have in common. The modules in model/ are the definition.
//
// Activations are float32 from the embedding to the logits; convolution windows, keys and values
// are kept in the model's type, and are read as they are kept. Every phase of a Team writes what
// only later phases read.
#ifndef JAMBA_STEP_LOOPS_H
#define JAMBA_STEP_LOOPS_H

#include "step_attention_loops.h"
#include "step_feed_forward_loops.h"
#include "step_mamba_loops.h"

namespace jamba::JAMBA_PATH {

// How one thread's scratch is cut.
struct StepScratch {
  int64_t normed, operand, local, lists;  // floats of each
};

inline int64_t largest_inputs(const jamba_model &model) {
  const int64_t queries = model.H * model.P, mixed = model.C > queries ? model.C : queries;
  const int64_t most = mixed > model.F ? mixed : model.F;
  return most > model.D ? most : model.D;
}

inline StepScratch cut_scratch(const jamba_step_call &call) {
  const jamba_model &model = *call.model;
  const int64_t pairs = call.M * (model.K > 0 ? model.K : 1), selection = model.R + 2 * model.N;
  int64_t experts = 1;
  for (int64_t i = 0; i < model.num_layers; i++) {
    if (model.layers[i].experts > experts) experts = model.layers[i].experts;
  }
  const int64_t gates = 2 * pairs * PIECE, window = (model.W - 1 + call.M) * PIECE;
  const int64_t scores = MOST_QUERIES * (KEYS_OF_PIECE + arranged_floats(model.P));
  const int64_t probabilities = call.M * experts;
  return {
      cache_line_floats(call.M * (model.D > selection ? model.D : selection)),
      cache_line_floats(operand_floats(pairs, largest_inputs(model))),
      cache_line_floats(gates + window + scores + probabilities),
      2 * (3 * pairs + 2 * experts + 8),
  };
}

inline int64_t step_scratch(const jamba_step_call &call) {
  const StepScratch cut = cut_scratch(call);
  return cut.normed + cut.operand + cut.local + cut.lists;
}

// What is read first of a layer, or behind the last one.
inline Upcoming upcoming(const jamba_model &model, int64_t layer) {
  if (layer == model.num_layers) return {&model.head, divide_up(model.V, PIECE)};
  const jamba_layer &one = model.layers[layer];
  const int64_t queries = divide_up(model.H * model.P, PIECE);
  const int64_t keys = divide_up(model.G * model.P, PIECE);
  return {&one.in_proj, one.attends ? queries + 2 * keys : divide_up(model.C, PIECE)};
}

inline void step(const jamba_step_call &call, const StepBuffers &shared, const TileKernels &kernels,
                 Team team, float *scratch) {
  const jamba_model &model = *call.model;
  const StepScratch cut = cut_scratch(call);
  float *operand = scratch + cut.normed, *local = operand + cut.operand;
  Step mine = {call,      model, shared,
               kernels,   team,  scratch,
               operand,   local, (int64_t *)(local + cut.local),
               Upcoming{}};
  if (kernels.begin != nullptr) kernels.begin();

  team.timeline.turn_to(JAMBA_EMBEDDING);
  team.share(call.M, [&](int64_t m) {
    unpack_row(model.embedding, call.ids_M[m], shared.x + m * model.D);
  });
  for (int64_t i = 0; i < model.num_layers; i++) {
    const jamba_layer &layer = model.layers[i];
    const jamba_memory *memories = call.memories + i * call.B;
    mine.upcoming = upcoming(model, i + 1);
    (layer.attends ? attention_layer : mamba_layer)(mine, layer, memories);
    feed_forward(mine, layer);
  }
  team.timeline.turn_to(JAMBA_NORMS);
  for (int64_t i = 0; i < call.num_logits; i++) {
    norm_row(shared.x + call.logit_rows[i] * model.D, model.final_norm_D, model.D,
             (float)model.epsilon, mine.normed + i * model.D);
  }
  team.timeline.turn_to(JAMBA_HEAD, JAMBA_CUTS_ROWS);
  const Operand x = prepare_operand(kernels, model.head, mine.normed, model.D, call.num_logits,
                                    model.bfloat16, operand);
  team.timeline.turn_to(JAMBA_HEAD);
  const auto score = [&](int64_t piece, int64_t next) {
    const Range range = piece_of(model.V, piece);
    multiply(model.head, range.first, range.last, x, FIRST_ROWS, call.num_logits,
             call.logits + range.first, model.V, weights_of_piece(model.head, next));
  };
  team.share_runs(divide_up(model.V, PIECE), score, [] {});
  if (kernels.end != nullptr) kernels.end();
  team.timeline.charge();
}

}  // namespace jamba::JAMBA_PATH
#endif
