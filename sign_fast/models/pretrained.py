"""What a network knows of its making, and how it is saved to and loaded from folders and the Hub."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's from Python 3.11

_CHANGEABLE = ("use_fp16", "sigma_min", "sigma_max", "sigma_data")  # arguments that are attributes of the same name


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class's constructor, without self."""
    parameters = dict(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    del parameters[next(iter(parameters))]
    return parameters


class Pretrained:
    """A base of networks: the calls of huggingface_hub's `ModelHubMixin`, which `checkpoints.hub` carries out.

    Attributes:
        facts: role and sampling, as config.json told them where the network was loaded.
    """

    facts: dict[str, Any]
    _init: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        # for config.json; a copy and a pickle come here without arguments, and bring their own
        self.__dict__["_init"] = (args, kwargs)
        self.__dict__["facts"] = {}
        return self

    def init_kwargs(self) -> dict[str, Any]:
        """The constructor's arguments by name, as JSON has them: what config.json says of the network.

        Arguments at their defaults are left away, and dtype, which is a choice of the run; attributes that were changed
        since (use_fp16, sigma_min, sigma_max, sigma_data) go before.
        """
        args, kwargs = self._init
        parameters = constructor_parameters(type(self))
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        given |= {name: getattr(self, name) for name in _CHANGEABLE if name in parameters and hasattr(self, name)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if name != "dtype" and not (name in parameters and value == parameters[name].default)
        }

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        config: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Write the network in the Hub's layout: config.json, model.safetensors (float32) and a model card, README.md.

        Args:
            folder: where to; a network's folder is replaced in one step.
            config: further entries of config.json, e.g. {"role": "student", "sampling": {"steps": 1, "sigma": 2.5}}.
            push_to_hub: also upload it; options are those of `push_to_hub`.
            repo_id: where to on the Hub; None means the folder's name.

        Returns:
            The commit's address where it was uploaded, else None.

        Raises:
            SignFastError: it cannot be written or uploaded; nothing half-written is left.
        """
        from ..checkpoints import hub

        hub.save(self, folder, config)
        return (
            self.push_to_hub(repo_id or Path(folder).resolve().name, config=config, **options) if push_to_hub else None
        )

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | os.PathLike[str], *, device: str | torch.device | None = None, **of_the_hub: Any
    ) -> Self:
        """A trained network of this class, as `sign_fast.models.load` gives it.

        Args:
            path_or_name: a folder, a bundled name, a published snapshot, or a repository of the Hub ("user/name").
            device: where to put it; None means CUDA where there is one, else the CPU.
            of_the_hub: revision, cache_dir, force_download, local_files_only, token: as huggingface_hub takes them.

        Raises:
            SignFastError: it cannot be loaded, or is of another class.
        """
        from ..checkpoints import hub

        net: Self = hub.load(cls, path_or_name, device, **of_the_hub)
        return net

    def push_to_hub(self, repo_id: str, *, config: dict[str, Any] | None = None, **options: Any) -> str:
        """Upload the network to the Hub.

        Args:
            repo_id: e.g. "user/name"; made where there is none.
            config: as in `save_pretrained`.
            options: commit_message, private, token, branch, create_pr, allow_patterns, ignore_patterns,
                delete_patterns: as huggingface_hub's `ModelHubMixin.push_to_hub` takes them.

        Returns:
            The commit's address.

        Raises:
            SignFastError: huggingface_hub is missing, offline, or the Hub refuses.
        """
        from ..checkpoints import hub

        return hub.push(self, repo_id, config, **options)
