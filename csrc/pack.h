// Whole vectors of float32, bfloat16 or float16 as vectors of float; all of internal linkage, see capability.h.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <type_traits>

namespace sign_fast {
namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t V = Vec::size();
constexpr int64_t UNROLL = 4;  // float vectors in flight, which hides the latency of the additions
constexpr int64_t RUN = 32;    // additions a float lane takes before it is moved to a double: bounds the rounding

// One whole vector of T, widened to VECS vectors of float.
template <typename T>
constexpr int64_t VECS = sizeof(float) / sizeof(T);
template <typename T>
constexpr int64_t N = VECS<T> * V;

template <typename T>
struct Pack {
  Vec v[VECS<T>];
};

template <typename T>
inline Pack<T> load_pack(const T* p, int64_t count = N<T>) {
  using Native = at::vec::Vectorized<T>;
  const Native raw = count == N<T> ? Native::loadu(p) : Native::loadu(p, count);
  if constexpr (std::is_same_v<T, float>) {
    return {raw};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(raw);
    return {low, high};
  }
}

template <typename T>
inline void store_pack(T* p, const Pack<T>& x, int64_t count = N<T>) {
  at::vec::Vectorized<T> raw;
  if constexpr (std::is_same_v<T, float>) {
    raw = x.v[0];
  } else {
    raw = at::vec::convert_from_float<T>(x.v[0], x.v[1]);
  }
  if (count == N<T>) {
    raw.store(p);
  } else {
    raw.store(p, count);
  }
}

inline float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
}

}  // namespace
}  // namespace sign_fast
