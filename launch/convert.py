r"""Hugging Face checkpoints: check one, or write one from a run.

    python launch/convert.py --check path/to/folder
    python launch/convert.py --check EleutherAI/pythia-70m --revision step143000
    python launch/convert.py --workdir runs/quickstart --stage dpo --to exported/dpo

A check prints the configuration and the number of parameters, or one line with everything
that is missing, unexpected or mis-shaped (exit status 2).
"""

import dataclasses

import door
import jax
from absl import flags

from jaxdpo import InputError, convert, recipe, runs, sharding

CHECK = flags.DEFINE_string("check", None, "Folder, or hub name owner/name, of a checkpoint.")
REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of --check on the hub.")
WORKDIR = flags.DEFINE_string("workdir", None, "A run whose parameters are written.")
STAGE = flags.DEFINE_enum("stage", "dpo", recipe.STAGES, "The stage of --workdir that is written.")
WHICH = flags.DEFINE_enum("which", "last", runs.WHICH, "The checkpoint of --stage that is written.")
TO = flags.DEFINE_string("to", None, "The Hugging Face folder to write.")


def main() -> None:
    if CHECK.value and not (WORKDIR.value or TO.value):
        check(CHECK.value, REVISION.value)
    elif WORKDIR.value and TO.value and not (CHECK.value or REVISION.value):
        runs.export(WORKDIR.value, STAGE.value, TO.value, which=WHICH.value)
        print(f"wrote {TO.value}")
    else:
        raise InputError("give either --check [--revision], or --workdir and --to")


def check(source: str, revision: str | None) -> None:
    config, params = convert.load_hf(source, mesh=sharding.make_mesh(), revision=revision)
    for field, value in dataclasses.asdict(config).items():
        print(f"{field:20} {value}")
    print(f"{'parameters':20} {sum(leaf.size for leaf in jax.tree.leaves(params)):,}")


if __name__ == "__main__":
    door.run(main)
