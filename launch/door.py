"""What every launcher does around its one call: the environment, the flags, the exit status.

`--help` shows the launcher's docstring and its flags. Exit status: 0 done, 2 a mistake in what
the user gave (one line, never a traceback), 1 a bug.
"""

import os
import re
import sys
from collections.abc import Callable, Collection
from importlib.metadata import version

# By default XLA overlaps what it can of a CPU's program, which takes half as much memory again and
# is no faster. jaxlib 0.10.1 to 0.12 know the flag; one that is not known ends the process.
if version("jaxlib").startswith(("0.10.", "0.11.", "0.12.")):
    if "cpu" in (os.environ.get("JAX_PLATFORMS") or "cpu"):
        one_by_one = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ["XLA_FLAGS"] = f"{one_by_one} {os.environ.get('XLA_FLAGS', '')}"
# Fake CPU devices starve each other in a thread pool that is no larger than the machine's cores; a
# single device takes 1.4 times as long in a larger one.
if fake := re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
    os.environ.setdefault("NPROC", str(4 * int(fake[1])))

from absl import flags
from rich.console import Console

from jaxdpo import InputError, compilation


def run(main: Callable[..., None], *, commands: Collection[str] = ()) -> None:
    """Parse the command line, call `main`, and end the process with the right status.

    With `commands`, the first word of the command line must be one of them; `main` is given it.
    """
    console = Console(stderr=True, soft_wrap=True)
    if "--help" in sys.argv[1:]:
        print(sys.modules[main.__module__].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    try:
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
        if warning := compilation.persist():
            console.print(warning, markup=False, highlight=False)
        main(*words)
    except InputError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from what is saved")
        sys.exit(130)
