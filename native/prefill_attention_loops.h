// Attention for many tokens: keys in blocks, each meeting a few hundred rows of queries, and a
// softmax that goes along (FlashAttention-2, Algorithm 1), so that memory does not depend on the
// length of the context. Both products are those of tiles.h: scores lie [key][row], sums [channel]
// [row], so a vector holds as many queries, and maxima and sums run down the keys.
#ifndef JAMBA_PREFILL_ATTENTION_LOOPS_H
#define JAMBA_PREFILL_ATTENTION_LOOPS_H

#include "prefill_parts.h"
#include "step_attention_loops.h"

namespace jamba::JAMBA_PATH {

constexpr int64_t KEYS_AT_ONCE = KEY_TILES * TILE;

// One thread's room for attention; Q is AttentionSizes::row_tiles.
struct AttentionScratch {
  uint32_t *queries;  // tiles of rows: [Q][depth of P]
  uint32_t *keys;     // [KEY_TILES][depth of P]
  uint32_t *values;   // [tiles of P][depth of KEYS_AT_ONCE]
  float *scores;      // [Q][KEY_TILES][TILE_WORDS]
  uint32_t *weights;  // tiles of rows: [Q][depth of KEYS_AT_ONCE]
  float *sums;        // [Q][tiles of P][TILE_WORDS]
  float *largest;     // [Q][TILE], and the sums of weights
  float *total;
};

struct AttentionSizes {
  Words words;
  int64_t row_tiles, depth, key_depth, channel_tiles;

  AttentionSizes(const TileKernels &kernels, const jamba_model &model)
      : words(model.bfloat16 && kernels.pairs != nullptr ? Words::PAIRS : Words::FLOATS),
        row_tiles(model.H / model.G > QUERY_TILES ? model.H / model.G : QUERY_TILES),
        depth(tile_depth(words, model.P)),
        key_depth(tile_depth(words, KEYS_AT_ONCE)),
        channel_tiles(tiles_of(model.P)) {}

  int64_t scratch_words() const {
    return (row_tiles * depth + KEY_TILES * depth + channel_tiles * key_depth +
            row_tiles * (KEY_TILES + key_depth + channel_tiles)) *
               TILE_WORDS +
           2 * row_tiles * TILE;
  }

