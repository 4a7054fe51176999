"""Evaluate: whose responses are better, agreement with labelled pairs, what more beams are worth.

    python launch/evaluate.py win-rate --policy runs/quickstart:dpo --judge oracle \\
        --data runs/quickstart/data/pairs_test.jsonl --limit 256 --out runs/quickstart/win_rate
    python launch/evaluate.py win-rate --policy dpo.jsonl --opponent sft.jsonl --data tldr.jsonl \\
        --judge server --judge_model NAME --both_orders --out dpo_sft
    python launch/evaluate.py accuracy --run runs/quickstart --out runs/quickstart/accuracy
    python launch/evaluate.py sweep --run runs/figure2 --beam_sizes 1,2,5 --norms generated,total

A side is a model (see decode.py), a file that decode.py wrote, or the data's "chosen" or "rejected"
responses. A server is that of OPENAI_BASE_URL, its key that of OPENAI_API_KEY.
"""

import commands
import data_flags
import decoding_flags
import door
import judge_flags
from absl import flags

from jaxdpo import evaluation
from jaxdpo.analysis import preference_accuracy, sweep

SHARED = (data_flags, decoding_flags, judge_flags)
GIVEN = sum((module.GIVEN for module in SHARED), []) + [
    flags.DEFINE_string("policy", None, "Whose wins are counted."),
    flags.DEFINE_string("opponent", None, "Who it is compared with; chosen if not given."),
    flags.DEFINE_string("run", None, "A run's work directory, for what is not given."),
    flags.DEFINE_string("model", None, "The policy that is measured or swept."),
    flags.DEFINE_string("reference", None, "The model that its rewards are relative to."),
    flags.DEFINE_float("beta", None, "Strength of the KL term that it was trained with."),
    flags.DEFINE_list("methods", None, f"Sweep {' and '.join(sweep.METHODS)}, if not given."),
    flags.DEFINE_list("norms", None, f"Rank beams by {', '.join(sweep.NORMS)}, if not given."),
    flags.DEFINE_list("beam_sizes", None, f"How many beams; {sweep.BEAM_SIZES} if not given."),
]
for module in SHARED:
    flags.adopt_module_key_flags(module)
DATA, DECODING, JUDGE = (module.NAMES for module in SHARED)
COMMANDS = {
    "win-rate": (evaluation.win_rate, f"policy opponent {DATA} {DECODING} {JUDGE}"),
    "accuracy": (preference_accuracy.write, f"run model reference beta {DATA}"),
    "sweep": (sweep.write, f"run model reference beta {sweep.OPTIONS}"),
}


def main(command: str) -> None:
    commands.call(command, COMMANDS, GIVEN)


if __name__ == "__main__":
    door.run(main, commands=COMMANDS)
