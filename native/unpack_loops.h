// What packed weights stand for, as floats: an embedding looked up, and matrices that many rows are
// to meet.
#ifndef JAMBA_UNPACK_LOOPS_H
#define JAMBA_UNPACK_LOOPS_H

#include "paths.h"
#include "simd.h"

namespace jamba::JAMBA_PATH {

JAMBA_INLINE float from_bfloat16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Row `row` of a matrix as float32, in order.
inline void unpack_row(const jamba_matrix &matrix, int64_t row, float *out) {
  const int64_t inputs = matrix.I;
  switch (matrix.kind) {
    case JAMBA_F32:
      memcpy(out, (const float *)matrix.values + row * inputs, (size_t)inputs * sizeof *out);
      break;
    case JAMBA_BF16:
      for (int64_t i = 0; i < inputs; i++) {
        out[i] = from_bfloat16(((const uint16_t *)matrix.values)[row * inputs + i]);
      }
      break;
    case JAMBA_INT8: {
      const int8_t *values = (const int8_t *)matrix.values + row * inputs;
      const float scale = ((const float *)matrix.scale)[row];
      for (int64_t i = 0; i < inputs; i++) out[i] = (float)values[i] * scale;
      break;
    }
    case JAMBA_INT4: {
      const int64_t groups = divide_up(inputs, matrix.group);
      const uint8_t *packed = (const uint8_t *)matrix.values + row * (inputs / 2);
      for (int64_t block = 0; block < inputs / 32; block++) {
        const int64_t at = row * groups + block * 32 / matrix.group;
        const float scale = from_bfloat16(((const uint16_t *)matrix.scale)[at]);
        const float minimum = from_bfloat16(((const uint16_t *)matrix.minimum)[at]);
        for (int64_t j = 0; j < 16; j++) {
          const uint8_t both = packed[block * 16 + j];
          out[block * 32 + j] = (float)(both & 15) * scale + minimum;
          out[block * 32 + j + 16] = (float)(both >> 4) * scale + minimum;
        }
      }
      break;
    }
  }
}

// Rows [first, last) as the caller wants them.
inline void unpack(const jamba_unpack_call &call, int64_t first, int64_t last, float *scratch) {
  const int64_t inputs = call.matrix.I;
  for (int64_t row = first; row < last; row++) {
    unpack_row(call.matrix, row, scratch);
    for (int64_t i = 0; i < inputs; i += LANES) {
      const int64_t left = inputs - i < LANES ? inputs - i : LANES;
      store_any(call.out_OI, call.bfloat16 & JAMBA_U, row * inputs + i, left,
                load_as<false>(scratch, i, left));
    }
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
