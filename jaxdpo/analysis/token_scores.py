"""What a model says of every token of given responses, and which tokens a marked text means.

Spans are of characters, as people mark them; scores are of tokens, as models give them. Left
out: what is made of the scores (`credit`, `credit_benchmark`).
"""

import dataclasses
import functools
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Encoding, Tokenizer

from jaxdpo import InputError, batching, step
from jaxdpo.batching import Batch, Batches
from jaxdpo.completions import rows_of
from jaxdpo.language_models import LanguageModel
from jaxdpo.metrics import ProgressLine
from jaxdpo.pairs import Pair
from jaxdpo.reference import place, reference_token_logps
from jaxdpo.tokens import Limits, TokenStore, text_ids, tokenize
from jaxdpo.train import put_batch

_ROWS = 32  # examples that are scored together
_SHORT = 4096  # tokens of a batch that costs little

_score = jax.jit(step.token_logps, static_argnums=0)  # compiled once for models of one shape


class Span(NamedTuple):
    """Characters `start:end` of a text, and what is said of them."""

    start: int
    end: int
    label: str = ""


def marked_tokens(text: str, spans: Sequence[Span], tokenizer: Tokenizer) -> np.ndarray:
    """The number of the span that each token of a text belongs to, [T]; -1: to none.

    A token belongs to a span if they share a character that is no white space. EOS is not of
    the text. Raises `InputError` where the text cannot be spelled, and for a span that is
    empty, outside the text, of white space alone, overlaps another one, or cuts a token.

    >>> from jaxdpo import synthetic
    >>> marked_tokens(" I live in Oslo.", [Span(11, 15)], synthetic.tokenizer()).tolist()
    [-1, -1, -1, 0, -1]
    """
    offsets, owners = _encoded(text, tokenizer).offsets, _owners(text, spans)
    marked = np.full(len(offsets), -1)
    for token, (start, end) in enumerate(offsets):
        of = {owners[at] for at in range(start, end) if not text[at].isspace()}
        if len(of) > 1:
            raise InputError(
                f"{_named(max(of), spans)} cuts the token of characters {start}:{end}; "
                "move its ends to where tokens end"
            )
        marked[token] = of.pop() if of else -1
    for number in range(len(spans)):
        if not (marked == number).any():
            raise InputError(f"{_named(number, spans)} marks no token; move it onto a word")
    return marked


class Part(NamedTuple):
    """Which of the `count` tokens that only together spell `of` a token is, from 1."""

    number: int
    count: int
    of: str


class Piece(NamedTuple):
    """A token of a text: its id, and its text, with U+FFFD for bytes that are no character."""

    id: int
    text: str
    part: Part | None  # of a character that several tokens spell


def pieces(text: str, tokenizer: Tokenizer) -> list[Piece]:
    """A text as the tokenizer splits it; `InputError` where it cannot spell it.

    >>> from jaxdpo import synthetic
    >>> [piece.text for piece in pieces(" I live in Oslo.", synthetic.tokenizer())]
    [' I', ' live', ' in', ' Oslo', '.']
    """
    encoded = _encoded(text, tokenizer)
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in encoded.ids]
    parts: dict[int, Part] = {}
    for run in _broken(text, texts, encoded.offsets):
        places = Counter(at for token in run for at in range(*encoded.offsets[token]))
        shared = "".join(text[at] for at in sorted(places) if len(run) == 1 or places[at] > 1)
        parts |= {token: Part(number, len(run), shared) for number, token in enumerate(run, 1)}
    return [
        Piece(*one, parts.get(at)) for at, one in enumerate(zip(encoded.ids, texts, strict=True))
    ]


def whole_store(
    examples: Sequence[Pair],
    tokenizer: Tokenizer,
    eos: int,
    max_length: int,
    *,
    named: Callable[[int], str] = "line {}".format,
) -> TokenStore:
    """The token store of examples of which nothing may be cut, dropped or left out.

    Raises `InputError` that says `named(line)` of one that has an empty part, or whose prompt
    and longer response, EOS included, are more than `max_length` tokens.
    """
    for pair in examples:
        if not all(text is None or text for text in (pair.prompt, pair.chosen, pair.rejected)):
            raise InputError(f"{named(pair.line)}: the prompt or a response is empty; give it text")
    unlimited = Limits(sys.maxsize, None, "drop")
    with tempfile.TemporaryDirectory() as folder:
        store = tokenize(examples, tokenizer, eos=eos, limits=unlimited, folder=folder)
        store = dataclasses.replace(store, tokens=np.array(store.tokens))
    if store.report.empty:
        raise InputError(f"{named(store.report.empty[0])}: prompt or response comes to no token")
    lengths = store.lengths[:, 0] + store.lengths[:, 1:].max(axis=1)
    if len(longer := np.flatnonzero(lengths > max_length)):
        raise InputError(
            f"{named(int(store.lines[longer[0]]))}: prompt and response are "
            f"{lengths[longer[0]]} tokens, more than {max_length}; shorten them"
        )
    return store


