"""Token MDPs small enough to solve exactly: soft dynamic programming in float64.

Where `qfunction` reads Q off a trained model, here rewards are given and Q is found
(2404.12358, Eq. 5-7), so that what the paper proves can be computed on both sides. A state is
a prompt with the tokens so far; a response ends after EOS or at the horizon. The same arrays
hold what the paper excludes, where its proofs break: states that several prefixes share or
that can be revisited, and dynamics that draw.

`examples/theory.py` prints what follows. Left out: models, sampling, learning.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxdpo import InputError

State = tuple[Hashable, ...]


class TokenMDP(NamedTuple):
    """S states that are not terminal, the prompt first, and V tokens in each.

    `transitions[s, v]` is the distribution over the next state; its last place is the end,
    where every value is 0.
    """

    rewards: Float[np.ndarray, "S V"]
    reference_logps: Float[np.ndarray, "S V"]
    transitions: Float[np.ndarray, "S V E"]  # E = S + 1


class Solution(NamedTuple):
    """The optimum of an MDP; `policy_logps` are log pi*."""

    q_values: Float[np.ndarray, "S V"]
    state_values: Float[np.ndarray, " S"]
    policy_logps: Float[np.ndarray, "S V"]


class Walks(NamedTuple):
    """N beginnings of responses, from the prompt on."""

    tokens: list[tuple[int, ...]]
    visits: Float[np.ndarray, "N S V"]  # how often a walk takes token v in state s
    ends: Int[np.ndarray, " N"]  # the state a walk has reached; S is the end
    chances: Float[np.ndarray, " N"]  # of what the dynamics drew on the way

    def sums(self, values: Float[np.ndarray, "S V"]) -> Float[np.ndarray, " N"]:
        """The sum of `values` along each walk."""
        return np.einsum("nsv,sv->n", self.visits, values)

    def responses(self) -> "Walks":
        """Those that have reached the end."""
        places = np.flatnonzero(self.ends == self.visits.shape[1])
        tokens = [self.tokens[place] for place in places]
        return Walks(tokens, *(array[places] for array in self[1:]))


def prefix_tree(
    num_tokens: int,
    horizon: int,
    *,
    eos: int = 0,
    outcomes: Sequence[float] = (1.0,),
    state_of: Callable[[State], State] = lambda prefix: prefix,
) -> tuple[list[State], Float[np.ndarray, "S V E"]]:
    """The states of a token MDP, tuples of tokens, and its transitions.

    A response ends with `eos` or after `horizon` tokens. With more than one of `outcomes`,
    probabilities, the dynamics answer every token with a draw, which the state then holds as
    well. `state_of` merges prefixes of the same length into one state, e.g. those of the
    same tokens in another order; as it is, every state has one history.

    >>> states, transitions = prefix_tree(num_tokens=3, horizon=2)
    >>> states, transitions.shape
    ([(), (1,), (2,)], (3, 3, 4))
    """
    places: dict[State, int] = {(): 0}
    frontier: list[State] = [()]
    moves = []
    for left in reversed(range(horizon)):
        here, frontier = frontier, []
        for state, token, draw in itertools.product(here, range(num_tokens), range(len(outcomes))):
            after = state_of((*state, token) if len(outcomes) == 1 else (*state, token, draw))
            goes_on = token != eos and left > 0
            if goes_on and after not in places:
                places[after] = len(places)
                frontier.append(after)
            moves.append((places[state], token, places[after] if goes_on else -1, outcomes[draw]))
    transitions = np.zeros((len(places), num_tokens, len(places) + 1))
    for state, token, after, chance in moves:
        transitions[state, token, after] += chance
    return list(places), transitions


def random_mdp(transitions: Float[np.ndarray, "S V E"], seed: int) -> TokenMDP:
    """Standard normal rewards for every token and a random reference on given dynamics."""
    rng, (states, tokens, _) = np.random.default_rng(seed), transitions.shape
    reference = rng.dirichlet(np.ones(tokens), size=states)
    return TokenMDP(rng.normal(size=(states, tokens)), np.log(reference), transitions)


def solve(mdp: TokenMDP, *, beta: float, max_sweeps: int = 10_000) -> Solution:
    """The soft Q-function, its values and policy, by dynamic programming from the end.

    Q(s, v) = r(s, v) + beta log pi_ref(v | s) + E V(s')      (2404.12358, Eq. 7)
    V(s)    = beta log sum_v exp(Q(s, v) / beta)              (Eq. 6), 0 at the end
    pi(v|s) = exp((Q(s, v) - V(s)) / beta)                    (Eq. 5)

    A sweep reaches one token further back, so without loops as many are exact as a response
    has tokens. With loops the values converge, up to the rounding of the largest or of beta, or
    do not exist: `InputError`, as after `max_sweeps`.

    >>> _, transitions = prefix_tree(num_tokens=2, horizon=1)
    >>> mdp = TokenMDP(np.array([[0.0, 1.0]]), np.log([[0.5, 0.5]]), transitions)
    >>> np.exp(solve(mdp, beta=1.0).policy_logps).round(3).tolist()  # softmax of (0, 1)
    [[0.269, 0.731]]
    """
    values = np.zeros(len(mdp.rewards))
    for _ in range(max_sweeps):
        q = mdp.rewards + beta * mdp.reference_logps + _following(mdp, values)
        previous, values = values, beta * np.logaddexp.reduce(q / beta, axis=-1)
        rounding = 4 * np.finfo(float).eps * max(np.abs(values).max(), beta)
        if np.abs(values - previous).max() <= rounding:
            return Solution(q, values, (q - values[:, None]) / beta)
    raise InputError(
        f"token MDP: no finite values after {max_sweeps} sweeps; a loop of states earns more than "
        "leaving it costs, or nearly so"
    )


def rewards_of(mdp: TokenMDP, q_values: Float[np.ndarray, "S V"], *, beta: float) -> TokenMDP:
    """The same dynamics with the one reward that `q_values` are optimal for.

    r(s, v) = Q(s, v) - beta log pi_ref(v | s) - E V(s')      (2404.12358, Eq. 7 inverted)
    """
    values = beta * np.logaddexp.reduce(q_values / beta, axis=-1)
    rewards = q_values - beta * mdp.reference_logps - _following(mdp, values)
    return mdp._replace(rewards=rewards)


def shaped(mdp: TokenMDP, potential: Float[np.ndarray, " S"]) -> TokenMDP:
    """The same dynamics with r(s, v) + E Phi(s') - Phi(s), and Phi = 0 at the end.

    (2404.12358, Definition 1.) Policy and preferences stay; Q and V move by -Phi(s).
    """
    return mdp._replace(rewards=mdp.rewards + _following(mdp, potential) - potential[:, None])


def walks(transitions: Float[np.ndarray, "S V E"], *, max_length: int) -> Walks:
    """Every beginning of a response of 1 to `max_length` tokens that can happen.

    >>> _, transitions = prefix_tree(num_tokens=2, horizon=2)
    >>> walks(transitions, max_length=2).tokens
    [(0,), (1,), (1, 0), (1, 1)]
    """
    end = len(transitions)
    found, shortest = [], [((), 0, 1.0)]  # steps, the state reached, its chance
    for _ in range(max_length):
        longer = [
            ((*steps, (state, token)), int(after), chance * transitions[state, token, after])
            for steps, state, chance in shortest
            for token in range(transitions.shape[1])
            for after in np.flatnonzero(transitions[state, token])
        ]
        found += longer
        shortest = [walk for walk in longer if walk[1] != end]
    visits = np.zeros((len(found), *transitions.shape[:2]))
    for n, (steps, _, _) in enumerate(found):
        np.add.at(visits[n], tuple(np.transpose(steps)), 1.0)
    tokens = [tuple(token for _, token in steps) for steps, _, _ in found]
    _, ends, chances = zip(*found, strict=True)
    return Walks(tokens, visits, np.array(ends), np.array(chances))


def preferences(returns: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N N"]:
    """Bradley-Terry: the probability that response i is preferred to j (2404.12358, Eq. 1).

    >>> preferences(np.array([0.0, 1.0])).round(3).tolist()
    [[0.5, 0.269], [0.731, 0.5]]
    """
    return np.exp(-np.logaddexp(0.0, returns[None, :] - returns[:, None]))


def _following(mdp: TokenMDP, values: Float[np.ndarray, " S"]) -> Float[np.ndarray, "S V"]:
    """E of `values` at the next state, 0 at the end."""
    return mdp.transitions @ np.append(values, 0.0)
