// Tiles of floats, and the ways into and out of tiles: rows and weights of any kind cut into words,
// sums turned back into rows.
#ifndef JAMBA_TILE_LOOPS_H
#define JAMBA_TILE_LOOPS_H

#include "product_tiles.h"
#include "row_ops_loops.h"
#include "tiles.h"
#include "unpack_loops.h"

namespace jamba::JAMBA_PATH {

// Vectors of a row of TILE words.
constexpr int TILE_VECS = TILE / LANES;

typedef int8_t SomeBytes __attribute__((vector_size(LANES), may_alias));
typedef uint8_t SomeUnsignedBytes __attribute__((vector_size(LANES), may_alias));

// Written as one instruction where there is one: GCC 12 takes the bytes apart one by one.
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

// Outputs and tiles of rows whose sums fit the registers beside the words of the rows.
#if defined(__AVX512F__)
constexpr int FLOAT_OUTPUTS = 8, FLOAT_ROWS = 3;
#elif defined(__AVX2__)
constexpr int FLOAT_OUTPUTS = 4, FLOAT_ROWS = 1;
#else
constexpr int FLOAT_OUTPUTS = 2, FLOAT_ROWS = 1;
#endif

template <int ROWS>
inline void float_block(const TileProduct &p, int64_t output, int64_t row) {
  constexpr int VECS = ROWS * TILE_VECS;
  const int64_t tile = output / TILE, lane = output % TILE;
  float *sums[ROWS];
  const float *rows[ROWS];
  Vec sum[FLOAT_OUTPUTS][VECS];
  for (int r = 0; r < ROWS; r++) {
    sums[r] = (float *)p.sums + ((row + r) * p.output_tiles + tile) * TILE_WORDS + lane * TILE;
    rows[r] = (const float *)p.rows + (row + r) * p.rows_stride;
    for (int o = 0; o < FLOAT_OUTPUTS; o++) {
      for (int v = 0; v < TILE_VECS; v++) {
        sum[o][r * TILE_VECS + v] = p.adds ? load(sums[r] + o * TILE + v * LANES) : Vec{};
      }
    }
  }
  const float *weights = (const float *)p.weights + tile * p.depth * TILE_WORDS + lane * TILE;
  for (int64_t d = 0; d < p.depth; d++) {
    for (int64_t word = 0; word < TILE; word++) {
      Vec x[VECS];
      for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < TILE_VECS; v++) {
          x[r * TILE_VECS + v] = load(rows[r] + d * TILE_WORDS + word * TILE + v * LANES);
        }
      }
#pragma GCC unroll 8
      for (int o = 0; o < FLOAT_OUTPUTS; o++) {
        const Vec w = set(weights[d * TILE_WORDS + o * TILE + word]);
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) sum[o][v] = fma(w, x[v], sum[o][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int o = 0; o < FLOAT_OUTPUTS; o++) {
      for (int v = 0; v < TILE_VECS; v++) {
        store(sums[r] + o * TILE + v * LANES, sum[o][r * TILE_VECS + v]);
      }
    }
  }
}

inline void float_tiles(const TileProduct &p) {
  for (int64_t output = 0; output < p.output_tiles * TILE; output += FLOAT_OUTPUTS) {
    fetch_ahead(p.ahead, output / FLOAT_OUTPUTS, p.output_tiles * TILE / FLOAT_OUTPUTS);
    int64_t row = 0;
    for (; row + FLOAT_ROWS <= p.row_tiles; row += FLOAT_ROWS) {
      float_block<FLOAT_ROWS>(p, output, row);
    }
    for (; row < p.row_tiles; row++) float_block<1>(p, output, row);
  }
}

// out[j][i] = in[i][j], words. `out` may not be `in`.
inline void turn(const uint32_t *in, uint32_t *out) {
#if defined(__AVX512F__)
  typedef WordVec W;
  // In lanes of four words: interleave neighbouring rows, then pairs of rows; a[4 g + j] then
  // holds, for rows 4 g to 4 g + 3, columns j, j + 4, j + 8 and j + 12. The same again with whole
  // lanes.
  constexpr W FIRST = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr W SECOND = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr W LOW = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr W HIGH = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  constexpr W EVEN = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  constexpr W ODD = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  W a[TILE], b[TILE];
  for (int i = 0; i < TILE; i++) a[i] = (W)load((const float *)in + i * TILE);
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i += 2) {
    b[i] = __builtin_shuffle(a[i], a[i + 1], FIRST);
    b[i + 1] = __builtin_shuffle(a[i], a[i + 1], SECOND);
  }
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i += 4) {
    for (int half = 0; half < 2; half++) {
      a[i + 2 * half] = __builtin_shuffle(b[i + half], b[i + 2 + half], LOW);
      a[i + 2 * half + 1] = __builtin_shuffle(b[i + half], b[i + 2 + half], HIGH);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; j++) {
    const W even = __builtin_shuffle(a[j], a[4 + j], EVEN);
    const W odd = __builtin_shuffle(a[j], a[4 + j], ODD);
    const W next_even = __builtin_shuffle(a[8 + j], a[12 + j], EVEN);
    const W next_odd = __builtin_shuffle(a[8 + j], a[12 + j], ODD);
    store((float *)out + j * TILE, (Vec)__builtin_shuffle(even, next_even, EVEN));
    store((float *)out + (j + 4) * TILE, (Vec)__builtin_shuffle(odd, next_odd, EVEN));
    store((float *)out + (j + 8) * TILE, (Vec)__builtin_shuffle(even, next_even, ODD));
    store((float *)out + (j + 12) * TILE, (Vec)__builtin_shuffle(odd, next_odd, ODD));
  }
#else
  for (int i = 0; i < TILE; i++) {
    for (int j = 0; j < TILE; j++) out[j * TILE + i] = in[i * TILE + j];
  }
#endif
}

