"""The worker's end of its arenas: asks for them, copies its share of the state into one, and says that it has.

What the agent frees may be written again; until then a slot is the agent's. Nothing here waits for a file system.

On a GPU the copy runs on a stream of its own, behind everything that the step has queued, into memory that is
registered with CUDA once. Parameters and optimizer state must not change before it is done: the optimizer's next step
waits for it, on the device (`guard`). Everything else may change before that, in the next forward pass, and is copied
in the order of the program's own work.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcft.checkpoint.arena import Arena, memory_file
from hpcft.checkpoint.image import Image
from hpcft.checkpoint.manifest import metrics_to_json
from hpcft.checkpoint.pieces import Piece
from hpcft.checkpoint.tree import DTYPES, FlatState
from hpcft.checkpoint.write import Plan, Words
from hpcft.worker.link import Link

ANSWER_SECONDS = 300.0
"""How long the agent may take to make arenas: a second per GiB, and more where memory has to be found first."""
_TORCH_SPLITS = 32_768
"""Elements: above, torch's copy is done by as many threads as the program has given it."""
_WAIT_SECONDS = 0.5
"""Between two looks at the lease while waiting for the agent."""


class NoArenas(Exception):
    """The agent has no memory for a copy; the reason is for people."""


@dataclass(frozen=True, slots=True)
class _Slot:
    arena: Arena
    places: tuple[tuple[Tensor, Piece], ...]
    """Where each piece goes; in the order of the image."""


class Arenas:
    """What this rank's share is copied into."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self._link = link
        self._device = device
        self._plan: Plan | None = None
        self._image: Image | None = None
        self._slots: tuple[_Slot, ...] = ()
        self._free: deque[int] = deque()
        self._asked = 0
        """Questions that the agent has not answered yet; what it says to the last one counts."""
        self.refused: str | None = None
        """Why the agent has no memory for a copy."""
        self._stream: torch.cuda.Stream | None = None
        self._copying: torch.cuda.Event | None = None

    def prepare(self, plan: Plan, image: Image) -> None:
        """Ask for memory for a share like this, unless it is there. Does not wait."""
        if self._plan == plan:
            return
        self._give_up()
        self._plan, self._image = plan, image
        self._asked += 1
        self._link.say_reserve(plan.size, memory_file("hpcft-plan", plan.to_bytes()))

    def _give_up(self) -> None:
        for slot in self._slots:
            if self._device.type == "cuda":
                _unpin(slot.arena)
            slot.arena.close()
        self._slots, self.refused = (), None
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
        """A slot that may be written, as soon as there is one.

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

    def answered(self) -> bool:
        """Whether the agent has answered; what it has made is mapped here."""
        self._hear(0.0)
        return self._asked == 0

    def copy(
        self, slot: int, flat: FlatState, later: Collection[str], began: float, about: Mapping[str, Any], words: Words
    ) -> None:
        """Copy the share of `flat` into the slot, and tell the agent when it is there.

        `later`: names of the tensors that only an optimizer's step changes, before which comes `guard`. `began`: when
        the save did (monotonic); from then until this returns, training stands still.
        """
        chosen, plan, image = self._slots[slot], self._plan, self._image
        assert plan is not None and image is not None
        chosen.arena.view[: len(image.header)] = image.header

        def say(blocked: float) -> None:
            values = None if words.values is None else memory_file("hpcft-values", words.values)
            own = {"slot": slot, "size": plan.size, "blocked": blocked, "metrics": metrics_to_json(words.metrics or {})}
            said = {**own, "position": words.position, "versions": words.versions, **about}
            self._link.say_snapshot(said, values)

        if self._device.type != "cuda":
            for place, piece in chosen.places:
                _copy(place, flat.part(piece))
            say(time.monotonic() - began)
            return
        # what else may change is copied first, in the order of the program's own work, which the stream then waits for
        for place, piece in chosen.places:
            if piece.name not in later:
                place.copy_(flat.part(piece), non_blocking=True)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, piece in chosen.places:
                if piece.name in later:
                    source = flat.part(piece)
                    place.copy_(source, non_blocking=True)
                    source.record_stream(self._stream)
            self._copying = copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)

        blocked = time.monotonic() - began

        def say_when_done() -> None:
            copied.synchronize()
            say(blocked)

        threading.Thread(target=say_when_done, name="hpcft-copied", daemon=True).start()

    def guard(self) -> None:
        """Before parameters change: the device waits for the copy of them, if one is on its way."""
        if self._copying is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copying)
            self._copying = None

    def _hear(self, seconds: float) -> None:
        while (heard := self._link.hear(seconds)) is not None:
            seconds = 0.0
            message, fds = heard
            match message:
                case {"kind": "arenas", "size": int() as size, "free": list() as free}:
                    self._map(size, fds, free)
                case {"kind": "no_arenas", "reason": str() as reason}:
                    self._asked -= 1
                    self.refused = None if self._asked else reason
                case {"kind": "free", "slot": int() as slot}:
                    self._free.append(slot)

    def _map(self, size: int, fds: Sequence[int], free: Sequence[int]) -> None:
        arenas = [Arena(fd) for fd in fds]
        self._asked -= 1
        if self._asked or self._plan is None or self._image is None or size != self._plan.size:
            for arena in arenas:  # of an earlier question
                arena.close()
            return
        for arena in arenas:
            arena.touch()
            if self._device.type == "cuda":
                _pin(arena)
        self._slots = tuple(_Slot(arena, _places(arena, self._image)) for arena in arenas)
        self._free = deque(free)  # what was said free before is one of them, or of earlier arenas


def _places(arena: Arena, image: Image) -> tuple[tuple[Tensor, Piece], ...]:
    memory = torch.frombuffer(arena.view, dtype=torch.uint8)
    found = []
    for placed in image.placed:
        piece = placed.piece
        part = memory[placed.begin : placed.end].view(DTYPES[piece.dtype]).view(piece.extent)
        found.append((part, piece))
    return tuple(found)


def _copy(place: Tensor, source: Tensor) -> None:
    """memcpy(3) where it can be: its stores go past the caches, and a small tensor costs a microsecond less."""
    as_it_lies = source.is_cpu and source.is_contiguous() and not (source.is_conj() or source.is_neg())
    if as_it_lies and (torch.get_num_threads() == 1 or source.numel() < _TORCH_SPLITS):
        ctypes.memmove(place.data_ptr(), source.data_ptr(), place.nbytes)
    else:
        place.copy_(source)


def _pin(arena: Arena) -> None:
    """Let the device write there by itself. Where it may not, copies are slower, and right all the same."""
    memory = torch.frombuffer(arena.view, dtype=torch.uint8)
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if status := cudart.cudaHostRegister(memory.data_ptr(), arena.size, 0):
        print(f"hpcft: {arena.size} bytes could not be registered with CUDA ({status}): copies will be slower")


def _unpin(arena: Arena) -> None:
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(torch.frombuffer(arena.view, dtype=torch.uint8).data_ptr())
