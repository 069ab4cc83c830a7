"""From a checkpoint back into the user's objects, after making sure that it is theirs.

The bytes are verified while they are read; then names and shapes are compared with the objects before any of them is
touched, so that a state that does not fit is refused with the names of what differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hpcft.checkpoint.load import load
from hpcft.checkpoint.read import UnreadableError
from hpcft.checkpoint.tree import unflatten
from hpcft.errors import DamagedError, HpcftError, UsageError
from hpcft.ids import RunId, Step
from hpcft.worker.saving import OWN, Stateful

_SHOWN = 5
_HINT = "a run goes on with the program that it was started with: put it back, or start a new run"


class RestoreError(UsageError):
    """The checkpoint is sound, and its state is not that of the objects given to `run.restore`."""


def put_back(directory: Path, objects: Mapping[str, Stateful], run: RunId | None) -> Step:
    """Load the checkpoint of the run into the objects; returns its step.

    CheckpointDamagedError, NotFoundError: it cannot be used, or is another run's. UnreadableError: not from here.
    RestoreError: it is one of other objects.
    """
    try:
        loaded = load(directory, run=run)
    except OSError as error:
        raise UnreadableError(directory, error) from error
    state = unflatten(loaded)
    own = state.pop(OWN, None)
    if not isinstance(own, dict) or not isinstance(own.get("step"), int):
        raise DamagedError(f"{directory.name} is no checkpoint of a run: it does not say at which step it was made")
    _compare(f"{directory.name} and run.restore differ", state, objects)
    for name, each in objects.items():
        if isinstance(each, nn.Module):
            what = f"{directory.name}: {name} ({type(each).__name__}) has another shape than when it was saved"
            _compare(what, state[name], each.state_dict())
    for name, each in objects.items():
        try:
            each.load_state_dict(state[name])
        except HpcftError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise RestoreError(
                f"{directory.name}: the state of {name} does not fit this {type(each).__name__}: {error}", _HINT
            ) from error
    return Step(own["step"])


def _compare(what: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    differences = []
    if missing := [name for name in given if name not in saved]:
        differences.append(f"not in the checkpoint: {_listed(missing)}")
    if extra := [name for name in saved if name not in given]:
        differences.append(f"only in the checkpoint: {_listed(extra)}")
    for name, value in given.items():
        other = saved.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape != other.shape:
            differences.append(f"{name} is {list(value.shape)} and was {list(other.shape)}")
    if differences:
        more = len(differences) - _SHOWN
        shown = differences[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise RestoreError(f"{what}: {'; '.join(shown)}", _HINT)


def _listed(names: Iterable[str]) -> str:
    names = [repr(name) for name in names]
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
