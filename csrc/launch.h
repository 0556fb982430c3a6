// What the convolutions on the CPU share: when threads pay, and whole cache lines.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "convolution_kernel.h"

namespace sign_fast {
namespace {

constexpr int64_t kLine = 64;          // bytes of a cache line
constexpr int64_t kAlone = 2'000'000;  // multiplications below which a second thread does not pay
constexpr int64_t kGrain = 250'000;    // multiplications a thread takes at least
constexpr int64_t kCopyGrain = 16'384;  // floats a thread copies at least

// floats of a vector, as the kernels of this CPU have it
inline int64_t vector_size() {
  static const int64_t size = choose_convolution_vector()();
  return size;
}

// kernel(begin, end, thread) over all items: directly where a thread alone is as fast.
template <typename Kernel>
void launch(int64_t items, int64_t work, int64_t alone, int64_t grain, Kernel&& kernel) {
  if (items == 0) return;
  if (work < alone || items == 1 || at::get_num_threads() == 1) return kernel(0, items, 0);
  at::parallel_for(0, items, std::max<int64_t>(1, grain * items / work),
                   [&](int64_t begin, int64_t end) { kernel(begin, end, at::get_thread_num()); });
}

}  // namespace
}  // namespace sign_fast
