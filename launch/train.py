"""Train: `python launch/train.py --config configs/quickstart.py --workdir runs/quickstart`.

A recipe's keys are set on the command line, as in `--config.dpo.beta=0.05`; an unknown key
is an error. The same command goes on after a kill, and does nothing once all is done. Of a
recipe with `runs`, such as configs/figure3.py, each is trained in a folder of its own. A
recipe is a Python file and is executed: run only those you trust.
"""

from pathlib import Path

import door
from absl import flags
from ml_collections import config_flags

from jaxdpo import InputError, experiment

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    recipe = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(recipe).is_file():
        raise InputError(f"--config {recipe}: no such file")
    experiment.run(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    door.run(main)
