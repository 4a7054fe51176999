"""The GPT-NeoX model of the Pythia suite: tokens -> hidden states; the unembedding.

A row may hold several segments, and a segment a prompt with several responses: who may
attend to whom is read off `segment_ids` and `branch_ids` (`attention`), rotary angles off
`positions`. Left out: logits in training (`qfunction` makes them, for the scored positions
only), the placement of parameters (`sharding`), files (`convert`), and dropout, which Pythia
does not use.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxdpo import attention
from jaxdpo.pythia_config import PythiaConfig

_save = jax.checkpoint_policies
_REMAT = {
    # What is dear: products with weights, and attention's result with its normalisers.
    "dots": _save.save_from_both_policies(
        _save.dots_with_no_batch_dims_saveable, _save.save_only_these_names(attention.SAVED)
    ),
    "full": _save.nothing_saveable,
}


class _Layer(nn.Module):
    """One layer; the second output is `nn.scan`'s and empty."""

    config: PythiaConfig

    def setup(self):
        c = self.config
        fan_in = nn.initializers.normal(math.sqrt(2 / (5 * c.width)))
        to_residual = nn.initializers.normal(2 / (c.num_layers * math.sqrt(c.width)))

        self.attention_norm = _LayerNorm(c)
        self.qkv = _Linear(c, 1, (c.num_heads, 3, c.head_width), fan_in)
        self.out = _Linear(c, 2, (c.width,), to_residual)
        self.mlp_norm = _LayerNorm(c)
        self.up = _Linear(c, 1, (c.mlp_width,), fan_in)
        self.down = _Linear(c, 1, (c.width,), to_residual)

    def __call__(self, x, ids, cos, sin):
        how = {"span": self.config.attention_span, "implementation": self.config.attention}
        mixed = attention.attend(*self.queries_keys_values(x, cos, sin), *ids, **how)
        return self.after_attention(x, mixed), None

    def queries_keys_values(self, x, cos, sin):
        # Whose gradient is a concatenation; that of an index would be three sums of zeros.
        parts = jax.lax.split(self.qkv(self.attention_norm(x)), (1, 1, 1), axis=x.ndim)
        q, k, v = (jnp.squeeze(part, axis=x.ndim) for part in parts)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after_attention(self, x, mixed):
        attended = x + self.out(mixed)
        mlp_input = x if self.config.parallel_residual else attended
        x = attended + self.mlp(self.mlp_norm(mlp_input))
        return _constrain(x, P(("data", "fsdp")))

    def mlp(self, x):
        return self.down(_gelu(self.up(x)))


