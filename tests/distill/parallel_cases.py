"""Small distillations in float64 that any number of processes runs; as a program, all of them under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sign_fast import models
from sign_fast.distill.iteration import Iteration
from sign_fast.distill.networks import build_networks
from sign_fast.distill.settings import DistillSettings
from tests.golden_rules import fill, normal

ITERATIONS = 2
LATER = 4  # where those that go on from a state stop: one step would not show all that Adam remembers
BATCH = 8
SHAPE = (1, 8, 8)
NETWORK = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "augment_dim": 9,
    "dropout": 0.0,
}
SIDA = {"adversarial_kimg": 0, "student_kimg": 0, "adversarial_weight": 1.0}
SIGN = {"fake_updates": 2, "reg": 1.0, "idem_ramp_kimg": 0.02}
CASES = {
    "sid": ("sid", {}),
    "sid-combined": ("sid", {"update": "combined", "accumulation": 2}),
    "sid-few-step": ("sid", {"steps": 3, "accumulation": 2}),
    "sida": ("sida", {**SIDA, "accumulation": 2}),
    "sida-combined": ("sida", {**SIDA, "update": "combined"}),
    "sign": ("sign", {**SIGN, "checkpointing": True}),
    "sign-combined": ("sign", {**SIGN, "update": "combined", "accumulation": 2}),
}
RUNS = [(case, "ddp") for case in CASES if case != "sid"]  # the few-step case alternates, too
RUNS += [(case, "fsdp") for case in CASES if case not in ("sid", "sign-combined")]
RESUMED = ("sid-combined", "sign")
MOVES = [  # case, whose state, what goes on from it
    (case, origin, parallel)
    for case in RESUMED
    for origin, parallel in [("alone", "ddp"), ("alone", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")]
]


def iteration_of(case, dtype=torch.float64, **changes):
    """The updates of a case, with a fake score that is not the teacher."""
    method, settings = CASES[case]
    teacher = fill(models.EDMPrecond(**NETWORK), 1).to(memory_format=torch.channels_last)  # as they are loaded
    networks = build_networks(teacher, "EDMPrecond", NETWORK, time_free=method == "sign")
    with torch.no_grad():
        for i, p in enumerate(networks.fake.parameters()):
            p.add_(0.02 * normal(100 + i, *p.shape))
    for net in (networks.teacher, networks.fake, networks.student, networks.ema, networks.frozen):
        if net is not None and dtype != torch.float32:
            net.to(dtype).dtype = dtype
    common = {"batch": BATCH, "lr": 1e-3, "kimg": 1.0, "ema_halflife_kimg": 0.02, "student_scale": 1.0}
    # both moments count, and gradients that are 0 but for rounding make no steps
    common |= {"betas": (0.5, 0.99), "eps": 1e-4}
    return Iteration(DistillSettings(method, "", **{**common, **settings, **changes}), networks)


def run(updates, start, stop):
    """Losses of iterations start … stop − 1, means over the whole batch."""
    share = BATCH // updates.world
    part = slice(updates.rank * share, (updates.rank + 1) * share)
    trajectory = []
    for number in range(start, stop):
        labels = torch.eye(3)[torch.arange(BATCH) % 3][part]
        images = normal(number, BATCH, *SHAPE)[part].clamp(-1, 1).double()
        pairs = normal(50 + number, BATCH, *SHAPE)[part], images.flip(3), labels
        given = {} if updates.settings.method == "sid" else {"images": images, "labels": labels}
        if updates.settings.reg:
            given["pairs"] = pairs
        found = updates.run(number, **given)
        values = torch.stack([value.double() for value in found.values()])
        if updates.world > 1:
            dist.all_reduce(values)
        trajectory.append(dict(zip(found, (values / updates.world).tolist(), strict=True)))
    return trajectory


def copied(state):
    """A state's tensors are those of the run."""
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def go_on(case, state, **changes):
    """(trajectory, state) of a run that goes on from the state of another."""
    updates = iteration_of(case, **changes)
    updates.load_state(state)
    return run(updates, ITERATIONS, LATER), updates.state()


def main(folder):
    """Run every case from its start and from states of others; rank 0 writes what came out."""
    dist.init_process_group("gloo")
    results = {}
    for case, parallel in RUNS:
        updates = iteration_of(case, parallel=parallel)
        results[case, parallel] = run(updates, 0, ITERATIONS)
        if case in RESUMED:
            state = results[case, parallel, "state"] = updates.state()
            if dist.get_rank() == 0:
                torch.save(state, folder / f"{case}-{parallel}.pt")
    dist.barrier()
    for case, origin, parallel in MOVES:
        state = torch.load(folder / f"{case}-{origin}.pt", weights_only=True)
        results[case, origin, parallel] = go_on(case, state, parallel=parallel)
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
