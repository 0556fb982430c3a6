// The transforms and matrix products of Winograd convolution, compiled once a CPU capability: see capability.h.
#include "winograd.h"

#include "matmul_tile.h"
#include "winograd_transform.h"

namespace sign_fast {
namespace {

constexpr int64_t SUM = 16;  // products that join a sum together: of Winograd's errors theirs are the largest

// Bᵀ·d of one side; the input's step is FROM vectors, the output's TO.
template <int M, int FROM, int TO>
inline __attribute__((always_inline)) void transform_input(const Vec* d, Vec* v) {
  if constexpr (M == 2) {
    v[0 * TO] = d[0 * FROM] - d[2 * FROM];
    v[1 * TO] = d[1 * FROM] + d[2 * FROM];
    v[2 * TO] = d[2 * FROM] - d[1 * FROM];
    v[3 * TO] = d[1 * FROM] - d[3 * FROM];
  } else {
    const Vec d1 = d[1 * FROM], d2 = d[2 * FROM], d3 = d[3 * FROM], d4 = d[4 * FROM];
    const Vec even1 = fma(-Q2, d2, d4), odd1 = fma(-Q2, d1, d3), even2 = fma(-P2, d2, d4), odd2 = fma(-P2, d1, d3);
    v[0 * TO] = fma(P2 * Q2, d[0 * FROM], fma(-P2 - Q2, d2, d4));
    v[1 * TO] = fma(P, odd1, even1);
    v[2 * TO] = fma(-P, odd1, even1);
    v[3 * TO] = fma(Q, odd2, even2);
    v[4 * TO] = fma(-Q, odd2, even2);
    v[5 * TO] = fma(P2 * Q2, d1, fma(-P2 - Q2, d3, d[5 * FROM]));
  }
}

// Aᵀ·v of one side.
template <int M, int FROM, int TO>
inline __attribute__((always_inline)) void transform_output(const Vec* v, Vec* y) {
  if constexpr (M == 2) {
    y[0 * TO] = v[0 * FROM] + (v[1 * FROM] + v[2 * FROM]);
    y[1 * TO] = (v[1 * FROM] - v[2 * FROM]) - v[3 * FROM];
  } else {
    const Vec even1 = v[1 * FROM] + v[2 * FROM], odd1 = v[1 * FROM] - v[2 * FROM];
    const Vec even2 = v[3 * FROM] + v[4 * FROM], odd2 = v[3 * FROM] - v[4 * FROM];
    y[0 * TO] = (v[0 * FROM] + even1) + even2;
    y[1 * TO] = fma(P, odd1, Vec(Q) * odd2);
    y[2 * TO] = fma(P2, even1, Vec(Q2) * even2);
    y[3 * TO] = fma(P2 * P, odd1, fma(Q2 * Q, odd2, v[5 * FROM]));
  }
}

struct Place {
  int64_t image, row, column;  // of the tile's first output pixel
};

inline Place place(const WinogradTask& t, int64_t tile) {
  const int64_t columns = t.columns(), tiles = t.rows() * columns;
  return {tile / tiles, tile % tiles / columns * t.m, tile % columns * t.m};
}

template <int M>
void inputs(const WinogradTask& t, int64_t begin, int64_t end) {
  constexpr int N = M + 2;
  const int64_t half = t.up ? 1 : 0, pixels = (t.height >> half) * (t.width >> half), depth = t.depth();
  const int64_t image_tiles = t.rows() * t.columns(), stride = t.stride;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t image = (t.first + tile) / image_tiles;
    const int32_t* index = t.input_index + (t.first + tile) % image_tiles * N * N;
    float* to = t.inputs + tile * depth;
    for (int64_t part = 0; part < 2; to += t.channels[part], ++part) {
      const int64_t channels = t.channels[part];
      if (channels == 0) continue;
      const float* from[N * N];
      const float* base = t.x[part] + image * pixels * channels;
      for (int64_t i = 0; i < N * N; ++i) from[i] = index[i] < 0 ? t.zeros : base + index[i] * channels;
      for (int64_t c = 0; c < channels; c += V) {
        const int64_t count = std::min(V, channels - c);
        Vectors<N * N> d;
        for (int64_t j = 0; j < N; ++j) {
          Vectors<N> column;
#pragma GCC unroll 6
          for (int64_t i = 0; i < N; ++i) column.v[i] = load(from[i * N + j] + c, count);
          transform_input<M, 1, N>(column.v, d.v + j);
        }
        float* y = to + c;
        for (int64_t i = 0; i < N; ++i) {
          Vectors<N> row;
          transform_input<M, 1, 1>(d.v + i * N, row.v);
#pragma GCC unroll 6
          for (int64_t j = 0; j < N; ++j, y += stride) store(y, row.v[j], count);
        }
      }
    }
  }
}

// Rows i and N − 1 (i = 0), or i and i + 1 (points ±p), of G·g·Gᵀ for all channels of a block: to is
// (m + 2, channels, vectors) of the first, and as much of the second `apart` after it. Two rows at a time read the
// filters half as often.
template <int M>
void filter_rows(const float* g, int64_t i, int64_t depth, int64_t step, float* to, int64_t apart) {
  constexpr int N = M + 2;
  float coefficient[N][3];
  for (int64_t j = 0; j < N; ++j)
    for (int64_t k = 0; k < 3; ++k) coefficient[j][k] = static_cast<float>(filter_coefficient(M, j, k));
  const float* own = coefficient[i];
  const int64_t column = depth * step;
  for (int64_t c = 0; c < depth; ++c, g += 9 * step, to += step)
    for (int64_t n = 0; n < step; n += V) {
      Vectors<3> s[2];
#pragma GCC unroll 3
      for (int64_t k = 0; k < 3; ++k) {
        const float* x = g + k * step + n;
        if (i == 0) {
          s[0].v[k] = Vec(own[0]) * Vec::loadu(x);
          s[1].v[k] = Vec::loadu(x + 6 * step);
        } else {
          const Vec even = fma(own[2], Vec::loadu(x + 6 * step), Vec(own[0]) * Vec::loadu(x));
          const Vec odd = Vec(own[1]) * Vec::loadu(x + 3 * step);
          s[0].v[k] = even + odd;
          s[1].v[k] = even - odd;
        }
      }
#pragma GCC unroll 2
      for (int64_t r = 0; r < 2; ++r) {
        const Vec* t = s[r].v;
        float* y = to + r * apart + n;
        (Vec(coefficient[0][0]) * t[0]).store(y);
#pragma GCC unroll 2
        for (int64_t j = 1; j < N - 1; j += 2) {  // points ±p
          const Vec even = fma(coefficient[j][2], t[2], Vec(coefficient[j][0]) * t[0]);
          const Vec odd = Vec(coefficient[j][1]) * t[1];
          (even + odd).store(y + j * column);
          (even - odd).store(y + (j + 1) * column);
        }
        t[2].store(y + (N - 1) * column);
      }
    }
}

template <int M>
void filters(const float* g, int64_t depth, int64_t step, float* to) {
  constexpr int N = M + 2;
  const int64_t row = N * depth * step;
  filter_rows<M>(g, 0, depth, step, to, (N - 1) * row);
  for (int64_t i = 1; i < N - 1; i += 2) filter_rows<M>(g, i, depth, step, to + i * row, row);
}

template <int64_t NV, int64_t R>
inline void product_rows(const float* x, const float* w, float* y, int64_t depth, int64_t count) {
  const float* rows[R];
  for (int64_t r = 0; r < R; ++r) rows[r] = x + std::min(r, count - 1) * depth;
  multiply<NV, R, false, SUM>(rows, w, depth, [&](const auto& sum) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      if (r >= count) break;
#pragma GCC unroll 3
      for (int64_t n = 0; n < NV; ++n) sum[r][n].store(y + (r * NV + n) * V);
    }
  });
}

