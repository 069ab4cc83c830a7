"""The cluster of the tests: it does what it says, and nothing of it is left afterwards, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from hpcft.slurm.nodelist import expand
from tests.cluster import USER, Cluster, ClusterError, Process, Size, address, until
from tests.cluster.files import REPOSITORY

pytestmark = pytest.mark.slurm


def test_every_node_is_a_machine_of_its_own(cluster: Cluster) -> None:
    ran = cluster.exec(0, "srun", "-N4", "-l", "sh", "-c", "echo $(hostname) $(hostname -i)", user=USER)
    seen = sorted(line.split(": ", 1)[1] for line in ran.stdout.splitlines())
    assert seen == [f"node{index} {address(index)}" for index in cluster.nodes]


def test_a_job_of_an_ordinary_user_imports_torch(cluster: Cluster) -> None:
    program = "import os, torch, hpcft; print(os.getuid(), torch.ones(2, 2).sum().item())"
    job = cluster.sbatch(
        "-N2",
        f"--output={cluster.shared}/out",
        script=f"#!/bin/sh\nsrun {sys.executable} -c '{program}'",
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    cluster.wait_job(job, "COMPLETED", "FAILED")
    uid = cluster.exec(0, "id", "-u", USER).stdout.strip()
    assert (cluster.shared / "out").read_text() == f"{uid} 4.0\n" * 2
    assert expand(cluster.job(job)["NodeList"]) == ("node1", "node2")


def test_shared_directories_are_shared_and_others_are_not(cluster: Cluster) -> None:
    for directory in (cluster.shared, cluster.detachable, cluster.home):
        cluster.exec(1, "sh", "-c", f"echo from node1 > {directory}/greeting", user=USER)
        assert cluster.exec(2, "cat", directory / "greeting", user=USER).stdout == "from node1\n"
        assert (directory / "greeting").read_text() == "from node1\n"
    for own in (Path("/tmp/own"), Path("/dev/shm/own")):
        cluster.exec(1, "touch", own, user=USER)
        assert cluster.exec(2, "ls", own, check=False).returncode == 2
        assert not own.exists()


def test_a_node_loses_power_without_a_word(cluster: Cluster) -> None:
    listener = cluster.popen(1, sys.executable, "-c", LISTEN, address(1), stdout=subprocess.PIPE, cwd=cluster.shared)
    assert listener.stdout
    assert listener.stdout.readline() == "listening\n"
    cluster.popen(2, sys.executable, "-c", CONNECT, address(1))
    assert listener.stdout.readline() == "connected\n"
    cluster.power_off(2)
    assert cluster.processes(2) == []
    with pytest.raises(ClusterError, match="node2 is off"):
        cluster.exec(2, "true")
    assert listener.stdout.readline() == "silence\n", "neither FIN nor RST may come from a dead machine"
    cluster.power_on(2)
    cluster.wait_idle([2])
    assert cluster.exec(0, "srun", "-w", "node2", "hostname", user=USER).stdout == "node2\n"


LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("listening", flush=True)
    peer, _ = server.accept()
    print("connected", flush=True)
    peer.settimeout(3)
    try:
        print("heard", peer.recv(1), flush=True)
    except TimeoutError:
        print("silence", flush=True)
    except OSError as error:
        print(error, flush=True)
"""
CONNECT = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000)):
    time.sleep(1000)
"""


def test_a_cut_node_lives_on_and_comes_back(cluster: Cluster) -> None:
    job = cluster.sbatch("-N2", "--wrap", "srun sleep 100")
    cluster.wait_job(job, "RUNNING")
    until(
        lambda: len(cluster.processes(2, USER)) == 1,
        lambda: f"the task on node2 runs: {cluster.output(cluster.job(job))}",
    )
    (task,) = cluster.processes(2, USER)
    cluster.cut(2)
    assert not _reaches(cluster, 1, 2)
    assert cluster.processes(2, USER) == [task]
    cluster.heal(2)
    until(lambda: _reaches(cluster, 1, 2), "node2 is back")
    assert cluster.job(job)["JobState"] == "RUNNING"
    assert cluster.processes(2, USER) == [task]


def _reaches(cluster: Cluster, source: int, target: int) -> bool:
    """slurmd's port answers."""
    connect = f"import socket; socket.create_connection(('{address(target)}', 6818), 1).close()"
    return cluster.exec(source, sys.executable, "-c", connect, check=False).returncode == 0


