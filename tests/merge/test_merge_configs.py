"""Every spec in conf/merge composes and builds."""

import pytest
from hydra import compose, initialize_config_dir

from runner.installation import config_directory
from runner.merge.spec import RULES, MergeSpec
from runner.run import _typed, setup

FILES = sorted((config_directory() / "merge").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_spec_composes_and_builds(file):
    setup()
    with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
        spec = _typed(compose("config", overrides=["task=merge", f"merge={file.stem}"])).merge
    assert isinstance(spec, MergeSpec)
    assert spec.name == file.stem


def test_every_rule_has_a_spec():
    assert set(RULES) <= {file.stem for file in FILES}
