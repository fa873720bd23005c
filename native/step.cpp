// Plans small products and whole steps: buffers, threads, and what is refused.
#include "step.h"

#include <algorithm>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "paths.h"
#include "scratch.h"

namespace jamba {
namespace {

// Multiply-adds below which a second thread costs more than it saves: some microseconds.
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 17;

// Phases of a layer, at most: seven of attention or Mamba and of the feed-forward; two more around.
constexpr int64_t PHASES_OF_LAYER = 8;

bool matrix_is_valid(const jamba_matrix &matrix) {
  if (matrix.O <= 0 || matrix.I <= 0 || matrix.values == nullptr) return false;
  switch (matrix.kind) {
    case JAMBA_F32:
    case JAMBA_BF16: return true;
    case JAMBA_INT8: return matrix.scale != nullptr;
    case JAMBA_INT4:
      return (matrix.group == 32 || matrix.group == 64) && matrix.I % matrix.group == 0 &&
             matrix.scale != nullptr && matrix.minimum != nullptr;
  }
  return false;
}

#ifdef _OPENMP
int64_t team_size() { return omp_get_num_threads(); }
int64_t team_member() { return omp_get_thread_num(); }
#else
int64_t team_size() { return 1; }
int64_t team_member() { return 0; }
#endif

int useful_threads(int64_t threads, int64_t products) {
  return (int)std::max<int64_t>(1, std::min(threads, products / PRODUCTS_PER_THREAD));
}

// Counters for `phases` phases, all zero.
class Counters {
 public:
  explicit Counters(int64_t phases) : memory_(2 * Team::COUNTER_STRIDE * phases) {
    if (memory_.data()) std::fill_n(memory_.data(), 2 * Team::COUNTER_STRIDE * phases, 0.0f);
  }
  int64_t *data() const { return (int64_t *)memory_.data(); }

 private:
  Scratch memory_;
};

bool matrices_are_valid(const jamba_model &model) {
  for (int64_t i = 0; i < model.num_layers; i++) {
    const jamba_layer &layer = model.layers[i];
    for (const jamba_matrix *matrix :
         {&layer.in_proj, &layer.x_proj, &layer.dt_proj, &layer.out_proj}) {
      if (!matrix_is_valid(*matrix)) return false;
    }
    if (layer.experts < 0 || (layer.experts > 0 && !matrix_is_valid(layer.router))) return false;
    if (layer.experts > 0 && (model.K < 1 || model.K > layer.experts)) return false;
    const int64_t matrices = 3 * std::max<int64_t>(layer.experts, 1);
    for (int64_t m = 0; m < matrices; m++) {
      if (!matrix_is_valid(layer.feed_forward[m])) return false;
    }
  }
  return matrix_is_valid(model.embedding) && matrix_is_valid(model.head);
}

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

int32_t jamba_product(const jamba_product_call *call) try {
  const Path *path = find_path(call->path);
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  const jamba_matrix &matrix = call->matrix;
  if (call->M <= 0 || call->M > JAMBA_STEP_ROWS || call->threads <= 0 || !matrix_is_valid(matrix)) {
    return JAMBA_BAD_SIZE;
  }
  const int threads = useful_threads(call->threads, call->M * matrix.O * matrix.I);
  const int64_t size = cache_lines(path->product_scratch(*call));
  const Scratch scratch(threads * size);
  const Counters counters(1);
  if (!scratch.data() || !counters.data()) return JAMBA_NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    float *own = scratch.data() + thread * size;
    path->product_begin(*call, own);
    const int64_t pieces = divide_up(matrix.O, PIECE);
    for (int64_t piece;
         (piece = __atomic_fetch_add(counters.data(), 1, __ATOMIC_RELAXED)) < pieces;) {
      const int64_t first = piece * PIECE;
      path->product(*call, first, std::min(first + PIECE, matrix.O), own);
    }
  }
  return JAMBA_OK;
} catch (const std::bad_alloc &) {
  return JAMBA_NO_MEMORY;
}

int32_t jamba_unpack(const jamba_unpack_call *call) try {
  const Path *path = find_path(call->path);
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  if (call->threads <= 0 || !matrix_is_valid(call->matrix)) return JAMBA_BAD_SIZE;
  const int64_t rows = call->matrix.O, size = cache_lines(call->matrix.I);
  const int threads = useful_threads(call->threads, rows * call->matrix.I);
  const Scratch scratch(threads * size);
  if (!scratch.data()) return JAMBA_NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    path->unpack(*call, rows * thread / threads, rows * (thread + 1) / threads,
                 scratch.data() + thread * size);
  }
  return JAMBA_OK;
} catch (const std::bad_alloc &) {
  return JAMBA_NO_MEMORY;
}

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
  const Counters counters(2 + PHASES_OF_LAYER * model.num_layers);
  if (!buffers.data() || !scratch.data() || !counters.data()) return JAMBA_NO_MEMORY;
  float *data = buffers.data();
  const StepBuffers shared = {data + x,         data + u,       data + gate,
                              data + selection, data + y,       data + q,
                              data + hidden,    data + partial, pieces};
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer than asked for.
    const Team team = {team_size(), counters.data()};
    path->step(*call, shared, team, scratch.data() + team_member() * size);
  }
  return JAMBA_OK;
} catch (const std::bad_alloc &) {
  return JAMBA_NO_MEMORY;
}
