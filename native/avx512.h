// The intrinsics of AVX-512 without the compiler's false alarms, for files compiled with it.
#ifndef JAMBA_AVX512_H
#define JAMBA_AVX512_H

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the undefined operands of its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace jamba {

static inline __m512i side_by_side(__m256i a, __m256i b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

}  // namespace jamba
#endif
