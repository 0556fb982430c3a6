// A program by ATen operators and the library's own: on a GPU, and on the CPU in 16 bits.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/upsample_nearest2d.h>

#include <algorithm>
#include <array>

#include "operators.h"
#include "program.h"

namespace sign_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using NormSignature = Tensor(const Tensor&, const OptionalTensor&, int64_t, const OptionalTensor&,
                             const OptionalTensor&, double, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, bool);
using JoinSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, double, int64_t,
                                                 const OptionalTensor&, const OptionalTensor&, double, bool);
using AttentionSignature = Tensor(const Tensor&, int64_t, bool);
using StepSignature = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, c10::SymInt, const OptionalTensor&, const OptionalTensor&);

// (B, C, H, W) channels_last -> (B·H·W, C), a view
Tensor pixels(const Tensor& x) { return x.permute({0, 2, 3, 1}).reshape({-1, x.size(1)}); }

// depthwise, stride 2, transposed where it goes up
Tensor resample(const Tensor& x, const Tensor& taps, bool up, int64_t padding) {
  const int64_t channels = x.size(1), size = taps.size(0);
  const Tensor weight = taps.expand({channels, 1, size, size});
  const std::array<int64_t, 2> two{2, 2}, pad{padding, padding};
  if (up) return at::conv_transpose2d(x, weight, {}, two, pad, 0, channels);
  return at::conv2d(x, weight, {}, two, pad, 1, channels);
}

// (y + bias + residual·residual_scale)·scale in y's memory
Tensor epilogue(Tensor y, const OptionalTensor& bias, const OptionalTensor& residual, double residual_scale,
                double scale) {
  if (bias) y.add_(bias->view({1, -1, 1, 1}));
  if (residual) y.add_(*residual, residual_scale);
  if (scale != 1) y.mul_(scale);
  return y;
}

class AtenExecutor final : public Executor {
 public:
  AtenExecutor(ProgramData data, at::ScalarType dtype)
      : data_(std::move(data)), uses_(data_.last_uses()), dtype_(dtype) {
    folded_.resize(data_.operations.size());
    for (size_t i = 0; i < data_.operations.size(); ++i)
      if (const auto* o = std::get_if<ConvolutionOperation>(&data_.operations[i])) folded_[i] = fold(*o);
  }

  Tensor run(const Tensor& x, const Tensor& rows) override {
    const at::NoGradGuard guard;
    std::vector<Tensor> buffers(data_.buffers.size());
    buffers[0] = x.to(dtype_).contiguous(at::MemoryFormat::ChannelsLast);
    for (size_t i = 0; i < data_.operations.size(); ++i) {
      std::visit([&](const auto& o) { apply(i, o, buffers, rows); }, data_.operations[i]);
      for (int64_t b : uses_[i]) buffers[b].reset();
    }
    return buffers[data_.output];
  }

  Tensor denoise(const Tensor& x, const Tensor& rows, const Tensor& coefficients) override {
    static const auto op = find_operator<StepSignature>("sign_fast::sampler_step");
    const at::NoGradGuard guard;
    const Tensor state = x.to(at::kFloat);
    const auto coefficient = [&](int64_t i) { return coefficients.narrow(0, i, 1); };
    const Tensor f = run(state.mul(coefficient(2)), rows);
    return op.call(state, f, coefficient(0), coefficient(1), {}, 0, {}, {});
  }

  int64_t bytes() const override { return 0; }  // the constants are the program's

 private:
  // A convolution's constants as its operator takes them
  struct Folded {
    Tensor weight, second;  // (C_out, C_in, k, k), or (C_in, C_out) of each input where k is 1
    OptionalTensor early, late;  // bias: for the operator, or where that has another dtype added to its result
  };

  ProgramData data_;
  std::vector<std::vector<int64_t>> uses_;
  at::ScalarType dtype_;
  std::vector<Folded> folded_;

  OptionalTensor constant(int64_t index) const {
    return index == kNone ? std::nullopt : OptionalTensor(data_.constants[index]);
  }

  OptionalTensor buffer(const std::vector<Tensor>& buffers, int64_t index) const {
    return index == kNone ? std::nullopt : OptionalTensor(buffers[index]);
  }

  Folded fold(const ConvolutionOperation& o) const {
    Folded f;
    f.weight = data_.constants[o.weight];
    const OptionalTensor bias = constant(o.bias);
    (bias && bias->scalar_type() == f.weight.scalar_type() ? f.early : f.late) = bias;
    if (f.weight.size(2) != 1 || o.padding != 0) return f;
    const Tensor matrix = f.weight.flatten(1);
    const int64_t first = data_.buffers[o.inputs[0]].channels;
    f.weight = matrix.narrow(1, 0, first).t();
    if (o.inputs.size() == 2) f.second = matrix.narrow(1, first, matrix.size(1) - first).t();
    return f;
  }

