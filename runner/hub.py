"""The Hugging Face hub: names, and snapshots of weights and tokenizers (never of code)."""

from pathlib import Path

from runner.errors import CheckpointError

PATTERNS = ("*.json", "*.safetensors", "tokenizer.model")
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "config.json")


def is_hub_name(name: str) -> bool:
    """Whether `name` could be a repository of the hub: `name` or `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def snapshot(key: str, name: str, *, download: bool, patterns: tuple[str, ...] = PATTERNS) -> Path:
    """The local directory of a hub repository; `key` is the option that named it.

    Raises CheckpointError in one line that names HF_TOKEN where it is absent, gated or out of reach.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not download))
    except Exception as error:  # network, authorisation and cache errors of several libraries: one answer
        raise CheckpointError(
            f"{key}={name}: neither a directory here nor available from the hub ({type(error).__name__}); check the "
            "name, give a local directory, or set HF_TOKEN where the model is gated or private"
        ) from error
