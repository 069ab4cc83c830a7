"""The node's shared page: the lease, the standing order, and one line of progress per worker.

One memfd per node, made by the keeper and mapped by agent, pool and workers. It exists so that a step costs no
system call, and so that a stopped agent is no danger: whoever trains can see by itself that the lease is over.

    header   128 bytes   magic, slots, lease_until_ns, generation, order, warned_ns, terminated_ns
    slot i   128 bytes   sequence, phase, then two banks of (ended, loss, samples, tokens, check)

Every field has one writer: the header belongs to the agent, a slot to its worker. Nobody locks.

**Why plain stores suffice.** Every write is one assignment to an item of a memoryview cast to an 8-byte format.
CPython packs such an item with a `memcpy` of constant size 8, which compilers turn into one store instruction; the
mapping is page-aligned and all offsets are multiples of 8, and an aligned 8-byte store is single-copy atomic on
x86-64 and on aarch64. So a *word* is never torn. What is not promised is the order in which another core sees two
different words (aarch64 may reorder them), hence the rest of the protocol:

- Time and code of a phase share one word (microseconds << 8 | code).
- `sequence` is 2 * completed steps, plus one while parameters change. A reader after the writer's death sees all
  its stores, so it knows for certain whether the death fell into an update.
- The figures of step S go to bank S & 1, before `sequence` reaches 2 * S: a reader that comes during the long odd
  time of step S + 1 still finds those of step S untouched. Each bank ends in `check`, a sum over the other words and
  S, each times a large odd number (steps, samples and tokens grow together: a plain sum or exclusive or of figures of
  two steps can come out right); a reader that sees stores out of order, or is overtaken by two whole steps, sees a
  wrong check and tries again. What it cannot read it calls unknown (None), never zero.

Times are CLOCK_BOOTTIME: it counts suspended time, so that a lease cannot outlive a sleeping machine, and it is one
clock for all processes of the node. It is never compared with another machine's.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum

from hpcft.errors import HpcftError

MAGIC = 0x3130_6750_7466_6368
"""Spells `hcftPg01` on a little-endian machine; the two digits are the version of the layout."""

LINE = 128
"""Bytes of the header and of each slot: two cache lines, so that no two writers share one."""

_WORDS = LINE // 8
_HEADER_MAGIC, _HEADER_SLOTS, _HEADER_LEASE, _HEADER_GENERATION, _HEADER_ORDER = range(5)
_HEADER_WARNED, _HEADER_TERMINATED = 5, 6
_SEQUENCE, _PHASE = range(2)
_BANK = 4
_BANK_WORDS = 6
_ENDED, _LOSS, _SAMPLES, _TOKENS, _CHECK = range(5)
_READS = 64

_clock_ns = time.clock_gettime_ns
_BOOTTIME = time.CLOCK_BOOTTIME


def now_ns() -> int:
    """The clock of the page (CLOCK_BOOTTIME), in nanoseconds."""
    return _clock_ns(_BOOTTIME)


class Phase(IntEnum):
    """What a worker is doing. Each has limits of its own when the agent looks for a hang."""

    EMPTY = 0
    """Nobody has used the slot since it was cleared."""
    START = 1
    """Process started; importing, building, forming the process group."""
    RESTORE = 2
    COMPILE = 3
    TRAIN = 4
    CHECKPOINT = 5
    EVAL = 6
    OTHER = 7
    """Named by the user, not training."""
    DONE = 8
    """The training function has returned."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One reading of a slot. Times are seconds of CLOCK_BOOTTIME; None means unknown."""

    step: int
    updating: bool
    """Parameters are changing: the step after `step` is being applied."""
    phase: Phase
    phase_since: float
    ended: float | None
    """When `step` was completed."""
    loss: float | None
    samples: int | None
    """Samples and tokens this worker reported with its last step, as it counts them."""
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Order:
    """What the agent asks of all workers of the node: a checkpoint at a step, and perhaps to stop there; or a copy."""

    save_at_step: int
    stop_after_save: bool
    in_memory: bool = False
    """A copy is made, and not written."""

    @property
    def word(self) -> int:
        return self.save_at_step << 2 | self.in_memory << 1 | self.stop_after_save

    @classmethod
    def from_word(cls, word: int) -> Order | None:
        """None when there is no order (the word is 0)."""
        return cls(word >> 2, bool(word & 1), bool(word & 2)) if word else None