class Pythia(nn.Module):
    """GPT-NeoX: token ids [B, T] -> hidden states [B, T, D] after the final layer norm.

    The parameters, in `config.param_dtype`:

        embedding                      [V, D]
        layers_0 ... layers_{L-1}      or, with `scan_layers`, one `layers` with L in front
            attention_norm, mlp_norm   scale [D], bias [D]
            qkv                        kernel [D, N, 3, H], bias [N, 3, H]
            out                        kernel [N, H, D], bias [D]
            up, down                   kernel [D, F], bias [F]; kernel [F, D], bias [D]
        final_norm                     scale [D], bias [D]
        unembedding                    [V, D]

    A token attends to itself and to earlier tokens of its row that are of its own segment
    and are either prompt (branch 0) or of its own branch. Segment 0 is padding. A token id
    outside the vocabulary gives NaN. Traced under `jax.set_mesh`, activations stay split by
    rows as `sharding` splits batches.
    """

    config: PythiaConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(math.sqrt(2 / (5 * c.width)))
        shape = (c.vocab_size, c.width)
        self.embedding = self.param("embedding", init, shape, c.param_dtype)
        self.layers = _layers(c)
        self.final_norm = _LayerNorm(c)
        self.unembedding = self.param("unembedding", init, shape, c.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        branch_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        c, ids = self.config, (segment_ids, branch_ids)
        cos, sin = rotary_angles(positions, c.rotary_width, c.rotary_base)
        x = self.embed(tokens)
        for layer in [self.layers] if c.scan_layers else self.layers:
            x, _ = layer(x, ids, cos, sin)
        return self.final_norm(x)

    def embed(self, tokens):
        # The looked-up rows are cast, not the table, whose gradient sums over tokens.
        x = _looked_up(self.embedding, tokens).astype(self.config.dtype)
        return _constrain(x, P(("data", "fsdp")))


def _looked_up(table, tokens):
    """The rows of a table, [B, T, D], in float32 or as the parameters are.

    Where `fsdp` splits the table's columns, each device looks up its columns for the tokens of all
    devices, which then exchange what they have found: as many bytes as activations have. Left
    alone, XLA gathers the table, and adds up gradients of its size that are mostly zeros.
    """
    mesh, take = jax.sharding.get_abstract_mesh(), functools.partial(jnp.take, axis=0, mode="fill")
    axes = [axis for axis in ("data", "fsdp") if axis in mesh.auto_axes and mesh.shape[axis] > 1]
    if "fsdp" not in axes or len(tokens) % math.prod(mesh.shape[axis] for axis in axes):
        return take(_constrain(table, P("tensor")), tokens)

    def own_columns(table, tokens):
        found = take(table, jax.lax.all_gather(tokens, "fsdp", tiled=True))
        return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    rows = P(tuple(axes))
    places = dict(in_specs=(P(None, "fsdp"), rows), out_specs=rows, axis_names=set(axes))
    return jax.shard_map(own_columns, **places)(table, tokens)


def rotary_angles(
    positions: Int[Array, "B T"], rotary_width: int, base: float
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """Cosine and sine of positions x base^(-2i / rotary_width), i < R = rotary_width / 2."""
    frequencies = 1.0 / base ** (np.arange(0, rotary_width, 2) / rotary_width)
    frequencies = jnp.asarray(frequencies, "float32")[None, None, None]
    angles = positions[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B #T 1 R"], sin: Float[Array, "#B #T 1 R"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, R + i), i < R, of each head by their angles, in float32."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype("float32"), (half, 2 * half), axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class _Linear(nn.Module):
    """x -> x @ kernel + bias over the last `summed` axes of x, in `config.dtype`."""

    config: PythiaConfig
    summed: int
    features: tuple[int, ...]
    kernel_init: Any

    @nn.compact
    def __call__(self, x):
        c, kept = self.config, x.ndim - self.summed
        matrix = (math.prod(x.shape[kept:]), math.prod(self.features))
        initial = lambda key, shape: self.kernel_init(key, matrix, c.param_dtype).reshape(shape)
        kernel = self.param("kernel", initial, (*x.shape[kept:], *self.features))
        bias = self.param("bias", nn.initializers.zeros, self.features, c.param_dtype)
        # With rows and positions on two axes, XLA on a CPU copies a factor of a weight's gradient
        # transposed before it multiplies, which takes as long again.
        flat = x.astype(c.dtype).reshape(-1, matrix[0]), kernel.reshape(matrix), bias.reshape(-1)
        affine = _affine if c.dtype == "float32" else _affine_in_half
        return affine(*flat).reshape(*x.shape[:kept], *self.features)


def _affine(x, kernel, bias):
    return _product(x, kernel.astype(x.dtype), 1, 0) + bias.astype(x.dtype)[None]


@jax.custom_vjp
def _affine_in_half(x, kernel, bias):
    """`_affine` whose gradients of kernel and bias are not rounded to the dtype of x on the way.

    They are sums over all positions, those of other devices too, and are added up in float32.
    """
    return _affine(x, kernel, bias)


def _affine_backward(residuals, g):
    x, kernel, bias = residuals
    of_kernel = _product(x, g, 0, 0, preferred_element_type=jnp.float32)
    of_bias = g.astype(jnp.float32).sum(axis=0)
    of_x = _product(g, kernel.astype(x.dtype), 1, 1)
    return of_x, of_kernel.astype(kernel.dtype), of_bias.astype(bias.dtype)


_affine_in_half.defvjp(lambda *inputs: (_affine(*inputs), inputs), _affine_backward)


def _product(x, y, x_axis, y_axis, **how):
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), **how)


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    # As PyTorch computes it, in float32. `jax.nn.gelu` takes 1 - erf where that is small: several
    # passes over the widest array of the model on a CPU, and lost in what it is added to.
    wide = x.astype("float32")
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * np.float32(math.sqrt(0.5))))).astype(x.dtype)


def _constrain(x: Float[Array, "..."], spec: P) -> Float[Array, "..."]:
    # Left alone, XLA splits the residual stream by width, as the matrices are split, and
    # sums over `fsdp` at every product. Without a mesh in context there is none to obey, nor
    # where rows are split by hand (`shard_map`).
    if {"data", "fsdp", "tensor"} <= set(jax.sharding.get_abstract_mesh().auto_axes):
        return jax.lax.with_sharding_constraint(x, spec)
    return x


