"""The interactive tool's commands, in one session; its files; and what it refuses, after which the session goes on."""

import json
import pickle
import sys
import types
from collections import OrderedDict
from datetime import datetime

import pytest
import torch

import runner
from runner.errors import CheckpointError, ConfigError, RunnerError
from runner.families.npt.tool.commands import COMMANDS, execute
from runner.families.npt.tool.session import Settings, Tool, arrow, parse
from runner.families.npt.transfer import combine, extract
from runner.families.npt.transfer_files import load_session, original_session
from runner.families.npt.transfer_injection import How, continued, inject
from runner.families.npt.transfer_permanent import edits_of, reset
from runner.metrics.generation import Sampling
from runner.transfer import tokenizer_of
from tests.conftest import MIXED, npt_tensors, write_base, write_npt

A, B = "the capital of France is", "12 planets"


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    return runner.load(write_npt(tmp_path_factory.mktemp("tool") / "npt", npt_tensors(base, MIXED), base=base))


@pytest.fixture
def tool(model):
    """An empty session."""
    yield session(model)
    reset(model)


def session(model, **settings):
    active = tuple(model.npt_layers)
    return Tool(
        model=model, tokenizer=tokenizer_of(model), settings=Settings(**settings), unrelated=("one", "two words"),
        active=active, layer=active[0], strength=0.3,
    )  # fmt: skip


def ids(tool, text):
    return tool.tokenizer.encode(text, special=False)


def do(tool, *lines):
    """The figures of the last line."""
    for line in lines:
        reply = execute(tool, line)
    return reply.figures


def said(tool, line):
    return "\n".join(execute(tool, line).lines)


@pytest.fixture
def full(tool):
    """A session with two modulations."""
    do(tool, f'extract a "{A}"', f'extract-seq b "{B}"')
    return tool


def test_extraction(full):
    expected = {"a": extract(full.model, ids(full, A)), "b": extract(full.model, ids(full, B), "mean")}
    for name, m in expected.items():
        for layer in m.layers:
            for one, two in zip(m[layer]["gate"], full.bank[name][layer]["gate"], strict=True):
                assert torch.equal(one, two)
    assert f"mean over {len(ids(full, B))} tokens" in said(full, f'extract-seq b "{B}"')
    figures = do(full, f'extract p "{A}" -pos 1')
    assert figures["sources"][0]["position"] == 1
    assert do(full, f'extract p "{A}" -pos -1')["sources"][0]["position"] == len(ids(full, A)) - 1
    assert do(full, "info b")["sources"][0] == {
        "text": f"Average of {len(ids(full, B))} tokens from: {B}...", "position": -1, "positions": 1,
        "ids": ids(full, B),
    }  # fmt: skip
    several = do(full, f'extract p "{A}" -pos -3:')
    assert (several["sources"][0]["positions"], full.bank["p"].count) == (3, 3)
    answered = do(full, f'extract p "{A}" -answer " Paris"')
    assert answered["sources"][0]["ids"] == ids(full, A) + ids(full, " Paris")[:1]
    special = do(full, f'extract p "{A}" -special true')
    assert special["sources"][0]["ids"] == full.tokenizer.encode(A)


def test_a_position_outside_names_the_length(full):
    for position in (len(ids(full, A)), -len(ids(full, A)) - 1):
        with pytest.raises(ConfigError, match=f"has {len(ids(full, A))} tokens"):
            execute(full, f'extract c "{A}" -pos {position}')
    assert list(full.bank) == ["a", "b"]


def test_a_name_that_is_taken_is_said(full):
    assert "b replaces the one of that name" in said(full, f'extract b "{A}"')
    assert "a replaces" in said(full, "negate b a")


