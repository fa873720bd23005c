// Tiles of the matrix extension (AMX), whose registers are the tiles of tiles.h. Compiled with
// AMX-TILE, AMX-BF16 and AMX-INT8; nothing here runs before find_path() has asked the processor.
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cpuid.h>

#include "tile_kernels.h"

namespace jamba {
namespace {

constexpr int ROW_BYTES = 64;

// Sums in registers 0 to 3, two tiles of weights in 4 and 5, two of rows in 6 and 7: four products
// for four loads. OUTPUTS and ROWS are 1 or 2.
#define JAMBA_TILES_BLOCK(NAME, PRODUCT)                                              \
  template <int OUTPUTS, int ROWS>                                                    \
  inline void NAME(const TileProduct &p, int64_t output, int64_t row) {               \
    uint32_t *sums = p.sums + (row * p.output_tiles + output) * TILE_WORDS;           \
    uint32_t *next_row = sums + p.output_tiles * TILE_WORDS;                          \
    if (p.adds) {                                                                     \
      _tile_loadd(0, sums, ROW_BYTES);                                                \
      if (OUTPUTS > 1) _tile_loadd(1, sums + TILE_WORDS, ROW_BYTES);                  \
      if (ROWS > 1) _tile_loadd(2, next_row, ROW_BYTES);                              \
      if (OUTPUTS > 1 && ROWS > 1) _tile_loadd(3, next_row + TILE_WORDS, ROW_BYTES);  \
    } else {                                                                          \
      _tile_zero(0);                                                                  \
      _tile_zero(1);                                                                  \
      _tile_zero(2);                                                                  \
      _tile_zero(3);                                                                  \
    }                                                                                 \
    const uint32_t *weights = p.weights + output * p.depth * TILE_WORDS;              \
    const uint32_t *rows = p.rows + row * p.rows_stride;                              \
    for (int64_t d = 0; d < p.depth; d++) {                                           \
      _tile_loadd(4, weights, ROW_BYTES);                                             \
      _tile_loadd(6, rows, ROW_BYTES);                                                \
      PRODUCT(0, 4, 6);                                                               \
      if (OUTPUTS > 1) {                                                              \
        _tile_loadd(5, weights + p.depth * TILE_WORDS, ROW_BYTES);                    \
        PRODUCT(1, 5, 6);                                                             \
      }                                                                               \
      if (ROWS > 1) {                                                                 \
        _tile_loadd(7, rows + p.rows_stride, ROW_BYTES);                              \
        PRODUCT(2, 4, 7);                                                             \
        if (OUTPUTS > 1) PRODUCT(3, 5, 7);                                            \
      }                                                                               \
      weights += TILE_WORDS, rows += TILE_WORDS;                                      \
    }                                                                                 \
    _tile_stored(0, sums, ROW_BYTES);                                                 \
    if (OUTPUTS > 1) _tile_stored(1, sums + TILE_WORDS, ROW_BYTES);                   \
    if (ROWS > 1) _tile_stored(2, next_row, ROW_BYTES);                               \
    if (OUTPUTS > 1 && ROWS > 1) _tile_stored(3, next_row + TILE_WORDS, ROW_BYTES);   \
  }                                                                                   \
                                                                                      \
  /* Outputs are the outer loop: two of their tiles stay in the first-level cache. */ \
  inline void all_##NAME(const TileProduct &p) {                                      \
    const int64_t blocks = (p.output_tiles + 1) / 2 * ((p.row_tiles + 1) / 2);        \
    int64_t block = 0;                                                                \
    for (int64_t output = 0; output < p.output_tiles; output += 2) {                  \
      const bool two_outputs = output + 1 < p.output_tiles;                           \
      for (int64_t row = 0; row < p.row_tiles; row += 2) {                            \
        const bool two_rows = row + 1 < p.row_tiles;                                  \
        fetch_ahead(p.ahead, block++, blocks);                                        \
        if (two_outputs && two_rows) NAME<2, 2>(p, output, row);                      \
        if (two_outputs && !two_rows) NAME<2, 1>(p, output, row);                     \
        if (!two_outputs && two_rows) NAME<1, 2>(p, output, row);                     \
        if (!two_outputs && !two_rows) NAME<1, 1>(p, output, row);                    \
      }                                                                               \
    }                                                                                 \
  }

JAMBA_TILES_BLOCK(pairs, _tile_dpbf16ps)
JAMBA_TILES_BLOCK(quads, _tile_dpbssd)

// Linux gives the registers to a process that asks, once.
bool granted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

bool processor_has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24, INT8 = 1u << 25;
  return (d & BF16) && (d & TILES) && (d & INT8);
}

}  // namespace

bool amx_runs_here() {
  static const bool answer = processor_has_tiles() && granted();
  return answer;
}

void begin_amx() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int i = 0; i < 8; i++) shape.row_bytes[i] = ROW_BYTES, shape.rows[i] = TILE;
  // The compiler does not know that the instruction reads all of it.
  asm volatile("" : : "r"(&shape) : "memory");
  _tile_loadconfig(&shape);
}

void end_amx() { _tile_release(); }

void pairs_by_amx(const TileProduct &p) { all_pairs(p); }

void quads_by_amx(const TileProduct &p) { all_quads(p); }

}  // namespace jamba
