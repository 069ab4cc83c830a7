"""A training state as named tensors and typed JSON, and back, without pickle.

`flatten` walks nested dicts, lists and tuples. Tensors and numpy arrays get a name, their path (`model.0.weight`,
the names that torch's distributed checkpoint gives them), and are stored as tensors; everything else becomes JSON
in which plain values stand for themselves and every object is a tag with one key that says what Python type it was:
``{"tuple": [...]}``, ``{"float": "7ff0000000000000"}``, ``{"tensor": "model.0.weight"}``. So state dicts of torch
come back equal, types included: int and str keys, tuples, infinities, counters, a module's `_metadata`.

Of a sharded tensor (DTensor) the local part stands for it, with the box of the whole that it is.

What has no place here (functions, arbitrary objects, sparse tensors) is refused with the path to it: a state that is
saved is a state that can be loaded.

Not kept: which tensors shared memory (each is stored in full), strides, `requires_grad`, the device (tensors come
back on the CPU; `load_state_dict` copies them to where they belong).
"""

from __future__ import annotations

import base64
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hpcft.checkpoint.boxes import Box, within
from hpcft.checkpoint.pieces import Piece, TensorShape
from hpcft.checkpoint.sharding import Layout, is_sharded, split
from hpcft.errors import DamagedError, UsageError

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""Types that a stock reader of safetensors knows."""

DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_STORED_AS: Mapping[torch.dtype, torch.dtype] = {
    torch.complex128: torch.float64,
    torch.complex32: torch.float16,
    **{
        dtype: torch.uint8
        for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")
        if (dtype := getattr(torch, name, None)) is not None
    },
}
"""Other types, and what they are stored as. Complex numbers get a last dimension of 2 (real, imaginary)."""


class StateError(UsageError):
    """The state holds something that a checkpoint cannot keep."""


@dataclass(frozen=True, slots=True)
class FlatState:
    """`tensors` by name, and `values`: everything else, with the names of the tensors at their places."""

    tensors: dict[str, Tensor]
    """Of one that is in `boxes`, the part that this rank holds."""
    values: Json
    boxes: Mapping[str, Box] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """Which of them are DTensors: those in `boxes`, and those that each rank holds all of."""

    def index(self) -> dict[str, TensorShape]:
        """All tensors with the shapes of the wholes: the same on every rank."""
        return {
            name: TensorShape(DTYPE_NAMES[tensor.dtype], box.shape if box else tuple(tensor.shape))
            for name, tensor in self.tensors.items()
            for box in (self.boxes.get(name),)
        }

    def has(self, index: Mapping[str, TensorShape]) -> bool:
        """Whether this is its index, whatever the order. Several times as fast as making one and comparing."""
        if len(index) != len(self.tensors):
            return False
        for name, tensor in self.tensors.items():
            known = index.get(name)
            if known is None or DTYPE_NAMES[tensor.dtype] != known.dtype:
                return False
            box = self.boxes.get(name)
            if (tensor.shape if box is None else box.shape) != known.shape:
                return False
        return True

    def part(self, piece: Piece) -> Tensor:
        """What a piece holds, a view; it has to lie in what this rank has of its tensor."""
        tensor = self.tensors[piece.name]
        if tensor.shape == piece.extent:
            return tensor
        if not piece.nbytes:
            return tensor.new_empty(piece.extent)
        region = piece.offsets, piece.extent
        if (box := self.boxes.get(piece.name)) is not None:
            region = within(region, box.region)
        for dimension, (start, length) in enumerate(zip(*region, strict=True)):
            tensor = tensor.narrow(dimension, start, length)
        return tensor


def flatten(state: Mapping[str, object]) -> FlatState:
    """The tensors of a state, not copied, and its values. StateError names what cannot be kept, and where."""
    encoder = _Encoder()
    values = encoder.encode(dict(state), ())
    return FlatState(encoder.tensors, values, encoder.boxes, encoder.layouts)


def unflatten(flat: FlatState) -> dict[str, Any]:
    """The state that was given to `flatten`. Its tensors are those of `flat`, not copies.

    Those that have a layout come as DTensors. Of tensors without content (meta) all comes but numpy's arrays, for
    which tensors stand.
    """
    try:
        state = _decode(flat.values, flat)
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        raise _unknown(str(error)) from error
    if not isinstance(state, dict):
        raise _unknown("it is not a state")
    return state


def _unknown(what: str) -> DamagedError:
    return DamagedError(
        f"the checkpoint's values cannot be understood: {what}",
        "it was perhaps written by a newer version of hpcft",
    )


_Path: TypeAlias = tuple[object, ...]


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.boxes: dict[str, Box] = {}
        self.layouts: dict[str, Layout] = {}
        self._open: set[int] = set()
        """Containers that are being walked: one that is met inside itself would never end."""

    def encode(self, value: object, path: _Path) -> Json:
        # The exact type counts: a subclass (a namedtuple, an enum) would come back as something else.
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if value is None or kind is bool:
            return value  # type: ignore[return-value]
        encode = _SCALARS.get(kind)
        if encode is not None:
            return encode(value)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, np.generic):
            return {"numpy": [_numpy_type(value.dtype, path), value.tobytes().hex()]}
        if kind not in _CONTAINERS:
            raise StateError(
                f"state[{_spell(path)}] is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot keep",
                "keep tensors, numpy arrays, numbers, strings, bytes, None, or dicts, lists, tuples of these",
            )
        if id(value) in self._open:
            raise StateError(f"state[{_spell(path)}] contains itself", "remove the cycle")
        self._open.add(id(value))
        try:
            return self._container(value, path)
        finally:
            self._open.discard(id(value))

    def _container(self, value: Any, path: _Path) -> Json:
        match value:
            case OrderedDict():
                # `Module.state_dict()` keeps the versions of its submodules beside its items.
                extra = vars(value)
                return {
                    "ordered": self._items(value, path),
                    **({"attributes": self._items(extra, (*path, "<attributes>"))} if extra else {}),
                }
            case Counter():
                return {"counter": self._items(value, path)}
            case dict():
                if all(type(key) is str and _is_text(key) for key in value):
                    return {"dict": {key: self.encode(item, (*path, key)) for key, item in value.items()}}
                return {"items": self._items(value, path)}
            case torch.Size():
                return {"size": list(value)}
            case tuple():
                return {"tuple": self._elements(value, path)}
            case list():
                return self._elements(value, path)
            case _:
                return {_SET_TAGS[type(value)]: sorted(self._elements(value, path), key=repr)}

    def _elements(self, values: Iterable[object], path: _Path) -> list[Json]:
        return [self.encode(item, (*path, index)) for index, item in enumerate(values)]

    def _items(self, value: Mapping[Any, object], path: _Path) -> list[Json]:
        return [[self._key(key, path), self.encode(item, (*path, key))] for key, item in value.items()]

    def _key(self, key: object, path: _Path) -> Json:
        if type(key) is str and _is_text(key):
            return key
        if isinstance(key, (Tensor, np.ndarray)):
            raise StateError(f"state[{_spell(path)}] has a tensor as a key", "use numbers or strings as keys")
        return self.encode(key, (*path, "<key>"))

    def _tensor(self, tensor: Tensor, path: _Path) -> Json:
        if not is_sharded(tensor):
            stored, note = _stored(tensor, path)
            return {"tensor": self._name(path, stored), **note} if note else {"tensor": self._name(path, stored)}
        where = f"state[{_spell(path)}]"
        layout, local = split(tensor)
        stored, note = _stored(local, path)
        name = self._name(path, stored)
        self.layouts[name] = layout
        try:
            box = layout.box(name)
        except ValueError as error:
            raise StateError(
                f"{where} is a sharded tensor that {error}, which a checkpoint cannot keep",
                "shard it over all ranks, with Shard and Replicate alone",
            ) from error
        if (
            0 in box.extent and 0 in local.shape and 0 not in box.shape
        ):  # fully_shard forgets the other lengths of what is empty
            box = replace(box, extent=tuple(local.shape))
        if box.extent != tuple(local.shape):
            raise StateError(
                f"{where} is a sharded tensor of which this rank holds {list(local.shape)}, and should hold "
                f"{list(box.extent)} by its placements {layout.placements}",
                "shard it as fully_shard or distribute_tensor do",
            )
        if layout.is_cut:
            parts = (2,) * (stored.dim() - local.dim())  # of complex numbers, if they are stored as two
            self.boxes[name] = replace(
                box,
                shape=box.shape + parts,
                offsets=box.offsets + (0,) * len(parts),
                extent=box.extent + parts,
            )
        return {"tensor": name, **note}

    def _array(self, array: np.ndarray[Any, Any], path: _Path) -> Json:
        kind = _numpy_type(array.dtype, path)
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        if not native.flags.writeable or not native.flags.c_contiguous:
            native = native.copy(order="C")  # torch takes neither read-only memory nor negative strides
        try:
            tensor = torch.from_numpy(native)
        except TypeError as error:
            raise StateError(
                f"state[{_spell(path)}] is a numpy array of {array.dtype}, which a checkpoint cannot keep",
                "convert it to numbers that torch knows",
            ) from error
        leaf = self._tensor(tensor, path)
        assert isinstance(leaf, dict)
        return {"array": leaf, "numpy": kind}

    def _name(self, path: _Path, tensor: Tensor) -> str:
        plain = ".".join(map(str, path))
        if not plain.isascii():
            plain = plain.encode("utf-8", "backslashreplace").decode()
        name, count = plain, 0
        while name in self.tensors or name in ("", "__metadata__"):
            # {"a": {"b": x}, "a.b": y}: the place in the values tells them apart, the name only has to be free.
            count += 1
            name = f"{plain}~{count}"
        self.tensors[name] = tensor
        return name


_AS_IT_IS: Final[Mapping[str, Json]] = {}


def _stored(tensor: Tensor, path: _Path) -> tuple[Tensor, Mapping[str, Json]]:
    """The tensor as one of a type that safetensors knows, and what the values say of that."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise StateError(
            f"state[{_spell(path)}] is a {type(tensor).__qualname__}, a kind of tensor that a checkpoint cannot keep",
            "give plain tensors or DTensors",
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
        raise StateError(f"state[{_spell(path)}] is a {kind} tensor, which a checkpoint cannot keep", "make it dense")
    true = tensor.dtype
    if tensor.requires_grad or type(tensor) is not Tensor:
        tensor = tensor.detach()
    if true in DTYPE_NAMES:
        return tensor, _AS_IT_IS
    stored = _STORED_AS.get(true)
    if stored is None:
        raise StateError(f"state[{_spell(path)}] has the type {true}, which a checkpoint cannot keep", "convert it")
    if true.is_complex:
        tensor = torch.view_as_real(tensor.resolve_conj().resolve_neg())
    else:
        tensor = tensor.view(stored)
    return tensor, {"as": str(true).removeprefix("torch.")}


