// GroupNorm–SiLU's gradients over raw pointers, compiled once a CPU capability: see capability.h.
//
// v = xhat·gain + offset is the SiLU's argument, dv = dy·silu'(v), d = x − mean. One pass over x and dy sums dv, dv·d and
// d, and keeps dv in float beside the item in the cache: working it out again in the second would cost another exponential
// and division an element.
#include "group_norm_silu_backward.h"

#include "group_norm_silu_vec.h"

namespace sign_fast {
namespace {

// A panel of pixels × channels, or in NCHW a channel as rows of one vector; strides lead from row to row.
template <typename T>
struct Panel {
  const T* x;
  const T* dy;
  const T* stream;  // or null
  T* dx;
  int64_t rows, width, x_stride, stride;  // x and dx step by x_stride
  float* kept;                            // dv, pack after pack, where it is not dy itself

  int64_t packs() const { return (width + N<T> - 1) / N<T>; }
  float* kept_pack(int64_t u) const { return kept + u * rows * N<T>; }
};

// One float each a column; dx = dv·factor − (base + d·slope) before stream and skip_scale.
struct Columns {
  float *centre, *rest, *factor, *offset, *base, *slope;

  static Columns over(float* p, int64_t width) {
    return {p, p + width, p + 2 * width, p + 3 * width, p + 4 * width, p + 5 * width};
  }

  Columns from(int64_t c) const { return {centre + c, rest + c, factor + c, offset + c, base + c, slope + c}; }

