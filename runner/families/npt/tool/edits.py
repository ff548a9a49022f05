"""The commands that write into the weights, and those of the older scripts around them."""

from collections.abc import Collection
from pathlib import Path

from runner.errors import ConfigError, printable
from runner.families.npt import transfer
from runner.families.npt.modulation import Modulation
from runner.families.npt.tool.session import (
    Call,
    Command,
    Reply,
    Tool,
    choice,
    layer_list,
    number,
    position,
    switch,
    whole,
)
from runner.families.npt.transfer import active_layers
from runner.families.npt.transfer_permanent import FORMS, apply, edits_of, reset, save_edited
from runner.metrics.generation import Sampling

_GENERAL = (
    "The capital of France is", "2 + 2 equals", "The largest planet in our solar system is", "Water freezes at",
    "The opposite of hot is",
)  # fmt: skip
_ASKED = Sampling(temperature=0.7, top_p=0.9)
_NEW_TOKENS = 50


def ask(tool: Tool, call: Call) -> Reply:
    """A sampled continuation."""
    text = tool.continuation(tool.ids(call.words[0]), call.get("tokens", _NEW_TOKENS), _ASKED)
    return Reply(lines=[printable(text)], figures={"text": call.words[0], "continuation": text})


def write(tool: Tool, call: Call) -> Reply:
    """Write a modulation of the bank into some layers for good."""
    m = tool.named(call.words[0])
    return _written(tool, call, m, _layers(call.words[1]) if len(call.words) > 1 else None)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return layer_list(text)
    except ValueError as error:
        raise ConfigError(f"{text}: layers are written as 1,3 ({error})") from error


def write_fact(tool: Tool, call: Call) -> Reply:
    """Extract a fact and write it into the current layer."""
    return _fact(tool, call, [tool.layer])


def write_all(tool: Tool, call: Call) -> Reply:
    """Extract a fact and write it into all active layers."""
    return _fact(tool, call, tool.active)


def write_some(tool: Tool, call: Call) -> Reply:
    """Extract a fact and write it into some layers."""
    return _fact(tool, call, active_layers(tool.model, _layers(call.words[1])))


def _fact(tool: Tool, call: Call, layers: Collection[int]) -> Reply:
    text, special = call.words[0], call.get("special", tool.settings.special_tokens)
    if missing := [layer for layer in layers if layer not in tool.active]:
        raise ConfigError(f"layer {missing[0]} is not active; active are {', '.join(map(str, tool.active))}")
    ids = tool.ids(text, special)
    where = call.get("pos", -1)
    m = transfer.extract(tool.model, ids, where, tool.active, text=text, special_tokens=special)
    return _written(tool, call, m, layers)


def _written(tool: Tool, call: Call, m: Modulation, layers: Collection[int] | None) -> Reply:
    strength = call.get("strength", tool.strength)
    edit = apply(tool.model, m, layers, strength, sequential=call.get("sequential", False))
    lines = [f"written, strength {edit.strength:g}: {edit.expression}"]
    lines += [
        f"  layer {row['layer']} {row['projection']}: ‖ΔW‖ {row['delta_norm']:.4f}, of ‖W‖ {row['relative']:.2%}"
        for row in edit.matrices
    ]
    return Reply(lines=[printable(line) for line in lines], figures={"edit": edit.values()})


def undo(tool: Tool, call: Call) -> Reply:
    """The first weights of some layers, or of all."""
    chosen = _layers(call.words[0]) if call.words else None
    given = reset(tool.model, chosen)
    said = f"first weights in layers {', '.join(map(str, given))}" if given else "nothing was written there"
    return Reply(lines=[said], figures={"reset": given})


def edits(tool: Tool, call: Call) -> Reply:
    """What was written, in order."""
    found = edits_of(tool.model)
    lines = [
        f"  {i}. {edit.expression}: layers {', '.join(map(str, edit.layers))}, strength {edit.strength:g}"
        for i, edit in enumerate(found, 1)
    ]
    return Reply(
        lines=[printable(line) for line in lines] or ["nothing was written"],
        figures={"edits": [edit.values() for edit in found]},
    )


def save_model(tool: Tool, call: Call) -> Reply:
    """Save the edited model."""
    target = Path(call.words[0]).expanduser()
    save_edited(tool.model, target, call.get("form", "delta"))
    return Reply(lines=[f"saved; ckpt={target} opens it"], figures={"saved": str(target)})


def strength(tool: Tool, call: Call) -> Reply:
    """Show or set how much is written."""
    if call.words:
        try:
            tool.strength = number(call.words[0])
        except ValueError as error:
            raise ConfigError(f"strength {call.words[0]}: {error}") from error
    return Reply(lines=[f"strength {tool.strength:g}"], figures={"strength": tool.strength})


def layer(tool: Tool, call: Call) -> Reply:
    """Show or set into which layer a fact is written."""
    if call.words:
        (tool.layer,) = active_layers(tool.model, _layers(call.words[0])[:1])
    return Reply(lines=[f"layer {tool.layer}"], figures={"layer": tool.layer})


