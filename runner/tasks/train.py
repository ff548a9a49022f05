"""`task=train`: what the family trains over a frozen base, from texts, and perhaps from a checkpoint to go on from."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from runner.checkpoints.detect import open_checkpoint
from runner.checkpoints.runs import find_run
from runner.config import TrainConfig, given_below
from runner.data.text import MAX_DOCUMENTS, Data
from runner.data.world import generate
from runner.errors import ConfigError, ModelError, RunnerError
from runner.evaluation.base_models import Base, load_base
from runner.evaluation.evaluator import Evaluator, plain_reference
from runner.evaluation.placement import Placement
from runner.evaluation.reference import Reference
from runner.evaluation.tokenizers import TextTokenizer, encode, load_tokenizer
from runner.families.family import Family
from runner.files.atomic import write_json
from runner.installation import demo_run
from runner.metrics.fidelity import summarise
from runner.metrics.verdict import judge, thresholds
from runner.progress import step_bar
from runner.reports.curves import write_curves
from runner.results import FILE_NAME, Result, finite, versions
from runner.tasks.context import Context
from runner.tracking.rows import STEP as CHECKPOINT_STEP
from runner.training.distributed import World, joined
from runner.training.inputs import Trained, TrainingInputs
from runner.training.settings import TrainingSettings
from runner.training.sources import TextStream

INTERRUPTED = 130
LOG, SAMPLES = "training_log.jsonl", "samples.jsonl"
# What `task=diagnose` finds during a training, in the layout of a sweep: `task=compare sweep=RUN/evaluations`.
EVALUATIONS = "evaluations"
# How long continuations of the prompts are, and how the seeded one is drawn.
NEW_TOKENS, TEMPERATURE = 32, 0.7


def run(config: TrainConfig, context: Context) -> Result:
    """Train, leaving `checkpoint-<step>` directories in the run's own. Without `base` that of the demonstration.

    Raises ConfigError, CheckpointError or ModelError, each with one line that says what to do.
    """
    family: Family = config.family
    settings: TrainingSettings = config.train
    data: Data = config.data
    if family.name != settings.family:
        raise ConfigError(
            f"family={family.name} and train={settings.family} contradict each other; give family={settings.family} "
            "alone"
        )
    family.check_training(settings)
    if data.name not in ("world", "text"):
        raise ConfigError(f"data={data.name} has no text to train on; give data=world, or data=text data.path=…")
    resume_from = _checkpoint(config.train.resume_from)
    done = 0 if resume_from is None else open_checkpoint(resume_from).step or 0
    with joined() as world:
        with context.timed("load_base"):
            base, base_name = _base(config, resume_from, world, llama=family.llama_base)
            tokenizer = load_tokenizer(config.tokenizer, [base.path])
        with context.timed("data"):
            stream, texts, findings = _data(data, family, tokenizer, base)
        follower = _Follower(context, config, base, tokenizer, world)
        tokens = settings.batch_size * settings.gradient_accumulation_steps * settings.sequence_length * world.size
        bar = step_bar(
            context.progress, f"training {family.name}", settings.max_steps, done, tokens=tokens, stage=settings.stage
        )
        with context.timed("train"), bar as on_step:
            trained = family.train(
                TrainingInputs(
                    directory=context.directory,
                    base=base,
                    base_name=base_name,
                    texts=texts,
                    settings=settings,
                    seed=config.seed,
                    resume_from=resume_from,
                    on_step=on_step,
                    on_log=follower.log,
                    stream=stream,
                    given=given_below("train"),
                    world=world,
                    measure=follower.measure if world.writes else None,
                    sample=follower.sample if world.writes else None,
                )
            )
    if world.writes:
        findings += follower.draw()
    if trained.interrupted and context.in_sweep and world.writes:
        raise KeyboardInterrupt  # which is for the whole sweep
    return Result(
        task="train",
        ckpt=str(trained.checkpoints[-1]) if trained.checkpoints else None,
        base=str(base.path),
        step=trained.step,
        family=family.name,
        format=trained.format,
        metrics=trained.figures,
        findings=[*findings, *trained.findings, *_ended_early(trained)],
        timing=context.timing,
        versions=versions(),
        details={
            "checkpoints": [str(path) for path in trained.checkpoints],
            **({"samples": follower.samples} if follower.samples else {}),
            **trained.details(),
        },
        exit_code=INTERRUPTED if trained.interrupted else 0,
    )


def _ended_early(trained: Trained) -> list[str]:
    if not trained.interrupted:
        return []
    where = f"; train.resume_from={trained.checkpoints[-1]} goes on" if trained.checkpoints else ""
    return [f"interrupted after step {trained.step}{where}"]


class _Follower:
    """What is seen of a training while it runs: rows of the log, evaluations, continuations of prompts."""

    def __init__(
        self, context: Context, config: TrainConfig, base: Base, tokenizer: TextTokenizer, world: World
    ) -> None:
        self.context, self.config, self.tokenizer, self.base, self.world = context, config, tokenizer, base, world
        self.samples: list[dict[str, object]] = []
        self._reference = Reference(base.model, (base.key, "training"))  # perhaps in another precision
        self._evaluations = 0
        self._before: tuple[float, float] | None = None  # tokens, and when they were done

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """A row in training_log.jsonl and, live, in W&B: figures without a group belong to `train/`."""
        if not self.world.writes:
            return
        row = dict(figures)
        now = time.monotonic()
        if (tokens := row.get("tokens")) is not None:
            if self._before is not None and tokens > self._before[0]:
                row["training/tokens_per_second"] = (tokens - self._before[0]) / (now - self._before[1])
            self._before = tokens, now
        self._append(LOG, {"step": step, **row})
        if any(name.startswith("eval/") for name in row):
            row[CHECKPOINT_STEP] = step
        named = {name if "/" in name else f"train/{name}": value for name, value in row.items()}
        self.context.log({"train/step": step, **named})

    def measure(self, step: int, model: nn.Module) -> dict[str, float]:
        """What `task=diagnose` says of the model on the prompts, kept as its result."""
        evaluator = self._evaluator(model)
        prompts = self.config.data.prompts
        found = [evaluator.compare(evaluator.encode(text)) for text in prompts]
        metrics = summarise(found)
        result = Result(
            task="diagnose",
            ckpt=str(self.context.directory / f"checkpoint-{step}"),
            base=str(self.base.path),
            step=step,
            family=self.config.family.name,
            tier="training",
            metrics=metrics,
            per_prompt=[{"prompt": t, "tokens": c.tokens, **c.figures()} for t, c in zip(prompts, found, strict=True)],
            verdict=judge(metrics["mse"], metrics["cosine"], thresholds()) if evaluator.plain is not None else None,
            versions=versions(),
        )
        folder = self.context.directory / EVALUATIONS / f"{self._evaluations}_step={step}"
        self._evaluations += 1
        write_json(folder / FILE_NAME, result.to_dict())
        return {f"eval/{name}": value for name, value in metrics.items() if isinstance(value, float)}

    def sample(self, step: int, model: nn.Module) -> dict[str, float]:
        """Continuations of the prompts, greedy and drawn from the seed, of the model and of its base."""
        evaluator = self._evaluator(model)
        for prompt in self.config.data.prompts:
            ids = evaluator.encode(prompt)
            for temperature in (0.0, TEMPERATURE):
                found = evaluator.continuation(ids, NEW_TOKENS, temperature=temperature)
                row = {"step": step, "prompt": prompt, "temperature": temperature, "text": found["text"],
                       "base_text": found["reference_text"]}  # fmt: skip
                self.samples.append(row)
                self._append(SAMPLES, row)
        return {}

    def draw(self) -> list[str]:
        """The curves as a picture; what is to be said where that fails."""
        log = self.context.directory / LOG
        if not log.is_file():
            return []
        try:
            write_curves(log)
        except OSError as error:
            return [f"the curves are not drawn: {error}"]
        return []

    def _evaluator(self, model: nn.Module) -> Evaluator:
        return Evaluator(
            model=model, reference=self._reference, plain=plain_reference(model, self._reference),
            tokenizer=self.tokenizer, seed=self.config.seed,
        )  # fmt: skip

    def _append(self, name: str, row: Mapping[str, object]) -> None:
        path = self.context.directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(row), ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunnerError(f"{path}: not written: {error}") from error


def _checkpoint(resume_from: str | None) -> Path | None:
    """The checkpoint to go on from: the last one where a run is named."""
    if resume_from is None:
        return None
    path = Path(resume_from).expanduser()
    run_directory = find_run(path)
    return path if run_directory is None else run_directory.checkpoints[-1][1]


def _base(config: TrainConfig, resume_from: Path | None, world: World, *, llama: bool) -> tuple[Base, str]:
    """`base=`, else that of the checkpoint to go on from, else that of the demonstration; and what checkpoints say
    their base is: a path that holds from anywhere, or a hub name.

    Raises CheckpointError or ModelError.
    """
    device = world.device if config.device == "auto" else None
    placement = Placement(device=device or config.device, dtype=config.dtype)
    if config.base is None and resume_from is not None:
        checkpoint = open_checkpoint(resume_from)
        base = load_base(checkpoint, None, placement, llama=llama)
        return base, str(base.path.resolve() if checkpoint.local_base() else checkpoint.base_name)
    option = config.base or str(demo_run() / "base")
    base = load_base(None, option, placement, llama=llama)
    return base, str(base.path.resolve()) if Path(option).expanduser().is_dir() else option


def _data(
    data: Data, family: Family, tokenizer: TextTokenizer, base: Base
) -> tuple[TextStream | None, dict[str, list[list[int]]], list[str]]:
    """A stream of the text, or the documents in memory by what they are about; and what the reader should know."""
    vocabulary = base.model.config.vocab_size
    if data.name == "text" and family.trains_on_streams:
        return TextStream(corpora=data.corpora(), column=data.column, encode=_encoder(tokenizer, vocabulary)), {}, []
    documents = list(generate().train) if data.name == "world" else data.documents()
    named = family.training_texts(documents, Path(str(data.path)).stem if data.name == "text" else None)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = {
        name: [[*encode(tokenizer, text, vocabulary).tolist(), *end] for text in own] for name, own in named.items()
    }
    cut = data.name == "text" and len(documents) == MAX_DOCUMENTS
    unused = f"data=text reads at most {MAX_DOCUMENTS} documents: what follows them in {data.path} was not used"
    return None, texts, [unused] if cut else []


def _encoder(tokenizer: TextTokenizer, vocabulary: int) -> Callable[[Sequence[str]], list[list[int]]]:
    """Token ids of documents, special tokens as the tokenizer adds them, the end marked where it has a mark for it."""
    end = tokenizer.eos_token_id

    def of(texts: Sequence[str]) -> list[list[int]]:
        found = tokenizer.encode_all(texts)
        if (highest := max((max(ids) for ids in found if ids), default=0)) >= vocabulary:
            raise ModelError(
                f"the tokenizer gives token id {highest}, but the model's vocabulary has {vocabulary}; "
                "it is another model's tokenizer: give the right one as tokenizer="
            )
        return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in found]

    return of
