"""The report in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .arms import WHOLE, environments_note

Column = tuple[str, str, str]
"""Title, key of the row, format."""

NETWORK: list[Column] = [
    ("", "name", "{}"),
    ("k", "steps", "{}"),
    ("network calls", "calls", "{}"),
    ("images", "images", "{:,}"),
    ("Fréchet distance", "frechet_distance", "{:.2f}"),
    ("diversity", "diversity", "{:.3f}"),
    ("effective classes", "effective_classes", "{:.2f}"),
    ("‖fᵏ⁺¹−fᵏ‖ from noise", "move_noise", "{:.4f}"),
    ("‖fᵏ⁺¹−fᵏ‖ from data", "move_data", "{:.4f}"),
    ("‖fᵏ(x)−x‖ held-out", "reconstruction", "{:.4f}"),
]
COST: list[Column] = [
    ("", "name", "{}"),
    ("images", "images", "{:,}"),
    ("forward", "forward", "{:g}"),
    ("backward to input", "backward_to_input", "{:g}"),
    ("backward to weights", "backward_to_weights", "{:g}"),
    ("passes an image", "passes_an_image", "{:g}"),
    ("teacher's samples, passes", "sampling_passes", "{:,}"),
    ("passes in all", "passes", "{:,.0f}"),
    ("seconds", "seconds", "{:,.0f}"),
]
ABLATION: list[Column] = [
    ("", "name", "{}"),
    ("seeds", "seeds", "{}"),
    ("Fréchet distance, k = 1", "frechet_distance_1", "{:.2f}"),
    ("k = 2", "frechet_distance_2", "{:.2f}"),
    ("diversity", "diversity", "{:.3f}"),
    ("‖f(f(z))−f(z)‖", "idempotence_noise", "{:.4f}"),
    ("‖f(f(x))−f(x)‖", "idempotence_data", "{:.4f}"),
    ("‖f(x)−x‖ held-out", "reconstruction", "{:.4f}"),
    ("seconds", "seconds", "{:.0f}"),
    ("sampling pairs, seconds", "sampling_seconds", "{:.0f}"),
]
TOY: list[Column] = [
    ("", "name", "{}"),
    ("k", "steps", "{}"),
    ("network calls", "calls", "{}"),
    ("seeds", "seeds", "{}"),
    ("modes covered", "covered", "{:.3g}"),
    ("of", "modes", "{}"),
    ("high quality", "high_quality", "{:.3f}"),
    ("KL of modes", "kl", "{:.4f}"),
    ("thickness", "thickness", "{:.2f}"),
    ("‖fᵏ⁺¹−fᵏ‖ from noise", "move_noise", "{:.4f}"),
    ("‖fᵏ⁺¹−fᵏ‖ from data", "move_data", "{:.4f}"),
    ("‖fᵏ(x)−x‖", "reconstruction", "{:.4f}"),
    ("seconds", "seconds", "{:.0f}"),
    ("sampling pairs, seconds", "sampling_seconds", "{:.0f}"),
]


_WITHOUT_DEN = "Without den the fake score stays the teacher and dmd is 0: that run is the one without dmd.\n"


def _terms(weights: str) -> str:
    return f'"{WHOLE}": {weights}. Pairs are sampled once a seed and shared by the arms that need them.\n'


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """A table of the columns that any row has; ± is the spread over seeds, – what was not measured."""
    shown = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]

    def cell(row: dict[str, Any], key: str, form: str) -> str:
        if row.get(key) is None:
            return "–"
        spread = row.get("spread", {}).get(key)
        return form.format(row[key]) + (f" ± {form.format(spread)}" if spread is not None else "")

    lines = [[title for title, *_ in shown], ["---"] + ["---:"] * (len(shown) - 1)]
    lines += [[cell(row, key, form) for _, key, form in shown] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def image(name: str) -> str:
    """A PNG of the report's folder."""
    return f"![{name}]({name})\n"


def report(facts: dict[str, Any], found: dict[str, Any]) -> str:
    """The whole of report.md.

    Args:
        facts: what was measured, with what.
        found: "network", "cost", "ablation" and "toy", those that were asked for, with the weights of all terms under
            "terms"; "notes" and "images".
    """
    images: list[str] = found["images"]
    parts = ["# SIGN's evidence\n", "".join(f"- {key}: {value}\n" for key, value in facts.items())]
    if "network" in found:
        parts += [
            "## Quality, diversity, idempotence\n",
            markdown(found["network"], NETWORK),
            "Distances are root mean squares over pixels in [−1, 1]. The identity and the constant are perfectly "
            "idempotent and make no digits: read idempotence beside the Fréchet distance, never alone. Diversity is "
            "the trace of the features' covariance over that of the real data; effective classes are exp(entropy) of "
            "the classes that the bundled classifier sees. Multi-step: x ← f((1 − τ)x + τε), τ = 1 − i/k. Fréchet "
            "distances at other numbers of images do not compare.\n",
        ]
    parts += [f"{note}\n" for note in found.get("notes", [])]
    parts += [image(name) for name in ("quality.png", "moves.png", "classes.png", "samples.png") if name in images]
    if "cost" in found:
        parts += [
            "## Cost of training\n",
            markdown(found["cost"], COST),
            "Passes through a network for each image of the batch, counted during an iteration. A pass in all is a "
            "forward pass or its equal: a backward pass to the input counts 1, one to the weights 2.\n",
        ]
    if "ablation" in found:
        parts += ["## Leaving one term out\n", markdown(found["ablation"], ABLATION), _WITHOUT_DEN]
        parts += [_terms(found["terms"]["ablation"]), f"{environments_note(found['ablation'])}\n"]
        parts += [image("ablation.png")] if "ablation.png" in images else []
    for name, rows in found.get("toy", {}).items():
        parts += [f"## {rows[0]['density']}\n", markdown(rows, TOY)]
        parts += [_terms(found["terms"]["toy"]), f"{environments_note(rows)}\n"]
        corrupted = [row for row in rows if "corruption" in row]
        shares = "; ".join(
            f"{row['name']} {row['corruption']['before']:.3f} → {row['corruption']['after']:.3f}" for row in corrupted
        )
        parts += [
            "High quality: within 3 standard deviations of a mode. A mode is covered if it has a tenth of its "
            "due number of such samples. Thickness: the smaller standard deviation of such samples within a mode, over "
            "the true one; 0 is a mode that shrank to a curve or a point. Corrupted points u = 0.8·x + 0.2·ε of high "
            f"quality, before and after f: {shares}.\n"
        ]
        parts += [image(file) for file in (f"toy-{name}.png", f"toy-{name}-arms.png") if file in images]
    return "\n".join(parts)
