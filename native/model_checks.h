// What is refused of a model before anything of it is read.
#ifndef JAMBA_MODEL_CHECKS_H
#define JAMBA_MODEL_CHECKS_H

#include "jamba_kernels.h"

namespace jamba {

bool matrix_is_valid(const jamba_matrix &matrix);
bool matrices_are_valid(const jamba_model &model);

}  // namespace jamba
#endif
