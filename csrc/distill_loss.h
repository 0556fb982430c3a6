// The CPU kernels of the distillation losses: raw pointers in, so that their translation units need no tensor headers.
#pragma once

#include <cstdint>

#include "capability.h"

namespace sign_fast {

enum class LossDtype { Float, BFloat16, Half };
enum class Student { None, Sid, Matching };

struct LossArgs {
  const void* images;
  const void* y_real;  // not read where student is None
  const void* y_fake;
  LossDtype dtype;
  Student student;
  int64_t batch, size;  // elements of a sample; sample b starts at b·size in every tensor
  float alpha;
  const float* student_weight;  // (batch), or null for 1/omega
  const float* fake_weight;     // (batch), or null: no fake loss
  float* student_loss;          // (batch)
  float* fake_loss;             // (batch)
  float* factors;               // (2, batch): 1/omega or the weight; 1, or 0 where a sample has a NaN
  // gradients: of student_scale·student_gradient[b] and fake_scale·fake_gradient[b]; null counts as 1
  const float* student_gradient;
  const float* fake_gradient;
  float student_scale, fake_scale;
  void* d_images;  // null where not wanted
  void* d_real;
  void* d_fake;        // of both losses, or of the student's alone where d_fake_error is given
  void* d_fake_error;  // of the fake loss
};

// Elements a span has: work is cut by shape alone, so that sums do not depend on the number of threads.
constexpr int64_t kLossSpan = 16384;

inline int64_t loss_spans(const LossArgs& a) { return (a.size + kLossSpan - 1) / kLossSpan; }

// sums (end − begin, 4) of spans begin to end: |x − y_r|, the student's term, the squared error, whether there is a NaN
SIGN_FAST_DECLARE_KERNEL(distill_loss_sums, void, const LossArgs&, int64_t begin, int64_t end, double* sums)
// gradients of spans begin to end
SIGN_FAST_DECLARE_KERNEL(distill_loss_gradients, void, const LossArgs&, int64_t begin, int64_t end)

// From the sums of a sample, added in their order: its losses and factors.
void finish_losses(const LossArgs&, int64_t sample, const double* sums);

}  // namespace sign_fast
