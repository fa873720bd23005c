// A few outputs times a few rows, for each kind of weight. Lanes are neighbouring inputs of one
// output. What a row gives does not depend on how many rows there are: sums run in the same order
// in a tile of one row and of four.
#ifndef JAMBA_PRODUCT_TILES_H
#define JAMBA_PRODUCT_TILES_H

#include "operand_loops.h"
#include "unpack_loops.h"

namespace jamba::JAMBA_PATH {

template <int DISTANCE>
JAMBA_INLINE Vec add_partners(Vec v) {
  IntVec partner;
  for (int l = 0; l < LANES; l++) partner[l] = l ^ DISTANCE;
  const Vec sum = v + __builtin_shuffle(v, partner);
  if constexpr (DISTANCE > 1) return add_partners<DISTANCE / 2>(sum);
  return sum;
}

JAMBA_INLINE float total(Vec v) { return add_partners<LANES / 2>(v)[0]; }

typedef int8_t ByteVec __attribute__((vector_size(LANES * 2), may_alias));
typedef uint8_t UnsignedByteVec __attribute__((vector_size(LANES * 2), may_alias));
typedef int16_t ShortVec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint16_t UnsignedShortVec __attribute__((vector_size(LANES * 4), may_alias));

JAMBA_INLINE ShortVec load_shorts(const int16_t *p) {
  ShortVec v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Adds the products of neighbouring pairs to 32-bit sums.
JAMBA_INLINE IntVec add_pairs(IntVec sum, ShortVec a, ShortVec b) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const IntVec even = ((IntVec)a << 16 >> 16) * ((IntVec)b << 16 >> 16);
  return sum + even + ((IntVec)a >> 16) * ((IntVec)b >> 16);
#endif
}

// The same, to no sums: one instruction less where adding takes a register of zeros.
JAMBA_INLINE IntVec multiply_pairs(ShortVec a, ShortVec b) {
#if defined(__AVX512BW__)
  return (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return add_pairs(IntVec{}, a, b);
#endif
}

JAMBA_INLINE Vec as_floats(IntVec v) { return __builtin_convertvector(v, Vec); }

// `size` bytes at `p`, of which only `left` may be read; the rest are zero.
template <typename T>
JAMBA_INLINE T load_bytes(const void *p, int64_t left) {
  T v = {};
  memcpy(&v, p, left < (int64_t)sizeof v ? (size_t)left : sizeof v);
  return v;
}

// Has the cache line of `p` fetched. Several rows at a time lie in one page, and the processor,
// which looks for one direction in each, does not find the pattern itself.
JAMBA_INLINE void fetch(const void *p) { __builtin_prefetch(p, 0, 3); }

// OUTPUTS rows of weights times ROWS rows of inputs; `after` are the weights that are read then.
template <int OUTPUTS, int ROWS>
inline void float_tile(const jamba_matrix &matrix, int64_t output, const char *,
                       const Operand &operand, const int64_t *rows, float (*sums)[ROWS]) {
  const float *const weights = (const float *)matrix.values + output * matrix.I;
  Vec even[OUTPUTS][ROWS] = {}, odd[OUTPUTS][ROWS] = {};
  const float *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.wide + rows[m] * operand.padded;
  const int64_t whole = matrix.I / (2 * LANES) * (2 * LANES);
  const auto step = [&](int64_t i, auto load_weights) {
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) {
      const float *w = weights + o * matrix.I + i;
      const Vec first = load_weights(w, i), second = load_weights(w + LANES, i + LANES);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
        even[o][m] = fma(first, load(x[m] + i), even[o][m]);
        odd[o][m] = fma(second, load(x[m] + i + LANES), odd[o][m]);
      }
    }
  };
  for (int64_t i = 0; i < whole; i += 2 * LANES) {
    step(i, [](const float *w, int64_t) { return load(w); });
  }
  if (whole < matrix.I) {
    step(whole, [&](const float *w, int64_t i) {
      return i < matrix.I ? load_bytes<Vec>(w, (matrix.I - i) * 4) : Vec{};
    });
  }
  for (int o = 0; o < OUTPUTS; o++) {
    for (int m = 0; m < ROWS; m++) sums[o][m] = total(even[o][m] + odd[o][m]);
  }
}

