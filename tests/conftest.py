"""Strict JAX for the whole suite: eight CPU devices, no silent rank promotion."""

import os

# Steps in flight on fake devices starve each other on few cores unless XLA's thread pool
# is larger than the devices; it must be set before the backend starts.
os.environ.setdefault("NPROC", "32")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
