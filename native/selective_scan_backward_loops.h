// Gradients of the selective scan for blocks of LANES channels over one chunk.
//
// With G_t the gradient of h_t:   G_t = C_t dy_t + exp(dt_{t+1} A) G_{t+1}
//   dC_t = sum_c dy_t h_t          dB_t = sum_c G_t dt_t u_t
//   d(dt_t u_t) = sum_n G_t B_t    d(dt_t A) = G_t exp(dt_t A) h_{t-1}
// States are recomputed from the chunk's checkpoint; nothing longer than a chunk is kept.
#ifndef JAMBA_SELECTIVE_SCAN_BACKWARD_LOOPS_H
#define JAMBA_SELECTIVE_SCAN_BACKWARD_LOOPS_H

#include "selective_scan_loops.h"

namespace jamba::JAMBA_PATH {

constexpr int64_t CHUNK = CHECKPOINT_TOKENS;

// What one block needs of every token of a chunk, [token][lane] each.
struct BlockTokens {
  float dt[CHUNK * LANES], slope[CHUNK * LANES], u[CHUNK * LANES], grad_y[CHUNK * LANES];
  float grad_step[CHUNK * LANES], grad_input[CHUNK * LANES];  // by exp(dt A), by dt u
};

// Per (token, state): exp(dt A), exp(dt A) h_{t-1}, and the sums over blocks for B and C.
// With a chunk of 16 tokens and 8 states all of them fit in the first-level cache. They
// lie side by side because arrays a multiple of 4 KiB apart would make each load wait for
// the store before it, whose address has the same low bits.
struct TokenState {
  float decay[LANES], decayed[LANES], grad_B[LANES], grad_C[LANES];
};

struct ChunkStates {
  TokenState of[CHUNK][STATE_GROUP];
};

inline int64_t scan_backward_scratch(const jamba_scan_call &call, int64_t blocks) {
  const int64_t bytes = (int64_t)sizeof(ChunkStates) + blocks * (int64_t)sizeof(BlockTokens);
  return bytes / 4 + 2 * CHUNK * padded_states(call.N);
}

inline void scan_backward_begin(const jamba_scan_call &call, const ScanCarry &carry,
                                int64_t block) {
  states_to_lanes(carry.A + block * padded_states(call.N) * LANES,
                  call.A_CN + block * LANES * call.N, lanes_used(call, block), call.N);
}

// Rows outside, blocks inside, as in scan_strip.
inline void prepare_tokens(const jamba_scan_backward_call &call, const ScanChunk &chunk,
                           int64_t first, int64_t last, BlockTokens *tokens) {
  const jamba_scan_call &forward = call.forward;
  const bool u_bf16 = forward.bfloat16 & JAMBA_U, dt_bf16 = forward.bfloat16 & JAMBA_DT;
  for (int64_t t = 0; t < chunk.num_rows; t++) {
    const int64_t row = chunk.first_row + t;
    for (int64_t block = first; block < last; block++) {
      const int64_t channels = lanes_used(forward, block), c0 = block * LANES;
      BlockTokens &to = tokens[block - first];
      const Vec bias = load_any(forward.dt_bias_C, forward.bfloat16 & JAMBA_DT_BIAS, c0, channels);
      const SoftplusAndSlope dt = softplus_and_slope(
          load_any(forward.dt_MC, dt_bf16, row * forward.dt_stride + c0, channels) + bias);
      store(to.dt + t * LANES, dt.value);
      store(to.slope + t * LANES, dt.slope);
      store(to.u + t * LANES,
            load_any(forward.u_MC, u_bf16, row * forward.u_stride + c0, channels));
      store(to.grad_y + t * LANES,
            load_any(call.grad_y_MC, u_bf16, row * call.grad_y_stride + c0, channels));
      store(to.grad_step + t * LANES, Vec{});
      store(to.grad_input + t * LANES, Vec{});
    }
  }
}

// Recomputes h over the chunk, keeping what the way back needs; dC is done on the way.
JAMBA_INLINE void recompute_states(const BlockTokens &tokens, ChunkStates &states, const float *A,
                                   const float *checkpoint, Rows B, int64_t count) {
  constexpr int G = STATE_GROUP;
  Vec h[G], a[G];
  for (int n = 0; n < G; n++) h[n] = load(checkpoint + n * LANES), a[n] = load(A + n * LANES);
  for (int64_t t = 0; t < count; t++) {
    const Vec dt = load(tokens.dt + t * LANES), step = dt * LOG2_E;
    const Vec input = dt * load(tokens.u + t * LANES), grad_y = load(tokens.grad_y + t * LANES);
    const float *B_N = B.data + t * B.stride;
#pragma GCC unroll 8
    for (int n = 0; n < G; n++) {
      TokenState &state = states.of[t][n];
      const Vec decay = exp2_product(step, a[n]), decayed = decay * h[n];
      h[n] = fma(input, set(B_N[n]), decayed);
      store(state.decay, decay);
      store(state.decayed, decayed);
      store(state.grad_C, fma(grad_y, h[n], load(state.grad_C)));
    }
  }
}

JAMBA_INLINE void reverse_states(BlockTokens &tokens, ChunkStates &states, const float *A,
                                 float *grad_state, float *grad_A, Rows B, Rows C, int64_t count) {
  constexpr int G = STATE_GROUP;
  Vec g[G], sum_A[G];
  for (int n = 0; n < G; n++) {
    g[n] = load(grad_state + n * LANES), sum_A[n] = load(grad_A + n * LANES);
  }
  for (int64_t t = count - 1; t >= 0; t--) {
    const Vec dt = load(tokens.dt + t * LANES), grad_y = load(tokens.grad_y + t * LANES);
    const Vec input = dt * load(tokens.u + t * LANES);
    const float *B_N = B.data + t * B.stride, *C_N = C.data + t * C.stride;
    Vec grad_step = load(tokens.grad_step + t * LANES);
    Vec grad_input = load(tokens.grad_input + t * LANES);
#pragma GCC unroll 8
    for (int n = 0; n < G; n++) {
      TokenState &state = states.of[t][n];
      const Vec grad_h = fma(set(C_N[n]), grad_y, g[n]);
      store(state.grad_B, fma(grad_h, input, load(state.grad_B)));
      grad_input = fma(grad_h, set(B_N[n]), grad_input);
      const Vec grad_exponent = grad_h * load(state.decayed);
      grad_step = fma(grad_exponent, load(A + n * LANES), grad_step);
      sum_A[n] = fma(grad_exponent, dt, sum_A[n]);
      g[n] = grad_h * load(state.decay);
    }
    store(tokens.grad_step + t * LANES, grad_step);
    store(tokens.grad_input + t * LANES, grad_input);
  }
  for (int n = 0; n < G; n++) {
    store(grad_state + n * LANES, g[n]), store(grad_A + n * LANES, sum_A[n]);
  }
}

inline void finish_tokens(const jamba_scan_backward_call &call, const ScanChunk &chunk,
                          const ScanCarry &carry, int64_t first, int64_t last,
                          const BlockTokens *tokens) {
  const jamba_scan_call &forward = call.forward;
  for (int64_t t = chunk.num_rows - 1; t >= 0; t--) {
    for (int64_t block = first; block < last; block++) {
      const int64_t channels = lanes_used(forward, block), c0 = block * LANES;
      const BlockTokens &from = tokens[block - first];
      const Vec skip = load_any(forward.skip_C, forward.bfloat16 & JAMBA_SKIP, c0, channels);
      const Vec u = load(from.u + t * LANES), grad_y = load(from.grad_y + t * LANES);
      const Vec grad_input = load(from.grad_input + t * LANES);
      const Vec grad_dt =
          fma(grad_input, u, load(from.grad_step + t * LANES)) * load(from.slope + t * LANES);
      const Vec grad_u = fma(grad_input, load(from.dt + t * LANES), skip * grad_y);
      const int64_t at = (chunk.first_row + t) * forward.C + c0;
      store_any(call.grad_u_MC, forward.bfloat16 & JAMBA_U, at, channels, grad_u);
      store_any(call.grad_dt_MC, forward.bfloat16 & JAMBA_DT, at, channels, grad_dt);
      store(carry.grad_skip + c0, fma(grad_y, u, load(carry.grad_skip + c0)));
      store(carry.grad_dt_bias + c0, load(carry.grad_dt_bias + c0) + grad_dt);
    }
  }
}

// Adds up the lanes of `sums`, the first of its kind in states, into rows of padded states.
inline void sum_lanes(float *rows, const float *sums, int64_t padded, int64_t count) {
  constexpr int64_t G = STATE_GROUP, DISTANCE = sizeof(TokenState) / sizeof(float);
  for (int64_t i = 0; i < count * G; i += LANES) {
    Vec group[LANES];
    for (int l = 0; l < LANES; l++) group[l] = load(sums + (i + l) * DISTANCE);
    float totals[LANES];
    store(totals, sum_each(group));
    for (int64_t l = 0; l < LANES && i + l < count * G; l++) {
      rows[(i + l) / G * padded + (i + l) % G] = totals[l];
    }
  }
}

inline void scan_backward(const jamba_scan_backward_call &call, const ScanChunk &chunk,
                          const ScanCarry &carry, int64_t first, int64_t last, float *grad_B,
                          float *grad_C, float *scratch) {
  const jamba_scan_call &forward = call.forward;
  const int64_t N = forward.N, padded = padded_states(N), count = chunk.num_rows;
  ChunkStates &states = *(ChunkStates *)scratch;
  BlockTokens *tokens = (BlockTokens *)(scratch + sizeof(ChunkStates) / 4);
  float *B_scratch = (float *)(tokens + (last - first));
  const Rows B = widen_rows(forward.B_MN, forward.bfloat16 & JAMBA_B, forward.B_stride,
                            chunk.first_row, count, N, B_scratch);
  const Rows C = widen_rows(forward.C_MN, forward.bfloat16 & JAMBA_C, forward.C_stride,
                            chunk.first_row, count, N, B_scratch + CHUNK * padded);
  const auto state_at = [&](int64_t block) {
    return (chunk.sequence * forward.C + block * LANES) * N;
  };
  for (int64_t block = first; block < last; block++) {
    if (chunk.ends_sequence) {
      const float *from = call.grad_last_state_BCN;
      states_to_lanes(carry.grad_state + block * padded * LANES,
                      from ? from + state_at(block) : nullptr, lanes_used(forward, block), N);
    }
  }
  prepare_tokens(call, chunk, first, last, tokens);
  for (int64_t n = 0; n < padded; n += STATE_GROUP) {
    memset(&states, 0, sizeof states);
    for (int64_t block = first; block < last; block++) {
      const int64_t at = (block * padded + n) * LANES;
      recompute_states(tokens[block - first], states, carry.A + at,
                       checkpoint_at(forward, chunk.checkpoint, block, LANES) + n * LANES,
                       {B.data + n, B.stride}, count);
      reverse_states(tokens[block - first], states, carry.A + at, carry.grad_state + at,
                     carry.grad_A + at, {B.data + n, B.stride}, {C.data + n, C.stride}, count);
    }
    sum_lanes(grad_B + n, states.of[0][0].grad_B, padded, count);
    sum_lanes(grad_C + n, states.of[0][0].grad_C, padded, count);
  }
  finish_tokens(call, chunk, carry, first, last, tokens);
  if (chunk.begins_sequence && call.grad_state_BCN != nullptr) {
    for (int64_t block = first; block < last; block++) {
      lanes_to_states(call.grad_state_BCN + state_at(block),
                      carry.grad_state + block * padded * LANES, lanes_used(forward, block), N);
    }
  }
}

inline void scan_backward_end(const jamba_scan_backward_call &call, const ScanCarry &carry,
                              int64_t block) {
  const jamba_scan_call &forward = call.forward;
  const int64_t channels = lanes_used(forward, block), c0 = block * LANES;
  lanes_to_states(call.grad_A_CN + c0 * forward.N,
                  carry.grad_A + block * padded_states(forward.N) * LANES, channels, forward.N);
  store_any(call.grad_skip_C, false, c0, channels, load(carry.grad_skip + c0));
  store_any(call.grad_dt_bias_C, false, c0, channels, load(carry.grad_dt_bias + c0));
}

inline void store_row(void *array, bool bfloat16, int64_t index, int64_t count, const float *row) {
  for (int64_t n = 0; n < count; n += LANES) {
    const int64_t left = count - n < LANES ? count - n : LANES;
    store_any(array, bfloat16, index + n, left, load_any(row, false, n, left));
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
