"""`task=generate` from the command line and from Python."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import runner
from runner.errors import ConfigError
from tests.conftest import MIXED, npt_tensors, write_base, write_gpt, write_npt
from tests.lora_files import edit_json, write_moe

SHORT = ("generate.max_new_tokens=5",)


@pytest.fixture
def words(checkpoint):
    return ["task=generate", f"ckpt={checkpoint}", *SHORT]


def rows(outcome) -> list[dict]:
    assert outcome.code == 0, outcome.err
    return outcome.result["generation"]


def test_a_prompt(words, run):
    outcome = run(*words, "prompt=Hello, world = [1,", "generate.temperature=0")
    (row,) = rows(outcome)
    assert row["prompt"] == "Hello, world = [1,"
    assert len(row["new_ids"]) == row["tokens"] == 5
    assert (row["finish"], row["seed"]) == ("length", 0)
    assert row["logprob_mean"] == pytest.approx(sum(row["logprobs"]) / 5)
    assert outcome.result["metrics"]["logprob_mean"] == row["logprob_mean"]
    assert outcome.result["settings"]["temperature"] == 0
    assert outcome.result["cache_bytes"] == 2 * 3 * 1 * (len(row["ids"]) + 5) * 2 * 8 * 4
    assert "Drawn With: greedy" in outcome.out
    assert "continuations" in outcome.out


def test_the_same_seed_draws_the_same_text(words, run):
    prompts = "prompt=[one,two three,four]"
    (first, *others) = rows(run(*words, prompts, "seed=3", "generate.num_samples=2"))
    assert [row["seed"] for row in (first, *others)] == [3, 4] * 3
    alone = rows(run(*words, "prompt=two three", "generate.seed=4", "generate.batch_size=1", "generate.cache=false"))
    assert others[2]["prompt"] == "two three"
    assert alone[0]["new_ids"] == others[2]["new_ids"]
    single = rows(run(*words, prompts, "seed=3", "generate.num_samples=2", "generate.batch_size=1"))
    assert [row["new_ids"] for row in single] == [row["new_ids"] for row in (first, *others)]
    assert rows(run(*words, "prompt=one", "seed=5"))[0]["new_ids"] != first["new_ids"]


def test_standard_input(words, run, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größer\nzwei\n".encode())))
    (row,) = rows(run(*words, "prompt=-"))
    assert row["prompt"] == "größer\nzwei"


def test_prompts_and_output_in_files(words, run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "one", "id": "a"}\n\n{"prompt": "two", "id": "b"}\n')
    outcome = run(*words, "prompts=in.jsonl", "output=out.jsonl", "generate.num_samples=2")
    written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert written == rows(outcome)
    assert [(row["id"], row["prompt"], row["seed"]) for row in written] == [
        ("a", "one", 0), ("a", "one", 1), ("b", "two", 0), ("b", "two", 1),
    ]  # fmt: skip
    rows(run(*words, "prompts=in.jsonl", "output=out.txt"))
    assert Path("out.txt").read_text() == f"{written[0]['text']}\n\n{written[2]['text']}\n"
    rows(run(*words, "prompt=one", "output=out.json"))
    assert json.loads(Path("out.json").read_text())["task"] == "generate"


def test_streamed_where_that_is_asked_for(words, run):
    outcome = run(*words, "prompt=Hello", "generate.stream=true")
    (row,) = rows(outcome)
    assert outcome.out.startswith(f"{row['text']}\n") or "\\x" in outcome.out
    assert "continuations" not in outcome.out
    several = run(*words, "prompt=[one,two]", "generate.stream=true")
    assert len(rows(several)) == 2
    assert "continuations" in several.out


def test_side_by_side(words, run, checkpoint, base):
    outcome = run(*words, "prompt=[one,two three]", "reference=base", "generate.seed=1")
    for row in rows(outcome):
        (theirs,) = runner.generate(base, [row["prompt"]], max_new_tokens=5, seed=1)
        assert row["reference_new_ids"] == theirs["new_ids"]
        assert row["reference_text"] == theirs["text"]
        same = [a == b for a, b in zip(row["new_ids"], row["reference_new_ids"], strict=True)]
        assert row["agreement"] == sum(same) / 5
        ids, first = torch.tensor([row["ids"] + row["new_ids"]]), len(row["ids"]) - 1
        with torch.inference_mode():
            ours, other = (runner.load(path)(ids).logits[0].double().log_softmax(-1) for path in (checkpoint, base))
        known = other[first:-1].gather(1, ids[0, first + 1 :, None]).squeeze(1)
        assert row["reference_logprobs"] == pytest.approx(known.tolist(), abs=1e-4)
        kl = (other.exp() * (other - ours)).sum(-1)[first:-1].mean().item()
        assert row["path_kl"] == pytest.approx(kl, rel=1e-3)
    assert outcome.result["reference"] == str(base)
    assert {"agreement", "path_kl"} <= outcome.result["metrics"].keys()
    assert "reference_text" in outcome.out
    itself = rows(run(*words, "prompt=one", f"reference={checkpoint}"))[0]
    assert (itself["agreement"], itself["first_divergence"]) == (1.0, None)
    assert itself["path_kl"] == pytest.approx(0, abs=1e-9)


def test_which_layers_modulate(words, run, base):
    (none,) = rows(run(*words, "prompt=one", "generate.layers=[]"))
    (plain,) = runner.generate(base, ["one"], max_new_tokens=5)
    assert none["new_ids"] == plain["new_ids"]
    (some,) = rows(run(*words, "prompt=one", "generate.layers=[1,2]", "generate.temperature=0"))
    model = runner.load(words[1].partition("=")[2])
    with model.npt_mode({1, 2}):
        assert some["new_ids"][0] == model(torch.tensor([some["ids"]])).logits[0, -1].argmax().item()


def test_experts_beside_their_base(run, base, tmp_path):
    path = write_moe(tmp_path / "moe", base)
    (row,) = rows(run("task=generate", f"ckpt={path}", *SHORT, "prompt=one", "reference=base"))
    assert row["reference_new_ids"] == next(runner.generate(base, ["one"], max_new_tokens=5))["new_ids"]


def test_a_tokenizer_without_an_end_and_without_a_template(words, run, base):
    (row,) = rows(run(*words, "prompt=one", f"tokenizer={base / 'tokenizer.json'}", "generate.temperature=3"))
    assert row["finish"] == "length"
    free = next(runner.generate(base, ["one"], max_new_tokens=5, ignore_eos=True, temperature=0))
    known = next(runner.generate(base, ["one"], tokenizer=base / "tokenizer.json", max_new_tokens=5, temperature=0))
    assert known["new_ids"] == free["new_ids"][: known["tokens"]]


def test_stops_and_ends(base, tmp_path):
    (free,) = runner.generate(base, ["Hello"], max_new_tokens=30, temperature=0, ignore_eos=True)
    stop = free["text"][3:5]
    (row,) = runner.generate(base, ["Hello"], max_new_tokens=30, temperature=0, ignore_eos=True, stop=[stop])
    assert (row["finish"], row["text"]) == ("stop", free["text"][: free["text"].index(stop)])
    assert row["new_ids"] == free["new_ids"][: len(row["new_ids"])]
    own = shutil.copytree(base, tmp_path / "own")
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free["new_ids"][4]]}))
    (ended,) = runner.generate(own, ["Hello"], max_new_tokens=30, temperature=0)
    cut = free["new_ids"].index(free["new_ids"][4]) + 1
    assert (ended["finish"], ended["new_ids"]) == ("eos", free["new_ids"][:cut])
    assert free["text"].startswith(ended["text"])


def test_the_end_of_the_context(words, run):
    outcome = run(*words[:2], f"prompt={'x' * 150}", "generate.max_new_tokens=20", "generate.ignore_eos=true")
    (row,) = rows(outcome)
    assert (row["finish"], row["tokens"]) == ("context", 10)


def test_a_stream_from_python(base):
    prompt, options = "Grüße", {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0}
    (whole,) = runner.generate(base, [prompt], **options)
    pieces = list(runner.generate(base, [prompt], stream=True, **options))
    assert "".join(pieces) == whole["text"]
    assert len(pieces) > 3
    by_ids = next(runner.generate(base, [whole["ids"]], **options))
    assert by_ids["new_ids"] == whole["new_ids"]
    with pytest.raises(ConfigError, match="one prompt"):
        runner.generate(base, ["a", "b"], stream=True)


def test_a_model_by_itself(base):
    model = runner.load(base)
    (row,) = runner.generate(model, [[5, 6, 7]], max_new_tokens=4, temperature=0)
    assert row["text"] == " " + " ".join(map(str, row["new_ids"]))
    with pytest.raises(ConfigError, match="token ids"):
        runner.generate(model, ["words"])
    (named,) = runner.generate(model, ["words"], tokenizer=base, max_new_tokens=4)
    assert named["text"]


@pytest.fixture
def gpt(tmp_path):
    (tmp_path / "gpt").mkdir()
    write_gpt(tmp_path / "gpt", "small")
    return tmp_path / "gpt"


def test_a_gpt_without_a_tokenizer_takes_ids(run, gpt):
    (row,) = rows(run("task=generate", f"ckpt={gpt}", *SHORT, "prompt=50 3 7", "generate.temperature=0"))
    assert row["ids"] == [50, 3, 7]
    long = " ".join(["50"] * 1100)
    outcome = run("task=generate", f"ckpt={gpt}", f"prompt={long}", "generate.max_new_tokens=1")
    assert any("window" in finding for finding in outcome.result["findings"])
    assert row["text"].split() == list(map(str, row["new_ids"]))


def test_a_gpt_never_draws_the_padding_of_its_vocabulary(gpt, base):
    """With a tokenizer of 259 tokens, greedy or not; a GPT's own documents begin with the token that it ends on."""
    drawn = [
        token
        for temperature in (0, 5.0)
        for row in runner.generate(
            gpt, ["Hello"], tokenizer=base, max_new_tokens=30, top_p=1.0, temperature=temperature
        )
        for token in row["new_ids"]
    ]
    assert max(drawn) < 259
    free = runner.generate(gpt, [[5, 6]], max_new_tokens=30, top_p=1.0, temperature=5.0, ignore_eos=True)
    assert max(next(free)["new_ids"]) >= 259


