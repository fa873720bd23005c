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

#define JAMBA_ABI_VERSION 2

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

// The vector functions the kernels are made of, one value at a time for all of
// `x_M`, so that tests can sweep their error.
enum { JAMBA_EXP2 = 0, JAMBA_EXP = 1, JAMBA_SOFTPLUS = 2, JAMBA_SIGMOID = 3 };
JAMBA_EXPORT int32_t jamba_vector_function(int64_t path, int64_t function, const float *x_M,
                                           float *y_M, int64_t M);

#ifdef __cplusplus
}
#endif
#endif
