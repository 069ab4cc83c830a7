"""The worker's end of its arenas: asks for them, copies its share of the state into one, and says that it has.

What the agent frees may be written again; until then a slot is the agent's. Nothing here waits for a file system.

On a GPU the copy runs on a stream of its own, behind everything that the step has queued, into memory that is
registered with CUDA once. Parameters and optimizer state must not change before it is done: the optimizer's next step
waits for it, on the device (`guard`). Everything else may change before that, in the next forward pass, and is copied
in the order of the program's own work. A parameter that changes otherwise meanwhile spoils the copy: it is given up,
and the save has failed.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hpcft.checkpoint.arena import Arena, memory_file
from hpcft.checkpoint.image import Image
from hpcft.checkpoint.manifest import metrics_to_json
from hpcft.checkpoint.pieces import Piece
from hpcft.checkpoint.tree import DTYPES, FlatState
from hpcft.checkpoint.write import Plan, SaveError, Words
from hpcft.ids import Step
from hpcft.worker.device import Flight, SideStream, changes_of
from hpcft.worker.link import Link

ANSWER_SECONDS = 300.0
"""How long the agent may take to make arenas: a second per GiB, and more where memory has to be found first."""
_UNHEARD = "the agent was not told of the copy"
_TORCH_SPLITS = 32_768
"""Elements: above, torch's copy is done by as many threads as the program has given it."""
_WAIT_SECONDS = 0.5
"""Between two looks at the lease while waiting for the agent."""


class NoArenas(Exception):
    """The agent has no memory for a copy; the reason is for people."""


_Place: TypeAlias = tuple[Tensor, Piece, tuple[int, int]]
"""Where a piece goes; with address and length in bytes, as asking for them takes longer than a small tensor's copy."""


@dataclass(frozen=True, slots=True)
class _Slot:
    arena: Arena
    places: tuple[_Place, ...]
    """In the order of the image."""


