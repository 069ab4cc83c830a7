from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.units import (
    Auto,
    EverySeconds,
    EverySteps,
    Never,
    cadence_text,
    duration_text,
    human_duration,
    human_size,
    lead_text,
    parse_cadence,
    parse_duration,
    parse_lead,
    parse_size,
    size_text,
)

DECIMALS = st.from_regex(r"[0-9]{1,12}(\.[0-9]{1,9})?", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5), ("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86400), ("0s", 0), ("1.5h", 5400),
        ("1.1h", 3960), ("1001ms", 1.001), (" 30 s ", 30), ("0.25ms", 0.00025),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("5 sekunden", "'5 sekunden' is not a duration; write a number and a unit, such as '30s'"),
        ("-5s", "'-5s' is not a duration; write a number and a unit, such as '30s'"),
        ("1e3s", "'1e3s' is not a duration; write a number and a unit, such as '30s'"),
        ("", "'' is not a duration; write a number and a unit, such as '30s'"),
        ("5S", "'5S' is not a duration; write a number and a unit, such as '30s'"),
        ("٣s", "'٣s' is not a duration; write a number and a unit, such as '30s'"),
        (True, "true is not a duration; write a number and a unit, such as '30s'"),
        (["5s"], "['5s'] is not a duration; write a number and a unit, such as '30s'"),
        (5, "5 has no unit; write '5s' or '5ms', say"),
        (0.5, "0.5 has no unit; write '0.5s' or '0.5ms', say"),
        ("5", "'5' has no unit; write '5s' or '5ms', say"),
    ],
)
def test_bad_durations_say_what_to_write(value: object, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_duration(value)
    assert str(raised.value) == message


@pytest.mark.parametrize("digits", [400, 5000])
def test_absurd_durations_are_refused(digits: int) -> None:
    with pytest.raises(ValueError, match=r"longer than can be counted|is not a duration"):
        parse_duration("9" * digits + "s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"), (0.5, "500ms"), (1.5, "1.5s"), (30.0, "30s"), (90.0, "90s"), (120.0, "2m"),
        (5400.0, "90m"), (86400.0, "1d"), (0.00025, "0.00025s"), (5e-05, "0.00005s"),
    ],
)  # fmt: skip
def test_duration_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_duration_text_is_exact_for_any_float(seconds: float) -> None:
    assert parse_duration(duration_text(seconds)) == seconds


