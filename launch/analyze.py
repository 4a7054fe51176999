"""Analyse: which tokens a policy rewards, how well that finds what is wrong, a run's report.

    python launch/analyze.py credit --run runs/quickstart
    python launch/analyze.py credit --model FOLDER --reference FOLDER --beta 0.1 \\
        --examples marked.json --out maps
    python launch/analyze.py credit-benchmark --run runs/quickstart
    python launch/analyze.py report --run runs/quickstart

A model is a Hugging Face folder, a hub name owner/name, or WORKDIR:STAGE[:best] of a run, of which
WORKDIR:start is what it began from. --run gives the models, beta and data that are not given.
"""

import commands
import door
from absl import flags

from jaxdpo import InputError, pairs
from jaxdpo.analysis import credit, credit_benchmark, report

GIVEN = [
    flags.DEFINE_string("run", None, "A run's work directory."),
    flags.DEFINE_string("model", None, "The policy."),
    flags.DEFINE_string("reference", None, "The model that its rewards are relative to."),
    flags.DEFINE_string("base", None, "The model that the reference was made from."),
    flags.DEFINE_float("beta", None, "Strength of the KL term that the policy was trained with."),
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the computation."),
    flags.DEFINE_string("data", None, "A data set whose responses are looked at."),
    flags.DEFINE_enum("format", None, list(pairs.FORMATS), "What the rows of --data look like."),
    flags.DEFINE_string("split", None, "Which split of --data on a hub."),
    flags.DEFINE_integer("limit", None, "Read so many rows of --data."),
    flags.DEFINE_string("examples", None, "A .json file of responses with marked spans."),
    flags.DEFINE_bool("corrupt", None, "Put errors into the chosen responses of --data."),
    flags.DEFINE_integer("seed", None, "Of what is drawn at random."),
    flags.DEFINE_string("out", None, "The folder to write into; the run's if not given."),
]
SCORED = "run model reference beta dtype data format split limit out"


def reported(run: str | None) -> list:
    if run is None:
        raise InputError("--run: give the work directory of a run")
    return report.write(run)


COMMANDS = {
    "credit": (credit.write, f"{SCORED} examples"),
    "credit-benchmark": (credit_benchmark.write, f"{SCORED} base corrupt seed"),
    "report": (reported, "run"),
}


def main(command: str) -> None:
    commands.call(command, COMMANDS, GIVEN)


if __name__ == "__main__":
    door.run(main, commands=COMMANDS)
