"""What 2404.12358 proves, computed; where its assumptions break, measured; and that DPO gets there.

    python examples/theory.py [--out runs/theory]

Prints a table of claim, error and verdict on token MDPs that are small enough to solve exactly,
then trains a tabular policy with this project's own DPO loss on preferences drawn from a known
reward, and draws how fast it reaches pi* into OUT/learning.png. A quarter of a minute on two
CPU cores. Exits with status 1 if a verdict is not what it must be.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import learning
import numpy as np
from learning import log_softmax
from rich.console import Console
from rich.table import Table

from jaxdpo import token_mdp
from jaxdpo.decoding import LM, Constraints, Product, beam_search
from jaxdpo.token_mdp import Solution, TokenMDP, Walks, preferences, rewards_of, shaped, solve

NUM_TOKENS, HORIZON, EOS = 5, 4, 0
EXACT, FLOAT32 = 1e-10, 1e-5  # the error of a claim that holds is at most this,
BROKEN = 1e-3  # and of one that fails at least this
SLOPE = 0.2  # what few draws leave uncertain of a slope of -1
GUIDANCE, BEAM_SIZES = 0.7, (2, 5)
DPO_OF_TOKENS = "DPO gets pi* of the MDP's token rewards"


class Case(NamedTuple):
    """An MDP with its optimum and everything that can be said in it."""

    mdp: TokenMDP
    beta: float
    optimum: Solution
    walks: Walks
    responses: Walks

    def token_rewards(self) -> np.ndarray:
        """beta log pi*/pi_ref for every state and token (Eq. 10)."""
        return self.beta * (self.optimum.policy_logps - self.mdp.reference_logps)


class Row(NamedTuple):
    """A line of the table. A claim that `holds` has at most the error `bound`, others at least."""

    claim: str
    where: str
    error: float
    bound: float = EXACT
    holds: bool = True

    @property
    def as_it_must_be(self) -> bool:
        """Whether the error is a number on the right side of its bound."""
        right_side = self.error <= self.bound if self.holds else self.error >= self.bound
        return bool(np.isfinite(self.error) and right_side)

    @property
    def verdict(self) -> str:
        expected = "holds" if self.holds else "fails"
        return expected if self.as_it_must_be else f"NOT AS IT MUST BE: {expected}"


def failing(claim: str, where: str, error: float) -> Row:
    return Row(claim, where, error, BROKEN, holds=False)


def case(mdp: TokenMDP, beta: float, max_length: int = HORIZON) -> Case:
    walks = token_mdp.walks(mdp.transitions, max_length=max_length)
    return Case(mdp, beta, solve(mdp, beta=beta), walks, walks.responses())


def cases() -> list[Case]:
    """Trees with rewards for every token, and with one for the last token only, as in RLHF."""
    _, transitions = token_mdp.prefix_tree(NUM_TOKENS, HORIZON, eos=EOS)
    found = []
    for seed, beta in itertools.product(range(3), (0.05, 0.1, 1.0)):
        dense = token_mdp.random_mdp(transitions, seed)
        sparse = dense._replace(rewards=dense.rewards * transitions[..., -1])
        found += [case(dense, beta), case(sparse, beta)]
    return found


def gap(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def worst(errors: Iterable[float]) -> float:
    """The largest, or NaN if there is one, which Python's max may pass over."""
    return float(np.max(list(errors)))


def advantages(c: Case) -> np.ndarray:
    """r + E V*(s') - V*(s), relative to the reference: the reward shaped by V*."""
    return shaped(c.mdp, c.optimum.state_values).rewards


# ---- What holds -------------------------------------------------------------------------------
# Each function is the largest error of one claim in one case.


def rewards_from_q(c: Case) -> float:
    return gap(rewards_of(c.mdp, c.optimum.q_values, beta=c.beta).rewards, c.mdp.rewards)


def q_from_rewards(c: Case) -> float:
    """Any table is the optimal Q-function of the reward that it gives."""
    table = np.random.default_rng(0).normal(size=c.mdp.rewards.shape)
    return gap(solve(rewards_of(c.mdp, table, beta=c.beta), beta=c.beta).q_values, table)