def test_a_document_of_a_gpt_begins_with_the_token_that_ends_one(gpt, base):
    model, options = runner.load(gpt), {"tokenizer": base, "max_new_tokens": 1}
    model.document_token = 2  # the tokenizer's end of text
    ids = {each: next(runner.generate(model, ["a"], special_tokens=each, **options))["ids"] for each in ("auto", False)}
    assert ids["auto"] == [2, *ids[False]]


def test_a_chat_template(run, checkpoint, tmp_path):
    base = write_base(tmp_path / "chatting")
    edit_json(base / "tokenizer_config.json", chat_template="{{ messages[0].role }}:{{ messages[-1].content }}>")
    own = write_npt(tmp_path / "own" / "checkpoint-1", npt_tensors(base, MIXED), base=base)
    words = ["task=generate", f"ckpt={own}", *SHORT]
    decoded = {
        name: bytes(each - 3 for each in rows(run(*words, "prompt=hi", *more))[0]["ids"])
        for name, more in {"auto": [], "system": ["generate.system=kind"], "plain": ["generate.chat=false"]}.items()
    }
    assert len(decoded["auto"]) == len("user:hi>")
    assert len(decoded["system"]) == len("system:hi>")
    assert len(decoded["plain"]) == len("hi")
    (tmp_path / "m.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "hello"}]}\n'
    )
    (row,) = rows(run(*words, f"prompts={tmp_path / 'm.jsonl'}"))
    assert len(row["ids"]) == len("user:hello>")
    edit_json(base / "tokenizer_config.json", chat_template="{{ raise_exception('no such role') }}")
    refused = run(*words, "prompt=hi")
    assert (refused.code, "no such role" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "there is no prompt"),
        (["prompt=a", "prompts=b.txt"], "both given"),
        (["prompt=a", "generate.temprature=1"], "temprature"),
        (["prompt=a", "generate.temperature=-1"], "generate.temperature=-1"),
        (["prompt=a", "generate.top_p=0"], "generate.top_p=0"),
        (["prompt=a", "generate.top_k=0"], "generate.top_k=0"),
        (["prompt=a", "generate.repetition_penalty=0"], "generate.repetition_penalty=0"),
        (["prompt=a", "generate.chat=true"], "no chat template"),
        (["prompt=a", "generate.system=be kind"], "needs a chat template"),
        (["prompt=a", "generate.layers=[9]"], "layer 9 is no NPT layer"),
        (["prompt=", "generate.layers=[1]"], "no tokens"),
        ([f"prompt={'x' * 160}"], "leaves no room in the model's 160 positions"),
        (["prompt=[a,b]", f"prompts={'p' * 10}.txt"], "both given"),
        (["prompts=nowhere.txt"], "cannot be read"),
        (["prompt=a", "reference=nowhere/at/all"], "nowhere/at/all"),
        (["prompt=a", "tier=full"], "tier belongs to"),
    ],
)
def test_bad_input_is_one_line(words, run, more, says):
    outcome = run(*words, *more)
    assert outcome.code == 2, outcome.out
    assert says in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_words_for_a_gpt_without_a_tokenizer(run, gpt):
    outcome = run("task=generate", f"ckpt={gpt}", "prompt=Hello -- you")
    assert (outcome.code, "token ids" in outcome.err) == (2, True)
    unknown = run("task=generate", f"ckpt={gpt}", "prompt=5 512")
    assert (unknown.code, "512 is not in the model's vocabulary" in unknown.err) == (2, True)
    alone = run("task=generate", f"ckpt={gpt}", "prompt=5", "reference=base")
    assert (alone.code, "has no base" in alone.err) == (2, True)


