// y = W x for many rows of x, in tiles: a part of W is cut into tiles once and meets all rows.
#ifndef JAMBA_MANY_ROWS_LOOPS_H
#define JAMBA_MANY_ROWS_LOOPS_H

#include "many_rows.h"
#include "team.h"
#include "weight_tiles_loops.h"

namespace jamba::JAMBA_PATH {

// What a thread has for products.
struct Products {
  const TileKernels &kernels;
  uint32_t *weights;  // [output tile][DEPTH_OF_PART][TILE_WORDS], then a WeightGroup for each
  uint32_t *sums;     // [row tile][output tile][TILE_WORDS]
  Timeline &timeline;
};

static_assert(DEPTH_OF_PART <= 16, "tile_nibbles takes as many lines as a vector has lanes");

inline void multiply_tiles(const TileKernels &kernels, Words words, const TileProduct &product) {
  switch (words) {
    case Words::FLOATS: return float_tiles(product);
    case Words::PAIRS: return kernels.pairs(product);
    case Words::QUADS: return kernels.quads(product);
    case Words::GROUPS: return kernels.groups(product);
  }
}

// Some outputs of a matrix; without one when it is not known which come next.
struct Outputs {
  const jamba_matrix *matrix = nullptr;
  int64_t first = 0, last = 0;
};

// Sums of outputs [first, last) for `row_tiles` tiles of rows from `row_tile` on, without scales
// and biases. They are added up in the same order whatever the rows and the range of outputs.
inline void sum_products(const Products &with, const jamba_matrix &matrix, int64_t first,
                         int64_t last, const TiledRows &x, int64_t row_tile, int64_t row_tiles,
                         uint32_t *sums, const Outputs &next) {
  const bool grouped = x.words == Words::GROUPS;
  const int64_t groups_of_tile = matrix.kind != JAMBA_INT4 ? 0 : matrix.group == 32 ? 2 : 1;
  const int64_t output_tiles = tiles_of(last - first);
  for (int64_t d = 0; d < x.depth; d += DEPTH_OF_PART) {
    const int64_t depth = x.depth - d < DEPTH_OF_PART ? x.depth - d : DEPTH_OF_PART;
    WeightGroup *const groups = (WeightGroup *)(with.weights + output_tiles * depth * TILE_WORDS);
    {
      const Doing doing(with.timeline, JAMBA_CUTS_WEIGHTS);
      tile_weights(matrix, x.words, first, last, d, depth, with.weights, groups);
    }
    Ahead ahead;
    if (d + depth < x.depth) {
      ahead = weights_ahead(matrix, x.words, first, last, d + depth, DEPTH_OF_PART);
    } else if (next.matrix != nullptr) {
      ahead = weights_ahead(*next.matrix, x.words, next.first, next.last, 0, DEPTH_OF_PART);
    }
    multiply_tiles(with.kernels, x.words,
                   {with.weights, x.tile(row_tile, d), x.depth * TILE_WORDS, depth, output_tiles,
                    row_tiles, sums, d > 0, ahead, grouped ? x.groups(row_tile, d) : nullptr,
                    x.depth, groups, groups_of_tile});
  }
}

// Makes results of the sums of outputs [first, first + TILE) of `matrix`, in place.
inline float *finish_tile(const jamba_matrix &matrix, int64_t first, const TiledRows &x,
                          int64_t row_tile, uint32_t *sums) {
  float *y = (float *)sums;
  const bool exact = x.words == Words::QUADS;
  const int64_t outputs = matrix.O - first < TILE ? matrix.O - first : TILE;
  if (matrix.kind != JAMBA_INT8 && matrix.bias == nullptr) return y;
  for (int64_t o = 0; o < outputs; o++) {
    const float scale = matrix.kind == JAMBA_INT8 ? ((const float *)matrix.scale)[first + o] : 1.0f;
    const float bias = matrix.bias == nullptr ? 0.0f : matrix.bias[first + o];
    for (int v = 0; v < TILE; v += LANES) {
      float *p = y + o * TILE + v;
      Vec sum = load(p);
      if (exact) sum = as_floats((IntVec)sum) * load(x.units(row_tile) + v);
      store(p, fma(sum, set(scale), set(bias)));
    }
  }
  return y;
}

// Calls take(row tile, first output, number of outputs, results) for every tile of the results of
// outputs [first, last), which are [16 rows][16 outputs]. `next` as above.
template <typename Take>
inline void multiply_rows(const Products &with, const jamba_matrix &matrix, int64_t first,
                          int64_t last, const TiledRows &x, int64_t row_tile, int64_t row_tiles,
                          const Outputs &next, const Take &take) {
  const int64_t output_tiles = tiles_of(last - first);
  alignas(64) float turned[TILE_WORDS];
  for (int64_t t = 0; t < row_tiles; t += ROW_TILES_OF_PART) {
    const int64_t some = row_tiles - t < ROW_TILES_OF_PART ? row_tiles - t : ROW_TILES_OF_PART;
    sum_products(with, matrix, first, last, x, row_tile + t, some, with.sums,
                 t + some < row_tiles ? Outputs{} : next);
    const Doing doing(with.timeline, JAMBA_GIVES_RESULTS);
    for (int64_t r = 0; r < some; r++) {
      for (int64_t o = 0; o < output_tiles; o++) {
        const int64_t output = first + o * TILE, left = last - output;
        uint32_t *sums = with.sums + (r * output_tiles + o) * TILE_WORDS;
        const float *y = finish_tile(matrix, output, x, row_tile + t + r, sums);
        turn((const uint32_t *)y, (uint32_t *)turned);
        take(row_tile + t + r, output, left < TILE ? left : TILE, turned);
      }
    }
  }
}

// The threads of a team call take(row tile, output, outputs, results) for all outputs of `matrix`.
template <typename Take>
inline void share_outputs(const Products &with, Team &team, const jamba_matrix &matrix,
                          const TiledRows &x, int64_t row_tiles, const Take &take) {
  const int64_t piece = outputs_of_piece(matrix.O, team.threads);
  const auto outputs_of = [&](int64_t index) -> Outputs {
    const int64_t first = index * piece, last = first + piece;
    if (index < 0) return {};
    return {&matrix, first, last < matrix.O ? last : matrix.O};
  };
  team.share_ahead(divide_up(matrix.O, piece), [&](int64_t index, int64_t next) {
    const Outputs outputs = outputs_of(index);
    multiply_rows(with, matrix, outputs.first, outputs.last, x, 0, row_tiles, outputs_of(next),
                  take);
  });
}

// Writes a tile of results as a part of TILE rows of an array.
inline void store_tile(void *array, bool half, int64_t stride, int64_t row, int64_t num_rows,
                       int64_t column, int64_t columns, const float *tile) {
  for (int64_t i = 0; i < num_rows; i++) {
    for (int64_t j = 0; j < columns; j += LANES) {
      store_any(array, half, (row + i) * stride + column + j, lanes_left(columns, j),
                load(tile + i * TILE + j));
    }
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
