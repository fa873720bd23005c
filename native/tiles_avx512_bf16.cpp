// Tiles of bfloat16 by AVX-512 BF16; nothing here runs before find_path() has asked the processor.
#include "tile_kernels.h"
#include "tiles_avx512.h"

namespace jamba {
namespace {

struct Pairs {
  template <int ROWS>
  static void block(const TileProduct &p, int64_t output, int64_t row) {
    const int64_t tile = output / TILE, lane = output % TILE;
    uint32_t *sums[ROWS];
    const uint32_t *rows[ROWS];
    __m512 sum[OUTPUTS][ROWS];
    for (int r = 0; r < ROWS; r++) {
      sums[r] = p.sums + ((row + r) * p.output_tiles + tile) * TILE_WORDS + lane * TILE;
      rows[r] = p.rows + (row + r) * p.rows_stride;
      for (int o = 0; o < OUTPUTS; o++) {
        sum[o][r] = (__m512)(p.adds ? load(sums[r] + o * TILE) : _mm512_setzero_si512());
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
          for (int r = 0; r < ROWS; r++) {
            sum[o][r] = _mm512_dpbf16_ps(sum[o][r], (__m512bh)w, (__m512bh)x[r]);
          }
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int o = 0; o < OUTPUTS; o++) _mm512_storeu_si512(sums[r] + o * TILE, (__m512i)sum[o][r]);
    }
  }
};

}  // namespace

void pairs_by_avx512_bf16(const TileProduct &p) { all_blocks<Pairs>(p); }

}  // namespace jamba
