// A few rows by the matrix extension (AMX): sixteen outputs at a time, whose weights are loaded as
// tiles from where they lie. Compiled with AVX-512 and AMX; nothing here runs before find_path()
// has asked the processor, and the caller has set up the registers (`begin_amx`).
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the undefined operands of its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#include <string.h>

#include "few_rows.h"
#include "tile_kernels.h"

namespace jamba {
namespace {

constexpr int ROW_BYTES = 64;
// Bytes that are asked for ahead of each row: a tile reads sixteen rows at once, and the processor
// does not see that many sequences by itself.
constexpr int64_t AHEAD = 384;

// Has two lines of each of sixteen rows fetched, of these outputs or of the next sixteen.
inline void fetch_rows(const char *weights, int64_t stride, int64_t at) {
  const char *p = at < stride ? weights + at : weights + TILE * stride + (at - stride);
  for (int64_t row = 0; row < TILE; row++, p += stride) {
    __builtin_prefetch(p, 0, 3);
    __builtin_prefetch(p + 64, 0, 3);
  }
}

// Sums of one tile of outputs with GROUPS times FEW rows, in two chains that do not wait for each
// other: [group][chain][TILE_WORDS].
#define JAMBA_FEW_SUMS(NAME, PRODUCT)                                                \
  template <int GROUPS>                                                              \
  inline void NAME(const char *weights, int64_t stride, const uint32_t *const *rows, \
                   uint32_t (*sums)[2][TILE_WORDS]) {                                \
    _tile_zero(0);                                                                   \
    _tile_zero(1);                                                                   \
    _tile_zero(2);                                                                   \
    _tile_zero(3);                                                                   \
    const int64_t depth = stride / ROW_BYTES;                                        \
    int64_t d = 0;                                                                   \
    for (; d + 2 <= depth; d += 2) {                                                 \
      fetch_rows(weights, stride, d * ROW_BYTES + AHEAD);                            \
      _tile_loadd(4, weights + d * ROW_BYTES, stride);                               \
      _tile_loadd(6, rows[0] + d * TILE_WORDS, ROW_BYTES);                           \
      PRODUCT(0, 4, 6);                                                              \
      _tile_loadd(5, weights + (d + 1) * ROW_BYTES, stride);                         \
      _tile_loadd(7, rows[0] + (d + 1) * TILE_WORDS, ROW_BYTES);                     \
      PRODUCT(1, 5, 7);                                                              \
      if (GROUPS > 1) {                                                              \
        _tile_loadd(6, rows[GROUPS - 1] + d * TILE_WORDS, ROW_BYTES);                \
        PRODUCT(2, 4, 6);                                                            \
        _tile_loadd(7, rows[GROUPS - 1] + (d + 1) * TILE_WORDS, ROW_BYTES);          \
        PRODUCT(3, 5, 7);                                                            \
      }                                                                              \
    }                                                                                \
    if (d < depth) {                                                                 \
      fetch_rows(weights, stride, d * ROW_BYTES + AHEAD);                            \
      _tile_loadd(4, weights + d * ROW_BYTES, stride);                               \
      _tile_loadd(6, rows[0] + d * TILE_WORDS, ROW_BYTES);                           \
      PRODUCT(0, 4, 6);                                                              \
      if (GROUPS > 1) {                                                              \
        _tile_loadd(7, rows[GROUPS - 1] + d * TILE_WORDS, ROW_BYTES);                \
        PRODUCT(2, 4, 7);                                                            \
      }                                                                              \
    }                                                                                \
    _tile_stored(0, sums[0][0], ROW_BYTES);                                          \
    _tile_stored(1, sums[0][1], ROW_BYTES);                                          \
    if (GROUPS > 1) {                                                                \
      _tile_stored(2, sums[GROUPS - 1][0], ROW_BYTES);                               \
      _tile_stored(3, sums[GROUPS - 1][1], ROW_BYTES);                               \
    }                                                                                \
  }

JAMBA_FEW_SUMS(sum_halves, _tile_dpbf16ps)
JAMBA_FEW_SUMS(sum_bytes, _tile_dpbssd)

// What a row is, from its two columns.
inline __m256 joined(__m512 columns, float coarse) {
  return _mm256_fmadd_ps(_mm512_castps512_ps256(columns), _mm256_set1_ps(coarse),
                         _mm512_extractf32x8_ps(columns, 1));
}

// Lanes of a pair of vectors, [step][column][output], that make up half of the columns of both.
struct Shuffle {
  alignas(64) int32_t lanes[2][TILE];
};

constexpr Shuffle shuffle_of(int outputs) {
  // A vector holds `TILE / outputs` columns of `outputs` outputs.
  Shuffle s = {};
  for (int half = 0; half < 2; half++) {
    for (int lane = 0; lane < (int)TILE; lane++) {
      const int column = lane / (2 * outputs) + half * (int)TILE / (2 * outputs);
      const int output = lane % (2 * outputs);
      s.lanes[half][lane] = output < outputs ? column * outputs + output
                                             : (int)TILE + column * outputs + output - outputs;
    }
  }
  return s;
}

// From [output pair][output][column] to [column][output].
inline void transpose(const __m256 (&sums)[TILE], __m512 (&rows)[FEW]) {
  // The first step takes outputs apart that lie one behind the other.
  static constexpr Shuffle by_four = [] {
    Shuffle s = {};
    for (int half = 0; half < 2; half++) {
      for (int lane = 0; lane < (int)TILE; lane++) {
        const int column = lane / 4 + half * 4, output = lane % 4;
        s.lanes[half][lane] = output / 2 * (int)TILE + output % 2 * (int)FEW + column;
      }
    }
    return s;
  }();
  static constexpr Shuffle by_eight = shuffle_of(4), by_sixteen = shuffle_of(8);
  const auto pick = [](const Shuffle &s, int half, __m512 a, __m512 b) {
    return _mm512_permutex2var_ps(a, _mm512_load_si512(s.lanes[half]), b);
  };
  __m512 pairs[FEW], fours[4][2], eights[2][4];
  for (int j = 0; j < FEW; j++) {
    pairs[j] = _mm512_insertf32x8(_mm512_castps256_ps512(sums[2 * j]), sums[2 * j + 1], 1);
  }
  for (int j = 0; j < 4; j++) {
    for (int h = 0; h < 2; h++) fours[j][h] = pick(by_four, h, pairs[2 * j], pairs[2 * j + 1]);
  }
  for (int j = 0; j < 2; j++) {
    for (int h = 0; h < 4; h++) {
      eights[j][h] = pick(by_eight, h % 2, fours[2 * j][h / 2], fours[2 * j + 1][h / 2]);
    }
  }
  for (int h = 0; h < FEW; h++) {
    rows[h] = pick(by_sixteen, h % 2, eights[0][h / 2], eights[1][h / 2]);
  }
}

// Rows of the result of one tile of outputs and FEW rows.
struct Found {
  __m512 rows[FEW];
};

inline Found from_halves(const uint32_t (&chains)[2][TILE_WORDS]) {
  __m256 sums[TILE];
  for (int o = 0; o < TILE; o++) {
    const __m512 a = _mm512_loadu_ps(chains[0] + o * TILE);
    sums[o] = joined(_mm512_add_ps(a, _mm512_loadu_ps(chains[1] + o * TILE)), 1.0f);
  }
  Found found;
  transpose(sums, found.rows);
  return found;
}

inline Found from_bytes(const uint32_t (&chains)[2][TILE_WORDS]) {
  __m256 sums[TILE];
  for (int o = 0; o < TILE; o++) {
    const __m512i a = _mm512_loadu_si512(chains[0] + o * TILE);
    const __m512i both = _mm512_add_epi32(a, _mm512_loadu_si512(chains[1] + o * TILE));
    sums[o] = joined(_mm512_cvtepi32_ps(both), 256.0f);
  }
  Found found;
  transpose(sums, found.rows);
  return found;
}

inline __m512i side_by_side(__m256i a, __m256i b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// Groups whose scales and minima are made wide at a time: whole vectors.
constexpr int64_t WIDE_GROUPS = 64;

// Scales, or minima, of groups [first, first + count) of sixteen outputs.
struct WideGroups {
  alignas(64) float values[TILE][WIDE_GROUPS];
};

inline void make_wide(const void *halves, int64_t output, int64_t groups, int64_t first,
                      int64_t count, WideGroups &wide) {
  for (int o = 0; o < TILE; o++) {
    const uint16_t *from = (const uint16_t *)halves + (output + o) * groups + first;
    for (int64_t g = 0; g < count; g += TILE) {
      const int64_t left = count - g;
      const __mmask16 some = left < TILE ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
      const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from + g));
      _mm512_store_si512(wide.values[o] + g, _mm512_slli_epi32(bits, 16));
    }
  }
}

// Where tiles of weights, and sums, wait for the next stage: what was just stored cannot be loaded
// as a tile before it has reached the cache. What one stage writes and what the next reads lie in
// different halves of a page: the processor tells them apart by their place in it.
template <int GROUPS>
struct alignas(4096) Stages {
  uint8_t bytes[2][2][TILE][ROW_BYTES];         // [step][tile]
  int32_t exact[2 * GROUPS][2][2][TILE_WORDS];  // [rows, half][step][tile]
};

// Weights of 4 bits: 64 inputs of sixteen outputs are laid out as bytes, and every group's sums
// are scaled before they are added up. Two tiles at a time are unpacked, while the two before them
// are multiplied and the two before those are added up.
template <int GROUPS>
inline void sum_nibbles(const FewProduct &p, int64_t output, const uint32_t *const *rows,
                        const float *const *group_sums, Found *found) {
  const jamba_matrix &matrix = p.matrix;
  const int64_t stride = matrix.I / 2, groups = matrix.I / matrix.group;
  const char *const weights = (const char *)matrix.values + output * stride;
  // Groups of one tile.
  const int halves = matrix.group == 32 ? 2 : 1;
  const __m256i low = _mm256_set1_epi8(15);
  __m512 sums[GROUPS][TILE];
  for (auto &one : sums) {
    for (auto &sum : one) sum = _mm512_setzero_ps();
  }
  Stages<GROUPS> stages;
  WideGroups scales, minima;
  for (int64_t first = 0; first < groups; first += WIDE_GROUPS) {
    const int64_t count = groups - first < WIDE_GROUPS ? groups - first : WIDE_GROUPS;
    make_wide(matrix.scale, output, groups, first, count, scales);
    make_wide(matrix.minimum, output, groups, first, count, minima);
    const int64_t first_tile = first / halves, tiles = count / halves, pairs = (tiles + 1) / 2;
    for (int64_t step = 0; step < pairs + 2; step++) {
      if (step < pairs) {
        const int64_t tile = first_tile + 2 * step;
        if (step % 2 == 0) fetch_rows(weights, stride, tile * 32 + AHEAD);
        for (int t = 0; t < 2 && 2 * step + t < tiles; t++) {
          const char *from = weights + (tile + t) * 32;
          for (int o = 0; o < TILE; o++) {
            const __m256i both = _mm256_loadu_si256((const __m256i *)(from + o * stride));
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            _mm512_store_si512(stages.bytes[step % 2][t][o],
                               side_by_side(_mm256_and_si256(both, low), high));
          }
        }
      }
      if (step >= 1 && step <= pairs) {
        const int64_t at = step - 1, depth = first + 2 * at * halves;
        const bool second = 2 * at + 1 < tiles;
        const int64_t half = step % 2;
        _tile_loadd(4, stages.bytes[at % 2][0], ROW_BYTES);
        if (second) _tile_loadd(5, stages.bytes[at % 2][1], ROW_BYTES);
        for (int r = 0; r < GROUPS; r++) {
          const uint32_t *x = rows[r] + depth * TILE_WORDS;
          for (int h = 0; h < halves; h++, x += TILE_WORDS) {
            _tile_zero(0);
            _tile_loadd(6, x, ROW_BYTES);
            _tile_dpbssd(0, 4, 6);
            _tile_stored(0, stages.exact[2 * r + h][half][0], ROW_BYTES);
            if (!second) continue;
            _tile_zero(1);
            _tile_loadd(7, x + halves * TILE_WORDS, ROW_BYTES);
            _tile_dpbssd(1, 5, 7);
            _tile_stored(1, stages.exact[2 * r + h][half][1], ROW_BYTES);
          }
        }
      }
      if (step >= 2) {
        const int64_t at = step - 2;
        for (int t = 0; t < 2 && 2 * at + t < tiles; t++) {
          const int64_t g = (2 * at + t) * halves;
          for (int r = 0; r < GROUPS; r++) {
            for (int h = 0; h < halves; h++) {
              const __m512 of_group = _mm512_loadu_ps(group_sums[r] + (first + g + h) * TILE);
              const int32_t *exact = stages.exact[2 * r + h][(step - 1) % 2][t];
              for (int o = 0; o < TILE; o++) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(exact + o * TILE));
                const __m512 scale = _mm512_set1_ps(scales.values[o][g + h]);
                const __m512 minimum = _mm512_set1_ps(minima.values[o][g + h]);
                sums[r][o] = _mm512_fmadd_ps(sum, scale, sums[r][o]);
                sums[r][o] = _mm512_fmadd_ps(of_group, minimum, sums[r][o]);
              }
            }
          }
        }
      }
    }
  }
  for (int r = 0; r < GROUPS; r++) {
    __m256 both[TILE];
    for (int o = 0; o < TILE; o++) both[o] = joined(sums[r][o], 256.0f);
    transpose(both, found[r].rows);
  }
}

