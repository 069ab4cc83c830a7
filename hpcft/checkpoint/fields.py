"""Strict reading of JSON that came from a disk or another process: each value has its type, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class MalformedError(ValueError):
    """`where` in the document, and what is wrong there."""


class Fields:
    """One JSON object. Each method returns the value of a key or raises `MalformedError` with the path to it.

    Unknown keys are ignored: a later version may add some without a new format number.
    """

    __slots__ = ("_table", "_where")

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise MalformedError(f"{where} is not an object")
        self._table: dict[str, Any] = value
        self._where = where

    def text(self, key: str) -> str:
        value = self._table.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self._table.get(key) is None else self.text(key)

    def whole(self, key: str, least: int = 0) -> int:
        value = self._table.get(key)
        if type(value) is not int or value < least:
            raise self._wrong(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str) -> float:
        value = self._table.get(key)
        if type(value) not in (int, float):
            raise self._wrong(key, "a number")
        return float(value)  # type: ignore[arg-type]

    def wholes(self, key: str) -> tuple[int, ...]:
        value = self._table.get(key)
        # ten thousand tensors have thirty thousand of these lists
        if not isinstance(value, list) or not {*map(type, value)} <= {int} or min(value, default=0) < 0:
            raise self._wrong(key, "a list of whole numbers")
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._table.get(key)
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of strings")
        return tuple(value)

    def table(self, key: str) -> dict[str, Any]:
        value = self._table.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return value

    def optional_table(self, key: str) -> dict[str, Any] | None:
        return None if self._table.get(key) is None else self.table(key)

    def named(self, key: str) -> Mapping[str, str]:
        value = self.table(key)
        if any(not isinstance(item, str) for item in value.values()):
            raise self._wrong(key, "an object of strings")
        return value

    def each(self, key: str, parse: Callable[[Fields], T]) -> tuple[T, ...]:
        """A list of objects, each made into a value by `parse`."""
        value = self._table.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        where = f"{self._where}.{key}"
        return tuple(parse(Fields(item, f"{where}[{index}]")) for index, item in enumerate(value))

    def refuse(self, what: str) -> MalformedError:
        return MalformedError(f"{self._where}: {what}")

    def _wrong(self, key: str, expected: str) -> MalformedError:
        found = "is missing" if key not in self._table else f"is not {expected}"
        return MalformedError(f"{self._where}.{key} {found}")
