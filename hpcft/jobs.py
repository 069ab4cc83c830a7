"""What the leader asks of whoever gave it the nodes, where that is the local launcher (see `slurm.job`)."""

from __future__ import annotations

from hpcft.events import Termination


class LocalJob:
    """A local cluster: the launcher reads the verdict and starts the agents again when it says so."""

    async def requeue(self) -> None:
        return

    async def why_terminated(self) -> Termination:
        """Only an operator ends a local cluster."""
        return Termination.CANCELLED

    async def kill_wait(self) -> float:
        """The launcher is patient."""
        return 30.0

    async def seconds_left(self) -> float | None:
        return None
