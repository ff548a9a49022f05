"""Checks of every checkpoint: its files, their size, its base, its hashes, and that the format's own code opens it."""

from runner.checkpoints.reading import some
from runner.checks.check import failed, part_outcome, passed, skipped
from runner.checks.context import CheckContext, Outcome
from runner.errors import DamagedError, RunnerError
from runner.files.file_type import BESIDE
from runner.files.strict_json import read_object

MB = 1_000_000
# What a weights file may hold beside its tensors' bytes: a share, something a tensor (its name and place), and a rest.
_SHARE, _PER_TENSOR, _REST = 1.05, 4096, 1 << 16


def built(context: CheckContext) -> Outcome:
    """The checkpoint is built and saved, absent or complete, by the code that training uses."""
    path = context.built
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    kept = f", kept in {path}" if context.config.keep else ""
    return passed(f"{context.family_name}: {len(files)} files, {size / 1e6:,.2f} MB{kept}", path=str(path), bytes=size)


def files(context: CheckContext) -> Outcome:
    """Each weights file, and each state that the format reads, is whole and what its place says: no pointer or page,
    nothing cut off and nothing added."""
    reading = context.reading
    if any(problem.part == "files" for problem in reading.problems):
        return part_outcome(context, "files", "copy or download it again")
    if not reading.files:
        held = ", ".join(sorted(entry.name for entry in context.directory.iterdir())[:8])
        return failed(f"{reading.path}: holds no weights; it holds {held}", "copy or download it again")
    kinds = sorted({path.suffix for path in reading.files})
    count = len(reading.files)
    return passed(f"{count} weights file{'s' * (count != 1)} ({', '.join(kinds)})")


def size(context: CheckContext) -> Outcome:
    """The weights files are as large as their tensors, and adapters together below the tier's `max_size_mb`."""
    if not context.reading.sources:
        return skipped("no weights could be read")
    sizes = []
    expected = 0
    for source in context.reading.sources:
        held, tensors = sum(path.stat().st_size for path in source.files), source.nbytes
        sizes += [path.stat().st_size for path in source.files]
        # Optimizers, provenance.
        holds_more = source.path.suffix != ".safetensors" and bool(source.extras)
        expected += tensors
        if held > tensors * _SHARE + len(source.infos) * _PER_TENSOR + _REST and not holds_more:
            return failed(
                f"{source.path.name}: {held / MB:,.1f} MB, where its {len(source.infos)} tensors make "
                f"{tensors / MB:,.1f} MB: it holds whole storages of which its tensors are views",
                "save clones of the tensors",
            )
    total, cap = sum(sizes), context.config.tier.max_size_mb
    if context.format is not None and context.format.adapters and total > cap * MB:
        return failed(
            f"{total / MB:,.1f} MB of adapters, more than max_size_mb={cap:g}",
            "look for a merged model, or raise tier.max_size_mb for large adapters",
        )
    shown = ", ".join(f"{each / MB:,.2f}" for each in sizes[:6]) + (", …" if len(sizes) > 6 else "")
    return passed(
        f"{total / MB:,.2f} MB ({shown}), by the shapes {expected / MB:,.2f} MB", bytes=total, expected_bytes=expected
    )


def loading(context: CheckContext) -> Outcome:
    """The format recognises the checkpoint, opens it from headers, and accounts for every key."""
    checkpoint = context.checkpoint
    checkpoint.require_complete()
    return passed(
        "; ".join([f"{checkpoint.format}: {checkpoint.evidence}", *checkpoint.findings]),
        format=checkpoint.format,
        step=checkpoint.step,
    )


def finite(context: CheckContext) -> Outcome:
    """No NaN or Inf in any tensor, read one at a time."""
    from runner.files.tensors import non_finite

    weights = context.checkpoint.weights
    try:
        bad = non_finite(weights)
        for source in (opened() for opened in context.reading.beside):
            bad += [f"{source.path.name}: {name}" for name in non_finite(source)]
    except DamagedError as error:
        if "hashes" not in context.config.tier.checks:
            raise
        return skipped(f"{error} (see hashes)")  # which fails for it, so that a fault shows once
    if bad:
        return failed(
            f"NaN or Inf in {some(bad, 4, ', ')}", "go back to the last checkpoint before the training diverged"
        )
    return passed(f"{len(weights.infos)} tensors")


def hashes(context: CheckContext) -> Outcome:
    """Every file is as it was written, by the SHA-256 of its manifest, and by the CRCs of a .pt where it has them."""
    from runner.files import manifest, staging
    from runner.files.archive import is_zip, verify_crc

    root, weights = context.directory, context.reading.files
    entries = sorted(root.rglob("*")) if context.reading.path.is_dir() else []
    beside = [path for path in entries if BESIDE.fullmatch(path.name) and path.is_file() and path not in weights]
    with_crcs = [path for path in (*weights, *filter(is_zip, beside)) if verify_crc(path)]
    if context.reading.path.is_dir() and (root / manifest.FILE_NAME).is_file():
        if problems := staging.verify(root):
            return failed("; ".join(problems[:4]), "it was changed since it was written: copy it again")
        return passed(f"{len(manifest.list_files(root)) - 1} files as they were written")
    if not with_crcs:
        return skipped(f"no {manifest.FILE_NAME} (not written by this runner), and no CRCs")
    names = ", ".join(path.name for path in with_crcs)
    bare = len(set(weights) - set(with_crcs))
    if not bare:
        return passed(f"no {manifest.FILE_NAME}; the CRCs of {names} hold")
    what = "the weights" if bare == len(weights) else f"{bare} of {len(weights)} weights files"
    return skipped(f"no {manifest.FILE_NAME}; {what} are without CRCs; those of {names} hold")


def base(context: CheckContext) -> Outcome:
    """The base model that the checkpoint names, as far as it lies here, has the sizes that it is made for."""
    checkpoint, family = context.reading.checkpoint, context.family
    if checkpoint is None or family is None:
        return skipped("what it is made for is not known")
    if not family.needs_base(checkpoint):
        return passed("complete by itself")
    try:
        path = context.base_path()
    except RunnerError as error:
        return skipped(f"{error}")
    values = read_object(path / "config.json", "config.json", 16 << 20)
    if problems := family.base_misfits(checkpoint, values):
        return failed(f"{'; '.join(problems[:4])} (base {path})", "give its own base model as base=")
    return passed(f"fits {path.name}: hidden size {values.get('hidden_size')}")
