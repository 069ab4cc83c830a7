"""Finding all mistakes of a configuration at once, and saying each so that it can be put right.

Theory of operation
-------------------
What was read is a tree of sections and keys, with a note where each key came from. Keys that the model lacks are
reported and taken out first, so that they do not keep pydantic from looking at the rest; then pydantic checks
everything, and its findings are put into our words. A required key that is missing only because it was misspelled
is reported once, as misspelled.

Nothing here knows the model itself: it is a pydantic model whose fields are sections, and a section is either
another model or a free table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hpcft.errors import UsageError
from hpcft.units import toml_text

Tree: TypeAlias = dict[str, Any]
Origins: TypeAlias = Mapping[tuple[str, str], str]
"""Where a section's key was set, if not in the file."""
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Mistake:
    source: str
    """The file, `--set`, or the name of the variable."""
    key: str
    """Dotted; empty where the mistake is not one key's."""
    reason: str
    nearest: str = ""
    """The valid key that was probably meant."""

    def __str__(self) -> str:
        meant = f"; did you mean {self.nearest}?" if self.nearest else ""
        return ": ".join(part for part in (self.source, self.key, self.reason) if part) + meant


class ConfigError(UsageError):
    """Everything that is wrong with the configuration, in one message."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        lines = [str(mistake) for mistake in self.mistakes]
        if len(lines) > 1:
            lines = [f"{len(lines)} mistakes in the configuration:", *(f"  {line}" for line in lines)]
        super().__init__("\n".join(lines), "docs/configuration.md describes every key")


class Contradiction(ValueError):
    """Raised by a section's validator: values that do not fit together, as pairs of key and reason.

    `cures` are keys any of which would put it right: where one was given under a wrong name, that is the mistake.
    """

    def __init__(self, *mistakes: tuple[str, str], cures: Sequence[str] = ()) -> None:
        super().__init__("; ".join(reason for _, reason in mistakes))
        self.mistakes = mistakes
        self.cures = cures


def sections_of(model: type[BaseModel]) -> dict[str, dict[str, FieldInfo] | None]:
    """The keys of every section, in order; None for a free table."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: dict(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        for name, kind in kinds.items()
    }


def check(model: type[M], tree: Tree, origins: Origins, where: str, known: Sequence[Mistake] = ()) -> M:
    """The model of the tree. Raises ConfigError with the mistakes `known` before and all that are found here."""
    tree = {section: dict(table) if isinstance(table, dict) else table for section, table in tree.items()}
    mistakes = [*known, *take_out_unknown(model, tree, origins, where)]
    meant = {mistake.nearest for mistake in mistakes}
    required: Tree = {name: {} for name, field in model.model_fields.items() if field.is_required()}
    try:
        checked = model.model_validate(required | tree)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            mistakes.extend(_in_our_words(found, tree, origins, where, meant))
    if mistakes:
        raise ConfigError(mistakes)
    return checked


def take_out_unknown(model: type[BaseModel], tree: Tree, origins: Origins, where: str) -> list[Mistake]:
    """The keys that the model lacks; they are removed from the tree."""
    mistakes = []
    sections = sections_of(model)
    for section, table in list(tree.items()):
        if section not in sections:
            del tree[section]
            mistakes.extend(_unknown_section(sections, section, table, origins, where))
            continue
        keys = sections[section]
        if keys is None or not isinstance(table, dict):
            continue
        for key in [key for key in table if key not in keys]:
            del table[key]
            nearest = _nearest_key(sections, section, key)
            reason = "unknown key" if nearest else f"unknown key; [{section}] has {', '.join(keys)}"
            mistakes.append(Mistake(origins.get((section, key), where), f"{section}.{key}", reason, nearest))
    return mistakes


def _unknown_section(
    sections: Mapping[str, Mapping[str, FieldInfo] | None], name: str, table: object, origins: Origins, where: str
) -> list[Mistake]:
    near = difflib.get_close_matches(name, sections, 1)
    if not isinstance(table, dict):
        homes = [f"{section}.{name}" for section, keys in sections.items() if keys and name in keys]
        return [Mistake(where, name, "unknown key: every key stands in a section", "".join(homes[:1] or near))]
    reason = "unknown section" if near else f"unknown section; there are {', '.join(sections)}"
    sources = {origins.get((name, key), where) for key in table} or {where}
    return [Mistake(source, name, reason, "".join(near)) for source in sorted(sources)]


def _nearest_key(sections: Mapping[str, Mapping[str, FieldInfo] | None], section: str, key: str) -> str:
    """In the same section if one is near, else in another one."""
    if near := difflib.get_close_matches(key, sections[section] or (), 1):
        return f"{section}.{near[0]}"
    homes: dict[str, list[str]] = {}
    for name, keys in sections.items():
        for each in keys or ():
            homes.setdefault(each, []).append(name)
    if not (near := difflib.get_close_matches(key, homes, 1, 0.8)):
        return ""
    return f"{difflib.get_close_matches(section, homes[near[0]], 1, 0.0)[0]}.{near[0]}"


def _in_our_words(found: Any, tree: Tree, origins: Origins, where: str, meant: set[str]) -> Iterator[Mistake]:
    place: tuple[int | str, ...] = found["loc"]
    section, key = str(place[0]), str(place[1]) if len(place) > 1 else ""
    source = origins.get((section, key), where)
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, Contradiction):
        if cause.cures and meant & {section, *(f"{section}.{cure}" for cure in cause.cures)}:
            return
        for wrong, reason in cause.mistakes:
            dotted = f"{section}.{wrong}" if wrong else section
            yield Mistake(_responsible(section, wrong, tree, origins, where), dotted, reason)
    elif not (found["type"] == "missing" and meant & {section, f"{section}.{key}"}):
        dotted = ".".join(part for part in (section, key) if part)
        index = "".join(f"[{part}]" for part in place[2:])
        yield Mistake(source, dotted + index, _reason(found, _written(tree, place)))


def _responsible(section: str, key: str, tree: Tree, origins: Origins, where: str) -> str:
    """Whoever set the key; else whoever set another one of the section, since defaults agree with each other."""
    table = tree.get(section, {})
    if key in table:
        return origins.get((section, key), where)
    return next((origins[section, other] for other in table if (section, other) in origins), where)


def _written(tree: Any, place: tuple[int | str, ...]) -> object:
    """What stood there before any conversion."""
    for part in place:
        if isinstance(tree, dict) and part not in tree:
            return None
        tree = tree[part]
    return tree


_EXPECTED = {
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "path_type": "text in quotes",
    "tuple_type": 'a list of text, such as ["a", "b"]',
    "model_type": "a section with its keys below it",
    "mapping_type": "a section with its keys below it",
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than_equal": "at most",
}
"""By pydantic's name for what is wrong; the comparisons are followed by their limit."""


def _reason(found: Any, written: object) -> str:
    kind = found["type"]
    detail = next(iter(found.get("ctx", {}).values()), "")
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(detail)
    if kind not in _EXPECTED:
        return f"{found['msg']}; it is {toml_text(written)}"
    limit = f" {str(detail).removesuffix('.0')}" if "than" in kind else ""
    return f"must be {_EXPECTED[kind]}{limit}, not {toml_text(written)}"
