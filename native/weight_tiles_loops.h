// The way into tiles for weights: matrices of any kind cut into words.
#ifndef JAMBA_WEIGHT_TILES_LOOPS_H
#define JAMBA_WEIGHT_TILES_LOOPS_H

#include "row_tiles_loops.h"

namespace jamba::JAMBA_PATH {

// A line of bytes with a sign becomes one of bytes without: 128 more.
JAMBA_INLINE void move_up(uint32_t *line) {
  for (int l = 0; l < TILE; l += LANES) {
    store((float *)line + l, (Vec)((WordVec)load((const float *)line + l) ^ 0x80808080u));
  }
}

// Words [word, ..) of one row of weights, `count` inputs from input `i` on; INT8 without its scale.
inline void cut_weights(const jamba_matrix &matrix, Words words, int64_t row, int64_t i,
                        int64_t count, uint32_t *line) {
  const int64_t at = row * matrix.I + i;
  const bool half = words == Words::PAIRS;
  if (count < TILE * inputs_in(words)) memset(line, 0, TILE * sizeof *line);
  switch (matrix.kind) {
    case JAMBA_F32: return cut_words(words, {matrix.values, false, 0}, 0, at, count, line);
    case JAMBA_BF16: return cut_words(words, {matrix.values, true, 0}, 0, at, count, line);
    case JAMBA_INT8: {
      const int8_t *values = (const int8_t *)matrix.values + at;
      if (are_bytes(words)) {
        memcpy(line, values, (size_t)count);
        if (words == Words::GROUPS) move_up(line);
        return;
      }
      for (int64_t j = 0; j < count; j += LANES) {
        const Vec floats = as_floats(widen(load_bytes<SomeBytes>(values + j, count - j)));
        if (half) {
          // Seven bits and a sign: nothing is rounded away.
          const HalfVec halves = high_halves((WordVec)floats);
          memcpy((uint16_t *)line + j, &halves, sizeof halves);
        } else {
          store((float *)line + j, floats);
        }
      }
      return;
    }
    case JAMBA_INT4: {
      // Of 32 or of 64: a division would take longer than all the rest.
      const int shift = matrix.group == 64 ? 6 : 5;
      for (int64_t j = 0; j < count; j += LANES) {
        const int64_t input = i + j, group = (at + j) >> shift;
        const Vec scale = set(from_bfloat16(((const uint16_t *)matrix.scale)[group]));
        const Vec minimum = set(from_bfloat16(((const uint16_t *)matrix.minimum)[group]));
        const uint8_t *bytes =
            (const uint8_t *)matrix.values + row * (matrix.I / 2) + nibble_byte(input);
        SomeUnsignedBytes both;
        memcpy(&both, bytes, sizeof both);
        const int half_byte = input % 32 < 16 ? 0 : 4;
        const IntVec q = (widen(both) >> half_byte) & 15;
        store_any(line, half, j, LANES, fma(as_floats(q), scale, minimum));
      }
      return;
    }
  }
}

// Whether words lie in memory as they are wanted, or but for a sign.
JAMBA_INLINE bool are_words(const jamba_matrix &matrix, Words words) {
  return matrix.kind == JAMBA_F32 || (matrix.kind == JAMBA_BF16 && words == Words::PAIRS) ||
         (matrix.kind == JAMBA_INT8 && are_bytes(words));
}

// Where those weights lie.
inline Ahead weights_ahead(const jamba_matrix &matrix, Words words, int64_t first, int64_t last,
                           int64_t d, int64_t depth) {
  const int64_t bits = matrix.kind == JAMBA_F32    ? 32
                       : matrix.kind == JAMBA_BF16 ? 16
                       : matrix.kind == JAMBA_INT8 ? 8
                                                   : 4;
  const int64_t per_tile = TILE * inputs_in(words), begin = d * per_tile;
  const int64_t left = matrix.I - begin, inputs = left < depth * per_tile ? left : depth * per_tile;
  return {(const char *)matrix.values + (first * matrix.I + begin) * bits / 8, matrix.I * bits / 8,
          last - first, inputs * bits / 8};
}

#if defined(__AVX512BW__)
// Inputs [begin, begin + 32 lines) of a row of INT4 as lines of PAIRS, TILE_WORDS apart; at most
// LANES lines, whose scales fill a register. A group has sixteen values: they are rounded once and
// looked up.
inline void tile_nibbles(const jamba_matrix &matrix, int64_t row, int64_t begin, int64_t lines,
                         uint32_t *line) {
  constexpr Vec STEPS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int shift = matrix.group == 64 ? 1 : 0;
  const uint8_t *const bytes =
      (const uint8_t *)matrix.values + row * (matrix.I / 2) + nibble_byte(begin);
  const int64_t first_block = begin / 32, groups = (matrix.I / 32) >> shift;
  const int64_t first = first_block >> shift, at = row * groups + first;
  float scales[LANES], minima[LANES];
  store(scales, load_as<true>(matrix.scale, at, groups - first));
  store(minima, load_as<true>(matrix.minimum, at, groups - first));
  for (int64_t t = 0; t < lines; t++, line += TILE_WORDS) {
    const int64_t group = ((first_block + t) >> shift) - first;
    const Vec scale = set(scales[group]), minimum = set(minima[group]);
    const HalfVec values =
        __builtin_convertvector(bfloat16_bits(fma(STEPS, scale, minimum)) >> 16, HalfVec);
    SomeUnsignedBytes both;
    memcpy(&both, bytes + t * 16, sizeof both);
    const SomeUnsignedBytes low = both & 15, high = both >> 4;
    // Put together in registers: halves that are stored would be waited for when read as one.
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_set_m128i((__m128i)high, (__m128i)low));
    const __m512i table = _mm512_castsi256_si512((__m256i)values);
    const __m512i found = _mm512_permutexvar_epi16(index, table);
    memcpy(line, &found, sizeof found);
  }
}

