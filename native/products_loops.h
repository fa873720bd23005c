// y = W x for a few rows of x: a decode step, where reading W is all the work there is. Every
// weight is read from memory once, whatever the number of rows.
#ifndef JAMBA_PRODUCTS_LOOPS_H
#define JAMBA_PRODUCTS_LOOPS_H

#include "product_tiles.h"
#include "step.h"

namespace jamba::JAMBA_PATH {

template <int OUTPUTS, int ROWS>
inline void tile(const jamba_matrix &matrix, int64_t output, const char *after,
                 const Operand &operand, const int64_t *rows, float (*sums)[ROWS]) {
  switch (matrix.kind) {
    case JAMBA_F32: return float_tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
    case JAMBA_BF16:
      return bfloat16_tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
    case JAMBA_INT8: return int8_tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
    case JAMBA_INT4: return int4_tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
  }
}

template <int OUTPUTS, int ROWS>
inline void tile_into(const jamba_matrix &matrix, int64_t output, const char *after,
                      const Operand &operand, const int64_t *rows, float *y, int64_t y_stride) {
  float sums[OUTPUTS][ROWS] = {};
  tile<OUTPUTS, ROWS>(matrix, output, after, operand, rows, sums);
  for (int o = 0; o < OUTPUTS; o++) {
    const float bias = matrix.bias == nullptr ? 0.0f : matrix.bias[output + o];
    for (int m = 0; m < ROWS; m++) y[m * y_stride + o] = sums[o][m] + bias;
  }
}

template <int OUTPUTS>
inline void outputs_into(const FewProduct &p, int64_t output, const Operand &operand) {
  const jamba_matrix &matrix = p.matrix;
  const char *const after = weights_after(p, output, OUTPUTS);
  float *const y = p.y + output - p.first;
  const int64_t *const rows = p.rows;
  const int64_t count = p.count, y_stride = p.y_stride;
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) {
    // Sixteen sums fit the registers: twice as many rows, so half as many outputs.
    constexpr int HALF = OUTPUTS > 1 ? OUTPUTS / 2 : 1;
    for (int o = 0; o < OUTPUTS; o += HALF) {
      tile_into<HALF, 4>(matrix, output + o, after + o * bytes_of_row(matrix), operand, rows + m,
                         y + m * y_stride + o, y_stride);
    }
  }
  if (m + 2 <= count) {
    tile_into<OUTPUTS, 2>(matrix, output, after, operand, rows + m, y + m * y_stride, y_stride);
    m += 2;
  }
  if (m < count) {
    tile_into<OUTPUTS, 1>(matrix, output, after, operand, rows + m, y + m * y_stride, y_stride);
  }
}

// y[m][o - first] = W[o] . x[rows[m]] + bias[o] for outputs [first, last) and `count` rows; `next`
// are weights that this thread will read then, in rows as long, or null.
inline void multiply(const jamba_matrix &matrix, int64_t first, int64_t last,
                     const Operand &operand, const int64_t *rows, int64_t count, float *y,
                     int64_t y_stride, const void *next = nullptr) {
  const FewProduct product = {matrix, first, last, operand.tiles, rows, count, y, y_stride, next};
  if (operand.few != nullptr) return operand.few->few(product);
  int64_t o = first;
  for (; o + 4 <= last; o += 4) outputs_into<4>(product, o, operand);
  for (; o < last; o++) outputs_into<1>(product, o, operand);
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
  prepare_operand(kernels, call.matrix, x, inputs, call.M, scratch);
}

// Outputs [first, last), at most PIECE, after product_begin with the same scratch.
inline void product(const jamba_product_call &call, const TileKernels &kernels, int64_t first,
                    int64_t last, float *scratch) {
  const int64_t inputs = call.matrix.I, count = last - first;
  float *y = scratch + cache_line_floats(operand_floats(call.M, inputs)) +
             cache_line_floats(call.M * inputs);
  const Operand operand = operand_in(kernels, call.matrix, call.M, scratch);
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
