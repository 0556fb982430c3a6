// Resampling filters and borders on the CPU: cutting into items for threads.
#include "program_filter.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace sign_fast {

void filter(const FilterArgs& a) {
  static const auto kernel = choose_resampling_filter();
  constexpr int64_t grain = 65536;  // multiplications below which a second thread does not pay
  TORCH_CHECK(0 < a.size && a.size <= kFilterSide, "resampling filters have at most ", kFilterSide, " taps a side");
  const int64_t row = a.out_width * a.channels * a.size * a.size;
  at::parallel_for(0, a.batch * a.out_height, std::max<int64_t>(1, grain / row),
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void pad(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t border, float* y) {
  const int64_t line = width * channels, side = border * channels, ends = border * (line + 2 * side);
  for (int64_t b = 0; b < batch; ++b) {
    y = std::fill_n(y, ends, 0.f);
    for (int64_t row = 0; row < height; ++row, x += line) {
      y = std::fill_n(y, side, 0.f);
      y = std::copy_n(x, line, y);
      y = std::fill_n(y, side, 0.f);
    }
    y = std::fill_n(y, ends, 0.f);
  }
}

}  // namespace sign_fast
