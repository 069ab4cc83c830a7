"""Prints docs/cli.md from the commands themselves. A test compares the two, so that no option changes by accident."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from hpcft.cli import cli

_HEAD = """\
# Commands

<!-- Printed by `make docs`; change hpcft/cli.py and hpcft/cli_*.py, not this page. -->

CONFIG is a configuration file ([configuration.md](configuration.md)). RUN is the name of a run, its directory, or its
configuration file; without it, the run that is live is meant, else the newest under `--root`. If several are live,
they are listed. CHECKPOINT, A and B are a step, the name of a checkpoint (`step-00001200-g0007`), or the directory of
one, or `latest`; of a step that two branches have passed, the newer one's is meant. What each command exits with is in
[exit-codes.md](exit-codes.md).

Errors go to stderr as `error: …` and `hint: …`; under `--json` as one JSON object
`{"error": {"message", "hint", "code", "kind"}}`. Colours appear on terminals only, and not where `NO_COLOR` is set.
"""


def commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    for each in group.commands.values():
        full = f"{name} {each.name}"
        if isinstance(each, click.Group):
            yield from commands(each, full)
        else:
            yield full, each


def section(name: str, command: click.Command) -> Iterator[str]:
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    options = [each for each in command.params if isinstance(each, click.Option)]
    usage = [name, *(each.make_metavar(click.Context(command)) for each in arguments)]
    yield f"## {name}\n"
    yield f"`{' '.join(usage)}`\n"
    yield inspect.cleandoc((command.help or "").replace("\b\n", "")) + "\n"
    if not options:
        return
    yield "| option | meaning |"
    yield "|---|---|"
    for option in options:
        context = click.Context(command)
        names, text = option.get_help_record(context) or ("", "")
        yield f"| `{names}` | {' '.join(text.split())} |"
    yield ""


def page() -> str:
    parts = [_HEAD]
    for name, command in commands(cli, "hpcft"):
        parts += section(name, command)
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
