"""A policy that is a table, trained by this project's DPO loss: where it gets, and how fast.

One logit for each state and token, so that any policy is possible, and preferences drawn
(Bradley-Terry) from a known reward for every token. Preferences between the responses of one
prompt fix their rewards up to a constant, hence log pi*(y) up to a constant, which
normalisation fixes: all of pi* is identified. `theory.py` prints and draws what is found here.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxdpo import losses
from jaxdpo.token_mdp import TokenMDP, Walks, preferences, prefix_tree, random_mdp, solve, walks

BETA = 0.5
MAX_STEPS, TOLERANCE = 300, 1e-14  # on from a gradient of 0, L-BFGS divides noise by noise
FORWARD, BACKWARD = "#1f6fb4", "#d1495b"


class Learning(NamedTuple):
    """How far from pi* policies are that were trained on so many pairs."""

    pairs: np.ndarray  # [P]
    forward: np.ndarray  # [P, draws of the data] KL(pi* || pi) in nats, of whole responses
    backward: np.ndarray  # [P, draws] KL(pi || pi*)
    all_pairs: float  # largest |log pi - log pi*| with every pair, weighted by its probability
    per_pair: float  # what asymptotic theory expects of KL times pairs

    @property
    def slope(self) -> float:
        """Of log KL(pi* || pi), averaged over the draws, over log pairs."""
        return float(np.polyfit(np.log(self.pairs), np.log(self.forward.mean(axis=1)), 1)[0])


def learning(num_draws: int = 20, seed: int = 0) -> Learning:
    """DPO on a thousand to a million pairs, on several draws of each number of them."""
    mdp, responses = known_reward()
    best = solve(mdp, beta=BETA).policy_logps
    chances = pair_chances(mdp, responses, responses.sums(mdp.rewards))
    pairs = np.logspace(3, 6, 7).astype(int)
    rng = np.random.default_rng(seed)
    wins = rng.multinomial(np.repeat(pairs, num_draws), chances.ravel()).astype(float)
    wins = [chances, *wins.reshape(-1, *chances.shape)]
    policies = dpo_policies(mdp, responses, np.stack(wins), beta=BETA)
    exact = float(np.abs(policies[0] - best).max())
    both = divergences(responses, responses.sums(best), policies[1:])
    forward, backward = (kl.reshape(len(pairs), -1) for kl in both)
    expected = expected_kl(responses, best, chances, beta=BETA)
    return Learning(pairs, forward, backward, exact, expected)


def known_reward() -> tuple[TokenMDP, Walks]:
    """15 responses of up to three tokens, none of them rare under the reference."""
    _, transitions = prefix_tree(num_tokens=3, horizon=3)
    mdp = near_uniform(random_mdp(transitions, seed=0))
    return mdp, walks(transitions, max_length=3).responses()


def near_uniform(mdp: TokenMDP) -> TokenMDP:
    """The same with a reference that makes no response rare, so that the optimizer converges."""
    z = np.random.default_rng(5).normal(scale=0.5, size=mdp.rewards.shape)
    return mdp._replace(reference_logps=log_softmax(z))


def log_softmax(z: np.ndarray) -> np.ndarray:
    """z - log sum exp z, over the last axis."""
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


def pair_chances(mdp: TokenMDP, responses: Walks, rewards: np.ndarray) -> np.ndarray:
    """How probable a pair (i preferred to j) is: two responses of pi_ref, not the same."""
    reference = np.exp(responses.sums(mdp.reference_logps)) * responses.chances
    both = np.outer(reference, reference)
    np.fill_diagonal(both, 0.0)
    return both / both.sum() * 2 * preferences(rewards)


def dpo_optima(mdp: TokenMDP, responses: Walks, rewards: np.ndarray, *, beta: float) -> np.ndarray:
    """log pi [D, S, V] of DPO on every pair there is, weighted by its probability.

    `rewards` [D, N] are of the whole responses.
    """
    wins = np.stack([pair_chances(mdp, responses, some) for some in rewards])
    return dpo_policies(mdp, responses, wins, beta=beta)


def dpo_policies(mdp: TokenMDP, responses: Walks, wins: np.ndarray, *, beta: float) -> np.ndarray:
    """log pi [D, S, V] of policies trained by `losses.dpo_loss`, from the reference on.

    `wins[d, i, j]` is how often data set d prefers response i to j; the loss is the mean over
    its pairs, in float64, the optimizer L-BFGS.
    """
    with jax.enable_x64(True):
        tables = mdp.reference_logps, responses.visits
        return np.array([_trained(*tables, some, beta) for some in wins])


@jax.jit
def _trained(reference, visits, wins, beta):
    first, second = jnp.indices(wins.shape)

    def logps(logits):
        return jnp.einsum("nsv,sv->n", visits, jax.nn.log_softmax(logits))

    def loss(logits):
        policy, start = logps(logits), logps(reference)
        pairs = policy[first], policy[second], start[first], start[second]
        return (wins * losses.dpo_loss(*pairs, beta=beta)).sum() / wins.sum()

    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def goes_on(carry):
        _, state = carry
        count, grad = (optax.tree.get(state, name) for name in ("count", "grad"))
        return (count == 0) | ((count < MAX_STEPS) & (optax.tree.norm(grad) > TOLERANCE))

    def step(carry):
        logits, state = carry
        value, grad = value_and_grad(logits, state=state)
        more = {"value": value, "grad": grad, "value_fn": loss}
        updates, state = tx.update(grad, state, logits, **more)
        return optax.apply_updates(logits, updates), state

    logits, _ = jax.lax.while_loop(goes_on, step, (reference, tx.init(reference)))
    return jax.nn.log_softmax(logits)


def divergences(
    responses: Walks, best: np.ndarray, policies: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """KL(pi* || pi) and KL(pi || pi*) of whole responses, in nats, for each log pi [S, V].

    `best` are log pi* of the responses, [N] or, with one pi* for each policy, [D, N].
    """
    chances = responses.chances
    found = np.array([responses.sums(policy) for policy in policies])
    forward = (chances * np.exp(best) * (best - found)).sum(axis=1)
    return forward, (chances * np.exp(found) * (found - best)).sum(axis=1)


def expected_kl(responses: Walks, best: np.ndarray, chances: np.ndarray, *, beta: float) -> float:
    """KL(pi* || pi) of the most likely policy times the number of pairs, as that grows.

    Rewards of responses err by a normal with covariance I^-1 / n, I being the Fisher
    information of a pair; log pi errs by 1 / beta of that, up to a constant; and KL is half
    the variance of its error under pi*.
    """
    drawn = chances + chances.T  # how probable it is that i and j are compared
    weights = chances * chances.T / np.where(drawn > 0, drawn, 1.0)
    information = np.diag(weights.sum(axis=1)) - weights
    best = np.exp(responses.sums(best))
    variance = np.diag(best) - np.outer(best, best)
    return float(np.trace(variance @ np.linalg.pinv(information)) / (2 * beta**2))


def draw(found: Learning, file: Path) -> None:
    """KL over the number of pairs: every draw a mark, their mean, and what theory expects."""
    figure, ax = plt.subplots(figsize=(7, 4.6))
    for kl, label, marker, colour, width, shift in (
        (found.forward, "KL(pi* || pi)", "o", FORWARD, 3.5, 0.94),
        (found.backward, "KL(pi || pi*)", "x", BACKWARD, 1.2, 1.06),
    ):
        x = np.broadcast_to(found.pairs[:, None] * shift, kl.shape)
        ax.plot(x.ravel(), kl.ravel(), marker, color=colour, alpha=0.3, markersize=4)
        mean = kl.mean(axis=1)
        ax.plot(found.pairs, mean, color=colour, linewidth=width, label=f"{label}, mean of draws")
    expected = found.per_pair / found.pairs
    label = f"expected: {found.per_pair:.1f} / pairs (Fisher information)"
    ax.plot(found.pairs, expected, color="black", linestyle="--", linewidth=1, label=label)
    ax.set(xscale="log", yscale="log", xlabel="preference pairs", ylabel="KL [nats per response]")
    draws = found.forward.shape[1]
    ax.set_title(f"DPO reaches pi*: slope {found.slope:.2f} ({draws} draws of the data)")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
