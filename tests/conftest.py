"""Tiny real checkpoints, written by the tests themselves, and the golden ones where that folder is present."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.machine import SLOW

ROOT = Path(__file__).resolve().parent.parent
# The models are tiny: one thread is faster than two, and does not suffer from a busy machine.
torch.set_num_threads(1)
# Started in the background by a script, pytest ignores SIGINT, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The golden checkpoints: a few small ones here, and more beside the checkout, on some machines.
GOLDEN = [ROOT / "tests" / "golden", Path(os.environ.get("RUNNER_GOLDEN", ROOT.parent / "shared" / "golden"))]


def golden_folders(kind: str) -> list[str]:
    """The golden checkpoints of this kind that are here, as `kind/name`, the base aside."""
    found = {
        path.name for root in GOLDEN if (root / kind).is_dir() for path in (root / kind).iterdir() if path.is_dir()
    }
    return [f"{kind}/{name}" for name in sorted(found - {"base"})]


def golden_numbers(kind: str) -> dict:
    """expected.json of this kind, for what is here."""
    files = [root / kind / "expected.json" for root in GOLDEN]
    return {name: numbers for file in files if file.exists() for name, numbers in json.loads(file.read_text()).items()}


def golden_file(name: str) -> Path | None:
    """The golden file of this name, where it is on this machine."""
    return next((root / name for root in GOLDEN if (root / name).exists()), None)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """The limit of pyproject.toml that catches a test which hangs, on this machine."""
    if config.option.timeout is None:
        config.option.timeout = float(config.getini("timeout")) * SLOW


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """The path of a golden checkpoint, `kind/name`. Skips where it is not on this machine."""

    def find(name: str) -> Path:
        found = [root / name for root in GOLDEN if (root / name).exists()]
        return found[0] if found else pytest.skip(f"the golden {name} (../shared/golden) is not on this machine")

    return find


@pytest.fixture(scope="session", params=["tiny", "golden"] if golden_folders("gpt") else ["tiny"])
def gpts(
    request: pytest.FixtureRequest, golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The path of a GPT checkpoint of 512 tokens and one head in this dialect, `small` or `medium`."""
    if request.param == "golden":
        return lambda dialect: golden(f"gpt/{dialect}")
    root = tmp_path_factory.mktemp("gpts")

    def made(dialect: str) -> Path:
        if not (root / dialect).exists():
            (root / dialect).mkdir()
            write_gpt(root / dialect, dialect)
        return root / dialect

    return made


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, so that outputs/ lands there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Outcome:
    """What one command line left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict:
        """The newest result.json under outputs/."""
        newest = max(Path("outputs").rglob("result.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text())


@pytest.fixture
def run(workdir: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run one command line in this process, in an empty directory, without W&B."""
    from runner import cli

    def call(*words: str) -> Outcome:
        capfd.readouterr()
        code = cli.run([*words, "tracker=none"])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def write_gpt(directory: Path, dialect: str) -> Path:
    """A random GPT of 512 tokens and one head as the training script saves it, the medium one in bfloat16."""
    from tests.gpt_files import random_state, script_file

    state = random_state(dialect, vocab=512)
    if dialect == "medium":
        state = {name: tensor if name == "scalars" else tensor.bfloat16() for name, tensor in state.items()}
    return script_file(directory / "best_state_step000300_val3.2500.pt", state)


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 256 tokens and three special ones: any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(directory)


def write_base(directory: Path, *, hidden: int = 32, layers: int = 3, seed: int = 0, **config: object) -> Path:
    """A random Llama of `layers` layers with grouped queries, in a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": 272,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden + 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "initializer_range": 0.15,
        **config,
    }
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def npt_tensors(
    base: Path, layers: dict[int, tuple[str, int, int]], *, seed: int = 1, scale: float = 0.1
) -> dict[str, torch.Tensor]:
    """Random NPT weights: layer → (modulation, np_rank, num_ranks), under the names of the first spelling."""
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (modulation, rank, count) in layers.items():
        for suffix in {"single": [""], "dual": ["_gate", "_up"], "triple": ["_gate", "_up", "_down"]}[modulation]:
            d_in, d_out = (inner, hidden) if suffix == "_down" else (hidden, inner)
            for matrix, shape in {"W_down": (hidden, rank), "W_a_up": (rank, d_in), "W_b_up": (rank, d_out)}.items():
                for i in range(count):
                    name = f"layer_{layer}_np.{matrix}{suffix}" + (f".{i}" if count > 1 else "")
                    tensors[name] = torch.randn(shape, generator=generator) * scale
    return tensors


def write_npt(directory: Path, tensors: dict[str, torch.Tensor], *, base: Path | None = None, step: int = 100) -> Path:
    """An npt_delta checkpoint as training writes it."""
    directory.mkdir(parents=True)
    torch.save(tensors, directory / "npt_weights.pt")
    torch.save({"global_step": step, "batch_count": step}, directory / "training_state.pt")
    if base is not None:
        (directory / "config.json").write_text(json.dumps({"model_name": str(base), "learning_rate": 1e-3}))
    return directory


MIXED = {0: ("single", 3, 1), 1: ("dual", 4, 3), 2: ("triple", 2, 5)}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random base model with tokenizer."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def checkpoint(tmp_path: Path, base: Path) -> Path:
    """A checkpoint with one layer of each kind."""
    return write_npt(tmp_path / "run" / "checkpoint-100", npt_tensors(base, MIXED), base=base)
