"""`sign-fast edit`: images projected back by a time-free student."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SignFastError
from .origin import is_generated

if TYPE_CHECKING:
    import torch

    from ..data import Dataset
    from ..editing import Evaluation, Task
    from ..sampling import ImageGenerator

_TASKS = ["denoise", "inpaint", "colorize", "super-resolve", "sketch", "project"]
_GRID_ROWS = 24


@click.command()
@click.option("--network", required=True, help="Folder or bundled name of a network without a noise level.")
@click.option("--task", required=True, type=click.Choice(_TASKS))
@click.option(
    "--images", required=True,
    help="Folder or zip of square images, or the digits: 'digits:test' is their held-out part.",
)  # fmt: skip
@click.option("--outdir", type=click.Path(path_type=Path), help="Where the edited images go, named as the given ones.")
@click.option("--grid", type=click.Path(path_type=Path, dir_okay=False), help="Also write before and after (PNG).")
@click.option(
    "--mask", type=click.Path(path_type=Path, dir_okay=False), help="inpaint: picture, white is painted anew."
)
@click.option("--factor", type=click.IntRange(min=2), help="super-resolve: images become so many times larger.  [2]")
@click.option("--noise-std", type=float, help="denoise --evaluate: noise added, on the scale of [-1, 1].  [0.4]")
@click.option("--noise-level", type=float, help="tau_0 in [0, 1]; 0 trusts the image.  [default: the task's]")
@click.option("--rounds", type=int, help="Multi-step rounds after the first network call.  [default: the task's]")
@click.option("--seeds", metavar="LIST", help="One an image, naming its noise.  [default: 0, 1, …]")
@click.option("--class", "class_idx", type=int, help="Class label of all images.  [default: the data set's labels]")
@click.option("--num", type=click.IntRange(min=1), help="Only the first NUM images.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images a batch.")
@click.option("--evaluate", is_flag=True, help="The images are clean: corrupt them, and report PSNR against them.")
@click.option("--teacher", help="--evaluate: this teacher's SDEdit with as many calls as a control.")
@click.option("--teacher-noise-level", type=float, help="tau_0 of the teacher's SDEdit.  [default: the task's]")
@click.option("--json", "as_json", is_flag=True, help="--evaluate: machine-readable.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
def edit(
    network: str,
    task: str,
    images: str,
    outdir: Path | None,
    grid: Path | None,
    mask: Path | None,
    factor: int | None,
    noise_std: float | None,
    noise_level: float | None,
    rounds: int | None,
    seeds: str | None,
    class_idx: int | None,
    num: int | None,
    batch: int,
    evaluate: bool,
    teacher: str | None,
    teacher_noise_level: float | None,
    as_json: bool,
    device: str | None,
    dtype: str,
) -> None:
    """Project corrupted images back to what a time-free student (SIGN) knows.

    Known pixels (inpaint), luma (colorize) and patch means (super-resolve) are kept as they are. super-resolve takes
    small images, or averages large ones; colorize takes grey images, or drops their colour; sketch takes bright lines
    on dark. With --evaluate PSNR stands beside two controls: the corrupted image itself, and a teacher.

    \b
    sign-fast edit --network digits-sign --task inpaint --images DIR --mask mask.png --outdir out --grid grid.png
    sign-fast edit --network digits-sign --task denoise --images digits:test --evaluate --teacher digits-uncond
    """
    import torch

    from ..data import open_dataset
    from ..editing.projection import noise_levels
    from ..sampling.pictures import check_channels

    _check_options(task, evaluate, outdir=outdir, grid=grid, mask=mask, factor=factor, noise_std=noise_std,
                   teacher=teacher, teacher_noise_level=teacher_noise_level, json=as_json or None)  # fmt: skip
    dataset = open_dataset(images)
    _check_folders(dataset, images, outdir)
    student = _generator(network, device, getattr(torch, dtype), time_free=True)
    check_channels(student.image_shape[0])
    work = _task(task, student, dataset, images, mask, factor, noise_std, evaluate)
    given: dict[str, Any] = {"noise_level": noise_level, "rounds": rounds, "teacher_noise_level": teacher_noise_level}
    work = replace(work, **{name: value for name, value in given.items() if value is not None})
    noise_levels(work.noise_level, work.rounds)
    noise_levels(work.teacher_noise_level, 0)
    data = _Data(dataset, images, num, student, work, evaluate)
    job = _Job(student, work, data, data.labels(class_idx), _seeds(seeds, len(data)), outdir, grid)
    if not evaluate:
        _edit(job, batch)
        return
    control = None if teacher is None else _generator(teacher, device, getattr(torch, dtype), time_free=False)
    if control is not None and control.image_shape != student.image_shape:
        raise SignFastError(f"{teacher} makes {control.image_shape} images (C, H, W), {network} "
                            f"{student.image_shape}: choose a teacher of the same")  # fmt: skip
    if control is not None and control.label_dim not in (0, student.label_dim):
        raise SignFastError(f"{teacher} has {control.label_dim} classes, {network} {student.label_dim}: "
                            "choose an unconditional teacher")  # fmt: skip
    _evaluate(job, batch, control, as_json)


@dataclass(frozen=True)
class _Job:
    """What is done to which images, checked."""

    student: ImageGenerator
    task: Task
    data: _Data
    labels: list[int] | None
    seeds: list[int]
    outdir: Path | None
    grid: Path | None


def _check_options(task: str, evaluate: bool, *, outdir: Path | None, grid: Path | None, **given: Any) -> None:
    """Options of other tasks are refused, and work that would leave nothing behind."""
    tasks = {"mask": "inpaint", "factor": "super-resolve", "noise_std": "denoise"}
    for name, owner in tasks.items():
        if given[name] is not None and task != owner:
            raise SignFastError(f"--{name.replace('_', '-')} goes with --task {owner}, not with {task}: leave it away")
    for name in ("noise_std", "teacher", "teacher_noise_level", "json"):
        if given[name] is not None and not evaluate:
            option = f"--{name.replace('_', '-')}"
            raise SignFastError(f"{option} goes with --evaluate: add it, or leave {option} away")
    if given["teacher_noise_level"] is not None and given["teacher"] is None:
        raise SignFastError("--teacher-noise-level goes with --teacher: name one")
    if not evaluate and outdir is None and grid is None:
        raise SignFastError("nothing would be written: give --outdir, --grid or both")
    if task == "inpaint" and given["mask"] is None and not evaluate:
        raise SignFastError("inpaint needs --mask, a picture whose white pixels are painted anew")


def _check_folders(dataset: Dataset, images: str, outdir: Path | None) -> None:
    """The originals must not be overwritten, nor one result by another."""
    if outdir is not None and Path(images).is_dir() and outdir.resolve() == Path(images).resolve():
        raise SignFastError(f"--outdir {outdir} is the folder of the images, which would be lost: choose another")
    taken: dict[Path, str] = {}
    for name in (dataset.name(i) for i in range(len(dataset))):
        other = taken.setdefault(Path(name).with_suffix(".png"), name)
        if other != name:
            raise SignFastError(f"{images}: {other} and {name} would both become {Path(name).with_suffix('.png')}: "
                                "rename one")  # fmt: skip
    for path in [] if outdir is None else [outdir / name for name in taken]:
        if is_generated(path):
            raise SignFastError(f"{path} is a generated image, which would be lost: choose another --outdir")


def _generator(network: str, device: str | None, dtype: torch.dtype, time_free: bool) -> ImageGenerator:
    from ..sampling import ImageGenerator
    from ..sampling.requests import is_time_free

    generator = ImageGenerator.from_pretrained(network, device, dtype)
    if is_time_free(generator.net) != time_free:
        needs = "--network needs a student without" if time_free else "--teacher needs a network with"
        raise SignFastError(f"{needs} a noise level, such as digits-{'sign' if time_free else 'uncond'}: "
                            f"{network} takes {'one' if time_free else 'none'}")  # fmt: skip
    return generator


def _task(
    name: str,
    student: ImageGenerator,
    dataset: Dataset,
    images: str,
    mask: Path | None,
    factor: int | None,
    noise_std: float | None,
    evaluate: bool,
) -> Task:
    """The task, once the images are known to be what it takes."""
    from ..editing import make_task
    from ..editing.tasks import centre_unknown

    channels, resolution, _ = student.image_shape
    known = None
    if name == "inpaint":
        known = centre_unknown(resolution) if mask is None else _read_mask(mask)
    task = make_task(name, known=known, factor=factor or 2, noise_std=0.4 if noise_std is None else noise_std)
    task.corruption.check((len(dataset), *student.image_shape))
    sizes, kinds = {resolution}, {channels}
    if not evaluate:
        sizes |= {resolution // (factor or 2)} if name == "super-resolve" else set()
        kinds |= {1} if name == "colorize" else set()
    if dataset.shape[1] not in sizes:
        wanted = " or ".join(f"{size}×{size}" for size in sorted(sizes))
        raise SignFastError(f"{images}: the images are {dataset.shape[2]}×{dataset.shape[1]}, the network's {wanted}: "
                            "resize them")  # fmt: skip
    if dataset.shape[0] not in kinds:
        words = {1: "grey", 3: "RGB"}
        raise SignFastError(f"{images}: the images are {words[dataset.shape[0]]}, the network's "
                            f"{words[channels]}: convert them")  # fmt: skip
    return task


def _read_mask(path: Path) -> torch.Tensor:
    """(H, W) bool, True where a pixel is known: where the picture is darker than half."""
    import numpy as np
    import torch
    from PIL import Image

    from ..errors import first_line

    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:
        raise SignFastError(f"--mask {path} is not a readable picture: {first_line(error)}") from error
    return torch.from_numpy(pixels < 128)


class _Data:
    """The first images of a data set, as the network takes them."""

    def __init__(
        self, dataset: Dataset, source: str, num: int | None, student: ImageGenerator, task: Task, evaluate: bool
    ) -> None:
        if num is not None and num > len(dataset):
            raise SignFastError(f"--num {num}: {source} has {len(dataset)} images")
        self.dataset, self.source, self.student, self.task, self.evaluate = dataset, source, student, task, evaluate
        self._count = len(dataset) if num is None else num
        for index in range(self._count):  # all are readable and of one size before any result is written
            dataset.image(index)

    def __len__(self) -> int:
        return self._count

    def path(self, index: int) -> Path:
        return Path(self.dataset.name(index)).with_suffix(".png")

    def read(self, indices: range) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1]: clean ones to evaluate with, otherwise what is known of them."""
        import numpy as np
        import torch

        from ..data import in_range

        pixels = in_range(torch.from_numpy(np.stack([self.dataset.image(i) for i in indices])))
        if self.evaluate:
            return pixels
        channels, resolution, _ = self.student.image_shape
        if pixels.shape[2] != resolution:
            pixels = self.task.corruption.enlarge(pixels)  # type: ignore[attr-defined]  # super-resolve's alone
        return self.task.observe(pixels.expand(-1, channels, -1, -1))

    def labels(self, class_idx: int | None) -> list[int] | None:
        """A class number an image where the network has classes."""
        from ..sampling.requests import check_labels

        classes = self.student.label_dim
        if class_idx is None and classes:
            if not self.dataset.num_classes:
                raise SignFastError(
                    f"this network has classes 0 to {classes - 1} and {self.source} no labels: add --class"
                )
            given = [self.dataset.label(i) for i in range(self._count)]
            return check_labels(given, self._count, classes)
        return check_labels(class_idx, self._count, classes)


