"""Quantities as people write them: durations ("30s"), sizes ("16MiB"), and how often to checkpoint ("200 steps").

Theory of operation
-------------------
A quantity in the configuration is text with a unit, never a bare number: `timeout = 5` makes the reader guess.
Each kind has a parser (text to value, `ValueError` with a sentence for the user) and an exact inverse, so that a
stored configuration says what was meant: `parse_duration(duration_text(x)) == x`. The `human_…` functions are for
screens only: they round.

`Duration`, `Size` and `Cadence` are plain types for readers (float seconds, int bytes, a closed union) and parse
text when pydantic meets them as the type of a field. pydantic itself is imported by whoever defines a model, not
here: `hpcft status` formats durations and must start at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

_NUMBER = re.compile(r"(?P<whole>[0-9]+)(?:\.(?P<fraction>[0-9]+))? *(?P<unit>[A-Za-z]*)")

_MILLISECONDS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
"""From the largest down: `duration_text` takes the first that fits."""

_BYTES = {
    "TiB": 1024**4, "GiB": 1024**3, "MiB": 1024**2, "KiB": 1024,
    "TB": 1000**4, "GB": 1000**3, "MB": 1000**2, "kB": 1000, "B": 1,
}  # fmt: skip


def _quantity(text: str, units: dict[str, int]) -> tuple[int, int] | None:
    """The exact value as a ratio of integers in the smallest unit, or None where it does not read as one."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None or found["unit"] not in units:
        return None
    fraction = found["fraction"] or ""
    try:
        digits = int(found["whole"] + fraction)
    except ValueError:  # thousands of digits: Python refuses to convert them
        return None
    return digits * units[found["unit"]], 10 ** len(fraction)


def toml_text(value: object) -> str:
    """A value as it stands in a configuration file, for messages: `'5 sekunden'`, `true`, `12`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def _bare_number(value: object) -> bool:
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value.strip())
        return found is not None and not found["unit"]
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- durations -------------------------------------------------------------------------------------------------


def parse_duration(value: object) -> float:
    """Seconds from text such as "500ms", "30s", "5m", "2h", "1d" or "1.5h".

    Raises ValueError with a sentence for the user. The result is the float nearest to what was written.
    """
    if isinstance(value, str) and (ratio := _quantity(value, _MILLISECONDS)) is not None:
        try:
            return ratio[0] / (ratio[1] * 1_000)
        except OverflowError:
            raise ValueError(f"{toml_text(value)} is longer than can be counted") from None
    if _bare_number(value):
        raise ValueError(f"{toml_text(value)} has no unit; write '{value}s' or '{value}ms', say")
    raise ValueError(f"{toml_text(value)} is not a duration; write a number and a unit, such as '30s'")


def duration_text(seconds: float) -> str:
    """The shortest exact text for a duration: `parse_duration` gives back the same float."""
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{seconds} seconds is not a duration")
    if seconds == 0:
        return "0s"
    for unit, milliseconds in _MILLISECONDS.items():
        if unit != "ms" and seconds % (milliseconds // 1_000) == 0:
            return f"{int(seconds) * 1_000 // milliseconds}{unit}"
    if seconds < 1 and (milliseconds := round(seconds * 1_000)) / 1_000 == seconds:
        return f"{milliseconds}ms"
    digits, _, exponent = repr(seconds).partition("e")
    whole, _, fraction = digits.partition(".")
    shift = int(exponent or "0")
    if shift >= 0:
        fraction = fraction.ljust(shift, "0")
        return f"{whole}{fraction[:shift]}.{fraction[shift:] or '0'}s"
    return f"0.{'0' * (-shift - len(whole))}{whole}{fraction}s"


def human_duration(seconds: float) -> str:
    """A duration for a screen, two figures or so: "0.34ms", "340ms", "12.3s", "3m 20s", "2h 05m", "1d 4h"."""
    if seconds < 0:
        return "-" + human_duration(-seconds)
    if seconds == float("inf") or seconds != seconds:
        return "∞" if seconds == seconds else "?"
    if seconds == 0:
        return "0s"
    if seconds < 0.01:
        return f"{seconds * 1_000:.2g}ms"
    if (milliseconds := round(seconds * 1_000)) < 1_000:
        return f"{milliseconds}ms"
    if (tenths := round(seconds * 10)) < 600:
        return f"{tenths / 10:g}s"
    if (total := round(seconds)) < 3_600:
        return f"{total // 60}m {total % 60:02}s"
    if (minutes := round(seconds / 60)) < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02}m"
    hours = round(seconds / 3_600)
    return f"{hours // 24}d {hours % 24}h"


# --- sizes -----------------------------------------------------------------------------------------------------


def counted(number: int, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_size(value: object) -> int:
    """Bytes from text such as "16MiB", "1GiB" (powers of 1024) or "4MB" (powers of 1000).

    Raises ValueError with a sentence for the user.
    """
    if isinstance(value, str) and (ratio := _quantity(value, _BYTES)) is not None:
        size, remainder = divmod(ratio[0], ratio[1])
        if remainder:
            raise ValueError(f"{toml_text(value)} is not a whole number of bytes")
        return size
    if _bare_number(value):
        raise ValueError(f"{toml_text(value)} has no unit; write '{value}MiB' or '{value}B', say")
    raise ValueError(f"{toml_text(value)} is not a size; write a number and a unit, such as '16MiB'")


def size_text(size: int) -> str:
    """The exact text for a number of bytes: `parse_size` gives back the same number."""
    if size < 0:
        raise ValueError(f"{size} bytes is not a size")
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return f"{size}B"


def human_size(size: float) -> str:
    """A number of bytes for a screen: "512 B", "1.5 KiB", "16 MiB", "2.3 TiB"."""
    if size < 0:
        return "-" + human_size(-size)
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if round(amount, 1) < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{round(amount, 1):g} {unit}"


# --- how often -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EverySteps:
    """At every step whose number divides by `steps`."""

    steps: int


@dataclass(frozen=True, slots=True)
class EverySeconds:
    """At the first step that ends `seconds` or more after the last one began."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Auto:
    """As it follows from what the run measures."""


