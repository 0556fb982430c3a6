// Winograd convolution on the CPU: packing of weights, blocks of tiles, threads.
#include "winograd.h"

#include <algorithm>

#include "convolution.h"
#include "launch.h"

namespace sign_fast {
namespace {

constexpr int64_t kTransformed = 1 << 18;  // weights of up to so many floats are kept transformed
constexpr int64_t kTileGrain = 64;         // tiles · channels/16 whose inputs a thread transforms at least

int64_t side_of(Algorithm algorithm) { return algorithm == Algorithm::Winograd2 ? 2 : 4; }

// Tiles at work at a time: their transformed inputs and products stay in the cache. Where filters are transformed on
// the way that work is shared by all of them; else there is a part for each thread, of whole rows of multiplications.
int64_t tiles_at_work(int64_t m, int64_t tiles, int64_t threads, bool transformed) {
  const int64_t most = std::min<int64_t>(tiles, m == 2 ? 128 : 64);
  return transformed ? std::min(most, ((tiles + threads - 1) / threads + 7) / 8 * 8) : most;
}

// Most vectors of a block: filters that are transformed on the way are to stay in the cache, with their products.
int64_t block_vectors(bool transformed) { return transformed ? 3 : 2; }

}  // namespace

bool prefers_winograd4(int64_t height, int64_t width) {
  const auto products = [&](int64_t m) { return (height + m - 1) / m * ((width + m - 1) / m) * (m + 2) * (m + 2); };
  return height >= 4 && width >= 4 && 10 * products(4) < 7 * products(2);
}

std::vector<int32_t> winograd_input_index(int64_t m, int64_t height, int64_t width, bool up) {
  std::vector<int32_t> index;
  index.reserve(((height + m - 1) / m) * ((width + m - 1) / m) * (m + 2) * (m + 2));
  const int64_t half = up ? 1 : 0;
  for (int64_t row = 0; row < height; row += m)
    for (int64_t column = 0; column < width; column += m)
      for (int64_t y = row - 1; y <= row + m; ++y)
        for (int64_t x = column - 1; x <= column + m; ++x) {
          const bool inside = y >= 0 && y < height && x >= 0 && x < width;
          index.push_back(inside ? (y >> half) * (width >> half) + (x >> half) : -1);
        }
  return index;
}

void PackedConvolution::pack_winograd(const Filter& weight) {
  const int64_t m = side_of(algorithm_), side = m + 2, in = in_channels(), size = vector_size();
  transformed_ = side * side * in * vectors_ * size <= kTransformed;
  weights_ = transformed_ ? AlignedFloats::uninitialized(side * side * in * vectors_ * size)
                          : AlignedFloats(9 * in * vectors_ * size);
  const auto filters = AlignedFloats::uninitialized(transformed_ ? 9 * in * std::min<int64_t>(vectors_, 3) * size : 0);
  zeros_ = AlignedFloats(in);
  input_index_ = winograd_input_index(m, shape_.height, shape_.width, shape_.resampling == Resampling::Up);
  static const auto transform = choose_winograd_filters();
  float* to = weights_.data();
  const int64_t most = block_vectors(transformed_);
  for (int64_t i = 0; i < block_count(vectors_, most); ++i) {
    const Block block = sign_fast::block(vectors_, i, most);
    const int64_t width = block.vectors * size, first = block.first * size;
    const int64_t count = std::min(width, shape_.out_channels - first);
    float* gathered = transformed_ ? filters.data() : to;
    if (transformed_ && count < width) std::fill_n(gathered, 9 * in * width, 0.f);
    gather_filter(weight, 3, in, first, count, width, 9 * width, gathered);
    if (transformed_) transform(m, gathered, in, width, to);
    to += (transformed_ ? side * side : 9) * in * width;
  }
}

// As many threads as there are blocks of tiles each take blocks of their own; with fewer blocks the threads share one.
int64_t PackedConvolution::winograd_workspace(int64_t batch, int threads) const {
  const int64_t m = side_of(algorithm_), side = m + 2;
  const int64_t all = batch * ((shape_.height + m - 1) / m) * ((shape_.width + m - 1) / m);
  const int64_t tiles = tiles_at_work(m, all, threads, transformed_);
  const int64_t line = kLine / sizeof(float);
  const int64_t scratch = winograd_scratch(m, tiles, in_channels(), vector_size(), transformed_);
  return threads * (side * side * winograd_stride(tiles, in_channels()) + scratch + line);
}

void PackedConvolution::run_winograd(const ConvolutionArgs& args, float* workspace) const {
  static const auto inputs = choose_winograd_inputs();
  static const auto outputs = choose_winograd_outputs();
  static const auto copy = choose_convolution_copy();
  WinogradTask task{};
  task.m = side_of(algorithm_);
  task.x[0] = args.x[0], task.x[1] = args.x[1];
  task.channels[0] = shape_.channels[0], task.channels[1] = shape_.channels[1];
  if (const int64_t size = this->scratch(args.batch); size > 0) {  // the mean of 2×2 is taken first
    const CopyTask source{{args.x[0], args.x[1]}, {shape_.channels[0], shape_.channels[1]}, args.batch, shape_.height,
                          shape_.width, 0, false, true, workspace};
    launch(source.items(), size, 2 * kCopyGrain, kCopyGrain,
           [&](int64_t begin, int64_t end, int) { copy(source, begin, end); });
    task.x[0] = workspace;
    task.channels[0] = in_channels(), task.channels[1] = 0;
    workspace = align(workspace + size);
  }
  task.zeros = zeros_.data();
  task.input_index = input_index_.data();
  task.height = shape_.height, task.width = shape_.width;
  task.up = shape_.resampling == Resampling::Up;
  task.weights = weights_.data(), task.transformed = transformed_;
  task.vectors = vectors_;
  task.block_vectors = block_vectors(transformed_);
  task.to = {bias_.data(), args.residual, args.residual_up ? residual_index_.data() : nullptr,
             shape_.height * shape_.width / (args.residual_up ? 4 : 1), args.residual_scale, args.scale, args.y,
             shape_.height * shape_.width, shape_.out_channels};

  const int64_t tiles = args.batch * task.rows() * task.columns(), threads = at::get_num_threads();
  const int64_t most = tiles_at_work(task.m, tiles, threads, transformed_);
  const int64_t side = task.side(), in = in_channels();
  const int64_t input_size = side * side * winograd_stride(most, in);
  const int64_t line = kLine / sizeof(float);
  const int64_t scratch = winograd_scratch(task.m, most, in, vector_size(), transformed_);
  const int64_t scratch_size = (scratch + line - 1) / line * line;
  const int64_t parts = (tiles + most - 1) / most, blocks = block_count(vectors_, task.block_vectors);
  const int64_t work = side * side * in * vectors_ * vector_size();  // multiplications of a tile
  const auto part = [&](WinogradTask& of, int64_t i) {
    of.first = i * most;
    of.tiles = std::min(most, tiles - of.first);
    of.stride = winograd_stride(of.tiles, in);
  };
  if (parts >= threads || tiles * work < kAlone) {
    launch(parts, tiles * work, kAlone, kGrain, [&](int64_t begin, int64_t end, int thread) {
      WinogradTask own = task;
      own.inputs = workspace + thread * (input_size + scratch_size);
      for (int64_t i = begin; i < end; ++i) {
        part(own, i);
        inputs(own, 0, own.tiles);
        outputs(own, 0, blocks, own.inputs + input_size);
      }
    });
    return;
  }
  task.inputs = workspace;
  for (int64_t i = 0; i < parts; ++i) {
    part(task, i);
    launch(task.tiles, task.tiles * in * side * side, kTileGrain * side * side * 16, kTileGrain * side * side * 16,
           [&](int64_t begin, int64_t end, int) { inputs(task, begin, end); });
    launch(blocks, task.tiles * work, kAlone, kGrain, [&](int64_t begin, int64_t end, int thread) {
      outputs(task, begin, end, workspace + input_size + thread * scratch_size);
    });
  }
}

}  // namespace sign_fast
