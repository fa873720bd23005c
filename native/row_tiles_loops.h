// The way into tiles for rows: floats of any type cut into words.
#ifndef JAMBA_ROW_TILES_LOOPS_H
#define JAMBA_ROW_TILES_LOOPS_H

#include "operand_loops.h"
#include "tile_loops.h"
#include "unpack_loops.h"

namespace jamba::JAMBA_PATH {

// Rows that meet a matrix, `row_tiles` tiles of them.
struct TiledRows {
  Words words;
  int64_t inputs, depth, row_tiles;
  // [row tile][depth][TILE_WORDS]; then, of QUADS, what 1 stands for in each row, or, of GROUPS, a
  // RowGroup for each tile.
  uint32_t *data;

  uint32_t *tile(int64_t row_tile, int64_t d) const {
    return data + (row_tile * depth + d) * TILE_WORDS;
  }
  float *units(int64_t row_tile) const { return (float *)tile(row_tiles, 0) + row_tile * TILE; }
  RowGroup *groups(int64_t row_tile, int64_t d) const {
    return (RowGroup *)tile(row_tiles, 0) + row_tile * depth + d;
  }
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
// where a tile begins; rows past `num_rows` are zero. Not for bytes, which need more of a row.
inline void tile_part(const TiledRows &out, int64_t row_tile, const RowSource &from,
                      const int64_t *rows, int64_t num_rows, int64_t out_first, int64_t first,
                      int64_t count) {
  const int64_t inputs = TILE * inputs_in(out.words);
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
    const SomeBytes rounded = narrow(__builtin_convertvector(scaled + half, IntVec));
    memcpy(bytes + i, &rounded, sizeof rounded);
  }
}

// Whole rows as GROUPS: as below, but with a scale for each tile.
inline void tile_groups(const TiledRows &out, int64_t row_tile, const RowSource &from,
                        const int64_t *rows, int64_t num_rows, int64_t first) {
  alignas(64) uint32_t lines[TILE_WORDS] = {};
  for (int64_t d = 0; d < out.depth; d++) {
    RowGroup &group = *out.groups(row_tile, d);
    group = {};
    const int64_t j = d * 4 * TILE, left = out.inputs - j < 4 * TILE ? out.inputs - j : 4 * TILE;
    for (int64_t i = 0; i < num_rows; i++) {
      const int64_t at = rows[i] * from.stride + first + j;
      const Peak peak = peak_of(left, [&](int64_t k, int64_t some) {
        return load_any(from.array, from.half, at + k, some);
      });
      group.unit[i] = from_integers(peak, 127.0f);
      const float inverse = to_integers(peak, 127.0f);
      uint32_t *const line = lines + i * TILE;
      if (inverse == 0) {
        memset(line, 0, TILE * sizeof *line);
        continue;
      }
      cut_quads(from, at, left, inverse, line);
    }
    uint32_t *const words = out.tile(row_tile, d);
    turn(lines, words);
    for (int64_t half = 0; half < 2; half++) {
      for (int64_t l = 0; l < TILE; l += LANES) {
        IntVec sum = {};
        for (int64_t word = half * TILE / 2; word < (half + 1) * TILE / 2; word++) {
          sum = add_bytes(sum, (IntVec)load((const float *)words + word * TILE + l));
        }
        store((float *)group.sums[half] + l, (Vec)sum);
      }
    }
  }
}

// Whole rows, from input `first` of `from` on. Bytes that stand for something infinite become "not
// a number", which no integer says, with all that share their scale.
inline void tile_rows(const TiledRows &out, int64_t row_tile, const RowSource &from,
                      const int64_t *rows, int64_t num_rows, int64_t first) {
  if (out.words == Words::GROUPS) return tile_groups(out, row_tile, from, rows, num_rows, first);
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

}  // namespace jamba::JAMBA_PATH
#endif
