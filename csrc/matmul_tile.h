// A tile of a matrix product, accumulated in registers: rows of scalars times vectors; of internal linkage, see
// capability.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "pack.h"

namespace sign_fast {
namespace {

// Rows of a tile. With 3 vectors 24 of 32, or 12 of 16, registers are accumulators.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t ROWS = 8;
#else
constexpr int64_t ROWS = 4;
#endif

// Products that a sum takes before it joins the others: bounds the rounding, as blocked summation does.
constexpr int64_t DEPTH = 32;

// OWN: each row has its own right operand, `apart` floats after the one before.
template <int64_t NV, int64_t ROWS = sign_fast::ROWS, bool OWN = false>
struct Tile {
  union {  // not set to zero, as vectors otherwise are
    Vec sum[ROWS][NV];
  };
  int64_t apart = 0;

  Tile() {}

  // sum[r] = Σ_k x[r][k]·w[k·step …], of few terms: never leaves the registers
  inline __attribute__((always_inline)) void set(const float* const (&x)[ROWS], const float* w, int64_t length,
                                                 int64_t step) {
    run(x, 0, w, length, step, sum);
  }

  // The same of any length, `most` terms at a time, added to the sum of the calls before.
  inline __attribute__((always_inline)) void add(const float* const (&x)[ROWS], const float* w, int64_t length,
                                                 int64_t step, int64_t most = DEPTH) {
    for (int64_t first = 0; first < length; first += most) {
      Vec part[ROWS][NV];
      run(x, first, w + first * step, std::min(most, length - first), step, part);
      if (empty_) {
        for_each([&](int64_t r, int64_t n) { sum[r][n] = part[r][n]; });
        empty_ = false;
      } else {
        for_each([&](int64_t r, int64_t n) { sum[r][n] = sum[r][n] + part[r][n]; });
      }
    }
  }

 private:
  bool empty_ = true;

  template <typename F>
  static inline __attribute__((always_inline)) void for_each(F&& f) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
      for (int64_t n = 0; n < NV; ++n) f(r, n);
  }

  inline __attribute__((always_inline)) void run(const float* const (&rows)[ROWS], int64_t first, const float* w,
                                                 int64_t length, int64_t step, Vec (&result)[ROWS][NV]) const {
    const float* x[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) x[r] = rows[r] + first;
    Vec s[ROWS][NV];
    for_each([&](int64_t r, int64_t n) { s[r][n] = Vec(0.f); });
    for (int64_t k = 0; k < length; ++k, w += step) {
      Vec right[NV];
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS; ++r) {
        const Vec left(x[r][k]);
        if (OWN || r == 0)
#pragma GCC unroll 3
          for (int64_t n = 0; n < NV; ++n) right[n] = Vec::loadu(w + r * apart + n * V);
#pragma GCC unroll 3
        for (int64_t n = 0; n < NV; ++n) s[r][n] = at::vec::fmadd(left, right[n], s[r][n]);
      }
    }
    for_each([&](int64_t r, int64_t n) { result[r][n] = s[r][n]; });
  }
};

// Calls use(sum) with sum[r] = Σ_k x[r][k]·w[k·step …].
template <int64_t NV, int64_t R, bool OWN = false, int64_t MOST = DEPTH, typename F>
inline __attribute__((always_inline)) void multiply(const float* const (&x)[R], const float* w, int64_t length,
                                                    F&& use, int64_t apart = 0) {
  Tile<NV, R, OWN> tile;
  tile.apart = apart;
  if (length <= MOST) {
    tile.set(x, w, length, NV * V);
    use(tile.sum);
  } else {
    tile.add(x, w, length, NV * V, MOST);
    use(tile.sum);
  }
}

// Calls f with NV as a constant.
template <typename F>
inline void with_vectors(int64_t vectors, F&& f) {
  if (vectors == 3) {
    f(std::integral_constant<int64_t, 3>());
  } else if (vectors == 2) {
    f(std::integral_constant<int64_t, 2>());
  } else {
    f(std::integral_constant<int64_t, 1>());
  }
}

inline void store(float* to, Vec x, int64_t count) {
  if (count >= V) {
    x.store(to);
  } else if (count > 0) {
    x.store(to, static_cast<int>(count));
  }
}

inline Vec load(const float* from, int64_t count) {
  return count >= V ? Vec::loadu(from) : count > 0 ? Vec::loadu(from, count) : Vec(0.f);
}

}  // namespace
}  // namespace sign_fast
