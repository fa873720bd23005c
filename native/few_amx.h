// What the files share that multiply a few rows by the matrix extension (AMX).
#ifndef JAMBA_FEW_AMX_H
#define JAMBA_FEW_AMX_H

#include "few_rows.h"

namespace jamba {

constexpr int ROW_BYTES = 64;
// Bytes that are asked for ahead of each row: a tile reads sixteen rows at once, and the processor
// does not see that many sequences by itself.
constexpr int64_t AHEAD = 384;

// Has two lines of each of sixteen rows fetched, of these outputs or of those read `after` them.
static inline void fetch_rows(const char *weights, const char *after, int64_t stride, int64_t at) {
  const char *p = at < stride ? weights + at : after + (at - stride);
  for (int64_t row = 0; row < TILE; row++, p += stride) {
    __builtin_prefetch(p, 0, 3);
    __builtin_prefetch(p + 64, 0, 3);
  }
}

// Sixteen outputs of weights of 4 bits with rows that have several columns each: found[row].
void sum_nibbles_apart(const FewProduct &p, int64_t output, float (*found)[TILE]);

}  // namespace jamba
#endif
