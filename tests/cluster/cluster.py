"""The cluster as an object: boot it, take things away from it, run jobs, look at what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeVar

from hpcft.slurm.control import find_job
from tests.cluster import files
from tests.cluster.files import UID, USER, Size, address, node_name

PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "scontrol", "srun", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
"""States that a job does not leave (others may be followed by a requeue)."""
LANGUAGE = {"LANG": "C.UTF-8", "PATH": SYSTEM_PATH}
HERE = Path(__file__).parent
DEFAULT = Size()

T = TypeVar("T")


class ClusterError(Exception):
    """The cluster of the tests did not do what it was told to."""


def missing() -> str | None:
    """Why no cluster can be started here, in one line with the cure; None if one can."""
    if os.geteuid():
        return "the Slurm tests need root: run them with sudo, or in a container of your own"
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=SYSTEM_PATH)]:
        return f"the Slurm tests need {', '.join(absent)}: apt-get install {PACKAGES}"
    namespaces = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "true"]
    if subprocess.run(namespaces, capture_output=True).returncode:
        return "the Slurm tests need namespaces, which this container forbids: docker run --privileged"
    return None


def until(condition: Callable[[], T], what: str | Callable[[], str], timeout: float = 60, every: float = 0.1) -> T:
    """Ask until the answer is true, and return it; AssertionError says what was waited for and the last answer."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > deadline:
            shown = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {timeout:g} s: {shown}; at last: {answer!r}")
        time.sleep(every)
    return answer


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    """As this machine sees it, so that a test can signal it."""
    parent: int
    uid: int
    state: str
    """R, S, D (hangs in the kernel), T (stopped), Z (dead, not yet reaped) …"""
    name: str
    cmdline: str


@dataclass(slots=True)
class Machine:
    """The head or a powered-on node."""

    starter: subprocess.Popen[bytes]
    init: int
    """Its first process, as this machine sees it."""


