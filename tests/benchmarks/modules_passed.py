"""Through how many modules of `runner` one diagnosis and one merge pass, and how often they cross from one to another.

    python tests/benchmarks/modules_passed.py [--list]

Both run in this process, each in a fork of its own, on tiny checkpoints that are written first. A module counts where
a function of it is called, or a class of it is made when it is imported.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PACKAGE = f"{ROOT / 'runner'}{os.sep}"


def passed(words: list[str]) -> tuple[set[str], int]:
    """The modules that one command line passes through, and the number of calls from one into another."""
    from runner import cli

    modules: set[str] = set()
    crossings = 0

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal crossings
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(PACKAGE) or frame.f_code.co_name == "<module>":
            return
        modules.add(file.removeprefix(PACKAGE))
        caller = frame.f_back.f_code.co_filename if frame.f_back else ""
        crossings += caller.startswith(PACKAGE) and caller != file

    sys.setprofile(watch)
    try:
        code = cli.run([*words, "tracker=none"])
    finally:
        sys.setprofile(None)
    if code:
        raise SystemExit(f"{' '.join(words)}: exit {code}")
    return modules, crossings


def report(name: str, words: list[str], *, with_names: bool) -> None:
    """Print the figures of one command line, which runs in a fork: nothing is imported or remembered before it."""
    child = os.fork()
    if child == 0:
        shown = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        modules, crossings = passed(words)
        os.dup2(shown, 1)
        lines = [f"{name}: {len(modules)} modules, {crossings} crossings", *(sorted(modules) if with_names else ())]
        os.write(1, ("\n".join(lines) + "\n").encode())
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)


def prepare(directory: Path) -> None:
    """A base and two checkpoints of other layers, written by a process of its own."""
    from tests.conftest import npt_tensors, write_base, write_npt

    base = write_base(directory / "base")
    for layer in (0, 1):
        write_npt(directory / f"layer{layer}", npt_tensors(base, {layer: ("dual", 2, 2)}), base=base)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the modules")
    with_names = parser.parse_args().list
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        if os.fork() == 0:
            prepare(Path(name))
            os._exit(0)
        os.wait()
        report("diagnose", ["ckpt=layer0"], with_names=with_names)
        words = ["task=merge", "merge.sources=[layer0,layer1]"]
        report("merge", [*words, "merge.output=merged"], with_names=with_names)
        words += ["merge.output=run", "merge.verify=functional"]
        report("merge with merge.verify=functional", words, with_names=with_names)


if __name__ == "__main__":
    main()
