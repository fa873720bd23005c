// Plans the causal convolution. Forward, rows do not depend on each other, so threads
// take rows; backward, weights collect a sum over all rows, so threads take channels.
// Either way results are the same for every number of threads.
#include <algorithm>

#include "paths.h"
#include "scratch.h"

namespace jamba {
namespace {

// Below this many products starting a second thread costs more than it saves.
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 17;

int32_t check(const jamba_conv_call &call, const Path *path) {
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  if (call.B <= 0 || call.M <= 0 || call.C <= 0 || call.threads <= 0) return JAMBA_BAD_SIZE;
  if (call.W < 1 || call.W > 8) return JAMBA_BAD_SIZE;
  if (!offsets_are_valid(call.offsets, call.B, call.M)) return JAMBA_BAD_OFFSETS;
  return JAMBA_OK;
}

int useful_threads(const jamba_conv_call &call, int64_t pieces) {
  const int64_t products = call.M * call.C * call.W;
  return (int)std::max<int64_t>(1,
                                std::min({call.threads, pieces, products / PRODUCTS_PER_THREAD}));
}

}  // namespace
}  // namespace jamba

using namespace jamba;

int32_t jamba_causal_conv(const jamba_conv_call *call) {
  const Path *path = find_path(call->path);
  if (const int32_t status = check(*call, path)) return status;
  const int threads = useful_threads(*call, call->M);
  const int64_t scratch_size = cache_lines(path->conv_scratch(*call));
  const Scratch scratch(threads * scratch_size);
  if (!scratch.data()) return JAMBA_NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    const int64_t begin = call->M * thread / threads, end = call->M * (thread + 1) / threads;
    for (int64_t b = 0; b < call->B; b++) {
      const int64_t first = std::max(begin, call->offsets[b]);
      const int64_t last = std::min(end, call->offsets[b + 1]);
      if (first < last) {
        path->conv(*call, b, first, last, scratch.data() + thread * scratch_size);
      }
    }
  }
  return JAMBA_OK;
}

int32_t jamba_causal_conv_backward(const jamba_conv_backward_call *call) {
  const Path *path = find_path(call->forward.path);
  if (const int32_t status = check(call->forward, path)) return status;
  const int64_t blocks = divide_up(call->forward.C, path->lanes);
  const int threads = useful_threads(call->forward, blocks);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++) path->conv_backward(*call, block);
  return JAMBA_OK;
}
