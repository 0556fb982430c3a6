// What NCSN++ needs besides convolutions: resampling filters and wider borders, in float32 on the CPU, channels last.
#pragma once

#include <cstdint>

#include "capability.h"

namespace sign_fast {

constexpr int64_t kFilterSide = 16;  // taps a side at most

// y = (resample(x) + bias + residual)·scale: every channel with the same filter, stride 2, transposed where it goes up.
struct FilterArgs {
  const float* x;  // (B, height, width, channels)
  int64_t batch, height, width, channels;
  const float* taps;  // (size, size)
  int64_t size, padding;
  bool up;
  const float* bias;      // (channels), or null
  const float* residual;  // in y's shape, or null
  float scale;
  float* y;  // (B, out_height, out_width, channels), aliases nothing
  int64_t out_height, out_width;
};

void filter(const FilterArgs& args);

// y (B, height + 2·border, width + 2·border, channels) = x with a border of zeros
void pad(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t border, float* y);

// For the kernel: items are (image, row of y).
SIGN_FAST_DECLARE_KERNEL(resampling_filter, void, const FilterArgs&, int64_t begin, int64_t end)

}  // namespace sign_fast
