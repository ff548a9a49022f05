"""The house's rule: imports run one way, downwards, and nothing heavy is imported before a task runs."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Which folders and modules each may import; the arrows run one way, engines never import a family.
GROUND = {"errors", "installation", "progress"}
KNOWLEDGE = GROUND | {"config", "results", "files", "metrics", "data", "checkpoints"}
ENGINES = {"evaluation", "generation", "checks", "merge", "training", "finetuning"}
PAGES = {"comparison", "reports", "tracking"}
MAY_IMPORT = {
    "errors": set(),
    "installation": {"errors"},
    "progress": set(),
    "config": GROUND,
    "results": GROUND,
    "files": GROUND,
    "metrics": GROUND,
    "data": GROUND | {"files"},
    "checkpoints": GROUND | {"files", "config"},
    "evaluation": KNOWLEDGE,
    "generation": KNOWLEDGE | {"evaluation"},
    "checks": KNOWLEDGE | {"evaluation"},
    "merge": KNOWLEDGE | {"evaluation"},
    "training": KNOWLEDGE | {"evaluation"},
    "finetuning": KNOWLEDGE | {"evaluation", "training"},
    "families": KNOWLEDGE | ENGINES,
    "comparison": KNOWLEDGE,
    "reports": KNOWLEDGE | {"comparison"},
    "tracking": KNOWLEDGE | {"comparison"},
    "tasks": KNOWLEDGE | ENGINES | PAGES | {"families", "transfer"},
    "overrides": KNOWLEDGE,
    "expand": KNOWLEDGE | {"overrides", "sweeps"},
    "run": KNOWLEDGE | PAGES | {"tasks", "overrides"},
    "sweeps": KNOWLEDGE | PAGES | {"tasks", "overrides", "run", "checks"},
    "cli": KNOWLEDGE | PAGES | {"tasks", "overrides", "run", "sweeps", "expand"},
    "__main__": {"cli"},
    "transfer": KNOWLEDGE | ENGINES | {"families"},
    "__init__": {"run", "transfer", "evaluation", "checkpoints", "families", "tasks"},
}
HYDRA = {"cli", "run", "sweeps", "config"}


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


def test_what_is_imported_is_declared_and_pinned():
    """By distribution: pyproject.toml says what is needed, constraints.txt which one of each the tests pass with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {normal(name) for name in project["dependencies"]}
    extras = {
        normal(name)
        for group in ("panels", "launchers", "data", "ray")
        for name in project["optional-dependencies"][group]
    }
    pinned = {normal(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    owners = packages_distributions()
    tops = {name.partition(".")[0] for file in FILES for name in imports(file)} - sys.stdlib_module_names - {"runner"}
    found = {top: {normal(owner) for owner in owners.get(top, ())} for top in tops}
    assert {top for top, names in found.items() if not names & (needed | extras)} == set()
    assert {top for top, names in found.items() if not names & pinned} == set()
    assert needed - pinned == set()
    unused = needed - set().union(*found.values())
    assert unused == set(), "declared and not imported"


def normal(requirement: str) -> str:
    """`huggingface_hub>=1` → `huggingface-hub`: the names of distributions as they are compared."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file):
    own = file.relative_to(ROOT).with_suffix("").parts[1]
    for name in imports(file):
        if name.startswith("runner.") and part(name) in MAY_IMPORT and part(name) != own and own != "__init__":
            assert part(name) in MAY_IMPORT[own], f"{own} must not import {name}"


def test_no_modules_import_each_other_in_a_circle():
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    arrows = {name: imports(file) & set(modules) for name, file in modules.items()}
    seen: dict[str, int] = {}
    path: list[str] = []

    def visit(name):
        if seen.get(name) == 1:
            pytest.fail(" → ".join([*path[path.index(name) :], name]))
        if name not in seen:
            seen[name] = 1
            path.append(name)
            for other in sorted(arrows[name]):
                visit(other)
            path.pop()
            seen[name] = 2

    for name in sorted(modules):
        visit(name)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_only_the_outermost_modules_know_hydra(file):
    own = file.relative_to(ROOT / "runner").with_suffix("").parts[0]
    if own not in HYDRA:
        assert not {name.split(".")[0] for name in imports(file)} & {"hydra", "omegaconf"}


def test_every_folder_has_its_place():
    parts = {file.relative_to(ROOT / "runner").with_suffix("").parts[0] for file in FILES}
    assert parts <= set(MAY_IMPORT), f"say what {parts - set(MAY_IMPORT)} may import"


LIBRARIES = ("torch", "transformers", "wandb", "peft", "numpy", "rich")


@pytest.mark.parametrize(("words", "absent", "left"), [
    (["--help"], (*LIBRARIES, "hydra", "omegaconf", "yaml"), 0),
    (["--cfg", "job"], LIBRARIES, 0),
    (["ckp=demo"], (*LIBRARIES, "hydra", "omegaconf"), 2),
    (["tier.new_token=3"], (*LIBRARIES, "hydra", "omegaconf"), 2),
])  # fmt: skip
def test_help_config_and_mistakes_import_nothing_heavy(words, absent, left, tmp_path):
    code = (
        "import sys; from runner.cli import run; code = run(sys.argv[1:]); "
        f"print([m for m in {absent} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (left, "[]")
    assert not list(tmp_path.iterdir())


def test_a_diagnosis_of_a_llama_imports_no_transformers(tmp_path, base):
    """NPT layers over a Llama (the demonstration), and a Llama by itself: at the end of both nothing of it is there."""
    code = (
        "import sys; from runner.cli import run; codes = run(['tracker=none']), run(['tracker=none', *sys.argv[1:]]); "
        "heavy = ('transformers', 'torch._dynamo', 'sympy', 'scipy', 'matplotlib', 'wandb', 'peft'); "
        "print(codes, [m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"ckpt={base}", f"reference={base}"], cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (0, "(0, 0) []"), done.stderr


@pytest.mark.parametrize(("words", "absent"), [
    (["ckpt=nowhere/checkpoint-1"], LIBRARIES),
    (["task=verify", "ckpt=nowhere"], LIBRARIES),
    (["task=diff", "ckpt=nowhere", "reference=demo"], LIBRARIES),
])  # fmt: skip
def test_a_path_that_is_not_there_costs_no_torch(words, absent, tmp_path):
    code = (
        "import sys; from runner.cli import run; code = run(sys.argv[1:]); "
        f"print([m for m in {absent} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "tracker=none"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "[]")
    assert "no such file or directory" in done.stderr
