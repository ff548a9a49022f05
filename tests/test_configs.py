"""Every YAML is a test case: it composes, its components build, and its keys are documented ones."""

from dataclasses import fields

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from runner.config import PATH_KEYS, TASKS, Tier, unknown_key
from runner.errors import ConfigError, did_you_mean
from runner.installation import config_directory
from runner.run import _components, _typed, setup

CONF = config_directory()
GROUPS = ("family", "format", "tier", "data", "tracker", "experiment")
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
MANDATORY = {("data", "text"): [f"data.path={CONF / 'config.yaml'}"], ("data", "shards"): ["data.path=x.bin"]}


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


def test_tier_names_only_known_measures():
    with pytest.raises(ConfigError, match="did you mean 'logits'"):
        Tier(name="mine", measures=("logit",))
