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

struct ConvolutionArgs {
  const float* x[2];  // (B, H, W, channels) each, dense; H and W as they are before resampling
  int64_t batch;
  const float* residual;  // (B, H, W, out_channels), or null
  bool residual_up;       // it is (B, H/2, W/2, out_channels), read nearest
  float residual_scale;
  float scale;
  float* y;  // (B, H, W, out_channels), aliases no input
};

// Memory on whole cache lines.
class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t size);  // zeros
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
  PackedConvolution(const float* weight, const float* bias, const ConvolutionShape& shape,
                    Algorithm algorithm = Algorithm::Automatic);

  // Needs workspace(batch, threads) floats for the threads that at::parallel_for has; allocates nothing.
  void run(const ConvolutionArgs& args, float* workspace) const;
  int64_t workspace(int64_t batch, int threads) const;

  Algorithm algorithm() const { return algorithm_; }
  int64_t bytes() const;  // of packed weights and tables

 private:
  void pack_direct(const float* weight);
  void pack_winograd(const float* weight);
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
