// Convolutions on the CPU: which algorithm, packing of weights, cutting into items for threads.
#include "convolution.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <new>

#include "convolution_kernel.h"
#include "launch.h"

namespace sign_fast {
namespace {

constexpr int64_t kChunk = 32;          // pixels of an item

// By shape alone, so that an image does not depend on its batch. Few input channels do not pay for the transforms.
// Upsampled inputs leave F(2×2) 9 products a tile, as many a pixel as F(4×4) has. Of images that tiles of 4×4 do not
// fit much would be padding, and where zeros cancel the error of F(4×4) is too large.
Algorithm choose(const ConvolutionShape& shape) {
  if (shape.kernel == 1 || shape.channels[0] + shape.channels[1] < 8) return Algorithm::Direct;
  const bool up = shape.resampling == Resampling::Up;
  return !up && prefers_winograd4(shape.height, shape.width) ? Algorithm::Winograd4 : Algorithm::Winograd2;
}

}  // namespace

float* align(float* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + kLine - 1) / kLine * kLine);
}

Resampling resampling_of(std::string_view name) {
  if (name == "none") return Resampling::None;
  if (name == "up") return Resampling::Up;
  TORCH_CHECK(name == "down", "resampling must be none, up or down");
  return Resampling::Down;
}

Algorithm algorithm_of(std::string_view name) {
  if (name.empty()) return Algorithm::Automatic;
  if (name == "direct") return Algorithm::Direct;
  if (name == "phases") return Algorithm::Phases;
  if (name == "winograd2") return Algorithm::Winograd2;
  TORCH_CHECK(name == "winograd4", "algorithm must be empty, direct, phases, winograd2 or winograd4");
  return Algorithm::Winograd4;
}

Filter dense_filter(const float* weight, const ConvolutionShape& shape) {
  const int64_t k = shape.kernel, in = shape.channels[0] + shape.channels[1];
  return {weight, {in * k * k, k * k, k, 1}};
}

void gather_filter(const Filter& weight, int64_t kernel, int64_t channels, int64_t first, int64_t count,
                   int64_t tap_step, int64_t channel_step, float* to) {
  const auto copy = [&](int64_t tap, int64_t c) {
    const int64_t step = weight.strides[0];
    const float* from = &weight(first, c, tap / kernel, tap % kernel);
    float* row = to + tap * tap_step + c * channel_step;
    if (step == 1) {
      std::copy_n(from, count, row);
    } else {
      for (int64_t o = 0; o < count; ++o) row[o] = from[o * step];
    }
  };
  // what lies next to each other in memory is read in turn
  if (weight.strides[1] < weight.strides[3]) {
    for (int64_t tap = 0; tap < kernel * kernel; ++tap)
      for (int64_t c = 0; c < channels; ++c) copy(tap, c);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < kernel * kernel; ++tap) copy(tap, c);
  }
}

AlignedFloats::AlignedFloats(int64_t size) : AlignedFloats(uninitialized(size)) { std::fill_n(data(), size, 0.f); }

AlignedFloats AlignedFloats::uninitialized(int64_t size) {
  AlignedFloats floats;
  floats.data_.reset(static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t(kLine))));
  floats.size_ = size;
  return floats;
}

void AlignedFloats::Free::operator()(float* p) const { ::operator delete(p, std::align_val_t(kLine)); }

PackedConvolution::PackedConvolution(const Filter& weight, const float* bias, const ConvolutionShape& shape,
                                     Algorithm algorithm)
    : shape_(shape), algorithm_(algorithm), vectors_((shape.out_channels + vector_size() - 1) / vector_size()) {
  TORCH_CHECK(shape.kernel == 1 || shape.kernel == 3, "the kernel must be 1×1 or 3×3");
  TORCH_CHECK(shape.channels[0] > 0 && shape.channels[1] >= 0 && shape.out_channels > 0, "there must be channels");
  TORCH_CHECK(shape.height > 0 && shape.width > 0, "there must be pixels");
  const bool even = shape.height % 2 == 0 && shape.width % 2 == 0;
  TORCH_CHECK(even || shape.resampling != Resampling::Up, "an upsampled image has even sides");
  const bool phases = shape.kernel == 3 && shape.resampling == Resampling::Up;
  if (algorithm == Algorithm::Automatic) algorithm_ = choose(shape);
  TORCH_CHECK(shape.kernel == 3 || !winograd(), "Winograd convolutions are 3×3");
  TORCH_CHECK(shape.resampling != Resampling::Up || algorithm_ != Algorithm::Winograd4,
              "upsampled inputs take winograd2: its products are as few and its error is smaller");
  TORCH_CHECK(phases || algorithm_ != Algorithm::Phases, "phases are those of a 3×3 convolution after upsampling");

  bias_ = AlignedFloats(vectors_ * vector_size());
  if (bias) std::copy_n(bias, shape.out_channels, bias_.data());
  for (int64_t y = 0; y < shape.height && even; ++y)
    for (int64_t x = 0; x < shape.width; ++x) residual_index_.push_back(y / 2 * (shape.width / 2) + x / 2);
  winograd() ? pack_winograd(weight) : pack_direct(weight);
}

