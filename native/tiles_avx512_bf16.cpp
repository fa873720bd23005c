// Tiles of bfloat16 by AVX-512 BF16; nothing here runs before find_path() has asked the processor.
#include "tile_kernels.h"
#include "tiles_avx512.h"

namespace jamba {
namespace {

struct Pairs {
  typedef __m512 Sum;
  static Sum product(Sum sum, __m512i weights, __m512i rows) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)rows);
  }
};

}  // namespace

void pairs_by_avx512_bf16(const TileProduct &p) { all<Pairs>(p); }

}  // namespace jamba
