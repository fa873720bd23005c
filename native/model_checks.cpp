#include "model_checks.h"

#include <algorithm>

namespace jamba {

bool matrix_is_valid(const jamba_matrix &matrix) {
  if (matrix.O <= 0 || matrix.I <= 0 || matrix.values == nullptr) return false;
  switch (matrix.kind) {
    case JAMBA_F32:
    case JAMBA_BF16: return true;
    case JAMBA_INT8: return matrix.scale != nullptr;
    case JAMBA_INT4:
      return (matrix.group == 32 || matrix.group == 64) && matrix.I % matrix.group == 0 &&
             matrix.scale != nullptr && matrix.minimum != nullptr;
  }
  return false;
}

bool matrices_are_valid(const jamba_model &model) {
  for (int64_t i = 0; i < model.num_layers; i++) {
    const jamba_layer &layer = model.layers[i];
    for (const jamba_matrix *matrix :
         {&layer.in_proj, &layer.x_proj, &layer.dt_proj, &layer.out_proj}) {
      if (!matrix_is_valid(*matrix)) return false;
    }
    if (layer.experts < 0 || (layer.experts > 0 && !matrix_is_valid(layer.router))) return false;
    if (layer.experts > 0 && (model.K < 1 || model.K > layer.experts)) return false;
    const int64_t matrices = 3 * std::max<int64_t>(layer.experts, 1);
    for (int64_t m = 0; m < matrices; m++) {
      if (!matrix_is_valid(layer.feed_forward[m])) return false;
    }
  }
  return matrix_is_valid(model.embedding) && matrix_is_valid(model.head);
}

}  // namespace jamba
