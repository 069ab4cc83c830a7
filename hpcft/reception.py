"""Who is connected to a leader, and what each of them may say.

Three kinds of connections come in, told apart by the `purpose` of their first words. An *agent* stays for as long as
both live: orders go out on its stream, facts about its own node come in. A *lifeline* says nothing but its end. An
*operator* says one command and gets one answer. What is not in the protocol, or not for its sender to say, closes the
stream it came on; nothing of it reaches the world.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from hpcft import stream, wire
from hpcft.events import (
    CopiesAlone,
    CopiesKept,
    Event,
    KeeperVanished,
    NodeHeard,
    NodeJoined,
    NodeReported,
    Order,
    PeerAnswered,
    Progressed,
    SnapshotDropped,
    SnapshotTaken,
    StreamClosed,
    WorkerFailed,
    WorkerReturned,
    WorkersReady,
    WorkerStopped,
    WorkersVanished,
    WorldAcknowledged,
    WorldRefused,
)
from hpcft.ids import Incarnation, NodeId

log = logging.getLogger("hpcft.reception")

FROM_AGENTS = (
    NodeHeard
    | PeerAnswered
    | WorldAcknowledged
    | WorldRefused
    | WorkersReady
    | Progressed
    | NodeReported
    | WorkerFailed
    | WorkerReturned
    | WorkerStopped
    | SnapshotTaken
    | CopiesKept
    | CopiesAlone
    | SnapshotDropped
)

Message: TypeAlias = Mapping[str, Any]


class Chair(Protocol):
    """The leader, as those who speak to it see it."""

    def feed(self, event: Event) -> None: ...

    def join(self, joined: NodeJoined, say: Callable[[Message], None]) -> None:
        """A node has come, again perhaps; `say` is for what it may have missed."""

    def heard(self, event: NodeHeard) -> None: ...

    def shard_reported(self, generation: int, step: int, rank: int, report: Any, timing: Message) -> None:
        """`timing` may hold `blocked` and `took`, in seconds (see `worker.link`)."""

    def save_skipped(self, generation: int, step: int, rank: int, reason: Any) -> None: ...

    def save_failed(self, generation: int, step: int, rank: int, reason: Any, nonce: str) -> None:
        """`nonce`: of the attempt that has failed; empty: of the first."""

    def signalled(self, name: str, age: float) -> None:
        """Slurm has signalled an agent, `age` seconds ago."""

    def command(self, command: Message) -> Message:
        """An operator's; returns the answer."""


class Reception:
    """The connections of one leadership. Only the event loop's thread calls it."""

    def __init__(self, chair: Chair) -> None:
        self._chair = chair
        self._agents: dict[NodeId, stream.Stream] = {}

    def tell(self, node: NodeId, message: Message) -> None:
        """To one agent; lost, if it is not connected."""
        connected = self._agents.get(node)
        if connected is not None:
            connected.send(message)

    def tell_all(self, message: Message) -> None:
        for connected in self._agents.values():
            connected.send(message)

    def dismiss(self, node: NodeId) -> None:
        """Close the stream of an agent that is out of office."""
        connected = self._agents.pop(node, None)
        if connected is not None:
            connected.close()

    async def serve(self, connected: stream.Stream) -> None:
        """One connection, from its first words to its end."""
        hello = connected.hello
        match hello.get("purpose"):
            case "agent":
                await self._serve_agent(connected, hello)
            case "lifeline":
                await self._watch_lifeline(connected, hello)
            case "operator":
                await self._serve_operator(connected)
            case _:
                connected.close()

    async def _serve_agent(self, connected: stream.Stream, hello: Message) -> None:
        joined = NodeJoined(
            NodeId(str(hello["node"])),
            Incarnation(str(hello["incarnation"])),
            str(hello["address"]),
            int(hello["workers"]),
            int(hello["port"]),
        )
        self.dismiss(joined.node)
        self._agents[joined.node] = connected
        self._chair.join(joined, connected.send)
        try:
            while True:
                self._hear(joined, await connected.receive())
        except stream.StreamClosed as closed:
            reason = str(closed)
        except (wire.WireError, KeyError, TypeError, ValueError) as error:
            reason = f"it sent what is not in the protocol: {error}"
            log.warning("%s: %s", joined.node, reason)
            connected.close(reason)
        if self._agents.get(joined.node) is connected:
            del self._agents[joined.node]
            self._chair.feed(StreamClosed(joined.node, joined.incarnation, reason))

    def _hear(self, joined: NodeJoined, message: Message) -> None:
        match message:
            case {"event": raw}:
                event = wire.decode_event(raw)
                if not isinstance(event, FROM_AGENTS) or event.node != joined.node:
                    raise wire.WireError(f"{type(event).__name__} is not for {joined.node} to say")
                if isinstance(event, NodeHeard):
                    self._chair.heard(event)
                else:
                    self._chair.feed(event)
            case {"skipped": {"generation": generation, "step": step, "rank": rank, "reason": reason}}:
                self._chair.save_skipped(generation, step, rank, reason)
            case {"shard": {"generation": generation, "step": step, "rank": rank, "report": report, **timing}}:
                self._chair.shard_reported(
                    generation, step, rank, report, {str(key): value for key, value in timing.items()}
                )
            case {"save_failed": {"generation": generation, "step": step, "rank": rank, "reason": reason, **more}}:
                self._chair.save_failed(generation, step, rank, reason, str(more.get("nonce", "")))
            case {"signal": str(name), "age": int() | float() as age}:
                self._chair.signalled(name, float(age))
            case _:
                raise wire.WireError(f"unknown message {sorted(message)}")

    async def _watch_lifeline(self, connected: stream.Stream, hello: Message) -> None:
        """Only an orderly close proves that the last holder is gone; a broken connection proves nothing."""
        try:
            await connected.receive()
        except stream.StreamClosed as closed:
            if closed.ending is not stream.Ending.EOF:
                return
            node, incarnation = NodeId(str(hello["node"])), Incarnation(str(hello["incarnation"]))
            gone: Event = (
                KeeperVanished(node, incarnation)
                if hello.get("line") == "keeper"
                else WorkersVanished(node, incarnation)
            )
            self._chair.feed(gone)
        else:
            connected.close()  # nothing is ever said on a lifeline

    async def _serve_operator(self, connected: stream.Stream) -> None:
        try:
            connected.send(self._chair.command(await connected.receive()))
        except stream.StreamClosed:
            return
        finally:
            connected.close()


def order_message(order: Order) -> Message:
    return {"order": wire.encode(order)}
