// GroupNorm–SiLU over raw pointers, compiled once a CPU capability: see capability.h.
#include <cmath>

#include "group_norm_silu_vec.h"

namespace sign_fast {
namespace {

inline Vec silu(Vec x) { return x / (Vec(1.f) + exp_of_minus(x)); }

struct Moments {
  double mean, rstd;
};

// The sums run around a rough mean, the one of a quarter of the pixels; what it misses is measured and taken off again.
// A mean over a fraction p of the data lies within √((1 − p)/p) standard deviations, so little can cancel here.
inline Moments moments(double rough, double s1, double s2, double count, double eps) {
  const double gap = s1 / count;
  const double variance = s2 / count - gap * gap;
  return {rough + gap, 1 / std::sqrt((variance > 0 ? variance : 0) + eps)};
}

inline void keep(const GroupNormArgs& a, int64_t b, int64_t group, Moments m) {
  if (!a.stats) return;
  float* to = a.stats + 3 * (b * a.groups + group);
  to[0] = static_cast<float>(m.mean), to[1] = static_cast<float>(m.mean - to[0]), to[2] = static_cast<float>(m.rstd);
}

template <typename T>
inline const T* input(const GroupNormArgs& a, const Run& run) {
  return static_cast<const T*>(a.skip ? a.r : run.second ? a.x2 : a.x) + run.offset;
}

inline int64_t quarter(int64_t length) { return std::max(std::min<int64_t>(length, 64), length / 4); }

template <typename T, bool SILU>
inline void apply(const T* x, T* y, const Pack<T>& centre, const Pack<T>& rest, const Pack<T>& factor,
                  const Pack<T>& offset, int64_t count = N<T>) {
  Pack<T> p = load_pack(x, count);
  for (int64_t k = 0; k < VECS<T>; ++k) {
    p.v[k] = at::vec::fmadd((p.v[k] - centre.v[k]) - rest.v[k], factor.v[k], offset.v[k]);
    if constexpr (SILU) p.v[k] = silu(p.v[k]);
  }
  store_pack(y, p, count);
}

template <typename T>
inline void join(const T* h, const T* skip, T* r, const Pack<T>& bias, Vec factor, int64_t count = N<T>) {
  Pack<T> x = load_pack(h, count);
  const Pack<T> s = load_pack(skip, count);
  for (int64_t k = 0; k < VECS<T>; ++k) x.v[k] = (x.v[k] + s.v[k] + bias.v[k]) * factor;
  store_pack(r, x, count);
}

// ---- NCHW: a channel is a run of pixels, a group without embedding one long run ----

// Σd and Σd² with d = (x − high) − low over runs, kept in UNROLL float vectors and moved to doubles in time.
template <typename T, bool SQUARES>
struct RunSums {
  static constexpr int64_t PACKS = UNROLL / VECS<T>;
  Vec t1[UNROLL], t2[UNROLL];
  int64_t filled = 0;
  double s1 = 0, s2 = 0;

  RunSums() { clear(); }

  void clear() {
    for (int64_t u = 0; u < UNROLL; ++u) t1[u] = t2[u] = Vec(0.f);
    filled = 0;
  }

  void flush() {
    s1 += sum((t1[0] + t1[1]) + (t1[2] + t1[3]));
    if (SQUARES) s2 += sum((t2[0] + t2[1]) + (t2[2] + t2[3]));
    clear();
  }

