// What the convolution kernels read: raw pointers, so that their translation units need no tensor headers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "capability.h"

namespace sign_fast {
namespace {

// Output channels are cut into blocks of at most `most` vectors: 3 are as many accumulators as a tile of pixels leaves
// room for, 2 have fewer weights at a time.
struct Block {
  int64_t first, vectors;
};

inline int64_t block_count(int64_t vectors, int64_t most = 3) { return (vectors + most - 1) / most; }

// Blocks of `most`, then those that have one vector less: 2 + 2 in place of 3 + 1.
inline Block block(int64_t vectors, int64_t i, int64_t most = 3) {
  const int64_t blocks = block_count(vectors, most), full = vectors - (most - 1) * blocks;
  if (vectors < most) return {0, vectors};
  return {(most - 1) * i + std::min(i, full), i < full ? most : most - 1};
}

}  // namespace

// Row r of the left operand is x + image·b + pixel·index[r], `length` long; segments follow each other in the sum.
struct Segment {
  const float* x;
  int64_t image, pixel, length;
};

// y = (sum + bias + residual·residual_scale)·scale
struct Epilogue {
  const float* bias;      // whole vectors
  const float* residual;  // or null
  const int32_t* residual_index;  // residual pixel of each output pixel; null: the same
  int64_t residual_pixels;
  float residual_scale;
  float scale;
  float* y;
  int64_t pixels, channels;
};

struct DirectTask {
  Segment segments[3];
  int64_t segment_count;
  const float* weights;          // (phase, block, segment and its channel, vectors of the block)
  int64_t depth, vectors;        // of a sum, of output channels
  const int32_t* input_index;    // of each pixel
  const int32_t* output_index;   // (phases or copies, pixels): where it goes; null: the same pixel
  int64_t batch, pixels, chunk;  // chunk: pixels of an item
  int64_t phases, phase_row, phase_column;  // phase 2·i + j shifts the input by i rows and j columns
  int64_t copies;                           // of each result, to several pixels
  Epilogue to;

  int64_t chunks() const { return (pixels + chunk - 1) / chunk; }
  int64_t items() const { return phases * block_count(vectors) * batch * chunks(); }
};

// The concatenated, resampled input with a border of zeros, (B, height + 2·border, width + 2·border, channels).
struct CopyTask {
  const float* x[2];
  int64_t channels[2];
  int64_t batch, height, width, border;  // height and width of the copy without border
  bool up, down;
  float* y;

  int64_t items() const { return batch * (height + 2 * border); }
};

SIGN_FAST_DECLARE_KERNEL(convolution_direct, void, const DirectTask&, int64_t begin, int64_t end)
SIGN_FAST_DECLARE_KERNEL(convolution_copy, void, const CopyTask&, int64_t begin, int64_t end)
SIGN_FAST_DECLARE_KERNEL(convolution_vector, int64_t)  // floats of a vector

}  // namespace sign_fast
