// kernels/ahead_of_time.py's specialise() over Python objects, without torch's headers.
#include "specialise.h"

#include <charconv>

namespace sign_fast {
namespace {

struct Dtype {
  Owned object;  // torch's dtypes are singletons: known by their address
  std::string_view code;
};

constexpr std::pair<std::string_view, std::string_view> DTYPES[] = {
    {"torch.bfloat16", "*bf16"}, {"torch.float16", "*fp16"}, {"torch.float32", "*fp32"}, {"torch.float64", "*fp64"},
    {"torch.int64", "*i64"},     {"torch.int32", "*i32"},    {"torch.int16", "*i16"},    {"torch.int8", "*i8"},
    {"torch.uint8", "*u8"},      {"torch.bool", "*u1"},
};
constexpr std::string_view ALIGNED = ":16";

// Of the whole process, under Python's lock, as long as the process.
struct Known {
  std::vector<Dtype> dtypes;
  std::array<std::pair<PyTypeObject*, PyObject*>, 4> tensors{};  // a class and its data_ptr
  size_t tensor_count = 0;
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* lower = PyObject_GetAttrString(reinterpret_cast<PyObject*>(&PyUnicode_Type), "lower");  // a C method

  Known() { dtypes.reserve(std::size(DTYPES)); }
};

Known& known() {
  static Known& it = *new Known;  // never freed: at exit Python is gone before this would be
  return it;
}

class Specialiser {
 public:
  Specialiser(const Kernel& kernel, Text& key, Arguments* packed)
      : kernel_(kernel), key_(key), packed_(packed), known_(known()) {}

  void constant(const Parameter& parameter, PyObject* value) {
    if (value == Py_True) return key_.add("True");
    if (value == Py_False) return key_.add("False");
    if (value == Py_None) return key_.add("None");
    if (value != parameter.seen.get()) {
      if (!PyLong_CheckExact(value) && !PyUnicode_CheckExact(value) && !PyFloat_CheckExact(value)) {
        refuse(parameter, value, "is a constant: bool, int, float, str or None");
      }
      const Owned repr = Owned::checked(PyObject_Repr(value));
      parameter.seen_text = text_of(repr.get());
      parameter.seen = Owned::of(value);
    }
    key_.add(parameter.seen_text);
  }

  void argument(const Parameter& parameter, PyObject* value) {
    if (value == Py_None) return key_.add("None");
    if (PyLong_CheckExact(value)) return integer(parameter, value);
    if (PyFloat_Check(value)) return real(value);
    if (PyBool_Check(value)) {
      key_.add("u1");
      return push(value == Py_True, 1);
    }
    if (PyLong_Check(value)) return integer(parameter, value);
    tensor(parameter, value);
  }

 private:
  void push(uint64_t value, uint8_t size) {
    if (packed_) packed_->push(value, size);
  }

  [[noreturn]] void refuse(const Parameter& parameter, PyObject* value, const char* takes) const {
    const Owned type = Owned::checked(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__name__"));
    PyErr_Format(PyExc_TypeError, "%s: the parameter %U %s, not %U", kernel_.name.c_str(), parameter.name.get(), takes,
                 type.get());
    throw PythonError();
  }

  void aligned(const Parameter& parameter, bool divisible) {
    if (divisible && parameter.alignment) key_.add(ALIGNED);
  }

  void real(PyObject* value) {
    const auto narrow = static_cast<float>(PyFloat_AsDouble(value));
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof(bits));
    key_.add("fp32");
    push(bits, 4);
  }

  void integer(const Parameter& parameter, PyObject* value) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow) return unsigned_integer(parameter, value);
    if (number == 1 && parameter.by_value) return key_.add("1");
    const bool narrow = number == static_cast<int32_t>(number);
    key_.add(narrow ? "i32" : "i64");
    aligned(parameter, number % 16 == 0);
    push(static_cast<uint64_t>(number), narrow ? 4 : 8);
  }

