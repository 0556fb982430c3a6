// The weights' gradient on the CPU: which algorithm, how its sums are cut, threads.
#include "convolution_gradient.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "convolution.h"
#include "launch.h"
#include "winograd.h"

namespace sign_fast {
namespace {

constexpr int64_t kSlices = 16;   // parts of the sum, each one thread's, at most
constexpr int64_t kDepth = 128;   // products that a sum takes before it joins the others
constexpr int64_t kSliceDepth = 1024;  // of a slice of pixels at least
constexpr int64_t kLineFloats = kLine / sizeof(float);

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_lines(int64_t floats) { return divide_up(floats, kLineFloats) * kLineFloats; }

// As for the convolution itself, see `choose` there: 0 is direct. Of few tiles the rounding of F(4×4) is too large.
int64_t choose(const ConvolutionShape& shape, int64_t batch) {
  if (shape.kernel == 1 || shape.channels[0] < 8) return 0;
  const bool few = batch * shape.height * shape.width < 256, up = shape.resampling == Resampling::Up;
  return !few && !up && prefers_winograd4(shape.height, shape.width) ? 4 : 2;
}

// One gradient: its sum is cut into slices, each with a sum of its own that one thread or all of them take.
class Gradient {
 public:
  Gradient(const ConvolutionShape& shape, const WeightGradientArgs& args) : shape_(shape), args_(args) {
    in_ = shape.channels[0], out_ = shape.out_channels, taps_ = shape.kernel * shape.kernel;
    m_ = choose(shape, args.batch);
    // the side with less waste in whole vectors and rows of tiles becomes the columns
    const auto waste = [](int64_t rows, int64_t columns) {
      return divide_up(rows, 4) * divide_up(columns, vector_size());
    };
    input_columns_ = (m_ > 0 || taps_ == 1) && waste(out_, in_) <= waste(in_, out_);
    columns_ = input_columns_ ? in_ : out_;
    rows_ = input_columns_ ? out_ : in_;
    row_ = divide_up(columns_, vector_size()) * vector_size();
  }

  void run() {
    m_ > 0 ? run_winograd() : run_direct();
    finish();
  }

 private:
  const float* resampled(const float* from, int64_t channels, int64_t height, int64_t width, int64_t border, bool up,
                         bool down) {
    const int64_t size = args_.batch * (height + 2 * border) * (width + 2 * border) * channels;
    copy_ = AlignedFloats::uninitialized(size);
    static const auto copy = choose_convolution_copy();
    const CopyTask task{{from, nullptr}, {channels, 0}, args_.batch, height, width, border, up, down, copy_.data()};
    launch(task.items(), size, 2 * kCopyGrain, kCopyGrain,
           [&](int64_t begin, int64_t end, int) { copy(task, begin, end); });
    return copy_.data();
  }

  // Calls slice(s, worker) for all slices: by a thread each, or one after the other with all threads inside.
  template <typename Slice>
  void for_slices(Slice&& slice) {
    if (workers_ == 1) {
      for (int64_t s = 0; s < slices_; ++s) slice(s, 0);
    } else {
      launch(slices_, work_, kAlone, kGrain, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t s = begin; s < end; ++s) slice(s, thread);
      });
    }
  }

  void cut(int64_t slices, int64_t work) {
    slices_ = std::min(slices, kSlices), work_ = work;
    const int64_t threads = at::get_num_threads();
    workers_ = slices_ >= threads && work >= kAlone ? threads : 1;  // as `launch` decides, so that nothing nests
    partial_size_ = taps_ * rows_ * row_;
    partial_ = AlignedFloats::uninitialized(slices_ * partial_size_);
    partial_bias_ = AlignedFloats::uninitialized(args_.bias ? slices_ * out_ : 0);
  }

  void run_winograd();
  void run_direct();
  void finish();

  const ConvolutionShape& shape_;
  const WeightGradientArgs& args_;
  int64_t in_, out_, taps_, m_, rows_, columns_, row_, slices_ = 0, work_ = 0, workers_ = 0, partial_size_ = 0;
  bool input_columns_;
  float scale_ = 1;
  AlignedFloats copy_, partial_, partial_bias_;
};

