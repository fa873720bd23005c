// Rows of inputs, arranged as the products with one kind of weight meet them.
//
// Float weights meet float32 inputs; those of bfloat16 meet inputs of that type where the caller
// lets them be rounded and there is an instruction for it (BF16), twice as fast. Integer weights
// meet inputs of 15 bits and a sign, one scale for a row (relative to its largest value 1.5e-5,
// which bfloat16's 4e-3 hides): their products and sums are exact, and one instruction does as much
// as four on floats.
#ifndef JAMBA_OPERAND_LOOPS_H
#define JAMBA_OPERAND_LOOPS_H

#include "few_rows.h"
#include "paths.h"
#include "simd_integers.h"

namespace jamba::JAMBA_PATH {

// Inputs are padded with zeros to a multiple of this, so that only weights have tails.
constexpr int64_t INPUT_PAD = 128;

inline int64_t cache_line_floats(int64_t floats) { return divide_up(floats, 16) * 16; }

inline int64_t padded_inputs(int64_t inputs) { return divide_up(inputs, INPUT_PAD) * INPUT_PAD; }

// Rows of x, arranged as one kind of weight meets them.
struct Operand {
  float *wide;        // [M][padded]: F32 in order; BF16 evens, then odds, of every 2 LANES
  uint16_t *halves;   // [M][padded]: BF16 in order, as bfloat16; or null, and `wide` is meant
  int16_t *fixed;     // [M][padded]: INT8 in order; INT4 as `nibble_input` says
  float *unit;        // [M] what 1 in `fixed` stands for
  float *group_sums;  // [M][groups] of `fixed`, for the minima of INT4
  int64_t padded, groups;
  const TileKernels *few;  // who multiplies `tiles`, instead of all of the above; or null
  FewTiles tiles;
};

// Floats of scratch that an operand of any kind takes.
inline int64_t operand_floats(int64_t rows, int64_t inputs) {
  const int64_t padded = padded_inputs(inputs), whole = divide_up(rows, FEW) * FEW;
  return whole * (padded + padded / 16) + cache_line_floats(rows) + padded;
}

// The first of the two inputs in byte `b` of a row; the other is 16 inputs on.
inline int64_t nibble_input(int64_t b) { return b / 16 * 32 + b % 16; }

// The byte of a row that holds input `i`, in its low half where i % 32 < 16.
inline int64_t nibble_byte(int64_t i) { return i / 32 * 16 + i % 16; }

// Bytes of weights that are multiplied at a time, two to each.
#if defined(__AVX512VNNI__)
constexpr int64_t NIBBLE_STEP = 4 * LANES;
#else
constexpr int64_t NIBBLE_STEP = 2 * LANES;
#endif

// Integers of a row in the order in which weights meet them: for each step, what meets low halves
// and what meets high ones; of bytes the coarse ones first, and then the others.
inline void arrange_nibbles(const int16_t *ordered, int64_t padded, int16_t *out) {
  for (int64_t b = 0; b < padded / 2; b += NIBBLE_STEP, out += 2 * NIBBLE_STEP) {
    for (int64_t j = 0; j < NIBBLE_STEP; j++) {
      const int16_t low = ordered[nibble_input(b + j)], high = ordered[nibble_input(b + j) + 16];
#if defined(__AVX512VNNI__)
      int8_t *const bytes = (int8_t *)out;
      bytes[j] = (int8_t)((low + 128) >> 8);
      bytes[j + NIBBLE_STEP] = (int8_t)((high + 128) >> 8);
      bytes[j + 2 * NIBBLE_STEP] = (int8_t)low;
      bytes[j + 3 * NIBBLE_STEP] = (int8_t)high;
#else
      out[j] = low;
      out[j + NIBBLE_STEP] = high;
#endif
    }
  }
}

// The largest magnitude in a row that is to become integers.
struct Peak {
  float top;
  bool finite;  // no integer says infinity or "not a number": the whole row becomes the latter
};

// load(i, left) gives LANES values of the row from `i` on, zero past `left`.
template <typename Load>
JAMBA_INLINE Peak peak_of(int64_t count, const Load &load) {
  Vec largest = {}, nothing = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec x = load(i, count - i < LANES ? count - i : LANES);
    largest = maximum((Vec)((WordVec)x & 0x7fffffffu), largest);
    nothing = fma(x, Vec{}, nothing);
  }
  Peak peak = {0, true};
  for (int l = 0; l < LANES; l++) {
    peak.finite = peak.finite && nothing[l] == 0;
    peak.top = largest[l] > peak.top ? largest[l] : peak.top;
  }
  return peak;
}

// What makes `most` of the largest value. Below 2^-100 the quotient would overflow; such rows are
// zero to any weight.
JAMBA_INLINE float to_integers(const Peak &peak, float most) {
  return peak.finite && peak.top > 7.9e-31f ? most / peak.top : 0;
}

