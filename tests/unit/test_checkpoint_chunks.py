"""Parts of a checkpoint, verified: where bytes belong, boxes put together, who reads what."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import RUN, committed, facts
from hypothesis import given
from hypothesis import strategies as st

from hpcft import durable
from hpcft.checkpoint import chunks as chunks_module
from hpcft.checkpoint.chunks import opened, runs, slabs
from hpcft.checkpoint.commit import Committed, commit
from hpcft.checkpoint.image import lay_out
from hpcft.checkpoint.layout import (
    STATE,
    CheckpointDamagedError,
    checkpoint_name,
    shard_name,
    sidecar_name,
    staging_name,
)
from hpcft.checkpoint.manifest import FileEntry, ShardReport, Sidecar
from hpcft.checkpoint.pieces import Piece, TensorShape, index_digest
from hpcft.checkpoint.read import read_manifest
from hpcft.checkpoint.readers import excluded, reading
from hpcft.checkpoint.retention import put_into_trash
from hpcft.errors import NotFoundError
from hpcft.ids import Generation, Rank, Step
from tests.search import sampled

KINDS = {1: ("U8", np.dtype("u1")), 2: ("I16", np.dtype("<i2")), 4: ("F32", np.dtype("<f4"))}


def by_hand(root: Path, tensors: dict[str, np.ndarray], boxes: Sequence[Sequence[Piece]]) -> Committed:
    """A checkpoint whose ranks hold these pieces, however the tensors are cut."""
    name, nonce = checkpoint_name(Step(1), Generation(1)), "c0de"
    staging = root / staging_name(name, nonce)
    staging.mkdir(parents=True)
    digest = index_digest({p.name: TensorShape(p.dtype, p.shape) for share in boxes for p in share})
    reports = []
    for rank, share in enumerate(boxes):
        image = lay_out(share)
        parts = [tensors[item.piece.name][box(item.piece)].tobytes() for item in image.placed]
        shard = shard_name(rank, len(boxes))
        written = durable.write_file(staging / shard, [image.header, *parts])
        files = [FileEntry(shard, written.size, written.digests, image.placed)]
        if rank == 0:
            written = durable.write_file(staging / STATE, [b'{"format":1,"state":{"dict":{}}}'])
            files.append(FileEntry(STATE, written.size, written.digests))
        sidecar = Sidecar(tuple(files), None, {}).to_bytes()
        durable.write_file(staging / sidecar_name(rank, len(boxes)), [sidecar])
        reports.append(ShardReport(name, nonce, Rank(rank), len(boxes), digest, durable.digest(sidecar), 0))
    return commit(root, reports, facts())


def box(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.extent, strict=True))


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[np.ndarray, list[Piece]]:
    """A tensor, cut in each dimension at any places."""
    name, kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    array = np.arange(math.prod(shape), dtype=kind).reshape(shape)
    edges = [sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))}) for length in shape]
    pieces = [
        Piece("t", name, shape, tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
        for spans in product(*(list(pairwise(each)) for each in edges))
    ]
    return array, pieces


@sampled(200)
@given(cut_tensors(), st.data())
def test_bytes_of_a_piece_find_their_place(cut: tuple[np.ndarray, list[Piece]], data: st.DataObject) -> None:
    array, pieces = cut
    whole = bytearray(array.nbytes)
    for piece in pieces:
        content = array[box(piece)].tobytes()
        # a chunk may end anywhere, also within an element
        edges = sorted({0, len(content), *data.draw(st.lists(st.integers(0, len(content)), max_size=3))})
        for begin, end in pairwise(edges):
            reached = begin
            for start, place, length in runs(piece, begin, end):
                assert start == reached and length > 0
                whole[place : place + length] = content[start : start + length]
                reached += length
            assert reached == end
    assert bytes(whole) == array.tobytes()


@sampled(100)
@given(st.lists(st.integers(0, 6), max_size=4), st.sampled_from(sorted(KINDS)), st.integers(1, 60))
def test_slabs_make_up_the_tensor_and_stay_small(shape: list[int], size: int, limit: int) -> None:
    tensor = TensorShape(KINDS[size][0], tuple(shape))
    covered = np.zeros(shape, int)
    for offsets, extent in slabs(tensor, limit):
        covered[tuple(slice(o, o + n) for o, n in zip(offsets, extent, strict=True))] += 1
        assert math.prod(extent) * size <= max(limit, size)
    assert (covered == 1).all()


@pytest.mark.parametrize("chunk_bytes", [durable.CHUNK_BYTES, 4096 + 1000])
def test_any_part_of_a_tensor_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """Cut in both dimensions over four ranks; with small chunks, across their borders."""
    for module in ("durable", "checkpoint.manifest", "checkpoint.read", "checkpoint.chunks"):
        monkeypatch.setattr(f"hpcft.{module}.CHUNK_BYTES", chunk_bytes)
    array = np.arange(60 * 70, dtype="<f4").reshape(60, 70)
    small = np.array(7, dtype="<i2")
    empty = np.empty((0, 3), "<f4")
    shares = [
        [Piece("w", "F32", (60, 70), (r, c), (n, m))] for r, n in ((0, 13), (13, 47)) for c, m in ((0, 33), (33, 37))
    ]
    shares[0] += [Piece("s", "I16", (), (), ()), Piece("e", "F32", (0, 3), (0, 0), (0, 3))]
    done = by_hand(tmp_path, {"w": array, "s": small, "e": empty}, shares)
    seen: list[int] = []
    with opened(done.directory, RUN, seen.append) as chunks:
        for offsets, extent in [((0, 0), (60, 70)), ((12, 32), (2, 2)), ((5, 0), (1, 70)), ((50, 69), (10, 1))]:
            found = chunks.box("w", offsets, extent).view("<f4")[..., 0]
            r, c = offsets
            assert np.array_equal(found, array[r : r + extent[0], c : c + extent[1]])
        assert chunks.box("s", (), ()).view("<i2").item() == 7
        assert chunks.box("e", (0, 0), (0, 3)).shape == (0, 3, 4)
        chunks.state()
    assert sum(seen) <= done.size, "no byte counts twice"


def test_what_is_damaged_or_gone_is_named(tmp_path: Path) -> None:
    done = committed(tmp_path, 1)
    manifest, _ = read_manifest(done.directory)
    entry = next(each for each in manifest.files if each.tensors)
    path = done.directory / entry.name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    last = entry.tensors[-1].piece
    with opened(done.directory) as chunks, pytest.raises(CheckpointDamagedError) as caught:
        chunks.box(last.name, last.offsets, last.extent)
    (damage,) = caught.value.damages
    assert (damage.file, damage.chunk) == (entry.name, 0) and last.name in damage.tensors
    with opened(done.directory) as chunks:
        put_into_trash(tmp_path, [done.name])
        with pytest.raises(NotFoundError, match="was retired while it was being read") as gone:
            chunks.state()
    assert "hpcft ckpt pin" in gone.value.hint


def test_the_memory_of_chunks_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("durable", "checkpoint.manifest", "checkpoint.read", "checkpoint.chunks"):
        monkeypatch.setattr(f"hpcft.{module}.CHUNK_BYTES", 4096)
    array = np.arange(40_000, dtype="<f4")
    done = by_hand(tmp_path, {"w": array}, [[Piece("w", "F32", (40_000,), (0,), (40_000,))]])
    with opened(done.directory) as chunks:
        for (start,), (count,) in slabs(TensorShape("F32", (40_000,)), 5000):
            assert np.array_equal(chunks.box("w", (start,), (count,)).view("<f4")[:, 0], array[start : start + count])
        assert len(chunks._kept) == chunks_module._KEPT


def test_who_reads_is_not_disturbed_and_who_deletes_is_not_joined(tmp_path: Path) -> None:
    done = committed(tmp_path, 1)
    with reading(done.directory), reading(done.directory), excluded(done.directory) as alone:
        assert not alone
    with excluded(done.directory) as alone:
        assert alone
        with pytest.raises(NotFoundError, match="just being deleted"), opened(done.directory):
            pass


def test_a_lock_ends_with_its_block_though_a_process_is_being_started(tmp_path: Path) -> None:
    """Between fork and exec it has a copy of the descriptor."""
    read, write = os.pipe()
    with excluded(tmp_path) as alone:
        assert alone
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
    try:
        with excluded(tmp_path) as alone:
            assert alone
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
