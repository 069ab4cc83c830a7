"""Links that can be cut, and connections over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hpcft.ids import NodeId
from tests.simulation.clock import Clock
from tests.simulation.machine import Machine, Process

PATIENCE_SECONDS = 12.0
"""The kernel gives up a connection that is silent for this long (shorter than shipped, to see more of it)."""


@dataclass(slots=True)
class End:
    """One end of a connection."""

    process: Process
    hear: Callable[[Any], None]
    lost: Callable[[str], None]
    open: bool = True
    coming: deque[tuple[str, Any]] = field(default_factory=deque)
    """On its way to this end."""
    latest: float = 0.0


class Connection:
    """Two FIFO directions. An orderly close, or a death on a machine with power, is told after what was sent."""

    def __init__(self, network: Network, client: End, server: End) -> None:
        self.network = network
        self.ends = (client, server)
        self.unreachable_since: float | None = None
        network.connections.append(self)

    def send(self, sender: End, message: Any) -> None:
        if sender.open:
            self._carry(self._other(sender), ("message", message))

    def close(self, closer: End, reason: str = "closed") -> None:
        if closer.open:
            closer.open = False
            self._carry(self._other(closer), ("closed", reason))

    def drop(self, end: End, reason: str) -> None:
        """This end learns by itself that the connection is gone."""
        if end.open:
            end.open = False
            end.process.deliver(lambda: end.lost(reason))
        self.network.forget(self)

    def died(self, process: Process, *, tells: bool) -> None:
        for end in self.ends:
            if end.process is process and end.open:
                if tells:
                    self.close(end, "reset")
                else:
                    end.open = False

    def reachable(self) -> bool:
        a, b = (end.process.machine for end in self.ends)
        return self.network.reachable(a.name, b.name) and a.powered and b.powered

    def flush(self) -> None:
        """After a cut has healed: what was held arrives, in order."""
        for end in self.ends:
            for _ in end.coming:
                self._schedule(end, self.network.random.uniform(0.0, 0.5))

    def _other(self, end: End) -> End:
        return self.ends[1] if end is self.ends[0] else self.ends[0]

    def _carry(self, to: End, item: tuple[str, Any]) -> None:
        to.coming.append(item)
        self._schedule(to, 0.0)

    def _schedule(self, to: End, retransmission: float) -> None:
        now = self.network.clock.now
        to.latest = max(to.latest, now + self.network.delay() + retransmission)
        self.network.clock.after(to.latest - now, lambda: self._arrive(to))

    def _arrive(self, to: End) -> None:
        """The next in line; across a cut it waits for `flush`."""
        if not to.coming or not self.reachable():
            return
        kind, what = to.coming.popleft()
        if not to.open:
            return
        if kind == "closed":
            to.open = False
            to.process.deliver(lambda: to.lost(what))
            self.network.forget(self)
        else:
            to.process.deliver(lambda: to.hear(what))


class Network:
    def __init__(self, clock: Clock, random: Random, slowness: float) -> None:
        self.clock = clock
        self.random = random
        self.slowness = slowness
        self.machines: dict[NodeId, Machine] = {}
        self.isolated: set[NodeId] = set()
        self.cut_links: set[frozenset[NodeId]] = set()
        self.connections: list[Connection] = []

    def delay(self) -> float:
        return 0.001 + self.random.random() ** 3 * self.slowness

    def reachable(self, a: NodeId, b: NodeId) -> bool:
        if a == b:
            return True
        return not (a in self.isolated or b in self.isolated or frozenset((a, b)) in self.cut_links)

    def forget(self, connection: Connection) -> None:
        if not any(end.open for end in connection.ends) and connection in self.connections:
            self.connections.remove(connection)

    def changed(self) -> None:
        """A link or a machine changed: held messages flow, or patience begins to run out."""
        for connection in list(self.connections):
            if connection.reachable():
                connection.unreachable_since = None
                connection.flush()
                if not all(end.open for end in connection.ends):
                    # one end is gone without a word (power): its machine answers the next packet with a reset
                    for end in connection.ends:
                        if end.open and not end.latest > self.clock.now:
                            self._later(0.5, connection, end)
            elif connection.unreachable_since is None:
                connection.unreachable_since = self.clock.now
                self._run_out(connection, self.clock.now)

    def break_connections(self, machine: Machine) -> None:
        """All of this machine's, with what is on its way: a middlebox has forgotten them."""
        for connection in list(self.connections):
            ends = connection.ends
            if (
                any(end.process.machine is machine for end in ends)
                and ends[0].process.machine is not ends[1].process.machine
            ):
                for end in ends:
                    end.coming.clear()
                    connection.drop(end, "reset")

    def _later(self, seconds: float, connection: Connection, end: End) -> None:
        self.clock.after(seconds, lambda: connection.drop(end, "reset"))

    def _run_out(self, connection: Connection, since: float) -> None:
        def give_up() -> None:
            if connection.unreachable_since == since:
                for end in connection.ends:
                    connection.drop(end, "timed out")

        self.clock.after(PATIENCE_SECONDS, give_up)
