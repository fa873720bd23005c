// The depthwise causal convolution: y_t = silu(bias + sum_w weight_w x_{t - L + w}).
// Lanes are channels. Sums are float32 and rounded once.
#ifndef JAMBA_CAUSAL_CONV_LOOPS_H
#define JAMBA_CAUSAL_CONV_LOOPS_H

#include "paths.h"
#include "vector_math.h"

namespace jamba::JAMBA_PATH {

constexpr int64_t MAX_WIDTH = 8;

// Blocks worked on side by side, so that a row is read 1 KiB at a time or more.
constexpr int64_t CONV_BLOCKS = 256 / LANES;

JAMBA_INLINE int64_t lanes_used(const jamba_conv_call &call, int64_t block) {
  const int64_t left = call.C - block * LANES;
  return left < LANES ? left : LANES;
}

// taps[w][lane] = weight[lane][w]
inline void taps_to_lanes(float *taps, const jamba_conv_call &call, int64_t block) {
  const int64_t channels = lanes_used(call, block), W = call.W;
  float flat[LANES * MAX_WIDTH] = {};
  for (int64_t i = 0; i < channels * W; i += LANES) {
    const int64_t left = channels * W - i < LANES ? channels * W - i : LANES;
    store(flat + i,
          load_any(call.weight_CW, call.bfloat16 & JAMBA_WEIGHT, block * LANES * W + i, left));
  }
  for (int64_t w = 0; w < W; w++) {
    Vec tap;
    for (int64_t c = 0; c < LANES; c++) tap[c] = flat[c * W + w];
    store(taps + w * LANES, tap);
  }
}

// Where the input of `sequence` at token `t` lies, t < 0 being in the incoming state.
struct InputRow {
  const void *array;
  int64_t index;
};

JAMBA_INLINE InputRow input_row(const jamba_conv_call &call, int64_t sequence, int64_t t) {
  if (t >= 0) return {call.x_MC, (call.offsets[sequence] + t) * call.x_stride};
  const int64_t L = call.W - 1;
  return {call.state_BLC, (sequence * L + L + t) * call.C};
}

JAMBA_INLINE Vec load_input(const jamba_conv_call &call, InputRow row, int64_t block) {
  if (row.array == nullptr) return Vec{};
  return load_any(row.array, call.bfloat16 & JAMBA_U, row.index + block * LANES,
                  lanes_used(call, block));
}

inline int64_t conv_scratch(const jamba_conv_call &call) {
  return CONV_BLOCKS * (call.W + 1) * LANES;
}

// Copies the last L inputs, of which the first ones may be of the incoming state.
inline void keep_last_inputs(const jamba_conv_call &call, int64_t sequence, int64_t tokens) {
  const int64_t L = call.W - 1;
  const size_t size = call.bfloat16 & JAMBA_U ? 2 : 4;
  for (int64_t i = 0; i < L; i++) {
    const InputRow from = input_row(call, sequence, tokens - L + i);
    char *to = (char *)call.last_state_BLC + (size_t)((sequence * L + i) * call.C) * size;
    if (from.array == nullptr) {
      memset(to, 0, (size_t)call.C * size);
    } else {
      memcpy(to, (const char *)from.array + (size_t)from.index * size, (size_t)call.C * size);
    }
  }
}

template <int W>
inline void conv_width(const jamba_conv_call &call, int64_t sequence, int64_t first, int64_t last,
                       float *scratch) {
  const int64_t blocks = divide_up(call.C, LANES), start = call.offsets[sequence];
  float *bias = scratch, *taps = scratch + CONV_BLOCKS * LANES;
  for (int64_t strip = 0; strip < blocks; strip += CONV_BLOCKS) {
    const int64_t strip_end = strip + CONV_BLOCKS < blocks ? strip + CONV_BLOCKS : blocks;
    for (int64_t block = strip; block < strip_end; block++) {
      taps_to_lanes(taps + (block - strip) * W * LANES, call, block);
      store(bias + (block - strip) * LANES, call.bias_C
                                                ? load_any(call.bias_C, call.bfloat16 & JAMBA_BIAS,
                                                           block * LANES, lanes_used(call, block))
                                                : Vec{});
    }
    for (int64_t row = first; row < last; row++) {
      InputRow rows[W];
      for (int w = 0; w < W; w++) rows[w] = input_row(call, sequence, row - start - (W - 1) + w);
      for (int64_t block = strip; block < strip_end; block++) {
        const float *tap = taps + (block - strip) * W * LANES;
        Vec sum = load(bias + (block - strip) * LANES);
        for (int w = 0; w < W; w++) {
          sum = fma(load(tap + w * LANES), load_input(call, rows[w], block), sum);
        }
        if (call.silu) sum = sum * sigmoid(sum);
        store_any(call.y_MC, call.bfloat16 & JAMBA_U, row * call.C + block * LANES,
                  lanes_used(call, block), sum);
      }
    }
  }
  if (last == call.offsets[sequence + 1]) keep_last_inputs(call, sequence, last - start);
}

// One pass over each sequence: at token t the gradient g_t of the sum becomes known, and
// with the W latest of them that of input t - L. Past the end g is zero, so L more steps
// finish the last inputs; those before the start are the incoming state.
template <int W>
inline void conv_backward_width(const jamba_conv_backward_call &call, int64_t block) {
  constexpr int L = W - 1;
  const jamba_conv_call &forward = call.forward;
  const int64_t channels = lanes_used(forward, block), c0 = block * LANES;
  const bool bf16 = forward.bfloat16 & JAMBA_U;
  float taps[W * LANES];
  taps_to_lanes(taps, forward, block);
  Vec tap[W], sum_tap[W] = {}, sum_bias = {};
  for (int w = 0; w < W; w++) tap[w] = load(taps + w * LANES);
  const Vec bias = forward.bias_C
                       ? load_any(forward.bias_C, forward.bfloat16 & JAMBA_BIAS, c0, channels)
                       : Vec{};
  for (int64_t b = 0; b < forward.B; b++) {
    const int64_t start = forward.offsets[b], tokens = forward.offsets[b + 1] - start;
    Vec x[W] = {}, g[W] = {};  // x_{t - L} .. x_t and g_{t - L} .. g_t
    for (int w = 1; w < W; w++) x[w] = load_input(forward, input_row(forward, b, w - W), block);
    for (int64_t t = 0; t < tokens + L; t++) {
      for (int w = 0; w < L; w++) x[w] = x[w + 1], g[w] = g[w + 1];
      if (t < tokens) {
        x[L] = load_input(forward, input_row(forward, b, t), block);
        g[L] = load_any(call.grad_y_MC, bf16, (start + t) * call.grad_y_stride + c0, channels);
        if (forward.silu) {
          Vec z = bias;
          for (int w = 0; w < W; w++) z = fma(tap[w], x[w], z);
          const Vec s = sigmoid(z);
          g[L] = g[L] * (s * fma(z, 1.0f - s, set(1.0f)));
        }
        for (int w = 0; w < W; w++) sum_tap[w] = fma(g[L], x[w], sum_tap[w]);
        sum_bias += g[L];
      } else {
        g[L] = Vec{};
      }
      const int64_t input = t - L;
      Vec grad_x = {};
      for (int w = 0; w < W; w++) grad_x = fma(tap[w], g[L - w], grad_x);
      if (input >= tokens - L && call.grad_last_state_BLC != nullptr) {
        const int64_t kept = input - (tokens - L);
        grad_x +=
            load_any(call.grad_last_state_BLC, bf16, (b * L + kept) * forward.C + c0, channels);
      }
      if (input >= 0) {
        store_any(call.grad_x_MC, bf16, (start + input) * forward.C + c0, channels, grad_x);
      } else if (call.grad_state_BLC != nullptr) {
        store_any(call.grad_state_BLC, bf16, (b * L + L + input) * forward.C + c0, channels,
                  grad_x);
      }
    }
  }
  for (int64_t c = 0; c < channels; c++) {
    for (int w = 0; w < W; w++) call.grad_weight_CW[(c0 + c) * W + w] = sum_tap[w][c];
  }
  store_any(call.grad_bias_C, false, c0, channels, sum_bias);
}

// Runs `one(W)` with W as a compile-time constant.
template <int W = 1, typename One>
inline void with_width(int64_t width, const One &one) {
  if constexpr (W <= MAX_WIDTH) {
    if (width == W) {
      one.template operator()<W>();
    } else {
      with_width<W + 1>(width, one);
    }
  }
}

inline void conv(const jamba_conv_call &call, int64_t sequence, int64_t first, int64_t last,
                 float *scratch) {
  with_width(call.W, [&]<int W>() { conv_width<W>(call, sequence, first, last, scratch); });
}

inline void conv_backward(const jamba_conv_backward_call &call, int64_t block) {
  with_width(call.forward.W, [&]<int W>() { conv_backward_width<W>(call, block); });
}

}  // namespace jamba::JAMBA_PATH
#endif
