// Plans whole steps: buffers, threads, and what is refused.
#include "step.h"

#include <algorithm>
#include <new>

#include "model_checks.h"
#include "paths.h"
#include "scratch.h"
#include "threads.h"

namespace jamba {
namespace {

// Phases of a layer, at most: seven of attention or Mamba and of the feed-forward; two more around.
constexpr int64_t PHASES_OF_LAYER = 8;

int64_t key_pieces(const jamba_step_call &call) {
  int64_t most = 1;
  for (int64_t i = 0; i < call.model->num_layers * call.B; i++) {
    if (!call.model->layers[i / call.B].attends) continue;
    int64_t tokens = 0;
    for (int64_t j = 0; j < call.memories[i].num_blocks; j++) {
      tokens += call.memories[i].blocks[j].count;
    }
    most = std::max(most, divide_up(tokens, KEYS_OF_PIECE));
  }
  return most;
}

int64_t products_of_step(const jamba_model &model) {
  int64_t sum = model.head.O * model.head.I;
  for (int64_t i = 0; i < model.num_layers; i++) {
    const jamba_layer &layer = model.layers[i];
    sum += layer.in_proj.O * layer.in_proj.I + layer.out_proj.O * layer.out_proj.I +
           3 * model.D * model.F * std::max<int64_t>(1, layer.experts > 0 ? model.K : 1);
  }
  return sum;
}

}  // namespace
}  // namespace jamba

using namespace jamba;

int32_t jamba_step(const jamba_step_call *call) try {
  const Path *path = find_path(call->path);
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  const jamba_model &model = *call->model;
  const int64_t M = call->M;
  if (M <= 0 || M > JAMBA_STEP_ROWS || call->B <= 0 || call->threads <= 0 ||
      call->num_logits <= 0 || call->num_logits > M || model.W < 1 || !matrices_are_valid(model)) {
    return JAMBA_BAD_SIZE;
  }
  if (!offsets_are_valid(call->offsets, call->B, M)) return JAMBA_BAD_OFFSETS;

  const int64_t pieces = key_pieces(*call), pairs = M * std::max<int64_t>(model.K, 1);
  const int64_t queries = model.H * model.P;
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    const int64_t at = used;
    used += cache_lines(floats);
    return at;
  };
  const int64_t x = take(M * model.D), u = take(M * model.C), gate = take(M * model.C);
  const int64_t selection = take(M * (model.R + 2 * model.N));
  const int64_t y = take(M * std::max(model.C, queries)), q = take(M * queries);
  const int64_t hidden = take(pairs * model.F);
  const int64_t partial = take(M * pieces * model.H * (model.P + 2));

  const int threads = useful_threads(call->threads, products_of_step(model));
  const int64_t size = cache_lines(path->step_scratch(*call));
  const Scratch buffers(used), scratch(threads * size);
  const Counters counters(2 + PHASES_OF_LAYER * model.num_layers, threads);
  if (!buffers.data() || !scratch.data() || !counters.data()) return JAMBA_NO_MEMORY;
  float *data = buffers.data();
  const StepBuffers shared = {data + x,         data + u,       data + gate,
                              data + selection, data + y,       data + q,
                              data + hidden,    data + partial, pieces};
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer than asked for.
    const Team team = {team_size(), team_member(), counters.data(),
                       Timeline(call->spent, team_member())};
    path->step(*call, shared, path->tiles, team, scratch.data() + team_member() * size);
  }
  return JAMBA_OK;
} catch (const std::bad_alloc &) {
  return JAMBA_NO_MEMORY;
}
