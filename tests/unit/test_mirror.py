"""Checkpoints in an object store and back, over HTTP, with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_samples import RUN, commit, committed, contents, facts, listing, save, training_state

from hpcft.bucket import Bucket, BucketError
from hpcft.checkpoint.layout import QUARANTINE, TRASH, CheckpointDamagedError, staging_name
from hpcft.checkpoint.read import read_manifest, verify
from hpcft.checkpoint.readers import excluded
from hpcft.checkpoint.retention import put_into_trash, stale
from hpcft.checkpoint.tree import flatten
from hpcft.cli import main
from hpcft.config import Config, ConfigError, check_mirror, load
from hpcft.errors import DamagedError, NotFoundError, UnusableError, UsageError
from hpcft.ids import Generation, RunId, Step, Term
from hpcft.mirror import operate
from hpcft.mirror.plan import Keys, Mirrored, Progress, Settings, due, superfluous, unfinished, way_back
from hpcft.mirror.restore import RefusedError, Restored, restore
from hpcft.mirror.supervisor import Mirror, restored
from hpcft.mirror.upload import Throttle, Uploads
from hpcft.rundir import RunDirectory
from hpcft.units import EverySeconds, EverySteps, Never
from tests.object_store import Store, damage, keys

NAME = "training"
PATIENCE = 60.0
OTHER = RunId("ab" * 8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoints"
    root.mkdir()
    return root


@pytest.fixture
def settings(store: Store, root: Path, request: pytest.FixtureRequest) -> Settings:
    bucket = request.node.name.replace("_", "-").replace("[", "-").replace("]", "").lower()[-60:].strip("-")
    return Settings(store.place(bucket), NAME, RUN, str(root), EverySteps(1), 3, request_seconds=5.0)


@pytest.fixture
def bucket(settings: Settings) -> Bucket:
    return Bucket(settings.place, settings.request_seconds)


def until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def uploads(bucket: Bucket, run: RunId = RUN, **options: bool) -> Uploads:
    return Uploads(bucket, Keys(NAME, run), Throttle(0), **options)


def copied(bucket: Bucket, root: Path, *names: str) -> None:
    for name in names:
        uploads(bucket).upload(root / name, RUN, lambda left: None)


def back(bucket: Bucket, root: Path, run: RunId = RUN, **options: object) -> str | None:
    root.mkdir(exist_ok=True)
    restored = restore(bucket, root, NAME, run, adopt=False, **options)  # type: ignore[arg-type]
    return restored.checkpoint if restored else None


def at(step: int, generation: int, nonce: str = "5eed5eed") -> Mirrored:
    found = Mirrored.parse(f"step-{step:08d}-g{generation:04d}-{nonce}")
    assert found is not None
    return found


# --- decisions ---


def test_which_checkpoint_is_due() -> None:
    assert due(EverySteps(1), None, Step(0), 0.0)
    assert not due(EverySteps(100), (Step(50), 0.0), Step(149), 1e9)
    assert due(EverySteps(100), (Step(50), 0.0), Step(150), 0.0)
    assert not due(EverySeconds(60.0), (Step(50), 1000.0), Step(9000), 1059.0)
    assert due(EverySeconds(60.0), (Step(50), 1000.0), Step(51), 1060.0)
    assert due(EverySteps(100), (Step(50), 0.0), Step(49), 0.0)  # a branch from before it
    assert not due(Never(), None, Step(1), 0.0)


def test_what_goes_is_the_oldest_by_commit_and_what_nobody_goes_on_with() -> None:
    there = [at(30, 1), at(10, 1), at(20, 2), at(15, 2)]
    assert superfluous(there, 2) == [at(10, 1), at(30, 1)]
    assert superfluous(there, 9) == []
    labels = [each.label for each in (*there, at(40, 1), at(16, 2), at(25, 2))]
    assert unfinished(labels, there, at(20, 2)) == [at(40, 1), at(16, 2)]
    assert unfinished(["..", "step-1-g1-x"], there, at(20, 2)) == []


def test_the_way_back_leaves_out_what_a_rollback_left_behind() -> None:
    there = [at(10, 1), at(20, 1), at(30, 1), at(15, 2), at(25, 3)]
    assert way_back(there) == [at(25, 3), at(15, 2), at(10, 1)]


def test_the_operator_is_told_how_far_it_is() -> None:
    assert Progress(mirrored=Step(20), behind=2).warning() == ""
    lagging = Progress(Step(20), "step-00000030-g0001", 3 << 30, 4)
    assert lagging.warning() == (
        "the mirror of checkpoints does not keep up: mirrored up to step 20, 4 due checkpoints behind, 3 GiB to go"
    )
    assert lagging.failing("no route").warning().endswith("tries again (mirrored up to step 20): no route")


# --- there and back ---


def test_what_comes_back_is_what_was_committed(bucket: Bucket, store: Store, root: Path, tmp_path: Path) -> None:
    name = committed(root, 10).name
    left: list[int] = []

    def sent(to_go: int) -> None:
        with excluded(root / name) as alone:
            assert not alone  # `ckpt prune` asks
        left.append(to_go)

    manifest = uploads(bucket).upload(root / name, RUN, sent)
    assert (left[0], left[-1]) == (manifest.size, 0)
    with excluded(root / name) as alone:
        assert alone
    assert keys(bucket, f"{NAME}/{RUN}/manifests/") == [f"{NAME}/{RUN}/manifests/{name}-{manifest.nonce}.json"]
    home = tmp_path / "home"
    killed = home / staging_name(name, "deadbeef")
    killed.mkdir(parents=True)
    (killed / "shard-00000-of-00003.safetensors").write_bytes(b"half")
    assert back(bucket, home) == name
    assert contents(home / name) == contents(root / name)
    assert listing(home) == [name]
    assert back(bucket, home) == name  # again, and it is there already


def test_the_manifest_is_the_last_object(settings: Settings, bucket: Bucket, store: Store, root: Path) -> None:
    copied(bucket, root, committed(root, 10).name)
    put = store.put(settings.place)
    assert [key for key in put if "/manifests/" in key] == put[-1:]
    assert len(put) == 5 and len(set(put)) == 5


def test_nothing_is_offered_of_a_damaged_checkpoint(bucket: Bucket, root: Path) -> None:
    name = committed(root, 10).name
    shard = root / name / "shard-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match="shard-00001"):
        copied(bucket, root, name)
    assert uploads(bucket).offered() == []
    with pytest.raises(CheckpointDamagedError, match="belongs to run"):
        uploads(bucket, OTHER).upload(root / name, OTHER, lambda left: None)


def test_what_lies_there_is_compared_before_it_counts(bucket: Bucket, store: Store, root: Path, tmp_path: Path) -> None:
    """Another's chunk under the right name: a store that damages, or an upload of another program."""
    name = committed(root, 10).name
    copied(bucket, root, name)
    (manifest,) = keys(bucket, f"{NAME}/{RUN}/manifests/")
    damage(bucket, keys(bucket, f"{NAME}/{RUN}/chunks/")[1])
    bucket.delete([manifest])
    copied(bucket, root, name)
    assert back(bucket, tmp_path / "home") == name
    assert verify(tmp_path / "home" / name, RUN) == []


