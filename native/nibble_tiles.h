// A few outputs times a few rows, as in product_tiles.h, for weights of 4 bits.
//
// Rows are integers of 16 bits. Where there is an instruction for four bytes (VNNI) they meet
// weights as two: the coarse one counts 256. It takes as many products as two of 16 bits do, and
// weights need not be widened.
#ifndef JAMBA_NIBBLE_TILES_H
#define JAMBA_NIBBLE_TILES_H

#include "product_tiles.h"

namespace jamba::JAMBA_PATH {

// The scales of the groups of a step, lane by lane; sixteen may be read.
template <int64_t GROUP>
JAMBA_INLINE Vec scales_of_lanes(const float *scales) {
#if defined(__AVX512VNNI__)
  IntVec group;
  for (int l = 0; l < LANES; l++) group[l] = l / (GROUP / 8);
  return _mm512_maskz_permutexvar_ps(0xffff, (__m512i)group, load(scales));
#elif defined(__AVX512F__)
  if constexpr (GROUP == 32) return _mm512_mask_blend_ps(0xff00, set(scales[0]), set(scales[1]));
#endif
  return set(scales[0]);
}

// The same address; of more than two rows the compiler does not know that. What it loads for one
// output it would keep for the next in so many registers that sums went into memory.
template <int ROWS, typename T>
JAMBA_INLINE T *anew(T *p) {
  if constexpr (ROWS > 2) asm volatile("" : "+r"(p));
  return p;
}

#if defined(__AVX512VNNI__)
typedef UnsignedQuadVec NibbleVec;

// What one output's weights add to each of ROWS rows, whose integers for this step are at x[row] +
// at.
template <int ROWS>
JAMBA_INLINE void add_nibbles(NibbleVec both, Vec factor, const int16_t *const *x, int64_t at,
                              Vec *wide) {
  // Else it is loaded twice.
  asm("" : "+v"(both));
  const UnsignedQuadVec low = both & 15, high = high_halves(both);
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; m++) {
    const int8_t *const bytes = (const int8_t *)anew<ROWS>(x[m] + at);
    IntVec exact = add_quads(IntVec{}, low, load_bytes<QuadVec>(bytes, NIBBLE_STEP));
    exact = add_quads(exact, high, load_bytes<QuadVec>(bytes + NIBBLE_STEP, NIBBLE_STEP)) << 8;
    exact = add_quads(exact, low, load_bytes<QuadVec>(bytes + 2 * NIBBLE_STEP, NIBBLE_STEP));
    exact = add_quads(exact, high, load_bytes<QuadVec>(bytes + 3 * NIBBLE_STEP, NIBBLE_STEP));
    wide[m] = fma(as_floats(exact), factor, wide[m]);
  }
}
#else
typedef UnsignedByteVec NibbleVec;

template <int ROWS>
JAMBA_INLINE void add_nibbles(NibbleVec bytes, Vec factor, const int16_t *const *x, int64_t at,
                              Vec *wide) {
  const UnsignedShortVec both = widen(bytes);
  const ShortVec low = (ShortVec)(both & 15), high = (ShortVec)(both >> 4);
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; m++) {
    const int16_t *const in = anew<ROWS>(x[m] + at);
    const IntVec pairs = multiply_pairs(low, load_shorts(in));
    const IntVec exact = add_pairs(pairs, high, load_shorts(in + NIBBLE_STEP));
    wide[m] = fma(as_floats(exact), factor, wide[m]);
  }
}
#endif

// Groups whose scales are made wide at a time: whole registers.
constexpr int64_t WIDE_GROUPS = 64;

template <int OUTPUTS, int ROWS, int64_t GROUP>
inline void int4_tile(const jamba_matrix &matrix, int64_t output, const char *after,
                      const Operand &operand, const int64_t *rows, Vec *sums) {
  const int64_t bytes = matrix.I / 2, groups = operand.groups;
  const uint8_t *const weights = (const uint8_t *)matrix.values + output * bytes;
  Vec wide[OUTPUTS][ROWS] = {};
  const int16_t *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.fixed + rows[m] * operand.padded;
  for (int64_t first = 0; first < groups; first += WIDE_GROUPS) {
    const int64_t count = groups - first < WIDE_GROUPS ? groups - first : WIDE_GROUPS;
    // A last step of fewer bytes asks for groups that are not there, which are zero.
    float scales[OUTPUTS][WIDE_GROUPS + LANES];
    for (int o = 0; o < OUTPUTS; o++) {
      const int64_t at = (output + o) * groups + first;
      // Not beside the products below: their sums need the registers.
      for (int64_t g = 0; g < count; g += LANES) {
        store(scales[o] + g, load_as<true>(matrix.scale, at + g, count - g));
        const Vec minimum = load_as<true>(matrix.minimum, at + g, count - g);
        for (int m = 0; m < ROWS; m++) {
          const float *group_sums = operand.group_sums + rows[m] * groups + first;
          wide[o][m] = fma(minimum, load_as<false>(group_sums, g, count - g), wide[o][m]);
        }
      }
    }
    const auto step = [&](int64_t b, uint64_t group, auto load_weights) JAMBA_ALWAYS {
      fetch_in_order<OUTPUTS>(after, b, NIBBLE_STEP);
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; o++) {
        add_nibbles<ROWS>(load_weights(weights + o * bytes + b),
                          scales_of_lanes<GROUP>(scales[o] + group), x, 2 * b, wide[o]);
      }
    };
    const int64_t begin = first * GROUP / 2, end = (first + count) * GROUP / 2;
    // Unsigned: a shift instead of a division.
    const auto group_at = [&](int64_t b) { return (uint64_t)(b - begin) / (GROUP / 2); };
    int64_t b = begin;
    for (; b + NIBBLE_STEP <= end; b += NIBBLE_STEP) {
      step(b, group_at(b), [](const uint8_t *w) { return load_bytes<NibbleVec>(w, NIBBLE_STEP); });
    }
    if (b < end) {
      step(b, group_at(b), [&](const uint8_t *w) { return load_bytes<NibbleVec>(w, end - b); });
    }
  }
  for (int o = 0; o < OUTPUTS; o++) {
    for (int m = 0; m < ROWS; m++) sums[m * LANES + o] = wide[o][m];
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
