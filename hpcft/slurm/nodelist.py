"""Slurm's way of writing many node names in one word: `gpu[008-010,12]-ib,login1`.

Theory of operation. A list is items separated by commas outside brackets. An item is literal text and bracket
groups in turn; a group is a comma-separated list of numbers and ranges, padded to the width of a range's lower
bound. An item with several groups stands for their product.

The order of the product matters, because a node's index in the allocation is its place in the expanded list. It is
Slurm's own, odd order (seen with `scontrol show hostnames`, 22.05): the last group varies fastest, after it the
first, then the second, and so on. Beyond Slurm, literal text after the last group is accepted (`n[1-2]-ib`); what
Slurm reads by guessing (`n[1`, `a,,b`, `n[1-]`) is an error here, because a name made up by a parser is a node
that never answers.

An own parser, because containers often lack `scontrol`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod

from hpcft.errors import UsageError

MAX_NODES = 65_536
"""Slurm's own limit for one range; here for the whole list, so that a typo cannot eat the memory."""

_TOKEN = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)|(,)")
_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)


def expand(nodelist: str) -> tuple[str, ...]:
    """All names of a node list, in Slurm's order, repeated names included.

    Raises UsageError for an empty list, unbalanced brackets, an empty item, a bad range or a character that no node
    name has.
    """
    names: list[str] = []
    for item in _items(nodelist):
        names.extend(_names_of(item, nodelist, MAX_NODES - len(names)))
    return tuple(names)


@dataclass(frozen=True, slots=True)
class _Item:
    """What stands between two commas: the choices at each place (one where the text is literal)."""

    places: list[list[str]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """Indices of the places that were written in brackets."""


def _items(nodelist: str) -> Iterator[_Item]:
    item = _Item()
    at = 0
    while at < len(nodelist):
        token = _TOKEN.match(nodelist, at)
        if token is None:
            raise _error(nodelist, f"unbalanced {nodelist[at]!r} at character {at + 1}")
        group, text, comma = token.groups()
        if comma:
            if not item.places:
                raise _error(nodelist, f"nothing before the comma at character {at + 1}")
            yield item
            item = _Item()
        elif text:
            if not _NAME.fullmatch(text):
                raise _error(nodelist, f"{text!r} has a character that no node name has")
            item.places.append([text])
        else:
            item.groups.append(len(item.places))
            item.places.append(_numbers(group, nodelist))
        at = token.end()
    if not item.places:
        raise _error(nodelist, "it ends with a comma" if nodelist else "it is empty")
    yield item


def _numbers(group: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for part in group.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _error(nodelist, f"{part!r} is not a number or a range")
        low, high = match[1], match[2] or match[1]
        if int(low) > int(high):
            raise _error(nodelist, f"the range {part} runs backwards")
        if int(high) - int(low) >= MAX_NODES - len(numbers):
            raise _error(nodelist, f"more than {MAX_NODES} names")
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return numbers


def _names_of(item: _Item, nodelist: str, room: int) -> Iterator[str]:
    if prod(map(len, item.places)) > room:
        raise _error(nodelist, f"more than {MAX_NODES} names")
    slowest_first = [*reversed(item.groups[:-1]), *item.groups[-1:]]
    name = [choices[0] for choices in item.places]
    for choice in product(*(item.places[index] for index in slowest_first)):
        for index, number in zip(slowest_first, choice, strict=True):
            name[index] = number
        yield "".join(name)


def _error(nodelist: str, why: str) -> UsageError:
    return UsageError(
        f"cannot read the node list {nodelist!r}: {why}",
        "Write it as Slurm does: 'node[01-04],gpu7'; `scontrol show hostnames LIST` shows how Slurm reads it.",
    )
