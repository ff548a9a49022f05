"""The commands of the bank: tracked tokens, extraction, arithmetic, active layers, files."""

from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, printable
from runner.families.npt import transfer, transfer_files
from runner.families.npt.modulation import SPACES, Modulation
from runner.families.npt.tool.session import (
    Call,
    Command,
    Convert,
    Reply,
    Tool,
    choice,
    layer_list,
    number,
    position,
    switch,
)
from runner.families.npt.transfer import active_layers
from runner.results import JsonObject


def track(tool: Tool, call: Call) -> Reply:
    """Add tokens to those whose probability is shown; alone: list them."""
    found, said = dict(tool.tracked), []
    for text in call.words:
        ids = tool.ids(text, special_tokens=False)
        found[text] = ids[0]
        if len(ids) > 1:
            spaced = tool.ids(f" {text}", special_tokens=False)
            offer = f"; {f' {text}'!r} is one token" if len(spaced) == 1 else ""
            said.append(f"{text!r} is {len(ids)} tokens: the first, {tool.decode(ids[:1])!r}, is tracked{offer}")
    tool.tracked = found
    listed = [f"  {text!r}  id {token}" for text, token in tool.tracked.items()] or ["no token is tracked"]
    return Reply(lines=[*said, *listed], figures={"tracked": dict(tool.tracked)})


def untrack(tool: Tool, call: Call) -> Reply:
    """Remove tracked tokens."""
    for text in call.words:
        if text not in tool.tracked:
            raise ConfigError(f"{text!r} is not tracked; tracked are {', '.join(map(repr, tool.tracked)) or 'none'}")
    tool.tracked = {text: token for text, token in tool.tracked.items() if text not in call.words}
    return Reply(lines=[f"{len(tool.tracked)} tokens are tracked"], figures={"tracked": dict(tool.tracked)})


def clear(tool: Tool, call: Call) -> Reply:
    """Track nothing."""
    tool.tracked = {}
    return Reply(lines=["no token is tracked"])


def extract(tool: Tool, call: Call) -> Reply:
    """Take a modulation at one position, or at several."""
    return _extracted(tool, call, call.get("pos", -1))


def extract_seq(tool: Tool, call: Call) -> Reply:
    """Take the mean of all positions."""
    return _extracted(tool, call, "mean")


def _extracted(tool: Tool, call: Call, where: transfer.Position) -> Reply:
    name, text = call.words
    special = call.get("special", tool.settings.special_tokens)
    ids = tool.ids(text, special)
    answer = tool.ids(call.options["answer"], special_tokens=False)[:1] if "answer" in call.options else []
    m = transfer.extract(tool.model, ids + answer, where, tool.active, text=text, special_tokens=special)
    said = []
    limit = tool.model.config.max_position_embeddings
    if len(ids) > limit:
        said.append(f"{len(ids)} tokens are more than the model's {limit} positions: its rotations go beyond them")
    if where == "mean":
        said.append(f"mean over {len(ids)} tokens")
    lines = tool.keep(name, replace(m, taken=datetime.now().astimezone().isoformat(timespec="seconds")))
    figures = {"tokens": len(ids + answer), **_described(tool.bank[name])}
    return Reply(lines=[*said, *lines], figures=figures)


def _described(m: Modulation) -> JsonObject:
    return {
        "expression": m.expression,
        "space": m.space,
        "sources": [_source(source) for source in m.sources],
        "active_layers": list(m.active),
        "layers": [
            {"layer": layer, "modulation": m.kind(layer), "num_ranks": m.ranks(layer), "magnitude": value}
            for layer, value in m.magnitudes().items()
        ],
        "delta_norms": {str(layer): norms for layer, norms in m.delta_norms().items()},
    }


def _source(source: Any) -> JsonObject:
    text = source.text
    if source.mean and text and not text.startswith("Average of"):
        text = f"Average of {len(source.ids)} tokens from: {text[:50]}..."
    return {"text": text, "position": source.position, "positions": source.count, "ids": list(source.ids)}


def list_bank(tool: Tool, call: Call) -> Reply:
    """The names, with layers, kind, k and source."""
    rows = [
        f"  {name}: {', '.join(f'layer {i} ({m.kind(i)}, k {m.ranks(i)})' for i in m.layers)}; {m.expression}"
        for name, m in tool.bank.items()
    ]
    return Reply(
        lines=[printable(row) for row in rows] or ["the bank is empty"],
        figures={"bank": {name: _described(m) for name, m in tool.bank.items()}},
    )


def info(tool: Tool, call: Call) -> Reply:
    """All about one modulation."""
    m = tool.named(call.words[0])
    lines = [f"{call.words[0]}: {m.expression}", f"  space {m.space}; taken {m.taken or 'at an unknown time'}"]
    for source in m.sources:
        said = _source(source)
        lines.append(f"  source {said['text']!r}, position {said['position']}")
    norms = m.delta_norms()
    for layer, magnitude in m.magnitudes().items():
        shapes = ", ".join(f"{name} {list(v_a.shape)} {list(v_b.shape)}" for name, (v_a, v_b) in m[layer].items())
        deltas = ", ".join(f"{name} {value:.4f}" for name, value in norms[layer].items())
        lines.append(
            f"  layer {layer}: {m.kind(layer)}, k {m.ranks(layer)}, magnitude {magnitude:.4f}, ‖ΔW‖ {deltas}; "
            f"v_a, v_b: {shapes}"
        )
    return Reply(lines=[printable(line) for line in lines], figures=_described(m))


def delete(tool: Tool, call: Call) -> Reply:
    """Remove one from the bank."""
    tool.named(call.words[0])
    del tool.bank[call.words[0]]
    return Reply(lines=[f"{call.words[0]} is gone; {len(tool.bank)} are left"])


