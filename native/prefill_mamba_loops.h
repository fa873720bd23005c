// A Mamba layer for many tokens. Between the products, a thread takes some channels of all rows:
// convolution and SiLU in one pass, step sizes, scan and gate in another.
#ifndef JAMBA_PREFILL_MAMBA_LOOPS_H
#define JAMBA_PREFILL_MAMBA_LOOPS_H

#include "prefill_parts.h"
#include "selective_scan_loops.h"

namespace jamba::JAMBA_PATH {

constexpr int64_t MOST_TAPS = 8;

// Convolution and SiLU of LANES channels from `c` on, in place, and the window that is left.
// `TAPS` is the number of taps where it is known.
template <bool HALF, int64_t TAPS>
inline void convolve_rows(const Prefill &prefill, const jamba_layer &layer,
                          const jamba_memory &memory, int64_t b, int64_t c) {
  const jamba_model &model = prefill.model;
  const int64_t W = TAPS > 0 ? TAPS : model.W;
  const int64_t C = model.C, L = W - 1, left = lanes_left(C, c);
  void *const u = prefill.shared.u;
  Vec taps[MOST_TAPS], window[MOST_TAPS + 1] = {};
  for (int64_t w = 0; w < W; w++) taps[w] = load_as<false>(layer.conv_WC, w * C + c, left);
  for (int64_t t = 0; t < L; t++) window[t] = load_as<HALF>(memory.conv_LC, t * C + c, left);
  const Vec bias =
      layer.conv_bias_C == nullptr ? Vec{} : load_as<false>(layer.conv_bias_C, c, left);
  for (int64_t m = prefill.call.offsets[b]; m < prefill.call.offsets[b + 1]; m++) {
    __builtin_prefetch((const char *)u + ((m + 8) * C + c) * (HALF ? 2 : 4));
    window[L] = load_as<HALF>(u, m * C + c, left);
    Vec sum = bias;
    for (int64_t w = 0; w < W; w++) sum = fma(window[w], taps[w], sum);
    store_as<HALF>(u, m * C + c, left, sum * sigmoid(sum));
    for (int64_t w = 0; w < L; w++) window[w] = window[w + 1];
  }
  for (int64_t t = 0; t < L; t++) store_as<HALF>(memory.next_conv_LC, t * C + c, left, window[t]);
}

// Scan, skip and gate of the channels in `range`; `dt` is [M][CHANNELS_OF_PIECE], before its bias.
// The result takes the place of the gate.
inline void scan_rows(const Prefill &prefill, const jamba_layer &layer,
                      const jamba_memory *memories, Range range, const float *dt, float *y,
                      float *scratch) {
  const jamba_model &model = prefill.model;
  const bool half = model.bfloat16;
  const int64_t C = model.C, N = model.N, width = range.count();
  for (int64_t b = 0; b < prefill.call.B; b++) {
    const int64_t first = prefill.call.offsets[b], rows = prefill.call.offsets[b + 1] - first;
    const int64_t offsets[2] = {0, rows};
    jamba_scan_call scan = {};
    scan.bfloat16 = half ? JAMBA_U : 0;
    scan.B = 1, scan.M = rows, scan.C = width, scan.N = N;
    scan.offsets = offsets;
    scan.u_MC = (const char *)prefill.shared.u + (first * C + range.first) * (half ? 2 : 4);
    scan.u_stride = C;
    scan.dt_MC = dt + first * CHANNELS_OF_PIECE;
    scan.dt_stride = CHANNELS_OF_PIECE;
    scan.dt_bias_C = layer.dt_bias_C + range.first;
    scan.A_CN = layer.A_CN + range.first * N;
    scan.B_MN = prefill.shared.B + first * N;
    scan.C_MN = prefill.shared.C + first * N;
    scan.B_stride = scan.C_stride = N;
    scan.skip_C = layer.skip_C + range.first;
    scan.state_BCN = memories[b].scan_CN + range.first * N;
    scan.last_state_BCN = memories[b].next_scan_CN + range.first * N;
    scan.y_MC = y;
    scan_many_tokens(scan, 0, 0, 0, divide_up(width, LANES), scratch);
    for (int64_t m = 0; m < rows; m++) {
      for (int64_t i = 0; i < width; i += LANES) {
        const int64_t left = lanes_left(width, i), at = (first + m) * C + range.first + i;
        const Vec z = load_any(prefill.shared.gate, half, at, left);
        store_any(prefill.shared.gate, half, at, left,
                  load_any(y, half, m * width + i, left) * z * sigmoid(z));
      }
    }
  }
}

inline Range channels_of(const jamba_model &model, int64_t piece) {
  const int64_t first = piece * CHANNELS_OF_PIECE, last = first + CHANNELS_OF_PIECE;
  return {first, last < model.C ? last : model.C};
}

// Some channels of all rows; a piece of channels is whole tiles, whatever the words.
inline void tile_channels(const Prefill &prefill, const TiledRows &out, const void *from,
                          Range range) {
  const RowSource source = {from, (bool)prefill.model.bfloat16, prefill.model.C};
  for (int64_t tile = 0; tile < prefill.row_tiles(); tile++) {
    tile_part(out, tile, source, RowsOfTile(tile).rows, prefill.rows_of(tile), range.first,
              range.first, range.count());
  }
}

// QUADS need the largest value of a row, and so all of its channels.
inline void tile_exactly(Prefill &prefill, int32_t part, const TiledRows &out, const void *from) {
  if (!are_bytes(out.words)) return;
  prefill.team.timeline.turn_to(part, JAMBA_CUTS_ROWS);
  const RowSource source = {from, (bool)prefill.model.bfloat16, prefill.model.C};
  prefill.team.share(prefill.row_tiles(), [&](int64_t tile) {
    tile_rows(out, tile, source, RowsOfTile(tile).rows, prefill.rows_of(tile), 0);
  });
}

inline void prefill_mamba(Prefill &prefill, const jamba_layer &layer,
                          const jamba_memory *memories) {
  const jamba_model &model = prefill.model;
  const PrefillBuffers &shared = prefill.shared;
  const int64_t C = model.C, N = model.N, R = model.R, width = R + 2 * N;
  const bool half = model.bfloat16;

  const TiledRows x = norm_inputs(prefill, layer.mixer_norm_D, JAMBA_IN_PROJ, layer.in_proj);
  Timeline &timeline = prefill.team.timeline;
  timeline.turn_to(JAMBA_IN_PROJ);
  share_outputs(prefill.products, prefill.team, layer.in_proj, x, prefill.row_tiles(),
                [&](int64_t tile, int64_t output, int64_t count, const float *results) {
                  // The first half of the outputs is convolved, the second is the gate.
                  const int64_t inputs = output + count <= C ? count : output < C ? C - output : 0;
                  const int64_t rows = prefill.rows_of(tile);
                  if (inputs > 0) {
                    store_tile(shared.u, half, C, tile * TILE, rows, output, inputs, results);
                  }
                  if (inputs < count) {
                    store_tile(shared.gate, half, C, tile * TILE, rows, output + inputs - C,
                               count - inputs, results + inputs);
                  }
                });

  constexpr int64_t USUAL = 4;
  const auto convolve =
      half ? (model.W == USUAL ? convolve_rows<true, USUAL> : convolve_rows<true, 0>)
           : (model.W == USUAL ? convolve_rows<false, USUAL> : convolve_rows<false, 0>);
  const TiledRows u = tiled(prefill, layer.x_proj, prefill.row_tiles(), shared.mixed);
  const int64_t channel_pieces = divide_up(C, CHANNELS_OF_PIECE);
  prefill.team.share(channel_pieces, [&](int64_t piece) {
    const Range range = channels_of(model, piece);
    timeline.turn_to(JAMBA_CONVOLUTION);
    for (int64_t b = 0; b < prefill.call.B; b++) {
      for (int64_t c = range.first; c < range.last; c += LANES) {
        convolve(prefill, layer, memories[b], b, c);
      }
    }
    if (are_bytes(u.words)) return;
    timeline.turn_to(JAMBA_X_PROJ, JAMBA_CUTS_ROWS);
    tile_channels(prefill, u, shared.u, range);
  });
  tile_exactly(prefill, JAMBA_X_PROJ, u, shared.u);
  timeline.turn_to(JAMBA_X_PROJ);

  // Few outputs: rows are shared out as well.
  constexpr int64_t FEW_TILES = 8, FEW_OUTPUTS = 64;
  const int64_t row_parts = divide_up(prefill.row_tiles(), FEW_TILES);
  prefill.team.share(divide_up(width, FEW_OUTPUTS) * row_parts, [&](int64_t task) {
    const int64_t tile = task % row_parts * FEW_TILES, first = task / row_parts * FEW_OUTPUTS;
    const int64_t some =
        prefill.row_tiles() - tile < FEW_TILES ? prefill.row_tiles() - tile : FEW_TILES;
    multiply_rows(prefill.products, layer.x_proj, first,
                  first + FEW_OUTPUTS < width ? first + FEW_OUTPUTS : width, u, tile, some, {},
                  [&](int64_t at, int64_t output, int64_t count, const float *results) {
                    store_tile(shared.selection, false, width, at * TILE, prefill.rows_of(at),
                               output, count, results);
                  });
  });

  const TiledRows dt = tiled(prefill, layer.dt_proj, prefill.row_tiles(), shared.dt);
  const float epsilon = (float)model.epsilon;
  prefill.team.share(prefill.row_tiles(), [&](int64_t tile) {
    const int64_t rows = prefill.rows_of(tile);
    timeline.turn_to(JAMBA_NORMS);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t m = tile * TILE + i;
      const float *row = shared.selection + m * width;
      norm_row(row, layer.dt_norm_R, R, epsilon, prefill.local + i * R);
      norm_row(row + R, layer.B_norm_N, N, epsilon, shared.B + m * N);
      norm_row(row + R + N, layer.C_norm_N, N, epsilon, shared.C + m * N);
    }
    timeline.turn_to(JAMBA_DT_PROJ, JAMBA_CUTS_ROWS);
    tile_rows(dt, tile, {prefill.local, false, R}, RowsOfTile(0).rows, rows, 0);
  });

