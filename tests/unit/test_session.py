"""The protocol of a stream, byte by byte: whatever is changed on the way, nothing false is ever accepted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.session import (
    HELLO_LIMIT,
    MESSAGE_LIMIT,
    WELCOME_SIZE,
    Answering,
    Dialling,
    Kind,
    RefusedError,
    Session,
)
from tests.search import sampled

KEY = b"k" * 32


def handshake(
    ours: bytes = KEY, theirs: bytes = KEY, hello: dict[str, Any] | None = None
) -> tuple[Session, Session, list[bytes]]:
    """The dialler's session, the server's, and the four things said."""
    dialling, answering = Dialling(ours, hello or {"from": "dialler"}), Answering(theirs, {"from": "server"})
    answer = answering.feed(dialling.opening)
    proof = dialling.prove(answer)
    welcome = answering.feed(proof)
    assert answering.session is not None
    session = dialling.agree(welcome[:WELCOME_SIZE], welcome[WELCOME_SIZE:])
    assert dialling.hello_size(welcome) == len(welcome) - WELCOME_SIZE
    return session, answering.session, [dialling.opening, answer, proof, welcome]


def test_both_ends_learn_the_others_hello_and_understand_each_other() -> None:
    dialler, server, _ = handshake()
    assert (dialler.hello, server.hello) == ({"from": "server"}, {"from": "dialler"})
    for sender, receiver in ((dialler, server), (server, dialler)):
        frames = sender.seal(Kind.MESSAGE, b"one") + sender.seal(Kind.GOODBYE, b"")
        opened = [(kind, bytes(body)) for kind, body in receiver.open(frames)]
        assert opened == [(Kind.MESSAGE, b"one"), (Kind.GOODBYE, b"")]
        assert not receiver.cut


def test_no_two_sessions_share_anything_that_was_said() -> None:
    _, _, first = handshake()
    _, _, second = handshake()
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_without_the_secret_neither_end_gets_past_the_first_proof() -> None:
    dialling, answering = Dialling(KEY, {}), Answering(bytes(32), {})
    with pytest.raises(RefusedError, match="does not know the run's secret"):
        dialling.prove(answering.feed(dialling.opening))

    stranger = Dialling(bytes(32), {})
    answering = Answering(KEY, {})
    answer = answering.feed(stranger.opening)
    proof = Dialling(bytes(32), {"purpose": "operator"})
    with pytest.raises(RefusedError, match="does not know the run's secret"):
        proof.prove(answer)
    with pytest.raises(RefusedError, match="does not know the run's secret"):
        answering.feed(b"\x00\x02" + bytes(32) + b"{}")
    assert answering.session is None


def test_a_recorded_handshake_opens_nothing() -> None:
    _, _, said = handshake()
    answering = Answering(KEY, {"from": "server"})
    answering.feed(said[0])
    with pytest.raises(RefusedError, match="does not know"):
        answering.feed(said[2])
    dialling = Dialling(KEY, {})
    with pytest.raises(RefusedError, match="does not know"):
        dialling.prove(said[1])


def test_a_dialler_is_not_fooled_by_its_own_words() -> None:
    dialling = Dialling(KEY, {})
    with pytest.raises(RefusedError):
        dialling.prove(dialling.opening + bytes(32))


@sampled(300)
@given(st.integers(0, 3), st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_byte_in_the_handshake_is_enough(turn: int, position: int, change: int) -> None:
    def tampered(number: int, said: bytes) -> bytes:
        if number != turn:
            return said
        at = position % len(said)
        return said[:at] + bytes([said[at] ^ change]) + said[at + 1 :]

    dialling, answering = Dialling(KEY, {"a": 1}), Answering(KEY, {"b": 2})
    try:
        answer = answering.feed(tampered(0, dialling.opening))
        if not answer:
            return
        welcome = answering.feed(tampered(2, dialling.prove(tampered(1, answer))))
        if not welcome:
            assert turn == 2  # the length was changed: the server waits for more, until its deadline
            return
        welcome = tampered(3, welcome)
        size = dialling.hello_size(welcome)
        if size != len(welcome) - WELCOME_SIZE:
            return  # the dialler waits for more, or leaves bytes that are no frame
        dialling.agree(welcome[:WELCOME_SIZE], welcome[WELCOME_SIZE:])
    except RefusedError:
        return
    pytest.fail("a changed handshake was accepted")


@sampled(300)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
def test_one_changed_byte_in_the_frames_stops_them_at_that_frame(bodies: list[bytes], data: st.DataObject) -> None:
    dialler, server, _ = handshake()
    frames = [dialler.seal(Kind.MESSAGE, body) for body in bodies]
    victim = data.draw(st.integers(0, len(frames) - 1))
    at = data.draw(st.integers(0, len(frames[victim]) - 1))
    changed = bytearray(frames[victim])
    changed[at] ^= data.draw(st.integers(1, 255))
    frames[victim] = bytes(changed)
    accepted = list[bytes]()
    try:
        for kind, body in server.open(b"".join(frames)):
            assert kind == Kind.MESSAGE
            accepted.append(bytes(body))
    except RefusedError:
        pass
    else:
        assert server.cut  # a longer length: the rest never comes, or is refused when it does
    assert accepted == bodies[:victim]


@sampled(200)
@given(st.lists(st.integers(0, 4), max_size=8))
def test_frames_are_accepted_once_and_in_the_order_sent_only(order: list[int]) -> None:
    dialler, server, _ = handshake()
    frames = [dialler.seal(Kind.MESSAGE, bytes([number])) for number in range(5)]
    accepted = list[int]()
    try:
        for number in order:
            accepted.extend(body[0] for _, body in server.open(frames[number]))
    except RefusedError:
        assert order[: len(accepted) + 1] != list(range(len(accepted) + 1))
    assert accepted == list(range(len(accepted)))


def test_a_frame_sent_back_is_refused() -> None:
    dialler, _, _ = handshake()
    with pytest.raises(RefusedError, match="not authentic"):
        list(dialler.open(dialler.seal(Kind.MESSAGE, b"{}")))


def test_a_frame_of_another_session_is_refused() -> None:
    dialler, _, _ = handshake()
    _, server, _ = handshake()
    with pytest.raises(RefusedError, match="not authentic"):
        list(server.open(dialler.seal(Kind.MESSAGE, b"{}")))


@sampled(200)
@given(st.lists(st.binary(max_size=60), max_size=8), st.lists(st.integers(1, 50), min_size=1))
def test_how_the_bytes_are_cut_makes_no_difference(bodies: list[bytes], sizes: list[int]) -> None:
    dialler, server, _ = handshake()
    data = b"".join(dialler.seal(Kind.MESSAGE, body) for body in bodies)
    accepted, at, turn = list[bytes](), 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        accepted.extend(bytes(body) for _, body in server.open(data[at : at + size]))
        at, turn = at + size, turn + 1
    assert accepted == bodies
    assert not server.cut


def test_a_handshake_that_arrives_byte_by_byte_is_understood() -> None:
    dialling, answering = Dialling(KEY, {"from": "dialler"}), Answering(KEY, {})
    answer = b"".join(answering.feed(bytes([byte])) for byte in dialling.opening)
    welcome = b"".join(answering.feed(bytes([byte])) for byte in dialling.prove(answer))
    assert welcome
    assert answering.session is not None
    assert answering.session.hello == {"from": "dialler"}


def test_sizes_are_refused_before_they_are_waited_for() -> None:
    dialler, server, _ = handshake()
    with pytest.raises(RefusedError, match="announced a frame"):
        list(server.open((MESSAGE_LIMIT + 1).to_bytes(4, "big") + bytes(17)))

    dialling, answering = Dialling(KEY, {}), Answering(KEY, {})
    dialling.prove(answering.feed(dialling.opening))
    with pytest.raises(RefusedError, match="too long a hello"):
        answering.feed((HELLO_LIMIT + 1).to_bytes(2, "big"))
    with pytest.raises(RefusedError, match="too long a hello"):
        dialling.hello_size((HELLO_LIMIT + 1).to_bytes(2, "big") + bytes(32))
    with pytest.raises(ValueError, match="exceeds the limit"):
        Dialling(KEY, {"text": "x" * HELLO_LIMIT})
    assert dialler.seal(Kind.MESSAGE, bytes(MESSAGE_LIMIT))


def test_who_speaks_out_of_turn_is_refused() -> None:
    dialling, answering = Dialling(KEY, {}), Answering(KEY, {})
    with pytest.raises(RefusedError, match="out of turn"):
        answering.feed(dialling.opening + b"x")
    answering = Answering(KEY, {})
    proof = dialling.prove(answering.feed(dialling.opening))
    with pytest.raises(RefusedError, match="out of turn"):
        answering.feed(proof + b"x")


@sampled(300)
@given(st.lists(st.binary(max_size=200), max_size=5))
def test_garbage_never_opens_a_session(chunks: list[bytes]) -> None:
    answering = Answering(KEY, {})
    try:
        for chunk in chunks:
            answering.feed(chunk)
    except RefusedError:
        pass
    assert answering.session is None
