// The exponential that the CPU kernels share; of internal linkage, see capability.h.
#pragma once

#include "pack.h"

namespace sign_fast {
namespace {

// e^-x, within 3e-7; infinite from x = −89 on
inline Vec exp_of_minus(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  // e^-x = 2^n·e^r, |r| ≤ ½ ln 2, and a polynomial of relative error 9e-8: half the instructions of exp_u20
  const auto c = [](float value) { return _mm512_set1_ps(value); };
  const __m512 within = _mm512_max_ps(_mm512_min_ps(x, c(104.f)), c(-89.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(within, c(-1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fnmsub_ps(n, c(0.693147182f), within);
  __m512 p = _mm512_fmadd_ps(r, c(0.008290272f), c(0.04189816f));
  p = _mm512_fmadd_ps(r, p, c(0.16667639f));
  p = _mm512_fmadd_ps(r, p, c(0.49999148f));
  p = _mm512_fmadd_ps(r, p, c(0.9999997f));
  p = _mm512_fmadd_ps(r, p, c(1.f));
  return _mm512_scalef_ps(p, n);
#else
  return x.neg().exp_u20();
#endif
}

}  // namespace
}  // namespace sign_fast
