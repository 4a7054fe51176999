"""How much arithmetic a step is, and how fast it went: FLOPs, utilisation, padding.

Three counts of the same work, all of products of matrices, a multiply-add being two FLOPs:

    model     what the mathematics needs: every real token once (a prompt is shared by both
              responses), the keys that it may see, logits where a token is scored, forward once
              and backward twice, no reference (it is cached), no padding, nothing twice
    plain     the same pairs as two whole sequences, logits everywhere, the reference in every
              step: what the figures of other implementations are made of
    hardware  what the compiled program does: every position of every row, every key that the
              kernel multiplies, and what the backward pass computes again

Of the last layer all of it counts, as is the custom, though of a prompt only its keys and values
are needed. Left out: norms, softmax, GELU, rotations, biases, embeddings (a look-up) and the
optimizer: work that grows with a width, not with its square.

Lengths are (prompt, chosen, rejected) in tokens; a rejected response of 0 is supervised
fine-tuning. Left out: clocks and memory (`metrics`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdpo.attention import keys_per_row, splash_tiling
from jaxdpo.pythia_config import PythiaConfig

# FLOP/s of one device in dense bfloat16, by its `device_kind`; makers' data sheets. A device of
# TPU7x is half a chip. A kind that is not here has no utilisation rather than a guessed one.
PEAK_FLOPS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 197e12),
    **dict.fromkeys(("TPU v5", "TPU v5p"), 459e12),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 918e12),
    "TPU7x": 1153.5e12,
    **dict.fromkeys(
        [f"NVIDIA A100-{kind}" for kind in ("SXM4-40GB", "SXM4-80GB", "PCIE-40GB")]
        + ["NVIDIA A100 80GB PCIe"],
        312e12,
    ),
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}


class Work(NamedTuple):
    """What some steps did; the sum of two is that of all their steps."""

    steps: int = 0
    pairs: int = 0
    tokens: int = 0  # of prompts, once, and of both responses
    positions: int = 0  # of rows, padding included
    real_positions: int = 0
    scored: int = 0  # places for scored positions, padding included
    real_scored: int = 0
    model_flops: int = 0
    plain_flops: int = 0
    hardware_flops: int = 0

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Accounts:
    """The work of a data set's batches, from lengths that the host knows.

    `lengths` are those of the token store that `batch.examples` points into, `parts` as in
    `hardware_flops`. One process's rows are counted.
    """

    def __init__(self, config: PythiaConfig, lengths: Int[np.ndarray, "n 3"], *, parts: int = 1):
        self.config, self.parts = config, parts
        self._tokens = np.asarray(lengths, np.int64).sum(1)
        self._model, self._plain = model_flops(config, lengths), plain_flops(config, lengths)

    def of(self, batch: Any) -> Work:
        """The work of one step on a `batching.Batch`."""
        examples = batch.examples[batch.examples >= 0]
        scored = batch.slots.shape[1]
        return Work(
            steps=1,
            pairs=len(examples),
            tokens=int(self._tokens[examples].sum()),
            positions=batch.tokens.size,
            real_positions=int(np.count_nonzero(batch.segment_ids)),
            scored=batch.slots.size,
            real_scored=int(np.count_nonzero(batch.slots >= 0)),
            model_flops=int(self._model[examples].sum()),
            plain_flops=int(self._plain[examples].sum()),
            hardware_flops=hardware_flops(self.config, batch.segment_ids, scored, parts=self.parts),
        )


def visible_keys(lengths: Int[np.ndarray, "n 3"]) -> Int[np.ndarray, " n"]:
    """Pairs of a token and a key that it may see, itself included, in a shared row.

    P (P + 1) / 2 in the prompt; the k-th token of a response sees the prompt and k of its
    branch. The last token of a response predicts nothing and is not in the row.

    >>> visible_keys(np.array([[2, 3, 2]])).tolist()  # 1 + 2, then 3 + 4, then 3
    [13]
    """
    prompt, *responses = np.asarray(lengths, np.int64).T
    inner = [np.maximum(response - 1, 0) for response in responses]
    return _triangle(prompt) + sum(n * prompt + _triangle(n) for n in inner)


def model_flops(config: PythiaConfig, lengths: Int[np.ndarray, "n 3"]) -> Int[np.ndarray, " n"]:
    """FLOPs that a training step needs for each example, in the shared form.

    3 [ L (2 (4 D^2 + 2 D F) tokens + 4 D keys) + 2 D V scored ], where `tokens` stand in the row,
    `keys` are `visible_keys`, `scored` the tokens of the responses; 3 is one pass forward and
    two backward.

    >>> config = PythiaConfig(vocab_size=5, num_layers=1, num_heads=1, width=8, mlp_width=32)
    >>> model_flops(config, np.array([[2, 3, 2]])).tolist()  # 3 (2 x 768 x 5 + 32 x 13 + 80 x 5)
    [25488]
    """
    prompt, *responses = np.asarray(lengths, np.int64).T
    tokens = prompt + sum(np.maximum(response - 1, 0) for response in responses)
    return 3 * _forward(config, tokens, visible_keys(lengths), sum(responses))


def plain_flops(config: PythiaConfig, lengths: Int[np.ndarray, "n 3"]) -> Int[np.ndarray, " n"]:
    """FLOPs of the same examples as whole sequences, with logits of every token.

    A pair is two sequences and has the reference run beside the policy, so a step is 4 passes;
    an example without a rejected response is one sequence and 3 passes. Attention is causal.

    >>> config = PythiaConfig(vocab_size=5, num_layers=1, num_heads=1, width=8, mlp_width=32)
    >>> plain_flops(config, np.array([[2, 3, 2], [2, 3, 0]])).tolist()
    [61376, 25680]
    """
    prompt, chosen, rejected = np.asarray(lengths, np.int64).T
    is_pair = rejected > 0
    first, second = prompt + chosen, np.where(is_pair, prompt + rejected, 0)
    tokens, keys = first + second, _triangle(first) + _triangle(second)
    return (3 + is_pair) * _forward(config, tokens, keys, tokens)


def _forward(config: PythiaConfig, tokens, keys, scored):
    width = config.width
    products = 2 * (4 * width**2 + 2 * width * config.mlp_width) * tokens
    attention = 4 * width * keys  # of each pair: a score, and a share of the mix
    return config.num_layers * (products + attention) + 2 * width * config.vocab_size * scored


def _triangle(n):
    return n * (n + 1) // 2


def hardware_flops(
    config: PythiaConfig, segment_ids: Int[np.ndarray, "B T"], scored: int, *, parts: int = 1
) -> int:
    """FLOPs of the compiled step on rows of these segments, with `scored` places each.

    Like `model_flops`, but for every position, with `multiplied_keys`, and on top what the
    backward pass computes again:

        attention      the scores, so it takes 5 products backward to 2 forward
        remat "dots"   with "cudnn", whose result cannot be saved, those 2
        remat "full"   the layer but for its products into the residual stream, whose values no
                       gradient needs; sequential residuals need attention's
        the logits     where they do not fit `logits_memory` and are made in pieces; each of
                       `parts`, devices x micro-batches, has its part of them

    >>> config = PythiaConfig(vocab_size=5, num_layers=1, num_heads=1, width=8, mlp_width=32)
    >>> row = np.ones((1, 16), int)
    >>> hardware_flops(config, row, 8)  # 6 x 768 x 16 + 7 x 16 x 16 x 16 + 6 x 40 x 8
    104320
    """
    (rows, length), width, mlp_width = segment_ids.shape, config.width, config.mlp_width
    product = 2 * width * multiplied_keys(config, segment_ids)  # queries with keys, or values
    projections = 2 * rows * length * (4 * width**2 + 2 * width * mlp_width)
    into_residual = 2 * rows * length * (width**2 * config.parallel_residual + width * mlp_width)
    again = {
        "none": 0,
        "dots": 2 * product * (config.attention == "cudnn"),
        "full": 2 * product + projections - into_residual,
    }
    layers = config.num_layers * (3 * projections + 7 * product + again[config.remat])
    in_pieces = 4 * rows * scored * config.vocab_size > parts * config.logits_memory * 2**20
    return int(layers + (3 + in_pieces) * 2 * width * config.vocab_size * rows * scored)


def multiplied_keys(config: PythiaConfig, segment_ids: Int[np.ndarray, "B T"]) -> int:
    """Products of a query with a key that `config.attention` makes of rows, visible or not.

    "blocks" makes those of its blocks back to a segment's beginning, or somewhat before; rows are
    counted as on a CPU, each by itself. "cudnn" makes those on and below the diagonal, in tiles
    that are taken to be of 128; "splash" makes those of its blocks there that are not farther
    from it than `attention_span`, and runs twice.

    >>> rows = np.repeat([[1, 2]], 512, axis=1)
    >>> [multiplied_keys(PythiaConfig.from_name("pythia-70m", attention=one), rows)
    ...  for one in ("blocks", "cudnn", "splash")]
    [434176, 589824, 1572864]
    """
    rows, length = segment_ids.shape
    if config.attention == "cudnn":
        return rows * 128**2 * _triangle(-(-length // 128))
    if config.attention == "splash":
        block, count = splash_tiling(length)
        span = min(config.attention_span or length, length)
        back = -(-(span - 1) // block)  # blocks before a query's own that it may reach
        return rows * 2 * block**2 * sum(min(i, back) + 1 for i in range(count))
    return int(keys_per_row(segment_ids, config.attention_span).sum())


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in dense bfloat16; None where it is not known.

    >>> peak_flops("NVIDIA H200"), peak_flops("cpu")
    (989400000000000.0, None)
    """
    return PEAK_FLOPS.get(device_kind)


