"""Tensors that will be written: known by dtype and shape, read or computed in parts as they are asked for.

Those that are only copied need no torch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

from runner.files.safetensors_header import DTYPES
from runner.files.stored import Stored, stored_tensors
from runner.files.tensors import TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch

# Elements of one part: small enough for the processor's cache, large enough that a part's overhead vanishes.
PART = 1 << 17
_ITEMSIZE = dict(DTYPES.values()) | {"complex128": 16}


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """One tensor of an output: `parts()` gives its elements in order, as 1-D tensors of at most PART elements.

    `origin` says where it comes from, for messages. It can be asked for its parts any number of times.
    `elements(indices)`: those at flat indices [N], each fetched by itself. `computed`: it is no copy of a stored
    tensor, and what is written of it is held against some of its elements. `stored`: where its bytes lie in one piece.
    """

    origin: str
    dtype_name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[torch.Tensor]]
    elements: Callable[[torch.Tensor], torch.Tensor] | None = None
    computed: bool = False
    stored: Stored | None = None

    @property
    def dtype(self) -> torch.dtype:
        """As torch has it, which is imported for it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        size = _ITEMSIZE.get(self.dtype_name)
        return self.dtype.itemsize if size is None else size

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.itemsize


def from_tensor(tensor: torch.Tensor, origin: str) -> LazyTensor:
    """A tensor as it is, which may be a view of a mapped file."""
    return LazyTensor(
        origin=origin,
        dtype_name=name_of(tensor.dtype),
        shape=tuple(tensor.shape),
        parts=lambda: split(tensor),
        elements=partial(_pick, tensor),
    )


def from_source(source: TensorSource, info: TensorInfo) -> LazyTensor:
    """The tensor `info` of a checkpoint, read when its parts are asked for."""
    return LazyTensor(
        origin=f"{source.path}: {info.name}",
        dtype_name=info.dtype_name,
        shape=info.shape,
        parts=lambda: split(source.read(info.name)),
        elements=lambda indices: _pick(source.read(info.name), indices),
        stored=_place(source, info),
    )


