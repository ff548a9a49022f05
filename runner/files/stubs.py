"""Stand-ins for the foreign objects that known formats hold: they record state and execute nothing."""

import struct
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, ClassVar


class Inert:
    """What a pickle said about an object of a foreign class: its name, constructor arguments and state.

    `state` is the object's `__dict__` where it had one; any other state (numpy's tuples) stands under "state".
    """

    type_name: ClassVar[str] = "unknown"

    args: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *args: Any) -> "Inert":
        """Record the arguments here and not in `__init__`, which pickle's NEWOBJ does not call."""
        self = super().__new__(cls)
        self.args = args
        self.state = {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = {str(k): v for k, v in state.items()} if isinstance(state, Mapping) else {"state": state}

    def __repr__(self) -> str:
        if self.state and "state" not in self.state:
            inside = ", ".join(f"{key}={value!r}" for key, value in self.state.items())
        else:
            inside = ", ".join(repr(value) for value in self.args)
        return f"{self.type_name}({inside})"


class InertPath(Inert):
    """A path's parts; as text, the path that they make."""

    def __str__(self) -> str:
        return str(PurePosixPath(*(str(part) for part in self.args)))

    def __repr__(self) -> str:
        return f"{self.type_name}({str(self)!r})"


class InertArray(Inert):
    """A numpy array, whose state is (version, shape, dtype, order, bytes)."""

    type_name = "numpy.ndarray"

    def __repr__(self) -> str:
        state = self.state.get("state")
        shape = state[1] if isinstance(state, tuple) and len(state) > 1 else "unknown"
        return f"{self.type_name}(shape={shape})"


def _stand_in(name: str) -> type[Inert]:
    if name.endswith("._reconstruct"):
        return type("ndarray", (InertArray,), {})
    kind = InertPath if name.startswith("pathlib.") else Inert
    return type(name.rpartition(".")[2], (kind,), {"type_name": name})


_NUMPY_SCALARS = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip


def numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    """A pickled numpy scalar as the Python number it holds; anything else it may hold as an inert record."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    layout = _NUMPY_SCALARS.get(code) if isinstance(code, str) else None
    if layout is None or not isinstance(data, bytes) or len(data) != struct.calcsize(layout):
        return STAND_INS["numpy.generic"](dtype, data)
    state = dtype.state.get("state")
    order = ">" if isinstance(state, tuple) and len(state) > 1 and state[1] == ">" else "<"
    return struct.unpack(order + layout, data)[0]


_NAMES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.date",
    "datetime.datetime",
    "datetime.time",
    "datetime.timedelta",
    "datetime.timezone",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    "numpy.dtype",
    "numpy.generic",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)  # fmt: skip
STAND_INS: dict[str, Any] = {name: _stand_in(name) for name in _NAMES}
FUNCTIONS = {f"numpy.{core}.multiarray.scalar": numpy_scalar for core in ("core", "_core")}
