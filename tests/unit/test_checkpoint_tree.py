from __future__ import annotations

import math
import random
import sys
from collections import Counter, OrderedDict, namedtuple
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from checkpoint_samples import bits, facts, save, training_state
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as schedulers

from hpcft.checkpoint.boxes import Box
from hpcft.checkpoint.commit import commit
from hpcft.checkpoint.load import load
from hpcft.checkpoint.tree import DTYPE_NAMES, FlatState, StateError, flatten, unflatten
from hpcft.errors import DamagedError
from tests.search import sampled

torch.set_num_threads(1)


def equal(one: Any, other: Any) -> bool:
    """Same types and same bits, all the way down; the order of keys counts too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, np.generic):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        attributes = isinstance(one, OrderedDict)
        return (
            len(one) == len(other)
            and all(equal(a, b) for a, b in zip(one, other, strict=True))
            and all(equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))
            and (not attributes or equal(vars(one), vars(other)))
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, complex):
        return equal(one.real, other.real) and equal(one.imag, other.imag)
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    flat = flatten(state)
    return unflatten(FlatState(flat.tensors, orjson.loads(orjson.dumps(flat.values))))


@pytest.fixture(params=[1, 3])
def through_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def travel(state: dict[str, Any]) -> dict[str, Any]:
        done = commit(tmp_path, save(tmp_path, flatten(state), 1, world_size=request.param, cut_above=64), facts())
        return unflatten(load(done.directory))

    return travel


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**63),
        2**63 - 1,
        2**63,
        2**128 - 1,
        -(2**200),
        10**5000,
        0.0,
        -0.0,
        1.0,
        0.1,
        5e-324,
        sys.float_info.max,
        math.nan,
        math.inf,
        -math.inf,
        1 + 2j,
        complex(math.nan, -math.inf),
        "",
        "käse ✓ \u0000",
        "\udcff",
        b"",
        bytes(range(256)),
        bytearray(b"x"),
        [],
        (),
        {},
        [1, (2, [3.0, None], {})],
        {1: "int", "1": "str", False: "x"},
        {(1, "a"): 2, None: 3, 2.5: 4, b"k": 5},
        {"tensor": "x"},
        {"\udc80": 1},
        OrderedDict([("b", 1), ("a", 2)]),
        Counter({3: 2, 7: 1}),
        {1, 2, 3},
        frozenset({"a"}),
        torch.Size([2, 3]),
        torch.float16,
        torch.device("cuda:1"),
        np.float32(1.1),
        np.int64(-5),
        np.bool_(True),
        np.str_("abc"),
        np.str_(""),
        np.str_("\udcff✓\0"),
        np.bytes_(b"abc"),
        np.bytes_(b""),
        np.bytes_(b"\0"),
        np.datetime64("2020-01-01"),
        np.float64(math.nan),
    ],
    ids=lambda value: ascii(value)[:30] if type(value) is not int else hex(value)[:20],
)
def test_values_come_back_with_their_types(value: Any) -> None:
    state = {"value": value, "again": [value]}
    assert equal(through_json(state), state)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


@sampled(150)
@given(st.dictionaries(st.text(max_size=5), json_like, max_size=4))
def test_any_nesting_comes_back(state: dict[str, Any]) -> None:
    assert equal(through_json(state), state)


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES, key=str), ids=str)
def test_every_type_of_tensor_in_every_shape(dtype: torch.dtype, through_disk: Any) -> None:
    source = torch.randint(0, 2 if dtype == torch.bool else 255, (4, 6, 2, dtype.itemsize), dtype=torch.uint8)
    full = source.view(dtype).squeeze(-1) if dtype.itemsize > 1 else source.squeeze(-1).view(dtype)
    state = {
        "full": full,
        "transposed": full.transpose(0, 2),
        "every other": full[::2],
        "column": full[:, 1],
        "scalar": full[0, 0, 0],
        "empty": full[:0],
        "expanded": full[:1].expand(5, 6, 2),
        "shared": full[1:3],
    }
    assert equal(through_disk(state), state)


@pytest.mark.parametrize(
    "name", ["complex128", "complex64", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint64"]
)
def test_types_that_safetensors_does_not_know(name: str, through_disk: Any) -> None:
    dtype = getattr(torch, name)
    one = torch.randint(0, 100, (3, 2, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(3, 2)
    state = {"one": one, "turned": one.T, "scalar": one[0, 0], "empty": one[:0]}
    if dtype.is_complex and dtype.itemsize > 4:
        state["conjugated"] = one.conj()
    assert equal(through_disk(state), state)


def test_negated_view_is_resolved(through_disk: Any) -> None:
    lazy = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert lazy.is_neg()
    assert through_disk({"x": lazy})["x"].tolist() == [-2.0, 4.0]


def test_numpy_arrays_of_any_layout(through_disk: Any) -> None:
    grid = np.arange(24, dtype=np.int32).reshape(4, 6)
    frozen = grid.astype(np.uint16)
    frozen.flags.writeable = False
    state = {
        "plain": grid,
        "fortran": np.asfortranarray(grid),
        "reversed": grid[::-1],
        "big endian": grid.astype(">i4"),
        "read only": frozen,
        "scalar": np.array(3.5),
        "empty": np.empty((0, 3), np.float16),
        "flags": grid > 4,
        "complex": grid.astype(np.complex128),
        "legacy generator": np.random.RandomState(3).get_state(),
        "generator": np.random.default_rng(3).bit_generator.state,
    }
    back = through_disk(state)
    assert equal(back, state)
    back["plain"][0, 0] = 1  # the caller's own, not a view of something read-only


def optimizers() -> list[type[torch.optim.Optimizer]]:
    named = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adamax", "RAdam", "NAdam", "LBFGS", "Rprop", "ASGD"]
    return [getattr(torch.optim, name) for name in named] + [torch.optim.Adadelta, torch.optim.Adafactor]


@pytest.mark.parametrize("kind", optimizers(), ids=lambda kind: kind.__name__)
def test_optimizers_go_on_as_if_nothing_had_happened(kind: Any, tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        return model, kind(model.parameters(), lr=torch.tensor(0.01) if kind is torch.optim.AdamW else 0.01)

    def advance(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]

    model, optimizer = build()
    advance(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    done = commit(tmp_path, save(tmp_path, flatten(state), 1, world_size=2, cut_above=16), facts())
    back = unflatten(load(done.directory))
    assert equal(back, state)
    other_model, other = build()
    other_model.load_state_dict(back["model"])
    other.load_state_dict(back["optimizer"])
    advance(model, optimizer)
    advance(other_model, other)
    assert equal(other_model.state_dict(), model.state_dict())
    assert equal(other.state_dict(), optimizer.state_dict())


def test_schedulers_scaler_and_random_states(through_disk: Any) -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    made = [
        schedulers.MultiStepLR(optimizer, [2, 4]),
        schedulers.OneCycleLR(optimizer, 0.1, 10),
        schedulers.CyclicLR(optimizer, 0.1, 0.2),
        schedulers.ReduceLROnPlateau(optimizer),
        schedulers.LambdaLR(optimizer, lambda epoch: 1.0),
        schedulers.CosineAnnealingWarmRestarts(optimizer, 5),
        torch.optim.swa_utils.SWALR(optimizer, 0.1),
    ]
    generator = torch.Generator().manual_seed(5)
    state = {
        "schedulers": [scheduler.state_dict() for scheduler in made],
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "torch": torch.get_rng_state(),
        "generator": generator.get_state(),
        "python": random.getstate(),
    }
    back = through_disk(state)
    assert equal(back, state)
    expected = torch.rand(3, generator=generator)
    assert torch.equal(torch.rand(3, generator=torch.Generator().set_state(back["generator"])), expected)
    random.setstate(back["python"])


def test_modules_keep_their_versions_and_extra_state(through_disk: Any) -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Embedding(5, 3))
            self.tied = self.inner[1].weight
            self.seen = 7

        def get_extra_state(self) -> Any:
            return {"seen": self.seen}

        def set_extra_state(self, state: Any) -> None:
            self.seen = state["seen"]

    module = Counting()
    back = through_disk({"model": module.state_dict()})["model"]
    assert back._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]
    other = Counting()
    other.seen = 0
    other.load_state_dict(back)
    assert other.seen == 7
    assert other.tied is other.inner[1].weight
    assert equal(other.state_dict(), module.state_dict())


def test_names_are_those_of_distributed_checkpoints() -> None:
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    state = training_state(1)
    theirs = {name for name, value in flatten_state_dict(state)[0].items() if isinstance(value, torch.Tensor)}
    assert set(flatten(state).tensors) == theirs


def test_paths_that_read_the_same_stay_apart(through_disk: Any) -> None:
    t = torch.arange(5)
    state = {
        "a": {"b.c": t, 0: t + 1, "0": t + 2, "__metadata__": t + 3},
        "a.b": {"c": t + 4},
        "__metadata__": t + 5,
        "": t + 6,
        "\udc80": t + 7,
    }
    assert equal(through_disk(state), state)


class Colour(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_cannot_be_kept_is_named_with_its_place() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    point = namedtuple("point", "x y")
    for value, words in [
        (lambda: 0, "builtins.function"),
        (Fraction(1, 2), "fractions.Fraction"),
        (point(1, 2), "point"),
        (Colour(), "Colour"),
        (cycle, "contains itself"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (np.array([object()]), "numpy"),
        (np.array(["text"]), "numpy"),
        (np.zeros(2, [("x", "i4")]), "numpy"),
    ]:
        with pytest.raises(StateError) as caught:
            flatten({"outer": [{"k": value}]})
        assert "state['outer'][0]['k']" in caught.value.message
        assert words in caught.value.message
        assert caught.value.hint


def test_the_same_object_twice_is_no_cycle() -> None:
    shared = [1]
    assert equal(through_json({"a": shared, "b": shared}), {"a": [1], "b": [1]})


def test_sharded_tensors_are_refused_rather_than_saved_wrong() -> None:
    from torch.distributed.tensor import DTensor

    class Pretender(torch.Tensor):
        pass

    assert issubclass(DTensor, torch.Tensor)
    with pytest.raises(StateError, match="Pretender"):
        flatten({"w": torch.ones(2).as_subclass(Pretender)})


@pytest.mark.parametrize(
    "values",
    [{"unheard of": 1}, {"dict": {"a": {"tensor": "missing"}}}, [1], {"dict": {"a": {"dtype": "load"}}}, {"float": 3}],
)
def test_values_of_another_version_are_refused(values: Any) -> None:
    with pytest.raises(DamagedError):
        unflatten(FlatState({}, values))


def test_flatten_copies_no_tensor() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    flat = flatten({"w": weight, "turned": weight.detach().T})
    assert all(tensor.untyped_storage().data_ptr() == weight.data_ptr() for tensor in flat.tensors.values())


def test_an_index_is_recognised_exactly_when_it_would_be_made_again() -> None:
    a, b = torch.zeros(2, 6), torch.zeros(3)
    flat = flatten({"a": a, "b": b})
    others = [
        {"a": a},
        {"a": a, "b": b, "c": b},
        {"a": a, "c": b},
        {"a": a.view(3, 4), "b": b},
        {"a": a, "b": b.to(torch.int32)},
        {"a": a[:1], "b": b},
        {"a": b, "b": a},
    ]
    assert flat.has(flat.index()) and flat.has(flatten({"b": b, "a": a}).index())
    for other in map(flatten, others):
        assert not flat.has(other.index()) and not other.has(flat.index())
    part = FlatState({"a": a[:1], "b": b}, None, {"a": Box((2, 6), (0, 0), (1, 6), True)})  # the whole counts
    assert part.has(flat.index()) and part.index() == flat.index()
    other = FlatState({"a": a[:1], "b": b}, None, {"a": Box((3, 6), (0, 0), (1, 6), True)})
    assert not other.has(flat.index())


def test_only_what_belongs_to_a_graph_is_detached() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    flat = flatten({"weight": weight, "frozen": frozen, "made": weight * 2})
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in flat.tensors.values())
    assert {type(tensor) for tensor in flat.tensors.values()} == {torch.Tensor}
    assert flat.tensors["weight"].data_ptr() == weight.data_ptr()
