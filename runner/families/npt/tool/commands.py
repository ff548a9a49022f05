"""All commands of the interactive tool, and what does the one that a line names.

A command is a function from the session and a line's arguments to what it says. It does all of that or nothing; its
errors are those of the functions that it calls.
"""

from runner.errors import ConfigError, printable
from runner.families.npt.tool import bank, edits, injections
from runner.families.npt.tool.session import Call, Command, Reply, Tool, parse

_HISTORY_SHOWN = 20


def execute(tool: Tool, line: str) -> Reply:
    """Do what a line says. Raises a RunnerError; then nothing was done."""
    command, call = parse(line, COMMANDS)
    reply = command.run(tool, call)
    if command is not COMMANDS["clear-history"]:
        tool.history.append(line)
    return reply


def history(tool: Tool, call: Call) -> Reply:
    """The last lines."""
    return Reply(lines=[printable(line) for line in tool.history[-_HISTORY_SHOWN:]] or ["nothing was typed yet"])


def clear_history(tool: Tool, call: Call) -> Reply:
    """Forget the lines."""
    tool.history = []
    return Reply(lines=["the history is empty"])


def show_help(tool: Tool, call: Call) -> Reply:
    """All commands, or one."""
    names = [name for name in COMMANDS if not call.words or name == call.words[0]]
    lines = []
    for name in names:
        options = " ".join(f"[-{each}]" for each in COMMANDS[name].options)
        lines += [f"  {' '.join(filter(None, (name, COMMANDS[name].usage, options)))}", f"      {COMMANDS[name].about}"]
    if not names:
        raise ConfigError(f"there is no command {call.words[0]!r}")
    return Reply(lines=lines)


COMMANDS: dict[str, Command] = {
    **bank.COMMANDS,
    **injections.COMMANDS,
    **edits.COMMANDS,
    "history": Command(usage="", about=f"the last {_HISTORY_SHOWN} lines", run=history),
    "clear-history": Command(usage="", about="forget them", run=clear_history),
    "help": Command(usage="[COMMAND]", about="this", run=show_help, most=1),
    "exit": Command(usage="", about="end; also Ctrl-D", run=lambda tool, call: Reply(ends=True)),
}  # fmt: skip
