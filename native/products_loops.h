// y = W x for a few rows of x: a decode step, where reading W is all the work there is. Every
// weight is read from memory once, whatever the number of rows.
#ifndef JAMBA_PRODUCTS_LOOPS_H
#define JAMBA_PRODUCTS_LOOPS_H

#include "nibble_tiles.h"
#include "step.h"

namespace jamba::JAMBA_PATH {

template <int OUTPUTS, int ROWS>
inline void tile_into(const FewProduct &p, int64_t output, const char *after,
                      const Operand &operand, int64_t row, Vec *sums) {
  const jamba_matrix &matrix = p.matrix;
  const int64_t *const rows = p.rows + row;
  switch (matrix.kind) {
    case JAMBA_F32: return float_tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
    case JAMBA_BF16:
#if defined(__AVX512BF16__)
      if (operand.halves != nullptr) {
        return halves_tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
      }
#endif
      return bfloat16_tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
    case JAMBA_INT8: return int8_tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
    case JAMBA_INT4:
      return (matrix.group == 32
                  ? int4_tile<OUTPUTS, ROWS, 32>
                  : int4_tile<OUTPUTS, ROWS, 64>)(matrix, output, after, operand, rows, sums);
  }
}

// Outputs whose sums with four rows fit the registers. The more there are, the less often rows are
// loaded, which do not fit the nearest cache.
#if defined(__AVX512F__)
constexpr int MOST_OUTPUTS_OF_FOUR = 4;
#else
constexpr int MOST_OUTPUTS_OF_FOUR = 2;
#endif

// OUTPUTS outputs times all rows.
template <int OUTPUTS>
inline void outputs_into(const FewProduct &p, int64_t output, const Operand &operand, Vec *sums) {
  const char *const after = weights_after(p, output, OUTPUTS);
  int64_t row = 0;
  for (; row + 4 <= p.count; row += 4) {
    constexpr int SOME = OUTPUTS < MOST_OUTPUTS_OF_FOUR ? OUTPUTS : MOST_OUTPUTS_OF_FOUR;
    for (int o = 0; o < OUTPUTS; o += SOME) {
      tile_into<SOME, 4>(p, output + o, after + o * bytes_of_row(p.matrix), operand, row,
                         sums + row * LANES + o);
    }
  }
  sums += row * LANES;
  switch (p.count - row) {
    case 1: return tile_into<OUTPUTS, 1>(p, output, after, operand, row, sums);
    case 2: return tile_into<OUTPUTS, 2>(p, output, after, operand, row, sums);
    case 3: return tile_into<OUTPUTS, 3>(p, output, after, operand, row, sums);
  }
}

// y = what the lanes add up to, in its own units, and the bias.
inline void finish_outputs(const FewProduct &p, int64_t output, int64_t count,
                           const Operand &operand, Vec *sums) {
  const jamba_matrix &matrix = p.matrix;
  const float *const scales = (const float *)matrix.scale;
  for (int64_t row = 0; row < p.count; row++, sums += LANES) {
    // They add nothing to the others; but nothing is read that was never written.
    for (int64_t lane = count; lane < LANES; lane++) sums[lane] = Vec{};
    Vec y = sum_each(sums);
    if (matrix.kind == JAMBA_INT8) y = y * load_as<false>(scales, output, count);
    if (matrix.kind == JAMBA_INT8 || matrix.kind == JAMBA_INT4) {
      y = y * set(operand.unit[p.rows[row]]);
    }
    if (matrix.bias != nullptr) y = y + load_as<false>(matrix.bias, output, count);
    store_as<false>(p.y, row * p.y_stride + output - p.first, count, y);
  }
}

// Whether one row meets one output after the other: while it stays in the nearest cache beside the
// weights that pass. A longer one would come from the next cache for each output, and four at a
// time ask for it a quarter as often; so they do for weights of 4 bits, which meet the most of a
// row for each byte. Measured on Zen 4, which has 32 KiB, four at a time against one after the
// other: whole steps on two threads, 1,024 and 2,560 inputs, 1.08 to 1.09 times the time with 16
// bits, 1.10 to 1.12 with 8, 0.95 to 0.97 with 4; on one thread 8,192 inputs of 16 bits 0.55. With
// narrow vectors products of 16 bits, each of which waits for the one before, are slower than
// memory.
inline bool takes_outputs_alone(const jamba_matrix &matrix, const Operand &operand) {
  if (matrix.kind == JAMBA_INT4 || (matrix.kind == JAMBA_BF16 && LANES < 16)) return false;
  const bool two_bytes = matrix.kind == JAMBA_INT8 || operand.halves != nullptr;
  return matrix.I * (two_bytes ? 2 : 4) <= 10240;
}

// y[m][o - first] = W[o] . x[rows[m]] + bias[o] for outputs [first, last) and `count` rows; `next`
// are weights that this thread will read then, in rows as long, or null.
inline void multiply(const jamba_matrix &matrix, int64_t first, int64_t last,
                     const Operand &operand, const int64_t *rows, int64_t count, float *y,
                     int64_t y_stride, const void *next = nullptr) {
  const FewProduct product = {matrix, first, last, operand.tiles, rows, count, y, y_stride, next};
  if (operand.few != nullptr) return operand.few->few(product);
  // [row][output], lanes not yet added up.
  Vec sums[JAMBA_STEP_ROWS * LANES];
  for (int64_t output = first; output < last; output += LANES) {
    const int64_t outputs = last - output < LANES ? last - output : LANES;
    int64_t o = 0;
    if (count > 1 || !takes_outputs_alone(matrix, operand)) {
      for (; o + 4 <= outputs; o += 4) outputs_into<4>(product, output + o, operand, sums + o);
    }
    for (; o < outputs; o++) outputs_into<1>(product, output + o, operand, sums + o);
    finish_outputs(product, output, outputs, operand, sums);
  }
}

inline int64_t product_scratch(const jamba_product_call &call) {
  const int64_t inputs = call.matrix.I, outputs = call.matrix.O;
  return cache_line_floats(operand_floats(call.M, inputs)) + cache_line_floats(call.M * inputs) +
         cache_line_floats(call.M * (outputs < PIECE ? outputs : PIECE));
}

inline void product_begin(const jamba_product_call &call, const TileKernels &kernels,
                          float *scratch) {
  const int64_t inputs = call.matrix.I;
  float *x = scratch + cache_line_floats(operand_floats(call.M, inputs));
  for (int64_t m = 0; m < call.M; m++) {
    for (int64_t i = 0; i < inputs; i += LANES) {
      const int64_t left = inputs - i < LANES ? inputs - i : LANES;
      const int64_t at = m * call.x_stride + i;
      store_as<false>(x, m * inputs + i, left,
                      load_any(call.x_MI, call.bfloat16 & JAMBA_U, at, left));
    }
  }
  prepare_operand(kernels, call.matrix, x, inputs, call.M, call.bfloat16 & JAMBA_U, scratch);
}

// Outputs [first, last), at most PIECE, after product_begin with the same scratch.
inline void product(const jamba_product_call &call, const TileKernels &kernels, int64_t first,
                    int64_t last, float *scratch) {
  const int64_t inputs = call.matrix.I, count = last - first;
  float *y = scratch + cache_line_floats(operand_floats(call.M, inputs)) +
             cache_line_floats(call.M * inputs);
  const Operand operand =
      operand_in(kernels, call.matrix, call.M, call.bfloat16 & JAMBA_U, scratch);
  multiply(call.matrix, first, last, operand, FIRST_ROWS, call.M, y, count);
  for (int64_t m = 0; m < call.M; m++) {
    for (int64_t o = 0; o < count; o += LANES) {
      const int64_t left = count - o < LANES ? count - o : LANES;
      store_any(call.y_MO, call.bfloat16 & JAMBA_U, m * call.matrix.O + first + o, left,
                load_as<false>(y, m * count + o, left));
    }
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
