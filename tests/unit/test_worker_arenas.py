"""The copy of a share in its arena: byte by byte the file that would be written from the tensors themselves."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest
import torch

from hpcft.checkpoint.arena import Arena
from hpcft.checkpoint.share import content, plan_share, words_of
from hpcft.checkpoint.tree import flatten
from hpcft.ids import Rank
from hpcft.page import NodePage
from hpcft.worker.arenas import Arenas
from hpcft.worker.link import Link
from hpcft.worker.spec import WorkerSpec

CPU = torch.device("cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def state() -> dict[str, object]:
    complex_ = torch.randn(5, 3, dtype=torch.complex64)
    return {
        "plain": torch.randn(7, 4),
        "large": torch.randn(300, 300),
        "transposed": torch.randn(6, 5).t(),
        "large transposed": torch.randn(200, 300).t(),
        "every other": torch.arange(20)[::2],
        "conjugate": complex_.conj(),
        "negative": complex_.conj().imag,
        "double": torch.randn(3, dtype=torch.complex128).conj(),
        "short": torch.randn(9).to(torch.bfloat16),
        "truth": torch.tensor([True, False, True]),
        "number": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_copy_is_the_file(rank: int, count: int) -> None:
    flat = flatten(state())
    plan, image = plan_share(flat.index(), flat.boxes, Rank(rank), 2, cut_above=64)
    page = NodePage.create(1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, threads(count):
        link = Link(WorkerSpec(rank=Rank(rank), page_fd=page.fd, control_fd=theirs.fileno()))
        arenas = Arenas(link, CPU)
        arenas.prepare(plan, image)
        arena = Arena.reserve(plan.size)
        socket.send_fds(ours, [orjson.dumps({"kind": "arenas", "size": plan.size, "free": [0]})], [arena.fd])
        slot = arenas.take()
        arenas.copy(slot, flat, (), 0.0, {"step": 1}, words_of(Rank(rank), flat, None))
        kinds = [orjson.loads(ours.recv(1 << 17))["kind"] for _ in range(2)]
        link.close()
    assert kinds == ["reserve", "snapshot"]
    assert bytes(arena.view) == b"".join(map(bytes, content(flat, image)))
    arena.close()
    page.close()
