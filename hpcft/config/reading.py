"""From a file, variables and `--set` to one checked configuration.

What an override says is read as TOML where that works and where its key wants something else than text; otherwise
it is the text itself. So `--set nodes.min=2` is a number, `--set run.name=2024` a name, and neither needs quotes.

Relative paths become absolute here, since agents and workers read the stored configuration elsewhere. `run.root`
counts from the current directory: under Slurm that is where `sbatch` was called. `job.script` in a file counts from
the file's own directory if it exists there, else, as always in an override, from the current directory.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from hpcft.config.checking import ConfigError, Mistake, Origins, Tree, check, sections_of, take_out_unknown
from hpcft.config.model import PROGRAMS, Config, kind_of


def load(path: Path | None, *, sets: Sequence[str] = (), environ: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Read the file, let the variables of `environ` and then `sets` (`section.key=value`) override it, check all.

    Of `environ` only `HPCFT_<SECTION>__<KEY>` is looked at. Raises ConfigError with all mistakes at once.
    """
    where = str(path) if path is not None else "configuration"
    mistakes: list[Mistake] = []
    tree = _read(path, mistakes) if path is not None else {}
    readable = not mistakes
    origins: dict[tuple[str, str], str] = {}
    for layer in (_from_variables(environ, mistakes), _from_sets(sets, mistakes)):
        _override(tree, layer, origins)
    if not readable:  # what is missing may stand in the file: only what is there can be judged
        raise ConfigError([*mistakes, *take_out_unknown(Config, tree, origins, where)])
    return _with_absolute_paths(check(Config, tree, origins, where, mistakes), path, origins)


def _read(path: Path, mistakes: list[Mistake]) -> Tree:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), map(str, path.parent.glob("*.toml")), 1)
        mistakes.append(Mistake(str(path), "", "there is no such file", "".join(near)))
    except OSError as error:
        mistakes.append(Mistake(str(path), "", f"cannot be read: {error.strerror}"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        mistakes.append(Mistake(f"{path}:{line}", "", "is not UTF-8 text"))
    except tomllib.TOMLDecodeError as error:
        place, reason = str(path), str(error)
        if found := re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", reason, re.DOTALL):
            place, reason = f"{path}:{found[2]}", f"{found[1]} (column {found[3]})"
        mistakes.append(Mistake(place, "", f"is not valid TOML: {reason}"))
    return {}


_Layer: TypeAlias = list[tuple[str, str, str, str]]
"""Source, section, key and text of overrides with the same precedence."""


def _from_variables(environ: Mapping[str, str], mistakes: list[Mistake]) -> _Layer:
    layer = []
    # what begins with HPCFT_LOCAL_ is for the nodes of a local cluster
    almost = {
        f"HPCFT_{section}_{key}".upper(): f"HPCFT_{section}__{key}".upper()
        for section, fields in sections_of(Config).items()
        for key in fields or ()
        if section != "local"
    }
    for name in sorted(environ):
        if name in almost:
            mistakes.append(Mistake(name, "", "two underscores separate the section from the key", almost[name]))
        section, dunder, key = name.removeprefix("HPCFT_").partition("__")
        if name.startswith("HPCFT_") and dunder:  # without it they are ours, for other purposes
            layer.append((name, section.lower(), key.lower(), environ[name]))
    return layer


def _from_sets(sets: Sequence[str], mistakes: list[Mistake]) -> _Layer:
    layer = []
    for item in sets:
        dotted, equals, text = item.partition("=")
        section, _, key = dotted.strip().partition(".")
        if equals and section and key:
            layer.append(("--set", section, key, text.strip()))
        else:
            mistakes.append(Mistake("--set", "", f"{item!r} is not of the form section.key=value"))
    return layer


def _override(tree: Tree, layer: _Layer, origins: dict[tuple[str, str], str]) -> None:
    if any(section == "job" and key in PROGRAMS for _, section, key, _ in layer):
        for program in PROGRAMS:  # `--set job.script=…` takes the place of the file's module
            if isinstance(tree.get("job"), dict):
                tree["job"].pop(program, None)
                origins.pop(("job", program), None)
    for source, section, key, text in layer:
        table = tree.setdefault(section, {})
        if isinstance(table, dict):  # otherwise a mistake of the file, and reported as one
            table[key] = _override_value(section, key, text)
            origins[section, key] = source


def _override_value(section: str, key: str, text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if parsed.keys() != {"value"}:  # a line break in the text began another key
        return text
    value = parsed["value"]
    field = (sections_of(Config).get(section) or {}).get(key)
    wants_text = field is not None and kind_of(field) not in ("whole number", "true or false", "list of text")
    return text if wants_text and not isinstance(value, str) else value


def _with_absolute_paths(config: Config, path: Path | None, origins: Origins) -> Config:
    run = config.run.model_copy(update={"root": config.run.root.expanduser().absolute()})
    script = config.job.script
    if script is not None:
        script = script.expanduser()
        if path is not None and ("job", "script") not in origins and (path.parent / script).is_file():
            script = path.parent / script
        script = script.absolute()
    return config.model_copy(update={"run": run, "job": config.job.model_copy(update={"script": script})})
