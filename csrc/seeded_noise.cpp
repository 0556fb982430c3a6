#include "seeded_noise.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/normal_cpu_dispatch.h>
#include <ATen/ops/random_cpu_dispatch.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>

namespace py = pybind11;

namespace sign_fast {
namespace {

constexpr int N = at::MERSENNE_STATE_N, M = at::MERSENNE_STATE_M;
constexpr int LANES = 8;  // seeds at a time: one seed's words depend on each other, and a multiplication takes long

uint32_t twist(uint32_t u, uint32_t v) {
  const uint32_t mixed = (u & at::UMASK) | (v & at::LMASK);
  return (mixed >> 1) ^ (-(v & 1) & at::MATRIX_A);
}

// The state from which the engine reads its first N words: mt19937's own, in loops the compiler makes vectors of.
void first_words(const uint32_t* seeded, uint32_t* words) {
  for (int j = 0; j < N - M; ++j) words[j] = seeded[j + M] ^ twist(seeded[j], seeded[j + 1]);
  for (int j = N - M; j < 2 * (N - M); ++j) words[j] = words[j - (N - M)] ^ twist(seeded[j], seeded[j + 1]);
  for (int j = 2 * (N - M); j < N - 1; ++j) words[j] = words[j - (N - M)] ^ twist(seeded[j], seeded[j + 1]);
  words[N - 1] = words[M - 1] ^ twist(seeded[N - 1], words[0]);
}

// The states of LANES engines seeded as at::mt19937(seed) seeds them.
void seed_states(const uint32_t* seeds, uint32_t states[LANES][N]) {
  uint32_t last[LANES];
  for (int lane = 0; lane < LANES; ++lane) states[lane][0] = last[lane] = seeds[lane];
  for (uint32_t j = 1; j < N; ++j) {
    for (int lane = 0; lane < LANES; ++lane) {
      last[lane] = 1812433253u * (last[lane] ^ (last[lane] >> 30)) + j;
      states[lane][j] = last[lane];
    }
  }
}

}  // namespace

SeededNoise::SeededNoise(const std::vector<uint64_t>& seeds) : generator_(at::detail::createCPUGenerator()) {
  static const at::mt19937 any_engine;
  streams_.assign(seeds.size(), Stream{any_engine, {}, {}});
  uint32_t states[LANES][N], lanes[LANES] = {};
  at::mt19937_data_pod data;
  for (size_t start = 0; start < seeds.size(); start += LANES) {
    const size_t count = std::min<size_t>(LANES, seeds.size() - start);
    for (size_t i = 0; i < count; ++i) lanes[i] = static_cast<uint32_t>(seeds[start + i]);
    seed_states(lanes, states);
    for (size_t i = 0; i < count; ++i) {
      first_words(states[i], data.state_.data());
      data.seed_ = seeds[start + i];
      data.seeded_ = true;
      data.left_ = N + 1;  // counted down before the first word is read
      data.next_ = 0;
      streams_[start + i].engine.set_data(data);
    }
  }
}

void SeededNoise::fill(at::Tensor& out, const std::function<void(at::Tensor&)>& draw) {
  const auto count = static_cast<int64_t>(streams_.size());
  TORCH_CHECK_VALUE(out.dim() > 0 && out.size(0) == count, "the first size must be the number of seeds, ", count);
  TORCH_CHECK_VALUE(out.is_cpu() && out.is_contiguous(), "a contiguous tensor on the CPU is needed");
  if (out.numel() == 0) return;
  const std::lock_guard<std::mutex> guard(mutex_);
  auto* generator = at::check_generator<at::CPUGeneratorImpl>(generator_);
  at::Tensor image = at::empty({out.numel() / count}, out.options());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (Stream& stream : streams_) {
    generator->set_engine(stream.engine);
    generator->set_next_float_normal_sample(stream.next_float_normal);
    generator->set_next_double_normal_sample(stream.next_double_normal);
    draw(image);
    std::memcpy(to, image.const_data_ptr(), image.nbytes());
    to += image.nbytes();
    stream.engine = generator->engine();
    stream.next_float_normal = generator->next_float_normal_sample();
    stream.next_double_normal = generator->next_double_normal_sample();
  }
}

void SeededNoise::normal_(at::Tensor& out) {
  fill(out, [&](at::Tensor& image) { at::cpu::normal_(image, 0, 1, generator_); });
}

void SeededNoise::randint_(at::Tensor& out, int64_t low, int64_t high) {
  fill(out, [&](at::Tensor& image) { at::cpu::random_(image, low, high, generator_); });
}

void bind_seeded_noise(py::module_& m) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<SeededNoise>(m, "SeededNoise", "One torch CPU generator a seed.")
      .def(py::init<const std::vector<uint64_t>&>(), py::arg("seeds"), released)
      .def("normal_", &SeededNoise::normal_, py::arg("out"), released)
      .def("randint_", &SeededNoise::randint_, py::arg("out"), py::arg("low"), py::arg("high"), released);
}

}  // namespace sign_fast
