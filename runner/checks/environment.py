"""Checks of the machine: what is installed and what it offers, and whether checkpoints can be written.

Nothing that is checked is imported: torch and peft alone take seconds.
"""

import ast
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runner.checks.check import WARNING, Outcome, failed, passed
from runner.checks.context import Bench

NEEDED = ("torch", "transformers", "safetensors", "peft")
OPTIONAL = ("wandb",)  # tracker=none does without it


def versions(bench: Bench) -> Outcome:
    """The libraries that write and read checkpoints, from their metadata."""
    found = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    absent = [name for name in NEEDED if found[name] is None]
    shown = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    if absent:
        return failed(f"not installed: {', '.join(absent)}", f"pip install {' '.join(absent)}", versions=found)
    if lacking := [name for name in OPTIONAL if found[name] is None]:
        return Outcome(
            status=WARNING, details=f"{shown}; not installed: {', '.join(lacking)}", data={"versions": found}
        )
    return passed(shown, versions=found)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def peft(bench: Bench) -> Outcome:
    """What the installed PEFT offers, read from its source."""
    root = package_directory("peft")
    if root is None:
        return failed("peft is not installed", "pip install peft")
    offers = peft_features(root)
    if not offers["LoRA"]:
        return failed(f"peft {_version('peft')} has no LoraConfig", "install peft 0.21 or later", offers=offers)
    there = [name for name, found in offers.items() if found]
    absent = [name for name, found in offers.items() if not found]
    details = f"peft {_version('peft')} offers {', '.join(there)}"
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


def safetensors(bench: Bench) -> Outcome:
    """Tensors written and read back are the same, and a damaged file is refused."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    path = bench.scratch / "round_trip.safetensors"
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


def writable(bench: Bench) -> Outcome:
    """Files can be made, synced and renamed where outputs land, and there is room for a checkpoint."""
    place = bench.scratch / "writable"
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
    free, wanted = shutil.disk_usage(bench.scratch).free / 1e6, bench.config.tier.max_size_mb
    details = f"{free:,.0f} MB free"
    if free < wanted:
        return Outcome(
            status=WARNING,
            details=f"{details}, less than the {wanted:,.0f} MB that a checkpoint may have (max_size_mb)",
            recommendation="free some space, or choose another place with hydra.run.dir=DIR",
        )
    return passed(f"can write, sync and rename; {details}")