// What 1 stands for then.
JAMBA_INLINE float from_integers(const Peak &peak, float most) {
  return peak.finite ? peak.top / most : __builtin_nanf("");
}

inline void fix_row(const float *x, int64_t inputs, int16_t *fixed, float *unit) {
  const Peak peak =
      peak_of(inputs, [&](int64_t i, int64_t left) { return load_as<false>(x, i, left); });
  *unit = from_integers(peak, MOST_INTEGER);
  const float inverse = to_integers(peak, MOST_INTEGER);
  if (inverse == 0) {
    memset(fixed, 0, (size_t)inputs * sizeof *fixed);
    return;
  }
  for (int64_t i = 0; i < inputs; i++) {
    const float scaled = x[i] * inverse;
    fixed[i] = (int16_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
  }
}

// Whether rows that may become bfloat16 do so, to meet `matrix`.
inline bool takes_halves(const jamba_matrix &matrix, bool half) {
#if defined(__AVX512BF16__)
  return half && matrix.kind == JAMBA_BF16;
#else
  (void)matrix, (void)half;
  return false;
#endif
}

// An operand of `rows` rows for `matrix`, in `scratch`; its values are yet to be written. `half`
// lets rows become bfloat16.
inline Operand operand_in(const TileKernels &kernels, const jamba_matrix &matrix, int64_t rows,
                          bool half, float *scratch) {
  const bool few = takes_few(kernels, matrix);
  const int64_t padded = padded_inputs(matrix.I), whole = few ? divide_up(rows, FEW) * FEW : rows;
  float *unit = scratch + whole * padded, *group_sums = unit + cache_line_floats(rows);
  const int64_t groups = matrix.kind == JAMBA_INT4 ? matrix.I / matrix.group : 0;
  int16_t *integers = (int16_t *)(group_sums + whole / FEW * groups * TILE);
  return {scratch,
          takes_halves(matrix, half) ? (uint16_t *)scratch : nullptr,
          (int16_t *)scratch,
          unit,
          group_sums,
          padded,
          groups,
          few ? &kernels : nullptr,
          {(uint32_t *)scratch, unit, group_sums, integers, slots_for(matrix, rows)}};
}

// Arranges rows of `x`, `stride` floats apart, for products with `matrix`, in `scratch`.
inline Operand prepare_operand(const TileKernels &kernels, const jamba_matrix &matrix,
                               const float *x, int64_t stride, int64_t rows, bool half,
                               float *scratch) {
  const Operand operand = operand_in(kernels, matrix, rows, half, scratch);
  if (operand.few != nullptr) {
    kernels.cut_few(matrix, x, stride, rows, operand.tiles);
    return operand;
  }
  const int64_t inputs = matrix.I, padded = operand.padded;
  for (int64_t m = 0; m < rows; m++) {
    const float *in = x + m * stride;
    float *wide = operand.wide + m * padded;
    int16_t *fixed = operand.fixed + m * padded;
    switch (matrix.kind) {
      case JAMBA_F32:
        memcpy(wide, in, (size_t)inputs * sizeof *in);
        memset(wide + inputs, 0, (size_t)(padded - inputs) * sizeof *in);
        break;
      case JAMBA_BF16:
        if (operand.halves != nullptr) {
          for (int64_t i = 0; i < padded; i += LANES) {
            const int64_t left = inputs - i < 0 ? 0 : inputs - i;
            store_bfloat16(operand.halves + m * padded + i, load_as<false>(in, i, left));
          }
          break;
        }
        for (int64_t i = 0; i < padded; i += 2 * LANES) {
          for (int64_t l = 0; l < LANES; l++) {
            const int64_t even = i + 2 * l;
            wide[i + l] = even < inputs ? in[even] : 0;
            wide[i + LANES + l] = even + 1 < inputs ? in[even + 1] : 0;
          }
        }
        break;
      case JAMBA_INT8:
        fix_row(in, inputs, fixed, operand.unit + m);
        memset(fixed + inputs, 0, (size_t)(padded - inputs) * sizeof *fixed);
        break;
      case JAMBA_INT4: {
        // In order first, at the end of the scratch, for the sums over groups.
        int16_t *ordered = (int16_t *)(operand.group_sums + rows * operand.groups);
        fix_row(in, inputs, ordered, operand.unit + m);
        memset(ordered + inputs, 0, (size_t)(padded - inputs) * sizeof *ordered);
        for (int64_t g = 0; g < operand.groups; g++) {
          int32_t sum = 0;
          for (int64_t i = 0; i < matrix.group; i++) sum += ordered[g * matrix.group + i];
          operand.group_sums[m * operand.groups + g] = (float)sum;
        }
        arrange_nibbles(ordered, padded, fixed);
        break;
      }
    }
  }
  return operand;
}

}  // namespace jamba::JAMBA_PATH
#endif
