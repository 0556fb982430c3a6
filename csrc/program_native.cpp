// A program on the CPU in float32: kernels of this folder, one piece of memory planned ahead, no tensor in between.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/resolve_neg.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "attention.h"
#include "group_norm_silu.h"
#include "memory.h"
#include "program.h"
#include "program_filter.h"

namespace sign_fast {
namespace {

using at::Tensor;

// Of all buffers together; more images than fit in are run in parts. Larger parts are slower: they leave the cache.
constexpr int64_t kFloats = 8 << 20;

// Where each buffer lies, in elements of an image: buffers that live at different times share memory.
struct Layout {
  std::vector<int64_t> offsets;
  int64_t size = 0;

  explicit Layout(const ProgramData& data) : offsets(data.buffers.size(), 0) {
    struct Life {
      int64_t buffer, size, start, end;
    };
    std::vector<Life> lives;
    const auto steps = static_cast<int64_t>(data.operations.size());
    for (size_t b = 0; b < data.buffers.size(); ++b)
      lives.push_back({static_cast<int64_t>(b), aligned(data.buffers[b].size()), kNone, steps});
    for (int64_t i = 0; i < steps; ++i)
      for (int64_t b : outputs_of(data.operations[i])) lives[b].start = i;
    const auto uses = data.last_uses();
    for (int64_t i = 0; i < steps; ++i)
      for (int64_t b : uses[i]) lives[b].end = i;

    // the largest first, each at the lowest place that is free while it lives
    std::stable_sort(lives.begin(), lives.end(), [](const Life& a, const Life& b) { return a.size > b.size; });
    std::vector<Life> placed;
    for (const Life& life : lives) {
      std::vector<std::pair<int64_t, int64_t>> taken;
      for (const Life& other : placed)
        if (other.start <= life.end && life.start <= other.end)
          taken.emplace_back(offsets[other.buffer], offsets[other.buffer] + other.size);
      std::sort(taken.begin(), taken.end());
      int64_t place = 0;
      for (const auto& [from, to] : taken) {
        if (place + life.size <= from) break;
        place = std::max(place, to);
      }
      offsets[life.buffer] = place;
      size = std::max(size, place + life.size);
      placed.push_back(life);
    }
  }

  static int64_t aligned(int64_t elements) { return (elements + 15) / 16 * 16; }
};

struct Native {
  Operation operation;
  std::unique_ptr<PackedConvolution> convolution;
  int64_t border = 0;  // of zeros around the input, besides the convolution's own
};

// The buffers and the kernels' scratch, for up to so many images and threads.
struct Memory {
  int64_t images = 0;
  int threads = 0;
  Tensor buffers, workspace;
};

// What the operations of one run work on.
struct Run {
  float *buffers, *workspace;
  int64_t batch;
  const float* rows;
  int64_t row;  // from one image's row to the next: 0 where they share one
};

class NativeExecutor final : public Executor {
 public:
  NativeExecutor(const ProgramData& data, bool consume)
      : buffers_(data.buffers), layout_(data), output_(data.output), width_(data.width) {
    for (const Tensor& t : data.constants)
      TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kFloat, "the native program takes float32 constants on the CPU");
    // weights are packed and their tensors not kept: only one copy stays
    constants_.resize(data.constants.size());
    for (const Operation& operation : data.operations) add(operation, data.constants, consume);
  }

  Tensor run(const Tensor& x, const Tensor& rows) override {
    check(x, rows);
    const Tensor images = plain(x);
    const Buffer& shape = buffers_[output_];
    Tensor y = at::empty({x.size(0), shape.channels, shape.height, shape.width},
                         images.options().memory_format(at::MemoryFormat::ChannelsLast));
    float* to = y.data_ptr<float>();
    in_parts(images, rows, 1.f, [&](int64_t first, int64_t count, const float* f) {
      std::copy_n(f, count * shape.size(), to + first * shape.size());
    });
    return y;
  }