def mode(tool: Tool, call: Call) -> Reply:
    """Let one layer modulate, or not."""
    (chosen,) = active_layers(tool.model, _layers(call.words[0])[:1])
    wanted = call.words[1] if len(call.words) > 1 else None
    if wanted not in (None, "npt", "standard"):
        raise ConfigError(f"mode {chosen} {wanted}: choose npt or standard")
    on = chosen not in tool.active if wanted is None else wanted == "npt"
    tool.active = active_layers(tool.model, {*tool.active, chosen} if on else {*tool.active} - {chosen})
    return modes(tool, call)


def modes(tool: Tool, call: Call) -> Reply:
    """How each NPT layer runs."""
    states = {index: "npt" if index in tool.active else "standard" for index in tool.model.npt_layers}
    return Reply(
        lines=[f"  layer {index}: {state}" for index, state in states.items()],
        figures={"modes": {str(index): state for index, state in states.items()}},
    )


def arch(tool: Tool, call: Call) -> Reply:
    """What the model is."""
    config = tool.model.config
    lines = [f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, MLP {config.intermediate_size}"]
    for index, each in tool.model.npt_layers.items():
        update = transfer.update_of(each, "gate")
        lines.append(f"  layer {index}: {each.modulation}, r {update.np_rank}, k {update.num_ranks}")
    return Reply(lines=lines, figures={"layers": list(tool.model.npt_layers)})


def status(tool: Tool, call: Call) -> Reply:
    """What is in this session."""
    lines = [
        f"active layers {', '.join(map(str, tool.active))}; space {tool.settings.space}",
        f"{len(tool.bank)} modulations, {len(tool.tracked)} tracked tokens, {len(edits_of(tool.model))} edits",
    ]
    return Reply(lines=lines, figures={"edits": len(edits_of(tool.model)), "bank": list(tool.bank)})


def recall(tool: Tool, call: Call) -> Reply:
    """Ask for every fact that was written, split at its first "is"."""
    rows = []
    for edit in edits_of(tool.model):
        for fact in edit.texts:
            subject, found, answer = fact.partition(" is ")
            if not found or not answer.strip(" ."):
                continue
            for prompt in (f"What is {subject}?", f"{subject} is", f"Tell me about {subject}."):
                said = tool.continuation(tool.ids(prompt), _NEW_TOKENS)
                success = answer.strip(" .").lower() in said.lower()
                rows.append({"fact": fact, "prompt": prompt, "continuation": said, "success": success})
    if not rows:
        raise ConfigError('no fact of the form "X is Y" was written')
    good = sum(row["success"] is True for row in rows)
    lines = [f"  {'+' if row['success'] else '-'} {row['prompt']} {row['continuation']!r}" for row in rows]
    figures = {"recall": rows, "recalled": good / len(rows)}
    return Reply(lines=[printable(x) for x in [*lines, f"{good} of {len(rows)}"]], figures=figures)


def general(tool: Tool, call: Call) -> Reply:
    """Five fixed questions, to see what else changed."""
    rows = [{"prompt": text, "continuation": tool.continuation(tool.ids(text), _NEW_TOKENS)} for text in _GENERAL]
    return Reply(
        lines=[printable(f"  {row['prompt']} {row['continuation']!r}") for row in rows], figures={"general": rows}
    )


_WRITE = {"strength": number, "sequential": switch}
_FACT = {**_WRITE, "pos": position, "special": switch}
COMMANDS: dict[str, Command] = {
    "write": Command(
        usage="NAME [1,3]", about="add strength times ΔW to the MLPs for good; -sequential true: layer by layer, each "
        "extracted again", run=write, least=1, most=2, options=_WRITE,
    ),
    "inject-one": Command(
        usage='"FACT"', about="extract (-pos last, first, all) and write into the current layer", run=write_fact,
        least=1, most=1, options=_FACT,
    ),
    "inject-all": Command(
        usage='"FACT"', about="into all active layers", run=write_all, least=1, most=1, options=_FACT
    ),
    "inject-multi": Command(
        usage='"FACT" 1,3', about="into these layers", run=write_some, least=2, most=2, options=_FACT
    ),
    "edits": Command(usage="", about="what was written, in order", run=edits),
    "reset": Command(usage="[1,3]", about="give the first weights back", run=undo, most=1),
    "reset-all": Command(usage="", about="all of them", run=undo),
    "save-model": Command(
        usage="DIRECTORY", about="the edited model, which ckpt= opens: -form delta (factors) or hf (a whole base)",
        run=save_model, least=1, most=1, options={"form": choice(*FORMS)},
    ),
    "strength": Command(usage="[X]", about="how much is written", run=strength, most=1),
    "layer": Command(usage="[I]", about="into which layer a fact is written", run=layer, most=1),
    "mode": Command(usage="I [npt|standard]", about="let one layer modulate or not", run=mode, least=1, most=2),
    "modes": Command(usage="", about="how each NPT layer runs", run=modes),
    "arch": Command(usage="", about="what the model is", run=arch),
    "status": Command(usage="", about="what is in this session", run=status),
    "ask": Command(usage='"TEXT"', about="a sampled continuation", run=ask, least=1, most=1, options={"tokens": whole}),
    "recall": Command(usage="", about='ask for the facts "X is Y" that were written', run=recall),
    "general": Command(usage="", about="five fixed questions", run=general),
}  # fmt: skip
