#pragma once
#include <ATen/ops/from_blob.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <cstdint>
namespace sign_fast {
inline int64_t attention_workspace(int64_t, int64_t, int64_t, int64_t, int) { return 0; }
inline void attention(const float* qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t d, float* y, float*) {
  auto t = at::from_blob(const_cast<float*>(qkv), {batch, tokens, 3, heads, d}, at::kFloat);
  auto o = at::scaled_dot_product_attention(t.select(2, 0).transpose(1, 2), t.select(2, 1).transpose(1, 2), t.select(2, 2).transpose(1, 2));
  at::from_blob(y, {batch, tokens, heads, d}, at::kFloat).copy_(o.transpose(1, 2));
}
}
