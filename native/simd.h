// One of two files that know instruction sets (simd_integers.h is the other): a vector of LANES
// floats and the few operations the kernels need. It is compiled once per path, each time with
// other flags, and JAMBA_PATH names the namespace, so that no inline function of one path can be
// linked into another.
#ifndef JAMBA_SIMD_H
#define JAMBA_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef JAMBA_PATH
#error "define JAMBA_PATH as the namespace of this instruction set"
#endif

#define JAMBA_ALWAYS __attribute__((always_inline))
#define JAMBA_INLINE inline JAMBA_ALWAYS

namespace jamba::JAMBA_PATH {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2 on every x86-64, NEON on every 64-bit ARM
#endif

typedef float Vec __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2), may_alias));

JAMBA_INLINE Vec set(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

JAMBA_INLINE Vec load(const float *p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

JAMBA_INLINE void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }

JAMBA_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

JAMBA_INLINE Vec select(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }

// The larger one; a NaN in `b` stays.
JAMBA_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

JAMBA_INLINE Vec minus_magnitude(Vec x) { return (Vec)((WordVec)x | 0x80000000u); }

// A power of two is taken apart as 2^(k + r): `shifted` = k + EXP2_SHIFT, where adding the
// shift has rounded k and left it in the low bits, and r is what remains.
//
// With AVX-512, k is a multiple of 1/32: its low five bits pick 2^(k - floor(k)) from a
// table held in two registers, scalef multiplies by 2^floor(k), underflowing to zero, and
// |r| <= 1/64 needs two coefficients (error 5.3e-8). Written as s + s r (..), the result
// is exact to half a unit where k is zero: for decays near one, whose errors would add up
// over many tokens.
//
// Elsewhere k is a whole number of at least -126: with 127 added the low bits are the
// exponent field of 2^k, and |r| <= 1/2 needs a polynomial 1 + r q(r), q by Remez
// (error 1.0e-7).
#if defined(__AVX512F__)
alignas(64) constexpr float EXP2_TABLE[32] = {
    1.000000000e+00f, 1.021897197e+00f, 1.044273734e+00f, 1.067140460e+00f, 1.090507746e+00f,
    1.114386797e+00f, 1.138788581e+00f, 1.163724899e+00f, 1.189207077e+00f, 1.215247393e+00f,
    1.241857767e+00f, 1.269050956e+00f, 1.296839595e+00f, 1.325236678e+00f, 1.354255557e+00f,
    1.383909941e+00f, 1.414213538e+00f, 1.445180774e+00f, 1.476826191e+00f, 1.509164453e+00f,
    1.542210817e+00f, 1.575980902e+00f, 1.610490322e+00f, 1.645755529e+00f, 1.681792855e+00f,
    1.718619347e+00f, 1.756252170e+00f, 1.794709086e+00f, 1.834008098e+00f, 1.874167681e+00f,
    1.915206552e+00f, 1.957144141e+00f,
};
constexpr float EXP2_SHIFT = 393216.0f;  // 1.5 * 2^18

JAMBA_INLINE Vec exp2_of_parts(Vec shifted, Vec k, Vec r) {
  const Vec entry = _mm512_permutex2var_ps(_mm512_load_ps(EXP2_TABLE), (__m512i)shifted,
                                           _mm512_load_ps(EXP2_TABLE + 16));
  // The zero-masked form, with nothing masked: GCC 12 warns about its own header in the
  // plain one.
  const Vec s = _mm512_maskz_scalef_ps(0xffff, entry, k);
  return fma(s * r, fma(set(2.402265070e-01f), r, set(6.931573432e-01f)), s);
}
#else
constexpr float EXP2_SHIFT = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the exponent's bias

JAMBA_INLINE Vec exp2_of_parts(Vec shifted, Vec, Vec r) {
  Vec p = fma(set(1.326522557e-03f), r, set(9.671231732e-03f));
  p = fma(p, r, set(5.550728366e-02f));
  p = fma(p, r, set(2.402224839e-01f));
  p = fma(p, r, set(6.931470037e-01f));
  p = fma(p, r, set(1.0f));
  return p * (Vec)((WordVec)shifted << 23);
}
#endif

// 2^(a b) for a b <= 0: the inner loop of the scan, eight instructions with AVX-512.
JAMBA_INLINE Vec exp2_product(Vec a, Vec b) {
  const Vec shift = set(EXP2_SHIFT);
#if defined(__AVX512F__)
  const Vec shifted = fma(a, b, shift), k = shifted - shift;
  return exp2_of_parts(shifted, k, _mm512_fmsub_ps(a, b, k));
#else
  Vec x = a * b;
  x = maximum(set(-126.0f), x);
  const Vec shifted = x + shift, k = shifted - shift;
  return exp2_of_parts(shifted, k, x - k);
#endif
}

// 1 / x for x in [1, 2], to one unit in the last place.
JAMBA_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  // A division keeps the multiplier busy for 16 cycles; one Newton step on 14 bits, 3.
  const Vec guess = _mm512_maskz_rcp14_ps(0xffff, x);
  return guess * _mm512_fnmadd_ps(guess, x, set(2.0f));
#else
  return 1.0f / x;
#endif
}

