// What Winograd's transforms share: vectors and points; of internal linkage, see capability.h.
#pragma once

#include "pack.h"
#include "winograd.h"

namespace sign_fast {
namespace {

// Vectors that are not set to zero first.
template <int COUNT>
union Vectors {
  Vec v[COUNT];
  Vectors() {}
};

inline Vec fma(float a, Vec b, Vec c) { return at::vec::fmadd(Vec(a), b, c); }

constexpr float P = kPoint1, Q = kPoint2, P2 = P * P, Q2 = Q * Q;

}  // namespace
}  // namespace sign_fast
