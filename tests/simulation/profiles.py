"""How much is searched: a fixed sample in `make test`, as much as you like in `make drills`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import settings


def sampled(examples: int) -> Callable[[Any], Any]:
    """HYPOTHESIS_PROFILE=drills searches HPCFT_SIMULATIONS (20000) random examples instead of the fixed few."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "drills":
        many = int(os.environ.get("HPCFT_SIMULATIONS", "20000"))
        return settings(max_examples=many, deadline=None, print_blob=True)
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True)
