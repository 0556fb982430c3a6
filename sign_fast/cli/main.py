"""The entry point: finds the subcommand, and turns every foreseen error into one line and a non-zero exit status."""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

import click

from .. import __version__
from ..errors import SharedError, SignFastError, first_line

_COMMANDS = {
    "build-cubins": "build_cubins.build_cubins",
    "convert": "convert.convert",
    "distill": "distill.distill",
    "edit": "edit.edit",
    "evaluate": "evaluate.evaluate",
    "generate": "generate.generate",
    "info": "info.info",
    "train": "train.train",
    "train-digits-classifier": "train.train_digits_classifier",
}


class _LazyGroup(click.Group):
    """Imports a subcommand when it is called for, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, function = _COMMANDS[cmd_name].split(".")
        command: click.Command = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sign-fast")
def cli() -> None:
    """Run, and distil, one- and few-step image generators."""


def _fail(message: str, status: int) -> None:
    rank = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    click.echo(f"sign-fast: error{rank}: {message}", err=True)
    sys.exit(status)


def main(argv: list[str] | None = None) -> Any:
    """Run the command line; exits with 0, 1 (bad input), 2 (bad usage) or 130 (interrupted)."""
    import warnings

    warnings.showwarning = _show_warning  # type: ignore[assignment]  # a warning for the person at the keyboard is one line too
    try:
        return cli.main(args=argv, prog_name="sign-fast", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "sign-fast"
        _fail(f"{' '.join(error.format_message().split())} (see {where} --help)", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except SharedError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # torchrun ends all processes as soon as one ends, and the first is about to print it
            sys.exit(1)
        _fail(first_line(error), 1)
    except SignFastError as error:
        _fail(first_line(error), 1)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        _fail("torch is not installed in this environment: install it (2.10 to 2.13), or activate the right one", 1)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; what was finished is kept, the same command goes on from there", 130)
    except BrokenPipeError:
        sys.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    click.echo(f"sign-fast: warning: {message}", err=True)
