// Plans RMSNorm, the SiLU gate and the softmax of a loss: threads take rows. The gain of the norm
// collects a sum over all rows, in a fixed number of parts, so that results are the same for every
// number of threads.
#include <string.h>

#include <algorithm>

#include "paths.h"
#include "scratch.h"

namespace jamba {
namespace {

// Below this many values starting a second thread costs more than it saves.
constexpr int64_t VALUES_PER_THREAD = 1 << 14;

// Rows whose part of the gain's gradient is summed before the parts are added up.
constexpr int64_t ROWS_PER_PART = 128;

int useful_threads(int64_t threads, int64_t pieces, int64_t values) {
  return (int)std::max<int64_t>(1, std::min({threads, pieces, values / VALUES_PER_THREAD}));
}

template <typename Call>
int32_t check(const Call &call, int64_t width, const Path *path) {
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  return call.M > 0 && width > 0 && call.threads > 0 ? JAMBA_OK : JAMBA_BAD_SIZE;
}

template <typename Rows>
void share_rows(int64_t M, int threads, Rows rows) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    rows(M * thread / threads, M * (thread + 1) / threads);
  }
}

}  // namespace
}  // namespace jamba

using namespace jamba;

int32_t jamba_norm(const jamba_norm_call *call) {
  const Path *path = find_path(call->path);
  if (const int32_t status = check(*call, call->D, path)) return status;
  share_rows(call->M, useful_threads(call->threads, call->M, call->M * call->D),
             [&](int64_t first, int64_t last) { path->norm(*call, first, last); });
  return JAMBA_OK;
}

int32_t jamba_norm_backward(const jamba_norm_backward_call *call) {
  const jamba_norm_call &in = call->forward;
  const Path *path = find_path(in.path);
  if (const int32_t status = check(in, in.D, path)) return status;
  const int64_t parts = divide_up(in.M, ROWS_PER_PART);
  const int64_t width = cache_lines(in.D);
  const Scratch sums(parts * width);
  if (!sums.data()) return JAMBA_NO_MEMORY;
  memset(sums.data(), 0, (size_t)(parts * width) * sizeof(float));
  const int threads = useful_threads(in.threads, parts, in.M * in.D);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = part * ROWS_PER_PART;
    path->norm_backward(*call, first, std::min(first + ROWS_PER_PART, in.M),
                        sums.data() + part * width);
  }
  for (int64_t i = 0; i < in.D; i++) {
    float sum = 0;
    for (int64_t part = 0; part < parts; part++) sum += sums.data()[part * width + i];
    call->grad_weight_D[i] = sum;
  }
  return JAMBA_OK;
}

int32_t jamba_gate(const jamba_gate_call *call) {
  const Path *path = find_path(call->path);
  if (const int32_t status = check(*call, call->D, path)) return status;
  share_rows(call->M, useful_threads(call->threads, call->M, call->M * call->D),
             [&](int64_t first, int64_t last) { path->gate(*call, first, last); });
  return JAMBA_OK;
}

int32_t jamba_gate_backward(const jamba_gate_backward_call *call) {
  const jamba_gate_call &in = call->forward;
  const Path *path = find_path(in.path);
  if (const int32_t status = check(in, in.D, path)) return status;
  share_rows(in.M, useful_threads(in.threads, in.M, in.M * in.D),
             [&](int64_t first, int64_t last) { path->gate_backward(*call, first, last); });
  return JAMBA_OK;
}

int32_t jamba_softmax_sums(const jamba_softmax_call *call) {
  const Path *path = find_path(call->path);
  if (const int32_t status = check(*call, call->V, path)) return status;
  share_rows(call->M, useful_threads(call->threads, call->M, call->M * call->V),
             [&](int64_t first, int64_t last) { path->softmax_sums(*call, first, last); });
  return JAMBA_OK;
}

int32_t jamba_softmax_slopes(const jamba_softmax_slopes_call *call) {
  const jamba_softmax_call &in = call->forward;
  const Path *path = find_path(in.path);
  if (const int32_t status = check(in, in.V, path)) return status;
  share_rows(in.M, useful_threads(in.threads, in.M, in.M * in.V),
             [&](int64_t first, int64_t last) { path->softmax_slopes(*call, first, last); });
  return JAMBA_OK;
}