def test_the_bank(full):
    assert [line.split(":")[0].strip() for line in execute(full, "list").lines] == ["a", "b"]
    listed = do(full, "list")["bank"]["a"]
    assert [row["modulation"] for row in listed["layers"]] == ["single", "dual", "triple"]
    assert [row["num_ranks"] for row in listed["layers"]] == [1, 3, 5]
    shown = said(full, "info a")
    assert "magnitude" in shown
    assert "[3, 32] [3, 80]" in shown
    do(full, "delete a")
    assert list(full.bank) == ["b"]
    with pytest.raises(ConfigError, match="no modulation 'a'; the bank holds b"):
        execute(full, "delete a")
    do(full, "delete b")
    assert said(full, "list") == "the bank is empty"
    with pytest.raises(ConfigError, match="the bank is empty"):
        execute(full, "info b")


def test_tracked_tokens(full):
    shown = said(full, 'track Paris x " y"')
    assert "'Paris' is 5 tokens: the first, 'P', is tracked" in shown
    assert list(full.tracked) == ["Paris", "x", " y"]
    assert full.tracked["x"] == ids(full, "x")[0]
    figures = do(full, f'inject a "{B}"')
    assert [row["text"] for row in figures["tracked"]] == ["Paris", "x", " y"]
    found = inject(full.model, ids(full, B), full.bank["a"], How())
    assert figures["tracked"][1]["injected"] == found.probabilities(full.tracked["x"])[1]
    do(full, "untrack x")
    assert list(do(full, "track")["tracked"]) == ["Paris", " y"]
    with pytest.raises(ConfigError, match="'x' is not tracked"):
        execute(full, "untrack x")
    do(full, "clear")
    assert said(full, "track") == "no token is tracked"


def test_a_space_before_a_word_is_offered_where_that_is_one_token(full):
    full.tokenizer = types.SimpleNamespace(
        encode=lambda text, special: [7] if text.startswith(" ") else [5, 6], decode=lambda ids: "P"
    )
    assert "' Paris' is one token" in said(full, "track Paris")


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("inject a", How()), ("inject a -space vectors", How(space="vectors")),
        ("inject-blend b -alpha 0.25", How(mode="blend", alpha=0.25)), ("inject-add b", How(mode="add")),
        ("inject-add a -strength 2 -space vectors", How(mode="add", strength=2.0, space="vectors")),
    ],
)  # fmt: skip
def test_injection(full, line, how):
    command, name, *options = line.split()
    figures = do(full, f'{command} {name} "{B}" {" ".join(options)}')
    found = inject(full.model, ids(full, B), full.bank[name], how)
    assert figures["kl"] == found.kl
    assert [row["token"] for row in figures["top"]] == [row["token"] for row in found.top(10)]
    assert {"permuted", "other_prompt", "locality"} == set(figures["controls"])
    assert len(figures["controls"]["locality"]["prompts"]) == 2
    at = do(full, f'{command} {name} "{B}" {" ".join(options)} -pos 2')
    assert at["kl"] == inject(full.model, ids(full, B), full.bank[name], how, 2).kl
    mode = [] if how.mode == "replace" else ["-mode", how.mode]
    compared = do(full, f'compare {name} "{B}" {" ".join([*options, *mode])}')
    assert (compared["kl"], compared["mode"]) == (found.kl, how.mode)
    assert compared["baseline_top"][0]["token"] == int(found.baseline.argmax())


def test_generation_with_injection(full):
    figures = do(full, "track x", f'inject-add a "{B}" -strength 0.5 -tokens 6')
    steps = list(continued(full.model, ids(full, B), full.bank["a"], How(mode="add", strength=0.5), 6))
    assert figures["new_ids"] == [token for token, _ in steps]
    kls = [found.kl for _, found in steps]
    assert [step["kl"] for step in figures["steps"]] == kls
    found = [figures[f"kl_{name}"] for name in ("mean", "max", "min", "last")]
    assert found == pytest.approx([sum(kls) / 6, max(kls), min(kls), kls[-1]])
    assert figures["steps"][2]["tracked"][0]["injected"] == steps[2][1].probabilities(full.tracked["x"])[1]


