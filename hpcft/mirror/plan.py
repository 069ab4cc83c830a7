"""What is mirrored and what goes: names and decisions, without the store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from hpcft.checkpoint.layout import parse_name
from hpcft.checkpoint.manifest import Manifest
from hpcft.ids import Generation, RunId, Step
from hpcft.places import Place
from hpcft.units import Auto, Cadence, EverySeconds, EverySteps, Never, cadence_text, counted, human_size, parse_cadence

_NAMED = re.compile(r"(step-\d{8,}-g\d{4,})-([0-9a-z]{4,32})")

LAG = 3
"""So many due checkpoints committed since the one mirrored last: the mirror does not keep up."""

SILENT_SECONDS = 30.0
"""The child says something every second. After this it is stopped, or hangs in the file system."""

PACKET = 1 << 16
"""What the leader and the child tell each other is shorter."""

_LONGEST_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the mirror's processes need to know of the configuration."""

    place: Place
    name: str
    """run.name."""
    run: RunId
    root: str
    """The run's directory of checkpoints."""
    every: Cadence
    keep: int
    bandwidth: int = 0
    """Bytes per second; 0: as fast as it goes."""
    read_back: bool = False
    adopt: bool = False
    request_seconds: float = 120.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "place": self.place.to_json(), "every": cadence_text(self.every)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        return cls(**{**raw, "place": Place.from_json(raw["place"]), "every": parse_cadence(raw["every"])})


@dataclass(frozen=True, slots=True, order=True)
class Mirrored:
    """A checkpoint in the store, by its name there; they are in the order of their commits."""

    generation: Generation
    step: Step
    checkpoint: str
    nonce: str

    @property
    def label(self) -> str:
        return f"{self.checkpoint}-{self.nonce}"

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        return cls(manifest.generation, manifest.step, manifest.name, manifest.nonce)

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """None: it is no such name."""
        found = _NAMED.fullmatch(label)
        parsed = parse_name(found[1]) if found else None
        if found is None or parsed is None:
            return None
        step, generation = parsed
        return cls(generation, step, found[1], found[2])


@dataclass(frozen=True, slots=True)
class Keys:
    """Of everything that belongs to one run, relative to the mirror's URL."""

    name: str
    run: str

    @property
    def manifests(self) -> str:
        return f"{self.name}/{self.run}/manifests/"

    @property
    def all_chunks(self) -> str:
        return f"{self.name}/{self.run}/chunks/"

    def manifest(self, which: Mirrored) -> str:
        return f"{self.manifests}{which.label}.json"

    def chunks(self, which: Mirrored) -> str:
        return f"{self.all_chunks}{which.label}/"

    def chunk(self, which: Mirrored, file: str, index: int) -> str:
        return f"{self.chunks(which)}{file}/{index:05d}"


def due(every: Cadence, last: tuple[Step, float] | None, step: Step, created: float) -> bool:
    """Whether a checkpoint is to be mirrored; `last` are step and time of creation of the one mirrored last.

    A run that went back to before it begins anew: what counts is then the branch that goes on.
    """
    match every:
        case Auto():
            return True  # what is made as often as pays
        case Never():
            return False
        case _ if last is None or step < last[0]:
            return True
        case EverySteps(steps):
            return step >= last[0] + steps
        case EverySeconds(seconds):
            return created >= last[1] + seconds


def pause_after(failures: int) -> float:
    """Seconds until the next try, after so many failures in a row: 1, 2, 4, … 60."""
    return min(_LONGEST_PAUSE, float(1 << min(max(failures - 1, 0), 10)))


def superfluous(offered: Iterable[Mirrored], keep: int) -> list[Mirrored]:
    """All but the `keep` committed last, oldest first."""
    return sorted(offered)[: -max(keep, 1)]


def unfinished(labels: Iterable[str], offered: Iterable[Mirrored], done: Mirrored) -> list[Mirrored]:
    """What has chunks and no manifest, and was committed before the one just mirrored: nobody goes on with it."""
    whole = {each.label for each in offered}
    found = (Mirrored.parse(label) for label in labels if label not in whole)
    return sorted(each for each in found if each is not None and each < done)


def way_back(offered: Sequence[Mirrored]) -> list[Mirrored]:
    """The checkpoints to try, the newest first. Each is of an earlier step than those before it.

    What a rollback left behind has a step that the branch which took its place has passed as well.
    """
    chosen: list[Mirrored] = []
    for each in sorted(offered, reverse=True):
        if not chosen or each.step < chosen[-1].step:
            chosen.append(each)
    return chosen


# --- what is known of it -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """What the mirror's process says of itself, and what the leader adds."""

    mirrored: Step | None = None
    """The newest checkpoint in the store; None: there is none, or the store has not been asked yet."""
    uploading: str | None = None
    """Name of the checkpoint that is under way."""
    bytes_left: int = 0
    """Of that one."""
    behind: int = 0
    """Due checkpoints committed since the one mirrored last, that under way included."""
    error: str | None = None
    """What is wrong, or went wrong last and has not gone well since."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        return cls(**raw)

    def failing(self, error: str) -> Self:
        return replace(self, error=error)

    def warning(self) -> str:
        """For the operator; empty when all is well."""
        upto = "nothing is mirrored yet" if self.mirrored is None else f"mirrored up to step {self.mirrored}"
        if self.error is not None:
            return f"the mirror of checkpoints fails, and tries again ({upto}): {self.error}"
        if self.behind >= LAG:
            left = f", {human_size(self.bytes_left)} to go" if self.uploading is not None else ""
            behind = counted(self.behind, "due checkpoint")
            return f"the mirror of checkpoints does not keep up: {upto}, {behind} behind{left}"
        return ""
