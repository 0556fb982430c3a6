// The CPU kernel of GroupNorm–SiLU: raw pointers in, so that its translation units need no tensor headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "capability.h"

namespace sign_fast {

enum class Dtype { Float, BFloat16, Half };

// What the forward and the backward kernel read: u = concat(x, x2) + emb + input_bias is normed.
struct NormInput {
  const void* x;            // (B, first_channels, H, W), or h of the residual form
  const void* x2;           // (B, channels − first_channels, H, W) in x's layout, or null
  const float* emb;         // (B, C) or (1, C) each, or null; the row stride is C or 0
  const float* scale;
  const float* shift;
  int64_t emb_row, scale_row, shift_row;
  const float* input_bias;  // (C) each, or null
  const float* weight;
  const float* bias;
  int64_t batch, channels, first_channels, pixels, groups;
  bool silu;
  bool channels_last;
  Dtype dtype;
};

struct GroupNormArgs : NormInput {
  const void* skip;        // residual form only, else null
  const float* join_bias;  // (C), added to h before the residual, or null
  float skip_scale;
  void* r;                 // residual form: (h + bias + skip)·skip_scale is written here and normed
  void* y;                 // (B, C, H, W)
  float* stats;            // (B, groups, 3) or null: the mean as the sum of two floats, 1/√(variance + eps)
  double eps;
};

// Work is cut into items by shape alone, so that results do not depend on the number of threads.
struct NormPlan {
  int64_t items;
  int64_t bundles;            // items a sample
  int64_t bundle_groups;      // whole groups an item; a sample's last item takes what remains as well
  int64_t elements_per_item;
  int64_t work;               // doubles of scratch memory a thread
};

inline NormPlan make_plan(const NormInput& a) {
  if (!a.channels_last) return {a.batch * a.groups, a.groups, 1, a.channels / a.groups * a.pixels, 0};
  // an item is a panel of pixels × channels: at least 64 channels keep every cache line whole, and where it comes out
  // even, whole vectors (of at most 32) leave no remainder
  const int64_t group_channels = a.channels / a.groups;
  const int64_t even = std::lcm(group_channels, int64_t{32});
  int64_t channels = even <= 256 ? even : group_channels;
  channels *= (64 + channels - 1) / channels;
  const int64_t bundle = std::min(channels / group_channels, a.groups);
  const int64_t bundles = a.groups / bundle;
  const int64_t widest = (a.groups - (bundles - 1) * bundle) * group_channels;
  return {a.batch * bundles, bundles, bundle, bundle * group_channels * a.pixels, 4 * widest};
}

SIGN_FAST_DECLARE_KERNEL(group_norm_silu, void, const GroupNormArgs&, const NormPlan&, int64_t begin, int64_t end,
                         double* work)

}  // namespace sign_fast