  AttentionScratch cut(float *scratch) const {
    AttentionScratch s;
    s.queries = (uint32_t *)scratch;
    s.keys = s.queries + row_tiles * depth * TILE_WORDS;
    s.values = s.keys + KEY_TILES * depth * TILE_WORDS;
    s.scores = (float *)(s.values + channel_tiles * key_depth * TILE_WORDS);
    s.weights = (uint32_t *)(s.scores + row_tiles * KEY_TILES * TILE_WORDS);
    s.sums = (float *)(s.weights + row_tiles * key_depth * TILE_WORDS);
    s.largest = s.sums + row_tiles * channel_tiles * TILE_WORDS;
    s.total = s.largest + row_tiles * TILE;
    return s;
  }
};

// Keys as tiles of outputs, and values as tiles of outputs whose inputs are the keys; zero beyond
// `count`.
inline void tile_keys(const Prefill &prefill, const AttentionSizes &sizes,
                      const AttentionScratch &scratch, KeyCursor &cursor, int64_t group,
                      int64_t position, int64_t count) {
  const jamba_model &model = prefill.model;
  const bool half = model.bfloat16;
  const int64_t P = model.P, width = model.G * P, per_tile = TILE * inputs_in(sizes.words);
  alignas(64) float lines[TILE_WORDS];
  const void *values[KEYS_AT_ONCE];
  int64_t rows[KEYS_AT_ONCE];
  for (int64_t s = 0; s < KEYS_AT_ONCE; s++) {
    uint32_t *line = scratch.keys + (s / TILE * sizes.depth * TILE + s % TILE) * TILE;
    if (s >= count) {
      for (int64_t d = 0; d < sizes.depth; d++) memset(line + d * TILE_WORDS, 0, TILE * 4);
      continue;
    }
    rows[s] = cursor.row_of(position + s);
    const jamba_key_block &block = cursor.memory.blocks[cursor.block];
    values[s] = block.values;
    for (int64_t d = 0; d < sizes.depth; d++) {
      cut_words(sizes.words, {block.keys, half, width}, rows[s], group * P + d * per_tile,
                P - d * per_tile, line + d * TILE_WORDS);
    }
  }
  // [key][channel] becomes words of keys, [channel][word].
  alignas(64) uint32_t words[TILE_WORDS];
  for (int64_t channel = 0; channel < P; channel += TILE) {
    for (int64_t s = 0; s < KEYS_AT_ONCE; s += TILE) {
      for (int64_t i = 0; i < TILE; i++) {
        for (int64_t l = 0; l < TILE; l += LANES) {
          const int64_t left = lanes_left(P, channel + l);
          store(lines + i * TILE + l,
                s + i < count && left > 0
                    ? load_any(values[s + i], half, rows[s + i] * width + group * P + channel + l,
                               left)
                    : Vec{});
        }
      }
      join_words(sizes.words, lines, words + s % per_tile / inputs_in(sizes.words) * TILE);
      if (s % per_tile + TILE == per_tile) {
        turn(words,
             scratch.values + (channel / TILE * sizes.key_depth + s / per_tile) * TILE_WORDS);
      }
    }
  }
}

// Scores of one tile of rows become weights; what was summed before is brought to the new largest.
// Row l of the tile is the query at position first_query + l, and sees keys up to itself.
inline void weigh_keys(const Prefill &prefill, const AttentionSizes &sizes,
                       const AttentionScratch &scratch, int64_t tile, int64_t position,
                       int64_t first_query) {
  float *const scores = scratch.scores + tile * KEY_TILES * TILE_WORDS;
  float *const sums = scratch.sums + tile * sizes.channel_tiles * TILE_WORDS;
  uint32_t *const weights = scratch.weights + tile * sizes.key_depth * TILE_WORDS;
  const Vec scale = set((float)prefill.model.attention_scale), hidden = set(-1e30f);
  const bool all_visible = position + KEYS_AT_ONCE - 1 <= first_query;
  for (int64_t l = 0; l < TILE; l += LANES) {
    IntVec last = {};  // the last key that each query sees, counted from `position`
    for (int i = 0; i < LANES; i++) last[i] = (int32_t)(first_query + l + i - position);
    float *const largest_at = scratch.largest + tile * TILE + l;
    float *const total_at = scratch.total + tile * TILE + l;
    const Vec before = load(largest_at);
    Vec largest = before;
    for (int64_t s = 0; s < KEYS_AT_ONCE; s++) {
      Vec score = load(scores + s * TILE + l) * scale;
      if (!all_visible) score = select(last >= (int32_t)s, score, hidden);
      store(scores + s * TILE + l, score);
      largest = maximum(largest, score);
    }
    const Vec factor = exp_nonpositive(before - largest);
    Vec total = load(total_at) * factor;
    for (int64_t s = 0; s < KEYS_AT_ONCE; s++) {
      Vec weight = exp_nonpositive(load(scores + s * TILE + l) - largest);
      if (!all_visible) weight = select(last >= (int32_t)s, weight, Vec{});
      store(scores + s * TILE + l, weight);
      total = total + weight;
    }
    store(largest_at, largest);
    store(total_at, total);
    for (int64_t i = 0; i < sizes.channel_tiles * TILE; i++) {
      store(sums + i * TILE + l, load(sums + i * TILE + l) * factor);
    }
  }
  for (int64_t s = 0; s < KEYS_AT_ONCE; s += TILE) {
    join_words(sizes.words, scores + s * TILE, weights + s / inputs_in(sizes.words) * TILE);
  }
}

// Rows of queries of one group, `heads` tiles for each of the query tiles [first, last) of a
// sequence.
struct Queries {
  int64_t sequence, group, first, last;
};

inline void attend(const Prefill &prefill, const jamba_memory &memory, const Queries &queries,
                   int64_t past) {
  const jamba_model &model = prefill.model;
  const TileKernels &kernels = prefill.products.kernels;
  const AttentionSizes sizes(kernels, model);
  const AttentionScratch scratch = sizes.cut(prefill.local);
  const int64_t P = model.P, H = model.H, heads = H / model.G;
  const int64_t row = prefill.call.offsets[queries.sequence];
  const int64_t end = prefill.call.offsets[queries.sequence + 1] - row;
  const int64_t tiles = (queries.last - queries.first) * heads;
  const TiledRows q = {sizes.words, P, sizes.depth, sizes.row_tiles, scratch.queries};

  // Tile t holds queries first + t / heads of head t % heads.
  const auto first_query = [&](int64_t t) { return (queries.first + t / heads) * TILE; };
  const auto head_of = [&](int64_t t) { return queries.group * heads + t % heads; };
  const auto count_of = [&](int64_t t) {
    const int64_t left = end - first_query(t);
    return left < TILE ? left : TILE;
  };
  for (int64_t t = 0; t < tiles; t++) {
    int64_t rows[TILE];
    for (int64_t i = 0; i < TILE; i++) rows[i] = row + first_query(t) + i;
    tile_rows(q, t, {prefill.shared.q, false, H * P}, rows, count_of(t), head_of(t) * P);
    for (int64_t i = 0; i < TILE; i++) {
      scratch.largest[t * TILE + i] = -1e30f;
      scratch.total[t * TILE + i] = 0;
    }
  }
  memset(scratch.sums, 0, (size_t)(tiles * sizes.channel_tiles * TILE_WORDS) * sizeof(float));

  const int64_t queries_end = queries.last * TILE < end ? queries.last * TILE : end;
  const int64_t num_keys = past + queries_end;
  KeyCursor cursor = {memory};
  for (int64_t position = 0; position < num_keys; position += KEYS_AT_ONCE) {
    const int64_t left = num_keys - position;
    tile_keys(prefill, sizes, scratch, cursor, queries.group, position,
              left < KEYS_AT_ONCE ? left : KEYS_AT_ONCE);
    multiply_tiles(kernels, sizes.words,
                   {scratch.keys,
                    scratch.queries,
                    sizes.depth * TILE_WORDS,
                    sizes.depth,
                    KEY_TILES,
                    tiles,
                    (uint32_t *)scratch.scores,
                    false,
                    {}});
    for (int64_t t = 0; t < tiles; t++) {
      weigh_keys(prefill, sizes, scratch, t, position, past + first_query(t));
    }
    multiply_tiles(kernels, sizes.words,
                   {scratch.values,
                    scratch.weights,
                    sizes.key_depth * TILE_WORDS,
                    sizes.key_depth,
                    sizes.channel_tiles,
                    tiles,
                    (uint32_t *)scratch.sums,
                    true,
                    {}});
  }

  alignas(64) float turned[TILE_WORDS];
  for (int64_t t = 0; t < tiles; t++) {
    for (int64_t c = 0; c < sizes.channel_tiles; c++) {
      turn((const uint32_t *)scratch.sums + (t * sizes.channel_tiles + c) * TILE_WORDS,
           (uint32_t *)turned);
      const int64_t columns = P - c * TILE < TILE ? P - c * TILE : TILE;
      for (int64_t i = 0; i < count_of(t); i++) {
        const float inverse = 1.0f / scratch.total[t * TILE + i];
        for (int64_t j = 0; j < columns; j++) turned[i * TILE + j] *= inverse;
      }
      store_tile(prefill.shared.y, false, H * P, row + first_query(t), count_of(t),
                 head_of(t) * P + c * TILE, columns, turned);
    }
  }
}

// Keys or values of all rows, to the end of each sequence's last block.
inline void remember_projected(Prefill &prefill, const jamba_matrix &matrix, const TiledRows &x,
                               const jamba_memory *memories, bool keys) {
  const jamba_model &model = prefill.model;
  const int64_t *const offsets = prefill.call.offsets;
  share_outputs(prefill.products, prefill.team, matrix, x, prefill.row_tiles(),
                [&](int64_t tile, int64_t output, int64_t count, const float *results) {
                  int64_t b = 0;
                  for (int64_t i = 0; i < prefill.rows_of(tile); i++) {
                    const int64_t m = tile * TILE + i;
                    while (m >= offsets[b + 1]) b++;
                    const jamba_key_block &last = memories[b].blocks[memories[b].num_blocks - 1];
                    store_tile((void *)(keys ? last.keys : last.values), model.bfloat16,
                               model.G * model.P, last.count - (offsets[b + 1] - m), 1, output,
                               count, results + i * TILE);
                  }
                });
}

inline void prefill_attention(Prefill &prefill, const jamba_layer &layer,
                              const jamba_memory *memories) {
  const jamba_model &model = prefill.model;
  const PrefillBuffers &shared = prefill.shared;
  const int64_t B = prefill.call.B, queries = model.H * model.P;

  const TiledRows x = norm_inputs(prefill, layer.mixer_norm_D, JAMBA_QKV_PROJ, layer.in_proj);
  Timeline &timeline = prefill.team.timeline;
  timeline.turn_to(JAMBA_QKV_PROJ);
  share_outputs(prefill.products, prefill.team, layer.in_proj, x, prefill.row_tiles(),
                [&](int64_t tile, int64_t output, int64_t count, const float *results) {
                  store_tile(shared.q, false, queries, tile * TILE, prefill.rows_of(tile), output,
                             count, results);
                });
  remember_projected(prefill, layer.x_proj, x, memories, true);
  remember_projected(prefill, layer.dt_proj, x, memories, false);

  // As many query tiles at a time as make QUERY_TILES of rows, and at least one.
  const int64_t heads = model.H / model.G;
  const int64_t per_task = heads < QUERY_TILES ? QUERY_TILES / heads : 1;
  int64_t tasks = 0;
  for (int64_t b = 0; b < B; b++) {
    tasks += divide_up(tiles_of(prefill.call.offsets[b + 1] - prefill.call.offsets[b]), per_task) *
             model.G;
  }
  timeline.turn_to(JAMBA_ATTENTION);
  prefill.team.share(tasks, [&](int64_t task) {
    // The last queries see most keys: they come first.
    int64_t left = tasks - 1 - task, b = 0, parts = 0;
    for (;; b++, left -= parts * model.G) {
      parts = divide_up(tiles_of(prefill.call.offsets[b + 1] - prefill.call.offsets[b]), per_task);
      if (left < parts * model.G) break;
    }
    const int64_t tokens = prefill.call.offsets[b + 1] - prefill.call.offsets[b];
    const int64_t first = left / model.G * per_task, last = first + per_task;
    int64_t past = -tokens;
    for (int64_t j = 0; j < memories[b].num_blocks; j++) past += memories[b].blocks[j].count;
    attend(prefill, memories[b],
           {b, left % model.G, first, last < tiles_of(tokens) ? last : tiles_of(tokens)}, past);
  });

  const TiledRows y = tiled(prefill, layer.out_proj, prefill.row_tiles(), shared.mixed);
  timeline.turn_to(JAMBA_O_PROJ, JAMBA_CUTS_ROWS);
  prefill.team.share(prefill.row_tiles(), [&](int64_t tile) {
    tile_rows(y, tile, {shared.y, false, queries}, RowsOfTile(tile).rows, prefill.rows_of(tile), 0);
  });
  add_to_stream(prefill, JAMBA_O_PROJ, layer.out_proj, y);
}

}  // namespace jamba::JAMBA_PATH
#endif
