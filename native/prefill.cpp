// Plans a prefill: what is refused, buffers, threads.
#include "prefill.h"

#include <algorithm>
#include <new>

#include "model_checks.h"
#include "paths.h"
#include "scratch.h"
#include "threads.h"

namespace jamba {
namespace {

// Phases of a layer, at most: of the mixer and of the feed-forward; some more around.
constexpr int64_t PHASES_OF_LAYER = 16, PHASES_AROUND = 4;

// Hands out parts of one allocation, which is made when all are known.
class Room {
 public:
  // Where `words` words will begin.
  int64_t take(int64_t words) {
    const int64_t at = used_;
    used_ += cache_lines(words);
    return at;
  }
  int64_t words() const { return used_; }

 private:
  int64_t used_ = 0;
};

struct Demand {
  int64_t inputs = 0, mixed = 0, dt = 0, hidden = 0, wide_hidden = 0, pair_tiles = 0, experts = 1;
};

Demand demand_of(const jamba_step_call &call, const TileKernels &kernels) {
  const jamba_model &model = *call.model;
  const int64_t rows = tiles_of(call.M);
  const auto words = [&](const jamba_matrix &matrix, int64_t tiles) {
    return tiled_words(kernels, matrix, model.bfloat16, tiles);
  };
  Demand most;
  for (int64_t i = 0; i < model.num_layers; i++) {
    const jamba_layer &layer = model.layers[i];
    const int64_t pairs = most_pair_tiles(call.M, model.K, layer.experts);
    most.pair_tiles = std::max(most.pair_tiles, pairs);
    most.experts = std::max(most.experts, layer.experts);
    most.inputs =
        std::max({most.inputs, words(layer.in_proj, rows), words(layer.feed_forward[0], pairs)});
    most.mixed = std::max(most.mixed, words(layer.out_proj, rows));
    if (!layer.attends) {
      most.mixed = std::max(most.mixed, words(layer.x_proj, rows));
      most.dt = std::max(most.dt, words(layer.dt_proj, rows));
    }
    const jamba_matrix &down = layer.feed_forward[2];
    most.hidden = std::max(most.hidden, words(down, pairs));
    if (are_bytes(words_for(kernels, down, model.bfloat16))) {
      // QUADS are of models in bfloat16.
      most.wide_hidden = std::max(most.wide_hidden, divide_up(pairs * TILE * model.F, 2));
    }
  }
  most.inputs = std::max(most.inputs, words(model.head, tiles_of(call.num_logits)));
  return most;
}

}  // namespace
}  // namespace jamba

using namespace jamba;

int32_t jamba_prefill(const jamba_step_call *call) try {
  const Path *path = find_path(call->path);
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  const jamba_model &model = *call->model;
  const int64_t M = call->M;
  if (M <= 0 || call->B <= 0 || call->threads <= 0 || call->num_logits < 0 ||
      call->num_logits > M || model.W < 1 || model.W > 8 || !matrices_are_valid(model)) {
    return JAMBA_BAD_SIZE;
  }
  if (!offsets_are_valid(call->offsets, call->B, M)) return JAMBA_BAD_OFFSETS;

  const TileKernels &kernels = path->tiles;
  const Demand demand = demand_of(*call, kernels);
  const int64_t queries = model.H * model.P, pairs = demand.pair_tiles * TILE;
  const bool routes = demand.experts > 1;
  const int64_t channels = model.bfloat16 ? divide_up(M * model.C, 2) : M * model.C;
  Room room;
  const int64_t x = room.take(M * model.D), normed = room.take(routes ? M * model.D : 0);
  const int64_t inputs = room.take(demand.inputs);
  const int64_t u = room.take(channels), gate = room.take(channels);
  const int64_t mixed = room.take(demand.mixed);
  const int64_t selection = room.take(M * (model.R + 2 * model.N)), dt = room.take(demand.dt);
  const int64_t B = room.take(M * model.N), C = room.take(M * model.N);
  const int64_t q = room.take(M * queries), y = room.take(M * queries);
  const int64_t hidden = room.take(demand.hidden), wide_hidden = room.take(demand.wide_hidden);
  const int64_t chosen = room.take(2 * M * model.K), chosen_by = room.take(M * model.K);
  const int64_t pair_rows = room.take(2 * pairs), pair_weights = room.take(pairs);
  const int64_t experts = room.take(4 * demand.experts);

  const int threads = (int)call->threads;
  const int64_t size = cache_lines(path->prefill_scratch(*call, kernels));
  const Scratch buffers(room.words()), scratch(threads * size);
  const Counters counters(PHASES_AROUND + PHASES_OF_LAYER * model.num_layers, threads);
  if (!buffers.data() || !scratch.data() || !counters.data()) return JAMBA_NO_MEMORY;
  float *const data = buffers.data();
  const PrefillBuffers shared = {
      .x = data + x,
      .normed = data + normed,
      .inputs = (uint32_t *)(data + inputs),
      .u = data + u,
      .gate = data + gate,
      .mixed = (uint32_t *)(data + mixed),
      .selection = data + selection,
      .dt = (uint32_t *)(data + dt),
      .B = data + B,
      .C = data + C,
      .q = data + q,
      .y = data + y,
      .hidden = (uint32_t *)(data + hidden),
      .wide_hidden = data + wide_hidden,
      .chosen = (int64_t *)(data + chosen),
      .chosen_by = data + chosen_by,
      .pair_rows = (int64_t *)(data + pair_rows),
      .pair_weights = data + pair_weights,
      .experts = (Expert *)(data + experts),
  };
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer than asked for.
    const Team team = {team_size(), team_member(), counters.data(),
                       Timeline(call->spent, team_member())};
    path->prefill(*call, shared, kernels, team, scratch.data() + team_member() * size);
  }
  return JAMBA_OK;
} catch (const std::bad_alloc &) {
  return JAMBA_NO_MEMORY;
}
