"""The run's secret: one per run, whole or absent, and refused when others could know it."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from hpcft import secret
from hpcft.errors import ExitCode, UnusableError


def test_a_created_secret_is_private_random_and_the_one_that_is_loaded(tmp_path: Path) -> None:
    first, second = secret.create(tmp_path / "a"), secret.create(tmp_path / "b")
    assert len(first) == secret.LENGTH
    assert first != second
    assert secret.load(tmp_path / "a") == first
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_a_generous_umask_lets_nobody_else_read_it(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        secret.create(tmp_path / "secret")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_all_who_create_at_once_end_with_the_same_secret(tmp_path: Path) -> None:
    path, count = tmp_path / "secret", 16
    together, got = threading.Barrier(count), list[bytes]()

    def start() -> None:
        together.wait(30)
        got.append(secret.create(path))

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == count
    assert set(got) == {secret.load(path)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_an_existing_secret_is_kept(tmp_path: Path) -> None:
    first = secret.create(tmp_path / "secret")
    assert secret.create(tmp_path / "secret") == first


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o644, 0o777])
def test_a_secret_that_others_can_reach_is_refused_with_the_command_that_cures_it(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    value = secret.create(path)
    path.chmod(mode)
    with pytest.raises(UnusableError) as refused:
        secret.load(path)
    assert refused.value.hint == f"chmod 600 {path}"
    assert refused.value.exit_code == ExitCode.UNUSABLE
    with pytest.raises(UnusableError):
        secret.create(path)
    path.chmod(0o600)
    assert secret.load(path) == value


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_another_users_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret.create(path)
    os.chown(path, 12345, -1)
    with pytest.raises(UnusableError, match="belongs to user 12345"):
        secret.load(path)


def test_links_and_pipes_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    secret.create(tmp_path / "secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UnusableError, match="cannot read"):
        secret.load(tmp_path / "link")
    with pytest.raises(UnusableError, match="not a regular file"):
        secret.load(tmp_path / "pipe")


@pytest.mark.parametrize("content", ["", "ab\n", "z" * 64, "ab" * 33, " " + "ab" * 31 + " ", "é" * 32])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secret"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UnusableError, match="64 hex digits"):
        secret.load(path)


def test_a_missing_file_or_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match="No such file"):
        secret.load(tmp_path / "secret")
    with pytest.raises(UnusableError, match="cannot write") as refused:
        secret.create(tmp_path / "absent" / "secret")
    assert "run directory" in refused.value.hint


def test_each_purpose_has_its_own_key() -> None:
    value = bytes(range(32))
    keys = {secret.derive(value, purpose) for purpose in ("stream", "heartbeat", "stream ")}
    assert len(keys) == 3
    assert secret.derive(value, "stream") == secret.derive(value, "stream")
    assert secret.derive(bytes(32), "stream") not in keys


def test_a_tag_covers_the_borders_between_its_parts() -> None:
    key = bytes(32)
    tags = [
        secret.tag(key, *parts)
        for parts in (("ab", "c"), ("a", "bc"), ("abc",), (b"ab", b"c"), ("abc", ""), (), (1, 2), (12,), ("1", "2"))
    ]
    assert len(set(tags)) == len(tags)
    assert all(len(value) == 32 for value in tags)
    assert secret.tag(key, "a") == secret.tag(key, "a") != secret.tag(bytes(31) + b"\x01", "a")
