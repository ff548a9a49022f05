"""The versions of what computed a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

import runner

PACKAGES = ("torch", "transformers", "safetensors", "peft", "hydra-core", "omegaconf", "wandb")


def versions() -> dict[str, str]:
    """Installed versions by package name, read from metadata: nothing is imported."""
    found = {"runner": runner.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
