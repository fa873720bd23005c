// Products of many rows with a matrix, cut into tiles: 16 outputs by 16 rows of sums, made of tiles
// of 1 KiB on either side.
//
// A word is four bytes: one float, or two bfloat16, or four int8, of inputs that follow each other.
// A tile of weights is [16 outputs][16 words], as they lie in memory; a tile of rows is
// [16 words][16 rows], so that a vector holds the same word of all rows. Sums are [16 outputs][16
// rows], float32, or int32 of QUADS.
#ifndef JAMBA_TILES_H
#define JAMBA_TILES_H

#include <stdint.h>

#include "jamba_kernels.h"

namespace jamba {

constexpr int64_t TILE = 16;                 // outputs, rows or words
constexpr int64_t TILE_WORDS = TILE * TILE;  // words, or sums

// What is in a word: a float, two bfloat16 numbers, or four bytes. Of QUADS a row has one scale, of
// GROUPS one for each tile.
enum class Words : int64_t { FLOATS, PAIRS, QUADS, GROUPS };

static inline int64_t inputs_in(Words words) {
  return words == Words::FLOATS ? 1 : words == Words::PAIRS ? 2 : 4;
}

// Whether rows become bytes, for which more of a row than a tile of channels has to be known.
static inline bool are_bytes(Words words) { return inputs_in(words) == 4; }

// What a tile of GROUPS is for each of its rows, beside its bytes, which have a sign.
struct RowGroup {
  float unit[TILE];       // what 1 stands for
  int32_t sums[2][TILE];  // of the bytes of the first 32 inputs, and of the others
};

// And for each output of INT4, whose bytes are 0 to 15: by halves where groups are of 32 inputs,
// else all in the first. Those of INT8 are moved up by 128.
struct WeightGroup {
  float scale[2][TILE], minimum[2][TILE];
};

// Memory that will be read next, in lines `stride` bytes apart: asked for a little with each block
// of sums, so that it arrives while there is other work.
struct Ahead {
  const char *first = nullptr;
  int64_t stride = 0, lines = 0, bytes = 0;  // `bytes` of each
};

struct FewTiles;
struct FewProduct;

struct TileProduct {
  const uint32_t *weights;  // [output tile][depth][TILE_WORDS]
  const uint32_t *rows;     // [row tile][..], `rows_stride` words apart, [depth][TILE_WORDS] each
  int64_t rows_stride;
  int64_t depth;  // tiles along the inputs
  int64_t output_tiles, row_tiles;
  uint32_t *sums;  // [row tile][output tile][TILE_WORDS]
  bool adds;       // to what is there, else to zero
  Ahead ahead;
  // Of GROUPS: [row tile][..], `group_stride` apart, [depth] each; and [output tile][depth] of
  // INT4.
  const RowGroup *row_groups = nullptr;
  int64_t group_stride = 0;
  const WeightGroup *weight_groups = nullptr;
  int64_t groups_of_tile = 0;  // of INT4: 1 or 2; 0 for INT8
};

// The part of `ahead` that comes with block `index` of `count`.
static inline void fetch_ahead(const Ahead &ahead, int64_t index, int64_t count) {
  const int64_t end = ahead.lines * (index + 1) / count;
  for (int64_t line = ahead.lines * index / count; line < end; line++) {
    const char *p = ahead.first + line * ahead.stride;
    for (int64_t b = 0; b < ahead.bytes; b += 64) __builtin_prefetch(p + b, 0, 2);
  }
}

// What an instruction set has for tiles; null where it has nothing. `begin` and `end` enclose the
// use of the others on each thread.
struct TileKernels {
  void (*begin)();
  void (*end)();
  void (*pairs)(const TileProduct &);
  void (*quads)(const TileProduct &);
  void (*groups)(const TileProduct &);
  // Of a few rows (few_rows.h): cuts `rows` rows of x, `stride` floats apart; then multiplies.
  void (*cut_few)(const jamba_matrix &matrix, const float *x, int64_t stride, int64_t rows,
                  const FewTiles &out);
  void (*few)(const FewProduct &);
};

static inline int64_t tiles_of(int64_t count) { return (count + TILE - 1) / TILE; }

// Tiles along `inputs` inputs.
static inline int64_t tile_depth(Words words, int64_t inputs) {
  return tiles_of((inputs + inputs_in(words) - 1) / inputs_in(words));
}

// How the rows that meet a matrix are cut: those of a model in bfloat16 (`half`) as bfloat16, where
// there is an instruction for it. Weights of 16 bits or fewer are, or are rounded to, such numbers.
static inline Words words_for(const TileKernels &kernels, const jamba_matrix &matrix, bool half) {
  if (!half || matrix.kind == JAMBA_F32) return Words::FLOATS;
  const bool packed = matrix.kind == JAMBA_INT8 || matrix.kind == JAMBA_INT4;
  if (packed && matrix.rows8 >= JAMBA_ROWS8_BY_GROUP && kernels.groups != nullptr) {
    return Words::GROUPS;
  }
  if (matrix.kind == JAMBA_INT8 && matrix.rows8 == JAMBA_ROWS8 && kernels.quads != nullptr) {
    return Words::QUADS;
  }
  return kernels.pairs != nullptr ? Words::PAIRS : Words::FLOATS;
}

// Words of `tiles` tiles of rows that meet a matrix, with what is known of each row of bytes.
static inline int64_t tiled_words(const TileKernels &kernels, const jamba_matrix &matrix, bool half,
                                  int64_t tiles) {
  const Words words = words_for(kernels, matrix, half);
  const int64_t depth = tile_depth(words, matrix.I);
  const int64_t beside = words == Words::GROUPS ? depth * (int64_t)sizeof(RowGroup) / 4 : TILE;
  return tiles * (depth * TILE_WORDS + beside);
}

}  // namespace jamba
#endif
