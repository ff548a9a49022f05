"""Writing an output directory so that it is absent or complete and verified, whatever moment the process dies.

lock → stage in a hidden directory beside the target → sync → MANIFEST.json → read back → rename → sync the parent.
Whether an output may be written there is asked before the first byte is. Beside it stand, while it is written, its
lock, the staged directory, and an old output on its way out. A written file is read back from the disk, once and in
order, for its hash and for whoever compares it.
"""

import errno
import hashlib
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from runner.errors import CheckpointError, RunnerError, printable
from runner.files import manifest as manifests
from runner.files.atomic import aside_name, by_umask, rename_new, swap, sync

# Bytes of one step. Small, so that few pages are in use: each step's are given back before many more are taken.
STEP = 1 << 23

Watcher = Callable[[int, memoryview], None]


def unwatched(offset: int, content: memoryview) -> None:
    """A watcher that sees nothing."""


def read_back(path: Path, watch: Watcher = unwatched) -> dict[str, Any]:
    """The size in bytes and SHA-256 of a synced file, as a manifest lists them, read from the disk.

    `watch` gets the content step by step, each with its offset, and at the end an empty one with the size. The file's
    pages are let go before the reading and behind it. Raises OSError, and what `watch` raises.
    """
    digest = hashlib.sha256()
    offset = 0
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashed = pool.submit(digest.update, b"")
        for content in _from_disk(path):
            hashed.result()
            hashed = pool.submit(digest.update, content)
            watch(offset, content)
            offset += len(content)
        hashed.result()
    watch(offset, memoryview(b""))
    return {"size": offset, "sha256": digest.hexdigest()}


