// Tiles by AVX-512 instructions that multiply words and add what they hold: each file that includes
// this is compiled for one of them.
#ifndef JAMBA_TILES_AVX512_H
#define JAMBA_TILES_AVX512_H

#include <immintrin.h>

#include "tiles.h"

namespace jamba {
namespace {

// Eight outputs by up to three tiles of rows: 24 sums, 3 words of rows, and one of weights that is
// broadcast from memory.
constexpr int OUTPUTS = 8;

inline __m512i load(const uint32_t *p) { return _mm512_loadu_si512(p); }

// Kind has the type of sums, Sum, and product(sum, weights, rows).
template <typename Kind, int ROWS>
inline void block(const TileProduct &p, int64_t output, int64_t row) {
  const int64_t tile = output / TILE, lane = output % TILE;
  uint32_t *sums[ROWS];
  const uint32_t *rows[ROWS];
  typename Kind::Sum sum[OUTPUTS][ROWS];
  for (int r = 0; r < ROWS; r++) {
    sums[r] = p.sums + ((row + r) * p.output_tiles + tile) * TILE_WORDS + lane * TILE;
    rows[r] = p.rows + (row + r) * p.rows_stride;
    for (int o = 0; o < OUTPUTS; o++) {
      sum[o][r] = (typename Kind::Sum)(p.adds ? load(sums[r] + o * TILE) : _mm512_setzero_si512());
    }
  }
  const uint32_t *weights = p.weights + tile * p.depth * TILE_WORDS + lane * TILE;
  for (int64_t d = 0; d < p.depth; d++) {
    for (int64_t word = 0; word < TILE; word++) {
      __m512i x[ROWS];
      for (int r = 0; r < ROWS; r++) x[r] = load(rows[r] + d * TILE_WORDS + word * TILE);
#pragma GCC unroll 8
      for (int o = 0; o < OUTPUTS; o++) {
        const __m512i w = _mm512_set1_epi32((int)weights[d * TILE_WORDS + o * TILE + word]);
#pragma GCC unroll 3
        for (int r = 0; r < ROWS; r++) sum[o][r] = Kind::product(sum[o][r], w, x[r]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int o = 0; o < OUTPUTS; o++) _mm512_storeu_si512(sums[r] + o * TILE, (__m512i)sum[o][r]);
  }
}

template <typename Kind>
void all(const TileProduct &p) {
  for (int64_t output = 0; output < p.output_tiles * TILE; output += OUTPUTS) {
    fetch_ahead(p.ahead, output / OUTPUTS, p.output_tiles * TILE / OUTPUTS);
    int64_t row = 0;
    for (; row + 3 <= p.row_tiles; row += 3) block<Kind, 3>(p, output, row);
    if (row + 2 == p.row_tiles) block<Kind, 2>(p, output, row);
    if (row + 1 == p.row_tiles) block<Kind, 1>(p, output, row);
  }
}

}  // namespace
}  // namespace jamba
#endif