def _seeds(text: str | None, count: int) -> list[int]:
    from ..sampling.noise import check_seeds, parse_seeds

    numbers = list(range(count)) if text is None else check_seeds(parse_seeds(text), allow_duplicates=True)
    if len(numbers) != count:
        raise SignFastError(f"--seeds names {len(numbers)}, there are {count} images: give one an image")
    return numbers


def _edit(job: _Job, batch: int) -> None:
    from tqdm import tqdm

    from ..editing import project
    from ..functional import to_uint8

    before: list[Any] = []
    after: list[Any] = []
    count = len(job.data)
    for start in tqdm(range(0, count, batch), desc="edit", unit="batch"):
        part = range(start, min(start + batch, count))
        observed = job.data.read(part)
        images = project(
            job.student,
            observed,
            noise_level=job.task.noise_level,
            rounds=job.task.rounds,
            constraint=job.task.constraint,
            labels=None if job.labels is None else [job.labels[i] for i in part],
            seeds=[job.seeds[i] for i in part],
            output="uint8",
        ).cpu()
        _write_images(job, part, images)
        if len(before) < _GRID_ROWS:
            before += list(to_uint8(observed).numpy())
            after += list(images.numpy())
    if job.outdir is not None:
        click.echo(f"{count} images in {job.outdir}")
    if job.grid is not None:
        _write_grid(job.grid, [before, after])
        click.echo(f"before and after in {job.grid}")


