"""How tokens are chosen: the flags of every launcher that decodes, which adopts them as its own."""

from absl import flags

from jaxdpo import completions
from jaxdpo.sides import MAX_NEW_TOKENS

GIVEN = [
    flags.DEFINE_enum(
        "method", None, list(completions.METHODS), "How to choose tokens; greedy if not given."
    ),
    flags.DEFINE_float("temperature", None, "Below 1 sharpens what is drawn from."),
    flags.DEFINE_integer("top_k", None, "Draw from so many tokens only."),
    flags.DEFINE_float("top_p", None, "Draw from the fewest tokens of this probability only."),
    flags.DEFINE_integer("beam_size", None, "Beams for each prompt."),
    flags.DEFINE_float("length_penalty", None, "A beam's score = sum of logps / length^penalty."),
    flags.DEFINE_enum(
        "early_stopping", None, list(completions.EARLY_STOPPING), "See decoding.Beams."
    ),
    flags.DEFINE_enum("length_norm", None, ["generated", "total"], "See decoding.Beams."),
    flags.DEFINE_integer(
        "max_new_tokens", None, f"Tokens of a completion, at most; {MAX_NEW_TOKENS} if not given."
    ),
    flags.DEFINE_integer("min_new_tokens", None, "Tokens of a completion, at least."),
    flags.DEFINE_integer("no_repeat_ngram", None, "No so many tokens in a row stand twice."),
    flags.DEFINE_integer("batch_size", None, "Prompts decoded together; about 8 if not given."),
    flags.DEFINE_integer("seed", None, "Of what is drawn at random."),
]
NAMES = " ".join(flag.name for flag in GIVEN)
