// A sum of states over raw pointers, compiled once a CPU capability: see capability.h.
//
// kernels/combine/reference.py operation by operation, without fused multiply-adds, so that the bits are the same.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off", "no-trapping-math")  // the latter lets roundings to 16 bits become vectors
#endif

#include <algorithm>

#include "combine.h"
#include "convert.h"

namespace sign_fast {
namespace {

constexpr int64_t CHUNK = 512;  // elements at a time: the sum stays in the first-level cache

template <typename Body>
inline void each_dtype(StateDtype dtype, const Body& body) {
  switch (dtype) {
    case StateDtype::Double:
      return body(double{});
    case StateDtype::Float:
      return body(float{});
    case StateDtype::BFloat16:
      return body(c10::BFloat16{});
    case StateDtype::Half:
      return body(c10::Half{});
  }
}

template <typename Wide>
void sum(const CombineArgs& a, int64_t begin, int64_t end) {
  Wide total[CHUNK], value[CHUNK];
  for (int64_t first = begin; first < end; first += CHUNK) {
    const int64_t n = std::min(CHUNK, end - first);
    for (int64_t j = 0; j < a.count; ++j) {
      each_dtype(a.terms[j].dtype, [&](auto type) {
        widen(static_cast<const decltype(type)*>(a.terms[j].state) + first, n, value);
      });
      const Wide coefficient = static_cast<Wide>(a.terms[j].coefficient);
      if (j == 0) {
        for (int64_t i = 0; i < n; ++i) total[i] = coefficient * value[i];
      } else {
        for (int64_t i = 0; i < n; ++i) total[i] = total[i] + coefficient * value[i];
      }
    }
    each_dtype(a.y_dtype, [&](auto type) { narrow(total, n, static_cast<decltype(type)*>(a.y) + first); });
  }
}

}  // namespace

void SIGN_FAST_ENTRY(combine)(const CombineArgs& a, int64_t begin, int64_t end) {
  if (a.y_dtype == StateDtype::Double) {
    sum<double>(a, begin, end);
  } else {
    sum<float>(a, begin, end);
  }
}

}  // namespace sign_fast
