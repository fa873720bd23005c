// Mamba, Algorithm 2, for one block of LANES channels: lanes are channels, so every
// lane is an independent recurrence and only the gradients of B and C add lanes up.
//
// Inner products run over states in registers. Each (token, state) costs, with
// AVX-512, eleven vector instructions forward (eight for the exponential, two for h, one
// for y) and eighteen backward (ten to recompute h, eight for gradients).
#ifndef JAMBA_SELECTIVE_SCAN_LOOPS_H
#define JAMBA_SELECTIVE_SCAN_LOOPS_H

#include "paths.h"
#include "vector_math.h"

namespace jamba::JAMBA_PATH {

// Up to this many tokens, turning the states of LANES channels around so that lanes
// are channels costs more than it saves; lanes are states then.
constexpr int64_t FEW_TOKENS = 8;

JAMBA_INLINE int64_t lanes_used(const jamba_scan_call &call, int64_t block) {
  const int64_t left = call.C - block * LANES;
  return left < LANES ? left : LANES;
}

// out[n][lane] = in[lane][n], zero where the block or N is padded.
inline void states_to_lanes(float *out, const float *in_CN, int64_t channels, int64_t N) {
  const int64_t padded = padded_states(N);
  memset(out, 0, (size_t)(padded * LANES) * sizeof *out);
  if (in_CN == nullptr) return;
  for (int64_t c = 0; c < channels; c++) {
    for (int64_t n = 0; n < N; n++) out[n * LANES + c] = in_CN[c * N + n];
  }
}

inline void lanes_to_states(float *out_CN, const float *in, int64_t channels, int64_t N) {
  for (int64_t c = 0; c < channels; c++) {
    for (int64_t n = 0; n < N; n++) out_CN[c * N + n] = in[n * LANES + c];
  }
}

// Rows of B or C as float32 with padded states; used where they lie when they already are.
struct Rows {
  const float *data;
  int64_t stride;
};

inline Rows widen_rows(const void *array, bool bfloat16, int64_t stride, int64_t first,
                       int64_t count, int64_t N, float *scratch) {
  const int64_t padded = padded_states(N);
  if (!bfloat16 && padded == N) return {(const float *)array + first * stride, stride};
  for (int64_t t = 0; t < count; t++) {
    float *row = scratch + t * padded;
    for (int64_t n = 0; n < N; n++) {
      const int64_t i = (first + t) * stride + n;
      if (bfloat16) {
        const uint32_t bits = (uint32_t)((const uint16_t *)array)[i] << 16;
        memcpy(row + n, &bits, sizeof bits);
      } else {
        row[n] = ((const float *)array)[i];
      }
    }
    for (int64_t n = N; n < padded; n++) row[n] = 0.0f;
  }
  return {scratch, padded};
}

// What one block keeps of every token of a chunk.
struct ForwardTokens {
  float steps[FORWARD_TOKENS * LANES];   // dt log2(e), so that exp(dt A) is 2^(step A)
  float inputs[FORWARD_TOKENS * LANES];  // dt u
  float y[FORWARD_TOKENS * LANES];
};

// Reads for one block are a row apart, which no hardware prefetcher follows: each asks for
// what the next block will read, and for what this block will write when it is done.
template <bool BFLOAT16>
JAMBA_INLINE void prefetch_at(const void *array, int64_t index) {
  __builtin_prefetch((const char *)array + index * (BFLOAT16 ? 2 : 4));
}

template <bool BFLOAT16>
JAMBA_INLINE void prefetch_after(const void *array, int64_t index) {
  prefetch_at<BFLOAT16>(array, index + LANES);
}

template <bool U_BFLOAT16, bool DT_BFLOAT16>
inline void prepare_tokens(const jamba_scan_call &call, int64_t block, int64_t row, int64_t count,
                           Vec bias, Vec skip, ForwardTokens &tokens) {
  const int64_t c0 = block * LANES, left = call.C - c0;
  for (int64_t t = 0; t < count; t++) {
    const int64_t u_at = (row + t) * call.u_stride + c0, dt_at = (row + t) * call.dt_stride + c0;
    prefetch_after<U_BFLOAT16>(call.u_MC, u_at);
    prefetch_after<DT_BFLOAT16>(call.dt_MC, dt_at);
    prefetch_at<U_BFLOAT16>(call.y_MC, (row + t) * call.C + c0);
    const Vec u = load_as<U_BFLOAT16>(call.u_MC, u_at, left);
    const Vec dt = softplus(load_as<DT_BFLOAT16>(call.dt_MC, dt_at, left) + bias);
    store(tokens.steps + t * LANES, dt * LOG2_E);
    store(tokens.inputs + t * LANES, dt * u);
    store(tokens.y + t * LANES, skip * u);
  }
}

inline void prepare_tokens_of_any(const jamba_scan_call &call, int64_t block, int64_t row,
                                  int64_t count, ForwardTokens &tokens) {
  const int64_t c0 = block * LANES, left = call.C - c0;
  const Vec bias = load_any(call.dt_bias_C, call.bfloat16 & JAMBA_DT_BIAS, c0, left);
  const Vec skip = load_any(call.skip_C, call.bfloat16 & JAMBA_SKIP, c0, left);
  const bool u = call.bfloat16 & JAMBA_U, dt = call.bfloat16 & JAMBA_DT;
  const auto prepare = u ? (dt ? prepare_tokens<true, true> : prepare_tokens<true, false>)
                         : (dt ? prepare_tokens<false, true> : prepare_tokens<false, false>);
  prepare(call, block, row, count, bias, skip, tokens);
}

// STATE_GROUP states over `count` tokens; what they add to y is added there.
inline void scan_states(ForwardTokens &tokens, Rows B, Rows C, const float *A, float *state,
                        int64_t count) {
  constexpr int G = STATE_GROUP;
  Vec h[G], a[G];
  for (int n = 0; n < G; n++) h[n] = load(state + n * LANES), a[n] = load(A + n * LANES);
  for (int64_t t = 0; t < count; t++) {
    const Vec step = load(tokens.steps + t * LANES), input = load(tokens.inputs + t * LANES);
    const float *B_N = B.data + t * B.stride, *C_N = C.data + t * C.stride;
    Vec even = load(tokens.y + t * LANES), odd = {};
#pragma GCC unroll 8
    for (int n = 0; n < G; n++) {
      h[n] = fma(input, set(B_N[n]), exp2_product(step, a[n]) * h[n]);
      Vec &sum = n % 2 == 0 ? even : odd;
      sum = fma(set(C_N[n]), h[n], sum);
    }
    store(tokens.y + t * LANES, even + odd);
  }
  for (int n = 0; n < G; n++) store(state + n * LANES, h[n]);
}

// Blocks [first, last) over a whole sequence. Tokens are the outer loop: a row of one block
// is a single cache line in a page of its own, and only while few rows are in use do their
// pages stay known to the processor.
inline void scan_many_tokens(const jamba_scan_call &call, int64_t sequence, int64_t checkpoint,
                             int64_t first, int64_t last, float *scratch) {
  const int64_t N = call.N, padded = padded_states(N), per_block = padded * LANES;
  ForwardTokens &tokens = *(ForwardTokens *)scratch;
  float *B_scratch = scratch + sizeof(ForwardTokens) / sizeof(float);
  float *C_scratch = B_scratch + FORWARD_TOKENS * padded;
  float *A = C_scratch + FORWARD_TOKENS * padded, *state = A + (last - first) * per_block;

  const auto state_at = [&](int64_t block) { return (sequence * call.C + block * LANES) * N; };
  for (int64_t block = first; block < last; block++) {
    const int64_t at = (block - first) * per_block, channels = lanes_used(call, block);
    states_to_lanes(A + at, call.A_CN + block * LANES * N, channels, N);
    states_to_lanes(state + at, call.state_BCN ? call.state_BCN + state_at(block) : nullptr,
                    channels, N);
  }
  const int64_t end = call.offsets[sequence + 1];
  for (int64_t row = call.offsets[sequence]; row < end; row += FORWARD_TOKENS) {
    const int64_t count = end - row < FORWARD_TOKENS ? end - row : FORWARD_TOKENS;
    const Rows B =
        widen_rows(call.B_MN, call.bfloat16 & JAMBA_B, call.B_stride, row, count, N, B_scratch);
    const Rows C =
        widen_rows(call.C_MN, call.bfloat16 & JAMBA_C, call.C_stride, row, count, N, C_scratch);
    for (int64_t block = first; block < last; block++) {
      const int64_t at = (block - first) * per_block;
      prepare_tokens_of_any(call, block, row, count, tokens);
      if (call.checkpoints != nullptr) {
        memcpy(checkpoint_at(call, checkpoint, block, LANES), state + at,
               (size_t)per_block * sizeof(float));
      }
      for (int64_t n = 0; n < padded; n += STATE_GROUP) {
        scan_states(tokens, {B.data + n, B.stride}, {C.data + n, C.stride}, A + at + n * LANES,
                    state + at + n * LANES, count);
      }
      for (int64_t t = 0; t < count; t++) {
        store_any(call.y_MC, call.bfloat16 & JAMBA_U, (row + t) * call.C + block * LANES,
                  call.C - block * LANES, load(tokens.y + t * LANES));
      }
    }
    checkpoint++;
  }
  for (int64_t block = first; block < last; block++) {
    lanes_to_states(call.last_state_BCN + state_at(block), state + (block - first) * per_block,
                    lanes_used(call, block), N);
  }
}

// One block with lanes as states, for a decode step: states stay where they lie in memory.
inline void scan_few_tokens(const jamba_scan_call &call, int64_t sequence, int64_t block,
                            float *scratch) {
  const int64_t N = call.N, channels = lanes_used(call, block), c0 = block * LANES;
  const Vec bias = load_any(call.dt_bias_C, call.bfloat16 & JAMBA_DT_BIAS, c0, channels);
  const Vec skip = load_any(call.skip_C, call.bfloat16 & JAMBA_SKIP, c0, channels);
  const int64_t state_at = (sequence * call.C + c0) * N;
  const float *state = call.state_BCN ? call.state_BCN + state_at : nullptr;
  float *last_state = call.last_state_BCN + state_at;
  for (int64_t row = call.offsets[sequence]; row < call.offsets[sequence + 1]; row++) {
    const Vec u = load_any(call.u_MC, call.bfloat16 & JAMBA_U, row * call.u_stride + c0, channels);
    const Vec dt = softplus(
        load_any(call.dt_MC, call.bfloat16 & JAMBA_DT, row * call.dt_stride + c0, channels) + bias);
    const Vec steps = dt * LOG2_E, inputs = dt * u;
    const Rows B =
        widen_rows(call.B_MN, call.bfloat16 & JAMBA_B, call.B_stride, row, 1, N, scratch);
    const Rows C = widen_rows(call.C_MN, call.bfloat16 & JAMBA_C, call.C_stride, row, 1, N,
                              scratch + padded_states(N));
    Vec products[LANES] = {};
    for (int64_t c = 0; c < channels; c++) {
      const float *A_N = call.A_CN + (c0 + c) * N;
      for (int64_t n = 0; n < N; n += LANES) {
        Vec h = state ? load(state + c * N + n) : Vec{};
        h = fma(set(inputs[c]), load(B.data + n), exp2_product(set(steps[c]), load(A_N + n)) * h);
        store(last_state + c * N + n, h);
        products[c] = fma(h, load(C.data + n), products[c]);
      }
    }
    store_any(call.y_MC, call.bfloat16 & JAMBA_U, row * call.C + c0, channels,
              fma(skip, u, sum_each(products)));
    state = last_state;
  }
}

// Room for `blocks` blocks at a time.
inline int64_t scan_scratch(const jamba_scan_call &call, int64_t blocks) {
  const int64_t padded = padded_states(call.N);
  return (int64_t)(sizeof(ForwardTokens) / sizeof(float)) + 2 * FORWARD_TOKENS * padded +
         2 * blocks * padded * LANES;
}

inline void scan(const jamba_scan_call &call, int64_t sequence, int64_t checkpoint, int64_t first,
                 int64_t last, float *scratch) {
  const int64_t tokens = call.offsets[sequence + 1] - call.offsets[sequence];
  if (tokens <= FEW_TOKENS && call.N % LANES == 0 && call.checkpoints == nullptr) {
    for (int64_t block = first; block < last; block++) {
      scan_few_tokens(call, sequence, block, scratch);
    }
  } else {
    scan_many_tokens(call, sequence, checkpoint, first, last, scratch);
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
