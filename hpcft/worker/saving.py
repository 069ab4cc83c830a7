"""One rank's part in a checkpoint: what belongs to the state, and copying or writing this rank's share of it.

The state is what the user gave to `Run.restore`, under the names given there, and `run`: the step and what it was
made by. Parameters and optimizer state are the same on every rank, so each writes a share of them; or they are sharded
(DTensors), and each writes its own part. Everything else (buffers, schedulers, the data position) counts as rank 0 has
it. Randomness is a function of the step.

As a rule a save is a copy into shared memory (`arenas`), and the agent does the rest while training goes on. Where
there is no memory for that, or it is not wanted, the share is written from here, and training waits.

A save that fails is told to the agent and training goes on: the older checkpoints are still there. This holds for
whatever goes wrong, also in a `state_dict` of the user's own.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpcft import durable
from hpcft.checkpoint.boxes import Box
from hpcft.checkpoint.image import Image
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.checkpoint.manifest import Metric
from hpcft.checkpoint.pieces import TensorShape
from hpcft.checkpoint.sharding import is_sharded, split
from hpcft.checkpoint.share import content, plan_share, save_share, words_of
from hpcft.checkpoint.tree import FlatState, StateError, flatten
from hpcft.checkpoint.write import Plan, paced
from hpcft.data.ledger import LedgerWriter
from hpcft.data.loader import Data
from hpcft.errors import HpcftError, UsageError
from hpcft.ids import Rank, Step
from hpcft.page import Phase
from hpcft.worker.arenas import Arenas, NoArenas
from hpcft.worker.link import Link
from hpcft.worker.spec import WorkerSpec

OWN = "run"
"""Name of hpcft's own values beside those of the user's objects."""


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back: models, optimizers, schedulers, scalers, data, the user's own."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state_dict: Any, /) -> object: ...


def named(objects: Mapping[str, object]) -> dict[str, Stateful]:
    """The objects whose states make up the run's, as they are without wrappers: a state does not depend on those.

    UsageError: one of them has no state, or a name that is taken.
    """
    found: dict[str, Stateful] = {}
    for name, given in objects.items():
        if name == OWN or not name.isidentifier():
            raise UsageError(f"run.restore({name}=…): this name cannot be used", "choose another one")
        unwrapped = _unwrapped(given)
        if not isinstance(unwrapped, Stateful):
            raise UsageError(
                f"run.restore({name}=…): a {type(unwrapped).__name__} has no state_dict and load_state_dict",
                "give models, optimizers, schedulers, data, or objects of your own with these two methods",
            )
        found[name] = unwrapped
    return found


def _unwrapped(given: object) -> object:
    while True:
        inner = getattr(given, "_orig_mod", None)  # torch.compile
        if isinstance(given, DistributedDataParallel):
            given = given.module
        elif isinstance(given, nn.Module) and isinstance(inner, nn.Module):
            given = inner
        else:
            return given


class Saving:
    """What is saved, and how far that got. `last` is the step of the last save tried (or restored from)."""

    def __init__(self, spec: WorkerSpec, link: Link, device: torch.device) -> None:
        self._spec = spec
        self._link = link
        self._arenas = Arenas(link, device) if spec.copies else None
        self._index: Mapping[str, TensorShape] = {}
        self._boxes: Mapping[str, Box] = {}
        self._planned: tuple[Plan, Image]
        self._later: Mapping[str, Tensor | None] = {}
        """Tensors that nothing but an optimizer's step changes, with what counts their changes (see `Arenas.copy`)."""
        self._objects: dict[str, Stateful] = {}
        self._data: Data | None = None
        self._ledger: LedgerWriter | None = None
        self._copies = 0
        self.last: Step | None = None
        self.last_copy: Step | None = None
        """The last step of which a copy was tried that is not written."""
        self.left_out: Step | None = None
        """The last step of which the save was left out, on all ranks."""
        self.metrics: dict[str, Metric] = {}
        """What the program has reported since the last checkpoint; it goes into the next one."""

    def remember(self, objects: dict[str, Stateful], data: Data | None, ledger: LedgerWriter | None) -> None:
        """From now on the state is that of these. StateError: there is something in it that cannot be kept."""
        self._objects, self._data, self._ledger = objects, data, ledger
        if self._spec.run_directory is not None:
            flatten(self._state(Step(0)))  # better now than in the first save
        arenas = self._arenas
        if arenas is not None:
            for each in objects.values():
                if isinstance(each, Optimizer):
                    each.register_step_pre_hook(lambda *_: arenas.guard())

    def prepare(self) -> None:
        """The state is complete now (optimizers have theirs after the first step): have memory made for its copies.

        Never raises, as `save`: what cannot be prepared now, the first save tries again.
        """
        if self._arenas is None or not self._objects:
            return
        try:
            self._arenas.prepare(*self._plan(flatten(self._state(Step(0)))))
        except Exception as error:  # whatever it is must not end the training; in a save it is an incident
            if not isinstance(error, HpcftError):
                traceback.print_exc()
            print(f"hpcft: no memory for copies was asked for yet, the next save will: {error}", file=sys.stderr)

    def finish(self) -> None:
        """Wait until the copies that a device makes by itself are there, and the agent knows."""
        if self._arenas is not None:
            self._arenas.finish()

    def prepared(self) -> bool:
        """Whether it is known if there is such memory. UsageError: there is none, and without it nothing is trained."""
        if self._arenas is None or not self._objects:
            return True
        answered = self._arenas.answered()
        if self._arenas.refused is not None and self._spec.needs_copies:
            raise UsageError(
                f"there is no memory for copies of the state, and checkpoint.low_memory is 'stop': "
                f"{self._arenas.refused}",
                "ask Slurm for more memory, raise checkpoint.memory, or let training wait with "
                "checkpoint.low_memory = 'write'",
            )
        return answered

    def save(self, step: Step) -> None:
        """Save this rank's share of the state at `step`, and say so; not left out, even if it has to wait for memory.

        The state must not change meanwhile. Nothing is saved twice. Never raises: a failure is reported, and training
        goes on.
        """
        if self._spec.run_directory is None or self.last == step:
            return
        self._link.slot.set_phase(Phase.CHECKPOINT)
        self.last = step
        self._try(step, durable=True)

    def copy(self, step: Step) -> None:
        """Copy this rank's share into memory, where it stays: left out where there is no room. Never raises, as `save`.

        Other ranks may have come too late for this step.
        """
        if self._arenas is None or self._spec.run_directory is None or step in (self.last, self.last_copy):
            return
        self.last_copy = step
        self._link.slot.set_phase(Phase.CHECKPOINT)
        if self._arenas.has_slot():
            self._try(step, durable=False)

    def due(self, step: Step, *, durable: bool, ordered: bool) -> None:
        """Save (`durable`) or copy at a step where that is due by its number: all ranks are here, and take part.

        Where there is no room on one of them, all leave it out. `ordered`: this rank has been told to save here, of
        which others may not have heard: then all save, as `save` does. Never raises, as `save`.
        """
        if self._spec.run_directory is None:
            return
        self._link.slot.set_phase(Phase.CHECKPOINT)
        room = True
        if self._arenas is not None and not (durable and self._spec.waits):
            room = self._arenas.has_room() if durable else self._arenas.has_slot()
            room, ordered = self._agree(room, ordered)
        if ordered or (durable and room):
            self.save(step)
        elif durable:
            self.left_out = step
            self._link.say_skipped(step, "the copies of earlier saves are still being written")
        elif self._arenas is not None:
            self.last_copy = step
            if room:
                self._try(step, durable=False)

    def _try(self, step: Step, *, durable: bool) -> None:
        try:
            self._save(step, durable)
        except HpcftError as error:
            self._failed(step, error.message)
        except Exception as error:  # whatever it is must not end the training: it is an incident
            traceback.print_exc()
            self._failed(step, f"{type(error).__name__}: {error}")

    def _agree(self, room: bool, ordered: bool) -> tuple[bool, bool]:
        """Whether all ranks have room, and whether one of them was told to save. They ask at the same step: with the
        copies of some of them, nobody could do anything."""
        if self._spec.world_size > 1:
            votes = torch.tensor([int(room), int(not ordered)])
            dist.all_reduce(votes, dist.ReduceOp.MIN)
            room, ordered = bool(votes[0]), not votes[1]
        return room, ordered

    def _save(self, step: Step, durable: bool) -> None:
        began = time.monotonic()
        if not self._objects:
            raise UsageError("nothing was given to run.restore, so there is nothing to save")
        for name, each in self._objects.items():
            if isinstance(each, Optimizer):
                _check_parts(name, each)
        flat = flatten(self._state(step))
        copied = self._arenas is not None and self._copy(self._arenas, flat, step, began, durable)
        if durable and not copied:
            self._write(flat, step, began)

    def _copy(self, arenas: Arenas, flat: FlatState, step: Step, began: float, durable: bool) -> bool:
        """False: there is no memory for it."""
        plan, image = self._plan(flat)
        try:
            arenas.prepare(plan, image)
            slot = arenas.take()
        except NoArenas:
            return False
        try:
            ledger = None if self._ledger is None else str(self._ledger.path)
            words = words_of(self._spec.rank, flat, self._position(), self.metrics)
            about = {"step": step, "durable": durable, "ledger": ledger, "replica": self._compared(flat)}
            arenas.copy(slot, flat, self._later, began, about, words)
        except BaseException:
            arenas.put_back(slot)
            raise
        if durable:
            self.metrics = {}
        return True

    def _compared(self, flat: FlatState) -> tuple[Rank, str] | None:
        """Another rank, and the digest that its share has here: now and then, as it takes half as long as a copy.

        Of replicas only. Rank 0's share has in it what only rank 0 has: nobody can compare it.
        """
        self._copies += 1
        every, world_size = self._spec.compare_every, self._spec.world_size
        if not every or self._copies % every or world_size == 1 or flat.boxes:
            return None
        number = self._copies // every
        other = Rank((self._spec.rank + 1 + number % (world_size - 1)) % world_size)
        pinned = self._pinned(self._index)
        if other == 0 and pinned:
            return None
        _, image = plan_share(self._index, flat.boxes, other, world_size, pinned)
        return other, durable.digest_of_chunks(durable.chunk_digests_of(content(flat, image)))

    def _plan(self, flat: FlatState) -> tuple[Plan, Image]:
        if not flat.has(self._index) or flat.boxes != self._boxes:
            index = flat.index()
            self._planned = plan_share(index, flat.boxes, self._spec.rank, self._spec.world_size, self._pinned(index))
            self._later = self._stepped(index)
            self._index, self._boxes = index, flat.boxes
        return self._planned

    def _position(self) -> Mapping[str, Any] | None:
        return None if self._data is None else self._data.state_dict()

    def _write(self, flat: FlatState, step: Step, began: float) -> None:
        spec = self._spec
        assert spec.run_directory is not None
        if self._ledger is not None:
            self._ledger.sync()
            if self._ledger.failed:
                print(f"hpcft: the ledger is incomplete: {self._ledger.failed}", file=sys.stderr)
        report = save_share(
            spec.run_directory / "checkpoints",
            checkpoint_name(step, spec.generation),
            spec.nonce,
            spec.rank,
            spec.world_size,
            flat,
            pinned=self._pinned(flat.tensors),
            position=self._position(),
            metrics=self.metrics,
            before=paced(spec.bandwidth, lambda written: self._link.check_lease()),
        )
        self.metrics = {}
        took = time.monotonic() - began
        self._link.say_shard(step, report, blocked=took, took=took)

    def _failed(self, step: Step, reason: str) -> None:
        print(f"hpcft: the checkpoint of step {step} failed on rank {self._spec.rank}: {reason}", file=sys.stderr)
        self._link.say_save_failed(step, reason)

    def _state(self, step: Step) -> dict[str, object]:
        spec = self._spec
        own = {"step": step, "seed": spec.seed, "generation": spec.generation, "world_size": spec.world_size}
        return {OWN: own, **{name: each.state_dict() for name, each in self._objects.items()}}

    def _stepped(self, names: Iterable[str]) -> Mapping[str, Tensor | None]:
        """Of these tensors, those that nothing but a step of one of the optimizers changes.

        Not its settings: a learning rate that is a tensor is set by others. A DTensor counts the changes of its parts.
        """
        optimizers = {name: each for name, each in self._objects.items() if isinstance(each, Optimizer)}
        stepped = {id(p) for each in optimizers.values() for group in each.param_groups for p in group["params"]}
        own = tuple(f"{name}.state." for name in optimizers)
        found: dict[str, Tensor | None] = {name: None for name in names if name.startswith(own)}
        for name, each in self._objects.items():
            if isinstance(each, nn.Module):
                for parameter, held in each.named_parameters(remove_duplicate=False):
                    if id(held) in stepped:
                        found[f"{name}.{parameter}"] = held if is_sharded(held) else None
        return found

    def _pinned(self, names: Iterable[str]) -> set[str]:
        """Of these tensors, all but those that every rank has alike: parameters and the optimizers' state."""
        shared: set[str] = set()
        alike: set[str] = set()
        for name, each in self._objects.items():
            if isinstance(each, nn.Module):
                shared |= {f"{name}.{parameter}" for parameter, _ in each.named_parameters(remove_duplicate=False)}
            elif isinstance(each, Optimizer):
                alike.add(name)
        return {name for name in names if name not in shared and name.partition(".")[0] not in alike}


def _check_parts(name: str, optimizer: Optimizer) -> None:
    """StateError: it keeps plain tensors for its rank's part of a sharded parameter.

    They would look alike on all ranks, and one rank's would be saved for all.
    """
    for number, (parameter, values) in enumerate(optimizer.state.items()):
        if not is_sharded(parameter):
            continue
        local = split(parameter)[1].shape
        for key, value in values.items():
            plain = isinstance(value, Tensor) and not is_sharded(value)
            if plain and value.shape == local != parameter.shape:
                raise StateError(
                    f"state[{name!r}]['state'][{number}][{key!r}] is a plain tensor for a rank's part of a parameter, "
                    "and does not say which part",
                    f"{type(optimizer).__name__} has to make its state of DTensors, as torch's own optimizers do",
                )
