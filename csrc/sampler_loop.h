// The sampler loop: a plan (sign_fast/sampling/plan.py) carried out with any denoiser. Knows nothing of Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

namespace pybind11 {
class module_;
}

namespace sign_fast {

using Terms = std::vector<std::pair<int64_t, double>>;

struct Combine {
  int64_t target;
  Terms states;  // (register, coefficient)
  Terms noise;   // (draw, coefficient)
};

struct Call {
  int64_t target, source, level;
};

// How a call is done.
struct Denoiser {
  virtual ~Denoiser() = default;
  // D of x's shape, in any floating dtype; `level` is the number of the noise level among the plan's
  virtual at::Tensor call(const at::Tensor& x, int64_t level) = 0;
};

class Plan {
 public:
  // All three throw std::out_of_range where a register or draw does not exist; draw 0 has to.
  Plan(int64_t registers, int64_t draws, int64_t result, at::ScalarType dtype);
  void add(Combine step);
  void add(Call step);

  int64_t draws() const { return draws_; }

  // `draws` as the plan has them, of one shape and device. between_calls is called once after each call and may throw.
  // coefficients: of all terms one after the other, (n,) float64 on the draws' device, in place of the plan's own.
  at::Tensor run(Denoiser& denoiser, at::TensorList draws, const std::function<void()>& between_calls,
                 const std::optional<at::Tensor>& coefficients = std::nullopt) const;

 private:
  int64_t check_register(int64_t number) const;

  int64_t registers_, draws_, result_;
  at::ScalarType dtype_;
  std::vector<std::variant<Combine, Call>> steps_;
};

void bind_sampler_loop(pybind11::module_& m);

}  // namespace sign_fast
