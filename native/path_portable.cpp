// Compiled for the baseline of whatever processor this is.
#define JAMBA_PATH portable
#include "path.inc"

static bool runs_here() { return true; }

JAMBA_DEFINE_PATH(portable, runs_here)
