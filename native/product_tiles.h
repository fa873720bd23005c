// A few outputs times a few rows, for each kind of weight. Lanes are neighbouring inputs of one
// output, and are yet to be added up. What a row gives does not depend on how many rows there are:
// sums run in the same order in a tile of one row and of four.
//
// One row takes one output after the other, so that memory is read from front to back, which a
// processor sees for itself and does best. Several outputs at a time, which share what they load of
// several rows, read several places in turn, and on some processors (Zen 4) at half the speed: for
// them what comes next is asked for from front to back.
#ifndef JAMBA_PRODUCT_TILES_H
#define JAMBA_PRODUCT_TILES_H

#include "operand_loops.h"

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

// What several outputs meet stays in a register, where there are enough of them: left to itself the
// compiler loads it again for each.
template <int OUTPUTS, typename T>
JAMBA_INLINE T shared(T v) {
#if defined(__AVX512F__)
  if constexpr (OUTPUTS > 1) asm("" : "+v"(v));
#endif
  return v;
}

// Has the cache line of `p` fetched.
JAMBA_INLINE void fetch(const void *p) { __builtin_prefetch(p, 0, 3); }

// Has `bytes` from `p` on fetched, into the second-level cache.
JAMBA_INLINE void fetch_bytes(const void *p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const char *)p + b, 0, 2);
}

// How far ahead of what is read next weights are asked for, in bytes. Twice as far took 1.03 times
// as long for one row and weights of 4 bits (Zen 4, in turns), and as long for eight rows.
constexpr int64_t FAR = 4096;

// Has the part of `after` fetched that comes with `bytes` of each of OUTPUTS rows from `at` on.
// Into the second-level cache: the first has room for so many lines on their way, and rows need it.
template <int OUTPUTS>
JAMBA_INLINE void fetch_in_order(const char *after, int64_t at, int64_t bytes) {
  if constexpr (OUTPUTS == 1) return;
  const char *const first = after + at * OUTPUTS + FAR;
#pragma GCC unroll 4
  for (int64_t b = 0; b < bytes * OUTPUTS; b += 64) __builtin_prefetch(first + b, 0, 2);
}

// OUTPUTS rows of weights times ROWS rows of inputs, into sums[row * LANES + output]; `after` are
// the weights that are read then.
template <int OUTPUTS, int ROWS>
inline void float_tile(const jamba_matrix &matrix, int64_t output, const char *after,
                       const Operand &operand, const int64_t *rows, Vec *sums) {
  const float *const weights = (const float *)matrix.values + output * matrix.I;
  Vec sum[OUTPUTS][ROWS] = {};
  const float *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.wide + rows[m] * operand.padded;
  const int64_t whole = matrix.I / (2 * LANES) * (2 * LANES);
  const auto step = [&](int64_t i, auto load_weights) JAMBA_ALWAYS {
    fetch_in_order<OUTPUTS>(after, i * 4, 2 * sizeof(Vec));
    Vec x_even[ROWS], x_odd[ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++) {
      x_even[m] = shared<OUTPUTS>(load(x[m] + i));
      x_odd[m] = shared<OUTPUTS>(load(x[m] + i + LANES));
    }
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) {
      const float *w = weights + o * matrix.I + i;
      const Vec first = load_weights(w, i), second = load_weights(w + LANES, i + LANES);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
        sum[o][m] = fma(second, x_odd[m], fma(first, x_even[m], sum[o][m]));
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
    for (int m = 0; m < ROWS; m++) sums[m * LANES + o] = sum[o][m];
  }
}

