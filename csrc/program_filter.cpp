#include "program_filter.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace sign_fast {
namespace {

// Where tap i of output o reads an input of `length`: −1 outside, and between two inputs where it goes up.
int64_t source(const FilterArgs& a, int64_t o, int64_t i, int64_t length) {
  const int64_t at = a.up ? o + a.padding - i : 2 * o + i - a.padding;
  if (at < 0 || (a.up && at % 2 != 0)) return -1;
  const int64_t index = a.up ? at / 2 : at;
  return index < length ? index : -1;
}

void filter_row(const FilterArgs& a, int64_t b, int64_t row) {
  const int64_t channels = a.channels;
  const float* x = a.x + b * a.height * a.width * channels;
  const int64_t start = (b * a.out_height + row) * a.out_width * channels;
  for (int64_t column = 0; column < a.out_width; ++column) {
    float* y = a.y + start + column * channels;
    std::fill_n(y, channels, 0.f);
    for (int64_t i = 0; i < a.size; ++i)
      for (int64_t j = 0; j < a.size; ++j) {
        const int64_t from_row = source(a, row, i, a.height), from_column = source(a, column, j, a.width);
        if (from_row < 0 || from_column < 0) continue;
        const float* from = x + (from_row * a.width + from_column) * channels;
        const float tap = a.taps[i * a.size + j];
        for (int64_t c = 0; c < channels; ++c) y[c] += tap * from[c];
      }
    const float* residual = a.residual ? a.residual + start + column * channels : nullptr;
    for (int64_t c = 0; c < channels; ++c)
      y[c] = (y[c] + (a.bias ? a.bias[c] : 0.f) + (residual ? residual[c] : 0.f)) * a.scale;
  }
}

}  // namespace

void filter(const FilterArgs& a) {
  constexpr int64_t grain = 65536;  // multiplications below which a second thread does not pay
  const int64_t row = a.out_width * a.channels * a.size * a.size;
  at::parallel_for(0, a.batch * a.out_height, std::max<int64_t>(1, grain / row), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) filter_row(a, item / a.out_height, item % a.out_height);
  });
}

void pad(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t border, float* y) {
  const int64_t line = width * channels, side = border * channels, ends = border * (line + 2 * side);
  for (int64_t b = 0; b < batch; ++b) {
    y = std::fill_n(y, ends, 0.f);
    for (int64_t row = 0; row < height; ++row, x += line) {
      y = std::fill_n(y, side, 0.f);
      y = std::copy_n(x, line, y);
      y = std::fill_n(y, side, 0.f);
    }
    y = std::fill_n(y, ends, 0.f);
  }
}

}  // namespace sign_fast