def test_bytes_of_a_token_are_appended_as_its_id(full):
    """The tokenizer is one of bytes: a token by itself is often no text, and would come back as others."""
    figures = do(full, f'inject a "{B}" -tokens 12 -strategy top_k -temp 3 -seed 1')
    again = ids(full, B)
    for token, step in zip(figures["new_ids"], figures["steps"], strict=True):
        assert step["kl"] == pytest.approx(inject(full.model, again, full.bank["a"], How()).kl, abs=1e-5)
        again.append(token)
    assert full.tokenizer.encode(figures["continuation"], special=False) != figures["new_ids"]


def test_strategies_and_seeds(full):
    def drawn(options):
        return do(full, f'inject a "{B}" -tokens 8 {options}')["new_ids"]

    def expected(sampling, seed):
        return [
            t for t, _ in continued(full.model, ids(full, B), full.bank["a"], How(), 8, sampling=sampling, seed=seed)
        ]

    assert drawn("-strategy sample -temp 2 -seed 5") == expected(Sampling(temperature=2.0, top_k=50), 5)
    assert drawn("-strategy top_k -temp 2 -seed 5") == drawn("-strategy sample -temp 2 -seed 5")
    assert drawn("-strategy top_k -top_k 1 -temp 2") == drawn("-strategy greedy") == drawn("")
    assert drawn("-strategy top_p -top_p 0.0001 -temp 2") == drawn("")  # one token at least, and no more
    assert drawn("-strategy top_p -top_p 1.0 -temp 2 -seed 5") == expected(Sampling(temperature=2.0), 5)
    assert drawn("-strategy top_p -seed 5") == drawn("-strategy top_p -seed 5") != drawn("-strategy top_p -seed 6")


def test_arithmetic(full):
    a, b = full.bank["a"], full.bank["b"]
    for line, expected in {
        "add a b r": combine("add", a, b), "subtract a b r -space vectors": combine("subtract", a, b, space="vectors"),
        "average a b a r": combine("average", a, b, a), "scale a -1.5 r": combine("scale", a, -1.5),
        "negate b r": combine("negate", b),
    }.items():  # fmt: skip
        figures = do(full, line)
        found = full.bank["r"]
        assert (found.magnitudes(), found.space) == (expected.magnitudes(), expected.space)
        assert [row["magnitude"] for row in figures["layers"]] == list(expected.magnitudes().values())
    assert full.bank["r"].expression == "-1 * (b)"
    do(full, "layers 0", f'extract c "{A}"')
    with pytest.raises(ConfigError, match=r"^a has the layers \[0, 1, 2\], c \[0\]$"):
        execute(full, "add a c r")


def test_the_space_of_the_settings_holds(model):
    tool = session(model, space="vectors", controls=False)
    do(tool, f'extract a "{A}"', "negate a n")
    one, two = do(tool, f'inject a "{B}"'), do(tool, f'inject n "{B}"')
    assert (one["kl"], one["space"], "controls" in one) == (two["kl"], "vectors", False)


def test_active_layers_and_the_baseline_that_belongs_to_them(full):
    text = ids(full, B)
    every = do(full, f'test "{B}"')["top"][0]["injected"]
    assert do(full, "layers 0,2")["active_layers"] == [0, 2]
    with full.model.npt_mode({0, 2}), torch.inference_mode():
        fewer = float(full.model(torch.tensor([text])).logits[0, -1].double().softmax(-1).max())
    assert do(full, f'test "{B}"')["top"][0]["injected"] == pytest.approx(fewer, rel=1e-5)
    assert fewer != every
    figures = do(full, f'inject a "{B}"')
    assert figures["kl"] == inject(full.model, text, full.bank["a"], How(), layers=[0, 2]).kl
    assert "not active: skipped" in figures["notes"][0]
    for wrong in ("99", "0,99"):
        with pytest.raises(ConfigError, match="layer 99 is no NPT layer; the NPT layers are 0, 1, 2"):
            execute(full, f"layers {wrong}")
    assert full.active == (0, 2)
    assert do(full, "mode 1 npt")["modes"] == {"0": "npt", "1": "npt", "2": "npt"}
    assert do(full, "mode 0")["modes"]["0"] == "standard"
    assert do(full, "modes")["modes"]["1"] == "npt"
    do(full, "layers all")
    assert full.active == (0, 1, 2)


