// Random numbers that belong to an image: torch's own CPU generators, one stream a seed, without their overhead.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/MT19937RNGEngine.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <vector>

namespace pybind11 {
class module_;
}

namespace sign_fast {

class SeededNoise {
 public:
  explicit SeededNoise(const std::vector<uint64_t>& seeds);

  // Fill out[i], out a contiguous CPU tensor (number of seeds, …), with what torch.randn or torch.randint(low, high)
  // would draw next from torch.Generator().manual_seed(seeds[i]). Safe to call from several threads.
  void normal_(at::Tensor& out);
  void randint_(at::Tensor& out, int64_t low, int64_t high);

 private:
  // what a CPUGeneratorImpl holds
  struct Stream {
    at::mt19937 engine;
    std::optional<float> next_float_normal;
    std::optional<double> next_double_normal;
  };

  void fill(at::Tensor& out, const std::function<void(at::Tensor& image)>& draw);

  std::vector<Stream> streams_;
  at::Generator generator_;  // lent to one stream after the other: making one costs as much as the draws
  std::mutex mutex_;
};

void bind_seeded_noise(pybind11::module_& m);

}  // namespace sign_fast
