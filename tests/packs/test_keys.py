"""The launcher's keys are the build's, and what is no launch says so."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace

import pytest
import torch

from sign_fast.kernels import ahead_of_time
from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.packs import key
from sign_fast.kernels.sampler_step.launches import launches_noise
from tests.example_kernels import add, annotated_kernel, meta
from tests.packs.launching import copy, key_by, norm

_launcher = pytest.importorskip("sign_fast._launcher", reason="the launcher is not built")
pytestmark = pytest.mark.usefixtures("triton_cache")

POINTERS = list(ahead_of_time._POINTERS)
INTEGERS = (0, 1, 2, 15, 16, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, -(2**31), -(2**31) - 1, 2**62, 2**63 - 1)
VALUES = (*INTEGERS, 2**63, 2**64 - 16, 2**64 - 1, True, False, 1.0, 0.0, -2.5, float("nan"), None)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_keys_of_numbers_are_those_of_the_build(launcher, value):
    for name in ("skip", "n", "scale"):
        launch = copy()
        launch = replace(launch, arguments={**launch.arguments, name: value})
        assert key_by(launcher, launch) == key.key(launch)


@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_keys_of_tensors_are_those_of_the_build(launcher, dtype):
    for x, offset in itertools.product((torch.zeros(64, dtype=dtype), meta(64, dtype=dtype)), (0, 1, 2, 4, 8, 16)):
        for y in (x[offset:], torch.nn.Parameter(x[offset:], requires_grad=False)):
            launch = add(x, y, x)
            assert key_by(launcher, launch) == key.key(launch)


@pytest.mark.parametrize("value", [True, False, None, 1, 64, -3, 2**70, 1.0, 0.1, "ieee", "it's", "σ", "x" * 3000])
def test_keys_of_constants_are_those_of_the_build(launcher, value):
    launch = copy(constants={"BLOCK": 1024, "NAME": value})
    assert key_by(launcher, launch) == key.key(launch)
    other = replace(launch, constants={"BLOCK": value, "NAME": value})
    assert key_by(launcher, other) == key.key(other)


@pytest.mark.parametrize("options", [(1, 1, True), (8, 3, False), (32, 10, True)])
def test_keys_of_options_are_those_of_the_build(launcher, options):
    launch = copy(num_warps=options[0], num_stages=options[1], enable_fp_fusion=options[2])
    assert key_by(launcher, launch) == key.key(launch)


def test_a_key_reads_as_it_is_described(launcher):
    launch = copy(5000)
    want = f"{add.__module__}.add_kernel *fp32:16 None *fp32:16 i32 fp32 1024 'D' warps=4 stages=1 fused=1"
    assert key_by(launcher, launch) == want
    one = replace(launch, arguments={**launch.arguments, "n": 1, "scale": 16})
    assert " 1 i32:16 1024 " in key_by(launcher, one)
    assert key_by(launcher, norm()).startswith("group_norm_silu.triton_kernels.forward_tile *bf16:16 None None None ")


def test_keys_of_the_operations_are_those_of_the_build(launcher):
    seeds, y = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 3, 32, 32)
    launches = [norm(), norm(96)]
    for step in (0, 1, 2, 16):  # which is in no variant: do_not_specialize
        launches += launches_noise(seeds, step, y, 1.0, KNOWN[90])
    for launch in launches:
        assert key_by(launcher, launch) == key.key(launch)
    assert len({key.key(launch) for launch in launches[2:]}) == 1


def test_parameters_whose_alignment_is_no_matter(launcher):
    declared = [("x", False, None, True, False), ("n", False, 16, True, False), ("one", False, 1, False, True)]
    launcher.declare("plain", declared)
    found = launcher.key("plain", {"x": torch.zeros(4)}, {}, 4, 1, True)
    assert found == "plain *fp32 i32 i32 warps=4 stages=1 fused=1"
    with pytest.raises(TypeError, match="wide is i64"):
        key.parameters(annotated_kernel)


def test_a_value_that_is_not_given_is_the_default(launcher):
    launcher.declare("k", [("a", False, None), ("n", False, 7), ("C", True, "D"), ("needed", False, inspect._empty)])
    assert launcher.key("k", {"needed": 3}, {}, 4, 2, False) == "k None i32 'D' i32 warps=4 stages=2 fused=0"
    assert launcher.key("k", {"needed": 3, "n": 1}, {"C": 2}, 4, 2, 0).startswith("k None 1 2 i32 ")
    with pytest.raises(TypeError, match="k: the parameter needed is not given"):
        launcher.key("k", {}, {}, 4, 1, True)


def test_values_and_subclasses_of_numbers_and_of_tensors(launcher):
    class Count(int):
        pass

    class Length(float):
        pass

    class Pointer:
        dtype = torch.float16

        def __init__(self, address):
            self.address = address

        def data_ptr(self):
            return self.address

    launcher.declare("k", [("a", False, None), ("b", False, None), ("c", False, None)])
    found = launcher.key("k", {"a": Count(16), "b": Length(2), "c": Pointer(2**63 + 32)}, {}, 4, 1, True)
    assert found.startswith("k i32:16 fp32 *fp16:16 ")
    found = launcher.key("k", {"a": Pointer(8), "b": torch.zeros(0), "c": torch.zeros(3)[1]}, {}, 4, 1, True)
    assert found.startswith("k *fp16 *fp32:16 *fp32 ")


@pytest.mark.parametrize(
    "value", ["x", (1,), 1j, object(), torch.float32, 2**64, -(2**63) - 1], ids=lambda value: type(value).__name__
)
def test_no_argument(launcher, value):
    launcher.declare("k", [("a", False, None), ("place", False, None)])
    with pytest.raises(TypeError, match="k: the parameter place takes"):
        launcher.key("k", {"place": value}, {}, 4, 1, True)


@pytest.mark.parametrize("value", [(1,), torch.float32, torch.zeros(1), b"x"], ids=repr)
def test_no_constant(launcher, value):
    launcher.declare("k", [("PLACE", True, None)])
    with pytest.raises(TypeError, match="k: the parameter PLACE is a constant"):
        launcher.key("k", {}, {"PLACE": value}, 4, 1, True)


def test_no_tensor(launcher):
    launcher.declare("k", [("place", False, None)])
    with pytest.raises(TypeError, match=r"the parameter place takes no tensor of torch\.complex64"):
        launcher.key("k", {"place": torch.zeros(2, dtype=torch.complex64)}, {}, 4, 1, True)
    with pytest.raises(TypeError, match="place is on the meta device"):
        launcher.launch(0, 0, "k", (1,), {"place": meta(4)}, {}, 4, 1, True)

    class Broken:
        def data_ptr(self):
            raise RuntimeError("no address")

    with pytest.raises(RuntimeError, match="no address"):
        launcher.key("k", {"place": Broken()}, {}, 4, 1, True)


def test_names_that_are_none(launcher):
    with pytest.raises(LookupError, match="'k' has not been declared"):
        launcher.key("k", {}, {}, 4, 1, True)
    launcher.declare("k", [("a", False, None), ("B", True, None)])
    with pytest.raises(TypeError, match="k has no parameter 'c'"):
        launcher.key("k", {"a": 1, "c": 2}, {}, 4, 1, True)
    with pytest.raises(TypeError, match="among the arguments and the constants"):
        launcher.key("k", {"a": 1}, {"a": 1}, 4, 1, True)
    with pytest.raises(TypeError, match="dicts by parameter name"):
        launcher.key("k", [("a", 1)], {}, 4, 1, True)


def test_declarations(launcher):
    rows = [("a", False, None), ("n", False, 7)]
    launcher.declare("k", rows)
    launcher.declare(kernel="k", parameters=tuple(tuple(row) for row in rows))
    launcher.declare("k", [[*row, True, True] for row in rows])
    for other in (rows[:1], [*rows, ("x", True, 1)], [rows[0], ("n", False, 7.0)], [rows[0], ("n", True, 7)]):
        with pytest.raises(ValueError, match="k has been declared with other parameters"):
            launcher.declare("k", other)
    for wrong in ([("a",)], [(1, True, None)], [3], 3):
        with pytest.raises(TypeError):
            launcher.declare("other", wrong)
    with pytest.raises(ValueError, match="too many"):
        launcher.declare("long", [(f"a{i}", False, None) for i in range(300)])
    with pytest.raises(LookupError):
        launcher.key("other", {}, {}, 4, 1, True)


def test_calls_that_are_none(launcher):
    launcher.declare("k", [])
    with pytest.raises(TypeError, match="lacks the argument enable_fp_fusion"):
        launcher.launch(0, 0, "k", (1,), {}, {}, 4, 1)
    with pytest.raises(TypeError, match="takes no argument 'speed'"):
        launcher.key("k", {}, {}, 4, 1, True, speed=3)
    for grid in ((), (1, 1, 1, 1), [1], 1):
        with pytest.raises(TypeError, match="a tuple of 1 to 3 integers"):
            launcher.launch(0, 0, "k", grid, {}, {}, 4, 1, True)
    for grid in ((-1,), (1, 2**32)):
        with pytest.raises(ValueError, match="a grid's number of programs"):
            launcher.launch(0, 0, "k", grid, {}, {}, 4, 1, True)
    with pytest.raises(ValueError, match="num_warps 33"):
        launcher.key("k", {}, {}, 33, 1, True)
    with pytest.raises(ValueError, match="device -1"):
        launcher.launch(-1, 0, "k", (1,), {}, {}, 4, 1, True)
    with pytest.raises(TypeError, match="a str is needed"):
        launcher.key(3, {}, {}, 4, 1, True)
