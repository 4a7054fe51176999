r"""Check a Hugging Face checkpoint: does it load, and what is in it?

    python launch/convert.py --check EleutherAI/pythia-70m --revision step143000
    python launch/convert.py --check path/to/folder

Prints the configuration and the number of parameters, or one line with everything that is
missing, unexpected or mis-shaped (exit status 2).
"""

import dataclasses

import jax
from absl import flags
from door import run

from jaxdpo.convert import load_hf
from jaxdpo.sharding import make_mesh

_CHECK = flags.DEFINE_string(
    "check", None, "Folder, or hub name owner/name, of a checkpoint.", required=True
)
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit on the hub.")


def main() -> None:
    config, params = load_hf(_CHECK.value, mesh=make_mesh(), revision=_REVISION.value)
    for field, value in dataclasses.asdict(config).items():
        print(f"{field:20} {value}")
    print(f"{'parameters':20} {sum(leaf.size for leaf in jax.tree.leaves(params)):,}")


if __name__ == "__main__":
    run(main)
