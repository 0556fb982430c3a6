// Direct convolution over raw pointers, compiled once a CPU capability: see capability.h.
#include "convolution_kernel.h"

#include "matmul_tile.h"

namespace sign_fast {
namespace {

constexpr int64_t DIRECT_DEPTH = 128;  // products a sum takes before it joins the others

// One item: `chunk` pixels of an image times one block of output channels.
template <int64_t NV>
void direct_item(const DirectTask& t, const float* weights, int64_t first_vector, int64_t b, int64_t phase,
                 int64_t begin, int64_t end) {
  const int64_t shift = phase / 2 * t.phase_row + phase % 2 * t.phase_column;
  const int64_t first = first_vector * V, left = t.to.channels - first;
  const Vec scale(t.to.scale), residual_scale(t.to.residual_scale);
  for (int64_t p = begin; p < end; p += ROWS) {
    const int64_t count = std::min(ROWS, end - p);
    Tile<NV> tile;
    const float* w = weights;
    for (int64_t s = 0; s < t.segment_count; ++s) {
      const Segment& segment = t.segments[s];
      const float* base = segment.x + segment.image * b + shift;
      const float* x[ROWS];
      // past the end the last pixel again: computed, not stored
      for (int64_t r = 0; r < ROWS; ++r) {
        const int64_t pixel = p + std::min(r, count - 1);
        x[r] = base + segment.pixel * (t.input_index ? t.input_index[pixel] : pixel);
      }
      tile.add(x, w, segment.length, NV * V, DIRECT_DEPTH);
      w += segment.length * NV * V;
    }
    for (int64_t copy = 0; copy < t.copies; ++copy) {
      const int32_t* to = t.output_index ? t.output_index + (phase + copy) * t.pixels : nullptr;
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS; ++r) {
        if (r >= count) break;
        const int64_t out = to ? to[p + r] : p + r;
        float* y = t.to.y + (b * t.to.pixels + out) * t.to.channels + first;
        const float* residual = nullptr;
        if (t.to.residual) {
          const int64_t pixel = t.to.residual_index ? t.to.residual_index[out] : out;
          residual = t.to.residual + (b * t.to.residual_pixels + pixel) * t.to.channels + first;
        }
#pragma GCC unroll 3
        for (int64_t n = 0; n < NV; ++n) {
          Vec sum = tile.sum[r][n] + Vec::loadu(t.to.bias + first + n * V);
          if (residual) sum = at::vec::fmadd(load(residual + n * V, left - n * V), residual_scale, sum);
          store(y + n * V, sum * scale, left - n * V);
        }
      }
    }
  }
}

inline void copy(const float* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + V <= count; i += V) Vec::loadu(from + i).store(to + i);
  for (; i < count; ++i) to[i] = from[i];
}

inline void mean(const float* from, int64_t row, int64_t pixel, float* to, int64_t count) {
  const Vec quarter(0.25f);
  int64_t i = 0;
  for (; i + V <= count; i += V) {
    const float *upper = from + i, *lower = upper + row;
    const Vec sum = (Vec::loadu(upper) + Vec::loadu(upper + pixel)) + (Vec::loadu(lower) + Vec::loadu(lower + pixel));
    (sum * quarter).store(to + i);
  }
  for (; i < count; ++i) {
    const float *upper = from + i, *lower = upper + row;
    to[i] = ((upper[0] + upper[pixel]) + (lower[0] + lower[pixel])) * 0.25f;
  }
}

}  // namespace

void SIGN_FAST_ENTRY(convolution_direct)(const DirectTask& t, int64_t begin, int64_t end) {
  const int64_t chunks = t.chunks(), images = t.batch * chunks, blocks = block_count(t.vectors);
  for (int64_t item = begin; item < end; ++item) {
    // the block of weights changes last: it stays in the cache
    const int64_t part = item / images, b = item % images / chunks, first = item % chunks * t.chunk;
    const int64_t phase = part / blocks;
    const Block block = sign_fast::block(t.vectors, part % blocks);
    const float* weights = t.weights + (phase * t.vectors + block.first) * V * t.depth;
    with_vectors(block.vectors, [&](auto n) {
      direct_item<n>(t, weights, block.first, b, phase, first, std::min(first + t.chunk, t.pixels));
    });
  }
}

void SIGN_FAST_ENTRY(convolution_copy)(const CopyTask& t, int64_t begin, int64_t end) {
  const int64_t rows = t.height + 2 * t.border, columns = t.width + 2 * t.border;
  const int64_t channels = t.channels[0] + t.channels[1];
  const int64_t height = t.up ? t.height / 2 : t.down ? t.height * 2 : t.height;
  const int64_t width = t.up ? t.width / 2 : t.down ? t.width * 2 : t.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / rows, i = item % rows - t.border;
    float* y = t.y + item * columns * channels;
    if (i < 0 || i >= t.height) {
      std::fill_n(y, columns * channels, 0.f);
      continue;
    }
    std::fill_n(y, t.border * channels, 0.f);
    std::fill_n(y + (columns - t.border) * channels, t.border * channels, 0.f);
    y += t.border * channels;
    for (int64_t part = 0, first = 0; part < 2; first += t.channels[part], ++part) {
      const int64_t c = t.channels[part], row = width * c;
      if (c == 0) continue;
      const float* x = t.x[part] + (b * height + (t.up ? i / 2 : t.down ? 2 * i : i)) * row;
      if (c == channels && !t.up && !t.down) {
        copy(x, y, t.width * c);
      } else if (t.down) {
        for (int64_t j = 0; j < t.width; ++j) mean(x + 2 * j * c, row, c, y + j * channels + first, c);
      } else {
        for (int64_t j = 0; j < t.width; ++j) copy(x + (t.up ? j / 2 : j) * c, y + j * channels + first, c);
      }
    }
  }
}

int64_t SIGN_FAST_ENTRY(convolution_vector)() { return V; }

}  // namespace sign_fast