LET_GO = Order(0, stop_after_save=True)
"""To those who have saved and wait at that step: all have, so end. Who does not wait takes no notice."""


class PageError(HpcftError):
    """The descriptor is not a page that this version understands."""


class Slot:
    """One worker's line. The worker writes, anybody reads."""

    __slots__ = ("_base", "_floats", "_words")

    def __init__(self, words: memoryview[int], floats: memoryview[float], base: int) -> None:
        self._words = words
        self._floats = floats
        self._base = base

    def begin_update(self) -> None:
        """Parameters start to change."""
        words = self._words
        base = self._base
        words[base] = words[base] | 1

    def end_update(self, step: int, loss: float, samples: int, tokens: int) -> None:
        """`step` is completed: parameters are consistent again. A loss of NaN stands for 'not given'."""
        words = self._words
        base = self._base
        bank = base + (_BANK + _BANK_WORDS if step & 1 else _BANK)
        ended = _clock_ns(_BOOTTIME)
        words[bank] = ended
        self._floats[bank + 1] = loss
        words[bank + 2] = samples
        words[bank + 3] = tokens
        words[bank + 4] = _check(step, ended, words[bank + 1], samples, tokens)
        words[base] = step << 1

    def set_step(self, step: int) -> None:
        """The state of `step` was put in place (restore, rollback): completed, but with no figures of its own."""
        words = self._words
        base = self._base
        for word in range(base + _BANK, base + _BANK + 2 * _BANK_WORDS):
            words[word] = 0
        words[base] = step << 1

    def set_phase(self, phase: Phase) -> None:
        self._words[self._base + _PHASE] = (_clock_ns(_BOOTTIME) // 1000) << 8 | phase

    @property
    def step(self) -> int:
        """Completed steps."""
        return self._words[self._base] >> 1

    def read(self) -> Progress:
        """A consistent reading; never blocks, whatever the writer does (also when it has died half-way)."""
        words = self._words
        base = self._base
        ended: float | None = None
        loss: float | None = None
        samples: int | None = None
        tokens: int | None = None
        sequence = words[base]
        for _ in range(_READS):
            sequence = words[base]
            step = sequence >> 1
            bank = base + (_BANK + _BANK_WORDS if step & 1 else _BANK)
            end_word, loss_word, sample_word, token_word, check = words[bank : bank + 5].tolist()
            if not end_word and not check:  # nothing reported for this step yet
                break
            if check == _check(step, end_word, loss_word, sample_word, token_word):
                value = _float_of(loss_word)
                ended, loss = end_word / 1e9, None if math.isnan(value) else value
                samples, tokens = sample_word, token_word
                break
        phase_word = words[base + _PHASE]
        return Progress(
            step=sequence >> 1,
            updating=bool(sequence & 1),
            phase=_phase_of(phase_word & 0xFF),
            phase_since=(phase_word >> 8) / 1e6,
            ended=ended,
            loss=loss,
            samples=samples,
            tokens=tokens,
        )

    def clear(self) -> None:
        """Only while no worker uses the slot."""
        for word in range(self._base, self._base + _WORDS):
            self._words[word] = 0


class NodePage:
    """The mapping. `fd` stays open for as long as the page is used: children inherit it by number."""

    __slots__ = ("_floats", "_map", "_words", "fd", "slots")

    def __init__(self, fd: int, slots: int, mapping: mmap.mmap) -> None:
        self.fd = fd
        self.slots = slots
        self._map = mapping
        self._words: memoryview[int] = memoryview(mapping).cast("Q")
        self._floats: memoryview[float] = memoryview(mapping).cast("d")

    @classmethod
    def create(cls, slots: int) -> NodePage:
        """A new page for `slots` workers, all zero. The caller owns `fd` (close-on-exec)."""
        if slots < 1:
            raise ValueError(f"a page needs at least one slot, not {slots}")
        size = LINE * (1 + slots)
        fd = os.memfd_create("hpcft-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        # Nobody can shorten it afterwards: a mapping beyond the end of its file answers with SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        page = cls(fd, slots, mmap.mmap(fd, size))
        page._words[_HEADER_SLOTS] = slots
        page._words[_HEADER_MAGIC] = MAGIC
        return page

    @classmethod
    def attach(cls, fd: int) -> NodePage:
        """The page behind an inherited descriptor."""
        try:
            size = os.fstat(fd).st_size
            mapping = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            raise PageError(f"file descriptor {fd} is not a page: {error}") from error
        with memoryview(mapping) as view:
            header = view[: 8 * (_HEADER_SLOTS + 1)].cast("Q").tolist() if size >= LINE else [0, 0]
        if header[_HEADER_MAGIC] != MAGIC or size < LINE * (1 + header[_HEADER_SLOTS]):
            raise PageError(
                f"file descriptor {fd} holds no page of this version",
                "keeper, agent and workers must come from the same installation of hpcft",
            )
        return cls(fd, header[_HEADER_SLOTS], mapping)

    def slot(self, index: int) -> Slot:
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of a page of {self.slots}")
        return Slot(self._words, self._floats, _WORDS * (1 + index))

    def clear_slot(self, index: int) -> None:
        self.slot(index).clear()

    @property
    def lease_until_ns(self) -> int:
        """End of the lease on CLOCK_BOOTTIME; 0 means that no lease is in force and everyone may run."""
        return self._words[_HEADER_LEASE]

    @lease_until_ns.setter
    def lease_until_ns(self, until: int) -> None:
        self._words[_HEADER_LEASE] = until

    def lease_left(self) -> float:
        """Seconds until the lease ends: negative afterwards, infinite without one."""
        until = self._words[_HEADER_LEASE]
        return (until - _clock_ns(_BOOTTIME)) / 1e9 if until else math.inf

    @property
    def generation(self) -> int:
        return self._words[_HEADER_GENERATION]

    @generation.setter
    def generation(self, generation: int) -> None:
        self._words[_HEADER_GENERATION] = generation

    @property
    def order_word(self) -> int:
        """`Order.word` of the standing order, 0 without one."""
        return self._words[_HEADER_ORDER]

    @order_word.setter
    def order_word(self, word: int) -> None:
        self._words[_HEADER_ORDER] = word

    @property
    def warned_ns(self) -> int:
        """When SIGUSR1 came, on CLOCK_BOOTTIME; 0 if it did not. An agent that dies must not take that along."""
        return self._words[_HEADER_WARNED]

    @warned_ns.setter
    def warned_ns(self, at: int) -> None:
        self._words[_HEADER_WARNED] = at

    @property
    def terminated_ns(self) -> int:
        """When SIGTERM came; as above."""
        return self._words[_HEADER_TERMINATED]

    @terminated_ns.setter
    def terminated_ns(self, at: int) -> None:
        self._words[_HEADER_TERMINATED] = at

    def close(self) -> None:
        """Give back mapping and descriptor. Slots taken from this page are unusable afterwards."""
        self._words.release()
        self._floats.release()
        self._map.close()
        os.close(self.fd)


def _check(step: int, ended: int, loss: int, samples: int, tokens: int) -> int:
    return (
        step * 0x9E3779B97F4A7C15
        + ended * 0xC2B2AE3D27D4EB4F
        + loss * 0x165667B19E3779F9
        + samples * 0xD6E8FEB86659FD93
        + tokens * 0xA0761D6478BD642F
    ) & 0xFFFFFFFFFFFFFFFF


def _float_of(word: int) -> float:
    value: float = struct.unpack("=d", struct.pack("=Q", word))[0]
    return value


def _phase_of(code: int) -> Phase:
    try:
        return Phase(code)
    except ValueError:
        return Phase.OTHER
