// Vectors and coefficients that the GroupNorm–SiLU kernels share; all of internal linkage, see capability.h.
#pragma once

#include <algorithm>

#include "exponential.h"
#include "group_norm_silu.h"
#include "pack.h"

namespace sign_fast {
namespace {

// float parameters beside a pack of T
template <typename T>
inline Pack<T> load_floats(const float* p, int64_t count = N<T>) {
  Pack<T> out;
  for (int64_t k = 0; k < VECS<T>; ++k) {
    const int64_t left = std::clamp<int64_t>(count - k * V, 0, V);
    out.v[k] = left == V ? Vec::loadu(p + k * V) : left > 0 ? Vec::loadu(p + k * V, left) : Vec(0.f);
  }
  return out;
}

template <typename T>
inline Pack<T> spread(float value) {
  Pack<T> out;
  for (auto& v : out.v) v = Vec(value);
  return out;
}

// 1/(1 + e^-x): of the exponential's relative error at most a quarter is left
inline Vec sigmoid(Vec x) { return Vec(1.f) / (Vec(1.f) + exp_of_minus(x)); }

// The last pack of a row ends with the row and so overlaps the one before: no partial loads but for narrow rows.
template <typename T>
inline int64_t pack_at(int64_t u, int64_t width) {
  return std::max<int64_t>(0, std::min(u * N<T>, width - N<T>));
}

// what is added to channel c before it is normed
inline double embedding(const NormInput& a, int64_t b, int64_t c) {
  return (a.emb ? static_cast<double>(a.emb[b * a.emb_row + c]) : 0) + (a.input_bias ? a.input_bias[c] : 0.f);
}

// y = ((x − centre) − rest)·factor + offset; the centre is split in two floats so that a large mean loses no digits.
struct Coefficients {
  float centre, rest, factor, offset;
};

inline Coefficients coefficients(const NormInput& a, int64_t b, int64_t c, double mean, double rstd) {
  const double centre = mean - embedding(a, b, c);
  const double scale = 1.0 + (a.scale ? a.scale[b * a.scale_row + c] : 0.f);
  const double shift = a.shift ? a.shift[b * a.shift_row + c] : 0.f;
  const double weight = a.weight ? a.weight[c] : 1.f;
  const double bias = a.bias ? a.bias[c] : 0.f;
  const float high = static_cast<float>(centre);
  return {high, static_cast<float>(centre - high), static_cast<float>(rstd * weight * scale),
          static_cast<float>(bias * scale + shift)};
}

// Channels [start, start + width) of an item lie in one tensor: x, or x2 of a pair; an item has one or two such runs.
struct Run {
  int64_t start, width;
  bool second;
  int64_t offset;  // of pixel 0 and the first channel in its tensor
  int64_t stride;  // from pixel to pixel, channels_last only
};

struct Runs {
  Run runs[2];
  int64_t count;
  const Run* begin() const { return runs; }
  const Run* end() const { return runs + count; }
};

inline Runs runs_of(const NormInput& a, int64_t b, int64_t first, int64_t width) {
  const int64_t one = a.first_channels, two = a.channels - one, in_one = std::clamp<int64_t>(one - first, 0, width);
  const int64_t step = a.channels_last ? 1 : a.pixels;
  Runs out{};
  if (in_one > 0) out.runs[out.count++] = {0, in_one, false, b * one * a.pixels + first * step, one};
  if (in_one < width)
    out.runs[out.count++] = {in_one, width - in_one, true, b * two * a.pixels + (first + in_one - one) * step, two};
  return out;
}

}  // namespace
}  // namespace sign_fast
