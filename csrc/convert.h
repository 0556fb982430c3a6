// Runs of memory as float or double and back; all of internal linkage, see capability.h.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

namespace sign_fast {
namespace {

using Vec = at::vec::Vectorized<float>;
using HalfVec = at::vec::Vectorized<c10::Half>;

// The compiler makes vectors of these loops except between half precision and float.
template <typename T, typename Wide>
inline void widen(const T* from, int64_t n, Wide* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, c10::Half> && std::is_same_v<Wide, float>) {
    for (; i + HalfVec::size() <= n; i += HalfVec::size()) {
      const auto [low, high] = at::vec::convert_to_float<c10::Half>(HalfVec::loadu(from + i));
      low.store(to + i), high.store(to + i + Vec::size());
    }
  }
  for (; i < n; ++i) to[i] = static_cast<Wide>(from[i]);
}

template <typename T, typename Wide>
inline void narrow(const Wide* from, int64_t n, T* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, c10::Half> && std::is_same_v<Wide, float>) {
    for (; i + HalfVec::size() <= n; i += HalfVec::size()) {
      at::vec::convert_from_float<c10::Half>(Vec::loadu(from + i), Vec::loadu(from + i + Vec::size())).store(to + i);
    }
  }
  for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

}  // namespace
}  // namespace sign_fast
