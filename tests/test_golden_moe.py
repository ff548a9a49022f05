"""The golden lora_moe checkpoints: logits, routing and the mean of all logits."""

import pytest
import torch

from runner.families.lora_moe import model as lora_moe
from tests.conftest import golden_numbers
from tests.lora_files import load_moe

EXPECTED = golden_numbers("moe")


def load(golden, name, **options):
    return load_moe(golden(f"moe/{name}"), golden("npt/base"), **options)


def distance(logits: torch.Tensor, name: str) -> float:
    """The largest difference from the expected logits of the last position."""
    return (logits[0, -1] - torch.tensor(EXPECTED[name]["logits_last"])).abs().max().item()


@pytest.mark.parametrize("name", list(EXPECTED))
def test_routing_and_mean(name, golden):
    expected = EXPECTED[name]
    model = load(golden, name)
    ids = torch.tensor([expected["ids"]])
    with torch.inference_mode():
        output = model(ids)
        final = model.head(model.hidden(ids))
    assert output.expert_weights.argmax(-1)[0].tolist() == expected["routing"]
    assert output.logits.mean().item() == pytest.approx(expected["logits_mean"], abs=1e-6)
    assert torch.equal(final, output.logits)
    active = (output.expert_weights > 0).sum(-1).unique().tolist()
    assert active == [2 if name.endswith("top2") else 1]


def test_logits_of_one_expert_a_token(golden):
    with torch.inference_mode():
        logits = load(golden, "two_experts")(torch.tensor([EXPECTED["two_experts"]["ids"]])).logits
    assert distance(logits, "two_experts") < 5e-5


def test_logits_of_two_experts_a_token(golden, monkeypatch):
    """The last token stands between two experts (0.565 and 0.435), and its features are ill-conditioned: changing the
    base's weights by half a unit in the last place moves its router logits by 1e-3 and its logits by 1e-2. So the
    expected logits are reached to 1e-4 by a shift of that size in one router logit, and by nothing else."""
    name = "three_experts_top2"
    model, ids = load(golden, name), torch.tensor([EXPECTED[name]["ids"]])
    top_k_weights = lora_moe.top_k_weights

    def shifted(by: float) -> float:
        def weights(logits, k):
            moved = logits.clone()
            moved[0, -1, 0] += by
            return top_k_weights(moved, k)

        monkeypatch.setattr(lora_moe, "top_k_weights", weights)
        with torch.inference_mode():
            return distance(model(ids).logits, name)

    assert shifted(0.0) < 2e-2
    low, high = -5e-3, 5e-3
    for _ in range(30):
        third = (high - low) / 3
        low, high = (low + third, high) if shifted(low + third) > shifted(high - third) else (low, high - third)
    assert shifted(low) < 1e-4


@pytest.mark.parametrize("name", list(EXPECTED))
@pytest.mark.parametrize("features", ["base", "expert_0"])
def test_other_router_features_give_other_logits(name, features, golden):
    with torch.inference_mode():
        output = load(golden, name, router_features=features)(torch.tensor([EXPECTED[name]["ids"]]))
    assert distance(output.logits, name) > 1
