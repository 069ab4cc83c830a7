from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from checkpoint_samples import listing, mounted, quick_directory, small_file_system
from system_calls import interrupted

from hpcft import durable

CHUNK = durable.CHUNK_BYTES


def test_replace_gives_new_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    durable.replace(path, b"one")
    durable.replace(path, b"two")
    assert path.read_bytes() == b"two"
    assert listing(tmp_path) == ["status.json"]


def test_mode_is_that_of_the_file_from_its_first_byte_on(tmp_path: Path) -> None:
    durable.replace(tmp_path / "secret", b"x", 0o600)
    durable.create(tmp_path / "claim", b"x", 0o600)
    for name in ("secret", "claim"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_create_refuses_what_exists(tmp_path: Path) -> None:
    path = tmp_path / "1"
    durable.create(path, b"first")
    with pytest.raises(FileExistsError):
        durable.create(path, b"second")
    assert path.read_bytes() == b"first"
    assert listing(tmp_path) == ["1"]


def test_of_many_creators_exactly_one_succeeds_and_the_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "7"
    start = threading.Barrier(8)
    winners: list[int] = []

    def claim(number: int) -> None:
        start.wait()
        try:
            durable.create(path, b"%d" % number * 5000)
        except FileExistsError:
            assert len(path.read_bytes()) == 5000
        else:
            winners.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert path.read_bytes() == b"%d" % winners[0] * 5000


def test_create_succeeds_when_its_link_was_made_by_a_request_repeated(tmp_path: Path) -> None:
    """An NFS client whose answer was lost: the link is there, and the call says EEXIST."""
    path = tmp_path / "7"

    def link_twice(name: str) -> None:
        (aside,) = (p for p in tmp_path.iterdir() if durable.is_aside(p.name))
        os.link(aside, path)  # the profile hook is not called for itself, so the real call follows and fails

    with interrupted(5, link_twice) as seen:
        durable.create(path, b"mine")
    assert seen[4] == "link"
    assert path.read_bytes() == b"mine"
    assert listing(tmp_path) == ["7"]


def test_make_directory(tmp_path: Path) -> None:
    assert durable.make_directory(tmp_path / "a")
    assert not durable.make_directory(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        durable.make_directory(tmp_path / "file")


@pytest.mark.parametrize(
    "lengths",
    [[], [0], [1], [CHUNK], [CHUNK + 1], [CHUNK - 1, 1, 1], [3] * 50_000, [100_000, 5, 70_000, CHUNK * 2, 9]],
)
def test_large_file_has_its_bytes_and_digests(tmp_path: Path, lengths: list[int]) -> None:
    whole = os.urandom(sum(lengths))
    chunks, start = [], 0
    for length in lengths:
        chunks.append(memoryview(whole)[start : start + length])
        start += length
    written = durable.write_file(tmp_path / "f", chunks)
    assert (tmp_path / "f").read_bytes() == whole
    assert written.size == len(whole)
    expected = [xxhash.xxh3_128(whole[at : at + CHUNK]).hexdigest() for at in range(0, len(whole), CHUNK)]
    assert list(written.digests) == expected


def test_a_large_file_says_how_far_it_is(tmp_path: Path) -> None:
    told: list[int] = []
    written = durable.write_file(tmp_path / "f", [b"1" * 10, b"2" * (CHUNK + 1), b"3" * 20], before=told.append)
    assert told[0] == 0 and told[-1] == written.size == CHUNK + 31
    assert 0 < max(later - one for one, later in pairwise(told)) <= 4 << 20


def test_large_file_is_never_written_over(tmp_path: Path) -> None:
    durable.write_file(tmp_path / "f", [b"one"])
    with pytest.raises(FileExistsError):
        durable.write_file(tmp_path / "f", [b"two"])
    assert (tmp_path / "f").read_bytes() == b"one"


def test_large_file_goes_when_its_content_cannot_be_made(tmp_path: Path) -> None:
    def content():  # type: ignore[no-untyped-def]
        yield b"x" * 200_000
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError):
        durable.write_file(tmp_path / "f", content())
    assert listing(tmp_path) == []


def test_short_writes_are_completed(tmp_path: Path) -> None:
    """A pipe takes what fits; the writer must come back for the rest."""
    reader, writer = os.pipe()
    os.set_blocking(writer, True)
    data = os.urandom(3_000_000)
    got = bytearray()

    def drain() -> None:
        while piece := os.read(reader, 7919):
            got.extend(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    # A signal that arrives in a large write makes it return early.
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        durable._write_all(writer, memoryview(data))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        os.close(writer)
        thread.join()
        os.close(reader)
    assert bytes(got) == data


SIZES = (1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 4096, 2 * CHUNK + 4097)
"""Around a block and around a chunk."""


@contextmanager
def image_of(size: int) -> Iterator[memoryview]:
    """Random bytes at the beginning of a page, as in an arena."""
    memory = mmap.mmap(-1, size)
    memory[:] = os.urandom(size)
    view = memoryview(memory)
    try:
        yield view
    finally:
        view.release()


def is_cached(path: Path) -> bool:
    """Whether the file's first block is in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(64)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_an_image_reaches_the_disk_around_the_page_cache_or_through_it(kind: str) -> None:
    """ext4 takes direct writes of whole blocks; tmpfs is one of those that refuse, or do not care."""
    with quick_directory() as place, small_file_system(place, kind, 96) as disk, image_of(SIZES[-1]) as whole:
        for size in SIZES:
            part = whole[:size]
            plain = durable.write_file(disk / "plain", [part])
            for direct in (True, False):
                told: list[int] = []
                assert durable.write_image(disk / "image", part, direct=direct, before=told.append) == plain
                assert told == [*range(0, size, CHUNK), size]
                if kind == "ext4" and direct and size >= 4096:
                    # ext4 itself completes a direct write through the cache now and then, but not each time; and to
                    # ask begins to read, so a file is asked once
                    tries = 1
                    while is_cached(disk / "image"):
                        assert tries < 5, size
                        (disk / "image").unlink()
                        durable.write_image(disk / "image", part, direct=True)
                        tries += 1
                assert (disk / "image").read_bytes() == part, (size, direct)
                (disk / "image").unlink()
            (disk / "plain").unlink()
            part.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("most", [8192, 5000, CHUNK - 4096])
def test_short_writes_of_an_image_are_completed(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """After one of 5000 bytes the next direct write begins within a block, which the disk refuses."""
    write, taken = os.write, []

    def short(fd: int, data: memoryview) -> int:
        taken.append(len(data))
        # a few: the rest of 17 MiB by 5000 bytes says nothing more
        return write(fd, data[:most] if len(taken) <= 40 else data)

    with quick_directory() as place, small_file_system(place, "ext4", 64) as disk, image_of(CHUNK + 4097) as image:
        plain = durable.write_file(disk / "plain", [image])
        monkeypatch.setattr(os, "write", short)
        for direct in (True, False):
            taken.clear()
            assert durable.write_image(disk / "image", image, direct=direct) == plain
            assert len(taken) > 2
            assert (disk / "image").read_bytes() == image
            (disk / "image").unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_what_is_not_taken_around_the_page_cache_goes_through_it(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From the second chunk on."""
    write, seen = os.write, []

    def failing(fd: int, data: memoryview) -> int:
        seen.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        if seen[-1] and seen.count(True) > 1:
            raise OSError(number, os.strerror(number))
        return write(fd, data)

    with quick_directory() as place, small_file_system(place, "ext4", 96) as disk, image_of(2 * CHUNK) as image:
        whole = durable.write_image(disk / "whole", image, direct=True)
        monkeypatch.setattr(os, "write", failing)
        written = durable.write_image(disk / "image", image, direct=True)
        assert (disk / "image").read_bytes() == image
    assert written == whole and not written.direct and seen == [True, True, False]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("direct", [True, False])
def test_an_image_for_which_there_is_no_room_leaves_nothing(direct: bool) -> None:
    with quick_directory() as place, small_file_system(place, "ext4", 24) as disk, image_of(2 * CHUNK) as image:
        with pytest.raises(OSError) as caught:
            durable.write_image(disk / "image", image, direct=direct)
        assert caught.value.errno == errno.ENOSPC
        assert listing(disk) == ["lost+found"]
        with pytest.raises(FileExistsError):
            (disk / "image").touch()
            durable.write_image(disk / "image", image[:5], direct=direct)


def test_file_size_limit_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts a write short and fails the next one: as a quota does."""
    path = tmp_path / "state"
    durable.replace(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            durable.replace(path, b"n" * 150_000)
        with pytest.raises(OSError):
            durable.write_file(tmp_path / "large", [b"n" * 150_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["state"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_disk_keeps_the_old_content_and_gives_the_room_back(tmp_path: Path, kind: str) -> None:
    with small_file_system(tmp_path, kind, 8) as disk:
        path = disk / "state"
        durable.replace(path, b"old")
        for attempt in (durable.replace, durable.create):
            with pytest.raises(OSError) as caught:
                attempt(path if attempt is durable.replace else disk / "new", b"n" * (16 << 20))
            assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as caught:
            durable.write_file(disk / "large", [b"n" * (16 << 20)])
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == b"old"
        assert set(listing(disk)) <= {"state", "lost+found"}
        durable.replace(path, b"n" * (4 << 20))
        assert path.stat().st_size == 4 << 20


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a loop device")
def test_power_cut_after_the_call_has_returned(tmp_path: Path) -> None:
    """A copy of the image is what the device holds at that moment: all that a power cut would leave."""
    steps: list[tuple[Callable[[Path], object], Callable[[Path], bool]]] = [
        (lambda d: durable.make_directory(d / "run"), lambda d: (d / "run").is_dir()),
        (lambda d: durable.create(d / "run/term", b"7"), lambda d: (d / "run/term").read_bytes() == b"7"),
        (lambda d: durable.replace(d / "run/status", b"a"), lambda d: (d / "run/status").read_bytes() == b"a"),
        (lambda d: durable.replace(d / "run/status", b"b"), lambda d: (d / "run/status").read_bytes() == b"b"),
        (
            lambda d: (durable.write_file(d / "run/shard", [b"s" * 100_000]), durable.sync_directory(d / "run")),
            lambda d: (d / "run/shard").read_bytes() == b"s" * 100_000,
        ),
    ]
    copies = []
    with small_file_system(tmp_path, "ext4", 8, "noauto_da_alloc") as disk:
        for number, (do, _) in enumerate(steps):
            do(disk)
            copies.append(tmp_path / f"copy{number}")
            copies[-1].write_bytes((tmp_path / "image").read_bytes())
    for number, copy in enumerate(copies):
        place = tmp_path / f"after{number}"
        place.mkdir()
        with mounted(place, "-o", "loop", str(copy)) as disk:
            assert steps[number][1](disk), number


def test_any_failing_call_leaves_old_or_new_and_nothing_aside(tmp_path: Path) -> None:
    def fail(name: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "state"
    number = 0
    while True:
        number += 1
        path.write_bytes(b"old")
        with interrupted(number, fail) as seen:
            try:
                durable.replace(path, b"new")
            except OSError as error:
                failed = True
                assert error.errno == errno.EIO
            else:
                failed = False
        if not failed:
            break
        # Only the directory's own fsync comes after the new name.
        renamed = "rename" in seen[: number - 1]
        assert path.read_bytes() == (b"new" if renamed else b"old")
        leftovers = set(listing(tmp_path)) - {"state"}
        # close(2) that fails has closed all the same; what cannot be removed is recognised by its name.
        assert all(durable.is_aside(name) for name in leftovers)
        assert not leftovers, seen
    assert number > 5