def return_telescopes(c: Case) -> float:
    returns = c.responses.sums(c.mdp.rewards)
    return gap(returns, c.optimum.state_values[0] + c.responses.sums(c.token_rewards()))


def preferences_by_log_ratios(c: Case) -> float:
    by_return = preferences(c.responses.sums(c.mdp.rewards))
    return gap(by_return, preferences(c.responses.sums(c.token_rewards())))


def shaping(c: Case) -> float:
    """Q and V move by minus the potential; policy and preferences stay."""
    potential = np.random.default_rng(1).normal(size=len(c.mdp.rewards))
    other = shaped(c.mdp, potential)
    moved = solve(other, beta=c.beta)
    responses = c.responses
    errors = (
        gap(moved.q_values, c.optimum.q_values - potential[:, None]),
        gap(moved.policy_logps, c.optimum.policy_logps),
        gap(preferences(responses.sums(other.rewards)), preferences(responses.sums(c.mdp.rewards))),
    )
    return worst(errors)


def representative(c: Case) -> float:
    """beta log pi*/pi_ref is in the reward's class: same policy and preferences, V = 0."""
    mdp = c.mdp._replace(rewards=c.token_rewards())
    optimum = solve(mdp, beta=c.beta)
    errors = (
        gap(mdp.rewards, advantages(c)),
        gap(optimum.policy_logps, c.optimum.policy_logps),
        gap(optimum.state_values, 0),
        preferences_by_log_ratios(c),
    )
    return worst(errors)


def any_policy_is_optimal(c: Case) -> float:
    """Whatever the policy, it is optimal for its own beta log pi/pi_ref."""
    policy = log_softmax(np.random.default_rng(2).normal(size=c.mdp.rewards.shape))
    mdp = c.mdp._replace(rewards=c.beta * (policy - c.mdp.reference_logps))
    optimum = solve(mdp, beta=c.beta)
    return worst([gap(optimum.policy_logps, policy), gap(optimum.state_values, 0)])


def any_reward_of_responses(c: Case) -> float:
    """A reward of whole responses, none like another, still is a sum of beta log pi*/pi_ref."""
    rewards = np.random.default_rng(3).normal(size=len(c.responses.tokens))
    last = c.responses.visits * c.mdp.transitions[..., -1]
    mdp = c.mdp._replace(rewards=np.einsum("n,nsv->sv", rewards, last))
    log_ratios = solve(mdp, beta=c.beta).policy_logps - mdp.reference_logps
    return gap(preferences(c.beta * c.responses.sums(log_ratios)), preferences(rewards))


def eq_12(c: Case, walks: Walks) -> np.ndarray:
    """sum (r + beta log pi_ref) + V*(the state reached), of beginnings of responses."""
    sums = walks.sums(c.mdp.rewards + c.beta * c.mdp.reference_logps)
    return sums + np.append(c.optimum.state_values, 0.0)[walks.ends]


def eq_13(c: Case, walks: Walks, sign: float = 1.0) -> np.ndarray:
    """V*(s_0) + beta sum log pi*; the paper prints -V*(s_0)."""
    return sign * c.optimum.state_values[0] + c.beta * walks.sums(c.optimum.policy_logps)


def value_search_is_likelihood_search(c: Case) -> float:
    return gap(eq_12(c, c.walks), eq_13(c, c.walks))


def printed_sign(c: Case) -> float:
    return gap(eq_12(c, c.walks), eq_13(c, c.walks, sign=-1.0))


def eq_14(c: Case, base: np.ndarray) -> np.ndarray:
    return log_softmax(base + GUIDANCE * (c.optimum.policy_logps - c.mdp.reference_logps))


def eq_15(c: Case, base: np.ndarray, exponent: float, with_reference: bool = False) -> np.ndarray:
    """base times exp(exponent times the advantage), normalised.

    With beta log pi_ref in it, as in Eq. 7, the advantage is beta log pi* and no log-ratio.
    """
    of_eq_7 = with_reference * c.beta * c.mdp.reference_logps
    return log_softmax(base + exponent * (advantages(c) + of_eq_7))


