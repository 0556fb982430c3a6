"""A text-to-image pipeline's folder in diffusers' layout: read as data, one line an error.

Nothing of a folder is executed: its parts are of classes named here, weights are safetensors, and what else lies in it,
such as Python files, is not looked at.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import SignFastError, first_line, short
from .parts import PARTS, REQUIRED, LatentScale, Parts, Prediction, Predictor, predictor
from .versions import require_diffusers

__all__ = ["LatentScale", "Parts", "Prediction", "Predictor", "load_parts", "predictor"]

INDEX = "model_index.json"
_CLASSES = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "tokenizer_2": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
_LEFT_ASIDE = ("safety_checker", "feature_extractor", "image_encoder")
_WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_WORDS = ("vocab.json", "merges.txt")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def load_parts(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    **given: Any,
) -> Parts:
    """The parts of a pipeline's folder: Stable Diffusion 1 and 2, SDXL, and what has the same parts.

    Args:
        folder: with model_index.json, as diffusers' save_pretrained writes it.
        dtype: of the models' weights, None for float32; in float16 an SDXL's VAE that overflows there (its
            config's force_upcast) stays in float32.
        variant: of the weights' file names, e.g. "fp16".
        given: parts in the place of the folder's own, by name, e.g. unet.

    Raises:
        SignFastError: a file is missing or damaged, a part is not supported, or parts do not fit together.
    """
    root = Path(folder)
    index = _read_index(root)
    if unknown := [name for name in given if name not in PARTS]:
        raise SignFastError(f"a pipeline has no part {unknown[0]!r}: parts are {', '.join(PARTS)}")
    listed = {name: value for name, value in index.items() if isinstance(value, list)}
    _check_listed(root, listed, given)
    parts = dict(given)
    for name in PARTS:
        if name not in given and listed.get(name, [None])[0] is not None:
            overflows = name == "vae" and dtype == torch.float16 and _has(listed, given, "text_encoder_2")
            parts[name] = _load(root, name, listed[name], dtype, variant, overflows)
    settings = {n: v for n, v in index.items() if not isinstance(v, list) and not n.startswith("_")}
    return Parts(**parts, settings={**settings, "_class_name": index["_class_name"]}, folder=root)


def _has(listed: Mapping[str, list[Any]], given: Mapping[str, Any], name: str) -> bool:
    return given[name] is not None if name in given else listed.get(name, [None])[0] is not None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SignFastError(
            f"{path} is missing: name a whole pipeline folder, as diffusers' save_pretrained writes it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise SignFastError(f"{path} is not readable as JSON ({first_line(error)}): copy it again") from error
    if not isinstance(content, dict):
        raise SignFastError(f"{path} is no table of settings: copy it again")
    return content


def _read_index(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        what = "is a file" if root.is_file() else "is not there"
        raise SignFastError(f"{root} {what}: name a pipeline's folder with {INDEX}")
    index = _read_json(root / INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise SignFastError(
            f"{root / INDEX} names {short(name)} as its pipeline, code of its own, which is never run: "
            f"name a pipeline of diffusers' own classes"
        )
    return index


def _check_listed(root: Path, listed: Mapping[str, list[Any]], given: Mapping[str, Any]) -> None:
    """Whether the parts named in the index are those of a pipeline, of known classes."""
    for name, value in listed.items():
        if name in given or name in _LEFT_ASIDE or value[:1] == [None]:
            continue
        if name not in PARTS:
            raise SignFastError(
                f"{root} has a {name} ({short(value[-1] if value else None)}), which is not supported: "
                "name a text-to-image pipeline with a UNet2DConditionModel and CLIP text encoders"
            )
        if len(value) != 2 or not all(isinstance(v, str) for v in value):
            raise SignFastError(f"{root / INDEX}: {name} must be [library, class], not {short(value)}")
        library, classes = _CLASSES.get(name, ("diffusers", ()))
        known = value[1] in classes if classes else value[1].endswith("Scheduler")
        if value[0] != library or not known:
            wanted = " or ".join(classes) or "a scheduler of diffusers"
            raise SignFastError(f"{root}: its {name} is {'.'.join(value)}, which is not supported: it must be {wanted}")
    for name in REQUIRED:
        if name not in given and listed.get(name, [None])[:1] == [None]:
            raise SignFastError(f"{root / INDEX} names no {name}: a pipeline needs {', '.join(REQUIRED)}")


def _library(name: str) -> Any:
    if name == "diffusers":
        return require_diffusers()
    try:
        return importlib.import_module(name)
    except Exception as error:  # its own dependencies may be missing or of other versions
        raise SignFastError(
            f"{name} does not import ({first_line(error)}): pip install 'sign-fast[diffusers]'"
        ) from error


def _load(
    root: Path, name: str, listed: list[str], dtype: torch.dtype | None, variant: str | None, overflows: bool
) -> Any:
    """One part, by its class's own reader; in float32 if it overflows, unless its config denies that."""
    library, class_name = listed
    place = root / name
    if not place.is_dir():
        raise SignFastError(
            f"{place} is missing: name a whole pipeline folder, as diffusers' save_pretrained writes it"
        )
    cls = getattr(_library(library), class_name, None)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise SignFastError(f"{library} has no {class_name}, which {root / INDEX} names: install a newer {library}")
    if name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        config = _read_json(place / "config.json")
        _check_weights(place, library, config, variant)
        if overflows and config.get("force_upcast", True):
            dtype = torch.float32
        return _load_model(cls, place, dtype, variant)
    if name == "scheduler":
        _read_json(place / "scheduler_config.json")
    elif not (place / "tokenizer.json").is_file() and not all((place / n).is_file() for n in _WORDS):
        # without its words transformers would make one that knows none
        raise SignFastError(f"{place} holds neither tokenizer.json nor {' and '.join(_WORDS)}: copy the pipeline again")
    try:
        return cls.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # whatever a damaged file makes another library raise
        raise SignFastError(f"{place} cannot be loaded as {class_name} ({first_line(error)}): copy it again") from error


def _load_model(cls: Any, place: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "variant": variant}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older name of dtype, which every version knows
            model, info = cls.from_pretrained(str(place), torch_dtype=dtype or torch.float32, **options)
    except Exception as error:
        raise SignFastError(
            f"{place} cannot be loaded as {cls.__name__} ({first_line(error)}): copy it again"
        ) from error
    # older versions of transformers saved position_ids, which are no weights
    unused = [key for key in map(str, info["unexpected_keys"]) if not key.endswith("position_ids")]
    for what, keys in (("lacks", map(str, info["missing_keys"])), ("has no use for", unused)):
        if names := sorted(keys):
            others = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SignFastError(
                f"{place} {what} {', '.join(names[:3])}{others}: weights and configuration are of different networks"
            )
    return model.eval()


def _check_weights(place: Path, library: str, config: Mapping[str, Any], variant: str | None) -> None:
    """Whether a model's folder holds whole safetensors of its own, and nothing that leads elsewhere."""
    if "quantization_config" in config:
        raise SignFastError(
            f"{place} is quantized, which is not supported: name a pipeline in float32 or half precision"
        )
    if (place / "adapter_config.json").exists():
        raise SignFastError(
            f"{place} is an adapter, whose network would be fetched: save the pipeline with it fused in"
        )
    for key, value in config.items():
        # transformers would fetch and run such a kernel, or read the weights that it is told to
        if key == "transformers_weights" or ("attn_implementation" in key and "/" in str(value)):
            raise SignFastError(f"{place} has {key}={short(value)}, which leads elsewhere: do not trust it")
    stem, infix = _WEIGHTS[library], f".{variant}" if variant else ""
    names = {f"{stem}.safetensors.index{infix}.json", f"{stem}{infix}.safetensors.index.json"}
    indices = [place / name for name in sorted(names) if (place / name).is_file()]
    for index in indices:  # also beside a single file: diffusers prefers the index, transformers the file
        _check_shards(place, index)
    if indices or (place / f"{stem}{infix}.safetensors").is_file():
        return
    pickled = sorted(path.name for path in place.iterdir() if path.suffix in _PICKLES)
    if pickled:
        raise SignFastError(
            f"{place} holds {pickled[0]} and no {stem}{infix}.safetensors: a pickle can run code and is not read; "
            "save the pipeline again with safe_serialization=True"
        )
    others = sorted(path.name for path in place.iterdir() if path.suffix == ".safetensors")
    hint = f", though {others[0]}: give its variant" if others else ": copy the pipeline again"
    raise SignFastError(f"{place} holds no {stem}{infix}.safetensors{hint}")


def _check_shards(place: Path, index: Path) -> None:
    files = _read_json(index).get("weight_map")
    names = (
        set(files.values()) if isinstance(files, dict) and all(isinstance(v, str) for v in files.values()) else set()
    )
    if not names:
        raise SignFastError(f"{index} names no files of weights: copy it again")
    for name in sorted(names):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise SignFastError(
                f"{index} names {short(name)}, which is no safetensors file of its folder: do not trust it"
            )
        if not (place / name).is_file():
            raise SignFastError(f"{place / name} is missing: copy the pipeline again")
