"""The carrier: a disposable process that moves the bytes of snapshots, so that nobody else has to wait for them.

A call into a file system that hangs never returns, and its process cannot be killed. So neither a worker nor the agent
makes such calls for large files: the agent gives the job to a carrier, and leaves behind one that does not come back.
Each rank has one for the disk, and one that makes and seals its copies, which never waits for a file system. (Making
them takes a second per GiB, and their memory is charged to the cgroup that the carriers share with the agent.) Others
send copies to a neighbour, and receive them (see `transfer`).

    agent -> carrier   {"do": "reserve", "size", "count"}
                       {"do": "unmap"} + [arena]
                       {"do": "seal", "size"} + [arena]
                       {"do": "write", "root", "name", "nonce", "direct", "bandwidth", "position", "versions",
                            "metrics", "ledger"}
                           + [arena, plan, values?]
                       {"do": "digest"} + memory files
                       {"do": "send", "host", "port", "token", "sizes"} + [arena, plan, values?]
                       {"do": "listen", "host"}, and then
                       {"do": "receive", "token", "size", "more": [[size, digests], …]} + [arena, digests]
    carrier -> agent   {"written": bytes}, now and then; made so far, of arenas
                       {"done": …} + the arenas, the digests, or what was received; or {"failed": reason}; once

SOCK_SEQPACKET, one JSON object per packet, one job at a time. The end of the channel is the end of the carrier. No
torch, and no more than is needed: there may be as many carriers as GPUs.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from hpcft import durable, transfer
from hpcft.checkpoint.arena import Arena, content_of, memory_file
from hpcft.checkpoint.manifest import parse_metrics
from hpcft.checkpoint.write import Plan, Words, paced, write_share
from hpcft.errors import HpcftError
from hpcft.process import CARRIER_NAME, die_with_parent, take_name
from hpcft.tcp import listen

_PACKET = 1 << 17
_NICENESS = 5
"""Training goes first, where there is no core to spare."""


class Carrier:
    """The process' side: does what comes over the channel."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._arenas: dict[tuple[int, int], Arena] = {}
        """Mapped once: filling the page tables for a GiB takes as long as copying it."""
        self._listening: socket.socket | None = None

    def serve(self) -> None:
        """Until the other end of the channel is closed."""
        while True:
            packet, fds, _, _ = socket.recv_fds(self._channel, _PACKET, 8, socket.MSG_CMSG_CLOEXEC)
            if not packet:
                return
            job = orjson.loads(packet)
            try:
                match job["do"]:
                    case "reserve":
                        self._reserve(job["size"], job["count"])
                    case "unmap":
                        self._unmap(fds[0])
                    case "seal":
                        self._seal(fds[0], job["size"])
                    case "write":
                        self._write(job, fds)
                    case "digest":
                        digests = [list(durable.chunk_digests(memoryview(content_of(fd)))) for fd in fds]
                        self._say({"done": {"digests": digests}})
                    case "send":
                        address, parts = (job["host"], job["port"]), list(zip(fds, job["sizes"], strict=True))
                        transfer.send(address, bytes.fromhex(job["token"]), parts)
                        self._say({"done": {}})
                    case "listen":
                        self._listen(job["host"])
                    case "receive":
                        self._receive(job, fds)
                    case other:
                        self._say({"failed": f"a carrier knows no {other!r}"})
            except HpcftError as error:
                self._say({"failed": error.message})
            except OSError as error:
                self._say({"failed": error.strerror or str(error)})
            except ValueError as error:
                self._say({"failed": str(error)})
            finally:
                for fd in fds:
                    os.close(fd)

    def _reserve(self, size: int, count: int) -> None:
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()
        made = []
        with ExitStack() as failed:
            for number in range(count):
                arena = Arena.reserve(size, partial(self._made, number * size))
                failed.callback(arena.close)
                made.append(arena)
            failed.pop_all()
        self._arenas = {_identity(arena.fd): arena for arena in made}
        self._say({"done": {}}, [arena.fd for arena in made])

    def _unmap(self, fd: int) -> None:
        """Nobody wants it: as long as it is mapped here, its memory is not free."""
        if (arena := self._arenas.pop(_identity(fd), None)) is not None:
            arena.close()
        self._say({"done": {}})

    def _made(self, before: int, of_this: int) -> None:
        self._say({"written": before + of_this})

    def _seal(self, fd: int, size: int) -> None:
        """Take the digests with which the copy will be compared whenever it is used."""
        image = self._arena(fd).view[:size]
        listed = tuple(durable.chunk_digests(image))
        digests = memory_file("hpcft-digests", orjson.dumps(listed))
        try:
            self._say({"done": {"digest": durable.digest_of_chunks(listed)}}, [digests])
        finally:
            os.close(digests)

    def _listen(self, host: str) -> None:
        self._stop_listening()
        self._listening = listen(host, 0)
        self._say({"done": {"port": self._listening.getsockname()[1]}})

    def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def _receive(self, job: Mapping[str, Any], fds: Sequence[int]) -> None:
        """The copy goes into the arena, what belongs to it into memory files."""
        if self._listening is None:
            raise ValueError("the process that listened has died")
        image = self._arena(fds[0]).view[: job["size"]]
        more = [(bytearray(size), digests) for size, digests in job["more"]]
        try:
            with transfer.accept(self._listening, bytes.fromhex(job["token"])) as connection:
                self._stop_listening()
                parts = [(memoryview(part), digests) for part, digests in more]
                transfer.receive(connection, [(image, orjson.loads(content_of(fds[1]))), *parts])
        finally:
            self._stop_listening()
        files = [memory_file("hpcft-guest", bytes(part)) for part, _ in more]
        try:
            self._say({"done": {}}, files)
        finally:
            for fd in files:
                os.close(fd)

    def _write(self, job: Mapping[str, Any], fds: Sequence[int]) -> None:
        arena = self._arena(fds[0])
        plan = Plan.parse(content_of(fds[1]))
        metrics = parse_metrics(job["metrics"], "snapshot")
        words = Words(content_of(fds[2]) if len(fds) > 2 else None, job["position"], job["versions"], metrics)
        image = arena.view[: plan.size]
        _sync_ledger(job["ledger"])
        began = time.monotonic()
        done: dict[str, Any] = {}

        def store(path: Path) -> durable.Written:
            before = paced(job["bandwidth"], self._told)
            written = durable.write_image(path, image, direct=job["direct"], before=before)
            done.update(direct=written.direct, digest=durable.digest_of_chunks(written.digests))
            return written

        report = write_share(Path(job["root"]), job["name"], job["nonce"], plan, words, store)
        self._say({"done": {**done, "report": report.to_json(), "seconds": time.monotonic() - began}})

    def _arena(self, fd: int) -> Arena:
        known = self._arenas.get(_identity(fd))
        if known is None:  # made by another one
            known = Arena(os.dup(fd))
            for identity in [each for each, arena in self._arenas.items() if arena.size != known.size]:
                self._arenas.pop(identity).close()  # outgrown: its memory is free when nobody has it mapped
            self._arenas[_identity(fd)] = known
        return known

    def _told(self, written: int) -> None:
        self._say({"written": written})

    def _say(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        socket.send_fds(self._channel, [orjson.dumps(message)], fds)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _sync_ledger(path: str | None) -> None:
    """The records of the steps before have to be as durable as the checkpoint that rests on them."""
    if path is None:
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        print(f"hpcft: the ledger {path} may be incomplete: {error.strerror}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hpcft.carrier")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the agent's channel")
    parser.add_argument("--parent", type=int, required=True, help="the agent's process")
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    take_name(CARRIER_NAME)
    with suppress(OSError):
        os.nice(_NICENESS)
    channel = socket.socket(fileno=options.channel)
    channel.set_inheritable(False)
    with suppress(BrokenPipeError, ConnectionResetError):  # the agent is gone
        Carrier(channel).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
