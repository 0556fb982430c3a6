"""What SIGN's students do, in tables and plots. Run with --help for the arguments.

    python benchmarks/sign_report.py --network digits-sign
    python benchmarks/sign_report.py --toy --toy-ablation
    python benchmarks/sign_report.py --ablation --recipe digits-sign --kimg 40 --seeds 0,1,2

Figures of a network beside its controls, its training's cost, the student without each term of the loss, and mixtures
in the plane whose modes can be counted. Finished runs of an ablation are kept in the folder and not run again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file; an installed sign_fast goes before the tree's
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import click

from sign_fast.errors import SignFastError, first_line


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers from 0 such as 0,1,2")
    return numbers


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--network", help="Folder or bundled name of a SIGN student.")
@click.option("--teacher", help="What it was distilled from.  [default: what its config.json names]")
@click.option("--data", default="digits:test", show_default=True, help="Held-out images.")
@click.option("--num", type=click.IntRange(min=2), default=2000, show_default=True, help="Images a row.")
@click.option("--recipe", default="digits-sign", show_default=True, help="Of the ablation, and the cost of a network.")
@click.option("--ablation", is_flag=True, help="Distil without each term.")
@click.option("--kimg", type=click.FloatRange(min=0, min_open=True), default=40, show_default=True, help="Of an arm.")
@click.option(
    "--seeds", default="0", show_default=True, callback=_numbers, metavar="LIST", help="Of arms and mixtures."
)
@click.option("--arms", help="Names of some arms, separated by commas.  [default: all]")
@click.option("--toy", is_flag=True, help="Mixtures of Gaussians in the plane.")
@click.option("--toy-ablation", is_flag=True, help="The same without each term.")
@click.option("--density", type=click.Choice(["ring", "grid"]), multiple=True, help="[default: both]")
@click.option("--toy-teacher", type=click.IntRange(min=1), default=4000, show_default=True, help="Iterations.")
@click.option("--toy-student", type=click.IntRange(min=1), default=2000, show_default=True, help="Iterations.")
@click.option("--toy-samples", type=click.IntRange(min=2), default=10_000, show_default=True)
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU.  [default: PyTorch's]")
@click.option("--outdir", type=click.Path(path_type=Path), default="out/sign_report", show_default=True)
def sign_report(
    network: str | None,
    teacher: str | None,
    data: str,
    num: int,
    recipe: str,
    ablation: bool,
    kimg: float,
    seeds: tuple[int, ...],
    arms: str | None,
    toy: bool,
    toy_ablation: bool,
    density: tuple[str, ...],
    toy_teacher: int,
    toy_student: int,
    toy_samples: int,
    device: str | None,
    threads: int | None,
    outdir: Path,
) -> None:
    """SIGN's evidence: report.md, report.json and plots."""
    if not (network or ablation or toy or toy_ablation):
        raise click.UsageError("nothing to report: give --network, --ablation or --toy")
    if threads is not None:  # before torch is imported
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    from benchmarks.sign_evidence import tables
    from benchmarks.sign_evidence.arms import environment, terms_of
    from sign_fast.checkpoints.atomic import make_folder, write_text
    from sign_fast.checkpoints.store import resolve_device

    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    make_folder(outdir)
    found: dict[str, Any] = {"notes": [], "images": [], "terms": {}}
    facts: dict[str, Any] = {}

    def say(text: str) -> None:
        click.echo(text, err=True)

    if network is not None:
        facts |= _network(found, network, teacher, data, num, recipe, where, outdir, say)
    if ablation:
        names = None if arms is None else tuple(arms.split(","))
        facts |= _ablation(found, recipe, teacher, kimg, seeds, data, num, names, where, outdir, say)
    if toy or toy_ablation:
        from benchmarks.sign_evidence.toy import settings as toy_settings
        from benchmarks.sign_evidence.toy_report import Sizes
        from benchmarks.sign_evidence.toy_report import report as toy_rows

        sizes = Sizes(toy_teacher, toy_student, toy_samples)
        found["toy"] = {}
        for name in density or ("ring", "grid"):
            found["toy"][name], pictures = toy_rows(name, sizes, seeds, toy_ablation, outdir, say)
            found["images"] += pictures
        found["terms"]["toy"] = terms_of(toy_settings(toy_student))
        of_seeds = f"seeds {', '.join(map(str, seeds))}"
        facts["toy"] = f"teacher {toy_teacher} iterations, student {toy_student}, {toy_samples:,} samples, {of_seeds}"
    facts |= environment(where)
    write_text(outdir / "report.json", json.dumps({**facts, **found}, indent=1, ensure_ascii=False) + "\n")
    text = tables.report(facts, found)
    write_text(outdir / "report.md", text)
    click.echo(text)


def _network(
    found: dict[str, Any],
    network: str,
    teacher: str | None,
    data: str,
    num: int,
    recipe: str,
    device: Any,
    outdir: Path,
    say: Any,
) -> dict[str, Any]:
    from benchmarks.sign_evidence import cost
    from benchmarks.sign_evidence.network import measure_network, teacher_of
    from benchmarks.sign_evidence.plots import plot_found

    source = teacher_of(network, teacher)
    say(f"{network} beside {source}: {num} images a row")
    measured = measure_network(network, source, data, num, device)
    found |= {"network": measured.rows, "moves": measured.moves, "classes": measured.classes}
    found["notes"] += measured.notes
    found["images"] += plot_found(outdir, measured, f"{network}, {num:,} images")
    settings = cost.settings_of(network) or _settings(recipe, source)
    found["cost"] = cost.training_cost(network, source, settings)
    return {"network": network, "teacher": source, "held-out data": data, "images": f"{num:,}, seeds 0-{num - 1}"}


def _ablation(
    found: dict[str, Any],
    recipe: str,
    teacher: str | None,
    kimg: float,
    seeds: tuple[int, ...],
    data: str,
    num: int,
    arms: tuple[str, ...] | None,
    device: Any,
    outdir: Path,
    say: Any,
) -> dict[str, Any]:
    from benchmarks.sign_evidence.ablation import ablation
    from benchmarks.sign_evidence.arms import terms_of
    from benchmarks.sign_evidence.plots import plot_ablation

    settings = _settings(recipe, teacher)
    found["ablation"] = ablation(settings, kimg, seeds, data, num, device, outdir / "ablation-arms.json", arms, say)
    found["terms"]["ablation"] = terms_of(settings)
    title = f"{recipe}, {kimg:g} thousand images, seeds {', '.join(map(str, seeds))}"
    plot_ablation(outdir / "ablation.png", found["ablation"], title)
    found["images"].append("ablation.png")
    return {"ablation": title}


def _settings(recipe: str, teacher: str | None) -> Any:
    from sign_fast.distill.recipes import settings_from

    return settings_from(recipe, teacher=teacher)


def main() -> None:
    """Run; foreseen errors are one line and a non-zero exit status."""
    try:
        sign_report.main(prog_name="sign_report.py", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"sign_report: error: {' '.join(error.format_message().split())} (see --help)", err=True)
        sys.exit(2)
    except ImportError as error:
        click.echo(f"sign_report: error: {first_line(error)}: pip install 'sign-fast[train]'", err=True)
        sys.exit(1)
    except SignFastError as error:
        click.echo(f"sign_report: error: {first_line(error)}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("sign_report: interrupted; finished runs of an ablation are kept", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
