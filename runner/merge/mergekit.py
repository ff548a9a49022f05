"""A mergekit YAML file as a recipe, as it stands; what it asks for and is not done here is named."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from runner.errors import ConfigError, did_you_mean
from runner.merge.recipe import METHODS, Part, Recipe, Slice, check_names

_LIMIT = 1 << 20
_KEYS = (
    "models", "slices", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "parameters",
)  # fmt: skip
_UNSUPPORTED = {
    "modules": "several modules in one model",
    "chat_template": "a chat template of its own: the base's is kept",
}


def read_recipe(file: Path) -> tuple[list[str], Recipe]:
    """The models that the file names, each once, and its recipe over their numbers.

    Raises ConfigError for what is no such file, and for what it asks for and is not done here.
    """
    try:
        if file.stat().st_size > _LIMIT:
            raise ConfigError(f"{file}: larger than {_LIMIT >> 20} MB: no recipe of a merge")
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return _recipe(content, text)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _recipe(content: Any, text: str) -> tuple[list[str], Recipe]:
    _refuse_code(content)
    content = _mapping("the file", content, _KEYS, _UNSUPPORTED)
    method = str(content.get("merge_method"))
    if method not in METHODS:
        raise ConfigError(f"merge_method {method} is not done here{did_you_mean(method, METHODS)}")
    if ("models" in content) == ("slices" in content):
        raise ConfigError("give either models or slices")
    models: list[str] = []
    parameters = _parameters(content)
    if "models" in content:
        parts = tuple(_part(each, models, sliced=False) for each in _items("models", content["models"]))
        slices = [Slice(parts=parts)]
    else:
        slices = [_slice(each, models) for each in _items("slices", content["slices"])]
    if method == "passthrough" and "models" in content and len(slices[0].parts) > 1:
        raise ConfigError("merge_method passthrough takes one model; give slices with layer_range")
    check_names(method, parameters, [part.parameters for each in slices for part in each.parts])
    for each in slices:
        check_names(method, each.parameters, [])
    base = _number(content["base_model"], models) if content.get("base_model") is not None else None
    tokenizer, padding = _tokenizer(content, models)
    return models, Recipe(
        method=method,
        slices=tuple(slices),
        parameters=parameters,
        base=base,
        dtype=_dtype(content),
        tokenizer=tokenizer,
        pad_to_multiple_of=padding,
        text=text,
    )


def _refuse_code(content: Any) -> None:
    if isinstance(content, Mapping):
        if content.get("trust_remote_code"):
            raise ConfigError("trust_remote_code: code that comes with a model is never run here; take the line out")
        for value in content.values():
            _refuse_code(value)
    elif isinstance(content, list):
        for value in content:
            _refuse_code(value)


def _mapping(
    what: str, value: Any, known: Sequence[str], unsupported: Mapping[str, str] | None = None
) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be keys and values, not {value!r}")
    for key in value:
        if unsupported and key in unsupported and value[key] is not None:
            raise ConfigError(f"{key}: {unsupported[key]} is not done here")
        if key not in known and key not in (unsupported or ()):
            raise ConfigError(f"{what}: {key!r} is unknown{did_you_mean(str(key), known)}")
    return value


def _items(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{what} must be a list, not {value!r}")
    return value


def _slice(value: Any, models: list[str]) -> Slice:
    unsupported = {"base_model": "a base for one slice", "residual_weight": "residual_weight"}
    given = _mapping("a slice", value, ("sources", "parameters"), unsupported)
    parts = tuple(_part(each, models, sliced=True) for each in _items("sources of a slice", given.get("sources")))
    return Slice(parts=parts, parameters=_parameters(given))


def _part(value: Any, models: list[str], *, sliced: bool) -> Part:
    known = ("model", "parameters", "layer_range") if sliced else ("model", "parameters")
    given = _mapping("a model", value, known)
    if "model" not in given:
        raise ConfigError(f"{value!r} names no model")
    layers = layer_range(given.get("layer_range")) if sliced else None
    return Part(source=_number(given["model"], models), layers=layers, parameters=_parameters(given))


def layer_range(value: Any) -> tuple[int, int]:
    """[start, stop) of layers. Raises ConfigError."""
    whole = isinstance(value, Sequence) and len(value) == 2 and all(type(each) is int for each in value)
    if isinstance(value, str) or not whole or not 0 <= value[0] < value[1]:
        raise ConfigError(f"layer_range={value}: give [first, last + 1], as [0,16]")
    return value[0], value[1]


def _parameters(given: Mapping[str, Any]) -> Mapping[str, Any]:
    found = given.get("parameters")
    return {} if found is None else _mapping("parameters", found, list(found) if isinstance(found, Mapping) else ())


def _number(value: Any, models: list[str]) -> int:
    """The place of a model in `models`, to which it is added where it is new."""
    if isinstance(value, Mapping):
        given = _mapping("a model", value, ("model",), {"lora": "an adapter", "override_architecture": "it"})
        inner = given.get("model")
        path = inner.get("path") if isinstance(inner, Mapping) else inner
        if isinstance(inner, Mapping) and inner.get("revision"):
            path = f"{path}@{inner['revision']}"
    else:
        path = value
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{value!r} names no model")
    if "+" in path and not Path(path).expanduser().exists():
        raise ConfigError(f"{path}: a model with an adapter: merge it first, with merge=into_base")
    if "@" in path and not Path(path).expanduser().exists():
        raise ConfigError(f"{path}: a revision of a model: download it, and give the directory")
    if path not in models:
        models.append(path)
    return models.index(path)


def _dtype(content: Mapping[str, Any]) -> str | None:
    value = content.get("out_dtype") or content.get("dtype")
    return None if value is None else str(value)


def _tokenizer(content: Mapping[str, Any], models: list[str]) -> tuple[str | int | None, int | None]:
    source, padding = content.get("tokenizer_source"), None
    if content.get("tokenizer") is not None:
        if source is not None:
            raise ConfigError("give either tokenizer_source or tokenizer")
        given = _mapping(
            "tokenizer", content["tokenizer"], ("source", "pad_to_multiple_of"), {"tokens": "a rule for one token"}
        )
        source, padding = given.get("source", "union"), given.get("pad_to_multiple_of")
        if padding is not None and (type(padding) is not int or padding < 1):
            raise ConfigError(f"pad_to_multiple_of={padding}: give a whole number from 1")
    if source is None or source in ("union", "base"):
        return source, padding
    return _number(source, models), padding