// One tile of outputs with the rows of one or two groups.
template <int GROUPS>
inline void find(const FewProduct &p, int64_t output, const int64_t *group, Found *found) {
  const jamba_matrix &matrix = p.matrix;
  const uint32_t *rows[GROUPS];
  for (int r = 0; r < GROUPS; r++) rows[r] = p.x.tiles + group[r] * few_words(matrix);
  if (matrix.kind == JAMBA_INT4) {
    const float *group_sums[GROUPS];
    const int64_t size = matrix.I / matrix.group * TILE;
    for (int r = 0; r < GROUPS; r++) group_sums[r] = p.x.group_sums + group[r] * size;
    return sum_nibbles<GROUPS>(p, output, rows, group_sums, found);
  }
  alignas(64) uint32_t sums[GROUPS][2][TILE_WORDS];
  const bool halves = matrix.kind == JAMBA_BF16;
  const int64_t stride = matrix.I * (halves ? 2 : 1);
  const char *weights = (const char *)matrix.values + output * stride;
  (halves ? sum_halves<GROUPS> : sum_bytes<GROUPS>)(weights, stride, rows, sums);
  for (int r = 0; r < GROUPS; r++) found[r] = halves ? from_halves(sums[r]) : from_bytes(sums[r]);
}

// Scales what was found for rows `begin` to `end` of the list, which belong to one group.
inline void give(const FewProduct &p, int64_t output, int64_t begin, int64_t end,
                 const Found &found) {
  const jamba_matrix &matrix = p.matrix;
  const __m512 bias =
      matrix.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(matrix.bias + output);
  for (int64_t i = begin; i < end; i++) {
    __m512 y = found.rows[p.rows[i] % FEW];
    if (matrix.kind != JAMBA_BF16) {
      const __m512 unit = _mm512_set1_ps(p.x.unit[p.rows[i]]);
      y = matrix.kind == JAMBA_INT4
              ? _mm512_mul_ps(y, unit)
              : _mm512_mul_ps(
                    y, _mm512_mul_ps(unit, _mm512_loadu_ps((const float *)matrix.scale + output)));
    }
    _mm512_storeu_ps(p.y + i * p.y_stride + output - p.first, _mm512_add_ps(y, bias));
  }
}

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
                            uint32_t *tiles, float *group_sums) {
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
    if (matrix.group == 64) {
      put_column(tiles, column, coarse);
      put_column(tiles, FEW + column, fine);
      group_sums[FEW + column] = (float)(sum_a + sum_b);
      tiles += TILE_WORDS, group_sums += TILE;
      continue;
    }
    for (int block = 0; block < 2; block++) {
      const __mmask16 words = block == 0 ? FIRST_BLOCK : (__mmask16)~FIRST_BLOCK;
      put_column(tiles, column, _mm512_maskz_mov_epi32(words, coarse));
      put_column(tiles, FEW + column, _mm512_maskz_mov_epi32(words, fine));
      group_sums[FEW + column] = (float)(block == 0 ? sum_a : sum_b);
      tiles += TILE_WORDS, group_sums += TILE;
    }
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
      cut_for_nibbles(matrix, out.integers, column, tiles, group_sums);
    }
  }
}

void few_by_amx(const FewProduct &p) {
  for (int64_t output = p.first; output < p.last; output += TILE) {
    for (int64_t i = 0; i < p.count;) {
      int64_t group[2] = {}, ends[3] = {i, i, i};
      int groups = 0;
      for (; groups < 2 && i < p.count; groups++) {
        group[groups] = p.rows[i] / FEW;
        while (i < p.count && p.rows[i] / FEW == group[groups]) i++;
        ends[groups + 1] = i;
      }
      Found found[2];
      (groups == 2 ? find<2> : find<1>)(p, output, group, found);
      for (int r = 0; r < groups; r++) give(p, output, ends[r], ends[r + 1], found[r]);
    }
  }
}

}  // namespace jamba
