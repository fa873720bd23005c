// Compiled with AVX2 and FMA; nothing here runs before find_path() has asked the
// processor.
#define JAMBA_PATH avx2
#include "path.inc"

static bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

JAMBA_DEFINE_PATH(avx2, runs_here)
