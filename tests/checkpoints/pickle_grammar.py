"""Random pickles by grammar: every opcode that a checkpoint may hold, its calls given operands of all types.

Byte mutation hardly ever keeps a pickle whole; these are whole, and wrong only in what they say.
"""

import random
import struct
from collections.abc import Callable
from typing import Any

from runner.files.pickle_values import _CALLS, _TENSOR_CLASSES, DTYPES, STORAGES
from runner.files.stubs import FUNCTIONS, STAND_INS

GLOBALS = (*_CALLS, *STORAGES, *DTYPES, *STAND_INS, *FUNCTIONS, *_TENSOR_CLASSES)
CALLED = (*_CALLS, *STAND_INS, *FUNCTIONS)
# What readers look for in the files that they open, and names that objects have.
NAMES = (
    "global_step", "batch_count", "config", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "state",
    "param_groups", "params", "param_names", "lr", "betas", "step", "exp_avg", "layers_to_train", "layer_weights",
    "curriculum_schedule", "merge_info", "layer_sources", "merged_from", "layer_steps", "model", "optimizers", "code",
    "val_loss", "args", "adapter_config", "modulation_scale", "modulation_type", "model_name", "adapter_rank", "r", "gate_state_dict", "weight", "bias",
    "top_k", "temperature", "num_experts", "input_size", "little_endian", "storage", "cpu", "latin1", "items", "__dict__",
    "learning_rate", "current_epoch", "best_val_loss", "last_epoch", "_step_count", "base_lrs", "i4", ">", "\ud800", "\x1b[2J", "",
)  # fmt: skip
RECORD = 64
TENSOR = object()
DEEP = 150


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() // 8) + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


