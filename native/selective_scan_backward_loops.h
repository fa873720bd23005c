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

// States that backward works on at a time: half a group, so that what it keeps of a chunk
// takes less than half of the first-level cache.
constexpr int64_t FEW_STATES = STATE_GROUP / 2;

// Per (token, state): exp(dt A), exp(dt A) h_{t-1}, and the sums over blocks for B and C.
struct TokenState {
  float decay[LANES], decayed[LANES], grad_B[LANES], grad_C[LANES];
  // An odd number of cache lines: with four, each load waits for stores of a few tokens ago
  // whose addresses have the same low 12 bits, and backward takes a quarter longer.
  float unused[LANES];
};

struct ChunkStates {
  TokenState of[CHUNK][FEW_STATES];
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

template <bool U_BFLOAT16, bool DT_BFLOAT16>
inline void prepare_backward(const jamba_scan_backward_call &call, const ScanChunk &chunk,
                             int64_t block, Vec bias, BlockTokens &tokens) {
  const jamba_scan_call &forward = call.forward;
  const int64_t c0 = block * LANES, left = forward.C - c0;
  for (int64_t t = 0; t < chunk.num_rows; t++) {
    const int64_t row = chunk.first_row + t, u_at = row * forward.u_stride + c0;
    const int64_t dt_at = row * forward.dt_stride + c0, y_at = row * call.grad_y_stride + c0;
    const SoftplusAndSlope dt =
        softplus_and_slope(load_as<DT_BFLOAT16>(forward.dt_MC, dt_at, left) + bias);
    store(tokens.dt + t * LANES, dt.value);
    store(tokens.slope + t * LANES, dt.slope);
    store(tokens.u + t * LANES, load_as<U_BFLOAT16>(forward.u_MC, u_at, left));
    store(tokens.grad_y + t * LANES, load_as<U_BFLOAT16>(call.grad_y_MC, y_at, left));
    store(tokens.grad_step + t * LANES, Vec{});
    store(tokens.grad_input + t * LANES, Vec{});
  }
}

inline void prepare_backward_of_any(const jamba_scan_backward_call &call, const ScanChunk &chunk,
                                    int64_t block, BlockTokens &tokens) {
  const jamba_scan_call &forward = call.forward;
  const int64_t c0 = block * LANES;
  const Vec bias =
      load_any(forward.dt_bias_C, forward.bfloat16 & JAMBA_DT_BIAS, c0, forward.C - c0);
  const bool u = forward.bfloat16 & JAMBA_U, dt = forward.bfloat16 & JAMBA_DT;
  const auto prepare = u ? (dt ? prepare_backward<true, true> : prepare_backward<true, false>)
                         : (dt ? prepare_backward<false, true> : prepare_backward<false, false>);
  prepare(call, chunk, block, bias, tokens);
}

// Rows of one block in one array that the work will soon reach. They are far apart, which no
// hardware prefetcher follows, and asking for all of them at once would wait for the few
// requests that a core can have under way: the loop over tokens asks for one at a time.
struct Ahead {
  const char *row;
  int64_t stride;

