// Products of a few rows with a matrix that lies as it was saved: reading it is all the work there
// is, and each weight is read once, whatever the number of rows.
#ifndef JAMBA_FEW_ROWS_H
#define JAMBA_FEW_ROWS_H

#include "tiles.h"

namespace jamba {

// Rows that share tiles: a row has two columns of them, a coarse part and the rest.
constexpr int64_t FEW = TILE / 2;

// Rows cut into tiles, one after the other along the inputs, for each FEW rows.
//
// Tiles are [16 words][16 columns]: column c holds the coarse part of row c, column FEW + c the
// rest. With BF16 these are two bfloat16 numbers whose sum is the row to 16 bits; with INT8 and
// INT4 two bytes of an integer of 16 bits: the coarse one counts 256. With INT4 a tile's
// inputs are in the order in which the low halves of 32 bytes of weights give them, and then the
// high halves; where a tile's inputs belong to two groups there is a tile for each of them, zero in
// the other.
//
// Up to MOST_ROWS_APART rows that meet INT4 have `slots` columns each, and what a tile holds of
// group g stands in column row * slots + g % slots, with zeros in the others. So sums of `slots`
// groups do not mix, and a tile of two groups need not be there twice.
struct FewTiles {
  uint32_t *tiles;
  float *unit;        // [rows] what 1 stands for in integers
  float *group_sums;  // INT4: [FEW rows][groups][16 columns]: zero, then the sums over each group
  int16_t *integers;  // room for a row
  int64_t slots;      // INT4: groups of a row that have columns of their own
};

constexpr int64_t MOST_ROWS_APART = FEW / 2;

static inline int64_t slots_for(const jamba_matrix &matrix, int64_t rows) {
  if (matrix.kind != JAMBA_INT4 || rows > MOST_ROWS_APART) return 1;
  return rows == 1 ? FEW : rows == 2 ? FEW / 2 : FEW / 4;
}

// A product with outputs [first, last) of a matrix, sixteen or a multiple of it.
struct FewProduct {
  const jamba_matrix &matrix;
  int64_t first, last;
  const FewTiles &x;
  const int64_t *rows;  // [count] ascending
  int64_t count;
  float *y;  // y[i][o - first] = W[o] . x[rows[i]] + bias[o]
  int64_t y_stride;
  const void *next;  // weights that the thread will read after these, in rows as long; or null
};

static inline int64_t bytes_of_row(const jamba_matrix &matrix) {
  switch (matrix.kind) {
    case JAMBA_F32: return matrix.I * 4;
    case JAMBA_BF16: return matrix.I * 2;
    case JAMBA_INT8: return matrix.I;
    case JAMBA_INT4: return matrix.I / 2;
  }
  return 0;
}

static inline const char *weights_of(const jamba_matrix &matrix, int64_t output) {
  return (const char *)matrix.values + output * bytes_of_row(matrix);
}

// What is read after outputs [output, output + count), for fetching early.
static inline const char *weights_after(const FewProduct &p, int64_t output, int64_t count) {
  if (output + count < p.last) return weights_of(p.matrix, output + count);
  return p.next != nullptr ? (const char *)p.next : weights_of(p.matrix, output);
}

// The largest integer of a row: its coarse byte is at most 127.
constexpr float MOST_INTEGER = 32639.0f;

// Inputs of one tile.
static inline int64_t inputs_of_tile(const jamba_matrix &matrix) {
  return matrix.kind == JAMBA_BF16 ? 2 * TILE : 4 * TILE;
}

// Tiles along the inputs.
static inline int64_t few_depth(const jamba_matrix &matrix) {
  const int64_t tiles = matrix.I / inputs_of_tile(matrix);
  return matrix.kind == JAMBA_INT4 && matrix.group < inputs_of_tile(matrix) ? 2 * tiles : tiles;
}

// Words that FEW rows take.
static inline int64_t few_words(const jamba_matrix &matrix) {
  return few_depth(matrix) * TILE_WORDS;
}

constexpr TileKernels NO_TILES = {};

// Whether an instruction set's own products take a matrix. It is a matter of the matrix alone: a
// row must have the same product in any company.
static inline bool takes_few(const TileKernels &kernels, const jamba_matrix &matrix) {
  return kernels.few != nullptr && matrix.kind != JAMBA_F32 && matrix.O % (2 * TILE) == 0 &&
         matrix.I % 64 == 0 && matrix.I <= 1 << 16;
}

}  // namespace jamba
#endif