  const TiledRows y = tiled(prefill, layer.out_proj, prefill.row_tiles(), shared.mixed);
  prefill.team.share(channel_pieces, [&](int64_t piece) {
    const Range range = channels_of(model, piece);
    float *const steps = prefill.local, *const out = steps + prefill.call.M * CHANNELS_OF_PIECE;
    timeline.turn_to(JAMBA_DT_PROJ);
    multiply_rows(prefill.products, layer.dt_proj, range.first, range.last, dt, 0,
                  prefill.row_tiles(), {},
                  [&](int64_t tile, int64_t output, int64_t count, const float *results) {
                    store_tile(steps, false, CHANNELS_OF_PIECE, tile * TILE, prefill.rows_of(tile),
                               output - range.first, count, results);
                  });
    timeline.turn_to(JAMBA_SCAN);
    scan_rows(prefill, layer, memories, range, steps, out,
              out + prefill.call.M * CHANNELS_OF_PIECE);
    if (are_bytes(y.words)) return;
    timeline.turn_to(JAMBA_OUT_PROJ, JAMBA_CUTS_ROWS);
    tile_channels(prefill, y, shared.gate, range);
  });
  tile_exactly(prefill, JAMBA_OUT_PROJ, y, shared.gate);
  add_to_stream(prefill, JAMBA_OUT_PROJ, layer.out_proj, y);
}

}  // namespace jamba::JAMBA_PATH
#endif
