// sign_fast._C: loading it registers the CPU kernels of every csrc/*.cpp with torch's dispatcher.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string_view>

#include "capability.h"
#include "sampler_loop.h"
#include "seeded_noise.h"

namespace sign_fast {

void bind_generation(pybind11::module_& m);
void bind_program(pybind11::module_& m);

Capability capability() {
  static const Capability chosen = [] {
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view most = limit ? limit : "";
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    if (avx512 && most != "default" && most != "avx2") return Capability::AVX512;
    if (avx2 && most != "default") return Capability::AVX2;
    return Capability::DEFAULT;
  }();
  return chosen;
}

}  // namespace sign_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "sign_fast in C++: CPU kernels, registered as torch.ops.sign_fast.*, the sampler loop and seeded noise";
  m.def(
      "capability",
      [] {
        switch (sign_fast::capability()) {
          case sign_fast::Capability::AVX512:
            return "AVX512";
          case sign_fast::Capability::AVX2:
            return "AVX2";
          default:
            return "DEFAULT";
        }
      },
      "The instruction set chosen here: DEFAULT, AVX2 or AVX512.");
  sign_fast::bind_program(m);
  sign_fast::bind_generation(m);
  sign_fast::bind_sampler_loop(m);
  sign_fast::bind_seeded_noise(m);
}
