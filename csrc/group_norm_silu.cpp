// GroupNorm–SiLU on the CPU: from tensors to the kernel's raw pointers, and registration with torch's dispatcher.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "group_norm_silu.h"

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

  Row(const OptionalTensor& t, const Tensor& x, int64_t dim, const char* name) {
    if (!t.has_value()) return;
    TORCH_CHECK(t->dim() == dim && t->size(-1) == x.size(1), name, " does not fit x");
    TORCH_CHECK(dim == 1 || t->size(0) == x.size(0) || t->size(0) == 1, name, " does not fit x");
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

void launch(GroupNormArgs& args) {
  static const auto kernel = choose_group_norm_silu();
  if (args.batch == 0 || args.pixels == 0) return;
  const Plan plan = make_plan(args);
  const int64_t grain = std::max<int64_t>(1, kGrain / plan.elements_per_item);
  at::parallel_for(0, plan.items, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> work(plan.work);
    kernel(args, plan, begin, end, work.data());
  });
}

Tensor dense(const Tensor& x) { return x.contiguous(x.suggest_memory_format()); }

GroupNormArgs base_args(const Tensor& x, int64_t groups, double eps, bool silu) {
  TORCH_CHECK(x.dim() == 4, "x must be (B, C, H, W)");
  TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, x.size(1), " channels do not divide into ", groups, " groups");
  GroupNormArgs args{};
  args.x = x.const_data_ptr();
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.pixels = x.size(2) * x.size(3);
  args.groups = groups;
  args.eps = eps;
  args.silu = silu;
  args.skip_scale = 1;
  // one pixel: the two layouts are the same memory, and channels_last has whole vectors
  args.channels_last = args.pixels == 1 || x.is_contiguous(at::MemoryFormat::ChannelsLast);
  args.dtype = dtype_of(x);
  return args;
}

Tensor group_norm_silu(const Tensor& input, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias,
                       double eps, const OptionalTensor& emb, const OptionalTensor& scale, const OptionalTensor& shift,
                       bool silu) {
  const Tensor x = dense(input);
  GroupNormArgs args = base_args(x, groups, eps, silu);
  const Row w(weight, x, 1, "weight"), o(bias, x, 1, "bias");
  const Row e(emb, x, 2, "emb"), a(scale, x, 2, "scale"), b(shift, x, 2, "shift");
  args.weight = w.data, args.bias = o.data;
  args.emb = e.data, args.scale = a.data, args.shift = b.data;
  args.emb_row = e.stride, args.scale_row = a.stride, args.shift_row = b.stride;
  Tensor y = at::empty_like(x);
  args.y = y.data_ptr();
  launch(args);
  return y;
}

std::tuple<Tensor, Tensor> residual_group_norm_silu(const Tensor& h_in, const Tensor& skip_in, const OptionalTensor& bias,
                                                    double skip_scale, int64_t groups, const OptionalTensor& weight,
                                                    const OptionalTensor& norm_bias, double eps, bool silu) {
  TORCH_CHECK(h_in.sizes() == skip_in.sizes() && h_in.scalar_type() == skip_in.scalar_type(),
              "h and skip must have one shape and dtype");
  const Tensor h = dense(h_in), skip = skip_in.contiguous(h.suggest_memory_format());
  GroupNormArgs args = base_args(h, groups, eps, silu);
  const Row j(bias, h, 1, "bias"), w(weight, h, 1, "weight"), o(norm_bias, h, 1, "norm_bias");
  args.skip = skip.const_data_ptr();
  args.join_bias = j.data, args.weight = w.data, args.bias = o.data;
  args.skip_scale = static_cast<float>(skip_scale);
  Tensor r = at::empty_like(h), y = at::empty_like(h);
  args.r = r.data_ptr(), args.y = y.data_ptr();
  launch(args);
  return {r, y};
}

}  // namespace
}  // namespace sign_fast

TORCH_LIBRARY_IMPL(sign_fast, CPU, m) {
  m.impl("group_norm_silu", sign_fast::group_norm_silu);
  m.impl("residual_group_norm_silu", sign_fast::residual_group_norm_silu);
}
