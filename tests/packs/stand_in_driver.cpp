// A stand-in for the CUDA driver library: checks what it is given and remembers it, runs nothing. See stand_in.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

constexpr int INVALID_VALUE = 1, NOT_INITIALISED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
              INVALID_HANDLE = 400, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900;
constexpr uint64_t MODULE = 0x1000000, FUNCTION = 0x2000000, CONTEXT = 0x3000000;  // handles that are no addresses

struct Module {
  int device;
  std::string image, hash;
  bool unloaded = false;
};

struct Function {
  int module;
  std::string symbol;
  int shared_limit = 48 << 10;
};

struct Launch {
  std::string symbol;
  int device;
  uint64_t stream;
  unsigned grid[3], block[3], shared;
  std::vector<std::string> parameters;
};

struct State {
  int version = 12080, devices = 2, shared_limit = 227 << 10;
  bool initialised = false, capturing = false, recording = true;
  std::map<std::string, std::map<int, int>> failures;  // function -> number of the call -> code
  std::map<std::string, int> calls;
  std::vector<Module> modules;
  size_t modules_before = 0;  // those of before the last reset, whose handles may still be in use
  std::vector<Function> functions;
  std::vector<Launch> launches;
  std::map<int, int> retained;
  unsigned long long launched = 0;
  uint64_t unchecked = 0;  // a function whose parameters were checked already, while nothing is recorded
};

State state;
std::mutex mutex;
thread_local std::vector<uint64_t> contexts;
thread_local int capture_mode = 0;

int begin(const char* name) {
  const int call = ++state.calls[name];
  const auto found = state.failures.find(name);
  if (found == state.failures.end()) return 0;
  const auto code = found->second.find(call);
  return code == found->second.end() ? 0 : code->second;
}

