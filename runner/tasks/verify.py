"""`task=verify`: is a checkpoint still what was written, at any later time."""

from collections.abc import Callable, Iterator
from pathlib import Path

from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import HasFormats, open_checkpoint
from runner.config import VerifyConfig
from runner.errors import CheckpointError
from runner.files import manifest, staging
from runner.files.archive import verify_crc
from runner.files.file_type import Kind, kind_of
from runner.files.tensors import non_finite
from runner.results import Result, versions
from runner.tasks.context import Context, check_family, checkpoint_path

Check = dict[str, str]
PICKLES = (".pt", ".pth", ".bin")


def run(config: VerifyConfig, context: Context) -> Result:
    """Every check with what it found; exit code 1 where one failed, or with `strict` where there is no manifest.

    `verified` is null where no check failed and no manifest is there to prove anything. Raises CheckpointError for a
    path that is none.
    """
    path = checkpoint_path(config)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    opened: list[Checkpoint] = []
    with context.timed("verify"):
        steps = check_checkpoint(path, config.format.name, config.format.module, opened, config.family)
        checks = list(context.track(steps, "verifying"))
    failed = any(check["status"] == "fail" for check in checks)
    proved = checks[0]["status"] == "pass"
    result = Result(
        task="verify",
        ckpt=str(path),
        checks=checks,
        timing=context.timing,
        versions=versions(),
        exit_code=int(failed or (config.strict and not proved)),
    )
    for checkpoint in opened:
        check_family(config, checkpoint)
        result.step, result.family, result.format = checkpoint.step, checkpoint.family, checkpoint.format
        result.findings = list(checkpoint.findings)
    result.details = {"verified": False if failed else True if proved else None, "strict": config.strict}
    return result


class _Skipped(str):
    """Why a check had nothing to look at."""

    __slots__ = ()


def check_checkpoint(
    path: Path,
    format_name: str = "auto",
    module: str | None = None,
    opened: list[Checkpoint] | None = None,
    family: HasFormats | None = None,
) -> Iterator[Check]:
    """One row {name, status, details} a check, as each is done; after a failure the later ones are `skipped`.

    Without a manifest nothing proves that these are the files that were written: what can be checked is, and the first
    row, which is `skipped`, says so. `opened` receives the checkpoint where its structure is sound.
    """
    opened = [] if opened is None else opened

    def structure() -> str:
        checkpoint = open_checkpoint(path, format_name, module, family)
        checkpoint.require_complete()
        opened.append(checkpoint)
        return f"{checkpoint.format}: {checkpoint.evidence}"

    steps: dict[str, Callable[[], str | None]] = {
        "manifest": lambda: _manifest(path),
        "structure": structure,
        "crc": lambda: _crc(path, opened[0]),
        "finite": lambda: _finite(opened[0]),
    }
    failed = False
    for name, step in steps.items():
        if failed:
            yield {"name": name, "status": "skipped", "details": "an earlier check failed"}
            continue
        try:
            details = step()
        except CheckpointError as error:
            failed = True
            yield {"name": name, "status": "fail", "details": str(error)}
        else:
            absent = (
                "no MANIFEST.json: not written by this runner, or removed; nothing proves that these are the files "
                "that were written, and what follows is all that can be checked"
            )
            skipped = details is None or isinstance(details, _Skipped)
            yield {"name": name, "status": "skipped" if skipped else "pass", "details": details or absent}


def _manifest(path: Path) -> str | None:
    """Every file's size and SHA-256. Raises CheckpointError with all that is wrong; None without a manifest.

    A weights file that is named itself is checked with the output that it belongs to.
    """
    output = path if path.is_dir() else path.parent
    if not (output / manifest.FILE_NAME).is_file():
        return None
    if problems := staging.verify(output):
        raise CheckpointError("; ".join(problems))
    if path.is_file() and path.name not in manifest.read(output)["files"]:
        raise CheckpointError(f"{path}: is not in the {manifest.FILE_NAME} beside it")
    return f"{len(manifest.list_files(output)) - 1} files as they were written, by size and SHA-256"


def _crc(path: Path, checkpoint: Checkpoint) -> str:
    """The CRC of every record of the torch.save files of a directory, and of the weights wherever they lie."""
    beside = path.rglob("*") if path.is_dir() else [path]
    files = {file for file in (*beside, *checkpoint.weights.files) if file.is_file() and file.suffix in PICKLES}
    zips = sorted(file for file in files if kind_of(file) is Kind.ZIP)
    with_crcs = [file for file in zips if verify_crc(file)]
    said = {
        "every record": with_crcs,
        "saved without CRCs": [file for file in zips if file not in with_crcs],
        "a layout without CRCs": sorted(set(checkpoint.weights.files) - set(zips)),
    }
    words = "; ".join(f"{', '.join(file.name for file in found)}: {words}" for words, found in said.items() if found)
    return words if with_crcs else _Skipped(words)


def _finite(checkpoint: Checkpoint) -> str:
    bad = non_finite(checkpoint.weights)
    if bad:
        raise CheckpointError(f"{checkpoint.path}: NaN or Inf in {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}")
    return f"no NaN or Inf in {len(checkpoint.weights.infos)} tensors"
