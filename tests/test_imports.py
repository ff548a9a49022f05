"""The house's rule: imports run one way, downwards, and nothing heavy is imported before a task runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Lower imports nothing above it; modules of one rank may import each other unless FORBIDDEN says otherwise.
RANKS = {
    "errors": 0,
    "confdir": 1, "imports": 1,
    "checkpoints": 1, "models": 1, "measures": 1, "data": 1,
    "results": 2, "plan": 2, "config": 2, "versions": 2,
    "bases": 2, "placement": 2, "hub": 2, "forward": 2, "loading": 2, "contents": 2, "kept": 2, "shelves": 2, "reference": 2, "subject": 2, "tokens": 2, "training": 2,
    "checks": 3, "comparison": 3, "merging": 3, "reports": 3, "tracking": 3,
    "tasks": 4,
    "overrides": 5, "run": 5, "sweep": 5, "sweeping": 5, "help": 5,
    "cli": 6,
    "__main__": 7,
}  # fmt: skip
FORBIDDEN = {("checkpoints", "models"), ("models", "checkpoints")}
HYDRA = {"cli", "run", "sweep", "sweeping", "config"}


def imports(file: Path) -> set[str]:
    """The full names of the modules that `file` imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(module: str) -> str:
    """`runner.families.hf.checkpoint` → `checkpoints`."""
    return module.split(".")[1]


FILES = sorted((ROOT / "runner").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_downwards(file):
    relative = file.relative_to(ROOT).with_suffix("").parts
    if relative == ("runner", "__init__"):
        return
    own = relative[1]
    for name in imports(file):
        if not name.startswith("runner.") or part(name) not in RANKS:
            continue
        other = part(name)
        assert RANKS[other] <= RANKS[own], f"{file.name} imports {name}, which stands above it"
        assert (own, other) not in FORBIDDEN, f"{own} must not import {other}: loading joins them"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_only_the_outermost_modules_know_hydra(file):
    own = file.relative_to(ROOT / "runner").with_suffix("").parts[0]
    if own not in HYDRA:
        assert not {name.split(".")[0] for name in imports(file)} & {"hydra", "omegaconf"}


def test_every_part_has_a_rank():
    parts = {file.relative_to(ROOT / "runner").with_suffix("").parts[0] for file in FILES} - {"__init__"}
    assert parts <= set(RANKS), f"give {parts - set(RANKS)} a rank"


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]])
def test_help_and_config_import_nothing_heavy(words, tmp_path):
    code = (
        "import sys; from runner.cli import run; code = run(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'wandb', 'peft') if m in sys.modules], file=sys.stderr); "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert not list(tmp_path.iterdir())
