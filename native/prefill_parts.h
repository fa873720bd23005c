// What the layers of a prefill share: one thread's view of it, norms, and the way back to the
// stream.
#ifndef JAMBA_PREFILL_PARTS_H
#define JAMBA_PREFILL_PARTS_H

#include "many_rows_loops.h"
#include "prefill.h"
#include "step_parts.h"

namespace jamba::JAMBA_PATH {

// One thread's view of a prefill.
struct Prefill {
  const jamba_step_call &call;
  const jamba_model &model;
  const PrefillBuffers &shared;
  Team &team;
  Products products;
  float *local;  // results of one piece

  int64_t row_tiles() const { return tiles_of(call.M); }
  int64_t rows_of(int64_t tile) const {
    const int64_t left = call.M - tile * TILE;
    return left < TILE ? left : TILE;
  }
};

// Row numbers of a tile.
struct RowsOfTile {
  int64_t rows[TILE];
  explicit RowsOfTile(int64_t tile) {
    for (int64_t i = 0; i < TILE; i++) rows[i] = tile * TILE + i;
  }
};

// Room for `row_tiles` tiles of rows that meet `matrix`.
JAMBA_INLINE TiledRows tiled(const Prefill &prefill, const jamba_matrix &matrix, int64_t row_tiles,
                             uint32_t *data) {
  const Words words = words_for(prefill.products.kernels, matrix, prefill.model.bfloat16);
  return {words, matrix.I, tile_depth(words, matrix.I), row_tiles, data};
}

// The norm of a tile of rows of the stream, in `out`, [TILE][D].
inline void norm_tile(const Prefill &prefill, const float *weight, int64_t tile, float *out) {
  const int64_t D = prefill.model.D;
  for (int64_t i = 0; i < prefill.rows_of(tile); i++) {
    norm_row(prefill.shared.x + (tile * TILE + i) * D, weight, D, (float)prefill.model.epsilon,
             out + i * D);
  }
}

// The stream, normalised, as `matrix` of part `part` and others of its kind meet it.
inline TiledRows norm_inputs(Prefill &prefill, const float *weight, int32_t part,
                             const jamba_matrix &matrix) {
  const TiledRows x = tiled(prefill, matrix, prefill.row_tiles(), prefill.shared.inputs);
  const int64_t D = prefill.model.D;
  prefill.team.share(prefill.row_tiles(), [&](int64_t tile) {
    prefill.team.timeline.turn_to(JAMBA_NORMS);
    norm_tile(prefill, weight, tile, prefill.local);
    prefill.team.timeline.turn_to(part, JAMBA_CUTS_ROWS);
    tile_rows(x, tile, {prefill.local, false, D}, RowsOfTile(0).rows, prefill.rows_of(tile), 0);
  });
  return x;
}

// Rows of a tile, each `stride` floats from the last, += weights[row] * results.
JAMBA_INLINE void add_row(float *x, float weight, const float *results, int64_t count) {
  for (int64_t j = 0; j < count; j += LANES) {
    const int64_t left = lanes_left(count, j);
    store_as<false>(x, j, left, fma(set(weight), load(results + j), load_as<false>(x, j, left)));
  }
}

// x += W y for all rows, as part `part`.
inline void add_to_stream(Prefill &prefill, int32_t part, const jamba_matrix &matrix,
                          const TiledRows &y) {
  const int64_t D = prefill.model.D;
  prefill.team.timeline.turn_to(part);
  share_outputs(prefill.products, prefill.team, matrix, y, prefill.row_tiles(),
                [&](int64_t tile, int64_t output, int64_t outputs, const float *results) {
                  for (int64_t i = 0; i < prefill.rows_of(tile); i++) {
                    add_row(prefill.shared.x + (tile * TILE + i) * D + output, 1.0f,
                            results + i * TILE, outputs);
                  }
                });
}

}  // namespace jamba::JAMBA_PATH
#endif
