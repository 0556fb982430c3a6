// From the Python description of a program to C++, and its pybind11 class.
#include "memory.h"
#include "program.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace py = pybind11;

namespace sign_fast {
namespace {

int64_t number(const py::handle& value) { return value.is_none() ? kNone : value.cast<int64_t>(); }

Columns columns(const py::handle& value) {
  if (value.is_none()) return {};
  return {value.attr("start").cast<int64_t>(), value.attr("stop").cast<int64_t>()};
}

Operation operation(const py::handle& o) {
  const auto kind = py::type::of(o).attr("__name__").cast<std::string>();
  const auto list = [&](const char* name) { return o.attr(name).cast<std::vector<int64_t>>(); };
  const auto index = [&](const char* name) { return number(o.attr(name)); };
  const auto real = [&](const char* name) { return o.attr(name).cast<double>(); };
  const auto flag = [&](const char* name) { return o.attr(name).cast<bool>(); };
  if (kind == "Convolution")
    return ConvolutionOperation{list("inputs"),    index("output"),
                                index("weight"),   index("bias"),
                                index("padding"),  resampling_of(o.attr("resampling").cast<std::string>()),
                                index("residual"), flag("residual_up"),
                                real("residual_scale"), real("scale")};
  if (kind == "Filter")
    return FilterOperation{index("input"),   index("output"), index("filter"),   flag("up"),
                           index("padding"), index("bias"),   index("residual"), real("scale")};
  if (kind == "Norm")
    return NormOperation{list("inputs"),           index("output"),         index("groups"),
                         real("eps"),              index("weight"),         index("bias"),
                         index("input_bias"),      columns(o.attr("emb")),  columns(o.attr("scale")),
                         columns(o.attr("shift")), flag("silu")};
  if (kind == "JoinNorm")
    return JoinNormOperation{index("input"),  index("skip"), index("sum"),    index("output"), real("skip_scale"),
                             index("join_bias"), index("groups"), real("eps"), index("weight"), index("bias"),
                             flag("silu")};
  TORCH_CHECK(kind == "Attention", "unknown operation ", kind);
  return AttentionOperation{index("input"), index("output"), index("heads")};
}

ProgramData parse(const py::handle& program) {
  ProgramData data;
  for (const auto& buffer : program.attr("buffers"))
    data.buffers.push_back({buffer.attr("channels").cast<int64_t>(), buffer.attr("height").cast<int64_t>(),
                            buffer.attr("width").cast<int64_t>()});
  for (const auto& o : program.attr("operations")) data.operations.push_back(operation(o));
  data.constants = program.attr("constants").cast<std::vector<at::Tensor>>();
  data.output = program.attr("output").cast<int64_t>();
  data.width = program.attr("width").cast<int64_t>();
  return data;
}

std::shared_ptr<Executor> make(const py::handle& program, bool native, at::ScalarType dtype, bool consume) {
  ProgramData data = parse(program);
  const py::gil_scoped_release released;
  return native ? native_executor(data, consume) : aten_executor(std::move(data), dtype);
}

}  // namespace

std::vector<int64_t> inputs_of(const Operation& operation) {
  struct Visitor {
    std::vector<int64_t> operator()(const ConvolutionOperation& o) const { return with(o.inputs, o.residual); }
    std::vector<int64_t> operator()(const FilterOperation& o) const { return with({o.input}, o.residual); }
    std::vector<int64_t> operator()(const NormOperation& o) const { return o.inputs; }
    std::vector<int64_t> operator()(const JoinNormOperation& o) const { return {o.input, o.skip}; }
    std::vector<int64_t> operator()(const AttentionOperation& o) const { return {o.input}; }
    static std::vector<int64_t> with(std::vector<int64_t> list, int64_t more) {
      if (more != kNone) list.push_back(more);
      return list;
    }
  };
  return std::visit(Visitor{}, operation);
}

std::vector<int64_t> outputs_of(const Operation& operation) {
  if (const auto* o = std::get_if<JoinNormOperation>(&operation)) return {o->sum, o->output};
  return {std::visit([](const auto& o) { return o.output; }, operation)};
}

std::vector<std::vector<int64_t>> ProgramData::last_uses() const {
  std::vector<int64_t> last(buffers.size(), kNone);
  for (size_t i = 0; i < operations.size(); ++i) {
    for (int64_t b : inputs_of(operations[i])) last[b] = static_cast<int64_t>(i);
    // what nothing reads, such as the sum of a join before the last layer, ends where it is written
    for (int64_t b : outputs_of(operations[i])) last[b] = static_cast<int64_t>(i);
  }
  std::vector<std::vector<int64_t>> uses(operations.size());
  for (size_t b = 0; b < buffers.size(); ++b)
    if (last[b] != kNone && static_cast<int64_t>(b) != output) uses[last[b]].push_back(static_cast<int64_t>(b));
  return uses;
}

void bind_program(py::module_& m) {
  m.def("return_freed_memory", return_freed_memory, "Hand what malloc keeps unused back to the system.");
  py::class_<Executor, std::shared_ptr<Executor>>(m, "Program", "A network without Python; see sign_fast.inference.")
      .def(py::init(&make), py::arg("program"), py::arg("native"), py::arg("dtype"), py::arg("consume"))
      .def("run", &Executor::run, py::arg("x"), py::arg("rows"), py::call_guard<py::gil_scoped_release>())
      .def("denoise", &Executor::denoise, py::arg("x"), py::arg("rows"), py::arg("coefficients"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bytes", &Executor::bytes);
}

}  // namespace sign_fast
