"""What two ends say to each other, without any I/O: the handshake and the frames of an authenticated stream.

Both ends prove that they know the run's secret; after that every frame is authenticated. Nothing is encrypted:
whoever can watch the network can read, but can neither speak, nor change, repeat, reorder, drop or send back a
frame unnoticed. `stream.py` carries the bytes.

Opening, with fresh nonces from both sides, each proof a tag under a key derived from the run's secret:

    dialler -> server   MAGIC nonce_d
    server  -> dialler  MAGIC nonce_s proof("server", nonce_d, nonce_s)
    dialler -> server   length:2 proof("dialler", nonce_d, nonce_s, hello_d) hello_d
    server  -> dialler  length:2 proof("welcome", nonce_d, nonce_s, hello_d, hello_s) hello_s

The keys of the session, one per direction, are tags over all four. Thereafter a frame is

    length:4 kind:1 mac:16 body      mac = HMAC(key of the direction, sequence:8 length kind body), cut short

with a sequence number that is counted, not sent. The key of the direction makes a reflected frame worthless, the
sequence one that is repeated, moved or missing. A session ends with a goodbye frame, so that a cut one is known.

A server holds at most one read and 4 KiB of somebody who has not proved anything yet.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, Final

import orjson

from hpcft.secret import tag

Message = dict[str, Any]

MAGIC: Final = b"hpcft/1\n"
MESSAGE_LIMIT: Final = 4 << 20
HELLO_LIMIT: Final = 4 << 10

_NONCE, _PROOF, _MAC = 32, 32, 16
_HEADER = struct.Struct(">IB")
_SEQUENCE = struct.Struct(">Q")
_LENGTH = struct.Struct(">H")
_PREFIX = _HEADER.size + _MAC

ANSWER_SIZE: Final = len(MAGIC) + _NONCE + _PROOF
WELCOME_SIZE: Final = _LENGTH.size + _PROOF
"""Without the hello, whose length `Dialling.hello_size` reads from it."""


class Kind(IntEnum):
    MESSAGE = 0
    GOODBYE = 1


class RefusedError(Exception):
    """The bytes of the other side are not acceptable; `reason` completes "the peer …"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Session:
    """One end after the handshake: seals frames to send, opens received ones."""

    def __init__(self, hello: Message, sending: bytes, receiving: bytes) -> None:
        self.hello: Final = hello
        """What the peer said about itself."""
        self._sending, self._receiving = sending, receiving
        self._sent = self._received = 0
        self._buffer = bytearray()

    def seal(self, kind: Kind, body: bytes) -> bytes:
        header = _HEADER.pack(len(body), kind)
        mac = hmac.digest(self._sending, _SEQUENCE.pack(self._sent) + header + body, "sha256")[:_MAC]
        self._sent += 1
        return header + mac + body

    def open(self, data: bytes) -> Iterator[tuple[int, bytearray]]:
        """The frames that `data` completes, kind and body. Iterate to the end; after `RefusedError` it is over."""
        buffer, start = self._buffer, 0
        buffer += data
        try:
            while len(buffer) - start >= _PREFIX:
                length, kind = _HEADER.unpack_from(buffer, start)
                if length > MESSAGE_LIMIT:
                    raise RefusedError(f"announced a frame of {length} bytes")
                stop = start + _PREFIX + length
                if stop > len(buffer):
                    break
                body = buffer[start + _PREFIX : stop]
                covered = _SEQUENCE.pack(self._received) + buffer[start : start + _HEADER.size] + body
                mac = hmac.digest(self._receiving, covered, "sha256")[:_MAC]
                if not hmac.compare_digest(mac, buffer[start + _HEADER.size : start + _PREFIX]):
                    raise RefusedError(f"sent a frame (number {self._received}) that is not authentic")
                self._received += 1
                start = stop
                yield kind, body
        finally:
            del buffer[:start]

    @property
    def cut(self) -> bool:
        """Whether a frame has arrived in part."""
        return bool(self._buffer)


