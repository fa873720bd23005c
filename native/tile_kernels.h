// The products of tiles that need instructions beyond those of a path.
#ifndef JAMBA_TILE_KERNELS_H
#define JAMBA_TILE_KERNELS_H

#include "tiles.h"

namespace jamba {

void pairs_by_avx512_bf16(const TileProduct &product);
void groups_by_avx512_vnni(const TileProduct &product);

// The registers of AMX are to be set up by `begin_amx` on each thread, and given back.
void begin_amx();
void end_amx();
void pairs_by_amx(const TileProduct &product);
void quads_by_amx(const TileProduct &product);
void cut_few_for_amx(const jamba_matrix &matrix, const float *x, int64_t stride, int64_t rows,
                     const FewTiles &out);
void few_by_amx(const FewProduct &product);

// Asks the processor, and the system for leave to use its registers.
bool amx_runs_here();

}  // namespace jamba
#endif
