// The distillation losses over raw pointers, compiled once a CPU capability: see capability.h.
//
// A sample is a run of `size` elements, whatever its memory format. One walk sums, another writes the gradients; both go
// by spans that the caches hold.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "distill_loss.h"
#include "pack.h"

namespace sign_fast {
namespace {

// Elements [at, at + count) of the three inputs; what is beyond counts as zero.
template <typename T>
struct Inputs {
  Pack<T> x, real, fake;

  Inputs(const LossArgs& a, int64_t at, int64_t count) {
    x = load_pack(static_cast<const T*>(a.images) + at, count);
    fake = load_pack(static_cast<const T*>(a.y_fake) + at, count);
    real = a.student == Student::None ? x : load_pack(static_cast<const T*>(a.y_real) + at, count);
  }
};

template <typename T>
void sums_of(const LossArgs& a, int64_t first, int64_t count, double* out) {
  const Vec alpha(a.alpha);
  double absolute = 0, student = 0, error = 0;
  Vec bad(0.f);
  // a float lane takes RUN additions, then its sum goes to a double
  constexpr int64_t STEP = RUN * N<T>;
  for (int64_t start = 0; start < count; start += STEP) {
    Vec one[VECS<T>], two[VECS<T>], three[VECS<T>];
    std::fill_n(one, VECS<T>, Vec(0.f)), std::fill_n(two, VECS<T>, Vec(0.f)), std::fill_n(three, VECS<T>, Vec(0.f));
    const int64_t end = std::min(start + STEP, count);
    const auto add = [&](int64_t i, int64_t n) {
      const Inputs<T> in(a, first + i, n);
      for (int64_t k = 0; k < VECS<T>; ++k) {
        const Vec gap = in.real.v[k] - in.fake.v[k], residual = in.real.v[k] - in.x.v[k];
        const Vec difference = in.fake.v[k] - in.x.v[k];
        one[k] = one[k] + residual.abs();
        two[k] = two[k] + (a.student == Student::Sid ? gap * (residual - alpha * gap) : gap * gap);
        three[k] = three[k] + difference * difference;
        bad = bad | (in.x.v[k] != in.x.v[k]) | (in.real.v[k] != in.real.v[k]) | (in.fake.v[k] != in.fake.v[k]);
      }
    };
    int64_t i = start;
    for (; i + N<T> <= end; i += N<T>) add(i, N<T>);
    if (i < end) add(i, end - i);
    for (int64_t k = 0; k < VECS<T>; ++k) absolute += sum(one[k]), student += sum(two[k]), error += sum(three[k]);
  }
  out[0] = absolute, out[1] = student, out[2] = error;
  out[3] = bad.zero_mask() == (1 << V) - 1 ? 0 : 1;
}

template <typename T>
void gradients_of(const LossArgs& a, int64_t sample, int64_t first, int64_t count) {
  T* const d_images = static_cast<T*>(a.d_images);
  T* const d_real = static_cast<T*>(a.d_real);
  T* const d_fake = static_cast<T*>(a.d_fake);
  T* const d_error = static_cast<T*>(a.d_fake_error);
  if (a.factors[a.batch + sample] == 0) {  // a dropped sample sends back zeros
    for (T* out : {d_images, d_real, d_fake, d_error}) {
      if (out) std::fill_n(out + first, count, T(0.f));
    }
    return;
  }
  const float student = a.student_scale * a.factors[sample] * (a.student_gradient ? a.student_gradient[sample] : 1.f);
  const float error = a.fake_scale * (a.fake_gradient ? a.fake_gradient[sample] : 1.f) *
                      (a.fake_weight ? a.fake_weight[sample] : 0.f);
  const Vec scale(student), twice(2 * error), slope(1 - 2 * a.alpha), other(2 * a.alpha);
  const bool sid = a.student == Student::Sid, error_to_fake = !a.d_fake_error && a.fake_weight;
  const auto write = [&](int64_t at, int64_t n) {
    const Inputs<T> in(a, at, n);
    Pack<T> to_images, to_real, to_fake, to_error;
    for (int64_t k = 0; k < VECS<T>; ++k) {
      const Vec gap = in.real.v[k] - in.fake.v[k], residual = in.real.v[k] - in.x.v[k];
      const Vec difference = (in.fake.v[k] - in.x.v[k]) * twice;
      to_images.v[k] = a.student == Student::None ? difference.neg() : gap.neg() * scale;
      to_real.v[k] = sid ? (residual + slope * gap) * scale : Vec(0.f);
      const Vec by_student = (other * gap - residual) * scale;
      to_fake.v[k] = sid ? (error_to_fake ? by_student + difference : by_student)
                                     : (error_to_fake ? difference : Vec(0.f));
      to_error.v[k] = difference;
    }
    if (d_images) store_pack(d_images + at, to_images, n);
    if (d_real) store_pack(d_real + at, to_real, n);
    if (d_fake) store_pack(d_fake + at, to_fake, n);
    if (d_error) store_pack(d_error + at, to_error, n);
  };
  int64_t i = 0;
  for (; i + N<T> <= count; i += N<T>) write(first + i, N<T>);
  if (i < count) write(first + i, count - i);
}

template <typename Body>
void each_dtype(LossDtype dtype, const Body& body) {
  switch (dtype) {
    case LossDtype::Float:
      return body(float{});
    case LossDtype::BFloat16:
      return body(c10::BFloat16{});
    case LossDtype::Half:
      return body(c10::Half{});
  }
}

struct Span {
  int64_t sample, first, count;

  Span(const LossArgs& a, int64_t item) {
    const int64_t spans = loss_spans(a), start = item % spans * kLossSpan;
    sample = item / spans;
    first = sample * a.size + start;
    count = std::min(kLossSpan, a.size - start);
  }
};

}  // namespace

void SIGN_FAST_ENTRY(distill_loss_sums)(const LossArgs& a, int64_t begin, int64_t end, double* sums) {
  each_dtype(a.dtype, [&](auto type) {
    for (int64_t item = begin; item < end; ++item) {
      const Span span(a, item);
      sums_of<decltype(type)>(a, span.first, span.count, sums + 4 * (item - begin));
    }
  });
}

void SIGN_FAST_ENTRY(distill_loss_gradients)(const LossArgs& a, int64_t begin, int64_t end) {
  each_dtype(a.dtype, [&](auto type) {
    for (int64_t item = begin; item < end; ++item) {
      const Span span(a, item);
      gradients_of<decltype(type)>(a, span.sample, span.first, span.count);
    }
  });
}

}  // namespace sign_fast
