"""A local cluster: N nodes on this machine, each a keeper with its agent, pool and workers, on loopback.

`hpcft run` goes through the same code as a job under Slurm, with 127.0.0.1, 127.0.0.2 … as the nodes' addresses. This
process plays Slurm's part: it starts the agents, passes signals on, starts them again after a verdict of "requeued",
and ends with the run's exit code. What it shows is read from the run directory, as `hpcft status` does.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from hpcft import durable, process, status, terms, verdicts
from hpcft.checkpoint import read as checkpoint_read
from hpcft.config import Config
from hpcft.errors import BelowMinimumError, ExitCode, UnusableError
from hpcft.events import Outcome, Verdict
from hpcft.ids import Step
from hpcft.membership import Timing
from hpcft.progress import Reporter
from hpcft.rundir import RunDirectory, is_live
from hpcft.units import human_duration

_LOOK_SECONDS = 0.2
_KILL_SECONDS = 15.0
_LAST_LINES = 15
_SILENCE_SECONDS = 30.0
"""So long nothing is said when a start begins; then, where to look. A module to preload may take its time."""
_WAIT_SECONDS = 5.0
"""After so long without a leader it is said if an earlier start is the reason."""
_REWRITTEN_SECONDS = 5.0
"""A leader rewrites its status about once a second: one that stands still for so long was left by a killed start."""
_ENDING = re.compile(r"agent ends with code \d+: (.*)| E hpcft\.\w+: (.*)|^error: (.*)")


@dataclass(slots=True)
class _Start:
    """One start of the run: what Slurm would call one run of the job."""

    number: int
    name: str
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)


def run_local(
    config: Config,
    config_file: Path,
    *,
    nodes: int,
    workers: int,
    sets: Sequence[str] = (),
    from_step: int | None = None,
    report: Callable[[str], None] = print,
) -> int:
    """Train on a cluster of `nodes` x `workers` on this machine; returns the run's exit code.

    Raises:
        HpcftError: the run cannot be started: too few nodes, no checkpoint of `from_step`, no run directory.
        UnusableError: the run is being trained already, or the agents ended without a verdict; then the message has
            their last lines.
    """
    directory = RunDirectory((config.run.root / config.run.name).resolve())
    if nodes < config.nodes.min:
        raise BelowMinimumError(
            f"nodes.min asks for {config.nodes.min} nodes, the local cluster is to have {nodes}",
            "raise --nodes (or local.nodes) or lower nodes.min",
        )
    if from_step is not None:
        checkpoint_read.of_step(directory.checkpoints, Step(from_step))
    elif directory.finished.exists():
        report(_finished_already(directory))
        return ExitCode.OK
    if _is_trained(directory):
        raise UnusableError(
            f"the run {directory.name} is being trained already: two starts of one run would be in each other's way",
            f"hpcft status {_reference(directory)} shows it, hpcft stop {_reference(directory)} ends it",
        )
    process.become_subreaper()
    directory.prepare()
    launcher = _Launcher(config, config_file, directory, nodes, workers, sets, from_step, report)
    return launcher.run()


def _reference(directory: RunDirectory) -> str:
    """How the run is named on the command line: by its name, where commands look for runs."""
    root = Path(os.environ.get("HPCFT_RUN__ROOT") or "runs")
    return directory.name if (root / directory.name).resolve() == directory.path else str(directory.path)


def _own_command() -> str:
    """What starts this hpcft once more: it need not be on PATH."""
    if shutil.which("hpcft") is not None:
        return "hpcft"
    own = Path(sys.argv[0])
    return str(own) if own.name == "hpcft" else f"{sys.executable} -m hpcft"


def _finished_already(directory: RunDirectory) -> str:
    step = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        step = orjson.loads(directory.finished.read_bytes())["step"]
    at = f", at step {step}" if step else ""  # of a plain command's steps nothing is known
    return (
        f"{directory.name} has finished already{at}; --from STEP goes on from a checkpoint, "
        "another run.name starts afresh"
    )


def _is_trained(directory: RunDirectory) -> bool:
    """Whether a leader is at work. A status that is fresh may also be the last one of a start that was killed."""
    if not is_live(directory):
        return False
    try:
        before = directory.status.stat().st_mtime_ns
        until = time.monotonic() + _REWRITTEN_SECONDS
        while time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            if directory.status.stat().st_mtime_ns != before:
                return is_live(directory)  # not if that was its end
    except OSError:
        return False  # nothing can be said; the agents find out by the terms
    return False


class _Launcher:
    def __init__(
        self,
        config: Config,
        config_file: Path,
        directory: RunDirectory,
        nodes: int,
        workers: int,
        sets: Sequence[str],
        from_step: int | None,
        report: Callable[[str], None],
    ) -> None:
        self._config = config
        self._config_file = config_file
        self._directory = directory
        self._count = nodes
        self._workers = workers
        self._sets = [argument for each in sets for argument in ("--set", each)]
        self._from_step = from_step
        self._say = report
        self._job = (
            f"local{os.getpid()}-{secrets.token_hex(4)}"  # pids repeat, and an old start's verdict would be obeyed
        )
        self._interrupts = 0
        self._drilled = config.drill.kill_rank < 0
        self._log_size = 0
        """Of the first node's log when this start began: what is before it was said by others."""

    def run(self) -> int:
        before = {number: signal.signal(number, self._interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            number = 0
            while True:
                verdict = self._one_start(number)
                if verdict.outcome is not Outcome.REQUEUED or self._interrupts:
                    self._say_what_next(verdict)
                    return verdict.exit_code
                self._say(f"requeued: {verdict.reason}")
                number += 1
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say_what_next(self, verdict: Verdict) -> None:
        trains = self._config.job.command is None
        if verdict.outcome is Outcome.FINISHED:
            looks = [
                "status",
                *(["ledger"] if self._config.data.ledger else []),
                *(["ckpt verify --run"] if trains else []),
            ]
            command, run = _own_command(), _reference(self._directory)
            self._say(f"look at it: {', '.join(f'{command} {look} {run}' for look in looks)}")
        elif verdict.outcome is Outcome.CANCELLED and trains and status.read(self._directory).get("checkpoints"):
            # with --from it would leave behind what it has just trained
            same = "the same command" + (" without --from" if self._from_step is not None else "")
            self._say(f"{same} goes on from the newest checkpoint")
        elif verdict.outcome is Outcome.FAILED:
            command, run = _own_command(), _reference(self._directory)
            self._say(f"look at it: {command} status {run}, {command} logs {run}")

    def _one_start(self, number: int) -> Verdict:
        start = _Start(number, f"{self._job}.{number}")
        reporter = Reporter(self._say, counts_steps=self._config.job.command is None)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._log_size = self._log().stat().st_size
            for index in range(self._count):
                start.nodes.append(self._boot(start, index))
            waits_at = time.monotonic() + _WAIT_SECONDS
            speaks_at = time.monotonic() + _SILENCE_SECONDS
            while True:
                snapshot = status.read(self._directory)
                if snapshot.get("allocation") == start.name:
                    speaks_at = waits_at = math.inf
                    reporter.see(snapshot)
                    self._drill(snapshot)
                elif time.monotonic() > waits_at:
                    waits_at = math.inf
                    if self._may_be_led(start):
                        longest = self._longest_wait()
                        speaks_at += longest
                        self._say(
                            f"waiting, for up to {human_duration(longest)}: another start of {self._directory.name} "
                            "has not let go of it; it was killed, or has just begun"
                        )
                elif time.monotonic() > speaks_at:
                    speaks_at = math.inf
                    self._say(f"no node leads yet; what node1 does is in {self._log()}")
                verdict = verdicts.read(self._directory, start.name)
                if verdict is not None or all(node.poll() is not None for node in start.nodes):
                    break
                time.sleep(_LOOK_SECONDS)
            self._await(start)
            verdict = verdict or verdicts.read(self._directory, start.name)
        finally:
            survivors = self._end(start)
        if verdict is None and self._interrupts:
            verdict = Verdict(Outcome.CANCELLED, int(ExitCode.CANCELLED), "interrupted, without a last checkpoint")
            if not survivors:
                self._record(start, verdict)
        snapshot = status.read(self._directory)
        if snapshot.get("allocation") == start.name:
            reporter.see(snapshot)
        elif verdict is not None:
            self._say(f"{verdict.outcome}  {verdict.reason}")
        return verdict or self._without_verdict(start)

    def _record(self, start: _Start, verdict: Verdict) -> None:
        """What the leader had no time for. Every process of this start is gone, so nobody can say otherwise, and the
        next start need not wait for its leader."""
        run = self._directory
        try:
            holder = terms.newest(run.terms)
            if holder is None or holder.allocation != start.name:
                return
            known = orjson.loads(run.status.read_bytes())
            if known["allocation"] == start.name:
                said = {"outcome": verdict.outcome, "exit_code": verdict.exit_code, "reason": verdict.reason}
                ended = {"state": verdict.outcome, "reason": verdict.reason, "verdict": said}
                verdicts.write(run, start.name, verdict, Step(known["step"]))
                durable.replace(run.status, orjson.dumps({**known, **ended}))
            sign = terms.lease(run.terms, holder.term)
            terms.renew(run.terms, holder.term, terms.TermLease(sign.count + 1, released=True))
        except (OSError, ValueError, KeyError) as error:
            self._say(
                f"the end of this start could not be recorded, and the next one has to wait for its lease: {error}"
            )

    def _holder(self) -> terms.TermRecord | None:
        """Of the newest term, which may be another start's."""
        try:
            return terms.newest(self._directory.terms)
        except (OSError, ValueError):
            return None

    def _may_be_led(self, start: _Start) -> bool:
        """Whether the agents wait for an earlier start's leader, which has not let go."""
        holder = self._holder()
        if holder is None or holder.allocation == start.name:
            return False
        try:
            return not terms.lease(self._directory.terms, holder.term).released
        except (OSError, ValueError):
            return False

    def _longest_wait(self) -> float:
        """Until an agent of another start may claim the next term (`membership.may_claim`)."""
        beat = self._config.heartbeat
        timing = Timing(beat.interval, beat.suspect, beat.timeout)
        return timing.patience + timing.timeout

    def _boot(self, start: _Start, index: int) -> subprocess.Popen[bytes]:
        names = [f"node{number}" for number in range(1, self._count + 1)]
        logs = self._directory.path / "logs" / names[index]
        logs.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "HPCFT_LOCAL_NODE": names[index],
            "HPCFT_LOCAL_NODES": ",".join(names),
            "HPCFT_LOCAL_ADDRESS": f"127.0.0.{index + 1}",
            "HPCFT_LOCAL_JOB": self._job,
            "HPCFT_LOCAL_RESTARTS": str(start.number),
        }
        command = [sys.executable, "-P", "-m", "hpcft", "agent", str(self._config_file)]
        command += [*self._sets, "--set", f"nodes.workers_per_node={self._workers}"]
        command += ["--set", f"run.root={self._config.run.root}"]
        if self._from_step is not None:  # applied once for each job
            command += ["--from", str(self._from_step)]
        with (logs / "keeper.log").open("ab") as output:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def _interrupted(self, number: int, frame: object) -> None:
        del frame
        self._interrupts += 1
        holder, name = self._holder(), signal.Signals(number).name
        leads = holder is not None and holder.allocation.rpartition(".")[0] == self._job
        if self._interrupts == 1:
            what = "stopping after a last checkpoint; once more kills" if leads else "nothing trains yet: ending"
            self._say(f"{name}: {what}")
        for pid in process.children(os.getpid()):
            process.send(pid, signal.SIGTERM if self._interrupts == 1 and leads else signal.SIGKILL)

    def _drill(self, snapshot: Mapping[str, Any]) -> None:
        """The announced failure of a demonstration: SIGKILL to one worker of this run."""
        drill = self._config.drill
        if self._drilled or snapshot["state"] != "training" or snapshot["step"] < drill.at_step:
            return
        victim = next((each for each in snapshot["workers"] if each["rank"] == drill.kill_rank), None)
        if victim is None or victim["pid"] not in process.descendants(os.getpid()):
            return
        self._drilled = True
        self._say(
            f"drill: SIGKILL to rank {victim['rank']} (pid {victim['pid']} on {victim['node']}) "
            f"at step {snapshot['step']}, as drill.kill_rank asks for"
        )
        process.send(victim["pid"], signal.SIGKILL)

    def _await(self, start: _Start) -> None:
        """The agents end by themselves after the verdict."""
        until = time.monotonic() + _KILL_SECONDS
        for node in start.nodes:
            try:
                node.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                return

    def _end(self, start: _Start) -> list[int]:
        """Nothing of this start outlives it, but for processes that cannot be killed; returns those."""
        for node in start.nodes:
            if node.poll() is None:
                node.terminate()
        survivors = process.end_descendants(_KILL_SECONDS)
        if survivors:
            self._say(f"processes that do not end (uninterruptible sleep): {survivors}")
        for node in start.nodes:
            node.poll()
        return survivors

    def _without_verdict(self, start: _Start) -> Verdict:
        codes = sorted({node.returncode for node in start.nodes})
        if codes == [0]:
            return Verdict(Outcome.FINISHED, int(ExitCode.OK), "the run has finished already")
        log = self._log()
        with log.open("rb") as file:
            file.seek(self._log_size)
            lines = file.read().decode(errors="replace").splitlines()
        reasons = [next(filter(None, found.groups()), "") for line in lines if (found := _ENDING.search(line))]
        why = f": {reasons[-1]}" if reasons else ""
        last = "\n".join(lines[-_LAST_LINES:]) or "(none)"
        raise UnusableError(
            f"the agents ended without a verdict{why} (exit codes {codes}); last lines of {log}:\n{last}",
            "`hpcft doctor CONFIG` checks what a run needs",
        )

    def _log(self) -> Path:
        return self._directory.path / "logs" / "node1" / "keeper.log"
