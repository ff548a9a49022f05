"""Merging whole models in Hugging Face directories, by the names of their tensors: any architecture, one at a time."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml

from runner.checkpoints import model_directory
from runner.checkpoints.checkpoint import Checkpoint
from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import resolve
from runner.errors import CheckpointError, ConfigError
from runner.families.hf.checkpoint import FAMILY, NAME
from runner.families.hf.vocabulary import TOKENIZER, Alignment, align, read_vocabulary
from runner.merge.apply import Planned, maker
from runner.merge.combination import Combination, Computed, steps
from runner.merge.lazy_tensor import LazyTensor, from_source, name_of, promoted
from runner.merge.plan import JsonObject, MergeOutput, Source, TensorFile, check_distinct, latest_step
from runner.merge.recipe import METHODS, Part, Recipe
from runner.merge.spec import MergeSpec, SourceSpec

# A list of layers in the names of tensors, as model.layers.3.mlp.up_proj.weight or transformer.h.3.mlp.c_fc.weight.
_LAYER = re.compile(r"(?:.*?\.)?(?:layers|layer|h|blocks|block)\.(?=\d+\.)")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)\.(?:weight|bias)")
_FIRST = re.compile(r"(?:.*\.)?(?:embed\w*|w[tp]e|\w*embeddings?)(?:\..*)?")
# Buffers that older versions saved and that follow from the config.
_WAIVED = re.compile(r".*(?:rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)")
_HEAD, _INPUT = "lm_head.weight", "model.embed_tokens.weight"
# What makes two configs those of one architecture; other differences are said.
_DECISIVE = (
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "n_embd", "n_head",
)  # fmt: skip
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_OF_THE_FILE = (*_DEPTHS, "vocab_size", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache")
# What lies beside the weights and is taken over as it is.
_BESIDE = (
    TOKENIZER, "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
CARD = "README.md"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Model(Source):
    """A whole model. `stack`: what stands before a layer's number in its tensors' names; `depth`: its layers."""

    config: JsonObject
    stack: str
    depth: int

    @property
    def infos(self) -> Mapping[str, Any]:
        """Its tensors by name."""
        return self.checkpoint.weights.infos

    def stored(self, name: str) -> str | None:
        """Under which name it stores `name`: a head that is tied is the embedding; None where it has none."""
        if name in self.infos:
            return name
        tied = name == _HEAD and self.config.get("tie_word_embeddings") and _INPUT in self.infos
        return _INPUT if tied else None


def plan_merge(
    spec: MergeSpec, paths: Sequence[Path], checkpoints: Sequence[Checkpoint], base: str | None, output: Path
) -> MergeOutput:
    """Plan the merge of whole models; every number is known afterwards, and no tensor is read.

    Raises ConfigError or CheckpointError where it is impossible or not allowed.
    """
    recipe = spec.models()
    models = [open_model(*each) for each in zip(spec.sources, paths, checkpoints, strict=True)]
    check_distinct(models)
    recipe = _with_base(spec, recipe, models)
    leader = models[recipe.base if recipe.base is not None else recipe.slices[0].parts[0].source]
    findings = _check_configs(leader, models)
    alignment = _alignment(recipe, models, leader)
    if alignment is None:
        findings += _differing_tokenizers(leader, models)
    planned = _tensors(recipe, models, leader)
    weights = {each.name: _tensor(spec, recipe, models, alignment, each) for each in planned}
    copies: dict[str, bytes | Path] = {} if alignment is None else {TOKENIZER: alignment.tokenizer}
    if recipe.method != "passthrough" and _says_int8(recipe):
        findings.append("int8_mask changes nothing: masks are made where they are used, a bit an element")
    models = [beside_model(model) if model is leader else model for model in models]
    names = [str(model.path) for model in models]
    return model_output(
        spec,
        models,
        leader,
        weights,
        how=recipe.method,
        rows=_rows(recipe, names),
        text=recipe.text,
        base=None if recipe.base is None else names[recipe.base],
        findings=findings,
        copies=copies,
        config=_config(recipe, leader, weights, alignment),
    )


def model_output(
    spec: MergeSpec,
    sources: Sequence[Source],
    leader: Model,
    weights: Mapping[str, LazyTensor],
    *,
    how: str,
    rows: Sequence[JsonObject],
    findings: Sequence[str],
    text: str = "",
    base: str | None = None,
    copies: Mapping[str, bytes | Path] | None = None,
    config: JsonObject | None = None,
) -> MergeOutput:
    """A whole model of `weights` with the files beside those of `leader`: `copies` and `config` in place of its own."""
    files = _shards(weights, spec.shard_size)
    texts: dict[str, JsonObject] = {model_directory.CONFIG: leader.config if config is None else config}
    if len(files) > 1:
        texts[INDEX] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
            "weight_map": {name: file.name for file in files for name in file.value},
        }
    names = [str(source.path) for source in sources]
    dtypes = sorted({tensor.dtype_name for tensor in weights.values() if tensor.stored is None})
    said = [f"computed in float64 and rounded once, to {' and '.join(dtypes)}"] if dtypes else []
    return MergeOutput(
        format=NAME,
        family=FAMILY,
        sources=tuple(sources),
        weights=weights,
        tensor_files=files,
        texts=texts,
        copies={path.name: path for path in _beside(leader)} | dict(copies or {}),
        card=partial(_card, spec, how, names, base, text),
        summary={
            "merged_from": names,
            "how": how,
            "base": base,
            "total_parameters": sum(tensor.numel for tensor in weights.values()),
            "checkpoint_keys": len(weights),
            "conflicts": [],
        },
        details={"how": how, "merged": list(rows)},
        step=latest_step(sources),
        findings=(*findings, *said),
        read_back=_read_back,
    )


def _beside(model: Model) -> list[Path]:
    """The files beside the weights that are taken over as they are."""
    paths = (model.checkpoint.directory / name for name in _BESIDE)
    return [path for path in paths if path.is_file()]


def open_model(spec: SourceSpec, path: Path, checkpoint: Checkpoint) -> Model:
    """A whole model as a source. Raises ConfigError for keys of other kinds, CheckpointError for quantised weights."""
    for key in ("layers", "experts"):
        if getattr(spec, key) is not None:
            raise ConfigError(f"{path}: a whole model has no {key} to choose; passthrough takes layer_range: [0,16]")
    checkpoint.require_complete()
    config = checkpoint.details.config
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: holds quantised weights, which cannot be merged; give full precision")
    stack, depth = _stack(checkpoint.weights.infos)
    return Model(
        spec=spec,
        path=path,
        checkpoint=checkpoint,
        files=(*checkpoint.weights.files, checkpoint.directory / model_directory.CONFIG),
        config=config,
        stack=stack,
        depth=depth,
    )


def _stack(names: Mapping[str, Any]) -> tuple[str, int]:
    """The list of layers with the most tensors, and how many layers it has."""
    found: dict[str, list[int]] = {}
    for name in names:
        if match := _LAYER.match(name):
            found.setdefault(match[0], []).append(int(name[match.end() :].partition(".")[0]))
    stack = max(found, key=lambda each: len(found[each]), default="")
    return stack, 1 + max(found.get(stack, [-1]))


def _with_base(spec: MergeSpec, recipe: Recipe, models: list[Model]) -> Recipe:
    """The recipe with its base among `models`, to which it is added where it is none of them. Raises ConfigError."""
    method = METHODS[recipe.method]
    if spec.base is not None and recipe.base == len(models):
        path = resolve(Path(spec.base).expanduser(), by_step=False)
        checkpoint = open_checkpoint(path)
        if checkpoint.format != NAME:
            raise CheckpointError(f"merge.base={spec.base}: is {checkpoint.format}, not a whole model")
        model = open_model(SourceSpec(path=spec.base), path, checkpoint)
        first = model.checkpoint.weights.files[0]
        same = (i for i, each in enumerate(models) if each.checkpoint.weights.files[0].samefile(first))
        number = next(same, len(models))
        models += [model] if number == len(models) else []
        recipe = replace(recipe, base=number)
    if method.base and recipe.base is None:
        raise ConfigError(f"merge={recipe.method} is over a base: give merge.base=PATH (base_model in a file)")
    for each in recipe.slices:
        others = [part for part in each.parts if not (part.source == recipe.base and method.base)]
        if not method.least <= len(others) <= method.most:
            wanted = str(method.least) if method.least == method.most else f"at least {method.least}"
            beside = " beside the base" if method.base else ""
            raise ConfigError(f"merge={recipe.method} takes {wanted} models{beside}, not {len(others)}")
        if recipe.method == "slerp" and recipe.base not in (None, *(part.source for part in each.parts)):
            raise ConfigError("merge=slerp goes from the base to the other model: the base must be one of the two")
        if recipe.method == "nuslerp" and recipe.base in [part.source for part in each.parts]:
            raise ConfigError("merge=nuslerp: the base can be neither of the two models")
    return recipe


def _check_configs(leader: Model, models: Sequence[Model]) -> list[str]:
    """What should be said of the configs. Raises CheckpointError where two are of different architectures."""
    said: list[str] = []
    for model in models:
        differing = [key for key in _DECISIVE if leader.config.get(key) != model.config.get(key)]
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"{leader.path} has {key} {leader.config.get(key)!r}, {model.path} {model.config.get(key)!r}: only "
                "models of one architecture are merged"
            )
        for key in sorted({*leader.config, *model.config} - {*_DECISIVE, *_OF_THE_FILE}):
            a, b = leader.config.get(key), model.config.get(key)
            if a != b and not isinstance(a, list):
                said.append(f"config.json: {key} is {b!r} in {model.path}; {a!r} of {leader.path} is kept")
    return said


def _alignment(recipe: Recipe, models: Sequence[Model], leader: Model) -> Alignment | None:
    """How the vocabularies are laid over each other; None where no tokenizer rule is given."""
    if recipe.tokenizer is None:
        return None
    vocabularies = [read_vocabulary(model.checkpoint.directory, _vocabulary_size(model)) for model in models]
    base = models.index(leader)
    found = align(vocabularies, recipe.tokenizer, base, recipe.pad_to_multiple_of)
    return found if recipe.base is not None else replace(found, base=None)


def _vocabulary_size(model: Model) -> int:
    size = model.config.get("vocab_size")
    if type(size) is not int:
        raise CheckpointError(f"{model.path}: config.json has no vocab_size, by which its embedding would be found")
    return size


def _differing_tokenizers(leader: Model, models: Sequence[Model]) -> list[str]:
    """What should be said of tokenizers that are not the leader's."""
    first = leader.checkpoint.directory / TOKENIZER
    known = first.read_bytes() if first.is_file() else None
    said = []
    for model in models:
        path = model.checkpoint.directory / TOKENIZER
        if model is not leader and (path.read_bytes() if path.is_file() else None) != known:
            said.append(
                f"{model.path}: its {TOKENIZER} is not that of {leader.path}, which is kept; where ids mean other "
                "tokens, merge.tokenizer=union or base lays the embeddings over each other"
            )
    return said


