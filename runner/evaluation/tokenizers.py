"""Tokenizers: the checkpoint's own, else the base's; text to token ids. An ordinary tokenizer.json is read by the
`tokenizers` library alone, every other tokenizer by transformers; the token ids are the same.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runner.checkpoints.model_directory import CONFIG, has_tokenizer
from runner.errors import CheckpointError, ConfigError, ModelError
from runner.evaluation.base_models import TOKENIZER_PATTERNS, is_hub_name, snapshot
from runner.files.strict_json import read_object

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

# Classes of tokenizer_config.json whose tokenizer is that of tokenizer.json as it is.
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# Those for which transformers takes no more than the vocabulary from it, and the tokens that they have anyway.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What makes another tokenizer of it, or is not known here.
_ODD_KEYS = (
    "auto_map split_special_tokens fix_mistral_regex init_inputs model_specific_special_tokens tokenizer_file "
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output additional_special_tokens "
    "extra_special_tokens"
).split()
_FILE_LIMIT = 64 << 20


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """Text to token ids and back. `special_tokens`: bos_token, eos_token, … → its text.

    `chat_template`: Jinja, or several by name. `by`: the library that made it, tokenizers or transformers.
    """

    backend: "Tokenizer | PreTrainedTokenizerBase" = field(repr=False)
    special_tokens: Mapping[str, str]
    chat_template: str | Mapping[str, str] | None = field(default=None, repr=False)
    by: str = "tokenizers"

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, with `special` tokens around it where the tokenizer adds them."""
        backend: Any = self.backend
        if self.by == "tokenizers":
            ids: list[int] = backend.encode(text, add_special_tokens=special).ids
        else:
            ids = backend(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with its special tokens, as `encode` gives them, in half the time for many."""
        backend: Any = self.backend
        if self.by == "tokenizers":
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]
        found: list[list[int]] = backend(list(texts), verbose=False, return_attention_mask=False)["input_ids"]
        return found

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""
        backend: Any = self.backend
        return str(backend.decode(list(token_ids), skip_special_tokens=skip_special))

    def token_id(self, token: str) -> int | None:
        """The id of a token; None for one that there is not."""
        backend: Any = self.backend
        found: int | None = backend.token_to_id(token) if self.by == "tokenizers" else backend.get_vocab().get(token)
        return found

    @property
    def size(self) -> int:
        """How many tokens there are, added ones too."""
        backend: Any = self.backend
        return int(backend.get_vocab_size() if self.by == "tokenizers" else len(backend))

    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added ones too."""
        backend: Any = self.backend
        return dict(backend.get_vocab())

    def templated(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation [{role, content}, …] as the chat template writes it, up to where the answer begins.

        Raises whatever the template raises, and KeyError where several have names and none is `default`.
        """
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        template = self.chat_template if isinstance(self.chat_template, str) else (self.chat_template or {})["default"]
        (text,), _ = render(
            conversations=[list(messages)],
            chat_template=template,
            add_generation_prompt=True,
            **self.special_tokens,
        )
        return str(text)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-text token; None where there is none."""
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self.token_id(eos)


def load_tokenizer(option: str | None, directories: Sequence[Path]) -> TextTokenizer:
    """The tokenizer `option` (a directory, a tokenizers JSON or a hub name), else the first one in `directories`.

    Raises ConfigError where `option` names none, CheckpointError where there is none or its files are damaged.
    """
    if option is not None and Path(option).expanduser().is_file():
        try:
            text = Path(option).expanduser().read_text(encoding="utf-8")
            return TextTokenizer(backend=_backend(text), special_tokens={})
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise ConfigError(f"tokenizer={option}: is no tokenizers JSON: {error}") from error
    if option is None:
        found = [directory for directory in directories if has_tokenizer(directory)]
        if not found:
            raise CheckpointError(f"{directories[-1]}: holds no tokenizer; give one as tokenizer=DIRECTORY")
        directory = found[0]
    else:
        directory = Path(option).expanduser()
        if not directory.is_dir():
            if not is_hub_name(option):
                raise ConfigError(f"tokenizer={option}: no such file or directory")
            directory = snapshot("tokenizer", option, download=True, patterns=TOKENIZER_PATTERNS)
        if not has_tokenizer(directory):
            raise ConfigError(f"tokenizer={option}: the directory holds no tokenizer files")
    stats = tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in sorted(directory.glob("*token*")))
    return _load_once(directory.absolute(), stats)


@lru_cache(maxsize=4)
def _load_once(directory: Path, stats: tuple[tuple[str, int, int], ...]) -> TextTokenizer:
    """The tokenizer of a directory whose files are as `stats` say: loading a large one takes half a second."""
    try:
        return _plain(directory) or _by_transformers(directory)
    except Exception as error:  # as many kinds as there are tokenizer classes; the user needs the file
        raise CheckpointError(f"{directory}: its tokenizer cannot be loaded: {first_line(error)}") from error


def _by_transformers(directory: Path) -> TextTokenizer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    return TextTokenizer(
        backend=tokenizer,
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items() if name in _NAMED},
        chat_template=tokenizer.chat_template,
        by="transformers",
    )