template <int OUTPUTS, int ROWS>
inline void bfloat16_tile(const jamba_matrix &matrix, int64_t output, const char *after,
                          const Operand &operand, const int64_t *rows, float (*sums)[ROWS]) {
  const uint16_t *const weights = (const uint16_t *)matrix.values + output * matrix.I;
  Vec even[OUTPUTS][ROWS] = {}, odd[OUTPUTS][ROWS] = {};
  const float *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.wide + rows[m] * operand.padded;
  const int64_t whole = matrix.I / (2 * LANES) * (2 * LANES);
  const auto step = [&](int64_t i, auto load_weights) {
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) {
      const uint16_t *w = weights + o * matrix.I + i;
      fetch(after + (o * matrix.I + i) * 2);
      const WordVec pairs = load_weights(w);
      // Little-endian: the first of each pair is the low half.
      const Vec first = (Vec)(pairs << 16), second = (Vec)(pairs & 0xffff0000u);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
        even[o][m] = fma(first, load(x[m] + i), even[o][m]);
        odd[o][m] = fma(second, load(x[m] + i + LANES), odd[o][m]);
      }
    }
  };
  for (int64_t i = 0; i < whole; i += 2 * LANES) {
    step(i, [](const uint16_t *w) { return (WordVec)load((const float *)w); });
  }
  if (whole < matrix.I) {
    step(whole, [&](const uint16_t *w) { return load_bytes<WordVec>(w, (matrix.I - whole) * 2); });
  }
  for (int o = 0; o < OUTPUTS; o++) {
    for (int m = 0; m < ROWS; m++) sums[o][m] = total(even[o][m] + odd[o][m]);
  }
}

// A lane adds two products of at most 127 * 32639 a step: 2^31 is out of reach of this many.
constexpr int64_t EXACT_STEPS = 256;

template <int OUTPUTS, int ROWS>
inline void int8_tile(const jamba_matrix &matrix, int64_t output, const char *after,
                      const Operand &operand, const int64_t *rows, float (*sums)[ROWS]) {
  const int8_t *const weights = (const int8_t *)matrix.values + output * matrix.I;
  Vec wide[OUTPUTS][ROWS] = {};
  const int16_t *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.fixed + rows[m] * operand.padded;
  constexpr int64_t STEP = 2 * LANES;
  const int64_t whole = matrix.I / STEP * STEP;
  for (int64_t begin = 0; begin < matrix.I; begin += EXACT_STEPS * STEP) {
    IntVec exact[OUTPUTS][ROWS] = {};
    const auto step = [&](int64_t i, auto load_weights) {
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; o++) {
        const int8_t *from = weights + o * matrix.I + i;
        fetch(after + o * matrix.I + i);
        const ShortVec w = __builtin_convertvector(load_weights(from), ShortVec);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++)
          exact[o][m] = add_pairs(exact[o][m], w, load_shorts(x[m] + i));
      }
    };
    const int64_t stop = begin + EXACT_STEPS * STEP;
    for (int64_t i = begin; i < (stop < whole ? stop : whole); i += STEP) {
      step(i, [](const int8_t *w) { return load_bytes<ByteVec>(w, sizeof(ByteVec)); });
    }
    if (whole < matrix.I && whole < stop) {
      step(whole, [&](const int8_t *w) { return load_bytes<ByteVec>(w, matrix.I - whole); });
    }
    for (int o = 0; o < OUTPUTS; o++) {
      for (int m = 0; m < ROWS; m++) wide[o][m] = wide[o][m] + as_floats(exact[o][m]);
    }
  }
  const float *scales = (const float *)matrix.scale + output;
  for (int o = 0; o < OUTPUTS; o++) {
    for (int m = 0; m < ROWS; m++)
      sums[o][m] = scales[o] * operand.unit[rows[m]] * total(wide[o][m]);
  }
}

// Which group the byte in each lane of a step belongs to, counted from the step's first one. A step
// of 2 LANES bytes holds two blocks of 32 inputs with AVX-512, one or a part of one elsewhere.
JAMBA_INLINE IntVec groups_of_lanes(int64_t group) {
  IntVec lanes;
  for (int l = 0; l < LANES; l++) lanes[l] = (int32_t)(nibble_input(2 * l) / group);
  return lanes;
}