def arithmetic(operation: str, tool: Tool, call: Call) -> Reply:
    """Combine modulations of the bank into a new one."""
    *names, result = call.words
    factors: list[float] = []
    if operation == "scale":
        try:
            factors = [number(names.pop())]
        except ValueError as error:
            raise ConfigError(f"scale {call.words[0]} {call.words[1]}: {error}") from error
    parts = [replace(tool.named(name), expression=name) for name in names]
    space = call.get("space", tool.settings.space)
    m = transfer.combine(operation, *parts, *factors, space=space)
    lines = tool.keep(result, replace(m, taken=datetime.now().astimezone().isoformat(timespec="seconds")))
    return Reply(lines=[printable(line) for line in lines], figures=_described(m))


def layers(tool: Tool, call: Call) -> Reply:
    """Show or set which layers are active."""
    if call.words:
        try:
            chosen = layer_list(call.words[0]) if call.words[0] != "all" else tuple(tool.model.npt_layers)
        except ValueError as error:
            raise ConfigError(f"layers {call.words[0]}: write them as 1,3 ({error})") from error
        tool.active = active_layers(tool.model, chosen)
    known = ", ".join(map(str, tool.model.npt_layers))
    return Reply(
        lines=[f"active: {', '.join(map(str, tool.active))}; NPT layers: {known}"],
        figures={"active_layers": list(tool.active)},
    )


def save(tool: Tool, call: Call) -> Reply:
    """Save the session as a directory, or one modulation as a file."""
    target = Path(call.words[0]).expanduser()
    if len(call.words) == 2:
        tool.named(call.words[1]).save(target)
        return Reply(lines=[f"{call.words[1]} is saved as {target}"], figures={"saved": str(target)})
    session = transfer_files.SavedSession(
        bank=tool.bank, tracked=tool.tracked, active=tool.active, history=[*tool.history]
    )
    transfer_files.save_session(session, target)
    return Reply(lines=[f"{len(tool.bank)} modulations are saved in {target}"], figures={"saved": str(target)})


def load(tool: Tool, call: Call) -> Reply:
    """Load a session in place of this one, or one modulation into the bank."""
    path = Path(call.words[0]).expanduser()
    found = transfer_files.load_session(path)
    notes = [*found.notes]
    for name, m in found.bank.items():
        notes += transfer_files.fit(replace(m, expression=name), tool.model)
    if any(not 0 <= token < tool.model.config.vocab_size for token in found.tracked.values()):
        raise ConfigError(f"{path}: tracks a token that this model's vocabulary does not have")
    if path.name.endswith(".safetensors") and not path.is_dir():
        tool.bank.update(found.bank)
    else:
        there = [layer for layer in found.active if layer in tool.model.npt_layers]
        if there != list(found.active):
            notes.append(f"of its active layers {list(found.active)} this model has {there}")
        tool.bank, tool.tracked = dict(found.bank), dict(found.tracked)
        tool.history = [*found.history]
        tool.active = tuple(there) or tool.active
    lines = [f"{len(found.bank)} modulations: {', '.join(found.bank)}", *notes]
    return Reply(lines=[printable(line) for line in lines], figures={"loaded": list(found.bank), "notes": notes})


_SPACE: dict[str, Convert] = {"space": choice(*SPACES)}
_TAKE: dict[str, Convert] = {"special": switch, "answer": str}
COMMANDS: dict[str, Command] = {
    "track": Command(usage="TOKEN…", about="show these tokens' probabilities; alone: list", run=track, most=None),
    "untrack": Command(usage="TOKEN…", about="no longer", run=untrack, least=1, most=None),
    "clear": Command(usage="", about="track nothing", run=clear),
    "extract": Command(
        usage='NAME "TEXT"', about="the modulation at the last position, at -pos N, or at several: -pos -3:; with "
        "-answer, at the first token of an answer after TEXT", run=extract, least=2, most=2,
        options={"pos": position, **_TAKE},
    ),
    "extract-seq": Command(
        usage='NAME "TEXT"', about="the mean over all positions", run=extract_seq, least=2, most=2, options=_TAKE
    ),
    "list": Command(usage="", about="the bank", run=list_bank),
    "info": Command(usage="NAME", about="all about one modulation", run=info, least=1, most=1),
    "delete": Command(usage="NAME", about="remove it", run=delete, least=1, most=1),
    "add": Command(usage="A B RESULT", about="A + B", run=partial(arithmetic, "add"), least=3, most=3, options=_SPACE),
    "subtract": Command(
        usage="A B RESULT", about="A - B", run=partial(arithmetic, "subtract"), least=3, most=3, options=_SPACE
    ),
    "average": Command(
        usage="A B … RESULT", about="the mean of two or more", run=partial(arithmetic, "average"), least=3, most=None,
        options=_SPACE,
    ),
    "scale": Command(
        usage="A FACTOR RESULT", about="FACTOR times ΔW; in space vectors ΔW grows by FACTOR²",
        run=partial(arithmetic, "scale"), least=3, most=3, options=_SPACE,
    ),
    "negate": Command(
        usage="A RESULT", about="-ΔW; in space vectors ΔW stays the same", run=partial(arithmetic, "negate"), least=2,
        most=2, options=_SPACE,
    ),
    "layers": Command(usage="[1,3|all]", about="show or set the active layers", run=layers, most=1),
    "save": Command(
        usage="DIRECTORY | FILE.safetensors NAME", about="the session, or one modulation", run=save, least=1, most=2
    ),
    "load": Command(
        usage="FILE", about="a session in place of this one, also of the older tool; or one modulation", run=load,
        least=1, most=1,
    ),
}  # fmt: skip
