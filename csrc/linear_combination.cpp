#include "linear_combination.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>

#include <algorithm>

#include "combine.h"
#include "operators.h"

namespace sign_fast {
namespace {

using at::Tensor;

bool is_float(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kDouble; }

StateDtype state_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? StateDtype::Double : StateDtype::Float; }

// Plain memory of the CPU: nothing that has to go through torch's dispatcher.
bool is_plain(const Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && is_float(t.scalar_type()) && t.is_non_overlapping_and_dense() &&
         !t.is_neg() && !at::isTensorSubclassLike(t) && !t.requires_grad();
}

}  // namespace

Tensor linear_combination(const std::vector<Term>& terms, at::ScalarType dtype) {
  const Tensor& first = terms.at(0).source;
  if (terms.size() == 1 && terms[0].coefficient == 1) return first.to(dtype);
  const bool plain = is_float(dtype) && std::all_of(terms.begin(), terms.end(), [&](const Term& term) {
    return is_plain(term.source) && term.source.sizes() == first.sizes() && term.source.strides() == first.strides();
  });
  if (plain) {
    Tensor sum = at::empty_like(first, first.options().dtype(dtype));
    std::vector<CombineTerm> states;
    for (const Term& term : terms)
      states.push_back({term.source.const_data_ptr(), state_dtype(term.source.scalar_type()), term.coefficient});
    run_combine({states.data(), static_cast<int64_t>(states.size()), sum.mutable_data_ptr(), state_dtype(dtype)},
                sum.numel());
    return sum;
  }
  Tensor sum = at::mul(first.to(dtype), terms[0].coefficient);
  for (size_t i = 1; i < terms.size(); ++i) sum = at::add(sum, terms[i].source.to(dtype), terms[i].coefficient);
  return sum;
}

Tensor linear_combination(const std::vector<Term>& terms, const Tensor& coefficients, at::ScalarType dtype) {
  static const auto op = find_operator<Tensor(at::TensorList, const Tensor&, at::ScalarType)>("sign_fast::combine");
  std::vector<Tensor> states;
  for (const Term& term : terms) states.push_back(term.source);
  return op.call(states, coefficients, dtype);
}

}  // namespace sign_fast
