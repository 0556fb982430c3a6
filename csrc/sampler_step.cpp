// The sampler step on the CPU: from tensors to the kernel's raw pointers, and registration with torch's dispatcher.
#include "sampler_step.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

namespace sign_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

SamplerDtype sampler_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return SamplerDtype::Float;
    case at::kBFloat16:
      return SamplerDtype::BFloat16;
    case at::kHalf:
      return SamplerDtype::Half;
    default:
      TORCH_CHECK(false, "images must be float32, bfloat16 or float16, not ", dtype);
  }
}

// (B) or (1) numbers
struct Row {
  Tensor held;
  const float* data = nullptr;
  int64_t stride = 0;

  Row(const OptionalTensor& t, int64_t batch, const char* name) {
    if (!t.has_value()) return;
    TORCH_CHECK(t->dim() == 1 && (t->size(0) == batch || t->size(0) == 1), name, " must be (B) or (1)");
    TORCH_CHECK(t->is_cpu(), name, " must be on the CPU");
    held = t->to(at::kFloat).contiguous();
    data = held.const_data_ptr<float>();
    stride = held.size(0) == 1 ? 0 : 1;
  }
};

Tensor checked_seeds(const Tensor& seeds, int64_t batch) {
  TORCH_CHECK(seeds.is_cpu() && seeds.scalar_type() == at::kLong && seeds.dim() == 1 && seeds.size(0) == batch,
              "seeds must be (B) int64 on the CPU");
  return seeds.contiguous();
}

void launch(const SamplerArgs& args) {
  static const auto kernel = choose_sampler_step();
  const int64_t elements = args.channels * args.pixels;
  if (args.batch == 0 || elements == 0) return;
  const int64_t items = sampler_items(args);
  // below so many elements a second thread does not pay: noise costs more than the rest
  const int64_t grain = std::max<int64_t>(1, (args.seeds ? 8192 : 65536) / std::min(kSamplerItem, elements));
  at::parallel_for(0, args.batch * items, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// What a step and the bytes at the end share; x and f are dense in one memory format afterwards.
struct Input {
  Tensor x, f;
  Row skip, out;

  Input(const Tensor& from, const OptionalTensor& network_output, const OptionalTensor& c_skip,
        const OptionalTensor& c_out)
      : x(from.contiguous(from.suggest_memory_format())),
        skip(c_skip, from.size(0), "c_skip"),
        out(c_out, from.size(0), "c_out") {
    if (!network_output.has_value()) return;
    TORCH_CHECK(network_output->sizes() == x.sizes() && network_output->is_cpu(), "network_output does not fit x");
    TORCH_CHECK(c_skip.has_value() && c_out.has_value(), "c_skip and c_out come with network_output");
    f = network_output->contiguous(x.suggest_memory_format());
  }

  SamplerArgs args() const {
    SamplerArgs a{};
    a.x = x.const_data_ptr();
    a.x_dtype = sampler_dtype(x.scalar_type());
    if (f.defined()) {
      a.network_output = f.const_data_ptr();
      a.network_dtype = sampler_dtype(f.scalar_type());
      a.c_skip = skip.data, a.c_skip_row = skip.stride;
      a.c_out = out.data, a.c_out_row = out.stride;
    }
    a.batch = x.size(0), a.channels = x.size(1), a.pixels = x.size(2) * x.size(3);
    a.channels_last = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    return a;
  }
};

Tensor philox_normal(const Tensor& seeds, int64_t step, at::IntArrayRef shape, double scale, at::ScalarType dtype,
                     bool channels_last) {
  TORCH_CHECK(shape.size() == 3, "shape must be (C, H, W)");
  const Tensor held = checked_seeds(seeds, seeds.size(0));
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  Tensor y = at::empty({seeds.size(0), shape[0], shape[1], shape[2]}, seeds.options().dtype(dtype), format);
  const float factor = static_cast<float>(scale);
  SamplerArgs args{};
  args.seeds = held.const_data_ptr<int64_t>();
  args.step = step;
  args.sigma = &factor;
  args.y = y.data_ptr();
  args.y_dtype = sampler_dtype(dtype);
  args.batch = y.size(0), args.channels = y.size(1), args.pixels = y.size(2) * y.size(3);
  args.channels_last = channels_last;
  launch(args);
  return y;
}

Tensor sampler_step(const Tensor& x, const OptionalTensor& network_output, const OptionalTensor& c_skip,
                    const OptionalTensor& c_out, const OptionalTensor& seeds, int64_t step, const OptionalTensor& scale,
                    const OptionalTensor& sigma) {
  TORCH_CHECK(x.dim() == 4, "x must be (B, C, H, W)");
  const Input input(x, network_output, c_skip, c_out);
  SamplerArgs args = input.args();
  const Row a(scale, args.batch, "scale"), s(sigma, args.batch, "sigma");
  Tensor held;
  if (seeds.has_value()) {
    TORCH_CHECK(scale.has_value() && sigma.has_value(), "scale and sigma come with seeds");
    held = checked_seeds(*seeds, args.batch);
    args.seeds = held.const_data_ptr<int64_t>();
    args.step = step;
    args.scale = a.data, args.scale_row = a.stride;
    args.sigma = s.data, args.sigma_row = s.stride;
  }
  Tensor y = at::empty(x.sizes(), x.options(), x.suggest_memory_format());
  args.y = y.data_ptr();
  args.y_dtype = args.x_dtype;
  launch(args);
  return y;
}

Tensor finish_images(const Tensor& x, const OptionalTensor& network_output, const OptionalTensor& c_skip,
                     const OptionalTensor& c_out) {
  TORCH_CHECK(x.dim() == 4, "x must be (B, C, H, W)");
  const Input input(x, network_output, c_skip, c_out);
  SamplerArgs args = input.args();
  Tensor y = at::empty({x.size(0), x.size(2), x.size(3), x.size(1)}, x.options().dtype(at::kByte));
  args.y = y.data_ptr();
  args.bytes = true;
  launch(args);
  return y;
}

}  // namespace
}  // namespace sign_fast

TORCH_LIBRARY_IMPL(sign_fast, CPU, m) {
  m.impl("philox_normal", sign_fast::philox_normal);
  m.impl("sampler_step", sign_fast::sampler_step);
  m.impl("finish_images", sign_fast::finish_images);
}
