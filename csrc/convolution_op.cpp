// The convolution operators: torch.ops.sign_fast.convolution, one call of PackedConvolution, for tests and benchmarks;
// and those of training, which kernels/convolution defines.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "convolution.h"
#include "launch.h"

namespace sign_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

void check(const Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 4 && t.scalar_type() == at::kFloat && t.is_cpu(), name, " must be (B, C, H, W) float32");
}

Filter filter_of(const Tensor& weight) {
  return {weight.const_data_ptr<float>(), {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
}

// Of few pixels the rounding of F(4×4) is too large: their result has few values, of which none is large.
const char* algorithm_for(const Tensor& x, int64_t channels, const Tensor& weight, Resampling resampling) {
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  return weight.size(2) == 3 && channels >= 8 && resampling != Resampling::Up && pixels < 256 ? "winograd2" : "";
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
  const Tensor first = x.contiguous(kLast);
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
  const PackedConvolution packed(filter_of(weight), bias ? offset.const_data_ptr<float>() : nullptr, shape,
                                 algorithm_of(algorithm));
  Tensor y = at::empty({x.size(0), shape.out_channels, shape.height, shape.width}, x.options().memory_format(kLast));
  const auto workspace = AlignedFloats::uninitialized(packed.workspace(x.size(0), at::get_num_threads()));
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

Tensor convolution_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           std::string_view resampling) {
  check(x, "x"), check(weight, "weight");
  return convolution(x, std::nullopt, weight, bias, resampling, std::nullopt, false, 1.0,
                     algorithm_for(x, x.size(1), weight, resampling_of(resampling)), 1.0);
}

// x (B, C, H, W) -> twice as high and wide, nearest, or the mean of 2×2
Tensor resample(const Tensor& x, bool up) {
  static const auto copy = choose_convolution_copy();
  const int64_t height = up ? 2 * x.size(2) : x.size(2) / 2, width = up ? 2 * x.size(3) : x.size(3) / 2;
  Tensor y = at::empty({x.size(0), x.size(1), height, width}, x.options().memory_format(kLast));
  const CopyTask task{
      {x.const_data_ptr<float>(), nullptr}, {x.size(1), 0}, x.size(0), height, width, 0, up, !up, y.data_ptr<float>()};
  launch(task.items(), y.numel(), 2 * kCopyGrain, kCopyGrain,
         [&](int64_t begin, int64_t end, int) { copy(task, begin, end); });
  return y;
}

// Convolution with the flipped filters, input and output channels exchanged, and the adjoint of the resampling: the
// sum of 2×2 is four times their mean, and a 1×1 convolution takes it first.
Tensor convolution_input_gradient(const Tensor& dy, const Tensor& weight, std::string_view resampling_name) {
  check(dy, "dy"), check(weight, "weight");
  const Resampling resampling = resampling_of(resampling_name);
  const bool up = resampling == Resampling::Up, down = resampling == Resampling::Down, one = weight.size(2) == 1;
  TORCH_CHECK(dy.size(1) == weight.size(0) && weight.size(2) == weight.size(3), "weight does not fit dy");
  TORCH_CHECK(!up || (dy.size(2) % 2 == 0 && dy.size(3) % 2 == 0), "an upsampled image has even sides");
  const int64_t last = weight.size(2) - 1;
  const Tensor input = dy.contiguous(kLast);
  const Filter flipped{weight.const_data_ptr<float>() + last * (weight.stride(2) + weight.stride(3)),
                       {weight.stride(1), weight.stride(0), -weight.stride(2), -weight.stride(3)}};
  const auto side = [&](int64_t size) { return one && up ? size / 2 : one && down ? 2 * size : size; };
  const ConvolutionShape shape{
      {dy.size(1), 0},   weight.size(1),
      weight.size(2),    side(dy.size(2)),
      side(dy.size(3)),  !one ? Resampling::None : up ? Resampling::Down : down ? Resampling::Up : Resampling::None};
  const char* algorithm = algorithm_for(dy, dy.size(1), weight, shape.resampling);
  const PackedConvolution packed(flipped, nullptr, shape, algorithm_of(algorithm));
  Tensor y = at::empty({dy.size(0), shape.out_channels, shape.height, shape.width}, dy.options().memory_format(kLast));
  const auto workspace = AlignedFloats::uninitialized(packed.workspace(dy.size(0), at::get_num_threads()));
  ConvolutionArgs args{};
  args.x[0] = input.const_data_ptr<float>(), args.batch = dy.size(0);
  args.scale = up ? 4.f : down ? 0.25f : 1.f;
  args.y = y.data_ptr<float>();
  packed.run(args, workspace.data());
  return one || resampling == Resampling::None ? y : resample(y, down);
}

std::tuple<Tensor, Tensor> convolution_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                       std::string_view resampling_name, bool bias) {
  check(dy, "dy"), check(x, "x"), check(weight, "weight");
  const Resampling resampling = resampling_of(resampling_name);
  const bool up = resampling == Resampling::Up, down = resampling == Resampling::Down;
  const Tensor first = x.contiguous(kLast), gradient = dy.contiguous(kLast);
  TORCH_CHECK(x.size(1) == weight.size(1) && dy.size(1) == weight.size(0), "weight does not fit x and dy");
  TORCH_CHECK(weight.size(2) == weight.size(3) && (weight.size(2) == 1 || weight.size(2) == 3),
              "weight must be 1×1 or 3×3");
  for (int64_t side = 2; side < 4; ++side) {
    TORCH_CHECK(!down || x.size(side) % 2 == 0, "x must have even sides to be halved");
    TORCH_CHECK(dy.size(side) == (up ? 2 * x.size(side) : down ? x.size(side) / 2 : x.size(side)), "dy does not fit x");
  }
  TORCH_CHECK(dy.size(0) == x.size(0), "dy does not fit x");
  Tensor dweight = at::empty_like(weight), dbias = at::empty({bias ? weight.size(0) : 0}, weight.options());
  if (dy.numel() == 0) return {dweight.zero_(), dbias.zero_()};
  const ConvolutionShape shape{
      {x.size(1), 0}, weight.size(0), weight.size(2), dy.size(2), dy.size(3), resampling};
  weight_gradient(shape, {first.const_data_ptr<float>(),
                          gradient.const_data_ptr<float>(),
                          x.size(0),
                          dweight.data_ptr<float>(),
                          {dweight.stride(0), dweight.stride(1), dweight.stride(2), dweight.stride(3)},
                          bias ? dbias.data_ptr<float>() : nullptr});
  return {dweight, dbias};
}

}  // namespace
}  // namespace sign_fast

TORCH_LIBRARY_FRAGMENT(sign_fast, m) {
  m.def(
      "convolution(Tensor x, Tensor? x2, Tensor weight, Tensor? bias, str resampling, Tensor? residual, "
      "bool residual_up, float scale, str algorithm='', float residual_scale=1.0) -> Tensor");
}

TORCH_LIBRARY_IMPL(sign_fast, CPU, m) { 
  m.impl("convolution", sign_fast::convolution);
  m.impl("convolution_forward", sign_fast::convolution_forward);
  m.impl("convolution_input_gradient", sign_fast::convolution_input_gradient);
  m.impl("convolution_weight_gradient", sign_fast::convolution_weight_gradient);
}
