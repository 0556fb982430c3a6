// Resampling filters over raw pointers, compiled once a CPU capability: see capability.h.
#include "program_filter.h"

#include <algorithm>

namespace sign_fast {
namespace {

// Where tap i of output o reads an input of `length`: −1 outside, and between two inputs where it goes up.
inline int64_t source(const FilterArgs& a, int64_t o, int64_t i, int64_t length) {
  const int64_t at = a.up ? o + a.padding - i : 2 * o + i - a.padding;
  if (at < 0 || (a.up && at % 2 != 0)) return -1;
  const int64_t index = a.up ? at / 2 : at;
  return index < length ? index : -1;
}

struct Tap {
  const float* x;  // of the pixel that it is multiplied with
  float factor;
};

void filter_row(const FilterArgs& a, int64_t b, int64_t row) {
  constexpr int64_t block = 16;  // channels at a time, whose sums stay in registers
  const int64_t channels = a.channels;
  const float* x = a.x + b * a.height * a.width * channels;
  for (int64_t column = 0; column < a.out_width; ++column) {
    Tap taps[kFilterSide * kFilterSide];
    int64_t count = 0;
    for (int64_t i = 0; i < a.size; ++i)
      for (int64_t j = 0; j < a.size; ++j) {
        const int64_t from_row = source(a, row, i, a.height), from_column = source(a, column, j, a.width);
        if (from_row < 0 || from_column < 0) continue;
        taps[count++] = {x + (from_row * a.width + from_column) * channels, a.taps[i * a.size + j]};
      }
    const int64_t pixel = ((b * a.out_height + row) * a.out_width + column) * channels;
    for (int64_t first = 0; first < channels; first += block) {
      const int64_t width = std::min(block, channels - first);
      float sum[block] = {};
      for (int64_t k = 0; k < count; ++k) {
        const float *from = taps[k].x + first, factor = taps[k].factor;
        if (width == block) {
          for (int64_t c = 0; c < block; ++c) sum[c] += factor * from[c];
        } else {
          for (int64_t c = 0; c < width; ++c) sum[c] += factor * from[c];
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        const float bias = a.bias ? a.bias[first + c] : 0.f;
        const float residual = a.residual ? a.residual[pixel + first + c] : 0.f;
        a.y[pixel + first + c] = (sum[c] + bias + residual) * a.scale;
      }
    }
  }
}

}  // namespace

void SIGN_FAST_ENTRY(resampling_filter)(const FilterArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) filter_row(a, item / a.out_height, item % a.out_height);
}

}  // namespace sign_fast
