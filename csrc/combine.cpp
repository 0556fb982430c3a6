// A product and a sum round once each, as two torch operations do: no fused multiply-adds.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "combine.h"

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>

#include <algorithm>

namespace sign_fast {
namespace {

using at::Tensor;

constexpr int64_t CHUNK = 1024;  // elements whose sum stays in the first-level cache while the terms are added
constexpr int64_t GRAIN = 32 * CHUNK;  // elements worth a thread

bool is_float(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kDouble; }

// Plain memory of the CPU: nothing that has to go through torch's dispatcher.
bool is_plain(const Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && is_float(t.scalar_type()) && t.is_non_overlapping_and_dense() &&
         !t.is_neg() && !at::isTensorSubclassLike(t) && !t.requires_grad();
}

template <typename T, typename From>
void add_term(T* sum, const From* source, T coefficient, int64_t n, bool first) {
  if (first) {
    for (int64_t i = 0; i < n; ++i) sum[i] = static_cast<T>(source[i]) * coefficient;
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<T>(source[i]) * coefficient;
  }
}

template <typename T>
void combine_range(const std::vector<Term>& terms, T* out, int64_t begin, int64_t end) {
  for (int64_t start = begin; start < end; start += CHUNK) {
    const int64_t n = std::min(CHUNK, end - start);
    for (const Term& term : terms) {
      const bool first = &term == terms.data();
      const T coefficient = static_cast<T>(term.coefficient);
      if (term.source.scalar_type() == at::kDouble) {
        add_term(out + start, term.source.const_data_ptr<double>() + start, coefficient, n, first);
      } else {
        add_term(out + start, term.source.const_data_ptr<float>() + start, coefficient, n, first);
      }
    }
  }
}

template <typename T>
Tensor combine_plain(const std::vector<Term>& terms, at::ScalarType dtype) {
  Tensor out = at::empty_like(terms[0].source, terms[0].source.options().dtype(dtype));
  T* data = out.mutable_data_ptr<T>();
  at::parallel_for(0, out.numel(), GRAIN,
                   [&](int64_t begin, int64_t end) { combine_range(terms, data, begin, end); });
  return out;
}

}  // namespace

Tensor combine(const std::vector<Term>& terms, at::ScalarType dtype) {
  const Tensor& first = terms.at(0).source;
  if (terms.size() == 1 && terms[0].coefficient == 1) return first.to(dtype);
  const bool plain = is_float(dtype) && std::all_of(terms.begin(), terms.end(), [&](const Term& term) {
    return is_plain(term.source) && term.source.sizes() == first.sizes() && term.source.strides() == first.strides();
  });
  if (plain) return dtype == at::kDouble ? combine_plain<double>(terms, dtype) : combine_plain<float>(terms, dtype);
  Tensor sum = at::mul(first.to(dtype), terms[0].coefficient);
  for (size_t i = 1; i < terms.size(); ++i) sum = at::add(sum, terms[i].source.to(dtype), terms[i].coefficient);
  return sum;
}

}  // namespace sign_fast
