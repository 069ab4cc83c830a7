"""Data-parallel replicas: DDP whose buckets never change, so that gradients add up in the same order in every life.

Theory of operation
-------------------
Floating-point sums depend on their order, and a ring all-reduce adds an element's parts in an order that depends on
where in its buffer the element lies. So with three ranks or more the layout of DDP's buckets decides the last bits.
Stock DDP starts with one layout and changes it after the first iteration (by the order in which gradients arrived);
a process that was restarted at step 7 would do step 8 in the first layout, where the others' history has the second.

`Replica` has the reducer lay out its buckets anew at once, in the constructor, before any gradient: by the reverse
order of definition, which is the order of arrival wherever modules run in the order they are defined in, and cut
like the layout that DDP settles on. The reducer rebuilds only once, so this layout stays. It is a function of the
module and the arguments alone: the same in every generation, on every rank. Where modules run in another order, less
communication overlaps with the backward pass; the sums are as well defined.

The means are DDP's own: `_push_all_rebuilt_params` and `_rebuild_buckets` do the same for ranks that have joined
early. They take parameters by number, so the reducer is given them in reverse. With `find_unused_parameters`
(and no static graph) the reducer keeps its first layout anyway.

Passes of a step: gradients of all but the last are only summed up locally, which is known from the data (`Pass`).
Buffers are rank 0's: stock DDP sends them out before the first pass of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Pass(Protocol):
    """Where in its step a forward pass is."""

    @property
    def index(self) -> int: ...
    @property
    def count(self) -> int: ...


class Replica(DistributedDataParallel):
    """DDP with a bucket layout that is the same from the first step on and in every generation."""

    def __init__(self, module: nn.Module, current: Callable[[], Pass | None], **arguments: Any) -> None:
        """`current` tells which pass the next forward is; None: each is a step of its own, or the user says."""
        # Asked for while the base class is being constructed.
        self._never_rebuilds = bool(arguments.get("find_unused_parameters")) and not arguments.get("static_graph")
        super().__init__(module, **arguments)
        self._current = current
        if hasattr(self, "reducer"):  # there is none if all reductions are delayed by the caller's own hook
            self.reducer._push_all_rebuilt_params()
            self._has_rebuilt_buckets = self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()  # type: ignore[no-untyped-call]
        if self._never_rebuilds:
            return parameters, sparse
        return parameters[::-1], sparse[::-1]

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        current = self._current()
        if current is not None and current.count > 1 and torch.is_grad_enabled():
            self.require_backward_grad_sync = current.index == current.count - 1
        return super().forward(*inputs, **arguments)  # type: ignore[no-untyped-call]