def _evaluate(job: _Job, batch: int, teacher: ImageGenerator | None, as_json: bool) -> None:
    from ..editing import evaluate

    whole = range(len(job.data))
    truth = job.data.read(whole)
    shared: dict[str, Any] = {"labels": job.labels, "seeds": job.seeds, "batch": batch}
    result = evaluate(job.task, truth, student=job.student, teacher=teacher, **shared)
    _write_images(job, whole, result.edited["student"])
    columns = {"truth": result.truth, "corrupted": result.observed}
    columns |= {name: images for name, images in result.edited.items() if name != "identity"}
    if job.grid is not None:
        _write_grid(job.grid, [list(images.numpy()) for images in columns.values()])
    if as_json:
        click.echo(_json(result, job.data))
        return
    click.echo(_table(result, job.data))
    if job.grid is not None:
        click.echo(f"{' | '.join(columns)} in {job.grid}")


def _json(result: Evaluation, data: _Data) -> str:
    facts = {"task": result.task, "images": len(data), "source": data.source, "rounds": result.rounds}
    return json.dumps({**facts, "scores": [asdict(score) for score in result.scores]})


def _table(result: Evaluation, data: _Data) -> str:
    lines = [
        f"{result.task}: {len(data)} images of {data.source}, {result.rounds} rounds",
        f"{'':16}{'calls':>6}{'noise level':>13}{'PSNR dB':>10}{'± error':>10}",
    ]
    for score in result.scores:
        level = "–" if score.noise_level is None else f"{score.noise_level:g}"
        error = "–" if score.standard_error is None else f"{score.standard_error:.2f}"
        lines.append(f"{score.method:16}{score.calls:6}{level:>13}{score.psnr:10.2f}{error:>10}")
    return "\n".join(lines)


def _write_images(job: _Job, part: range, images: torch.Tensor) -> None:
    from ..checkpoints.atomic import make_folder
    from ..sampling.pictures import PngWriter

    if job.outdir is None:
        return
    paths = [job.outdir / job.data.path(i) for i in part]
    for folder in sorted({path.parent for path in paths}):
        make_folder(folder)
    with PngWriter(workers=4) as writer:
        for path, image in zip(paths, images.numpy(), strict=True):
            writer.save(path, image)


def _write_grid(grid: Path, columns: list[list[Any]]) -> None:
    """A row an image, the columns side by side; many rows stand in two stacks."""
    import numpy as np

    from ..sampling.pictures import save_grid

    rows = list(zip(*(column[:_GRID_ROWS] for column in columns), strict=True))
    stacks = 2 if len(rows) > 8 else 1
    rows += [tuple(np.full_like(image, 255) for image in rows[0])] * (-len(rows) % stacks)
    save_grid(grid, [image for row in rows for image in row], columns=stacks * len(columns))
