"""The parts of the experts' training: settings, batches, skills, the first model."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from runner.data.world import generate
from runner.errors import ConfigError
from runner.families.lora_moe import MoeSettings
from runner.families.lora_moe.skills import add_skills, embedding, world_skills
from runner.families.lora_moe.training import new_moe
from runner.training.batches import cut, endless_batches, epoch_batches

WRONG = [
    ({"experts": 0}, "train.experts=0: must be a whole number, at least 1"),
    ({"experts": "many"}, "train.experts=many: must be a whole number, at least 1"),
    ({"experts": True}, "train.experts=True"),
    ({"lora_r": 1.5}, "train.lora_r=1.5"),
    ({"lora_alpha": 0}, "train.lora_alpha=0: must be a number above 0"),
    ({"lora_dropout": 1.0}, "train.lora_dropout=1.0: must be below 1"),
    ({"target_modules": []}, "give a list of modules"),
    ({"target_modules": "q_proj"}, "give a list of modules"),
    ({"temperature": float("nan")}, "train.temperature=nan"),
    ({"balance_weight": -1}, "train.balance_weight=-1: must be a number of at least 0"),
    ({"novelty": "mean"}, "choose max or median"),
    ({"novelty_threshold": 1.5}, "a cosine is at most 1"),
    ({"sequence_length": 1}, "train.sequence_length=1: must be a whole number, at least 2"),
    ({"warmup_steps": 200}, "train.warmup_steps=200 must be below train.max_steps=200"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_settings_that_cannot_be_trained(values, message):
    with pytest.raises(ConfigError) as raised:
        MoeSettings(**values)
    assert message in str(raised.value)


def test_documents_are_cut_into_rows_that_predict_something():
    assert cut([[1, 2, 3, 4, 5], [6], [7, 8]], 2) == [[1, 2], [3, 4], [7, 8]]


def test_an_epoch_has_every_row_once_in_batches_of_one_length():
    rows = [[i] * length for i, length in enumerate([3, 4, 3, 3, 4, 3, 3, 9])]
    orders = []
    for epoch in (0, 1, 0):
        orders.append(epoch_batches(rows, 2, 1, epoch))
        assert sorted(number for batch in orders[-1] for number in batch) == list(range(8))
        assert all(len({len(rows[number]) for number in batch}) == 1 for batch in orders[-1])
        assert len(orders[-1]) == 4
    assert orders[0] == orders[2] != orders[1]
    assert epoch_batches(rows, 2, 2, 0) != orders[0]
    expected = [[rows[number] for number in batch] for batch in orders[0] + orders[1]]
    for start in (0, 3, 4):
        found = itertools.islice(endless_batches(rows, 2, 1, start), 8 - start)
        assert [batch.tolist() for batch in found] == expected[start:]


def test_the_world_is_divided_by_subject():
    sentences = generate().train
    skills = world_skills(sentences)
    assert sorted(sentence for own in skills.values() for sentence in own) == sorted(sentences)
    assert len(skills) == 13
    assert "The capital of France is Paris." in skills["countries"]
    assert "2 + 2 equals 4." in skills["numbers and dates"]


def test_an_embedding_is_the_mean_of_all_tokens_last_hidden_states(base):
    texts = [[1, 2, 3, 4], [5, 6]]
    states = [base(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0] for text in texts]
    torch.testing.assert_close(embedding(base, texts), torch.cat(states).mean(0))


def test_novelty_decides_which_skills_are_added(base):
    texts = {"a": [[1, 2, 3, 4]], "b": [[30, 31, 32, 33]], "a again": [[1, 2, 3, 4]]}
    library, found = add_skills(base, texts, {}, threshold=0.999, reduction="max")
    assert [skill.is_new for skill in found] == [True, True, False]
    assert (list(library), found[0].similarity) == (["a", "b"], None)
    assert found[2].similarity == pytest.approx(1)
    # The median of 1 and the cosine of a to b lies below the threshold; a name that is there already is kept.
    _, by_median = add_skills(base, {"c": [[1, 2, 3, 4]], "a": [[9, 9]]}, library, threshold=0.999, reduction="median")
    assert [skill.is_new for skill in by_median] == [True, False]
    _, none_new = add_skills(base, {"c": [[30, 7, 8]]}, library, threshold=0.0, reduction="max")
    assert found[1].similarity is not None
    assert [skill.is_new for skill in none_new] == [none_new[0].similarity < 0]


def test_experts_start_apart_and_change_nothing(base):
    ids = torch.tensor([[3, 9, 27, 1, 5]])
    settings = MoeSettings(experts=3, lora_r=2, seed=5)
    made = SimpleNamespace(model=base, path="base")
    model = new_moe(made, settings, top_k=2)
    assert len(model.adapters()) == 3
    assert not any(b.any() for adapter in model.adapters() for _, b, _ in adapter.values())
    assert torch.equal(model(ids).logits, base(ids).logits)
    first, second, _ = model.adapters()
    assert len(first) == 3 * 7
    a, b, scaling = first["model.layers.1.mlp.down_proj"]
    assert (list(a.shape), list(b.shape), scaling) == ([2, 24], [16, 2], 8)
    assert a.abs().max() <= 24**-0.5 < 1.2 * a.abs().max()
    assert not torch.equal(a, second["model.layers.1.mlp.down_proj"][0])
    again = new_moe(made, settings).adapters()[0]["model.layers.1.mlp.down_proj"][0]
    assert torch.equal(a, again)
    assert (model.top_k, model.temperature) == (2, 2.0)
