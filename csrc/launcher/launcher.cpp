// sign_fast._launcher: precompiled kernels launched from Python, see sign_fast/_launcher.pyi for what each call does.
#include <algorithm>
#include <memory>
#include <new>

#include "specialise.h"

namespace sign_fast {
namespace {

PyObject* driver_error = nullptr;

struct State {
  explicit State(const char* library) : modules(library) {}

  Modules modules;
  // never taken out: a launch may be under way while another thread declares
  std::unordered_map<std::string_view, std::unique_ptr<Kernel>> kernels;
};

struct LauncherObject {
  PyObject_HEAD
  State* state;
};

State& state_of(PyObject* self) { return *reinterpret_cast<LauncherObject*>(self)->state; }

void set_driver_error(const DriverFailure& failure) {
  const Owned error(PyObject_CallFunction(driver_error, "s", failure.what()));
  const Owned code(PyLong_FromLong(failure.code)), function(PyUnicode_FromString(failure.function.c_str()));
  if (!error.get() || !code.get() || !function.get()) return;
  if (PyObject_SetAttrString(error.get(), "code", code.get()) < 0) return;
  if (PyObject_SetAttrString(error.get(), "function", function.get()) < 0) return;
  PyErr_SetObject(driver_error, error.get());
}

// A function's result as Python takes it: null with the error set where it throws.
template <typename Body>
PyObject* guarded(const Body& body) {
  try {
    return body().release();
  } catch (const PythonError&) {
  } catch (const DriverFailure& failure) {
    set_driver_error(failure);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

Owned none() { return Owned::of(Py_None); }

// A call's arguments by place or by name into `out`, borrowed; all have to be there.
template <size_t N>
std::array<PyObject*, N> unpack(const char* function, const char* const (&names)[N], PyObject* const* arguments,
                                Py_ssize_t count, PyObject* keywords) {
  std::array<PyObject*, N> out{};
  if (count > static_cast<Py_ssize_t>(N)) {
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, not %zd", function, N, count);
    throw PythonError();
  }
  std::copy_n(arguments, count, out.begin());
  for (Py_ssize_t i = 0; keywords != nullptr && i < PyTuple_Size(keywords); ++i) {
    PyObject* name = PyTuple_GetItem(keywords, i);
    size_t place = 0;
    while (place < N && PyUnicode_CompareWithASCIIString(name, names[place]) != 0) ++place;
    if (place == N || out[place] != nullptr) {
      PyErr_Format(PyExc_TypeError, "%s() takes no argument %R, or was given it twice", function, name);
      throw PythonError();
    }
    out[place] = arguments[count + i];
  }
  for (size_t i = 0; i < N; ++i) {
    if (out[i] == nullptr) {
      PyErr_Format(PyExc_TypeError, "%s() lacks the argument %s", function, names[i]);
      throw PythonError();
    }
  }
  return out;
}

long number(PyObject* object, long least, long most, const char* what) {
  const long value = PyLong_AsLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  if (value < least || value > most) {
    PyErr_Format(PyExc_ValueError, "%s %ld is not in %ld to %ld", what, value, least, most);
    throw PythonError();
  }
  return value;
}

bool truth(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw PythonError();
  return value;
}

std::string_view bytes_of(PyObject* object) {
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(object, &data, &size) < 0) throw PythonError();
  return {data, static_cast<size_t>(size)};
}

const Kernel& kernel_of(const State& state, PyObject* name) {
  const auto found = state.kernels.find(text_of(name));
  if (found == state.kernels.end()) {
    PyErr_Format(PyExc_LookupError, "the kernel %R has not been declared", name);
    throw PythonError();
  }
  return *found->second;
}

Options options_of(PyObject* num_warps, PyObject* num_stages, PyObject* enable_fp_fusion) {
  return {number(num_warps, 1, 32, "num_warps"), number(num_stages, 0, 1 << 20, "num_stages"), truth(enable_fp_fusion)};
}

void check_dicts(PyObject* arguments, PyObject* constants) {
  if (!PyDict_Check(arguments) || !PyDict_Check(constants)) {
    PyErr_SetString(PyExc_TypeError, "arguments and constants are dicts by parameter name");
    throw PythonError();
  }
}

std::array<unsigned, 3> grid_of(PyObject* grid) {
  const Py_ssize_t size = PyTuple_Check(grid) ? PyTuple_Size(grid) : 0;
  if (size < 1 || size > 3) {
    PyErr_SetString(PyExc_TypeError, "a grid is a tuple of 1 to 3 integers");
    throw PythonError();
  }
  std::array<unsigned, 3> programs{1, 1, 1};
  for (Py_ssize_t i = 0; i < size; ++i) {
    programs[i] = static_cast<unsigned>(number(PyTuple_GetItem(grid, i), 0, UINT32_MAX, "a grid's number of programs"));
  }
  return programs;
}

Parameter parameter_of(PyObject* object) {
  const Owned item = Owned::checked(PySequence_Tuple(object));
  PyObject *name, *value;
  int is_constant, by_value = 1, alignment = 1;
  if (!PyArg_ParseTuple(item.get(), "UpO|pp:declare", &name, &is_constant, &value, &by_value, &alignment)) {
    throw PythonError();
  }
  Py_INCREF(name);
  PyUnicode_InternInPlace(&name);
  // inspect.Parameter.empty, which is what Triton's parameters have, stands for no default
  Owned fallback = PyType_Check(value) ? Owned() : Owned::of(value);
  return {Owned(name), is_constant != 0, std::move(fallback), by_value != 0, alignment != 0, {}, {}};
}

bool equal(const Parameter& a, const Parameter& b) {
  const auto same = [](PyObject* x, PyObject* y) {
    if (x == y) return true;
    if (x == nullptr || y == nullptr || Py_TYPE(x) != Py_TYPE(y)) return false;
    const int result = PyObject_RichCompareBool(x, y, Py_EQ);
    if (result < 0) throw PythonError();
    return result != 0;
  };
  return a.is_constant == b.is_constant && a.by_value == b.by_value && a.alignment == b.alignment &&
         same(a.name.get(), b.name.get()) && same(a.value.get(), b.value.get());
}

PyObject* declare(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    static constexpr const char* NAMES[] = {"kernel", "parameters"};
    const auto [name, parameters] = unpack("declare", NAMES, given, count, keywords);
    auto kernel = std::make_unique<Kernel>();
    kernel->name = text_of(name);
    const Owned items = Owned::checked(PySequence_Tuple(parameters));
    const Py_ssize_t size = PyTuple_Size(items.get());
    size_t arguments = 0;
    for (Py_ssize_t i = 0; i < size; ++i) {
      kernel->parameters.push_back(parameter_of(PyTuple_GetItem(items.get(), i)));
      arguments += !kernel->parameters.back().is_constant;
    }
    if (arguments > MOST_ARGUMENTS) throw std::invalid_argument(kernel->name + " has too many parameters");
    auto& kernels = state_of(self).kernels;
    if (const auto old = kernels.find(kernel->name); old != kernels.end()) {
      const auto &before = old->second->parameters, &now = kernel->parameters;
      if (!std::equal(before.begin(), before.end(), now.begin(), now.end(), equal)) {
        throw std::invalid_argument(kernel->name + " has been declared with other parameters");
      }
      return none();
    }
    const std::string_view key = kernel->name;
    kernels.emplace(key, std::move(kernel));
    return none();
  });
}

PyObject* key(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    static constexpr const char* NAMES[] = {"kernel",     "arguments",  "constants",
                                            "num_warps", "num_stages", "enable_fp_fusion"};
    const auto [name, arguments, constants, warps, stages, fused] = unpack("key", NAMES, given, count, keywords);
    check_dicts(arguments, constants);
    Text text;
    specialise(kernel_of(state_of(self), name), arguments, constants, options_of(warps, stages, fused), text, nullptr);
    return Owned::checked(PyUnicode_FromStringAndSize(text.view().data(), static_cast<Py_ssize_t>(text.view().size())));
  });
}