  Tensor denoise(const Tensor& x, const Tensor& rows, const Tensor& coefficients) override {
    check(x, rows);
    TORCH_CHECK(coefficients.numel() == 3 && coefficients.is_cpu() && coefficients.scalar_type() == at::kFloat &&
                    coefficients.is_contiguous(),
                "coefficients must be c_skip, c_out, c_in in float32 on the CPU");
    const Buffer& shape = buffers_[output_];
    TORCH_CHECK(shape.size() == buffers_[0].size(), "a denoiser's output has the shape of its input");
    const float* c = coefficients.const_data_ptr<float>();
    const Tensor images = plain(x);
    Tensor y = at::empty_like(images);
    float* result = y.data_ptr<float>();
    const int64_t pixels = shape.height * shape.width;
    in_parts(images, rows, c[2], [&](int64_t first, int64_t count, const float* f) {
      const float* from = images.const_data_ptr<float>() + first * shape.size();
      float* to = result + first * shape.size();
      for (int64_t b = 0; b < count; ++b, f += shape.size())
        for (int64_t channel = 0; channel < shape.channels; ++channel)
          for (int64_t p = 0; p < pixels; ++p, ++from, ++to)
            *to = c[0] * *from + c[1] * f[p * shape.channels + channel];
    });
    return y;
  }

  int64_t bytes() const override {
    int64_t sum = 0;
    for (const Native& o : operations_)
      if (o.convolution) sum += o.convolution->bytes();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (spare_.images) sum += 4 * (spare_.buffers.numel() + spare_.workspace.numel());
    return sum;
  }

 private:
  std::vector<Buffer> buffers_;
  Layout layout_;
  int64_t output_, width_;
  std::vector<Tensor> constants_;
  std::vector<Native> operations_;
  FreedMemory freed_;
  mutable std::mutex mutex_;
  Memory spare_;  // of the last run; a second thread brings its own

  void add(const Operation& operation, const std::vector<Tensor>& constants, bool consume) {
    Native native{operation, nullptr};
    const auto keep = [&](int64_t index) {
      if (index != kNone) constants_[index] = constants[index].contiguous();
    };
    if (const auto* o = std::get_if<ConvolutionOperation>(&operation)) {
      const Tensor weight = constants[o->weight].contiguous();
      const int64_t kernel = weight.size(2);
      TORCH_CHECK(kernel == 1 || kernel == 3, "convolutions are 1×1 or 3×3 here, not ", kernel);
      native.border = o->padding - kernel / 2;
      const bool two = o->inputs.size() == 2;
      TORCH_CHECK(native.border == 0 || (native.border > 0 && !two && o->resampling == Resampling::None),
                  "a padding of ", o->padding, " is not supported for this convolution");
      const Buffer& out = buffers_[o->output];
      const ConvolutionShape shape{{buffers_[o->inputs[0]].channels, two ? buffers_[o->inputs[1]].channels : 0},
                                   out.channels,
                                   kernel,
                                   out.height,
                                   out.width,
                                   o->resampling};
      const Tensor bias = o->bias == kNone ? Tensor() : constants[o->bias].contiguous();
      native.convolution = std::make_unique<PackedConvolution>(
          dense_filter(weight.const_data_ptr<float>(), shape), bias.defined() ? bias.const_data_ptr<float>() : nullptr, shape);
      if (consume) {
        const auto bytes = static_cast<int64_t>(weight.nbytes());
        constants[o->weight].set_data(at::empty({0}, weight.options()));
        freed_.add(bytes);
      }
    } else if (const auto* o = std::get_if<FilterOperation>(&operation)) {
      keep(o->filter), keep(o->bias);
    } else if (const auto* o = std::get_if<NormOperation>(&operation)) {
      keep(o->weight), keep(o->bias), keep(o->input_bias);
    } else if (const auto* o = std::get_if<JoinNormOperation>(&operation)) {
      keep(o->weight), keep(o->bias), keep(o->join_bias);
    }
    operations_.push_back(std::move(native));
  }