class Grammar:
    """Values as the opcodes that make them, `depth` levels of containers at most."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # How often it says what the checker refuses: else what it makes loads, and the readers have to bear it.
        self.wild = self.random.choice((0.0, 0.0, 0.05, 0.5))

    def program(self, template: Any = None) -> bytes:
        """A whole pickle: any value, or `template` with any value in some of its places."""
        return b"\x80\x02" + (self.value(5) if template is None else self.like(template)) + b"."

    def like(self, template: Any) -> bytes:
        """`template`, plain containers and values with `TENSOR` for a tensor, most of it as it is."""
        pick = self.random.random()
        if pick < 0.08:
            return self.value(3)
        if isinstance(template, dict):
            kept = [(key, value) for key, value in template.items() if self.random.random() > 0.04]
            return b"}(" + b"".join(self.plain(key) + self.like(value) for key, value in kept) + b"u"
        if isinstance(template, list):
            return b"](" + b"".join(map(self.like, template)) + b"e"
        return self.plain(template)

    def plain(self, value: Any) -> bytes:
        """A constant, or a tensor of a few shapes."""
        if value is TENSOR:
            return self.tensor()
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        return text(value) if isinstance(value, str) else b"N" if value is None else number(value)

    def value(self, depth: int) -> bytes:
        plain: list[Callable[[], bytes]] = [self.constant, self.constant, self.tensor]
        nested: list[Callable[[int], bytes]] = [self.dict, self.dict, self.list, self.tuple, self.call, self.call, self.new, self.built]  # fmt: skip
        if depth == 0 or self.random.random() < 0.25:
            return self.random.choice(plain)()
        if self.random.random() < 0.02:
            return b"]" * DEEP + b"a" * (DEEP - 1)
        if self.random.random() >= self.wild:
            nested = [self.dict, self.dict, self.list, self.tuple, self.foreign, self.container]
        return self.random.choice(nested)(depth - 1)

    def constant(self) -> bytes:
        pick = self.random.randrange(10)
        if pick < 3:
            return text(self.random.choice(NAMES))
        if pick < 6:
            return number(
                self.random.choice((0, 1, 2, 3, -1, 7, 255, 1 << 31, -(1 << 63), 1 << 64, 1 << 1100, -(1 << 2000)))
            )
        if pick == 6:
            return b"G" + struct.pack(">d", self.random.choice((0.0, 1e-3, -1.5, float("nan"), float("inf"), 1e308)))
        if pick == 7 and self.random.random() < self.wild:
            return named(self.random.choice(GLOBALS))
        return self.random.choice((b"N", b"\x88", b"\x89", b")", b"}", b"]", b"U\x02i4"))

    def key(self) -> bytes:
        """What a dict may have as a key, or a set in it."""
        return self.constant() if self.random.random() < self.wild else number(self.random.randrange(4))

    def foreign(self, depth: int) -> bytes:
        """An object of a foreign class, as pickle and as older pickles make it, with state or without."""
        made = named(self.random.choice(tuple(STAND_INS))) + self.tuple(depth) + self.random.choice((b"\x81", b"R"))
        return made + self.dict(depth) + b"b" if self.random.random() < 0.5 else made

    def container(self, depth: int) -> bytes:
        """A set, sizes, a device, bytes or a complex number."""
        keys = b"](" + b"".join(self.key() for _ in range(3)) + b"e"
        return self.random.choice((
            named("builtins.set") + keys + b"\x85R",
            named("torch.Size") + b"(" + number(2) + number(3) + b"t\x85R",
            named("torch.device") + text("cpu") + b"\x85R",
            named("_codecs.encode") + text("abc") + text("latin1") + b"\x86R",
            named("builtins.complex") + b"G" + struct.pack(">dcd", 1.0, b"G", 2.0) + b"\x86R",
            named("numpy.core.multiarray.scalar") + named("numpy.dtype") + text("f8") + b"\x89\x88\x87R" + text("a" * 8) + b"\x86R",
        ))  # fmt: skip

    def some(self, depth: int, most: int = 4) -> list[bytes]:
        return [self.value(depth) for _ in range(self.random.randrange(most + 1))]

    def dict(self, depth: int) -> bytes:
        keys = [text(self.random.choice(NAMES)) if self.random.random() < 0.7 else self.key() for _ in range(4)]
        start = self.random.choice((b"}", named("collections.OrderedDict") + b")R"))
        start = self.value(0) if self.random.random() < self.wild / 4 else start
        pairs = b"".join(key + self.value(depth) for key in keys[: self.random.randrange(5)])
        return start + b"(" + pairs + b"u"

    def list(self, depth: int) -> bytes:
        start = self.value(0) if self.random.random() < self.wild / 4 else b"]"
        return start + b"(" + b"".join(self.some(depth)) + b"e"

    def tuple(self, depth: int) -> bytes:
        return b"(" + b"".join(self.some(depth)) + b"t"

    def call(self, depth: int) -> bytes:
        function = self.random.choice(CALLED)
        if self.random.random() < 0.3:
            return named(function) + self.arguments(depth) + b"R"
        return named(function) + self.random.choice((self.tuple(depth), self.value(depth) + b"\x85")) + b"R"

    def arguments(self, depth: int) -> bytes:
        """A tuple with one of a plausible kind in it."""
        inner = self.random.choice((self.list, self.dict, self.tuple))(depth)
        return inner + b"\x85"

    def new(self, depth: int) -> bytes:
        return named(self.random.choice(tuple(STAND_INS))) + self.tuple(depth) + b"\x81"

    def built(self, depth: int) -> bytes:
        start = self.random.choice((self.new, self.call, self.dict))(depth)
        return start + self.random.choice((self.dict, self.value))(depth) + b"b"

    def tensor(self) -> bytes:
        """Mostly a sound one over the one record that there is; else with arguments of any type."""
        kind = self.random.choice(
            ("torch.FloatStorage", "torch.LongStorage", "torch.BFloat16Storage", "torch.BoolStorage")
        )
        count = RECORD // STORAGES[kind]
        wrong = self.random.random() < self.wild / 2
        storage = b"(" + text("storage") + named(kind) + text("0") + text("cpu") + number(count) + b"tQ"
        shape = self.random.choice(((), (2,), (2, 3), (1,), (0,), (4, 1)))
        strides = [1] * len(shape)
        for place in range(len(shape) - 2, -1, -1):
            strides[place] = strides[place + 1] * max(1, shape[place + 1])
        sizes = b"(" + b"".join(map(number, shape)) + b"t" + b"(" + b"".join(map(number, strides)) + b"t"
        rest = b"\x89" + named("collections.OrderedDict") + b")R"
        parts = [storage, number(0), sizes, rest]
        if wrong:
            parts[self.random.randrange(4)] = self.value(1)
        return named("torch._utils._rebuild_tensor_v2") + b"(" + b"".join(parts) + b"tR"
