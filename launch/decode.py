"""Decode: what a model, or a product of models, says to prompts.

    python launch/decode.py --model runs/quickstart:dpo --data runs/quickstart/data/pairs_test.jsonl
    python launch/decode.py --model FOLDER --prompts prompts.txt --method beam --beam_size 5 \\
        --reference runs/quickstart:sft --beta 0.1 --out completions.jsonl

A model is a Hugging Face folder, a hub name owner/name, or WORKDIR:STAGE[:best] of a run.
"""

import decoding_flags
import door
from absl import flags
from rich.console import Console

from jaxdpo import completions, pairs, prompts, sides, transcript
from jaxdpo.metrics import console

flags.adopt_module_key_flags(decoding_flags)
flags.DEFINE_string("model", None, "The model that speaks.")
flags.DEFINE_multi_string("product", [], "A model of a product, and its power: NAME=EXPONENT.")
flags.DEFINE_enum("normalised", None, ["token", "sequence"], "What of a product is normalised.")
flags.DEFINE_string("reference", None, "A model for implicit rewards.")
flags.DEFINE_float("beta", None, "Strength of the KL term, for implicit rewards.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Computation of the models.")
flags.DEFINE_integer("num_samples", None, "Samples for each prompt.")
flags.DEFINE_integer("num_return", None, "How many beams are returned, best first.")
flags.DEFINE_multi_string("prompt", [], "A prompt.")
flags.DEFINE_string("prompts", None, "A file of prompts: .txt, one to a line, or .jsonl.")
flags.DEFINE_string("data", None, "A data set whose prompts are taken, each once.")
flags.DEFINE_enum("format", None, list(pairs.FORMATS), "What the rows of --data look like.")
flags.DEFINE_string("split", None, "Which split of --data on a hub.")
flags.DEFINE_integer("limit", None, "Read so many rows of --data.")
OUT = flags.DEFINE_string("out", None, "The .jsonl file to write.")


def main() -> None:
    given = lambda names: {name: flags.FLAGS[name].value for name in names.split()}
    scoring = completions.scoring(**given("model product normalised reference beta dtype"))
    decoding = sides.decoding(given(f"{decoding_flags.NAMES} num_samples num_return"))
    asked, report = prompts.collected(**given("prompt prompts data format split limit"))
    if report is not None:
        console.print(str(report), markup=False)
    transcript.check(OUT.value)  # before a model is loaded
    ready = completions.decoder(scoring, **decoding)
    Console().print(transcript.table(transcript.decode(ready, asked, out=OUT.value)))


if __name__ == "__main__":
    door.run(main)
