"""`task=transfer`: modulations of an NPT model taken, injected and written in; in a prompt, a script, or as listed.

In the result: `commands` [{line, command, …figures}], what each line found; `per_prompt` has a row an injection;
`experiments` and `means` where a file of experiments was run. `metrics` are those of the last injection.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.checkpoints.detect import open_checkpoint
from runner.config import TransferConfig
from runner.errors import ConfigError, ModelError, RunnerError, printable
from runner.evaluation.decoding import eos_ids
from runner.evaluation.placement import Placement
from runner.evaluation.tokenizers import load_tokenizer
from runner.families.npt import Npt
from runner.families.npt.tool.commands import execute
from runner.families.npt.tool.session import Settings, Tool, quoted
from runner.families.npt.transfer import active_layers, npt_model
from runner.families.npt.transfer_experiments import read_experiments, run_experiments
from runner.families.npt.transfer_permanent import default_strength
from runner.files.atomic import write_whole
from runner.generation.chat import line_history
from runner.results import JsonObject, Result
from runner.tasks.context import Context, cache_directory, checkpoint_path
from runner.transfer import tokenizer_of

PAGE, TABLE = "transfer.html", "transfer.csv"
Show = Callable[[str], None]
_TWICE = 1.0  # seconds within which a second Ctrl-C ends the session


def run(config: TransferConfig, context: Context) -> Result:
    """Do what the script, the experiments, standard input or a person says. Raises the errors of its first bad line."""
    settings: Settings = config.transfer
    wanted = read_experiments(Path(settings.experiment).expanduser()) if settings.experiment else []
    lines = None if settings.experiment else _script(settings, context)
    tool, result = _opened(config, context)
    if settings.session:
        execute(tool, f"load {quoted(settings.session)}")
        tool.history.pop()
    show: Show = _nothing if context.in_sweep else _shown
    with context.timed("transfer"):
        if wanted:
            result.details = run_experiments(tool, wanted, show)
            commands: list[JsonObject] = []
        else:
            commands = list(_typed(tool, config) if lines is None else _scripted(tool, lines, settings.script, show))
            result.details = {"commands": commands}
    result.per_prompt = [row for command in commands if (row := _injection_row(command))]
    if result.per_prompt:
        result.metrics = {name: value for name, value in result.per_prompt[-1].items() if isinstance(value, float)}
    elif wanted:
        result.metrics = {name: value for name, value in result.details["means"].items() if isinstance(value, float)}
    if settings.page and not context.in_sweep:
        _write_page(result, context)
    return result


def _opened(config: TransferConfig, context: Context) -> tuple[Tool, Result]:
    """The model with its session, and the result so far. Raises ModelError where it has no NPT layers."""
    placement = Placement(device=config.device, dtype=config.dtype, device_map=config.family.device_map)
    with context.timed("open"):
        checkpoint = open_checkpoint(checkpoint_path(config), config.format.name, config.format.module)
    if not checkpoint.layers:
        raise ModelError(
            f"{checkpoint.path}: No NPT layers found: it is {checkpoint.format}, and knowledge is transferred between "
            "the prompts of an NPT model only"
        )
    family = config.family.of(checkpoint)
    with context.timed("load_checkpoint"):
        own = family.load_base(checkpoint, config.base, placement)
        model = npt_model(family.build(checkpoint, own, placement))
    tokenizer = load_tokenizer(config.tokenizer, []) if config.tokenizer else tokenizer_of(model)
    active = active_layers(model, None)
    assert isinstance(family, Npt)
    tool = Tool(
        model=model,
        tokenizer=tokenizer,
        settings=config.transfer,
        unrelated=config.data.prompts,
        eos=eos_ids(model, tokenizer),
        active=active,
        layer=active[0],
        strength=default_strength(model),
    )
    base = own.path if own else checkpoint.local_base()
    return tool, context.result(
        "transfer",
        checkpoint,
        base=str(base) if base else None,
        layers=[layer.summary() for layer in checkpoint.layers],
    )


def _script(settings: Settings, context: Context) -> list[str] | None:
    """The lines of the script or of standard input; None where a person types them. Raises ConfigError."""
    if settings.script and settings.script != "-":
        try:
            return Path(settings.script).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"transfer.script={settings.script}: cannot be read: {error}") from error
    if settings.script == "-" or not sys.stdin.isatty():
        if context.in_sweep:
            raise ConfigError("a sweep has nobody who types: give transfer.script= or transfer.experiment=")
        try:
            return sys.stdin.read().splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is no UTF-8 text: {error}") from error
    return None


def _scripted(tool: Tool, lines: Iterable[str], script: str | None, show: Show) -> Iterator[JsonObject]:
    """What each line finds; empty lines and those that begin with # are left out. The first error ends it."""
    where = script if script and script != "-" else "standard input"
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            reply = execute(tool, line.strip())
        except RunnerError as error:
            raise type(error)(f"{where}, line {number}: {error}") from error
        for said in reply.lines:
            show(said)
        yield {"line": number, "command": line.strip(), **reply.figures}
        if reply.ends:
            return


def _typed(tool: Tool, config: TransferConfig) -> Iterator[JsonObject]:
    """What each line that a person types finds, to its end; an error is one line, and the session goes on."""
    known, active = (", ".join(map(str, layers)) for layers in (tool.model.npt_layers, tool.active))
    print(f"NPT layers {known}, active {active}; help, exit")
    prompt = "> " if sys.stdout.isatty() else ""
    number, last = 0, float("-inf")
    with line_history(cache_directory(config.cache) / "transfer_history"):
        while True:
            try:
                line = input(prompt).strip()
                number += 1
                if line:
                    reply = execute(tool, line)
                    for said in reply.lines:
                        _shown(said)
                    yield {"line": number, "command": line, **reply.figures}
                    if reply.ends:
                        return
            except EOFError:
                print(flush=True)
                return
            except RunnerError as error:
                print(f"error: {error}", flush=True)
            except KeyboardInterrupt:
                now = time.monotonic()
                if now - last < _TWICE:
                    raise
                last = now
                print("\ninterrupted; once more to end, or exit", flush=True)


def _shown(line: str) -> None:
    print(printable(line), flush=True)


def _nothing(line: str) -> None:
    """A job of a sweep shows its result only."""


def _injection_row(command: Mapping[str, Any]) -> JsonObject | None:
    """The row of one injection, for tables: what was injected where, its KL, and what the controls say."""
    if "modulation" not in command or "top" not in command:
        return None
    controls = command.get("controls", {})
    names = ("modulation", "mode", "alpha", "strength", "space", "kl")
    row = {"prompt": command["text"], **{name: command[name] for name in names}}
    for name, key in (("permuted_kl", "permuted"), ("other_prompt_kl", "other_prompt"), ("locality_kl", "locality")):
        if key in controls:
            row[name] = controls[key]["kl"]
    for each in command["tracked"]:
        row[f"change {each['text']!r}"] = each["change"]
    return row


def _write_page(result: Result, context: Context) -> None:
    """The page and its table beside the result, where there is anything to be seen."""
    from runner.reports.page.transfer import page, to_csv  # what draws is not for everyone who runs

    content = result.to_dict()
    text = page(content)
    if text is None:
        return
    try:
        write_whole(context.directory / PAGE, text.encode())
        write_whole(context.directory / TABLE, to_csv(content).encode())
    except OSError as error:
        raise RunnerError(f"{context.directory}: the page cannot be written: {error.strerror}") from error
    result.details["page"] = str(context.directory / PAGE)
