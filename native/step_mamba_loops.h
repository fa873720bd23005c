// A Mamba layer for a few tokens: convolution, selection, scan and gate from what each sequence
// remembers to what it will remember.
#ifndef JAMBA_STEP_MAMBA_LOOPS_H
#define JAMBA_STEP_MAMBA_LOOPS_H

#include "step_parts.h"

namespace jamba::JAMBA_PATH {

// Convolution and SiLU of the channels in `range` for one sequence; `in` is [M][PIECE].
inline void convolve(const Step &step, const jamba_layer &layer, const jamba_memory &memory,
                     int64_t b, Range range, const float *in, float *window) {
  const jamba_model &model = step.model;
  const bool half = model.bfloat16;
  const int64_t L = model.W - 1, C = model.C, first = step.call.offsets[b];
  const int64_t rows = step.call.offsets[b + 1] - first;
  for (int64_t c = range.first; c < range.last; c += LANES) {
    const int64_t left = lanes_left(C, c), at = c - range.first;
    for (int64_t t = 0; t < L; t++) {
      store(window + t * PIECE + at, load_any(memory.conv_LC, half, t * C + c, left));
    }
    for (int64_t t = 0; t < rows; t++) {
      // What the window will hold is what is convolved now: else the split would show.
      const Vec x = load_any(in, false, (first + t) * PIECE + at, left);
      store(window + (L + t) * PIECE + at, rounded_as(half, x));
    }
    const Vec bias =
        layer.conv_bias_C == nullptr ? Vec{} : load_any(layer.conv_bias_C, false, c, left);
    for (int64_t t = 0; t < rows; t++) {
      Vec sum = bias;
      for (int64_t w = 0; w < model.W; w++) {
        const Vec tap = load_any(layer.conv_WC, false, w * C + c, left);
        sum = fma(load(window + (t + w) * PIECE + at), tap, sum);
      }
      store_any(step.shared.u, false, (first + t) * C + c, left, sum * sigmoid(sum));
    }
    for (int64_t t = 0; t < L; t++) {
      store_any(memory.next_conv_LC, half, t * C + c, left, load(window + (rows + t) * PIECE + at));
    }
  }
}

// Scan, skip and gate of the channels in `range` for one sequence; `dt` is [M][PIECE], before
// its bias. Lanes are states, which stay where they lie in memory.
inline void scan_and_gate(const Step &step, const jamba_layer &layer, const jamba_memory &memory,
                          int64_t b, Range range, const float *dt_MP, const float *B_MN,
                          const float *C_MN) {
  const jamba_model &model = step.model;
  const int64_t C = model.C, N = model.N;
  for (int64_t c = range.first; c < range.last; c += LANES) {
    const int64_t channels = lanes_left(C, c);
    const Vec bias = load_any(layer.dt_bias_C, false, c, channels);
    const Vec skip = load_any(layer.skip_C, false, c, channels);
    const float *state = memory.scan_CN + c * N;
    float *next = memory.next_scan_CN + c * N;
    for (int64_t m = step.call.offsets[b]; m < step.call.offsets[b + 1]; m++) {
      const Vec u = load_any(step.shared.u, false, m * C + c, channels);
      const Vec dt = softplus(load(dt_MP + m * PIECE + c - range.first) + bias);
      const Vec steps = dt * LOG2_E, inputs = dt * u;
      Vec products[LANES] = {};
      for (int64_t lane = 0; lane < channels; lane++) {
        for (int64_t n = 0; n < N; n += LANES) {
          const int64_t left = lanes_left(N, n), at = lane * N + n;
          const Vec A = load_any(layer.A_CN, false, c * N + at, left);
          const Vec B = load_any(B_MN, false, m * N + n, left);
          Vec h = load_any(state, false, at, left);
          h = fma(set(inputs[lane]), B, exp2_product(set(steps[lane]), A) * h);
          store_any(next, false, at, left, h);
          products[lane] = fma(h, load_any(C_MN, false, m * N + n, left), products[lane]);
        }
      }
      const Vec y = fma(skip, u, sum_each(products));
      const Vec z = load_any(step.shared.gate, false, m * C + c, channels);
      store_any(step.shared.y, false, m * C + c, channels, y * z * sigmoid(z));
      state = next;
    }
  }
}

inline void mamba_layer(Step &step, const jamba_layer &layer, const jamba_memory *memories) {
  const jamba_model &model = step.model;
  const int64_t M = step.call.M, B = step.call.B, C = model.C, N = model.N, R = model.R;
  const StepBuffers &shared = step.shared;

  norm_stream(step, layer.mixer_norm_D);
  Timeline &timeline = step.team.timeline;
  timeline.turn_to(JAMBA_IN_PROJ, JAMBA_CUTS_ROWS);
  const Operand x = prepare_operand(step.kernels, layer.in_proj, step.normed, model.D, M,
                                    model.bfloat16, step.operand);
  const int64_t channel_pieces = divide_up(C, PIECE), width = R + 2 * N;
  // Small pieces: there are few outputs, and each is long.
  const int64_t selection_pieces = divide_up(width, TILE);
  const auto project = [&](int64_t piece, int64_t next) {
    const Range range = piece_of(C, piece);
    float *in = step.local, *window = in + M * PIECE;
    timeline.turn_to(JAMBA_IN_PROJ);
    multiply(layer.in_proj, range.first, range.last, x, FIRST_ROWS, M, in, PIECE,
             weights_of(layer.in_proj, C + range.first));
    multiply(layer.in_proj, C + range.first, C + range.last, x, FIRST_ROWS, M,
             shared.gate + range.first, C, weights_of_piece(layer.in_proj, next));
    timeline.turn_to(JAMBA_CONVOLUTION);
    for (int64_t b = 0; b < B; b++) convolve(step, layer, memories[b], b, range, in, window);
  };
  step.team.share_runs(channel_pieces, project,
                       [&] { fetch_start(step, layer.x_proj, selection_pieces, TILE); });

  timeline.turn_to(JAMBA_X_PROJ, JAMBA_CUTS_ROWS);
  const Operand u =
      prepare_operand(step.kernels, layer.x_proj, shared.u, C, M, model.bfloat16, step.operand);
  timeline.turn_to(JAMBA_X_PROJ);
  const auto select = [&](int64_t piece, int64_t next) {
    const int64_t first = piece * TILE, last = first + TILE < width ? first + TILE : width;
    multiply(layer.x_proj, first, last, u, FIRST_ROWS, M, shared.selection + first, width,
             weights_of_piece(layer.x_proj, next, TILE));
  };
  step.team.share_runs(selection_pieces, select,
                       [&] { fetch_start(step, layer.dt_proj, channel_pieces); });

  timeline.turn_to(JAMBA_NORMS);
  float *dt_MR = step.normed, *B_MN = dt_MR + M * R, *C_MN = B_MN + M * N;
  const float epsilon = (float)model.epsilon;
  for (int64_t m = 0; m < M; m++) {
    const float *row = shared.selection + m * width;
    norm_row(row, layer.dt_norm_R, R, epsilon, dt_MR + m * R);
    norm_row(row + R, layer.B_norm_N, N, epsilon, B_MN + m * N);
    norm_row(row + R + N, layer.C_norm_N, N, epsilon, C_MN + m * N);
  }
  timeline.turn_to(JAMBA_DT_PROJ, JAMBA_CUTS_ROWS);
  const Operand dt =
      prepare_operand(step.kernels, layer.dt_proj, dt_MR, R, M, model.bfloat16, step.operand);
  const auto scan = [&](int64_t piece, int64_t next) {
    const Range range = piece_of(C, piece);
    timeline.turn_to(JAMBA_DT_PROJ);
    multiply(layer.dt_proj, range.first, range.last, dt, FIRST_ROWS, M, step.local, PIECE,
             weights_of_piece(layer.dt_proj, next));
    timeline.turn_to(JAMBA_SCAN);
    for (int64_t b = 0; b < B; b++) {
      scan_and_gate(step, layer, memories[b], b, range, step.local, B_MN, C_MN);
    }
  };
  step.team.share_runs(channel_pieces, scan,
                       [&] { fetch_start(step, layer.out_proj, divide_up(model.D, PIECE)); });
  add_product(step, JAMBA_OUT_PROJ, layer.out_proj, shared.y,
              [&] { fetch_feed_forward(step, layer); });
}

}  // namespace jamba::JAMBA_PATH
#endif
