"""Sessions on disk: ours, a directory of modulations with `session.json`, and the pickles of the older tool."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch

from runner.errors import CheckpointError, ModelError
from runner.families.npt.model import PROJECTIONS, NptLlamaForCausalLM
from runner.families.npt.modulation import KINDS, Modulation, Pair, Source, checked, identity, load
from runner.files.python_pickle import Instance, read_records
from runner.files.staging import staged
from runner.files.strict_json import read_object

FORMAT, SESSION = "runner-session/1", "session.json"
_LIMIT = 64 << 20
# Where the classes of the older tool lie: in its package, or in the single script that it was before.
_MODULES = ("interactive_knowledge_transfer.core.data_types", "__main__")
_CLASSES = tuple(f"{module}.{name}" for module in _MODULES for name in ("SessionState", "ModulationData"))


@dataclass(frozen=True, kw_only=True)
class SavedSession:
    """What a session holds beside the model. `tracked`: texts and their token ids; `notes`: what is to be said."""

    bank: Mapping[str, Modulation] = field(default_factory=dict)
    tracked: Mapping[str, int] = field(default_factory=dict)
    active: tuple[int, ...] = ()
    history: Sequence[str] = ()
    notes: Sequence[str] = ()


def fit(m: Modulation, model: NptLlamaForCausalLM) -> list[str]:
    """What is to be said of a loaded modulation. Raises ModelError where it is of another width than the model."""
    d, f = model.config.hidden_size, model.config.intermediate_size
    for layer, pairs in m.vectors.items():
        for name, pair in pairs.items():
            for side, tensor, width in zip(("v_a", "v_b"), pair, (f, d) if name == "down" else (d, f), strict=True):
                if tensor.shape[-1] != width:
                    raise ModelError(
                        f"layer {layer}: {side} of {name} is {tensor.shape[-1]} wide, this model needs {width}"
                    )
    theirs, ours = identity(m.origin), identity(model.origin)
    if theirs.get("checkpoint_sha256") not in (None, ours.get("checkpoint_sha256")):
        return [f"{m.expression} was taken from another checkpoint: {theirs.get('checkpoint')}"]
    return []


def save_session(session: SavedSession, target: Path) -> None:
    """Write it as the directory `target`, in place of a session only. Raises CheckpointError or RunnerError."""
    files = {name: f"modulation-{i}.safetensors" for i, name in enumerate(session.bank)}
    content = {
        "format": FORMAT,
        "tracked": dict(session.tracked),
        "active_layers": session.active,
        "history": list(session.history),
        "bank": files,
    }
    with staged(target, replace=(target / SESSION).is_file()) as directory:
        for name, file in files.items():
            (directory / file).write_bytes(session.bank[name].to_bytes())
        (directory / SESSION).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_session(path: Path) -> SavedSession:
    """A session of ours (a directory), one modulation (a safetensors file), or a session of the older tool (a pickle).

    Raises CheckpointError for anything else.
    """
    if path.is_dir():
        return _own_session(path)
    if path.name.endswith(".safetensors"):
        return SavedSession(bank={path.stem: load(path)})
    return original_session(path)


def _own_session(path: Path) -> SavedSession:
    if not (path / SESSION).is_file():
        raise CheckpointError(f"{path}: is no session: it has no {SESSION}")
    said = read_object(path / SESSION, SESSION, _LIMIT)
    bank, tracked = said.get("bank"), said.get("tracked")
    if said.get("format") != FORMAT or not isinstance(bank, dict) or not isinstance(tracked, dict):
        raise CheckpointError(f"{path / SESSION}: is no session of the format {FORMAT}")
    files = {str(name): str(file) for name, file in bank.items()}
    if wrong := [file for file in files.values() if Path(file).name != file]:
        raise CheckpointError(f"{path / SESSION}: {wrong[0]} lies outside the session")
    return SavedSession(
        bank={name: load(path / file) for name, file in files.items()},
        tracked={text: token for text, token in tracked.items() if type(token) is int},
        active=tuple(layer for layer in said.get("active_layers", ()) if type(layer) is int),
        history=tuple(map(str, said.get("history", ()))),
    )


def original_session(path: Path) -> SavedSession:
    """A session of the older tool, whose pickle is read without running anything. Raises CheckpointError."""
    session = read_records(path, _CLASSES)
    if not isinstance(session, Instance) or not session.name.endswith(".SessionState"):
        raise CheckpointError(f"{path}: is no session of the interactive tool")
    try:
        state = session.state
        bank = {str(name): _original(str(name), layers) for name, layers in state["modulation_bank"].items()}
        tracked = dict(zip(map(str, state["tracked_tokens"]), map(int, state["tracked_token_ids"]), strict=True))
        active = tuple(sorted(map(int, state["active_layers"])))
        history = tuple(map(str, state["command_history"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no whole session of the interactive tool ({error})") from error
    empty = sorted(name for name, m in bank.items() if not m.vectors)
    bank = {name: checked(replace(m, active=active), f"{path}: {name}") for name, m in bank.items() if m.vectors}
    notes = [f"{name} is empty: left out" for name in empty]
    return SavedSession(bank=bank, tracked=tracked, active=active, history=history, notes=notes)


def _original(name: str, layers: Mapping[int, Instance]) -> Modulation:
    vectors: dict[int, dict[str, Pair]] = {}
    for layer, record in sorted(layers.items()):
        state = record.state
        for projection, end in zip(PROJECTIONS, ("_gate", "_up", "_down"), strict=True):
            single = state["modulation_type"] == KINDS[0] and projection == "gate"
            pair = [state[f"{side}{'' if single else end}"] for side in ("v_a", "v_b")]
            if all(isinstance(tensor, torch.Tensor) for tensor in pair):
                v_a, v_b = (tensor.reshape(-1, tensor.shape[-1]) for tensor in pair)
                vectors.setdefault(int(layer), {})[projection] = (v_a, v_b)
    first = next(iter(layers.values())).state if layers else {}
    text, position = first.get("source_prompt"), int(first.get("extraction_position", -1))
    source = Source(text=str(text), ids=(), position=position, mean=position < 0)
    return Modulation(
        vectors=vectors,
        active=(),
        expression=str(text) if position < 0 else name,
        sources=(source,),
        taken=_time(first.get("timestamp")),
    )


def _time(stamp: object) -> str:
    """The ten bytes in which Python pickles a time, as ISO 8601."""
    if not isinstance(stamp, bytes) or len(stamp) != 10:
        return ""
    year, month, day, hour, minute, second = (stamp[0] << 8 | stamp[1], *stamp[2:7])
    try:
        return datetime(year, month & 0x7F, day, hour, minute, second).isoformat()
    except ValueError:
        return ""
