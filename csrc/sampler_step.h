// The CPU kernel of the sampler step: raw pointers in, so that its translation units need no tensor headers.
#pragma once

#include <cstdint>

#include "capability.h"

namespace sign_fast {

enum class SamplerDtype { Float, BFloat16, Half };

struct SamplerArgs {
  const void* x;               // (B, C, H, W), or null: noise alone
  const void* network_output;  // F, or null: D = x
  void* y;                     // x's or F's kind of memory; (B, H, W, C) bytes if `bytes`
  const float* c_skip;         // per image, where F is given; a row of 0 shares the first value
  const float* c_out;
  const int64_t* seeds;        // per image, or null: y = D
  const float* scale;          // y = scale·D + sigma·n
  const float* sigma;
  int64_t c_skip_row, c_out_row, scale_row, sigma_row;
  int64_t step;
  int64_t batch, channels, pixels;
  SamplerDtype x_dtype, network_dtype, y_dtype;
  bool channels_last;          // of x, F and y alike
  bool bytes;
};

// Elements an item takes, whole Philox calls: work is cut by shape alone.
constexpr int64_t kSamplerItem = 4096;

inline int64_t sampler_items(const SamplerArgs& a) {
  return (a.channels * a.pixels + kSamplerItem - 1) / kSamplerItem;
}

// Items begin to end of all images' items, image by image.
SIGN_FAST_DECLARE_KERNEL(sampler_step, void, const SamplerArgs&, int64_t begin, int64_t end)

}  // namespace sign_fast
