// Winograd convolution F(m×m, 3×3), m = 2 or 4: an output tile of m×m pixels takes (m + 2)² multiplications a pair of
// channels in place of 9·m². Y = Aᵀ[(G·g·Gᵀ) ⊙ (Bᵀ·d·B)]A; the sum over channels makes (m + 2)² matrix products of ⊙.
#pragma once

#include "convolution_kernel.h"

namespace sign_fast {
namespace {

// Points of F(4×4): 0, ±11/16, ±3/2, ∞. Exact in float32, and of a third of the error that 0, ±1, ±2, ∞ have.
constexpr double kPoint1 = 0.6875, kPoint2 = 1.5;

// G (m + 2, 3): what a filter is multiplied with from both sides.
inline double filter_coefficient(int64_t m, int64_t i, int64_t k) {
  if (m == 2) {
    constexpr double g[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    return g[i][k];
  }
  if (i == 5) return k == 2;
  constexpr double square1 = kPoint1 * kPoint1, square2 = kPoint2 * kPoint2;
  constexpr double points[5] = {0, kPoint1, -kPoint1, kPoint2, -kPoint2};
  const double divisor = i == 0  ? square1 * square2
                         : i < 3 ? 2 * square1 * (square1 - square2)
                                 : 2 * square2 * (square2 - square1);
  return (k == 0 ? 1 : k == 1 ? points[i] : points[i] * points[i]) / divisor;
}

// A cache line beyond the tiles: strides of whole pages would put all (m + 2)² values of a tile into one set.
inline int64_t winograd_stride(int64_t tiles, int64_t channels) { return (tiles * channels + 31) / 16 * 16; }

// vector: floats of one
inline int64_t winograd_scratch(int64_t m, int64_t tiles, int64_t depth, int64_t vector, bool transformed) {
  const int64_t side = m + 2, width = 3 * vector;
  return side * side * winograd_stride(tiles, width) + (transformed ? 0 : 2 * side * depth * width);
}

}  // namespace

struct WinogradTask {
  int64_t m;
  const float* x[2];
  int64_t channels[2];
  const float* zeros;      // as many as the wider input has channels: what lies outside of the image
  const int32_t* input_index;  // (tiles of an image, (m + 2)²): the pixel, or −1 outside of the image
  int64_t height, width;   // of the output
  bool up;                 // x is half as high and wide; tiles of 2: rows and columns 2 of Bᵀ·d·B vanish
  const float* weights;    // transformed: (block, (m + 2)², channels, vectors); else (block, channels, 9, vectors)
  bool transformed;
  int64_t vectors;         // of output channels
  int64_t block_vectors;   // most of a block
  int64_t first, tiles;    // of all images' tiles, those at work
  float* inputs;           // ((m + 2)², stride)
  int64_t stride;
  Epilogue to;

  int64_t side() const { return m + 2; }
  int64_t rows() const { return (height + m - 1) / m; }
  int64_t columns() const { return (width + m - 1) / m; }
  int64_t depth() const { return channels[0] + channels[1]; }
};

// G·g·Gᵀ of filters (channels, 9, width) to ((m + 2)², channels, width); width: floats of whole vectors
SIGN_FAST_DECLARE_KERNEL(winograd_filters, void, int64_t m, const float* filters, int64_t channels, int64_t width,
                         float* to)
// Transforms the inputs of tiles begin … end − 1 of those at work.
SIGN_FAST_DECLARE_KERNEL(winograd_inputs, void, const WinogradTask&, int64_t begin, int64_t end)
// Blocks of output channels begin … end − 1 of the tiles at work; scratch: winograd_scratch floats of this thread.
SIGN_FAST_DECLARE_KERNEL(winograd_outputs, void, const WinogradTask&, int64_t begin, int64_t end, float* scratch)

}  // namespace sign_fast
