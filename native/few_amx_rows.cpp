// A few rows cut into the tiles that few_amx.cpp multiplies. Compiled with AVX-512; nothing here
// runs before find_path() has asked the processor.
#include <string.h>

#include "avx512.h"
#include "few_rows.h"
#include "tile_kernels.h"

namespace jamba {
namespace {

// The same word of a tile for sixteen words: of one column.
inline void put_column(uint32_t *tile, int64_t column, __m512i words) {
  const __m512i places =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(TILE));
  _mm512_i32scatter_epi32(tile + column, places, words, 4);
}

// The nearest bfloat16 in the upper half of each lane.
inline __m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

// Pairs of bfloat16 of neighbouring inputs, from their even and their odd ones' upper halves.
inline __m512i paired(__m512i even, __m512i odd) {
  return _mm512_or_si512(_mm512_srli_epi32(even, 16),
                         _mm512_and_si512(odd, _mm512_set1_epi32((int)0xffff0000u)));
}

// What is left of x when its upper half is taken away; nothing is left of infinity.
inline __m512 rest_of(__m512 x) {
  const __m512i coarse =
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xffff0000u));
  const __m512 infinity = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000));
  const __mmask16 some = _mm512_cmp_ps_mask(_mm512_abs_ps(x), infinity, _CMP_NEQ_UQ);
  return _mm512_maskz_sub_ps(some, x, _mm512_castsi512_ps(coarse));
}

inline void cut_halves(const float *x, int64_t inputs, int64_t column, uint32_t *tiles) {
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  for (int64_t i = 0; i < inputs; i += 2 * TILE, tiles += TILE_WORDS) {
    const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + TILE);
    const __m512 even = _mm512_permutex2var_ps(a, evens, b);
    const __m512 odd = _mm512_permutex2var_ps(a, odds, b);
    put_column(tiles, column, paired(_mm512_castps_si512(even), _mm512_castps_si512(odd)));
    put_column(tiles, FEW + column, paired(rounded(rest_of(even)), rounded(rest_of(odd))));
  }
}

// Integers of 16 bits, as operand_loops.h has them for other paths; returns what 1 stands for.
inline float fix(const float *x, int64_t inputs, int16_t *integers) {
  __m512 largest = _mm512_setzero_ps(), nothing = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += TILE) {
    const __m512 v = _mm512_loadu_ps(x + i);
    largest = _mm512_max_ps(_mm512_abs_ps(v), largest);
    nothing = _mm512_fmadd_ps(v, _mm512_setzero_ps(), nothing);
  }
  const float top = _mm512_reduce_max_ps(largest);
  const bool finite = _mm512_cmp_ps_mask(nothing, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff;
  // Below 2^-100 the quotient would overflow; such rows are zero to any weight.
  const float inverse = finite && top > 7.9e-31f ? MOST_INTEGER / top : 0;
  const __m512 half = _mm512_set1_ps(0.5f), sign = _mm512_set1_ps(-0.0f);
  for (int64_t i = 0; i < inputs; i += TILE) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse));
    const __m512 away = _mm512_or_ps(half, _mm512_and_ps(scaled, sign));
    const __m512i integer = _mm512_cvttps_epi32(_mm512_add_ps(scaled, away));
    const __m512i kept = inverse == 0 ? _mm512_setzero_si512() : integer;
    _mm256_storeu_si256((__m256i *)(integers + i), _mm512_cvtepi32_epi16(kept));
  }
  return finite ? top / MOST_INTEGER : __builtin_nanf("");
}

// The coarse byte of 32 integers, and the rest.
inline __m256i coarse_bytes(__m512i v) {
  return _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8));
}

// Of the lower eight bits, as a signed byte: what the coarse one has rounded away.
inline __m256i fine_bytes(__m512i v) { return _mm512_cvtepi16_epi8(v); }

inline void cut_bytes(const int16_t *x, int64_t inputs, int64_t column, uint32_t *tiles) {
  for (int64_t i = 0; i < inputs; i += 4 * TILE, tiles += TILE_WORDS) {
    const __m512i a = _mm512_loadu_si512(x + i), b = _mm512_loadu_si512(x + i + 2 * TILE);
    put_column(tiles, column, side_by_side(coarse_bytes(a), coarse_bytes(b)));
    put_column(tiles, FEW + column, side_by_side(fine_bytes(a), fine_bytes(b)));
  }
}

// In the order that few_rows.h describes; and the sums over groups.
inline void cut_for_nibbles(const jamba_matrix &matrix, const int16_t *x, int64_t column,
                            int64_t slots, uint32_t *tiles, float *group_sums) {
  int64_t group = 0;
  // Words of the first block of 32 inputs: four of its first half, and four of its second.
  constexpr __mmask16 FIRST_BLOCK = 0x0f0f;
  const __m512i ones = _mm512_set1_epi16(1);
  const auto quarters = _mm512_set_epi64(7, 6, 3, 2, 5, 4, 1, 0);
  for (int64_t i = 0; i < matrix.I; i += 4 * TILE) {
    const __m512i a = _mm512_loadu_si512(x + i), b = _mm512_loadu_si512(x + i + 2 * TILE);
    const __m512i coarse =
        _mm512_permutexvar_epi64(quarters, side_by_side(coarse_bytes(a), coarse_bytes(b)));
    const __m512i fine =
        _mm512_permutexvar_epi64(quarters, side_by_side(fine_bytes(a), fine_bytes(b)));
    const int sum_a = _mm512_reduce_add_epi32(_mm512_madd_epi16(a, ones));
    const int sum_b = _mm512_reduce_add_epi32(_mm512_madd_epi16(b, ones));
    const auto put_group = [&](__mmask16 words, int sum) {
      const int64_t at = column * slots + group % slots;
      put_column(tiles, at, _mm512_maskz_mov_epi32(words, coarse));
      put_column(tiles, FEW + at, _mm512_maskz_mov_epi32(words, fine));
      group_sums[group * TILE + FEW + column] = (float)sum;
      group++;
    };
    if (matrix.group == 64) {
      put_group(0xffff, sum_a + sum_b);
    } else {
      put_group(FIRST_BLOCK, sum_a);
      // One column cannot hold both.
      if (slots == 1) tiles += TILE_WORDS;
      put_group((__mmask16)~FIRST_BLOCK, sum_b);
    }
    tiles += TILE_WORDS;
  }
}

}  // namespace

void cut_few_for_amx(const jamba_matrix &matrix, const float *x, int64_t stride, int64_t rows,
                     const FewTiles &out) {
  const int64_t words = few_words(matrix);
  const int64_t sums = matrix.kind == JAMBA_INT4 ? matrix.I / matrix.group * TILE : 0;
  for (int64_t m = 0; m < rows; m++) {
    const int64_t group = m / FEW, column = m % FEW;
    uint32_t *tiles = out.tiles + group * words;
    float *group_sums = out.group_sums + group * sums;
    if (column == 0) {
      // Columns without a row, and those that sums over groups do not use.
      if (rows - m < FEW) memset(tiles, 0, (size_t)words * sizeof *tiles);
      memset(group_sums, 0, (size_t)sums * sizeof *group_sums);
    }
    if (matrix.kind == JAMBA_BF16) {
      cut_halves(x + m * stride, matrix.I, column, tiles);
      continue;
    }
    out.unit[m] = fix(x + m * stride, matrix.I, out.integers);
    if (matrix.kind == JAMBA_INT8) {
      cut_bytes(out.integers, matrix.I, column, tiles);
    } else {
      cut_for_nibbles(matrix, out.integers, column, out.slots, tiles, group_sums);
    }
  }
}

}  // namespace jamba
