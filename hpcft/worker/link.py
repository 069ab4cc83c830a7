"""The worker's link to its agent: its slot of the shared page, and the control channel.

The page carries what changes with every step, without a system call; the channel carries what is said once. The
agent answers through the page (the lease, the standing order), and over the channel where it hands out arenas and
says which may be written again. A process that trains alone has a page of its own and nobody to talk to, so that the
step is the same code.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import orjson

from hpcft.checkpoint.manifest import ShardReport
from hpcft.ids import Step
from hpcft.page import NodePage, now_ns
from hpcft.worker.report import report_exception
from hpcft.worker.spec import STATUS_FENCED, WorkerSpec

_SEND_SECONDS = 10.0
_PACKET = 1 << 16
_TEXT_LIMIT = 8_000
"""Characters of a reason; a packet holds 64 KiB."""


class Link:
    """What this worker tells its agent, and hears from it."""

    __slots__ = ("_channel", "_control", "page", "slot")

    def __init__(self, spec: WorkerSpec) -> None:
        self.page = NodePage.create(1) if spec.page_fd is None else NodePage.attach(spec.page_fd)
        self.slot = self.page.slot(spec.slot)
        self._control = spec.control_fd
        self._channel = None if self._control is None else socket.socket(fileno=os.dup(self._control))

    def close(self) -> None:
        """Give back what this end holds of the channel. Nothing can be said afterwards."""
        if self._channel is not None:
            self._channel.close()

    def check_lease(self) -> None:
        """Ends this process at once if the node's lease has run out: its ranks may already train elsewhere."""
        until = self.page.lease_until_ns
        if until and now_ns() > until:
            self._fence()

    def _fence(self) -> NoReturn:
        late = -self.page.lease_left()
        step = self.slot.step + 1
        text = f"hpcft: stopped before step {step}: the lease of this node ran out {late:.3f} s ago\n"
        os.write(2, text.encode())  # no buffer, no lock: another thread may hold those of sys.stderr
        os._exit(STATUS_FENCED)

    def say_ready(self) -> None:
        """Group formed, state in place: the first step may start."""
        self._say({"kind": "ready"})

    def say_reserve(self, size: int, plan: int) -> bool:
        """Asks for arenas; `plan` is a memory file that says what they are for, and is closed. False: nobody
        listens."""
        return self._say({"kind": "reserve", "size": size}, plan)

    def say_snapshot(self, about: Mapping[str, Any], values: int | None) -> bool:
        """A copy of this rank's share is in its arena; `values` is a memory file with what is no tensor, and is closed.

        False: the agent was not told, so the arena is not its own.
        """
        return self._say({"kind": "snapshot", **about}, values)

    def say_skipped(self, step: Step, reason: str) -> None:
        """This rank takes no part in the save of `step`."""
        self._say({"kind": "skipped", "step": step, "reason": reason[:_TEXT_LIMIT]})

    def say_shard(self, step: Step, report: ShardReport, blocked: float = 0.0, took: float = 0.0) -> None:
        """This rank's files of the checkpoint are durable: `took` seconds after it began to save, for `blocked` of
        which training stood still; 0: not measured."""
        self._say({"kind": "shard", "step": step, "report": report.to_json(), "blocked": blocked, "took": took})

    def say_save_failed(self, step: Step, reason: str) -> None:
        self._say({"kind": "save_failed", "step": step, "reason": reason[:_TEXT_LIMIT]})

    def say_damaged(self, directory: str, detail: str) -> None:
        self._say({"kind": "damaged", "directory": directory, "detail": detail[:_TEXT_LIMIT]})

    def say_unreadable(self, detail: str) -> None:
        self._say({"kind": "unreadable", "detail": detail[:_TEXT_LIMIT]})

    def say_forgotten(self, detail: str) -> None:
        self._say({"kind": "forgotten", "detail": detail[:_TEXT_LIMIT]})

    def say_returned(self, step: Step) -> None:
        self._say({"kind": "returned", "step": step})

    def say_exception(self, error: BaseException, step: Step) -> None:
        if self._control is not None:
            report_exception(self._control, error, step)

    def hear(self, seconds: float) -> tuple[dict[str, Any], list[int]] | None:
        """The next thing that the agent says, with the descriptors that come along; None: nothing in `seconds`."""
        if self._channel is None or not _ready(self._channel, select.POLLIN, seconds):
            return None
        try:
            packet, fds, _, _ = socket.recv_fds(self._channel, _PACKET, 8, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            packet, fds = b"", []
        if not packet:
            time.sleep(seconds)  # the agent is gone, and says nothing any more
            return None
        return orjson.loads(packet), fds

    def _say(self, message: dict[str, Any], fd: int | None = None) -> bool:
        """Whether it was said, if there is somebody to talk to. Closes `fd`.

        Never raises: an agent that does not listen is gone, or about to end this process.
        """
        try:
            if self._channel is None:
                return True
            if _ready(self._channel, select.POLLOUT, _SEND_SECONDS):
                socket.send_fds(self._channel, [orjson.dumps(message)], [] if fd is None else [fd])
                return True
            reason = f"it has not listened for {_SEND_SECONDS:.0f} s"
        except OSError as error:
            reason = error.strerror or str(error)
        finally:
            if fd is not None:
                os.close(fd)
        print(f"hpcft: the agent was not told {message['kind']!r}: {reason}", file=sys.stderr)
        return False


def _ready(channel: socket.socket, event: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(channel, event)
    return bool(poller.poll(seconds * 1000))