// The scales of a step's groups, lane by lane; `lanes` are groups counted from `scales` on.
JAMBA_INLINE Vec scales_of_lanes(const float *scales, int64_t first, IntVec lanes) {
#if defined(__AVX512F__)
  // A register holds sixteen of them, and picks by the low four bits of each lane.
  return __builtin_shuffle(load(scales + first / LANES * LANES), lanes);
#else
  (void)lanes;
  return set(scales[first]);
#endif
}

// Groups whose scales are made wide at a time: whole registers.
constexpr int64_t WIDE_GROUPS = 64;

template <int OUTPUTS, int ROWS>
inline void int4_tile(const jamba_matrix &matrix, int64_t output, const char *after,
                      const Operand &operand, const int64_t *rows, float (*sums)[ROWS]) {
  const int64_t bytes = matrix.I / 2, groups = operand.groups, group = matrix.group;
  const uint8_t *const weights = (const uint8_t *)matrix.values + output * bytes;
  Vec wide[OUTPUTS][ROWS] = {};
  float from_minima[OUTPUTS][ROWS] = {};
  const int16_t *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.fixed + rows[m] * operand.padded;
  constexpr int64_t STEP = 2 * LANES;  // bytes
  const int64_t whole = bytes / STEP * STEP;
  const IntVec first_lanes = groups_of_lanes(group);
  for (int64_t first = 0; first < groups; first += WIDE_GROUPS) {
    const int64_t count = groups - first < WIDE_GROUPS ? groups - first : WIDE_GROUPS;
    // A last step of half as many bytes asks for one group more than there are, and meets zeros.
    float scales[OUTPUTS][WIDE_GROUPS];
    for (int o = 0; o < OUTPUTS; o++) {
      const int64_t at = (output + o) * groups + first;
      // Not beside the products below: their sums need the registers.
      Vec minima[ROWS] = {};
      for (int64_t g = 0; g < count; g += LANES) {
        store(scales[o] + g, load_as<true>(matrix.scale, at + g, count - g));
        const Vec minimum = load_as<true>(matrix.minimum, at + g, count - g);
        for (int m = 0; m < ROWS; m++) {
          const float *group_sums = operand.group_sums + rows[m] * groups + first;
          minima[m] = fma(minimum, load_as<false>(group_sums, g, count - g), minima[m]);
        }
      }
      for (int m = 0; m < ROWS; m++) from_minima[o][m] += total(minima[m]);
    }
    const auto step = [&](int64_t b, IntVec lanes, auto load_weights) {
      const int64_t step_group = nibble_input(b) / group - first;
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; o++) {
        const uint8_t *from = weights + o * bytes + b;
        fetch(after + o * bytes + b);
        const UnsignedShortVec both = __builtin_convertvector(load_weights(from), UnsignedShortVec);
        const ShortVec low = (ShortVec)(both & 15), high = (ShortVec)(both >> 4);
        const Vec factor = scales_of_lanes(scales[o], step_group, lanes);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) {
          IntVec exact = multiply_pairs(low, load_shorts(x[m] + 2 * b));
          exact = add_pairs(exact, high, load_shorts(x[m] + 2 * b + STEP));
          wide[o][m] = fma(as_floats(exact), factor, wide[o][m]);
        }
      }
    };
    const int64_t end = (first + count) * group / 2;
    const int32_t per_step = (int32_t)(2 * STEP / group);
    IntVec lanes = first_lanes;
    int64_t b = first * group / 2;
    for (; b < (end < whole ? end : whole); b += STEP, lanes += per_step) {
      step(b, lanes, [](const uint8_t *w) { return load_bytes<UnsignedByteVec>(w, STEP); });
    }
    if (b < end) {
      step(b, lanes, [&](const uint8_t *w) { return load_bytes<UnsignedByteVec>(w, bytes - b); });
    }
  }
  for (int o = 0; o < OUTPUTS; o++) {
    for (int m = 0; m < ROWS; m++) {
      sums[o][m] = operand.unit[rows[m]] * (total(wide[o][m]) + from_minima[o][m]);
    }
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
