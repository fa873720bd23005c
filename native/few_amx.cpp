// A few rows by the matrix extension (AMX): sixteen outputs at a time, whose weights are loaded as
// tiles from where they lie. Compiled with AVX-512 and AMX; nothing here runs before find_path()
// has asked the processor, and the caller has set up the registers (`begin_amx`).
#include "few_amx.h"

#include "avx512.h"
#include "tile_kernels.h"

namespace jamba {
namespace {

// Sums of one tile of outputs with GROUPS times FEW rows, in two chains that do not wait for each
// other: [group][chain][TILE_WORDS].
#define JAMBA_FEW_SUMS(NAME, PRODUCT)                                              \
  template <int GROUPS>                                                            \
  inline void NAME(const char *weights, const char *after, int64_t stride,         \
                   const uint32_t *const *rows, uint32_t (*sums)[2][TILE_WORDS]) { \
    _tile_zero(0);                                                                 \
    _tile_zero(1);                                                                 \
    _tile_zero(2);                                                                 \
    _tile_zero(3);                                                                 \
    const int64_t depth = stride / ROW_BYTES;                                      \
    int64_t d = 0;                                                                 \
    for (; d + 2 <= depth; d += 2) {                                               \
      fetch_rows(weights, after, stride, d * ROW_BYTES + AHEAD);                   \
      _tile_loadd(4, weights + d * ROW_BYTES, stride);                             \
      _tile_loadd(6, rows[0] + d * TILE_WORDS, ROW_BYTES);                         \
      PRODUCT(0, 4, 6);                                                            \
      _tile_loadd(5, weights + (d + 1) * ROW_BYTES, stride);                       \
      _tile_loadd(7, rows[0] + (d + 1) * TILE_WORDS, ROW_BYTES);                   \
      PRODUCT(1, 5, 7);                                                            \
      if (GROUPS > 1) {                                                            \
        _tile_loadd(6, rows[GROUPS - 1] + d * TILE_WORDS, ROW_BYTES);              \
        PRODUCT(2, 4, 6);                                                          \
        _tile_loadd(7, rows[GROUPS - 1] + (d + 1) * TILE_WORDS, ROW_BYTES);        \
        PRODUCT(3, 5, 7);                                                          \
      }                                                                            \
    }                                                                              \
    if (d < depth) {                                                               \
      fetch_rows(weights, after, stride, d * ROW_BYTES + AHEAD);                   \
      _tile_loadd(4, weights + d * ROW_BYTES, stride);                             \
      _tile_loadd(6, rows[0] + d * TILE_WORDS, ROW_BYTES);                         \
      PRODUCT(0, 4, 6);                                                            \
      if (GROUPS > 1) {                                                            \
        _tile_loadd(7, rows[GROUPS - 1] + d * TILE_WORDS, ROW_BYTES);              \
        PRODUCT(2, 4, 7);                                                          \
      }                                                                            \
    }                                                                              \
    _tile_stored(0, sums[0][0], ROW_BYTES);                                        \
    _tile_stored(1, sums[0][1], ROW_BYTES);                                        \
    if (GROUPS > 1) {                                                              \
      _tile_stored(2, sums[GROUPS - 1][0], ROW_BYTES);                             \
      _tile_stored(3, sums[GROUPS - 1][1], ROW_BYTES);                             \
    }                                                                              \
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
  const char *const weights = weights_of(matrix, output);
  const char *const after = weights_after(p, output, TILE);
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
        if (step % 2 == 0) fetch_rows(weights, after, stride, tile * 32 + AHEAD);
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
  (halves ? sum_halves<GROUPS> : sum_bytes<GROUPS>)(weights_of(matrix, output),
                                                    weights_after(p, output, TILE),
                                                    bytes_of_row(matrix), rows, sums);
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

}  // namespace

void few_by_amx(const FewProduct &p) {
  for (int64_t output = p.first; output < p.last; output += TILE) {
    if (p.x.slots > 1) {
      float sums[MOST_ROWS_APART][TILE];
      sum_nibbles_apart(p, output, sums);
      Found found;
      for (int row = 0; row < MOST_ROWS_APART; row++) found.rows[row] = _mm512_loadu_ps(sums[row]);
      give(p, output, 0, p.count, found);
      continue;
    }
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
