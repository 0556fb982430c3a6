// The CPU kernel of GroupNorm–SiLU: raw pointers in, so that its translation units need no tensor headers.
#pragma once

#include <cstdint>

namespace sign_fast {

enum class Dtype { Float, BFloat16, Half };

struct GroupNormArgs {
  const void* x;           // (B, C, H, W), or h of the residual form
  const void* skip;        // residual form only, else null
  const float* join_bias;  // (C), added to h before the residual, or null
  float skip_scale;
  void* r;                 // residual form: (h + bias + skip)·skip_scale is written here and normed
  void* y;
  const float* emb;        // (B, C) or (1, C) each, or null; the row stride is C or 0
  const float* scale;
  const float* shift;
  int64_t emb_row, scale_row, shift_row;
  const float* weight;     // (C) each, or null
  const float* bias;
  int64_t batch, channels, pixels, groups;
  double eps;
  bool silu;
  bool channels_last;
  Dtype dtype;
};

// Work is cut into items by shape alone, so that results do not depend on the number of threads.
struct Plan {
  int64_t items;
  int64_t bundle_groups;      // whole groups an item
  int64_t bundles;            // items a sample
  int64_t elements_per_item;
};

inline Plan make_plan(const GroupNormArgs& a) {
  const int64_t group_channels = a.channels / a.groups;
  // channels_last reads a panel of pixels × bundle: at least 64 channels keep every cache line whole
  int64_t bundle = a.channels_last ? (64 + group_channels - 1) / group_channels : 1;
  if (bundle > a.groups) bundle = a.groups;
  const int64_t bundles = (a.groups + bundle - 1) / bundle;
  return {a.batch * bundles, bundle, bundles, bundle * group_channels * a.pixels};
}

using Kernel = void (*)(const GroupNormArgs&, const Plan&, int64_t begin, int64_t end);

void group_norm_silu_default(const GroupNormArgs&, const Plan&, int64_t begin, int64_t end);
void group_norm_silu_avx2(const GroupNormArgs&, const Plan&, int64_t begin, int64_t end);
void group_norm_silu_avx512(const GroupNormArgs&, const Plan&, int64_t begin, int64_t end);

}  // namespace sign_fast