@dataclass(frozen=True, slots=True)
class Never:
    """Not at all."""


_STEPS = re.compile(r"([0-9]{1,18}) *steps?")


def parse_cadence(value: object) -> EverySteps | EverySeconds | Auto | Never:
    """One of "200 steps", a duration such as "60s", "auto" or "off". Raises ValueError with a sentence for the user."""
    if not isinstance(value, str):
        hint = f"; write '{value} steps' or '{value}s'" if _bare_number(value) else ""
        raise ValueError(f"{toml_text(value)} does not say how often{hint or _CADENCE_HINT}")
    text = value.strip()
    if text == "off":
        return Never()
    if text == "auto":
        return Auto()
    if found := _STEPS.fullmatch(text):
        if (steps := int(found[1])) == 0:
            raise ValueError("every 0 steps is not possible; write 'off' to have none")
        return EverySteps(steps)
    if _bare_number(value):
        raise ValueError(f"{toml_text(value)} has no unit; write '{text} steps' or '{text}s'")
    try:
        seconds = parse_duration(text)
    except ValueError:
        raise ValueError(f"{toml_text(value)} does not say how often{_CADENCE_HINT}") from None
    if seconds == 0:
        raise ValueError("every 0 seconds is not possible; write 'off' to have none")
    return EverySeconds(seconds)


_CADENCE_HINT = "; write '200 steps', '60s', 'auto' or 'off'"


def cadence_text(cadence: EverySteps | EverySeconds | Auto | Never) -> str:
    """The exact inverse of `parse_cadence`."""
    match cadence:
        case EverySteps(steps):
            return f"{steps} step" if steps == 1 else f"{steps} steps"
        case EverySeconds(seconds):
            return duration_text(seconds)
        case Auto():
            return "auto"
        case Never():
            return "off"


def parse_lead(value: object) -> float | Auto:
    """Seconds from a duration longer than "0s", or "auto". Raises ValueError with a sentence for the user."""
    if isinstance(value, str) and value.strip() == "auto":
        return Auto()
    try:
        seconds = parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{error}, or 'auto'") from None
    if seconds == 0:
        raise ValueError("must be more than 0, or 'auto'")
    return seconds


def lead_text(lead: float | Auto) -> str:
    """The exact inverse of `parse_lead`."""
    return "auto" if isinstance(lead, Auto) else duration_text(lead)


# --- as types of configuration keys ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Written:
    """Marks a type whose values are written as text, for pydantic (which calls the method by its name)."""

    kind: str
    parse: Callable[[object], Any]
    text: Callable[[Any], str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        from pydantic_core import core_schema

        text = core_schema.plain_serializer_function_ser_schema(
            self.text, return_schema=core_schema.str_schema(), when_used="json"
        )
        return core_schema.no_info_before_validator_function(self.parse, handler(source), serialization=text)


Duration: TypeAlias = Annotated[float, Written("duration", parse_duration, duration_text)]
"""Seconds."""

Size: TypeAlias = Annotated[int, Written("size", parse_size, size_text)]
"""Bytes."""

Cadence: TypeAlias = Annotated[
    EverySteps | EverySeconds | Auto | Never, Written("how often", parse_cadence, cadence_text)
]
"""How often something is done."""

Lead: TypeAlias = Annotated[float | Auto, Written('duration or "auto"', parse_lead, lead_text)]
"""How long before something else, in seconds."""
