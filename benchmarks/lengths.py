"""How long prompts and responses are: the lengths that benchmarks draw their pairs from.

`tldr` and `hh` are drawn from what is written here, so that a benchmark needs no data; `measured`
takes the examples of a file instead. Token ids are random: no time depends on them.

    tldr  Reddit TL;DR, 779 pairs of openai/summarize-from-feedback under the 20B tokenizer at 512
          tokens, prompts cut to 256 where that is passed (official truncation): deciles of each
          length after that, joined by a Gaussian copula with their rank correlations.
    hh    assumed, not measured: lognormal, mean 107, 72 and 54 tokens, deviation 0.7 of the
          logarithm, nothing correlated, responses cut to 256 and prompts to what is left of 512.
"""

import math
from pathlib import Path

import numpy as np

MAX_LENGTH, MAX_PROMPT_LENGTH = 512, 256
# Least, deciles and greatest of prompt, chosen and rejected, the end token included.
TLDR = (
    (54, 206, 236, 256, 276, 300, 328, 356, 387, 431, 483),
    (18, 26, 29, 32, 35, 36, 38, 41, 43, 46, 49),
    (18, 25, 27, 29, 30, 32, 34, 36, 39, 43, 49),
)
TLDR_RANK_CORRELATIONS = ((1.0, 0.12, 0.23), (0.12, 1.0, -0.08), (0.23, -0.08, 1.0))
HH_MEANS, HH_DEVIATION = (107, 72, 54), 0.7
EOS = 0

Pairs = list[list[list[int]]]  # [prompt, chosen, rejected] of each pair, as token ids


def tldr(n: int, seed: int) -> np.ndarray:
    """Lengths of prompt, chosen and rejected, [n, 3]."""
    # A Gaussian copula with rank correlation r is that of normals with 2 sin(pi r / 6).
    correlations = 2 * np.sin(np.pi / 6 * np.array(TLDR_RANK_CORRELATIONS))
    normals = np.random.default_rng(seed).multivariate_normal(np.zeros(3), correlations, n)
    ranks = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(normals)
    deciles = np.linspace(0, 1, len(TLDR[0]))
    columns = [np.interp(ranks[:, i], deciles, TLDR[i]) for i in range(3)]
    lengths = np.stack(columns, axis=1).round().astype(int)
    lengths[:, 0] = np.minimum(lengths[:, 0], MAX_LENGTH - lengths[:, 1:].max(1))
    return lengths


def hh(n: int, seed: int) -> np.ndarray:
    """As `tldr`; assumed."""
    location = np.log(HH_MEANS) - HH_DEVIATION**2 / 2
    lengths = np.random.default_rng(seed).lognormal(location, HH_DEVIATION, (n, 3))
    lengths = np.maximum(lengths.round().astype(int), 2)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], MAX_LENGTH - MAX_PROMPT_LENGTH)
    lengths[:, 0] = np.minimum(lengths[:, 0], MAX_LENGTH - lengths[:, 1:].max(1))
    return lengths


DRAWN = {"tldr": tldr, "hh": hh}


def random_pairs(lengths: np.ndarray, vocab_size: int, seed: int) -> Pairs:
    """Random ids of the given lengths; every response ends in `EOS`, which stands nowhere else."""
    rng = np.random.default_rng(seed)
    ids = lambda size: rng.integers(1, vocab_size, size).tolist()
    return [[ids(x), [*ids(y - 1), EOS], [*ids(z - 1), EOS]] for x, y, z in lengths.tolist()]


def measured(data: Path, tokenizer: Path, n: int, seed: int) -> np.ndarray:
    """Lengths of `n` pairs drawn from `comparisons_train.jsonl` of a folder, [n, 3]."""
    import tempfile

    from jaxdpo.pairs import read_pairs
    from jaxdpo.tokens import Limits, eos_id, load_tokenizer, tokenize

    rows, _ = read_pairs(str(data / "comparisons_train.jsonl"), format="pairs")
    reader = load_tokenizer(tokenizer)
    limits = Limits(MAX_LENGTH, MAX_PROMPT_LENGTH, "official")
    with tempfile.TemporaryDirectory() as folder:
        store = tokenize(rows, reader, eos=eos_id(reader), limits=limits, folder=Path(folder))
        chosen = np.random.default_rng(seed).permutation(len(store))[:n]
        return np.array(store.lengths[chosen])


def store(pairs: Pairs):
    """The pairs as the package's token store."""
    from jaxdpo.tokens import TokenReport, TokenStore

    lengths = np.array([[len(part) for part in pair] for pair in pairs])
    flat = np.concatenate([np.asarray(part, np.int32) for pair in pairs for part in pair])
    starts = np.cumsum(lengths.sum(1)) - lengths.sum(1)
    report = TokenReport(len(pairs), 0, 0, 0, 0, [], [], len(flat))
    return TokenStore(flat, starts, lengths, np.arange(len(pairs)), "random", report)