def _tensors(recipe: Recipe, models: Sequence[Model], leader: Model) -> list[Planned]:
    """Every tensor of the output, those before the layers first. Raises CheckpointError where one is missing."""
    first, last = recipe.slices[0], recipe.slices[-1]
    heads = [models[part.source] for part in first.parts]
    single = [name for name in _names(leader) if not (leader.stack and name.startswith(leader.stack))]
    before = [name for name in single if _FIRST.fullmatch(name)]
    planned = [Planned(name=name, slice=first, t=0.0, names=(name,) * len(first.parts)) for name in before]
    number = 0
    for each in recipe.slices:
        ranges = [_range(models[part.source], part) for part in each.parts]
        if len({stop - start for start, stop in ranges}) > 1:
            raise ConfigError("all models of a slice must give as many layers")
        count = ranges[0][1] - ranges[0][0]
        model = models[each.parts[0].source]
        for index in range(count):
            t = index / (count - 1) if count > 1 else 1.0
            prefix = f"{model.stack}{ranges[0][0] + index}."
            for name in _names(model):
                if not name.startswith(prefix):
                    continue
                rest = name.removeprefix(prefix)
                names = tuple(
                    f"{models[part.source].stack}{start + index}.{rest}"
                    for part, (start, _) in zip(each.parts, ranges, strict=True)
                )
                planned.append(Planned(name=f"{leader.stack}{number}.{rest}", slice=each, t=t, names=names))
            number += 1
    after = [name for name in single if name not in before]
    planned += [Planned(name=name, slice=last, t=0.0, names=(name,) * len(last.parts)) for name in after]
    _check_present(recipe, models, planned, heads)
    return planned