def speeds(
    work: Work, seconds: Mapping[str, float], *, peak: float | None = None
) -> dict[str, float]:
    """What `work` in so many seconds comes to: rates, shares and utilisation.

    `seconds` are those of the training steps alone, by what they were spent on (`input` is
    waiting for a batch); `peak` is the FLOP/s of all devices together, in dense bfloat16 whatever
    the dtype, without which there is no utilisation. MFU and HFU are model and hardware FLOPs
    as a share of it.

    >>> work = Work(steps=2, pairs=8, tokens=400, model_flops=6 * 10**12)
    >>> found = speeds(work, {"input": 0.5, "device": 1.5}, peak=1e13)
    >>> found["pairs_per_second"], found["input_share"], found["mfu"]
    (4.0, 0.25, 0.3)
    """
    total = max(sum(seconds.values()), 1e-9)
    share = lambda part, whole: part / whole if whole else 0.0
    found = {
        "pairs_per_second": work.pairs / total,
        "tokens_per_second": work.tokens / total,
        "real_positions_share": share(work.real_positions, work.positions),
        "real_scored_share": share(work.real_scored, work.scored),
        "input_share": seconds.get("input", 0.0) / total,
        "model_tflops_per_second": work.model_flops / total / 1e12,
        "plain_tflops_per_second": work.plain_flops / total / 1e12,
        "hardware_tflops_per_second": work.hardware_flops / total / 1e12,
    }
    if peak is not None:
        found["mfu"] = work.model_flops / total / peak
        found["hfu"] = work.hardware_flops / total / peak
    return found
