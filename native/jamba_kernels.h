// The whole interface between Python and the native CPU kernels: a plain C ABI,
// no torch and no Python headers, so one build serves every version of both.
//
// Shapes are in the names: M rows of all sequences laid end to end, B sequences,
// C channels, N states, W convolution taps, L = W - 1. Callers own all memory. Tensors are
// row-major and their last axis is contiguous; `*_stride` is the distance between rows in elements.
// `offsets` has B + 1 entries: sequence b is rows offsets[b] .. offsets[b + 1]. Inputs are never
// written.
//
// A call is one struct of 8-byte members, so that Python fills it with a single
// struct.pack: this costs a third of passing as many arguments through ctypes.
#ifndef JAMBA_KERNELS_H
#define JAMBA_KERNELS_H

#include <stdint.h>

#define JAMBA_ABI_VERSION 7

// Tokens between two saved states of the scan; what backward recomputes at once.
#define JAMBA_CHECKPOINT_TOKENS 16

// A saved state takes C rounded up to 16 times N rounded up to 8 floats, in an order of
// its own: backward must run on the path that saved it.
#define JAMBA_CHECKPOINT_CHANNELS 16
#define JAMBA_CHECKPOINT_STATES 8

// All other symbols of the library are hidden.
#define JAMBA_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Set in `bfloat16` where that tensor is bfloat16; all others are float32.
enum {
  JAMBA_U = 1,  // also y, grad_y and grad_u; in the convolution x, y, state and their gradients
  JAMBA_DT = 2,
  JAMBA_DT_BIAS = 4,
  JAMBA_B = 8,
  JAMBA_C = 16,
  JAMBA_SKIP = 32,
  JAMBA_WEIGHT = 64,
  JAMBA_BIAS = 128,
};

// What a function returns.
enum {
  JAMBA_OK = 0,
  JAMBA_NO_SUCH_PATH = 1,  // the processor, or this build, lacks the path asked for
  JAMBA_BAD_OFFSETS = 2,   // offsets do not rise strictly from 0 to M
  JAMBA_BAD_SIZE = 3,      // a size is not positive, or W is above 8
  JAMBA_NO_MEMORY = 4,
};

typedef struct {
  int64_t path;     // 0 picks the best here; else 1 + an index for jamba_path_name
  int64_t threads;  // upper bound; results do not depend on it
  int64_t bfloat16;
  int64_t B, M, C, N;
  const int64_t *offsets;
  const void *u_MC;
  int64_t u_stride;
  const void *dt_MC;  // before bias and softplus
  int64_t dt_stride;
  const void *dt_bias_C;
  const float *A_CN;
  const void *B_MN;
  int64_t B_stride;
  const void *C_MN;
  int64_t C_stride;
  const void *skip_C;
  const float *state_BCN;  // null means zeros
  void *y_MC;
  float *last_state_BCN;
  float *checkpoints;  // null, or K saved states: before every 16th token of each sequence
} jamba_scan_call;

typedef struct {
  jamba_scan_call forward;  // y_MC and last_state_BCN are not read
  const void *grad_y_MC;
  int64_t grad_y_stride;
  const float *grad_last_state_BCN;  // null means zeros
  void *grad_u_MC;                   // in the type of u
  void *grad_dt_MC;                  // in the type of dt
  float *grad_dt_bias_C;
  float *grad_A_CN;
  void *grad_B_MN;  // in the type of B
  void *grad_C_MN;  // in the type of C
  float *grad_skip_C;
  float *grad_state_BCN;  // null when nobody needs it
} jamba_scan_backward_call;

typedef struct {
  int64_t path;
  int64_t threads;
  int64_t bfloat16;
  int64_t B, M, C, W;
  int64_t silu;  // 0 or 1
  const int64_t *offsets;
  const void *x_MC;
  int64_t x_stride;
  const void *weight_CW;
  const void *bias_C;     // null means none
  const void *state_BLC;  // null means zeros
  void *y_MC;
  void *last_state_BLC;
} jamba_conv_call;

typedef struct {
  jamba_conv_call forward;  // y_MC and last_state_BLC are not read
  const void *grad_y_MC;
  int64_t grad_y_stride;
  const void *grad_last_state_BLC;  // null means zeros
  void *grad_x_MC;
  float *grad_weight_CW;
  float *grad_bias_C;
  void *grad_state_BLC;  // null when nobody needs it
} jamba_conv_backward_call;

// RMSNorm over the last axis: y = round(x / rms) * weight. JAMBA_U and JAMBA_WEIGHT apply.
typedef struct {
  int64_t path;
  int64_t threads;
  int64_t bfloat16;
  int64_t M, D;
  const void *x_MD;
  int64_t x_stride;
  const void *weight_D;
  double epsilon;
  void *y_MD;
  float *inverse_M;  // 1 / rms of each row, written forward and read backward
} jamba_norm_call;

