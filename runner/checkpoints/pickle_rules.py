"""What a checkpoint's pickle may refer to, call and build: plain containers, dense tensors, inert records."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from runner.checkpoints.pickle_records import Container, Global, Refused, Tensor
from runner.checkpoints.pickle_tensors import DTYPES, STORAGES, check_hooks, tensor_v2, tensor_v3
from runner.files.stubs import FUNCTIONS, STAND_INS

_CONSTANTS = (str, bytes, int, float, bool, type(None))
_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_QUANTISED = ("torch.q", "torch.Q")
_REFUSED_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor; save it dense (tensor.to_dense())",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor; save it dense (tensor.to_dense())",
    "torch.serialization._get_layout": "a sparse tensor; save it dense (tensor.to_dense())",
    "torch._utils._rebuild_qtensor": "a quantised tensor; save it dequantised (tensor.dequantize())",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has a shape but no data",
    "torch._utils._rebuild_nested_tensor": "a nested tensor; save its parts",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass; save plain tensors",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a foreign device; save it from the CPU",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a foreign device; save it from the CPU",
    "torch.distributed.tensor.DTensor": "a distributed tensor; save the full tensor",
}


def check_global(argument: str) -> Global:
    """The global that pickletools gives as "module name". Raises Refused unless it is known to be inert."""
    name = ".".join(argument.split(" ", 1)).replace("__builtin__.", "builtins.")
    if name in _REFUSED_TENSORS:
        raise Refused(f"holds {_REFUSED_TENSORS[name]}", about_tensor=True)
    if name.startswith(_QUANTISED):
        raise Refused("holds a quantised tensor; save it dequantised (tensor.dequantize())", about_tensor=True)
    if any(name in known for known in (_CALLS, STORAGES, DTYPES, STAND_INS, FUNCTIONS, _TENSOR_CLASSES)):
        return Global(name=name)
    raise Refused(
        f"refers to {name}, which is neither a tensor nor plain data: nothing in a checkpoint is executed; "
        "save it again as a dict of tensors"
    )


def check_key(key: Any) -> None:
    """A dict key must be a constant or a flat tuple of constants."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, _CONSTANTS) for part in parts):
        raise Refused("a dict key that is not a string, number or flat tuple")


def reduce(function: Any, arguments: Any) -> Any:
    """What calling `function` would make, as a record. Raises Refused for a call that torch.save does not write."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise TypeError("not a call")
    if function.name in STAND_INS or function.name in FUNCTIONS:
        return Container(kind="foreign", items=list(arguments))
    if function.name not in _CALLS:
        raise Refused(f"calls {function.name}, which torch.save never writes")
    return _CALLS[function.name](*arguments)


def new(cls: Any, arguments: Any) -> Container:
    """An object of a foreign class made without its constructor."""
    if not isinstance(cls, Global) or not isinstance(arguments, tuple):
        raise TypeError("not a class")
    if cls.name not in STAND_INS:
        raise Refused(f"makes a {cls.name}, which torch.save never writes")
    return Container(kind="foreign", items=list(arguments))


def build(target: Any, state: Any) -> None:
    """State given to an object: a foreign record takes any, an OrderedDict only attributes that shadow no method."""
    if not isinstance(target, Container) or target.kind not in ("foreign", "dict"):
        raise Refused("gives state to something that takes none")
    if target.kind == "dict":
        _check_attributes(state, OrderedDict)
        target.items.append(None)
    target.items.append(state)


def _parameter(data: Any, grad: Any = False, hooks: Any = None, state: Any = None) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("not a tensor")
    check_hooks(hooks)
    _check_attributes(state, torch.nn.Parameter)
    return data


def _typed_tensor(function: Any, cls: Any, arguments: Any, state: Any) -> Any:
    made = reduce(function, arguments)
    if not isinstance(made, Tensor) or not isinstance(cls, Global) or cls.name not in _TENSOR_CLASSES:
        raise Refused("a tensor of a foreign class; save plain tensors", about_tensor=True)
    _check_attributes(state, torch.Tensor)
    return made


def _check_attributes(state: Any, owner: type) -> None:
    """Attributes given to an object must not hide one that its class has."""
    if state is None:
        return
    if not isinstance(state, Container) or state.kind != "dict":
        raise Refused("attributes that are not a dict")
    for name in state.items[::2]:
        if not isinstance(name, str) or hasattr(owner, name):
            raise Refused(f"an attribute {name!r} that hides one of {owner.__name__}")


def _mapping(items: Any = None) -> Container:
    if items is None:
        return Container(kind="dict")
    if not isinstance(items, Container):
        raise TypeError("not items")
    if items.kind == "dict":
        return Container(kind="dict", items=list(items.items))
    pairs: list[Any] = []
    for pair in items.items:
        pairs.extend(pair.items if isinstance(pair, Container) else pair)
    for key in pairs[::2]:
        check_key(key)
    return Container(kind="dict", items=pairs)


def _set_of(items: Any) -> Container:
    for item in items.items:
        check_key(item)
    return Container(kind="set", items=list(items.items))


def _bytes(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise Refused("bytes that are not written the way pickle writes them")
    return text.encode("latin1")


def _bytearray(content: Any, codec: Any = "latin1") -> bytes:
    if isinstance(content, int):
        raise Refused(f"a bytearray of {content} bytes made out of nothing")
    return content if isinstance(content, bytes) else _bytes(content, codec)


def _record(*arguments: Any) -> Container:
    if not all(isinstance(a, (*_CONSTANTS, tuple)) for a in arguments):
        raise TypeError("not constants")
    return Container(kind="value", items=list(arguments))


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor_v2,
    "torch._utils._rebuild_tensor_v2": tensor_v2,
    "torch._utils._rebuild_tensor_v3": tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "torch.Size": _record,
    "torch.device": _record,
    "builtins.complex": _record,
    "builtins.set": _set_of,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _bytes,
}