  void set(int64_t c, const Coefficients& k) const {
    centre[c] = k.centre, rest[c] = k.rest, factor[c] = k.factor, offset[c] = k.offset;
  }
};

template <bool SILU>
inline Vec dv_of(Vec dy, Vec d, Vec factor, Vec offset) {
  if constexpr (!SILU) return dy;
  const Vec v = at::vec::fmadd(d, factor, offset), s = sigmoid(v);
  return dy * (s * at::vec::fmadd(v, Vec(1.f) - s, Vec(1.f)));
}

// a·b rounded, which the compiler may not fuse with what follows: a single value's gradient is exactly zero
inline Vec rounded_product(Vec a, Vec b) {
  Vec product = a * b;
#if defined(CPU_CAPABILITY_AVX512)
  __m512 held = product;
  asm("" : "+v"(held));
  product = held;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 held = product;
  asm("" : "+x"(held));
  product = held;
#endif
  return product;
}

// lanes → doubles; packs may overlap: only the first one adds to a column that two of them hold
template <typename T>
inline void add_lanes(const Pack<T>& t, double* to, int64_t from, int64_t count) {
  float lanes[N<T>];
  for (int64_t k = 0; k < VECS<T>; ++k) t.v[k].store(lanes + k * V);
  for (int64_t c = from; c < count; ++c) to[c] += lanes[c];
}

template <typename T, int64_t PACKS>
inline int64_t overlap(const int64_t* at, int64_t u) {
  return u > 0 ? at[u - 1] + N<T> - at[u] : 0;
}

// s1 = Σdv, s2 = Σdv·d, s3 = Σd of the columns of PACKS packs, the first-th and following, that start at `at`; count < N
// only where the width is.
template <typename T, bool SILU, int64_t PACKS>
void gradient_sums(const Panel<T>& panel, int64_t first, const int64_t* at, int64_t count, const Columns& w, double* s1, double* s2,
                   double* s3) {
  Pack<T> centre[PACKS], rest[PACKS], factor[PACKS], offset[PACKS], t1[PACKS], t2[PACKS], t3[PACKS];
  for (int64_t u = 0; u < PACKS; ++u) {
    centre[u] = load_floats<T>(w.centre + at[u], count), rest[u] = load_floats<T>(w.rest + at[u], count);
    factor[u] = load_floats<T>(w.factor + at[u], count), offset[u] = load_floats<T>(w.offset + at[u], count);
  }
  for (int64_t u = 0; u < PACKS; ++u)
    for (int64_t c = at[u]; c < at[u] + count; ++c) s1[c] = s2[c] = s3[c] = 0;
  const T *x = panel.x, *dy = panel.dy;
  float* kept = panel.kept_pack(first);
  for (int64_t from = 0; from < panel.rows; from += RUN) {
    for (int64_t u = 0; u < PACKS; ++u) t1[u] = t2[u] = t3[u] = spread<T>(0.f);
    const int64_t to = std::min(from + RUN, panel.rows);
    for (int64_t p = from; p < to; ++p, x += panel.x_stride, dy += panel.stride, kept += N<T>)
      for (int64_t u = 0; u < PACKS; ++u) {
        const Pack<T> a = load_pack(x + at[u], count), g = load_pack(dy + at[u], count);
        for (int64_t k = 0; k < VECS<T>; ++k) {
          const Vec d = (a.v[k] - centre[u].v[k]) - rest[u].v[k];
          const Vec dv = dv_of<SILU>(g.v[k], d, factor[u].v[k], offset[u].v[k]);
          if constexpr (SILU) dv.store(kept + u * panel.rows * N<T> + k * V);
          t1[u].v[k] = t1[u].v[k] + dv;
          t2[u].v[k] = at::vec::fmadd(dv, d, t2[u].v[k]);
          t3[u].v[k] = t3[u].v[k] + d;
        }
      }
    for (int64_t u = 0; u < PACKS; ++u) {
      const int64_t skip = overlap<T, PACKS>(at, u);
      add_lanes<T>(t1[u], s1 + at[u], skip, count);
      add_lanes<T>(t2[u], s2 + at[u], skip, count);
      add_lanes<T>(t3[u], s3 + at[u], skip, count);
    }
  }
}

// Writes dx; streamed = Σstream unless that is null.
template <typename T, bool SILU, int64_t PACKS>
void input_gradient(const Panel<T>& panel, int64_t first, const int64_t* at, int64_t count, const Columns& w, float skip_scale,
                    double* streamed) {
  Pack<T> centre[PACKS], rest[PACKS], factor[PACKS], base[PACKS], slope[PACKS], total[PACKS];
  for (int64_t u = 0; u < PACKS; ++u) {
    centre[u] = load_floats<T>(w.centre + at[u], count), rest[u] = load_floats<T>(w.rest + at[u], count);
    factor[u] = load_floats<T>(w.factor + at[u], count);
    base[u] = load_floats<T>(w.base + at[u], count), slope[u] = load_floats<T>(w.slope + at[u], count);
    if (streamed) std::fill_n(streamed + at[u], count, 0.0);
  }
  const T *x = panel.x, *dy = panel.dy, *stream = panel.stream;
  T* dx = panel.dx;
  const float* kept = panel.kept_pack(first);
  for (int64_t from = 0; from < panel.rows; from += RUN) {
    for (int64_t u = 0; u < PACKS; ++u) total[u] = spread<T>(0.f);
    const int64_t to = std::min(from + RUN, panel.rows);
    for (int64_t p = from; p < to; ++p, x += panel.x_stride, dx += panel.x_stride, dy += panel.stride, kept += N<T>) {
      for (int64_t u = 0; u < PACKS; ++u) {
        const Pack<T> a = load_pack(x + at[u], count);
        const Pack<T> dv = SILU ? load_floats<T>(kept + u * panel.rows * N<T>) : load_pack(dy + at[u], count);
        Pack<T> out;
        for (int64_t k = 0; k < VECS<T>; ++k) {
          const Vec d = (a.v[k] - centre[u].v[k]) - rest[u].v[k];
          out.v[k] = rounded_product(dv.v[k], factor[u].v[k]) - at::vec::fmadd(d, slope[u].v[k], base[u].v[k]);
        }
        if (stream) {
          const Pack<T> more = load_pack(stream + at[u], count);
          for (int64_t k = 0; k < VECS<T>; ++k) {
            out.v[k] = out.v[k] + more.v[k];
            total[u].v[k] = total[u].v[k] + more.v[k];
          }
        }
        for (int64_t k = 0; k < VECS<T>; ++k) out.v[k] = out.v[k] * Vec(skip_scale);
        store_pack(dx + at[u], out, count);
      }
      if (stream) stream += panel.stride;
    }
    if (streamed)
      for (int64_t u = 0; u < PACKS; ++u) add_lanes<T>(total[u], streamed + at[u], overlap<T, PACKS>(at, u), count);
  }
}

// both passes walk a panel by as many packs as `at` has room for, then by single ones
template <typename T, int64_t PACKS, typename Many, typename One>
inline void walk(const Panel<T>& panel, Many many, One one) {
  const int64_t packs = panel.packs(), count = std::min(N<T>, panel.width);
  int64_t u = 0;
  for (; u + PACKS <= packs; u += PACKS) {
    int64_t at[PACKS];
    for (int64_t i = 0; i < PACKS; ++i) at[i] = pack_at<T>(u + i, panel.width);
    many(u, at, count);
  }
  for (; u < packs; ++u) {
    const int64_t at = pack_at<T>(u, panel.width);
    one(u, &at, count);
  }
}

template <typename T, bool SILU>
void all_gradient_sums(const Panel<T>& panel, const Columns& w, double* s1, double* s2, double* s3) {
  constexpr int64_t PACKS = 2 / VECS<T>;
  walk<T, PACKS>(
      panel,
      [&](int64_t u, const int64_t* at, int64_t count) { gradient_sums<T, SILU, PACKS>(panel, u, at, count, w, s1, s2, s3); },
      [&](int64_t u, const int64_t* at, int64_t count) { gradient_sums<T, SILU, 1>(panel, u, at, count, w, s1, s2, s3); });
}

template <typename T, bool SILU>
void all_input_gradients(const Panel<T>& panel, const Columns& w, float skip_scale, double* streamed) {
  constexpr int64_t PACKS = 2 / VECS<T>;
  walk<T, PACKS>(
      panel,
      [&](int64_t u, const int64_t* at, int64_t count) { input_gradient<T, SILU, PACKS>(panel, u, at, count, w, skip_scale, streamed); },
      [&](int64_t u, const int64_t* at, int64_t count) { input_gradient<T, SILU, 1>(panel, u, at, count, w, skip_scale, streamed); });
}

// to a whole cache line
inline float* aligned(double* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63}); }

