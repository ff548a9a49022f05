"""The stages of a training of several NPT layers: how far each layer is fed by the layers below it that are trained."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runner.errors import ConfigError, did_you_mean

STAGES = ("teacher", "mixed", "student")
# The one stage of a training without a curriculum: losses of a layer by itself, on what the base gives it, and of all
# layers together, in a pass of their own.
EQUIVALENCE = "equivalence"
Ratio = tuple[float, float]  # in the first and the last step of the stage


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps from `begin` (not among them) to `until_step`.

    Of the input of attention and MLP the share `attention` and `mlp` is the student's own stream; the rest is what the
    teacher gives the layer.
    """

    name: str
    begin: int
    until_step: int
    attention: Ratio
    mlp: Ratio

    def ratios(self, step: int) -> tuple[float, float]:
        """The two shares in the optimizer step `step`, counted from 1; beyond the stage those of its end."""
        length = self.until_step - self.begin
        done = min(1.0, (step - 1 - self.begin) / (length - 1)) if length > 1 else 1.0
        first, second = (
            (low + (high - low) * done) if low != high else low for low, high in (self.attention, self.mlp)
        )
        return first, second

    @property
    def mixes(self) -> bool:
        """Whether the teacher's and the student's streams are both needed in some step."""
        return any(0 < ratio < 1 for pair in (self.attention, self.mlp) for ratio in pair) or (
            self.attention[0] != self.attention[1] or self.mlp[0] != self.mlp[1]
        )


def parse(text: str) -> tuple[Stage, ...]:
    """`name:steps[:ρ[:ρ']]`, comma-separated; each ratio a number from 0 to 1, or `0.2-0.8` for a linear ramp.

    Raises ConfigError.
    """
    stages: list[Stage] = []
    begin = 0
    for part in str(text).split(","):
        name, *numbers = (word.strip() for word in part.split(":"))
        where = f"train.curriculum: {part.strip()!r}"
        if name not in STAGES:
            raise ConfigError(f"{where}: {name!r} is no stage{did_you_mean(name, STAGES)}")
        if not 1 <= len(numbers) <= 3:
            raise ConfigError(f"{where}: write name:steps, and for mixed name:steps:ratio or name:steps:ratio:ratio")
        if not numbers[0].isdecimal() or int(numbers[0]) < 1:
            raise ConfigError(f"{where}: {numbers[0]!r} is no number of steps above 0")
        given = [_ratio(number, where) for number in numbers[1:]]
        first = given[0] if given else (0.0, 0.0)
        fixed = {"teacher": (0.0, 0.0), "student": (1.0, 1.0)}.get(name)
        until = begin + int(numbers[0])
        mlp = given[1] if len(given) > 1 else first
        stages.append(Stage(name=name, begin=begin, until_step=until, attention=fixed or first, mlp=fixed or mlp))
        begin = until
    return tuple(stages)


def _ratio(text: str, where: str) -> Ratio:
    try:
        ends = [float(end) for end in re.split(r"(?<![eE])-", text)]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2) or not all(0 <= end <= 1 for end in ends):
        raise ConfigError(f"{where}: {text!r} is no ratio; give a number from 0 to 1, or a ramp such as 0.2-0.8")
    return ends[0], ends[-1]


def stage_at(stages: Sequence[Stage], step: int) -> int:
    """Which stage the optimizer step `step`, counted from 1, runs in: the first with step − 1 < until_step, or the
    last."""
    return next((i for i, stage in enumerate(stages) if step - 1 < stage.until_step), len(stages) - 1)


def to_state(stages: Sequence[Stage]) -> list[dict[str, object]]:
    """The stages as multi_layer_state.pt holds them."""
    rows = []
    for stage in stages:
        row: dict[str, object] = {
            "name": stage.name,
            "until_step": stage.until_step,
            "mixing_ratio": stage.attention[0],
            "mlp_mixing_ratio": stage.mlp[0],
        }
        if stage.attention[0] != stage.attention[1] or stage.mlp[0] != stage.mlp[1]:
            row |= {"mixing_ratio_end": stage.attention[1], "mlp_mixing_ratio_end": stage.mlp[1]}
        rows.append(row)
    return rows


def from_state(rows: object) -> str | None:
    """The curriculum that multi_layer_state.pt holds, as text; None where it holds none, or one without stages.

    The original drops the ratio of the MLP: it is then that of attention.
    """
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) for row in rows):
        return None
    parts, begin = [], 0
    for row in rows:
        name, until = row.get("name"), row.get("until_step")
        if name == EQUIVALENCE or name not in STAGES or type(until) is not int or until <= begin:
            return None
        part = f"{name}:{until - begin}"
        if name == "mixed":
            pairs = [(row.get("mixing_ratio"), row.get("mixing_ratio_end", row.get("mixing_ratio")))]
            mlp = row.get("mlp_mixing_ratio", pairs[0][0])
            pairs.append((mlp, row.get("mlp_mixing_ratio_end", mlp if "mlp_mixing_ratio" in row else pairs[0][1])))
            if not all(_is_share(end) for pair in pairs for end in pair):
                return None
            part += "".join(f":{low}" if low == high else f":{low}-{high}" for low, high in pairs)
        parts.append(part)
        begin = until
    return ",".join(parts) or None


def _is_share(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1  # type: ignore[arg-type,operator]
