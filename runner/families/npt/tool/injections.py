"""The commands that run a text: without injection, with one, for some tokens, by strength and by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from runner.errors import ConfigError, printable
from runner.families.npt import transfer, transfer_measures
from runner.families.npt.modulation import SPACES, Modulation
from runner.families.npt.tool.session import (
    KEPT,
    SHOWN,
    Call,
    Command,
    Reply,
    Tool,
    choice,
    number,
    numbers,
    position,
    share,
    token_lines,
    whole,
)
from runner.families.npt.transfer_injection import MODES, How, Injection, Reader, continued, inject, kl_divergence
from runner.families.npt.transfer_permanent import edits_of, unwritten
from runner.metrics.generation import Sampling
from runner.results import JsonObject

# What is tried by `sweep` where nothing else is said.
_STRENGTHS = [step / 4 for step in range(9)]
_GENERATION_BOUNDS = {"one": 10.0, "two": 50.0}
_STRATEGIES = ("greedy", "top_k", "top_p", "sample")


def test(tool: Tool, call: Call) -> Reply:
    """The next token without injection; beside it that with the first weights, where something was written."""
    text = call.words[0]
    ids = transfer.check_ids(tool.model, tool.ids(text))
    reader = Reader(tool.model, None, How(), tool.active, cached=False)
    logits = reader.plain(ids)
    written = edits_of(tool.model) and tool.model.first_weights
    before = logits
    if written:
        with unwritten(tool.model):
            before = reader.plain(ids)
    found = _as_injection(before, logits)
    rows, tracked = tool.top_rows(found), tool.tracked_rows(found)
    figures: JsonObject = {"text": text, "top": rows, "tracked": tracked, "written": bool(written), "kl": found.kl}
    title = f"{text!r}, layers {_shown(tool.active)}" + (", first weights → as written" if written else "")
    lines = [title, *_plain_lines(rows[:SHOWN], bool(written)), *_tracked_lines(tracked, bool(written))]
    if expected := call.get("expect"):
        answer = _answered(tool, tool.ids(text), expected)
        figures |= answer
        lines.append(f"  continues {answer['continuation']!r}: {'as' if answer['success'] else 'not as'} expected")
    return Reply(lines=[printable(line) for line in lines], figures=figures)


def _as_injection(before: torch.Tensor, after: torch.Tensor) -> Injection:
    return Injection(logits=after, baseline=before, kl=kl_divergence(before, after), all_logits=after[None])


def _answered(tool: Tool, ids: Sequence[int], expected: str) -> JsonObject:
    said = tool.continuation(ids, 50)
    return {"continuation": said, "expected": expected, "success": expected.lower() in said.lower()}


def _plain_lines(rows: Sequence[Mapping[str, Any]], changed: bool) -> list[str]:
    return token_lines(rows) if changed else [f"  {row['text']!r}  {share(row['injected'])}" for row in rows]


def _tracked_lines(rows: Sequence[Mapping[str, Any]], changed: bool) -> list[str]:
    return ["  tracked", *_plain_lines(rows, changed)] if rows else []


def _shown(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def injection(mode: str, tool: Tool, call: Call) -> Reply:
    """Read a text with a modulation at one position, or let it go on for some tokens."""
    name, text = call.words
    m, how = tool.named(name), _how(mode, tool, call)
    tokens = call.get("tokens", 1)
    if tokens < 1:
        raise ConfigError(f"-tokens {tokens}: give a whole number, at least 1")
    if tokens > 1:
        return _generated(tool, call, m, how, text, tokens)
    for option in ("strategy", "temp", "top_k", "top_p", "seed"):
        if option in call.options:
            raise ConfigError(f"-{option} belongs to generation: give -tokens N with N above 1, too")
    ids, where = tool.ids(text), call.get("pos", -1)
    if not isinstance(where, int):
        raise ConfigError("-pos of an injection is one position, a whole number")
    found = inject(tool.model, ids, m, how, where, tool.active)
    figures = _injected_figures(tool, name, how, text, found) | {"position": where}
    rows = figures["top"][:SHOWN]
    lines = [
        f"{name} into {text!r} ({_said(how)}), layers {_shown(tool.active)}: KL {found.kl:.4f} nats",
        *token_lines(rows),
        *_tracked_lines(figures["tracked"], True),
        *[f"  {note}" for note in found.notes],
    ]
    if tool.settings.controls:
        figures["controls"] = transfer_measures.controls(
            tool.model, ids, m, how, tool.active, tracked=tool.tracked, others=_others(tool), seed=tool.settings.seed,
            position=where,
        )  # fmt: skip
        lines += _control_lines(figures["controls"])
    return Reply(lines=[printable(line) for line in lines], figures=figures)


def _others(tool: Tool) -> dict[str, list[int]]:
    return {text: tool.ids(text) for text in tool.unrelated}


def _how(mode: str, tool: Tool, call: Call) -> How:
    mode = call.get("mode", mode)
    for option, owner in (("alpha", "blend"), ("strength", "add")):
        if option in call.options and mode != owner:
            raise ConfigError(f"-{option} belongs to {owner}, not to {mode}")
    return How(
        mode=mode,
        alpha=call.get("alpha"),
        strength=call.get("strength", 1.0),
        space=call.get("space", tool.settings.space),
    )


def _said(how: How) -> str:
    number = {"blend": f", alpha {how.alpha}", "add": f", strength {how.strength:g}"}.get(how.mode, "")
    return f"{how.mode}{number}, {how.space}"


def _injected_figures(tool: Tool, name: str, how: How, text: str, found: Injection) -> JsonObject:
    return {
        "modulation": name,
        **vars(how),
        "text": text,
        "active_layers": list(tool.active),
        "kl": found.kl,
        "top": tool.top_rows(found, KEPT),
        "tracked": tool.tracked_rows(found),
        "notes": list(found.notes),
    }


def _control_lines(found: JsonObject) -> list[str]:
    lines = [f"  control: the same vectors permuted, KL {found['permuted']['kl']:.4f}"]
    if other := found.get("other_prompt"):
        lines.append(f"  control: the modulation of {other['prompt']!r}, KL {other['kl']:.4f}")
    if where := found.get("locality"):
        lines.append(f"  locality: KL {where['kl']:.4f} on {len(where['prompts'])} other prompts")
    return lines


def _sampling(call: Call) -> Sampling:
    strategy, temperature = call.get("strategy", "greedy"), call.get("temp", 1.0)
    if strategy == "greedy":
        return Sampling()
    if temperature <= 0:
        raise ConfigError(f"-temp {temperature}: sampling needs a number above 0")
    top_k, top_p = call.get("top_k", 50), call.get("top_p", 0.9)
    if top_k < 1:
        raise ConfigError(f"-top_k {top_k}: give a whole number, at least 1")
    if not 0 < top_p <= 1:
        raise ConfigError(f"-top_p {top_p}: give a number above 0, at most 1")
    return Sampling(temperature=temperature, **({"top_p": top_p} if strategy == "top_p" else {"top_k": top_k}))


def _generated(tool: Tool, call: Call, m: Modulation, how: How, text: str, tokens: int) -> Reply:
    ids, sampling = tool.ids(text), _sampling(call)
    if "pos" in call.options:
        raise ConfigError("-pos: generation injects at the last position of each step")
    steps: list[JsonObject] = []
    notes: tuple[str, ...] = ()
    seed = call.get("seed", tool.settings.seed)
    for token, found in continued(
        tool.model, ids, m, how, tokens, tool.active, sampling=sampling, seed=seed, eos=tool.eos
    ):
        row = found.row(token)
        notes = found.notes
        steps.append({"text": tool.decode([token]), **row, "kl": found.kl, "tracked": tool.tracked_rows(found)})
    kls = [step["kl"] for step in steps]
    figures: JsonObject = {
        "modulation": call.words[0],
        **vars(how),
        "text": text,
        "active_layers": list(tool.active),
        "sampling": {**vars(sampling), "seed": seed},
        "new_ids": [step["token"] for step in steps],
        "continuation": tool.decode([int(step["token"]) for step in steps]),
        "steps": steps,
        "kl_mean": sum(kls) / len(kls),
        "kl_max": max(kls),
        "kl_min": min(kls),
        "kl_last": kls[-1],
        "notes": list(notes),
    }
    lines = [f"{call.words[0]} into {text!r} ({_said(how)}), layers {_shown(tool.active)}: {len(steps)} tokens"]
    for step, shown in zip(steps, token_lines(steps, **_GENERATION_BOUNDS), strict=True):
        lines.append(f"{shown}  KL {step['kl']:.4f}")
        lines += [f"  {each}" for each in token_lines(step["tracked"], **_GENERATION_BOUNDS)]
    means = f"KL mean {figures['kl_mean']:.4f}, max {figures['kl_max']:.4f}, min {figures['kl_min']:.4f}"
    lines += [f"  {figures['continuation']!r}", f"  {means}, last {figures['kl_last']:.4f}", *notes]
    return Reply(lines=[printable(line) for line in lines], figures=figures)


def compare(tool: Tool, call: Call) -> Reply:
    """The most probable tokens without and with a modulation, side by side."""
    name, text = call.words
    how = _how("replace", tool, call)
    found = inject(tool.model, tool.ids(text), tool.named(name), how, -1, tool.active)
    figures = _injected_figures(tool, name, how, text, found)
    swapped = replace(found, logits=found.baseline, baseline=found.logits)
    figures["baseline_top"] = [
        {"text": row["text"], "token": row["token"], "baseline": row["injected"]}
        for row in tool.top_rows(swapped, KEPT)
    ]
    left = [f"{row['text']!r} {share(row['baseline'])}" for row in figures["baseline_top"][:SHOWN]]
    right = [f"{row['text']!r} {share(row['injected'])}" for row in figures["top"][:SHOWN]]
    width = max(map(len, left))
    lines = [f"{text!r}: baseline | {name} ({_said(how)}), KL {found.kl:.4f} nats"]
    lines += [f"  {one.ljust(width)} | {two}" for one, two in zip(left, right, strict=True)]
    lines += [*_tracked_lines(figures["tracked"], True), *[f"  {note}" for note in found.notes]]
    return Reply(lines=[printable(line) for line in lines], figures=figures)


def sweep(tool: Tool, call: Call) -> Reply:
    """Add-injection by strength, and replace by layer alone: the curves of the page."""
    name, text = call.words
    m, ids = tool.named(name), tool.ids(text)
    space = call.get("space", tool.settings.space)
    rows = transfer_measures.by_strength(
        tool.model, ids, m, call.get("strengths", _STRENGTHS), space, tool.active, tracked=tool.tracked,
        seed=tool.settings.seed,
    )  # fmt: skip
    each = transfer_measures.by_layer(tool.model, ids, m, How(space=space), tool.active, tracked=tool.tracked)
    lines = [f"{name} into {text!r} ({space}): by strength (add), KL and that of its vectors permuted"]
    lines += [f"  {row['strength']:g}  {row['kl']:.4f}  {row['permuted_kl']:.4f}" for row in rows]
    lines += ["by layer (replace, one at a time)", *[f"  {row['layer']}  KL {row['kl']:.4f}" for row in each]]
    figures = {"modulation": name, "text": text, "space": space, "by_strength": rows, "by_layer": each}
    return Reply(lines=[printable(line) for line in lines], figures=figures)


def delta_map(tool: Tool, call: Call) -> Reply:
    """‖ΔW‖ by layer and position of a text."""
    text = call.words[0]
    ids = tool.ids(text)
    rows = transfer_measures.delta_map(tool.model, ids, tool.active)
    tokens = [tool.decode([token]) for token in ids]
    lines = [f"‖ΔW‖ at each token of {text!r}: {' '.join(map(repr, tokens))}"]
    lines += [f"  layer {row['layer']}: {' '.join(f'{value:.3g}' for value in row['norms'])}" for row in rows]
    return Reply(lines=[printable(line) for line in lines], figures={"text": text, "tokens": tokens, "delta_map": rows})


_SPACE: dict[str, Callable[[str], Any]] = {"space": choice(*SPACES)}
_MIX = {"alpha": number, "strength": number, **_SPACE}
_INJECT = {
    **_MIX, "pos": position, "tokens": whole, "strategy": choice(*_STRATEGIES), "temp": number, "top_k": whole,
    "top_p": number, "seed": whole,
}  # fmt: skip
COMMANDS: dict[str, Command] = {
    "test": Command(
        usage='"TEXT"', about="the next token without injection; -expect ANSWER: whether the continuation holds it",
        run=test, least=1, most=1, options={"expect": str},
    ),
    "inject": Command(
        usage='NAME "TEXT"', about="with NAME in place of its own modulation; -tokens N goes on for N tokens",
        run=partial(injection, "replace"), least=2, most=2, options=_INJECT,
    ),
    "inject-blend": Command(
        usage='NAME "TEXT" -alpha X', about="(1-X) of its own and X of NAME", run=partial(injection, "blend"), least=2,
        most=2, options=_INJECT,
    ),
    "inject-add": Command(
        usage='NAME "TEXT"', about="its own and -strength times NAME", run=partial(injection, "add"), least=2, most=2,
        options=_INJECT,
    ),
    "compare": Command(
        usage='NAME "TEXT"', about="baseline and injected side by side", run=compare, least=2, most=2,
        options={"mode": choice(*MODES), **_MIX},
    ),
    "sweep": Command(
        usage='NAME "TEXT"', about="by strength, and by layer: curves for the page", run=sweep, least=2, most=2,
        options={"strengths": numbers, **_SPACE},
    ),
    "map": Command(usage='"TEXT"', about="‖ΔW‖ by layer and position: a map for the page", run=delta_map, least=1,
        most=1),
}  # fmt: skip
