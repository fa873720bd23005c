// One to four rows with weights of 4 bits by the matrix extension (AMX): a row has several columns
// of a tile, so that several of its groups are summed before anything is scaled. Compiled with
// AVX-512 and AMX; nothing here runs before find_path() has asked the processor, and the caller has
// set up the registers (`begin_amx`).
#include <algorithm>

#include "avx512.h"
#include "few_amx.h"

namespace jamba {
namespace {

// Tiles of weights that are unpacked, multiplied and added up together. Each stage works on what
// the one before it did a turn earlier: a tile cannot be loaded, nor its sums, before what was
// stored has reached the cache.
constexpr int64_t TILES_OF_TURN = 4;

// Groups whose scales and minima are made wide at a time.
constexpr int64_t WIDE_GROUPS = 64;

// What one stage writes and what the next reads lie in different halves of a page: the processor
// tells them apart by their place in it.
struct alignas(4096) Turns {
  uint8_t bytes[2][TILES_OF_TURN][TILE][ROW_BYTES];
  // Of each block of groups that ends in a turn, in two chains that do not wait for each other.
  int32_t exact[2][TILES_OF_TURN][2][TILE_WORDS];
};

// [group][output]
struct WideGroups {
  alignas(64) float values[WIDE_GROUPS][TILE];
};

// Element [j] of vector i becomes element [i] of vector j.
inline void transpose(__m512i (&v)[TILE]) {
  __m512i a[TILE];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; j++) {
      a[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + 4 + j], 0x88);
      a[i + 4 + j] = _mm512_shuffle_i32x4(v[i + j], v[i + 4 + j], 0xdd);
    }
  }
  for (int j = 0; j < 8; j++) {
    v[j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0xdd);
  }
}

inline void make_wide(const void *halves, int64_t output, int64_t groups, int64_t first,
                      int64_t count, WideGroups &wide) {
  for (int64_t g = 0; g < count; g += TILE) {
    const int64_t left = count - g;
    const __mmask16 some = left < TILE ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
    __m512i v[TILE];
    for (int o = 0; o < TILE; o++) {
      const uint16_t *from = (const uint16_t *)halves + (output + o) * groups + first + g;
      const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
      v[o] = _mm512_slli_epi32(bits, 16);
    }
    transpose(v);
    for (int j = 0; j < TILE; j++) _mm512_store_si512(wide.values[g + j], v[j]);
  }
}

// 64 weights of each of sixteen outputs, as bytes: low halves, then high ones.
inline void unpack(const char *from, int64_t stride, uint8_t (*bytes)[ROW_BYTES]) {
  const __m512i shifts = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004,
                                          0x0004000400040004, 0x0004000400040004, 0, 0, 0, 0);
  const __m512i low = _mm512_set1_epi8(15);
  for (int o = 0; o < TILE; o++) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)(from + o * stride));
    const __m512i twice = _mm512_broadcast_i64x4(both);
    _mm512_store_si512(bytes[o], _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), low));
  }
}

template <int ROWS>
struct Added {
  __m512 coarse[ROWS], rest[ROWS];
};

// Scales the sums of a block of groups, from `first` of the wide ones on, and adds them up: for
// each row the same operations in the same order as with one column (few_amx.cpp).
template <int ROWS, int SLOTS>
inline void add_block(const int32_t (&exact)[2][TILE_WORDS], int64_t first, int64_t count,
                      const WideGroups &scales, const WideGroups &minima, const float *group_sums,
                      Added<ROWS> &added) {
  __m512i v[TILE];
  for (int o = 0; o < TILE; o++) {
    v[o] = _mm512_add_epi32(_mm512_load_si512(exact[0] + o * TILE),
                            _mm512_load_si512(exact[1] + o * TILE));
  }
  transpose(v);
  const auto add_group = [&](int slot) {
    const __m512 scale = _mm512_load_ps(scales.values[first + slot]);
    const __m512 minimum = _mm512_load_ps(minima.values[first + slot]);
    for (int row = 0; row < ROWS; row++) {
      const int column = row * SLOTS + slot;
      const __m512 of_group = _mm512_set1_ps(group_sums[(first + slot) * TILE + FEW + row]);
      const __m512 coarse = _mm512_cvtepi32_ps(v[column]);
      const __m512 rest = _mm512_cvtepi32_ps(v[FEW + column]);
      added.coarse[row] = _mm512_fmadd_ps(coarse, scale, added.coarse[row]);
      added.rest[row] = _mm512_fmadd_ps(rest, scale, added.rest[row]);
      added.rest[row] = _mm512_fmadd_ps(of_group, minimum, added.rest[row]);
    }
  };
  if (count >= SLOTS) {
#pragma GCC unroll 8
    for (int slot = 0; slot < SLOTS; slot++) add_group(slot);
  } else {
    for (int slot = 0; slot < (int)count; slot++) add_group(slot);
  }
}

