// From a launch's Python values to the key of its machine code and to that code's arguments, by Triton's rules.
#pragma once

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "modules.h"
#include "python.h"

namespace sign_fast {

// A parameter of a kernel.
struct Parameter {
  Owned name;  // interned: looking it up in a dict compares pointers
  bool is_constant;
  Owned value;     // where none is given; null: there has to be one
  bool by_value;   // whether an integer 1 is compiled in
  bool alignment;  // whether it matters that 16 divides it

  // the last constant and its repr; constants are few and mostly the same objects
  mutable Owned seen;
  mutable std::string seen_text;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
};

// A text under construction that allocates only where it grows long.
class Text {
 public:
  void add(std::string_view part) {
    if (size_ + part.size() > room_) grow(part.size());
    std::memcpy(data_ + size_, part.data(), part.size());
    size_ += part.size();
  }
  std::string_view view() const { return {data_, size_}; }

  Text() = default;
  Text(const Text&) = delete;

 private:
  void grow(size_t more);

  std::array<char, 1024> inline_;
  std::string long_;
  char* data_ = inline_.data();
  size_t size_ = 0, room_ = inline_.size();
};

struct Options {
  long num_warps, num_stages;
  bool enable_fp_fusion;
};

// Writes the key of a launch to `key`, and its arguments to `packed` unless that is null, which a launch on the meta
// device has to have. Throws PythonError: TypeError for what is no argument or constant, and for names that are none.
void specialise(const Kernel& kernel, PyObject* arguments, PyObject* constants, const Options& options, Text& key,
                Arguments* packed);

}  // namespace sign_fast