def proxy_tuning(c: Case) -> float:
    base = _base(c)
    return gap(eq_14(c, base), eq_15(c, base, GUIDANCE / c.beta))


def proxy_tuning_by_the_decoder(c: Case) -> float:
    """Eq. 14 as `decoding.Product` computes it in float32, in probabilities."""
    base = _base(c)
    logits = [base, c.optimum.q_values / c.beta, c.mdp.reference_logps]
    logits = tuple(jnp.asarray(z, jnp.float32)[:, None] for z in logits)
    lm = LM(PrefixTable(NUM_TOKENS), None)
    product = Product((lm,) * 3, jnp.array([1.0, GUIDANCE, -GUIDANCE], jnp.float32))
    found = np.exp(product.scores(logits).logps[:, 0])
    return gap(found, np.exp(eq_15(c, base, GUIDANCE / c.beta)))


def expected_advantage_is_minus_kl(c: Case) -> float:
    """Eq. 16: the advantage that pi_ref expects, over beta, is -KL(pi_ref || pi*), never above 0.

    The KL is cross-entropy minus entropy.
    """
    chances = np.exp(c.mdp.reference_logps)
    kl = (chances * c.mdp.reference_logps).sum(-1) - (chances * c.optimum.policy_logps).sum(-1)
    expected = (chances * advantages(c)).sum(-1) / c.beta
    return worst([gap(expected, -kl), gap(kl, np.abs(kl))])


def _base(c: Case) -> np.ndarray:
    return log_softmax(np.random.default_rng(4).normal(size=c.mdp.rewards.shape))


# ---- Beam search, by value in NumPy and by likelihood in the project's decoder ----------------


class At(NamedTuple):
    states: jax.Array  # [B, K]


@dataclasses.dataclass(frozen=True)
class PrefixTable:
    """A model for the decoder whose state is the whole prefix: (logits, next state) by row."""

    vocab_size: int
    max_length: int = 1000

    def prefill(self, params, tokens, lengths, *, num_beams, room):
        start = jnp.zeros((len(tokens), num_beams), jnp.int32)
        return params[0][start[:, 0]], At(start)

    def extend(self, params, cache, tokens, *, room):
        states = params[1][cache.states, tokens]
        return params[0][states], At(states)

    def reorder(self, cache, parents):
        return At(jnp.take_along_axis(cache.states, parents, axis=1))

    def num_nodes(self, cache):
        return jnp.zeros(len(cache.states), jnp.int32)

    def compact(self, cache, prompts, *, num_nodes, room):
        return At(cache.states[prompts])


def as_model(c: Case) -> LM:
    """The language model whose logits are Q* / beta."""
    logits = np.append(c.optimum.q_values / c.beta, np.zeros((1, NUM_TOKENS)), axis=0)
    end = np.full((1, NUM_TOKENS), len(c.mdp.rewards))
    states = np.append(c.mdp.transitions.argmax(axis=-1), end, axis=0)
    params = jnp.asarray(logits, jnp.float32), jnp.asarray(states, jnp.int32)
    return LM(PrefixTable(NUM_TOKENS), params)


def likelihood_beams(c: Case, size: int, length_penalty: float = 0.0) -> list:
    """[(tokens, score)] of the decoder: log pi* and nothing else (Eq. 13)."""
    [found] = beam_search(
        as_model(c),
        [[EOS]],
        Constraints(HORIZON, (EOS,)),
        beam_size=size,
        length_penalty=length_penalty,
        early_stopping="never",
    )
    return [(tuple(h.tokens.tolist()), h.score) for h in found]