@pytest.mark.parametrize("how", ["hang", "stuck"])
def test_calls_hang_on_a_node_that_has_lost_its_files(cluster: Cluster, how: Literal["hang", "stuck"]) -> None:
    writer, victim = (_writer(cluster, name) for name in ("writer", "victim"))
    cluster.detach(3, how)
    (cluster.detachable / "other").write_text("the others go on\n")
    assert cluster.exec(4, "cat", cluster.detachable / "other").stdout == "the others go on\n"
    _write(writer)
    _write(victim)
    until(lambda: len(_waiting(cluster)) == 2, "both wait for the file system")
    if how == "stuck":  # a call can be killed as long as the server has not taken it
        until(lambda: _server_sleeps(cluster), "the server has taken both calls")
    (process,) = (each for each in _waiting(cluster) if each.cmdline.endswith("victim"))
    os.kill(process.pid, signal.SIGKILL)
    if how == "stuck":
        until(lambda: [each.state for each in _waiting(cluster) if each.pid == process.pid] == ["D"], "state D")
    else:
        until(lambda: process.pid not in [each.pid for each in cluster.processes(3)], "it could be killed")
    assert (cluster.detachable / "writer").read_bytes() == b""
    cluster.attach(3)
    assert _said(writer) == "done"
    assert (cluster.detachable / "writer").read_bytes() == b"x" * 5000
    until(lambda: not _waiting(cluster), "the victim is dead, at last")
    assert cluster.exec(3, "cat", cluster.detachable / "other").stdout == "the others go on\n"


def test_calls_fail_on_a_node_that_was_evicted_from_its_files(cluster: Cluster) -> None:
    writer = _writer(cluster, "writer")
    cluster.detach(3, "error")
    _write(writer)
    assert _said(writer) == "[Errno 5] Input/output error"
    assert cluster.exec(3, "ls", cluster.detachable, check=False).returncode == 2
    cluster.attach(3)
    assert "writer" in cluster.exec(3, "ls", cluster.detachable).stdout


def _writer(cluster: Cluster, name: str) -> subprocess.Popen[str]:
    file = cluster.detachable / name
    pipe = subprocess.PIPE
    writer = cluster.popen(3, sys.executable, "-c", WRITE, file, stdin=pipe, stdout=pipe)
    assert _said(writer) == "open"
    return writer


def _write(writer: subprocess.Popen[str]) -> None:
    print("write", file=writer.stdin, flush=True)


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip("\n")


def _waiting(cluster: Cluster) -> list[Process]:
    """Writers inside a system call on the file system."""
    writers = [each for each in cluster.processes(3) if "os.fsync" in each.cmdline]
    return [each for each in writers if "request_wait_answer" in Path(f"/proc/{each.pid}/wchan").read_text()]


def _server_sleeps(cluster: Cluster) -> bool:
    return [each.state for each in cluster.processes(3) if "sharedfs.py" in each.cmdline] == ["S"]


WRITE = """
import os, sys
with open(sys.argv[1], "wb", buffering=0) as file:
    print("open", flush=True)
    input()
    try:
        file.write(b"x" * 5000)
        os.fsync(file.fileno())
        print("done", flush=True)
    except OSError as error:
        print(error, flush=True)
"""


def test_jobs_run_on_while_slurmctld_is_away(cluster: Cluster) -> None:
    job = cluster.sbatch("-N1", f"--output={cluster.shared}/tick", "--wrap", "srun sh -c 'sleep 3; echo over'")
    until(lambda: [each for each in cluster.processes(1, USER) if each.name == "sleep"], "the task runs")
    cluster.ctld_stop()
    assert cluster.exec(0, "scontrol", "ping", check=False).returncode != 0
    until(lambda: "over" in (cluster.shared / "tick").read_text(), "the job goes on")
    cluster.ctld_start()
    assert cluster.wait_job(job, "COMPLETED")["ExitCode"] == "0:0"


def test_reset_ends_jobs_and_undoes_faults(cluster: Cluster) -> None:
    job = cluster.sbatch("-N4", "--wrap", "srun sleep 100")
    cluster.wait_job(job, "RUNNING")
    cluster.power_off(2)
    cluster.cut(3)
    cluster.detach(4)
    cluster.ctld_stop()
    cluster.reset()
    assert set(cluster.node_states().values()) == {"idle"}
    assert cluster.job_processes() == {}
    assert cluster.exec(0, "srun", "-N4", "ls", cluster.detachable, user=USER).returncode == 0


