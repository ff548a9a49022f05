"""The same text alone and in a batch, with a cache and without, in every family."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import runner
from runner.errors import ModelError
from runner.evaluation.decoding import Continuation, Feed, cached, extend
from runner.metrics.generation import Sampling
from tests.conftest import MIXED, npt_tensors, write_gpt, write_npt
from tests.lora_files import write_adapter, write_moe

LENGTHS = (1, 2, 17, 9)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2)


def prompts(vocabulary: int = 256) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=numbers).tolist() for length in LENGTHS]


def grown(model, rows, how, *, cache=True, count=8):
    made = [Continuation(prompt=ids, count=count, seed=i) for i, ids in rows]
    for _ in extend(Feed(model, torch.device("cpu"), cache=cache), made, how):
        pass
    return [row.new_ids for row in made]


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    """One tiny model of each family, and two of transformers that place and mask otherwise."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "vocab_size": 272}
    mistral = MistralConfig(
        **sizes, intermediate_size=48, num_key_value_heads=1, head_dim=16, sliding_window=6, initializer_range=0.2
    )
    gpt2 = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=272, n_positions=30, initializer_range=0.3)
    (root / "gpt").mkdir()
    return {
        "hf": runner.load(base),
        "npt": runner.load(write_npt(root / "npt", npt_tensors(base, MIXED)), base=base),
        "peft": runner.load(write_adapter(root / "peft", base)),
        "lora_moe": runner.load(write_moe(root / "moe", base), base=base),
        "gpt": runner.load(write_gpt(root / "gpt", "small")),
        "mistral": MistralForCausalLM(mistral).eval(),
        "gpt2": GPT2LMHeadModel(gpt2).eval(),
    }


FAMILIES = ["hf", "npt", "peft", "lora_moe", "gpt", "mistral", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_the_batch_and_the_cache_change_nothing(models, family, how):
    model, rows = models[family], list(enumerate(prompts()))
    together = grown(model, rows, how)
    assert together == [grown(model, [row], how)[0] for row in rows]
    assert together == grown(model, rows, how, cache=False)
    assert together[1:3] == grown(model, rows[1:3], how)
    assert len({tuple(ids) for ids in together}) == len(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_a_cache_are_those_without(models, family):
    """At every position, whatever number of tokens is fed at once, beside rows of other lengths."""
    model = models[family]
    ids = torch.tensor([prompts()[2]])
    with torch.inference_mode():
        expected = model(ids).logits[0].float()
        steps = cached(model)
        cache = steps.new_cache(torch.tensor([0, 2]), 30)
        padded = torch.cat([ids, torch.cat([torch.zeros(1, 2, dtype=torch.long), ids[:, :-2]], dim=1)])
        end = 0
        for count in (3, 1, 1, 5, 7):
            got = steps.advance(padded[:, end : end + count], cache)
            end += count
            torch.testing.assert_close(got[0], expected[end - 1], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(got[1], expected[end - 3], atol=2e-5, rtol=1e-4)


def test_a_row_ends_by_itself(models):
    model, rows = models["hf"], prompts()
    endless = grown(model, list(enumerate(rows)), Sampling(), count=12)
    eos = endless[0][3]
    made = [Continuation(prompt=ids, count=12 - 3 * i, full="context") for i, ids in enumerate(rows)]
    for _ in extend(Feed(model, torch.device("cpu")), made, Sampling(), eos=frozenset([eos])):
        pass
    for i, (row, whole) in enumerate(zip(made, endless, strict=True)):
        cut = whole[: 12 - 3 * i]
        if eos in cut:
            assert (row.new_ids, row.finish) == (whole[: whole.index(eos) + 1], "eos")
        else:
            assert (row.new_ids, row.finish) == (cut, "context")
        logprobs = model(torch.tensor([[*row.prompt, *row.new_ids]])).logits[0].log_softmax(-1)
        known = [logprobs[len(row.prompt) - 1 + j, each].item() for j, each in enumerate(row.new_ids)]
        assert row.logprobs == pytest.approx(known, abs=1e-4)


def test_a_feed_goes_on_where_the_text_does(models, monkeypatch):
    """A longer prompt that begins with what was fed costs its new tokens only; any other one begins anew."""
    model, (first, *_, other) = models["npt"], prompts()
    alone = {len(ids): grown(model, [(0, ids)], Sampling(), count=4)[0] for ids in (first, other)}
    longer = [*first, *alone[len(first)], 7, 8]
    known = grown(model, [(0, longer)], Sampling(), count=4)[0]
    feed, fed = Feed(model, torch.device("cpu"), spare=40), []
    advance = feed._model.advance
    monkeypatch.setattr(feed._model, "advance", lambda ids, cache: fed.append(ids.shape[1]) or advance(ids, cache))

    def after(ids):
        row = Continuation(prompt=ids, count=4)
        for _ in extend(feed, [row], Sampling()):
            pass
        return row.new_ids

    assert after(first) == alone[len(first)]
    fed.clear()
    assert after(longer) == known
    assert fed == [3, 1, 1, 1]  # the last new token was drawn and not fed
    fed.clear()
    assert after(other) == alone[len(other)]
    assert fed[0] == len(other)


def test_ids_beyond_the_limit_are_never_drawn(models):
    free = grown(models["hf"], [(0, [5, 6])], Sampling(), count=20)[0]
    row = Continuation(prompt=[5, 6], count=20)
    for _ in extend(Feed(models["hf"], torch.device("cpu")), [row], Sampling(), drawable=max(free)):
        pass
    assert max(row.new_ids) < max(free)


def test_logits_that_are_not_finite(models):
    class Broken(torch.nn.Linear):
        config = type("Config", (), {"vocab_size": 4})

        def forward(self, ids):
            return type("Output", (), {"logits": torch.full((1, ids.shape[1], 4), torch.nan)})

    for temperature in (0, 1.0):
        with pytest.raises(ModelError, match="not finite"):
            next(runner.generate(Broken(1, 1), [[1, 2]], temperature=temperature))
