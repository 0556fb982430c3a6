// A program on the CPU in float32: kernels of this folder, one piece of memory planned ahead, no tensor in between.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <numeric>

#include "attention.h"
#include "group_norm_silu.h"
#include "memory.h"
#include "program.h"
#include "program_filter.h"

namespace sign_fast {
namespace {

using at::Tensor;

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
};

// Memory of one run: the buffers and the kernels' scratch.
struct Scratch {
  int64_t batch = 0;
  Tensor memory, workspace;
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
    const int64_t batch = check(x, rows);
    Scratch scratch = take(batch);
    float* input = at(scratch, 0);
    transpose_in(x.to(at::kFloat).contiguous(), input, 1.f);
    execute(scratch, rows);
    const Buffer& shape = buffers_[output_];
    Tensor y = at::empty({batch, shape.channels, shape.height, shape.width},
                         x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::ChannelsLast));
    std::copy_n(at(scratch, output_), y.numel(), y.data_ptr<float>());
    give_back(std::move(scratch));
    return y;
  }

  Tensor denoise(const Tensor& x, const Tensor& rows, const Tensor& coefficients) override {
    const int64_t batch = check(x, rows);
    TORCH_CHECK(coefficients.numel() == 3 && coefficients.scalar_type() == at::kFloat && coefficients.is_contiguous(),
                "coefficients must be c_skip, c_out, c_in in float32");
    const float* c = coefficients.const_data_ptr<float>();
    const Tensor state = x.to(at::kFloat).contiguous();
    Scratch scratch = take(batch);
    transpose_in(state, at(scratch, 0), c[2]);
    execute(scratch, rows);
    const Buffer& shape = buffers_[output_];
    Tensor y = at::empty_like(state);
    const float *f = at(scratch, output_), *from = state.const_data_ptr<float>();
    float* to = y.data_ptr<float>();
    const int64_t pixels = shape.height * shape.width;
    for (int64_t b = 0; b < batch; ++b, f += shape.size())
      for (int64_t channel = 0; channel < shape.channels; ++channel)
        for (int64_t p = 0; p < pixels; ++p, ++from, ++to) *to = c[0] * *from + c[1] * f[p * shape.channels + channel];
    give_back(std::move(scratch));
    return y;
  }

  int64_t bytes() const override {
    int64_t sum = 0;
    for (const Native& o : operations_)
      if (o.convolution) sum += o.convolution->bytes();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (spare_.batch) sum += 4 * (spare_.memory.numel() + spare_.workspace.numel());
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
  Scratch spare_;  // of the last run: another batch size, or a second thread, brings its own

  void add(const Operation& operation, const std::vector<Tensor>& constants, bool consume) {
    Native native{operation, nullptr};
    const auto keep = [&](int64_t index) {
      if (index != kNone) constants_[index] = constants[index].contiguous();
    };
    if (const auto* o = std::get_if<ConvolutionOperation>(&operation)) {
      const Tensor weight = constants[o->weight].contiguous();
      const int64_t kernel = weight.size(2);
      TORCH_CHECK(kernel == 1 || kernel == 3, "convolutions are 1×1 or 3×3 here, not ", kernel);
      if (o->padding == kernel / 2) {
        const Buffer& out = buffers_[o->output];
        const bool two = o->inputs.size() == 2;
        const ConvolutionShape shape{{buffers_[o->inputs[0]].channels, two ? buffers_[o->inputs[1]].channels : 0},
                                     out.channels,
                                     kernel,
                                     out.height,
                                     out.width,
                                     o->resampling};
        const Tensor bias = o->bias == kNone ? Tensor() : constants[o->bias].contiguous();
        native.convolution = std::make_unique<PackedConvolution>(
            weight.const_data_ptr<float>(), bias.defined() ? bias.const_data_ptr<float>() : nullptr, shape);
        if (consume) {
          const auto bytes = static_cast<int64_t>(weight.nbytes());
          constants[o->weight].set_data(at::empty({0}, weight.options()));
          freed_.add(bytes);
        }
      } else {
        keep(o->weight), keep(o->bias);
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

  int64_t check(const Tensor& x, const Tensor& rows) const {
    const Buffer& in = buffers_[0];
    TORCH_CHECK(x.dim() == 4 && x.size(1) == in.channels && x.size(2) == in.height && x.size(3) == in.width,
                "images must be (B, ", in.channels, ", ", in.height, ", ", in.width, "), not ", x.sizes());
    TORCH_CHECK(x.is_cpu() && rows.is_cpu(), "the native program runs on the CPU");
    TORCH_CHECK(rows.dim() == 2 && rows.size(1) == width_ && (rows.size(0) == 1 || rows.size(0) == x.size(0)) &&
                    rows.scalar_type() == at::kFloat && rows.is_contiguous(),
                "rows must be contiguous (1 or B, ", width_, ") float32");
    return x.size(0);
  }

  Scratch take(int64_t batch) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (spare_.batch == batch) return std::exchange(spare_, Scratch{});
      spare_ = {};  // before the new one is allocated: never two at a time
    }
    int64_t workspace = 0;
    for (const Native& native : operations_) {
      if (native.convolution)
        workspace = std::max(workspace, native.convolution->workspace(batch, at::get_num_threads()));
      if (const auto* o = std::get_if<AttentionOperation>(&native.operation)) {
        const Buffer& out = buffers_[o->output];
        workspace = std::max(workspace, attention_workspace(out.height * out.width, out.channels / o->heads,
                                                            at::get_num_threads()));
      }
    }
    const auto options = at::TensorOptions().dtype(at::kFloat);
    return {batch, at::empty({layout_.size * batch}, options), at::empty({workspace}, options)};
  }

  void give_back(Scratch scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    spare_ = std::move(scratch);
  }

  float* at(const Scratch& scratch, int64_t buffer) const {
    return scratch.memory.data_ptr<float>() + layout_.offsets[buffer] * scratch.batch;
  }

  const float* constant(int64_t index) const {
    return index == kNone ? nullptr : constants_[index].const_data_ptr<float>();
  }

  // (B, C, H, W) contiguous -> factor·x, pixel by pixel
  void transpose_in(const Tensor& x, float* to, float factor) const {
    const float* from = x.const_data_ptr<float>();
    const Buffer& shape = buffers_[0];
    const int64_t pixels = shape.height * shape.width;
    for (int64_t b = 0; b < x.size(0); ++b, from += shape.size())
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < shape.channels; ++c) *to++ = factor * from[c * pixels + p];
  }

  void execute(const Scratch& scratch, const Tensor& rows) const {
    if (scratch.batch == 0) return;
    for (const Native& native : operations_)
      std::visit([&](const auto& o) { apply(native, o, scratch, rows); }, native.operation);
  }

  void apply(const Native& native, const ConvolutionOperation& o, const Scratch& scratch, const Tensor&) const {
    if (native.convolution) {
      ConvolutionArgs args{};
      for (size_t i = 0; i < o.inputs.size(); ++i) args.x[i] = at(scratch, o.inputs[i]);
      args.batch = scratch.batch;
      args.residual = o.residual == kNone ? nullptr : at(scratch, o.residual);
      args.residual_up = o.residual_up;
      args.residual_scale = static_cast<float>(o.residual_scale);
      args.scale = static_cast<float>(o.scale);
      args.y = at(scratch, o.output);
      native.convolution->run(args, scratch.workspace.data_ptr<float>());
      return;
    }
    TORCH_CHECK(o.inputs.size() == 1 && o.resampling == Resampling::None, "unusual padding of an unusual convolution");
    padded_convolution(view(scratch, o.inputs[0]), constants_[o.weight], optional(o.bias), o.padding,
                       residual(scratch, o.residual), o.scale, view(scratch, o.output));
  }

  void apply(const Native&, const FilterOperation& o, const Scratch& scratch, const Tensor&) const {
    filter(view(scratch, o.input), constants_[o.filter], o.up, o.padding, optional(o.bias),
           residual(scratch, o.residual), o.scale, view(scratch, o.output));
  }

  void apply(const Native&, const NormOperation& o, const Scratch& scratch, const Tensor& rows) const {
    GroupNormArgs args{};
    describe(args, o.inputs, o.groups, o.eps, o.weight, o.bias, o.silu, scratch);
    const auto column = [&](const Columns& columns, const float*& data, int64_t& row) {
      if (!columns) return;
      data = rows.const_data_ptr<float>() + columns.start;
      row = rows.size(0) == 1 ? 0 : width_;
    };
    column(o.emb, args.emb, args.emb_row);
    column(o.scale, args.scale, args.scale_row);
    column(o.shift, args.shift, args.shift_row);
    args.input_bias = constant(o.input_bias);
    args.y = at(scratch, o.output);
    norm(args);
  }

  void apply(const Native&, const JoinNormOperation& o, const Scratch& scratch, const Tensor&) const {
    GroupNormArgs args{};
    describe(args, {o.input}, o.groups, o.eps, o.weight, o.bias, o.silu, scratch);
    args.skip = at(scratch, o.skip);
    args.join_bias = constant(o.join_bias);
    args.skip_scale = static_cast<float>(o.skip_scale);
    args.r = at(scratch, o.sum);
    args.y = at(scratch, o.output);
    norm(args);
  }

  void apply(const Native&, const AttentionOperation& o, const Scratch& scratch, const Tensor&) const {
    const Buffer& out = buffers_[o.output];
    attention(at(scratch, o.input), scratch.batch, out.height * out.width, o.heads, out.channels / o.heads,
              at(scratch, o.output), scratch.workspace.data_ptr<float>());
  }

  void describe(GroupNormArgs& args, const std::vector<int64_t>& inputs, int64_t groups, double eps, int64_t weight,
                int64_t bias, bool silu, const Scratch& scratch) const {
    const Buffer& first = buffers_[inputs[0]];
    args.x = at(scratch, inputs[0]);
    args.batch = scratch.batch;
    args.first_channels = args.channels = first.channels;
    if (inputs.size() == 2) {
      args.x2 = at(scratch, inputs[1]);
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
    const Plan plan = make_plan(args);
    at::parallel_for(0, plan.items, std::max<int64_t>(1, grain / plan.elements_per_item),
                     [&](int64_t begin, int64_t end) {
                       const auto work = std::make_unique_for_overwrite<double[]>(plan.work);
                       kernel(args, plan, begin, end, work.get());
                     });
  }

  Tensor view(const Scratch& scratch, int64_t buffer) const {
    const Buffer& b = buffers_[buffer];
    const auto options = at::TensorOptions().dtype(at::kFloat);
    return at::from_blob(at(scratch, buffer), {scratch.batch, b.height, b.width, b.channels}, options)
        .permute({0, 3, 1, 2});
  }

  std::optional<Tensor> residual(const Scratch& scratch, int64_t buffer) const {
    return buffer == kNone ? std::nullopt : std::optional<Tensor>(view(scratch, buffer));
  }

  std::optional<Tensor> optional(int64_t index) const {
    return index == kNone ? std::nullopt : std::optional<Tensor>(constants_[index]);
  }
};

}  // namespace

std::unique_ptr<Executor> native_executor(const ProgramData& data, bool consume) {
  return std::make_unique<NativeExecutor>(data, consume);
}

}  // namespace sign_fast
