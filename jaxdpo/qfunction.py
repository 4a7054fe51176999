"""What logits mean in the token MDP; so far, the narrow waist: token log-probabilities.

Everything downstream (objectives, the reference, analysis) needs of a model only
log pi(target | prefix) at the scored positions, in float32. Logits exist for those
positions alone.

Left out: the model that makes the hidden states (`pythia`), and Q, V and advantages.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def scored_hidden(
    hidden: Float[Array, "B T D"], scored_positions: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """The hidden states that predict: `hidden[b, scored_positions[b, s]]`.

    >>> hidden = jnp.arange(6.0).reshape(1, 3, 2)
    >>> scored_hidden(hidden, jnp.array([[2, 0]])).tolist()
    [[[4.0, 5.0], [0.0, 1.0]]]
    """
    return jnp.take_along_axis(hidden, scored_positions[..., None], axis=1)


def token_logps(
    hidden: Float[Array, "B S D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B S"],
) -> Float[Array, "B S"]:
    """Log-probability of each target under the softmax of its logits, in float32.

    log pi(y_t | s_t) = z[y_t] - log sum_v exp z[v],  z = hidden @ unembedding.T

    In the token MDP z is Q / beta up to a potential, and the log-sum-exp V / beta
    (2404.12358, Eq. 6 and 9). `hidden` holds the scored positions only. The product is
    accumulated in float32 whatever the inputs' dtype, and the result is not normalised by
    length.

    >>> hidden, unembedding = jnp.zeros((1, 2, 3)), jnp.ones((4, 3))
    >>> f"{token_logps(hidden, unembedding, jnp.array([[0, 3]]))[0, 0]:.4f}"  # -log 4
    '-1.3863'
    """
    logits = jnp.einsum(
        "bsd,vd->bsv",
        hidden,
        unembedding.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def response_sums(
    values: Float[Array, "B S"], slots: Int[Array, "B S"], examples: Int[Array, "G P"]
) -> Float[Array, "G P 2"]:
    """Sums of per-token values over each response: [..., 0] chosen, [..., 1] rejected.

    A group is one row or, with chosen and rejected in separate rows, two adjacent ones:
    the values are regrouped to [G, -1], which moves nothing between devices. `slots` says
    which response a scored position belongs to; -1 belongs to none.

    >>> values, slots = jnp.array([[1.0, 2.0, 4.0, 8.0]]), jnp.array([[0, 0, 1, -1]])
    >>> response_sums(values, slots, jnp.array([[7]])).tolist()
    [[[3.0, 4.0]]]
    """
    groups, pairs = examples.shape
    values, slots = values.reshape(groups, 1, -1), slots.reshape(groups, 1, -1)
    belongs = slots == jnp.arange(2 * pairs)[None, :, None]
    return jnp.where(belongs, values, 0.0).sum(-1).reshape(groups, pairs, 2)