def _plain(directory: Path) -> TextTokenizer | None:
    """The tokenizer of tokenizer.json, where transformers would make the same of it; None where it might not."""
    file, described = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not (file.is_file() and described.is_file()) or (directory / "added_tokens.json").exists():
        return None
    values = _object(described)
    kind = _object(directory / CONFIG).get("model_type") if (directory / CONFIG).is_file() else None
    if values.get("tokenizer_class") not in (*_PLAIN_CLASSES, *_LLAMA_CLASSES) or kind not in (None, "llama"):
        return None
    if any(values.get(key) for key in _ODD_KEYS) or (directory / "additional_chat_templates").exists():
        return None
    listed = values.get("added_tokens_decoder")
    older = directory / "special_tokens_map.json"
    if listed is None and older.is_file():
        values |= _object(older)
    text = file.read_text(encoding="utf-8")
    if values["tokenizer_class"] in _LLAMA_CLASSES and '"ByteLevel"' not in text:
        content = _object(file)
        if content["model"].get("type") != "BPE":
            return None
        values = {**_LLAMA_TOKENS, **values}
        text = json.dumps(_with_llama_pieces(content, values))
    backend = _backend(text)
    known = {str(index): token for index, token in backend.get_added_tokens_decoder().items()}
    special = {
        name: _text(value)
        for name, value in values.items()
        if name.endswith("_token") and isinstance(value, (str, dict))
    }
    plain = {token.content for token in known.values() if _flags(token) == (True, False, False, False, False)}
    if not (plain.issuperset(special.values()) and _listed_as_known(listed, known)):
        return None
    if values.get("clean_up_tokenization_spaces") and type(backend.model).__name__ != "BPE":
        return None
    template = directory / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else values.get("chat_template")
    if isinstance(chat, list):
        chat = {str(each["name"]): str(each["template"]) for each in chat}
    named = {name: str(special[name]) for name in _NAMED if name in special}
    return TextTokenizer(backend=backend, special_tokens=named, chat_template=chat)


def _with_llama_pieces(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json with what `LlamaTokenizer` of transformers makes anew, whatever stands there."""
    prefix = values.get("add_prefix_space") in (None, True)
    scheme = "never" if not prefix else "always" if values.get("legacy") else "first"
    pieces = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]  # fmt: skip
    model = {name: content["model"][name] for name in ("type", "vocab", "merges")}
    return {
        **content,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": pieces},
        "model": {**model, "fuse_unk": True, "byte_fallback": True},
    }


def _backend(text: str) -> "Tokenizer":
    """The tokenizer of a tokenizers JSON, which does not cut or pad whatever its file says."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, path.name, _FILE_LIMIT)


def _text(token: object) -> object:
    """The text of a special token, which may stand there as a dict; one with flags of its own stays a dict."""
    if isinstance(token, dict) and not any(token.get(name) for name in ("lstrip", "rstrip", "single_word")):
        return token.get("content")
    return token if isinstance(token, str) else repr(token)


def _flags(token: "AddedToken") -> tuple[bool, ...]:
    return token.special, token.normalized, token.lstrip, token.rstrip, token.single_word


def _listed_as_known(listed: object, known: Mapping[str, "AddedToken"]) -> bool:
    """Whether `added_tokens_decoder` says of each token what tokenizer.json says."""
    from tokenizers import AddedToken

    if listed is None:
        return True
    if not isinstance(listed, dict) or not all(isinstance(token, dict) for token in listed.values()):
        return False
    made = {index: AddedToken(**token) for index, token in listed.items()}
    return all(
        index in known and (token.content, *_flags(token)) == (known[index].content, *_flags(known[index]))
        for index, token in made.items()
    )


def encode(tokenizer: TextTokenizer, text: str, vocab_size: int, limit: int | None = None) -> torch.Tensor:
    """Token ids [T] of `text`, special tokens as the tokenizer adds them, at most `limit` of them.

    Raises ModelError for a text without tokens, or a token id that the model's embedding does not have.
    """
    ids = tokenizer.encode(text)[:limit]
    if not ids:
        raise ModelError(f"the text {text!r} has no tokens in this tokenizer; give another prompt or tokenizer=")
    if max(ids) >= vocab_size:
        raise ModelError(
            f"the tokenizer gives token id {max(ids)}, but the model's vocabulary has {vocab_size}; "
            "it is another model's tokenizer: give the right one as tokenizer="
        )
    return torch.tensor(ids, dtype=torch.long)


def seeded_ids(text: str, vocab_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """`length` uniform token ids [T] that stand for `text` where there is no tokenizer: the same for the same seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()) + (seed << 32))
    return torch.randint(vocab_size, (length,), generator=generator)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