def _names(model: Model) -> list[str]:
    """The tensors that are merged: neither buffers of older versions nor the head that is the embedding."""
    tied = {_HEAD} if model.config.get("tie_word_embeddings") else set()
    return [name for name in model.infos if name not in tied and not _WAIVED.fullmatch(name)]


def _range(model: Model, part: Part) -> tuple[int, int]:
    start, stop = part.layers or (0, model.depth)
    if stop > model.depth:
        raise ConfigError(f"{model.path}: has the layers 0 to {model.depth - 1}, not layer_range [{start},{stop}]")
    return start, stop


def _check_present(recipe: Recipe, models: Sequence[Model], planned: Sequence[Planned], heads: Sequence[Model]) -> None:
    used: dict[int, dict[str, None]] = {}
    for each in planned:
        for part, name in zip(each.slice.parts, each.names, strict=True):
            used.setdefault(part.source, {})[name] = None
        if recipe.base is not None and recipe.whole:
            used.setdefault(recipe.base, {})[each.name] = None
    for source, names in used.items():
        model = models[source]
        missing = [name for name in names if model.stored(name) is None]
        more = [name for name in _names(model) if name not in names] if recipe.whole else []
        for what, found in (("lacks", missing), ("has", more)):
            if found:
                shown = ", ".join(found[:3]) + (f", … ({len(found)} in all)" if len(found) > 3 else "")
                other = next((head for head in heads if head is not model), heads[0])
                against = "which {} has" if what == "lacks" else "which {} has not"
                raise CheckpointError(f"{model.path}: {what} {shown}, {against.format(other.path)}")