def _spell(path: _Path) -> str:
    return "][".join(repr(key) for key in path)


def _numpy_type(dtype: np.dtype[Any], path: _Path) -> str:
    if dtype.kind not in "biufcSUMm":
        raise StateError(
            f"state[{_spell(path)}] is of numpy's type {dtype}, which a checkpoint cannot keep",
            "convert it to numbers that torch knows",
        )
    return dtype.str


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False  # lone surrogates, as in file names that are not UTF-8; JSON has no place for them
    return True


def _encode_float(value: float) -> Json:
    finite = value - value == 0
    return value if finite else {"float": struct.pack(">d", value).hex()}


def _decode_float(value: Json) -> float:
    if isinstance(value, dict):
        number: float = struct.unpack(">d", bytes.fromhex(str(value["float"])))[0]
        return number
    if not isinstance(value, float):
        raise ValueError("a number is not a float")
    return value


_SCALARS: Mapping[type, Callable[[Any], Json]] = {
    int: lambda value: value if -(2**63) <= value < 2**63 else {"int": hex(value)},
    float: _encode_float,
    complex: lambda value: {"complex": [_encode_float(value.real), _encode_float(value.imag)]},
    str: lambda value: value if _is_text(value) else {"str": value.encode("utf-8", "surrogatepass").hex()},
    bytes: lambda value: {"bytes": base64.b64encode(value).decode()},
    bytearray: lambda value: {"bytearray": base64.b64encode(value).decode()},
    torch.dtype: lambda value: {"dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"device": str(value)},
}

_SET_TAGS: Mapping[type, str] = {set: "set", frozenset: "frozenset"}

_CONTAINERS = frozenset({dict, OrderedDict, Counter, list, tuple, torch.Size, *_SET_TAGS})


def _decode(value: Json, flat: FlatState) -> Any:
    if isinstance(value, list):
        return [_decode(item, flat) for item in value]
    if not isinstance(value, dict):
        return value

    def items(rows: Json) -> list[tuple[Any, Any]]:
        return [(_decode(key, flat), _decode(item, flat)) for key, item in rows]  # type: ignore[union-attr,misc,str-unpack]

    match value:
        case {"dict": dict() as table}:
            return {key: _decode(item, flat) for key, item in table.items()}
        case {"items": rows}:
            return dict(items(rows))
        case {"ordered": rows, **rest}:
            ordered = OrderedDict(items(rows))
            for key, item in items(rest.get("attributes", [])):
                setattr(ordered, key, item)
            return ordered
        case {"counter": rows}:
            return Counter(dict(items(rows)))
        case {"tuple": list() as elements}:
            return tuple(_decode(item, flat) for item in elements)
        case {"size": list() as lengths}:
            return torch.Size(lengths)
        case {"set": list() as elements}:
            return {_decode(item, flat) for item in elements}
        case {"frozenset": list() as elements}:
            return frozenset(_decode(item, flat) for item in elements)
        case {"tensor": str() as name, **rest}:
            return _decode_tensor(name, rest.get("as"), flat)
        case {"array": dict() as leaf, "numpy": str() as kind}:
            tensor = _decode(leaf, flat)
            return tensor if tensor.is_meta else tensor.numpy().astype(np.dtype(kind), copy=False)
        case {"numpy": [str() as kind, str() as text]}:
            return _decode_scalar(np.dtype(kind), bytes.fromhex(text))
        case {"int": str() as text}:
            return int(text, 16)
        case {"float": _}:
            return _decode_float(value)
        case {"complex": [real, imaginary]}:
            return complex(_decode_float(real), _decode_float(imaginary))
        case {"str": str() as text}:
            return bytes.fromhex(text).decode("utf-8", "surrogatepass")
        case {"bytes": str() as text}:
            return base64.b64decode(text, validate=True)
        case {"bytearray": str() as text}:
            return bytearray(base64.b64decode(text, validate=True))
        case {"dtype": str() as text}:
            return _torch_type(text)
        case {"device": str() as text}:
            return torch.device(text)
    raise ValueError(f"unknown kind of value {sorted(value)}")


def _decode_scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    data = data[: dtype.itemsize]  # of an empty text, numpy gives out a zero as its bytes
    match dtype.kind:  # frombuffer would refuse it, and lose zeros at the end of others
        case "S":
            return np.bytes_(data)
        case "U":
            return np.str_(data.decode("utf-32-be" if dtype.str[0] == ">" else "utf-32-le", "surrogatepass"))
    return np.frombuffer(data, dtype)[0]


def _decode_tensor(name: str, true: Json, flat: FlatState) -> Tensor:
    tensor = flat.tensors.get(name)
    if tensor is None:
        raise ValueError(f"there is no tensor {name!r}")
    if true is not None:
        dtype = _torch_type(str(true))
        tensor = torch.view_as_complex(tensor) if dtype.is_complex else tensor.view(dtype)
    layout = flat.layouts.get(name)
    return tensor if layout is None else layout.join(tensor)


def _torch_type(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no type of torch")
    return dtype
