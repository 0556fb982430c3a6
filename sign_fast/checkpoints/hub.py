"""Networks on the Hugging Face Hub: `save_pretrained`, `from_pretrained` and `push_to_hub` of every network.

A repository holds what a network's folder holds: config.json, model.safetensors and README.md. Uploads go through
huggingface_hub's `ModelHubMixin`. It is not a base class of the networks because importing it takes half a second and
because it is optional, and nothing happens at import here; so a network becomes part of one when it is pushed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import SignFastError, first_line
from . import card, store

FILES = [store.CONFIG, store.WEIGHTS, "README.md"]
"""All that is ever fetched of a repository."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_EXTRA = "pip install 'sign-fast[hub]'"


def is_repository(text: str) -> bool:
    """Whether a text that is no folder's name can be a repository's, e.g. "user/name".

    A name below a folder that is here is a mistyped path: nobody is asked about it.
    """
    return bool(_ID.fullmatch(text)) and ".." not in text and "--" not in text and not Path(text).parent.is_dir()


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise SignFastError(f"the Hub needs huggingface_hub: {_EXTRA}") from error
    return huggingface_hub


@contextmanager
def _explained(repository: str, doing: str) -> Iterator[None]:
    """Turn the Hub's errors, and the network's, into one line."""
    from huggingface_hub import errors

    def line(why: str) -> SignFastError:
        return SignFastError(f"cannot {doing} {repository} {'from' if doing == 'fetch' else 'on'} the Hub: {why}")

    try:
        yield
    except errors.GatedRepoError as error:
        raise line(f"it is gated: ask for access at https://huggingface.co/{repository}, then hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise line("there is none of that name, or it is private: check the name, or hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise line("it has no such revision") from error
    except errors.OfflineModeIsEnabled as error:
        raise line("HF_HUB_OFFLINE is set: unset it") from error
    except errors.LocalEntryNotFoundError as error:
        raise line("it is not in the cache, and the Hub cannot be reached: go online once") from error
    except errors.HFValidationError as error:
        raise line("a name is USER/NAME, of letters, digits, '-', '_' and '.'") from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise line("no permission: hf auth login with a token that may write there") from error
        raise line(first_line(error)) from error
    except OSError as error:
        raise line(first_line(error)) from error
    except Exception as error:
        # the transport's errors are of no class that all versions of huggingface_hub share
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise line(f"it cannot be reached ({first_line(error)}): check the connection") from error
        raise


def fetch(
    repository: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The folder, in huggingface_hub's cache, of a repository's network.

    Args:
        repository: e.g. "user/name".
        revision, cache_dir, force_download, local_files_only, token: as huggingface_hub's `snapshot_download` takes
            them. Of the repository's files only config.json, model.safetensors and README.md are fetched.

    Raises:
        SignFastError: huggingface_hub is missing, offline, no such repository, gated, or no network in it.
    """
    hub = _huggingface_hub()
    with _explained(repository, "fetch"):
        folder = Path(
            hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=FILES,
            )
        )
    for name in (store.CONFIG, store.WEIGHTS):
        if not (folder / name).is_file():
            raise SignFastError(
                f"{repository} on the Hub holds no {name}: a network there is {store.CONFIG} and {store.WEIGHTS}; "
                "fetch a published .pkl as a file and convert it"
            )
    return folder


def save(net: Any, folder: str | os.PathLike[str], config: dict[str, Any] | None = None) -> None:
    """Write a network in the Hub's layout; see `Precond.save_pretrained`."""
    folder = Path(folder)
    facts = {**net.facts, **(config or {})}
    if taken := {"format", "cls", "kwargs"} & facts.keys():
        raise SignFastError(f"{', '.join(sorted(taken))} of config.json are the network's own: leave them away")
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SignFastError(f"config.json cannot hold these entries: {first_line(error)}") from error
    store.check_use(facts, "config")  # what is written can be read
    text = card.model_card(
        folder.resolve().name, {"cls": type(net).__name__, "kwargs": net.init_kwargs(), **facts}, hub=True
    )
    store.check_replaceable(folder)
    store.save_network(folder, net.state_dict(), type(net).__name__, net.init_kwargs(), card=text, **facts)


def load(cls: type[Any], path_or_name: str | os.PathLike[str], device: Any = None, **of_the_hub: Any) -> Any:
    """A network of a class, or of one derived from it; see `Precond.from_pretrained`."""
    text = os.fspath(path_or_name)
    here = Path(text).exists() or text in store.bundled_names()
    place = fetch(text, **of_the_hub) if of_the_hub and not here else text
    net = store.load_network(place, device)
    if not isinstance(net, cls):
        own = type(net).__name__
        raise SignFastError(f"{text} is a network of class {own}, not {cls.__name__}: say {own}.from_pretrained")
    return net


@lru_cache(maxsize=1)
def _pushed_class() -> type[Any]:
    class Pushed(_huggingface_hub().ModelHubMixin):  # type: ignore[misc]
        """A network in the mixin's hands: its `_save_pretrained` writes our layout, card included."""

        net: Any
        entries: dict[str, Any] | None

        def _save_pretrained(self, save_directory: Path) -> None:
            save(self.net, save_directory, self.entries)

    return Pushed


def push(net: Any, repository: str, config: dict[str, Any] | None = None, **options: Any) -> str:
    """Upload a network; see `Precond.push_to_hub`."""
    _huggingface_hub()
    net.init_kwargs()  # what cannot be saved is told before a repository is made
    pushed = _pushed_class()()
    pushed.net, pushed.entries = net, config
    with _explained(repository, "put"):
        return str(pushed.push_to_hub(repository, **options))
