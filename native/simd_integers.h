// Vectors of bytes and of 16-bit integers, where simd.h has those of floats: the other file that
// knows instruction sets.
#ifndef JAMBA_SIMD_INTEGERS_H
#define JAMBA_SIMD_INTEGERS_H

#include "simd.h"

namespace jamba::JAMBA_PATH {

typedef int8_t ByteVec __attribute__((vector_size(LANES * 2), may_alias));
typedef uint8_t UnsignedByteVec __attribute__((vector_size(LANES * 2), may_alias));
typedef int16_t ShortVec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint16_t UnsignedShortVec __attribute__((vector_size(LANES * 4), may_alias));
typedef int8_t QuadVec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint8_t UnsignedQuadVec __attribute__((vector_size(LANES * 4), may_alias));
// LANES bytes.
typedef int8_t SomeBytes __attribute__((vector_size(LANES), may_alias));
typedef uint8_t SomeUnsignedBytes __attribute__((vector_size(LANES), may_alias));

// A vector of the bytes at `p`, of which only `left` may be read; the rest are zero.
template <typename T>
JAMBA_INLINE T load_bytes(const void *p, int64_t left) {
  T v = {};
  memcpy(&v, p, left < (int64_t)sizeof v ? (size_t)left : sizeof v);
  return v;
}

// Written as one instruction where there is one: GCC 12 makes five of each, and takes
// bytes that become words apart one by one.
JAMBA_INLINE ShortVec widen(ByteVec v) {
#if defined(__AVX512BW__)
  return (ShortVec)_mm512_maskz_cvtepi8_epi16(0xffffffff, (__m256i)v);
#elif defined(__AVX2__)
  return (ShortVec)_mm256_cvtepi8_epi16((__m128i)v);
#else
  return __builtin_convertvector(v, ShortVec);
#endif
}

JAMBA_INLINE UnsignedShortVec widen(UnsignedByteVec v) {
#if defined(__AVX512BW__)
  return (UnsignedShortVec)_mm512_maskz_cvtepu8_epi16(0xffffffff, (__m256i)v);
#elif defined(__AVX2__)
  return (UnsignedShortVec)_mm256_cvtepu8_epi16((__m128i)v);
#else
  return __builtin_convertvector(v, UnsignedShortVec);
#endif
}

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

JAMBA_INLINE IntVec widen(SomeBytes v) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)v);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)v));
#else
  return __builtin_convertvector(v, IntVec);
#endif
}

JAMBA_INLINE IntVec widen(SomeUnsignedBytes v) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)v);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)v));
#else
  return __builtin_convertvector(v, IntVec);
#endif
}

#if defined(__AVX512VNNI__)
// What the upper four bits of each byte say. GCC 12 takes the same by >> through memory.
JAMBA_INLINE UnsignedQuadVec high_halves(UnsignedQuadVec v) {
  return (UnsignedQuadVec)((WordVec)v >> 4 & 0x0f0f0f0fu);
}

// Adds the products of four neighbours to 32-bit sums.
JAMBA_INLINE IntVec add_quads(IntVec sum, UnsignedQuadVec a, QuadVec b) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#endif

// Values of at most 8 bits and a sign. GCC 12 does it byte by byte.
JAMBA_INLINE SomeBytes narrow(IntVec v) {
#if defined(__AVX512F__)
  return (SomeBytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, SomeBytes);
#endif
}

// Adds the four bytes of each word, which have a sign, to 32-bit sums.
JAMBA_INLINE IntVec add_bytes(IntVec sum, IntVec words) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi8(1), (__m512i)words);
#else
  const IntVec low = (words << 24 >> 24) + (words << 16 >> 24);
  return sum + low + (words << 8 >> 24) + (words >> 24);
#endif
}

JAMBA_INLINE Vec as_floats(IntVec v) { return __builtin_convertvector(v, Vec); }

}  // namespace jamba::JAMBA_PATH
#endif
