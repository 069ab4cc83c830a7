"""The shared page: what readers see while, and after, somebody writes."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from hpcft.page import MAGIC, NodePage, Order, PageError, Phase, Slot, now_ns


@pytest.fixture
def page() -> Iterator[NodePage]:
    page = NodePage.create(3)
    yield page
    page.close()


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def test_a_new_page_knows_nothing_and_forbids_nothing(page: NodePage) -> None:
    assert page.lease_left() == math.inf
    assert Order.from_word(page.order_word) is None
    progress = page.slot(2).read()
    assert (progress.phase, progress.step, progress.loss, progress.ended) == (Phase.EMPTY, 0, None, None)


def test_what_one_mapping_writes_another_reads(page: NodePage) -> None:
    other = NodePage.attach(os.dup(page.fd))
    slot = page.slot(1)
    before = now_ns() / 1e9
    slot.set_phase(Phase.TRAIN)
    slot.begin_update()
    slot.end_update(7, 2.5, 64, 4096)
    page.order_word = Order(12, True).word
    progress = other.slot(1).read()
    assert (progress.step, progress.updating, progress.phase) == (7, False, Phase.TRAIN)
    assert (progress.loss, progress.samples, progress.tokens) == (2.5, 64, 4096)
    assert Order.from_word(other.order_word) == Order(12, stop_after_save=True)
    assert progress.ended is not None
    assert before - 0.001 <= progress.phase_since <= progress.ended <= now_ns() / 1e9
    assert other.slot(0).read().phase is Phase.EMPTY, "slots must not touch each other"
    assert other.slot(2).read().phase is Phase.EMPTY
    other.close()


def test_an_update_that_was_not_finished_is_seen_after_the_writers_death(page: NodePage) -> None:
    slot = page.slot(0)

    def work() -> None:
        slot.end_update(4, 1.0, 8, 8)
        slot.begin_update()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = in_child(work)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    progress = slot.read()
    assert (progress.step, progress.updating) == (4, True)
    assert (progress.loss, progress.samples) == (1.0, 8), "the figures of the finished step are still there"


def test_a_restored_step_has_no_figures_of_its_own(page: NodePage) -> None:
    slot = page.slot(0)
    for step in (9, 10):
        slot.end_update(step, 1.0, 8, 8)
    slot.set_step(7)
    progress = slot.read()
    assert (progress.step, progress.loss, progress.samples, progress.ended) == (7, None, None, None)


def test_a_loss_of_nan_reads_as_unknown_while_the_rest_is_known(page: NodePage) -> None:
    page.slot(0).end_update(1, math.nan, 8, 9)
    progress = page.slot(0).read()
    assert (progress.loss, progress.samples, progress.tokens) == (None, 8, 9)


def test_a_reader_never_sees_figures_of_two_steps_mixed(page: NodePage) -> None:
    slot = page.slot(0)

    def work() -> None:
        step = 0
        while True:
            step += 1
            slot.begin_update()
            slot.end_update(step, float(step), 3 * step, 5 * step)

    pid = in_child(work)
    try:
        known = 0
        last = 0
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            progress = slot.read()
            assert progress.step >= last
            last = progress.step
            if progress.loss is not None:
                known += 1
                step = int(progress.loss)
                assert (progress.samples, progress.tokens) == (3 * step, 5 * step)
                assert step == progress.step
        assert last > 1000
        assert known > 1000
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_figure_that_does_not_match_its_check_is_unknown(page: NodePage) -> None:
    slot = page.slot(0)
    slot.end_update(5, 1.0, 8, 9)
    page._words[16 + 4 + 6 + 2] = 1234  # samples of bank 1, as after stores seen out of order
    progress = slot.read()
    assert (progress.step, progress.loss, progress.samples, progress.tokens) == (5, None, None, None)


def test_the_lease_runs_out(page: NodePage) -> None:
    page.lease_until_ns = now_ns() + 50_000_000
    assert 0 < page.lease_left() <= 0.05
    page.lease_until_ns = now_ns() - 1
    assert page.lease_left() < 0
    page.lease_until_ns = 0
    assert page.lease_left() == math.inf


def test_a_cleared_slot_is_empty(page: NodePage) -> None:
    page.slot(1).set_phase(Phase.TRAIN)
    page.slot(1).end_update(3, 1.0, 1, 1)
    page.clear_slot(1)
    assert page.slot(1).read().phase is Phase.EMPTY
    assert page.slot(1).step == 0


@pytest.mark.parametrize("index", [-1, 3])
def test_a_slot_that_does_not_exist_is_refused(page: NodePage, index: int) -> None:
    with pytest.raises(IndexError, match="of a page of 3"):
        page.slot(index)


def test_nobody_can_cut_the_page_off_under_the_others(page: NodePage) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(page.fd, 0)


def test_something_else_is_not_taken_for_a_page() -> None:
    fd = os.memfd_create("other")
    try:
        with pytest.raises(PageError, match="not a page"):
            NodePage.attach(fd)
        os.ftruncate(fd, 4096)
        with pytest.raises(PageError, match="no page of this version"):
            NodePage.attach(fd)
        os.pwrite(fd, (MAGIC + (1 << 56)).to_bytes(8, "little"), 0)
        with pytest.raises(PageError, match="no page of this version"):
            NodePage.attach(fd)
    finally:
        os.close(fd)


def test_a_step_costs_no_more_than_a_few_microseconds(page: NodePage) -> None:
    slot: Slot = page.slot(0)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        for step in range(1, 2001):
            slot.begin_update()
            slot.end_update(step, 1.5, 32, 4096)
        best = min(best, (time.perf_counter() - began) / 2000)
    assert best < 10e-6, f"{best * 1e6:.2f} µs (1 µs expected)"