PyObject* add(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    static constexpr const char* NAMES[] = {"device",    "key",          "image",          "symbol",
                                            "num_warps", "shared_bytes", "parameter_sizes"};
    const auto [device, key, image, symbol, warps, shared, sizes] = unpack("add", NAMES, given, count, keywords);
    const int number_of_device = static_cast<int>(number(device, 0, INT32_MAX, "the device"));
    const auto num_warps = static_cast<unsigned>(number(warps, 1, 32, "num_warps"));
    const auto shared_bytes = static_cast<unsigned>(number(shared, 0, INT32_MAX, "shared_bytes"));
    const std::string_view key_text = text_of(key), machine_code = bytes_of(image), size_bytes = bytes_of(sizes);
    const std::string name(text_of(symbol));
    Modules& modules = state_of(self).modules;
    {
      const Released released;
      modules.add(number_of_device, key_text, machine_code, name, num_warps, shared_bytes, size_bytes);
    }
    return none();
  });
}

PyObject* launch(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    static constexpr const char* NAMES[] = {"device",    "stream",    "kernel",     "grid",            "arguments",
                                            "constants", "num_warps", "num_stages", "enable_fp_fusion"};
    const auto [device, stream, name, grid, arguments, constants, warps, stages, fused] =
        unpack("launch", NAMES, given, count, keywords);
    State& state = state_of(self);
    const int number_of_device = static_cast<int>(number(device, 0, INT32_MAX, "the device"));
    auto* const handle = static_cast<Stream>(PyLong_AsVoidPtr(stream));
    if (handle == nullptr && PyErr_Occurred()) throw PythonError();
    const auto programs = grid_of(grid);
    check_dicts(arguments, constants);
    Text text;
    Arguments packed;
    specialise(kernel_of(state, name), arguments, constants, options_of(warps, stages, fused), text, &packed);
    const Entry* entry = state.modules.find(number_of_device, text.view());
    if (entry == nullptr) {
      return Owned::checked(
          PyUnicode_FromStringAndSize(text.view().data(), static_cast<Py_ssize_t>(text.view().size())));
    }
    {
      const Released released;
      state.modules.launch(*entry, handle, programs, packed);
    }
    return none();
  });
}

