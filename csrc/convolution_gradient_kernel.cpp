// Products and transforms of a convolution's weight gradient, compiled once a CPU capability: see capability.h.
#include "convolution_gradient.h"

#include "matmul_tile.h"
#include "winograd.h"
#include "winograd_transform.h"

namespace sign_fast {
namespace {

constexpr int64_t SUM = 16;  // products that join a sum together: of Winograd's errors theirs are the largest

// A·d of one side, the adjoint of transform_output.
template <int M, int FROM, int TO>
inline __attribute__((always_inline)) void transform_output_gradient(const Vec* d, Vec* v) {
  if constexpr (M == 2) {
    v[0 * TO] = d[0 * FROM];
    v[1 * TO] = d[0 * FROM] + d[1 * FROM];
    v[2 * TO] = d[0 * FROM] - d[1 * FROM];
    v[3 * TO] = Vec(0.f) - d[1 * FROM];
  } else {
    const Vec d0 = d[0 * FROM], d1 = d[1 * FROM], d2 = d[2 * FROM], d3 = d[3 * FROM];
    const Vec even1 = fma(P2, d2, d0), odd1 = fma(P2, d3, d1), even2 = fma(Q2, d2, d0), odd2 = fma(Q2, d3, d1);
    v[0 * TO] = d0;
    v[1 * TO] = fma(P, odd1, even1);
    v[2 * TO] = fma(-P, odd1, even1);
    v[3 * TO] = fma(Q, odd2, even2);
    v[4 * TO] = fma(-Q, odd2, even2);
    v[5 * TO] = d3;
  }
}

// Gᵀ·v of one side.
template <int M>
inline __attribute__((always_inline)) void transform_filter_gradient(const float (&g)[M + 2][3], const Vec* v, Vec* d) {
  constexpr int N = M + 2;
  d[0] = Vec(g[0][0]) * v[0];
  d[1] = Vec(0.f);
  d[2] = v[N - 1];
#pragma GCC unroll 2
  for (int i = 1; i < N - 1; i += 2) {  // points ±p
    const Vec even = v[i] + v[i + 1], odd = v[i] - v[i + 1];
    d[0] = fma(g[i][0], even, d[0]);
    d[1] = fma(g[i][1], odd, d[1]);
    d[2] = fma(g[i][2], even, d[2]);
  }
}

template <int M>
void output_gradients(const OutputGradientTask& t, int64_t begin, int64_t end) {
  constexpr int N = M + 2;
  const int64_t columns = (t.width + M - 1) / M, tiles = (t.height + M - 1) / M * columns;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t i = (t.first + tile) % tiles, row = i / columns * M, column = i % columns * M;
    const int64_t height = std::min<int64_t>(M, t.height - row), width = std::min<int64_t>(M, t.width - column);
    const float* dy = t.dy + ((t.first + tile) / tiles * t.height * t.width + row * t.width + column) * t.channels;
    for (int64_t c = 0; c < t.channels; c += V) {
      const int64_t count = std::min(V, t.channels - c);
      Vectors<M * N> half;  // (N, M)
      Vec sum(0.f);
      for (int64_t x = 0; x < M; ++x) {
        Vectors<M> d;
#pragma GCC unroll 4
        for (int64_t y = 0; y < M; ++y) {
          const bool inside = y < height && x < width;
          d.v[y] = inside ? load(dy + (y * t.width + x) * t.channels + c, count) : Vec(0.f);
          sum = sum + d.v[y];
        }
        transform_output_gradient<M, 1, M>(d.v, half.v + x);
      }
      if (t.sums) store(t.sums + tile * t.channels + c, sum, count);
      float* to = t.to + tile * t.channels + c;
      for (int64_t y = 0; y < N; ++y) {
        Vectors<N> v;
        transform_output_gradient<M, 1, 1>(half.v + y * M, v.v);
#pragma GCC unroll 6
        for (int64_t x = 0; x < N; ++x, to += t.stride) store(to, v.v[x], count);
      }
    }
  }
}

// The sums of one tile of the product.
template <int64_t NV, int64_t R>
class Sums {
 public:
  // left: columns from the first of `right` on
  inline __attribute__((always_inline)) Sums(const ProductTask& t, const float* const (&x)[R], const float* right,
                                             int64_t left) {
    int64_t whole = t.segments * t.length - t.last;  // elements that are read by whole vectors
    for (int64_t segment = 0; segment < t.segments; ++segment, whole -= t.length) {
      const int64_t readable = std::clamp<int64_t>(whole, 0, t.length);
      const float* y = right + segment * t.right_segment;
      int64_t at = segment * t.left_segment;
      for (int64_t k = 0; k < readable; k += SUM)
        run(t, x, y, at, std::min(SUM, readable - k), [](const float* p, int64_t) { return Vec::loadu(p); });
      if (readable < t.length)
        run(t, x, y, at, t.length - readable, [&](const float* p, int64_t i) { return load(p, left - i); });
    }
  }

  Vec sum(int64_t r, int64_t n) const { return sum_[r][n]; }

 private:
  template <typename Read>
  inline __attribute__((always_inline)) void run(const ProductTask& t, const float* const (&x)[R], const float*& y,
                                                 int64_t& at, int64_t length, Read&& read) {
    Vec s[R][NV];
    each([&](int64_t r, int64_t n) { s[r][n] = Vec(0.f); });
    for (int64_t k = 0; k < length; ++k, y += t.right_step, at += t.left_step) {
      Vec vectors[NV];
#pragma GCC unroll 3
      for (int64_t n = 0; n < NV; ++n) vectors[n] = read(y + n * V, n * V);
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r) {
        const Vec scalar(x[r][at]);
#pragma GCC unroll 3
        for (int64_t n = 0; n < NV; ++n) s[r][n] = at::vec::fmadd(scalar, vectors[n], s[r][n]);
      }
    }
    if (empty_) {
      each([&](int64_t r, int64_t n) { sum_[r][n] = s[r][n]; });
    } else {
      each([&](int64_t r, int64_t n) { sum_[r][n] = sum_[r][n] + s[r][n]; });
    }
    empty_ = false;
  }

