"""Runner: what a checkpoint is, how close it is to its base, and how far its training has come.

import runner
model = runner.load("run7/checkpoint-22000", base="path/to/base")     # model(input_ids).logits
result = runner.diagnose("run7/checkpoint-22000", base="path/to/base")  # the dict of result.json
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["diagnose", "load"]


def load(path: Any, **options: Any) -> Any:
    """The checkpoint at `path` as a torch module: see `runner.loading.load` for the options and errors."""
    from runner.loading import load as load_checkpoint

    return load_checkpoint(path, **options)


def diagnose(path: Any, **options: Any) -> dict[str, Any]:
    """The result of `task=diagnose` as a dict: see `runner.run.diagnose` for the options and errors."""
    from runner.run import diagnose as run_diagnose

    return run_diagnose(path, **options)
