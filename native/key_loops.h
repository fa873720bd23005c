// What a few queries make of a run of keys and values: scores, weights, and sums of values. One
// reading of a key serves several queries, and where keys are bfloat16 a word of two is widened as
// it lies, to its first and to its second half; queries are arranged for that.
//
// Queries share registers and nothing else: what one gives does not depend on the others.
#ifndef JAMBA_KEY_LOOPS_H
#define JAMBA_KEY_LOOPS_H

#include "product_tiles.h"
#include "vector_math.h"

namespace jamba::JAMBA_PATH {

// Queries that meet a key, and keys that are scored, at the same time: their sums, and what they
// are made of, fill the registers.
#if defined(__AVX512F__)
constexpr int MOST_QUERIES = 4;
#else
constexpr int MOST_QUERIES = 2;
#endif
constexpr int SCORED_KEYS = 4;

// Channels that come with one load of a key, and the vectors that they become.
template <bool HALF>
constexpr int VECS_OF_LOAD = HALF ? 2 : 1;
template <bool HALF>
constexpr int CHANNELS_OF_LOAD = VECS_OF_LOAD<HALF> * LANES;

// Floats that a query of P channels takes, in either type.
JAMBA_INLINE int64_t arranged_floats(int64_t P) {
  return divide_up(P, CHANNELS_OF_LOAD<true>) * CHANNELS_OF_LOAD<true>;
}

// Channels [at, at + left) of a row as vectors; zero beyond.
template <bool HALF>
JAMBA_INLINE void load_channels(const void *row, int64_t at, int64_t left, Vec *out) {
  if constexpr (HALF) {
    const uint16_t *p = (const uint16_t *)row + at;
    WordVec pairs;
    if (left >= CHANNELS_OF_LOAD<true>) {
      memcpy(&pairs, p, sizeof pairs);
    } else {
#if defined(__AVX512F__)
      pairs = (WordVec)_mm512_maskz_loadu_epi16(((uint32_t)1 << left) - 1, p);
#else
      pairs = WordVec{};
      memcpy(&pairs, p, (size_t)left * sizeof *p);
#endif
    }
    // Little-endian: the first of each pair is the low half.
    out[0] = (Vec)(pairs << 16);
    out[1] = (Vec)(pairs & 0xffff0000u);
  } else {
    out[0] = load_as<false>(row, at, left);
  }
}

// One query as its channels meet those of keys; zero beyond P.
template <bool HALF>
inline void arrange_query(const float *q, int64_t P, float *out) {
  for (int64_t c = 0; c < P; c += CHANNELS_OF_LOAD<HALF>) {
    for (int64_t i = 0; i < CHANNELS_OF_LOAD<HALF>; i++) {
      const int64_t place = HALF ? i % 2 * LANES + i / 2 : i;
      out[c + place] = c + i < P ? q[c + i] : 0;
    }
  }
}

// A run of keys, or of values, of one group of heads.
struct KeyRun {
  const void *const *rows;  // [count] each key of all groups
  int64_t count;
  int64_t at, P;       // the channels of the group
  int64_t row_bytes;   // of a key of all groups
  int64_t rows_ahead;  // how far ahead rows are asked for; 0 where they are near already
};

// How far ahead of a row that is read others are asked for, in bytes.
constexpr int64_t FAR_KEYS = 8192;

// Has the row asked for that is read so far after row `key`.
JAMBA_INLINE void fetch_ahead_of(const KeyRun &run, int64_t key) {
  if (run.rows_ahead == 0 || key + run.rows_ahead >= run.count) return;
  fetch_bytes(run.rows[key + run.rows_ahead], run.row_bytes);
}

// scores[query][key] = scale * query . key. What fills the last vector is the score of the last
// key, which makes no difference to the largest.
template <bool HALF, int QUERIES>
inline void score_keys(const KeyRun &run, const float *queries, int64_t query_stride, float scale,
                       float *scores, int64_t score_stride) {
  constexpr int VECS = VECS_OF_LOAD<HALF>;
  for (int64_t first = 0; first < run.count; first += LANES) {
    Vec products[QUERIES][LANES];
    const int64_t last = run.count - 1;
    for (int64_t s = 0; s < LANES; s += SCORED_KEYS) {
      Vec sum[QUERIES][SCORED_KEYS] = {};
      const void *rows[SCORED_KEYS];
      for (int k = 0; k < SCORED_KEYS; k++) {
        const int64_t key = first + s + k;
        rows[k] = run.rows[key < last ? key : last];
        fetch_ahead_of(run, key);
      }
      for (int64_t c = 0; c < run.P; c += CHANNELS_OF_LOAD<HALF>) {
        Vec query[QUERIES][VECS];
        for (int q = 0; q < QUERIES; q++) {
          for (int v = 0; v < VECS; v++) {
            query[q][v] = load(queries + q * query_stride + c + v * LANES);
          }
        }
#pragma GCC unroll 4
        for (int k = 0; k < SCORED_KEYS; k++) {
          Vec key[VECS];
          load_channels<HALF>(rows[k], run.at + c, run.P - c, key);
#pragma GCC unroll 4
          for (int q = 0; q < QUERIES; q++) {
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) sum[q][k] = fma(query[q][v], key[v], sum[q][k]);
          }
        }
      }
      for (int q = 0; q < QUERIES; q++) {
        for (int k = 0; k < SCORED_KEYS; k++) products[q][s + k] = sum[q][k];
      }
    }
    for (int q = 0; q < QUERIES; q++) {
      store(scores + q * score_stride + first, sum_each(products[q]) * scale);
    }
  }
}

