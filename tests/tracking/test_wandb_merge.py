"""What a merge leaves in W&B, read back with wandb's own reader."""

import json
from pathlib import Path

import pytest
from wandb_reader import read_runs

from runner import cli
from tests.conftest import npt_tensors, write_base, write_npt


def test_a_merge_with_its_joint_figures(a_machine_of_its_own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = write_base(Path("base").absolute())
    for name, layer, step in (("a", 0, 300), ("b", 2, 100)):
        write_npt(Path(name), npt_tensors(base, {layer: ("dual", 2, 2)}, seed=layer + 1), base=base, step=step)
    words = ["merge.sources=[a,b]", "merge.output=out", "merge.verify=functional", "tracker=wandb", "tracker.wait=true"]
    assert cli.run(["task=merge", *words]) == 0, capfd.readouterr().err
    (file,) = Path("outputs").rglob("result.json")
    result = json.loads(file.read_text())
    (run,) = read_runs(Path("outputs/wandb"))
    assert run.header["job_type"] == "merge"
    wanted = {
        "merge/layers": [0, 2],
        "merge/keys": 24,
        "merge/parameters": result["parameters"],
        "merge/sources": ["a", "b"],
        "eval/mse": result["metrics"]["mse"],
        "eval/cosine": result["metrics"]["cosine"],
        "verdict": result["verdict"]["status"],
    }
    assert {name: run.summary[name] for name in wanted} == wanted
    assert run.rows("checkpoint/step", "eval/mse") == [(300, result["metrics"]["mse"])]
    layers = run.table("tables/per_layer")
    column = layers["columns"].index("layer")
    assert [row[column] for row in layers["data"]] == [0, 2]
