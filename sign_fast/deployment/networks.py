"""The networks that wheels are built for: published configurations, bundled digits, diffusers' Stable Diffusion.

`python -m sign_fast.deployment.networks` in a source tree reads their calls off them and writes
kernels/packs/calls.json, which is all that a build looks at; it needs diffusers, and a minute.
"""

from __future__ import annotations

from pathlib import Path

from ..kernels.packs import calls
from ..kernels.packs.calls import Call
from ..models.presets import preset, preset_names
from .diffusers_networks import diffusers_networks
from .recording import calls_of


def networks() -> dict[str, dict[Call, None]]:
    """The calls of each network by its name, in a fixed order.

    Raises:
        SignFastError: diffusers is not installed.
    """
    return {name: calls_of(*preset(name)) for name in preset_names()} | diffusers_networks()


def main() -> None:
    """Write them where builds look."""
    target = Path(calls.__file__).with_name("calls.json")
    target.write_text(calls.to_json(networks()))
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
