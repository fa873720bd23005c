// Compiled with AVX-512 F, BW, DQ, VL, VNNI and BF16, which multiplies pairs of bfloat16 numbers
// and adds them in one instruction; nothing here runs before find_path() has asked the processor.
#define JAMBA_PATH avx512_bf16
#include "path.inc"

static bool runs_here() {
  return jamba::path_avx512_vnni.runs_here() && __builtin_cpu_supports("avx512bf16");
}

JAMBA_DEFINE_PATH(avx512_bf16, runs_here)
