// GroupNorm–SiLU on the CPU: from tensors to the kernel's raw pointers, and registration with torch's dispatcher.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "group_norm_silu_backward.h"

namespace sign_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::Float;
    case at::kBFloat16:
      return Dtype::BFloat16;
    case at::kHalf:
      return Dtype::Half;
    default:
      TORCH_CHECK(false, "x must be float32, bfloat16 or float16, not ", x.scalar_type());
  }
}

template <typename T>
void widen(const Tensor& t, std::vector<float>& out) {
  const T* from = t.const_data_ptr<T>();
  for (int64_t i = 0; i < t.numel(); ++i) out[i] = static_cast<float>(from[i]);
}

// (C) parameters and (B, C) or (1, C) rows as float32. They are small: a loop costs less than a call of Tensor::to.
struct Row {
  Tensor held;
  std::vector<float> widened;
  const float* data = nullptr;
  int64_t stride = 0;

  Row(const OptionalTensor& t, const NormInput& a, int64_t dim, const char* name) {
    if (!t.has_value()) return;
    TORCH_CHECK(t->dim() == dim && t->size(-1) == a.channels, name, " does not fit x");
    TORCH_CHECK(dim == 1 || t->size(0) == a.batch || t->size(0) == 1, name, " does not fit x");
    TORCH_CHECK(t->is_cpu(), name, " must be on the CPU");
    stride = dim == 2 && t->size(0) != 1 ? t->size(1) : 0;
    const auto dtype = t->scalar_type();
    if (dtype == at::kFloat) {
      held = t->contiguous();
    } else if (dtype == at::kBFloat16 || dtype == at::kHalf) {
      const Tensor flat = t->contiguous();
      widened.resize(flat.numel());
      dtype == at::kHalf ? widen<at::Half>(flat, widened) : widen<at::BFloat16>(flat, widened);
      data = widened.data();
      return;
    } else {
      held = t->to(at::kFloat).contiguous();
    }
    data = held.const_data_ptr<float>();
  }
};

template <typename Args, typename Kernel>
void launch(const Args& args, const NormPlan& plan, Kernel kernel) {
  const int64_t grain = std::max<int64_t>(1, kGrain / plan.elements_per_item);
  at::parallel_for(0, plan.items, grain, [&](int64_t begin, int64_t end) {
    const auto work = std::make_unique_for_overwrite<double[]>(plan.work);
    kernel(args, plan, begin, end, work.get());
  });
}

// x, and x2 where there is one, dense and in one layout: what the kernels read.
struct Inputs {
  at::MemoryFormat format;
  Tensor x, x2;

  Inputs(const Tensor& first, const OptionalTensor& second)
      : format(first.suggest_memory_format()), x(first.contiguous(format)) {
    TORCH_CHECK(x.dim() == 4, "x must be (B, C, H, W)");
    if (!second.has_value()) return;
    TORCH_CHECK(second->dim() == 4 && second->size(0) == x.size(0) && second->size(2) == x.size(2) &&
                    second->size(3) == x.size(3) && second->scalar_type() == x.scalar_type() && second->is_cpu(),
                "x2 does not fit x");
    x2 = second->contiguous(format);
  }

  void describe(NormInput& a, int64_t groups, bool silu) const {
    a.x = x.const_data_ptr();
    a.x2 = x2.defined() ? x2.const_data_ptr() : nullptr;
    a.batch = x.size(0);
    a.first_channels = x.size(1);
    a.channels = a.first_channels + (x2.defined() ? x2.size(1) : 0);
    a.pixels = x.size(2) * x.size(3);
    TORCH_CHECK(groups > 0 && a.channels % groups == 0, a.channels, " channels do not divide into ", groups, " groups");
    a.groups = groups;
    a.silu = silu;
    // one pixel: the two layouts are the same memory, and channels_last has whole vectors
    a.channels_last = a.pixels == 1 || format == at::MemoryFormat::ChannelsLast;
    a.dtype = dtype_of(x);
  }

  bool same_layout(const Tensor& t) const {
    return t.dim() == 4 && t.size(0) == x.size(0) && t.size(2) == x.size(2) && t.size(3) == x.size(3) &&
           t.size(1) == x.size(1) + (x2.defined() ? x2.size(1) : 0) && t.scalar_type() == x.scalar_type() && t.is_cpu();
  }

  Tensor output(int64_t channels) const {
    return at::empty({x.size(0), channels, x.size(2), x.size(3)}, x.options().memory_format(format));
  }
};

// (C) and (B, C) parameters, held while the kernel runs
struct Parameters {
  Row weight, bias, input_bias, emb, scale, shift;

  Parameters(NormInput& a, const OptionalTensor& w, const OptionalTensor& o, const OptionalTensor& i,
             const OptionalTensor& e, const OptionalTensor& m, const OptionalTensor& s)
      : weight(w, a, 1, "weight"), bias(o, a, 1, "bias"), input_bias(i, a, 1, "input_bias"), emb(e, a, 2, "emb"),
        scale(m, a, 2, "scale"), shift(s, a, 2, "shift") {
    a.weight = weight.data, a.bias = bias.data, a.input_bias = input_bias.data;
    a.emb = emb.data, a.scale = scale.data, a.shift = shift.data;
    a.emb_row = emb.stride, a.scale_row = scale.stride, a.shift_row = shift.stride;
  }
};

Tensor new_statistics(const NormInput& a, const Tensor& x) {
  return at::empty({a.batch, a.groups, 3}, x.options().dtype(at::kFloat));
}

