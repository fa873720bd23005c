// Which instruction sets this build has, and which of them the processor runs.
#include "paths.h"

#include "tile_kernels.h"

namespace jamba {

#ifdef JAMBA_X86
// A path with all of another's code, and more for products of many rows.
static Path with_tiles(const char *name, Path path, bool (*runs_here)(), TileKernels tiles) {
  path.name = name;
  path.runs_here = runs_here;
  path.tiles = tiles;
  return path;
}

static const Path amx = with_tiles(
    "amx", path_avx512_vnni, [] { return path_avx512_vnni.runs_here() && amx_runs_here(); },
    {begin_amx, end_amx, pairs_by_amx, quads_by_amx, nullptr, cut_few_for_amx, few_by_amx});
static const Path avx512_vnni =
    with_tiles("avx512_vnni", path_avx512_vnni, path_avx512_vnni.runs_here,
               {nullptr, nullptr, nullptr, nullptr, groups_by_avx512_vnni, nullptr, nullptr});
static const Path avx512_bf16 = with_tiles(
    "avx512_bf16", path_avx512_bf16, path_avx512_bf16.runs_here,
    {nullptr, nullptr, pairs_by_avx512_bf16, nullptr, groups_by_avx512_vnni, nullptr, nullptr});
#endif

// Fastest first.
static const Path *const PATHS[] = {
#ifdef JAMBA_X86
    &amx,           &avx512_bf16, &avx512_vnni, &path_avx512, &path_avx2,
#endif
    &path_portable,
};
constexpr int64_t NUM_PATHS = sizeof PATHS / sizeof *PATHS;

const Path *find_path(int64_t request) {
  if (request < 0 || request > NUM_PATHS) return nullptr;
  if (request > 0) return PATHS[request - 1]->runs_here() ? PATHS[request - 1] : nullptr;
  for (const Path *path : PATHS) {
    if (path->runs_here()) return path;
  }
  return nullptr;
}

bool offsets_are_valid(const int64_t *offsets, int64_t B, int64_t M) {
  if (offsets[0] != 0 || offsets[B] != M) return false;
  for (int64_t b = 0; b < B; b++) {
    if (offsets[b] >= offsets[b + 1]) return false;
  }
  return true;
}

}  // namespace jamba

using namespace jamba;

int32_t jamba_abi_version(void) { return JAMBA_ABI_VERSION; }

const char *jamba_path_name(int64_t index) {
  return index >= 0 && index < NUM_PATHS ? PATHS[index]->name : nullptr;
}

int32_t jamba_path_runs_here(int64_t index) {
  return index >= 0 && index < NUM_PATHS && PATHS[index]->runs_here();
}

int32_t jamba_vector_function(int64_t request, int64_t function, const float *x_M, float *y_M,
                              int64_t M) {
  const Path *path = find_path(request);
  if (path == nullptr) return JAMBA_NO_SUCH_PATH;
  path->vector_function(function, x_M, y_M, M);
  return JAMBA_OK;
}