template <int ROWS, int SLOTS>
void sum_apart(const FewProduct &p, int64_t output, float (*found)[TILE]) {
  const jamba_matrix &matrix = p.matrix;
  const int64_t stride = matrix.I / 2, groups = matrix.I / matrix.group;
  const char *const weights = weights_of(matrix, output);
  const char *const after = weights_after(p, output, TILE);
  // Groups of a tile, and tiles of a block of as many groups as a row has columns.
  const int64_t of_tile = matrix.group == 32 ? 2 : 1, of_block = SLOTS / of_tile;
  Added<ROWS> added;
  for (int row = 0; row < ROWS; row++) {
    added.coarse[row] = added.rest[row] = _mm512_setzero_ps();
  }
  Turns turns;
  WideGroups scales, minima;
  for (int64_t first = 0; first < groups; first += WIDE_GROUPS) {
    const int64_t count = std::min(groups - first, WIDE_GROUPS);
    make_wide(matrix.scale, output, groups, first, count, scales);
    make_wide(matrix.minimum, output, groups, first, count, minima);
    const float *group_sums = p.x.group_sums + first * TILE;
    const int64_t first_tile = first / of_tile, tiles = count / of_tile;
    const int64_t num_turns = (tiles + TILES_OF_TURN - 1) / TILES_OF_TURN;
    // Blocks whose sums have been stored, and added up.
    int64_t stored = 0, done = 0, stored_before = 0;
    for (int64_t turn = 0; turn < num_turns + 2; turn++) {
      if (turn < num_turns) {
        const int64_t tile = first_tile + turn * TILES_OF_TURN;
        fetch_rows(weights, after, stride, tile * 32 + AHEAD);
        const int64_t end = std::min(TILES_OF_TURN, tiles - turn * TILES_OF_TURN);
        for (int64_t t = 0; t < end; t++) {
          unpack(weights + (tile + t) * 32, stride, turns.bytes[turn % 2][t]);
        }
      }
      const int64_t ready = stored;
      if (turn >= 1 && turn <= num_turns) {
        const int64_t from = (turn - 1) * TILES_OF_TURN;
        const int64_t end = std::min(from + TILES_OF_TURN, tiles);
        for (int64_t t = from; t < end; t++) {
          const uint8_t (*bytes)[ROW_BYTES] = turns.bytes[(turn - 1) % 2][t - from];
          const uint32_t *x = p.x.tiles + (first_tile + t) * TILE_WORDS;
          if (t % of_block == 0) {
            _tile_zero(0);
            _tile_zero(1);
          }
          if (t % of_block % 2 == 0) {
            _tile_loadd(4, bytes, ROW_BYTES);
            _tile_loadd(6, x, ROW_BYTES);
            _tile_dpbssd(0, 4, 6);
          } else {
            _tile_loadd(5, bytes, ROW_BYTES);
            _tile_loadd(7, x, ROW_BYTES);
            _tile_dpbssd(1, 5, 7);
          }
          if (t % of_block == of_block - 1 || t == tiles - 1) {
            auto &exact = turns.exact[turn % 2][stored - stored_before];
            _tile_stored(0, exact[0], ROW_BYTES);
            _tile_stored(1, exact[1], ROW_BYTES);
            stored++;
          }
        }
      }
      for (const int64_t base = done; done < ready; done++) {
        add_block<ROWS, SLOTS>(turns.exact[(turn - 1) % 2][done - base], done * SLOTS,
                               count - done * SLOTS, scales, minima, group_sums, added);
      }
      stored_before = stored;
    }
  }
  for (int row = 0; row < ROWS; row++) {
    const __m512 y = _mm512_fmadd_ps(added.coarse[row], _mm512_set1_ps(256.0f), added.rest[row]);
    _mm512_storeu_ps(found[row], y);
  }
}

}  // namespace

void sum_nibbles_apart(const FewProduct &p, int64_t output, float (*found)[TILE]) {
  switch (p.x.slots) {
    case 8: return sum_apart<1, 8>(p, output, found);
    case 4: return sum_apart<2, 4>(p, output, found);
    default: return sum_apart<4, 2>(p, output, found);
  }
}

}  // namespace jamba