def test_curves_and_the_map(full):
    figures = do(full, "track x", f'sweep a "{B}" -strengths 0,0.5,1')
    assert [row["strength"] for row in figures["by_strength"]] == [0.0, 0.5, 1.0]
    assert figures["by_strength"][0]["kl"] == pytest.approx(0, abs=1e-9)
    half = inject(full.model, ids(full, B), full.bank["a"], How(mode="add", strength=0.5))
    assert figures["by_strength"][1]["kl"] == half.kl
    assert figures["by_strength"][1]["probabilities"] == {"x": half.probabilities(full.tracked["x"])[1]}
    assert [row["layer"] for row in figures["by_layer"]] == [0, 1, 2]
    assert len(do(full, f'sweep a "{B}"')["by_strength"]) == 9
    rows = do(full, f'map "{A}"')
    assert [len(row["norms"]) for row in rows["delta_map"]] == [len(ids(full, A))] * 3


def test_facts_are_written_recalled_and_taken_back(full, tmp_path):
    fact = "the moon is made of x"
    before = do(full, f'test "{B}"')["top"]
    edit = do(full, f'inject-all "{fact}" -strength 0.1')["edit"]
    assert (edit["layers"], edit["strength"]) == ([0, 1, 2], 0.1)
    recalled = do(full, "recall")["recall"]
    assert [row["prompt"] for row in recalled] == ["What is the moon?", "the moon is", "Tell me about the moon."]
    assert recalled == do(full, "recall")["recall"]  # greedy
    assert do(full, "layer 1", f'inject-one "{fact}" -pos all')["edit"]["layers"] == [1]
    assert do(full, "strength 0.2", f'inject-multi "{fact}" 0,2 -pos first')["edit"]["strength"] == 0.2
    assert do(full, "write a 2")["edit"]["layers"] == [2]
    assert do(full, f'inject-all "{fact}" -sequential true')["edit"]["layers"] == [0, 1, 2]
    after = do(full, f'test "{B}"')
    assert (after["written"], after["kl"] > 0) == (True, True)
    assert {row["token"]: row["baseline"] for row in after["top"]} != {
        row["token"]: row["injected"] for row in after["top"]
    }
    assert len(do(full, "edits")["edits"]) == 5
    assert do(full, "status")["edits"] == 5
    do(full, f"save-model {tmp_path}/edited", f"save-model {tmp_path}/whole -form hf")
    written = [row["injected"] for row in do(full, f'test "{B}"')["top"]]
    assert do(full, "reset 1")["reset"] == [1]
    assert do(full, "reset-all")["reset"] == [0, 2]
    assert do(full, f'test "{B}"')["top"] == before
    assert edits_of(full.model) == []
    for name in ("edited", "whole"):
        other = session(runner.load(tmp_path / name))
        assert [row["injected"] for row in do(other, f'test "{B}"')["top"]] == written
    with pytest.raises(ConfigError, match="no fact"):
        execute(full, "recall")


def test_the_older_scripts_commands(full):
    one = do(full, f'ask "{A}" -tokens 5')["continuation"]
    assert one == do(full, f'ask "{A}" -tokens 5')["continuation"]
    assert len(do(full, "general")["general"]) == 5
    assert do(full, "arch")["layers"] == [0, 1, 2]
    assert do(full, "strength")["strength"] == 0.3
    assert do(full, "layer")["layer"] == 0
    assert do(full, f'test "{A}" -expect zzz')["success"] in (True, False)
    assert execute(full, "exit").ends