def _tensor(
    spec: MergeSpec, recipe: Recipe, models: Sequence[Model], alignment: Alignment | None, planned: Planned
) -> LazyTensor:
    """One tensor of the output, not yet computed. Raises ConfigError or CheckpointError where it cannot be."""
    parts = list(zip(planned.slice.parts, planned.names, strict=True))
    inputs: dict[int, str] = {}
    for part, name in parts:
        inputs.setdefault(part.source, str(models[part.source].stored(name)))
    with_base = recipe.method not in ("linear", "passthrough") and recipe.base is not None
    if with_base and recipe.base not in inputs:
        assert recipe.base is not None
        if not recipe.whole:
            raise ConfigError(f"merge={recipe.method}: the base must be among the models of each slice")
        inputs[recipe.base] = str(models[recipe.base].stored(planned.name))
    infos = [models[number].infos[name] for number, name in inputs.items()]
    origin = " with ".join(f"{models[number].path}: {name}" for number, name in inputs.items())
    first = parts[0][0].source
    if not infos[0].is_floating:
        return from_source(models[first].checkpoint.weights, models[first].infos[inputs[first]])
    aligned = alignment if alignment is not None and _EMBEDDING.fullmatch(planned.name) else None
    shape = _shape(models, inputs, planned.name, aligned)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else promoted([info.dtype for info in infos])
    others = [(part, name) for part, name in parts if not (METHODS[recipe.method].base and part.source == recipe.base)]
    under = recipe.base if with_base and recipe.base not in [part.source for part, _ in others] else None
    make = maker(recipe, planned, [part for part, _ in others], spec.seed)
    if isinstance(make, float):  # passthrough, times a number
        if make == 1.0 and dtype == infos[0].dtype and aligned is None:
            return from_source(models[first].checkpoint.weights, infos[0])
        make = partial(_scaled, make)

    def tensors() -> dict[int, torch.Tensor]:
        read = {number: models[number].checkpoint.weights.read(name) for number, name in inputs.items()}
        if aligned is None:
            return read
        every = [
            read[i] if i in read else model.checkpoint.weights.read(str(model.stored(planned.name)))
            for i, model in enumerate(models)
        ]
        return {number: aligned.aligned(every, number) for number in read}

    @cache
    def computed() -> Computed:
        read = tensors()
        order = [read[part.source] for part, _ in others]
        return make(order, None if under is None else read[under])

    def in_parts() -> Iterator[torch.Tensor]:
        found = computed()
        for start, stop in steps(numel):
            yield found.part(start, stop).to(dtype)

    numel = 1
    for size in shape:
        numel *= size
    return LazyTensor(
        origin=origin,
        dtype_name=name_of(dtype),
        shape=shape,
        parts=in_parts,
        elements=lambda indices: torch.from_numpy(computed().sample(indices.numpy())).to(dtype),
        computed=True,
    )