// Rows that meet a matrix, `row_tiles` tiles of them.
struct TiledRows {
  Words words;
  int64_t inputs, depth, row_tiles;
  uint32_t *data;  // [row tile][depth][TILE_WORDS]; then, of QUADS, what 1 stands for in each row

  uint32_t *tile(int64_t row_tile, int64_t d) const {
    return data + (row_tile * depth + d) * TILE_WORDS;
  }
  float *units(int64_t row_tile) const { return (float *)tile(row_tiles, 0) + row_tile * TILE; }
};

// Some rows of floats, or of bfloat16, that are to be tiled; `at` may name any row, in any order.
struct RowSource {
  const void *array;
  bool half;
  int64_t stride;
};

// Sixteen words of a row, from input `first` on, of which there are `left`; zero beyond.
JAMBA_INLINE void cut_words(Words words, const RowSource &from, int64_t row, int64_t first,
                            int64_t left, uint32_t *out) {
  const int64_t at = row * from.stride + first;
  if (words == Words::PAIRS) {
    if (from.half && left >= 2 * TILE) {
      memcpy(out, (const uint16_t *)from.array + at, 2 * TILE * sizeof(uint16_t));
      return;
    }
    for (int64_t i = 0; i < 2 * TILE; i += LANES) {
      const int64_t some = left - i < 0 ? 0 : left - i;
      store_as<true>(out, i, LANES, load_any(from.array, from.half, at + i, some));
    }
    return;
  }
  for (int64_t i = 0; i < TILE; i += LANES) {
    const int64_t some = left - i < 0 ? 0 : left - i;
    store_as<false>(out, i, LANES, load_any(from.array, from.half, at + i, some));
  }
}

// Inputs [first, first + count) of up to TILE rows become tiles of `out` from input `out_first` on,
// where a tile begins; rows past `num_rows` are zero. Not for QUADS, which need all of a row.
inline void tile_part(const TiledRows &out, int64_t row_tile, const RowSource &from,
                      const int64_t *rows, int64_t num_rows, int64_t out_first, int64_t first,
                      int64_t count) {
  const int64_t inputs = TILE * (int64_t)out.words;
  alignas(64) uint32_t lines[TILE_WORDS];
  for (int64_t i = num_rows; i < TILE; i++) memset(lines + i * TILE, 0, TILE * sizeof *lines);
  for (int64_t done = 0; done < count; done += inputs) {
    for (int64_t i = 0; i < num_rows; i++) {
      cut_words(out.words, from, rows[i], first + done, count - done, lines + i * TILE);
    }
    turn(lines, out.tile(row_tile, (out_first + done) / inputs));
  }
}

// Rounds 4 TILE inputs of a row to 8 bits, of which `left` are not zero.
JAMBA_INLINE void cut_quads(const RowSource &from, int64_t at, int64_t left, float inverse,
                            uint32_t *out) {
  int8_t *const bytes = (int8_t *)out;
  for (int64_t i = 0; i < 4 * TILE; i += LANES) {
    const int64_t some = left - i < 0 ? 0 : left - i;
    const Vec scaled = load_any(from.array, from.half, at + i, some) * inverse;
    const Vec half = (Vec)(((WordVec)scaled & 0x80000000u) | (WordVec)set(0.5f));
    const SomeBytes rounded =
        __builtin_convertvector(__builtin_convertvector(scaled + half, IntVec), SomeBytes);
    memcpy(bytes + i, &rounded, sizeof rounded);
  }
}

