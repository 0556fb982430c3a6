// torch.ops.sign_fast.convolution: one call of PackedConvolution, for tests and benchmarks.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "convolution.h"

namespace sign_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

void check(const Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 4 && t.scalar_type() == at::kFloat && t.is_cpu(), name, " must be (B, C, H, W) float32");
}

Tensor convolution(const Tensor& x, const OptionalTensor& x2, const Tensor& weight, const OptionalTensor& bias,
                   std::string_view resampling_name, const OptionalTensor& residual, bool residual_up, double scale,
                   std::string_view algorithm, double residual_scale) {
  check(x, "x"), check(weight, "weight");
  const Resampling resampling = resampling_of(resampling_name);
  const bool up = resampling == Resampling::Up, down = resampling == Resampling::Down;
  TORCH_CHECK(!down || (x.size(2) % 2 == 0 && x.size(3) % 2 == 0), "x must have even sides to be halved");
  ConvolutionShape shape{{x.size(1), x2 ? x2->size(1) : 0}, weight.size(0), weight.size(2),
                         up ? 2 * x.size(2) : down ? x.size(2) / 2 : x.size(2),
                         up ? 2 * x.size(3) : down ? x.size(3) / 2 : x.size(3), resampling};
  const Tensor first = x.contiguous(kLast), filter = weight.contiguous();
  Tensor second, offset, added;
  if (x2) {
    check(*x2, "x2");
    TORCH_CHECK(x2->size(0) == x.size(0) && x2->size(2) == x.size(2) && x2->size(3) == x.size(3), "x2 does not fit x");
    second = x2->contiguous(kLast);
  }
  TORCH_CHECK(weight.size(1) == shape.channels[0] + shape.channels[1] && weight.size(2) == weight.size(3),
              "weight does not fit x");
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.out_channels && bias->scalar_type() == at::kFloat,
                "bias does not fit weight");
    offset = bias->contiguous();
  }
  if (residual) {
    check(*residual, "residual");
    const int64_t times = residual_up ? 2 : 1;
    TORCH_CHECK(residual->size(0) == x.size(0) && residual->size(1) == shape.out_channels &&
                    residual->size(2) * times == shape.height && residual->size(3) * times == shape.width,
                "residual does not fit the output");
    added = residual->contiguous(kLast);
  }
  const PackedConvolution packed(filter.const_data_ptr<float>(), bias ? offset.const_data_ptr<float>() : nullptr, shape,
                                 algorithm_of(algorithm));
  Tensor y = at::empty({x.size(0), shape.out_channels, shape.height, shape.width}, x.options().memory_format(kLast));
  const AlignedFloats workspace(packed.workspace(x.size(0), at::get_num_threads()));
  packed.run({{first.const_data_ptr<float>(), x2 ? second.const_data_ptr<float>() : nullptr},
              x.size(0),
              residual ? added.const_data_ptr<float>() : nullptr,
              residual_up && residual,
              static_cast<float>(residual_scale),
              static_cast<float>(scale),
              y.data_ptr<float>()},
             workspace.data());
  return y;
}

}  // namespace
}  // namespace sign_fast

TORCH_LIBRARY_FRAGMENT(sign_fast, m) {
  m.def(
      "convolution(Tensor x, Tensor? x2, Tensor weight, Tensor? bias, str resampling, Tensor? residual, "
      "bool residual_up, float scale, str algorithm='', float residual_scale=1.0) -> Tensor");
}

TORCH_LIBRARY_IMPL(sign_fast, CPU, m) { m.impl("convolution", sign_fast::convolution); }
