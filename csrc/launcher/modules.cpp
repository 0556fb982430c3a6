// Loading, the tables by key, and the launch itself.
#include "modules.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace sign_fast {
namespace {

constexpr int INVALID_IMAGE = 200;
constexpr unsigned SHARED_BYTES = 48 << 10;  // that a launch may have without asking

// Two independent hashes of 64 bits: that two images of a package share both does not happen by accident.
std::pair<uint64_t, uint64_t> hashes(std::string_view bytes) {
  uint64_t a = 0x9e3779b97f4a7c15, b = 0xc2b2ae3d27d4eb4f;
  for (size_t at = 0; at < bytes.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, std::min<size_t>(8, bytes.size() - at));
    a = (a ^ word) * 0xff51afd7ed558ccd;
    a ^= a >> 32;
    b = (b + word) * 0xd6e8feb86659fd93;
    b ^= b >> 29;
  }
  return {a, b};
}

bool is_elf(std::string_view image) { return image.substr(0, 4) == "\x7f" "ELF"; }

// Whether an ELF file's tables of segments or of sections lie past its end; one of them comes last.
bool cut_off(std::string_view image) {
  if (image.size() < 64) return true;
  const auto past_end = [&](size_t at_offset, size_t at_sizes) {
    uint64_t offset;
    uint16_t size, count;
    std::memcpy(&offset, image.data() + at_offset, sizeof(offset));
    std::memcpy(&size, image.data() + at_sizes, sizeof(size));
    std::memcpy(&count, image.data() + at_sizes + 2, sizeof(count));
    return offset > image.size() || uint64_t(size) * count > image.size() - offset;
  };
  return past_end(32, 54) || past_end(40, 58);
}

std::string listed(const uint8_t* sizes, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text += (i ? " " : "") + std::to_string(sizes[i]);
  return text;
}

[[noreturn]] void throw_other_arguments(const Entry& entry, const Arguments& arguments) {
  const auto* sizes = reinterpret_cast<const uint8_t*>(entry.parameter_sizes.data());
  throw std::invalid_argument("the machine code of " + entry.symbol + " takes parameters of " +
                              listed(sizes, entry.parameter_sizes.size()) + " bytes, not arguments of " +
                              listed(arguments.sizes.data(), arguments.count) +
                              " and scratch pointers: its key is another kernel's");
}

}  // namespace

