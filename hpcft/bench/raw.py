"""How fast this node writes to a directory at all: plain files, write and fsync.

    python -m hpcft.bench.raw DIRECTORY FILES BYTES

writes so many files of so many bytes each at the same time, three times, and prints what the fastest round took as
JSON. The files are removed again, also when it is told to end (SIGTERM).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import orjson

PREFIX = ".raw-"
"""Of the files' names."""
_BLOCK = 4 << 20
_ROUNDS = 3


def measure(directory: Path, files: int, size: int) -> float:
    """Seconds until `files` files of `size` bytes each are durable, written by one thread each; the fastest of three.

    Raises:
        OSError: they cannot be written.
    """
    block = memoryview(os.urandom(min(_BLOCK, max(1, size))))  # a file system may compress, or leave out zeros
    return min(_round(directory, files, size, block) for _ in range(_ROUNDS))


def _round(directory: Path, files: int, size: int, block: memoryview) -> float:
    paths = [directory / f"{PREFIX}{os.uname().nodename}-{os.getpid()}-{number}" for number in range(files)]
    errors: list[OSError] = []

    def write(path: Path) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                left = size
                while left:
                    left -= os.write(fd, block[: min(left, len(block))])
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(path,), name="hpcft-raw", daemon=True) for path in paths]
    try:
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
    if errors:
        raise errors[0]
    return took


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    directory, files, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    try:
        seconds = measure(directory, files, size)
    except OSError as error:
        print(f"{directory} cannot be written: {error}", file=sys.stderr)
        return 1
    print(orjson.dumps({"bytes": files * size, "seconds": seconds}).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
