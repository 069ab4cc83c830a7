"""The edge to TCPStore: the leader's server, and the heartbeats of all nodes through it.

Why such care (measured, see docs/decisions/0004): a TCPStore call on a server that is stopped or cut off never
returns, whatever time-out was set; `set` is not acknowledged; `multi_get` stalls on a missing key; a client never
reconnects; connecting looks addresses up in the DNS, on the client's side and in the server's own loop. Therefore

* the event loop never calls torch, not even to import it: every call happens on a thread with a client of its own
  that can be left behind when it is stuck (`lanes.py`). Nothing ever waits for such a thread;
* each heartbeat is followed by a `check` on the same connection: without its answer the thread counts as stuck. What a
  lease may run from is another matter: the leader's confirmation, over the stream;
* the reader asks only for keys that it made sure exist;
* the process that hosts the server answers host names from files alone (`forget_dns`).

Anyone who reaches the port can read, write and delete every key. So a value carries a tag under a key derived from
the run's secret, over its own key (which names term and node) and all its content. The reader accepts, for a node,
only the incarnation that the leader has registered, and only growing sequence numbers: a forged or repeated value
counts as silence. A deleted key is put back at the next reading. What remains is that a stranger on the network can
keep the leader from hearing, which is why the cluster's network must keep strangers out.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hmac
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import orjson

from hpcft.errors import UnusableError
from hpcft.ids import Generation, Incarnation, NodeId, Term
from hpcft.lanes import CONNECT_SECONDS, Lane, Lanes, first_line
from hpcft.secret import derive, tag
from hpcft.tcp import Address, listen, named

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_CHUNK = 1024
"""Keys per call, so that the server's only thread is not held for long: 1.5 ms."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One sign of life of a node's agent."""

    node: NodeId
    incarnation: Incarnation
    generation: Generation
    sequence: int
    """Grows with every heartbeat of an incarnation."""
    digest: Mapping[str, Any]
    """The node's workers in a few words (JSON)."""


def quiet_torch() -> None:
    """Keep torch from printing stack traces for every connection that fails or ends: the exceptions say it all.

    Call when the process starts: torch reads the level once, at its import. A level that is already set stays.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # noqa: TID251 set for torch's C++ side, not read


def import_torch() -> None:
    """Import what the store needs of torch. Takes a second of processor time, in which other threads starve."""
    import torch.distributed  # noqa: F401


def forget_dns() -> bool:
    """From now on this process looks host names up in /etc/hosts only; for processes that host a store.

    The server's loop asks for the name of every address that connects; one lost reply of the DNS stalls it, and all
    its clients, for 10 s. Nothing of ours needs names (addresses are numeric). Where the C library has no such switch
    (False) the wait is shortened instead, to a second. Child processes are not affected by the former.
    """
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # noqa: TID251 set for the C library, not read
    configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None)
    return configure is not None and configure(b"hosts", b"files") == 0


class StoreServer:
    """The TCPStore of a leadership, listening on one address; made by `start`."""

    def __init__(self, address: Address) -> None:
        self.address: Final = address
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._closed = asyncio.Event()
        self._stop = threading.Event()

    @classmethod
    async def start(cls, host: str, port: int = 0, *, seconds: float = 30.0) -> StoreServer:
        """Listen on a numeric address (port 0: any free one); returns when clients can connect.

        The first time this imports torch, which takes a second or two.

        Raises:
            UnusableError: the address cannot be listened on, or torch does not get ready in `seconds`.
        """
        listening = listen(host, port)
        bound = listening.getsockname()
        server = cls((bound[0], bound[1]))
        # torch gets a descriptor of its own, which it closes with the server.
        thread = threading.Thread(
            target=server._serve, args=(os.dup(listening.fileno()),), name="hpcft-store-server", daemon=True
        )
        thread.start()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(server._ready)
        except TimeoutError:
            server.close()
            raise UnusableError(
                f"the TCPStore on {named(server.address)} was not ready within {seconds:g} s",
                "run `hpcft doctor`: importing torch or connecting to this machine's own address takes too long",
            ) from None
        finally:
            listening.close()
        return server

    def close(self) -> None:
        """Let the server go; clients see their connections end. Never blocks."""
        self._stop.set()

    async def wait_closed(self, seconds: float = 5.0) -> bool:
        """After `close`: whether the server has gone within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return False
        return True

    def _serve(self, descriptor: int) -> None:
        try:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            host, port = self.address
            store = TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=CONNECT_SECONDS),
                master_listen_fd=descriptor,
                use_libuv=True,
            )
        except (RuntimeError, ImportError, OSError) as error:
            self._tell(self._fail, UnusableError(f"no TCPStore on {named(self.address)}: {first_line(error)}"))
            return
        self._tell(self._succeed)
        self._stop.wait()
        del store
        self._tell(self._closed.set)

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _succeed(self) -> None:
        if not self._ready.done():
            self._ready.set_result(None)

    def _fail(self, error: UnusableError) -> None:
        self._closed.set()
        if not self._ready.done():
            self._ready.set_exception(error)