  void check(const Tensor& x, const Tensor& rows) const {
    const Buffer& in = buffers_[0];
    TORCH_CHECK(x.dim() == 4 && x.size(1) == in.channels && x.size(2) == in.height && x.size(3) == in.width,
                "images must be (B, ", in.channels, ", ", in.height, ", ", in.width, "), not ", x.sizes());
    TORCH_CHECK(x.is_cpu() && rows.is_cpu(), "the native program runs on the CPU");
    TORCH_CHECK(rows.dim() == 2 && rows.size(1) == width_ && (rows.size(0) == 1 || rows.size(0) == x.size(0)) &&
                    rows.scalar_type() == at::kFloat && rows.is_contiguous(),
                "rows must be contiguous (1 or B, ", width_, ") float32");
  }

  // (B, C, H, W) dense, float32
  static Tensor plain(const Tensor& x) { return x.to(at::kFloat).resolve_neg().contiguous(); }

  Memory take(int64_t images) {
    const int threads = at::get_num_threads();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (spare_.images >= images && spare_.threads >= threads) return std::exchange(spare_, {});
      spare_ = {};  // before the new one is allocated: never two at a time
    }
    int64_t workspace = 0;
    for (const Native& native : operations_) {
      if (native.convolution)
        workspace = std::max(workspace, native.convolution->workspace(images, threads) + images * bordered(native));
      if (const auto* o = std::get_if<AttentionOperation>(&native.operation)) {
        const Buffer& out = buffers_[o->output];
        workspace = std::max(workspace, attention_workspace(out.height * out.width, out.channels / o->heads, threads));
      }
    }
    const auto options = at::TensorOptions().dtype(at::kFloat);
    return {images, threads, at::empty({layout_.size * images}, options), at::empty({workspace}, options)};
  }

  // floats of an image with the border that a convolution wants around it, 0 without
  int64_t bordered(const Native& native) const {
    if (native.border == 0) return 0;
    const auto& o = std::get<ConvolutionOperation>(native.operation);
    return buffers_[o.inputs[0]].channels * buffers_[o.output].height * buffers_[o.output].width;
  }

  void give_back(Memory memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (memory.images >= spare_.images) spare_ = std::move(memory);
  }

  // Runs all images, as many at a time as memory allows: use(first, count, F of these images, pixel by pixel).
  template <typename Use>
  void in_parts(const Tensor& x, const Tensor& rows, float factor, const Use& use) {
    const int64_t batch = x.size(0), most = std::max<int64_t>(1, kFloats / layout_.size);
    if (batch == 0) return;
    const int64_t parts = (batch + most - 1) / most, images = (batch + parts - 1) / parts;
    Memory memory = take(images);
    const int64_t row = rows.size(0) == 1 ? 0 : width_;
    for (int64_t first = 0; first < batch; first += images) {
      const int64_t count = std::min(images, batch - first);
      const Run run{memory.buffers.data_ptr<float>(), memory.workspace.data_ptr<float>(), count,
                    rows.const_data_ptr<float>() + first * row, row};
      transpose_in(x.const_data_ptr<float>() + first * buffers_[0].size(), factor, run);
      for (const Native& native : operations_)
        std::visit([&](const auto& o) { apply(native, o, run); }, native.operation);
      use(first, count, at(run, output_));
    }
    give_back(std::move(memory));
  }

  float* at(const Run& run, int64_t buffer) const { return run.buffers + layout_.offsets[buffer] * run.batch; }

  const float* constant(int64_t index) const {
    return index == kNone ? nullptr : constants_[index].const_data_ptr<float>();
  }