def _scaled(scale: float, tensors: Sequence[torch.Tensor], base: torch.Tensor | None) -> Computed:
    return Combination(tensors=tensors, coefficients=(scale,))


def _shape(
    models: Sequence[Model], inputs: Mapping[int, str], name: str, alignment: Alignment | None
) -> tuple[int, ...]:
    shapes = {number: tuple(models[number].infos[own].shape) for number, own in inputs.items()}
    (number, shape), *others = shapes.items()
    for other, found in others:
        if found[1:] != shape[1:] or (alignment is None and found != shape):
            rule = ""
            if _EMBEDDING.fullmatch(name) and found[1:] == shape[1:]:
                rule = ": vocabularies of two sizes need merge.tokenizer=union or base"
            raise CheckpointError(
                f"{name} is {list(shape)} in {models[number].path} and {list(found)} in {models[other].path}{rule}"
            )
    return shape if alignment is None else (alignment.padded, *shape[1:])


def _says_int8(recipe: Recipe) -> bool:
    return any("int8_mask" in place for place in (recipe.parameters, *(each.parameters for each in recipe.slices)))


def _config(
    recipe: Recipe, leader: Model, weights: Mapping[str, LazyTensor], alignment: Alignment | None
) -> dict[str, Any]:
    """config.json of the output: the leader's, with the dtype, depth and vocabulary that are written."""
    config = {name: value for name, value in leader.config.items() if name != "_name_or_path"}
    dtypes = [tensor.dtype_name for tensor in weights.values() if tensor.dtype_name.startswith(("float", "bfloat"))]
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = max(sorted(set(dtypes)), key=dtypes.count)
    if alignment is not None:
        config["vocab_size"] = alignment.padded
    if not recipe.whole:
        taken = [index for each in recipe.slices for index in range(*(each.parts[0].layers or (0, leader.depth)))]
        for name, value in config.items():
            if isinstance(value, list) and len(value) == leader.depth:  # one entry a layer, as layer_types
                config[name] = [value[index] for index in taken if index < len(value)]
        for name in _DEPTHS:
            if name in config:
                config[name] = len(taken)
    return config


def _shards(weights: Mapping[str, LazyTensor], gigabytes: float) -> tuple[TensorFile, ...]:
    """The weights in files of at most so many GB, as transformers names them."""
    groups: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if groups[-1] and size + tensor.nbytes > gigabytes * 1e9:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return (TensorFile(name=model_directory.SINGLE[0], value=weights),)
    return tuple(
        TensorFile(name=f"model-{number:05}-of-{len(groups):05}.safetensors", value=group)
        for number, group in enumerate(groups, 1)
    )


def beside_model(model: Model) -> Model:
    """The model with all of its files that the output depends on, those beside the weights too."""
    return replace(model, files=(*model.files, *_beside(model)))


def _rows(recipe: Recipe, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each model gives, for the report."""
    rows = []
    for each in recipe.slices:
        for part in each.parts:
            layers = None if part.layers is None else list(part.layers)
            rows.append({"source": names[part.source], "layer_range": layers, "parameters": dict(part.parameters)})
    return rows


def _card(
    spec: MergeSpec, how: str, names: Sequence[str], base: str | None, text: str, hashes: Mapping[str, str]
) -> dict[str, str]:
    """README.md: what was merged from which files."""
    front = yaml.safe_dump({"tags": ["merge"], "library_name": "transformers", "base_model": names}, sort_keys=False)
    lines = [f"| {path} | `{digest}` |" for path, digest in hashes.items()]
    recipe = text or yaml.safe_dump(json.loads(json.dumps(spec.recipe())), sort_keys=False)
    parts = [
        f"---\n{front}---\n# {how} of {len(names)} models\n",
        f"Merged by {how}{f' over {base}' if base else ''}, computed in float64, verified when it was written.\n",
        "Made of these files (SHA-256):\n",
        "\n".join(["| file | SHA-256 |", "|---|---|", *lines]) + "\n",
        f"The recipe:\n\n```yaml\n{recipe.rstrip()}\n```\n",
    ]
    return {CARD: "\n".join(parts)}


def _read_back(written: Checkpoint) -> tuple[JsonObject, str]:
    return {"found_keys": len(written.weights.infos)}, f"reads back as planned: {written.evidence}"
