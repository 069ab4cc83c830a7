"""How fast a checkpoint is loaded, beside what the machine can do: `python benchmarks/loading.py [--gib N]`.

Each trial is a process of its own, so that tensors are memory that has never been touched, as in a worker. The limits,
from the same run: with an empty page cache a raw read of the files into memory that is used again, buffered (told that
it is sequential) or direct, whichever is faster; with a warm one a copy of as many bytes into new tensors, with their
digests.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from table import Row, row, show

from hpcft import durable
from hpcft.checkpoint.commit import Facts, commit
from hpcft.checkpoint.layout import checkpoint_name
from hpcft.checkpoint.load import load
from hpcft.checkpoint.share import save_share
from hpcft.checkpoint.tree import flatten
from hpcft.ids import Generation, Rank, RunId, Step, Term

_TENSOR = 4 << 20
"""Elements: 16 MiB."""


def make(root: Path, gib: float) -> Path:
    tensors = {f"t{number:04d}": torch.arange(_TENSOR) + float(number) for number in range(int(64 * gib))}
    name = checkpoint_name(Step(1), Generation(1))
    report = save_share(root, name, "be9c", Rank(0), 1, flatten(tensors), cut_above=1 << 60)
    return commit(root, [report], Facts(RunId("0f" * 16), Term(1), None, 0.0)).directory


def read_raw(directory: Path, flags: int) -> None:
    place = memoryview(mmap.mmap(-1, durable.CHUNK_BYTES))
    for path in sorted(directory.glob("*.safetensors")):
        fd = os.open(path, os.O_RDONLY | flags)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        reached = 0
        while count := os.preadv(fd, [place], reached):
            reached += count
        os.close(fd)


def copy(directory: Path) -> None:
    source = np.ones(4 * _TENSOR, np.uint8)
    count = sum(path.stat().st_size for path in directory.glob("*.safetensors")) // source.nbytes
    tensors = [torch.empty(_TENSOR) for _ in range(count)]
    for tensor in tensors:
        place = tensor.numpy().view(np.uint8)
        place[:] = source
        durable.digest(place.data)


TRIALS: dict[str, Callable[[Path], object]] = {
    "cold": load,
    "warm": load,
    "cold-buffered": lambda directory: read_raw(directory, 0),
    "cold-direct": lambda directory: read_raw(directory, os.O_DIRECT),
    "warm-copy": copy,
}


def trial(case: str, directory: Path) -> float:
    """Seconds, in a new process."""
    durable.forget_cached(directory)
    if case == "warm":
        read_raw(directory, 0)
    command = [sys.executable, __file__, "--trial", case, str(directory)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(directory: Path, gib: float, trials: int) -> list[Row]:
    times: dict[str, list[float]] = {case: [] for case in TRIALS}
    for _ in range(trials):
        for case, found in times.items():
            found.append(trial(case, directory))
    rows = [row(f"{case}-{gib:g}GiB", "limit", times[case], "s") for case in times if "-" in case]
    cold = min(statistics.median(times[case]) for case in ("cold-buffered", "cold-direct"))
    rows.append(row(f"cold-{gib:g}GiB", "hpcft", times["cold"], "s", limit=cold))
    rows.append(row(f"warm-{gib:g}GiB", "hpcft", times["warm"], "s", limit=statistics.median(times["warm-copy"])))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument(
        "--root", type=Path, help="where the checkpoint is made; the default is the temporary directory"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a fraction of the size and of the trials")
    parser.add_argument("--trial", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.trial:
        began = time.perf_counter()
        TRIALS[arguments.trial[0]](Path(arguments.trial[1]))
        print(time.perf_counter() - began)
        return
    gib = 0.25 if arguments.quick else arguments.gib
    with TemporaryDirectory(dir=arguments.root) as root:
        show(measure(make(Path(root), gib), gib, 2 if arguments.quick else 7), arguments.json)


if __name__ == "__main__":
    main()
