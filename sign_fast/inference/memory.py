"""Frees the weights of a network that is being turned into another form, for good."""

from __future__ import annotations

from torch import Tensor

from ..kernels import extension

_ENOUGH = 16 * 2**20  # bytes freed before they are given back: that walks the whole heap


class Release:
    """Frees parameters and gives their memory back to the system, which malloc alone does not do."""

    def __init__(self) -> None:
        self._pending = _ENOUGH  # what loading the network has left lying around goes at once

    def __call__(self, *parameters: Tensor | None) -> None:
        """Free the memory of parameters that will not be used again."""
        for p in parameters:
            if p is not None:
                self._pending += p.nbytes
                p.data = p.data.new_empty(0)
        module = extension.module()
        if self._pending >= _ENOUGH and module is not None:
            module.return_freed_memory()
            self._pending = 0
