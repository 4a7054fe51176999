"""What a benchmark leaves: a table on the console, `results.json` and a figure in its folder."""

import json
import math
import os
import platform
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 150)
PACKAGES = ("jaxdpo", "jax", "flax", "torch", "transformers", "trl")
OURS, OTHERS = "#2b6cb0", "#b7791f"


def warn_if_busy() -> None:
    """Say so where other work would spoil the times: PyTorch's threads spin, and lose most."""
    if os.getloadavg()[0] > 0.5:
        load = os.getloadavg()[0]
        console.print(f"other work runs on this machine (load {load:.1f}): do not keep these times")


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    shown = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*map(str, row))
    console.print(shown)


def median_and_spread(values: list[float], digits: int = 2) -> str:
    """
    >>> median_and_spread([1.0, 3.0, 2.0])
    '2.00 (1.00-3.00)'
    """
    show = lambda value: f"{value:.{digits}f}"
    return f"{show(statistics.median(values))} ({show(min(values))}-{show(max(values))})"


def write(out: Path, results: dict[str, Any]) -> None:
    """`results.json`, with what they were measured on."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine()} | results, indent=1)
    (out / "results.json").write_text(text + "\n")
    console.print(f"results and figures: {out}")


def machine() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),
    }


def processor() -> str:
    """The name of the processor, where the system gives it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def bars(
    file: Path, title: str, unit: str, times: dict[str, list[float]], ours: str = "jaxdpo"
) -> None:
    """A bar for each median, with its spread; how many times `ours` it is, where that is there."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names, base = list(times), statistics.median(times.get(ours, [math.nan]))
    medians = [statistics.median(times[name]) for name in names]
    spread = [
        [m - min(times[n]) for n, m in zip(names, medians, strict=True)],
        [max(times[n]) - m for n, m in zip(names, medians, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(names)), layout="constrained")
    colours = [OURS if name == ours else OTHERS for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, height=0.65)
    for i, median in enumerate(medians):
        text = f"{median / base:.2f}x" if ours in times else f"{median:.2f}"
        axes.text(median / 2, i, text, ha="center", va="center", color="w")
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