def test_history_and_help(full):
    execute(full, "list")
    assert execute(full, "history").lines[-1] == "list"
    for _ in range(30):
        execute(full, "layers")
    assert len(execute(full, "history").lines) == 20
    execute(full, "clear-history")
    assert full.history == []
    shown = said(full, "help")
    assert all(f"  {name}" in shown for name in COMMANDS)
    assert "-alpha" in said(full, "help inject-blend")


def test_a_session_is_saved_and_loaded_as_one(full, tmp_path):
    do(full, "track x", "layers 0,1", f"save {tmp_path}/s", "add a b late", "clear")
    other = session(full.model)
    do(other, f"load {tmp_path}/s")
    assert (list(other.bank), other.active, list(other.tracked)) == (["a", "b"], (0, 1), ["x"])
    # What is extracted after loading is what is injected and saved: one session.
    do(other, f'extract c "{A}"', f'inject c "{B}"', "add a b r", f"save {tmp_path}/s")
    do(full, f"load {tmp_path}/s")
    assert list(full.bank) == ["a", "b", "c", "r"]
    do(full, f"save {tmp_path}/m.safetensors c", "delete c", f"load {tmp_path}/m.safetensors")
    assert full.bank["m"].magnitudes() == other.bank["c"].magnitudes()
    assert list(full.bank) == ["a", "b", "r", "m"]


def test_a_session_of_another_checkpoint(full, base, tmp_path):
    do(full, f"save {tmp_path}/s")
    other = session(runner.load(write_npt(tmp_path / "other", npt_tensors(base, {2: MIXED[2]}, seed=8), base=base)))
    shown = said(other, f"load {tmp_path}/s")
    assert "a was taken from another checkpoint" in shown
    assert "of its active layers [0, 1, 2] this model has [2]" in shown
    assert do(other, f'inject a "{B}"')["kl"] > 0
    wide = write_base(tmp_path / "wide", hidden=64)
    third = session(runner.load(write_npt(tmp_path / "third", npt_tensors(wide, {2: MIXED[2]}), base=wide)))
    with pytest.raises(RunnerError, match="layer 0: v_a of gate is 32 wide, this model needs 64"):
        execute(third, f"load {tmp_path}/s")
    assert third.bank == {}


@pytest.mark.parametrize(
    "damage", ["not json", '{"format": "x"}', '{"format": "runner-session/1", "bank": {"a": "../x"}, "tracked": {}}']
)
def test_a_damaged_session_is_refused(full, tmp_path, damage):
    do(full, f"save {tmp_path}/s")
    (tmp_path / "s" / "session.json").write_text(damage)
    with pytest.raises(CheckpointError):
        execute(full, f"load {tmp_path}/s")
    assert list(full.bank) == ["a", "b"]
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError):
            execute(full, f"load {path}")


