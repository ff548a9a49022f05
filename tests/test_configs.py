"""Every YAML is a test case: it composes, its components build, and its keys are documented ones."""

from dataclasses import fields

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from runner.config import FIXED_KEYS, PATH_KEYS, TASKS, Tier, list_keys, unknown_key
from runner.data.text import Data
from runner.errors import ConfigError, did_you_mean
from runner.families.lora_moe import LoraMoe
from runner.installation import config_directory
from runner.run import _components, _typed, setup
from runner.sweeps.launchers import check_values

CONF = config_directory()
GROUPS = ("family", "format", "tier", "data", "tracker", "experiment")
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
MANDATORY = {("data", "text"): [f"data.path={CONF / 'config.yaml'}"], ("data", "shards"): ["data.path=x.bin"]} | {
    ("experiment", "npt_multi_layer"): [f"data.path={CONF / 'config.yaml'}"]
}


NEEDED = {"convert": ["convert.output=out"]}
# The task that a choice is made for, where it is not the one by default.
TASK_OF = {("tier", "minimal"): ["task=test"]}


@pytest.fixture(scope="module", autouse=True)
def composing():
    setup()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        yield


@pytest.mark.parametrize("task", sorted(TASKS))
def test_each_task_composes_into_its_typed_root(task):
    cfg = compose("config", overrides=[f"task={task}", *NEEDED.get(task, [])])
    assert OmegaConf.get_type(cfg) is TASKS[task]
    assert {str(key) for key in cfg} == {field.name for field in fields(TASKS[task])}
    typed = _typed(cfg)
    assert isinstance(typed, TASKS[task])


@pytest.mark.parametrize(("group", "words"), [("experiment", []), ("merge", ["task=merge"])])
def test_no_two_presets_are_one(group, words):
    composed = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        cfg = OmegaConf.to_container(compose("config", overrides=[*words, f"{group}={file.stem}"]))
        if group == "merge":
            del cfg["merge"]["name"]
        assert composed.setdefault(str(cfg), file.stem) == file.stem


def test_every_task_has_a_page_and_a_file():
    assert {file.stem for file in (CONF / "task").glob("*.yaml")} == set(TASKS)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_each_choice_composes_and_builds(group, choice):
    cfg = compose(
        "config",
        overrides=[f"{group}={choice}", *TASK_OF.get((group, choice), []), *MANDATORY.get((group, choice), [])],
    )
    _typed(cfg)
    if group != "experiment":
        assert _components(cfg, [group])[group] is not None
        if group != "tracker":
            assert cfg[group].name == choice


def test_path_keys_exist():
    known = {
        f"{name}.{child}" if child else str(name)
        for task in TASKS
        for name, node in compose("config", overrides=[f"task={task}"]).items()
        for child in ([None, *node] if OmegaConf.is_dict(node) else [None])
    }
    assert {key for key in PATH_KEYS if not key.startswith("hydra.")} <= known


def test_unknown_keys_are_answered():
    assert "did you mean 'accuracy'?" in str(unknown_key("acuracy", "diagnose"))
    assert "accuracy belongs to task=diagnose, not to task=train" in str(unknown_key("accuracy", "train"))
    assert did_you_mean("xyzzy", ["a", "b"]) == "; known are a, b"


@pytest.mark.parametrize("override", ["+typo=1", "+tier.typo=1", "+data.typo=1", "data.prompts=[]", "data.prompts=[3]"])
def test_added_keys_and_wrong_values_are_refused(override):
    with pytest.raises(ConfigError):
        _typed(compose("config", overrides=[override]))


# A value of each key that is a list, and the words that choose the file that has it.
SINGLE = {
    "data.prompts": ("hello", ["data=prompts"]),
    "tier.measures": ("logits", ["tier=full"]),
    "tier.checks": ("files", ["tier=full"]),
    "tier.temperatures": (0.9, ["tier=full"]),
    "merge.sources": ("a/checkpoint-1", ["task=merge"]),
    "merge.layers": (3, ["task=merge"]),
    "merge.drop": (3, ["task=merge"]),
    "generate.stop": ("end", ["task=generate"]),
    "generate.layers": (1, ["task=generate"]),
    "data.text": ("text", ["task=finetune"]),
    "family.layers": (1, ["task=transfer"]),
    "train.layers": (2, ["task=train"]),
    "train.target_modules": ("q_proj", ["task=train", "family=lora_moe"]),
}


