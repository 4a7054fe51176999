"""Decode: what a model, or a product of models, says to prompts.

    python launch/decode.py --model runs/quickstart:dpo --data runs/quickstart/data/pairs_test.jsonl
    python launch/decode.py --model FOLDER --prompts prompts.txt --method beam --beam_size 5 \\
        --reference runs/quickstart:sft --beta 0.1 --out completions.jsonl

A model is a Hugging Face folder, a hub name owner/name, or WORKDIR:STAGE[:best] of a run.
"""

import door
from absl import flags
from rich.console import Console

from jaxdpo import completions, pairs, prompts, transcript
from jaxdpo.metrics import console

flags.DEFINE_string("model", None, "The model that speaks.")
flags.DEFINE_multi_string("product", [], "A model of a product, and its power: NAME=EXPONENT.")
flags.DEFINE_enum("normalised", None, ["token", "sequence"], "What of a product is normalised.")
flags.DEFINE_string("reference", None, "A model for implicit rewards.")
flags.DEFINE_float("beta", None, "Strength of the KL term, for implicit rewards.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Computation of the models.")
METHOD = flags.DEFINE_enum("method", "greedy", list(completions.METHODS), "How to choose tokens.")
flags.DEFINE_integer("num_samples", None, "Samples for each prompt.")
flags.DEFINE_float("temperature", None, "Below 1 sharpens what is drawn from.")
flags.DEFINE_integer("top_k", None, "Draw from so many tokens only.")
flags.DEFINE_float("top_p", None, "Draw from the fewest tokens of this probability only.")
flags.DEFINE_integer("seed", None, "Which draws.")
flags.DEFINE_integer("beam_size", None, "Beams for each prompt.")
flags.DEFINE_integer("num_return", None, "How many beams are returned, best first.")
flags.DEFINE_float("length_penalty", None, "A beam's score = sum of logps / length^penalty.")
flags.DEFINE_enum("early_stopping", None, list(completions.EARLY_STOPPING), "See decoding.Beams.")
flags.DEFINE_enum("length_norm", None, ["generated", "total"], "See decoding.Beams.")
flags.DEFINE_integer("max_new_tokens", 128, "Tokens of a completion, at most.")
flags.DEFINE_integer("min_new_tokens", 0, "Tokens of a completion, at least.")
flags.DEFINE_integer("no_repeat_ngram", 0, "No so many tokens in a row stand twice (0: no rule).")
flags.DEFINE_multi_string("prompt", [], "A prompt.")
flags.DEFINE_string("prompts", None, "A file of prompts: .txt, one to a line, or .jsonl.")
flags.DEFINE_string("data", None, "A data set whose prompts are taken, each once.")
flags.DEFINE_enum("format", None, list(pairs.FORMATS), "What the rows of --data look like.")
flags.DEFINE_string("split", None, "Which split of --data on a hub.")
flags.DEFINE_integer("limit", None, "Read so many rows of --data.")
flags.DEFINE_integer("batch_size", None, "Prompts decoded together; about 8 if not given.")
OUT = flags.DEFINE_string("out", None, "The .jsonl file to write.")


def main() -> None:
    given = lambda names: {name: flags.FLAGS[name].value for name in names.split()}
    scoring = completions.scoring(**given("model product normalised reference beta dtype"))
    method = completions.method(METHOD.value, given(" ".join(completions.OPTIONS)))
    limits = given("max_new_tokens min_new_tokens no_repeat_ngram batch_size")
    asked, report = prompts.collected(**given("prompt prompts data format split limit"))
    if report is not None:
        console.print(str(report), markup=False)
    transcript.check(OUT.value)  # before a model is loaded
    ready = completions.decoder(scoring, **method, **limits)
    Console().print(transcript.table(transcript.decode(ready, asked, out=OUT.value)))


if __name__ == "__main__":
    door.run(main)
