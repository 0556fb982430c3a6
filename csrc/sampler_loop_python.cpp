// sign_fast._C.Plan: the sampler loop for Python, over a Python callable.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "sampler_loop.h"

namespace py = pybind11;

namespace sign_fast {
namespace {

class Callable : public Denoiser {
 public:
  explicit Callable(py::object function) : function_(std::move(function)) {}

  at::Tensor call(const at::Tensor& x, int64_t level) override {
    const py::gil_scoped_acquire held;
    const py::object denoised = function_(x, level);
    if (!THPVariable_Check(denoised.ptr())) {
      throw py::type_error("the denoiser must give a tensor, not " + std::string(Py_TYPE(denoised.ptr())->tp_name));
    }
    return THPVariable_Unpack(denoised.ptr());
  }

 private:
  py::object function_;  // borrowed for the time of a run: destroyed with the GIL held
};

void check_signals() {
  const py::gil_scoped_acquire held;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

at::Tensor run(const Plan& plan, py::object function, const std::vector<at::Tensor>& draws,
               const std::optional<at::Tensor>& coefficients) {
  Callable denoiser(std::move(function));
  const py::gil_scoped_release released;
  return plan.run(denoiser, draws, check_signals, coefficients);
}

}  // namespace

void bind_sampler_loop(py::module_& m) {
  py::class_<Plan>(m, "Plan", "A sampler's steps, as sign_fast.sampling.plan.Plan has them.")
      .def(py::init<int64_t, int64_t, int64_t, at::ScalarType>(), py::arg("registers"), py::arg("draws"),
           py::arg("result"), py::arg("dtype"))
      .def(
          "combine",
          [](Plan& plan, int64_t target, Terms states, Terms noise) {
            plan.add(Combine{target, std::move(states), std::move(noise)});
          },
          py::arg("target"), py::arg("terms"), py::arg("noise"))
      .def(
          "call",
          [](Plan& plan, int64_t target, int64_t source, int64_t level) { plan.add(Call{target, source, level}); },
          py::arg("target"), py::arg("source"), py::arg("level"))
      .def("run", run, py::arg("denoiser"), py::arg("draws"), py::arg("coefficients") = py::none(),
           "Runs it with denoiser(x, level); the GIL is held while the denoiser runs only.");
}

}  // namespace sign_fast
