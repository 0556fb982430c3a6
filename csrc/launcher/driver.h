// The CUDA driver library: opened at first use, never linked, none of its headers needed. Knows nothing of Python.
#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <stdexcept>
#include <string>

namespace sign_fast {

// A call of the driver that failed: CUresult and function, or 0 and what is wrong with the library itself.
struct DriverFailure : std::runtime_error {
  DriverFailure(const std::string& message, int code, std::string function)
      : std::runtime_error(message), code(code), function(std::move(function)) {}

  int code;
  std::string function;
};

using Context = struct ContextOfTheDriver*;
using Module = struct ModuleOfTheDriver*;
using Function = struct FunctionOfTheDriver*;
using Stream = struct StreamOfTheDriver*;

constexpr int DYNAMIC_SHARED_BYTES = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int PREFER_SHARED = 1;         // CU_FUNC_CACHE_PREFER_SHARED
constexpr int RELAXED = 2;               // CU_STREAM_CAPTURE_MODE_RELAXED

// (name, symbol, parameters): the symbols are the versions that CUDA 12's headers map the names to
#define SIGN_FAST_DRIVER_FUNCTIONS(F)                                                                              \
  F(cuDriverGetVersion, cuDriverGetVersion, int*)                                                                  \
  F(cuInit, cuInit, unsigned)                                                                                      \
  F(cuGetErrorName, cuGetErrorName, int, const char**)                                                             \
  F(cuGetErrorString, cuGetErrorString, int, const char**)                                                         \
  F(cuDeviceGet, cuDeviceGet, int*, int)                                                                           \
  F(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, Context*, int)                                             \
  F(cuCtxGetCurrent, cuCtxGetCurrent, Context*)                                                                    \
  F(cuCtxPushCurrent, cuCtxPushCurrent_v2, Context)                                                                \
  F(cuCtxPopCurrent, cuCtxPopCurrent_v2, Context*)                                                                 \
  F(cuModuleLoadData, cuModuleLoadData, Module*, const void*)                                                      \
  F(cuModuleUnload, cuModuleUnload, Module)                                                                        \
  F(cuModuleGetFunction, cuModuleGetFunction, Function*, Module, const char*)                                      \
  F(cuFuncSetAttribute, cuFuncSetAttribute, Function, int, int)                                                    \
  F(cuFuncSetCacheConfig, cuFuncSetCacheConfig, Function, int)                                                     \
  F(cuThreadExchangeStreamCaptureMode, cuThreadExchangeStreamCaptureMode, int*)                                    \
  F(cuLaunchKernel, cuLaunchKernel, Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
    Stream, void**, void**)

class Driver {
 public:
  explicit Driver(std::string library) : library_(std::move(library)) {}

  // The CUDA version that the driver supports, 12080 for 12.8. Opens the library.
  int version();

  // Opens the library and initialises CUDA, both once; has to come before the functions below.
  void start();

  // Throws in a child of a process that had opened the library: CUDA does not survive a fork. Costs a load or two.
  void check_fork() const {
    const long opened = opened_.load(std::memory_order_acquire);
    if (opened != 0 && opened != forks.load(std::memory_order_relaxed) + 1) throw_forked();
  }

  // Throws where `result` is an error; `what` completes "the driver could not …".
  void check(int result, const char* function, const std::string& what) const {
    if (result != 0) fail(result, function, what);
  }
  [[noreturn]] void fail(int result, const char* function, const std::string& what) const;

#define SIGN_FAST_DECLARE(name, symbol, ...) int (*name)(__VA_ARGS__) = nullptr;
  SIGN_FAST_DRIVER_FUNCTIONS(SIGN_FAST_DECLARE)
#undef SIGN_FAST_DECLARE

 private:
  void open();
  void resolve(void* handle);
  [[noreturn]] static void throw_forked();

  inline static std::atomic<long> forks{0};  // that this process is away from the one that loaded this file
  std::string library_;
  std::mutex mutex_;
  std::atomic<long> opened_{0};  // 1 + forks when opening began; 0 before, and where it failed
  bool open_ = false, started_ = false;
  int version_ = 0;
};

// While it lives, what a captured stream forbids to its thread, such as loading a module, is allowed.
class Uncaptured {
 public:
  explicit Uncaptured(const Driver& driver);
  ~Uncaptured() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
  Uncaptured(const Uncaptured&) = delete;

 private:
  const Driver& driver_;
  int mode_ = RELAXED;
};

// While it lives, `context` is the thread's current one.
class Current {
 public:
  Current(const Driver& driver, Context context);
  ~Current() {
    if (Context popped; pushed_) driver_.cuCtxPopCurrent(&popped);
  }
  Current(const Current&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

}  // namespace sign_fast
