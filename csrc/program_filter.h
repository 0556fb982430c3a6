// What a program needs seldom (NCSN++'s resampling filters, unusual paddings), by ATen operators on any device.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace sign_fast {

// y = (conv(x) + bias + residual)·scale into the memory of y
void padded_convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        int64_t padding, const std::optional<at::Tensor>& residual, double scale, const at::Tensor& y);

// y = (resample(x) + bias + residual)·scale: depthwise, stride 2, transposed where it goes up
void filter(const at::Tensor& x, const at::Tensor& kernel, bool up, int64_t padding,
            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, double scale,
            const at::Tensor& y);

// the same two, allocating their results
at::Tensor resample(const at::Tensor& x, const at::Tensor& kernel, bool up, int64_t padding);
at::Tensor add_residual(at::Tensor y, const std::optional<at::Tensor>& residual, double scale);

}  // namespace sign_fast
