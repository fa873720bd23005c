// What the threads of a prefill share, and how much room each thing takes.
#ifndef JAMBA_PREFILL_H
#define JAMBA_PREFILL_H

#include "jamba_kernels.h"
#include "many_rows.h"

namespace jamba {

// Channels that one thread convolves, or scans, at a time: two tiles of pairs.
constexpr int64_t CHANNELS_OF_PIECE = 64;

// Queries of attention that share a reading of the keys: rows of all heads of a group, in tiles.
constexpr int64_t QUERY_TILES = 16;

// Keys that meet them at a time, in tiles.
constexpr int64_t KEY_TILES = 8;

struct Expert {
  int64_t first_tile, tiles;  // of rows
};

// Activations of all rows: float32, but what is "half", which has the type of the model.
struct PrefillBuffers {
  float *x;            // [M][D] the residual stream
  float *normed;       // [M][D] of a mixture of experts
  uint32_t *inputs;    // tiles of what meets the first matrices of a layer
  void *u;             // half [M][C]
  void *gate;          // half [M][C]
  uint32_t *mixed;     // tiles of C, or of H P: for x_proj, then for out_proj
  float *selection;    // [M][R + 2 N]
  uint32_t *dt;        // tiles of R
  float *B, *C;        // [M][N]
  float *q, *y;        // [M][H P]
  uint32_t *hidden;    // tiles of F, one row for each row and expert
  void *wide_hidden;   // half [rows of those tiles][F], where rows are needed whole
  int64_t *chosen;     // [M][K] experts
  float *chosen_by;    // [M][K] and their weights
  int64_t *pair_rows;  // [row tiles of all experts][TILE] the row of x, or -1
  float *pair_weights;
  Expert *experts;  // [X]
};

// Tiles of rows that all experts together may need.
static inline int64_t most_pair_tiles(int64_t M, int64_t K, int64_t experts) {
  return experts == 0 ? tiles_of(M) : M * K / TILE + (experts < M * K ? experts : M * K);
}

}  // namespace jamba
#endif
