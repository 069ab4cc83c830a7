"""Vocabulary as JSON: what crosses a stream or goes into the journal.

A record is `{"kind": <class name>, <field>: <value> …}`. Decoding validates every field against its annotation
with pydantic; a record of another kind, with a missing, unknown or ill-typed field is refused, never guessed at.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import cache
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from hpcft.events import Event, Order

T = TypeVar("T")


class WireError(ValueError):
    """A record that is not one of ours."""


def encode(record: Event | Order) -> dict[str, Any]:
    return {"kind": type(record).__name__, **asdict(record)}


def decode_event(raw: dict[str, Any]) -> Event:
    event: Event = _decode(raw, _kinds(Event))
    return event


def decode_order(raw: dict[str, Any]) -> Order:
    order: Order = _decode(raw, _kinds(Order))
    return order


@cache
def _kinds(union: Any) -> dict[str, type]:
    return {kind.__name__: kind for kind in get_args(union)}


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _decode(raw: dict[str, Any], kinds: dict[str, type]) -> Any:
    name = raw.get("kind")
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise WireError(f"unknown kind of record: {name!r}")
    values = {key: value for key, value in raw.items() if key != "kind"}
    unknown = values.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise WireError(f"{name}: unknown fields {sorted(unknown)}")
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise WireError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