class HeartbeatWriter:
    """Sends a node's heartbeats to a leader's store. One per leadership."""

    def __init__(self, address: Address, secret: bytes, term: Term, *, patience: float = 2.0) -> None:
        """`patience`: seconds until a call that does not return is given up, the first time."""
        self._key = derive(secret, "heartbeat")
        self._term = term
        self._newest: Heartbeat | None = None
        self._lanes = Lanes("hpcft-heartbeat-writer", address, self._write, patience)
        self._lanes.start()

    def beat(self, heartbeat: Heartbeat) -> None:
        """Send this one as soon as possible, and none before it that has not gone out yet. Never blocks."""
        self._newest = heartbeat
        self._lanes.wake()
        self._lanes.tend()

    def close(self) -> None:
        """Send no more. Never blocks."""
        self._lanes.close()

    def _write(self, lane: Lane, client: TCPStore) -> None:
        done: Heartbeat | None = None
        while True:
            heartbeat = self._newest
            if heartbeat is not None and heartbeat is not done:
                name = _key_name(self._term, heartbeat.node)
                value = _signed(self._key, name, heartbeat)
                with lane.calling():
                    client.set(name, value)
                    client.check([name])  # `set` alone would go unanswered
                done = heartbeat
                self._lanes.succeeded()
            if not lane.rest():
                return


class HeartbeatReader:
    """Reads the registered nodes' heartbeats for the leader. One per leadership."""

    def __init__(
        self,
        address: Address,
        secret: bytes,
        term: Term,
        on_heartbeat: Callable[[NodeId, Heartbeat], None],
        *,
        interval: float = 0.25,
        patience: float = 1.0,
    ) -> None:
        """`on_heartbeat` is called in the event loop that runs now; `interval`: seconds between two readings."""
        self.forged = 0
        """Values that nobody who knows the secret has made for this key."""
        self.replayed = 0
        """Genuine values that had been there before a newer one."""
        self.outdated = 0
        """Genuine values of an incarnation that is not the registered one."""
        self._key = derive(secret, "heartbeat")
        self._term = term
        self._on_heartbeat = on_heartbeat
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._registered = dict[NodeId, Incarnation]()
        self._fresh = dict[NodeId, Heartbeat]()
        self._sifting = threading.Lock()
        self._raw = dict[NodeId, bytes]()
        self._last = dict[NodeId, tuple[Incarnation, int]]()
        self._lanes = Lanes("hpcft-heartbeat-reader", address, self._read, patience)
        self._lanes.start()
        self._timer = self._loop.call_later(interval, self._tend)

    def register(self, node: NodeId, incarnation: Incarnation) -> None:
        """Listen to this node, in this incarnation only."""
        with self._lock:
            self._registered[node] = incarnation

    def forget(self, node: NodeId) -> None:
        """Do not listen to this node any more."""
        with self._lock:
            self._registered.pop(node, None)
            self._fresh.pop(node, None)

    def close(self) -> None:
        """Read no more, deliver no more. Never blocks."""
        self._timer.cancel()
        self._lanes.close()
        with self._lock:
            self._registered.clear()
            self._fresh.clear()

    def _tend(self) -> None:
        self._lanes.tend()
        self._timer = self._loop.call_later(self._interval, self._tend)

    def _read(self, lane: Lane, client: TCPStore) -> None:
        made_sure = set[NodeId]()
        while True:
            started = time.monotonic()
            with self._lock:
                registered = dict(self._registered)
            nodes = list(registered)
            values = list[bytes]()
            with lane.calling():
                for chunk in (nodes[at : at + _CHUNK] for at in range(0, len(nodes), _CHUNK)):
                    names = [_key_name(self._term, node) for node in chunk]
                    # A missing key would stall multi_get. Usually new nodes lack theirs; somebody may delete one.
                    if not made_sure.issuperset(chunk) or not client.check(names):
                        for name in names:
                            client.compare_set(name, "", "")  # makes an empty one, leaves any other alone
                        made_sure.update(chunk)
                    values += client.multi_get(names)
            made_sure &= registered.keys()
            self._sift(lane, registered, values)
            self._lanes.succeeded()
            if not lane.rest(max(0.0, started + self._interval - time.monotonic())):
                return

    def _sift(self, lane: Lane, registered: dict[NodeId, Incarnation], values: list[bytes]) -> None:
        accepted = list[Heartbeat]()
        with self._sifting:
            if lane.left_behind:
                return
            self._raw = {node: raw for node, raw in self._raw.items() if node in registered}
            self._last = {node: last for node, last in self._last.items() if node in registered}
            for (node, incarnation), value in zip(registered.items(), values, strict=True):
                if not value or self._raw.get(node) == value:
                    continue
                self._raw[node] = value
                heartbeat = _verified(self._key, _key_name(self._term, node), value)
                last_incarnation, last_sequence = self._last.get(node, (incarnation, -1))
                if heartbeat is None or heartbeat.node != node:
                    self.forged += 1
                elif heartbeat.incarnation != incarnation:
                    self.outdated += 1
                elif last_incarnation == incarnation and heartbeat.sequence <= last_sequence:
                    self.replayed += 1
                else:
                    self._last[node] = incarnation, heartbeat.sequence
                    accepted.append(heartbeat)
        if accepted:
            with self._lock:
                due = not self._fresh
                self._fresh.update((heartbeat.node, heartbeat) for heartbeat in accepted)
            if due:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                    self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, {}
            current = {node for node, beat in fresh.items() if self._registered.get(node) == beat.incarnation}
        for node, heartbeat in fresh.items():
            if node in current:
                self._on_heartbeat(node, heartbeat)


def _key_name(term: Term, node: NodeId) -> str:
    return f"hb/{term}/{node}"


def _signed(key: bytes, name: str, heartbeat: Heartbeat) -> str:
    payload = orjson.dumps(asdict(heartbeat))
    return tag(key, name, payload).hex() + payload.decode()


def _verified(key: bytes, name: str, value: bytes) -> Heartbeat | None:
    signature, payload = value[:64], value[64:]
    if not hmac.compare_digest(signature, tag(key, name, payload).hex().encode()):
        return None
    try:
        return Heartbeat(**orjson.loads(payload))
    except (TypeError, ValueError):  # made by another version
        return None
