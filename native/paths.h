// What one instruction set offers to the files that plan work and start threads.
// Those see no vectors: they hand out channel blocks, one block being `lanes` channels.
#ifndef JAMBA_PATHS_H
#define JAMBA_PATHS_H

#include "jamba_kernels.h"
#include "prefill.h"
#include "step.h"

namespace jamba {

constexpr int64_t CHECKPOINT_TOKENS = JAMBA_CHECKPOINT_TOKENS;

// States are worked on this many at a time: their registers, and those of what
// accumulates over tokens beside them, fit in the register file.
constexpr int64_t STATE_GROUP = JAMBA_CHECKPOINT_STATES;

// Tokens that forward takes before it moves on to the next channels.
constexpr int64_t FORWARD_TOKENS = CHECKPOINT_TOKENS;

// Static, so that the copies compiled for each instruction set stay apart.
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t padded_states(int64_t N) { return divide_up(N, STATE_GROUP) * STATE_GROUP; }

// A checkpoint holds the states of all channels, block after block, [state][lane] each.
static inline int64_t checkpoint_size(const jamba_scan_call &call) {
  return divide_up(call.C, JAMBA_CHECKPOINT_CHANNELS) * JAMBA_CHECKPOINT_CHANNELS *
         padded_states(call.N);
}

static inline float *checkpoint_at(const jamba_scan_call &call, int64_t checkpoint, int64_t block,
                                   int64_t lanes) {
  return call.checkpoints + checkpoint * checkpoint_size(call) +
         block * lanes * padded_states(call.N);
}

// Up to CHECKPOINT_TOKENS rows of one sequence, which backward takes in one go.
struct ScanChunk {
  int64_t sequence, first_row, num_rows, checkpoint;
  bool begins_sequence, ends_sequence;
};

// A row, and a block of channels.
struct ScanPlace {
  int64_t row, block;
};

// What backward carries from chunk to chunk, for all channel blocks: the gradient of
// the state, and the sums over tokens. Per block, N is padded and lanes are channels.
struct ScanCarry {
  float *A, *grad_state, *grad_A;   // [block][state][lane]
  float *grad_skip, *grad_dt_bias;  // [block][lane]
};

struct Path {
  const char *name;
  int64_t lanes;
  bool (*runs_here)();

  // Floats of scratch memory that each of the calls below needs.
  int64_t (*scan_scratch)(const jamba_scan_call &call, int64_t blocks);
  int64_t (*scan_backward_scratch)(const jamba_scan_call &call, int64_t blocks);
  int64_t (*conv_scratch)(const jamba_conv_call &call);
  int64_t (*product_scratch)(const jamba_product_call &call);
  int64_t (*step_scratch)(const jamba_step_call &call);
  int64_t (*prefill_scratch)(const jamba_step_call &call, const TileKernels &kernels);

  // Blocks [first, last) over one sequence; `checkpoint` is the sequence's first.
  void (*scan)(const jamba_scan_call &call, int64_t sequence, int64_t checkpoint, int64_t first,
               int64_t last, float *scratch);

  void (*scan_backward_begin)(const jamba_scan_call &call, const ScanCarry &carry, int64_t block);
  // Blocks [first, last) over one chunk. Their part of the gradients of B and C goes to
  // `grad_B` and `grad_C`, one row of padded_states(N) for each row of the chunk. `next` is where
  // the caller will go on: a hint, for fetching early.
  void (*scan_backward)(const jamba_scan_backward_call &call, const ScanChunk &chunk,
                        const ScanCarry &carry, int64_t first, int64_t last, ScanPlace next,
                        float *grad_B, float *grad_C, float *scratch);
  void (*scan_backward_end)(const jamba_scan_backward_call &call, const ScanCarry &carry,
                            int64_t block);
  // Writes `count` floats as a row of the gradient of B or C.
  void (*store_row)(void *array, bool bfloat16, int64_t index, int64_t count, const float *row);

  // Rows [first, last) of one sequence, all channels.
  void (*conv)(const jamba_conv_call &call, int64_t sequence, int64_t first, int64_t last,
               float *scratch);
  // One block of channels over all sequences.
  void (*conv_backward)(const jamba_conv_backward_call &call, int64_t block);

  // Rows [first, last); the gradient of the gain is added to `grad_weight`.
  void (*norm)(const jamba_norm_call &call, int64_t first, int64_t last);
  void (*norm_backward)(const jamba_norm_backward_call &call, int64_t first, int64_t last,
                        float *grad_weight);
  void (*gate)(const jamba_gate_call &call, int64_t first, int64_t last);
  void (*gate_backward)(const jamba_gate_backward_call &call, int64_t first, int64_t last);
  void (*softmax_sums)(const jamba_softmax_call &call, int64_t first, int64_t last);
  void (*softmax_slopes)(const jamba_softmax_slopes_call &call, int64_t first, int64_t last);

  // Arranges the inputs; then outputs [first, last), at most PIECE, with the same scratch.
  void (*product_begin)(const jamba_product_call &call, const TileKernels &kernels, float *scratch);
  void (*product)(const jamba_product_call &call, const TileKernels &kernels, int64_t first,
                  int64_t last, float *scratch);
  // One thread's part of a product of many rows, `tiles` being shared.
  void (*product_many)(const jamba_product_call &call, const TileKernels &kernels, uint32_t *tiles,
                       Team team, uint32_t *scratch);
  void (*unpack)(const jamba_unpack_call &call, int64_t first, int64_t last, float *scratch);
  // One thread's part of a step.
  void (*step)(const jamba_step_call &call, const StepBuffers &shared, const TileKernels &kernels,
               Team team, float *scratch);
  // One thread's part of a prefill.
  void (*prefill)(const jamba_step_call &call, const PrefillBuffers &shared,
                  const TileKernels &kernels, Team team, float *scratch);

  void (*vector_function)(int64_t function, const float *x, float *y, int64_t count);

  // Products of tiles beyond those of floats; another path may have the same code with others.
  TileKernels tiles;
};

extern const Path path_avx512_bf16, path_avx512_vnni, path_avx512, path_avx2, path_portable;

// The path a call asks for, the best one for 0, or null when it cannot run here.
const Path *find_path(int64_t request);

bool offsets_are_valid(const int64_t *offsets, int64_t B, int64_t M);

}  // namespace jamba
#endif