  void apply(size_t i, const ConvolutionOperation& o, std::vector<Tensor>& buffers, const Tensor&) const {
    const Folded& f = folded_[i];
    const Buffer& out = data_.buffers[o.output];
    std::vector<Tensor> inputs;
    for (int64_t b : o.inputs) inputs.push_back(resampled(buffers[b], o.resampling, out));
    OptionalTensor residual = buffer(buffers, o.residual);
    Tensor y;
    if (f.weight.dim() == 2) {
      // nobody reads the residual later: its memory may be taken
      const bool takes = residual && !o.residual_up && !f.early && ends(i, o.residual);
      if (takes) {
        y = pixels(*residual).addmm_(pixels(inputs[0]), f.weight, o.residual_scale);
        residual.reset();
      } else {
        y = f.early ? at::addmm(*f.early, pixels(inputs[0]), f.weight) : at::mm(pixels(inputs[0]), f.weight);
      }
      if (inputs.size() == 2) y.addmm_(pixels(inputs[1]), f.second);
      y = y.view({inputs[0].size(0), out.height, out.width, out.channels}).permute({0, 3, 1, 2});
    } else {
      const Tensor x = inputs.size() == 2 ? at::cat(inputs, 1) : inputs[0];
      const std::array<int64_t, 2> one{1, 1}, pad{o.padding, o.padding};
      y = at::conv2d(x, f.weight, f.early, one, pad);
    }
    if (residual && o.residual_up) {
      // each pixel of the residual beside the 2×2 that it is added to
      const Tensor squares = y.view({y.size(0), out.channels, out.height / 2, 2, out.width / 2, 2});
      squares.add_(residual->unsqueeze(3).unsqueeze(5), o.residual_scale);
      residual.reset();
    }
    buffers[o.output] = epilogue(y, f.late, residual, o.residual_scale, o.scale);
  }

  // Whether operation i is the last to read a buffer, and reads it as its residual only; buffer 0 can be the caller's
  bool ends(size_t i, int64_t buffer) const {
    const auto& inputs = std::get<ConvolutionOperation>(data_.operations[i]).inputs;
    return buffer != 0 && std::find(uses_[i].begin(), uses_[i].end(), buffer) != uses_[i].end() &&
           std::find(inputs.begin(), inputs.end(), buffer) == inputs.end();
  }

  static Tensor resampled(const Tensor& x, Resampling resampling, const Buffer& out) {
    if (resampling == Resampling::Up) {
      const std::array<int64_t, 2> size{out.height, out.width};
      return at::upsample_nearest2d(x, size);
    }
    const std::array<int64_t, 2> two{2, 2};
    return resampling == Resampling::Down ? at::avg_pool2d(x, two) : x;
  }

  void apply(size_t, const FilterOperation& o, std::vector<Tensor>& buffers, const Tensor&) const {
    const Tensor y = resample(buffers[o.input], *constant(o.filter), o.up, o.padding);
    buffers[o.output] = epilogue(y, constant(o.bias), buffer(buffers, o.residual), 1, o.scale)
                            .contiguous(at::MemoryFormat::ChannelsLast);
  }

  void apply(size_t, const NormOperation& o, std::vector<Tensor>& buffers, const Tensor& rows) const {
    static const auto op = find_operator<NormSignature>("sign_fast::group_norm_silu");
    const auto column = [&](const Columns& c) {
      return c ? OptionalTensor(rows.narrow(1, c.start, c.stop - c.start)) : std::nullopt;
    };
    const OptionalTensor second = buffer(buffers, o.inputs.size() == 2 ? o.inputs[1] : kNone);
    buffers[o.output] =
        op.call(buffers[o.inputs[0]], second, o.groups, constant(o.weight), constant(o.bias), o.eps, column(o.emb),
                constant(o.input_bias), column(o.scale), column(o.shift), o.silu);
  }

  void apply(size_t, const JoinNormOperation& o, std::vector<Tensor>& buffers, const Tensor&) const {
    static const auto op = find_operator<JoinSignature>("sign_fast::residual_group_norm_silu");
    std::tie(buffers[o.sum], buffers[o.output]) =
        op.call(buffers[o.input], buffers[o.skip], constant(o.join_bias), o.skip_scale, o.groups, constant(o.weight),
                constant(o.bias), o.eps, o.silu);
  }

  void apply(size_t, const AttentionOperation& o, std::vector<Tensor>& buffers, const Tensor&) const {
    const Tensor& qkv = buffers[o.input];
    if (qkv.is_cuda()) {
      static const auto op = find_operator<AttentionSignature>("sign_fast::projected_attention");
      buffers[o.output] = op.call(qkv, o.heads, false);
      return;
    }
    const Buffer& out = data_.buffers[o.output];
    const int64_t batch = qkv.size(0), tokens = out.height * out.width;
    const Tensor rows = qkv.permute({0, 2, 3, 1}).reshape({batch, tokens, 3, o.heads, out.channels / o.heads});
    const auto part = [&](int64_t which) { return rows.select(2, which).transpose(1, 2); };
    const Tensor y = at::scaled_dot_product_attention(part(0), part(1), part(2));  // (B, heads, T, d)
    buffers[o.output] =
        y.transpose(1, 2).reshape({batch, out.height, out.width, out.channels}).permute({0, 3, 1, 2});
  }
};

}  // namespace

std::unique_ptr<Executor> aten_executor(ProgramData data, at::ScalarType dtype) {
  return std::make_unique<AtenExecutor>(std::move(data), dtype);
}

}  // namespace sign_fast
