// Tiles of int8 by AVX-512 VNNI; nothing here runs before find_path() has asked the processor.
#include "tile_kernels.h"
#include "tiles_avx512.h"

namespace jamba {
namespace {

// The instruction takes one side unsigned: rows are moved up by 128, and what that adds, 128 times
// the sum of the weights, is taken off at the end.
struct Quads {
  // Not __m512i, which may alias anything: GCC 12 then stores every sum after every product.
  typedef int32_t Sum __attribute__((vector_size(64)));
  static Sum product(Sum sum, __m512i weights, __m512i rows) {
    const __m512i unsigned_rows = _mm512_xor_si512(rows, _mm512_set1_epi8((char)0x80));
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, unsigned_rows, weights);
  }
};

}  // namespace

void quads_by_avx512_vnni(const TileProduct &p) {
  all<Quads>(p);
  const __m512i all_128 = _mm512_set1_epi8((char)0x80);
  for (int64_t output = 0; output < p.output_tiles * TILE; output++) {
    const int64_t tile = output / TILE, lane = output % TILE;
    const uint32_t *weights = p.weights + tile * p.depth * TILE_WORDS + lane * TILE;
    __m512i excess = _mm512_setzero_si512();
    for (int64_t d = 0; d < p.depth; d++) {
      excess = _mm512_dpbusd_epi32(excess, all_128, load(weights + d * TILE_WORDS));
    }
    int32_t lanes[TILE], sum = 0;
    _mm512_storeu_si512(lanes, excess);
    for (const int32_t lane_sum : lanes) sum += lane_sum;
    const __m512i total = _mm512_set1_epi32(sum);
    for (int64_t row = 0; row < p.row_tiles; row++) {
      uint32_t *sums = p.sums + (row * p.output_tiles + tile) * TILE_WORDS + lane * TILE;
      _mm512_storeu_si512(sums, _mm512_sub_epi32(load(sums), total));
    }
  }
}

}  // namespace jamba
