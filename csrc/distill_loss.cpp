// The distillation losses on the CPU: from tensors to the kernels' raw pointers, and registration with torch's dispatcher.
#include "distill_loss.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>

namespace sign_fast {

void finish_losses(const LossArgs& a, int64_t sample, const double* sums) {
  double absolute = 0, student = 0, error = 0, bad = 0;
  for (int64_t span = 0; span < loss_spans(a); ++span, sums += 4) {
    absolute += sums[0], student += sums[1], error += sums[2], bad += sums[3];
  }
  const double keep = bad == 0 ? 1 : 0;
  double factor = 0;
  if (a.student != Student::None) {
    // one rounding to float32: gradients and losses then use the same factor
    factor = a.student_weight ? a.student_weight[sample]
                              : static_cast<float>(1 / std::max(absolute / static_cast<double>(a.size), 1e-5));
  }
  double loss = 0;
  if (a.student == Student::Sid) loss = student * factor;
  if (a.student == Student::Matching) loss = 0.5 * student * factor * factor;
  a.student_loss[sample] = keep ? static_cast<float>(loss) : 0.f;
  a.fake_loss[sample] = keep && a.fake_weight ? static_cast<float>(error * a.fake_weight[sample]) : 0.f;
  a.factors[sample] = keep ? static_cast<float>(factor) : 0.f;
  a.factors[a.batch + sample] = static_cast<float>(keep);
}

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 32768;  // elements below which a second thread does not pay

LossDtype loss_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return LossDtype::Float;
    case at::kBFloat16:
      return LossDtype::BFloat16;
    case at::kHalf:
      return LossDtype::Half;
    default:
      TORCH_CHECK(false, "images must be float32, bfloat16 or float16, not ", dtype);
  }
}

Student student_of(std::string_view mode) {
  if (mode == "sid") return Student::Sid;
  if (mode == "matching") return Student::Matching;
  TORCH_CHECK(mode == "fake", "mode must be sid, matching or fake, not ", std::string(mode));
  return Student::None;
}

// (B) numbers as float32
struct Vector {
  Tensor held;
  const float* data = nullptr;

  Vector(const OptionalTensor& t, int64_t batch, const char* name) {
    if (!t.has_value()) return;
    TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == batch, name, " must be (B) on the CPU");
    held = t->to(at::kFloat).contiguous();
    data = held.const_data_ptr<float>();
  }
};

// The three inputs, dense and alike, and their arguments.
struct Input {
  Tensor x, real, fake;

  Input(const Tensor& images, const Tensor& y_real, const Tensor& y_fake) : x(images), real(y_real), fake(y_fake) {
    TORCH_CHECK(x.dim() >= 1 && x.is_non_overlapping_and_dense() && (x.size(0) <= 1 || x.stride(0) == x.numel() / x.size(0)),
                "images must be dense, sample by sample");
    for (const Tensor* t : {&y_real, &y_fake}) {
      TORCH_CHECK(t->sizes() == x.sizes() && t->is_cpu() && t->scalar_type() == x.scalar_type(),
                  "images, y_real and y_fake must agree in shape, dtype and device");
    }
    // an element must lie at one place in all: where they differ, in the images' format
    for (Tensor* t : {&real, &fake}) {
      if (t->strides() != x.strides()) *t = at::empty_like(x).copy_(*t);
    }
  }

  LossArgs args(std::string_view mode, double alpha) const {
    LossArgs a{};
    a.images = x.const_data_ptr();
    a.y_real = real.const_data_ptr();
    a.y_fake = fake.const_data_ptr();
    a.dtype = loss_dtype(x.scalar_type());
    a.student = student_of(mode);
    a.batch = x.size(0);
    a.size = a.batch ? x.numel() / a.batch : 0;
    a.alpha = static_cast<float>(alpha);
    a.student_scale = a.fake_scale = 1;
    return a;
  }
};

struct Results {
  Tensor student, fake, factors;

  explicit Results(const Tensor& images) {
    const auto options = images.options().dtype(at::kFloat);
    student = at::zeros({images.size(0)}, options);
    fake = at::zeros({images.size(0)}, options);
    factors = at::zeros({2, images.size(0)}, options);
  }

  void into(LossArgs& a) const {
    a.student_loss = student.data_ptr<float>();
    a.fake_loss = fake.data_ptr<float>();
    a.factors = factors.data_ptr<float>();
  }
};

int64_t grain(const LossArgs& a, int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(elements, a.size)));
}

void run_sums(const LossArgs& a) {
  static const auto kernel = choose_distill_loss_sums();
  const int64_t items = a.batch * loss_spans(a);
  const auto sums = std::make_unique_for_overwrite<double[]>(4 * items);
  at::parallel_for(0, items, grain(a, kLossSpan),
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end, sums.get() + 4 * begin); });
  for (int64_t b = 0; b < a.batch; ++b) finish_losses(a, b, sums.get() + 4 * b * loss_spans(a));
}