PyObject* driver_version(PyObject* self, PyObject*) {
  return guarded([&] {
    Modules& modules = state_of(self).modules;
    int version = 0;
    {
      const Released released;
      version = modules.driver_version();
    }
    return Owned::checked(PyLong_FromLong(version));
  });
}

PyObject* loaded(PyObject* self, void*) {
  return guarded([&] {
    Owned counts = Owned::checked(PyDict_New());
    for (const auto& [device, count] : state_of(self).modules.loaded()) {
      const Owned name = Owned::checked(PyLong_FromLong(device)), value = Owned::checked(PyLong_FromSize_t(count));
      if (PyDict_SetItem(counts.get(), name.get(), value.get()) < 0) throw PythonError();
    }
    return counts;
  });
}

PyObject* launches(PyObject* self, void*) { return PyLong_FromUnsignedLongLong(state_of(self).modules.launches()); }

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  return guarded([&] {
    static const char* names[] = {"driver", nullptr};
    const char* library = "libcuda.so.1";
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|s:Launcher", const_cast<char**>(names), &library)) {
      throw PythonError();
    }
    auto state = std::make_unique<State>(library);
    Owned self = Owned::checked(PyType_GenericAlloc(type, 0));
    reinterpret_cast<LauncherObject*>(self.get())->state = state.release();
    return self;
  });
}

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<LauncherObject*>(self)->state;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

template <typename Method>
PyMethodDef fast(const char* name, Method method, const char* text) {
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method));
  return {name, function, METH_FASTCALL | METH_KEYWORDS, text};
}

PyObject* make_module() {
  static PyMethodDef methods[] = {
      fast("declare", declare, "declare(kernel, parameters): a kernel's parameters in order."),
      fast("key", key, "key(kernel, arguments, constants, num_warps, num_stages, enable_fp_fusion) -> str"),
      fast("add", add,
           "add(device, key, image, symbol, num_warps, shared_bytes, parameter_sizes): load a kernel on a device."),
      fast("launch", launch,
           "launch(device, stream, kernel, grid, arguments, constants, num_warps, num_stages, enable_fp_fusion)\n"
           "-> None where it was launched, else the key that has not been added for that device."),
      {"driver_version", driver_version, METH_NOARGS, "The CUDA version that the driver supports: 12080 for 12.8."},
      {},
  };
  static PyGetSetDef properties[] = {
      {"loaded", loaded, nullptr, "Number of modules by device.", nullptr},
      {"launches", launches, nullptr, "How many kernels were launched.", nullptr},
      {},
  };
  static PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(make)},
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
      {Py_tp_methods, methods},
      {Py_tp_getset, properties},
      {Py_tp_doc, const_cast<char*>("Launcher(driver=\"libcuda.so.1\"): precompiled kernels on this process's GPUs.")},
      {},
  };
  static PyType_Spec spec = {"sign_fast._launcher.Launcher", sizeof(LauncherObject), 0, Py_TPFLAGS_DEFAULT, slots};
  static constexpr char text[] = "Launches precompiled CUDA kernels, without torch or Triton.";
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_launcher", text, -1, nullptr, {}, {}, {}, {}};
  return guarded([&] {
    Owned module = Owned::checked(PyModule_Create(&definition));
    const Owned attributes = Owned::checked(Py_BuildValue("{s:i,s:s}", "code", 0, "function", ""));
    Owned error = Owned::checked(PyErr_NewExceptionWithDoc(
        "sign_fast._launcher.DriverError",
        "A call of the CUDA driver failed: `function` gave `code`, or 0 where the library itself is unusable.",
        PyExc_RuntimeError, attributes.get()));
    driver_error = Owned::of(error.get()).release();
    const Owned type = Owned::checked(PyType_FromSpec(&spec));
    if (PyModule_AddObjectRef(module.get(), "DriverError", error.get()) < 0) throw PythonError();
    if (PyModule_AddObjectRef(module.get(), "Launcher", type.get()) < 0) throw PythonError();
    return module;
  });
}

}  // namespace
}  // namespace sign_fast

PyMODINIT_FUNC PyInit__launcher() { return sign_fast::make_module(); }
