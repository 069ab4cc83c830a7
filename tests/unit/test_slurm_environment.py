"""The allocation, from variables as Slurm 22.05 sets them in a step, and as the local launcher does."""

from __future__ import annotations

import socket

import pytest

from hpcft.errors import UnusableError, UsageError
from hpcft.slurm.environment import Allocation, from_environment, own_address

STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[08-11]",
    "SLURM_STEP_NODELIST": "node[08-11]",
    "SLURMD_NODENAME": "node10",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NAME": "hpcft",
    "CUDA_VISIBLE_DEVICES": "2,3",
    "SLURM_JOB_GPUS": "6,7",
}


def test_a_step_of_a_first_start() -> None:
    allocation = from_environment(STEP)
    assert allocation.kind == "slurm"
    assert (allocation.job_id, allocation.requeue_target, allocation.restart_count) == ("17", "17", 0)
    assert allocation.nodes == ("node08", "node09", "node10", "node11")
    assert (allocation.node, allocation.node_index) == ("node10", 2)
    assert allocation.gpus == ("2", "3"), "relative to the cgroup, not the global ids"
    assert allocation.start == "17.0"


def test_a_later_start_of_a_task_of_an_array() -> None:
    more = {"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    allocation = from_environment({**STEP, **more, "SLURM_JOB_END_TIME": "1795261181"})
    assert allocation.requeue_target == "15_3", "the bare id would requeue the whole array"
    assert allocation.start == "17.2"


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, ()),
        ("", ()),
        ("NoDevFiles", ()),
        ("0", ("0",)),
        ("3,1,2", ("3", "1", "2")),
        ("GPU-8932f937,GPU-11aa", ("GPU-8932f937", "GPU-11aa")),
    ],
)
def test_gpus_are_the_visible_devices_by_position(visible: str | None, gpus: tuple[str, ...]) -> None:
    environ = {name: value for name, value in STEP.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    assert from_environment(environ).gpus == gpus


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_a_job_is_said_with_the_way_in(missing: str) -> None:
    with pytest.raises(UsageError, match=f"not inside a Slurm job: {missing} is not set") as caught:
        from_environment({name: value for name, value in STEP.items() if name != missing})
    assert "hpcft run" in caught.value.hint


def test_a_node_outside_its_own_list() -> None:
    with pytest.raises(UsageError, match=r"calls itself login1, which is not in the job's node list node\[08-11\]"):
        from_environment({**STEP, "SLURMD_NODENAME": "login1"})


def test_a_local_cluster_gives_the_same() -> None:
    variables = {
        "HPCFT_LOCAL_NODE": "node2",
        "HPCFT_LOCAL_NODES": "node1,node2",
        "HPCFT_LOCAL_ADDRESS": "127.0.0.2",
        "HPCFT_LOCAL_JOB": "local-1",
        "HPCFT_LOCAL_RESTARTS": "1",
    }
    allocation = from_environment({**STEP, **variables})
    assert allocation.kind == "local", "also when started inside a Slurm job"
    assert (allocation.nodes, allocation.node_index) == (("node1", "node2"), 1)
    assert allocation.start == "local-1.1"
    assert own_address(allocation) == "127.0.0.2"


def named(node: str, *others: str) -> Allocation:
    return Allocation("slurm", "17", 0, node, (node, *others), None)


def test_the_address_of_a_single_node_may_be_loopback() -> None:
    assert own_address(named("localhost")) == "127.0.0.1"


def test_an_unknown_name_has_no_address() -> None:
    with pytest.raises(UnusableError, match=r"node no-such-node\.invalid has no address") as caught:
        own_address(named("no-such-node.invalid"))
    assert "/etc/hosts" in caught.value.hint


def test_an_address_that_others_do_not_reach_is_refused() -> None:
    assert socket.gethostbyname("localhost") == "127.0.0.1"
    with pytest.raises(UnusableError, match=r"localhost, means 127\.0\.0\.1 here, where other nodes do not reach it"):
        own_address(named("localhost", "127.0.0.2"))
