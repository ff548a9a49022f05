"""Checks of the machine: what is installed and what it offers, and whether checkpoints can be written.

Nothing that is checked is imported: torch and peft alone take seconds.
"""

import ast
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runner.checks.check import PARTS, checks_for, failed, passed, run_checks
from runner.checks.context import FAIL, WARNING, CheckContext, CheckedFamily, Item, Outcome
from runner.config import Format
from runner.errors import RunnerError
from runner.results import versions as installed

NEEDED = ("torch", "transformers", "safetensors", "peft")
OPTIONAL = ("wandb",)  # tracker=none does without it
# The checks of structure that each tiny layout must pass.
STRUCTURE = (*PARTS, "pollution", "size")


def versions(context: CheckContext) -> Outcome:
    """The libraries that write and read checkpoints, from their metadata."""
    numbers = installed()
    found = {name: numbers.get(name) for name in (*NEEDED, *OPTIONAL)}
    absent = [name for name in NEEDED if found[name] is None]
    shown = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    if absent:
        return failed(f"not installed: {', '.join(absent)}", f"pip install {' '.join(absent)}", versions=found)
    if lacking := [name for name in OPTIONAL if found[name] is None]:
        return Outcome(
            status=WARNING, details=f"{shown}; not installed: {', '.join(lacking)}", data={"versions": found}
        )
    return passed(shown, versions=found)


def peft(context: CheckContext) -> Outcome:
    """What the installed PEFT offers, read from its source."""
    root = package_directory("peft")
    if root is None:
        return failed("peft is not installed", "pip install peft")
    offers, number = peft_features(root), installed().get("peft")
    if not offers["LoRA"]:
        return failed(f"peft {number} has no LoraConfig", "install peft 0.21 or later", offers=offers)
    there = [name for name, found in offers.items() if found]
    absent = [name for name, found in offers.items() if not found]
    details = f"peft {number} offers {', '.join(there)}"
    if absent:
        details += f"; no {', no '.join(absent)}: the routing of experts is this runner's own"
    return passed(details, offers=offers)


def package_directory(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    found = find_spec(name)
    return Path(found.origin).parent if found is not None and found.origin else None


def peft_features(root: Path) -> dict[str, bool]:
    """LoRA, X-LoRA, a config of mixtures of LoRA experts, `attach_router`: whether the source below `root` has them."""
    classes, functions = set(), set()
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        # To parse all of the package takes seconds: only what may define one of them.
        if "attach_router" in text or (file.name == "config.py" and re.search(r"^class \w*Lora\w*", text, re.M | re.I)):
            nodes = list(ast.walk(ast.parse(text)))
            classes |= {node.name for node in nodes if isinstance(node, ast.ClassDef)}
            functions |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    mixtures = {name for name in classes if re.search(r"mo(l|lo)?e", name, re.I) and "lora" in name.lower()}
    return {
        "LoRA": "LoraConfig" in classes,
        "X-LoRA": "XLoraConfig" in classes,
        "MoE LoRA config": bool({name for name in mixtures if name.endswith("Config")}),
        "attach_router": "attach_router" in functions,
    }


def safetensors(context: CheckContext) -> Outcome:
    """Tensors written and read back are the same, and a damaged file is refused."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    path = context.scratch / "round_trip.safetensors"
    written: dict[str, Any] = {
        "gate.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "gate.bias": np.ones(3, dtype=np.float16),
    }
    save_file(written, path, metadata={"format": "pt"})
    read = load_file(path)
    same = set(read) == set(written) and all(
        read[name].dtype == array.dtype and np.array_equal(read[name], array) for name, array in written.items()
    )
    if not same:
        return failed("what was read back is not what was written", "install safetensors 0.8 or later")
    path.write_bytes(path.read_bytes()[:-1])
    try:
        load_file(path)
    except SafetensorError:
        path.unlink()
        return passed("2 tensors written and read back equal; a file with its last byte cut off was refused")
    return failed("a truncated file was read without an error", "install safetensors 0.8 or later")


def formats(context: CheckContext) -> Outcome:
    """Each layout is created, passes its checks, and does not pass them without one of its files."""
    problems, names = [], []
    for family in context.families.values():
        for name, write in family.examples().items():
            root = context.scratch / "layouts" / name
            part = write(root)
            names.append(name)
            found = _failing(context, family, root)
            (root / part).unlink()
            problems += [f"{name}: {text}" for text in found]
            if not _failing(context, family, root):
                problems.append(f"{name}: nothing misses {part}")
    if problems:
        return failed("; ".join(problems), "the checks of this runner do not fit its formats: report it")
    return passed(f"{', '.join(names)}: created and recognised, and refused without one of their files")


def _failing(context: CheckContext, family: CheckedFamily, root: Path) -> list[str]:
    """What is wrong with the tiny checkpoint of `family` in `root`, whose name is that of its format."""
    config = replace(context.config, ckpt=str(root), base=None, format=Format(name="auto"))
    inner = CheckContext(config=config, shows=_Silent(root), path=root, scratch=root)
    inner.family = family
    try:
        if inner.format is None or inner.format.name != root.name:
            return [f"recognised as {inner.format.name if inner.format else 'nothing'}"]
        checks = checks_for(inner, STRUCTURE)
    except RunnerError as error:
        return [str(error)]
    return [row["details"] for row in run_checks(checks, inner) if row["status"] == FAIL]


def write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file with tensors of zeros, written without torch."""
    import numpy as np
    from safetensors.numpy import save_file

    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path, metadata={"format": "pt"})


class _Silent:
    """A task's context without a progress bar."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
        """The items as they are."""
        return iter(items)


def writable(context: CheckContext) -> Outcome:
    """Files can be made, synced and renamed where outputs land, and there is room for a checkpoint."""
    place = context.scratch / "writable"
    try:
        place.mkdir()
        file = place / "file"
        with file.open("wb") as opened:
            opened.write(b"x" * 4096)
            opened.flush()
            os.fsync(opened.fileno())
        place.rename(place.with_name("renamed"))
        shutil.rmtree(place.with_name("renamed"))
    except OSError as error:
        return failed(f"{place}: {error.strerror}", "choose another place with hydra.run.dir=DIR")
    free, wanted = shutil.disk_usage(context.scratch).free / 1e6, context.config.tier.max_size_mb
    details = f"{free:,.0f} MB free"
    if free < wanted:
        return Outcome(
            status=WARNING,
            details=f"{details}, less than the {wanted:,.0f} MB that a checkpoint may have (max_size_mb)",
            recommendation="free some space, or choose another place with hydra.run.dir=DIR",
        )
    return passed(f"can write, sync and rename; {details}")
