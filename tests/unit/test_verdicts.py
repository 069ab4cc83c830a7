"""`hpcft wait`, which must outlast a run directory that cannot be read for a while."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from hpcft import verdicts
from hpcft.events import Outcome
from hpcft.rundir import RunDirectory

VERDICT = orjson.dumps({"outcome": "finished", "exit_code": 0, "reason": "all ranks returned"})


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    return run


@pytest.mark.parametrize("kind", ["directory", "loop", "torn"])
def test_a_verdict_that_cannot_be_read_is_looked_for_again(
    run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    path = run.verdict("7.0")
    match kind:
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "torn":
            path.write_bytes(VERDICT[:10])
    whole = tmp_path / "whole"
    whole.write_bytes(VERDICT)
    srun = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})

    def mend() -> None:
        time.sleep(3 * verdicts._LOOK_SECONDS)  # several looks, one message
        if kind == "directory":
            path.rmdir()
        whole.replace(path)
        os.kill(srun, signal.SIGTERM)

    mending = threading.Thread(target=mend)
    mending.start()
    verdict = verdicts.wait(run, "7.0", srun)
    mending.join()
    assert verdict.outcome is Outcome.FINISHED
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(path) in lines[0]


def test_the_mark_of_a_finished_run_may_come_after_the_end_of_srun(run: RunDirectory) -> None:
    run.finished.symlink_to(run.finished.name)  # ELOOP
    whole = run.path / "whole"
    whole.write_bytes(VERDICT)
    timer = threading.Timer(1.0, lambda: whole.replace(run.finished))
    timer.start()
    srun = os.posix_spawn("/bin/true", ["true"], {})
    assert verdicts.wait(run, "7.0", srun).outcome is Outcome.FINISHED
    timer.join()
