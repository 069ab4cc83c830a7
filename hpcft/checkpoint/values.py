"""What `state.json` holds, looked at as JSON: its parts, which tensors belong to one, how two differ. No torch.

`tree` makes Python values of it. Here the tags stay what they are, so that a command which only looks needs no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from hpcft.errors import DamagedError, NotFoundError

ROWS = ("items", "ordered", "counter")
"""Tags whose value is a list of [key, value]."""

_SHOWN = 60
"""Characters of a value in a message."""


def parts(state: Any) -> Mapping[str, Any]:
    """What was given to `run.restore`, by name, and `run`, which is hpcft's own."""
    found = state.get("dict") if isinstance(state, dict) else None
    if not isinstance(found, dict):
        raise DamagedError(
            "the checkpoint's values cannot be understood: it is not a state",
            "it was perhaps written by a newer version of hpcft",
        )
    return found


def select(state: Any, only: Sequence[str]) -> dict[str, Any]:
    """The parts that are named; all where none is.

    Raises:
        NotFoundError: there is no such part; the hint lists those that there are.
    """
    found = parts(state)
    for name in only:
        if name not in found:
            raise NotFoundError(f"the checkpoint has no {name!r}", f"it holds: {', '.join(found)}")
    return {name: value for name, value in found.items() if not only or name in only}


def tensor_names(value: Any) -> Iterator[str]:
    """Of all tensors in a value, in its order."""
    if isinstance(value, list):
        for item in value:
            yield from tensor_names(item)
    elif isinstance(value, dict):
        if isinstance(name := value.get("tensor"), str):
            yield name
            return
        if isinstance(table := value.get("dict"), dict):
            value = table
        for item in value.values():
            yield from tensor_names(item)


def count_others(value: Any) -> int:
    """How many values there are that are no tensors; an empty container is none."""
    if isinstance(value, list):
        return sum(map(count_others, value))
    if not isinstance(value, dict):
        return 1
    if "tensor" in value or "array" in value:
        return 0
    if isinstance(table := value.get("dict"), dict):
        return sum(map(count_others, table.values()))
    for tag in ROWS:
        if isinstance(rows := value.get(tag), list):
            return sum(count_others(item) for _, item in rows)
    if isinstance(elements := value.get("tuple"), list):
        return sum(map(count_others, elements))
    return 1


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """`a` and `b` as they stand in `state.json`; None where there is nothing (JSON's null is the text "null")."""

    path: str
    a: str | None
    b: str | None

    def __str__(self) -> str:
        if self.a is None or self.b is None:
            return f"{self.path}: only in {'B' if self.a is None else 'A'}: {_short(self.b or self.a or '')}"
        return f"{self.path}: {_short(self.a)} → {_short(self.b)}"


def differences(a: Any, b: Any, path: tuple[str, ...] = ()) -> Iterator[ValueDifference]:
    """Where two values differ; tensors by their names alone, for `diff` compares them. A dict has no order here."""
    mine, theirs = _children(a), _children(b)
    if mine is None or theirs is None or mine[0] != theirs[0]:
        if _text(a) != _text(b):
            yield ValueDifference(".".join(path), _shown(a), _shown(b))
        return
    for key in [*mine[1], *(key for key in theirs[1] if key not in mine[1])]:
        where = (*path, key)
        if key not in theirs[1] or key not in mine[1]:
            alone = mine[1].get(key, theirs[1].get(key))
            if count_others(alone) or not any(True for _ in tensor_names(alone)):
                shown = _shown(alone)
                yield ValueDifference(".".join(where), *((shown, None) if key in mine[1] else (None, shown)))
        else:
            yield from differences(mine[1][key], theirs[1][key], where)


def _children(value: Any) -> tuple[str, dict[str, Any]] | None:
    """What kind of container a value is, and what it holds; None for all that is compared as a whole."""
    if isinstance(value, list):
        return "list", {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return None
    match value:
        case {"dict": dict() as table}:
            return "dict", table
        case {"tuple": list() as elements}:
            return "tuple", {str(index): item for index, item in enumerate(elements)}
    for tag in ROWS:
        if isinstance(rows := value.get(tag), list):
            kind = "dict" if tag == "items" else tag
            found = {key_text(key): item for key, item in rows}
            return kind, found | {f"<attributes>.{key_text(key)}": item for key, item in value.get("attributes", ())}
    return None


def key_text(key: Any) -> str:
    """A key of a dict, in a path."""
    return key if isinstance(key, str) else _text(key)


def _text(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _shown(value: Any) -> str:
    match value:
        case {"float": str() as digits}:
            return repr(struct.unpack(">d", bytes.fromhex(digits))[0])
        case {"int": str() as digits}:
            return str(int(digits, 16))
    return _text(value)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
