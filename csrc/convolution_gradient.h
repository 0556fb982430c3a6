// The weights' gradient of a convolution on the CPU, float32, channels last: products of matrices over tiles or pixels.
#pragma once

#include "convolution_kernel.h"

namespace sign_fast {

// A·dy·Aᵀ of the tiles of an output's gradient, the adjoint of Winograd's output transform.
struct OutputGradientTask {
  int64_t m;
  const float* dy;  // (B, height, width, channels)
  int64_t height, width, channels;
  int64_t first;   // of all images' tiles, the one at 0
  float* to;       // ((m + 2)², stride)
  int64_t stride;
  float* sums;     // (tiles, channels) of each tile's dy, or null
};

// to (+)= leftᵀ·right: rows (channels or taps) of the left times columns of the right, summed over segments of `length`.
// With matrices > 1 those are Winograd's (m + 2)² products, and what is added is Gᵀ·products·G: (9, rows, columns).
struct ProductTask {
  int64_t m;  // of Winograd, or 0
  const float *left, *right;
  const int64_t* left_offset;          // of each row; null: the row
  int64_t left_step, right_step;       // floats from one element of a sum to the next
  int64_t segments, length;            // of a sum
  int64_t left_segment, right_segment;
  int64_t left_stride, right_stride;   // floats from one of Winograd's matrices to the next
  int64_t last;  // so many elements of a sum at the end are followed by less than a vector of the right's memory
  int64_t rows, columns;
  float* to;          // (1 or 9, rows, row)
  int64_t row;        // floats of a row: whole vectors
  bool add;

  int64_t row_blocks() const { return (rows + kRows - 1) / kRows; }
  int64_t items(int64_t vector) const { return row_blocks() * block_count(row / vector); }
  static constexpr int64_t kRows = 24;  // of an item: its products stay in the cache
};

// floats that one thread needs for an item
inline int64_t product_scratch(int64_t m, int64_t vector) {
  return m == 0 ? 0 : (m + 2) * (m + 2) * ProductTask::kRows * 3 * vector;
}

SIGN_FAST_DECLARE_KERNEL(output_gradients, void, const OutputGradientTask&, int64_t begin, int64_t end)
SIGN_FAST_DECLARE_KERNEL(gradient_products, void, const ProductTask&, int64_t begin, int64_t end, float* scratch)
// to (+)= the sum of the rows of x (rows, channels)
SIGN_FAST_DECLARE_KERNEL(row_sums, void, const float* x, int64_t rows, int64_t channels, bool add, float* to)

}  // namespace sign_fast
