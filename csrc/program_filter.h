// What a program needs seldom (NCSN++'s resampling filters, unusual paddings), by ATen operators on any device.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace sign_fast {

// y = (conv(x) + bias + residual·residual_scale)·scale into the memory of y
void padded_convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        int64_t padding, const std::optional<at::Tensor>& residual, double residual_scale, double scale,
                        const at::Tensor& y);

// y = (resample(x) + bias + residual)·scale into the memory of y: depthwise, stride 2, transposed where it goes up
void filter(const at::Tensor& x, const at::Tensor& kernel, bool up, int64_t padding,
            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, double scale,
            const at::Tensor& y);

// the parts of both: the first allocates its result, the second works in y's memory
at::Tensor resample(const at::Tensor& x, const at::Tensor& kernel, bool up, int64_t padding);
at::Tensor epilogue(at::Tensor y, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                    double residual_scale, double scale);

}  // namespace sign_fast