class Arenas:
    """What this rank's share is copied into."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link = link
        self._plan: Plan | None = None
        self._image: Image | None = None
        self._slots: tuple[_Slot, ...] = ()
        self._free: deque[int] = deque()
        self._asked = 0
        """Questions that the agent has not answered yet; what it says to the last one counts."""
        self.refused: str | None = None
        """Why the agent has no memory for a copy."""
        self._side = SideStream(device) if device.type == "cuda" else None
        self._flights: list[Flight] = []
        """Copies that the device has not finished, or that are not said yet; in their order."""

    def prepare(self, plan: Plan, image: Image) -> None:
        """Ask for memory for a share like this, unless it is there. Waits for copies that a device still makes.

        NoArenas: the agent does not listen.
        """
        if self._plan == plan:
            return
        said = memory_file("hpcft-plan", plan.to_bytes())
        self._give_up()
        if not self._link.say_reserve(plan.size, said):
            raise NoArenas("the agent was not asked for any")
        self._plan, self._image = plan, image
        self._asked += 1

    def finish(self) -> None:
        """Wait until all copies are there, and the agent was told so. Ends this process if its lease runs out."""
        for flight in self._flights:
            flight.land(self._link.check_lease)
        self._flights.clear()

    def _give_up(self) -> None:
        self.finish()  # the device writes there; and what is said of a copy belongs to the plan that was said before
        for slot in self._slots:
            if self._side is not None:
                self._side.unpin(slot.arena)
            slot.arena.close()
        self._slots, self._plan, self._image, self.refused = (), None, None, None
        self._free.clear()

    def has_room(self) -> bool:
        """Whether a save would not have to wait for an earlier one's copies. (It may have to for the first arenas.)"""
        self._hear(0.0)
        return bool(self._free) or not self._slots

    def has_slot(self) -> bool:
        """Whether a copy can be made at once."""
        self._hear(0.0)
        return bool(self._free)

    def take(self) -> int:
        """A slot that may be written, as soon as there is one: to be copied into, or put back.

        Raises:
            NoArenas: the agent has none for this rank.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            self._hear(0.0)
            if self.refused is not None:
                raise NoArenas(self.refused)
            if self._free and not self._asked:
                return self._free.popleft()
            if self._asked and time.monotonic() > deadline:
                raise NoArenas(f"the agent has not made any in {ANSWER_SECONDS:.0f} s")
            self._link.check_lease()
            self._hear(_WAIT_SECONDS)

    def put_back(self, slot: int) -> None:
        """Nothing has become of the copy: the slot may be taken again."""
        self._free.append(slot)

    def answered(self) -> bool:
        """Whether the agent was asked and has answered; what it has made is mapped here."""
        self._hear(0.0)
        return self._plan is not None and self._asked == 0

    def copy(
        self,
        slot: int,
        flat: FlatState,
        later: Mapping[str, Tensor | None],
        began: float,
        about: Mapping[str, Any],
        words: Words,
    ) -> None:
        """Copy the share of `flat` into the slot, and tell the agent when it is there.

        `later`: the tensors that only an optimizer's step changes, before which comes `guard`; by name, with what
        counts their changes if they do not themselves. `began`: when the save did (monotonic); from then until this
        returns, training stands still.

        Whatever it raises, the slot is still the caller's. SaveError: the agent does not listen.
        """
        chosen, plan, image = self._slots[slot], self._plan, self._image
        assert plan is not None and image is not None
        chosen.arena.view[: len(image.header)] = image.header

        said = {
            **about,
            "slot": slot,
            "size": plan.size,
            "position": words.position,
            "versions": words.versions,
            "metrics": metrics_to_json(words.metrics or {}),
        }
        values = None if words.values is None else memory_file("hpcft-values", words.values)

        def say(blocked: float) -> bool:
            return self._link.say_snapshot({**said, "blocked": blocked}, values)

        def landed(why: str, since: float) -> None:
            if why and values is not None:
                os.close(values)
            why = why or ("" if say(since - began) else _UNHEARD)
            if why:
                self.put_back(slot)
                print(f"hpcft: the copy of step {about['step']} failed: {why}", file=sys.stderr)
                self._link.say_save_failed(Step(about["step"]), why)

        try:
            if self._side is not None:
                self._fly(self._side, chosen, flat, later, landed)
                return
            _copy(chosen.places, flat)
        except BaseException:
            if values is not None:
                os.close(values)
            raise
        if not say(time.monotonic() - began):
            raise SaveError(_UNHEARD)

    def _fly(
        self,
        side: SideStream,
        chosen: _Slot,
        flat: FlatState,
        later: Mapping[str, Tensor | None],
        landed: Callable[[str, float], None],
    ) -> None:
        first, beside, counted = [], [], {}
        for place, piece, _ in chosen.places:
            if piece.name in later:
                beside.append((place, flat.part(piece)))
                tensor = later[piece.name]
                tensor = flat.tensors[piece.name] if tensor is None else tensor
                counted[piece.name] = tensor, changes_of(tensor)
            else:
                first.append((place, flat.part(piece)))
        self._flights = [each for each in self._flights if not each.over]
        before = self._flights[-1] if self._flights else None
        try:
            copied = side.start(first, beside)
            sources = [source.untyped_storage() for _, source in (*first, *beside)]
            self._flights.append(Flight(copied, sources, counted, landed, before))
        except BaseException:
            with suppress(RuntimeError):  # what it was, most likely
                side.drain()  # nothing may be on its way into a slot that somebody takes
            raise

    def guard(self) -> None:
        """Before parameters change: the device waits for the copies of them that are on their way.

        Each time, until they are there: the next optimizer may step on another stream.
        """
        for flight in self._flights:
            if self._side is not None and not flight.over:
                self._side.hold_back(flight.copied)
                flight.guard()

    def _hear(self, seconds: float) -> None:
        while (heard := self._link.hear(seconds)) is not None:
            seconds = 0.0
            message, fds = heard
            match message:
                case {"kind": "arenas", "size": int() as size, "free": list() as free}:
                    self._map(size, fds, free)
                case {"kind": "arena", "size": int() as size, "slot": int() as slot}:
                    self._add(size, slot, fds)
                case {"kind": "no_arenas", "reason": str() as reason}:
                    self._asked -= 1
                    self.refused = None if self._asked else reason
                case {"kind": "free", "slot": int() as slot}:
                    self._free.append(slot)
                case _:  # copies to start from, say, of a program that does not ask for them
                    _close_all(fds)

    def _map(self, size: int, fds: Sequence[int], free: Sequence[int]) -> None:
        self._asked -= 1
        if self._asked or self._plan is None or self._image is None or size != self._plan.size:
            _close_all(fds)  # of an earlier question
            return
        if (made := self._mapped(fds)) is not None:
            self._slots = made
            self._free = deque(free)  # what was said free before is one of them, or of earlier arenas

    def _mapped(self, fds: Sequence[int]) -> tuple[_Slot, ...] | None:
        assert self._image is not None
        arenas: list[Arena] = []
        try:
            for fd in fds:
                arena = Arena(fd)
                arenas.append(arena)
                arena.touch()
                if self._side is not None:
                    self._side.pin(arena)
        except OSError as error:
            for arena in arenas:
                arena.close()
            _close_all(fds[len(arenas) :])
            self.refused = f"the agent's memory could not be mapped: {error.strerror}"
            return None
        self.refused = None
        return tuple(_Slot(arena, _places(arena, self._image)) for arena in arenas)

    def _add(self, size: int, slot: int, fds: Sequence[int]) -> None:
        """There is memory for one more, by now."""
        if self._asked or self._plan is None or size != self._plan.size or slot != len(self._slots):
            _close_all(fds)  # of an earlier question
            return
        if (made := self._mapped(fds)) is not None:
            self._slots += made
            self._free.append(slot)


def _places(arena: Arena, image: Image) -> tuple[_Place, ...]:
    memory = torch.frombuffer(arena.view, dtype=torch.uint8)
    found = []
    for placed in image.placed:
        piece = placed.piece
        part = memory[placed.begin : placed.end].view(DTYPES[piece.dtype]).view(piece.extent)
        found.append((part, piece, (part.data_ptr(), part.nbytes)))
    return tuple(found)


def _copy(places: Iterable[_Place], flat: FlatState) -> None:
    """memcpy(3) where it can be: its stores go past the caches, and a small tensor costs a microsecond less."""
    tensors, alone = flat.tensors, torch.get_num_threads() == 1
    for place, piece, (address, length) in places:
        source = tensors[piece.name]
        if source.shape != piece.extent:
            source = flat.part(piece)
        as_it_lies = source.is_cpu and source.is_contiguous() and not (source.is_conj() or source.is_neg())
        if as_it_lies and (alone or source.numel() < _TORCH_SPLITS):
            ctypes.memmove(address, source.data_ptr(), length)
        else:
            place.copy_(source)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