#define BEGIN(name)                                            \
  const std::lock_guard<std::mutex> guard(mutex);              \
  if (const int code = begin(#name); code != 0) return code;   \
  if (!state.initialised) return NOT_INITIALISED

template <typename T>
T read(std::string_view bytes, size_t at) {
  T value{};
  if (at + sizeof(T) <= bytes.size()) std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

bool is_elf(std::string_view image) { return image.substr(0, 4) == "\x7f" "ELF"; }

struct Section {
  std::string name;
  uint32_t type, link;
  std::string_view content;
};

std::vector<Section> sections(std::string_view image) {
  std::vector<Section> found;
  const auto start = read<uint64_t>(image, 40);
  const auto size = read<uint16_t>(image, 58), count = read<uint16_t>(image, 60), names = read<uint16_t>(image, 62);
  const auto content = [&](int i) -> std::string_view {
    const size_t header = start + size_t(i) * size;
    if (read<uint32_t>(image, header + 4) == 8) return {};
    return image.substr(read<uint64_t>(image, header + 24), read<uint64_t>(image, header + 32));
  };
  for (int i = 0; i < count; ++i) {
    const size_t header = start + size_t(i) * size;
    found.push_back({content(names).data() + read<uint32_t>(image, header), read<uint32_t>(image, header + 4),
                     read<uint32_t>(image, header + 40), content(i)});
  }
  return found;
}

bool has_symbol(std::string_view image, const std::string& symbol) {
  const auto all = sections(image);
  for (const Section& section : all) {
    if (section.type != 2) continue;
    for (size_t at = 0; at + 24 <= section.content.size(); at += 24) {
      const auto info = read<uint8_t>(section.content, at + 4);
      const char* name = all[section.link].content.data() + read<uint32_t>(section.content, at);
      if ((info & 15) == 2 && symbol == name) return true;
    }
  }
  return false;
}

// The sizes of a kernel's parameters as its machine code gives them: EIATTR_KPARAM_INFO.
std::vector<int> parameter_sizes(std::string_view image, const std::string& symbol) {
  std::map<int, int> sizes;
  for (const Section& section : sections(image)) {
    if (section.name != ".nv.info." + symbol) continue;
    const std::string_view info = section.content;
    for (size_t at = 0; at + 4 <= info.size();) {
      const auto form = read<uint8_t>(info, at), attribute = read<uint8_t>(info, at + 1);
      const auto size = read<uint16_t>(info, at + 2);
      if (form == 4 && attribute == 0x17) sizes[read<uint16_t>(info, at + 8)] = read<uint32_t>(info, at + 12) >> 18;
      at += 4 + (form == 4 ? size : 0);
    }
  }
  std::vector<int> ordered;
  for (const auto& [ordinal, size] : sizes) ordered.push_back(size);
  return ordered;
}

std::string hash_of(std::string_view bytes) {
  uint64_t hash = 14695981039346656037u;
  for (const unsigned char byte : bytes) hash = (hash ^ byte) * 1099511628211u;
  return std::to_string(hash);
}

size_t elf_size(const char* data) {
  const std::string_view head(data, 64);
  size_t end = read<uint64_t>(head, 40) + size_t(read<uint16_t>(head, 58)) * read<uint16_t>(head, 60);
  const std::string_view to_headers(data, end);
  end = std::max<size_t>(end, read<uint64_t>(head, 32) + size_t(read<uint16_t>(head, 54)) * read<uint16_t>(head, 56));
  for (int i = 0; i < read<uint16_t>(head, 60); ++i) {
    const size_t header = read<uint64_t>(head, 40) + size_t(i) * read<uint16_t>(head, 58);
    if (read<uint32_t>(to_headers, header + 4) == 8) continue;
    end = std::max<size_t>(end, read<uint64_t>(to_headers, header + 24) + read<uint64_t>(to_headers, header + 32));
  }
  return end;
}

std::string hex(const std::string& bytes) {
  std::string text;
  for (const unsigned char byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

void quote(std::string& out, const std::string& text) { out += '"' + text + '"'; }

template <typename Items, typename Write>
void list(std::string& out, const Items& items, const Write& write) {
  out += '[';
  bool first = true;
  for (const auto& item : items) {
    if (!first) out += ',';
    first = false;
    write(item);
  }
  out += ']';
}

}  // namespace

extern "C" {

int cuDriverGetVersion(int* version) {
  const std::lock_guard<std::mutex> guard(mutex);
  if (const int code = begin("cuDriverGetVersion"); code != 0) return code;
  *version = state.version;
  return 0;
}

int cuInit(unsigned flags) {
  const std::lock_guard<std::mutex> guard(mutex);
  if (const int code = begin("cuInit"); code != 0) return code;
  if (flags != 0) return INVALID_VALUE;
  state.initialised = true;
  return 0;
}

int cuGetErrorName(int code, const char** name) {
  static const std::map<int, const char*> names = {
      {1, "CUDA_ERROR_INVALID_VALUE"},         {2, "CUDA_ERROR_OUT_OF_MEMORY"},
      {3, "CUDA_ERROR_NOT_INITIALIZED"},       {100, "CUDA_ERROR_NO_DEVICE"},
      {101, "CUDA_ERROR_INVALID_DEVICE"},      {200, "CUDA_ERROR_INVALID_IMAGE"},
      {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},   {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
      {500, "CUDA_ERROR_NOT_FOUND"},           {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}, {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
  };
  const auto found = names.find(code);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? INVALID_VALUE : 0;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == 2 ? "out of memory" : nullptr;
  return code == 2 ? 0 : INVALID_VALUE;
}

int cuDeviceGet(int* device, int ordinal) {
  BEGIN(cuDeviceGet);
  if (ordinal < 0 || ordinal >= state.devices) return INVALID_DEVICE;
  *device = ordinal;
  return 0;
}

int cuDevicePrimaryCtxRetain(uint64_t* context, int device) {
  BEGIN(cuDevicePrimaryCtxRetain);
  if (device < 0 || device >= state.devices) return INVALID_DEVICE;
  ++state.retained[device];
  *context = CONTEXT + device;
  return 0;
}

int cuCtxGetCurrent(uint64_t* context) {
  BEGIN(cuCtxGetCurrent);
  *context = contexts.empty() ? 0 : contexts.back();
  return 0;
}

int cuCtxPushCurrent_v2(uint64_t context) {
  BEGIN(cuCtxPushCurrent);
  if (context < CONTEXT || context >= CONTEXT + state.devices) return INVALID_CONTEXT;
  contexts.push_back(context);
  return 0;
}

int cuCtxPopCurrent_v2(uint64_t* context) {
  BEGIN(cuCtxPopCurrent);
  if (contexts.empty()) return INVALID_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}

#ifndef STAND_IN_IS_INCOMPLETE
int cuThreadExchangeStreamCaptureMode(int* mode) {
  BEGIN(cuThreadExchangeStreamCaptureMode);
  if (*mode < 0 || *mode > 2) return INVALID_VALUE;
  std::swap(*mode, capture_mode);
  return 0;
}
#endif

int cuModuleLoadData(uint64_t* module, const void* data) {
  BEGIN(cuModuleLoadData);
  if (contexts.empty()) return INVALID_CONTEXT;
  if (state.capturing && capture_mode != 2) return CAPTURE_UNSUPPORTED;
  const auto* bytes = static_cast<const char*>(data);
  std::string image;
  if (std::strncmp(bytes, "\x7f" "ELF", 4) == 0) {
    if (read<uint16_t>({bytes, 64}, 18) != 190) return INVALID_IMAGE;
    image.assign(bytes, elf_size(bytes));
  } else {
    image = bytes;
    if (image.find(".version") == std::string::npos || image.find(".entry") == std::string::npos) return INVALID_IMAGE;
  }
  const std::string hash = hash_of(image);
  state.modules.push_back({static_cast<int>(contexts.back() - CONTEXT), std::move(image), hash});
  *module = MODULE + state.modules.size() - 1;
  return 0;
}

int cuModuleUnload(uint64_t module) {
  BEGIN(cuModuleUnload);
  if (module < MODULE || module >= MODULE + state.modules.size()) return INVALID_HANDLE;
  state.modules[module - MODULE].unloaded = true;
  return 0;
}

int cuModuleGetFunction(uint64_t* function, uint64_t module, const char* name) {
  BEGIN(cuModuleGetFunction);
  if (module < MODULE || module >= MODULE + state.modules.size()) return INVALID_HANDLE;
  const Module& loaded = state.modules[module - MODULE];
  if (loaded.unloaded) return INVALID_HANDLE;
  const bool there = is_elf(loaded.image) ? has_symbol(loaded.image, name)
                                          : loaded.image.find(".entry " + std::string(name)) != std::string::npos;
  if (!there) return NOT_FOUND;
  // one handle a function, as the driver has it
  for (size_t i = 0; i < state.functions.size(); ++i) {
    if (state.functions[i].module == int(module - MODULE) && state.functions[i].symbol == name) {
      *function = FUNCTION + i;
      return 0;
    }
  }
  state.functions.push_back({static_cast<int>(module - MODULE), name});
  *function = FUNCTION + state.functions.size() - 1;
  return 0;
}

int cuFuncSetAttribute(uint64_t function, int attribute, int value) {
  BEGIN(cuFuncSetAttribute);
  if (function < FUNCTION || function >= FUNCTION + state.functions.size()) return INVALID_HANDLE;
  if (attribute != 8 || value > state.shared_limit) return INVALID_VALUE;
  state.functions[function - FUNCTION].shared_limit = value;
  return 0;
}

int cuFuncSetCacheConfig(uint64_t function, int config) {
  BEGIN(cuFuncSetCacheConfig);
  if (function < FUNCTION || function >= FUNCTION + state.functions.size()) return INVALID_HANDLE;
  return config == 1 ? 0 : INVALID_VALUE;
}

int cuLaunchKernel(uint64_t function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, uint64_t stream, void** parameters,
                   void** extra) {
  if (!state.recording && function == state.unchecked) {  // being timed: as little as can be of what is not launching
    ++state.launched;
    return 0;
  }
  BEGIN(cuLaunchKernel);
  if (function < FUNCTION || function >= FUNCTION + state.functions.size()) return INVALID_HANDLE;
  const Function& launched = state.functions[function - FUNCTION];
  const Module& module = state.modules[launched.module];
  if (module.unloaded) return INVALID_HANDLE;
  if (contexts.empty() || contexts.back() != CONTEXT + module.device) return INVALID_CONTEXT;
  if (extra != nullptr || int(shared) > launched.shared_limit || grid_x == 0 || grid_x > 0x7fffffff || grid_y == 0 ||
      grid_y > 65535 || grid_z == 0 || grid_z > 65535 || block_x * block_y * block_z > 1024) {
    return INVALID_VALUE;
  }
  ++state.launched;
  if (!state.recording) {
    state.unchecked = function;
    return 0;
  }
  Launch record{launched.symbol,  module.device, stream, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared,
                {}};
  int i = 0;
  for (const int size : parameter_sizes(module.image, launched.symbol)) {
    record.parameters.emplace_back(static_cast<const char*>(parameters[i++]), size);
  }
  state.launches.push_back(std::move(record));
  return 0;
}

// For the tests.

void stand_in_reset() {
  const std::lock_guard<std::mutex> guard(mutex);
  const bool initialised = state.initialised;
  std::vector<Module> modules = std::move(state.modules);
  std::vector<Function> functions = std::move(state.functions);
  state = State{};
  state.initialised = initialised;
  state.modules = std::move(modules);
  state.modules_before = state.modules.size();
  state.functions = std::move(functions);
}

void stand_in_fail(const char* function, int call, int code) {
  const std::lock_guard<std::mutex> guard(mutex);
  state.failures[function][state.calls[function] + call] = code;
}

void stand_in_set(const char* what, int value) {
  const std::lock_guard<std::mutex> guard(mutex);
  const std::string_view name = what;
  if (name == "version") state.version = value;
  if (name == "devices") state.devices = value;
  if (name == "shared_limit") state.shared_limit = value;
  if (name == "capturing") state.capturing = value != 0;
  if (name == "capture_mode") capture_mode = value;
  if (name == "recording") state.recording = value != 0, state.unchecked = 0;
  if (name == "context") {
    contexts.clear();
    if (value >= 0) contexts.push_back(CONTEXT + value);
  }
}

// Of the calling thread.
int stand_in_capture_mode() { return capture_mode; }
int stand_in_context() { return contexts.empty() ? -1 : static_cast<int>(contexts.back() - CONTEXT); }
int stand_in_depth() { return static_cast<int>(contexts.size()); }

// All that happened, as JSON; valid until the next call.
const char* stand_in_report() {
  const std::lock_guard<std::mutex> guard(mutex);
  static std::string out;
  out = "{\"modules\":";
  const std::vector<Module> modules(state.modules.begin() + state.modules_before, state.modules.end());
  list(out, modules, [](const Module& module) {
    out += "{\"device\":" + std::to_string(module.device) + ",\"hash\":";
    quote(out, module.hash);
    out += ",\"bytes\":" + std::to_string(module.image.size());
    out += module.unloaded ? ",\"unloaded\":true}" : ",\"unloaded\":false}";
  });
  out += ",\"launches\":";
  list(out, state.launches, [](const Launch& launch) {
    const auto number = [](unsigned value) { out += std::to_string(value); };
    out += "{\"symbol\":";
    quote(out, launch.symbol);
    out += ",\"device\":" + std::to_string(launch.device) + ",\"stream\":" + std::to_string(launch.stream);
    out += ",\"shared\":" + std::to_string(launch.shared) + ",\"grid\":";
    list(out, launch.grid, number);
    out += ",\"block\":";
    list(out, launch.block, number);
    out += ",\"parameters\":";
    list(out, launch.parameters, [](const std::string& bytes) { quote(out, hex(bytes)); });
    out += '}';
  });
  out += ",\"launched\":" + std::to_string(state.launched) + ",\"calls\":{";
  bool first = true;
  for (const auto& [name, count] : state.calls) {
    if (!first) out += ',';
    first = false;
    quote(out, name);
    out += ":" + std::to_string(count);
  }
  out += "}}";
  return out.c_str();
}
}