def token_logps(
    model: LanguageModel, store: TokenStore, *, batch_size: int = _ROWS, label: str
) -> np.ndarray:
    """The log-probability of every scored token in nats, flat float32, as `scored_offsets` say.

    At most `batch_size` examples are scored together; `label` stands in the progress line.
    Raises `InputError` where one of them is not finite.
    """
    with ProgressLine(label, len(store), unit="examples") as line:
        logps = reference_token_logps(
            _scorer(model),
            Batches(store, batch_size=rows_of(_mesh(model), min(batch_size, len(store)))),
            progress=lambda done, seen: line.update(done, seen=seen),
        )
    if not np.isfinite(logps).all():
        raise InputError(f"{model.name}: log-probabilities are not finite; look at the weights")
    return logps


def noise_floor(
    model: LanguageModel, store: TokenStore, logps: np.ndarray, *, examples: int = 16
) -> float:
    """How far rounding alone moves a token's log-probability, in nats.

    The largest difference between `logps`, which `token_logps` gave for the store, and the same
    weights' log-probabilities of its first `examples` in batches of two other shapes: two
    examples to a row; and fewer rows if they were many, or else more. In bfloat16 a device may
    multiply few rows otherwise than some 16, and nothing else would show it; but where examples
    are both few and long, so many rows would cost too much: there they are only twice as many,
    and rounding that needs more does not show.
    """
    few = dataclasses.replace(
        store,
        starts=store.starts[:examples],
        lengths=store.lengths[:examples],
        lines=store.lines[:examples],
    )
    rows, score = functools.partial(rows_of, _mesh(model)), _scorer(model)
    other = rows(_other_rows(rows(min(_ROWS, len(store))), int(few.lengths.sum(axis=1).max())))
    again = (
        _logps_in_twos(score, few, rows(1)),
        reference_token_logps(score, Batches(few, batch_size=other)),
    )
    return max(float(np.abs(found - logps[: len(found)]).max()) for found in again)


def _logps_in_twos(score: Callable[[Batch], jax.Array], store: TokenStore, rows: int) -> np.ndarray:
    """The log-probabilities of neighbours that share a row, so many rows at a time; flat."""
    every = np.arange(len(store))
    twos = np.pad(every, (0, -len(store) % (2 * rows)), constant_values=-1).reshape(-1, 2)
    found, shape = np.zeros(store.scored_offsets[-1], np.float32), batching.row_shape(store, twos)
    for groups in twos.reshape(-1, rows, 2):
        batch = batching.rows(store, groups, shape)
        place(found, jax.device_get(score(batch)), batch, store)
    return found


def _other_rows(scored: int, length: int) -> int:
    """How many rows of so many tokens to score again what was scored in `scored` rows.

    >>> _other_rows(32, 500), _other_rows(4, 100), _other_rows(1, 1300), _other_rows(1, 8000)
    (8, 32, 3, 2)
    """
    return scored // 4 if scored >= 16 else max(2 * scored, min(_ROWS, _SHORT // length))


def _scorer(model: LanguageModel) -> Callable[[Batch], jax.Array]:
    config, params, mesh = model.lm.model.config, model.lm.params, _mesh(model)

    def score(batch):
        with jax.set_mesh(mesh):  # or else each device makes the logits of all rows
            return _score(config, params, put_batch(batch, mesh))

    return score


def _mesh(model: LanguageModel) -> Mesh:
    return jax.tree.leaves(model.lm.params)[0].sharding.mesh


def _encoded(text: str, tokenizer: Tokenizer) -> Encoding:
    text_ids(text, tokenizer)  # says so where it cannot
    return tokenizer.encode(text, add_special_tokens=False)


def _broken(
    text: str, texts: Sequence[str], offsets: Sequence[tuple[int, int]]
) -> Iterator[list[int]]:
    """Runs of tokens that are bytes of one character, or of several that share a token."""
    run: list[int] = []
    for token, (piece, (start, end)) in enumerate(zip(texts, offsets, strict=True)):
        if "\ufffd" not in piece or "\ufffd" in text[start:end]:
            continue
        if run and (run[-1] != token - 1 or start >= offsets[run[-1]][1]):
            yield run
            run = []
        run.append(token)
    if run:
        yield run


def _owners(text: str, spans: Sequence[Span]) -> list[int]:
    """The number of the span that each character is in; -1: in none."""
    owners = [-1] * len(text)
    for number, (start, end, _) in enumerate(spans):
        if not 0 <= start < end <= len(text):
            raise InputError(
                f"{_named(number, spans)} is empty, or outside the text of {len(text)} characters; "
                "count from 0, the end exclusive"
            )
        if (other := max(owners[start:end])) >= 0:
            raise InputError(
                f"{_named(number, spans)} overlaps {_named(other, spans)}; mark a character once"
            )
        owners[start:end] = [number] * (end - start)
    return owners


def _named(number: int, spans: Sequence[Span]) -> str:
    return f"span {number + 1} ({spans[number].start}:{spans[number].end})"
