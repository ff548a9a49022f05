import subprocess
import sys

import pytest

from runner.errors import ConfigError
from runner.families.npt import EquivalenceSettings, TrainSettings
from runner.training.language_model import LanguageModelSettings
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"layers": ()}, "layers"),
        ({"layers": 3}, "layers"),
        ({"layers": (1, 1)}, "twice"),
        ({"layers": (-1,)}, "layers"),
        ({"layers": ("1",)}, "layers"),
        ({"layers": (True,)}, "layers"),
        ({"modulation": "quadruple"}, "triple"),
        ({"np_rank": 0}, "np_rank"),
        ({"num_ranks": 1.5}, "num_ranks"),
        ({"max_steps": 0}, "max_steps"),
        ({"save_every": "often"}, "save_every"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"gradient_clip_value": -1.0}, "gradient_clip_value"),
        ({"warmup_steps": 3000}, "warmup_steps"),
        ({"warmup_steps": None}, "warmup_steps"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"direct_weight": 0, "logit_weight": 0}, "nothing would be trained"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(wrong, named):
    with pytest.raises(ConfigError, match=named) as caught:
        EquivalenceSettings(**{"layers": (1,), **wrong})
    assert "\n" not in str(caught.value)


def test_a_list_from_a_config_becomes_layers():
    assert TrainSettings(layers=[2, 1], resume_from="run").layers == (2, 1)


@pytest.mark.parametrize(
    "wrong", [{"num_heads": 3}, {"hidden_size": 12, "num_heads": 4}, {"max_steps": 0}, {"packed_length": 2000}]
)
def test_a_language_model_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError):
        LanguageModelSettings(**wrong)


def test_settings_are_built_without_torch():
    """A wrong value is refused at once."""
    code = (
        "import sys; from runner.families.lora_moe import MoeTrainSettings; from runner.families.npt import TrainSettings; "
        "MoeTrainSettings(), TrainSettings(layers=[1]); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
