// Plans the selective scan: which thread takes which channels of which sequence.
//
// Forward needs no sums over channels, so any split is right. Backward adds the
// gradients of B and C over channels: it does so in groups of blocks whose number
// depends on C alone, and adds the groups in order, so that results are the same for
// every number of threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "paths.h"
#include "scratch.h"

namespace jamba {
namespace {

// Below this many (token, channel, state) triples starting a second thread costs more
// than it saves: about 10 microseconds of work.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 16;

// Chunks between two meetings of the threads in backward.
constexpr int64_t SLAB_CHUNKS = 16;

bool sizes_are_valid(const jamba_scan_call &call) {
  return call.B > 0 && call.M > 0 && call.C > 0 && call.N > 0 && call.threads > 0;
}

int useful_threads(const jamba_scan_call &call, int64_t pieces) {
  const int64_t elements = call.M * call.C * call.N;
  return (int)std::max<int64_t>(1,
                                std::min({call.threads, pieces, elements / ELEMENTS_PER_THREAD}));
}

void forward(const Path &path, const jamba_scan_call &call, int threads,
             const std::vector<int64_t> &checkpoints, const Scratch &scratch,
             int64_t scratch_size) {
  const int64_t blocks = divide_up(call.C, path.lanes);
  const int64_t work = call.M * blocks;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    // Sequences laid end to end, block after block: this thread's share is the blocks
    // that begin within its part of the whole.
    const int64_t begin = work * thread / threads, end = work * (thread + 1) / threads;
    for (int64_t b = 0; b < call.B; b++) {
      const int64_t tokens = call.offsets[b + 1] - call.offsets[b];
      const int64_t at = call.offsets[b] * blocks;
      const int64_t first = std::clamp<int64_t>(divide_up(begin - at, tokens), 0, blocks);
      const int64_t last = std::clamp<int64_t>(divide_up(end - at, tokens), 0, blocks);
      if (first < last) {
        path.scan(call, b, checkpoints[b], first, last, scratch.data() + thread * scratch_size);
      }
    }
  }
}

// Each sequence's first checkpoint.
std::vector<int64_t> first_checkpoints(const jamba_scan_call &call) {
  std::vector<int64_t> first(call.B);
  int64_t count = 0;
  for (int64_t b = 0; b < call.B; b++) {
    first[b] = count;
    count += divide_up(call.offsets[b + 1] - call.offsets[b], CHECKPOINT_TOKENS);
  }
  return first;
}

std::vector<ScanChunk> all_chunks(const jamba_scan_call &call) {
  std::vector<ScanChunk> chunks;
  for (int64_t b = 0; b < call.B; b++) {
    const int64_t start = call.offsets[b], end = call.offsets[b + 1];
    for (int64_t row = start; row < end; row += CHECKPOINT_TOKENS) {
      const int64_t last = std::min(row + CHECKPOINT_TOKENS, end);
      chunks.push_back({b, row, last - row, (int64_t)chunks.size(), row == start, last == end});
    }
  }
  return chunks;
}

// Blocks per group: eight where there are many, fewer so that small models still give
// work to a few threads, and at most 64 groups so that their sums stay small.
int64_t blocks_per_group(int64_t blocks) {
  return std::max(std::clamp<int64_t>(blocks / 4, 1, 8), divide_up(blocks, 64));
}

int32_t backward(const Path &path, const jamba_scan_backward_call &call) {
  const jamba_scan_call &forward = call.forward;
  const int64_t N = forward.N, padded = padded_states(N), lanes = path.lanes;
  const int64_t blocks = divide_up(forward.C, lanes), per_group = blocks_per_group(blocks);
  const int64_t groups = divide_up(blocks, per_group);
  const int threads = useful_threads(forward, groups);
  const std::vector<ScanChunk> chunks = all_chunks(forward);

  const int64_t per_state = blocks * padded * lanes, per_channel = cache_lines(blocks * lanes);
  const Scratch carried(3 * per_state + 2 * per_channel);
  const int64_t sums_size = groups * SLAB_CHUNKS * CHECKPOINT_TOKENS * padded;
  const Scratch sums(2 * sums_size);
  const int64_t scratch_size = cache_lines(path.scan_backward_scratch(forward, per_group));
  const Scratch scratch(threads * scratch_size);
  if (!carried.data() || !sums.data() || !scratch.data()) return JAMBA_NO_MEMORY;

  std::fill_n(carried.data(), 3 * per_state + 2 * per_channel, 0.0f);
  const ScanCarry carry = {
      carried.data(),
      carried.data() + per_state,
      carried.data() + 2 * per_state,
      carried.data() + 3 * per_state,
      carried.data() + 3 * per_state + per_channel,
  };
  for (int64_t block = 0; block < blocks; block++) path.scan_backward_begin(forward, carry, block);

  const int64_t num_chunks = (int64_t)chunks.size();
#pragma omp parallel num_threads(threads)
  for (int64_t slab_end = num_chunks; slab_end > 0; slab_end -= SLAB_CHUNKS) {
    const int64_t slab = std::max<int64_t>(slab_end - SLAB_CHUNKS, 0);
    const int64_t first_row = chunks[slab].first_row;
    const int64_t end_row = chunks[slab_end - 1].first_row + chunks[slab_end - 1].num_rows;
    const auto sums_at = [&](int64_t group, int64_t row) {
      return sums.data() + (group * SLAB_CHUNKS * CHECKPOINT_TOKENS + row - first_row) * padded;
    };
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < threads; piece++) {
      const int64_t first = groups * piece / threads, last = groups * (piece + 1) / threads;
      float *own = scratch.data() + piece * scratch_size;
      for (int64_t i = slab_end - 1; i >= slab; i--) {
        for (int64_t group = first; group < last; group++) {
          const ScanPlace next =
              group + 1 < last ? ScanPlace{chunks[i].first_row, (group + 1) * per_group}
                               : ScanPlace{chunks[i > 0 ? i - 1 : 0].first_row, first * per_group};
          float *grad_B = sums_at(group, chunks[i].first_row);
          path.scan_backward(call, chunks[i], carry, group * per_group,
                             std::min((group + 1) * per_group, blocks), next, grad_B,
                             grad_B + sums_size, own);
        }
      }
    }
    // Group 0 receives the others, in order.
#pragma omp for schedule(static)
    for (int64_t row = first_row; row < end_row; row++) {
      for (int64_t part = 0; part < 2; part++) {
        float *total = sums_at(0, row) + part * sums_size;
        for (int64_t group = 1; group < groups; group++) {
          const float *addend = sums_at(group, row) + part * sums_size;
          for (int64_t n = 0; n < N; n++) total[n] += addend[n];
        }
      }
      path.store_row(call.grad_B_MN, forward.bfloat16 & JAMBA_B, row * N, N, sums_at(0, row));
      path.store_row(call.grad_C_MN, forward.bfloat16 & JAMBA_C, row * N, N,
                     sums_at(0, row) + sums_size);
    }
  }
  for (int64_t block = 0; block < blocks; block++) path.scan_backward_end(call, carry, block);
  return JAMBA_OK;
}