def test_a_reference_with_another_tokenizer(words, run, tmp_path, base):
    other = shutil.copytree(base, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"a":', '"aa":', 1))
    outcome = run(*words, "prompt=b", f"reference={other}")
    assert (outcome.code, "another tokenizer" in outcome.err) == (2, True)


def test_a_sweep_over_steps_and_prompts(run, base, tmp_path):
    for step in (1, 2):
        write_npt(tmp_path / "run" / f"checkpoint-{step}", npt_tensors(base, MIXED, seed=step), base=base, step=step)
    outcome = run("-m", "task=generate", f"ckpt={tmp_path / 'run'}", "step=all", "prompt=[one,<b>two]", *SHORT)
    assert outcome.code == 0, outcome.err
    (sweep,) = Path("sweeps").iterdir()
    jobs = [json.loads(file.read_text()) for file in sorted(sweep.glob("*/result.json"))]
    table = outcome.out[outcome.out.index("continuations") if "continuations" in outcome.out else 0 :]
    head = next(line for line in outcome.out.splitlines() if line.startswith("step"))
    assert head.split("  ")[0] == "step"
    assert "one" in head
    assert "<b>two" in head
    page = (sweep / "comparison.html").read_text()
    assert 'id="texts"' in page
    assert "&lt;b&gt;two" in page
    assert len(jobs) == 2
    assert table
    swept = run("-m", "task=generate", f"ckpt={tmp_path / 'run' / 'checkpoint-1'}", "prompt=one,two", *SHORT)
    assert swept.code == 0, swept.err
    lines = swept.out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("step"))
    assert "one" in lines[at]
    assert "two" in lines[at]
    assert "–" not in lines[at + 1]
