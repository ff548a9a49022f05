"""The records that stand for a pickle's values while it is checked, and the error of a broken rule."""

from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    """A rule is broken; `about_tensor` where the message should be led by the tensor's name."""

    def __init__(self, message: str, *, about_tensor: bool = False) -> None:
        super().__init__(message)
        self.about_tensor = about_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Global:
    """A name that the pickle refers to."""

    name: str


@dataclass(kw_only=True, slots=True)
class Container:
    """A list, dict (keys and values in turn), set or foreign record in the making."""

    kind: str
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """`count` elements of `item_bytes` each, in a record that holds `record_bytes`."""

    key: str
    count: int
    item_bytes: int
    record_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A dense tensor over a storage."""

    storage: Storage
    shape: tuple[int, ...]
