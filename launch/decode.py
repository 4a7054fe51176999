"""Decode: what a model, or a product of models, says to prompts.

    python launch/decode.py --model runs/quickstart:dpo --data runs/quickstart/data/pairs_test.jsonl
    python launch/decode.py --model FOLDER --prompts prompts.txt --method beam --beam_size 5 \\
        --reference runs/quickstart:sft --beta 0.1 --out completions.jsonl

A model is a Hugging Face folder, a hub name owner/name, or WORKDIR:STAGE[:best] of a run. An
option that has no effect is an error. The same command goes on with `--out` after a kill.
"""

import door
from absl import flags
from rich.console import Console

from jaxdpo import completions, pairs, prompts, transcript
from jaxdpo.decoding import Constraints

flags.DEFINE_string("model", None, "The model that speaks.")
flags.DEFINE_multi_string("product", [], "Instead: NAME=EXPONENT, once for each of its models.")
flags.DEFINE_enum("normalised", None, ["token", "sequence"], "A product, by token if not given.")
flags.DEFINE_string("reference", None, "A model for implicit rewards.")
flags.DEFINE_float("beta", None, "Of the implicit rewards.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the computation.")
METHOD = flags.DEFINE_enum("method", "greedy", list(completions.METHODS), "How to choose tokens.")
flags.DEFINE_integer("num_samples", None, "Samples for each prompt.")
flags.DEFINE_float("temperature", None, "Below 1 sharpens what is drawn from.")
flags.DEFINE_integer("top_k", None, "Draw from so many tokens only.")
flags.DEFINE_float("top_p", None, "Draw from the fewest tokens of this probability only.")
flags.DEFINE_integer("seed", None, "Of the draws.")
flags.DEFINE_integer("beam_size", None, "Beams for each prompt.")
flags.DEFINE_integer("num_return", None, "How many of them are returned, best first.")
flags.DEFINE_float("length_penalty", None, "Score = sum of logps / length^penalty.")
flags.DEFINE_enum("early_stopping", None, list(completions.EARLY_STOPPING), "See decoding.Beams.")
flags.DEFINE_enum("length_norm", None, ["generated", "total"], "See decoding.Beams.")
flags.DEFINE_integer("max_new_tokens", 128, "Tokens of a completion, at most.")
flags.DEFINE_integer("min_new_tokens", 0, "And at least.")
flags.DEFINE_integer("no_repeat_ngram", 0, "No so many tokens stand twice (0: no rule).")
flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
flags.DEFINE_string("prompts", None, "Or a file: .txt, one to a line; .jsonl with prompt.")
flags.DEFINE_string("data", None, "Or a data set whose prompts are taken, each once.")
flags.DEFINE_enum("format", None, list(pairs.FORMATS), "Of the data set's rows.")
flags.DEFINE_string("split", None, "Of a hub data set.")
flags.DEFINE_integer("limit", None, "Read its first rows only.")
OUT = flags.DEFINE_string("out", None, "The .jsonl file to write.")
BATCH = flags.DEFINE_integer("batch_size", 8, "Prompts decoded together.")


def main() -> None:
    given = lambda names: {name: flags.FLAGS[name].value for name in names.split()}
    asked = prompts.collected(**given("prompt prompts data format split limit"))
    scoring = completions.scoring(**given("model product normalised reference beta dtype"))
    method = completions.method(METHOD.value, given(" ".join(completions.OPTIONS)))
    limits = Constraints(eos_ids=(), **given("max_new_tokens min_new_tokens no_repeat_ngram"))
    request = completions.Request(scoring, method, limits)
    records = transcript.decode(request, asked, out=OUT.value, batch_size=BATCH.value)
    Console().print(transcript.table(records))


if __name__ == "__main__":
    door.run(main)
