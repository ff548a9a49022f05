"""Scores and words of NPT models that are the base, near to it, and far from it."""

from dataclasses import replace

import pytest
import torch

from runner.checks.quality import grade, word_of
from tests.checks.benches import QUALITY, bench_of, rows_of, write_npt_full
from tests.conftest import npt_tensors, write_npt

LAYERS = {0: ("single", 3, 1), 2: ("dual", 4, 2)}
NAMES = ("model", "forward", "modes", "control", "fidelity", "layers", "progressive", "generation")


@pytest.mark.parametrize(
    ("mse", "cosine", "word"),
    [
        (0.0, 1.0, "PASS"),
        (0.0999, 0.951, "PASS"),
        (0.1, 0.99, "WARNING"),
        (0.05, 0.95, "WARNING"),
        (0.4999, 0.801, "WARNING"),
        (0.5, 0.99, "FAIL"),
        (0.01, 0.8, "FAIL"),
        (None, None, "FAIL"),
        (0.01, None, "FAIL"),
    ],
)
def test_words_of_one_comparison(mse, cosine, word):
    assert grade(mse, cosine) == word


@pytest.mark.parametrize(
    ("score", "word"), [(1, "PASS"), (0.8, "WARNING"), (0.5, "WARNING"), (0.49, "FAIL"), (0, "FAIL")]
)
def test_words_of_several(score, word):
    assert word_of(score) == word


def quality(path, tmp_path, **values):
    bench = bench_of(path, tmp_path / "scratch", **values)
    bench.config.tier = replace(bench.config.tier, new_tokens=6)
    rows = rows_of(bench, NAMES)
    assert {name for name, row in rows.items() if not row["integrity"]} == QUALITY
    return rows


@pytest.fixture
def like_its_base(tmp_path, base):
    """NPT layers without modulation still leave the attention out of the residual: the base must not have any."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(tmp_path / "quiet")
    for file in base.glob("*token*"):
        (tmp_path / "quiet" / file.name).write_bytes(file.read_bytes())
    tensors = {name: t * ("W_b_up" not in name) for name, t in npt_tensors(base, LAYERS).items()}
    return write_npt(tmp_path / "zero", tensors, base=tmp_path / "quiet")


def test_a_model_that_is_its_base_scores_one(like_its_base, tmp_path):
    rows = quality(like_its_base, tmp_path)
    assert {name: (rows[name]["status"], rows[name]["score"]) for name in QUALITY} == dict.fromkeys(
        QUALITY, ("pass", 1)
    )
    assert rows["fidelity"]["details"].startswith("PASS: mse 0, cosine 1.0000 over 3 prompts: excellent")
    assert rows["layers"]["details"].startswith("PASS: 2 PASS of 2 layers alone")
    assert len(rows["generation"]["data"]["generation"]) == 9
    assert [row["temperature"] for row in rows["generation"]["data"]["generation"][:3]] == [0.1, 0.7, 1.0]


def test_a_random_model_warns_and_never_fails(tmp_path, base):
    path = write_npt(tmp_path / "npt", npt_tensors(base, LAYERS, scale=0.5), base=base)
    rows = quality(path, tmp_path)
    assert {rows[name]["status"] for name in QUALITY} == {"warning"}
    assert rows["fidelity"]["score"] < 0.6
    assert rows["fidelity"]["details"].startswith("FAIL: mse ")
    assert rows["fidelity"]["recommendation"]
    mses = [row["mse"] for row in rows["layers"]["data"]["layers"]]
    assert f"mse {max(mses):.4g}" in rows["layers"]["details"]
    progressive = rows["progressive"]["data"]["progressive"]
    assert [row["layers"] for row in progressive] == [[0], [0, 2]]
    assert progressive[0]["mse"] == mses[0]


def test_the_figures_are_those_of_diagnose(tmp_path, base):
    import runner

    path = write_npt(tmp_path / "npt", npt_tensors(base, LAYERS), base=base)
    rows, diagnosed = quality(path, tmp_path), runner.diagnose(path, tier="full")
    assert rows["fidelity"]["data"]["mse"] == diagnosed["metrics"]["mse"]
    assert rows["fidelity"]["data"]["cosine"] == diagnosed["metrics"]["cosine"]
    assert [row["mse"] for row in rows["layers"]["data"]["layers"]] == [row["mse"] for row in diagnosed["layers"]]
    assert [row["mse"] for row in rows["progressive"]["data"]["progressive"]] == [
        row["mse"] for row in diagnosed["progressive"]
    ]


def test_without_a_base_there_is_nothing_to_compare_with(tmp_path, base):
    path = write_npt_full(tmp_path / "full", base, base_name="nowhere/to-be-found")
    rows = quality(path, tmp_path)
    assert {rows[name]["status"] for name in QUALITY} == {"skipped"}
    assert "its base model 'nowhere/to-be-found' lies neither beside it" in rows["fidelity"]["details"]
    assert rows["control"]["status"] == "pass"