def value_beams(c: Case, size: int) -> list:
    """[(tokens, score)] of a beam search for the highest Eq. 12, by the decoder's rules.

    An end among the best `size` of 2 `size` candidates is finished, the best others go on.
    """
    scores = dict(zip(c.walks.tokens, eq_12(c, c.walks), strict=True))
    ended = dict(zip(c.walks.tokens, c.walks.ends == len(c.mdp.rewards), strict=True))
    running, finished = [()], []
    while running:
        grown = [(*tokens, v) for tokens in running for v in range(NUM_TOKENS)]
        grown = sorted(grown, key=scores.get, reverse=True)[: 2 * size]
        finished += [tokens for tokens in grown[:size] if ended[tokens]]
        running = [tokens for tokens in grown if not ended[tokens]][:size]
    finished = sorted(finished, key=scores.get, reverse=True)[:size]
    return [(tokens, scores[tokens]) for tokens in finished]


def beam_rows(found: list[Case]) -> Iterator[Row]:
    differing, changed, errors = 0, 0, []
    searches = list(itertools.product(found, BEAM_SIZES))
    for c, size in searches:
        by_value, by_likelihood = value_beams(c, size), likelihood_beams(c, size)
        differing += [t for t, _ in by_value] != [t for t, _ in by_likelihood]
        changed += likelihood_beams(c, size, 1.0)[0][0] != by_value[0][0]
        start = c.optimum.state_values[0]
        errors += [
            abs(score - start - c.beta * logp)
            for (_, score), (_, logp) in zip(by_value, by_likelihood, strict=True)
        ]
    n = len(searches)
    claim = "Eq. 12 = 13: value beams = the decoder's beams"
    yield Row(claim, f"{n} searches; share that differs", differing / n, 0.0)
    claim = "Eq. 12 = 13: and so are the scores"
    yield Row(claim, f"{n} searches, float32", worst(errors), FLOAT32)
    claim = "Eq. 13 with length_penalty=1: the same winner"
    yield failing(claim, f"{n} searches; share that differs", changed / n)


# ---- Where the assumptions break --------------------------------------------------------------


def potential_at_the_end(c: Case) -> float:
    """Shaping with a potential that is not 0 in terminal states: how far preferences move."""
    potential = np.random.default_rng(5).normal(size=len(c.responses.tokens))
    returns = c.responses.sums(c.mdp.rewards)
    return gap(preferences(returns + potential), preferences(returns))


def wrong_units(c: Case) -> float:
    base = _base(c)
    return gap(eq_14(c, base), eq_15(c, base, GUIDANCE))


def wrong_advantage(c: Case) -> float:
    base = _base(c)
    return gap(eq_14(c, base), eq_15(c, base, GUIDANCE / c.beta, with_reference=True))


def order_forgotten() -> Iterator[Row]:
    """States are bags of tokens, so several histories meet in one state."""
    _, transitions = token_mdp.prefix_tree(
        4, 3, eos=EOS, state_of=lambda prefix: tuple(sorted(prefix))
    )
    c = case(learning.near_uniform(token_mdp.random_mdp(transitions, 0)), 0.5)
    where = "order of tokens forgotten"
    yield Row("Lemma 1, both ways", where, worst([rewards_from_q(c), q_from_rewards(c)]))
    yield Row("Eq. 8/9: the return telescopes", where, return_telescopes(c))
    count = len(c.responses.tokens)
    directions = c.responses.visits.reshape(count, -1)
    rank = int(np.linalg.matrix_rank(directions - directions.mean(axis=0)))
    claim = "Theorem 1: any reward of responses is represented"
    place = f"{where}; share of {count - 1} dimensions"
    yield failing(claim, place, 1 - rank / (count - 1))
    of_tokens, of_responses = dpo_by_kind_of_reward(c)
    place = f"{where}; KL(pi* || pi), nats"
    yield Row(DPO_OF_TOKENS, f"{place}, largest of {len(of_tokens)}", gap(of_tokens, 0))
    claim = "DPO gets pi* of any reward of responses"
    yield failing(claim, f"{place}, mean of {len(of_responses)}", of_responses.mean())


