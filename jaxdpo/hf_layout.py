"""How Hugging Face names GPT-NeoX's tensors and lays them out: one table for both directions.

Left out: reading and writing them (`convert`).
"""

import re
from collections.abc import Iterator

import numpy as np

from jaxdpo.pythia_config import PythiaConfig

# Tensor, parameter, and their axes: the torch shape, axes in brackets merged, -> ours. The
# fused projection holds query, key and value of one head side by side, head after head.
_LAYER = "gpt_neox.layers.{}."
TABLE = (
    ("gpt_neox.embed_in.weight", "embedding", "V D -> V D"),
    (_LAYER + "input_layernorm.weight", "layers_{}/attention_norm/scale", "D -> D"),
    (_LAYER + "input_layernorm.bias", "layers_{}/attention_norm/bias", "D -> D"),
    (
        _LAYER + "attention.query_key_value.weight",
        "layers_{}/qkv/kernel",
        "(N 3 H) D -> D N 3 H",
    ),
    (_LAYER + "attention.query_key_value.bias", "layers_{}/qkv/bias", "(N 3 H) -> N 3 H"),
    (_LAYER + "attention.dense.weight", "layers_{}/out/kernel", "D (N H) -> N H D"),
    (_LAYER + "attention.dense.bias", "layers_{}/out/bias", "D -> D"),
    (_LAYER + "post_attention_layernorm.weight", "layers_{}/mlp_norm/scale", "D -> D"),
    (_LAYER + "post_attention_layernorm.bias", "layers_{}/mlp_norm/bias", "D -> D"),
    (_LAYER + "mlp.dense_h_to_4h.weight", "layers_{}/up/kernel", "F D -> D F"),
    (_LAYER + "mlp.dense_h_to_4h.bias", "layers_{}/up/bias", "F -> F"),
    (_LAYER + "mlp.dense_4h_to_h.weight", "layers_{}/down/kernel", "D F -> F D"),
    (_LAYER + "mlp.dense_4h_to_h.bias", "layers_{}/down/bias", "D -> D"),
    ("gpt_neox.final_layer_norm.weight", "final_norm/scale", "D -> D"),
    ("gpt_neox.final_layer_norm.bias", "final_norm/bias", "D -> D"),
    ("embed_out.weight", "unembedding", "V D -> V D"),
)


def axes(pattern: str) -> tuple[list[list[str]], list[str]]:
    """The axes of a table entry: torch's, merged ones together, and ours.

    >>> axes("(N 3 H) D -> D N 3 H")
    ([['N', '3', 'H'], ['D']], ['D', 'N', '3', 'H'])
    """
    theirs, ours = pattern.split(" -> ")
    groups = re.findall(r"\((.*?)\)|(\w)", theirs)
    return [(merged or single).split() for merged, single in groups], ours.split()


def sizes(config: PythiaConfig) -> dict[str, int]:
    """The length of each axis by its letter."""
    return {
        "V": config.vocab_size,
        "D": config.width,
        "F": config.mlp_width,
        "N": config.num_heads,
        "3": 3,
        "H": config.head_width,
    }


def torch_shape(config: PythiaConfig, pattern: str) -> list[int]:
    """The shape of torch's tensor.

    >>> config = PythiaConfig.from_name("pythia-70m")
    >>> torch_shape(config, "(N 3 H) D -> D N 3 H")
    [1536, 512]
    """
    length = sizes(config)
    return [int(np.prod([length[a] for a in group])) for group in axes(pattern)[0]]


def entries(config: PythiaConfig) -> Iterator[tuple[str, str, str]]:
    """The table with every layer written out."""
    for name, path, pattern in TABLE:
        for i in range(config.num_layers if "{}" in name else 1):
            yield name.format(i), path.format(i), pattern
