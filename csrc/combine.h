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
// shared. In one pass for dense float32 and float64 on the CPU, with the bits of one torch operation after another.
at::Tensor combine(const std::vector<Term>& terms, at::ScalarType dtype);

}  // namespace sign_fast