def dpo_by_kind_of_reward(c: Case, draws: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """KL(pi* || pi) of DPO's pi, pi*(y) ~ pi_ref(y) exp(r(y) / beta), for draws of two kinds of r.

    Returns of rewards for every token, and rewards of whole responses, none like another.
    """
    rng, responses = np.random.default_rng(1), c.responses
    returns = map(responses.sums, rng.normal(size=(draws, *c.mdp.rewards.shape)))
    rewards = np.array([*returns, *rng.normal(size=(draws, len(responses.tokens)))])
    best = log_softmax(responses.sums(c.mdp.reference_logps) + rewards / c.beta)
    policies = learning.dpo_optima(c.mdp, responses, rewards, beta=c.beta)
    apart, _ = learning.divergences(responses, best, policies)
    return apart[:draws], apart[draws:]


def last_token_only(seed: int, beta: float) -> tuple[TokenMDP, float]:
    """A loop: the state is the last token, EOS ends. And its spectral radius.

    With u = exp(V / beta) the Bellman equation is u = M u + b, M >= 0, b > 0: it has a
    positive solution if and only if the spectral radius of M is below 1.
    """
    transitions = np.zeros((NUM_TOKENS, NUM_TOKENS, NUM_TOKENS + 1))
    for token in range(NUM_TOKENS):
        transitions[:, token, NUM_TOKENS if token == EOS else token] = 1.0
    mdp = token_mdp.random_mdp(transitions, seed)
    weights = np.exp(mdp.rewards / beta + mdp.reference_logps)
    loop = np.einsum("sv,svt->st", weights, transitions[..., :-1])
    return mdp, float(np.abs(np.linalg.eigvals(loop)).max())


def loops(beta: float = 1.0, draws: int = 100) -> Iterator[Row]:
    """States that can be revisited: the state is the last token."""
    errors, finite, without = [], 0, 0
    for seed in range(draws):
        mdp, radius = last_token_only(seed, beta)
        without += radius >= 1
        if radius < 0.9:
            c = case(mdp, beta, max_length=3)
            telescoped = gap(eq_12(c, c.walks), eq_13(c, c.walks))
            errors += [rewards_from_q(c), q_from_rewards(c), telescoped]
            finite += 1
    where = "loops: state = last token"
    claim = "Lemma 1, Eq. 12 = 13, where V* is finite"
    yield Row(claim, f"{where}; {finite} rewards", worst(errors))
    claim = "Lemma 1: every reward has a Q*"
    yield failing(claim, f"{where}; share of {draws} without", without / draws)
    claim = "Lemma 1: one Q* for all visits of a state"
    yield failing(claim, f"{where}, with a horizon", spread(beta))


def spread(beta: float) -> float:
    """The largest difference in Q* between two visits of a last token, with a horizon."""
    looping, _ = last_token_only(0, beta)
    states, transitions = token_mdp.prefix_tree(NUM_TOKENS, HORIZON, eos=EOS)
    last = np.array([state[-1] if state else EOS for state in states])
    mdp = TokenMDP(looping.rewards[last], looping.reference_logps[last], transitions)
    q = solve(mdp, beta=beta).q_values
    return worst(np.ptp(q[last == token], axis=0).max() for token in range(1, NUM_TOKENS))


def drawn_dynamics() -> Iterator[Row]:
    """The world answers every token with a coin, which the state then holds."""
    _, transitions = token_mdp.prefix_tree(3, 3, eos=EOS, outcomes=(0.5, 0.5))
    c = case(learning.near_uniform(token_mdp.random_mdp(transitions, 0)), 0.5)
    where = "stochastic dynamics"
    claim = "Lemma 1, both ways, with E V*(s')"
    yield Row(claim, where, worst([rewards_from_q(c), q_from_rewards(c)]))
    other = solve(c.mdp._replace(rewards=c.token_rewards()), beta=c.beta)
    policies = other.policy_logps, c.optimum.policy_logps
    yield Row("beta log pi*/pi_ref has the same optimal policy", where, gap(*policies))
    for claim, error in (
        ("Eq. 8/9: the return telescopes", return_telescopes),
        ("Eq. 8/9: preferences by return = by log-ratios", preferences_by_log_ratios),
        ("Eq. 12 = 13 for every partial response", value_search_is_likelihood_search),
    ):
        yield failing(claim, where, error(c))
    rewards, best = map(c.responses.sums, (c.mdp.rewards, c.optimum.policy_logps))
    policies = learning.dpo_optima(c.mdp, c.responses, rewards[None], beta=c.beta)
    [apart], _ = learning.divergences(c.responses, best, policies)
    yield failing(DPO_OF_TOKENS, f"{where}; KL(pi* || pi), nats", apart)


# ---- The table --------------------------------------------------------------------------------

HOLDS: list[tuple[str, Callable[[Case], float]]] = [
    ("Lemma 1: r -> Q* -> r", rewards_from_q),
    ("Lemma 1: any Q -> r -> Q*", q_from_rewards),
    ("Eq. 8/9: return = V*(s_0) + sum beta log pi*/pi_ref", return_telescopes),
    ("Eq. 8/9: preferences by return = by log-ratios", preferences_by_log_ratios),
    ("Definition 1: shaping moves Q alone", shaping),
    ("Theorem 1: beta log pi*/pi_ref is like r, V* = 0", representative),
    ("Theorem 1: any pi is optimal for beta log pi/pi_ref", any_policy_is_optimal),
    ("Theorem 1: any reward of responses is represented", any_reward_of_responses),
    ("Eq. 12 = 13 for every partial response", value_search_is_likelihood_search),
    ("Eq. 14 = 15 with guidance / beta as the exponent", proxy_tuning),
    ("Eq. 16: E (r + V*(s') - V*(s)) / beta = -KL <= 0", expected_advantage_is_minus_kl),
]
BREAKS: list[tuple[str, Callable[[Case], float]]] = [
    ("Eq. 12 = 13 as printed, with -V*(s_0)", printed_sign),
    ("Eq. 14 = 15 with guidance as the exponent", wrong_units),
    ("Eq. 14 = 15 with Q* as in Eq. 7", wrong_advantage),
    ("Definition 1: a potential at the end too", potential_at_the_end),
]


def rows() -> Iterator[Row]:
    """The whole table, the claims that hold first."""
    found = cases()
    where = f"{len(found)} trees"
    for claim, error in HOLDS:
        yield Row(claim, where, worst(map(error, found)))
    claim = "Eq. 14 = 15 by decoding.Product"
    product = worst(map(proxy_tuning_by_the_decoder, found))
    yield Row(claim, f"{where}, float32; probabilities", product, FLOAT32)
    yield from beam_rows(found)
    for claim, error in BREAKS:
        yield failing(claim, where, worst(map(error, found)))
    yield from order_forgotten()
    yield from loops()
    yield from drawn_dynamics()


def table(shown: list[Row]) -> Table:
    """What holds, then what does not."""
    header = ("claim", "where", "error", "verdict")
    found = Table(*header, title="2404.12358, computed: the largest errors")
    for holds in (True, False):
        for row in (row for row in shown if row.holds == holds):
            error = f"{row.error:.1e}" if holds else f"{row.error:.3g}"
            found.add_row(row.claim, row.where, error, row.verdict)
        found.add_section()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="What the paper proves, computed.")
    parser.add_argument("--out", default="runs/theory", help="folder for learning.png")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    learnt = learning.learning()
    learning.draw(learnt, out / "learning.png")
    where = "a tree of 15 responses, all pairs; log pi"
    shown = [*rows(), Row(DPO_OF_TOKENS, where, learnt.all_pairs)]
    where = "the same tree, draws of pairs; |slope + 1|, log axes"
    shown += [Row("DPO: KL(pi* || pi) falls as 1 / pairs", where, abs(learnt.slope + 1), SLOPE)]
    console = Console()
    console.print(table(shown))
    for pairs, kl in zip(learnt.pairs, learnt.forward.mean(axis=1), strict=True):
        expected = learnt.per_pair / pairs
        console.print(f"DPO on {pairs} pairs: KL(pi* || pi) {kl:.2e}, expected {expected:.2e}")
    console.print(f"slope {learnt.slope:.3f} on log axes; figure: {out / 'learning.png'}")
    return 0 if all(row.as_it_must_be for row in shown) else 1


if __name__ == "__main__":
    sys.exit(main())
