"""What workers print: taken from their pipes by the loop, written by one thread, remembered for incidents.

A file system that hangs must cost neither a heartbeat nor a training step. So the loop only reads pipes
(non-blocking) and puts the bytes into a bounded queue; a single thread named `hpcft-logs` opens, writes, rotates.
When the queue is full the bytes are dropped and counted, and the file says so once writing works again. Workers never
block on a full pipe as long as the agent lives.

Bytes are kept as they are. A file is rotated between lines where that is possible (`x.log` becomes `x.log.1`, and so
on, `keep` files in all), so the files in order, oldest first, are the stream.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_READ = 1 << 16
_LINE_KEPT = 4096
"""Bytes of one line that the tail remembers: its end, for that is where an error stands."""


@dataclass(eq=False)
class RotatingFile:
    """One log file and its older parts. Used by the writing thread only, but for `lost`."""

    path: Path
    max_size: int
    keep: int
    """Files kept, the current one included."""
    lost: int = 0
    """Bytes dropped since the file last said so. Written by the loop and by the thread, under the queue's lock."""
    error: OSError | None = None
    """Why the last write failed; None when it did not."""
    _file: int | None = None
    _size: int = 0

    def write(self, chunk: bytes) -> None:
        """Append, rotating as needed. Raises OSError; what was not written then is lost."""
        while chunk:
            if self._file is None:
                self._open()
            room = self.max_size - self._size
            if len(chunk) <= room:
                piece = len(chunk)
            else:
                piece = chunk.rfind(b"\n", 0, max(room, 0)) + 1
                if piece == 0 and self._size == 0:
                    piece = max(room, 1)  # a line longer than a whole file
            if piece:
                self._append(chunk[:piece])
                chunk = chunk[piece:]
            if chunk:
                self._rotate()

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._file).st_size

    def _append(self, piece: bytes) -> None:
        assert self._file is not None
        view = memoryview(piece)
        while view:
            written = os.write(self._file, view)
            self._size += written
            view = view[written:]

    def _rotate(self) -> None:
        self.close()
        for number in range(self.keep - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            newer = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            with suppress(FileNotFoundError):
                newer.replace(older)
        if self.keep == 1:
            self.path.unlink(missing_ok=True)


class LogWriter:
    """The thread and its queue. `put` is for the loop, never blocks, and drops what does not fit."""

    def __init__(self, queue_bytes: int = 8 << 20) -> None:
        self._limit = queue_bytes
        self._queued = 0
        self._queue: deque[tuple[RotatingFile, bytes | None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._files: set[RotatingFile] = set()
        self._thread = threading.Thread(target=self._run, name="hpcft-logs", daemon=True)
        self._thread.start()

    def put(self, file: RotatingFile, chunk: bytes) -> bool:
        """Queue `chunk` for `file`; False when it had to be dropped."""
        with self._changed:
            if self._closing or self._queued + len(chunk) > self._limit:
                file.lost += len(chunk)
                return False
            self._queued += len(chunk)
            self._queue.append((file, chunk))
            self._changed.notify()
            return True

    def finish(self, file: RotatingFile) -> None:
        """Nothing more comes for `file`: close it when the queue is through."""
        with self._changed:
            self._queue.append((file, None))
            self._changed.notify()

    async def close(self, seconds: float) -> bool:
        """Write what is queued, for so long at most; False when something was left (the file system hangs)."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110 (a thread sets no Event)
            await asyncio.sleep(0.005)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    break
                file, chunk = self._queue.popleft()
                self._queued -= len(chunk or b"")
                lost = file.lost
            written = self._write(file, chunk, lost)
            with self._changed:
                file.lost += -lost if written else len(chunk or b"")
        for file in list(self._files):
            self._write(file, None, 0)

    def _write(self, file: RotatingFile, chunk: bytes | None, lost: int) -> bool:
        """False when the file system would not have it: the loss is told with the next chunk that it takes."""
        self._files.add(file)
        try:
            if lost:
                file.write(b"\n[hpcft: %d bytes of output were dropped here: the log could not be written]\n" % lost)
            if chunk is not None:
                file.write(chunk)
        except OSError as error:
            file.error = error
            with suppress(OSError):
                file.close()  # a stale handle stays stale: open it anew next time
            return False
        finally:
            if chunk is None:
                self._files.discard(file)
                with suppress(OSError):
                    file.close()
        file.error = None
        return True


@dataclass(eq=False)
class Capture:
    """One worker's output: the reading end of its pipe, the file it goes to, its last lines."""

    fd: int
    file: RotatingFile
    writer: LogWriter
    lines: int = 50
    open: bool = True
    total: int = 0
    """Bytes read."""
    _last: deque[bytes] = field(default_factory=deque)
    _partial: bytes = b""

    def start(self) -> None:
        """Read whenever there is something, on the running loop."""
        os.set_blocking(self.fd, False)
        self._last = deque(maxlen=self.lines)
        asyncio.get_running_loop().add_reader(self.fd, self._read)

    def drain(self) -> None:
        """Read what is there now: before a worker's end is told, so that its last lines are known."""
        while self.open and self._read():
            pass

    def tail(self, count: int | None = None) -> tuple[str, ...]:
        """The last lines (an unfinished one included), oldest first."""
        lines = [*self._last, self._partial] if self._partial else list(self._last)
        texts = [line.decode("utf-8", "replace").rstrip("\r\n") for line in lines[-self.lines :]]
        return tuple(texts if count is None else texts[-count:] if count else ())

    def close(self) -> None:
        """Stop reading, whoever may still hold the other end."""
        if self.open:
            self.open = False
            asyncio.get_running_loop().remove_reader(self.fd)
            os.close(self.fd)
            self.writer.finish(self.file)

    def _read(self) -> bool:
        try:
            chunk = os.read(self.fd, _READ)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self.close()
            return False
        self.total += len(chunk)
        self.writer.put(self.file, chunk)
        *lines, partial = chunk.split(b"\n")
        for line in lines:
            self._last.append((self._partial + line)[-_LINE_KEPT:])
            self._partial = b""
        self._partial = (self._partial + partial)[-_LINE_KEPT:]
        return True
