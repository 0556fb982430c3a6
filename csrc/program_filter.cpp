#include "program_filter.h"

#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv_transpose2d.h>

namespace sign_fast {

using at::Tensor;

Tensor epilogue(Tensor y, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                double residual_scale, double scale) {
  if (bias) y.add_(bias->view({1, -1, 1, 1}));
  if (residual) y.add_(*residual, residual_scale);
  if (scale != 1) y.mul_(scale);
  return y;
}

Tensor resample(const Tensor& x, const Tensor& kernel, bool up, int64_t padding) {
  const int64_t channels = x.size(1), size = kernel.size(0);
  const Tensor weight = kernel.to(x.scalar_type()).expand({channels, 1, size, size});
  const std::array<int64_t, 2> two{2, 2}, pad{padding, padding};
  if (up) return at::conv_transpose2d(x, weight, {}, two, pad, 0, channels);
  return at::conv2d(x, weight, {}, two, pad, 1, channels);
}

void filter(const Tensor& x, const Tensor& kernel, bool up, int64_t padding, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& residual, double scale, const Tensor& y) {
  y.copy_(epilogue(resample(x, kernel, up, padding), bias, residual, 1, scale));
}

void padded_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t padding,
                        const std::optional<Tensor>& residual, double residual_scale, double scale, const Tensor& y) {
  const std::array<int64_t, 2> one{1, 1}, pad{padding, padding};
  y.copy_(epilogue(at::conv2d(x, weight, bias, one, pad), {}, residual, residual_scale, scale));
}

}  // namespace sign_fast
