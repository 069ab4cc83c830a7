"""What several commands share: their options, which run is meant, how they print, and how they show progress.

As cheap to import as `cli`, which see: nothing slow is imported before a command runs.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hpcft.errors import NotFoundError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from hpcft.config import Config
    from hpcft.rundir import RunDirectory

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ReaderGone(click.ClickException):
    """What we write to is a pipe that nobody reads any more. click itself would end with 1 there, a defect's code."""


class Commands(click.Group):
    """Commands in the order in which a user meets them, and a word about the nearest one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, self.commands, 1)
            meant = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(self.commands)}."
            ctx.fail(f"No such command {name!r}. {meant}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGone(str(error)) from error


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from hpcft.rundir import runs

    names = [run.name for run in runs(ctx.params.get("root") or Path("runs"))]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


config_argument = click.argument("config", type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of CONFIG; may be repeated."
)
from_option = click.option(
    "--from",
    "from_step",
    type=click.IntRange(min=0),
    metavar="STEP",
    help="Start from the checkpoint of this step, as a new branch, instead of the newest.",
)


def _expanded(ctx: click.Context, param: click.Parameter, path: Path) -> Path:
    """As in the configuration: no shell has seen what an environment variable or `--root=~/runs` says."""
    return path.expanduser()


run_argument = click.argument("run", required=False, shell_complete=complete_run)
root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    envvar="HPCFT_RUN__ROOT",
    show_envvar=True,
    callback=_expanded,
    help="Where the run directories are.",
)
json_lines_option = click.option("--json", "as_json", is_flag=True, help="One JSON object per line instead of text.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document instead of text.")


def with_options(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def load_config(config: Path, sets: Sequence[str]) -> Config:
    from hpcft.config import load

    return load(config, sets=sets, environ=os.environ)


def find(root: Path, run: str | None) -> RunDirectory:
    from hpcft.rundir import RunDirectory, find_run

    if run is not None and run.endswith(".toml") and Path(run).is_file():
        section = load_config(Path(run), ()).run
        found = RunDirectory(section.root / section.name)
        if not found.identity.is_file():
            raise NotFoundError(f"the run {section.name} of {run} has not been started", f"hpcft submit {run}")
        return found
    return find_run(root, run)


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def meter(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with rate and time to go, if that is a terminal. It is told: bytes done, of how many."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from hpcft.units import human_size

    began = time.monotonic()
    shown: list[Any] = []

    def rate(done: int | None) -> str | None:
        seconds = time.monotonic() - began
        return f"{human_size(int(done / seconds))}/s" if done and seconds > 0 else None

    def advance(done: int, total: int) -> None:
        if total and not shown:
            bar = click.progressbar(length=total, label=label, file=sys.stderr, item_show_func=rate, color=False)
            shown.append(bar.__enter__())
        if shown:
            shown[0].update(done - shown[0].pos, done)

    try:
        yield advance
    finally:
        for bar in shown:
            bar.__exit__(None, None, None)
