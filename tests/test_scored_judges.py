"""A judge's scores are the models' own, one for each text, whichever way the question is put."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from speakers import MODEL, TEXTS, checkpoint, run, spoken
from test_token_scores import all_logps, bytes_tokenizer

from jaxdpo import InputError, scored_judges, synthetic
from jaxdpo.judge import FIRST, SECOND, TIE, Comparison, Question, judged
from jaxdpo.records import line
from jaxdpo.scored_judges import likelihood_judge, reward_judge

BETA = 0.3
FLOAT32 = dict(rel=1e-4, abs=1e-4)  # of sums of log-probabilities down to -30
RESPONSES = (TEXTS[1], TEXTS[3], TEXTS[0] + TEXTS[1], "")
PROMPTS = (TEXTS[0], TEXTS[2], TEXTS[1] + TEXTS[3])
ASKED = [
    Question(prompt, *pair) for prompt in PROMPTS for pair in itertools.permutations(RESPONSES, 2)
]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return checkpoint(folder / "policy", seed=1), checkpoint(folder / "reference", seed=2)


@pytest.fixture(scope="module")
def reward(names):
    return reward_judge(*names, BETA)


@pytest.fixture(scope="module")
def likelihood(names):
    return likelihood_judge(names[0])


def logps(seed, prompt, response) -> float:
    """By one plain pass over one row: the end token counts, the prompt does not."""
    before, ids = (synthetic.tokenizer().encode(text).ids for text in (prompt, response))
    row = np.zeros((1, MODEL.max_positions), np.int32)
    row[0, : len(before) + len(ids)] = before + ids  # the end token's id is 0
    logs = np.asarray(all_logps(spoken(seed), row), np.float64)
    return float(sum(logs[len(before) + at - 1, token] for at, token in enumerate([*ids, 0])))


def expected(kind, prompt, response) -> float:
    if kind == "likelihood":
        return logps(1, prompt, response)
    return BETA * (logps(1, prompt, response) - logps(2, prompt, response))


def scores(verdict) -> list[float]:
    return [float(number) for number in verdict.reason.split(" | ")]


def agrees(judge, kind, asked=ASKED) -> bool:
    """Whether scores and preferences are those of plain passes over each model."""
    slow = {(p, r): expected(kind, p, r) for p in PROMPTS for r in RESPONSES}
    found = dict(judge.ask(asked))
    for place, (prompt, *responses) in enumerate(asked):
        wanted = [slow[prompt, response] for response in responses]
        better = FIRST if wanted[0] > wanted[1] else SECOND
        close = scores(found[place]) == [pytest.approx(one, **FLOAT32) for one in wanted]
        if not (close and found[place].preferred == better):
            return False
    return sorted(found) == list(range(len(asked)))


@pytest.mark.parametrize("kind", ["reward", "likelihood"])
def test_the_scores_are_the_models_own(kind, reward, likelihood):
    assert agrees({"reward": reward, "likelihood": likelihood}[kind], kind)


MUTATIONS = {
    "the reference is forgotten": lambda found: (found[0], (BETA, 0.0)),
    "the reference counts for the policy": lambda found: (found[0][::-1], found[1]),
    "the better is the worse": lambda found: (found[0], (-BETA, BETA)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_reward_is_noticed(name, reward):
    models, weights = MUTATIONS[name](reward.ask.args)
    wrong = reward._replace(ask=lambda asked: scored_judges._ask(models, weights, asked))
    assert not agrees(wrong, "reward")


def test_a_score_that_counts_a_token_too_few_is_noticed(reward, monkeypatch):
    whole = scored_judges.token_logps

    def without_end(model, store, **more):
        found = whole(model, store, **more).copy()
        found[store.scored_offsets[1:] - 1] = 0
        return found

    monkeypatch.setattr(scored_judges, "token_logps", without_end)
    assert not agrees(reward, "reward")


def test_each_text_is_scored_once_and_by_each_model(reward, monkeypatch):
    sizes, whole = [], scored_judges.token_logps

    def counted(model, store, **more):
        sizes.append(len(store))
        return whole(model, store, **more)

    monkeypatch.setattr(scored_judges, "token_logps", counted)
    list(reward.ask(ASKED))
    assert sizes == [len(PROMPTS) * len(RESPONSES)] * 2


@pytest.mark.parametrize("kind", ["reward", "likelihood"])
def test_the_order_of_responses_and_questions_does_not_matter(kind, reward, likelihood):
    judge = {"reward": reward, "likelihood": likelihood}[kind]
    assert judge.fair
    asked = [Comparison(p, *pair, "here") for p, *pair in ASKED]
    first, again, both = (
        [one.winner for one in judged(judge, asked, seed=seed, both_orders=both)]
        for seed, both in ((0, False), (1, False), (2, True))
    )
    assert first == again == both and {"left", "right"} == set(first)
    turned = [one.winner for one in judged(judge, asked[::-1], seed=0)]
    assert turned[::-1] == first


def test_the_same_text_is_a_tie_and_the_same_model_twice_calls_nothing_but_ties(names, reward):
    (found,) = reward.ask([Question(TEXTS[0], TEXTS[1], TEXTS[1])])
    assert found[1].preferred == TIE
    judge = reward_judge(names[0], names[0], BETA)
    assert {verdict.preferred for _, verdict in judge.ask(ASKED)} == {TIE}
    assert {verdict.reason for _, verdict in judge.ask(ASKED)} == {"0 | 0"}


def test_a_difference_however_small_is_no_tie(likelihood, monkeypatch):
    def nearly(model, store, **more):
        return np.arange(store.scored_offsets[-1], dtype=np.float32) * 1e-30

    monkeypatch.setattr(scored_judges, "token_logps", nearly)
    (found,) = likelihood.ask([Question(TEXTS[0], TEXTS[1], TEXTS[3])])
    assert found[1].preferred == SECOND


def test_no_questions_are_no_verdicts(reward):
    assert list(reward.ask([])) == []


def test_the_identity_is_json_and_tells_models_and_beta_apart(names, reward, likelihood):
    def differ(*judges):
        return len({line(judge.identity) for judge in judges}) == len(judges)

    assert line(reward_judge(*names, BETA).identity) == line(reward.identity)
    assert differ(reward, reward_judge(*names[::-1], BETA), reward_judge(*names, 2 * BETA))
    assert differ(
        likelihood, likelihood_judge(names[1]), likelihood_judge(names[0], dtype="bfloat16")
    )


def test_a_stage_of_a_run_is_a_judge_too(likelihood, tmp_path):
    run(tmp_path / "run", {1: 0.5})
    stage = likelihood_judge(f"{tmp_path / 'run'}:dpo")
    found, wanted = (
        np.array([scores(verdict) for _, verdict in judge.ask(ASKED)])
        for judge in (stage, likelihood)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


LONG = TEXTS[1] * 7  # 70 tokens, more than the model's 64 positions


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (Question(LONG, TEXTS[1], TEXTS[3]), r"question 2, prompt '.*': .* are 81 tokens, more"),
        (Question(TEXTS[0], TEXTS[1], LONG), r"question 2, prompt '.*': .* are 76 tokens, more"),
        (Question(TEXTS[0], " I live in Atlantis.", " I"), "question 2, .* cannot encode"),
        (Question("", TEXTS[1], TEXTS[3]), "question 2, prompt '': is empty"),
    ],
)
def test_what_cannot_be_scored_whole_is_named(question, said, reward):
    with pytest.raises(InputError, match=said) as error:
        next(reward.ask([ASKED[0], question]))
    assert "\n" not in str(error.value)


def test_an_end_token_within_a_text_is_refused(likelihood):
    (model,) = likelihood.ask.args[0]
    spelled = synthetic.tokenizer()  # which takes special tokens for what they are
    held = [model._replace(tokenizer=spelled)]
    with pytest.raises(InputError, match="holds an end token"):
        list(scored_judges._ask(held, (1.0,), [Question(" I", "<|endoftext|>", " I")]))


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan")])
def test_a_beta_that_is_none_is_refused_before_a_model_is_loaded(beta):
    with pytest.raises(InputError, match="beta=.*must be above 0"):
        reward_judge("no/such/model", "neither", beta)


def test_models_that_do_not_go_together_are_named(names, tmp_path):
    other = checkpoint(tmp_path / "bytes", seed=1, tokenizer=bytes_tokenizer())
    with pytest.raises(InputError, match="their tokenizers differ"):
        reward_judge(names[0], other, BETA)


def test_broken_weights_make_no_verdicts(likelihood):
    (model,) = likelihood.ask.args[0]
    params = jax.tree.map(lambda leaf: leaf * np.nan, model.lm.params)
    broken = [model._replace(lm=dataclasses.replace(model.lm, params=params))]
    with pytest.raises(InputError, match="not finite"):
        list(scored_judges._ask(broken, (1.0,), ASKED))
