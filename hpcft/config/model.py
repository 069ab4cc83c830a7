"""What can be configured: one class per section, in the order of the files in configs/.

Values are strict (`min = "2"` is a mistake, not a 2) and quantities are written with their units (see `units`).
The descriptions are the reference that users read: docs/configuration.md is printed from them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from hpcft.config.checking import ConfigError, Contradiction, Mistake, check
from hpcft.places import flaw_of_endpoint, flaw_of_url
from hpcft.units import (
    Auto,
    Cadence,
    Duration,
    EverySteps,
    Lead,
    Never,
    Size,
    Written,
    duration_text,
    parse_duration,
    parse_size,
    toml_text,
)


def _program_list(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or not value[0]:
        raise ValueError('must name a program, such as ["python", "train.py"]')
    return value


def _dotted_name(value: str) -> str:
    if value.endswith(".py") or "/" in value:
        raise ValueError(f"{value!r} is a file; give it as job.script")
    return _module_name(value)


def _module_name(value: str) -> str:
    if not all(part.isidentifier() for part in value.split(".")):
        raise ValueError(f"{value!r} is not the dotted name of a module, such as 'mypackage.train'")
    return value


def _metric_name(value: str) -> str:
    if not value.isidentifier():
        raise ValueError(f"{value!r} cannot be reported: `run.report` takes names such as val_loss")
    return value


def _run_name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", value) is None:
        raise ValueError(
            f"{value!r} cannot name a directory of its own: use 1 to 64 of the characters A-Z a-z 0-9 . _ -,"
            " the first one a letter, a digit or _"
        )
    return value


def _object_url(value: str) -> str:
    return _without_flaw(value, flaw_of_url)


def _endpoint(value: str) -> str:
    return _without_flaw(value, flaw_of_endpoint)


def _without_flaw(value: str, flaw_of: Callable[[str], str]) -> str:
    if value and (flaw := flaw_of(value)):
        raise ValueError(flaw)
    return value


def _train_value(value: object) -> object:
    """What JSON carries without loss; raises ValueError on everything else."""
    if isinstance(value, list):
        return [_train_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot be stored as JSON; write it as text")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} does not fit into 64 bits; write it as text")
    if isinstance(value, dict):
        raise ValueError("a table within [train] is not supported; use a key such as optimizer_lr")
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"{value} is neither a number, text, true or false, nor a list of them")
    return value


PROGRAMS = ("module", "script", "command")
"""Keys of [job], one of which says what to run."""

_Path: TypeAlias = Annotated[Path, Field(strict=False)]
_Strings: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]
_Modules: TypeAlias = Annotated[tuple[Annotated[str, AfterValidator(_module_name)], ...], Field(strict=False)]


def _no_auto(value: Cadence) -> Cadence:
    if isinstance(value, Auto):
        raise ValueError("'auto' is for checkpoint.every; write '20 steps', '5s' or 'off'")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class RunSection(_Section):
    """What this training is called and where it keeps its files."""

    name: Annotated[str, AfterValidator(_run_name)] = Field(
        description="Name of the run, and of its directory below `run.root`. Change it to start afresh: the same "
        "name goes on where the run of that name stopped."
    )
    root: _Path = Field(
        Path("runs"),
        description="Directory that holds the run directories; relative to the current directory. It must be "
        "on a file system that all nodes share.",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="Seed of the sample order and of all random numbers. Change it to repeat an experiment with "
        "other luck.",
    )


class JobSection(_Section):
    """The training program: one of `module`, `script` and `command`; an override with one replaces the others."""

    module: Annotated[str, AfterValidator(_dotted_name)] | None = Field(
        None, description="Python module that calls `hpcft.main(train)`, by its dotted name, as in `python -m`."
    )
    script: _Path | None = Field(
        None,
        description="Python file that calls `hpcft.main(train)`; relative to the configuration file's directory "
        "if it exists there, else to the current directory.",
    )
    command: Annotated[_Strings, AfterValidator(_program_list)] | None = Field(
        None,
        description='Any program, such as `["python", "train.py"]`: an unmodified torchrun script, started with '
        "the same environment variables. It is restarted rather than re-entered, see docs/guarantees.md.",
    )
    args: _Strings = Field(
        (), description="Arguments of the program, each one text: `sys.argv[1:]` of a module or script."
    )
    preload: _Modules = Field(
        (),
        description='Modules, such as `["torchvision"]`, that each node imports once, beside torch, before it forks '
        "workers: what all would import anyway is then there when they start. The agent's log names one that cannot "
        "be imported, one whose import crashes or takes longer than 120 s (the node goes on without it), and one that "
        "does not survive a fork: then workers start without what was imported. Of no use to `command`.",
    )

    @model_validator(mode="after")
    def _one_program(self) -> Self:
        given = [key for key in PROGRAMS if getattr(self, key) is not None]
        if len(given) != 1:
            found = f"it has {' and '.join(given)}" if given else "it has none"
            reason = f"needs exactly one of {', '.join(PROGRAMS)}; {found}"
            raise Contradiction(("", reason), cures=() if given else PROGRAMS)
        return self


class NodesSection(_Section):
    """How many nodes and workers make a world."""

    min: int = Field(
        1,
        ge=1,
        description="Training goes on as long as this many nodes are left; below it the job is requeued. Raise "
        "it where fewer nodes would not hold the model or would be too slow to be of use.",
    )
    workers_per_node: int = Field(
        0,
        ge=0,
        description="Workers on each node; 0: one per GPU. Set it on nodes without GPUs, or to leave GPUs unused.",
    )
    join_timeout: Duration = Field(
        parse_duration("60s"),
        gt=0,
        description="How long the first world waits for all nodes of the allocation before it forms from those "
        "that came. Raise it where nodes take long to boot or to load Python.",
    )
    multiple_of: int = Field(
        1,
        ge=1,
        description="The number of workers in a world is a multiple of this; surplus nodes are spares. Set it to "
        "the size of a model-parallel group.",
    )


class HeartbeatSection(_Section):
    """How soon a silent node is given up."""

    interval: Duration = Field(
        parse_duration("500ms"),
        gt=0,
        description="Time between two heartbeats of a node. Raise it above a few thousand nodes.",
    )
    suspect: Duration = Field(
        parse_duration("2s"),
        gt=0,
        description="A node silent for this long is suspect: no new world is formed, with it or without it, until "
        "it speaks again or is evicted, and another agent is asked to look at it. At least twice "
        "`heartbeat.interval`.",
    )
    timeout: Duration = Field(
        parse_duration("5s"),
        gt=0,
        description="A node silent for this long is evicted, and has stopped its workers by itself before. "
        "Longer than `heartbeat.suspect`. Raise it on a network with longer hiccups: it is the price of each "
        "lost node.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        interval, suspect, timeout = map(duration_text, (self.interval, self.suspect, self.timeout))
        wrong = []
        if self.suspect < 2 * self.interval:
            why = f"twice heartbeat.interval ({interval}), or a single late heartbeat makes a node suspect"
            wrong.append(("suspect", f"must be at least {why}; it is {suspect}"))
        if self.timeout <= self.suspect:
            why = f"heartbeat.suspect ({suspect}), or a node is evicted as soon as it is suspect"
            wrong.append(("timeout", f"must be longer than {why}; it is {timeout}"))
        if wrong:
            raise Contradiction(*wrong)
        return self


class CheckpointSection(_Section):
    """When the training state is made durable, and how many of these states are kept."""

    every: Cadence = Field(
        EverySteps(200),
        description='How often: `"200 steps"`, `"60s"`, `"auto"` or `"off"`. What a failure costs is half of this on '
        "average; what it costs without failures is the time of one save, this often. `auto` weighs the two by what "
        "saves have taken and how often training has failed; `hpcft status` shows with which numbers.",
    )
    every_min: Duration = Field(
        parse_duration("30s"),
        gt=0,
        description="What `auto` does not go below. Raise it to spare the file system.",
    )
    every_max: Duration = Field(
        parse_duration("1h"),
        gt=0,
        description="What `auto` does not go beyond, however rarely the run fails; not below `checkpoint.every_min`.",
    )
    mtbf: Duration = Field(
        parse_duration("6h"),
        gt=0,
        description="Mean time between failures of the whole job as you expect it: it counts in `auto` like one "
        "failure seen in this time, beside those that do happen. Lower it for many nodes, raise it for few.",
    )
    snapshot_every: Annotated[Cadence, AfterValidator(_no_auto)] = Field(
        Never(),
        description='How often the state is copied into memory beyond that, without being written: `"20 steps"`, '
        '`"5s"` or `"off"`. After the death of a worker training goes on from the newest such copy, which is written '
        "then, too. Takes the memory of one more copy.",
    )
    compare_every: int = Field(
        10,
        ge=0,
        description="With every so many copies each rank compares its parameters with those that another one has "
        "copied: replicas that differ are reported as an incident. Takes half as long as the copy. 0: never.",
    )
    neighbour: bool = Field(
        True,
        description="Whether each node's copies go to the next node's memory as well, so that a lost node takes no "
        "state with it. Only with `checkpoint.snapshot_every`; takes the memory of two more copies and, for each copy, "
        "its size on the network. Turn it off where memory is short.",
    )
    mode: Literal["async", "sync"] = Field(
        "async",
        description='`"async"`: training waits for a copy of the state into shared memory, and goes on while that is '
        'written. `"sync"`: training waits until all is written, and no memory is needed.',
    )
    busy: Literal["skip", "wait"] = Field(
        "skip",
        description='What a save does that comes while the copies of earlier ones are still being written. `"skip"`: '
        'it is left out, and counted. `"wait"`: training waits for it. The last save of a run is never left out.',
    )
    slots: int = Field(
        2,
        ge=1,
        le=8,
        description="Copies of its share of the state that each rank has memory for. With one, a save is left out (or "
        "waits) as long as the one before is being written.",
    )
    memory: Size | None = Field(
        None,
        gt=0,
        description="Memory that these copies may take on a node. Without it: as much as the machine and the job's "
        "cgroups have to spare when training begins.",
    )
    low_memory: Literal["write", "stop"] = Field(
        "write",
        description='What happens where the memory does not suffice for a single copy. `"write"`: saves are as with '
        '`checkpoint.mode = "sync"`, on that node. `"stop"`: the run stops and says so.',
    )
    max_bandwidth: Size | None = Field(
        None,
        gt=0,
        description="Bytes per second that a node writes at most. Set it where checkpoints of many nodes disturb "
        "others on the file system.",
    )
    keep: int = Field(
        3, ge=1, description="How many of the newest checkpoints are kept. Raise it to be able to go back further."
    )
    keep_every: int = Field(
        0,
        ge=0,
        description="Checkpoints whose step divides by this are kept for good; 0: none. Set it to look back at "
        "the course of a training.",
    )
    keep_best: int = Field(
        0,
        ge=0,
        description="Of those with the best values of `checkpoint.best_metric` so many are kept, too; 0: none. Set it "
        "where the last model is not the one that you want.",
    )
    best_metric: Annotated[str, AfterValidator(_metric_name)] | None = Field(
        None,
        description='Name of the number that says which are the best, such as `"val_loss"`. The program tells it: '
        "`run.report(val_loss=…)`; each value belongs to the next checkpoint.",
    )
    best_mode: Literal["min", "max"] = Field(
        "min", description='Whether the lowest (`"min"`) or the highest values (`"max"`) are the best.'
    )
    verify: bool = Field(
        False,
        description="Whether the leader's node reads checkpoints back after their commit, the newest whenever it has "
        "read the one before. The newest that is found sound is never retired. Turn it on where you do not trust "
        "the storage: it costs as much reading as there is writing.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        wrong = []
        if self.every_max < self.every_min:
            shortest, longest = duration_text(self.every_min), duration_text(self.every_max)
            wrong.append(("every_max", f"must not be below checkpoint.every_min ({shortest}); it is {longest}"))
        if self.keep_best and self.best_metric is None:
            reason = "is needed by checkpoint.keep_best: the name under which the program reports the number"
            wrong.append(("best_metric", reason))
        if wrong:
            raise Contradiction(*wrong)
        return self


class MirrorSection(_Section):
    """Copies of the checkpoints in an object store, see docs/object-storage.md. Needs `pip install 'hpcft[s3]'`."""

    url: Annotated[str, AfterValidator(_object_url)] = Field(
        "",
        description="Where they go: `s3://bucket/prefix`; empty: there are none. Credentials never stand here: they "
        "come from the environment, or from the instance.",
    )
    endpoint: Annotated[str, AfterValidator(_endpoint)] = Field(
        "",
        description="Address of a store that is not Amazon's, such as `https://minio.example.org:9000`; empty: as "
        "`AWS_ENDPOINT_URL` says, else Amazon's.",
    )
    region: str = Field("", description="Region of the bucket; empty: as `AWS_REGION` says.")
    every: Cadence = Field(
        EverySteps(1),
        description="Which checkpoints: the first one that is so many steps, or so long, after the one mirrored last. "
        '`"1 step"`: each; `"off"`: none, though a lost directory is still restored.',
    )
    keep: int = Field(
        3,
        ge=1,
        description="How many of the newest copies of this run are kept. Raise it to be able to go back further.",
    )
    max_bandwidth: Size = Field(
        parse_size("0B"),
        ge=0,
        description='Bytes per second at most, such as `"100MiB"`; `"0B"`: no limit. Set it where training uses the '
        "same network.",
    )
    read_back: bool = Field(
        False,
        description="Whether every object is read again after it was written. Otherwise only where the store's ETag "
        "is no MD5 of it. Turn it on for a store that you do not trust.",
    )
    adopt: bool = Field(
        False,
        description="Whether a new run directory goes on from what a run of the same name with another id has "
        "mirrored, as after the loss of a whole file system. Otherwise it refuses to begin, with exit code 16.",
    )


class DataSection(_Section):
    """How samples reach the workers."""

    workers: int = Field(
        0,
        ge=0,
        description="Loader processes of each worker; 0: samples are loaded between steps, in the worker itself. "
        "Raise it when steps wait for data.",
    )
    prefetch: int = Field(
        2,
        ge=1,
        description="Batches that each loader process fetches ahead. Raise it where loading times vary widely.",
    )
    ledger: bool = Field(
        False,
        description="Whether the ids of the samples of every completed step are recorded, for `hpcft ledger`. Turn "
        "it on to prove that each was used once; it takes room in the run directory.",
    )


class RecoverySection(_Section):
    """How much failure is too much, and how fast to try again."""

    infrastructure_failures: int = Field(
        20,
        ge=0,
        description="Failures of nodes, networks and processes within `recovery.window` before the run gives up. "
        "Raise it with the number of nodes.",
    )
    user_failures: int = Field(
        5,
        ge=0,
        description="Failures of the training code within the window before the run gives up. The same exception "
        "twice at the same step ends it anyway.",
    )
    preemptions: int = Field(
        100,
        ge=0,
        description="Preemptions within the window before the run gives up. They are nobody's fault: keep it high.",
    )
    window: Duration = Field(
        parse_duration("1h"),
        gt=0,
        description="How long a failure counts. Only the failures of the last such span are compared with the "
        "numbers above.",
    )
    backoff: Duration = Field(
        parse_duration("1s"),
        ge=0,
        description="Pause before the next generation when the last one ended without a newly completed step; it "
        "doubles each time, with jitter. After progress there is no pause.",
    )
    backoff_max: Duration = Field(
        parse_duration("60s"),
        ge=0,
        description="The longest such pause; not below `recovery.backoff`. Raise it where faults last.",
    )
    grace: Duration = Field(
        parse_duration("10s"),
        ge=0,
        description="Time from SIGTERM to SIGKILL when a worker is ended. Raise it if the program needs longer to "
        "clean up; keep it below Slurm's KillWait.",
    )
    group_timeout: Duration = Field(
        parse_duration("10m"),
        gt=0,
        description="Time-out of collectives. Failures are noticed long before; this catches what nobody notices. "
        "Longer than the longest time one rank may keep the others waiting.",
    )
    no_progress_generations: int = Field(
        3,
        ge=0,
        description="The run gives up after this many generations in a row without a newly completed step; 0: it "
        "never does for that reason.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.backoff_max < self.backoff:
            backoff, longest = duration_text(self.backoff), duration_text(self.backoff_max)
            reason = f"must not be below recovery.backoff ({backoff}), the first pause; it is {longest}"
            raise Contradiction(("backoff_max", reason))
        return self


class SlurmSection(_Section):
    """How the run deals with Slurm."""

    requeue: bool = Field(
        True,
        description="Whether the run gives its job back to the queue when it cannot go on in this allocation; else "
        "it stops. Turn it off where something else resubmits jobs.",
    )
    end_lead: Lead = Field(
        Auto(),
        description="How long before the time limit the last checkpoint begins. `auto`: as late as what saves and "
        "steps have taken allows, with a margin; two minutes before that is known. A duration: longer than a "
        "checkpoint and the longest step take together; Slurm's warning may come up to 60 s early.",
    )
    command_timeout: Duration = Field(
        parse_duration("10s"),
        gt=0,
        description="How long one Slurm command may take. Raise it for a busy controller: training does not wait "
        "for it.",
    )


class LogsSection(_Section):
    """The workers' and agents' output below `logs/` in the run directory."""

    max_size: Size = Field(
        parse_size("16MiB"),
        ge=1024,
        description="A log file is rotated when it has reached this size. Lower it on a small file system.",
    )
    keep: int = Field(
        3,
        ge=1,
        description="Files kept of each log, the current one included: `agent.log`, `agent.log.1`, `agent.log.2`.",
    )


class LocalSection(_Section):
    """The cluster that `hpcft run` makes on this machine. Not used under Slurm."""

    nodes: int = Field(2, ge=1, description="Virtual nodes, each with an agent of its own; also `--nodes`.")
    workers: int = Field(2, ge=1, description="Workers on each of them; also `--workers`.")


class DrillSection(_Section):
    """One failure on purpose, announced beforehand. Only `hpcft run` does it."""

    kill_rank: int = Field(-1, ge=-1, description="Rank whose worker is killed with SIGKILL; -1: none.")
    at_step: int = Field(
        0, ge=0, description="It is killed once the run has completed this step; 0: as soon as it trains."
    )


class Config(_Section):
    """Everything that is configured; frozen."""

    run: RunSection
    job: JobSection
    nodes: NodesSection = Field(default_factory=NodesSection)
    heartbeat: HeartbeatSection = Field(default_factory=HeartbeatSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    mirror: MirrorSection = Field(default_factory=MirrorSection)
    data: DataSection = Field(default_factory=DataSection)
    recovery: RecoverySection = Field(default_factory=RecoverySection)
    slurm: SlurmSection = Field(default_factory=SlurmSection)
    logs: LogsSection = Field(default_factory=LogsSection)
    local: LocalSection = Field(default_factory=LocalSection)
    drill: DrillSection = Field(default_factory=DrillSection)
    train: Mapping[str, Annotated[Any, AfterValidator(_train_value)]] = Field(default_factory=dict)
    """Numbers, text, true or false, and lists of them: `run.config` of the training program, unchanged."""

    def to_json(self) -> bytes:
        """Durations, sizes and cadences as text with units, so that people can read the stored file too."""
        return self.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"

    @classmethod
    def from_json(cls, stored: bytes, source: str = "config.json") -> Config:
        """The inverse of `to_json`. Raises ConfigError that names `source` if it is not such a file."""
        try:
            tree = json.loads(stored)
        except ValueError as error:
            raise ConfigError([Mistake(source, "", f"is not JSON: {error}")]) from None
        if not isinstance(tree, dict):
            raise ConfigError([Mistake(source, "", "is not a JSON object")])
        return check(cls, tree, {}, source)


def kind_of(field: FieldInfo) -> str:
    """What a user writes for this key: "duration", "text", "whole number" …"""
    for mark in field.metadata:
        if isinstance(mark, Written):
            return mark.kind
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{toml_text(choice)}`" for choice in get_args(annotation))
    while annotation not in _KINDS and get_origin(annotation) is not tuple:
        annotation = get_args(annotation)[0]  # of `X | None` and of Annotated[X, …]
    return _KINDS[annotation if annotation in _KINDS else tuple]


_KINDS: dict[type, str] = {
    str: "text",
    Path: "path",
    int: "whole number",
    bool: "true or false",
    tuple: "list of text",
}
