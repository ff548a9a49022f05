"""Files read back from the disk: their hash, their content in order, whatever their size."""

import hashlib
from pathlib import Path

import pytest

from runner.files import staging as readback
from runner.files.staging import STEP, read_back


@pytest.mark.parametrize("size", [0, 1, STEP - 1, STEP, STEP + 1, 3 * STEP + 5])
def test_the_content_comes_in_order_and_whole(size: int, tmp_path: Path) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    path = tmp_path / "file"
    path.write_bytes(content)
    steps: list[tuple[int, bytes]] = []
    found = read_back(path, lambda offset, step: steps.append((offset, bytes(step))))
    assert found == {"size": size, "sha256": hashlib.sha256(content).hexdigest()}
    assert steps[-1] == (size, b"")
    assert b"".join(step for _, step in steps) == content
    assert [offset for offset, _ in steps] == [sum(len(step) for _, step in steps[:i]) for i in range(len(steps))]


def test_what_a_watcher_raises_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")

    def refuse(offset: int, content: memoryview) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        read_back(path, refuse)


def test_a_system_without_fadvise_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(readback.os, "posix_fadvise")
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert read_back(path)["size"] == 7
