"""Checks of every checkpoint: its files, their size, its base, its hashes, and that the format's own code opens it."""

from pathlib import Path
from typing import Any

from runner.checks.check import Outcome, failed, passed, skipped
from runner.checks.context import Bench
from runner.errors import CheckpointError, DamagedError, RunnerError
from runner.files.file_type import BESIDE, Kind, kind_of

MB = 1_000_000
# What a weights file may hold beside its tensors' bytes: a share, something a tensor (its name and place), and a rest.
_SHARE, _PER_TENSOR, _REST = 1.05, 4096, 1 << 16
# Files beside the weights that the formats read.
_STATES = ("multi_layer_state.pt", "skill_library.pt", "training_info.pt", "training_state.pt")
# Only these stand on a base and so are small: the tier's cap is for them.
_ADAPTERS = ("lora_moe", "peft")


def files(bench: Bench) -> Outcome:
    """Each weights file is whole and what its place says: no pointer, page, truncated or stretched file."""
    found, problems = bench.files, []
    for path in found:
        try:
            bench.header(path)
        except CheckpointError as error:
            problems.append(str(error))
    problems += _states(bench)
    if problems:
        return failed("; ".join(problems), "copy or download it again")
    if not found:
        held = ", ".join(sorted(entry.name for entry in bench.look.path.iterdir())[:8])
        return failed(f"{bench.look.path}: holds no weights; it holds {held}", "copy or download it again")
    kinds = sorted({path.suffix for path in found})
    return passed(f"{len(found)} weights file{'s' * (len(found) != 1)} ({', '.join(kinds)})")


def _states(bench: Bench) -> list[str]:
    """What is wrong with the files beside the weights that the formats read."""
    if not bench.look.path.is_dir():
        return []
    problems = []
    for path in (bench.look.path / name for name in _STATES):
        if not path.exists():
            continue
        from runner.files.tensors import load_pickle

        try:
            load_pickle(path, tensors="meta")
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def size(bench: Bench) -> Outcome:
    """The weights files are as large as their tensors, and adapters together below the tier's `max_size_mb`."""
    found = bench.files
    total, expected = 0, 0
    for path in found:
        header, nbytes = bench.header(path), path.stat().st_size
        total, expected = total + nbytes, expected + header.nbytes
        most = header.nbytes * _SHARE + len(header.tensors) * _PER_TENSOR + _REST
        if nbytes > most and not _holds_more(bench, path):
            return failed(
                f"{path.name}: {nbytes / MB:,.1f} MB, where its {len(header.tensors)} tensors make "
                f"{header.nbytes / MB:,.1f} MB: it holds whole storages of which its tensors are views",
                "save clones of the tensors",
            )
    cap = bench.config.tier.max_size_mb
    if bench.look.format in _ADAPTERS and total > cap * MB:
        return failed(
            f"{total / MB:,.1f} MB of adapters, more than max_size_mb={cap:g}",
            "look for a merged model, or raise tier.max_size_mb for large adapters",
        )
    shown = ", ".join(f"{path.stat().st_size / MB:,.2f}" for path in found[:6]) + (", …" if len(found) > 6 else "")
    return passed(
        f"{total / MB:,.2f} MB ({shown}), by the shapes {expected / MB:,.2f} MB", bytes=total, expected_bytes=expected
    )


def _holds_more(bench: Bench, path: Path) -> bool:
    """Whether the file may hold more than the tensors at its top: optimizers, provenance."""
    return bench.look.family == "gpt" or (path.suffix != ".safetensors" and bool(bench.header(path).extras))


def loading(bench: Bench) -> Outcome:
    """The format recognises the checkpoint, opens it from headers, and accounts for every key.

    Where nothing else needs torch, it is left to the other tiers: the parts were looked at one by one.
    """
    import sys

    light = bench.config.tier.name == "quick" and "torch" not in sys.modules and not _has_pickles(bench)
    if light and bench.look.format is not None and bench.config.format.module is None:
        return passed(f"{bench.look.format}, by its parts; the other tiers open it with the format's own code")
    checkpoint = bench.checkpoint
    checkpoint.require_complete()
    return passed(
        "; ".join([f"{checkpoint.format}: {checkpoint.evidence}", *checkpoint.findings]),
        format=checkpoint.format,
        step=checkpoint.step,
    )