// Inputs [begin, begin + 32 lines) of a row of INT8 as lines of PAIRS, TILE_WORDS apart. Of seven
// bits and a sign nothing is rounded away.
inline void tile_bytes(const jamba_matrix &matrix, int64_t row, int64_t begin, int64_t lines,
                       uint32_t *line) {
  const int8_t *bytes = (const int8_t *)matrix.values + row * matrix.I + begin;
  for (int64_t t = 0; t < lines; t++, bytes += 2 * TILE, line += TILE_WORDS) {
    __m256i packed;
    memcpy(&packed, bytes, sizeof packed);
    // Two of 16 bits in each word: the first of a pair is the low half.
    const IntVec both = (IntVec)_mm512_cvtepi8_epi16(packed);
    const WordVec first = (WordVec)as_floats(both << 16 >> 16);
    const WordVec second = (WordVec)as_floats(both >> 16);
    store((float *)line, (Vec)(first >> 16 | (second & 0xffff0000u)));
  }
}
#endif

typedef uint8_t Half __attribute__((vector_size(TILE), may_alias));

// Inputs [begin, ..) of a row of INT4 as lines of GROUPS, TILE_WORDS apart, and what their groups
// are for output `lane` of a tile.
inline void tile_nibble_groups(const jamba_matrix &matrix, int64_t row, int64_t begin,
                               int64_t lines, uint32_t *line, WeightGroup *groups, int64_t lane) {
  const uint8_t *bytes = (const uint8_t *)matrix.values + row * (matrix.I / 2) + begin / 2;
  const bool twice = matrix.group == 32;
  const int64_t of_row = (matrix.I / 32) >> !twice, first = (begin / 32) >> !twice;
  const uint16_t *scale = (const uint16_t *)matrix.scale + row * of_row + first;
  const uint16_t *minimum = (const uint16_t *)matrix.minimum + row * of_row + first;
  for (int64_t t = 0; t < lines; t++, line += TILE_WORDS) {
    WeightGroup &group = groups[t];
    for (int half = 0; half < 2; half++) {
      const bool there = begin + t * 4 * TILE + half * 2 * TILE < matrix.I;
      const bool own = there && (half == 0 || twice);
      group.scale[half][lane] = own ? from_bfloat16(*scale++) : 0;
      group.minimum[half][lane] = own ? from_bfloat16(*minimum++) : 0;
      Half both = {};
      if (there) {
        memcpy(&both, bytes, sizeof both);
        bytes += sizeof both;
      }
      const Half low = both & 15, high = both >> 4;
      memcpy((uint8_t *)line + half * 2 * TILE, &low, sizeof low);
      memcpy((uint8_t *)line + half * 2 * TILE + TILE, &high, sizeof high);
    }
  }
}

// Weights of outputs [first, last) and tiles [d, d + depth) along the inputs, as [output tile]
// [depth][TILE_WORDS]; zero beyond the matrix. Of INT4 as GROUPS, `groups` are [output
// tile][depth].
inline void tile_weights(const jamba_matrix &matrix, Words words, int64_t first, int64_t last,
                         int64_t d, int64_t depth, uint32_t *out, WeightGroup *groups) {
  const int64_t per_tile = TILE * inputs_in(words), begin = d * per_tile;
  const int64_t whole =
      (matrix.I - begin) / per_tile < depth ? (matrix.I - begin) / per_tile : depth;
  for (int64_t o = 0; o < tiles_of(last - first) * TILE; o++) {
    uint32_t *line = out + ((o / TILE) * depth * TILE + o % TILE) * TILE;
    const int64_t row = first + o;
    int64_t t = 0;
    if (row < last && words == Words::GROUPS && matrix.kind == JAMBA_INT4) {
      tile_nibble_groups(matrix, row, begin, depth, line, groups + o / TILE * depth, o % TILE);
      continue;
    }
    if (row < last && are_words(matrix, words)) {
      const float *from =
          (const float *)matrix.values + (row * matrix.I + begin) / inputs_in(words);
      const bool aligned = row * matrix.I % inputs_in(words) == 0;
      for (; aligned && t < whole; t++, from += TILE, line += TILE_WORDS) {
        for (int l = 0; l < TILE; l += LANES) store((float *)line + l, load(from + l));
        if (words == Words::GROUPS) move_up(line);
      }
    }
#if defined(__AVX512BW__)
    if (row < last && matrix.kind == JAMBA_INT4 && words == Words::PAIRS) {
      // A line is one block of 32 inputs, and rows are whole blocks.
      tile_nibbles(matrix, row, begin, whole, line);
      line += whole * TILE_WORDS;
      t = whole;
    }
    if (row < last && matrix.kind == JAMBA_INT8 && words == Words::PAIRS) {
      tile_bytes(matrix, row, begin, whole, line);
      line += whole * TILE_WORDS;
      t = whole;
    }
#endif
    for (; t < depth; t++, line += TILE_WORDS) {
      const int64_t i = begin + t * per_tile, left = row < last ? matrix.I - i : 0;
      if (left > 0) {
        cut_weights(matrix, words, row, i, left < per_tile ? left : per_tile, line);
      } else {
        memset(line, 0, TILE * sizeof *line);
      }
    }
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
