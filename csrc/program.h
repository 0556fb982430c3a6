// A network as a flat list of operations (sign_fast/inference/program.py), executed without Python: on the CPU in
// float32 by kernels of this folder on one planned piece of memory, elsewhere by ATen operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "convolution.h"

namespace sign_fast {

constexpr int64_t kNone = -1;  // an absent buffer, constant or column

struct Buffer {
  int64_t channels, height, width;
  int64_t size() const { return channels * height * width; }  // elements of an image
};

struct Columns {
  int64_t start = kNone, stop = kNone;
  explicit operator bool() const { return start != kNone; }
};

struct ConvolutionOperation {
  std::vector<int64_t> inputs;
  int64_t output, weight, bias, padding;
  Resampling resampling;
  int64_t residual;
  bool residual_up;
  double residual_scale, scale;
};

struct FilterOperation {
  int64_t input, output, filter;
  bool up;
  int64_t padding, bias, residual;
  double scale;
};

struct NormOperation {
  std::vector<int64_t> inputs;
  int64_t output, groups;
  double eps;
  int64_t weight, bias, input_bias;
  Columns emb, scale, shift;
  bool silu;
};

struct JoinNormOperation {
  int64_t input, skip, sum, output;
  double skip_scale;
  int64_t join_bias, groups;
  double eps;
  int64_t weight, bias;
  bool silu;
};

struct AttentionOperation {
  int64_t input, output, heads;
};

using Operation =
    std::variant<ConvolutionOperation, FilterOperation, NormOperation, JoinNormOperation, AttentionOperation>;

std::vector<int64_t> inputs_of(const Operation& operation);
std::vector<int64_t> outputs_of(const Operation& operation);

struct ProgramData {
  std::vector<Operation> operations;
  std::vector<Buffer> buffers;
  std::vector<at::Tensor> constants;
  int64_t output, width;

  // for each operation, the buffers that nothing reads after it
  std::vector<std::vector<int64_t>> last_uses() const;
};

// The network F: images in, images out. Safe to call from several threads.
class Executor {
 public:
  virtual ~Executor() = default;
  // x (B, C, H, W) of any dtype; rows (B or 1, width) float32; coefficients c_skip, c_out, c_in (3,) float32
  // -> D = c_skip·x + c_out·F(c_in·x), (B, C, H, W) float32
  virtual at::Tensor denoise(const at::Tensor& x, const at::Tensor& rows, const at::Tensor& coefficients) = 0;
  // x (B, C, H, W) -> F (B, C', H, W) in the network's dtype
  virtual at::Tensor run(const at::Tensor& x, const at::Tensor& rows) = 0;
  virtual int64_t bytes() const = 0;  // of packed weights and of scratch memory that is kept
};

// CPU, float32; consume: each weight's tensor is emptied once it is packed, so that there are never two of all
std::unique_ptr<Executor> native_executor(const ProgramData& data, bool consume);
std::unique_ptr<Executor> aten_executor(ProgramData data, at::ScalarType dtype);

}  // namespace sign_fast
