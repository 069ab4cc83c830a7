"""How hypothesis searches: the same examples each time in `make test`, others each time and many in `make drills`.

A test that fails for one example in a thousand says nothing about the change it fails on; found by a campaign, it comes
with the example that reproduces it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_TIMES = int(os.environ.get("HPCFT_SEARCH", "0"))
"""So many times the fixed sample's examples, at random; 0: the fixed sample."""

_BUSY = [HealthCheck.too_slow]
"""What says more about the machine than about a property."""

settings.register_profile("fixed", deadline=None, database=None, derandomize=True, suppress_health_check=_BUSY)
settings.register_profile(
    "random", max_examples=100 * max(_TIMES, 1), deadline=None, print_blob=True, suppress_health_check=_BUSY
)
settings.load_profile("random" if _TIMES else "fixed")


def sampled(examples: int) -> settings:
    """A property of which `examples` are tried in `make test`; of the others hypothesis tries 100."""
    return settings(max_examples=examples * max(_TIMES, 1))
