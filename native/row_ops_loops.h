// Operations on rows that know no neighbours: RMSNorm and the SiLU gate.
// Lanes are neighbouring values of one row. Sums are float32.
#ifndef JAMBA_ROW_OPS_LOOPS_H
#define JAMBA_ROW_OPS_LOOPS_H

#include <math.h>

#include "paths.h"
#include "vector_math.h"

namespace jamba::JAMBA_PATH {

JAMBA_INLINE int64_t lanes_left(int64_t width, int64_t i) {
  return width - i < LANES ? width - i : LANES;
}

JAMBA_INLINE float sum_lanes(Vec v) {
  float sum = 0;
  for (int l = 0; l < LANES; l++) sum += v[l];
  return sum;
}

// What a value becomes when it is stored and loaded again.
JAMBA_INLINE Vec rounded_as(bool bfloat16, Vec v) {
  return bfloat16 ? from_bfloat16(to_bfloat16(v)) : v;
}

inline void norm(const jamba_norm_call &call, int64_t first, int64_t last) {
  const bool half = call.bfloat16 & JAMBA_U, half_weight = call.bfloat16 & JAMBA_WEIGHT;
  for (int64_t m = first; m < last; m++) {
    const int64_t row = m * call.x_stride;
    Vec squares = {};
    for (int64_t i = 0; i < call.D; i += LANES) {
      const Vec x = load_any(call.x_MD, half, row + i, lanes_left(call.D, i));
      squares = fma(x, x, squares);
    }
    const float inverse = 1.0f / sqrtf(sum_lanes(squares) / (float)call.D + (float)call.epsilon);
    call.inverse_M[m] = inverse;
    for (int64_t i = 0; i < call.D; i += LANES) {
      const int64_t left = lanes_left(call.D, i);
      const Vec x = load_any(call.x_MD, half, row + i, left);
      const Vec gain = load_any(call.weight_D, half_weight, i, left);
      // The published model rounds before the gain.
      store_any(call.y_MD, half, m * call.D + i, left, rounded_as(half, x * inverse) * gain);
    }
  }
}

// With z = x / rms and g = grad_y * weight:
//   grad_x = (g - z mean(g z)) / rms,   grad_weight = sum over rows of grad_y z
inline void norm_backward(const jamba_norm_backward_call &call, int64_t first, int64_t last,
                          float *grad_weight) {
  const jamba_norm_call &in = call.forward;
  const bool half = in.bfloat16 & JAMBA_U, half_weight = in.bfloat16 & JAMBA_WEIGHT;
  for (int64_t m = first; m < last; m++) {
    const int64_t row = m * in.x_stride, grad_row = m * call.grad_y_stride;
    const float inverse = in.inverse_M[m];
    Vec products = {};
    for (int64_t i = 0; i < in.D; i += LANES) {
      const int64_t left = lanes_left(in.D, i);
      const Vec z = load_any(in.x_MD, half, row + i, left) * inverse;
      const Vec grad_y = load_any(call.grad_y_MD, half, grad_row + i, left);
      const Vec gain = load_any(in.weight_D, half_weight, i, left);
      products = fma(grad_y * gain, z, products);
      const Vec sum = fma(grad_y, z, load_any(grad_weight, false, i, left));
      store_any(grad_weight, false, i, left, sum);
    }
    const float mean = sum_lanes(products) / (float)in.D;
    for (int64_t i = 0; i < in.D; i += LANES) {
      const int64_t left = lanes_left(in.D, i);
      const Vec z = load_any(in.x_MD, half, row + i, left) * inverse;
      const Vec grad_y = load_any(call.grad_y_MD, half, grad_row + i, left);
      const Vec gain = load_any(in.weight_D, half_weight, i, left);
      store_any(call.grad_x_MD, half, m * in.D + i, left, (grad_y * gain - z * mean) * inverse);
    }
  }
}

inline void gate(const jamba_gate_call &call, int64_t first, int64_t last) {
  const bool half = call.bfloat16 & JAMBA_U;
  for (int64_t m = first; m < last; m++) {
    for (int64_t i = 0; i < call.D; i += LANES) {
      const int64_t left = lanes_left(call.D, i);
      const Vec x = load_any(call.x_MD, half, m * call.x_stride + i, left);
      const Vec z = load_any(call.gate_MD, half, m * call.gate_stride + i, left);
      store_any(call.y_MD, half, m * call.D + i, left, x * z * sigmoid(z));
    }
  }
}

// With s = sigmoid(z): grad_x = grad_y z s,   grad_z = grad_y x s (1 + z (1 - s))
inline void gate_backward(const jamba_gate_backward_call &call, int64_t first, int64_t last) {
  const jamba_gate_call &in = call.forward;
  const bool half = in.bfloat16 & JAMBA_U;
  for (int64_t m = first; m < last; m++) {
    for (int64_t i = 0; i < in.D; i += LANES) {
      const int64_t left = lanes_left(in.D, i);
      const Vec x = load_any(in.x_MD, half, m * in.x_stride + i, left);
      const Vec z = load_any(in.gate_MD, half, m * in.gate_stride + i, left);
      const Vec grad_y = load_any(call.grad_y_MD, half, m * call.grad_y_stride + i, left);
      const Vec s = sigmoid(z);
      const int64_t out = m * in.D + i;
      store_any(call.grad_x_MD, half, out, left, grad_y * z * s);
      store_any(call.grad_gate_MD, half, out, left,
                grad_y * x * s * fma(z, set(1.0f) - s, set(1.0f)));
    }
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