  template <typename F>
  static inline __attribute__((always_inline)) void each(F&& f) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int64_t n = 0; n < NV; ++n) f(r, n);
  }

  union {  // not set to zero, as vectors otherwise are
    Vec sum_[R][NV];
  };
  bool empty_ = true;
};

template <int64_t NV, int64_t R, typename F>
inline void row_tile(const ProductTask& t, int64_t first, int64_t count, const float* left, const float* right,
                     int64_t column, F&& use) {
  const float* x[R];
  for (int64_t r = 0; r < R; ++r) {  // past the end the last row again: computed, not used
    const int64_t row = first + std::min(r, count - 1);
    x[r] = left + (t.left_offset ? t.left_offset[row] : row);
  }
  const Sums<NV, R> sums(t, x, right + column, t.columns - column);
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r) {
    if (r >= count) break;
#pragma GCC unroll 3
    for (int64_t n = 0; n < NV; ++n) use(r, n, sums.sum(r, n));
  }
}

// use(row − first, n, sum) for rows first … end − 1
template <int64_t NV, typename F>
inline void product(const ProductTask& t, int64_t first, int64_t end, const float* left, const float* right,
                    int64_t column, F&& use) {
  for (int64_t row = first; row < end; row += ROWS) {
    const int64_t count = std::min(ROWS, end - row);
    const auto shifted = [&](int64_t r, int64_t n, Vec sum) { use(row - first + r, n, sum); };
    if (ROWS > 4 && count <= 4) {
      row_tile<NV, 4>(t, row, count, left, right, column, shifted);
    } else {
      row_tile<NV, ROWS>(t, row, count, left, right, column, shifted);
    }
  }
}

inline void put(float* to, Vec x, bool add) { (add ? Vec::loadu(to) + x : x).store(to); }

template <int M, int64_t NV>
void winograd_item(const ProductTask& t, int64_t first, int64_t end, int64_t column, float* scratch) {
  constexpr int N = M + 2;
  constexpr int64_t step = ProductTask::kRows * NV * V;
  float g[N][3];
  for (int64_t i = 0; i < N; ++i)
    for (int64_t k = 0; k < 3; ++k) g[i][k] = static_cast<float>(filter_coefficient(M, i, k));
  for (int64_t k = 0; k < N * N; ++k)
    product<NV>(t, first, end, t.left + k * t.left_stride, t.right + k * t.right_stride, column,
                [&](int64_t r, int64_t n, Vec sum) { sum.store(scratch + k * step + (r * NV + n) * V); });
  for (int64_t r = 0; r < end - first; ++r)
    for (int64_t n = 0; n < NV; ++n) {
      const float* from = scratch + (r * NV + n) * V;
      Vectors<3 * N> half;  // (N, 3)
      for (int64_t i = 0; i < N; ++i) {
        Vectors<N> v;
#pragma GCC unroll 6
        for (int64_t j = 0; j < N; ++j) v.v[j] = Vec::loadu(from + (i * N + j) * step);
        transform_filter_gradient<M>(g, v.v, half.v + 3 * i);
      }
      float* to = t.to + (first + r) * t.row + column + n * V;
      for (int64_t x = 0; x < 3; ++x) {
        Vectors<N> v;
        Vectors<3> d;
#pragma GCC unroll 6
        for (int64_t i = 0; i < N; ++i) v.v[i] = half.v[3 * i + x];
        transform_filter_gradient<M>(g, v.v, d.v);
        for (int64_t y = 0; y < 3; ++y) put(to + (3 * y + x) * t.rows * t.row, d.v[y], t.add);
      }
    }
}

}  // namespace

void SIGN_FAST_ENTRY(output_gradients)(const OutputGradientTask& t, int64_t begin, int64_t end) {
  t.m == 2 ? output_gradients<2>(t, begin, end) : output_gradients<4>(t, begin, end);
}

void SIGN_FAST_ENTRY(gradient_products)(const ProductTask& t, int64_t begin, int64_t end, float* scratch) {
  const int64_t vectors = t.row / V, blocks = block_count(vectors);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / blocks * t.kRows, last = std::min(first + t.kRows, t.rows);
    const Block block = sign_fast::block(vectors, item % blocks);
    const int64_t column = block.first * V;
    with_vectors(block.vectors, [&](auto n) {
      if (t.m == 4) {
        winograd_item<4, n>(t, first, last, column, scratch);
      } else if (t.m == 2) {
        winograd_item<2, n>(t, first, last, column, scratch);
      } else {
        product<n>(t, first, last, t.left, t.right, column, [&](int64_t r, int64_t i, Vec sum) {
          put(t.to + (first + r) * t.row + column + i * V, sum, t.add);
        });
      }
    });
  }
}

void SIGN_FAST_ENTRY(row_sums)(const float* x, int64_t rows, int64_t channels, bool add, float* to) {
  for (int64_t c = 0; c < channels; c += V) {
    const int64_t count = std::min(V, channels - c);
    Vec sum(0.f);
    for (int64_t first = 0; first < rows; first += RUN) {
      Vec part(0.f);
      for (int64_t r = first; r < std::min(first + RUN, rows); ++r) part = part + load(x + r * channels + c, count);
      sum = sum + part;
    }
    store(to + c, add ? load(to + c, count) + sum : sum, count);
  }
}

}  // namespace sign_fast
