// Compiled with AVX-512 F, BW, DQ, VL and VNNI, which multiplies pairs of integers and adds
// them in one instruction; nothing here runs before find_path() has asked the processor.
#define JAMBA_PATH avx512_vnni
#include "path.inc"

static bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("avx2");
}

JAMBA_DEFINE_PATH(avx512_vnni, runs_here)