# Lists of as many values as the training needs: one is none of them.
OF_A_LENGTH = {"data.labels", "train.betas", "experiment.train.betas", "train.layer_weights"}


def lists_in(node, way: str) -> set[str]:
    """The keys below `node` whose value is a list."""
    if not isinstance(node, dict):
        return {way} if isinstance(node, list) else set()
    return {found for key, value in node.items() if key != "defaults" for found in lists_in(value, f"{way}.{key}")}


def test_every_key_of_the_configs_that_is_a_list_is_tried_below():
    found = {
        key
        for group in (path for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "task"))
        for file in group.glob("*.yaml")
        for key in lists_in(yaml.safe_load(file.read_text()) or {}, group.name)
    }
    typed = {
        f"{key}.{name}"
        for task in TASKS
        for key, node in compose("config", overrides=[f"task={task}"]).items()
        if OmegaConf.is_dict(node) and key not in FIXED_KEYS and "_target_" in node
        for name in list_keys(get_object(node["_target_"]))
    }
    assert found | typed | {"train.target_modules"} == set(SINGLE) | OF_A_LENGTH


@pytest.mark.parametrize("key", SINGLE)
def test_a_single_value_is_a_list_of_one(key):
    value, words = SINGLE[key]
    group, _, name = key.partition(".")
    for spelled in (value, [value]):
        typed = _typed(compose("config", overrides=[*words, f"{key}={spelled}"]))
        (found,) = getattr(getattr(typed, group), name)
        assert getattr(found, "path", found) == value


def test_one_command_for_a_launcher_is_a_list_of_one():
    launcher = OmegaConf.load(CONF / "hydra" / "launcher" / "submitit_slurm.yaml")
    keys = {key for key, value in OmegaConf.to_container(launcher).items() if isinstance(value, list)}
    for key in keys:
        launcher[key] = "module load cuda"
    check_values(launcher)
    assert {key: list(launcher[key]) for key in keys} == {"setup": ["module load cuda"]}


@pytest.mark.parametrize(
    ("node", "group", "in_each"), [(Tier, "tier", True), (Data, "data", False), (LoraMoe, "family", False)]
)
def test_what_the_code_reads_can_be_said(node, group, in_each):
    """A field of no YAML is unknown on the command line."""
    given = [
        set(
            compose(
                "config",
                overrides=[f"{group}={choice}", *MANDATORY.get((group, choice), []), *TASK_OF.get((group, choice), [])],
            )[group]
        )
        for g, choice in CHOICES
        if g == group
    ]
    known = set.intersection(*given) if in_each else set.union(*given)
    assert {field.name for field in fields(node)} <= known


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tier.sequence_length=1", "tier.sequence_length=1: give a whole number, at least 2"),
        ("tier.sequence_length=long", "tier.sequence_length=long: give a whole number, at least 2"),
        ("tier.new_tokens=0", "tier.new_tokens=0: give a whole number, at least 1"),
        ("tier.new_tokens=1.5", "tier.new_tokens=1.5: give a whole number, at least 1"),
        ("tier.temperatures=[hot]", "tier.temperatures=['hot']: give a list of numbers above 0"),
        ("tier.temperatures=[1e999]", "tier.temperatures=[inf]: give a list of numbers above 0"),
        ("tier.temperatures=[0]", "tier.temperatures=[0]: give a list of numbers above 0"),
        ("data.max_tokens=1", "data.max_tokens=1: give a whole number, at least 2"),
        ("data.max_tokens=all", "data.max_tokens=all: give a whole number, at least 2"),
    ],
)
def test_sizes_that_are_none(override, says):
    with pytest.raises(ConfigError) as caught:
        _typed(compose("config", overrides=["data=shards", "data.path=x.bin", override]))
    assert says in str(caught.value)


def test_tier_names_only_known_measures():
    with pytest.raises(ConfigError, match="did you mean 'logits'"):
        Tier(name="mine", measures=("logit",))