def test_gpus_and_two_clusters_at_once(cluster: Cluster, tmp_path: Path) -> None:
    with Cluster.start(tmp_path / "second", Size(nodes=1, gpus=4, kill_wait=7)) as second:
        shown = second.exec(0, "srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES", user=USER)
        assert shown.stdout == "0,1\n"
        assert "KillWait                = 7 sec" in second.exec(0, "scontrol", "show", "config").stdout
        assert len(cluster.node_states()) == 4
    assert set(cluster.node_states().values()) == {"idle"}


@pytest.mark.parametrize("end", ["stop", "exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left(end: str, tmp_path: Path) -> None:
    directory = tmp_path / "cluster"
    program = [sys.executable, "-c", TEST, str(directory), end]
    with subprocess.Popen(program, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout
        spaces = set(test.stdout.readline().split())
        assert len(spaces) == 3, "pid namespaces of the head and two nodes"
        running = _processes_in(spaces)
        assert len(running) > 15
        if end.startswith("SIG"):
            test.send_signal(signal.Signals[end])
        else:
            print("go on", file=test.stdin, flush=True)
    expected = {"stop": 0, "exception": 3, "SIGINT": 3, "SIGTERM": -15, "SIGKILL": -9}
    assert test.returncode == expected[end]
    if end in ("stop", "exception", "SIGINT"):
        assert not running & _all_processes()  # at once: `stop` waits for the last of them
    until(lambda: not running & _all_processes(), "everything is gone", timeout=30)
    _assert_no_trace(directory)


def _processes_in(spaces: set[str]) -> set[tuple[str, str]]:
    """Pid and start time: numbers of processes and of namespaces are used again, the pair is not."""
    return {each for each in _all_processes() if _pid_namespace(each[0]) in spaces}


def _pid_namespace(pid: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:  # it has just ended, or is none of ours
        return ""


def _all_processes() -> set[tuple[str, str]]:
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, *rest = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":  # dead; it is for whoever inherited it to reap
            found.add((path.name, rest[18]))
    return found


def _commands_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found.append((path / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [command for command in found if text in command]


def _assert_no_trace(directory: Path) -> None:
    """Namespaces end with their processes, unless something else holds them: a mount or a name."""
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert not [path for path in Path("/sys/class/net").iterdir() if path.name.startswith(("cable", "switch"))]
    assert not Path("/run/netns").exists() or not list(Path("/run/netns").glob("*node*"))


TEST = """
import sys
from pathlib import Path
from tests.cluster import Cluster, Size, until
try:
    with Cluster.start(Path(sys.argv[1]), Size(nodes=2)) as cluster:
        job = cluster.sbatch("-N2", "--wrap", "srun sh -c 'setsid sleep 1000 & trap : TERM; while :; do sleep 1; done'")
        cluster.wait_job(job, "RUNNING")
        until(lambda: len(cluster.job_processes()) == 2, "tasks run")
        cluster.detach(1, "stuck")
        cluster.popen(1, "ls", cluster.detachable)
        cluster.cut(2)
        inits = [machine.init for machine in cluster.machines.values()]
        print(*(Path(f"/proc/{init}/ns/pid").readlink() for init in inits), flush=True)
        input()
        if sys.argv[2] == "exception":
            raise RuntimeError("a test fails")
except (RuntimeError, KeyboardInterrupt):
    sys.exit(3)
"""


def test_a_cluster_that_cannot_boot_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "cluster"
    with pytest.raises(ClusterError, match="NoSuchKey"):
        Cluster.start(directory, Size(nodes=1, slurm_options=("NoSuchKey=1",)))
    assert _commands_with(str(directory)) == []
    _assert_no_trace(directory)


def test_the_user_and_the_addresses_exist_on_the_cluster_only(cluster: Cluster) -> None:
    assert USER not in Path("/etc/passwd").read_text()
    assert USER in cluster.exec(0, "id", USER).stdout
    assert cluster.exec(0, "hostname").stdout == "head\n"
    assert os.uname().nodename != "head"
    assert "10.77" not in subprocess.run(["ip", "address"], capture_output=True, text=True).stdout