void PackedConvolution::pack_direct(const Filter& weight) {
  const int64_t k = shape_.kernel, in = in_channels(), size = vector_size();
  const bool phases = algorithm_ == Algorithm::Phases, low = shape_.resampling == Resampling::Up && (phases || k == 1);
  const int64_t taps = phases ? 2 : k, depth = taps * taps * in;  // a side, in all
  weights_ = AlignedFloats((phases ? 4 : 1) * depth * vectors_ * size);
  float* to = weights_.data();
  for (int64_t i = 0; i < block_count(vectors_) && !phases; ++i) {
    const Block block = sign_fast::block(vectors_, i);
    const int64_t first = block.first * size, width = block.vectors * size;
    gather_filter(weight, k, in, first, std::min(width, shape_.out_channels - first), in * width, width, to);
    to += depth * width;
  }
  for (int64_t phase = 0; phase < 4 && phases; ++phase) {
    // taps i … of a side that one tap of phase 0 or 1 stands for: {0}, {1, 2} and {0, 1}, {2}
    const auto range = [&](int64_t side_phase, int64_t tap) -> std::pair<int64_t, int64_t> {
      return tap == 0 ? std::pair<int64_t, int64_t>{0, 1 + side_phase} : std::pair<int64_t, int64_t>{1 + side_phase, 3};
    };
    for (int64_t i = 0; i < block_count(vectors_); ++i) {
      const Block block = sign_fast::block(vectors_, i);
      for (int64_t row = 0; row < taps; ++row)
        for (int64_t column = 0; column < taps; ++column)
          for (int64_t c = 0; c < in; ++c)
            for (int64_t o = block.first * size; o < (block.first + block.vectors) * size; ++o, ++to) {
              if (o >= shape_.out_channels) continue;
              const auto [top, bottom] = range(phase / 2, row);
              const auto [left, right] = range(phase % 2, column);
              double sum = 0;
              for (int64_t y = top; y < bottom; ++y)
                for (int64_t x = left; x < right; ++x) sum += weight(o, c, y, x);
              *to = static_cast<float>(sum);
            }
    }
  }
  const int64_t height = low ? shape_.height / 2 : shape_.height, width = low ? shape_.width / 2 : shape_.width;
  if (k == 3)
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x) input_index_.push_back(y * (width + 2) + x);
  for (int64_t phase = 0; phase < 4 && low; ++phase)
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        output_index_.push_back((2 * y + phase / 2) * shape_.width + 2 * x + phase % 2);
}

int64_t PackedConvolution::scratch(int64_t batch) const {
  const int64_t divisor = algorithm_ == Algorithm::Phases ? 2 : 1, border = winograd() ? 0 : shape_.kernel / 2;
  if (border == 0 && shape_.resampling != Resampling::Down) return 0;
  return batch * (shape_.height / divisor + 2 * border) * (shape_.width / divisor + 2 * border) * in_channels();
}

int64_t PackedConvolution::workspace(int64_t batch, int threads) const {
  return scratch(batch) + (winograd() ? winograd_workspace(batch, threads) : 0) + 2 * kLine / sizeof(float);
}

int64_t PackedConvolution::bytes() const {
  const int64_t indices = input_index_.size() + output_index_.size() + residual_index_.size();
  return (weights_.size() + bias_.size() + zeros_.size() + indices) * 4;
}

void PackedConvolution::run(const ConvolutionArgs& args, float* workspace) const {
  if (args.batch == 0) return;
  winograd() ? run_winograd(args, align(workspace)) : run_direct(args, align(workspace));
}

void PackedConvolution::run_direct(const ConvolutionArgs& args, float* copied) const {
  static const auto copy = choose_convolution_copy();
  static const auto direct = choose_convolution_direct();
  const bool up = shape_.resampling == Resampling::Up, down = shape_.resampling == Resampling::Down;
  const bool phases = algorithm_ == Algorithm::Phases, low = up && (phases || shape_.kernel == 1);
  const int64_t height = low ? shape_.height / 2 : shape_.height, width = low ? shape_.width / 2 : shape_.width;
  const int64_t in = in_channels(), border = shape_.kernel / 2, pixels = height * width;

  DirectTask task{};
  if (scratch(args.batch) > 0) {
    CopyTask source{{args.x[0], args.x[1]}, {shape_.channels[0], shape_.channels[1]}, args.batch, height, width, border,
                    up && !low, down, copied};
    const int64_t size = scratch(args.batch);
    launch(source.items(), size, 2 * kCopyGrain, kCopyGrain,
           [&](int64_t begin, int64_t end, int) { copy(source, begin, end); });
    const int64_t row = (width + 2 * border) * in, taps = phases ? 2 : shape_.kernel;
    for (int64_t s = 0; s < taps; ++s)  // the taps of a row lie next to each other
      task.segments[s] = {copied + s * row, (height + 2 * border) * row, in, taps * in};
    task.segment_count = taps;
    task.phase_row = row, task.phase_column = in;
  } else {
    for (int64_t part = 0; part < 2 && shape_.channels[part] > 0; ++part) {
      const int64_t channels = shape_.channels[part];
      task.segments[task.segment_count++] = {args.x[part], pixels * channels, channels, channels};
    }
  }
  task.weights = weights_.data();
  task.depth = (phases ? 4 : shape_.kernel * shape_.kernel) * in;
  task.vectors = vectors_;
  task.input_index = input_index_.empty() ? nullptr : input_index_.data();
  task.output_index = output_index_.empty() ? nullptr : output_index_.data();
  task.batch = args.batch, task.pixels = pixels, task.chunk = kChunk;
  task.phases = phases ? 4 : 1;
  task.copies = low && !phases ? 4 : 1;
  task.to = {bias_.data(), args.residual, args.residual_up ? residual_index_.data() : nullptr,
             shape_.height * shape_.width / (args.residual_up ? 4 : 1), args.residual_scale, args.scale, args.y,
             shape_.height * shape_.width, shape_.out_channels};
  const int64_t work = args.batch * pixels * task.phases * task.depth * vectors_ * vector_size();
  launch(task.items(), work, kAlone, kGrain, [&](int64_t begin, int64_t end, int) { direct(task, begin, end); });
}

}  // namespace sign_fast