@given(DECIMALS, st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_a_written_duration_survives_storing(number: str, unit: str) -> None:
    seconds = parse_duration(number + unit)
    assert parse_duration(duration_text(seconds)) == seconds


@given(st.integers(0, 10**15))
def test_units_of_durations_agree(count: int) -> None:
    assert parse_duration(f"{count}m") == parse_duration(f"{count * 60}s") == parse_duration(f"{count * 60000}ms")


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_duration_text_refuses_what_cannot_be_written(seconds: float) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        duration_text(seconds)


@given(st.text(max_size=12) | st.integers() | st.floats() | st.none() | st.booleans())
def test_parsers_raise_nothing_but_value_errors(value: object) -> None:
    for parse in (parse_duration, parse_size, parse_cadence):
        try:
            parse(value)
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.00034, "0.34ms"), (0.0052, "5.2ms"), (0.34, "340ms"), (0.9996, "1s"), (1.0, "1s"),
        (1.54, "1.5s"), (12.34, "12.3s"), (59.94, "59.9s"), (59.96, "1m 00s"), (200, "3m 20s"),
        (3599.7, "1h 00m"), (7500, "2h 05m"), (86399, "1d 0h"), (100_800, "1d 4h"), (-1.5, "-1.5s"),
        (float("inf"), "∞"), (float("nan"), "?"),
    ],
)  # fmt: skip
def test_human_duration(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@given(st.floats(min_value=1e-6, max_value=1e9))
def test_human_duration_is_right_within_five_per_cent(seconds: float) -> None:
    shown = sum(parse_duration(part) for part in human_duration(seconds).split())
    assert shown == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16MiB", 16 * 1024**2), ("1GiB", 1024**3), ("4MB", 4_000_000), ("64KiB", 65536), ("1.5GiB", 3 * 2**29),
        ("7kB", 7000), ("2TB", 2 * 10**12), ("1TiB", 2**40), ("0B", 0), ("12 B", 12),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("16 megs", "'16 megs' is not a size; write a number and a unit, such as '16MiB'"),
        ("16M", "'16M' is not a size; write a number and a unit, such as '16MiB'"),
        ("-1B", "'-1B' is not a size; write a number and a unit, such as '16MiB'"),
        ("0.3B", "'0.3B' is not a whole number of bytes"),
        (False, "false is not a size; write a number and a unit, such as '16MiB'"),
        (16, "16 has no unit; write '16MiB' or '16B', say"),
    ],
)
def test_bad_sizes_say_what_to_write(value: object, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_size(value)
    assert str(raised.value) == message


@given(st.integers(0, 2**70))
def test_size_text_is_exact(size: int) -> None:
    assert parse_size(size_text(size)) == size


def test_size_text_refuses_negative_numbers() -> None:
    with pytest.raises(ValueError, match="-1 bytes is not a size"):
        size_text(-1)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (512, "512 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (16 * 2**20, "16 MiB"),
        (2**20 - 1, "1 MiB"), (150 * 2**20 + 5, "150 MiB"), (2.3 * 2**40, "2.3 TiB"), (-1536, "-1.5 KiB"),
    ],
)  # fmt: skip
def test_human_size(size: float, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("text", "cadence"),
    [
        ("200 steps", EverySteps(200)), ("1 step", EverySteps(1)), ("50steps", EverySteps(50)),
        ("60s", EverySeconds(60)), ("auto", Auto()), ("off", Never()),
    ],
)  # fmt: skip
def test_cadences(text: str, cadence: object) -> None:
    assert parse_cadence(text) == cadence


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sometimes", "'sometimes' does not say how often; write '200 steps', '60s', 'auto' or 'off'"),
        ("-3 steps", "'-3 steps' does not say how often; write '200 steps', '60s', 'auto' or 'off'"),
        ("0 steps", "every 0 steps is not possible; write 'off' to have none"),
        ("0s", "every 0 seconds is not possible; write 'off' to have none"),
        (200, "200 does not say how often; write '200 steps' or '200s'"),
        ("200", "'200' has no unit; write '200 steps' or '200s'"),
        (False, "false does not say how often; write '200 steps', '60s', 'auto' or 'off'"),
    ],
)
def test_bad_cadences_say_what_to_write(value: object, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_cadence(value)
    assert str(raised.value) == message


@given(
    st.builds(EverySteps, st.integers(1, 10**18 - 1))
    | st.builds(EverySeconds, st.floats(min_value=1e-3, max_value=1e9))
    | st.just(Never())
    | st.just(Auto())
)
def test_cadence_text_is_exact(cadence: EverySteps | EverySeconds | Auto | Never) -> None:
    assert parse_cadence(cadence_text(cadence)) == cadence


@given(st.floats(min_value=1e-3, max_value=1e9) | st.just(Auto()))
def test_lead_text_is_exact(lead: float | Auto) -> None:
    assert parse_lead(lead_text(lead)) == lead


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("soon", "'soon' is not a duration; write a number and a unit, such as '30s', or 'auto'"),
        ("0s", "must be more than 0, or 'auto'"),
        (60, "60 has no unit; write '60s' or '60ms', say, or 'auto'"),
    ],
)
def test_bad_leads_say_what_to_write(value: object, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_lead(value)
    assert str(raised.value) == message


def test_import_is_light() -> None:
    """Views format durations: they must not pay for pydantic or torch."""
    code = "import sys, hpcft.units; print([m for m in ('pydantic', 'pydantic_core', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
