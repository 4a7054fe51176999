"""The objectives: SFT, DPO and IPO, one number for each pair.

Arrays in, arrays out: [B] float32 sums of log-probabilities over the whole response (EOS
included, prompt excluded), not divided by length, as in the official DPO code; the
caller takes the mean over pairs. No model, no reduction, no logging.
"""

import jax
from jaxtyping import Array, Float, ScalarLike

from jaxdpo import qfunction


@jax.jit
def sft_loss(logps: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Negative log-likelihood of the response: minus the *sum* over its tokens.

    loss = - sum_t log pi(y_t | x, y_<t)

    Not divided by length: a longer response weighs more, as in the official SFT.

    >>> import jax.numpy as jnp
    >>> sft_loss(jnp.array([-3.0])).tolist()
    [3.0]
    """
    return -logps


@jax.jit
def implicit_rewards(
    policy_logps: Float[Array, "*B"],
    reference_logps: Float[Array, "*B"],
    *,
    beta: ScalarLike,
) -> Float[Array, "*B"]:
    """The reward that the policy is optimal for, up to a function of the prompt.

    r(x, y) = beta (log pi(y | x) - log pi_ref(y | x))     (2305.18290, Eq. 5)

    The same holds for a single token with token log-probabilities (2404.12358, Eq. 10).

    >>> import jax.numpy as jnp
    >>> rewards = implicit_rewards(jnp.array([-12.5]), jnp.array([-13.0]), beta=0.1)
    >>> f"{rewards[0]:.3f}"
    '0.050'
    """
    return qfunction.token_rewards(policy_logps, reference_logps, beta=beta)


@jax.jit
def dpo_loss(
    policy_chosen_logps: Float[Array, "*B"],
    policy_rejected_logps: Float[Array, "*B"],
    reference_chosen_logps: Float[Array, "*B"],
    reference_rejected_logps: Float[Array, "*B"],
    *,
    beta: ScalarLike,
    label_smoothing: ScalarLike = 0.0,
) -> Float[Array, "*B"]:
    """Direct preference optimisation: logistic loss of the implicit-reward margin.

    loss = - (1 - e) log sigmoid(m) - e log sigmoid(-m),
    m    = beta [(log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))]

    with e = `label_smoothing`: 0 is DPO (2305.18290, Eq. 7), above 0 conservative DPO.
    Log-probabilities are sums over the response; policy equal to reference gives log 2.

    >>> import jax.numpy as jnp
    >>> logps = jnp.array([-5.0])
    >>> f"{dpo_loss(logps, logps, logps, logps, beta=0.1)[0]:.4f}"  # log 2
    '0.6931'
    """
    margins = beta * (
        (policy_chosen_logps - reference_chosen_logps)
        - (policy_rejected_logps - reference_rejected_logps)
    )
    preferred, flipped = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    return -(1.0 - label_smoothing) * preferred - label_smoothing * flipped


@jax.jit
def ipo_loss(
    policy_chosen_logps: Float[Array, "*B"],
    policy_rejected_logps: Float[Array, "*B"],
    reference_chosen_logps: Float[Array, "*B"],
    reference_rejected_logps: Float[Array, "*B"],
    *,
    beta: ScalarLike,
) -> Float[Array, "*B"]:
    """Identity preference optimisation: the log-ratio margin regressed on 1 / (2 beta).

    loss = (h - 1 / (2 beta))^2,
    h    = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))

    (2310.12036, Eq. 17), on *sums* over the response, as the official DPO code has it;
    TRL's "ipo" divides each log-ratio by its response's length.

    >>> import jax.numpy as jnp
    >>> zero = jnp.zeros(1)
    >>> ipo_loss(zero, zero, zero, zero, beta=0.1).tolist()
    [25.0]
    """
    log_ratio_margins = (policy_chosen_logps - reference_chosen_logps) - (
        policy_rejected_logps - reference_rejected_logps
    )
    return (log_ratio_margins - 1.0 / (2.0 * beta)) ** 2
