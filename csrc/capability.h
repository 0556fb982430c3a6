// One kernel file, three instruction sets: setup.py compiles each csrc/*_kernel.cpp once a CPU capability and defines
// SIGN_FAST_CAPABILITY. Everything else in such a file must have internal linkage or be inlined: a function shared with
// another object could be linked from here and run on a CPU without these instructions.
#pragma once

#define SIGN_FAST_JOIN_(a, b) a##_##b
#define SIGN_FAST_JOIN(a, b) SIGN_FAST_JOIN_(a, b)

// the name under which a kernel file defines its entry point
#define SIGN_FAST_ENTRY(name) SIGN_FAST_JOIN(name, SIGN_FAST_CAPABILITY)

// declares the three entry points of type `type` and choose_<name>(), which picks one for this CPU
#define SIGN_FAST_DECLARE_KERNEL(name, result, ...)           \
  result name##_DEFAULT(__VA_ARGS__);                         \
  result name##_AVX2(__VA_ARGS__);                            \
  result name##_AVX512(__VA_ARGS__);                          \
  inline auto choose_##name() -> result (*)(__VA_ARGS__) {    \
    switch (::sign_fast::capability()) {                      \
      case ::sign_fast::Capability::AVX512:                   \
        return name##_AVX512;                                 \
      case ::sign_fast::Capability::AVX2:                     \
        return name##_AVX2;                                   \
      default:                                                \
        return name##_DEFAULT;                                \
    }                                                         \
  }

namespace sign_fast {

enum class Capability { DEFAULT, AVX2, AVX512 };

// What this CPU has; ATEN_CPU_CAPABILITY=default or avx2 limits it as it limits torch's own kernels.
Capability capability();

}  // namespace sign_fast
