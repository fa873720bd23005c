// Tiles of floats: their products, and how a tile is turned.
#ifndef JAMBA_TILE_LOOPS_H
#define JAMBA_TILE_LOOPS_H

#include "row_ops_loops.h"
#include "tiles.h"

namespace jamba::JAMBA_PATH {

// Vectors of a row of TILE words.
constexpr int TILE_VECS = TILE / LANES;

// Outputs and tiles of rows whose sums fit the registers beside the words of the rows.
#if defined(__AVX512F__)
constexpr int FLOAT_OUTPUTS = 8, FLOAT_ROWS = 3;
#elif defined(__AVX2__)
constexpr int FLOAT_OUTPUTS = 4, FLOAT_ROWS = 1;
#else
constexpr int FLOAT_OUTPUTS = 2, FLOAT_ROWS = 1;
#endif

template <int ROWS>
inline void float_block(const TileProduct &p, int64_t output, int64_t row) {
  constexpr int VECS = ROWS * TILE_VECS;
  const int64_t tile = output / TILE, lane = output % TILE;
  float *sums[ROWS];
  const float *rows[ROWS];
  Vec sum[FLOAT_OUTPUTS][VECS];
  for (int r = 0; r < ROWS; r++) {
    sums[r] = (float *)p.sums + ((row + r) * p.output_tiles + tile) * TILE_WORDS + lane * TILE;
    rows[r] = (const float *)p.rows + (row + r) * p.rows_stride;
    for (int o = 0; o < FLOAT_OUTPUTS; o++) {
      for (int v = 0; v < TILE_VECS; v++) {
        sum[o][r * TILE_VECS + v] = p.adds ? load(sums[r] + o * TILE + v * LANES) : Vec{};
      }
    }
  }
  const float *weights = (const float *)p.weights + tile * p.depth * TILE_WORDS + lane * TILE;
  for (int64_t d = 0; d < p.depth; d++) {
    for (int64_t word = 0; word < TILE; word++) {
      Vec x[VECS];
      for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < TILE_VECS; v++) {
          x[r * TILE_VECS + v] = load(rows[r] + d * TILE_WORDS + word * TILE + v * LANES);
        }
      }
#pragma GCC unroll 8
      for (int o = 0; o < FLOAT_OUTPUTS; o++) {
        const Vec w = set(weights[d * TILE_WORDS + o * TILE + word]);
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) sum[o][v] = fma(w, x[v], sum[o][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int o = 0; o < FLOAT_OUTPUTS; o++) {
      for (int v = 0; v < TILE_VECS; v++) {
        store(sums[r] + o * TILE + v * LANES, sum[o][r * TILE_VECS + v]);
      }
    }
  }
}

inline void float_tiles(const TileProduct &p) {
  for (int64_t output = 0; output < p.output_tiles * TILE; output += FLOAT_OUTPUTS) {
    fetch_ahead(p.ahead, output / FLOAT_OUTPUTS, p.output_tiles * TILE / FLOAT_OUTPUTS);
    int64_t row = 0;
    for (; row + FLOAT_ROWS <= p.row_tiles; row += FLOAT_ROWS) {
      float_block<FLOAT_ROWS>(p, output, row);
    }
    for (; row < p.row_tiles; row++) float_block<1>(p, output, row);
  }
}

// out[j][i] = in[i][j], words. `out` may not be `in`.
inline void turn(const uint32_t *in, uint32_t *out) {
#if defined(__AVX512F__)
  typedef WordVec W;
  // In lanes of four words: interleave neighbouring rows, then pairs of rows; a[4 g + j] then
  // holds, for rows 4 g to 4 g + 3, columns j, j + 4, j + 8 and j + 12. The same again with whole
  // lanes.
  constexpr W FIRST = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr W SECOND = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr W LOW = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr W HIGH = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  constexpr W EVEN = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  constexpr W ODD = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  W a[TILE], b[TILE];
  for (int i = 0; i < TILE; i++) a[i] = (W)load((const float *)in + i * TILE);
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i += 2) {
    b[i] = __builtin_shuffle(a[i], a[i + 1], FIRST);
    b[i + 1] = __builtin_shuffle(a[i], a[i + 1], SECOND);
  }
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i += 4) {
    for (int half = 0; half < 2; half++) {
      a[i + 2 * half] = __builtin_shuffle(b[i + half], b[i + 2 + half], LOW);
      a[i + 2 * half + 1] = __builtin_shuffle(b[i + half], b[i + 2 + half], HIGH);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; j++) {
    const W even = __builtin_shuffle(a[j], a[4 + j], EVEN);
    const W odd = __builtin_shuffle(a[j], a[4 + j], ODD);
    const W next_even = __builtin_shuffle(a[8 + j], a[12 + j], EVEN);
    const W next_odd = __builtin_shuffle(a[8 + j], a[12 + j], ODD);
    store((float *)out + j * TILE, (Vec)__builtin_shuffle(even, next_even, EVEN));
    store((float *)out + (j + 4) * TILE, (Vec)__builtin_shuffle(odd, next_odd, EVEN));
    store((float *)out + (j + 8) * TILE, (Vec)__builtin_shuffle(even, next_even, ODD));
    store((float *)out + (j + 12) * TILE, (Vec)__builtin_shuffle(odd, next_odd, ODD));
  }
#else
  for (int i = 0; i < TILE; i++) {
    for (int j = 0; j < TILE; j++) out[j * TILE + i] = in[i * TILE + j];
  }
#endif
}

}  // namespace jamba::JAMBA_PATH
#endif