// y (tiles, vectors) = x (tiles, depth)·w (depth, vectors)
template <int64_t NV>
void product(const float* x, const float* w, float* y, int64_t tiles, int64_t depth) {
  for (int64_t p = 0; p < tiles; p += ROWS, x += ROWS * depth, y += ROWS * NV * V) {
    const int64_t count = std::min(ROWS, tiles - p);
    if (ROWS > 4 && count <= 4) {
      product_rows<NV, 4>(x, w, y, depth, count);
    } else {
      product_rows<NV, ROWS>(x, w, y, depth, count);
    }
  }
}

// One tile alone: the products of half a row of Bᵀ·d·B together, as one row leaves the multipliers waiting.
template <int64_t NV, int64_t R>
inline void product_alone(const float* x, int64_t x_apart, const float* w, int64_t w_apart, float* y, int64_t y_apart,
                          int64_t depth) {
  const float* rows[R];
  for (int64_t r = 0; r < R; ++r) rows[r] = x + r * x_apart;
  const auto use = [&](const auto& sum) {
#pragma GCC unroll 3
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int64_t n = 0; n < NV; ++n) sum[r][n].store(y + r * y_apart + n * V);
  };
  multiply<NV, R, true, SUM>(rows, w, depth, use, w_apart);
}

template <int M, bool UP, int64_t NV>
void output_tiles(const WinogradTask& t, const float* products, int64_t stride, int64_t first_vector) {
  constexpr int N = M + 2;
  const int64_t first = first_vector * V, left = t.to.channels - first;
  const Vec scale(t.to.scale), residual_scale(t.to.residual_scale);
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const Place at = place(t, t.first + tile);
    const int64_t rows = std::min<int64_t>(M, t.height - at.row), columns = std::min<int64_t>(M, t.width - at.column);
    for (int64_t n = 0; n < NV; ++n) {
      const float* from = products + (tile * NV + n) * V;
      const int64_t count = left - n * V;
      const Vec bias = Vec::loadu(t.to.bias + first + n * V);
      Vectors<M * N> half;
#pragma GCC unroll 6
      for (int64_t j = 0; j < N; ++j) {
        Vectors<N> column;
#pragma GCC unroll 6
        for (int64_t i = 0; i < N; ++i)
          column.v[i] = UP && (i == 2 || j == 2) ? Vec(0.f) : Vec::loadu(from + (i * N + j) * stride);
        transform_output<M, 1, N>(column.v, half.v + j);
      }
      for (int64_t i = 0; i < rows; ++i) {
        Vectors<M> y;
        transform_output<M, 1, 1>(half.v + i * N, y.v);
        const int64_t pixel = (at.row + i) * t.width + at.column;
        float* to = t.to.y + (at.image * t.to.pixels + pixel) * t.to.channels + first + n * V;
#pragma GCC unroll 4
        for (int64_t j = 0; j < M; ++j) {
          if (j >= columns) break;
          Vec sum = y.v[j] + bias;
          if (t.to.residual) {
            const int64_t index = t.to.residual_index ? t.to.residual_index[pixel + j] : pixel + j;
            const int64_t at_pixel = at.image * t.to.residual_pixels + index;
            const Vec residual = load(t.to.residual + at_pixel * t.to.channels + first + n * V, count);
            sum = at::vec::fmadd(residual, residual_scale, sum);
          }
          store(to + j * t.to.channels, sum * scale, count);
        }
      }
    }
  }
}