struct Statistics {
  double mean, rstd;
};

inline Statistics statistics(const GroupNormBackwardArgs& a, int64_t b, int64_t group) {
  const float* s = a.stats + 3 * (b * a.groups + group);
  return {static_cast<double>(s[0]) + s[1], s[2]};
}

template <typename T>
inline Panel<T> panel_of(const GroupNormBackwardArgs& a, const Run& run, int64_t base, float* kept) {
  return {static_cast<const T*>(run.second ? a.x2 : a.x) + run.offset,
          static_cast<const T*>(a.dy) + base,
          a.stream ? static_cast<const T*>(a.stream) + base : nullptr,
          static_cast<T*>(run.second ? a.dx2 : a.dx) + run.offset,
          a.pixels,
          run.width,
          run.stride,
          a.channels,
          kept};
}

// The sums of a group, and what they take off dv·factor: base + d·slope.
struct Projection {
  double base = 0, slope = 0;

  void add(float factor, double s1, double s2) { base += factor * s1, slope += factor * s2; }
  void finish(double count, double rstd) { base /= count, slope *= rstd * rstd / count; }

  // Σdx of a channel before stream and skip_scale, where terms cancel: from the other sums, in double
  double input_sum(float factor, double pixels, double s1, double s3) const {
    return factor * s1 - (pixels * base + s3 * slope);
  }
};

inline void write_sums(const GroupNormBackwardArgs& a, int64_t plane, int64_t b, int64_t first, int64_t width,
                       const double* from, double factor = 1) {
  float* to = a.sums + (plane * a.batch + b) * a.channels + first;
  for (int64_t c = 0; c < width; ++c) to[c] = from ? static_cast<float>(from[c] * factor) : 0.f;
}

template <typename T, bool SILU>
void channels_last_item(const GroupNormBackwardArgs& a, int64_t b, int64_t first_group, int64_t groups, double* work) {
  const int64_t group_channels = a.channels / a.groups, first = first_group * group_channels;
  const int64_t width = groups * group_channels, at = b * a.channels * a.pixels + first;
  double *s1 = work, *s2 = s1 + width, *s3 = s2 + width;
  const Columns w = Columns::over(reinterpret_cast<float*>(s3 + width), width);
  for (int64_t g = 0; g < groups; ++g) {
    const Statistics m = statistics(a, b, first_group + g);
    for (int64_t c = g * group_channels; c < (g + 1) * group_channels; ++c)
      w.set(c, coefficients(a, b, first + c, m.mean, m.rstd));
  }
  const Runs runs = runs_of(a, b, first, width);
  float* kept = aligned(s3 + 4 * width);
  Panel<T> panels[2];
  for (int64_t i = 0; i < runs.count; ++i) {
    const int64_t c = runs.runs[i].start;
    panels[i] = panel_of<T>(a, runs.runs[i], at + c, kept);
    kept = panels[i].kept_pack(panels[i].packs());
    all_gradient_sums<T, SILU>(panels[i], w.from(c), s1 + c, s2 + c, s3 + c);
  }

  const double pixels = static_cast<double>(a.pixels);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t c0 = g * group_channels, c1 = c0 + group_channels;
    const double rstd = statistics(a, b, first_group + g).rstd;
    Projection total;
    for (int64_t c = c0; c < c1; ++c) total.add(w.factor[c], s1[c], s2[c]);
    total.finish(static_cast<double>(group_channels) * pixels, rstd);
    for (int64_t c = c0; c < c1; ++c) {
      w.base[c] = static_cast<float>(total.base), w.slope[c] = static_cast<float>(total.slope);
      s3[c] = total.input_sum(w.factor[c], pixels, s1[c], s3[c]);
    }
    write_sums(a, 0, b, first + c0, group_channels, s1 + c0);
    write_sums(a, 1, b, first + c0, group_channels, s2 + c0, rstd);
  }

  double* streamed = a.stream && a.input_sum ? s1 : nullptr;
  for (int64_t i = 0; i < runs.count; ++i) {
    const int64_t c = runs.runs[i].start;
    all_input_gradients<T, SILU>(panels[i], w.from(c), a.skip_scale, streamed ? streamed + c : nullptr);
  }
  for (int64_t c = 0; streamed && c < width; ++c) s3[c] += streamed[c];
  write_sums(a, 2, b, first, width, a.input_sum ? s3 : nullptr, a.skip_scale);
}

