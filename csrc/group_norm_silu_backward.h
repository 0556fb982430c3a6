// The CPU kernel of GroupNorm–SiLU's gradients: see group_norm_silu.h.
#pragma once

#include "group_norm_silu.h"

namespace sign_fast {

struct GroupNormBackwardArgs : NormInput {
  const void* dy;      // (B, C, H, W) in x's layout
  const void* stream;  // the same, or null: added to the norm's gradient before it is multiplied by skip_scale
  const float* stats;  // (B, groups, 3) of the forward kernel
  float skip_scale;
  bool input_sum;      // whether the third plane of sums is wanted
  void* dx;
  void* dx2;           // null without x2
  float* sums;         // (3, B, C): sums over the pixels of dv, dv·xhat and, if wanted, dx
};

inline Plan make_backward_plan(const NormInput& a) {
  Plan plan = make_plan(a);
  // three doubles and six floats a channel, or in NCHW two doubles
  plan.work = a.channels_last ? plan.work / 2 * 3 : 2 * (a.channels / a.groups);
  return plan;
}

SIGN_FAST_DECLARE_KERNEL(group_norm_silu_backward, void, const GroupNormBackwardArgs&, const Plan&, int64_t begin,
                         int64_t end, double* work)

}  // namespace sign_fast
