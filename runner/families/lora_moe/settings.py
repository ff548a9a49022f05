"""How LoRA experts and their router are trained: numbers, checked. Nothing heavy is imported here."""

from dataclasses import dataclass

from runner.errors import ConfigError
from runner.families.npt.settings import check_number, check_whole

NOVELTY = ("max", "median")
AUTO = "auto"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_AT_LEAST_ONE = ("lora_r", "max_steps", "save_every", "batch_size")
_POSITIVE = ("lora_alpha", "temperature", "learning_rate", "gradient_clip_value")
_NOT_NEGATIVE = ("weight_decay", "balance_weight")


@dataclass(frozen=True, kw_only=True)
class MoeSettings:
    """The experts, and how they are trained.

    `experts`: their number, or `auto` for one for each new skill of the data (a training that goes on keeps those of
    its checkpoint). `target_modules`: what the experts change, by the last part of the modules' names. `temperature`
    divides the router's logits in training; `balance_weight`: how much the balance loss counts beside the
    cross-entropy. A skill is new where its `novelty` (max or median) cosine to the library is below
    `novelty_threshold`. `batch_size` rows of up to `sequence_length` tokens are a batch. Raises ConfigError for what
    cannot be trained.
    """

    experts: int | str = 2
    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    temperature: float = 2.0
    balance_weight: float = 0.1
    novelty: str = "max"
    novelty_threshold: float = 0.75
    max_steps: int = 200
    save_every: int = 100
    learning_rate: float = 5e-3
    warmup_steps: int = 20
    weight_decay: float = 0.0
    gradient_clip_value: float = 1.0
    batch_size: int = 16
    sequence_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        names = self.target_modules
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"train.target_modules={names}: give a list of modules, such as [q_proj,v_proj]")
        object.__setattr__(self, "target_modules", tuple(names))
        if self.experts != AUTO:
            check_whole("experts", self.experts, 1, or_else=AUTO)
        for name in _AT_LEAST_ONE:
            check_whole(name, getattr(self, name), 1)
        check_whole("sequence_length", self.sequence_length, 2)
        check_whole("warmup_steps", self.warmup_steps, 0)
        check_whole("seed", self.seed, 0)
        for name in (*_POSITIVE, *_NOT_NEGATIVE, "lora_dropout"):
            check_number(name, getattr(self, name), zero_allowed=name not in _POSITIVE)
        check_number("novelty_threshold", self.novelty_threshold, zero_allowed=True)
        if self.lora_dropout >= 1:
            raise ConfigError(f"train.lora_dropout={self.lora_dropout}: must be below 1")
        if self.novelty_threshold > 1:
            raise ConfigError(f"train.novelty_threshold={self.novelty_threshold}: a cosine is at most 1")
        if self.novelty not in NOVELTY:
            raise ConfigError(f"train.novelty={self.novelty} is unknown; choose {' or '.join(NOVELTY)}")
        if self.warmup_steps >= self.max_steps:
            raise ConfigError(f"train.warmup_steps={self.warmup_steps} must be below train.max_steps={self.max_steps}")


@dataclass(frozen=True, kw_only=True)
class MoeTrainSettings(MoeSettings):
    """The `train` node of `task=train family=lora_moe`. `resume_from`: a checkpoint or a run to go on from."""

    resume_from: str | None = None