// A channel as rows of one vector, and a narrower row of what is left; call(panel) for each.
template <typename T, typename Call>
inline void rows_of(Panel<T> panel, int64_t pixels, Call call) {
  const int64_t whole = pixels / N<T>, left = pixels % N<T>;
  panel.x_stride = panel.stride = panel.width = N<T>;
  panel.rows = whole;
  if (whole) call(panel);
  const int64_t done = whole * N<T>;
  panel.x += done, panel.dy += done, panel.dx += done, panel.kept += done;
  if (panel.stream) panel.stream += done;
  panel.width = left, panel.rows = 1;
  if (left) call(panel);
}

template <typename T, bool SILU>
void contiguous_item(const GroupNormBackwardArgs& a, int64_t b, int64_t group, double* work) {
  const int64_t channels = a.channels / a.groups, first = group * channels, n = a.pixels;
  const Runs runs = runs_of(a, b, first, channels);
  const Statistics m = statistics(a, b, group);
  float parameters[6 * N<T>];
  double lanes1[N<T>], lanes2[N<T>], lanes3[N<T>];
  const Columns w = Columns::over(parameters, N<T>);
  double *s1 = work, *s3 = work + channels;
  float* kept = aligned(s3 + channels);
  const int64_t padded = (n + N<T> - 1) / N<T> * N<T>;
  const auto each = [&](auto call) {
    for (const Run& run : runs)
      for (int64_t i = 0; i < run.width; ++i) {
        const int64_t c = run.start + i;
        Panel<T> panel = panel_of<T>(a, run, (b * a.channels + first + c) * n, kept + c * padded);
        panel.x += i * n, panel.dx += i * n;
        const Coefficients k = coefficients(a, b, first + c, m.mean, m.rstd);
        for (int64_t lane = 0; lane < N<T>; ++lane) w.set(lane, k);
        call(panel, c, k.factor);
      }
  };
  const auto sum_of = [](const double* lanes, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += lanes[i];
    return sum;
  };

  Projection total;
  each([&](const Panel<T>& channel, int64_t c, float factor) {
    double s2 = 0;
    s1[c] = s3[c] = 0;
    rows_of(channel, n, [&](const Panel<T>& rows) {
      all_gradient_sums<T, SILU>(rows, w, lanes1, lanes2, lanes3);
      s1[c] += sum_of(lanes1, rows.width), s2 += sum_of(lanes2, rows.width), s3[c] += sum_of(lanes3, rows.width);
    });
    total.add(factor, s1[c], s2);
    write_sums(a, 0, b, first + c, 1, s1 + c);
    write_sums(a, 1, b, first + c, 1, &s2, m.rstd);
  });

  total.finish(static_cast<double>(channels * n), m.rstd);
  std::fill_n(w.base, N<T>, static_cast<float>(total.base));
  std::fill_n(w.slope, N<T>, static_cast<float>(total.slope));
  const bool streams = a.stream && a.input_sum;
  each([&](const Panel<T>& channel, int64_t c, float factor) {
    s3[c] = total.input_sum(factor, static_cast<double>(n), s1[c], s3[c]);
    rows_of(channel, n, [&](const Panel<T>& rows) {
      all_input_gradients<T, SILU>(rows, w, a.skip_scale, streams ? lanes1 : nullptr);
      if (streams) s3[c] += sum_of(lanes1, rows.width);
    });
  });
  write_sums(a, 2, b, first, channels, a.input_sum ? s3 : nullptr, a.skip_scale);
}

template <typename T, bool SILU>
void run(const GroupNormBackwardArgs& a, const NormPlan& plan, int64_t begin, int64_t end, double* work) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / plan.bundles, bundle = item % plan.bundles, first = bundle * plan.bundle_groups;
    if (a.channels_last) {
      const int64_t groups = bundle + 1 == plan.bundles ? a.groups - first : plan.bundle_groups;
      channels_last_item<T, SILU>(a, b, first, groups, work);
    } else {
      contiguous_item<T, SILU>(a, b, first, work);
    }
  }
}

template <typename T>
void run(const GroupNormBackwardArgs& a, const NormPlan& plan, int64_t begin, int64_t end, double* work) {
  return a.silu ? run<T, true>(a, plan, begin, end, work) : run<T, false>(a, plan, begin, end, work);
}

}  // namespace

void SIGN_FAST_ENTRY(group_norm_silu_backward)(const GroupNormBackwardArgs& a, const NormPlan& plan, int64_t begin,
                                               int64_t end, double* work) {
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
