"""Searches over what a model may say: beams, samples, greedy, over one jitted loop.

    scorers     what is maximised: one model, a product of models, a reference beside it
    hypotheses  what a search carries, and what every continuation obeys
    beam        beam search and beam sampling
    sample      greedy decoding and sampling
    loop        the jitted loop
    schedule    batches, buckets, prompts that leave when they are finished
    top_k       the k largest, exactly

The package knows models by their interface alone (`scorers.Model`), and no text.
"""

from collections.abc import Sequence
from typing import Any

from jaxdpo import InputError
from jaxdpo.decoding.beam import Beams
from jaxdpo.decoding.hypotheses import Constraints, Hypothesis
from jaxdpo.decoding.sample import Samples, Warp
from jaxdpo.decoding.schedule import Memory, Prompt, Search
from jaxdpo.decoding.scorers import LM, Product, Scorer, WithReference

__all__ = [
    "LM",
    "Beams",
    "Constraints",
    "Hypothesis",
    "Memory",
    "Product",
    "Samples",
    "Scorer",
    "Search",
    "Warp",
    "WithReference",
    "beam_search",
    "greedy",
    "sample",
]


def beam_search(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    constraints: Constraints,
    *,
    beam_size: int,
    num_return: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    length_norm: str = "generated",
    warp: Warp | None = None,
    **search: Any,
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt, best first: `num_return` of them (None: all).

    score = sum_t log pi(y_t | x, y_<t) / length^length_penalty

    See `Beams` for the options and `Search` for the rest. Equal to `transformers` token for
    token. With `length_penalty=0` and `early_stopping="never"` the score is the return of
    2404.12358, Eq. 13. As in `transformers`, one beam without a warp is greedy decoding: it
    ends at the first end token. Raises `InputError` for what cannot be searched.

    >>> import jax
    >>> from jaxdpo.pythia import init_params
    >>> from jaxdpo.pythia_cache import CachedPythia
    >>> from jaxdpo.pythia_config import PythiaConfig
    >>> config = PythiaConfig(vocab_size=8, num_layers=1, num_heads=1, width=8, mlp_width=8)
    >>> lm = LM(CachedPythia(config), init_params(config, jax.random.key(0)))
    >>> constraints = Constraints(max_new_tokens=3, eos_ids=(0,))
    >>> [hypotheses] = beam_search(lm, [[5, 2]], constraints, beam_size=3)
    >>> len(hypotheses), hypotheses[0].score >= hypotheses[1].score
    (3, True)
    """
    beams = Beams(beam_size, length_penalty, early_stopping, length_norm, warp)
    if num_return is not None and not 1 <= num_return <= beam_size:
        raise InputError(f"num_return={num_return}: must be between 1 and beam_size={beam_size}")
    found = _collected(Search(scorer, beams, constraints, **search), prompts)
    return [hypotheses[:num_return] for hypotheses in found]


def sample(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    constraints: Constraints,
    *,
    key: Any,
    num_samples: int = 1,
    warp: Warp | None = None,
    **search: Any,
) -> list[list[Hypothesis]]:
    """`num_samples` continuations of each prompt, drawn token by token from the scorer.

    All samples of a prompt share its cache. The default `warp` changes nothing: y_t is drawn
    from pi(. | x, y_<t). The score is the sum of log pi(y_t), warp or not. See `Samples` and
    `Search`.
    """
    rule = Samples(num_samples, Warp() if warp is None else warp)
    return _collected(Search(scorer, rule, constraints, key=key, **search), prompts)


def greedy(
    scorer: Scorer, prompts: Sequence[Prompt], constraints: Constraints, **search: Any
) -> list[Hypothesis]:
    """The continuation of each prompt that takes the most probable token at every step.

    Of equally probable tokens the one with the lowest id. See `Search`.
    """
    return [one for [one] in _collected(Search(scorer, Samples(), constraints, **search), prompts)]


def _collected(search: Search, prompts: Sequence[Prompt]) -> list[list[Hypothesis]]:
    found: list[list[Hypothesis]] = [[] for _ in prompts]
    for place, hypotheses in search.run(prompts):
        found[place] = hypotheses
    return found