Context Modules::context(int device) {
  if (const auto found = contexts_.find(device); found != contexts_.end()) return found->second;
  const std::string what = "use device " + std::to_string(device);
  int handle = 0;
  Context context = nullptr;
  driver_.check(driver_.cuDeviceGet(&handle, device), "cuDeviceGet", what);
  driver_.check(driver_.cuDevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain", what);
  return contexts_[device] = context;
}

void Modules::add(int device, std::string_view key, std::string_view image, const std::string& symbol,
                  unsigned num_warps, unsigned shared_bytes, std::string_view parameter_sizes) {
  if (parameter_sizes.size() > MOST_ARGUMENTS + MOST_SCRATCH ||
      !std::all_of(parameter_sizes.begin(), parameter_sizes.end(), [](char c) { return c > 0 && c <= 8; })) {
    throw std::invalid_argument("parameter sizes of " + symbol + ": " + std::to_string(MOST_ARGUMENTS + MOST_SCRATCH) +
                                " parameters of 1 to 8 bytes at most");
  }
  if (num_warps < 1 || num_warps > 32) throw std::invalid_argument("a kernel has 1 to 32 warps");
  driver_.start();
  const std::lock_guard<std::mutex> loading(loading_);
  const Uncaptured uncaptured(driver_);
  const Context context = this->context(device);
  const Current current(driver_, context);
  const std::string what = "load " + symbol + " on device " + std::to_string(device);

  const auto [hash, other_hash] = hashes(image);
  const Identity identity{device, image.size(), hash, other_hash};
  const auto known = modules_.find(identity);
  const bool is_new = known == modules_.end();
  Module module = is_new ? nullptr : known->second;
  if (is_new) {
    const bool elf = is_elf(image);
    // the driver reads ELF as far as its headers say, however short the image, and PTX up to a zero byte
    if (elf && cut_off(image)) driver_.fail(INVALID_IMAGE, "cuModuleLoadData", what);
    const std::string text(elf ? "" : image);
    driver_.check(driver_.cuModuleLoadData(&module, elf ? image.data() : text.c_str()), "cuModuleLoadData", what);
  }
  try {
    Function function = nullptr;
    driver_.check(driver_.cuModuleGetFunction(&function, module, symbol.c_str()), "cuModuleGetFunction", what);
    if (shared_bytes > SHARED_BYTES) {
      const std::string wanted = "give " + symbol + " " + std::to_string(shared_bytes) + " bytes of shared memory";
      driver_.check(driver_.cuFuncSetAttribute(function, DYNAMIC_SHARED_BYTES, static_cast<int>(shared_bytes)),
                    "cuFuncSetAttribute", wanted);
      // a cache that leaves less to it would let fewer programs run at a time
      driver_.check(driver_.cuFuncSetCacheConfig(function, PREFER_SHARED), "cuFuncSetCacheConfig", wanted);
    }
    Entry entry{function, context, 32 * num_warps, shared_bytes, std::string(parameter_sizes), symbol};
    const std::lock_guard<std::mutex> guard(table_);
    auto& place = by_key_[device][std::string(key)];
    const bool same = place != nullptr && place->function == function && place->threads == entry.threads &&
                      place->shared_bytes == shared_bytes && place->parameter_sizes == parameter_sizes;
    if (is_new) {
      modules_.emplace(identity, module);
      ++counts_[device];
    }
    if (!same) place = &entries_.emplace_back(std::move(entry));
  } catch (...) {
    if (is_new && !modules_.contains(identity)) driver_.cuModuleUnload(module);
    throw;
  }
}

const Entry* Modules::find(int device, std::string_view key) {
  driver_.check_fork();
  const std::lock_guard<std::mutex> guard(table_);
  const auto table = by_key_.find(device);
  if (table == by_key_.end()) return nullptr;
  const auto found = table->second.find(key);
  return found == table->second.end() ? nullptr : found->second;
}

void Modules::launch(const Entry& entry, Stream stream, const std::array<unsigned, 3>& grid, Arguments& arguments) {
  driver_.check_fork();
  const size_t count = entry.parameter_sizes.size();
  if (count < arguments.count || count > arguments.count + MOST_SCRATCH ||
      std::memcmp(entry.parameter_sizes.data(), arguments.sizes.data(), arguments.count) != 0) {
    throw_other_arguments(entry, arguments);
  }
  void* parameters[MOST_ARGUMENTS + MOST_SCRATCH];
  for (size_t i = 0; i < arguments.count; ++i) parameters[i] = &arguments.values[i];
  uint64_t null = 0;
  for (size_t i = arguments.count; i < count; ++i) {
    if (entry.parameter_sizes[i] != sizeof(null)) throw_other_arguments(entry, arguments);
    parameters[i] = &null;
  }
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return;
  const Current current(driver_, entry.context);
  const int result = driver_.cuLaunchKernel(entry.function, grid[0], grid[1], grid[2], entry.threads, 1, 1,
                                            entry.shared_bytes, stream, parameters, nullptr);
  if (result != 0) {
    driver_.fail(result, "cuLaunchKernel",
                 "launch " + entry.symbol + " with " + std::to_string(grid[0]) + "×" + std::to_string(grid[1]) + "×" +
                     std::to_string(grid[2]) + " programs of " + std::to_string(entry.threads) + " threads");
  }
  launches_.fetch_add(1, std::memory_order_relaxed);
}

std::map<int, size_t> Modules::loaded() {
  const std::lock_guard<std::mutex> guard(table_);
  return counts_;
}

}  // namespace sign_fast
