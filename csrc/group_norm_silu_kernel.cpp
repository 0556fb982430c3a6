// Compiled once a CPU capability: setup.py gives each object its instruction set, CPU_CAPABILITY and SIGN_FAST_KERNEL.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "group_norm_silu.h"

namespace sign_fast {
namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t V = Vec::size();
constexpr int64_t UNROLL = 4;  // vectors of channels that share one walk over the pixels

inline Vec load(const float* p, int64_t n) { return n == V ? Vec::loadu(p) : Vec::loadu(p, n); }

template <typename T>
inline Vec load(const T* p, int64_t n) {
  Vec out;
  if (n == V) {
    at::vec::load_to_float<T>(p, out);
  } else {
    T padded[V] = {};
    std::memcpy(static_cast<void*>(padded), p, n * sizeof(T));
    at::vec::load_to_float<T>(padded, out);
  }
  return out;
}

inline void store(float* p, Vec v, int64_t n) { v.store(p, n); }

template <typename T>
inline void store(T* p, Vec v, int64_t n) {
  at::vec::convert_from_float<T>(v, v).store(p, n);
}

inline float sum(Vec v) {
  float lanes[V];
  v.store(lanes);
  double total = 0;
  for (float lane : lanes) total += lane;
  return static_cast<float>(total);
}

inline Vec silu(Vec v) { return v / (Vec(1.f) + v.neg().exp_u20()); }

struct Moments {
  double mean, rstd;
};

// The second pass runs around the first pass's mean, so what that mean misses is measured and taken off again.
inline Moments moments(double rough, double s1, double s2, double count, double eps) {
  const double gap = s1 / count;
  const double variance = s2 / count - gap * gap;
  return {rough + gap, 1 / std::sqrt((variance > 0 ? variance : 0) + eps)};
}

// y = ((x − centre) − rest)·factor + offset; the centre is split in two floats so that a large mean loses no digits.
struct Coefficients {
  float centre, rest, factor, offset;
};

inline Coefficients coefficients(const GroupNormArgs& a, int64_t b, int64_t c, Moments m) {
  const double centre = m.mean - (a.emb ? a.emb[b * a.emb_row + c] : 0.f);
  const double scale = 1.0 + (a.scale ? a.scale[b * a.scale_row + c] : 0.f);
  const double shift = a.shift ? a.shift[b * a.shift_row + c] : 0.f;
  const double weight = a.weight ? a.weight[c] : 1.f;
  const double bias = a.bias ? a.bias[c] : 0.f;
  const float high = static_cast<float>(centre);
  return {high, static_cast<float>(centre - high), static_cast<float>(m.rstd * weight * scale),
          static_cast<float>(bias * scale + shift)};
}

inline float embedding(const GroupNormArgs& a, int64_t b, int64_t c) { return a.emb ? a.emb[b * a.emb_row + c] : 0.f; }

inline Vec apply(Vec x, Vec centre, Vec rest, Vec factor, Vec offset, bool with_silu) {
  const Vec y = at::vec::fmadd((x - centre) - rest, factor, offset);
  return with_silu ? silu(y) : y;
}

// ---- NCHW: a channel is a run of pixels ----

template <typename T>
void join_run(const GroupNormArgs& a, int64_t c, int64_t at, int64_t n) {
  const Vec bias(a.join_bias ? a.join_bias[c] : 0.f), factor(a.skip_scale);
  const T* h = static_cast<const T*>(a.x) + at;
  const T* skip = static_cast<const T*>(a.skip) + at;
  T* r = static_cast<T*>(a.r) + at;
  for (int64_t i = 0; i < n; i += V) {
    const int64_t k = n - i < V ? n - i : V;
    store(r + i, (load(h + i, k) + load(skip + i, k) + bias) * factor, k);
  }
}

template <typename T>
void contiguous_item(const GroupNormArgs& a, int64_t b, int64_t group) {
  const int64_t channels = a.channels / a.groups, first = group * channels, n = a.pixels;
  const int64_t base = (b * a.channels + first) * n;
  const double count = static_cast<double>(channels * n);
  if (a.skip)
    for (int64_t c = 0; c < channels; ++c) join_run<T>(a, first + c, base + c * n, n);
  const T* x = static_cast<const T*>(a.skip ? a.r : a.x) + base;
  T* y = static_cast<T*>(a.y) + base;

  double rough = 0;
  for (int64_t c = 0; c < channels; ++c) {
    Vec total(0.f);
    for (int64_t i = 0; i < n; i += V) total = total + load(x + c * n + i, n - i < V ? n - i : V);
    rough += sum(total) + static_cast<double>(embedding(a, b, first + c)) * n;
  }
  rough /= count;

  double s1 = 0, s2 = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const double centre = rough - embedding(a, b, first + c);
    const float high = static_cast<float>(centre);
    const Vec centre_high(high), centre_low(static_cast<float>(centre - high));
    Vec t1(0.f), t2(0.f);
    int64_t i = 0;
    for (; i + V <= n; i += V) {
      const Vec d = (load(x + c * n + i, V) - centre_high) - centre_low;
      t1 = t1 + d;
      t2 = at::vec::fmadd(d, d, t2);
    }
    s1 += sum(t1);
    s2 += sum(t2);
    for (; i < n; ++i) {
      const float d = (static_cast<float>(x[c * n + i]) - high) - static_cast<float>(centre - high);
      s1 += d;
      s2 += static_cast<double>(d) * d;
    }
  }

