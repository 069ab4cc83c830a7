from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest

from hpcft.errors import UsageError
from hpcft.worker.spec import SPEC_VARIABLE, SpecError, WorkerSpec, hold_spec, take_spec

SPEC = {
    "run_id": "a", "run_dir": "/r/a", "name": "a", "node": "n1", "address": "10.0.0.1", "generation": 3, "term": 1,
    "nonce": "00ff", "rank": 2, "local_rank": 0, "world_size": 4, "local_world_size": 2, "node_rank": 1,
    "node_count": 2, "slot": 0, "master_addr": "10.0.0.2", "master_port": 4000, "store_prefix": "g3",
    "group_timeout": 30.0, "restore": {"step": 7, "directory": "/r/a/checkpoints/step-00000007-g0002"}, "seed": 5,
    "checkpoint": {"every_steps": 10}, "data": {"ledger": True, "workers": 2, "prefetch": 4},
    "train": {"steps": 9}, "program": {"module": "m"}, "args": [], "device": None,
}  # fmt: skip


def test_what_the_agent_says_is_understood() -> None:
    spec = WorkerSpec.parse(orjson.dumps({**SPEC, "page_fd": 8, "control_fd": 9, "unknown": 1}))
    assert (spec.rank, spec.world_size, spec.generation, spec.nonce) == (2, 4, 3, "00ff")
    assert (spec.run, spec.run_directory) == ("a", Path("/r/a"))
    assert spec.store == ("10.0.0.2", 4000)
    assert spec.restore is not None
    assert (spec.restore.step, spec.restore.directory.name) == (7, "step-00000007-g0002")
    assert (spec.save_every, spec.ledger, spec.train) == (10, True, {"steps": 9})
    assert not spec.alone


@pytest.mark.parametrize("broken", [{"rank": "x"}, {"restore": {}}, {"data": None}, {"page_fd": None}])
def test_a_specification_that_cannot_be_understood_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="cannot be understood"):
        WorkerSpec.parse(orjson.dumps({**SPEC, "page_fd": 8, "control_fd": 9, **broken}))
    with pytest.raises(SpecError):
        WorkerSpec.parse("{")


def test_descriptors_are_not_handed_to_the_programs_that_a_worker_starts() -> None:
    reading, writing = os.pipe()
    try:
        for descriptor in (reading, writing):
            os.set_inheritable(descriptor, True)
        text = orjson.dumps({**SPEC, "page_fd": reading, "control_fd": writing}).decode()
        environment = {SPEC_VARIABLE: text}
        assert take_spec(environment).control_fd == writing
        assert environment == {}, "nor is what they are told"
        assert not os.get_inheritable(reading) and not os.get_inheritable(writing)
    finally:
        os.close(reading)
        os.close(writing)


def test_what_is_held_is_taken_once_and_by_the_process_that_was_told() -> None:
    reading, writing = os.pipe()
    try:
        hold_spec({**SPEC, "page_fd": reading, "control_fd": writing})
        pid = os.fork()
        if pid == 0:
            os._exit(0 if take_spec({}).alone else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert take_spec({}).rank == 2
        assert take_spec({}).alone
    finally:
        os.close(reading)
        os.close(writing)


def test_alone_without_an_agent_but_not_under_another_launcher() -> None:
    assert take_spec({}).alone
    assert take_spec({"WORLD_SIZE": "1", "RANK": "0"}).alone
    with pytest.raises(UsageError, match="one of 8"):
        take_spec({"WORLD_SIZE": "8", "RANK": "0"})