class Dialling:
    """The dialler's side: send `opening`, then what `prove` returns; `agree` returns the session."""

    def __init__(self, key: bytes, hello: Mapping[str, Any]) -> None:
        self._key, self._hello, self._nonce = key, encode_hello(hello), os.urandom(_NONCE)
        self._theirs = b""
        self.opening: Final = MAGIC + self._nonce

    def prove(self, answer: bytes) -> bytes:
        """`answer`: the server's first `ANSWER_SIZE` bytes."""
        if not answer.startswith(MAGIC):
            raise RefusedError("is not an agent, or one of another version")
        self._theirs, proof = answer[len(MAGIC) : -_PROOF], answer[-_PROOF:]
        if not hmac.compare_digest(proof, tag(self._key, "server", self._nonce, self._theirs)):
            raise RefusedError("does not know the run's secret")
        own = tag(self._key, "dialler", self._nonce, self._theirs, self._hello)
        return _LENGTH.pack(len(self._hello)) + own + self._hello

    def hello_size(self, welcome: bytes) -> int:
        """How many bytes follow these `WELCOME_SIZE` ones."""
        (length,) = _LENGTH.unpack_from(welcome)
        if length > HELLO_LIMIT:
            raise RefusedError("sent too long a hello")
        return int(length)

    def agree(self, welcome: bytes, hello: bytes) -> Session:
        transcript = (self._nonce, self._theirs, self._hello, hello)
        message = parse(hello)
        proof = welcome[_LENGTH.size :]
        if message is None or not hmac.compare_digest(proof, tag(self._key, "welcome", *transcript)):
            raise RefusedError("sent a hello that is not authentic")
        to_server, to_dialler = _keys(self._key, transcript)
        return Session(message, sending=to_server, receiving=to_dialler)


class Answering:
    """The server's side: send what `feed` returns; the handshake is over when `session` is set."""

    def __init__(self, key: bytes, hello: Mapping[str, Any]) -> None:
        self._key, self._hello, self._nonce = key, encode_hello(hello), b""
        self._theirs = b""
        self._buffer = bytearray()
        self.session: Session | None = None

    def feed(self, data: bytes) -> bytes:
        """What to answer, perhaps nothing. A dialler cannot know what to say next before it has the answer, so
        anything beyond the expected bytes is refused."""
        self._buffer += data
        if not self._nonce:
            return self._answer()
        return self._welcome()

    def _answer(self) -> bytes:
        expected = len(MAGIC) + _NONCE
        if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
            raise RefusedError("does not speak this protocol")
        if len(self._buffer) < expected:
            return b""
        if len(self._buffer) > expected:
            raise RefusedError("spoke out of turn")
        self._theirs, self._nonce = bytes(self._buffer[len(MAGIC) :]), os.urandom(_NONCE)
        self._buffer.clear()
        return MAGIC + self._nonce + tag(self._key, "server", self._theirs, self._nonce)

    def _welcome(self) -> bytes:
        buffer = self._buffer
        if len(buffer) < _LENGTH.size:
            return b""
        (length,) = _LENGTH.unpack_from(buffer)
        if length > HELLO_LIMIT:
            raise RefusedError("sent too long a hello")
        if len(buffer) < WELCOME_SIZE + length:
            return b""
        if len(buffer) > WELCOME_SIZE + length:
            raise RefusedError("spoke out of turn")
        theirs = bytes(buffer[WELCOME_SIZE:])
        proof = tag(self._key, "dialler", self._theirs, self._nonce, theirs)
        if not hmac.compare_digest(proof, buffer[_LENGTH.size : WELCOME_SIZE]):
            raise RefusedError("does not know the run's secret")
        message = parse(theirs)
        if message is None:
            raise RefusedError("sent a hello that is not a message")
        transcript = (self._theirs, self._nonce, theirs, self._hello)
        to_server, to_dialler = _keys(self._key, transcript)
        self.session = Session(message, sending=to_dialler, receiving=to_server)
        return _LENGTH.pack(len(self._hello)) + tag(self._key, "welcome", *transcript) + self._hello


def encode_hello(hello: Mapping[str, Any]) -> bytes:
    encoded = orjson.dumps(dict(hello))
    if len(encoded) > HELLO_LIMIT:
        raise ValueError(f"a hello of {len(encoded)} bytes exceeds the limit of {HELLO_LIMIT}")
    return encoded


def parse(body: bytes | bytearray) -> Message | None:
    """The message, or None when it is none (JSON, an object at the top)."""
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return message if isinstance(message, dict) else None


def _keys(key: bytes, transcript: tuple[bytes, ...]) -> tuple[bytes, bytes]:
    """Dialler's to server, server's to dialler."""
    return tag(key, "to server", *transcript), tag(key, "to dialler", *transcript)