typedef struct {
  jamba_norm_call forward;  // y_MD is not read
  const void *grad_y_MD;
  int64_t grad_y_stride;
  void *grad_x_MD;
  float *grad_weight_D;
} jamba_norm_backward_call;

// y = x * silu(gate). JAMBA_U applies to all.
typedef struct {
  int64_t path;
  int64_t threads;
  int64_t bfloat16;
  int64_t M, D;
  const void *x_MD;
  int64_t x_stride;
  const void *gate_MD;
  int64_t gate_stride;
  void *y_MD;
} jamba_gate_call;

typedef struct {
  jamba_gate_call forward;  // y_MD is not read
  const void *grad_y_MD;
  int64_t grad_y_stride;
  void *grad_x_MD;
  void *grad_gate_MD;
} jamba_gate_backward_call;

// Over rows of scores, float32 or, with JAMBA_U, bfloat16: the largest of a row, and the sum of
// exp(score - largest).
typedef struct {
  int64_t path;
  int64_t threads;
  int64_t bfloat16;
  int64_t M, V;
  void *scores_MV;
  int64_t scores_stride;
  float *largest_M;
  float *sum_M;
} jamba_softmax_call;

// Writes exp(score - largest) * share, less 1 at the target, over the scores. A target outside of
// 0 to V - 1 is of another part of the vocabulary, or of nobody.
typedef struct {
  jamba_softmax_call forward;  // sum_M is not read
  const float *share_M;
  const int64_t *targets_M;
} jamba_softmax_slopes_call;

// How the values of a matrix lie in memory; row after row in each.
enum {
  JAMBA_F32 = 0,
  JAMBA_BF16 = 1,
  JAMBA_INT8 = 2,  // values[o][i] * scale[o], scale float32
  // q * scale + minimum, both bfloat16 and shared by `group` inputs. Of 32 inputs, byte j
  // holds input j in its low and input j + 16 in its high half.
  JAMBA_INT4 = 3,
};

// Whether bfloat16 rows that meet a matrix of INT8 or INT4 may be rounded to 8 bits, where they are
// many and that is faster.
enum {
  JAMBA_ROWS_KEPT = 0,
  JAMBA_ROWS8_BY_GROUP = 1,  // with a scale for each 64 inputs
  JAMBA_ROWS8 = 2,           // so, or with a scale for the row
};

// W of y = W x + bias, with O outputs and I inputs.
typedef struct {
  int64_t kind, O, I;
  int64_t group;  // INT4 only: 32 or 64, and a divisor of I
  const void *values;
  const void *scale;    // INT8, INT4
  const void *minimum;  // INT4
  const float *bias;    // null means none
  int64_t rows8;        // JAMBA_ROWS_KEPT ..
} jamba_matrix;

// y = W x for rows of float32 or bfloat16 (JAMBA_U), in the type of x.
typedef struct {
  int64_t path;
  int64_t threads;
  int64_t bfloat16;
  int64_t M;
  const void *x_MI;
  int64_t x_stride;
  void *y_MO;
  jamba_matrix matrix;
} jamba_product_call;

// The matrix as bfloat16 (JAMBA_U) or float32, [O, I].
typedef struct {
  int64_t path;
  int64_t threads;
  int64_t bfloat16;
  void *out_OI;
  jamba_matrix matrix;
} jamba_unpack_call;

// Most rows of a step. D model width, H query heads, G key/value heads, P head width,
// F feed-forward width, R rank of dt, V vocabulary, X experts, K experts for a row.
#define JAMBA_STEP_ROWS 16

// One layer. Vectors are float32. Null where the layer has none of it.
typedef struct {
  int64_t attends;  // 0: Mamba, 1: attention
  int64_t experts;  // 0: one feed-forward without router
  const float *mixer_norm_D, *feed_forward_norm_D;
  // Attention: the query, key, value and output projections take the places of the first four.
  jamba_matrix in_proj, x_proj, dt_proj, out_proj;
  const float *conv_WC, *conv_bias_C;
  const float *dt_norm_R, *B_norm_N, *C_norm_N;  // null: not normalised
  const float *dt_bias_C, *A_CN, *skip_C;
  jamba_matrix router;
  const jamba_matrix *feed_forward;  // gate, up, down: of each expert, or of the one
} jamba_layer;

typedef struct {
  int64_t num_layers, D, V, C, N, W, R, F, H, G, P, K;
  int64_t bfloat16;  // type of the convolution's window, of keys and of values
  double epsilon, attention_scale;
  const jamba_layer *layers;
  const float *final_norm_D;
  jamba_matrix embedding, head;
} jamba_model;