  const Moments m = moments(rough, s1, s2, count, a.eps);
  for (int64_t c = 0; c < channels; ++c) {
    const Coefficients k = coefficients(a, b, first + c, m);
    const Vec centre(k.centre), rest(k.rest), factor(k.factor), offset(k.offset);
    for (int64_t i = 0; i < n; i += V) {
      const int64_t w = n - i < V ? n - i : V;
      store(y + c * n + i, apply(load(x + c * n + i, w), centre, rest, factor, offset, a.silu), w);
    }
  }
}

// ---- channels_last: a pixel is a run of channels ----

template <typename T>
void channels_last_item(const GroupNormArgs& a, int64_t b, int64_t first_group, int64_t groups, std::vector<float>& work) {
  const int64_t group_channels = a.channels / a.groups, first = first_group * group_channels;
  const int64_t width = groups * group_channels, stride = a.channels, n = a.pixels;
  const int64_t base = b * a.channels * n + first;
  const double count = static_cast<double>(group_channels * n);
  work.resize(4 * width);
  float *w0 = work.data(), *w1 = w0 + width, *w2 = w1 + width, *w3 = w2 + width;

  if (a.skip) {
    const Vec factor(a.skip_scale);
    const T* h = static_cast<const T*>(a.x) + base;
    const T* skip = static_cast<const T*>(a.skip) + base;
    T* r = static_cast<T*>(a.r) + base;
    for (int64_t p = 0; p < n; ++p)
      for (int64_t c = 0; c < width; c += V) {
        const int64_t k = width - c < V ? width - c : V, at = p * stride + c;
        const Vec bias = a.join_bias ? load(a.join_bias + first + c, k) : Vec(0.f);
        store(r + at, (load(h + at, k) + load(skip + at, k) + bias) * factor, k);
      }
  }
  const T* x = static_cast<const T*>(a.skip ? a.r : a.x) + base;
  T* y = static_cast<T*>(a.y) + base;

  // sums over the pixels of UNROLL vectors of channels at a time; d = (x − w0) − w1
  const auto column_sums = [&](bool centred) {
    for (int64_t c = 0; c < width; c += UNROLL * V) {
      Vec t1[UNROLL], t2[UNROLL], high[UNROLL], low[UNROLL];
      int64_t k[UNROLL];
      int64_t used = 0;
      for (; used < UNROLL && c + used * V < width; ++used) {
        const int64_t at = c + used * V;
        k[used] = width - at < V ? width - at : V;
        t1[used] = t2[used] = Vec(0.f);
        if (centred) high[used] = load(w0 + at, k[used]), low[used] = load(w1 + at, k[used]);
      }
      if (used == UNROLL && k[UNROLL - 1] == V) {
        for (int64_t p = 0; p < n; ++p)
          for (int64_t u = 0; u < UNROLL; ++u) {
            Vec d = load(x + p * stride + c + u * V, V);
            if (centred) {
              d = (d - high[u]) - low[u];
              t2[u] = at::vec::fmadd(d, d, t2[u]);
            }
            t1[u] = t1[u] + d;
          }
      } else {
        for (int64_t p = 0; p < n; ++p)
          for (int64_t u = 0; u < used; ++u) {
            Vec d = load(x + p * stride + c + u * V, k[u]);
            if (centred) {
              d = (d - high[u]) - low[u];
              t2[u] = at::vec::fmadd(d, d, t2[u]);
            }
            t1[u] = t1[u] + d;
          }
      }
      for (int64_t u = 0; u < used; ++u) {
        store(w2 + c + u * V, t1[u], k[u]);
        store(w3 + c + u * V, t2[u], k[u]);
      }
    }
  };

  column_sums(false);
  for (int64_t g = 0; g < groups; ++g) {
    double rough = 0;
    for (int64_t c = g * group_channels; c < (g + 1) * group_channels; ++c)
      rough += w2[c] + static_cast<double>(embedding(a, b, first + c)) * n;
    rough /= count;
    for (int64_t c = g * group_channels; c < (g + 1) * group_channels; ++c) {
      const double centre = rough - embedding(a, b, first + c);
      w0[c] = static_cast<float>(centre);
      w1[c] = static_cast<float>(centre - w0[c]);
    }
  }

  column_sums(true);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t c0 = g * group_channels;
    double s1 = 0, s2 = 0;
    for (int64_t c = c0; c < c0 + group_channels; ++c) s1 += w2[c], s2 += w3[c];
    const double rough = static_cast<double>(w0[c0]) + w1[c0] + embedding(a, b, first + c0);
    const Moments m = moments(rough, s1, s2, count, a.eps);
    for (int64_t c = c0; c < c0 + group_channels; ++c) {
      const Coefficients k = coefficients(a, b, first + c, m);
      w0[c] = k.centre, w1[c] = k.rest, w2[c] = k.factor, w3[c] = k.offset;
    }
  }

  for (int64_t c = 0; c < width; c += V) {
    const int64_t k = width - c < V ? width - c : V;
    const Vec centre = load(w0 + c, k), rest = load(w1 + c, k), factor = load(w2 + c, k), offset = load(w3 + c, k);
    if (k == V) {
      for (int64_t p = 0; p < n; ++p)
        store(y + p * stride + c, apply(load(x + p * stride + c, V), centre, rest, factor, offset, a.silu), V);
    } else {
      for (int64_t p = 0; p < n; ++p)
        store(y + p * stride + c, apply(load(x + p * stride + c, k), centre, rest, factor, offset, a.silu), k);
    }
  }
}

template <typename T>
void run(const GroupNormArgs& a, const Plan& plan, int64_t begin, int64_t end) {
  std::vector<float> work;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / plan.bundles, first = item % plan.bundles * plan.bundle_groups;
    if (a.channels_last) {
      const int64_t left = a.groups - first;
      channels_last_item<T>(a, b, first, left < plan.bundle_groups ? left : plan.bundle_groups, work);
    } else {
      contiguous_item<T>(a, b, first);
    }
  }
}

}  // namespace

void SIGN_FAST_KERNEL(const GroupNormArgs& a, const Plan& plan, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::Float:
      return run<float>(a, plan, begin, end);
    case Dtype::BFloat16:
      return run<c10::BFloat16>(a, plan, begin, end);
    case Dtype::Half:
      return run<c10::Half>(a, plan, begin, end);
  }
}

}  // namespace sign_fast
