"""How many modules of runner one diagnose and one merge of golden NPT checkpoints pass through.

    python tests/benchmarks/modules_passed.py [--golden DIR] [--list] [--root CHECKOUT]

A module is passed through where any code of it runs, that of its import too. A crossing is a pair of modules of which
the one's code calls, directly or through libraries, that of the other.
Goals: at most 60 modules for the diagnose, 65 for the merge.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[2]
GOALS = {"diagnose": 60, "merge": 65}


class Passage:
    """A profile function that remembers modules and crossings."""

    def __init__(self, root: Path) -> None:
        self._root = str(root / "runner")
        self._names: dict[CodeType, str] = {}
        self.modules: set[str] = set()
        self.crossings: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Note the module of what is called, and who called it."""
        if event != "call" or not (name := self._module(frame.f_code)):
            return
        self.modules.add(name)
        caller = frame.f_back
        while caller is not None and not (other := self._module(caller.f_code)):
            caller = caller.f_back
        if caller is not None and other != name:
            self.crossings.add((other, name))

    def _module(self, code: CodeType) -> str:
        """The module of a piece of code; empty outside of runner."""
        if code not in self._names:
            inside = code.co_filename.startswith(self._root)
            self._names[code] = (
                Path(code.co_filename).relative_to(Path(self._root).parent).with_suffix("").as_posix() if inside else ""
            )
        return self._names[code]


def passed(words: list[str], root: Path) -> Passage:
    """What one command line passes through; run in a process of its own, where nothing is loaded yet."""
    from runner import cli

    passage = Passage(root)
    threading.setprofile(passage)
    sys.setprofile(passage)
    try:
        code = cli.run(words)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if code:
        raise SystemExit(f"{' '.join(words)}: exit {code}")
    return passage


def main() -> None:
    """Print both figures for both tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--golden", type=Path, default=Path(os.environ.get("RUNNER_GOLDEN", ROOT.parent / "shared/golden"))
    )
    parser.add_argument("--list", action="store_true", help="name the modules")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout that is measured")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    npt = arguments.golden.resolve() / "npt"
    sources = ",".join(str(npt / name) for name in ("triple_rank8_layer1", "triple_rank8_layer3"))
    lines = {
        "diagnose": ["task=diagnose", f"ckpt={npt / 'triple_rank8_layer1'}"],
        "merge": ["task=merge", f"merge.sources=[{sources}]", "merge.output=merged"],
    }
    if arguments.of:
        sys.path.insert(0, str(arguments.root))
        found = passed([*lines[arguments.of], "tracker=none"], arguments.root.resolve())
        goal = GOALS[arguments.of]
        print(
            f"{arguments.of:9} {len(found.modules):4} modules (goal: at most {goal}) {len(found.crossings):5} crossings"
        )
        if arguments.list:
            print("\n".join(f"    {name}" for name in sorted(found.modules)))
        return
    for task in lines:
        with tempfile.TemporaryDirectory() as directory:
            words = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--of", task]
            done = subprocess.run(words, cwd=directory, stdout=subprocess.PIPE, text=True, check=True)
        text = done.stdout.splitlines()
        start = next(number for number, line in enumerate(text) if line.startswith(f"{task} ") and "modules" in line)
        print("\n".join(text[start:]))


if __name__ == "__main__":
    main()