def _place(source: TensorSource, info: TensorInfo) -> Stored | None:
    """Where the tensor lies, where that is one piece of one file."""
    name = source.stripped_prefix + info.name
    found = (stored_tensors(file).get(name) for file in source.files)
    return next((stored for stored in found if stored is not None and stored.size == info.nbytes), None)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _pick(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The elements at flat `indices`, of a tensor in any layout."""
    import torch

    return tensor.detach()[torch.unravel_index(indices, tensor.shape)]


def replaced(value: Any, change: Callable[[LazyTensor], LazyTensor]) -> Any:
    """Plain containers with every `LazyTensor` in them changed."""
    if isinstance(value, LazyTensor):
        return change(value)
    if isinstance(value, OrderedDict):
        return OrderedDict((key, replaced(item, change)) for key, item in value.items())
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(item, change) for item in value)
    return value


def contained(value: Any) -> list[LazyTensor]:
    """Every `LazyTensor` inside plain containers, in order."""
    if isinstance(value, LazyTensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inside for tensor in contained(item)]


def split(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements of `tensor` in order, PART at a time; only one that is not contiguous is copied."""
    flat = tensor.detach().contiguous().reshape(-1)
    for start in range(0, flat.numel(), PART):
        yield flat[start : start + PART]


def as_bytes(part: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied; a single number has no dimension to view as bytes."""
    import torch

    return part.reshape(-1).view(torch.uint8).numpy().data


def mean(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The mean of tensors of one shape, computed in float64: equal ones give themselves."""
    return _elementwise(tensors, lambda parts: reduce(add, parts) / len(parts))


def average(tensors: Sequence[LazyTensor], weights: Sequence[float]) -> LazyTensor:
    """The mean of `tensors` by `weights`, which sum to 1; equal weights give exactly what `mean` gives."""
    return mean(tensors) if len(set(weights)) == 1 else weighted(tensors, weights)


def rows(parts: Sequence[tuple[LazyTensor, Sequence[int]]]) -> LazyTensor:
    """Rows of several tensors that agree in all but the first dimension, one below the other; computed at once."""
    import torch

    found = [tensor for tensor, _ in parts]
    dtype = _dtype(found)

    def stacked() -> Iterator[torch.Tensor]:
        whole = [torch.cat(list(each.parts())).reshape(each.shape)[list(chosen)].to(dtype) for each, chosen in parts]
        yield from split(torch.cat(whole))

    count = sum(len(chosen) for _, chosen in parts)
    return LazyTensor(
        origin=_origins(found),
        dtype_name=name_of(dtype),
        shape=(count, *found[0].shape[1:]),
        parts=stacked,
        elements=lambda indices: torch.cat(list(stacked()))[indices],
    )


def linear(first: LazyTensor, second: LazyTensor, t: float) -> LazyTensor:
    """(1 - t)·first + t·second, computed in float64: t = 0 gives the first, t = 1 the second."""
    return weighted((first, second), (1 - t, t))


def weighted(tensors: Sequence[LazyTensor], weights: Sequence[float]) -> LazyTensor:
    """The sum of `weights[i]`·`tensors[i]`, computed in float64; a tensor of weight 0 does not count."""
    chosen = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight]
    return _elementwise(
        [tensor for tensor, _ in chosen],
        lambda parts: reduce(add, [part * w for part, (_, w) in zip(parts, chosen, strict=True)]),
        like=tensors,
    )


def slerp(first: LazyTensor, second: LazyTensor, t: float) -> LazyTensor:
    """Spherical interpolation: each tensor as one vector, along the arc between the two (Shoemake 1985).

    Where one is zero or they point (almost) the same or opposite way, which has no arc, it is linear.
    """

    @cache
    def found() -> LazyTensor:
        return weighted((first, second), _slerp_weights(first, second, t))

    return LazyTensor(
        origin=_origins((first, second)),
        dtype_name=name_of(_dtype((first, second))),
        shape=first.shape,
        parts=lambda: found().parts(),
        elements=lambda indices: _elements(found(), indices),
        computed=True,
    )


def combined(how: str, tensors: Sequence[LazyTensor], weights: Sequence[float], t: float) -> LazyTensor:
    """`tensors` by the rule `how`: their average by `weights`, or linear or slerp from the first to the second."""
    if how == "average":
        return average(tensors, weights)
    first, second = tensors
    return slerp(first, second, t) if how == "slerp" else linear(first, second, t)


# Above this |cosine| the arc is too short for its sine: linear interpolation is the limit.
_PARALLEL = 0.9995


def _slerp_weights(first: LazyTensor, second: LazyTensor, t: float) -> tuple[float, float]:
    dot = length_a = length_b = 0.0
    for a, b in zip(first.parts(), second.parts(), strict=True):
        a, b = a.double(), b.double()
        dot, length_a, length_b = dot + float(a @ b), length_a + float(a @ a), length_b + float(b @ b)
    norm = math.sqrt(length_a) * math.sqrt(length_b)
    cosine = dot / norm if norm else 1.0
    if abs(cosine) > _PARALLEL or not math.isfinite(cosine):
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _elementwise(
    tensors: Sequence[LazyTensor],
    combine: Callable[[list[torch.Tensor]], torch.Tensor],
    like: Sequence[LazyTensor] | None = None,
) -> LazyTensor:
    dtype = _dtype(like or tensors)

    def parts() -> Iterator[torch.Tensor]:
        for group in zip(*(tensor.parts() for tensor in tensors), strict=True):
            yield combine([part.double() for part in group]).to(dtype)

    def elements(indices: torch.Tensor) -> torch.Tensor:
        return combine([_elements(tensor, indices).double() for tensor in tensors]).to(dtype)

    return LazyTensor(
        origin=_origins(like or tensors),
        dtype_name=name_of(dtype),
        shape=tensors[0].shape,
        parts=parts,
        elements=elements,
        computed=True,
    )


def _elements(tensor: LazyTensor, indices: torch.Tensor) -> torch.Tensor:
    assert tensor.elements is not None, f"{tensor.origin}: has no elements by index"
    return tensor.elements(indices)


def _dtype(tensors: Sequence[LazyTensor]) -> torch.dtype:
    return promoted([tensor.dtype for tensor in tensors])


def promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """A dtype that holds all values of all of these."""
    return reduce(_promoted, dtypes)


def _promoted(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """A dtype that holds all values of both. torch refuses to choose one where float8 is among them."""
    import torch

    small, large = sorted((a, b), key=lambda dtype: dtype.itemsize)
    if a == b or not (small.itemsize == 1 and small.is_floating_point):
        return torch.promote_types(a, b)
    return large if large.is_floating_point and large.itemsize > 1 else torch.float32


def _origins(tensors: Sequence[LazyTensor]) -> str:
    return " with ".join(tensor.origin for tensor in tensors)
