#include "sampler_loop.h"

#include <c10/util/Exception.h>

#include <stdexcept>
#include <string>

#include "linear_combination.h"

namespace sign_fast {

Plan::Plan(int64_t registers, int64_t draws, int64_t result, at::ScalarType dtype)
    : registers_(registers), draws_(draws), result_(result), dtype_(dtype) {
  check_register(result);
  if (draws < 1) throw std::out_of_range("a plan draws its latents at least");
}

int64_t Plan::check_register(int64_t number) const {
  if (number < 0 || number >= registers_) {
    throw std::out_of_range("register " + std::to_string(number) + " of " + std::to_string(registers_));
  }
  return number;
}

void Plan::add(Combine step) {
  check_register(step.target);
  if (step.states.empty() && step.noise.empty()) throw std::out_of_range("a combination of nothing");
  for (const auto& [source, coefficient] : step.states) check_register(source);
  for (const auto& [draw, coefficient] : step.noise) {
    if (draw < 0 || draw >= draws_) {
      throw std::out_of_range("draw " + std::to_string(draw) + " of " + std::to_string(draws_));
    }
  }
  steps_.emplace_back(std::move(step));
}

void Plan::add(Call step) {
  check_register(step.target), check_register(step.source);
  steps_.emplace_back(step);
}

at::Tensor Plan::run(Denoiser& denoiser, at::TensorList draws, const std::function<void()>& between_calls,
                     const std::optional<at::Tensor>& coefficients) const {
  TORCH_CHECK_VALUE(static_cast<int64_t>(draws.size()) == draws_, "this plan uses ", draws_, " draws, not ",
                    draws.size());
  std::vector<at::Tensor> states(registers_, draws[0]);
  std::vector<Term> terms;
  int64_t used = 0;
  for (const auto& step : steps_) {
    if (const auto* call = std::get_if<Call>(&step)) {
      states[call->target] = denoiser.call(states[call->source], call->level);
      between_calls();
      continue;
    }
    const auto& sum = std::get<Combine>(step);
    terms.clear();
    for (const auto& [source, coefficient] : sum.states) terms.push_back({states[source], coefficient});
    for (const auto& [draw, coefficient] : sum.noise) terms.push_back({draws[draw], coefficient});
    if (coefficients) {
      const auto count = static_cast<int64_t>(terms.size());
      states[sum.target] = linear_combination(terms, coefficients->narrow(0, used, count), dtype_);
      used += count;
    } else {
      states[sum.target] = linear_combination(terms, dtype_);
    }
  }
  return states[result_];
}

}  // namespace sign_fast
