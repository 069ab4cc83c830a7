"""Samples for training: an order for each epoch, batches for any world, loading, and the record of what was used.

`hpcft.data.Data` and `hpcft.data.JsonLines` are what user code needs. They are loaded on first use, so that
`hpcft.data.ledger` (and with it `hpcft ledger`) imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcft.data.jsonl import JsonLines as JsonLines
    from hpcft.data.loader import Data as Data

__all__ = ["Data", "JsonLines"]


def __getattr__(name: str) -> Any:
    if name == "Data":
        from hpcft.data.loader import Data

        return Data
    if name == "JsonLines":
        from hpcft.data.jsonl import JsonLines

        return JsonLines
    raise AttributeError(f"module 'hpcft.data' has no attribute {name!r}")
