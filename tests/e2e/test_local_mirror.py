"""A run that loses everything it has on the file system, and goes on from its object store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hpcft.places import Place
from tests.e2e.conftest import Undisturbed
from tests.e2e.localrun import LocalRun, command, exact
from tests.object_store import Store

pytestmark = [pytest.mark.local, pytest.mark.drill]


def mirrored(place: Place, out: Path) -> dict[str, Any]:
    return {
        **exact(out, pause=0.05),
        "mirror.url": place.url,
        "mirror.endpoint": place.endpoint,
        "mirror.region": place.region,
    }


def test_a_lost_run_directory_comes_back(store: Store, undisturbed: Undisturbed, tmp_path: Path) -> None:
    out = tmp_path / "digest"
    settings = mirrored(store.place("lost-run-directory"), out)
    with LocalRun(tmp_path, settings).start() as run:
        run.until("a copy", lambda found: ((found.get("mirror") or {}).get("mirrored") or 0) >= 20)
        for node in (0, 1):
            run.kill_node(node)
        run.ends(run._process.wait())  # type: ignore[union-attr]
    shutil.rmtree(run.directory)
    with LocalRun(tmp_path, settings).start() as run:
        run.ends(16)
        assert "mirror.adopt = true" in run.said()
    with LocalRun(tmp_path, {**settings, "mirror.adopt": True}).start() as run:
        found = run.ends(0)
        assert found["restored"]["step"] in (20, 30, 40)
    assert out.read_text() == undisturbed.digest
    assert command("ckpt", "verify", "--root", tmp_path / "runs", "--run", "run").returncode == 0


def test_lost_checkpoints_come_back_where_the_journal_is_left(
    store: Store, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "digest"
    settings = mirrored(store.place("lost-checkpoints"), out)
    with LocalRun(tmp_path, settings).start() as run:
        run.until("a copy", lambda found: ((found.get("mirror") or {}).get("mirrored") or 0) >= 20)
        for node in (0, 1):
            run.kill_node(node)
        run.ends(run._process.wait())  # type: ignore[union-attr]
        shutil.rmtree(run.directory / "checkpoints")
        run.start()
        found = run.ends(0)
        assert found["generation"] >= 2 and found["restored"]["step"] in (20, 30, 40)
        assert found["mirror"]["mirrored"] is not None
        run.assert_exact(44)
    assert out.read_text() == undisturbed.digest


def test_a_store_that_hangs_costs_nothing(store: Store, tmp_path: Path) -> None:
    settings = mirrored(store.place("hanging-store"), tmp_path / "digest")
    with LocalRun(tmp_path, settings).start() as run:
        run.trains(past=5)
        with store.hanging():
            found = run.ends(0)
    assert found["step"] == 44
