"""Strict JAX for the whole suite: eight CPU devices, no silent rank promotion.

What is compiled is kept until the session ends, for other tests and for the launchers that tests
start: much of it is the same programs again.
"""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

# Steps in flight on fake devices starve each other on few cores unless XLA's thread pool
# is larger than the devices; it must be set before the backend starts.
os.environ.setdefault("NPROC", "32")
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxdpo-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# XLA's older emitters compile a third faster; later versions have no others, and end at the flag.
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def tenured():
    """What JAX keeps of a module's programs, no later collection of garbage looks through again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def quick_compile():
    """For a module most of whose time would go to compiling programs that run a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_unconfigure():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
