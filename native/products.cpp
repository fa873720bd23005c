// Plans products with matrices of any kind, and their unpacking: buffers, threads, what is refused.
#include <algorithm>
#include <new>

#include "model_checks.h"
#include "paths.h"
#include "scratch.h"
#include "threads.h"

namespace jamba {
namespace {

int32_t product_of_few(const Path &path, const jamba_product_call &call, int threads) {
  const int64_t size = cache_lines(path.product_scratch(call));
  const Scratch scratch(threads * size);
  const Counters counters(1, 1);
  if (!scratch.data() || !counters.data()) return JAMBA_NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    float *own = scratch.data() + thread * size;
    if (path.tiles.begin != nullptr) path.tiles.begin();
    path.product_begin(call, path.tiles, own);
    const int64_t outputs = call.matrix.O, pieces = divide_up(outputs, PIECE);
    for (int64_t piece;
         (piece = __atomic_fetch_add(counters.data(), 1, __ATOMIC_RELAXED)) < pieces;) {
      const int64_t first = piece * PIECE;
      path.product(call, path.tiles, first, std::min(first + PIECE, outputs), own);
    }
    if (path.tiles.end != nullptr) path.tiles.end();
  }
  return JAMBA_OK;
}

int32_t product_of_many(const Path &path, const jamba_product_call &call, int threads) {
  const bool half = call.bfloat16 & JAMBA_U;
  const Scratch tiles(tiled_words(path.tiles, call.matrix, half, tiles_of(call.M)));
  const int64_t size = weight_words(MOST_OUTPUTS) + sum_words(MOST_OUTPUTS);
  const Scratch scratch(threads * size);
  const Counters counters(2, threads);
  if (!tiles.data() || !scratch.data() || !counters.data()) return JAMBA_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer than asked for.
    const Team team = {team_size(), team_member(), counters.data()};
    path.product_many(call, path.tiles, (uint32_t *)tiles.data(), team,
                      (uint32_t *)scratch.data() + team_member() * size);
  }
  return JAMBA_OK;
}

}  // namespace
}  // namespace jamba

using namespace jamba;

int32_t jamba_product(const jamba_product_call *call) try {
  const Path *path = find_path(call->path);
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  const jamba_matrix &matrix = call->matrix;
  if (call->M <= 0 || call->threads <= 0 || !matrix_is_valid(matrix)) return JAMBA_BAD_SIZE;
  const int threads = useful_threads(call->threads, call->M * matrix.O * matrix.I);
  return (call->M <= JAMBA_STEP_ROWS ? product_of_few : product_of_many)(*path, *call, threads);
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
