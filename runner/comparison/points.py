"""What one job stands for in words and plots: its name, its figures, those of its layers and prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.comparison.jobs import Job, is_number


def layer_mses(job: Job) -> dict[Any, float]:
    """Layer → its isolated mse, for the layers that have one."""
    return {
        row.get("layer"): row["mse"]
        for row in job.layers
        if is_number(row.get("mse")) and isinstance(row.get("layer"), (int, str))
    }


def prompt_mses(job: Job) -> dict[str, float]:
    """Prompt → its mse, for the prompts that have one."""
    return {str(row.get("prompt")): row["mse"] for row in job.per_prompt if is_number(row.get("mse"))}


def figures(job: Job) -> str:
    """`mse 0.0421, cosine 0.9982`, as far as they are there."""
    shown: Mapping[str, str] = {"mse": ".4g", "cosine": ".4f"}
    return ", ".join(
        f"{name} {value:{form}}" for name, form in shown.items() if (value := job.metric(name)) is not None
    )


def checkpoint_name(job: Job) -> str:
    """The last part of the checkpoint's path, or the job's name."""
    return Path(job.ckpt).name if job.ckpt else job.name