  // Into the second-level cache: the first is full of the chunk at hand.
  JAMBA_INLINE void fetch(int64_t t) const { __builtin_prefetch(row + t * stride, 0, 2); }
};

// A block is passed over once for each FEW_STATES states; each pass asks for another of the
// five large arrays, the first for two. With fewer passes some are not asked for.
struct PassAhead {
  Ahead one, other;
};

inline PassAhead rows_ahead(const jamba_scan_backward_call &call, const ScanChunk &chunk,
                            int64_t block, ScanPlace next, int64_t pass) {
  const jamba_scan_call &forward = call.forward;
  const int64_t u_size = forward.bfloat16 & JAMBA_U ? 2 : 4;
  const int64_t dt_size = forward.bfloat16 & JAMBA_DT ? 2 : 4;
  const auto rows = [&](const void *array, int64_t size, int64_t stride, ScanPlace place) {
    const int64_t at = place.row * stride + place.block * LANES;
    return Ahead{(const char *)array + at * size, stride * size};
  };
  const ScanPlace here = {chunk.first_row, block};
  Ahead one;
  switch (pass) {
    case 0:
      return {rows(forward.u_MC, u_size, forward.u_stride, next),
              rows(call.grad_y_MC, u_size, call.grad_y_stride, next)};
    case 1: one = rows(forward.dt_MC, dt_size, forward.dt_stride, next); break;
    case 2: one = rows(call.grad_u_MC, u_size, forward.C, here); break;
    default: one = rows(call.grad_dt_MC, dt_size, forward.C, here); break;
  }
  return {one, one};
}

// Recomputes h over the chunk, keeping what the way back needs; dC is done on the way.
template <bool FIRST>
inline void recompute_states(const BlockTokens &tokens, ChunkStates &states, const float *A,
                             const float *checkpoint, Rows B, int64_t count,
                             const PassAhead &ahead) {
  constexpr int G = FEW_STATES;
  Vec h[G], a[G];
  for (int n = 0; n < G; n++) h[n] = load(checkpoint + n * LANES), a[n] = load(A + n * LANES);
  for (int64_t t = 0; t < count; t++) {
    const Vec dt = load(tokens.dt + t * LANES), step = dt * LOG2_E;
    const Vec input = dt * load(tokens.u + t * LANES), grad_y = load(tokens.grad_y + t * LANES);
    const float *B_N = B.data + t * B.stride;
    ahead.one.fetch(t);
    ahead.other.fetch(t);
#pragma GCC unroll 4
    for (int n = 0; n < G; n++) {
      TokenState &state = states.of[t][n];
      const Vec decay = exp2_product(step, a[n]), decayed = decay * h[n];
      h[n] = fma(input, set(B_N[n]), decayed);
      store(state.decay, decay);
      store(state.decayed, decayed);
      store(state.grad_C, FIRST ? grad_y * h[n] : fma(grad_y, h[n], load(state.grad_C)));
    }
  }
}

template <bool FIRST>
inline void reverse_states(BlockTokens &tokens, ChunkStates &states, const float *A,
                           float *grad_state, float *grad_A, Rows B, Rows C, int64_t count) {
  constexpr int G = FEW_STATES;
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
#pragma GCC unroll 4
    for (int n = 0; n < G; n++) {
      TokenState &state = states.of[t][n];
      const Vec grad_h = fma(set(C_N[n]), grad_y, g[n]);
      store(state.grad_B, FIRST ? grad_h * input : fma(grad_h, input, load(state.grad_B)));
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

inline void finish_backward(const jamba_scan_backward_call &call, const ScanChunk &chunk,
                            const ScanCarry &carry, int64_t block, const BlockTokens &tokens) {
  const jamba_scan_call &forward = call.forward;
  const int64_t c0 = block * LANES, left = forward.C - c0;
  const Vec skip = load_any(forward.skip_C, forward.bfloat16 & JAMBA_SKIP, c0, left);
  Vec sum_skip = load(carry.grad_skip + c0), sum_bias = load(carry.grad_dt_bias + c0);
  for (int64_t t = chunk.num_rows - 1; t >= 0; t--) {
    const Vec u = load(tokens.u + t * LANES), grad_y = load(tokens.grad_y + t * LANES);
    const Vec grad_input = load(tokens.grad_input + t * LANES);
    const Vec grad_dt =
        fma(grad_input, u, load(tokens.grad_step + t * LANES)) * load(tokens.slope + t * LANES);
    const Vec grad_u = fma(grad_input, load(tokens.dt + t * LANES), skip * grad_y);
    const int64_t at = (chunk.first_row + t) * forward.C + c0;
    store_any(call.grad_u_MC, forward.bfloat16 & JAMBA_U, at, left, grad_u);
    store_any(call.grad_dt_MC, forward.bfloat16 & JAMBA_DT, at, left, grad_dt);
    sum_skip = fma(grad_y, u, sum_skip);
    sum_bias += grad_dt;
  }
  store(carry.grad_skip + c0, sum_skip);
  store(carry.grad_dt_bias + c0, sum_bias);
}

// Adds up the lanes of `sums`, the first of its kind in states, into rows of padded states.
inline void sum_lanes(float *rows, const float *sums, int64_t padded, int64_t count) {
  constexpr int64_t G = FEW_STATES, DISTANCE = sizeof(TokenState) / sizeof(float);
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
                          const ScanCarry &carry, int64_t first, int64_t last, ScanPlace next,
                          float *grad_B, float *grad_C, float *scratch) {
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
    prepare_backward_of_any(call, chunk, block, tokens[block - first]);
  }
  for (int64_t n = 0; n < padded; n += FEW_STATES) {
    for (int64_t block = first; block < last; block++) {
      const int64_t at = (block * padded + n) * LANES;
      const ScanPlace place = {next.row, next.block + block - first};
      const PassAhead ahead = rows_ahead(call, chunk, block, place, n / FEW_STATES);
      const auto recompute = block == first ? recompute_states<true> : recompute_states<false>;
      recompute(tokens[block - first], states, carry.A + at,
                checkpoint_at(forward, chunk.checkpoint, block, LANES) + n * LANES,
                {B.data + n, B.stride}, count, ahead);
      const auto reverse = block == first ? reverse_states<true> : reverse_states<false>;
      reverse(tokens[block - first], states, carry.A + at, carry.grad_state + at, carry.grad_A + at,
              {B.data + n, B.stride}, {C.data + n, C.stride}, count);
    }
    sum_lanes(grad_B + n, states.of[0][0].grad_B, padded, count);
    sum_lanes(grad_C + n, states.of[0][0].grad_C, padded, count);
  }
  for (int64_t block = first; block < last; block++) {
    finish_backward(call, chunk, carry, block, tokens[block - first]);
    if (chunk.begins_sequence && call.grad_state_BCN != nullptr) {
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