def _from_disk(path: Path) -> Iterator[memoryview]:
    """The content of a file step by step, past the page cache where the file system can; a step holds until the next
    but one."""
    size = path.stat().st_size
    # Of whole pages, at the start of pages, as reading past the cache needs; two in turn.
    buffers = [mmap.mmap(-1, min(STEP, -(-(size + 1) // mmap.PAGESIZE) * mmap.PAGESIZE)) for _ in range(2)]
    direct = getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | direct)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        direct, descriptor = 0, os.open(path, os.O_RDONLY)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not direct:
            forget(descriptor)
        offset = 0
        while count := file.readinto(buffers[0]):
            yield memoryview(buffers[0])[:count].toreadonly()
            if not direct:
                forget(descriptor, offset, count)
            offset += count
            if direct and count % mmap.PAGESIZE:
                return  # the end, which lies inside of a page: there is no more that could be read past the cache
            buffers.reverse()


def forget(descriptor: int, offset: int = 0, count: int = 0) -> None:
    """Let the system give up pages of a file that the disk has, and begin to write those that it has not.

    Pages that are used again cost less than new ones, which a virtual machine gets one by one from its host; and what
    others hold in the page cache stays there. `count` 0 is all to the end of the file.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


PARTIAL = ".partial-"
REPLACED = ".replaced-"
_LEFTOVER = re.compile(r"\.(?P<target>.+)\.(partial|replaced)-[0-9a-f]{8}", re.DOTALL)


def hidden(target: Path, mark: str) -> Path:
    """A free name beside `target` that a later sweep recognises."""
    return target.with_name(f".{target.name}{mark}{uuid.uuid4().hex[:8]}")


def retire(old: Path, target: Path) -> None:
    """Delete an output of this runner that nothing was added to; keep anything else beside, under a visible name."""
    try:
        known = {*manifests.read(old)["files"], manifests.FILE_NAME}
        ours = set(manifests.list_files(old)) <= known
    except CheckpointError:
        ours = False
    if ours or not any(old.iterdir()):
        # Under a name that a sweep deletes: half deleted, it would look like someone else's.
        doomed = hidden(target, PARTIAL)
        old.rename(doomed)
        shutil.rmtree(doomed)
    elif old.name.startswith("."):
        old.rename(aside_name(target))


def sweep(target: Path) -> None:
    """Remove what killed processes left beside `target`: its own leftovers, and others' that no live lock holds."""
    for path in sorted(target.parent.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if not found or path.is_symlink() or not path.is_dir():
            continue
        if found["target"] == target.name:
            _remove_leftover(path, target)
        elif path.stat().st_uid == os.getuid():
            _sweep_other(path, target.with_name(found["target"]))


def _sweep_other(path: Path, other: Path) -> None:
    try:
        with locked(other):
            if path.exists():
                _remove_leftover(path, other)
    except CheckpointError:
        return  # a live process writes it


def _remove_leftover(path: Path, target: Path) -> None:
    if REPLACED in path.name:
        retire(path, target)
    else:
        shutil.rmtree(path)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the one lock of `target`, for which nobody waits."""
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{target}: another process is writing it: wait for it, or choose another") from error
    try:
        yield
    finally:
        # Unlinked while held: whoever opened the old file finds it without a name, and opens a new one.
        path.unlink(missing_ok=True)
        lock.release()


# For the manifest and the file system's own records.
_MARGIN = 1 << 20


def check_output(
    target: Path,
    *,
    replace: bool = False,
    inputs: Sequence[Path] = (),
    expected_bytes: int = 0,
    option: str = "merge.force",
) -> None:
    """Raises CheckpointError unless the directory `target` can be written.

    It must not be a link, a file, or (without `replace`) there already; not equal to, inside or around an input,
    by file identity and not by name; and its file system must have `expected_bytes` to spare.
    """
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be an output: {error.strerror}: choose another output") from error
    if target.is_symlink():
        raise CheckpointError(f"{target}: a symbolic link cannot be an output: give the directory itself")
    if target.exists():
        if not target.is_dir():
            raise CheckpointError(f"{target}: a file stands where the output directory should be")
        if target.is_mount():
            raise CheckpointError(f"{target}: a mount point cannot be an output: give a directory inside it")
        if not replace:
            raise CheckpointError(f"{target}: exists already: choose another output, or replace it: {option}=true")
    for source in inputs:
        _check_input(target, source)
    existing = next(folder for folder in target.parents if folder.exists())
    if not existing.is_dir():
        raise CheckpointError(f"{target}: {existing} is not a directory")
    free = shutil.disk_usage(existing).free
    if expected_bytes and free < expected_bytes + _MARGIN:
        raise CheckpointError(
            f"{target}: needs {_megabytes(expected_bytes + _MARGIN)}, {existing} has {_megabytes(free)} free"
        )


def _check_input(target: Path, source: Path) -> None:
    if not source.exists():
        raise CheckpointError(f"{source}: no such input")
    if _any_same((target, *target.parents), source):
        raise CheckpointError(f"{target}: the output is equal to or inside the input {source}: choose another output")
    if target.exists() and _any_same(source.resolve().parents, target):
        raise CheckpointError(f"{target}: the output holds the input {source}: choose another output")


def _any_same(folders: Iterable[Path], other: Path) -> bool:
    return any(folder.exists() and folder.samefile(other) for folder in folders)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


@contextmanager
def staged(
    target: Path,
    *,
    replace: bool = False,
    inputs: Sequence[Path] = (),
    expected_bytes: int = 0,
    manifest: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str | None] | None = None,
    option: str = "merge.force",
    watchers: Callable[[Path], Mapping[str, Watcher]] = lambda partial: {},
) -> Iterator[Path]:
    """A directory to write into that becomes `target`, whole and verified, when the block ends without an exception.

    `manifest` is added to MANIFEST.json (recipe, hashes of inputs) and must not depend on the time. `hashes`: the
    SHA-256 of files by name, where whoever wrote them knows it; what is read back is held against it. None: the file's
    watcher proves every byte, and the hash is that of what it was shown.
    `watchers(partial)` gives checks of the writer's own, by the name of the file whose content they get as it is read
    back; they raise RunnerError where it is not as it should be.
    `option`: what would let an existing `target` be replaced. With `replace` it is swapped out; it is deleted only if
    this runner wrote it and nothing was added since, else it stays beside as `NAME.old-<id>`. Raises CheckpointError
    where the output is refused or another process writes it, RunnerError where the disk fails.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow the link that must be refused
    check_output(target, replace=replace, inputs=inputs, expected_bytes=expected_bytes, option=option)
    with _disk_errors(target):
        _make_parents(target.parent)
        with locked(target):
            check_output(target, replace=replace, inputs=inputs, expected_bytes=expected_bytes, option=option)
            sweep(target)
            partial = hidden(target, PARTIAL)
            partial.mkdir()
            identity = _identity(partial)
            try:
                yield partial
                for file in partial.rglob("*"):
                    if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 == 0o600:
                        by_umask(file)  # safetensors' own
                _seal(partial, manifest or {}, hashes or {}, watchers)
                _publish(partial, target, replace=replace)
            finally:
                # After a swap this name may belong to the old output.
                if _identity(partial) == identity:
                    shutil.rmtree(partial)


def verify(
    directory: Path, watchers: Mapping[str, Watcher] | None = None, proved: Mapping[str, Any] | None = None
) -> list[str]:
    """What is wrong with an output, one line a problem; empty when every byte is as it was written.

    With `watchers` the files are read from the disk, and those that have a watcher are shown to it; `proved`: entries
    of files that were read from it already. Raises CheckpointError where there is no such directory.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    try:
        listed = manifests.read(directory)["files"]
        present = manifests.list_files(directory)
    except CheckpointError as error:
        return [str(error)]
    present.pop(manifests.FILE_NAME)
    problems = [f"{directory}: {name} is missing" for name in listed if name not in present]
    problems += [f"{directory}: {name} is not in the manifest" for name in present if name not in listed]
    for name in sorted(set(listed) & set(present)):
        try:
            if watchers is None:
                found = manifests.describe(present[name])
            elif proved is not None and name in proved:
                found = proved[name]
            else:
                found = read_back(present[name], watchers.get(name, unwatched))
        except OSError as error:
            problems.append(f"{directory}: {name} cannot be read: {error.strerror}")
            continue
        if found["size"] != listed[name].get("size"):
            problems.append(f"{directory}: {name} has {found['size']} bytes instead of {listed[name].get('size')}")
        elif found != listed[name]:
            problems.append(f"{directory}: {name} was changed: its SHA-256 differs")
    return [printable(problem) for problem in problems]


def _seal(
    partial: Path,
    extra: Mapping[str, Any],
    hashes: Mapping[str, str | None],
    watchers: Callable[[Path], Mapping[str, Watcher]],
) -> None:
    """Sync every file, write the manifest last, and read everything back from the disk."""
    files = manifests.list_files(partial)
    assert files, "an output without files"
    assert manifests.FILE_NAME not in files, "the manifest is written here"
    reserved = {"files", "versions", "digest"} & set(extra)
    assert not reserved, f"names of the manifest itself: {reserved}"
    unknown = [name for name in files if name in hashes and hashes[name] is None]
    entries = {name: _synced(path, hashes.get(name), later=name in unknown) for name, path in files.items()}
    proofs = watchers(partial) if unknown else {}
    proved = {name: read_back(files[name], proofs[name]) for name in unknown}
    content = {**extra, "files": entries | proved}
    path = partial / manifests.FILE_NAME
    path.write_bytes(manifests.render({**content, "versions": manifests.versions()}))
    sync(path)
    with path.open("rb") as file:
        forget(file.fileno())
    for folder, _, _ in os.walk(partial):
        sync(Path(folder))
    try:
        problems = verify(partial, proofs if unknown else watchers(partial), proved)
    except RunnerError:
        # A file that does not read back as it was written is the cause, where there is one.
        if not (problems := verify(partial, {})):
            raise
    if problems:
        raise RunnerError(f"what was read back is not what was written: {problems[0]}")


def _synced(path: Path, known: str | None, *, later: bool = False) -> dict[str, Any]:
    """A file's entry in the manifest; hashed while the disk takes it, where its hash is not known (or not `later`)."""
    if known is not None or later:
        sync(path)
        return {"size": path.stat().st_size, "sha256": known}
    with ThreadPoolExecutor(max_workers=1) as pool:
        synced = pool.submit(sync, path)
        entry = manifests.describe(path)
        synced.result()
    return entry


def _publish(partial: Path, target: Path, *, replace: bool) -> None:
    if replace and target.exists():
        # Under this name a sweep knows that it may find the old output here.
        replaced = hidden(target, REPLACED)
        partial.rename(replaced)
        old = swap(replaced, target)
        _confirm(target)
        retire(old, target)
    else:
        try:
            rename_new(partial, target)
        except FileExistsError as error:
            raise CheckpointError(f"{target}: appeared while it was being written: left as it is") from error
    _confirm(target)


def _confirm(target: Path) -> None:
    try:
        sync(target.parent)
    except OSError as error:
        raise RunnerError(
            f"{target}: complete and verified, but the disk did not confirm its name ({error.strerror}): "
            "verify it once more after a restart"
        ) from error


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Say what the disk said, in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunnerError(f"{target}: not written: {error}; nothing is left of it") from error
    except RuntimeError as error:
        # torch.save's writer reports a failing disk as a RuntimeError of its own.
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise RunnerError(f"{target}: not written: the disk failed or is full; nothing is left of it") from error


def _make_parents(folder: Path) -> None:
    if folder.exists():
        return
    _make_parents(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    return status.st_dev, status.st_ino