template <int M, bool UP>
void outputs(const WinogradTask& t, int64_t begin, int64_t end, float* scratch) {
  constexpr int N = M + 2;
  const int64_t depth = t.depth();
  for (int64_t item = begin; item < end; ++item) {
    const Block block = sign_fast::block(t.vectors, item, t.block_vectors);
    const float* weights = t.weights + block.first * V * depth * (t.transformed ? N * N : 9);
    with_vectors(block.vectors, [&](auto vectors) {
      constexpr int64_t step = vectors * V;
      const int64_t stride = winograd_stride(t.tiles, step);
      float* filters = scratch + N * N * stride;
      for (int64_t i = 0; i < N; ++i) {
        const int64_t row = i < 2 ? i * (N - 1) : i - 1;  // first and last, then the pairs
        if (!t.transformed && i % 2 == 0) filter_rows<M>(weights, row, depth, step, filters, N * depth * step);
        if (UP && row == 2) continue;
        const float* own = t.transformed ? weights + row * N * depth * step : filters + i % 2 * N * depth * step;
        if (t.tiles == 1) {
          for (int64_t column = 0; column < N; column += N / 2)
            product_alone<vectors, N / 2>(t.inputs + (row * N + column) * t.stride, t.stride,
                                          own + column * depth * step, depth * step,
                                          scratch + (row * N + column) * stride, stride, depth);
          continue;
        }
        for (int64_t column = 0; column < N; ++column) {
          if (UP && column == 2) continue;
          const int64_t k = row * N + column;
          const float* filter = own + column * depth * step;
          product<vectors>(t.inputs + k * t.stride, filter, scratch + k * stride, t.tiles, depth);
        }
      }
      output_tiles<M, UP, vectors>(t, scratch, stride, block.first);
    });
  }
}

}  // namespace

void SIGN_FAST_ENTRY(winograd_filters)(int64_t m, const float* g, int64_t channels, int64_t width, float* to) {
  m == 2 ? filters<2>(g, channels, width, to) : filters<4>(g, channels, width, to);
}

void SIGN_FAST_ENTRY(winograd_inputs)(const WinogradTask& t, int64_t begin, int64_t end) {
  t.m == 2 ? inputs<2>(t, begin, end) : inputs<4>(t, begin, end);
}

void SIGN_FAST_ENTRY(winograd_outputs)(const WinogradTask& t, int64_t begin, int64_t end, float* scratch) {
  if (t.m == 4) {
    outputs<4, false>(t, begin, end, scratch);
  } else if (t.up) {
    outputs<2, true>(t, begin, end, scratch);
  } else {
    outputs<2, false>(t, begin, end, scratch);
  }
}

}  // namespace sign_fast
