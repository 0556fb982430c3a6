"""Small distillations for tests; as a script, ones that are killed with -9 at chosen moments."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from sign_fast.checkpoints.store import save_network
from sign_fast.distill.settings import DistillSettings
from sign_fast.distill.trainer import Distiller
from sign_fast.models.presets import CLASSES, preset

CPU = torch.device("cpu")


def write_teacher(folder: Path, name: str = "digits-cond", seed: int = 0, **changes) -> str:
    """An untrained denoiser of 8 channels."""
    cls, kwargs = preset(name)
    kwargs |= {"model_channels": 8, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CLASSES[cls](**kwargs)
        with torch.no_grad():
            for p in net.parameters():  # also those that start at 0
                p.add_(0.05 * torch.randn_like(p))
    save_network(folder, net.state_dict(), cls, kwargs, role="teacher")
    return str(folder)


def settings(teacher: str, **changes) -> DistillSettings:
    """Eight iterations, a state every three and a quality check every two."""
    base = {"method": "sid", "batch": 8, "kimg": 0.064, "lr": 1e-3, "dropout": 0.1, "seed": 5, "log_every": 1}
    base |= {"save_every": 3, "quality_every": 2, "quality_images": 16, "pairs": 24}
    return DistillSettings(teacher=teacher, **{**base, **changes})


def brightness(images: torch.Tensor) -> float:
    """A quality that costs nothing."""
    return float(images.float().mean()) + 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_an_iteration() -> None:
    from sign_fast.distill.trained import Trained

    step = Trained.step

    def killed(self):
        killed.calls += 1
        if killed.calls == 10:  # the fake score has moved, the student has not
            die()
        return step(self)

    killed.calls = 0
    Trained.step = killed


def _in_a_state() -> None:
    save = torch.save

    def killed(state, path):
        save(state, path)
        if state["iteration"] == 6:
            with open(path, "rb+") as file:
                file.truncate(os.path.getsize(path) // 2)
            die()

    torch.save = killed


def _at_rename(name: str, count: int, after: bool) -> None:
    replace = Path.replace

    def killed(self, target):
        matches = Path(target).name == name and not self.name.endswith(".old")
        killed.calls += matches
        dying = matches and killed.calls == count
        if dying and not after:
            die()
        found = replace(self, target)
        if dying:
            die()
        return found

    killed.calls = 0
    Path.replace = killed


def _in_a_row() -> None:
    from sign_fast.training import logs

    write = logs.CsvTable.write

    def killed(self, iteration, values):
        if iteration == 5:
            with self.path.open("a") as file:
                file.write("5,0.0")
            die()
        write(self, iteration, values)

    logs.CsvTable.write = killed


MOMENTS = {
    "in an iteration": _in_an_iteration,
    "while a state is written": _in_a_state,
    "before a state has its name": lambda: _at_rename("state-00000006.pt", 1, after=False),
    "after a state has its name": lambda: _at_rename("state-00000006.pt", 1, after=True),
    "while the network is replaced": lambda: _at_rename("network", 2, after=False),
    "after the network is replaced": lambda: _at_rename("network", 2, after=True),
    "while the best is replaced": lambda: _at_rename("best", 2, after=False),
    "in a log row": _in_a_row,
}


def main(teacher: str, folder: str) -> None:
    """One killed run a moment, in FOLDER/MOMENT; prints the signals that ended them."""
    for moment, arrange in MOMENTS.items():
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            arrange()
            Distiller(settings(teacher), Path(folder) / moment, CPU, quality=brightness).run()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"{moment}: {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
