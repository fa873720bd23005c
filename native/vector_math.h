// exp, softplus and sigmoid on vectors, with the error bounds that
// tests/kernels/test_vector_functions.py sweeps.
#ifndef JAMBA_VECTOR_MATH_H
#define JAMBA_VECTOR_MATH_H

#include "simd.h"

namespace jamba::JAMBA_PATH {

constexpr float LOG2_E = 1.44269504088896341f;

// exp(x) for x <= 0, relative error at most 3e-7 down to 2^-126. The two-part ln 2 (the
// first part has nine bits, so k * LN2_HIGH is exact) keeps the digits of large arguments.
JAMBA_INLINE Vec exp_nonpositive(Vec x) {
  constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  x = maximum(set(-87.3f), x);
  const Vec shift = set(EXP2_SHIFT);
  const Vec shifted = fma(x, set(LOG2_E), shift), k = shifted - shift;
  const Vec r = fma(k, set(-LN2_LOW), fma(k, set(-LN2_HIGH), x));
  return exp2_of_parts(shifted, k, r * LOG2_E);
}

// log(1 + x) for x in [0, 1]: x times a polynomial by Remez, relative error 3e-8 before
// rounding, so small results keep their digits.
JAMBA_INLINE Vec log1p_unit(Vec x) {
  Vec p = fma(set(5.378411151e-03f), x, set(-3.012227081e-02f));
  p = fma(p, x, set(7.930055261e-02f));
  p = fma(p, x, set(-1.376237422e-01f));
  p = fma(p, x, set(1.915793866e-01f));
  p = fma(p, x, set(-2.485834062e-01f));
  p = fma(p, x, set(3.332148194e-01f));
  p = fma(p, x, set(-4.999965727e-01f));
  return fma(p * x, x, x);
}

struct SoftplusAndSlope {
  Vec value, slope;
};

JAMBA_INLINE Vec magnitude_exp(Vec z) { return exp_nonpositive(minus_magnitude(z)); }

JAMBA_INLINE Vec sigmoid_given(Vec z, Vec exp_of_minus_magnitude) {
  const Vec e = exp_of_minus_magnitude;
  return select(z > 0, set(1.0f), e) * reciprocal(e + 1.0f);
}

// log(1 + exp(z)), split so that it neither overflows for large z nor loses the
// digits of its tail exp(z) for very negative z.
JAMBA_INLINE Vec softplus(Vec z) { return maximum(set(0.0f), z) + log1p_unit(magnitude_exp(z)); }

JAMBA_INLINE SoftplusAndSlope softplus_and_slope(Vec z) {
  const Vec e = magnitude_exp(z);
  return {maximum(set(0.0f), z) + log1p_unit(e), sigmoid_given(z, e)};
}

JAMBA_INLINE Vec sigmoid(Vec z) { return sigmoid_given(z, magnitude_exp(z)); }

}  // namespace jamba::JAMBA_PATH
#endif
