"""Fixtures for all tests; those marked `slurm` run on a real cluster, and are skipped where none can be started."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator

import pytest

from tests import search as search  # loads hypothesis' profile before any property is declared
from tests.cluster import Cluster, missing
from tests.object_store import CREDENTIALS, Store

why_no_cluster = functools.cache(missing)


def pytest_configure() -> None:
    # Whoever is started in the background by a script ignores Ctrl-C, and so would every program that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Here and not in a fixture: pytest folds skips of one place and one reason into one line.
    if item.get_closest_marker("slurm") and (why := why_no_cluster()):
        pytest.skip(why)


@pytest.fixture(scope="module")
def cluster_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster.start(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(cluster_of_module: Cluster) -> Iterator[Cluster]:
    """Four nodes, shared by a module's tests; each finds it whole and empty, whatever the one before did to it."""
    yield cluster_of_module
    cluster_of_module.reset()


@pytest.fixture(scope="session")
def store_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.start(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture
def store(store_of_session: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An object store, and what it takes to use it. Every test makes buckets of its own."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return store_of_session