  void unsigned_integer(const Parameter& parameter, PyObject* value) {
    const unsigned long long number = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred()) {
      PyErr_Format(PyExc_TypeError, "%s: the parameter %U takes an integer of 64 bits, not %R", kernel_.name.c_str(),
                   parameter.name.get(), value);
      throw PythonError();
    }
    key_.add("u64");
    aligned(parameter, number % 16 == 0);
    push(number, 8);
  }

  void tensor(const Parameter& parameter, PyObject* value) {
    uint64_t address = address_of(parameter, value);
    key_.add(pointer_type(parameter, value));
    if (address == 0) address = without_memory(parameter, value);
    aligned(parameter, address % 16 == 0);
    push(address, 8);
  }

  uint64_t address_of(const Parameter& parameter, PyObject* value) {
    const auto number = [](PyObject* result) {
      const Owned owned = Owned::checked(result);
      void* address = PyLong_AsVoidPtr(owned.get());
      if (address == nullptr && PyErr_Occurred()) throw PythonError();
      return reinterpret_cast<uint64_t>(address);
    };
    PyTypeObject* type = Py_TYPE(value);
    for (size_t i = 0; i < known_.tensor_count; ++i) {
      if (known_.tensors[i].first == type) {
        return number(PyObject_CallFunctionObjArgs(known_.tensors[i].second, value, nullptr));
      }
    }
    Owned method(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), known_.data_ptr));
    if (method.get() == nullptr) PyErr_Clear();
    // a C method of the class, as tensors have: it can be called without looking it up each time
    if (method.get() != nullptr && Py_TYPE(method.get()) == Py_TYPE(known_.lower) &&
        known_.tensor_count < known_.tensors.size()) {
      Py_INCREF(type);
      known_.tensors[known_.tensor_count++] = {type, method.release()};
      return address_of(parameter, value);
    }
    const Owned bound = attribute(parameter, value, known_.data_ptr);
    return number(PyObject_CallObject(bound.get(), nullptr));
  }

  Owned attribute(const Parameter& parameter, PyObject* value, PyObject* name) const {
    Owned found(PyObject_GetAttr(value, name));
    if (found.get() == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw PythonError();
      PyErr_Clear();
      refuse(parameter, value, "takes a tensor, a number or None");
    }
    return found;
  }

  std::string_view pointer_type(const Parameter& parameter, PyObject* value) {
    Owned dtype = attribute(parameter, value, known_.dtype);
    for (const Dtype& one : known_.dtypes) {
      if (one.object.get() == dtype.get()) return one.code;
    }
    const Owned name = Owned::checked(PyObject_Str(dtype.get()));
    const std::string_view wanted = text_of(name.get());
    for (const auto& [torchs, code] : DTYPES) {
      if (torchs != wanted) continue;
      // at most once each, so that objects that only call themselves so do not fill the table
      if (known_.dtypes.size() < std::size(DTYPES)) known_.dtypes.push_back({std::move(dtype), code});
      return code;
    }
    PyErr_Format(PyExc_TypeError, "%s: the parameter %U takes no tensor of %U", kernel_.name.c_str(),
                 parameter.name.get(), name.get());
    throw PythonError();
  }

  // The address that an allocation at 0 would give it: empty tensors and those on the meta device have none.
  uint64_t without_memory(const Parameter& parameter, PyObject* value) {
    const Owned is_meta(PyObject_GetAttrString(value, "is_meta"));
    if (is_meta.get() != Py_True) {
      PyErr_Clear();
      return 0;
    }
    if (packed_) {
      PyErr_Format(PyExc_TypeError, "%s: the parameter %U is on the meta device, where nothing runs",
                   kernel_.name.c_str(), parameter.name.get());
      throw PythonError();
    }
    const Owned offset = Owned::checked(PyObject_CallMethod(value, "storage_offset", nullptr));
    const Owned size = Owned::checked(PyObject_CallMethod(value, "element_size", nullptr));
    const uint64_t bytes = PyLong_AsUnsignedLongLong(offset.get()) * PyLong_AsUnsignedLongLong(size.get());
    if (PyErr_Occurred()) throw PythonError();
    return bytes;
  }

  const Kernel& kernel_;
  Text& key_;
  Arguments* packed_;
  Known& known_;
};

// Borrowed, null where the dict does not have it.
PyObject* look_up(PyObject* dict, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dict, name);
  if (found == nullptr && PyErr_Occurred()) throw PythonError();
  return found;
}

[[noreturn]] void throw_wrong_names(const Kernel& kernel, PyObject* arguments, PyObject* constants) {
  for (PyObject* dict : {arguments, constants}) {
    PyObject *name, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(dict, &at, &name, &value)) {
      bool is_one = false;
      for (const Parameter& parameter : kernel.parameters) {
        const int same = PyObject_RichCompareBool(parameter.name.get(), name, Py_EQ);
        if (same < 0) throw PythonError();
        is_one = is_one || same;
      }
      if (!is_one) {
        PyErr_Format(PyExc_TypeError, "%s has no parameter %R", kernel.name.c_str(), name);
        throw PythonError();
      }
    }
  }
  PyErr_Format(PyExc_TypeError, "%s: a parameter is among the arguments and the constants", kernel.name.c_str());
  throw PythonError();
}

void add_number(Text& key, std::string_view before, long number) {
  char digits[24];
  const auto end = std::to_chars(digits, digits + sizeof(digits), number).ptr;
  key.add(before);
  key.add({digits, static_cast<size_t>(end - digits)});
}

}  // namespace

void Text::grow(size_t more) {
  std::string larger(2 * (size_ + more), '\0');
  std::memcpy(larger.data(), data_, size_);
  long_ = std::move(larger);
  data_ = long_.data();
  room_ = long_.size();
}

void specialise(const Kernel& kernel, PyObject* arguments, PyObject* constants, const Options& options, Text& key,
                Arguments* packed) {
  Specialiser specialiser(kernel, key, packed);
  key.add(kernel.name);
  Py_ssize_t used = 0;
  for (const Parameter& parameter : kernel.parameters) {
    key.add(" ");
    PyObject* name = parameter.name.get();
    PyObject* first = parameter.is_constant ? constants : arguments;
    PyObject* value = look_up(first, name);
    if (value == nullptr) value = look_up(first == constants ? arguments : constants, name);
    if (value != nullptr) {
      ++used;
    } else if ((value = parameter.value.get()) == nullptr) {
      PyErr_Format(PyExc_TypeError, "%s: the parameter %U is not given", kernel.name.c_str(), name);
      throw PythonError();
    }
    // data_ptr() may run Python, which may take the value out of its dict
    const Owned kept = Owned::of(value);
    parameter.is_constant ? specialiser.constant(parameter, value) : specialiser.argument(parameter, value);
  }
  if (used != PyDict_Size(arguments) + PyDict_Size(constants)) throw_wrong_names(kernel, arguments, constants);
  add_number(key, " warps=", options.num_warps);
  add_number(key, " stages=", options.num_stages);
  key.add(options.enable_fp_fusion ? " fused=1" : " fused=0");
}

}  // namespace sign_fast
