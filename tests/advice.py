"""Which flags an error of a command names that the command does not have."""

import re

from resnet_jax.cli import arguments
from resnet_jax.distributed.launch import FLAGS

_CONNECTING = {*re.findall(r"--[\w-]+", FLAGS)}
_OF_RUNS = {"--config", "--workdir"}
# Flags that a command reads itself, besides those of its parser.
_READ = {
    "train": {"--help", *_OF_RUNS, *_CONNECTING},
    "plan": _OF_RUNS,
    "find_rate": _OF_RUNS,
    "doctor": _CONNECTING,
}
# Of Docker and Slurm.
_ELSEWHERE = {"--gpus", "--privileged", "--pids-limit", "--cpus-per-task"}


def foreign_flags(words, message):
    """The flags in a message that neither the command has nor the user has typed.

    What stands behind the name of another command, as in "run: resnet-jax prepare mnist
    --data_dir=DIR" or "(evaluate: --split)", is advice about that one.

    Args:
      words: The command and its arguments.
      message: Its error.
    """
    parsers = arguments.commands_of(arguments.build_parser())
    command, *typed = words or [""]
    own = {*parsers[command]._option_string_actions} if command in parsers else {"--help"}
    own |= _READ.get(command, set()) | _ELSEWHERE | {*re.findall(r"--[a-z][\w-]*", " ".join(typed))}
    text = re.sub(rf"\b(?:{'|'.join(parsers)})\b:? [^;)]*", "", message)
    found = {*re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    return {flag for flag in found - own if not flag.startswith("--xla")}
