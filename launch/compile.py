"""Whether a recipe fits a TPU slice, without a TPU: its programs compiled, and what they need.

python launch/compile.py --config configs/tldr_pythia_2_8b.py --topology v5e:4x4

Needs the compiler of the slice, `pip install -e '.[aot]'`. Nothing is read but the recipe: rows are
as the lengths given here make them. With --search the micro-batch is grown until it fits no more.
A recipe is a Python file and is executed: run only those you trust.
"""

import json
from pathlib import Path

import door
import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from jaxdpo import InputError, ahead, recipe

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The slice: v5e:4x4, v5p:2x2x4, ...", required=True
)
STAGE = flags.DEFINE_enum("stage", "dpo", list(recipe.STAGES), "The stage that is compiled.")
PROMPT = flags.DEFINE_integer("prompt", 310, "Mean tokens of a prompt.", lower_bound=1)
RESPONSE = flags.DEFINE_integer("response", 35, "Mean tokens of a response.", lower_bound=1)
LONGEST = flags.DEFINE_integer("longest", 560, "Positions of the longest example in its row.")
PROMPTS = flags.DEFINE_integer("prompts", 64, "Prompts decoded together.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Of each.", lower_bound=1)
SEARCH = flags.DEFINE_bool("search", False, "Find the largest micro-batch that fits.")
OUT = flags.DEFINE_string("out", None, "A file for the report as JSON.")
flags.mark_flag_as_required("config")


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # no program of it can be run here
    config, stage, console = CONFIG.value, STAGE.value, Console(soft_wrap=True)
    recipe.check(config)
    if stage not in config.stages:
        raise InputError(f"--stage {stage}: the recipe has {', '.join(config.stages)}")
    mesh = ahead.tpu_mesh(TOPOLOGY.value, **config.mesh)
    lengths, found = ahead.Lengths(PROMPT.value, RESPONSE.value, LONGEST.value), []
    sizes = {"prompts": PROMPTS.value, "new_tokens": NEW_TOKENS.value}
    for report in ahead.reports(config, stage, mesh, lengths, **sizes):
        console.print(f"{report.program}: {report.fault or 'fits'}, {report.seconds:.0f} s")
        found.append(report)
    kind = mesh.devices.flat[0].device_kind
    console.print(ahead.table(found, f"a device of {mesh.size}, {kind}; memory in GiB"))
    answer = {"programs": list(map(ahead.as_json, found)), "mesh": dict(mesh.shape), "kind": kind}
    if SEARCH.value:
        for pairs in ahead.largest_batch(config, stage, mesh, lengths):
            console.print(f"a micro-batch of {pairs} pairs fits")
            answer["largest_micro_batch"] = pairs
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    door.run(main)
