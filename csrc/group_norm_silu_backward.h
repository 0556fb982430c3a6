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

inline NormPlan make_backward_plan(const NormInput& a) {
  NormPlan plan = make_plan(a);
  // doubles: sums and six floats a channel, and in float the item itself; packs are of 32 channels or pixels at most
  if (a.channels_last) {
    const int64_t widest = plan.work / 4;
    plan.work = 6 * widest + (a.silu ? (widest + 64) * a.pixels / 2 : 0) + 8;
  } else {
    const int64_t channels = a.channels / a.groups;
    plan.work = 2 * channels + (a.silu ? channels * ((a.pixels + 31) / 32 * 16) : 0) + 8;
  }
  return plan;
}

SIGN_FAST_DECLARE_KERNEL(group_norm_silu_backward, void, const GroupNormBackwardArgs&, const NormPlan&, int64_t begin,
                         int64_t end, double* work)

}  // namespace sign_fast
