"""What the text of a training script says of its model: read as text, never run.

A published text is known by its hash. Of another one, features tell records apart whose tensors are the same, and it
has numbers that no tensor holds: the size of a head, the scheduled iterations, the end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

from runner.families.gpt.records import RECORDS, Record

# A text that was left out: what stands for it.
_STAND_IN = re.compile(r"modded-nanogpt record=(\S+) sha256=([0-9a-f]{64}) head_dim=(\d+) eot=(\d+)")
_KERNELS = re.compile(r"^#? ?-{20,}\n# triton_kernels\.py$", re.MULTILINE)
_COMMENT = re.compile(r"#[^\n]*")
_LISTS = {
    "paired": r"paired_head_layers = \[([0-9, ]*)\]",
    "xsa": r"xsa_layers = \[([0-9, ]*)\]",
    "composed": r"dc_layers = \[([0-9, ]*)\]",
    "backout": r"backout_layer = ([0-9]+)",
}
_CAPS = {
    "T15": r"15 \* torch\.tanh",
    "T30": r"30 \* torch\.tanh|lm_head_softcap",
    "S30d": r"7\.5 \* x\.size\(-1\)",
    "S30": r"sigmoid\(logits(\.float\(\))? / (logits\.new_tensor\()?7\.5\)",
    "S23": r"23 ?\* ?torch\.sigmoid",
    "R15": r"rsqrt\(logits\.square",
}


@cache
def published() -> Mapping[str, str]:
    """SHA-256 of each published text, without white space at its ends → the record."""
    found = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return {each: name for name, hashes in found.items() for each in hashes}


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a text says; None, or "", where it says nothing. `features`: name → what was found of it.

    `published`: the name of a published text. `whole`: there is the class of the model, so what is not found is not
    there.
    """

    published: str | None = None
    whole: bool = False
    features: Mapping[str, object] = field(default_factory=dict)
    head_dim: int | None = None
    num_heads: int | None = None
    heads_from_width: bool = False
    iterations: int | None = None
    split_share: float = 2 / 3
    end_of_text: int | None = None

    @property
    def record(self) -> Record | None:
        """The record of a published text."""
        return RECORDS.get(self.published or "")

    @property
    def unknown(self) -> str | None:
        """The name of a published text whose model is no record's here."""
        return None if self.record else self.published


def read(code: str | None) -> Script:
    """What `code` says."""
    text = (code or "").strip()
    if stand_in := _STAND_IN.fullmatch(text):
        name, digest, head_dim, end = stand_in.groups()
        if published().get(digest, name) != name:
            name = f"said to be that of {name} with the hash of {published()[digest]}"
        return Script(published=name, head_dim=int(head_dim), end_of_text=int(end))
    name = published().get(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    text = _COMMENT.sub("", _KERNELS.split(text, maxsplit=1)[0])
    head_dim = _numbers(text, r"\bhead_dim ?(?:: ?int ?)?= ?(\d+)")
    num_heads = _numbers(text, r"\b(?:num_heads|n_head) ?(?:: ?int ?)?= ?(\d+)")
    iterations = _numbers(text, r"\bnum_scheduled_iterations ?(?:: ?int ?)?= ?(\d+)")
    iterations = iterations or _numbers(text, r"\bnum_iterations ?(?:: ?int ?)?= ?(\d+)")
    end = _numbers(text, r"\bBOS_ID ?= ?(\d+)") or _numbers(text, r"== ?(\d{2,})\)\.cumsum")
    split = re.search(r"\bsplit_embed_frac ?(?:: ?float ?)?= ?([0-9]+(?:/[0-9]+)*)", text)
    return Script(
        published=name,
        whole=re.search(r"^class GPT\b", text, re.MULTILINE) is not None,
        features=_features(text),
        head_dim=head_dim[-1] if head_dim else None,
        num_heads=num_heads[-1] if num_heads else None,
        heads_from_width=re.search(r"\bhead_dim = dim // num_heads", text) is not None,
        iterations=iterations[0] if iterations else None,
        split_share=_share(split[1]) if split else 2 / 3,
        end_of_text=end[0] if end else None,
    )


def contradictions(script: Script, record: Record) -> list[str]:
    """What the script's features say against the record; what a part of a script does not hold, it does not deny."""
    expected: dict[str, object] = {
        "cap": record.cap,
        "tied": record.tied,
        "half": record.value_mix == "half",
        "rotary": record.rotary,
        "yarn": bool(record.yarn),
        "sigmoid skips": record.sigmoid_skips,
        "block 0 not run": bool(record.not_run),
        "offset": record.offset,
        "gate of 6+6": record.value_gate != "input",
        "injection before attention": False,
        "paired": record.paired,
        "xsa": record.xsa,
        "composed": (10,) if record.mudd == "gated" else (),
        "backout": () if record.backout is None else (record.backout,),
    }
    if record.backout == 8:  # elsewhere the same words mean other things
        expected["one skip into 7"] = not isinstance(record.skips, str) and 7 in record.skips and len(record.skips) == 1
    wrong = []
    for name, wanted in expected.items():
        found = script.features.get(name)
        if found is None and not (script.whole and name == "paired" and wanted):
            continue
        if found != wanted and (found or script.whole):
            wrong.append(f"{name} {_word(found)}, not {_word(wanted)}")
    return wrong


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return f"in {', '.join(map(str, value))}" if value else "nowhere"
    return {True: "yes", False: "no", "": "none", None: "nowhere"}.get(value, str(value))


def _numbers(text: str, pattern: str) -> list[int]:
    return [int(found) for found in re.findall(pattern, text) if len(found) < 10]


def _share(text: str) -> float:
    """2/3/4 → 1/6."""
    first, *others = map(int, text.split("/"))
    share = Fraction(first)
    for other in others:
        share /= other or 1
    return float(share)


def _features(text: str) -> dict[str, object]:
    """The features of §8 of the records' description, of a text without comments."""
    found: dict[str, object] = {
        "cap": next((cap for cap, pattern in _CAPS.items() if re.search(pattern, text)), ""),
        "tied": "wte.weight = self.lm_head" in text,
        "half": re.search(r"lamb = 0\.5", text) is not None,
        "rotary": _rotary(text),
        "yarn": re.search(r"def apply_yarn\(|class Yarn", text) is not None,
        "sigmoid skips": re.search(r"torch\.sigmoid\(skip_", text) is not None,
        "one skip into 7": re.search(r"if i ?== ?7:|skip_out = \[7\]", text) is not None,
        "block 0 not run": re.search(r"range\(1, ?len\(self\.blocks\)\)", text) is not None,
        "offset": "",
        "gate of 6+6": re.search(r"\[\.\.\., :6\]", text) is not None,
        "injection before attention": re.search(r"lane0 = lane0 \+ x0_inject", text) is not None,
    }
    if re.search(r"head_dim ?// ?4: ?self", text):
        found["offset"] = "O1"
    elif re.search(r", self\.head_dim ?// ?2:\] = k", text):
        found["offset"] = "O2"
    for name, pattern in _LISTS.items():
        if match := re.search(pattern, text):
            found[name] = tuple(int(each) for each in re.findall(r"\d+", match[1]))
    return found


def _rotary(text: str) -> str:
    if re.search(r"base=10000", text):
        return "F"
    if not re.search(r"1 ?/ ?1024", text):
        return ""
    return "I" if re.search(r"repeat_interleave\(2\)", text) else "H"
