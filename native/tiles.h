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

// The value is the number of inputs in a word.
enum class Words : int64_t { FLOATS = 1, PAIRS = 2, QUADS = 4 };

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
  // Of a few rows (few_rows.h): cuts `rows` rows of x, `stride` floats apart; then multiplies.
  void (*cut_few)(const jamba_matrix &matrix, const float *x, int64_t stride, int64_t rows,
                  const FewTiles &out);
  void (*few)(const FewProduct &);
};

static inline int64_t tiles_of(int64_t count) { return (count + TILE - 1) / TILE; }

// Tiles along `inputs` inputs.
static inline int64_t tile_depth(Words words, int64_t inputs) {
  return tiles_of((inputs + (int64_t)words - 1) / (int64_t)words);
}

// How the rows that meet a matrix are cut: those of a model in bfloat16 (`half`) as bfloat16, where
// there is an instruction for it. Weights of 16 bits or fewer are, or are rounded to, such numbers.
static inline Words words_for(const TileKernels &kernels, const jamba_matrix &matrix, bool half) {
  if (!half || matrix.kind == JAMBA_F32) return Words::FLOATS;
  if (matrix.kind == JAMBA_INT8 && matrix.rows8 && kernels.quads != nullptr) return Words::QUADS;
  return kernels.pairs != nullptr ? Words::PAIRS : Words::FLOATS;
}

// Words of `tiles` tiles of rows that meet a matrix, with what 1 stands for in each row of QUADS.
static inline int64_t tiled_words(const TileKernels &kernels, const jamba_matrix &matrix, bool half,
                                  int64_t tiles) {
  return tiles * (tile_depth(words_for(kernels, matrix, half), matrix.I) * TILE_WORDS + TILE);
}

}  // namespace jamba
#endif
