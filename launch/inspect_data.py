"""Look at a row as the model will see it: ids, pieces, and which token predicts what.

python launch/inspect_data.py --data pairs.jsonl --format pairs --tokenizer tokenizer.json
"""

import tempfile

import door
from absl import flags
from rich.console import Console

from jaxdpo import InputError, pairs, tokens
from jaxdpo.analysis.row_table import row_table
from jaxdpo.batching import LAYOUTS, row_shape, rows

DATA = flags.DEFINE_string("data", None, "A file of examples, or a hub name.", required=True)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A tokenizer.json, or its folder.", required=True
)
FORMAT = flags.DEFINE_enum("format", "pairs", list(pairs.FORMATS), "What the rows look like.")
SPLIT = flags.DEFINE_string("split", "train", "Of --data on the hub.")
ROW = flags.DEFINE_integer("row", 0, "Which of the good examples to show, from 0.", lower_bound=0)
PACKED = flags.DEFINE_integer("examples", 1, "Examples in the row.", lower_bound=1)
EOS = flags.DEFINE_string("eos_token", "<|endoftext|>", "The token that ends a response.")
MAX_LENGTH = flags.DEFINE_integer("max_length", 512, "Tokens of prompt and response.")
MAX_PROMPT = flags.DEFINE_integer(
    "max_prompt_length", 256, "Tokens of a prompt; see tokens.Limits."
)
TRUNCATION = flags.DEFINE_enum("truncation", "official", tokens.TRUNCATIONS, "How to cut.")
LAYOUT = flags.DEFINE_enum("layout", "shared", LAYOUTS, "One row for a pair, or two.")


def main() -> None:
    examples, report = pairs.read_pairs(
        DATA.value, format=FORMAT.value, split=SPLIT.value, max_bad_fraction=1.0
    )
    shown = examples[ROW.value : ROW.value + PACKED.value]
    if len(shown) < PACKED.value:
        raise InputError(f"--row {ROW.value}: {DATA.value} has only {len(examples)} good rows")
    if TRUNCATION.value == "drop" and MAX_PROMPT.present:
        raise InputError("--max_prompt_length: has no effect with --truncation drop")
    tokenizer = tokens.load_tokenizer(TOKENIZER.value)
    prompt = None if TRUNCATION.value == "drop" else MAX_PROMPT.value
    limits = tokens.Limits(MAX_LENGTH.value, prompt, TRUNCATION.value)
    eos = tokens.eos_id(tokenizer, EOS.value)
    with tempfile.TemporaryDirectory() as folder:
        store = tokens.tokenize(shown, tokenizer, eos=eos, limits=limits, folder=folder)
        groups = [range(len(store))]
        shape = row_shape(store, groups, layout=LAYOUT.value)
        batch = rows(store, groups, shape, layout=LAYOUT.value)
    console = Console()
    console.print(report, highlight=False)
    console.print(f"line {shown[0].line}: {store.report}", highlight=False)
    for row in range(len(batch.tokens)):
        console.print(row_table(batch, row, tokenizer))


if __name__ == "__main__":
    door.run(main)
