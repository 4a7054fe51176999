"""What is read and where to write: flags of launchers that go over a data set, and adopt them."""

from absl import flags

from jaxdpo import pairs

GIVEN = [
    flags.DEFINE_string("data", None, "The data set whose prompts, or pairs, are asked."),
    flags.DEFINE_enum("format", None, list(pairs.FORMATS), "What the rows of --data look like."),
    flags.DEFINE_string("split", None, "Which split of --data on a hub."),
    flags.DEFINE_integer("limit", None, "Ask so many prompts; accuracy: read so many rows."),
    flags.DEFINE_string("subset", None, "The field of a row that says what it belongs to."),
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the computation."),
    flags.DEFINE_string("out", None, "The folder to write into."),
]
NAMES = " ".join(flag.name for flag in GIVEN)
