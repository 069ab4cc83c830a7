"""A GPU's part in a copy: it copies by itself while the program goes on, so what it copies must not change meanwhile.

`SideStream` is all that is CUDA's. `Flight` is what has to be known of a copy until it is there, and needs of the
device no more than an event to wait for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcft.checkpoint.arena import Arena

_WAIT_SECONDS = 0.5
"""Between two looks at the lease."""


class SideStream:
    """The stream of one GPU on which copies are made, beside the program's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def start(
        self, first: Iterable[tuple[Tensor, Tensor]], beside: Iterable[tuple[Tensor, Tensor]]
    ) -> torch.cuda.Event:
        """Begin to copy pairs of a place and its source; the event comes when all are there.

        `first` are copied in the order of the program's own work, `beside` after that, and beside what follows.
        """
        for place, source in first:
            place.copy_(source, non_blocking=True)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, source in beside:
                place.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        return copied

    def hold_back(self, copied: torch.cuda.Event) -> None:
        """What the program queues from now on waits for the copy, on the device."""
        torch.cuda.current_stream(self._device).wait_event(copied)

    def drain(self) -> None:
        """Wait for everything that is queued."""
        torch.cuda.synchronize(self._device)

    def pin(self, arena: Arena) -> None:
        """Let the device write there by itself. Where it may not, copies are slower, and right all the same."""
        memory = torch.frombuffer(arena.view, dtype=torch.uint8)
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if status := cudart.cudaHostRegister(memory.data_ptr(), arena.size, 0):
            print(f"hpcft: {arena.size} bytes could not be registered with CUDA ({status}): copies will be slower")

    def unpin(self, arena: Arena) -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        cudart.cudaHostUnregister(torch.frombuffer(arena.view, dtype=torch.uint8).data_ptr())


class Flight:
    """A copy that is on its way.

    Its sources may change once `guard` was called, on a stream that waits for it (`SideStream.hold_back`: each stream
    for itself). What has changed before that, or before the copy was there, may be in it in part: it is none. Tensors
    count the changes that are made in place (but for those through `.data`), and that is where it shows.
    """

    def __init__(
        self,
        copied: torch.cuda.Event,
        sources: Sequence[torch.UntypedStorage],
        counted: Mapping[str, tuple[Tensor, int]],
        landed: Callable[[str, float], None],
        before: Flight | None,
    ) -> None:
        """`counted`: what must not change, with the changes that it had seen when the copy began. `landed` is called
        on a thread when all is there, after that of the flight `before`: with an empty text, or why it is no copy; and
        since when (monotonic) the program has gone on.
        """
        self._since = time.monotonic()
        self.copied = copied
        self._sources = sources  # held until then: nobody else gets their memory
        self._counted = counted
        self._landed = landed
        self._before = before
        self._lock = threading.Lock()
        self._guarded = False
        self._changed = ""
        self._thread = threading.Thread(target=self._accompany, name="hpcft-copied", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def guard(self) -> None:
        """What changes after this is not in the copy any more; on return the changes before it are counted.

        Only the first time: later ones are those of steps that were held back.
        """
        with self._lock:
            if not self._guarded:
                self._guarded = True
                changed = (name for name, (tensor, then) in self._counted.items() if changes_of(tensor) != then)
                self._changed = next(changed, "")

    def land(self, meanwhile: Callable[[], None]) -> None:
        """Wait until it is there, and said."""
        while not self.over:
            self._thread.join(_WAIT_SECONDS)
            meanwhile()

    def _accompany(self) -> None:
        try:
            self.copied.synchronize()
            self.guard()
            why = self._changed and (
                f"{self._changed} was changed outside an optimizer's step while it was being copied: "
                "change it in register_step_post_hook of the optimizer"
            )
        except Exception as error:  # the device's, whatever it is; the agent must hear of it
            why = f"{type(error).__name__}: {error}"
        self._sources, self._counted = (), {}
        if self._before is not None:
            self._before._thread.join()
            self._before = None
        self._landed(why, self._since)


def changes_of(tensor: Tensor) -> int:
    """How often it was changed in place; what was made for inference alone does not count."""
    return 0 if tensor.is_inference() else tensor._version