void forward(const GroupNormArgs& args) {
  static const auto kernel = choose_group_norm_silu();
  if (args.batch > 0 && args.pixels > 0) launch(args, make_plan(args), kernel);
}

template <bool STATISTICS>
std::tuple<Tensor, Tensor> norm(const Tensor& first, const OptionalTensor& second, int64_t groups,
                                const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                const OptionalTensor& emb, const OptionalTensor& input_bias, const OptionalTensor& scale,
                                const OptionalTensor& shift, bool silu) {
  const Inputs inputs(first, second);
  GroupNormArgs args{};
  inputs.describe(args, groups, silu);
  const Parameters parameters(args, weight, bias, input_bias, emb, scale, shift);
  args.eps = eps;
  Tensor y = inputs.output(args.channels), stats;
  args.y = y.data_ptr();
  if (STATISTICS) stats = new_statistics(args, y), args.stats = stats.data_ptr<float>();
  forward(args);
  return {y, stats};
}

Tensor group_norm_silu(const Tensor& x, const OptionalTensor& x2, int64_t groups, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, const OptionalTensor& emb,
                       const OptionalTensor& input_bias, const OptionalTensor& scale, const OptionalTensor& shift,
                       bool silu) {
  return std::get<0>(norm<false>(x, x2, groups, weight, bias, eps, emb, input_bias, scale, shift, silu));
}

template <bool STATISTICS>
std::tuple<Tensor, Tensor, Tensor> residual(const Tensor& h, const Tensor& skip_in, const OptionalTensor& bias,
                                            double skip_scale, int64_t groups, const OptionalTensor& weight,
                                            const OptionalTensor& norm_bias, double eps, bool silu) {
  const Inputs inputs(h, std::nullopt);
  TORCH_CHECK(inputs.same_layout(skip_in), "h and skip must have one shape and dtype");
  const Tensor skip = skip_in.contiguous(inputs.format);
  GroupNormArgs args{};
  inputs.describe(args, groups, silu);
  const Parameters parameters(args, weight, norm_bias, {}, {}, {}, {});
  const Row join(bias, args, 1, "bias");
  args.skip = skip.const_data_ptr();
  args.join_bias = join.data;
  args.skip_scale = static_cast<float>(skip_scale);
  args.eps = eps;
  Tensor r = inputs.output(args.channels), y = inputs.output(args.channels), stats;
  args.r = r.data_ptr(), args.y = y.data_ptr();
  if (STATISTICS) stats = new_statistics(args, y), args.stats = stats.data_ptr<float>();
  forward(args);
  return {r, y, stats};
}

std::tuple<Tensor, Tensor> residual_group_norm_silu(const Tensor& h, const Tensor& skip, const OptionalTensor& bias,
                                                    double skip_scale, int64_t groups, const OptionalTensor& weight,
                                                    const OptionalTensor& norm_bias, double eps, bool silu) {
  auto [r, y, stats] = residual<false>(h, skip, bias, skip_scale, groups, weight, norm_bias, eps, silu);
  return {r, y};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& dy_in, const Tensor& first, const OptionalTensor& second, const Tensor& stats_in, int64_t groups,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& emb,
    const OptionalTensor& input_bias, const OptionalTensor& scale, const OptionalTensor& shift, bool silu,
    const OptionalTensor& stream_in, double skip_scale, bool input_sum) {
  static const auto kernel = choose_group_norm_silu_backward();
  const Inputs inputs(first, second);
  TORCH_CHECK(inputs.same_layout(dy_in), "dy does not fit x");
  TORCH_CHECK(!stream_in.has_value() || inputs.same_layout(*stream_in), "stream does not fit x");
  GroupNormBackwardArgs args{};
  inputs.describe(args, groups, silu);
  const Parameters parameters(args, weight, bias, input_bias, emb, scale, shift);
  TORCH_CHECK(stats_in.scalar_type() == at::kFloat && stats_in.is_cpu() && stats_in.numel() == 3 * args.batch * groups,
              "stats must be (B, groups, 3) float32");
  const Tensor dy = dy_in.contiguous(inputs.format), stats = stats_in.contiguous();
  const Tensor stream = stream_in.has_value() ? stream_in->contiguous(inputs.format) : Tensor();
  Tensor dx = inputs.output(args.first_channels);
  Tensor dx2 = inputs.x2.defined() ? inputs.output(inputs.x2.size(1)) : at::empty({0}, dx.options());
  Tensor sums = at::empty({3, args.batch, args.channels}, stats.options());
  args.dy = dy.const_data_ptr();
  args.stream = stream.defined() ? stream.const_data_ptr() : nullptr;
  args.stats = stats.const_data_ptr<float>();
  args.skip_scale = static_cast<float>(skip_scale);
  args.input_sum = input_sum;
  args.dx = dx.data_ptr(), args.dx2 = dx2.data_ptr();
  args.sums = sums.data_ptr<float>();
  if (dy.numel() > 0) {
    launch(args, make_backward_plan(args), kernel);
  } else {
    sums.zero_();
  }
  return {dx, dx2, sums};
}

}  // namespace
}  // namespace sign_fast

TORCH_LIBRARY_IMPL(sign_fast, CPU, m) {
  m.impl("group_norm_silu", sign_fast::group_norm_silu);
  m.impl("group_norm_silu_forward", sign_fast::norm<true>);
  m.impl("group_norm_silu_backward", sign_fast::group_norm_silu_backward);
  m.impl("residual_group_norm_silu", sign_fast::residual_group_norm_silu);
  m.impl("residual_group_norm_silu_forward", sign_fast::residual<true>);
}
