"""Samples for training: an order for each epoch, batches for any world, loading, and the record of what was used.

`hpcft.data.Data`, `hpcft.data.JsonLines` and `hpcft.data.S3JsonLines` are what user code needs. They are loaded on
first use, so that `hpcft.data.ledger` (and with it `hpcft ledger`) imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcft.data.jsonl import JsonLines as JsonLines
    from hpcft.data.loader import Data as Data
    from hpcft.data.remote import S3JsonLines as S3JsonLines

__all__ = ["Data", "JsonLines", "S3JsonLines"]


def __getattr__(name: str) -> Any:
    if name == "Data":
        from hpcft.data.loader import Data

        return Data
    if name == "JsonLines":
        from hpcft.data.jsonl import JsonLines

        return JsonLines
    if name == "S3JsonLines":
        from hpcft.data.remote import S3JsonLines

        return S3JsonLines
    raise AttributeError(f"module 'hpcft.data' has no attribute {name!r}")
