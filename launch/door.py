"""What every launcher does around its one call: the environment, the flags, the exit status.

`--help` shows the launcher's docstring and its flags. Started as one of several processes, it meets
the others; only the first one speaks, and what ends one ends all. Exit status: 0 done, 2 a mistake
in what the user gave (one line, never a traceback), 143 stopped by a signal once all was saved, 130
stopped at once, 1 a bug, a process lost, or a step that hung.
"""

import os
import sys
import traceback
from collections.abc import Callable, Collection

import xla  # noqa: F401  first of all
from absl import flags

from jaxdpo import InputError, compilation, processes
from jaxdpo.metrics import console
from jaxdpo.stopping import Stopped


def run(main: Callable[..., None], *, commands: Collection[str] = ()) -> None:
    """Parse the command line, call `main`, and end the process with the right status.

    With `commands`, the first word of the command line must be one of them; `main` is given it.
    """
    if "--help" in sys.argv[1:]:
        print(sys.modules[main.__module__].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    try:
        words = _words(commands)
        processes.begin()
        if not processes.is_first():
            console.quiet, sys.stdout = True, open(os.devnull, "w")
        if warning := compilation.persist():
            console.print(warning, markup=False)
        status = _status(main, words)
        processes.finish()
    except InputError as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "interrupted; the same command goes on from what is saved")
    except Exception as error:
        if not processes.several():
            raise
        traceback.print_exc()
        _end(1, f"error: {type(error).__name__}: {error}")
    sys.exit(status)


def _words(commands: Collection[str]) -> list[str]:
    """The words of the command line that are no flags; `InputError` where it is wrong."""
    try:
        arguments = flags.FLAGS(sys.argv)
    # A recipe is a program: what it or a flag gets wrong can be any exception.
    except Exception as error:
        said = " ".join(str(error).strip("\"'").split())
        raise InputError(f"command line or recipe: {said}") from error
    words = arguments[1:]
    if commands and words[:1] not in [[command] for command in commands]:
        said = f"{words[0]!r} is no command" if words else "a command is missing"
        raise InputError(f"command line: {said}; choose {', '.join(commands)}")
    if words[bool(commands) :]:
        raise InputError(f"command line: {words[-1]!r} belongs to no flag")
    return words


def _status(main: Callable[..., None], words: list[str]) -> int:
    try:
        main(*words)
    except Stopped as stopped:
        console.print(str(stopped), markup=False)
        return 143
    return 0


def _end(status: int, said: str) -> None:
    if processes.several():
        processes.end_all(status, said)
    console.print(said, style="red" if status == 2 else None, markup=False)
    sys.exit(status)
