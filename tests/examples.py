"""Small inputs that several tests share: a tiny model, ragged token stores."""

from pathlib import Path

import numpy as np

from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.tokens import TokenReport, TokenStore

TINY = PythiaConfig(vocab_size=64, num_layers=2, num_heads=2, width=16, mlp_width=32)
SHARED = Path(__file__).parents[2] / "shared"


def token_store(lengths, *, seed=0, vocab_size=64, eos=0) -> TokenStore:
    """A store of random ids with the given [n, 3] lengths; every response ends in `eos`."""
    lengths = np.asarray(lengths, np.int64)
    rng = np.random.default_rng(seed)
    parts = []
    for prompt, *responses in lengths:
        parts.append(rng.integers(1, vocab_size, prompt))
        for size in responses:
            response = rng.integers(1, vocab_size, size)
            response[-1:] = eos
            parts.append(response)
    flat = np.concatenate(parts).astype(np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths.sum(1))[:-1]])
    report = TokenReport(len(lengths), 0, 0, 0, 0, [], [], len(flat))
    return TokenStore(flat, starts, lengths, np.arange(1, len(lengths) + 1), "key", report)


def ragged_lengths(n, *, seed=0, longest=(9, 6, 6)):
    """[n, 3] random lengths from 1 up to `longest`."""
    return np.random.default_rng(seed).integers(1, np.array(longest) + 1, (n, 3))