REFUSED = [
    ("injekt a x", "no command 'injekt'; did you mean 'inject'"), ('inject a "x" -strenght 2', "no option -strenght; did you mean '-strength'"),
    ('list -pos 3', "list has no option -pos"), ('extract x ""', "the text is empty"), ('extract x "a', "quotes do not match"),
    ("extract x", "it is extract NAME"), ("extract x some words here", "texts of several words stand in quotes"),
    ('inject-blend a "x"', "blend needs alpha"), ('inject-blend a "x" -alpha 1.5', "alpha 1.5 is outside"),
    ('inject a "x" -alpha 0.5', "-alpha belongs to blend"), ('inject a "x" -strength 2', "-strength belongs to add"),
    ('compare a "x" -mode blend', "blend needs alpha"), ('inject a "x" -tokens 0', "at least 1"), ('inject a "x" -tokens x', "whole number"),
    ('inject a "x" -tokens 3 -strategy top_k -temp 0', "above 0"), ('inject a "x" -tokens 3 -strategy top_p -top_p 0', "at most 1"),
    ('inject a "x" -tokens 3 -strategy top_p -top_p 1.5', "at most 1"), ('inject a "x" -tokens 3 -strategy top_k -top_k 0', "at least 1"),
    ('inject a "x" -tokens 3 -strategy gredy', "did you mean 'greedy'"), ('inject a "x" -temp 2', "belongs to generation"),
    ('inject a "x" -tokens 300', "160 positions"), ('inject a "x" -space weight', "did you mean 'weights'"), ('inject a "x" -pos', "needs a value"),
    ('inject nobody "x"', "the bank holds a, b"), ("scale a big r", "give a number"), ("layers x", "write them as 1,3"), ("layers 5", "is no NPT layer"),
    ("mode 0 on", "choose npt or standard"), ("strength much", "give a number"), ('inject-multi "x is y" 7', "is no NPT layer"),
    ("write a 9", "not in the modulation"), ("save-model here", "nothing to save"), ("save-model here -form pt", "choose delta, hf"), ("help me", "no command"),
    ('inject a "x" -tokens 3 -pos 1', "last position of each step"), ('inject a "x" -pos mean', "one position"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_refused_line_is_one_line_and_changes_nothing(full, line, says):
    before = (dict(full.bank), dict(full.tracked), full.active, full.layer, full.strength, list(full.history))
    with pytest.raises(RunnerError, match=says) as caught:
        execute(full, line)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    after = (dict(full.bank), dict(full.tracked), full.active, full.layer, full.strength, list(full.history))
    assert [str(each) for each in before] == [str(each) for each in after]
    assert edits_of(full.model) == []


def test_an_error_in_an_injection_leaves_the_next_ones_right(full, monkeypatch):
    before = do(full, f'test "{B}"')["top"]
    monkeypatch.setattr(How, "mixed", lambda self, own, source: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute(full, f'inject a "{B}"')
    monkeypatch.undo()
    assert do(full, f'test "{B}"')["top"] == before
    assert do(full, f'inject a "{B}"')["kl"] == inject(full.model, ids(full, B), full.bank["a"], How()).kl


def test_quotes_and_empty_words():
    command, call = parse('track \'it\'\'s\' "say \\"hi\\"" ""', COMMANDS)
    assert (command.about.startswith("show"), call.words) == (True, ["its", 'say "hi"', ""])


@pytest.mark.parametrize(
    ("percent", "shown"), [(0, "="), (20, "="), (21, "↑"), (-21, "↓"), (101, "↑↑"), (-101, "↓↓"), (-100, "↓")]
)
def test_arrows(percent, shown):
    assert arrow(percent) == shown


@pytest.fixture
def older_tool(monkeypatch):
    """The classes of the older tool, and what makes a modulation of them; they can be imported while it is set up."""
    package = types.ModuleType("interactive_knowledge_transfer")
    core = types.ModuleType("interactive_knowledge_transfer.core")
    module = types.ModuleType("interactive_knowledge_transfer.core.data_types")
    for name in ("SessionState", "ModulationData"):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))
    for each in (package, core, module):
        monkeypatch.setitem(sys.modules, each.__name__, each)

    def modulation(kind, pairs, **more):
        made = module.ModulationData()
        made.__dict__ |= dict.fromkeys(("v_a", "v_b", *(f"v_{s}_{n}" for s in "ab" for n in ("gate", "up", "down"))))
        made.__dict__ |= {
            "name": "temp", "layer_idx": 0, "source_prompt": A, "extraction_position": 3, "timestamp": datetime(2024, 5, 6, 7, 8, 9),
            "modulation_type": kind, "num_ranks": 1, "magnitude": 1.0, **pairs, **more,
        }  # fmt: skip
        return made

    def session(bank, **more):
        made = module.SessionState()
        made.__dict__ |= {
            "modulation_bank": bank, "tracked_tokens": ["x"], "tracked_token_ids": [90], "active_layers": {0, 2},
            "command_history": ["list"], "last_baseline_probs": torch.rand(4), "last_prompt": "x", **more,
        }  # fmt: skip
        return made

    return modulation, session


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_older_tools_pickles_are_records(older_tool, full, tmp_path, protocol, monkeypatch):
    modulation, session_of = older_tool
    storage = torch.randn(1, 2, 4, 32)
    dual = {
        "v_a_gate": storage[:, 1:],
        "v_b_gate": torch.randn(1, 1, 4, 80),
        "v_a_up": torch.randn(1, 1, 4, 32),
        "v_b_up": torch.randn(1, 1, 4, 80),
    }
    single = {"v_a": torch.randn(1, 1, 32), "v_b": torch.randn(1, 1, 80)}
    bank = {
        "one": {0: modulation("single", single), 1: modulation("dual", dual, layer_idx=1)},
        "mean": {0: modulation("single", single, name="averaged", extraction_position=-1)}, "empty": {},
    }  # fmt: skip
    path = tmp_path / "old.pkl"
    path.write_bytes(pickle.dumps(session_of(bank), protocol=protocol))
    monkeypatch.undo()
    found = load_session(path)
    assert "interactive_knowledge_transfer" not in sys.modules
    one = found.bank["one"]
    assert (one.layers, [one.kind(i) for i in one.layers], one.taken) == (
        [0, 1],
        ["single", "dual"],
        "2024-05-06T07:08:09",
    )
    assert torch.equal(one[0]["gate"][0], single["v_a"].reshape(1, 32))
    assert torch.equal(one[1]["gate"][0], storage[0, 1])
    assert (found.active, dict(found.tracked), list(found.history)) == ((0, 2), {"x": 90}, ["list"])
    assert "empty" in found.notes[0]
    assert do(full, f"load {path}", f'inject one "{B}" -space vectors')["kl"] >= 0
    assert list(full.bank) == ["one", "mean"]


class Bomb:
    def __reduce__(self):
        return (print, ("it ran",))


class Attribute:
    def __reduce__(self):
        return (getattr, ("", "join"))


@pytest.mark.parametrize(
    "make", [Bomb, Attribute, OrderedDict, lambda: {"a": 1}, lambda: torch.nn.Linear(2, 2), lambda: [torch.float32]]
)
def test_any_other_pickle_is_refused_and_nothing_runs(tmp_path, capfd, make):
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps(make()))
    with pytest.raises(CheckpointError) as caught:
        original_session(path)
    assert "\n" not in str(caught.value)
    assert "it ran" not in capfd.readouterr().out


def test_damaged_pickles_are_refused(older_tool, tmp_path):
    modulation, session_of = older_tool
    content = pickle.dumps(
        session_of({"a": {0: modulation("single", {"v_a": torch.randn(1, 1, 32), "v_b": torch.randn(1, 1, 80)})}})
    )
    path = tmp_path / "cut.pkl"
    refused = 0
    for cut in range(0, len(content), 37):
        path.write_bytes(content[:cut] + content[cut + 1 :])
        try:
            original_session(path)
        except (CheckpointError, RunnerError):
            refused += 1
    assert refused > 20


def test_settings_are_checked():
    for wrong in ({"space": "x"}, {"controls": "yes"}, {"seed": -1}, {"script": "a", "experiment": "b"}):
        with pytest.raises(ConfigError, match=r"transfer\."):
            Settings(**wrong)


def test_figures_are_json(full):
    for line in (
        "track x",
        f'inject a "{B}"',
        f'inject a "{B}" -tokens 2',
        "info a",
        "list",
        f'map "{A}"',
        f'sweep a "{B}"',
        "write a",
    ):
        json.dumps(execute(full, line).figures)
