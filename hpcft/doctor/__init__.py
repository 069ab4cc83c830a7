"""Everything that would fail later, asked now: `hpcft doctor [CONFIG]`.

Theory of operation
-------------------
Looking and judging are apart. A probe (`probes`) finds facts and passes no judgement; a rule (`rules`) is a pure
function from facts to findings, and is tested with the facts of clusters that are not at hand. A finding is graded
`ok`, `warn` or `fail`, and whatever is not ok says what to do.

What may never return is asked in a process of its own, which is killed at its deadline: a stuck mount, a name
service that does not answer, a GPU driver in trouble, an import of torch from a file system under load. A process in
uninterruptible sleep does not die even then; it is left behind, and that there was no answer is a finding. All
probes run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpcft.doctor import probes, rules
from hpcft.doctor.finding import Finding, as_dict, exit_code

if TYPE_CHECKING:
    from hpcft.config import Config

__all__ = ["Finding", "as_dict", "examine", "exit_code"]


def examine(config: Config | None) -> Iterator[Finding]:
    """Runs all probes and judges what they find; the slowest, the import of torch, comes last."""
    root = config.run.root if config is not None else Path("runs").absolute()
    asked = [
        probes.Question("directory", str(root)),
        probes.Question("address"),
        probes.Question("gpus"),
        probes.Question("torch"),
    ]
    directory, address, gpus, torch = asked
    try:
        slurm = probes.look_at_slurm(config.slurm.command_timeout if config is not None else 10.0)
        on_cluster = slurm.settings is not None
        yield from rules.judge_python(probes.look_at_python())
        if config is not None:
            yield rules.judge_program(probes.look_at_program(config))
        yield from rules.judge_slurm(slurm, rules.Limits.of(config))
        yield from rules.judge_directory(str(root), directory.answer(), shared=on_cluster)
        yield from rules.judge_memory(probes.look_at_memory())
        yield from rules.judge_address(address.answer(), shared=on_cluster)
        devices = gpus.answer()
        yield from rules.judge_gpus(devices, config.nodes.workers_per_node if config is not None else None)
        yield from rules.judge_torch(torch.answer(), gpus=len(devices.get("names", ())))
    finally:
        for question in asked:
            question.drop()
