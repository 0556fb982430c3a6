// A whole generation without Python: the noise, every network call, what lies between them, the images as bytes.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/nan_to_num.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>

#include "operators.h"
#include "program.h"
#include "sampler_loop.h"

namespace py = pybind11;

namespace sign_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What depends on noise level and class alone, as sign_fast.inference.conditioning.Conditioning holds it.
struct Conditioning {
  Tensor coefficients;          // (levels, 3): c_skip, c_out, c_in
  Tensor held;                  // (levels, classes, width), or the embedding where the affines are given
  OptionalTensor weight, bias;  // the affines: (width, emb_channels), (width,)
  OptionalTensor labels;        // (B,) int64; none: the last class, which is "no class"

  Tensor rows(int64_t level) const {
    const Tensor classes = held.select(0, level);
    const Tensor chosen = labels ? classes.index_select(0, *labels) : classes.narrow(0, classes.size(0) - 1, 1);
    return weight ? at::addmm(*bias, chosen, weight->t()) : chosen;
  }
};

class ProgramDenoiser final : public Denoiser {
 public:
  ProgramDenoiser(Executor& program, const Conditioning& conditioning)
      : program_(program), conditioning_(conditioning) {}

  Tensor call(const Tensor& x, int64_t level) override {
    return program_.denoise(x, conditioning_.rows(level), conditioning_.coefficients.select(0, level));
  }

 private:
  Executor& program_;
  const Conditioning& conditioning_;
};

// Ctrl-C arrives between two network calls. Taking the GIL can wait for a busy Python thread: not at every short step.
class Signals {
 public:
  void operator()() {
    using namespace std::chrono_literals;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < 10ms) return;
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    last_ = std::chrono::steady_clock::now();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// n of each image's seed, a stream a draw
std::vector<Tensor> draw(const Tensor& seeds, int64_t count, const std::vector<int64_t>& shape) {
  static const auto op =
      find_operator<Tensor(const Tensor&, c10::SymInt, c10::SymIntArrayRef, double, at::ScalarType, bool)>(
          "sign_fast::philox_normal");
  const std::vector<c10::SymInt> sizes(shape.begin(), shape.end());
  std::vector<Tensor> draws;
  for (int64_t i = 0; i < count; ++i) draws.push_back(op.call(seeds, i, sizes, 1.0, at::kFloat, false));
  return draws;
}

// float64 to (B, H, W, C) bytes without a rounding to float32 in between, as the published samplers' images; NaN is 0
Tensor to_bytes(const Tensor& images) {
  const Tensor levels = images.permute({0, 2, 3, 1}).contiguous().mul(127.5).add_(128);
  return at::nan_to_num(levels, 0.0).clamp_(0, 255).to(at::kByte);
}

Tensor generate(const Plan& plan, Executor& program, Conditioning conditioning, std::vector<Tensor> draws,
                const OptionalTensor& seeds, const std::vector<int64_t>& shape, const OptionalTensor& coefficients,
                bool bytes) {
  const at::NoGradGuard guard;
  if (seeds) draws = draw(*seeds, plan.draws(), shape);
  ProgramDenoiser denoiser(program, conditioning);
  const Tensor images = plan.run(denoiser, draws, Signals(), coefficients);
  if (!bytes) return images.to(at::kFloat).contiguous();
  if (images.scalar_type() == at::kDouble) return to_bytes(images);
  static const auto finish =
      find_operator<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&)>(
          "sign_fast::finish_images");
  return finish.call(images, {}, {}, {});
}

}  // namespace

void bind_generation(py::module_& m) {
  m.def(
      "generate",
      [](const Plan& plan, Executor& program, Tensor level_coefficients, Tensor held, OptionalTensor weight,
         OptionalTensor bias, OptionalTensor labels, std::vector<Tensor> draws, OptionalTensor seeds,
         std::vector<int64_t> shape, OptionalTensor coefficients, bool bytes) {
        const py::gil_scoped_release released;
        return generate(plan, program, {level_coefficients, held, weight, bias, labels}, std::move(draws), seeds, shape,
                        coefficients, bytes);
      },
      py::kw_only(), py::arg("plan"), py::arg("program"), py::arg("level_coefficients"), py::arg("held"),
      py::arg("weight"), py::arg("bias"), py::arg("labels"), py::arg("draws"), py::arg("seeds"), py::arg("shape"),
      py::arg("coefficients"), py::arg("bytes"),
      "Images (B, H, W, C) uint8 or (B, C, H, W) float32; see sign_fast.sampling.engine.");
}

}  // namespace sign_fast
