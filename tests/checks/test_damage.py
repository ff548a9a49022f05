"""Damaged copies of every layout: exactly the check that should see it fails, and says why; all else passes or waits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from runner.checks.check import checks_for, run_checks
from runner.files import manifest
from runner.files.staging import staged
from runner.installation import config_directory
from tests.checks.benches import bench_of, write_npt_full
from tests.checks.damages import MODEL, TABLES, changed, tensors, values, without, without_a_layer
from tests.conftest import MIXED, npt_tensors, write_npt
from tests.gpt_files import random_state, script_file
from tests.lora_files import adapter_of, edit_json, hashes, older, write_adapter, write_moe

CASES = [(layout, *case) for layout, table in TABLES.items() for case in table]
# The tier that opens the checkpoint named as ckpt= without a model.
MINIMAL = tuple(OmegaConf.load(config_directory() / "tier" / "minimal.yaml").checks[1:])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    root, sealed = tmp_path_factory.mktemp("originals"), tmp_path_factory.mktemp("sealed")
    written = {
        "lora_moe": write_moe(root / "checkpoint-120", base, ranks=(3,) * 4, alphas=(6,) * 4),
        "npt_delta": write_npt(root / "checkpoint-100", npt_tensors(base, MIXED), base=base),
        "gpt": script_file(root / "state_step000300.pt", random_state("small")),
        "npt_full": write_npt_full(root / "full", base),
        "hf": Path(shutil.copytree(base, root / "model")),
        "peft": write_adapter(root / "adapter", base),
    }
    return {layout: path if path.is_file() else with_manifest(path, sealed) for layout, path in written.items()}


def with_manifest(path: Path, folder: Path) -> Path:
    """The same checkpoint as this runner leaves one: every damage then contradicts the manifest, too."""
    with staged(folder / path.name) as partial:
        shutil.copytree(path, partial, dirs_exist_ok=True)
    return folder / path.name


def rows_of(path: Path, scratch: Path, **options: object) -> dict[str, dict]:
    bench = bench_of(path, scratch, **options)
    return {row["name"]: row for row in run_checks(checks_for(bench, MINIMAL), bench)}


def copy(original: Path, folder: Path) -> Path:
    target = folder / original.name
    return Path(shutil.copytree(original, target) if original.is_dir() else shutil.copy(original, target))


@pytest.mark.parametrize("layout", list(TABLES))
def test_the_undamaged_pass(layout, originals, tmp_path):
    rows = rows_of(originals[layout], tmp_path / "scratch")
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rows, "pass")
    assert {"files", "keys", "shapes", "size", "loading", "finite", "hashes"} <= rows.keys()


def flat(path: Path) -> None:
    for index in range(3):
        for file in list(adapter_of(path, index).iterdir()):
            file.rename(adapter_of(path, index).parent / file.name)
        adapter_of(path, index).rmdir()


def as_bins(path: Path) -> None:
    for index in range(3):
        file = adapter_of(path, index) / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


def beside_a_base_config(path: Path) -> None:
    older(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))


def second_spelling(path: Path) -> None:
    held = torch.load(path / "npt_weights.pt", weights_only=True)
    spelled = {name.replace("layer_", "model.layers.").replace("_np.", ".np_component."): t for name, t in held.items()}
    (path / "npt_weights.pt").unlink()
    save_file(spelled, path / "npt_weights.safetensors")


@pytest.mark.parametrize(
    ("layout", "change"),
    [("lora_moe", older), ("lora_moe", flat), ("lora_moe", as_bins), ("lora_moe", beside_a_base_config),
     ("npt_delta", second_spelling)],
)  # fmt: skip
def test_other_spellings_of_a_layout_pass(layout, change, originals, tmp_path):
    path = copy(originals[layout], tmp_path)
    (path / manifest.FILE_NAME).unlink()
    change(path)
    rows = rows_of(path, tmp_path / "scratch")
    assert {name: row["details"] for name, row in rows.items() if row["status"] == "fail"} == {}
    assert rows["finite"]["status"] == "pass"


@pytest.mark.parametrize("dialect", ["small", "medium"])
def test_a_gpt_of_each_dialect_passes(dialect, tmp_path):
    path = script_file(tmp_path / "state_step000300.pt", random_state(dialect), prefix="")
    assert {row["status"] for row in rows_of(path, tmp_path / "scratch").values()} == {"pass"}


@pytest.mark.parametrize(
    ("layout", "what", "damage", "check", "message"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_exactly_the_right_check_fails(layout, what, damage, check, message, originals, tmp_path):
    path = copy(originals[layout], tmp_path)
    damage(path)
    before = hashes(tmp_path)
    rows = rows_of(path, tmp_path / "scratch")
    assert {name: row["details"] for name, row in rows.items() if row["status"] == "fail"}.keys() == {check}
    assert message in rows[check]["details"]
    assert "internal error" not in rows[check]["details"]
    assert not {row["status"] for row in rows.values()} - {"pass", "fail", "skipped"}
    assert {file: hash for file, hash in hashes(tmp_path).items() if file in before} == before


def lora_at_the_root(path: Path) -> None:
    shutil.copy(adapter_of(path, 0) / "adapter_config.json", path)


def merged_under_another_name(path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(4, 4)}, path / "merged.safetensors")


@pytest.mark.parametrize(
    ("layout", "change", "check", "message"),
    [
        ("lora_moe", lora_at_the_root, "layout", "adapter_config.json beside them: of no expert, and not read"),
        ("lora_moe", merged_under_another_name, "pollution", "merged.safetensors: weights that are no part"),
        ("npt_delta", lambda p: torch.save([1], p / "multi_layer_state.pt"), "files", "holds a list, not a dictionary"),
        ("npt_full", lambda path: (path / "training_info.pt").unlink(), "config", "taken as the default, 0.1"),
    ],
)
def test_what_is_not_wrong_but_odd_is_a_warning(layout, change, check, message, originals, tmp_path):
    path = copy(originals[layout], tmp_path)
    (path / manifest.FILE_NAME).unlink()
    change(path)
    rows = rows_of(path, tmp_path / "scratch")
    assert {name for name, row in rows.items() if row["status"] in ("warning", "fail")} == {check}
    assert message in rows[check]["details"]


def sharded_without_index(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("layout", "change", "check", "advice"),
    [
        ("npt_delta", tensors(without("layer_1_np.W_b_up_up")), "keys", "a layer that is not whole"),
        ("npt_delta", without_a_layer, "keys", "a layer that is not whole"),
        ("npt_delta", tensors(lambda held: {**held, "extra": torch.ones(2)}), "keys", None),
        ("npt_full", tensors(without("layers.1.adapter.B_ffn"), MODEL), "keys", "a layer that is not whole"),
        ("npt_full", tensors(lambda held: {**held, "extra": torch.ones(2)}, MODEL), "keys", None),
        ("npt_full", sharded_without_index, "keys", None),
        ("npt_delta", tensors(changed("layer_1_np.W_down_gate.0", torch.t)), "shapes", "one layer has one rank"),
        ("npt_full", values("config.json", vocab_size=77), "shapes", "config.json is that of another model"),
        ("npt_full", tensors(changed(HEAD, torch.t), MODEL), "shapes", "or these tensors were changed"),
        ("npt_full", tensors(changed(HEAD, torch.Tensor.int), MODEL), "shapes", "as floating-point numbers"),
    ],
)  # fmt: skip
def test_the_advice_is_of_what_is_wrong(layout, change, check, advice, originals, tmp_path):
    path = copy(originals[layout], tmp_path)
    change(path)
    row = rows_of(path, tmp_path / "scratch")[check]
    assert row["status"] == "fail"
    assert advice in row["recommendation"] if advice else "recommendation" not in row


def test_there_are_enough_of_them():
    assert len({(layout, what) for layout, what, *_ in CASES}) == len(CASES) >= 25


def with_skills(path: Path) -> Path:
    """Without a manifest, and a skill library, which has CRCs, beside adapters that have none."""
    (path / manifest.FILE_NAME).unlink()
    torch.save({0: torch.ones(32)}, path / "skill_library.pt")
    return path


def test_the_crcs_of_what_lies_beside_say_nothing_of_the_weights(originals, tmp_path):
    path = with_skills(copy(originals["lora_moe"], tmp_path))
    row = rows_of(path, tmp_path / "scratch")["hashes"]
    assert row["status"] == "skipped"
    assert "the weights are without CRCs; those of skill_library.pt hold" in row["details"]


def test_with_some_weights_without_crcs_nothing_is_proved(originals, tmp_path):
    path = with_skills(copy(originals["lora_moe"], tmp_path))
    torch.save(load_file(path / "router.safetensors"), path / "router.pt")
    (path / "router.safetensors").unlink()
    row = rows_of(path, tmp_path / "scratch")["hashes"]
    assert row["status"] == "skipped"
    assert "3 of 4 weights files are without CRCs; those of router.pt, skill_library.pt hold" in row["details"]


def save_without_crcs(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(True)


def test_weights_saved_without_crcs_prove_nothing(originals, tmp_path):
    path = copy(originals["npt_delta"], tmp_path)
    (path / manifest.FILE_NAME).unlink()
    save_without_crcs(path / "npt_weights.pt")
    row = rows_of(path, tmp_path / "scratch")["hashes"]
    assert row["status"] == "skipped"
    assert "the weights are without CRCs; those of training_state.pt hold" in row["details"]
    (path / "training_state.pt").unlink()
    assert rows_of(path, tmp_path / "again")["hashes"]["details"].endswith("and no CRCs")


def test_a_whole_number_adapter_is_named_once(originals, tmp_path):
    path = copy(originals["npt_full"], tmp_path)
    name = "model.layers.1.adapter.A_proj.weight"
    tensors(changed(name, torch.Tensor.int), MODEL)(path)
    row = rows_of(path, tmp_path / "scratch")["shapes"]
    assert (row["status"], row["details"]) == ("fail", f"{name} is int32, no weights")


def test_weights_that_all_have_crcs_pass(originals, tmp_path):
    path = copy(originals["npt_delta"], tmp_path)
    (path / manifest.FILE_NAME).unlink()
    row = rows_of(path, tmp_path / "scratch")["hashes"]
    assert row["status"] == "pass"
    assert "npt_weights.pt" in row["details"]


def test_a_damaged_file_beside_bare_weights_fails(originals, tmp_path):
    path = with_skills(copy(originals["lora_moe"], tmp_path))
    # Not read by this format, so that only its CRC tells.
    file = path / "optimizer.pt"
    torch.save({"moments": torch.ones(64)}, file)
    content = bytearray(file.read_bytes())
    content[content.index(torch.ones(64).numpy().tobytes())] ^= 1
    file.write_bytes(bytes(content))
    row = rows_of(path, tmp_path / "scratch")["hashes"]
    assert row["status"] == "fail"
    assert "CRC" in row["details"]


def test_without_readable_weights_there_is_no_size(originals, tmp_path):
    path = copy(originals["hf"], tmp_path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    save_file({"b": torch.ones(1)}, path / "model-00002-of-00002.safetensors")
    rows = rows_of(path, tmp_path / "scratch")
    assert (rows["size"]["status"], rows["size"]["details"]) == ("skipped", "no weights could be read")


def test_a_whole_file_of_another_architecture_is_not_to_be_copied_again(originals, tmp_path):
    path = copy(originals["gpt"], tmp_path)
    held = torch.load(path, weights_only=True)
    model = {name: t for name, t in held["model"].items() if "blocks.7." not in name}
    torch.save({**held, "model": model}, path)
    row = rows_of(path, tmp_path / "scratch")["blocks"]
    assert "has 7 blocks" in row["details"]
    assert "recommendation" not in row


@pytest.mark.parametrize(
    ("there", "advice"), [(False, "write it with the checkpoint's num_experts"), (True, "correct config.json")]
)
def test_a_config_is_written_where_there_is_none_and_corrected_where_there_is_one(there, advice, originals, tmp_path):
    path = copy(originals["lora_moe"], tmp_path)
    (path / "config.json").unlink()
    if there:
        (path / "config.json").write_text("{")
    row = rows_of(path, tmp_path / "scratch")["config"]
    assert (row["status"], row["recommendation"]) == ("fail", advice)


def test_whole_modules_of_other_shapes_are_counted(originals, tmp_path):
    """The keys are all there, though no shape of an adapter fits its config."""
    for layout, place in (("lora_moe", "peft_adapters/expert_0/expert_0"), ("peft", "")):
        whole = rows_of(originals[layout], tmp_path / f"{layout}-whole")["keys"]["details"]
        path = copy(originals[layout], tmp_path)
        edit_json(path / place / "adapter_config.json", r=7)
        rows = rows_of(path, tmp_path / layout)
        assert (rows["shapes"]["status"], rows["keys"]["status"], rows["keys"]["details"]) == ("fail", "pass", whole)


def test_a_file_is_named_once_where_it_is_no_json(originals, tmp_path):
    path = copy(originals["hf"], tmp_path)
    (path / "config.json").write_text("{")
    details = rows_of(path, tmp_path / "scratch")["config"]["details"]
    assert details.startswith(f"{path / 'config.json'} is not valid JSON (")


def test_shapes_count_the_tensors_and_name_the_sizes(originals, tmp_path):
    count = len(load_file(originals["hf"] / "model.safetensors"))
    details = rows_of(originals["hf"], tmp_path / "scratch")["shapes"]["details"]
    assert details.startswith(f"{count} tensors as config.json says: hidden size 32, vocabulary ")
