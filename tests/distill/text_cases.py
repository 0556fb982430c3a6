"""Small text-to-image distillations for tests; as a script, one that is killed with -9, or two processes' runs."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from sign_fast.distill import run_monitor
from sign_fast.distill.text_to_image import inputs, monitor
from sign_fast.distill.text_to_image.settings import TextToImageSettings
from sign_fast.distill.text_to_image.trainer import TextDistiller
from tests.integrations.diffusers import tiny

CPU = torch.device("cpu")
PROMPTS = [f"a {colour} {thing} on the cat" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "tree")]
ITERATIONS = 5


@cache
def teacher(kind: str) -> Path:
    """A tiny pipeline's folder with a UNet of a quarter of its channels; leave it as it is."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = shutil.copytree(tiny.folder(kind), root / kind)
    unet = tiny.unet(kind)
    config = {**unet.config, "block_out_channels": (8, 16), "attention_head_dim": 4, "norm_num_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = type(unet).from_config(config)
        with torch.no_grad():
            unet.conv_out.weight.mul_(3)  # whose outputs are then of the size of noise
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    return folder


def write_prompts(path: Path, prompts=PROMPTS) -> str:
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return str(path)


def write_images(folder: Path, count: int = 5) -> str:
    """Images of several sizes with a .txt each."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(draws.integers(0, 256, (70 + i, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a cat {i}\n")
    return str(folder)


def settings(teacher, prompts: str, **changes) -> TextToImageSettings:
    """Five iterations of four images, a state every two and a check every three."""
    base = {"batch": 4, "kimg": ITERATIONS * 0.004, "lr": 1e-4, "seed": 5, "log_every": 1, "save_every": 2}
    base |= {"quality_every": 3, "samples": 2, "ema_halflife_kimg": 0.02, "stop_factor": float("inf")}
    return TextToImageSettings("sid-latent", str(teacher), prompts=prompts, **{**base, **changes})


def leave_away_what_takes_long(set_: Callable[[object, str, object], None]) -> None:
    """Curves, and most of the teacher's calls for a reference; `set_` is setattr, or a fixture's."""
    set_(run_monitor, "draw_curves", lambda *arguments, **options: "")
    set_(monitor, "_TEACHER_CALLS", 3)


# ---- several processes ----

PARALLEL = {  # by name: kind of pipeline, settings
    "adversarial": ("flow", {"guidance": "lsg-4.5", "steps": 2, "accumulation": 2, "data": "DATA"}),
    "lora": ("sd2-v", {"guidance": "anti-cfg", "guidance_scale": -0.5, "fake_lora": 2, "checkpointing": True}),
}
RUNS = [("adversarial", "ddp"), ("adversarial", "fsdp"), ("lora", "fsdp")]


def parallel_settings(root: Path, case: str, parallel: str) -> TextToImageSettings:
    kind, changes = PARALLEL[case]
    changes = {name: str(root / "data") if value == "DATA" else value for name, value in changes.items()}
    # both moments count, and gradients that are 0 but for rounding make no steps
    changes |= {"kimg": 0.008, "betas": (0.5, 0.99), "eps": 1e-4, "lr": 1e-3, "parallel": parallel, "samples": 1}
    return settings(root / kind, str(root / "prompts.txt"), cache=str(root / "cache" / case), **changes)


def _together(root: Path, folder: Path) -> None:
    """Every case under both kinds of parallelism, in this process group."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    leave_away_what_takes_long(setattr)
    inputs._TEXT_SHARD, inputs._LATENT_SHARD = 3, 2  # several files, for each process some
    for case, parallel in RUNS:
        TextDistiller(parallel_settings(root, case, parallel), folder / f"{case}-{parallel}", CPU).run()
    dist.destroy_process_group()


# ---- kill -9 ----


def _killed(teacher: str, prompts: str, folder: Path) -> None:
    """Die while the second state is written."""
    save = torch.save

    def cut(state, path):
        save(state, path)
        if state["iteration"] == 4:
            with open(path, "rb+") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = cut
    leave_away_what_takes_long(setattr)
    torch.set_num_threads(1)
    TextDistiller(settings(teacher, prompts, steps=2, guidance="lsg"), folder, CPU).run()


# ---- golden numbers ----


class GivenDraws:
    """`Draws` whose numbers are given by stream."""

    repeat = 0

    def __init__(self, normals: dict[int, torch.Tensor], uniforms: dict[int, torch.Tensor]) -> None:
        self.normals, self.uniforms = normals, uniforms

    def repeated(self, repeat: int) -> GivenDraws:
        assert repeat == 0
        return self

    def normal(self, stream: int, shape: tuple[int, int, int]) -> torch.Tensor:
        found = self.normals[stream]
        assert found.shape[1:] == shape
        return found

    def uniform(self, stream: int) -> torch.Tensor:
        return self.uniforms[stream].reshape(-1, 1, 1, 1)


def perturb(net: nn.Module, other: nn.Module) -> None:
    """net + 0.02·other."""
    with torch.no_grad():
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.add_(0.02 * q)


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        _killed(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        _together(Path(sys.argv[2]), Path(sys.argv[3]))