def _has_pickles(bench: Bench) -> bool:
    beside = list(bench.look.path.iterdir()) if bench.look.path.is_dir() else []
    return any(path.suffix in (".pt", ".pth", ".bin") for path in (*bench.files, *beside))


def finite(bench: Bench) -> Outcome:
    """No NaN or Inf in any tensor, read one at a time."""
    from runner.files.tensors import non_finite

    try:
        bad = [*non_finite(bench.checkpoint.weights), *_broken_skills(bench)]
    except DamagedError as error:
        if "hashes" not in bench.config.tier.checks:
            raise
        return skipped(f"{error} (see hashes)")  # which fails for it, so that a fault shows once
    if bad:
        shown = ", ".join(bad[:4]) + (f", … ({len(bad)} in all)" if len(bad) > 4 else "")
        return failed(f"NaN or Inf in {shown}", "go back to the last checkpoint before the training diverged")
    return passed(f"{len(bench.checkpoint.weights.infos)} tensors")


def _broken_skills(bench: Bench) -> list[str]:
    """The embeddings of a skill library, which are no weights, that are not finite."""
    skills = getattr(bench.checkpoint.details, "skills", None)
    if skills is None:
        return []
    from runner.families.lora_moe.state import read_skills

    return [
        f"{skills.file.name}: {name}" for name, tensor in read_skills(skills).items() if not tensor.isfinite().all()
    ]


def hashes(bench: Bench) -> Outcome:
    """Every file is as it was written, by the SHA-256 of its manifest, and every record of a .pt by its CRC."""
    from runner.files import manifest
    from runner.files import staging as commit
    from runner.files.archive import is_zip, verify_crc

    root = bench.look.directory
    with_crcs = [path for path in bench.files if kind_of(path) is Kind.ZIP]
    if bench.look.path.is_dir():
        with_crcs += [
            path for path in sorted(root.rglob("*")) if BESIDE.fullmatch(path.name) and path.is_file() and is_zip(path)
        ]
    for path in with_crcs:
        verify_crc(path)
    if bench.look.path.is_dir() and (root / manifest.FILE_NAME).is_file():
        if problems := commit.verify(root):
            return failed("; ".join(problems[:4]), "it was changed since it was written: copy it again")
        return passed(f"{len(manifest.list_files(root)) - 1} files as they were written")
    if with_crcs:
        return passed(f"no {manifest.FILE_NAME}; the CRCs of {', '.join(path.name for path in with_crcs)} hold")
    return skipped(f"no {manifest.FILE_NAME} (not written by this runner), and a layout without CRCs")


def base(bench: Bench) -> Outcome:
    """The base model that the checkpoint names, as far as it lies here, has the sizes that it is made for."""
    if bench.look.format in ("hf", "npt_full") or bench.look.family == "gpt":
        return passed("complete by itself")
    try:
        path = base_path(bench)
    except RunnerError as error:
        return skipped(f"{error}")
    from runner.files.strict_json import read_object

    values = read_object(path / "config.json", "config.json", 16 << 20)
    if problems := _misfits(bench, values):
        return failed(f"{'; '.join(problems)} (base {path})", "give its own base model as base=")
    return passed(f"fits {path.name}: hidden size {values.get('hidden_size')}")


def base_path(bench: Bench) -> Path:
    """The directory of the base that `base=` or the checkpoint names. Raises CheckpointError where it is not here."""
    if bench.config.base is not None:
        path = Path(bench.config.base).expanduser()
    else:
        from runner.checks.names import base_name

        name = base_name(bench)
        if name is None:
            raise CheckpointError("it names no base model; give it as base=")
        root = bench.look.directory
        path = next((start / name for start in (root, root.parent, Path()) if (start / name).is_dir()), Path(name))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"its base model {path} does not lie here; give it as base=")
    return path


def _misfits(bench: Bench, values: dict[str, Any]) -> list[str]:
    from runner.checks.names import made_for, module_misfits

    sizes = made_for(bench)
    problems = [
        f"{key} is {values[key]} in the base, but the checkpoint is made for {sizes[key]}"
        for key in ("hidden_size", "intermediate_size")
        if key in sizes and key in values and values[key] != sizes[key]
    ]
    depth = values.get("num_hidden_layers")
    if "layer" in sizes and isinstance(depth, int) and sizes["layer"] >= depth:
        problems.append(f"has layer {sizes['layer']}, but the base only the layers 0 to {depth - 1}")
    return problems or module_misfits(bench, values)
