// Precompiled kernels on the GPUs of this process: loaded once a device, found by key, launched. Knows nothing of
// Python; every function may be called from any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "driver.h"

namespace sign_fast {

constexpr size_t MOST_ARGUMENTS = 248;
constexpr size_t MOST_SCRATCH = 2;  // Triton's global and profile scratch come last, null as no kernel of ours has any

// A launch's arguments in the machine code's order, each in the low bytes of its value.
struct Arguments {
  std::array<uint64_t, MOST_ARGUMENTS> values;
  std::array<uint8_t, MOST_ARGUMENTS> sizes;
  size_t count = 0;

  void push(uint64_t value, uint8_t size) { values[count] = value, sizes[count++] = size; }  // not checked
};

// A kernel as it is launched on one device.
struct Entry {
  Function function;
  Context context;
  unsigned threads, shared_bytes;
  std::string parameter_sizes;  // a byte for each parameter of the machine code
  std::string symbol;
};

class Modules {
 public:
  explicit Modules(std::string library) : driver_(std::move(library)) {}

  // Loads `image`, ELF machine code or PTX text, on that device unless it is there, and enters its kernel under `key`,
  // in the place of what had that key. What fails leaves nothing behind.
  // Throws DriverFailure; std::invalid_argument where the sizes are none.
  void add(int device, std::string_view key, std::string_view image, const std::string& symbol, unsigned num_warps,
           unsigned shared_bytes, std::string_view parameter_sizes);

  // Null where nothing was added; else valid as long as this object.
  const Entry* find(int device, std::string_view key);

  // On that stream of the entry's device; a grid without programs launches nothing.
  // Throws DriverFailure; std::invalid_argument where the arguments are not those of the machine code.
  void launch(const Entry& entry, Stream stream, const std::array<unsigned, 3>& grid, Arguments& arguments);

  int driver_version() { return driver_.version(); }
  std::map<int, size_t> loaded();  // number of modules by device
  uint64_t launches() const { return launches_.load(std::memory_order_relaxed); }

 private:
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  struct Identity {  // of an image on a device
    int device;
    size_t size;
    uint64_t hash, other_hash;
    auto operator<=>(const Identity&) const = default;
  };

  Context context(int device);

  Driver driver_;
  std::mutex loading_;  // held while the driver loads, which takes milliseconds; of contexts_ and modules_
  std::map<int, Context> contexts_;
  // Never unloaded: captured graphs hold on to their functions, and at exit the driver may be gone already.
  std::map<Identity, Module> modules_;
  std::mutex table_;  // held for a look only; of what follows
  std::map<int, size_t> counts_;
  std::deque<Entry> entries_;  // an address given away stays
  std::unordered_map<int, std::unordered_map<std::string, const Entry*, Hash, std::equal_to<>>> by_key_;
  std::atomic<uint64_t> launches_{0};
};

}  // namespace sign_fast
