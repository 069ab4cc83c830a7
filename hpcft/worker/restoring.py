"""From a checkpoint back into the user's objects, after making sure that it is theirs.

Names and shapes are compared with the objects before anything is read, so that a state that does not fit is refused
with the names of what differs.

A model's parameters and buffers are read to where they lie, since fresh memory costs several times what the copy into
it does. So a checkpoint that turns out to be damaged leaves a model that is neither: its errors end the process, in
`Run.restore`. Everything else is verified before any object is touched.

A checkpoint has no shape of a world: tensors are whole there, whoever wrote them. Those that are DTensors in the
objects come back as DTensors, for which a rank reads its own part alone; so do an optimizer's values for a parameter
that is one, which a new optimizer does not have yet. Everything else is read whole, on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpcft.checkpoint.boxes import Box
from hpcft.checkpoint.files import ALONE, Peers
from hpcft.checkpoint.load import SavedState
from hpcft.checkpoint.pieces import TensorShape
from hpcft.checkpoint.read import UnreadableError
from hpcft.checkpoint.sharding import Layout, sharding_is_used
from hpcft.checkpoint.tree import DTYPE_NAMES, FlatState, flatten, unflatten
from hpcft.errors import DamagedError, HpcftError, UsageError
from hpcft.ids import RunId, Step
from hpcft.worker.saving import OWN, Stateful

_SHOWN = 5
_HINT = "a run goes on with the program that it was started with: put it back, or start a new run"


class RestoreError(UsageError):
    """The checkpoint is sound, and its state is not that of the objects given to `run.restore`."""


def put_back(directory: Path, objects: Mapping[str, Stateful], run: RunId | None, peers: Peers = ALONE) -> Step:
    """Load the checkpoint of the run into the objects; returns its step.

    CheckpointDamagedError, NotFoundError: it cannot be used, or is another run's. UnreadableError: not from here.
    RestoreError: it is one of other objects.
    """
    try:
        return put_in(SavedState.open(directory, run, peers), objects)
    except OSError as error:
        raise UnreadableError(directory, error) from error


def put_in(saved: SavedState, objects: Mapping[str, Stateful]) -> Step:
    """Load a state into the objects; returns its step. Errors as of `put_back`, and what the state's sources raise."""
    outline = saved.outline()
    own = outline.pop(OWN, None)
    if not isinstance(own, dict) or not isinstance(own.get("step"), int):
        raise DamagedError(f"{saved.name} is no state of a run: it does not say at which step it was made")
    _compare(f"{saved.name} and run.restore differ", outline, objects)
    for name, each in objects.items():
        if isinstance(each, nn.Module):
            what = f"{saved.name}: {name} ({type(each).__name__}) has another shape than when it was saved"
            _compare(what, outline[name], each.state_dict())
    boxes, layouts = _sharded(saved.index, objects)
    state = unflatten(replace(saved.read(boxes, _places(saved.index, objects)), layouts=layouts))
    for name, each in objects.items():
        try:
            each.load_state_dict(state.pop(name))  # what a model has copied is freed before the next one's turn
        except HpcftError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise RestoreError(
                f"{saved.name}: the state of {name} does not fit this {type(each).__name__}: {error}", _HINT
            ) from error
    return Step(own["step"])


def _sharded(
    index: Mapping[str, TensorShape], objects: Mapping[str, Stateful]
) -> tuple[dict[str, Box], dict[str, Layout]]:
    """Which tensors of the checkpoint come back as DTensors: this rank's boxes of them, and all their layouts."""
    boxes: dict[str, Box] = {}
    layouts: dict[str, Layout] = {}
    if not sharding_is_used():
        return boxes, layouts

    def lay_out_like(given: FlatState, pairs: Iterable[tuple[str, str]]) -> None:
        shapes = given.index()
        for tensor, model in pairs:
            if model in given.layouts and tensor in index and index[tensor].shape == shapes[model].shape:
                layouts[tensor] = given.layouts[model]
                if model in given.boxes:
                    boxes[tensor] = given.boxes[model]

    for name, each in objects.items():
        given = flatten({name: each.state_dict()})
        lay_out_like(given, ((tensor, tensor) for tensor in given.layouts))
        if isinstance(each, Optimizer):
            # Its state dict numbers the parameters in the order of its groups.
            parameters = [parameter for group in each.param_groups for parameter in group["params"]]
            values = (re.fullmatch(rf"{name}\.state\.(\d+)\.(.+)", tensor) for tensor in index)
            # As torch has it: a count of steps is a plain number even where the parameter is one number as well.
            pairs = ((value[0], value[1]) for value in values if value is not None and value[2] != "step")
            lay_out_like(flatten({str(number): each for number, each in enumerate(parameters)}), pairs)
    return boxes, layouts


def _places(index: Mapping[str, TensorShape], objects: Mapping[str, Stateful]) -> dict[str, Tensor]:
    """The tensors of models which a checkpoint's can be read into, as `load_state_dict` would copy them there.

    Given such a tensor itself, `load_state_dict` has nothing to copy. Where a module's own code comes between the
    names in a state and the tensors of the module, it gets a state of its own.
    """
    found: dict[str, Tensor] = {}
    if torch.__future__.get_swap_module_params_on_conversion():  # it wants the only reference to what it is given
        return found
    for name, each in objects.items():
        if not isinstance(each, nn.Module) or type(each).load_state_dict is not nn.Module.load_state_dict:
            continue
        modules = dict(each.named_modules(remove_duplicate=False))
        if any(module._load_state_dict_pre_hooks for module in modules.values()):
            continue
        own_code = [path for path, module in modules.items() if _loads_its_own_way(module)]
        state = each.state_dict()
        for path, tensor in (
            *each.named_parameters(remove_duplicate=False),
            *each.named_buffers(remove_duplicate=False),
        ):
            saved, given = index.get(f"{name}.{path}"), state.get(path)
            if saved is None or type(given) is not Tensor or any(_is_below(path, module) for module in own_code):
                continue
            plain = tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
            same = given.data_ptr() == tensor.data_ptr() and given.shape == tensor.shape and given.dtype == tensor.dtype
            if plain and same and saved == TensorShape(DTYPE_NAMES.get(tensor.dtype, ""), tuple(tensor.shape)):
                found[f"{name}.{path}"] = tensor
    return _disjoint(found)


def _loads_its_own_way(module: nn.Module) -> bool:
    return type(module)._load_from_state_dict is not nn.Module._load_from_state_dict


def _is_below(path: str, module: str) -> bool:
    return not module or path.startswith(f"{module}.")


def _disjoint(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without those that share memory with an earlier one, such as tied parameters: two threads would write there."""
    found: dict[str, Tensor] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.nbytes and tensor.data_ptr() >= end:
            found[name] = tensor
            end = tensor.data_ptr() + tensor.nbytes
    return found


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
