// Σ coefficient·tensor, the only arithmetic of a sampler between two network calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace sign_fast {

struct Term {
  at::Tensor source;
  double coefficient;
};

// At least one term; every source is read in `dtype`, which the result has. A single source with coefficient 1 is
// shared.
at::Tensor linear_combination(const std::vector<Term>& terms, at::ScalarType dtype);

// The same with the coefficients as a (terms,) float64 tensor on the sources' device, where nothing is shared and
// nothing read: a CUDA graph has them as an input. Needs the operators of sign_fast.kernels.combine to be defined.
at::Tensor linear_combination(const std::vector<Term>& terms, const at::Tensor& coefficients, at::ScalarType dtype);

}  // namespace sign_fast
