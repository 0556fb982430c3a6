"""The calls that builds look at are those of the networks, and of any batch."""

from __future__ import annotations

import pytest
import torch

from sign_fast.deployment import recording
from sign_fast.deployment.diffusers_networks import text_to_image
from sign_fast.inference.launches import LaunchCounter
from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.packs import calls
from sign_fast.kernels.packs.calls import BATCH, BATCHES, Call, Shape, call_of
from sign_fast.kernels.packs.key import key
from sign_fast.models.presets import preset, preset_names
from sign_fast.sampling.buckets import LARGEST_BUCKET, bucket_of


@pytest.fixture(scope="module")
def networks():
    return calls.networks()


def test_the_table_has_the_networks(networks):
    assert list(networks) == [*preset_names(), "sd15", "sdxl"]
    for name, own in networks.items():
        operators = {call.operator for call in own}
        assert {"group_norm_silu", "group_norm_silu_forward", "group_norm_silu_backward"} <= operators, name
        dtypes = {a.dtype for call in own for a in call.arguments if isinstance(a, Shape)}
        assert {"float32", "bfloat16", "float16"} <= dtypes, name
        if not name.startswith("sd"):
            assert {"philox_normal", "combine", "finish_images", "distill_loss_gradients"} <= operators, name


def test_the_table_is_what_the_digits_network_calls(networks):
    """All of it in float16: sign_fast.deployment.networks writes it anew where this fails."""
    found = recording.calls_of(*preset("digits-uncond"), [torch.float16])
    table = networks["digits-uncond"]
    assert set(found) <= set(table)
    assert {call for call in table if '"float16"' in calls.to_json({"": [call]})} <= set(found)


@pytest.mark.parametrize("name", ["cifar10-cond-ve", "imagenet64-cond-adm"])
def test_the_table_has_the_generations_of_published_networks(networks, name):
    found = recording.generation(*preset(name), torch.bfloat16)
    assert found and set(found) <= set(networks[name])


def test_the_table_has_the_calls_of_diffusers_networks(networks):
    pytest.importorskip("diffusers")
    found = text_to_image("sd15", torch.float16)
    assert {call.operator for call in found} == {
        "group_norm_silu", "group_norm_silu_forward", "group_norm_silu_backward",
        "group_norm_silu_parameter_gradients", "residual_group_norm_silu",
        "attention", "attention_forward", "attention_backward", "combine", "finish_images",
    }  # fmt: skip
    assert set(found) <= set(networks["sd15"])
    silu = {call.arguments[-1] for call in found if call.operator == "residual_group_norm_silu"}
    assert silu == {True, False}  # resnets' and transformers' norms


def test_a_call_at_a_batch_is_the_network_at_that_batch():
    """What the network at batch 5 launches is what its calls, recorded at another batch, lead to at 5."""
    from sign_fast.inference.optimized import optimize

    cls, kwargs = preset("digits-cond")
    with torch.device("meta"):
        net = recording.CLASSES[cls](**kwargs).eval().to(memory_format=torch.channels_last)

    class Keys(LaunchCounter):
        def __init__(self):
            super().__init__()
            self.found = set()

        def _ours(self, name, args):
            self.found.update(
                key(launch) for launch in Call(name, tuple(map(calls._abstract, args))).launches(5, KNOWN[90])
            )
            return super()._ours(name, args)

    optimized = optimize(net, torch.bfloat16)
    x, sigma, labels = (
        torch.empty(5, 1, 8, 8, device="meta"),
        torch.empty(5, device="meta"),
        torch.empty(5, 10, device="meta"),
    )
    with Keys() as keys:
        optimized(x, sigma, labels)
    recorded = recording.generation(cls, kwargs, torch.bfloat16)
    want = {key(launch) for call in recorded for launch in call.launches(5, KNOWN[90])}
    assert keys.found and keys.found <= want | _of_precondition(recorded)


def _of_precondition(recorded):
    """A call with a noise level for each image preconditions with as many coefficients; generations have one."""
    found = set()
    for call in recorded:
        if call.operator == "sampler_step":
            rows = tuple(
                Shape(a.dtype, (-1,), (1,)) if isinstance(a, Shape) and a.size == (1,) else a for a in call.arguments
            )
            found |= {key(launch) for launch in Call(call.operator, rows).launches(5, KNOWN[90])}
    return found


def test_every_bucket_is_compiled():
    assert {bucket_of(n) for n in range(1, LARGEST_BUCKET + 1)} <= set(BATCHES)
    assert {True, False} == {batch % 16 == 0 for batch in BATCHES if batch > 1}


def test_json_keeps_calls():
    x = torch.empty(3 * BATCH, 4, device="meta")[:, 1:]
    call = call_of("combine", ([x, None], torch.float64, 1.5, True, "a", 7))
    assert call.arguments[0][0] == Shape("float32", (-3, 3), (4, 1), 1)
    assert calls.from_json(calls.to_json({"a": [call, call], "b": []})) == {"a": [call, call], "b": []}
    back = call.arguments[0][0].at(5)
    assert back.shape == (15, 3) and back.stride() == (4, 1) and back.storage_offset() == 1 and back.is_meta


def test_a_number_that_depends_on_the_batch_is_refused():
    with pytest.raises(ValueError, match="depends on the batch"):
        call_of("combine", (2 * BATCH,))
