// How the work of small products and of a step is cut, and what the threads of a step share.
#ifndef JAMBA_STEP_H
#define JAMBA_STEP_H

#include "jamba_kernels.h"
#include "team.h"

namespace jamba {

// Outputs, or channels, of one piece of work: a multiple of every path's lanes and of the tile of
// a product.
constexpr int64_t PIECE = 64;

// Keys that one piece of attention takes: long enough for the way there to pay, short enough that
// two threads share a context of some thousand. Sums are joined piece by piece, so it
// decides the last bits of the result, and does not depend on the threads.
constexpr int64_t KEYS_OF_PIECE = 512;

// Activations of all rows, float32.
struct StepBuffers {
  float *x;          // [M][D] the residual stream
  float *u, *gate;   // [M][C]
  float *selection;  // [M][R + 2 N]
  float *y;          // [M][max(C, H P)]
  float *q;          // [M][H P]
  float *hidden;     // [M K][F]
  float *partial;    // [M][key_pieces][H][P + 2]
  int64_t key_pieces;
};

// 0, 1, 2, ...: the rows of a product that takes all of them.
constexpr int64_t FIRST_ROWS[JAMBA_STEP_ROWS] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                 8, 9, 10, 11, 12, 13, 14, 15};

}  // namespace jamba
#endif
