"""Beam search written slowly, one prompt at a time, over lists of tokens and no cache.

The semantics are those of transformers: `beams` today's, `beams_429` version 4.29.2's, which
the paper's code pinned. `logps(sequences)` gives float32 log-probabilities [n, V] of the next
token after each continuation.
"""

import numpy as np

NEVER = np.float32(-1e9)


def top(values, count):
    """Largest first, of equal ones the first."""
    return np.argsort(-values, kind="stable")[:count]


def beams(
    logps, size, max_new, eos=(), penalty=1.0, stopping=False, *, rules=(), draw=None
):  # fmt: skip
    """(tokens, score) of the `size` best, best first, as transformers since 4.50."""
    running, scores = [[]] * size, np.full(size, NEVER, np.float32)
    scores[0] = 0
    finished, improvable = [(NEVER, None, False)] * size, True
    for length in range(1, max_new + 1):
        given = logps(running)
        for rule in rules:
            given = rule(running, given, length - 1)
        totals = (given + scores[:, None]).astype(np.float32).ravel()
        count = (max(2, 1 + len(eos)) if size > 1 else 1) * size
        chosen = top(totals, count) if draw is None else draw(totals, count, length - 1)
        grown = [[*running[i // given.shape[1]], int(i % given.shape[1])] for i in chosen]
        totals = totals[chosen]
        stops = np.array([g[-1] in eos or length == max_new for g in grown])
        goes = top(totals + stops * NEVER, size)
        for rank, (tokens, total) in enumerate(zip(grown, totals, strict=True)):
            frozen = not improvable or (stopping is True and all(f[2] for f in finished[:size]))
            enters = stops[rank] and rank < size and not frozen
            score = np.float32(total) / np.float32(length**penalty)
            finished = finished + [(score if enters else NEVER, tokens, bool(enters))]
        kept = top(np.array([f[0] for f in finished], np.float32), size)
        finished = [finished[i] for i in kept]
        running, scores = [grown[i] for i in goes], (totals + stops * NEVER)[goes]
        reach = max_new if stopping == "never" and penalty > 0 else length
        full = all(f[2] for f in finished)
        worst = min(f[0] for f in finished) if full else NEVER
        improvable = improvable and scores[0] / np.float32(reach**penalty) > worst
        if not improvable or (stopping is True and full) or (size == 1 and full):
            break
    return [(tokens, float(score)) for score, tokens, done in finished if done]


def beams_429(logps, size, max_new, eos, penalty=1.0, stopping=False, *, prompt_length):
    """(tokens, score) of the `size` best, best first, as transformers 4.29.2 without padding.

    A length is prompt and continuation without the end token; the pool is kept in float64.
    """
    running, scores = [[]] * size, np.full(size, NEVER, np.float32)
    scores[0] = 0
    pool, done = [], False

    def add(tokens, total, length):
        pool.append((float(total) / (prompt_length + length) ** penalty, len(pool), tokens))
        pool.sort(key=lambda entry: (-entry[0], entry[1]))
        del pool[size:]

    for length in range(1, max_new + 1):
        given = logps(running)
        totals = (given + scores[:, None]).astype(np.float32).ravel()
        chosen = top(totals, 2 * size)
        going = []
        for rank, i in enumerate(chosen):
            tokens = [*running[i // given.shape[1]], int(i % given.shape[1])]
            if tokens[-1] in eos:
                if rank < size:
                    add(tokens, totals[i], length - 1)
            elif len(going) < size:
                going.append((tokens, totals[i]))
        if len(pool) == size:
            reach = prompt_length + (max_new if stopping == "never" and penalty > 0 else length)
            best = float(totals[chosen].max()) / reach**penalty
            done = stopping is True or pool[-1][0] >= best
        running, scores = [g[0] for g in going], np.array([g[1] for g in going], np.float32)
        if done:
            break
    if not done:
        for tokens, total in zip(running, scores, strict=True):
            add(tokens, total, max_new)
    return [(tokens, score) for score, _, tokens in pool]