class _LayerNorm(nn.Module):
    config: PythiaConfig

    @nn.compact
    def __call__(self, x):
        c, shape = self.config, (self.config.width,)
        scale = self.param("scale", nn.initializers.ones, shape, c.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, c.param_dtype)
        return _normalised(x, scale, bias, c.layer_norm_epsilon).astype(c.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalised(x, scale, bias, epsilon):
    return _normalised_forward(x, scale, bias, epsilon)[0]


def _normalised_forward(x, scale, bias, epsilon):
    wide = x.astype("float32")
    mean = wide.mean(axis=-1, keepdims=True)
    # Not E[x^2] - E[x]^2, which cancels where a channel's mean is large.
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)
    y = (wide - mean) * (inverse * _as_rows(scale, x)) + _as_rows(bias, x)
    return y, (x, mean, inverse, scale, bias)


def _normalised_backward(epsilon, residuals, g):
    # By hand it takes half the time of what XLA on a CPU makes of the transposed steps.
    x, mean, inverse, scale, bias = residuals
    unit, scaled = (x.astype("float32") - mean) * inverse, g * _as_rows(scale, g)
    shared = scaled.mean(axis=-1, keepdims=True)
    along = unit * (scaled * unit).mean(axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = (g * unit).sum(rows), g.sum(rows)
    of_x = inverse * (scaled - shared - along)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_normalised.defvjp(_normalised_forward, _normalised_backward)


def _as_rows(vector, like):
    return jnp.expand_dims(vector.astype("float32"), range(like.ndim - 1))


def _layers(config: PythiaConfig) -> list[nn.Module] | nn.Module:
    layer = _Layer
    if config.remat != "none":
        # Within a scan the barriers against common-subexpression elimination only cost.
        layer = nn.remat(layer, policy=_REMAT[config.remat], prevent_cse=not config.scan_layers)
    if not config.scan_layers:
        return [layer(config) for _ in range(config.num_layers)]
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
    )(config)


def init_params(config: PythiaConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Parameters as GPT-NeoX starts them; the tree is described at `Pythia`.

    Normal with standard deviation sqrt(2 / (5 D)), for the two projections into the
    residual stream 2 / (L sqrt(D)); biases zero.
    """
    row = jnp.zeros((1, 1), jnp.int32)
    config = dataclasses.replace(config, attention="blocks")  # a kernel may refuse such a row
    return Pythia(config).init(key, row, row, row, row)["params"]


def hidden_states(
    config: PythiaConfig,
    params: dict[str, Any],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """What `Pythia` computes, as a function of its parameters; in `config.dtype`.

    >>> config = PythiaConfig(vocab_size=7, num_layers=1, num_heads=1, width=8, mlp_width=8)
    >>> params, row = init_params(config, jax.random.key(0)), jnp.ones((2, 3), int)
    >>> hidden_states(config, params, row, row, row, row).shape
    (2, 3, 8)
    """
    model = Pythia(config)
    return model.apply({"params": params}, tokens, positions, segment_ids, branch_ids)


def unembed(
    hidden: Float[Array, "*rest D"], unembedding: Float[Array, "V D"]
) -> Float[Array, "*rest V"]:
    """Logits, multiplied in the dtype of `hidden`, summed and returned in float32."""
    unembedding = unembedding.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, unembedding, preferred_element_type="float32")


def num_params(config: PythiaConfig) -> int:
    """The number of parameters, with both embeddings.

    >>> num_params(PythiaConfig.from_name("pythia-70m"))
    70426624
    """
    # One layer is traced instead of all of them.
    config = dataclasses.replace(config, scan_layers=True)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The tree of `scan_layers=True` with the parameters of a tree of separate layers."""
    names = [f"layers_{i}" for i in range(len(params)) if f"layers_{i}" in params]
    rest = {name: leaf for name, leaf in params.items() if name not in names}
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[n] for n in names))
    return rest | {"layers": layers}


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The tree of separate layers with the parameters of a `scan_layers=True` tree."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    (num_layers,) = {leaf.shape[0] for leaf in jax.tree.leaves(params["layers"])}
    for i in range(num_layers):
        rest[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    return rest