void Gradient::run_winograd() {
  static const auto inputs = choose_winograd_inputs();
  static const auto outputs = choose_output_gradients();
  static const auto products = choose_gradient_products();
  static const auto row_sums = choose_row_sums();
  const bool up = shape_.resampling == Resampling::Up, down = shape_.resampling == Resampling::Down;
  const AlignedFloats zeros(in_);
  const std::vector<int32_t> index = winograd_input_index(m_, shape_.height, shape_.width, up);
  WinogradTask x{};
  x.m = m_;
  x.x[0] = down ? resampled(args_.x, in_, shape_.height, shape_.width, 0, false, true) : args_.x;
  x.channels[0] = in_;
  x.zeros = zeros.data(), x.input_index = index.data();
  x.height = shape_.height, x.width = shape_.width, x.up = up;

  const int64_t matrices = x.side() * x.side(), tiles = args_.batch * x.rows() * x.columns();
  const int64_t most = std::min<int64_t>(tiles, m_ == 2 ? 128 : 64), parts = divide_up(tiles, most);
  cut(parts, tiles * matrices * in_ * out_);
  const int64_t input_size = whole_lines(matrices * winograd_stride(most, in_));
  const int64_t output_size = whole_lines(matrices * winograd_stride(most, out_));
  const int64_t sums_size = whole_lines(most * out_), scratch_size = product_scratch(m_, vector_size());
  const int64_t inside = workers_ == 1 ? at::get_num_threads() : 1;
  const int64_t worker_size = input_size + output_size + sums_size + inside * scratch_size;
  const auto workspace = AlignedFloats::uninitialized(workers_ * worker_size);

  for_slices([&](int64_t s, int64_t worker) {
    float* inputs_at = workspace.data() + worker * worker_size;
    float *outputs_at = inputs_at + input_size, *sums = outputs_at + output_size, *scratch = sums + sums_size;
    const int64_t first = s * parts / slices_, last = (s + 1) * parts / slices_;
    for (int64_t part = first; part < last; ++part) {
      WinogradTask own = x;
      own.first = part * most, own.tiles = std::min(most, tiles - part * most);
      own.inputs = inputs_at, own.stride = winograd_stride(own.tiles, in_);
      const OutputGradientTask dy{m_, args_.dy, shape_.height, shape_.width, out_, own.first,
                                  outputs_at, winograd_stride(own.tiles, out_), args_.bias ? sums : nullptr};
      launch(own.tiles, own.tiles * in_ * matrices, 65'536, 65'536,
             [&](int64_t begin, int64_t end, int) { inputs(own, begin, end); });
      launch(own.tiles, own.tiles * out_ * matrices, 65'536, 65'536,
             [&](int64_t begin, int64_t end, int) { outputs(dy, begin, end); });
      if (args_.bias) row_sums(sums, own.tiles, out_, part > first, partial_bias_.data() + s * out_);
      ProductTask task{};
      task.m = m_;
      task.left = input_columns_ ? outputs_at : inputs_at, task.right = input_columns_ ? inputs_at : outputs_at;
      task.left_step = rows_, task.right_step = columns_;
      task.segments = 1, task.length = own.tiles;
      task.left_stride = input_columns_ ? dy.stride : own.stride;
      task.right_stride = input_columns_ ? own.stride : dy.stride;
      task.rows = rows_, task.columns = columns_;
      task.to = partial_.data() + s * partial_size_, task.row = row_, task.add = part > first;
      launch(task.items(vector_size()), own.tiles * matrices * in_ * out_, kAlone / 4, kGrain / 2,
             [&](int64_t begin, int64_t end, int thread) {
               products(task, begin, end, scratch + thread * scratch_size);
             });
    }
  });
}

