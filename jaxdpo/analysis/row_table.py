"""What a row of a batch holds, token by token: how a user finds a mask bug."""

import numpy as np
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from jaxdpo.batching import Batch

SPACES = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥"})
BRANCHES = ("prompt", "chosen", "rejected")


def row_table(batch: Batch, row: int, tokenizer: Tokenizer) -> Table:
    """One line a token of the row: where it stands, what it is, and what it must predict.

    A token of the table is an input. The tokens it is scored on stand in the last columns:
    the prompt's last token predicts the first token of both responses; the last token of a
    response stands only there.
    """
    table = Table("place", "position", "pair", "part", "id", "piece", "predicts chosen")
    table.add_column("predicts rejected")
    piece = lambda token: Text(f"{token} {shown(tokenizer, int(token))}")
    for place in np.flatnonzero(batch.segment_ids[row]):
        scored = (batch.scored_positions[row] == place) & (batch.slots[row] >= 0)
        of_branch = [scored & (batch.slots[row] % 2 == branch) for branch in (0, 1)]
        table.add_row(
            str(place),
            str(batch.positions[row, place]),
            str(batch.segment_ids[row, place]),
            BRANCHES[batch.branch_ids[row, place]],
            str(batch.tokens[row, place]),
            Text(shown(tokenizer, int(batch.tokens[row, place]))),
            *(Text("  ").join(map(piece, batch.targets[row][where])) for where in of_branch),
        )
    padding = int((batch.segment_ids[row] == 0).sum())
    table.caption = (
        f"{int((batch.slots[row] >= 0).sum())} tokens are scored; {padding} places of padding"
    )
    return table


def shown(tokenizer: Tokenizer, token: int) -> str:
    """The piece of a token id as text, with spaces and line breaks visible.

    >>> from jaxdpo import synthetic
    >>> pieces = synthetic.tokenizer()
    >>> shown(pieces, pieces.token_to_id(" Oslo")), shown(pieces, 0)
    ('·Oslo', '<|endoftext|>')
    """
    text = tokenizer.decode([token], skip_special_tokens=False)
    return text.translate(SPACES)
