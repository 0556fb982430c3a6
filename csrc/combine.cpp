// A sum of states on the CPU: from tensors to the kernel's raw pointers, and registration with torch's dispatcher.
#include "combine.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace sign_fast {

void run_combine(const CombineArgs& args, int64_t elements) {
  static const auto kernel = choose_combine();
  constexpr int64_t grain = 65536;  // below so many elements a second thread does not pay
  at::parallel_for(0, elements, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

namespace {

using at::Tensor;

StateDtype state_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return StateDtype::Double;
    case at::kFloat:
      return StateDtype::Float;
    case at::kBFloat16:
      return StateDtype::BFloat16;
    case at::kHalf:
      return StateDtype::Half;
    default:
      TORCH_CHECK(false, "states must be float64, float32, bfloat16 or float16, not ", dtype);
  }
}

Tensor combine(at::TensorList states, const Tensor& coefficients, at::ScalarType dtype) {
  const auto count = static_cast<int64_t>(states.size());
  TORCH_CHECK(1 <= count && count <= 8, "1 to 8 states are needed, not ", count);
  TORCH_CHECK(coefficients.is_cpu() && coefficients.scalar_type() == at::kDouble && coefficients.dim() == 1 &&
                  coefficients.size(0) == count,
              "coefficients must be (", count, ") float64 on the CPU");
  const Tensor& like = states[0];
  const auto format = like.suggest_memory_format();
  const Tensor weights = coefficients.contiguous();
  std::vector<Tensor> dense;
  std::vector<CombineTerm> terms;
  for (int64_t j = 0; j < count; ++j) {
    TORCH_CHECK(states[j].is_cpu() && states[j].dim() == 4 && states[j].sizes() == like.sizes(),
                "states must be (B, C, H, W) of one shape on the CPU");
    dense.push_back(states[j].contiguous(format));
    terms.push_back({dense[j].const_data_ptr(), state_dtype(dense[j].scalar_type()),
                     weights.const_data_ptr<double>()[j]});
  }
  Tensor y = at::empty(like.sizes(), like.options().dtype(dtype), format);
  run_combine({terms.data(), count, y.mutable_data_ptr(), state_dtype(dtype)}, y.numel());
  return y;
}

}  // namespace
}  // namespace sign_fast

TORCH_LIBRARY_IMPL(sign_fast, CPU, m) { m.impl("combine", sign_fast::combine); }
