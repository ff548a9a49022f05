"""Runner: what a checkpoint is, how close it is to its base, and how far its training has come.

import runner
model = runner.load("run7/checkpoint-22000", base="path/to/base")     # model(input_ids).logits
result = runner.diagnose("run7/checkpoint-22000", base="path/to/base")  # the dict of result.json
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["diagnose", "inspect", "load"]


def load(path: Any, **options: Any) -> Any:
    """The checkpoint at `path` as a torch module: see `runner.evaluation.build.load` for the options and errors."""
    from runner.evaluation.build import load as load_checkpoint

    return load_checkpoint(path, **options)


def diagnose(path: Any, **options: Any) -> dict[str, Any]:
    """The result of `task=diagnose` as a dict: see `runner.run.call` for the options and errors."""
    from runner.run import call

    return call("diagnose", path, **options)


def inspect(path: Any, **options: Any) -> dict[str, Any]:
    """The result of `task=inspect` as a dict, from headers only: see `runner.run.call` for options and errors."""
    from runner.run import call

    return call("inspect", path, **options)