void run_gradients(const LossArgs& a) {
  static const auto kernel = choose_distill_loss_gradients();
  at::parallel_for(0, a.batch * loss_spans(a), grain(a, kLossSpan),
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Samples that the caches keep between the two walks, each by one thread.
void run_both(const LossArgs& a) {
  constexpr int64_t kCached = 65536;
  if (a.size > kCached) {
    run_sums(a);
    run_gradients(a);
    return;
  }
  static const auto sum = choose_distill_loss_sums();
  static const auto write = choose_distill_loss_gradients();
  const int64_t spans = loss_spans(a);
  at::parallel_for(0, a.batch, grain(a, a.size), [&](int64_t begin, int64_t end) {
    const auto sums = std::make_unique_for_overwrite<double[]>(4 * spans);
    for (int64_t b = begin; b < end; ++b) {
      sum(a, b * spans, (b + 1) * spans, sums.get());
      finish_losses(a, b, sums.get());
      write(a, b * spans, (b + 1) * spans);
    }
  });
}

// An output, and the pointer to it where it is wanted.
Tensor output(const Tensor& x, bool wanted, void*& pointer) {
  Tensor t = wanted ? at::empty_like(x) : at::empty({0}, x.options());
  pointer = wanted ? t.data_ptr() : nullptr;
  return t;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& images, const Tensor& y_real, const Tensor& y_fake,
                                           double alpha, const OptionalTensor& student_weight,
                                           const OptionalTensor& fake_weight, std::string_view mode) {
  const Input input(images, y_real, y_fake);
  LossArgs a = input.args(mode, alpha);
  const Vector student(student_weight, a.batch, "student_weight"), fake(fake_weight, a.batch, "fake_weight");
  a.student_weight = student.data, a.fake_weight = fake.data;
  const Results results(images);
  if (images.numel() == 0) return {results.student, results.fake, results.factors};
  results.into(a);
  run_sums(a);
  return {results.student, results.fake, results.factors};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& images, const Tensor& y_real, const Tensor& y_fake,
                                            const Tensor& factors, const OptionalTensor& student_gradient,
                                            const OptionalTensor& fake_gradient, const OptionalTensor& fake_weight,
                                            double alpha, std::string_view mode, bool for_images, bool for_real,
                                            bool for_fake) {
  const Input input(images, y_real, y_fake);
  LossArgs a = input.args(mode, alpha);
  const Vector student(student_gradient, a.batch, "student_gradient"), fake(fake_gradient, a.batch, "fake_gradient");
  const Vector weight(fake_weight, a.batch, "fake_weight");
  a.student_gradient = student.data, a.fake_gradient = fake.data, a.fake_weight = weight.data;
  TORCH_CHECK(factors.is_cpu() && factors.scalar_type() == at::kFloat && factors.numel() == 2 * a.batch,
              "factors must be (2, B) float32 on the CPU");
  const Tensor held = factors.contiguous();
  a.factors = const_cast<float*>(held.const_data_ptr<float>());
  Tensor d_images = output(input.x, for_images, a.d_images), d_real = output(input.x, for_real, a.d_real);
  Tensor d_fake = output(input.x, for_fake, a.d_fake);
  if (images.numel() && (for_images || for_real || for_fake)) run_gradients(a);
  return {d_images, d_real, d_fake};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients(
    const Tensor& images, const Tensor& y_real, const Tensor& y_fake, double alpha,
    const OptionalTensor& student_weight, const OptionalTensor& fake_weight, double student_scale, double fake_scale,
    std::string_view mode, bool for_images, bool for_real, bool for_fake) {
  const Input input(images, y_real, y_fake);
  LossArgs a = input.args(mode, alpha);
  const Vector student(student_weight, a.batch, "student_weight"), fake(fake_weight, a.batch, "fake_weight");
  a.student_weight = student.data, a.fake_weight = fake.data;
  a.student_scale = static_cast<float>(student_scale), a.fake_scale = static_cast<float>(fake_scale);
  const Results results(images);
  results.into(a);
  Tensor d_images = output(input.x, for_images, a.d_images), d_real = output(input.x, for_real, a.d_real);
  Tensor d_fake = output(input.x, for_fake, a.d_fake);
  Tensor d_error = output(input.x, fake_weight.has_value(), a.d_fake_error);
  if (images.numel()) run_both(a);
  return {results.student, results.fake, d_images, d_real, d_fake, d_error};
}

}  // namespace
}  // namespace sign_fast

TORCH_LIBRARY_IMPL(sign_fast, CPU, m) {
  m.impl("distill_loss_forward", sign_fast::forward);
  m.impl("distill_loss_backward", sign_fast::backward);
  m.impl("distill_loss_gradients", sign_fast::gradients);
}
