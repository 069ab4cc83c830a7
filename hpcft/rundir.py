"""The names of everything in a run directory, and how a run is found.

A run directory lies on the shared file system: `<run.root>/<run.name>/`. Whoever comes first creates it; every
file in it appears complete or not at all (see `durable`). All names that one agent's life writes carry its
generation or incarnation, so that a late writer only ever adds.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import orjson

from hpcft import durable
from hpcft.errors import NotFoundError, UnusableError
from hpcft.ids import Generation, NodeId, RunId

STATUS_FRESH_SECONDS = 15.0
"""A status that the leader rewrote this recently (by the file server's clock) belongs to a live run."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def identity(self) -> Path:
        return self.path / "run.json"

    @property
    def secret(self) -> Path:
        return self.path / "secret"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def terms(self) -> Path:
        return self.path / "terms"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def verdicts(self) -> Path:
        return self.path / "verdicts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    def logs(self, node: NodeId) -> Path:
        return self.path / "logs" / node

    @property
    def finished(self) -> Path:
        """Exists once the training function has returned and its last checkpoint is committed."""
        return self.path / "finished.json"

    def branch(self, job: str) -> Path:
        """Exists once the checkpoint that this job was told to start from (`--from`) has been turned to."""
        return self.path / "branches" / f"{job}.json"

    def begin_branch(self, job: str, newest: Generation) -> None:
        """A job turns to an older checkpoint: the run is not finished any more. Blocks; may be repeated.

        `newest` is the last generation that ran, or may have run, before the branch.
        """
        aside = (self.path / f"finished-{number}.json" for number in itertools.count(1))
        with contextlib.suppress(FileNotFoundError):
            self.finished.rename(next(path for path in aside if not path.exists()))
        durable.make_directory(self.branch(job).parent)
        durable.replace(self.branch(job), orjson.dumps({"newest": newest}))

    def branch_began_at(self, job: str) -> Generation | None:
        """The last generation before this job's branch; None if it has not begun one."""
        try:
            return Generation(int(orjson.loads(self.branch(job).read_bytes())["newest"]))
        except FileNotFoundError:
            return None

    def verdict(self, allocation: str) -> Path:
        """One verdict for each start: a batch script waits for its own."""
        return self.verdicts / f"{allocation}.json"

    def prepare(self) -> RunId:
        """Create what is missing; any number of agents may do so at once. Returns the run's id.

        Raises:
            UnusableError: the directory cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            inside = (self.terms, self.journal, self.verdicts, self.spool, self.checkpoints, self.ledger)
            for directory in (self.path, *inside, self.path / "logs"):
                durable.own_directory(directory)  # what lies there decides about the run, or is trained from
            if not self.identity.exists():  # looked for first: on a full disk a run goes on, though none begins
                born = {
                    "id": secrets.token_hex(8),
                    "name": self.name,
                    "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                }
                with contextlib.suppress(FileExistsError):
                    durable.create(self.identity, orjson.dumps(born, option=orjson.OPT_INDENT_2))
        except OSError as error:
            raise UnusableError(
                f"the run directory {self.path} cannot be used: {error.strerror or error}",
                "check run.root and its permissions; `hpcft doctor CONFIG` tests the file system",
            ) from error
        return self.run_id()

    def run_id(self) -> RunId:
        try:
            found = orjson.loads(self.identity.read_bytes())["id"]
            if not isinstance(found, str):
                raise ValueError("its id is no text")
            return RunId(found)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{self.path} is not a run directory: it has no run.json", "`hpcft status` lists runs"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnusableError(f"{self.identity} cannot be read: {error}") from error


def runs(root: Path) -> list[RunDirectory]:
    """All runs under `root`, the most recently active first; without what cannot be read, somebody else's perhaps."""
    if not root.is_dir():
        return []
    return sorted((RunDirectory(path) for path in root.iterdir() if _holds_run(path)), key=_last_active, reverse=True)


def _holds_run(path: Path) -> bool:
    try:
        return (path / "run.json").is_file()
    except OSError:
        return False


def _last_active(run: RunDirectory) -> float:
    for path in (run.status, run.identity):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def is_live(run: RunDirectory) -> bool:
    """Whether a leader has rewritten its status within the last seconds."""
    try:
        status = orjson.loads(run.status.read_bytes())
    except (OSError, ValueError):
        return False
    if status.get("state") in ("finished", "failed", "cancelled", "requeued"):
        return False
    return time.time() - _last_active(run) < STATUS_FRESH_SECONDS


def find_run(root: Path, run: str | None) -> RunDirectory:
    """The run an operator means: a name under `root`, a path, or, without either, the newest.

    Raises:
        NotFoundError: there is none, or several are live; the message lists what there is.
    """
    if run is not None:
        for candidate in (root / run, Path(run)):
            if (candidate / "run.json").is_file():
                return RunDirectory(candidate.resolve())
        names = ", ".join(each.name for each in runs(root)[:8]) or "none"
        raise NotFoundError(
            f"there is no run {run!r} under {root}", f"runs there: {names}; --root names another directory"
        )
    known = runs(root)
    if not known:
        raise NotFoundError(
            f"there is no run under {root}", "--root names another directory; `hpcft submit` starts a run"
        )
    live = [each for each in known if is_live(each)]
    if len(live) > 1:
        raise NotFoundError(
            f"several runs are live: {', '.join(each.name for each in live)}", "name one: hpcft status RUN"
        )
    return live[0] if live else known[0]