  void add(const T* x, int64_t length, double centre) {
    const float high_part = static_cast<float>(centre);
    const Vec high(high_part), low(static_cast<float>(centre - high_part));
    int64_t i = 0;
    while (i + PACKS * N<T> <= length) {
      const int64_t whole = std::min(RUN - filled, (length - i) / (PACKS * N<T>));
      Vec a1[UNROLL], a2[UNROLL];  // locals: members would be written back to memory at every step
      std::copy_n(t1, UNROLL, a1);
      std::copy_n(t2, UNROLL, a2);
      for (int64_t step = 0; step < whole; ++step, i += PACKS * N<T>)
        for (int64_t u = 0; u < PACKS; ++u) {
          const Pack<T> p = load_pack(x + i + u * N<T>);
          for (int64_t k = 0; k < VECS<T>; ++k) {
            const Vec d = (p.v[k] - high) - low;
            a1[u * VECS<T> + k] = a1[u * VECS<T> + k] + d;
            if (SQUARES) a2[u * VECS<T> + k] = at::vec::fmadd(d, d, a2[u * VECS<T> + k]);
          }
        }
      std::copy_n(a1, UNROLL, t1);
      std::copy_n(a2, UNROLL, t2);
      if ((filled += whole) == RUN) flush();
    }
    for (int64_t u = 0; i < length; i += N<T>, u = (u + 1) % PACKS) {
      const int64_t count = std::min(N<T>, length - i);
      const Pack<T> p = load_pack(x + i, count);
      for (int64_t k = 0; k < VECS<T>; ++k) {
        const int64_t left = std::clamp<int64_t>(count - k * V, 0, V);
        const Vec d = Vec::set(Vec(0.f), (p.v[k] - high) - low, left);
        t1[u * VECS<T> + k] = t1[u * VECS<T> + k] + d;
        if (SQUARES) t2[u * VECS<T> + k] = at::vec::fmadd(d, d, t2[u * VECS<T> + k]);
      }
    }
    if (i > 0 && ++filled >= RUN) flush();
  }
};

template <typename T, bool SILU>
void contiguous_item(const GroupNormArgs& a, int64_t b, int64_t group) {
  const int64_t channels = a.channels / a.groups, first = group * channels, n = a.pixels;
  const int64_t base = (b * a.channels + first) * n;
  if (a.skip) {
    const T *h = static_cast<const T*>(a.x) + base, *skip = static_cast<const T*>(a.skip) + base;
    T* r = static_cast<T*>(a.r) + base;
    for (int64_t c = 0; c < channels; ++c) {
      const Pack<T> bias = spread<T>(a.join_bias ? a.join_bias[first + c] : 0.f);
      for (int64_t i = c * n; i < (c + 1) * n; i += N<T>)
        join(h + i, skip + i, r + i, bias, Vec(a.skip_scale), std::min(N<T>, (c + 1) * n - i));
    }
  }
  const Runs runs = runs_of(a, b, first, channels);
  const bool embeds = a.emb || a.input_bias;
  RunSums<T, false> some;
  double embeddings = 0;
  int64_t seen = 0;
  for (const Run& run : runs) {
    const T* x = input<T>(a, run);
    const int64_t pieces = embeds ? run.width : 1, length = embeds ? n : run.width * n, part = quarter(length);
    for (int64_t c = 0; c < pieces; ++c) some.add(x + c * n, part, 0);
    seen += pieces * part;
  }
  some.flush();
  for (int64_t c = 0; c < channels; ++c) embeddings += embedding(a, b, first + c);
  const double rough = some.s1 / static_cast<double>(seen) + embeddings / static_cast<double>(channels);

  RunSums<T, true> all;
  for (const Run& run : runs) {
    const T* x = input<T>(a, run);
    const int64_t pieces = embeds ? run.width : 1, length = embeds ? n : run.width * n;
    for (int64_t c = 0; c < pieces; ++c)
      all.add(x + c * n, length, rough - embedding(a, b, first + run.start + c));
  }
  all.flush();

  const Moments m = moments(rough, all.s1, all.s2, static_cast<double>(channels * n), a.eps);
  keep(a, b, group, m);
  for (const Run& run : runs) {
    const T* x = input<T>(a, run);
    T* y = static_cast<T*>(a.y) + base + run.start * n;
    for (int64_t c = 0; c < run.width; ++c) {
      const Coefficients k = coefficients(a, b, first + run.start + c, m.mean, m.rstd);
      const Pack<T> centre = spread<T>(k.centre), rest = spread<T>(k.rest);
      const Pack<T> factor = spread<T>(k.factor), offset = spread<T>(k.offset);
      for (int64_t i = c * n; i < (c + 1) * n; i += N<T>)
        apply<T, SILU>(x + i, y + i, centre, rest, factor, offset, std::min(N<T>, (c + 1) * n - i));
    }
  }
}

// ---- channels_last: a pixel is a run of channels ----

// Sums over the pixels of PACKS packs of channels that start at `at`; count < N only where the width is.
template <typename T, int64_t PACKS, bool CENTRED>
void column_sums(const T* x, int64_t pixels, int64_t stride, const int64_t* at, int64_t count, const float* high,
                 const float* low, double* s1, double* s2) {
  Pack<T> h[PACKS], l[PACKS], t1[PACKS], t2[PACKS];
  if (CENTRED)
    for (int64_t u = 0; u < PACKS; ++u) {
      h[u] = load_floats<T>(high + at[u], count);
      l[u] = load_floats<T>(low + at[u], count);
    }
  for (int64_t u = 0; u < PACKS; ++u)
    for (int64_t c = 0; c < count; ++c) s1[at[u] + c] = s2[at[u] + c] = 0;
  for (int64_t from = 0; from < pixels; from += RUN) {
    for (int64_t u = 0; u < PACKS; ++u) t1[u] = t2[u] = spread<T>(0.f);
    const int64_t to = std::min(from + RUN, pixels);
    for (int64_t p = from; p < to; ++p)
      for (int64_t u = 0; u < PACKS; ++u) {
        const Pack<T> v = load_pack(x + p * stride + at[u], count);
        for (int64_t k = 0; k < VECS<T>; ++k) {
          const Vec d = CENTRED ? (v.v[k] - h[u].v[k]) - l[u].v[k] : v.v[k];
          t1[u].v[k] = t1[u].v[k] + d;
          if (CENTRED) t2[u].v[k] = at::vec::fmadd(d, d, t2[u].v[k]);
        }
      }
    for (int64_t u = 0; u < PACKS; ++u) {
      float lanes1[N<T>], lanes2[N<T>];
      for (int64_t k = 0; k < VECS<T>; ++k) t1[u].v[k].store(lanes1 + k * V), t2[u].v[k].store(lanes2 + k * V);
      // packs may overlap: only the first one adds to a channel that two of them hold
      const int64_t skip = u > 0 ? at[u - 1] + N<T> - at[u] : 0;
      for (int64_t c = skip; c < count; ++c) s1[at[u] + c] += lanes1[c];
      if (CENTRED)
        for (int64_t c = skip; c < count; ++c) s2[at[u] + c] += lanes2[c];
    }
  }
}

template <typename T, bool CENTRED>
void all_column_sums(const T* x, int64_t pixels, int64_t stride, int64_t width, const float* high, const float* low,
                     double* s1, double* s2) {
  constexpr int64_t PACKS = UNROLL / VECS<T>;
  const int64_t packs = (width + N<T> - 1) / N<T>, count = std::min(N<T>, width);
  int64_t u = 0;
  for (; u + PACKS <= packs; u += PACKS) {
    int64_t at[PACKS];
    for (int64_t i = 0; i < PACKS; ++i) at[i] = pack_at<T>(u + i, width);
    column_sums<T, PACKS, CENTRED>(x, pixels, stride, at, count, high, low, s1, s2);
  }
  if (u + 2 <= packs) {
    const int64_t at[2] = {pack_at<T>(u, width), pack_at<T>(u + 1, width)};
    column_sums<T, 2, CENTRED>(x, pixels, stride, at, count, high, low, s1, s2);
    u += 2;
  }
  for (; u < packs; ++u) {
    const int64_t at = pack_at<T>(u, width);
    column_sums<T, 1, CENTRED>(x, pixels, stride, &at, count, high, low, s1, s2);
  }
}

// A walk over the pixels with PACKS packs, a cache line or more: their four parameters stay in registers.
template <typename T, int64_t PACKS, bool SILU>
void apply_columns(const T* x, int64_t x_stride, T* y, int64_t stride, int64_t pixels, const int64_t* at, int64_t count, const float* w0,
                   const float* w1, const float* w2, const float* w3) {
  Pack<T> centre[PACKS], rest[PACKS], factor[PACKS], offset[PACKS];
  for (int64_t u = 0; u < PACKS; ++u) {
    centre[u] = load_floats<T>(w0 + at[u], count), rest[u] = load_floats<T>(w1 + at[u], count);
    factor[u] = load_floats<T>(w2 + at[u], count), offset[u] = load_floats<T>(w3 + at[u], count);
  }
  for (int64_t p = 0; p < pixels; ++p, x += x_stride, y += stride)
    for (int64_t u = 0; u < PACKS; ++u)
      apply<T, SILU>(x + at[u], y + at[u], centre[u], rest[u], factor[u], offset[u], count);
}

template <typename T, bool SILU>
void apply_all_columns(const T* x, int64_t x_stride, T* y, int64_t stride, int64_t pixels, int64_t width,
                       const float* w0, const float* w1, const float* w2, const float* w3) {
  const int64_t packs = (width + N<T> - 1) / N<T>, count = std::min(N<T>, width);
  constexpr bool pairs = 2 * 4 * VECS<T> < (V == 16 ? 16 : 16);  // of packs: their parameters must fit the registers
  int64_t u = 0;
  for (; pairs && u + 2 <= packs; u += 2) {
    const int64_t at[2] = {pack_at<T>(u, width), pack_at<T>(u + 1, width)};
    apply_columns<T, 2, SILU>(x, x_stride, y, stride, pixels, at, count, w0, w1, w2, w3);
  }
  for (; u < packs; ++u) {
    const int64_t at = pack_at<T>(u, width);
    apply_columns<T, 1, SILU>(x, x_stride, y, stride, pixels, &at, count, w0, w1, w2, w3);
  }
}

template <typename T, bool SILU>
void channels_last_item(const GroupNormArgs& a, int64_t b, int64_t first_group, int64_t groups, double* work) {
  const int64_t group_channels = a.channels / a.groups, first = first_group * group_channels;
  const int64_t width = groups * group_channels, stride = a.channels, n = a.pixels;
  const int64_t base = b * a.channels * n + first;
  const int64_t packs = (width + N<T> - 1) / N<T>, lanes = std::min(N<T>, width);
  double *s1 = work, *s2 = work + width;
  float* w0 = reinterpret_cast<float*>(s2 + width);
  float *w1 = w0 + width, *w2 = w1 + width, *w3 = w2 + width;

  if (a.skip) {
    const T *h = static_cast<const T*>(a.x) + base, *skip = static_cast<const T*>(a.skip) + base;
    T* r = static_cast<T*>(a.r) + base;
    for (int64_t c = 0; c < width; ++c) w0[c] = a.join_bias ? a.join_bias[first + c] : 0.f;
    for (int64_t p = 0; p < n; ++p)
      for (int64_t u = 0; u < packs; ++u) {
        const int64_t c = pack_at<T>(u, width), at = p * stride + c;
        join(h + at, skip + at, r + at, load_floats<T>(w0 + c, lanes), Vec(a.skip_scale), lanes);
      }
  }
  const Runs runs = runs_of(a, b, first, width);
  const int64_t part = quarter(n);
  for (const Run& run : runs)
    all_column_sums<T, false>(input<T>(a, run), part, run.stride, run.width, nullptr, nullptr, s1 + run.start,
                              s2 + run.start);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t c0 = g * group_channels, c1 = c0 + group_channels;
    double rough = 0;
    for (int64_t c = c0; c < c1; ++c) rough += s1[c] / static_cast<double>(part) + embedding(a, b, first + c);
    rough /= static_cast<double>(group_channels);
    for (int64_t c = c0; c < c1; ++c) {
      const double centre = rough - embedding(a, b, first + c);
      w0[c] = static_cast<float>(centre);
      w1[c] = static_cast<float>(centre - w0[c]);
    }
  }