int32_t check(const jamba_scan_call &call, const Path *path) {
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  if (!sizes_are_valid(call)) return JAMBA_BAD_SIZE;
  if (!offsets_are_valid(call.offsets, call.B, call.M)) return JAMBA_BAD_OFFSETS;
  return JAMBA_OK;
}

}  // namespace
}  // namespace jamba

using namespace jamba;

int32_t jamba_selective_scan(const jamba_scan_call *call) try {
  const Path *path = find_path(call->path);
  if (const int32_t status = check(*call, path)) return status;
  const int threads = useful_threads(*call, call->B * divide_up(call->C, path->lanes));
  const int64_t scratch_size =
      cache_lines(path->scan_scratch(*call, divide_up(call->C, path->lanes)));
  const Scratch scratch(threads * scratch_size);
  if (!scratch.data()) return JAMBA_NO_MEMORY;
  forward(*path, *call, threads, first_checkpoints(*call), scratch, scratch_size);
  return JAMBA_OK;
} catch (const std::bad_alloc &) {
  return JAMBA_NO_MEMORY;
}

int32_t jamba_selective_scan_backward(const jamba_scan_backward_call *call) try {
  const Path *path = find_path(call->forward.path);
  if (const int32_t status = check(call->forward, path)) return status;
  return backward(*path, *call);
} catch (const std::bad_alloc &) {
  return JAMBA_NO_MEMORY;
}