def test_read_back_reads_everything_again(settings: Settings, bucket: Bucket, store: Store, root: Path) -> None:
    name = committed(root, 10).name
    uploads(bucket, read_back=True).upload(root / name, RUN, lambda left: None)
    bucket_name = settings.place.url.split("/")[2]
    got = [
        line for line in store.log.read_text().splitlines() if f"GET /{bucket_name}/home" in line and "chunks" in line
    ]
    assert len([line for line in got if "list-type" not in line]) == 4


def test_a_damaged_copy_gives_way_to_the_next_older_one(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    names = [committed(root, step).name for step in (10, 20, 30)]
    copied(bucket, root, *names)
    damage(bucket, next(key for key in keys(bucket) if names[2] in key and "shard-00002" in key))
    damage(bucket, next(key for key in keys(bucket) if names[1] in key and key.endswith(".json")))
    home = tmp_path / "home"
    assert back(bucket, home) == names[0]
    assert listing(home) == [names[0]]
    bucket.delete([key for key in keys(bucket) if names[0] in key and "state.json" in key])
    with pytest.raises(RefusedError, match="no copy in the mirror is sound") as refused:
        back(bucket, tmp_path / "other")
    assert all(name in refused.value.message for name in names)
    assert listing(tmp_path / "other") == []


def test_two_may_restore_the_same_at_the_same_time(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    """And what they are about is no leftover: not for each other, the leader or `ckpt prune`."""
    name = committed(root, 10).name
    copied(bucket, root, name)
    home = tmp_path / "home"
    second: list[Restored | None] = []

    def meanwhile(checkpoint: str, left: int) -> None:
        if not second and len(list(next(home.glob(".tmp-*")).iterdir())) == 2:
            assert stale(home, Generation(9)) == ()
            put_into_trash(home, [path.name for path in home.iterdir()])
            second.append(restore(bucket, home, NAME, RUN, adopt=False))
            shutil.rmtree(home / name)  # as if it were still under way

    assert back(bucket, home, progress=meanwhile) == name
    assert second == [Restored(name, fetched=True)]
    assert verify(home / name, RUN) == []
    assert [path.name for path in home.iterdir() if path.name != TRASH] == [name]


def test_half_of_one_never_gets_its_name(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    """Where locks do not reach, another node's sweeper may have begun with it."""
    name = committed(root, 10).name
    copied(bucket, root, name)
    home = tmp_path / "home"

    def swept(checkpoint: str, left: int) -> None:
        files = sorted(next(home.glob(".tmp-*")).iterdir())
        if len(files) == 2:
            files[0].unlink()

    with pytest.raises(UnusableError, match="cannot be restored"):
        back(bucket, home, progress=swept)
    assert list(home.iterdir()) == []
    assert back(bucket, home) == name


def test_what_is_there_is_read_before_it_counts(bucket: Bucket, root: Path) -> None:
    name = committed(root, 10).name
    before = contents(root / name)
    copied(bucket, root, name)
    assert restore(bucket, root, NAME, RUN, adopt=False) == Restored(name, fetched=False)
    shard = root / name / "shard-00001-of-00003.safetensors"
    damaged = before[shard.name][:-1] + bytes([before[shard.name][-1] ^ 1])
    shard.write_bytes(damaged)
    assert restore(bucket, root, NAME, RUN, adopt=False) == Restored(name, fetched=True)
    assert contents(root / name) == before
    assert (root / QUARANTINE / name / shard.name).read_bytes() == damaged


def test_two_attempts_of_one_name_never_mix(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    """A run directory that was copied, say: the same run and generation, and other bytes."""
    twin = tmp_path / "twin"
    twin.mkdir()
    name = committed(root, 10).name
    commit(twin, save(twin, flatten(training_state(11)), 10, nonce="0ther0ne"), facts())
    copied(bucket, root, name)
    copied(bucket, twin, name)
    assert len(uploads(bucket).offered()) == 2
    home = tmp_path / "home"
    assert back(bucket, home) == name
    assert contents(home / name) in (contents(root / name), contents(twin / name))


def test_old_copies_go_and_nothing_newer(bucket: Bucket, root: Path) -> None:
    names = [committed(root, step).name for step in (10, 20, 30, 40)]
    copied(bucket, root, *names)
    (half,) = [key for key in keys(bucket) if names[1] in key and key.endswith(".json")]
    (newer,) = [key for key in keys(bucket) if names[3] in key and key.endswith(".json")]
    bucket.delete([half, newer])
    uploads(bucket).retire(1, at(30, 1))
    left = keys(bucket)
    assert {name for name in names if any(name in key for key in left)} == {names[2], names[3]}
    assert [each.checkpoint for each in uploads(bucket).offered()] == [names[2]]


def test_what_is_deleted_while_it_is_sent_is_not_offered(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    """An older one is pushed, and meanwhile the leader's process has mirrored a newer one, and retires."""
    old, new = (committed(root, step).name for step in (10, 20))
    retired: list[str] = []

    def retire(left: int) -> None:
        if left == 0 and not retired:
            retired.append(old)
            manifest = uploads(bucket).upload(root / new, RUN, lambda left: None)
            uploads(bucket).retire(3, Mirrored.of(manifest))

    with pytest.raises(BucketError, match="lost objects"):
        uploads(bucket).upload(root / old, RUN, retire)
    assert [each.checkpoint for each in uploads(bucket).offered()] == [new]
    copied(bucket, root, old)
    assert back(bucket, tmp_path / "home", step=Step(10)) == old


def test_a_copy_without_its_chunks_is_made_whole(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    name = committed(root, 10).name
    copied(bucket, root, name)
    bucket.delete([key for key in keys(bucket) if "shard-00001" in key])
    copied(bucket, root, name)
    assert back(bucket, tmp_path / "home") == name


def test_retiring_takes_a_manifest_that_came_meanwhile(
    bucket: Bucket, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has sent all, and puts the manifest while the chunks are being deleted."""
    old, new = (committed(root, step).name for step in (10, 20))
    copied(bucket, root, old, new)
    (key,) = [key for key in keys(bucket) if old in key and key.endswith(".json")]
    manifest = bytes(bucket.get(key)[0])
    bucket.delete([key])
    deleting = bucket.delete

    def late(which: list[str]) -> None:
        deleting(which)
        if "/chunks/" in which[0]:
            bucket.put(key, manifest)

    monkeypatch.setattr(bucket, "delete", late)
    uploads(bucket).retire(3, at(20, 1))
    assert [each.checkpoint for each in uploads(bucket).offered()] == [new]


# --- whose it is ---


def test_another_run_of_the_name_is_adopted_only_by_consent(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert back(bucket, home, OTHER) is None
    name = committed(root, 10).name
    copied(bucket, root, name)
    with pytest.raises(RefusedError, match=f"up to step 10 of a run {NAME} with another id") as refused:
        back(bucket, home, OTHER)
    assert "mirror.adopt = true" in refused.value.hint
    assert restore(bucket, home, NAME, OTHER, adopt=True) == Restored(name, fetched=True)
    manifest, _ = read_manifest(home / name, OTHER)
    assert manifest.adopted == RUN
    assert verify(home / name, OTHER) == []
    # and from then on it is its own, wherever the first one is
    uploads(bucket, OTHER).upload(home / name, OTHER, lambda left: None)
    assert back(bucket, tmp_path / "again", OTHER) == name
    assert read_manifest(tmp_path / "again" / name, OTHER)[0].adopted == RUN


def test_with_a_journal_only_its_branch_is_gone_back_to(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    names = [committed(root, step).name for step in (10, 20)]
    copied(bucket, root, *names)
    home = tmp_path / "home"
    with pytest.raises(RefusedError, match=r"of step 20, 10, but the journal") as refused:
        back(bucket, home, journaled=(Term(2), ()))
    assert "--from STEP" in refused.value.hint
    assert back(bucket, home, journaled=(Term(2), (names[0],))) == names[0]
    assert back(bucket, tmp_path / "late", journaled=(Term(1), ())) == names[1]  # committed, and not journaled


def test_a_certain_step(bucket: Bucket, root: Path, tmp_path: Path) -> None:
    names = [committed(root, step).name for step in (10, 20)]
    copied(bucket, root, *names)
    assert back(bucket, tmp_path / "home", step=Step(10)) == names[0]
    with pytest.raises(NotFoundError) as missing:
        back(bucket, tmp_path / "home", step=Step(15))
    assert missing.value.hint == "there are: 10, 20"


# --- processes ---


@contextmanager
def mirroring(settings: Settings) -> Iterator[Mirror]:
    mirror = Mirror(settings)
    try:
        yield mirror
    finally:
        mirror.close()
        assert not mirror._thread.is_alive()


def pid_of(mirror: Mirror) -> int:
    until("a process", lambda: mirror._child is not None)
    assert mirror._child is not None
    return mirror._child.pid


@pytest.mark.parametrize("kills", [(2,), pytest.param((1, 3, 5, 7), marks=pytest.mark.drill)])
def test_a_killed_process_is_gone_on_with(
    settings: Settings, bucket: Bucket, store: Store, root: Path, kills: tuple[int, ...]
) -> None:
    name = committed(root, 10, world_size=8).name
    size = read_manifest(root / name)[0].size
    with mirroring(replace(settings, bandwidth=size // 2)) as mirror:
        mirror.follow(name)
        for least in kills:
            until(f"{least} objects", lambda least=least: len(keys(bucket)) >= least)
            killed = pid_of(mirror)
            before = keys(bucket)
            os.kill(killed, signal.SIGKILL)
            assert uploads(bucket).offered() == []
            until("another process", lambda killed=killed: pid_of(mirror) != killed)
        until("the checkpoint", lambda: mirror.progress().mirrored == 10)
        assert mirror.progress().warning() == ""
    put = store.put(settings.place)
    assert {key for key in before if put.count(key) > 1} == set()
    assert len(before) >= kills[-1]
    assert back(bucket, root.parent / "home") == name


def test_a_store_that_hangs_holds_up_nobody(settings: Settings, store: Store, root: Path) -> None:
    name = committed(root, 10).name
    with mirroring(replace(settings, request_seconds=0.5)) as mirror:
        with store.hanging():
            mirror.follow(name)
            until("a word about it", lambda: "no answer" in mirror.progress().warning())
            assert mirror.progress().mirrored is None
        until("the checkpoint", lambda: mirror.progress() == Progress(mirrored=Step(10)))
        with store.hanging():
            mirror.follow(committed(root, 20).name)
            until("the next one", lambda: mirror.progress().uploading is not None)
            assert mirror.held() == {"step-00000020-g0001"}
            child = pid_of(mirror)
            mirror.close()
    assert not Path(f"/proc/{child}").exists()


def test_a_file_that_cannot_be_read_holds_up_nothing(settings: Settings, root: Path) -> None:
    names = [committed(root, step).name for step in (10, 20)]
    bad = root / names[0] / "shard-00001-of-00003.safetensors"
    bad.unlink()
    bad.symlink_to("/proc/self/mem")  # where reading is an I/O error
    with mirroring(settings) as mirror:
        mirror.follow(names[0])
        until("a word about it", lambda: "shard-00001" in mirror.progress().warning())
        until("it may be retired", lambda: mirror.held() == frozenset())
        mirror.follow(names[1])
        until("the next one", lambda: mirror.progress() == Progress(mirrored=Step(20)))


def test_the_newest_is_mirrored_after_what_was_begun(settings: Settings, store: Store, root: Path) -> None:
    names = [committed(root, step).name for step in (10, 20, 30, 40)]
    size = read_manifest(root / names[0])[0].size
    with mirroring(replace(settings, bandwidth=2 * size, keep=9)) as mirror:
        mirror.follow(names[0])
        until("the first one", lambda: mirror.progress().uploading == names[0])
        for name in names[1:]:
            mirror.follow(name)
            time.sleep(0.05)
        until("it is behind", lambda: mirror.progress().behind > 0)
        until("the last one", lambda: mirror.progress().mirrored == 40)
        assert mirror.progress().behind == 0
    mirrored = {label.checkpoint for label in uploads(Bucket(settings.place)).offered()}
    assert mirrored == {names[0], names[3]}


async def test_restoring_is_a_process_that_can_be_killed(
    settings: Settings, bucket: Bucket, store: Store, root: Path, tmp_path: Path
) -> None:
    name = committed(root, 10).name
    copied(bucket, root, name)
    home = tmp_path / "home"
    home.mkdir()
    lost = replace(settings, root=str(home))
    with store.hanging():
        waiting = asyncio.create_task(restored(lost))
        await asyncio.sleep(0.5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await restored(lost) == name
    assert contents(home / name) == contents(root / name)
    with pytest.raises(DamagedError, match="with another id") as refused:
        await restored(replace(lost, run=OTHER))
    assert "mirror.adopt" in refused.value.hint


async def test_errors_of_the_store_are_told_without_secrets(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = replace(settings, place=replace(settings.place, url="s3://nosuchbucket"), request_seconds=2.0)
    with pytest.raises(UnusableError, match="NoSuchBucket") as refused:
        await restored(nowhere)
    assert "not-a-secret" not in str(refused.value)
    with pytest.raises(BucketError, match="no answer"):
        Bucket(replace(settings.place, endpoint="http://127.0.0.1:1"), 1.0).get("x")


def interrupt_at_request() -> None:
    """SIGINT for this process as soon as a request is under way."""

    def interrupt() -> None:
        until("a request", requesting)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


def requesting() -> bool:
    return any(each.name == "hpcft-request" for each in threading.enumerate())


def test_who_waits_for_the_store_can_be_interrupted(bucket: Bucket, store: Store, root: Path, tmp_path: Path) -> None:
    name = committed(root, 10).name
    copied(bucket, root, name)
    home = tmp_path / "home"
    with ExitStack() as stack:

        def hang(checkpoint: str, left: int) -> None:
            until("the requests before it", lambda: not requesting())
            stack.enter_context(store.hanging())
            interrupt_at_request()

        with pytest.raises(KeyboardInterrupt):
            back(bucket, home, progress=hang)
        assert requesting()  # it was not waited for
        assert listing(home) == []
    until("its end", lambda: not requesting())
    assert back(bucket, home) == name


def test_a_command_that_waits_for_the_store_can_be_interrupted(run: RunDirectory, store: Store) -> None:
    with store.hanging():
        command = [sys.executable, "-m", "hpcft.cli", "mirror", "ls", str(run.path)]
        pipe = subprocess.PIPE
        listing = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)

        def connected() -> bool:
            with suppress(FileNotFoundError):
                fds = Path(f"/proc/{listing.pid}/fd")
                return any(str(each.readlink()).startswith("socket:") for each in fds.iterdir())
            return False

        until("a connection", connected)
        listing.send_signal(signal.SIGINT)
        assert listing.communicate(timeout=PATIENCE) == (b"", b"interrupted\n")
        assert listing.returncode == 130


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_the_store_may_be_named_by_the_environment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    place = settings.place
    monkeypatch.setenv(variable, place.endpoint)
    there = Bucket(replace(place, endpoint=""), 2.0)
    there.put("x", b"1")
    assert there.get("x")[0] == b"1"
    monkeypatch.setenv(variable, "http://me:secret@127.0.0.1:9")
    with pytest.raises(UsageError, match=f"in the environment, {variable}, has an @ in it") as refused:
        Bucket(replace(place, endpoint=""))
    assert "secret" not in str(refused.value)
    if variable == "AWS_ENDPOINT_URL_S3":  # the client would go there, although another one is configured
        with pytest.raises(UsageError, match="is another address than"):
            Bucket(place)
    else:
        assert Bucket(place).get("x")[0] == b"1"


def test_a_client_that_fails_is_a_store_that_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Rust panics, which is no Exception of Python's: here because of a header with a line break."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of\ntwo lines")
    there = Bucket(settings.place, 2.0)
    for request in (lambda: there.get("x"), lambda: list(there.objects("")), lambda: there.put("x", b"")):
        with pytest.raises(BucketError, match="the client of the store has failed") as failed:
            request()
        assert "line breaks" in failed.value.hint


# --- by hand, and what is refused ---


@pytest.fixture
def run(settings: Settings, root: Path) -> RunDirectory:
    run = RunDirectory(root.parent / NAME)
    run.path.mkdir()
    run.identity.write_text(json.dumps({"id": RUN}))
    root.rename(run.checkpoints)
    place = settings.place
    sets = ["job.module=m", f"run.name={NAME}", f"mirror.url={place.url}", f"mirror.endpoint={place.endpoint}"]
    run.config.write_bytes(load(None, sets=[*sets, f"mirror.region={place.region}"]).to_json())
    return run


def test_by_hand(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    names = [committed(run.checkpoints, step).name for step in (10, 20)]
    there = str(run.path)
    assert main(["mirror", "push", there, "--step", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == names[0]
    assert main(["mirror", "push", there]) == 0
    assert main(["mirror", "ls", there]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[-2:]] == ["20", "10"]
    shutil.rmtree(run.checkpoints / names[1])
    assert main(["mirror", "pull", there, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"restored": names[1], "fetched": True}
    assert main(["mirror", "pull", there]) == 0
    assert capsys.readouterr().out == f"{names[1]} is there already, and sound\n"
    assert verify(run.checkpoints / names[1], RUN) == []
    assert main(["mirror", "pull", there, "--step", "15"]) == 15
    assert "there are: 10, 20" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    name = committed(run.checkpoints, 10).name
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for verb, label in (("push", b"sending"), ("pull", b"fetching")):
            assert main(["mirror", verb, str(run.path)]) == 0
            terminal.flush()
            shown = screen.read(1 << 16)
            assert label in shown and b"100%" in shown and b"/s" in shown
            shutil.rmtree(run.checkpoints / name)


def test_without_the_extra_there_is_one_word(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    config = Config.from_json(run.config.read_bytes())
    for refused in (lambda: check_mirror(config, {}), lambda: operate.list_copies(run)):
        with pytest.raises(UsageError, match="obstore, which is not installed") as raised:
            refused()
        assert raised.value.hint == "pip install 'hpcft[s3]'"
    check_mirror(load(None, sets=["run.name=r", "job.module=m"]), {})


def test_an_address_in_the_environment_is_checked_before_anything_starts() -> None:
    config = load(None, sets=["run.name=r", "job.module=m", "mirror.url=s3://bucket"])
    check_mirror(config, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"})
    with pytest.raises(UsageError, match=r"AWS_ENDPOINT_URL, 'http://127\.0\.0\.1:99999' has a port that there is not"):
        check_mirror(config, {"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("url", "s3://AKIA:secret@bucket/x", "credentials come from the environment"),
        ("url", "gs://bucket", "is not of the form s3://bucket"),
        ("url", "s3://", "is not of the form s3://bucket"),
        ("endpoint", "https://me:secret@host", "credentials come from the environment"),
        ("endpoint", "host:9000", "is not of the form https://host"),
        ("endpoint", "http://127.0.0.1:99999", "a port that there is not"),
        ("endpoint", "http://host:0", "a port that there is not"),
        ("endpoint", "http://host:http", "is not of the form https://host"),
        ("endpoint", "http://[::1", "is not of the form https://host"),
        ("endpoint", "http://:80", "is not of the form https://host"),
    ],
)
def test_an_address_that_is_none(key: str, value: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        load(None, sets=["run.name=r", "job.module=m", f"mirror.{key}={value}"])
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9000", "https://s3.example.org/", "http://[::1]:65535"])
def test_an_address_that_is_one(endpoint: str) -> None:
    sets = ["run.name=r", "job.module=m", "mirror.url=s3://bucket", f"mirror.endpoint={endpoint}"]
    assert load(None, sets=sets).mirror.endpoint == endpoint


def test_nothing_of_it_is_imported_without_a_url() -> None:
    code = "import sys, hpcft.node; print({'obstore', 'boto3'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    code = "import sys, hpcft.mirror.child, hpcft.bucket; print({'torch', 'obstore'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