  for (const Run& run : runs)
    all_column_sums<T, true>(input<T>(a, run), n, run.stride, run.width, w0 + run.start, w1 + run.start,
                             s1 + run.start, s2 + run.start);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t c0 = g * group_channels, c1 = c0 + group_channels;
    double t1 = 0, t2 = 0;
    for (int64_t c = c0; c < c1; ++c) t1 += s1[c], t2 += s2[c];
    const double rough = static_cast<double>(w0[c0]) + w1[c0] + embedding(a, b, first + c0);
    const Moments m = moments(rough, t1, t2, static_cast<double>(group_channels * n), a.eps);
    keep(a, b, first_group + g, m);
    for (int64_t c = c0; c < c1; ++c) {
      const Coefficients k = coefficients(a, b, first + c, m.mean, m.rstd);
      w0[c] = k.centre, w1[c] = k.rest, w2[c] = k.factor, w3[c] = k.offset;
    }
  }

  T* y = static_cast<T*>(a.y) + base;
  for (const Run& run : runs) {
    const int64_t c = run.start;
    apply_all_columns<T, SILU>(input<T>(a, run), run.stride, y + c, stride, n, run.width, w0 + c, w1 + c, w2 + c, w3 + c);
  }
}

template <typename T, bool SILU>
void run(const GroupNormArgs& a, const NormPlan& plan, int64_t begin, int64_t end, double* work) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / plan.bundles, bundle = item % plan.bundles, first = bundle * plan.bundle_groups;
    if (a.channels_last) {
      const int64_t groups = bundle + 1 == plan.bundles ? a.groups - first : plan.bundle_groups;
      channels_last_item<T, SILU>(a, b, first, groups, work);
    } else {
      contiguous_item<T, SILU>(a, b, first);
    }
  }
}

template <typename T>
void run(const GroupNormArgs& a, const NormPlan& plan, int64_t begin, int64_t end, double* work) {
  return a.silu ? run<T, true>(a, plan, begin, end, work) : run<T, false>(a, plan, begin, end, work);
}

}  // namespace

void SIGN_FAST_ENTRY(group_norm_silu)(const GroupNormArgs& a, const NormPlan& plan, int64_t begin, int64_t end, double* work) {
  switch (a.dtype) {
    case Dtype::Float:
      return run<float>(a, plan, begin, end, work);
    case Dtype::BFloat16:
      return run<c10::BFloat16>(a, plan, begin, end, work);
    case Dtype::Half:
      return run<c10::Half>(a, plan, begin, end, work);
  }
}

}  // namespace sign_fast