// Written as instructions where there is one: GCC 12 makes four or five of each conversion below.
JAMBA_INLINE Vec from_bfloat16(HalfVec half) {
#if defined(__AVX512F__)
  return (Vec)((WordVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half) << 16);
#elif defined(__AVX2__)
  return (Vec)((WordVec)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
  return (Vec)(__builtin_convertvector(half, WordVec) << 16);
#endif
}

JAMBA_INLINE Vec load_bfloat16(const uint16_t *p) {
  HalfVec half;
  memcpy(&half, p, sizeof half);
  return from_bfloat16(half);
}

// The bits of the nearest bfloat16, ties to even, in the high half, and some in the low one; a NaN
// stays a NaN.
JAMBA_INLINE WordVec bfloat16_bits(Vec v) {
  const WordVec bits = (WordVec)v;
  return v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x00400000u;
}

JAMBA_INLINE HalfVec high_halves(WordVec bits) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(bits >> 16));
#else
  return __builtin_convertvector(bits >> 16, HalfVec);
#endif
}

#if defined(__AVX512BF16__)
// Adds the products of neighbouring bfloat16 numbers to sums.
JAMBA_INLINE Vec add_half_pairs(Vec sum, WordVec a, WordVec b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

JAMBA_INLINE HalfVec to_bfloat16(Vec v) { return high_halves(bfloat16_bits(v)); }

JAMBA_INLINE void store_bfloat16(uint16_t *p, Vec v) {
  const HalfVec half = to_bfloat16(v);
  memcpy(p, &half, sizeof half);
}

#if defined(__AVX512F__)
JAMBA_INLINE __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }
#endif

// Element `index` onwards of an array of either type; `count` < LANES leaves the rest zero.
template <bool BFLOAT16>
JAMBA_INLINE Vec load_as(const void *array, int64_t index, int64_t count) {
  if constexpr (BFLOAT16) {
    const uint16_t *p = (const uint16_t *)array + index;
    if (count >= LANES) return load_bfloat16(p);
#if defined(__AVX512F__)
    return from_bfloat16((HalfVec)_mm256_maskz_loadu_epi16(first_lanes(count), p));
#endif
    uint16_t part[LANES] = {};
    memcpy(part, p, (size_t)count * sizeof *p);
    return load_bfloat16(part);
  } else {
    const float *p = (const float *)array + index;
    if (count >= LANES) return load(p);
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(first_lanes(count), p);
#endif
    float part[LANES] = {};
    memcpy(part, p, (size_t)count * sizeof *p);
    return load(part);
  }
}

template <bool BFLOAT16>
JAMBA_INLINE void store_as(void *array, int64_t index, int64_t count, Vec v) {
  if constexpr (BFLOAT16) {
    uint16_t *p = (uint16_t *)array + index;
    if (count >= LANES) return store_bfloat16(p, v);
    uint16_t part[LANES];
    store_bfloat16(part, v);
    memcpy(p, part, (size_t)count * sizeof *p);
  } else {
    float *p = (float *)array + index;
    if (count >= LANES) return store(p, v);
    memcpy(p, &v, (size_t)count * sizeof *p);
  }
}

JAMBA_INLINE Vec load_any(const void *array, bool bfloat16, int64_t index, int64_t count) {
  return bfloat16 ? load_as<true>(array, index, count) : load_as<false>(array, index, count);
}

JAMBA_INLINE void store_any(void *array, bool bfloat16, int64_t index, int64_t count, Vec v) {
  if (bfloat16) return store_as<true>(array, index, count, v);
  store_as<false>(array, index, count, v);
}

// One level of the tree below: lane l of the result adds lanes l and l ^ DISTANCE of
// `a` where bit DISTANCE of l is clear, of `b` where it is set.
template <int DISTANCE>
JAMBA_INLINE Vec fold(Vec a, Vec b) {
  IntVec own, other;
  for (int l = 0; l < LANES; l++) {
    const int source = l & DISTANCE ? LANES : 0;
    own[l] = source + l;
    other[l] = source + (l ^ DISTANCE);
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

template <int COUNT>
JAMBA_INLINE Vec fold_all(const Vec *v) {
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    Vec half[COUNT / 2];
    for (int i = 0; i < COUNT / 2; i++) half[i] = fold<COUNT / 2>(v[i], v[i + COUNT / 2]);
    return fold_all<COUNT / 2>(half);
  }
}

// Lane l of the result is the sum of all lanes of v[l], for LANES vectors.
JAMBA_INLINE Vec sum_each(const Vec *v) { return fold_all<LANES>(v); }

}  // namespace jamba::JAMBA_PATH
#endif
