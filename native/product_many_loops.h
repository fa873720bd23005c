// y = W x for many rows of x, as a call of its own.
#ifndef JAMBA_PRODUCT_MANY_LOOPS_H
#define JAMBA_PRODUCT_MANY_LOOPS_H

#include "many_rows_loops.h"
#include "team.h"

namespace jamba::JAMBA_PATH {

// One thread's part; `tiles` is shared, `scratch` its own.
inline void product_many(const jamba_product_call &call, const TileKernels &kernels,
                         uint32_t *tiles, Team team, uint32_t *scratch) {
  const jamba_matrix &matrix = call.matrix;
  const bool half = call.bfloat16 & JAMBA_U;
  const Words words = words_for(kernels, matrix, half);
  const int64_t row_tiles = tiles_of(call.M);
  const TiledRows x = {words, matrix.I, tile_depth(words, matrix.I), row_tiles, tiles};
  const auto rows_of = [&](int64_t tile) {
    return call.M - tile * TILE < TILE ? call.M - tile * TILE : TILE;
  };
  if (kernels.begin != nullptr) kernels.begin();
  team.share(row_tiles, [&](int64_t tile) {
    int64_t rows[TILE];
    for (int64_t i = 0; i < TILE; i++) rows[i] = tile * TILE + i;
    tile_rows(x, tile, {call.x_MI, half, call.x_stride}, rows, rows_of(tile), 0);
  });
  const Products with = {kernels, scratch, scratch + weight_words(MOST_OUTPUTS), team.timeline};
  share_outputs(with, team, matrix, x, row_tiles,
                [&](int64_t tile, int64_t output, int64_t count, const float *results) {
                  store_tile(call.y_MO, half, matrix.O, tile * TILE, rows_of(tile), output, count,
                             results);
                });
  if (kernels.end != nullptr) kernels.end();
}

}  // namespace jamba::JAMBA_PATH
#endif