// Rows are the input's channels times taps. A 1×1 convolution's elements are pixels one after the other, a 3×3 one's
// those of image rows in a copy with a border.
void Gradient::run_direct() {
  static const auto products = choose_gradient_products();
  static const auto row_sums = choose_row_sums();
  const bool up = shape_.resampling == Resampling::Up, down = shape_.resampling == Resampling::Down;
  const float *x = args_.x, *dy = args_.dy;
  const int64_t k = shape_.kernel;
  int64_t height = shape_.height, width = shape_.width;
  if (k == 1 && up) {  // the sum of 2×2 of dy meets the low input
    height /= 2, width /= 2, scale_ = 4;
    dy = resampled(dy, out_, height, width, 0, false, true);
  } else if (k == 3 || down) {
    x = resampled(x, in_, height, width, k / 2, up, down);
  }
  ProductTask task{};
  std::vector<int64_t> offset;
  const int64_t padded = (width + k - 1) * in_;  // floats of a row of x
  for (int64_t tap = 0; tap < taps_ && k == 3; ++tap)
    for (int64_t c = 0; c < in_; ++c) offset.push_back(tap / 3 * padded + tap % 3 * in_ + c);
  task.left_offset = k == 3 ? offset.data() : nullptr;
  task.rows = taps_ * rows_, task.columns = columns_, task.row = row_;
  task.left_step = input_columns_ ? out_ : in_, task.right_step = columns_;
  task.left_segment = padded, task.right_segment = width * columns_;
  const float *left = input_columns_ ? dy : x, *right = input_columns_ ? x : dy;

  // units of the sum: image rows, or pixels
  const int64_t units = k == 3 ? args_.batch * height : args_.batch * height * width, length = k == 3 ? width : 1;
  const int64_t chunk = std::max<int64_t>(1, kDepth / length), chunks = divide_up(units, chunk);
  cut(std::max<int64_t>(1, units * length / kSliceDepth), units * length * task.rows * columns_);
  const int64_t masked = columns_ == row_ ? 0 : divide_up(row_ - columns_, columns_);
  for_slices([&](int64_t s, int64_t) {
    const int64_t first = s * chunks / slices_, last = (s + 1) * chunks / slices_;
    ProductTask own = task;
    own.to = partial_.data() + s * partial_size_;
    const auto run = [&](int64_t begin, int64_t end, int) {
      ProductTask at = own;
      for (int64_t i = first; i < last; ++i) {
        const int64_t unit = i * chunk, count = std::min(chunk, units - unit);
        at.add = i > first;
        for (int64_t from = unit, next; from < unit + count; from = next) {
          // image rows end with their image: the next one's lie behind its border
          next = k == 3 ? std::min(unit + count, (from / height + 1) * height) : unit + count;
          at.segments = k == 3 ? next - from : 1, at.length = k == 3 ? width : next - from;
          at.left = left + (k == 3 ? (from + from / height * 2) * padded : from * at.left_step);
          at.right = right + from * length * columns_;
          at.last = std::clamp<int64_t>(masked - (units - next) * length, 0, (next - from) * length);
          products(at, begin, end, nullptr);
          at.add = true;
        }
      }
    };
    launch(own.items(vector_size()), (last - first) * chunk * length * task.rows * columns_, kAlone / 4, kGrain / 2,
           run);
    if (args_.bias) {
      const int64_t from = first * chunk * length, to = std::min(last * chunk, units) * length;
      row_sums(dy + from * out_, to - from, out_, false, partial_bias_.data() + s * out_);
    }
  });
}

// The sum of the slices, from the first to the last, where the weight has its place.
void Gradient::finish() {
  const int64_t* stride = args_.strides;
  const int64_t row_stride = stride[input_columns_ ? 0 : 1], column_stride = stride[input_columns_ ? 1 : 0];
  launch(taps_ * rows_, slices_ * partial_size_, 4 * kCopyGrain, kCopyGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* sum = partial_.data() + i * row_;
      for (int64_t s = 1; s < slices_; ++s) {
        const float* other = sum + s * partial_size_;
        for (int64_t c = 0; c < row_; ++c) sum[c] += other[c];
      }
      const int64_t tap = i / rows_, k = shape_.kernel;
      float* to = args_.weight + tap / k * stride[2] + tap % k * stride[3] + i % rows_ * row_stride;
      for (int64_t c = 0; c < columns_; ++c) to[c * column_stride] = sum[c] * scale_;
    }
  });
  for (int64_t o = 0; o < out_ && args_.bias; ++o) {
    float sum = partial_bias_.data()[o];
    for (int64_t s = 1; s < slices_; ++s) sum += partial_bias_.data()[s * out_ + o];
    args_.bias[o] = sum * scale_;
  }
}

}  // namespace

void weight_gradient(const ConvolutionShape& shape, const WeightGradientArgs& args) {
  TORCH_CHECK(shape.kernel == 1 || shape.kernel == 3, "the kernel must be 1×1 or 3×3");
  Gradient(shape, args).run();
}

}  // namespace sign_fast
