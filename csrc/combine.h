// The CPU kernel of a sum of states: raw pointers in, so that its translation units need no tensor headers.
#pragma once

#include <cstdint>

#include "capability.h"

namespace sign_fast {

enum class StateDtype { Double, Float, BFloat16, Half };

struct CombineTerm {
  const void* state;
  StateDtype dtype;
  double coefficient;
};

struct CombineArgs {
  const CombineTerm* terms;
  int64_t count;  // of terms, at least 1
  void* y;        // y = Σ coefficient·state, in double where y is, else in float; may be one of the states
  StateDtype y_dtype;
};

// Elements begin to end.
SIGN_FAST_DECLARE_KERNEL(combine, void, const CombineArgs&, int64_t begin, int64_t end)

// All elements, by several threads where that pays.
void run_combine(const CombineArgs& args, int64_t elements);

}  // namespace sign_fast