// Whole rows, from input `first` of `from` on. A row of QUADS that holds something infinite becomes
// "not a number", which no integer says.
inline void tile_rows(const TiledRows &out, int64_t row_tile, const RowSource &from,
                      const int64_t *rows, int64_t num_rows, int64_t first) {
  if (out.words != Words::QUADS) {
    return tile_part(out, row_tile, from, rows, num_rows, 0, first, out.inputs);
  }
  float inverse[TILE] = {};
  for (int64_t i = 0; i < num_rows; i++) {
    const int64_t at = rows[i] * from.stride + first;
    const Peak peak = peak_of(out.inputs, [&](int64_t j, int64_t left) {
      return load_any(from.array, from.half, at + j, left);
    });
    out.units(row_tile)[i] = from_integers(peak, 127.0f);
    inverse[i] = to_integers(peak, 127.0f);
  }
  for (int64_t i = num_rows; i < TILE; i++) out.units(row_tile)[i] = 0;
  alignas(64) uint32_t lines[TILE_WORDS] = {};
  for (int64_t d = 0; d < out.depth; d++) {
    const int64_t j = d * 4 * TILE;
    for (int64_t i = 0; i < num_rows; i++) {
      if (inverse[i] == 0) {
        memset(lines + i * TILE, 0, TILE * sizeof *lines);
      } else {
        cut_quads(from, rows[i] * from.stride + first + j, out.inputs - j, inverse[i],
                  lines + i * TILE);
      }
    }
    turn(lines, out.tile(row_tile, d));
  }
}

// TILE inputs of TILE rows, floats [input][row], as words of the rows: [word][row].
inline void join_words(Words words, const float *in, uint32_t *out) {
  if (words == Words::FLOATS) {
    memcpy(out, in, TILE_WORDS * sizeof *out);
    return;
  }
  for (int64_t i = 0; i < TILE; i += 2) {
    for (int64_t l = 0; l < TILE; l += LANES) {
      const WordVec first = bfloat16_bits(load(in + i * TILE + l)) >> 16;
      const WordVec second = bfloat16_bits(load(in + (i + 1) * TILE + l)) & 0xffff0000u;
      store((float *)out + i / 2 * TILE + l, (Vec)(first | second));
    }
  }
}

// Words [word, ..) of one row of weights, `count` inputs from input `i` on; INT8 without its scale.
inline void cut_weights(const jamba_matrix &matrix, Words words, int64_t row, int64_t i,
                        int64_t count, uint32_t *line) {
  const int64_t at = row * matrix.I + i;
  const bool half = words == Words::PAIRS;
  if (count < TILE * (int64_t)words) memset(line, 0, TILE * sizeof *line);
  switch (matrix.kind) {
    case JAMBA_F32: return cut_words(words, {matrix.values, false, 0}, 0, at, count, line);
    case JAMBA_BF16: return cut_words(words, {matrix.values, true, 0}, 0, at, count, line);
    case JAMBA_INT8: {
      const int8_t *values = (const int8_t *)matrix.values + at;
      if (words == Words::QUADS) {
        memcpy(line, values, (size_t)count);
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

// Whether words lie in memory as they are wanted.
JAMBA_INLINE bool are_words(const jamba_matrix &matrix, Words words) {
  return matrix.kind == JAMBA_F32 || (matrix.kind == JAMBA_BF16 && words == Words::PAIRS);
}

// Where those weights lie.
inline Ahead weights_ahead(const jamba_matrix &matrix, Words words, int64_t first, int64_t last,
                           int64_t d, int64_t depth) {
  const int64_t bits = matrix.kind == JAMBA_F32    ? 32
                       : matrix.kind == JAMBA_BF16 ? 16
                       : matrix.kind == JAMBA_INT8 ? 8
                                                   : 4;
  const int64_t per_tile = TILE * (int64_t)words, begin = d * per_tile;
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
#endif

// Weights of outputs [first, last) and tiles [d, d + depth) along the inputs, as [output tile]
// [depth][TILE_WORDS]; zero beyond the matrix.
inline void tile_weights(const jamba_matrix &matrix, Words words, int64_t first, int64_t last,
                         int64_t d, int64_t depth, uint32_t *out) {
  const int64_t per_tile = TILE * (int64_t)words, begin = d * per_tile;
  const int64_t whole =
      (matrix.I - begin) / per_tile < depth ? (matrix.I - begin) / per_tile : depth;
  for (int64_t o = 0; o < tiles_of(last - first) * TILE; o++) {
    uint32_t *line = out + ((o / TILE) * depth * TILE + o % TILE) * TILE;
    const int64_t row = first + o;
    int64_t t = 0;
    if (row < last && are_words(matrix, words)) {
      const float *from = (const float *)matrix.values + (row * matrix.I + begin) / (int64_t)words;
      const bool aligned = row * matrix.I % (int64_t)words == 0;
      for (; aligned && t < whole; t++, from += TILE, line += TILE_WORDS) {
        for (int l = 0; l < TILE; l += LANES) store((float *)line + l, load(from + l));
      }
    }
#if defined(__AVX512BW__)
    if (row < last && matrix.kind == JAMBA_INT4 && words == Words::PAIRS) {
      // A line is one block of 32 inputs, and rows are whole blocks.
      tile_nibbles(matrix, row, begin, whole, line);
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
