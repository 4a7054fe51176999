"""When programs are compiled: before the loop, once, and kept for the next process.

Three things: a folder where compiled programs outlive the process (`persist`), a count of what
is compiled and how long that takes (`Compilations`), and programs that are compiled for every
shape before the first of them runs (`Programs`), so that one that does not compile or does not
fit says so before anything is trained, and nothing is compiled later.

Left out: what is compiled (`step`), and when (`train`).
"""

import contextlib
import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdpo import InputError, pythia, qfunction
from jaxdpo.pythia_cache import CachedPythia
from jaxdpo.pythia_config import PythiaConfig

_COMPILED = "/jax/core/compile/backend_compile_duration"  # from the cache as well
_FROM_CACHE = "/jax/compilation_cache/cache_hits"
_ROOM = 2 * 2**30  # bytes of programs that are kept for other runs
_TOO_LARGE = (
    "a step does not fit the memory of a device; lower batch_size, raise micro_batches, or set "
    "model.remat"
)


def persist() -> str | None:
    """Keep compiled programs in a folder, so that the next process need not compile them.

    The folder is JAX_COMPILATION_CACHE_DIR, or else jaxdpo/jax among the user's caches, of which
    the programs used last are kept, 2 GiB of them; JAX_ENABLE_COMPILATION_CACHE=false turns it
    off. A program is found again on a CPU of the same instructions only. Returns a line of warning
    where the folder cannot be written to, or can be by others, and then nothing is kept.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    given = jax.config.jax_compilation_cache_dir
    folder = given or _user_folder()
    try:
        if "://" not in folder:
            _claim(folder)
        if not given and jax.config.jax_compilation_cache_max_size == -1:  # JAX's own bound
            _trim(folder)
    except OSError as error:
        jax.config.update("jax_compilation_cache_dir", None)
        return (
            f"warning: {folder}: cannot be written to, or not trusted ({error.strerror}), so "
            "programs are compiled by every run; set JAX_COMPILATION_CACHE_DIR to another folder"
        )
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run makes a hundred small programs, which take seconds together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return None


def _user_folder() -> str:
    return os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxdpo", "jax"
    )


def _claim(folder: str) -> None:
    """Make the folder, or raise `OSError` where it is not the user's alone to write to.

    A program from it is executed.
    """
    if folder.startswith("~"):
        raise FileNotFoundError(errno.ENOENT, "there is no home folder")
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    status = Path(folder).stat()
    if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(errno.EACCES, "others own it or may write to it")
    tempfile.TemporaryFile(dir=folder).close()


def _trim(folder: str) -> None:
    """Remove what was longest unused and does not fit into `_ROOM`; others may do so as well."""
    found = []
    for file in Path(folder).glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    room = _ROOM
    for _, size, file in sorted(found, reverse=True):
        room -= size
        if room < 0:
            file.unlink(missing_ok=True)


class Compilations:
    """Counts what is compiled by any thread while it is entered.

    >>> with Compilations() as found:
    ...     _ = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
    >>> found.so_far()["programs"]
    1
    """

    def __init__(self):
        self._seconds: list[float] = []  # appending is atomic
        self._hits: list[str] = []

    def so_far(self) -> dict[str, int | float]:
        """How many `programs` were made, how many of them read from the folder of `persist`, and
        the seconds of compiling or reading, added up over threads."""
        return {
            "programs": len(self._seconds),
            "programs_from_cache": len(self._hits),
            "compile_seconds": sum(self._seconds),
        }

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._timed)
        jax.monitoring.register_event_listener(self._happened)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._timed)
        jax.monitoring.unregister_event_listener(self._happened)

    def _timed(self, event: str, seconds: float, **_) -> None:
        if event == _COMPILED:
            self._seconds.append(seconds)

    def _happened(self, event: str, **_) -> None:
        if event == _FROM_CACHE:
            self._hits.append(event)


class Programs:
    """A jitted function of two arguments, compiled for every form of the second one.

    Called as the function is; a tree, shape or dtype that it was not made for is a `KeyError`,
    never a compilation. Donation and shardings are the function's.
    """

    def __init__(self, function: Callable, first: Any, seconds: Iterable[Any]):
        """Lower `function(first, second)` for each second; arrays may be `ShapeDtypeStruct`s."""
        self._lowered = {_form(second): function.lower(first, second) for second in seconds}
        self._compiled: dict[tuple, Any] = {}

    def __len__(self) -> int:
        return len(self._lowered)

    def __call__(self, first: Any, second: Any) -> Any:
        return self._compiled[_form(second)](first, second)


def compile_all(programs: Sequence[Programs]) -> int:
    """Compile all programs side by side; returns the bytes a device needs to run the largest.

    Those are its arguments, its results and what it holds meanwhile; 0 where the backend does
    not say. Raises `InputError` where a program needs more memory than a device has.
    """
    lowered = [one for each in programs for one in each._lowered.values()]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            compiled = list(threads.map(lambda one: one.compile(), lowered))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"{_TOO_LARGE} ({str(error).splitlines()[0]})") from error
    for each in programs:
        each._compiled = dict(zip(each._lowered, compiled, strict=False))
        del compiled[: len(each)]
    needed = max((_memory(one) for each in programs for one in each._compiled.values()), default=0)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if needed > limit:
        raise InputError(f"{_TOO_LARGE} (it needs {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB)")
    return needed


def _memory(program: Any) -> int:
    size = program.memory_analysis()
    if size is None:
        return 0
    held = size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
    return held + size.temp_size_in_bytes


def _form(tree: Any) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def check_dtype(dtype: str) -> None:
    """Raise `InputError` where the devices cannot train or decode in this dtype.

    Both are compiled for a model of one layer: no table says which products a backend lacks.
    float32 is everywhere.

    >>> check_dtype("bfloat16")
    """
    if dtype == "float32":
        return
    sizes = dict(vocab_size=8, num_layers=1, num_heads=1, width=8, mlp_width=8)
    config = PythiaConfig(**sizes, dtype=dtype, param_dtype=dtype)
    row, cached = jnp.zeros((1, 8), jnp.int32), CachedPythia(config)

    def loss(params):
        hidden = pythia.hidden_states(config, params, row, row, row, row)
        return qfunction.token_logps(hidden, params["unembedding"], row).sum()

    def decoded(params):
        first, pool = cached.prefill(params, row, row[:, 0] + 1, num_beams=1, room=1)
        return first, cached.extend(params, pool, row[:, :1], room=1)

    params = jax.eval_shape(lambda key: pythia.init_params(config, key), jax.random.key(0))
    try:
        for function in (jax.grad(loss), decoded):
            jax.jit(function).lower(params).compile()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        kind, why = jax.devices()[0].device_kind, str(error).partition("\n")[0]
        raise InputError(
            f"model.dtype: {dtype} does not do on this device, {kind} ({why}); choose another"
        ) from error
