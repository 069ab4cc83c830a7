"""The processes of a node, really started and really killed: nothing that could train outlives its keeper.

Every process of a test carries a mark in its environment, so "nothing is left" means: no process on this machine has
that mark any more.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from hpcft.keeper import AGENT_RESTART, Pauses
from hpcft.page import NodePage, now_ns
from hpcft.process import children, descendants, lives, state_of
from hpcft.workers import (
    Fault,
    Fenced,
    LogLimits,
    PoolEvent,
    PoolReady,
    PreloadFault,
    WorkerExited,
    Workers,
    WorkerSaid,
    WorkerSpawned,
)

pytestmark = pytest.mark.local

GENEROUS = 60.0
MARK = "HPCFT_TEST_MARK"

WITH_LOADERS = """
import multiprocessing, os, signal, subprocess, sys, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
def load():
    time.sleep(1000)

for daemon in (True, False):
    multiprocessing.get_context("fork").Process(target=load, daemon=daemon).start()
subprocess.Popen(["sleep", "1000"])
subprocess.Popen(["sleep", "1000"], start_new_session=True)
if os.fork() == 0:                      # a daemon: out of the session, and an orphan
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
os.wait()
print("up", flush=True)
time.sleep(1000)
"""
FDS = """
import os
fds = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
       if os.path.exists(f"/proc/self/fd/{fd}")}
"""
WITH_LOADERS_SIZE = 6
"""Processes that it consists of."""

AGENT = """
import asyncio, json, os, signal, sys
from pathlib import Path
from hpcft.keeper import Inherited
from hpcft.page import now_ns
from hpcft.workers import LogLimits, PoolReady, Workers, WorkerExited

out, spec, lease = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])

def note(what, **more):
    with (out / "events").open("a") as file:
        file.write(json.dumps({"what": what, "agent": os.getpid(), **more}) + "\\n")

async def renew(page):
    while True:
        page.lease_until_ns = now_ns() + int(lease * 1e9)
        await asyncio.sleep(lease / 10)

async def main():
    inherited = Inherited.take(os.environ)
    pools = []
    def on_pool(event):
        note(type(event).__name__, text=str(event))
        if isinstance(event, PoolReady):
            pools.append(event.pid)
    workers = Workers(inherited.keeper, LogLimits(out / "logs"), on_pool)
    workers.open()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: note("USR1"))
    Inherited.unblock_signals()
    renewing = lease and asyncio.ensure_future(renew(inherited.page))
    note("started", life=inherited.life)
    await workers.ready()
    note("ready", pool=pools[-1])
    workers.start("w", spec)

    async def hear():
        async for event in workers.events():
            note(type(event).__name__, pid=event.pid, cause=getattr(event, "cause", ""))
            if isinstance(event, WorkerExited) and not ended.is_set():
                os._exit(int(os.environ.get("TEST_AGENT_EXIT", "120")))

    hearing = asyncio.ensure_future(hear())
    await ended.wait()
    stuck = await workers.end(grace=0.1)
    note("ended", stuck=list(stuck))
    os._exit(12)

