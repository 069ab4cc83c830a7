"""The vocabulary as JSON: every record comes back as it was, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft import events, wire
from hpcft.events import Event, Order
from hpcft.ids import Generation, Term
from tests.search import sampled

EVENTS = get_args(Event)
ORDERS = get_args(Order)


def records(kinds: tuple[type, ...]) -> st.SearchStrategy[Any]:
    # JSON has neither infinities nor numbers beyond 64 bits
    st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
    st.register_type_strategy(int, st.integers(-(2**63), 2**63 - 1))
    return st.one_of(*(st.from_type(kind) for kind in kinds))


@sampled(200)
@given(records(EVENTS))
def test_every_event_comes_back(event: Event) -> None:
    assert wire.decode_event(orjson.loads(orjson.dumps(wire.encode(event)))) == event


@sampled(100)
@given(records(ORDERS))
def test_every_order_comes_back(order: Order) -> None:
    assert wire.decode_order(orjson.loads(orjson.dumps(wire.encode(order)))) == order


def test_kinds_have_names_of_their_own() -> None:
    names = [kind.__name__ for kind in (*EVENTS, *ORDERS)]
    assert len(set(names)) == len(names)
    for kind in (*EVENTS, *ORDERS):
        assert dataclasses.is_dataclass(kind)
        assert "kind" not in {field.name for field in dataclasses.fields(kind)}


HEARD = wire.encode(events.NodeHeard("node1", "abc", Generation(3), 7))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({}, "unknown kind of record: None"),
        ({"kind": "Nothing"}, "unknown kind of record: 'Nothing'"),
        ({"kind": ["NodeHeard"]}, "unknown kind"),
        ({**HEARD, "more": 1}, r"NodeHeard: unknown fields \['more'\]"),
        ({key: value for key, value in HEARD.items() if key != "sequence"}, "NodeHeard: sequence"),
        ({**HEARD, "sequence": "many"}, "NodeHeard: sequence"),
        ({**HEARD, "generation": None}, "NodeHeard: generation"),
    ],
)
def test_anything_else_is_refused(raw: dict[str, Any], word: str) -> None:
    with pytest.raises(wire.WireError, match=word):
        wire.decode_event(raw)


def test_an_order_is_not_an_event() -> None:
    raw = wire.encode(events.Start(Term(1), Generation(2)))
    with pytest.raises(wire.WireError, match="'Start'"):
        wire.decode_event(raw)
    with pytest.raises(wire.WireError, match="'NodeHeard'"):
        wire.decode_order(HEARD)


def test_actions_inside_a_decision_keep_their_kinds() -> None:
    """Two actions with the same fields differ by their tag only."""
    decided = events.Decided(
        (events.Commit(Generation(4)), events.HaltWorkers(Generation(4)), events.SaveAndStop(Generation(4))), "why"
    )
    back = wire.decode_event(orjson.loads(orjson.dumps(wire.encode(decided))))
    assert isinstance(back, events.Decided)
    assert [type(action) for action in back.actions] == [events.Commit, events.HaltWorkers, events.SaveAndStop]