// Keys and values of `count` consecutive tokens, [count][G][P] each.
typedef struct {
  const void *keys, *values;
  int64_t count;
} jamba_key_block;

// What one sequence remembers in one layer.
typedef struct {
  // Mamba. Read and written; the two may not overlap.
  const void *conv_LC;
  const float *scan_CN;
  void *next_conv_LC;
  float *next_scan_CN;
  // Attention: all tokens, those of this step at the end of the last block, where there is room
  // for them: the step writes them first.
  int64_t num_blocks;
  const jamba_key_block *blocks;
} jamba_memory;

// Parts of a step or a prefill, and what a thread does in them: for a caller who asks where the
// time goes. Norms are all of them, the scan comes with its gate, and the first part also has what
// a thread does before its first row.
enum {
  JAMBA_EMBEDDING,
  JAMBA_NORMS,
  JAMBA_IN_PROJ,
  JAMBA_CONVOLUTION,
  JAMBA_X_PROJ,
  JAMBA_DT_PROJ,
  JAMBA_SCAN,
  JAMBA_OUT_PROJ,
  JAMBA_QKV_PROJ,
  JAMBA_ATTENTION,
  JAMBA_O_PROJ,
  JAMBA_ROUTER,
  JAMBA_MLP,
  JAMBA_EXPERTS,
  JAMBA_HEAD,
  JAMBA_PARTS
};
enum {
  JAMBA_COMPUTES,
  JAMBA_CUTS_WEIGHTS,   // into tiles, where many rows meet them
  JAMBA_CUTS_ROWS,      // or otherwise arranges them for a product
  JAMBA_GIVES_RESULTS,  // of a product of many rows
  JAMBA_WAITS,          // for other threads
  JAMBA_ACTIVITIES
};

// All layers for some tokens of one or more sequences.
typedef struct {
  int64_t path;
  int64_t threads;
  const jamba_model *model;
  int64_t B, M;
  const int64_t *offsets;
  const int64_t *ids_M;
  const jamba_memory *memories;  // [layer][sequence]
  int64_t num_logits;            // of a prefill, also none
  const int64_t *logit_rows;
  float *logits;  // [num_logits][V]
  // Nanoseconds, which the call adds to: [threads][JAMBA_PARTS][JAMBA_ACTIVITIES]; or null.
  int64_t *spent;
} jamba_step_call;

JAMBA_EXPORT int32_t jamba_abi_version(void);

// Name of path `index` (from 0, best first), or null past the last one.
JAMBA_EXPORT const char *jamba_path_name(int64_t index);

// 1 when this processor can run path `index`.
JAMBA_EXPORT int32_t jamba_path_runs_here(int64_t index);

JAMBA_EXPORT int32_t jamba_selective_scan(const jamba_scan_call *call);
JAMBA_EXPORT int32_t jamba_selective_scan_backward(const jamba_scan_backward_call *call);
JAMBA_EXPORT int32_t jamba_causal_conv(const jamba_conv_call *call);
JAMBA_EXPORT int32_t jamba_causal_conv_backward(const jamba_conv_backward_call *call);
JAMBA_EXPORT int32_t jamba_norm(const jamba_norm_call *call);
JAMBA_EXPORT int32_t jamba_norm_backward(const jamba_norm_backward_call *call);
JAMBA_EXPORT int32_t jamba_gate(const jamba_gate_call *call);
JAMBA_EXPORT int32_t jamba_gate_backward(const jamba_gate_backward_call *call);
JAMBA_EXPORT int32_t jamba_softmax_sums(const jamba_softmax_call *call);
JAMBA_EXPORT int32_t jamba_softmax_slopes(const jamba_softmax_slopes_call *call);
JAMBA_EXPORT int32_t jamba_product(const jamba_product_call *call);
JAMBA_EXPORT int32_t jamba_unpack(const jamba_unpack_call *call);
// Up to JAMBA_STEP_ROWS tokens, where reading the weights is the work.
JAMBA_EXPORT int32_t jamba_step(const jamba_step_call *call);
// Any number of tokens, where multiplying is the work.
JAMBA_EXPORT int32_t jamba_prefill(const jamba_step_call *call);

// The vector functions the kernels are made of, one value at a time for all of
// `x_M`, so that tests can sweep their error.
enum { JAMBA_EXP2 = 0, JAMBA_EXP = 1, JAMBA_SOFTPLUS = 2, JAMBA_SIGMOID = 3 };
JAMBA_EXPORT int32_t jamba_vector_function(int64_t path, int64_t function, const float *x_M,
                                           float *y_M, int64_t M);

#ifdef __cplusplus
}
#endif
#endif
