// Opening the driver library, and what its errors mean to the person at the keyboard.
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>

#include <string_view>

namespace sign_fast {
namespace {

constexpr int OLDEST = 12000;
constexpr char FORKED[] = "this process was forked after CUDA was in use; start workers with spawn";

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

const char* remedy(int code, std::string_view function) {
  switch (code) {
    case 1:
      if (function == "cuFuncSetAttribute") return "it is built for GPUs with more of it: build it for this one";
      return "its grid, threads or arguments are not what a GPU takes";
    case 2:
      return "free memory on that GPU, or end other processes there";
    case 3:
      return FORKED;
    case 46:
      return "another process has that GPU for itself: end it, or use another GPU";
    case 100:
      return "no NVIDIA GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES";
    case 101:
      return "there is no such GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES";
    case 200:
      return "the machine code is damaged, or newer than this driver: update the driver, or install sign_fast again";
    case 209:
      return "the machine code is for other GPUs, or newer than this driver: build with SIGN_FAST_ARCHS naming this one, or "
             "update the driver";
    case 218:
      return "the PTX is damaged: install sign_fast again";
    case 221:
      return "the driver's PTX compiler is missing: install all of it, or build with SIGN_FAST_ARCHS naming this GPU";
    case 222:
      return "the PTX is newer than the driver: update the driver, or build with SIGN_FAST_ARCHS naming this GPU";
    case 500:
      return "the machine code does not have it: install sign_fast again";
    case 700:
    case 715:
    case 716:
    case 717:
    case 718:
    case 719:
      return "an earlier kernel broke CUDA in this process: start it again with CUDA_LAUNCH_BLOCKING=1 to see which";
    case 701:
      return "it needs more registers, threads or shared memory than this GPU has: build it for this one";
    case 802:
      return "the GPUs' fabric is not up: start nvidia-fabricmanager, or wait for it";
    case 803:
      return "the driver and its library are of different versions: restart the machine or the container";
    case 804:
      return "the compatibility library is not for this GPU: take it out of LD_LIBRARY_PATH, or update the driver";
    case 999:
      return "look at nvidia-smi and dmesg, then restart the process";
    default:
      return code >= 900 && code < 910 ? "a CUDA graph is being captured, which does not allow it"
                                       : "look the error up in CUDA's documentation of CUresult";
  }
}

}  // namespace

void Driver::throw_forked() { throw DriverFailure(FORKED, 0, "fork"); }

void Driver::fail(int result, const char* function, const std::string& what) const {
  const char *name = nullptr, *meaning = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &meaning);
  std::string message = "the CUDA driver could not " + what + ": " + (name ? name : "unknown error") + " (" + function +
                        " returned " + std::to_string(result);
  if (meaning) message += std::string(", ") + meaning;
  throw DriverFailure(message + "); " + remedy(result, function), result, function);
}

void Driver::resolve(void* handle) {
  const auto lacks = [&](const char* symbol) {
    const std::string it = version_ == 0 ? library_ + " is no CUDA driver library: it lacks "
                                         : "the NVIDIA driver supports CUDA " + dotted(version_) + " but lacks ";
    throw DriverFailure(it + symbol + "; install NVIDIA's driver for CUDA 12.0 or newer", 0, symbol);
  };
  // the version first: an older driver says that it is old, not what it lacks
  cuDriverGetVersion = reinterpret_cast<int (*)(int*)>(dlsym(handle, "cuDriverGetVersion"));
  if (cuDriverGetVersion == nullptr) lacks("cuDriverGetVersion");
  if (cuDriverGetVersion(&version_) != 0 || version_ < OLDEST) {
    throw DriverFailure("the NVIDIA driver is too old: it supports CUDA " + dotted(version_) +
                            ", and 12.0 is needed; update the driver",
                        0, "cuDriverGetVersion");
  }
#define SIGN_FAST_RESOLVE(name, symbol, ...)                             \
  name = reinterpret_cast<int (*)(__VA_ARGS__)>(dlsym(handle, #symbol)); \
  if (name == nullptr) lacks(#symbol);
  SIGN_FAST_DRIVER_FUNCTIONS(SIGN_FAST_RESOLVE)
#undef SIGN_FAST_RESOLVE
}

void Driver::open() {
  if (open_) return;
  // process-wide and once: what it counts concerns only drivers that were opened before
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  opened_.store(forks.load() + 1, std::memory_order_release);
  void* handle = nullptr;
  try {
    handle = dlopen(library_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      const char* why = dlerror();
      throw DriverFailure("the CUDA driver library cannot be loaded (" + std::string(why ? why : library_) +
                              "); install NVIDIA's driver, or use the CPU",
                          0, "dlopen");
    }
    version_ = 0;
    resolve(handle);
  } catch (...) {
    if (handle != nullptr) dlclose(handle);
    opened_.store(0, std::memory_order_release);
    throw;
  }
  open_ = true;
}

int Driver::version() {
  check_fork();
  const std::lock_guard<std::mutex> guard(mutex_);
  open();
  return version_;
}

void Driver::start() {
  check_fork();
  const std::lock_guard<std::mutex> guard(mutex_);
  open();
  if (started_) return;
  check(cuInit(0), "cuInit", "start");
  started_ = true;
}

Uncaptured::Uncaptured(const Driver& driver) : driver_(driver) {
  driver.check(driver.cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode",
               "allow loading while a graph is captured");
}

Current::Current(const Driver& driver, Context context) : driver_(driver) {
  Context now = nullptr;
  driver.check(driver.cuCtxGetCurrent(&now), "cuCtxGetCurrent", "say which context is current");
  if (now == context) return;
  driver.check(driver.cuCtxPushCurrent(context), "cuCtxPushCurrent", "make a GPU's context current");
  pushed_ = true;
}

}  // namespace sign_fast
