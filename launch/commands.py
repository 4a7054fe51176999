"""A launcher of several commands: each obeys some of its flags, and returns what to print."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from rich.console import Console

from jaxdpo import InputError, processes

Commands = Mapping[str, tuple[Callable[..., Sequence[Any]], str]]  # its function, its flags' names


def call(command: str, commands: Commands, given: Sequence[flags.FlagHolder]) -> None:
    """Call a command with its own flags; one that is given to no effect is an `InputError`."""
    if processes.several():
        raise InputError(f"several processes: {command} is of one, with all its devices")
    function, names = commands[command]
    values = {flag.name: flag.value for flag in given}
    asked = {name: values.pop(name) for name in names.split()}
    if without := [name for name, value in values.items() if value is not None]:
        raise InputError(f"--{without[0]}: has no effect on {command}; leave it out")
    for shown in function(**asked):
        Console(soft_wrap=isinstance(shown, str)).print(shown, markup=False, highlight=False)