asyncio.run(main())
"""


def marked(mark: str) -> list[int]:
    """Living processes that carry `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                variables = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"{MARK}={mark}\0".encode() in variables and state_of(int(entry.name)) not in ("Z", "X", ""):
                found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def executable(pid: int) -> str:
    return Path(f"/proc/{pid}/exe").readlink().name


def wait_for(condition: Callable[[], Any], what: str, seconds: float = GENEROUS) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"did not happen within {seconds:g} s: {what}"
        time.sleep(0.005)


async def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + GENEROUS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"did not happen: {what}"
        await asyncio.sleep(0.005)
    return value


def wait_until_nothing_is_left(mark: str, seconds: float = GENEROUS) -> None:
    deadline = time.monotonic() + seconds
    while left := marked(mark):
        if time.monotonic() > deadline:
            told = {pid: command_of(pid).replace("\0", " ")[:100] for pid in left}
            raise AssertionError(f"processes are left: {told}")
        time.sleep(0.01)


@pytest.fixture
def mark() -> Iterator[str]:
    mark = uuid4().hex
    yield mark
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


def spec(program: dict[str, Any], *args: str, rank: int = 0) -> dict[str, Any]:
    return {
        "run_id": "r1",
        "run_dir": "/nowhere",
        "name": "test",
        "node": "node1",
        "generation": 3,
        "term": 1,
        "nonce": "0badcafe",
        "rank": rank,
        "local_rank": rank,
        "world_size": 2,
        "local_world_size": 2,
        "node_rank": 0,
        "node_count": 1,
        "slot": rank,
        "master_addr": "127.0.0.1",
        "master_port": 29999,
        "store_prefix": "g3",
        "group_timeout": 30.0,
        "restore": None,
        "seed": 1,
        "checkpoint": {"every_steps": None},
        "data": {"ledger": False, "workers": 0, "prefetch": 2},
        "program": program,
        "args": list(args),
        "device": None,
    }


# The pool alone: the test is its keeper and its agent


@dataclass
class Pool:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    page: NodePage
    mark: str


def start_pool(mark: str, *preload: str, directory: Path | None = None) -> Pool:
    page = NodePage.create(4)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    arguments = ["--page", str(page.fd), "--keeper", str(theirs.fileno())]
    arguments += [argument for module in preload for argument in ("--preload", module)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hpcft.pool", *arguments],
        pass_fds=[page.fd, theirs.fileno()],
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "2"},
        cwd=directory,
        start_new_session=True,
    )
    theirs.close()
    return Pool(process, ours, page, mark)


def end_pool(pool: Pool) -> None:
    pool.channel.close()
    pool.process.wait(GENEROUS)
    pool.page.close()
    wait_until_nothing_is_left(pool.mark)


@pytest.fixture(scope="module")
def warm() -> Iterator[Pool]:
    """One warm pool for all tests that do not kill it; each introduces itself as a new agent."""
    mark = uuid4().hex
    pool = start_pool(mark)
    yield pool
    end_pool(pool)
    assert pool.process.returncode == 0


@dataclass
class Node:
    workers: Workers
    page: NodePage
    mark: str
    channel: socket.socket
    logs: Path
    pool: list[PoolEvent] = field(default_factory=list)
    seen: list[WorkerSpawned | WorkerSaid | WorkerExited] = field(default_factory=list)

    async def until(self, kind: type, worker: str = "w") -> Any:
        """The next event of that kind about `worker`; what comes before is remembered in `seen`."""
        async with asyncio.timeout(GENEROUS):
            async for event in self.workers.events():
                self.seen.append(event)
                if isinstance(event, kind) and event.worker == worker:
                    return event
            raise AssertionError("the events ended")

    async def printed(self, text: str, worker: str = "w") -> None:
        await until(lambda: text in self.workers.tail(worker), f"{worker} prints {text!r}")

    async def pool_said(self, kind: type) -> Any:
        return await until(lambda: next((e for e in self.pool if isinstance(e, kind)), None), kind.__name__)


def introduce(pool: Pool, keeper: socket.socket) -> None:
    """What the keeper does when agent or pool are new."""
    for_agent, for_pool = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with for_agent, for_pool:
        socket.send_fds(keeper, [b'{"kind":"pool"}'], [for_agent.fileno()])
        socket.send_fds(pool.channel, [b'{"op":"control"}'], [for_pool.fileno()])


@asynccontextmanager
async def agent_of(pool: Pool, logs: Path) -> AsyncIterator[Node]:
    pool.page.lease_until_ns = 0
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    events: list[PoolEvent] = []
    workers = Workers(theirs, LogLimits(logs, lines=100), events.append)
    workers.open()
    introduce(pool, channel)
    try:
        async with asyncio.timeout(GENEROUS):
            await workers.ready()
        yield Node(workers, pool.page, pool.mark, channel, logs, events)
    finally:
        await workers.close()
        channel.close()
        theirs.close()


@pytest.fixture
async def node(warm: Pool, tmp_path: Path) -> AsyncIterator[Node]:
    async with agent_of(warm, tmp_path / "logs") as node:
        yield node
        await node.workers.end(grace=0)


def script(tmp_path: Path, text: str, name: str = "program.py") -> dict[str, Any]:
    path = tmp_path / name
    path.write_text(text)
    return {"script": str(path)}


@pytest.mark.parametrize(
    ("text", "status", "cause"),
    [
        ("pass", 0, "exit 0"),
        ("import sys; sys.exit(7)", 7, "exit 7"),
        ("import sys; sys.exit('no good')", 1, "exit 1"),
        ("import os; os.kill(os.getpid(), 9)", -9, "SIGKILL"),
        ("import os; os.abort()", -6, "SIGABRT"),
        ("1/0", 1, "exit 1"),
        ("def f(:", 1, "exit 1"),
    ],
)
@pytest.mark.parametrize("way", ["forked", "command"])
async def test_the_end_of_a_worker_is_told_with_status_and_cause(
    node: Node, tmp_path: Path, text: str, status: int, cause: str, way: str
) -> None:
    program = script(tmp_path, text)
    if way == "command":
        program = {"command": [sys.executable, program["script"]]}
    node.workers.start("w", spec(program))
    spawned = await node.until(WorkerSpawned)
    exited = await node.until(WorkerExited)
    assert (exited.pid, exited.status, exited.stuck, exited.asked) == (spawned.pid, status, False, False)
    assert exited.cause.removesuffix(" (core dumped)") == cause


async def test_an_exception_is_reported_before_the_exit_and_printed_without_our_frames(
    node: Node, tmp_path: Path
) -> None:
    program = script(tmp_path, "def train():\n    raise ValueError('bad ' + 'batch')\n\ntrain()\n")
    node.page.slot(0).set_step(41)
    node.workers.start("w", spec(program))
    exited = await node.until(WorkerExited)
    said = [event.message for event in node.seen if isinstance(event, WorkerSaid)]
    assert [(each["kind"], each["type"], each["message"], each["step"]) for each in said] == [
        ("exception", "ValueError", "bad batch", 41)
    ]
    assert said[0]["where"] == f"{program['script']}:2"
    assert said[0]["collective"] is False
    assert exited.tail[0] == "Traceback (most recent call last):"
    assert exited.tail[1].strip().startswith(f'File "{program["script"]}", line 4')
    assert exited.tail[-1] == "ValueError: bad batch"


async def test_a_program_finds_what_torchrun_would_set_and_nothing_of_the_pool(node: Node, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("here = True")
    text = (
        FDS
        + """
import json, os, random, signal, sys, threading
import beside
import numpy, torch
out = {
    "env": dict(os.environ), "argv": sys.argv, "path": sys.path[0], "name": __name__,
    "fds": fds,
    "sid": os.getsid(0) == os.getpgid(0) == os.getpid(), "pid": os.getpid(),
    "threads": torch.get_num_threads(), "main": threading.current_thread() is threading.main_thread(),
    "signals": [int(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)],
    "random": [random.random(), float(numpy.random.rand()), float(torch.rand(1))],
    "oom": open("/proc/self/oom_score_adj").read().strip(), "stdin": sys.stdin.read(),
}
torch.ones(1 << 21).sum()
print(json.dumps(out))
"""
    )
    lifeline, other = socket.socketpair()
    results = []
    for rank, name in enumerate(("a", "b")):
        program = script(tmp_path, text)
        node.workers.start(name, spec(program, "--lr", "0.1", rank=rank), lifeline)
        exited = await node.until(WorkerExited, name)
        assert exited.status == 0, exited.tail
        results.append(json.loads(exited.tail[-1]))
    lifeline.close()
    other.close()
    first, second = results
    assert {name: second["env"].get(name) for name in sorted(TORCHRUN)} == TORCHRUN
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in second["env"], "the pool's own settings are not the program's"
    assert "HPCFT_WORKER_SPEC" not in second["env"]
    assert second["argv"] == [str(tmp_path / "program.py"), "--lr", "0.1"]
    assert (second["path"], second["name"]) == (str(tmp_path), "__main__")
    assert second["sid"]
    assert second["main"]
    # what Slurm sends to every process of the step is not for a program that obeys orders
    assert second["signals"] == [signal.SIG_IGN, signal.SIG_IGN, signal.SIG_DFL]
    assert (second["threads"], second["oom"], second["stdin"]) == (2, "500", "")
    sockets = [target for target in second["fds"].values() if target.startswith("socket:")]
    assert len(sockets) == 2, "the control channel and the lifeline, and none of the pool's"
    assert sum("hpcft-page" in target for target in second["fds"].values()) in (1, 2)
    for one, another in zip(first["random"], second["random"], strict=True):
        assert one != another, "forks must not share random state"


CHILDREN = """
import multiprocessing, os, subprocess, sys
from hpcft.errors import UsageError
from hpcft.worker.spec import take_spec

ENTRY = "import os; from hpcft.worker.spec import take_spec; take_spec(os.environ)"
TOLD = "HPCFT_WORKER_SPEC"

def load(said):
    try:
        take_spec(os.environ)
    except UsageError:
        said.put((TOLD in os.environ, "no worker"))

if __name__ == "__main__":
    started = subprocess.run([sys.executable, "-c", ENTRY], capture_output=True, text=True)
    print("program", started.returncode, "UsageError" in started.stderr)
    for way in ("fork", "spawn"):
        context = multiprocessing.get_context(way)
        said = context.Queue()
        loader = context.Process(target=load, args=(said,))
        loader.start()
        print(way, *said.get(timeout=60))
        loader.join()
    print("itself", TOLD in os.environ, take_spec(os.environ).rank)
"""
CHILDREN_SAY = ("program 1 True", "fork False no worker", "spawn False no worker", "itself False 1")


async def test_what_a_worker_starts_does_not_take_itself_for_a_worker(node: Node, tmp_path: Path) -> None:
    told = {**spec(script(tmp_path, CHILDREN), rank=1), "address": "127.0.0.1", "train": {}}
    node.workers.start("w", told)
    exited = await node.until(WorkerExited)
    assert exited.tail == CHILDREN_SAY


TORCHRUN = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
    "OMP_NUM_THREADS": "2",
    "RANK": "1",
    "ROLE_NAME": "default",
    "ROLE_RANK": "1",
    "ROLE_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "2147483647",
    "TORCHELASTIC_RESTART_COUNT": "3",
    "TORCHELASTIC_RUN_ID": "r1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "WORLD_SIZE": "2",
}


async def test_the_end_of_a_forked_program_is_that_of_a_script(node: Node, tmp_path: Path) -> None:
    """Exit functions run, threads are waited for, files that nobody closed are written."""
    text = f"""
import atexit, threading, time
file = open({str(tmp_path / "unclosed")!r}, "w")
file.write("written")
class Cycle: pass
cycle = Cycle(); cycle.itself = cycle; cycle.file = open({str(tmp_path / "cycle")!r}, "w"); cycle.file.write("too")
atexit.register(lambda: print("exit function", file.name[-8:]))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("end of script", end="\\n")
"""
    node.workers.start("w", spec(script(tmp_path, text)))
    exited = await node.until(WorkerExited)
    assert (exited.status, exited.tail) == (0, ("end of script", "thread", "exit function unclosed"))
    assert (tmp_path / "unclosed").read_text() == "written"
    assert (tmp_path / "cycle").read_text() == "too"


async def test_a_module_runs_as_python_m_would(node: Node, tmp_path: Path) -> None:
    node.workers.start("w", spec({"module": "json.tool"}, "--help"))
    exited = await node.until(WorkerExited)
    assert exited.status == 0
    assert exited.tail[0].startswith("usage:")


async def test_a_command_that_does_not_exist_is_said_so(node: Node) -> None:
    node.workers.start("w", spec({"command": ["no-such-program-here"]}))
    exited = await node.until(WorkerExited)
    assert exited.status == 127
    assert any(isinstance(e, WorkerSaid) and e.message["type"] == "FileNotFoundError" for e in node.seen)


async def test_output_is_captured_in_order_and_rotated(warm: Pool, tmp_path: Path) -> None:
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    workers = Workers(theirs, LogLimits(tmp_path / "logs", max_size=20_000, keep=9, lines=4))
    workers.open()
    introduce(warm, channel)
    node = Node(workers, warm.page, warm.mark, channel, tmp_path)
    text = (
        "import sys\nfor i in range(8000): print(i, file=sys.stdout if i % 2 else sys.stderr)\n"
        "print('no newline', end='')"
    )
    workers.start("w", spec(script(tmp_path, text)))
    exited = await node.until(WorkerExited)
    assert exited.tail == ("7997", "7998", "7999", "no newline")
    await workers.close(GENEROUS)
    files = [tmp_path / "logs" / f"w.log.{n}" for n in range(9, 0, -1)] + [tmp_path / "logs" / "w.log"]
    assert sum(file.exists() for file in files) >= 2
    text = "".join(file.read_text() for file in files if file.exists())
    assert text == "".join(f"{i}\n" for i in range(8000)) + "no newline"
    channel.close()
    theirs.close()


async def test_ending_is_term_first_and_whoever_goes_is_not_waited_for(node: Node, tmp_path: Path) -> None:
    # Short sleeps: Python does not run a handler when the signal comes just before a long blocking call begins.
    text = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(5))\nprint('up')\n"
        "while True: time.sleep(0.05)\n"
    )
    node.workers.start("w", spec(script(tmp_path, text)))
    await node.printed("up")
    assert await node.workers.end(grace=10 * GENEROUS) == ()
    exited = await node.until(WorkerExited)
    assert (exited.status, exited.asked) == (5, True)


async def test_after_the_grace_everything_is_killed_that_a_worker_started(node: Node, tmp_path: Path) -> None:
    node.workers.start("w", spec(script(tmp_path, WITH_LOADERS)))
    await node.printed("up")
    began = time.monotonic()
    assert await node.workers.end(grace=0.3) == ()
    assert time.monotonic() - began > 0.25
    exited = await node.until(WorkerExited)
    assert (exited.status, exited.asked) == (-signal.SIGKILL, True)
    await until(lambda: len(marked(node.mark)) == 1, "nothing of the worker is left")


async def test_what_a_dead_worker_leaves_goes_while_another_worker_lives(node: Node, tmp_path: Path) -> None:
    node.workers.start("other", spec(script(tmp_path, WITH_LOADERS, "a.py"), rank=1))
    await node.printed("up", "other")
    others = set(marked(node.mark))
    loaders = (
        "import os, subprocess, time\n"
        "subprocess.Popen(['sleep', '1000'])\n"
        "if os.fork() == 0:\n    time.sleep(1000)\n"
        "print('up', flush=True)\n"
        "os.kill(os.getpid(), 11)\n"
    )
    node.workers.start("w", spec(script(tmp_path, loaders, "b.py")))
    exited = await node.until(WorkerExited)
    assert exited.cause.startswith("SIGSEGV")
    await until(lambda: set(marked(node.mark)) == others, "only the other worker is left, and all of it")


async def test_loaders_forked_by_a_thread_outlive_the_thread(node: Node, tmp_path: Path) -> None:
    """The death signal follows the forking thread: set there, it would kill loaders when a thread of the user ends."""
    text = """
import os, threading, time
pids = []
def fork():
    pid = os.fork()
    if pid == 0:
        time.sleep(1000)
    pids.append(pid)
thread = threading.Thread(target=fork); thread.start(); thread.join()
fork()
time.sleep(0.1)
print("children", len([pid for pid in pids if open(f"/proc/{pid}/stat").read().split()[2] != "Z"]), flush=True)
os._exit(0)
"""
    node.workers.start("w", spec(script(tmp_path, text)))
    exited = await node.until(WorkerExited)
    assert exited.tail[-1] == "children 2"


async def test_a_stopped_worker_is_ended_too(node: Node, tmp_path: Path) -> None:
    node.workers.start("w", spec(script(tmp_path, WITH_LOADERS)))
    spawned = await node.until(WorkerSpawned)
    await node.printed("up")
    os.kill(spawned.pid, signal.SIGSTOP)
    assert await node.workers.end(grace=0.05) == ()
    assert (await node.until(WorkerExited)).status == -signal.SIGKILL


async def test_the_lifeline_ends_when_the_last_process_that_could_train_is_gone(node: Node, tmp_path: Path) -> None:
    far, near = socket.socketpair()
    node.workers.start("w", spec(script(tmp_path, WITH_LOADERS)), near)
    near.close()
    spawned = await node.until(WorkerSpawned)
    await node.printed("up")
    loaders = [pid for pid in descendants(spawned.pid) if "python" in executable(pid)]
    assert len(loaders) == 2
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    os.kill(spawned.pid, signal.SIGKILL)
    async with asyncio.timeout(GENEROUS):
        assert await asyncio.get_running_loop().sock_recv(far, 1) == b""
    # The kernel closes descriptors when a process can no longer run its program, a moment before it is gone.
    await until(lambda: all(state_of(pid) in ("Z", "X", "") for pid in (spawned.pid, *loaders)), "all are gone")
    far.close()


async def test_a_held_line_stays_open_in_the_pool_and_only_there(node: Node, tmp_path: Path) -> None:
    far, near = socket.socketpair()
    node.workers.hold(near.fileno())
    inode = f"socket:[{os.fstat(near.fileno()).st_ino}]"
    near.close()
    text = f"import sys\n{FDS}print([fd for fd, target in fds.items() if target == sys.argv[1]])"
    node.workers.start("w", spec(script(tmp_path, text), inode))
    assert (await node.until(WorkerExited)).tail == ("[]",)
    await node.workers.close()
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    far.close()


async def test_a_lease_that_runs_out_kills_the_workers(node: Node, tmp_path: Path) -> None:
    node.page.lease_until_ns = now_ns() + 10**12
    node.workers.start("w", spec(script(tmp_path, WITH_LOADERS)))
    await node.printed("up")
    node.page.lease_until_ns = until = now_ns() + 300_000_000
    exited = await node.until(WorkerExited)
    assert 0 <= (now_ns() - until) / 1e9 < 5.0
    assert (exited.status, exited.asked) == (-signal.SIGKILL, True)
    assert Fenced() in node.pool
    node.workers.start("late", spec(script(tmp_path, "import time; time.sleep(1000)")))
    assert (await node.until(WorkerExited, "late")).status == -signal.SIGKILL, "no start without a lease"


async def test_a_new_agent_finds_the_workers_of_the_old_one_gone(warm: Pool, tmp_path: Path) -> None:
    async with agent_of(warm, tmp_path / "a") as first:
        first.workers.start("w", spec(script(tmp_path, WITH_LOADERS)))
        await first.printed("up")
        await until(lambda: len(marked(warm.mark)) == 1 + WITH_LOADERS_SIZE, "all its processes are there")
    async with agent_of(warm, tmp_path / "b") as second:
        assert isinstance(second.pool[0], PoolReady)
        assert second.pool[0].pid == warm.process.pid
        second.workers.start("w", spec(script(tmp_path, "print('again')")))
        exited = await second.until(WorkerExited)
        assert (exited.status, exited.tail) == (0, ("again",))
    wait_for(lambda: marked(warm.mark) == [warm.process.pid], "the old workers are gone")


async def test_a_request_that_makes_no_sense_is_refused_and_costs_nothing(node: Node, tmp_path: Path) -> None:
    node.workers.start("w", {"rank": 0})
    exited = await node.until(WorkerExited)
    assert (exited.status, exited.pid) == (126, 0)
    assert "KeyError" in exited.cause
    node.workers.start("next", spec(script(tmp_path, "print('well')")))
    assert (await node.until(WorkerExited, "next")).tail == ("well",)


async def test_a_stopped_pool_hides_no_end(mark: str, tmp_path: Path) -> None:
    pool = start_pool(mark)
    try:
        async with agent_of(pool, tmp_path) as node:
            node.workers.start("w", spec(script(tmp_path, WITH_LOADERS)))
            spawned = await node.until(WorkerSpawned)
            await node.printed("up")
            pool.process.send_signal(signal.SIGSTOP)
            await until(lambda: state_of(pool.process.pid) == "T", "the pool is stopped")
            assert await node.workers.end(grace=0, kill_seconds=0.3) == ()
            exited = await node.until(WorkerExited)
            assert (exited.pid, exited.stuck) == (spawned.pid, False)
            assert "does not answer" in exited.cause
            pool.process.send_signal(signal.SIGCONT)
            node.workers.start("next", spec(script(tmp_path, "print('awake again')")))
            assert (await node.until(WorkerExited, "next")).tail == ("awake again",)
    finally:
        end_pool(pool)


async def test_a_worker_that_does_not_die_is_named_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test is a pool that kills nobody, and signals of the agent are lost: so it is with state D."""
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *ignored: None)
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pool, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    workers = Workers(theirs, LogLimits(tmp_path))
    workers.open()
    socket.send_fds(channel, [b'{"kind":"pool"}'], [control.fileno()])
    control.close()
    events = workers.events()
    sleeper = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        workers.start("w", spec({"module": "m"}))
        loop = asyncio.get_running_loop()
        pool.setblocking(False)
        request = json.loads(await asyncio.wait_for(loop.sock_recv(pool, 1 << 17), GENEROUS))
        pool.send(json.dumps({"kind": "spawned", "worker": request["worker"], "pid": sleeper.pid}).encode())
        assert await anext(events) == WorkerSpawned("w", sleeper.pid)
        assert await workers.end(0.0, kill_seconds=0.2) == ("w",)
        exited = await anext(events)
        assert isinstance(exited, WorkerExited) and exited.stuck
        pool.close()  # whoever asks again, and whatever has become of the pool since
        assert await workers.end(0.0) == ("w",)
        assert await workers.end(0.0) == ("w",)
        sleeper.kill()
        await sleeper.wait()
        assert await workers.end(0.0) == ()
    finally:
        if sleeper.returncode is None:
            sleeper.kill()
            await sleeper.wait()
        await workers.close()
        for end in (channel, theirs, pool):
            end.close()


def test_a_process_lives_until_its_last_thread_has_ended() -> None:
    """SIGKILL ends the main thread, another one hangs in the kernel: all that /proc/PID/stat says is zombie."""
    text = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    process = subprocess.Popen([sys.executable, "-c", text])
    try:
        wait_for(lambda: state_of(process.pid) == "Z", "its main thread has ended")
        assert lives(process.pid)
    finally:
        process.kill()
    wait_for(lambda: not lives(process.pid), "all of it is gone")
    process.wait()
    assert not lives(process.pid)


async def test_the_death_of_the_pool_is_the_end_of_its_workers(mark: str, tmp_path: Path) -> None:
    pool = start_pool(mark)
    async with agent_of(pool, tmp_path) as node:
        node.workers.start("w", spec(script(tmp_path, "import time; print('up'); time.sleep(1000)")))
        spawned = await node.until(WorkerSpawned)
        await node.printed("up")
        pool.process.kill()
        exited = await node.until(WorkerExited)
        assert (exited.pid, exited.cause, exited.stuck) == (spawned.pid, "the pool died", False)
        assert state_of(spawned.pid) in ("Z", "X", "")
        # What is asked for now waits for the next pool.
        node.workers.start("next", spec(script(tmp_path, "print('warm again')")))
        second = start_pool(mark)
        introduce(second, node.channel)
        assert (await node.until(WorkerExited, "next")).tail == ("warm again",)
        end_pool(second)
    pool.process.wait()
    pool.channel.close()
    pool.page.close()


async def test_a_module_that_breaks_forks_is_named_and_workers_are_executed(mark: str, tmp_path: Path) -> None:
    (tmp_path / "harmless.py").write_text("import json")
    (tmp_path / "parallel_at_import.py").write_text(
        "import torch\ntorch.set_num_threads(2)\ntorch.ones(1 << 21).sum()\ntorch.set_num_threads(1)\n"
    )
    (tmp_path / "broken.py").write_text("raise RuntimeError('not today')")
    pool = start_pool(mark, "harmless", "broken", "parallel_at_import", directory=tmp_path)
    try:
        async with agent_of(pool, tmp_path / "logs") as node:
            ready = await node.pool_said(PoolReady)
            assert not ready.warm
            await until(lambda: len(node.pool) == 3, "both modules are named")
            faults = {event.module: event for event in node.pool if isinstance(event, PreloadFault)}
            assert faults["parallel_at_import"].fault is Fault.UNSAFE
            assert "as a parallel region does" in faults["parallel_at_import"].reason
            assert faults["broken"].fault is Fault.MISSING
            assert "not today" in faults["broken"].reason
            text = (
                "import os, sys, torch\nassert 'harmless' not in sys.modules\ntorch.set_num_threads(2)\n"
                f"torch.ones(1 << 21).sum()\n{FDS}"
                "print(os.environ['RANK'], sys.argv[1:], sys.path[0] == os.path.dirname(__file__), __name__,"
                " sum(t.startswith('socket') for t in fds.values()), sum('hpcft-page' in t for t in fds.values()))\n"
                "raise KeyError('told')\n"
            )
            lifeline, far = socket.socketpair()
            node.workers.start("w", spec(script(tmp_path, text), "x"), lifeline)
            exited = await node.until(WorkerExited)
            assert exited.tail[0] == "0 ['x'] True __main__ 2 1", exited.tail
            assert exited.status == 1
            said = [event.message for event in node.seen if isinstance(event, WorkerSaid)]
            assert [each["type"] for each in said] == ["KeyError"]
            lifeline.close()
            far.close()
            told = {**spec(script(tmp_path, CHILDREN), rank=1), "address": "127.0.0.1", "train": {}}
            node.workers.start("children", told)
            assert (await node.until(WorkerExited, "children")).tail == CHILDREN_SAY
    finally:
        end_pool(pool)


async def test_a_module_after_which_a_child_hangs_is_named(mark: str, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(
        "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(1000))\n"
    )
    pool = start_pool(mark, "hanging", directory=tmp_path)
    try:
        async with agent_of(pool, tmp_path / "logs") as node:
            fault = await node.pool_said(PreloadFault)
            assert (fault.module, fault.fault) == ("hanging", Fault.UNSAFE)
            assert "does not get through a parallel region" in fault.reason
    finally:
        end_pool(pool)


async def test_a_process_that_an_import_has_started_is_named_and_nobodys_worker(mark: str, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(
        "import subprocess\nsubprocess.run(['true'])\n"
        "subprocess.Popen(['sleep', '1001'])\nsubprocess.Popen(['sleep', '1002'], start_new_session=True)\n"
    )
    pool = start_pool(mark, "helper", directory=tmp_path)
    try:
        async with agent_of(pool, tmp_path / "logs") as node:
            fault = await node.pool_said(PreloadFault)
            assert (fault.module, fault.fault) == ("helper", Fault.LEAVING)
            assert "(sleep 1001)" in fault.reason and "(sleep 1002)" in fault.reason and "true" not in fault.reason
            ready = await node.pool_said(PoolReady)
            assert ready.warm and len(ready.left) == 2
            node.workers.start("w", spec(script(tmp_path, WITH_LOADERS)))
            await node.printed("up")
            assert await node.workers.end(grace=0.0) == ()
            await until(lambda: set(marked(mark)) == {pool.process.pid, *ready.left}, "only the worker's have ended")
    finally:
        end_pool(pool)  # now they have


# The whole node: keeper, agent, pool, worker


@dataclass
class Whole:
    process: subprocess.Popen[bytes]
    out: Path
    mark: str

    def events(self, what: str) -> list[dict[str, Any]]:
        file = self.out / "events"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for line in lines if (event := json.loads(line))["what"] == what]

    def event(self, what: str, number: int = 0) -> dict[str, Any]:
        found: list[dict[str, Any]] = wait_for(
            lambda: self.events(what) if len(self.events(what)) > number else None, f"{what} [{number}]"
        )
        return found[number]

    def up(self, all_of_it: bool = True) -> tuple[int, int, int]:
        """Agent, pool and worker, when the worker and all its loaders live."""
        ready, spawned = self.event("ready"), self.event("WorkerSpawned")
        log = self.out / "logs" / "w.log"
        wait_for(lambda: log.exists() and "up" in log.read_text(), "the worker is up")
        if all_of_it:
            wait_for(lambda: len(marked(self.mark)) == 3 + WITH_LOADERS_SIZE, "its loaders are there")
        return ready["agent"], ready["pool"], spawned["pid"]


@pytest.fixture
def start_node(mark: str, tmp_path: Path) -> Iterator[Callable[..., Whole]]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(
        text: str = WITH_LOADERS,
        lease: float = 0.0,
        way: str = "script",
        keeper: tuple[str, ...] = (),
        **variables: str,
    ) -> Whole:
        program = script(tmp_path, text, "worker.py")
        if way == "command":
            program = {"command": [sys.executable, program["script"]]}
        agent = tmp_path / "agent.py"
        agent.write_text(AGENT)
        command = [sys.executable, "-P", "-m", "hpcft.keeper", "--slots", "2", *keeper, "--"]
        command += [sys.executable, str(agent), str(tmp_path), json.dumps(spec(program)), str(lease)]
        environment = {**os.environ, MARK: mark, **variables}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        processes.append(process)
        return Whole(process, tmp_path, mark)

    yield start
    for process in processes:
        process.kill()
        process.wait()
    wait_until_nothing_is_left(mark)


@pytest.mark.parametrize("way", ["script", "command"])
def test_nothing_outlives_a_killed_keeper(start_node: Callable[..., Whole], way: str) -> None:
    node = start_node(way=way)
    node.up()
    node.process.kill()
    node.process.wait()
    wait_until_nothing_is_left(node.mark, 15)


@pytest.mark.parametrize("way", ["script", "command"])
def test_a_killed_agent_costs_its_workers_but_not_the_pool(start_node: Callable[..., Whole], way: str) -> None:
    node = start_node(way=way)
    agent, pool, worker = node.up()
    old = set(marked(node.mark)) - {node.process.pid, pool}
    os.kill(agent, signal.SIGKILL)
    wait_for(lambda: not old & set(marked(node.mark)), "workers and loaders of the killed agent are gone", 15)
    again = node.event("ready", 1)
    assert again["pool"] == pool, "the pool stays warm"
    assert again["agent"] != agent
    assert node.event("started", 1)["life"] == 2
    assert node.event("WorkerSpawned", 1)["pid"] != worker


@pytest.mark.parametrize("way", ["script", "command"])
def test_a_killed_pool_takes_its_workers_along_and_comes_back(start_node: Callable[..., Whole], way: str) -> None:
    node = start_node(way=way, TEST_AGENT_EXIT="1")
    agent, pool, _ = node.up()
    old = set(marked(node.mark)) - {node.process.pid, agent}
    os.kill(agent, signal.SIGSTOP)  # so that nobody but keeper and kernel can have done it
    os.kill(pool, signal.SIGKILL)
    wait_for(lambda: not old & set(marked(node.mark)), "worker and loaders are gone", 15)
    new = wait_for(
        lambda: [pid for pid in children(node.process.pid) if pid != pool and "hpcft.pool" in command_of(pid)],
        "the keeper starts another pool",
    )
    os.kill(agent, signal.SIGCONT)
    assert node.event("WorkerExited")["cause"] == "the pool died"
    assert node.event("ready", 1)["pool"] == new[0]


def test_a_stopped_agent_is_fenced_by_the_pool(start_node: Callable[..., Whole]) -> None:
    node = start_node(lease=1.0)
    agent, pool, _ = node.up()
    old = set(marked(node.mark)) - {node.process.pid, pool, agent}
    os.kill(agent, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: not old & set(marked(node.mark)), "worker and loaders are gone", 15)
    assert time.monotonic() - began > 0.5
    os.kill(agent, signal.SIGCONT)
    node.event("Fenced")
    assert node.event("WorkerExited")["cause"] == "SIGKILL"
    assert node.event("ready", 1)["agent"] != agent, "it asked for a successor"


def test_a_final_exit_code_ends_the_keeper_and_everything_else(start_node: Callable[..., Whole]) -> None:
    node = start_node(text="raise SystemExit(3)", TEST_AGENT_EXIT="13")
    assert node.process.wait(GENEROUS) == 13
    wait_until_nothing_is_left(node.mark, 15)


@pytest.mark.parametrize("code", [1, AGENT_RESTART])
def test_other_exit_codes_bring_a_new_agent(start_node: Callable[..., Whole], code: int) -> None:
    node = start_node(text="raise SystemExit(3)", TEST_AGENT_EXIT=str(code))
    assert node.event("started", 2)["life"] == 3
    assert {event["pool"] for event in node.events("ready")} == {node.event("ready")["pool"]}


def test_signals_are_forwarded_once_and_term_ends_the_node(start_node: Callable[..., Whole]) -> None:
    node = start_node()
    node.up()
    node.process.send_signal(signal.SIGUSR1)
    node.event("USR1")
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(GENEROUS) == 12
    wait_until_nothing_is_left(node.mark, 15)
    assert node.event("ended")["stuck"] == []
    assert len(node.events("USR1")) == 1


def test_a_pool_that_still_imports_survives_the_steps_signals(start_node: Callable[..., Whole]) -> None:
    node = start_node()
    pool = wait_for(
        lambda: [pid for pid in children(node.process.pid) if "hpcft.pool" in command_of(pid)], "the pool is started"
    )[0]
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pool, number)
    assert node.event("ready")["pool"] == pool


def test_a_signal_that_comes_too_early_waits_for_the_agent(start_node: Callable[..., Whole]) -> None:
    node = start_node()
    wait_for(lambda: len(children(node.process.pid)) == 2, "the agent is started")
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(GENEROUS) == 12
    assert len(node.events("started")) == 1


def test_the_keeper_ends_when_whoever_started_it_is_gone(mark: str, tmp_path: Path) -> None:
    agent = [sys.executable, "-c", "import time; time.sleep(1000)"]
    keeper = [sys.executable, "-P", "-m", "hpcft.keeper", "--slots", "1", "--", *agent]
    text = f"import subprocess, time; subprocess.Popen({keeper!r}); time.sleep(1000)"
    step = subprocess.Popen([sys.executable, "-c", text], env={**os.environ, MARK: mark}, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(marked(mark)) >= 4, "keeper, agent and pool run")
    step.kill()
    step.wait()
    wait_until_nothing_is_left(mark, 15)


def test_an_agent_that_cannot_be_started_ends_the_keeper(mark: str) -> None:
    command = [sys.executable, "-P", "-m", "hpcft.keeper", "--slots", "1", "--", "/no/such/agent"]
    result = subprocess.run(command, env={**os.environ, MARK: mark}, capture_output=True, timeout=GENEROUS, check=False)
    assert result.returncode == 14
    assert b"cannot start the agent (/no/such/agent)" in result.stderr
    wait_until_nothing_is_left(mark, 15)


def test_a_module_that_ends_the_pool_or_never_comes_back_is_left_out(
    start_node: Callable[..., Whole], tmp_path: Path
) -> None:
    (tmp_path / "sound.py").write_text("")
    (tmp_path / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(1000)\n")
    preload = [word for name in ("crashing", "hanging", "sound") for word in ("--preload", name)]
    node = start_node(
        "import sys\nprint('up', [name in sys.modules for name in ('crashing', 'hanging', 'sound')])\n"
        "import time\ntime.sleep(1000)",
        keeper=("--import-seconds", "8", *preload),
        PYTHONPATH=str(tmp_path),
    )
    node.up(all_of_it=False)
    log = node.out / "logs" / "w.log"
    wait_for(lambda: log.read_text() == "up [False, False, True]\n", "only the sound one has been imported")
    faults = [event["text"] for event in node.events("PreloadFault")]
    assert len(faults) == 2
    assert "crashing" in faults[0] and "the pool ended with SIGSEGV" in faults[0]
    assert "hanging" in faults[1] and "takes longer than 8 s" in faults[1]
    assert len(node.events("PoolReady")) == 1


def test_a_pool_that_can_never_start_ends_the_node(mark: str, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    agent = [sys.executable, "-c", "import time; time.sleep(1000)"]
    command = [sys.executable, "-P", "-m", "hpcft.keeper", "--slots", "1", "--", *agent]
    variables = {MARK: mark, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=GENEROUS, check=False
    )
    assert result.returncode == 14
    last = result.stderr.splitlines()[-1]
    assert "SIGSEGV" in last and "for the 5th time in a row: giving up on this node; `hpcft doctor`" in last
    wait_until_nothing_is_left(mark, 15)


def test_the_pause_before_a_restart_grows_and_is_forgotten_after_a_long_life() -> None:
    pauses = Pauses()
    assert [pauses.after(1.0) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert pauses.after(60.0) == 0.1
    assert [pauses.after(1.0) for _ in range(2)] == [0.1, 0.2]
    for _ in range(5000):
        assert pauses.after(0.0) <= 5.0


def test_a_process_becomes_the_keeper_and_no_signal_is_lost_on_the_way(mark: str) -> None:
    agent = (
        "import os, signal; from hpcft.keeper import Inherited\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: os._exit(12)); Inherited.unblock_signals()\n"
        "signal.pause()"
    )
    text = (
        "import os, signal, sys; from hpcft import keeper\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, keeper.FORWARDED); os.kill(os.getpid(), signal.SIGTERM)\n"
        "keeper.become([sys.executable, '-c', sys.argv[1]], slots=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, agent], env={**os.environ, MARK: mark}, timeout=GENEROUS, check=False
    )
    assert done.returncode == 12
    wait_until_nothing_is_left(mark, 15)


def test_the_agent_command_becomes_a_small_keeper(mark: str, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'[run]\nname = "c"\nroot = "{tmp_path}"\n[job]\ncommand = ["sleep", "1000"]\n[nodes]\nworkers_per_node = 1\n'
        '[train]\nkey = "not-for-everybody"\n'
    )
    local = {"NODE": "node1", "NODES": "node1", "ADDRESS": "127.0.0.1", "JOB": mark, "RESTARTS": "0"}
    variables = {MARK: mark, **{f"HPCFT_LOCAL_{name}": value for name, value in local.items()}}
    node = subprocess.Popen(
        [sys.executable, "-P", "-m", "hpcft", "agent", config], env={**os.environ, **variables}, stderr=subprocess.PIPE
    )
    with node:
        wait_for(lambda: any("sleep" in command_of(pid) for pid in descendants(node.pid)), "the worker runs")
        assert "hpcft.keeper" in command_of(node.pid)
        assert len(children(node.pid)) == 2
        status = Path(f"/proc/{node.pid}/status").read_text()
        assert int(status.partition("VmRSS:")[2].split()[0]) < 24 << 10, "kB, of which an interpreter needs half"
        lines = [command_of(pid) for pid in (node.pid, *descendants(node.pid))]
        assert not any("not-for-everybody" in line for line in lines), "every user of the machine can read these"
        node.terminate()
        assert node.wait(GENEROUS) == 12
    wait_until_nothing_is_left(mark, 15)


def test_the_keeper_is_small() -> None:
    """No torch, no asyncio, no numpy: what is not imported cannot fail."""
    text = "import sys, hpcft.keeper; print([m for m in ('torch','asyncio','numpy','pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, check=True).stdout == b"[]\n"
