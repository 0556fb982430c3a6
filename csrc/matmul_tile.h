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

// Products that a sum takes before it is set aside: bounds the rounding, as blocked summation does.
constexpr int64_t DEPTH = 32;

// OWN: each row has its own right operand, `apart` floats after the one before.
template <int64_t NV, int64_t ROWS = sign_fast::ROWS, bool OWN = false>
struct Tile {
  Vec sum[ROWS][NV];
  int64_t apart = 0;

  Tile() { clear(); }

  // sum[r] += Σ_k x[r][k]·w[k·step …], where the whole sum will have depth terms
  inline __attribute__((always_inline)) void add(const float* const (&rows)[ROWS], const float* w, int64_t length,
                                                 int64_t step, int64_t depth) {
    for (int64_t first = 0; first < length; first += DEPTH) {
      const int64_t count = std::min(DEPTH, length - first);
      if (filled_ + count > DEPTH && depth > DEPTH) set_aside();
      filled_ += count;
      run(rows, first, w + first * step, count, step);
    }
  }

  // To be called before sum is read.
  inline __attribute__((always_inline)) void finish() {
    if (aside_)
      for_each([&](int64_t r, int64_t n) { sum[r][n] = total_[r][n] + sum[r][n]; });
  }

 private:
  Vec total_[ROWS][NV];
  int64_t filled_ = 0;
  bool aside_ = false;

  template <typename F>
  static inline __attribute__((always_inline)) void for_each(F&& f) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
      for (int64_t n = 0; n < NV; ++n) f(r, n);
  }

  inline __attribute__((always_inline)) void clear() {
    for_each([&](int64_t r, int64_t n) { sum[r][n] = Vec(0.f); });
  }

  inline __attribute__((always_inline)) void set_aside() {
    for_each([&](int64_t r, int64_t n) { total_[r][n] = aside_ ? total_[r][n] + sum[r][n] : sum[r][n]; });
    clear();
    aside_ = true;
    filled_ = 0;
  }

  inline __attribute__((always_inline)) void run(const float* const (&rows)[ROWS], int64_t first, const float* w,
                                                 int64_t length, int64_t step) {
    const float* x[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) x[r] = rows[r] + first;
    Vec s[ROWS][NV];
    for_each([&](int64_t r, int64_t n) { s[r][n] = sum[r][n]; });
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
    for_each([&](int64_t r, int64_t n) { sum[r][n] = s[r][n]; });
  }
};

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
