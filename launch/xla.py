"""What XLA reads when its backend starts: imported before anything that imports jax."""

import os
import re
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
    devices = int(fake[1]) * int(os.environ.get("JAX_NUM_PROCESSES") or 1)
    os.environ.setdefault("NPROC", str(4 * devices))