  // (B, C, H, W) dense -> factor·x, pixel by pixel, as the first buffer
  void transpose_in(const float* from, float factor, const Run& run) const {
    const Buffer& shape = buffers_[0];
    const int64_t pixels = shape.height * shape.width;
    float* to = at(run, 0);
    for (int64_t b = 0; b < run.batch; ++b, from += shape.size())
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < shape.channels; ++c) *to++ = factor * from[c * pixels + p];
  }

  void apply(const Native& native, const ConvolutionOperation& o, const Run& run) const {
    ConvolutionArgs args{};
    for (size_t i = 0; i < o.inputs.size(); ++i) args.x[i] = at(run, o.inputs[i]);
    if (native.border > 0) {
      const Buffer& in = buffers_[o.inputs[0]];
      pad(args.x[0], run.batch, in.height, in.width, in.channels, native.border, run.workspace);
      args.x[0] = run.workspace;
    }
    args.batch = run.batch;
    args.residual = o.residual == kNone ? nullptr : at(run, o.residual);
    args.residual_up = o.residual_up;
    args.residual_scale = static_cast<float>(o.residual_scale);
    args.scale = static_cast<float>(o.scale);
    args.y = at(run, o.output);
    native.convolution->run(args, run.workspace + run.batch * bordered(native));
  }

  void apply(const Native&, const FilterOperation& o, const Run& run) const {
    const Buffer &in = buffers_[o.input], &out = buffers_[o.output];
    filter({at(run, o.input), run.batch, in.height, in.width, in.channels, constant(o.filter),
            constants_[o.filter].size(0), o.padding, o.up, constant(o.bias),
            o.residual == kNone ? nullptr : at(run, o.residual), static_cast<float>(o.scale), at(run, o.output),
            out.height, out.width});
  }

  void apply(const Native&, const NormOperation& o, const Run& run) const {
    GroupNormArgs args{};
    describe(args, o.inputs, o.groups, o.eps, o.weight, o.bias, o.silu, run);
    const auto column = [&](const Columns& columns, const float*& data, int64_t& row) {
      if (!columns) return;
      data = run.rows + columns.start;
      row = run.row;
    };
    column(o.emb, args.emb, args.emb_row);
    column(o.scale, args.scale, args.scale_row);
    column(o.shift, args.shift, args.shift_row);
    args.input_bias = constant(o.input_bias);
    args.y = at(run, o.output);
    norm(args);
  }

  void apply(const Native&, const JoinNormOperation& o, const Run& run) const {
    GroupNormArgs args{};
    describe(args, {o.input}, o.groups, o.eps, o.weight, o.bias, o.silu, run);
    args.skip = at(run, o.skip);
    args.join_bias = constant(o.join_bias);
    args.skip_scale = static_cast<float>(o.skip_scale);
    args.r = at(run, o.sum);
    args.y = at(run, o.output);
    norm(args);
  }

  void apply(const Native&, const AttentionOperation& o, const Run& run) const {
    const Buffer& out = buffers_[o.output];
    attention(at(run, o.input), run.batch, out.height * out.width, o.heads, out.channels / o.heads,
              at(run, o.output), run.workspace);
  }

  void describe(GroupNormArgs& args, const std::vector<int64_t>& inputs, int64_t groups, double eps, int64_t weight,
                int64_t bias, bool silu, const Run& run) const {
    const Buffer& first = buffers_[inputs[0]];
    args.x = at(run, inputs[0]);
    args.batch = run.batch;
    args.first_channels = args.channels = first.channels;
    if (inputs.size() == 2) {
      args.x2 = at(run, inputs[1]);
      args.channels += buffers_[inputs[1]].channels;
    }
    args.pixels = first.height * first.width;
    args.groups = groups;
    args.eps = eps;
    args.weight = constant(weight);
    args.bias = constant(bias);
    args.silu = silu;
    args.channels_last = true;
    args.dtype = Dtype::Float;
  }

  static void norm(const GroupNormArgs& args) {
    static const auto kernel = choose_group_norm_silu();
    constexpr int64_t grain = 16384;  // elements below which a second thread does not pay
    const NormPlan plan = make_plan(args);
    at::parallel_for(0, plan.items, std::max<int64_t>(1, grain / plan.elements_per_item),
                     [&](int64_t begin, int64_t end) {
                       const auto work = std::make_unique_for_overwrite<double[]>(plan.work);
                       kernel(args, plan, begin, end, work.get());
                     });
  }
};

}  // namespace

std::unique_ptr<Executor> native_executor(const ProgramData& data, bool consume) {
  return std::make_unique<NativeExecutor>(data, consume);
}

}  // namespace sign_fast