@dataclass(slots=True)
class Cluster:
    directory: Path
    size: Size
    machines: dict[int, Machine] = field(default_factory=dict)
    controller: subprocess.Popen[bytes] | None = None
    commands: list[subprocess.Popen[str]] = field(default_factory=list)
    """Started by `popen`."""

    @classmethod
    def start(cls, directory: Path, size: Size = DEFAULT) -> Cluster:
        """Boot a cluster with its files below `directory` (made if need be); return when all nodes are idle."""
        if why := missing():
            raise ClusterError(why)
        directory.mkdir(parents=True, exist_ok=True)
        cluster = cls(directory.resolve(), size)
        cluster.directory.chmod(0o755)
        files.write(cluster.directory, size)
        for path in (cluster.home, cluster.shared, cluster.detachable):
            path.mkdir()
            os.chown(path, UID, UID)
        for gpu in range(size.gpus):
            os.mknod(cluster.directory / "dev" / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        try:
            cluster._boot_head()
            cluster.ctld_start("-c")
            for index in cluster.nodes:
                cluster.power_on(index)
            cluster.wait_idle()
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def stop(self) -> None:
        """Everything is gone when this returns, whatever state the cluster was in."""
        head = self.machines.pop(0, None)
        if head is None:
            return
        os.kill(head.init, signal.SIGKILL)  # its namespace goes with it: all nodes, all jobs
        for starter in (head.starter, *(machine.starter for machine in self.machines.values()), self.controller):
            if starter is not None:
                starter.wait(60)
                _close(starter)
        self._end_commands()
        self.machines.clear()
        self.controller = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def nodes(self) -> range:
        return range(1, self.size.nodes + 1)

    @property
    def home(self) -> Path:
        """The user's home directory, the same on all machines."""
        return self.directory / "home"

    @property
    def shared(self) -> Path:
        """Shared by all machines and the tests, at the same path, for the user to write; always reachable."""
        return self.directory / "shared"

    @property
    def detachable(self) -> Path:
        """The same, but each node reaches it through a file system of its own that can be taken away: `detach`."""
        return self.directory / "detachable"

    # Faults and their repair

    def power_off(self, index: int) -> None:
        """The node is gone, silently: its cable first, as a dead machine sends no RST."""
        self.cut(index)
        machine = self.machines.pop(index)
        os.kill(machine.init, signal.SIGKILL)
        machine.starter.wait(60)
        _close(machine.starter)
        self._ip(0, "link", "del", f"cable{index}", check=False)  # the kernel may have been faster

    def power_on(self, index: int) -> None:
        """Boot a node; it joins the cluster by itself (`wait_idle`)."""
        if index in self.machines:
            raise ClusterError(f"{node_name(index)} is on")
        own = self.directory / node_name(index)
        under_tmp = [path for path in files.to_open(self.directory) if path.is_relative_to("/tmp")]
        sharedfs = [sys.executable, "-I", str(HERE / "sharedfs.py"), str(self.detachable), str(self.detachable)]
        spec = {
            "hostname": node_name(index),
            "keep": [str(path) for path in under_tmp],
            # slurmd makes sockets there, whose paths have at most 107 characters: a test's own directory is too deep
            "covers": {"/tmp": str(own / "tmp"), "/var/spool": str(own / "spool")},
            "binds": {},
            "tmpfs": {"/dev/shm": "mode=1777"},
            "commands": [
                ["ip", "link", "set", "lo", "up"],
                ["ip", "addr", "add", f"{address(index)}/24", "dev", "eth0"],
                ["ip", "link", "set", "eth0", "up"],
                sharedfs,
            ],
            "daemons": [["slurmd", "-D", "-b", "-N", node_name(index)]],
        }
        starter = self._boot(index, spec, ["nsenter", *self._into(0)])
        init = _child(_child(starter.pid))
        # `ip` runs on the head's network but among the outer process ids, to name the new node by one. A machine keeps
        # its hardware address over a reboot: with a new one, others would send to the old one for seconds.
        card = ["address", f"02:00:00:00:00:{index:02x}", "name", "eth0", "netns", str(init)]
        self._ip(0, "link", "add", f"cable{index}", "type", "veth", "peer", *card)
        self._ip(0, "link", "set", f"cable{index}", "master", "switch", "up")
        self.machines[index] = Machine(starter, init)
        self._go(index, starter)

    def cut(self, index: int) -> None:
        """Pull the node's network cable."""
        self._ip(0, "link", "set", f"cable{index}", "down")

    def heal(self, index: int) -> None:
        """Plug it back, and mend its ways to others."""
        self._ip(0, "link", "set", f"cable{index}", "up")
        for other in self.machines:
            if other != index:
                self._ip(index, "route", "del", "blackhole", address(other), check=False)
                self._ip(other, "route", "del", "blackhole", address(index), check=False)

    def part(self, one: int, other: int) -> None:
        """Break the way between two nodes, both ways; each reaches all others. `heal` of either mends it."""
        for here, there in ((one, other), (other, one)):
            self._ip(here, "route", "replace", "blackhole", address(there))

    def detach(self, index: int, how: Literal["hang", "stuck", "error"] = "hang") -> None:
        """Take the directory `detachable` from one node, open files included.

        hang: calls wait, their callers can be killed (NFS without its server); stuck: nor killed (state D);
        error: calls fail with EIO. `cut` and `detach` together are a node cut off from network storage too.
        """
        signals = {"hang": signal.SIGSTOP, "stuck": signal.SIGHUP, "error": signal.SIGUSR1}
        os.kill(self._file_server(index), signals[how])

    def attach(self, index: int) -> None:
        """Give it back; calls that hung go on."""
        server = self._file_server(index)
        os.kill(server, signal.SIGUSR2)
        os.kill(server, signal.SIGCONT)

    def ctld_stop(self) -> None:
        """Stop slurmctld: commands fail, jobs run on."""
        if self.controller is None:
            raise ClusterError("slurmctld is not running")
        os.kill(_child(self.controller.pid), signal.SIGTERM)
        self.controller.wait(60)
        self.controller = None

    def ctld_start(self, *options: str) -> None:
        if self.controller is not None:
            raise ClusterError("slurmctld is running")
        with self._log("slurmctld.out") as log:
            command = ["nsenter", *self._into(0), "slurmctld", "-D", *options]
            self.controller = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=LANGUAGE
            )

    def reset(self) -> None:
        """Undo every fault, end every command and job: the next test meets a cluster as after `start`."""
        if self.controller is None:
            self.ctld_start()
        for index in self.nodes:
            if index in self.machines:
                self.attach(index)
                self.heal(index)
            else:
                self.power_on(index)
        self._end_commands()
        until(lambda: not self.exec(0, "scontrol", "ping", check=False).returncode, "slurmctld answers")
        self.exec(0, "scancel", f"--user={USER}")
        self.wait_idle()
        for processes in self.job_processes().values():
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        until(lambda: not self.job_processes(), "no process of a job is left")

    # Commands and jobs

    def exec(
        self,
        index: int,
        *command: str | Path,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
        timeout: float = 60,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node (0: the head) as if logged in there; AssertionError with its output if it fails."""
        ran = subprocess.run(
            self._login(index, command, user, cwd),
            env=self._environment(user, env),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and ran.returncode:
            shown = " ".join(map(str, command))
            raise AssertionError(f"{shown} on {node_name(index)}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    def popen(
        self,
        index: int,
        *command: str | Path,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a command on a node; killing what this returns kills it (and not its children), and so does `reset`."""
        login = self._login(index, command, user, cwd)
        started = subprocess.Popen(login, env=self._environment(user, env), text=True, **options)
        self.commands.append(started)
        return started

    def sbatch(
        self,
        *arguments: str | Path,
        script: str = "",
        user: str = USER,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Submit from the head (from the user's home, unless `cwd` says otherwise) and return the job's id.

        Without a file among the arguments, `script` is the batch script.
        """
        ran = self.exec(0, "sbatch", "--parsable", *arguments, user=user, env=env, cwd=cwd or self.home, stdin=script)
        return ran.stdout.strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by field name."""
        found = find_job(self.exec(0, "scontrol", "show", "job", job).stdout, job)
        if found is None:
            raise ClusterError(f"Slurm does not show job {job}")
        return found

    def wait_job(self, job: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Wait until the job is in one of these states (RUNNING, COMPLETED …) and return its fields."""
        seen: dict[str, str] = {}

        def arrived() -> bool:
            seen.update(self.job(job))
            return seen["JobState"] in (*states, *OVER)

        until(arrived, lambda: f"job {job} is {' or '.join(states)}; it is: {seen}", timeout, every=0.2)
        assert seen["JobState"] in states, f"job {job} has ended otherwise: {seen}\n{self.output(seen)}"
        return seen

    def output(self, job: Mapping[str, str], size: int = 4000) -> str:
        """The end of what a job has written, for the message of a failing test."""
        path = Path(job["StdOut"])
        return path.read_text(errors="replace")[-size:] if path.is_file() else f"{path} is not there"

    def node_states(self) -> dict[str, str]:
        shown = self.exec(0, "sinfo", "-h", "-N", "-o", "%N %T").stdout.split()
        return dict(zip(shown[::2], shown[1::2], strict=True))

    def wait_idle(self, nodes: Iterable[int] | None = None, timeout: float = 120) -> None:
        """Wait until these nodes (default: all) are up and empty."""
        wanted = {node_name(index): "idle" for index in nodes or self.nodes}

        def states() -> dict[str, str]:
            if self.controller is None or self.controller.poll() is not None:
                raise ClusterError(f"slurmctld is not running:\n{self.log('slurmctld.out')[-2000:]}")
            shown = self.exec(0, "sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.split()
            return dict(zip(shown[::2], shown[1::2], strict=True))

        until(lambda: wanted.items() <= states().items(), f"idle: {', '.join(wanted)}", timeout, every=0.2)

    def processes(self, index: int, user: str | None = None) -> list[Process]:
        """All processes in a node's pid namespace, or those of one user; none if the node is off."""
        machine = self.machines.get(index)
        if machine is None:
            return []
        namespace = Path(f"/proc/{machine.init}/ns/pid").readlink()
        uid = None if user is None else UID if user == USER else 0
        found = (_process(path, namespace) for path in Path("/proc").glob("[0-9]*"))
        return [process for process in found if process and uid in (None, process.uid)]

    def job_processes(self) -> dict[str, list[Process]]:
        """What the user has running, by node name; empty when no job left anything anywhere."""
        running = {node_name(index): self.processes(index, USER) for index in self.nodes}
        return {node: processes for node, processes in running.items() if processes}

    def log(self, name: str) -> str:
        """`slurmctld`, `slurmd-node1` …, for the message of a failing test."""
        return (self.directory / "log" / name).read_text(errors="replace")

    # Inside

    def _end_commands(self) -> None:
        while self.commands:
            command = self.commands.pop()
            command.kill()
            command.wait(20)
            _close(command)

    def _boot_head(self) -> None:
        keep = files.to_open(self.directory)
        for path in keep:
            if not path.stat().st_mode & 0o005 == 0o005:
                raise ClusterError(f"jobs run as an ordinary user and cannot read {path}: chmod o+rx {path}")
        etc = self.directory / "etc"
        munge = self.directory / "munge"
        spec = {
            "hostname": files.HEAD,
            "keep": [str(path) for path in keep],
            "covers": {str(top): "" for top in map(files.closed_top, keep) if top},
            "binds": {
                **{str(etc / name): f"/etc/{name}" for name in ("hosts", "passwd", "group", "slurm")},
            },
            "tmpfs": {},
            "commands": [
                ["ip", "link", "set", "lo", "up"],
                ["ip", "link", "add", "switch", "type", "bridge"],
                ["ip", "addr", "add", f"{address(0)}/24", "dev", "switch"],
                ["ip", "link", "set", "switch", "up"],
            ],
            "daemons": [
                ["munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
                 f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
            ],
        }  # fmt: skip
        owner = os.pidfd_open(os.getpid())
        try:
            starter = self._boot(0, spec, [], owner)
        finally:
            os.close(owner)
        self.machines[0] = Machine(starter, _child(starter.pid))
        self._go(0, starter)
        until((munge / "socket").exists, "munged listens", 20, every=0.02)

    def _boot(self, index: int, spec: dict[str, Any], into: list[str], owner: int | None = None) -> Any:
        """Start a machine's first process, up to where its namespaces exist and it waits for its cable."""
        own = self.directory / node_name(index)
        own.mkdir(exist_ok=True)
        (own / "machine.json").write_text(json.dumps(spec, indent=1))
        isolate = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*into, *isolate, sys.executable, "-I", str(HERE / "init.py"), str(own / "machine.json")]
        with self._log(f"{node_name(index)}.out") as log:
            starter = subprocess.Popen(
                command if owner is None else [*command, str(owner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                pass_fds=() if owner is None else (owner,),
                env=LANGUAGE,
            )
        self._expect(starter, index, b"isolated\n")
        return starter

    def _go(self, index: int, starter: subprocess.Popen[bytes]) -> None:
        assert starter.stdin
        starter.stdin.write(b"go\n")
        starter.stdin.flush()
        self._expect(starter, index, b"ready\n")

    def _expect(self, starter: subprocess.Popen[bytes], index: int, line: bytes) -> None:
        assert starter.stdout
        if starter.stdout.readline() != line:
            log = self.log(f"{node_name(index)}.out")
            raise ClusterError(f"{node_name(index)} does not boot:\n{log[-2000:]}")

    def _into(self, index: int) -> list[str]:
        if index not in self.machines:
            raise ClusterError(f"{node_name(index)} is off")
        return ["--target", str(self.machines[index].init), "--mount", "--net", "--uts", "--ipc", "--pid", "--"]

    def _login(self, index: int, command: Iterable[str | Path], user: str, cwd: Path | None) -> list[str]:
        become = ["--reuid", user, "--regid", user, "--init-groups"] if user != "root" else []
        where = ["env", "--chdir", str(cwd or "/")]
        return ["nsenter", *self._into(index), "setpriv", *become, "--pdeathsig", "KILL", *where, *map(str, command)]

    def _environment(self, user: str, env: Mapping[str, str] | None) -> dict[str, str]:
        home = str(self.home) if user == USER else "/root"
        return {**LANGUAGE, "HOME": home, "USER": user, "LOGNAME": user, "SHELL": "/bin/bash", **(env or {})}

    def _ip(self, index: int, *arguments: str, check: bool = True) -> None:
        net = f"--net=/proc/{self.machines[index].init}/ns/net"
        ran = subprocess.run(["nsenter", net, "ip", *arguments], capture_output=True, text=True, env=LANGUAGE)
        if check and ran.returncode:
            raise ClusterError(f"ip {' '.join(arguments)}: {ran.stderr.strip()}")

    def _file_server(self, index: int) -> int:
        for process in self.processes(index, "root"):
            if "sharedfs.py" in process.cmdline:
                return process.pid
        raise ClusterError(f"{node_name(index)} has no file server")

    def _log(self, name: str) -> IO[bytes]:
        return (self.directory / "log" / name).open("ab")


def _child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int(until(lambda: children.read_text().split(), f"a child of process {pid}", 20, every=0.01)[0])


def _close(process: subprocess.Popen[Any]) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            with suppress(BrokenPipeError):  # a last line that nobody reads any more
                stream.close()


def _process(path: Path, namespace: Path) -> Process | None:
    try:
        if (path / "ns/pid").readlink() != namespace:
            return None
        status = dict(line.split(":\t", 1) for line in (path / "status").read_text().splitlines())
        cmdline = (path / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or none of ours
        return None
    uid = int(status["Uid"].split()[0])
    return Process(int(path.name), int(status["PPid"]), uid, status["State"][0], status["Name"], cmdline)
