"""What logits mean in the token MDP: token log-probabilities, Q, V, advantages and rewards.

Objectives, the reference and the credit of tokens need of a model only log pi(target | prefix)
at the scored positions, in float32: the narrow waist. What is said of all tokens of a state
(Q, V, both sides of Eq. 16) takes the logits of those positions; no others exist. In the token
MDP a state s is a prompt with the tokens so far, s_0 the prompt alone, an action is the next
token v, and the policy is the optimal soft Q-function of a reward (2404.12358):

    pi(v | s) = exp((Q(s, v) - V(s)) / beta)                            Eq. 5
    V(s)      = beta log sum_v exp(Q(s, v) / beta)                      Eq. 6
    Q(s, v)   = r(s, v) + beta log pi_ref(v | s) + V(s'),               Eq. 7
                where V(s') = 0 if s' is terminal

What a policy identifies. A softmax forgets what is added to all logits of a state, so Q and V
read off logits are those of *one* reward of a class: with z + c(s) in place of z the reward
is r(s, v) + Phi(s') - Phi(s), Phi = - beta c (Definition 1). `q_values`, `state_values` and
`bellman_rewards` depend on that choice. `advantages`, `token_rewards` and preferences between
responses of one prompt do not: they are functions of pi and pi_ref. As printed, Eq. 13 has
the sign of V(s_0) wrong: the return of a response is V(s_0) *plus* the sum of its token
rewards (`return_decomposition`); no ranking notices.

`beta` is the strength of the KL term the policy was trained with, in reward per nat. It is
not `guidance`, the exponent of Eq. 14 (`decoding.scorers.Product`), which has no unit: in
Eq. 15 advantages relative to the reference are to be multiplied by guidance / beta.

Left out: the model that makes the hidden states (`pythia`); how log-probabilities come about
without all logits (`scored_logps`); MDPs whose rewards are given and whose Q is found
(`token_mdp`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, ScalarLike

from jaxdpo import scored_logps


def scored_hidden(
    hidden: Float[Array, "B T D"], scored_positions: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """The hidden states that predict: `hidden[b, scored_positions[b, s]]`.

    >>> hidden = jnp.arange(6.0).reshape(1, 3, 2)
    >>> scored_hidden(hidden, jnp.array([[2, 0]])).tolist()
    [[[4.0, 5.0], [0.0, 1.0]]]
    """
    return jnp.take_along_axis(hidden, scored_positions[..., None], axis=1)


def logits(
    hidden: Float[Array, "B S D"], unembedding: Float[Array, "V D"]
) -> Float[Array, "B S V"]:
    """The policy's logits at the scored positions, z = hidden @ unembedding.T.

    The product is accumulated in float32 whatever the inputs' dtype.

    >>> logits(jnp.ones((1, 1, 2)), jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[[3.0, 1.0]]]
    """
    return jnp.einsum(
        "bsd,vd->bsv",
        hidden,
        unembedding.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def token_logps(
    hidden: Float[Array, "B S D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    *,
    logits_memory: int = 512,
) -> Float[Array, "B S"]:
    """Log-probability of each target under the softmax of its logits, in float32.

    log pi(y_t | s_t) = z[y_t] - log sum_v exp z[v],  z = hidden @ unembedding.T

    In the token MDP z is Q / beta up to a potential, and the log-sum-exp V / beta
    (2404.12358, Eq. 6 and 9). `hidden` holds the scored positions only. Not normalised by
    length. A target that is no token of the vocabulary has NaN.

    `logits_memory` is what logits may take of a device at a time, in MiB. If those of its
    positions all fit, they are kept for the backward pass: three products of 2 B S V D
    floating-point operations in all. If not, they exist for a chunk of positions at a time and
    are multiplied again: four products, and beside a chunk the gradient of its logits, in the
    dtype of `hidden`, and twice that of the unembedding, in float32. Raises `InputError` where
    one position's logits do not fit. See `scored_logps` for what happens on a mesh.

    >>> hidden, unembedding = jnp.zeros((1, 2, 3)), jnp.ones((4, 3))
    >>> f"{token_logps(hidden, unembedding, jnp.array([[0, 3]]))[0, 0]:.4f}"  # -log 4
    '-1.3863'
    """
    return scored_logps.target_logps(hidden, unembedding, targets, logits_memory=logits_memory)


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


@jax.jit
def q_values(logits: Float[Array, "*B V"], *, beta: ScalarLike) -> Float[Array, "*B V"]:
    """Q(s, v) = beta z(s, v): the policy's logits in units of reward (2404.12358, Eq. 5).

    Fixed up to a potential: each state's values may be shifted together (Definition 1).

    >>> q_values(jnp.array([1.0, 3.0]), beta=0.5).tolist()
    [0.5, 1.5]
    """
    return beta * logits


@jax.jit
def state_values(logits: Float[Array, "*B V"], *, beta: ScalarLike) -> Float[Array, "*B"]:
    """V(s) = beta log sum_v exp(Q(s, v) / beta), with Q = beta z (2404.12358, Eq. 6).

    Fixed up to a potential, as Q is. A terminal state has V = 0 and no logits.

    >>> f"{state_values(jnp.zeros(4), beta=0.5):.4f}"  # 0.5 log 4
    '0.6931'
    """
    return beta * jax.nn.logsumexp(logits, axis=-1)


@jax.jit
def advantages(logits: Float[Array, "*B V"], *, beta: ScalarLike) -> Float[Array, "*B V"]:
    """Q(s, v) - V(s) = beta log pi(v | s) for every token (2404.12358, Eq. 5).

    No potential is left in them. Q is that of Eq. 7, which holds beta log pi_ref, so these
    are never positive and say how likely a token is. Relative to the reference, as Eq. 10 and
    Eq. 15 mean it, the advantage is r + V(s') - V(s) = beta log pi/pi_ref: `token_rewards`.

    >>> [f"{a:.4f}" for a in advantages(jnp.zeros(4), beta=0.5)[:2]]  # -0.5 log 4
    ['-0.6931', '-0.6931']
    """
    return beta * jax.nn.log_softmax(logits, axis=-1)


@jax.jit
def token_rewards(
    policy_token_logps: Float[Array, "*B"],
    reference_token_logps: Float[Array, "*B"],
    *,
    beta: ScalarLike,
) -> Float[Array, "*B"]:
    """The implicit reward of each token: its advantage relative to the reference.

    beta log pi(y_t | s_t)/pi_ref(y_t | s_t) = r(s_t, y_t) + V(s_{t+1}) - V(s_t)

    (2404.12358, Eq. 10-11). Of the rewards for which pi is optimal it is the one whose values
    are zero everywhere; no potential moves it. Credit read off it is therefore credit under
    this member of the class. Its sum over a response is `losses.implicit_rewards`.

    >>> rewards = token_rewards(jnp.array([-1.0, -2.0]), jnp.array([-3.0, -2.0]), beta=0.1)
    >>> [f"{reward:.2f}" for reward in rewards]
    ['0.20', '0.00']
    """
    return beta * (policy_token_logps - reference_token_logps)


@jax.jit
def bellman_rewards(
    token_q_values: Float[Array, "*B T"],
    state_values: Float[Array, "*B T"],
    reference_token_logps: Float[Array, "*B T"],
    lengths: Int[Array, "*B"],
    *,
    beta: ScalarLike,
) -> Float[Array, "*B T"]:
    """The token rewards that Q is optimal for: the Bellman equation, solved for r.

    r(s_t, y_t) = Q(s_t, y_t) - beta log pi_ref(y_t | s_t) - V(s_{t+1})

    (2404.12358, Eq. 7 inverted), where V after a response's last token is 0, as it is after
    EOS, whatever `state_values` hold there. `token_q_values` are Q of the response's own
    tokens, `lengths` their number, at least 1; rewards beyond it are 0. Another choice of logits
    for the same policy gives other rewards of the same class (Definition 1). If a response was
    cut before EOS, its last reward holds V of the state it was cut at as well.

    >>> q, v, reference = jnp.array([1.0, 0.5, 9.0]), jnp.array([0.2, 0.3, 9.0]), jnp.zeros(3)
    >>> [f"{r:.1f}" for r in bellman_rewards(q, v, reference, jnp.array(2), beta=0.1)]
    ['0.7', '0.5', '0.0']
    """
    steps = jnp.broadcast_to(jnp.arange(token_q_values.shape[-1]), token_q_values.shape)
    lengths = lengths[..., None]
    following = jnp.where(steps + 1 < lengths, jnp.roll(state_values, -1, axis=-1), 0.0)
    rewards = token_q_values - beta * reference_token_logps - following
    return jnp.where(steps < lengths, rewards, 0.0)


class Return(NamedTuple):
    """The return of a response: `start_values + token_rewards.sum(-1)`."""

    start_values: Float[Array, "*B"]
    token_rewards: Float[Array, "*B T"]


@jax.jit
def return_decomposition(
    token_q_values: Float[Array, "*B T"],
    state_values: Float[Array, "*B T"],
    reference_token_logps: Float[Array, "*B T"],
    lengths: Int[Array, "*B"],
    *,
    beta: ScalarLike,
) -> Return:
    """The sum of `bellman_rewards`, telescoped into a prompt's share and the tokens'.

    sum_t r(s_t, y_t) = V(s_0) + sum_t beta log pi(y_t | s_t)/pi_ref(y_t | s_t)

    over t = 0 .. T-1 (2404.12358, Eq. 8-9; V after the last token is 0). V(s_0) is common to all
    responses of a prompt, so it leaves preferences alone, and no policy fixes it: what pi and
    pi_ref fix is the sum of the token rewards. Arguments as for `bellman_rewards`.

    >>> q, v, reference = jnp.array([1.0, 0.5]), jnp.array([0.2, 0.3]), jnp.zeros(2)
    >>> parts = return_decomposition(q, v, reference, jnp.array(2), beta=0.1)
    >>> f"{parts.start_values:.1f}", [f"{r:.1f}" for r in parts.token_rewards]
    ('0.2', ['0.8', '0.2'])
    """
    steps = jnp.broadcast_to(jnp.arange(token_q_values.shape[-1]), token_q_values.shape)
    rewards = token_q_values - state_values - beta * reference_token_logps
    return Return(state_values[..., 0], jnp.where(steps < lengths[..., None], rewards, 0.0))


@jax.jit
def shape(rewards: Float[Array, "*B T"], potential: Float[Array, "*B T+1"]) -> Float[Array, "*B T"]:
    """Another reward of the same class: r'_t = r_t + Phi(s_{t+1}) - Phi(s_t).

    (2404.12358, Definition 1.) `potential` holds Phi of every state that a response passes,
    first and last included. Q moves by -Phi(s), the optimal policy not at all. Preferences
    stay if Phi is 0 in terminal states (or the same in all of them): returns then change by
    -Phi(s_0), the same for all responses of a prompt. After a response's end Phi is to
    be 0 as well.

    >>> shape(jnp.array([1.0, 1.0]), jnp.array([0.5, 2.0, 0.0])).tolist()
    [2.5, -1.0]
    """
    return rewards + jnp.diff(potential, axis=-1)


@jax.jit
def expected_log_ratios(
    policy_logits: Float[Array, "*B V"], reference_logits: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """The log-ratio that the reference's own tokens have on average, exactly, at each state.

    sum_v pi_ref(v | s) (log pi(v | s) - log pi_ref(v | s))

    (2404.12358, Eq. 16; times beta an expected implicit reward.) It is -KL(pi_ref || pi), so
    never positive: rewards of responses that are like the reference's own must fall.
    In nats; logits must be finite and have one vocabulary.

    >>> policy, reference = jnp.log(jnp.array([0.25, 0.75])), jnp.zeros(2)
    >>> f"{expected_log_ratios(policy, reference):.4f}"  # 0.5 log 0.5 + 0.5 log 1.5
    '-0.1438'
    """
    policy, reference = jax.nn.log_softmax(policy_logits), jax.nn.log_softmax(reference_logits)
    return jnp.sum(jnp.exp(reference) * (policy - reference), axis=-1)


@jax.jit
def kl_divergences(
    reference_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """KL(pi_ref || pi) at each state: cross-entropy minus entropy.

    KL = [log sum_v exp z(v) - sum_v p(v) z(v)] - [log sum_v exp z_ref(v) - sum_v p(v) z_ref(v)]

    with p = pi_ref. The other side of Eq. 16 (2404.12358) by other arithmetic: added to
    `expected_log_ratios` it vanishes, up to the rounding of float32. In nats.

    >>> policy, reference = jnp.log(jnp.array([0.25, 0.75])), jnp.zeros(2)
    >>> f"{kl_divergences(reference, policy):.4f}"
    '0.1438'
    """
    probabilities = jax.nn.softmax(reference_logits)

    def cross_entropies(z):
        z = z - z.max(axis=-1, keepdims=True)  # near zero, where float32 is fine
        return jax.nn.logsumexp(z, axis=-1) - jnp.sum(probabilities * z, axis=-1)

    return cross_entropies(policy_logits) - cross_entropies(reference_logits)
