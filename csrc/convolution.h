// float32 convolutions on the CPU for inference: weights packed once, channels last, epilogue in registers.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

namespace sign_fast {

// Of the concatenated input, before the convolution: nearest ×2, or the mean of 2×2.
enum class Resampling { None, Up, Down };

enum class Algorithm { Automatic, Direct, Phases, Winograd2, Winograd4 };

Resampling resampling_of(std::string_view name);  // "none", "up", "down"
Algorithm algorithm_of(std::string_view name);    // "", "direct", "phases", "winograd2", "winograd4"

struct ConvolutionShape {
  int64_t channels[2];  // of the two concatenated inputs; the second may be 0
  int64_t out_channels;
  int64_t kernel;         // 1 or 3, padding kernel/2
  int64_t height, width;  // of the output
  Resampling resampling;
};

// weight (o, c, ky, kx) is data[o·strides[0] + c·strides[1] + ky·strides[2] + kx·strides[3]]
struct Filter {
  const float* data;
  int64_t strides[4];

  const float& operator()(int64_t o, int64_t c, int64_t y, int64_t x) const {
    return data[o * strides[0] + c * strides[1] + y * strides[2] + x * strides[3]];
  }
};

// of a dense weight (out_channels, channels, k, k)
Filter dense_filter(const float* weight, const ConvolutionShape& shape);

struct ConvolutionArgs {
  const float* x[2];  // (B, H, W, channels) each, dense; H and W as they are before resampling
  int64_t batch;
  const float* residual;  // (B, H, W, out_channels), or null
  bool residual_up;       // it is (B, H/2, W/2, out_channels), read nearest
  float residual_scale;
  float scale;
  float* y;  // (B, H, W, out_channels), aliases no input
};

// to[tap·tap_step + c·channel_step + o − first] for all taps and channels and o = first … first + count − 1
void gather_filter(const Filter& weight, int64_t kernel, int64_t channels, int64_t first, int64_t count,
                   int64_t tap_step, int64_t channel_step, float* to);

// Whether F(4×4) is to be preferred to F(2×2), whose error is smaller: where its tiles fit, and multiply clearly less.
bool prefers_winograd4(int64_t height, int64_t width);

// The pixel of each value of each tile of an image, (tiles, (m + 2)²), −1 outside of it; up: of an image half as large.
std::vector<int32_t> winograd_input_index(int64_t m, int64_t height, int64_t width, bool up);

// The gradients of a convolution's weight and bias; the second input has no channels.
struct WeightGradientArgs {
  const float* x;   // (B, H, W, channels), dense; H and W as they are before resampling
  const float* dy;  // (B, height, width, out_channels)
  int64_t batch;
  float* weight;       // (out_channels, channels, k, k) by strides
  int64_t strides[4];
  float* bias;  // (out_channels), or null
};

// Their bits depend on the shape and the batch, on the number of threads in none: sums are cut by shape alone.
void weight_gradient(const ConvolutionShape& shape, const WeightGradientArgs& args);

// Memory on whole cache lines.
class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t size);  // zeros
  static AlignedFloats uninitialized(int64_t size);
  float* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(float* p) const;
  };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

// the first whole cache line from p on; 16 floats more than needed make room for it
float* align(float* p);

// y = (conv(resample(concat(x0, x1))) + bias + residual·residual_scale)·scale. What an image becomes depends on its
// batch and on the number of threads in no bit.
class PackedConvolution {
 public:
  // weight (out_channels, channels, k, k) and bias (out_channels) or null are copied.
  PackedConvolution(const Filter& weight, const float* bias, const ConvolutionShape& shape,
                    Algorithm algorithm = Algorithm::Automatic);

  // Needs workspace(batch, threads) floats for the threads that at::parallel_for has; allocates nothing.
  void run(const ConvolutionArgs& args, float* workspace) const;
  int64_t workspace(int64_t batch, int threads) const;

  Algorithm algorithm() const { return algorithm_; }
  int64_t bytes() const;  // of packed weights and tables

 private:
  void pack_direct(const Filter& weight);
  void pack_winograd(const Filter& weight);
  void run_direct(const ConvolutionArgs& args, float* workspace) const;
  void run_winograd(const ConvolutionArgs& args, float* workspace) const;

  int64_t in_channels() const { return shape_.channels[0] + shape_.channels[1]; }
  bool winograd() const { return algorithm_ == Algorithm::Winograd2 || algorithm_ == Algorithm::Winograd4; }
  int64_t winograd_workspace(int64_t batch, int threads) const;
  int64_t scratch(int64_t batch) const;  // floats of the copied input, 0 where it is read in place

  ConvolutionShape shape_;
  Algorithm algorithm_;
  int64_t vectors_;           // of output channels
  bool transformed_ = false;  // the weights, for Winograd; else every run does it, which takes less memory
  AlignedFloats weights_, bias_, zeros_;
  std::vector<int32_t> input_index_, output_index_, residual_index_;
};

}  // namespace sign_fast
