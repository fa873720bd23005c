// Tiles of bytes by AVX-512 VNNI; nothing here runs before find_path() has asked the processor.
#include "tile_kernels.h"
#include "tiles_avx512.h"

namespace jamba {
namespace {

// Not __m512i, which may alias anything: GCC 12 then stores every sum after every product.
typedef int32_t Sum __attribute__((vector_size(64)));

// The sums of a group stay in registers, those over all groups in memory: they are met once for
// every group. GROUPS of INT4 in a tile; none says INT8. The instruction takes one side unsigned:
// weights of INT8 have been moved up by 128, and what that adds, 128 times the sum of a row, is
// where sums begin.
template <int GROUPS>
struct Grouped {
  template <int ROWS>
  static void block(const TileProduct &p, int64_t output, int64_t row) {
    constexpr int HALVES = GROUPS == 2 ? 2 : 1;
    constexpr int64_t WORDS = TILE / HALVES;
    const int64_t tile = output / TILE, lane = output % TILE;
    float *sums[ROWS];
    const uint32_t *rows[ROWS];
    const RowGroup *groups[ROWS];
    for (int r = 0; r < ROWS; r++) {
      sums[r] = (float *)p.sums + ((row + r) * p.output_tiles + tile) * TILE_WORDS + lane * TILE;
      rows[r] = p.rows + (row + r) * p.rows_stride;
      groups[r] = p.row_groups + (row + r) * p.group_stride;
    }
    const uint32_t *weights = p.weights + tile * p.depth * TILE_WORDS + lane * TILE;
    for (int64_t d = 0; d < p.depth; d++) {
      for (int half = 0; half < HALVES; half++) {
        Sum exact[OUTPUTS][ROWS];
#pragma GCC unroll 3
        for (int r = 0; r < ROWS; r++) {
          const __m512i start =
              GROUPS > 0
                  ? _mm512_setzero_si512()
                  : _mm512_slli_epi32(_mm512_sub_epi32(_mm512_sub_epi32(_mm512_setzero_si512(),
                                                                        load(groups[r][d].sums[0])),
                                                       load(groups[r][d].sums[1])),
                                      7);
#pragma GCC unroll 8
          for (int o = 0; o < OUTPUTS; o++) exact[o][r] = (Sum)start;
        }
        const int64_t first = half * WORDS;
        for (int64_t word = first; word < first + WORDS; word++) {
          __m512i x[ROWS];
#pragma GCC unroll 3
          for (int r = 0; r < ROWS; r++) x[r] = load(rows[r] + d * TILE_WORDS + word * TILE);
#pragma GCC unroll 8
          for (int o = 0; o < OUTPUTS; o++) {
            const __m512i w = _mm512_set1_epi32((int)weights[d * TILE_WORDS + o * TILE + word]);
#pragma GCC unroll 3
            for (int r = 0; r < ROWS; r++) {
              exact[o][r] = (Sum)_mm512_dpbusd_epi32((__m512i)exact[o][r], w, x[r]);
            }
          }
        }
        const bool adds = p.adds || d > 0 || half > 0;
        const WeightGroup *const of = p.weight_groups + tile * p.depth + d;
#pragma GCC unroll 3
        for (int r = 0; r < ROWS; r++) {
          const RowGroup &group = groups[r][d];
          const __m512 unit = _mm512_loadu_ps(group.unit);
          __m512 total = _mm512_setzero_ps();
          if constexpr (GROUPS > 0) {
            const __m512i all = GROUPS == 2
                                    ? load(group.sums[half])
                                    : _mm512_add_epi32(load(group.sums[0]), load(group.sums[1]));
            total = _mm512_mul_ps(_mm512_cvtepi32_ps(all), unit);
          }
#pragma GCC unroll 8
          for (int o = 0; o < OUTPUTS; o++) {
            float *const at = sums[r] + o * TILE;
            const __m512 before = adds ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
            const __m512 found = _mm512_cvtepi32_ps((__m512i)exact[o][r]);
            if constexpr (GROUPS == 0) {
              _mm512_storeu_ps(at, _mm512_fmadd_ps(found, unit, before));
            } else {
              const __m512 scale = _mm512_set1_ps(of->scale[half][lane + o]);
              const __m512 minimum = _mm512_set1_ps(of->minimum[half][lane + o]);
              const __m512 lowest = _mm512_fmadd_ps(minimum, total, before);
              _mm512_storeu_ps(at, _mm512_fmadd_ps(found, _mm512_mul_ps(scale, unit), lowest));
            }
          }
        }
      }
    }
  }
};

}  // namespace

void groups_by_avx512_vnni(const TileProduct &p) {
  switch (p.groups_of_tile) {
    case 0: return all_blocks<Grouped<0>>(p);
    case 1: return all_blocks<Grouped<1>>(p);
    case 2: return all_blocks<Grouped<2>>(p);
  }
}

}  // namespace jamba
