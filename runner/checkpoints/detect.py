"""Which format a checkpoint has, decided from names and shapes alone."""

import json
from pathlib import Path
from typing import Any

from runner.checkpoints import npt_delta
from runner.checkpoints.checkpoint import Checkpoint, Listing
from runner.checkpoints.pickles import load_pickle
from runner.checkpoints.runs import step_in_name
from runner.errors import CheckpointError, ConfigError

FORMATS = {npt_delta.NAME: npt_delta}
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
NOT_WEIGHTS = ("training_state.pt", "multi_layer_state.pt", "training_info.pt", "optimizer.pt", "scheduler.pt")


def open_checkpoint(path: Path, format_name: str = "auto") -> Checkpoint:
    """The checkpoint at `path`. Raises CheckpointError where there is none, or where several files could be it."""
    if format_name not in ("auto", *FORMATS):
        raise ConfigError(f"format={format_name} cannot be opened yet; formats are {', '.join(FORMATS)}")
    listing = Listing.of(path)
    name = _weights_file(listing)
    weights = listing.weights(name)
    layers = npt_delta.layers(weights.infos, listing.file(name))
    state, config = _side_files(listing)
    return _with_step(
        path,
        Checkpoint(
            path=path,
            format=npt_delta.NAME,
            family=npt_delta.FAMILY,
            evidence=f"{name}: {len(weights.infos)} keys of {len(layers)} NPT layers",
            weights=weights,
            layers=layers,
            base_name=config.get("model_name") or (state.get("config") or {}).get("model_name"),
            step=state.get("global_step"),
            training=state,
            findings=_dtype_findings(weights.infos),
        ),
    )


def _weights_file(listing: Listing) -> str:
    """The name of the file that holds the NPT weights. Never a guess: several candidates are an error."""
    if not listing.path.is_dir():
        return listing.path.name
    named = [name for name in npt_delta.WEIGHT_FILES if name in listing.entries]
    if len(named) > 1:
        raise CheckpointError(f"{listing.path}: holds {' and '.join(named)}; name one of them as ckpt=")
    if named:
        return named[0]
    files = [n for n in listing.entries if n.endswith(WEIGHT_SUFFIXES) and n not in NOT_WEIGHTS]
    found = [name for name in files if any(map(npt_delta.is_key, listing.weights(name).infos))]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{listing.path}: several files hold NPT weights: {', '.join(found)}; name one as ckpt=")
    if not listing.entries:
        raise CheckpointError(f"{listing.path}: the directory is empty; a checkpoint has npt_weights.pt in it")
    seen = ", ".join(listing.entries[:8]) + (", …" if len(listing.entries) > 8 else "")
    raise CheckpointError(
        f"{listing.path}: No NPT layers found: neither npt_weights.pt nor a file with NPT keys in {seen}"
    )


def _side_files(listing: Listing) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training state (tensors on the meta device) and the config beside the weights; {} where there is none."""
    directory = Listing.of(listing.path if listing.path.is_dir() else listing.path.parent)
    state: Any = {}
    config: Any = {}
    if npt_delta.TRAINING_STATE in directory.entries:
        state = load_pickle(directory.file(npt_delta.TRAINING_STATE), tensors="meta")
    if npt_delta.CONFIG in directory.entries:
        path = directory.file(npt_delta.CONFIG)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    for name, content in ((npt_delta.TRAINING_STATE, state), (npt_delta.CONFIG, config)):
        if not isinstance(content, dict):
            raise CheckpointError(f"{directory.path / name}: holds a {type(content).__name__}, not a dictionary")
    return state, config


def _dtype_findings(infos: Any) -> tuple[str, ...]:
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()} - {"float32"})
    return (f"weights are stored as {', '.join(dtypes)}",) if dtypes else ()


def _with_step(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with a finding where its name and its state disagree on the step."""
    from dataclasses import replace

    named = step_in_name(path.name)
    if named is None or checkpoint.step in (None, named):
        return checkpoint if checkpoint.step is not None else replace(checkpoint, step=named)
    finding = f"the name says step {named}, the checkpoint's own state says {checkpoint.step}"
    return replace(checkpoint, findings=(*checkpoint.findings, finding))
