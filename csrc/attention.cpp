// Attention on the CPU: cutting into items for threads, and torch.ops.sign_fast.attention_cpu for tests and benchmarks.
#include "attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "convolution.h"
#include "launch.h"

namespace sign_fast {
namespace {

constexpr int64_t kChunk = 32;         // queries of an item

// floats of a thread's scratch, whole cache lines
int64_t scratch(int64_t tokens, int64_t channels) {
  static const auto kernel = choose_attention_scratch();
  return (kernel(tokens, channels) + 15) / 16 * 16;
}

}  // namespace

int64_t attention_workspace(int64_t tokens, int64_t head_channels, int threads) {
  return scratch(tokens, head_channels) * threads + 16;
}

void attention(const float* qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t head_channels, float* y,
               float* workspace) {
  static const auto kernel = choose_attention();
  const AttentionTask task{qkv, batch, tokens, heads, head_channels, y, kChunk};
  float* aligned = align(workspace);
  const int64_t items = task.items(), work = 2 * batch * heads * tokens * tokens * head_channels;
  const int64_t size = scratch(tokens, head_channels);
  launch(items, work, kAlone, kGrain, [&](int64_t begin, int64_t end, int thread) {
    kernel(task, begin, end, aligned + thread * size);
  });
}

namespace {

at::Tensor attention_op(const at::Tensor& qkv, int64_t heads) {
  TORCH_CHECK(qkv.dim() == 3 && qkv.scalar_type() == at::kFloat && qkv.is_cpu(), "qkv must be (B, T, 3·C) float32");
  TORCH_CHECK(heads > 0 && qkv.size(2) > 0 && qkv.size(2) % (3 * heads) == 0, "qkv does not divide into 3 times ",
              heads, " heads");
  const at::Tensor x = qkv.contiguous();
  const int64_t channels = x.size(2) / 3, tokens = x.size(1);
  at::Tensor y = at::empty({x.size(0), tokens, channels}, x.options());
  const AlignedFloats workspace(attention_workspace(tokens, channels / heads, at::get_num_threads()));
  attention(x.const_data_ptr<float>(), x.size(0), tokens, heads, channels / heads, y.data_ptr<float>(),
            workspace.data());
  return y;
}

}  // namespace
}  // namespace sign_fast

TORCH_LIBRARY_FRAGMENT(sign_fast, m) { m.def("attention_cpu(Tensor qkv, int heads) -> Tensor"); }

TORCH_LIBRARY_IMPL(sign_fast, CPU, m) { m.impl("attention_cpu", sign_fast::attention_op); }
