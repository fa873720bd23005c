// How products of tiles by AVX-512 go through blocks of sums: each file that includes this is
// compiled for the instruction that makes them.
#ifndef JAMBA_TILES_AVX512_H
#define JAMBA_TILES_AVX512_H

#include "avx512.h"
#include "tiles.h"

namespace jamba {
namespace {

// Eight outputs by up to three tiles of rows: 24 sums, 3 words of rows, and one of weights that is
// broadcast from memory.
constexpr int OUTPUTS = 8;

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }

// Calls Block::template block<ROWS>(product, first output, first tile of rows) for all of them.
template <typename Block>
void all_blocks(const TileProduct &p) {
  for (int64_t output = 0; output < p.output_tiles * TILE; output += OUTPUTS) {
    fetch_ahead(p.ahead, output / OUTPUTS, p.output_tiles * TILE / OUTPUTS);
    int64_t row = 0;
    for (; row + 3 <= p.row_tiles; row += 3) Block::template block<3>(p, output, row);
    if (row + 2 == p.row_tiles) Block::template block<2>(p, output, row);
    if (row + 1 == p.row_tiles) Block::template block<1>(p, output, row);
  }
}

}  // namespace
}  // namespace jamba
#endif
