"""The golden classifiers: what the original computes, and never what it computes where it errs."""

import copy
import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from runner.checkpoints.checkpoint import Listing
from runner.evaluation.base_models import load_base
from runner.evaluation.placement import Placement
from runner.finetuning.classifier import Classifier
from runner.finetuning.files import load_trained
from runner.finetuning.low_rank import LowRankSettings, add_to_linears
from runner.finetuning.scope import choose, groups, reached
from runner.training.loop import take_steps
from tests.gpt_files import built, opened

GPTS = ["gpt_small", "gpt_medium"]
KINDS = [*GPTS, "hf"]
CPU = Placement(device="cpu", dtype="float32")


class Case:
    def __init__(self, golden, kind):
        self.kind, self.root = kind, golden(f"finetune/{kind}")
        self.expected = json.loads((self.root / "expected.json").read_text())
        self.inputs = torch.load(self.root / "inputs.pt", weights_only=True)
        self.golden = golden

    def model(self):
        if self.kind == "hf":
            backbone = copy.deepcopy(load_base(None, str(self.golden("npt/base")), CPU).model)  # which stays loaded
            head = "linear"
        else:
            dialect = self.kind.removeprefix("gpt_")
            backbone, head = built(opened(Listing.of(self.golden(f"gpt/{dialect}")).path, dialect)), "mlp"
        return self.with_head(Classifier(backbone, 3, head=head).eval())

    def with_head(self, model):
        for name, parameter in model.head_parameters().items():
            parameter.data.copy_(self.inputs["head"][name])
        return model

    def batch(self):
        return self.inputs["input_ids"], self.inputs["attention_mask"]

    def loss(self, model, weight=None):
        return cross_entropy(model(*self.batch()).logits, self.inputs["labels"], weight)

    def steps(self, model, trained, scale=0.1):
        """The loss before each of three steps and after the last, and the logits then."""
        parts = groups(model, list(trained.values()), rate=1e-3, backbone_scale=scale, decay=0.01)
        optimizer = torch.optim.AdamW(parts, betas=(0.9, 0.999), eps=1e-8)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0)
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        found = [
            figures["loss"]
            for _, figures in take_steps(
                range(1, 4), parameters, [(optimizer, schedule)], lambda: None,
                lambda batch, step: {"loss": self.loss(model)}, clip=1.0,
            )
        ]  # fmt: skip
        with torch.no_grad():
            return [*found, self.loss(model).item()], model(*self.batch()).logits


@pytest.fixture(params=KINDS)
def case(request, golden):
    return Case(golden, request.param)


@pytest.fixture(params=GPTS)
def gpt(request, golden):
    return Case(golden, request.param)


def near(found, expected, tolerance=1e-4):
    torch.testing.assert_close(torch.as_tensor(found), torch.tensor(expected), atol=tolerance, rtol=0)


def test_logits_losses_and_gradients(case):
    model, expected = case.model(), case.expected
    scope = reached(model, choose(model, "all", (), ()), case.batch)
    logits = model(*case.batch()).logits
    near(logits.detach(), expected["logits"])
    near(case.loss(model).item(), expected["loss"])
    if weighted := expected.get("loss_weighted"):
        near(case.loss(model, torch.tensor(weighted["class_weights"])).item(), weighted["loss"])
    case.loss(model).backward()
    norms = {f"backbone.{name}": p.grad.norm().item() for name, p in scope.trained.items()}
    norms |= {name: p.grad.norm().item() for name, p in model.head_parameters().items()}
    for name, norm in expected["grad_norms"].items():
        own = norms[name if name in norms else f"backbone.{name}"]
        assert own == pytest.approx(norm, rel=1e-3), name
    if total := expected.get("grad_norm_total"):
        assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(total, rel=1e-3)
    assert [name for name in scope.unreached if "head" not in name] == []


@pytest.mark.parametrize("scope", ["all", "head"])
def test_three_steps(case, scope):
    expected = case.expected.get({"all": "steps3_all", "head": "steps3_head_only"}[scope])
    if expected is None:
        pytest.skip("no golden numbers")
    model = case.model()
    trained = reached(model, choose(model, scope, (), ()), case.batch).trained
    losses, logits = case.steps(model, trained)
    near(losses, expected["loss_before_each_step_and_after_the_last"], 1e-3)
    near(logits, expected["logits_after"], 1e-3)
    if scope == "all" and (wrong := case.expected.get("wrong")):
        assert abs(losses[1] - wrong["one_lr_for_all_groups"][1]) > 0.01


@torch.no_grad()
def test_real_tokens_with_id_0_are_tokens(gpt):
    model, (ids, mask) = gpt.model(), gpt.batch()
    length = int(mask[1].sum())
    ids = ids.clone()
    ids[1, length - 3 : length] = 0
    logits = model(ids, mask).logits[1]
    near(logits, gpt.expected["trap"]["logits_example_1"])
    assert (logits - torch.tensor(gpt.expected["wrong"]["trap_pooled_by_id_not_0"])).abs().max() > 0.05


@torch.no_grad()
def test_padding_and_the_batch_do_not_matter(gpt):
    model, (ids, mask) = gpt.model(), gpt.batch()
    alone = model(ids[3:, : int(mask[3].sum())]).logits[0]
    near(alone, gpt.expected["padding_does_not_matter"]["logits"])
    near(model(ids, mask).logits[3], alone.tolist(), 1e-5)


@torch.no_grad()
def test_a_small_backbone_keeps_its_own_arithmetic(golden):
    case = Case(golden, "gpt_small")
    wrong = torch.tensor(case.expected["wrong"]["converted_small_as_batched_logits"])
    assert (case.model()(*case.batch()).logits - wrong).abs().max() > 0.01


def test_the_sequence_classifier_of_peft(golden):
    case = Case(golden, "hf")
    expected = case.expected["lora"]
    model = case.model()
    names = add_to_linears(model.backbone, LowRankSettings(rank=4, alpha=8, targets=("q_proj", "v_proj")))
    load_trained(model, golden("finetune/hf/adapter"))
    near(model(*case.batch()).logits.detach(), expected["logits"])
    near(case.loss(model).item(), expected["loss"])
    trained = reached(model, choose(model, "lora", (), names), case.batch).trained
    losses, logits = case.steps(model, trained)
    near(losses, expected["steps3_adapter_and_head"]["loss_before_each_step_and_after_the_last"], 1e-3)
    near(logits, expected["steps3_adapter_and_head"]["logits_after"], 1e-3)