struct Weighed {
  float largest, sum;
};

// Scores become weights exp(score - largest), and 0 up to the end of the last vector.
inline Weighed weigh_scores(float *scores, int64_t count) {
  Vec largest = load(scores);
  for (int64_t s = LANES; s < count; s += LANES) largest = maximum(largest, load(scores + s));
  float most = largest[0];
  for (int l = 1; l < LANES; l++) most = largest[l] > most ? largest[l] : most;
  Vec sum = {};
  for (int64_t s = 0; s < count; s += LANES) {
    Vec weight = exp_nonpositive(load(scores + s) - most);
    for (int64_t l = count - s; l < LANES; l++) weight[l] = 0;
    store(scores + s, weight);
    sum = sum + weight;
  }
  return {most, total(sum)};
}

// LOADS loads of channels from `c` on of the sums of values: out[query][c ..].
template <bool HALF, int QUERIES, int LOADS>
inline void sum_channels(const KeyRun &run, int64_t c, const float *weights, int64_t weight_stride,
                         float *out, int64_t out_stride) {
  constexpr int VECS = VECS_OF_LOAD<HALF>, CHANNELS = CHANNELS_OF_LOAD<HALF>;
  Vec sum[QUERIES][LOADS * VECS] = {};
  for (int64_t s = 0; s < run.count; s++) {
    if (c == 0) fetch_ahead_of(run, s);
    Vec value[LOADS * VECS];
#pragma GCC unroll 4
    for (int l = 0; l < LOADS; l++) {
      const int64_t at = c + l * CHANNELS;
      load_channels<HALF>(run.rows[s], run.at + at, run.P - at, value + l * VECS);
    }
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; q++) {
      const Vec weight = set(weights[q * weight_stride + s]);
#pragma GCC unroll 8
      for (int v = 0; v < LOADS * VECS; v++) sum[q][v] = fma(weight, value[v], sum[q][v]);
    }
  }
  for (int q = 0; q < QUERIES; q++) {
    for (int64_t i = 0; i < LOADS * CHANNELS && c + i < run.P; i++) {
      const int64_t within = i % CHANNELS;
      const Vec &from = sum[q][i / CHANNELS * VECS + (HALF ? within % 2 : 0)];
      out[q * out_stride + c + i] = from[HALF ? within / 2 : within];
    }
  }
}

// out[query][channel] = sum of weights[query][key] * value[key][channel].
template <bool HALF, int QUERIES>
inline void sum_values(const KeyRun &run, const float *weights, int64_t weight_stride, float *out,
                       int64_t out_stride) {
  constexpr int CHANNELS = CHANNELS_OF_LOAD<HALF>;
  int64_t c = 0;
  for (; c + CHANNELS < run.P; c += 2 * CHANNELS) {
    sum_channels<HALF, QUERIES, 2>(run, c, weights, weight_stride, out, out_stride);
  }
  if (c < run.P) {
    sum_channels<HALF, QUERIES, 1>(run, c, weights, weight_stride, out, out_stride);
  }
}

}  // namespace jamba::JAMBA_PATH
#endif
