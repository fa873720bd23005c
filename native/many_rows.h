// How products of many rows are cut so that what is used again stays in the second-level cache.
#ifndef JAMBA_MANY_ROWS_H
#define JAMBA_MANY_ROWS_H

#include "tiles.h"

namespace jamba {

// Tiles along the inputs: 16 KiB for a tile of rows or outputs, so that two of outputs, which meet
// all rows in turn, stay in the first-level cache.
constexpr int64_t DEPTH_OF_PART = 16;

// Tiles of rows that meet one part of the weights: 512 KiB of them.
constexpr int64_t ROW_TILES_OF_PART = 32;

// Most outputs of one piece of work.
constexpr int64_t MOST_OUTPUTS = 256;

// Words of scratch for weights and for sums of at most `outputs` outputs and any rows.
static inline int64_t weight_words(int64_t outputs) {
  return tiles_of(outputs) * DEPTH_OF_PART * (TILE_WORDS + (int64_t)sizeof(WeightGroup) / 4);
}
static inline int64_t sum_words(int64_t outputs) {
  return tiles_of(outputs) * ROW_TILES_OF_PART * TILE_WORDS;
}

// Outputs of one piece: as many as keep every thread busy to the end. It decides nothing about
// results.
static inline int64_t outputs_of_piece(int64_t outputs, int64_t threads) {
  int64_t piece = MOST_OUTPUTS;
  while (piece > 2 * TILE && outputs < 4 * threads * piece) piece /= 2;
  return piece;
}

}  // namespace jamba
#endif
