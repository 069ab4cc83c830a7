"""The worker side with real processes: what a checkpoint, a restart and another world may not change."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import numpy as np
import pytest

from hpcft.data.account import report as ledger_report
from hpcft.page import LET_GO, Order, Phase, now_ns
from tests.e2e.worlds import SMALL, Life

pytestmark = pytest.mark.local


def weights(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def same_bits(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_run_with_failures_ends_with_the_bits_of_one_without(tmp_path: Path) -> None:
    smooth = Life.begin(tmp_path / "smooth")
    with smooth.world(4, steps=20, out=str(tmp_path / "smooth.npz")) as world:
        assert world.finish() == [0, 0, 0, 0], world.output()
        assert [message["step"] for message in world.messages("returned")] == [20] * 4
        assert {message["step"] for message in world.messages("shard")} == {20}  # the final one

    rough = Life.begin(tmp_path / "rough")
    with rough.world(4, every=7, at=[[9, 2, "die"]]) as world:
        at_7 = rough.commit(world, 7)
        assert world.finish()[2] == -9
        causes = world.messages("exception")
        assert {message["rank"] for message in causes} == {0, 1, 3}
        assert all(message["collective"] for message in causes), causes
    at = at_7
    for step in (10, 13):  # the program evaluates after step 10: only the undisturbed run goes on from there
        with rough.world(4, restore=at, workers=1, at=[[step - 1, None, f"wait {tmp_path}/go-{step}"]]) as world:
            world.page.order_word = Order(step, stop_after_save=True).word
            (tmp_path / f"go-{step}").touch()
            at = rough.commit(world, step)
            world.page.order_word = LET_GO.word
            assert world.finish() == [115] * 4, world.output()
    at_13 = at
    with rough.world(4, restore=at_13, steps=20, out=str(tmp_path / "rough.npz")) as world:
        assert world.finish() == [0, 0, 0, 0], world.output()

    assert same_bits(tmp_path / "smooth.npz", tmp_path / "rough.npz")
    for life in (smooth, rough):
        account = ledger_report(life.directory.path)
        assert account.exact, account
        assert account.last_step == 20


@pytest.mark.parametrize(
    "ddp", [{"static_graph": True}, {"find_unused_parameters": True}], ids=lambda ddp: "".join(ddp)
)
def test_the_bits_are_kept_in_every_mode_of_ddp(tmp_path: Path, ddp: dict[str, bool]) -> None:
    smooth, rough = Life.begin(tmp_path / "smooth"), Life.begin(tmp_path / "rough")
    with smooth.world(4, steps=9, ddp=ddp, out=str(tmp_path / "smooth.npz")) as world:
        assert world.finish() == [0, 0, 0, 0], world.output()
    with rough.world(4, steps=4, ddp=ddp) as world:
        at_4 = rough.commit(world, 4)
        assert world.finish() == [0, 0, 0, 0], world.output()
    with rough.world(4, steps=9, restore=at_4, ddp=ddp, out=str(tmp_path / "rough.npz")) as world:
        assert world.finish() == [0, 0, 0, 0], world.output()
    assert same_bits(tmp_path / "smooth.npz", tmp_path / "rough.npz")


def test_a_world_that_changes_in_mid_epoch_computes_what_one_process_does(tmp_path: Path) -> None:
    common = {"kind": "plain", "samples": 100, "steps": 12}  # batches of 22, 22, 22, 22, 12
    alone = Life.begin(tmp_path / "alone")
    with alone.world(1, out=str(tmp_path / "alone.npz"), **common) as world:
        assert world.finish() == [0], world.output()

    life = Life.begin(tmp_path / "many")
    go = tmp_path / "go"
    with life.world(4, at=[[6, None, f"wait {go}"]], **common) as world:
        world.page.order_word = Order(7, stop_after_save=True).word
        go.touch()
        at_7 = life.commit(world, 7)
        world.page.order_word = LET_GO.word
        assert world.finish() == [115] * 4
    with life.world(3, restore=at_7, micro=3, out=str(tmp_path / "many.npz"), **common) as world:
        assert world.finish() == [0, 0, 0], world.output()
        samples = [world.page.slot(rank).read().samples for rank in range(3)]
        assert sum(s or 0 for s in samples) == 22  # of the last step, over all passes

    one, many = weights(tmp_path / "alone.npz"), weights(tmp_path / "many.npz")
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-9, atol=1e-12, err_msg=name)
    account = ledger_report(life.directory.path)
    assert account.exact, account
    assert [(g.world_size, g.steps) for g in account.generations] == [(4, 7), (3, 5)]


def test_a_damaged_checkpoint_is_told_and_not_loaded(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    with life.world(2, steps=3) as world:
        at_3 = life.commit(world, 3)
        assert world.finish() == [0, 0]
    shard = at_3 / "shard-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content)
    with life.world(2, restore=at_3, steps=5) as world:
        assert world.finish() == [114, 114]
        damaged = world.messages("damaged")
        assert {message["rank"] for message in damaged} == {0, 1}
        assert damaged[0]["directory"] == str(at_3)
        assert "shard-00001-of-00002.safetensors, chunk 0" in damaged[0]["detail"]
        assert not world.messages("ready")
        assert not world.messages("exception")
    at_3.rename(at_3.with_name("moved"))
    with life.world(2, restore=at_3, steps=5) as world:
        assert world.finish() == [114, 114]
        assert "there is no checkpoint" in world.messages("damaged")[0]["detail"]


def test_a_checkpoint_that_a_node_cannot_read_is_not_called_damaged(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    with life.world(1, steps=3) as world:
        at_3 = life.commit(world, 3)
        assert world.finish() == [0]
    (at_3 / "manifest.json").unlink()
    (at_3 / "manifest.json").symlink_to("/proc/self/mem")  # whose first page cannot be read: EIO
    with life.world(1, restore=at_3, steps=5) as world:
        assert world.finish() == [116]
        (message,) = world.messages("unreadable")
        assert "manifest.json cannot be read: Input/output error" in message["detail"]
        assert not world.messages("damaged") and not world.messages("exception")


def test_a_save_that_fails_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    full, room = [1, 1, "limit 20000"], [9, 1, f"limit {2**40}"]
    with life.world(2, every=4, steps=12, at=[full, room]) as world:
        last = life.commit(world, 12)
        assert world.finish() == [0, 0], world.output()
        failed = world.messages("save_failed")
        assert [(message["rank"], message["step"]) for message in failed] == [(1, 4), (1, 8)]
        assert "File too large" in failed[0]["reason"]
    assert last.name == "step-00000012-g0001"

    with life.world(2, every=2, steps=6, at=[[1, None, f"wait {tmp_path}/gone"]]) as world:
        world.until(lambda: world.step() >= 1, "the first step")
        life.directory.checkpoints.rename(tmp_path / "elsewhere")
        (tmp_path / "gone").touch()
        assert world.finish() == [0, 0], world.output()
        assert len(world.messages("save_failed")) == 6
        assert "No such file" in world.messages("save_failed")[0]["reason"]
        assert len(world.messages("returned")) == 2


def test_no_step_starts_after_the_lease_has_run_out(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    with life.world(2, at=[[5, None, f"wait {tmp_path}/go"]]) as world:
        world.page.lease_until_ns = now_ns() + 3_600_000_000_000
        world.until(lambda: world.step() == 5, "step 5")
        world.page.lease_until_ns = now_ns() - 1_000_000
        (tmp_path / "go").touch()
        assert world.finish() == [113, 113]
        readings = [world.page.slot(rank).read() for rank in range(2)]
        assert [(reading.step, reading.updating) for reading in readings] == [(5, False)] * 2
        assert "stopped before step 6: the lease of this node ran out" in world.output()
        assert not world.messages("exception")


def test_the_page_says_what_a_worker_does(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    with life.world(
        2, steps=4, at=[["restored", None, f"wait {tmp_path}/a"], [3, None, f"wait {tmp_path}/b"]]
    ) as world:
        world.until(lambda: len(world.messages("ready")) == 2, "readiness")
        assert world.step() == 0
        world.page.order_word = Order(2, stop_after_save=False).word
        (tmp_path / "a").touch()
        at_2 = life.commit(world, 2)
        assert at_2.name == "step-00000002-g0001"
        world.until(lambda: world.step() == 3, "step 3")
        reading = world.page.slot(1).read()
        assert reading.phase is Phase.TRAIN
        assert reading.loss is not None and reading.loss > 0
        assert (reading.samples, reading.tokens) == (11, 11)
        # Too late: the step is over.
        world.page.order_word = Order(3, stop_after_save=True).word
        (tmp_path / "b").touch()
        assert world.finish() == [0, 0], world.output()
        assert world.page.slot(1).read().phase is Phase.DONE
        assert {message["step"] for message in world.messages("shard")} == {2, 4}


def test_an_order_that_is_too_late_for_one_rank_costs_nothing(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    go = tmp_path / "go"
    with life.world(3, at=[["update 3", 0, f"wait {go}"]]) as world:
        slots = [world.page.slot(rank) for rank in range(3)]
        world.until(lambda: [slot.step for slot in slots] == [2, 3, 3], "a rank that is behind")
        world.page.order_word = Order(3, stop_after_save=True).word
        go.touch()
        world.until(lambda: slots[0].read().phase is Phase.CHECKPOINT, "the one rank that has read it in time")
        time.sleep(0.5)
        assert [slot.step for slot in slots] == [3, 3, 3], "nobody has gone on"
        assert not world.messages("exception")
        world.page.order_word = Order(5, stop_after_save=True).word
        assert life.commit(world, 5).name == "step-00000005-g0001"
        world.page.order_word = LET_GO.word
        assert world.finish() == [115] * 3, world.output()
        assert not world.messages("exception")


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("due", ["every_steps", "copy_steps"])
def test_an_order_for_a_step_that_is_due_anyway_may_come_too_late_for_some(
    tmp_path: Path, due: str, stop: bool
) -> None:
    """Those who have not heard of it ask whether all have room; who has heard must answer, and they save with it."""
    life = Life.begin(tmp_path / "run")
    go = tmp_path / "go"
    checkpoint = {"copies": True, due: 3}
    with life.world(3, checkpoint=checkpoint, steps=6, at=[["update 3", 0, f"wait {go}"]]) as world:
        slots = [world.page.slot(rank) for rank in range(3)]
        world.until(
            lambda: [slot.read().phase for slot in slots[1:]] == [Phase.CHECKPOINT] * 2, "two ranks that ask the third"
        )
        assert [slot.step for slot in slots] == [2, 3, 3]
        world.page.order_word = Order(3, stop_after_save=stop).word
        go.touch()
        assert life.commit(world, 3).name == "step-00000003-g0001"
        if stop:
            world.page.order_word = Order(5, stop_after_save=True).word
            assert life.commit(world, 5).name == "step-00000005-g0001"
            world.page.order_word = LET_GO.word
        assert world.finish() == [115 if stop else 0] * 3, world.output()
        assert not world.messages("exception")


def test_the_users_own_exception_is_told_from_its_echo(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    with life.world(3, at=[[3, 1, "swallow raise"], [6, 1, "raise"]]) as world:
        assert world.finish() == [1, 1, 1]
        by_rank = {message["rank"]: message for message in world.messages("exception")}
    assert (by_rank[1]["type"], by_rank[1]["message"]) == ("ArithmeticError", "wrong at step 6")
    assert (by_rank[1]["step"], by_rank[1]["collective"]) == (6, False)
    assert by_rank[1]["where"].startswith(str(SMALL))
    assert "raise ArithmeticError" in by_rank[1]["traceback"]
    assert "worker/run.py" not in by_rank[1]["traceback"]
    assert by_rank[0]["collective"] and by_rank[2]["collective"]
    assert by_rank[0]["where"].startswith(str(SMALL))  # the line that waited
    assert "ArithmeticError: wrong at step 6" in world.logs[1].read_text()


def test_leaving_with_a_status_is_a_failure(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    with life.world(1, at=[[2, 0, "exit"]]) as world:
        assert world.finish() == [1]
        (message,) = world.messages("exception")
        assert (message["type"], message["message"], message["collective"]) == ("SystemExit", "3", False)


def test_a_second_main_is_called_by_its_name(tmp_path: Path) -> None:
    program = tmp_path / "twice.py"
    program.write_text(
        "import os, hpcft\n"
        "os.environ['WORLD_SIZE'] = '2'  # as an agent says to a plain command\n"
        "hpcft.main(lambda run: print('trained'))\n"
        "hpcft.main(lambda run: print('trained again'))\n"
    )
    with Life.begin(tmp_path / "run").world(1, program=program) as world:
        assert world.finish() == [1]
        said = world.logs[0].read_text()
    assert "\ntrained again" not in said
    assert "UsageError: hpcft.main was called twice" in said, said


def test_waiting_in_vain_is_no_bug_of_the_user(tmp_path: Path) -> None:
    life = Life.begin(tmp_path / "run")
    with life.world(2, timeout=6.0, at=[[2, 1, "sleep"]]) as world:  # a peer that is stuck
        world.until(lambda: world.messages("exception"), "a time-out")
        assert all(message["rank"] == 0 and message["collective"] for message in world.messages("exception"))
    with life.world(2, timeout=2.0, absent=1) as world:  # a peer that never came
        assert world.finish() == [1]
        assert world.messages("exception")[0]["collective"], world.output()
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = server.getsockname()[1]
    with life.world(1, timeout=2.0, store_port=nobody) as world:  # no store
        assert world.finish() == [1]
        assert world.messages("exception")[0]["collective"], world.output()
