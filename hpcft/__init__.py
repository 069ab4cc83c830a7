"""hpcft keeps training jobs alive on Slurm clusters.

What user code needs is loaded on first use, so that `import hpcft` (and with it `hpcft status`) imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hpcft.worker.run import Run as Run
    from hpcft.worker.run import main as main

__all__ = ["Run", "__version__", "main"]


def __getattr__(name: str) -> Any:
    if name in ("Run", "main"):
        from hpcft.worker import run

        return getattr(run, name)
    raise AttributeError(f"module 'hpcft' has no attribute {name!r}")