template <int OUTPUTS, int ROWS>
inline void bfloat16_tile(const jamba_matrix &matrix, int64_t output, const char *after,
                          const Operand &operand, const int64_t *rows, Vec *sums) {
  const uint16_t *const weights = (const uint16_t *)matrix.values + output * matrix.I;
  Vec sum[OUTPUTS][ROWS] = {};
  const float *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.wide + rows[m] * operand.padded;
  const int64_t whole = matrix.I / (2 * LANES) * (2 * LANES);
  const auto step = [&](int64_t i, auto load_weights) JAMBA_ALWAYS {
    fetch_in_order<OUTPUTS>(after, i * 2, sizeof(Vec));
    Vec x_even[ROWS], x_odd[ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++) {
      x_even[m] = shared<OUTPUTS>(load(x[m] + i));
      x_odd[m] = shared<OUTPUTS>(load(x[m] + i + LANES));
    }
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) {
      const uint16_t *w = weights + o * matrix.I + i;
      const WordVec pairs = load_weights(w);
      // Little-endian: the first of each pair is the low half.
      const Vec first = (Vec)(pairs << 16), second = (Vec)(pairs & 0xffff0000u);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
        sum[o][m] = fma(second, x_odd[m], fma(first, x_even[m], sum[o][m]));
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
    for (int m = 0; m < ROWS; m++) sums[m * LANES + o] = sum[o][m];
  }
}

#if defined(__AVX512BF16__)
// The same with rows in bfloat16: two products an instruction, and nothing to take apart.
template <int OUTPUTS, int ROWS>
inline void halves_tile(const jamba_matrix &matrix, int64_t output, const char *after,
                        const Operand &operand, const int64_t *rows, Vec *sums) {
  const uint16_t *const weights = (const uint16_t *)matrix.values + output * matrix.I;
  Vec sum[OUTPUTS][ROWS] = {};
  const uint16_t *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.halves + rows[m] * operand.padded;
  constexpr int64_t STEP = 2 * LANES;
  const int64_t whole = matrix.I / STEP * STEP;
  const auto step = [&](int64_t i, int64_t left) JAMBA_ALWAYS {
    fetch_in_order<OUTPUTS>(after, i * 2, sizeof(Vec));
    WordVec in[ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++) in[m] = load_bytes<WordVec>(x[m] + i, sizeof(WordVec));
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) {
      const WordVec w = load_bytes<WordVec>(weights + o * matrix.I + i, left * 2);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) sum[o][m] = add_half_pairs(sum[o][m], w, in[m]);
    }
  };
  for (int64_t i = 0; i < whole; i += STEP) step(i, STEP);
  if (whole < matrix.I) step(whole, matrix.I - whole);
  for (int o = 0; o < OUTPUTS; o++) {
    for (int m = 0; m < ROWS; m++) sums[m * LANES + o] = sum[o][m];
  }
}
#endif

// A lane adds two products of at most 127 * 32639 a step: 2^31 is out of reach of this many.
constexpr int64_t EXACT_STEPS = 256;

template <int OUTPUTS, int ROWS>
inline void int8_tile(const jamba_matrix &matrix, int64_t output, const char *after,
                      const Operand &operand, const int64_t *rows, Vec *sums) {
  const int8_t *const weights = (const int8_t *)matrix.values + output * matrix.I;
  Vec wide[OUTPUTS][ROWS] = {};
  const int16_t *x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = operand.fixed + rows[m] * operand.padded;
  constexpr int64_t STEP = 2 * LANES;
  const int64_t whole = matrix.I / STEP * STEP;
  for (int64_t begin = 0; begin < matrix.I; begin += EXACT_STEPS * STEP) {
    IntVec exact[OUTPUTS][ROWS] = {};
    const auto step = [&](int64_t i, auto load_weights) JAMBA_ALWAYS {
      fetch_in_order<OUTPUTS>(after, i, STEP);
      ShortVec in[ROWS];
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) in[m] = shared<OUTPUTS>(load_shorts(x[m] + i));
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; o++) {
        const ShortVec w = widen(load_weights(weights + o * matrix.I + i));
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) exact[o][m] = add_pairs(exact[o][m], w, in[m]);
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
  for (int o = 0; o < OUTPUTS; o++) {
    for (int m = 0; m < ROWS; m++) sums[m * LANES + o] = wide[o][m];
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
