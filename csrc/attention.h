// float32 attention on the CPU for inference, on the tile of the convolutions.
#pragma once

#include <cstdint>

#include "capability.h"

namespace sign_fast {

// y = softmax(q·kᵀ/√d)·v. qkv is (B, T, 3·C), all q, all k, all v, with C = heads·head_channels; y is (B, T, C) and
// aliases nothing. Needs attention_workspace(…) floats for the threads that at::parallel_for has; allocates nothing.
// What an image becomes depends on its batch and on the number of threads in no bit.
void attention(const float* qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t head_channels, float* y,
               float* workspace);

int64_t attention_workspace(int64_t tokens, int64_t head_channels, int threads);

// For the kernel: items are (image, head, chunk of queries).
struct AttentionTask {
  const float* qkv;
  int64_t batch, tokens, heads, channels;  // channels of a head
  float* y;
  int64_t chunk;

  int64_t chunks() const { return (tokens + chunk - 1) / chunk; }
  int64_t items() const { return batch * heads * chunks(); }
};

// scratch: of this thread, attention_scratch floats
SIGN_FAST_DECLARE_KERNEL(attention, void, const AttentionTask&, int64_t begin, int64_t end, float* scratch)
SIGN_FAST_DECLARE_KERNEL(attention_scratch, int64_t, int64_t tokens, int64_t channels)

}  // namespace sign_fast
