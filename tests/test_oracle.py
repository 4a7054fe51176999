"""The oracle counts what the task's own record says, and no piece of a summary escapes it."""

import random
import re

import pytest
from test_synthetic import HARD, drawn, post_of, told

from jaxdpo import InputError, oracle, synthetic
from jaxdpo.judge import FIRST, SECOND, TIE, Comparison, Question, judged
from jaxdpo.oracle import Count, count, facts, kinds, oracle_judge
from jaxdpo.synthetic import Task

REPHRASED = Task(rephrase=1.0)
POST = synthetic.PROMPT.format(
    "advice", "A strange week", "I live in Oslo. My aunt owns a cat. I feel sad. Please be kind."
)
BOTH = {"city", "feeling"}
tasks = pytest.mark.parametrize("task", [Task(), HARD, REPHRASED], ids=["default", "hard", "other"])


@tasks
def test_the_facts_are_those_that_the_posts_sentences_tell_of_the_writer(task):
    """Read by a regular expression for each wording, where the oracle looks sentences up."""
    for one in drawn(task, 300):
        found = facts(one.prompt)
        assert len(found) == task.facts
        for kind in synthetic.KINDS:
            own = told(post_of(one.prompt), kind, "own")
            assert own == ([found[kind]] if kind in found else [])


def test_what_is_told_of_others_is_no_fact_of_the_writer():
    seen = 0
    for one in drawn(HARD, 100):
        for kind, value in facts(one.prompt).items():
            other = told(post_of(one.prompt), kind, "others")
            seen += len(other)
            assert value not in other
    assert seen == 100 * HARD.distractors


@tasks
def test_a_right_summary_is_right_and_a_wrong_one_wrong_in_its_errors(task):
    for one in drawn(task, 300):
        wanted = kinds(one.chosen)
        assert len(wanted) == task.stated and kinds(one.rejected) == wanted
        assert count(one.prompt, one.chosen, wanted) == Count(task.stated, 0, 0, 0)
        wrong = len(one.errors)
        assert count(one.prompt, one.rejected, wanted) == Count(task.stated - wrong, wrong, 0, 0)
        wrong = len(one.completion_errors)
        assert count(one.prompt, one.completion, wanted)[:2] == (task.stated - wrong, wrong)


def clauses(summary):
    """The clauses of a right summary, found by their values' places and the task's joints."""
    pieces = re.findall(r"(?:[ ,;.]|and )*(.+?)(?=, |; |\. | and |\.$)", summary)
    return [piece[0].upper() + piece[1:] for piece in pieces]


@tasks
def test_a_clause_that_is_dropped_is_missing_and_one_that_is_repeated_something_else(task):
    for number, one in enumerate(drawn(task, 200)):
        wanted, pieces = kinds(one.chosen), clauses(one.chosen)
        assert len(pieces) == task.stated
        at = random.Random(number).randrange(len(pieces))
        dropped = " " + "; ".join(pieces[:at] + pieces[at + 1 :]) + "." * (len(pieces) > 1)
        assert count(one.prompt, dropped, wanted) == Count(task.stated - 1, 0, 1, 0)
        repeated = " " + ". ".join([*pieces, pieces[at]]) + "."
        assert count(one.prompt, repeated, wanted) == Count(task.stated, 0, 0, 1)


@tasks
def test_wherever_a_summary_is_cut_no_piece_is_lost_and_none_invented(task):
    """Whole clauses count as before, the rest of one as one piece, at most one in all."""
    for one in drawn(task, 20):
        wanted, pieces = kinds(one.chosen), synthetic.tokenizer().encode(one.chosen)
        ends = [end for _, end in pieces.offsets]
        found = [count(one.prompt, one.chosen[:end], wanted) for end in ends]
        for each in found:
            assert each.right + each.missing == task.stated and each.wrong == 0
            assert each.other <= 1
        assert [each.right for each in found] == sorted(each.right for each in found)
        whole = {ends[-1], ends[-2]}  # with its last stop, and without it
        assert all(found[ends.index(end)] == Count(task.stated, 0, 0, 0) for end in whole)
        assert found[0] == Count(0, 0, task.stated, 1)


@pytest.mark.parametrize(
    ("summary", "expected", "reward"),
    [
        (" I live in Oslo. I feel sad.", (2, 0, 0, 0), 2),
        (" All this makes me feel sad and my home is in Oslo.", (2, 0, 0, 0), 2),
        ("i live in Oslo; I feel sad", (2, 0, 0, 0), 2),  # case, space and last stop are forgiven
        (" I live in Rome. I feel sad.", (1, 1, 0, 0), 0),
        (" I live in Oslo.", (1, 0, 1, 0), 1),
        ("", (0, 0, 2, 0), 0),
        ("  \n ", (0, 0, 2, 0), 0),
        (".", (0, 0, 2, 1), -1),
        (" Oslo sad.", (0, 0, 2, 1), -1),
        (" I live in Atlantis. I feel sad.", (1, 0, 1, 1), 0),
        (" I have a pet cat. I feel sad.", (1, 1, 1, 0), 0),  # the aunt's: the writer has none
        (" I live in Oslo. I live in Oslo.", (1, 0, 1, 1), 0),
        (" I live in Rome. I live in Oslo.", (0, 1, 1, 1), -2),  # no second try
        (" I live in Oslo. I live in Rome.", (1, 0, 1, 1), 0),
        (" I live in Oslo. I feel", (1, 0, 1, 1), 0),  # cut short
        (" I live in Oslo and", (1, 0, 1, 1), 0),
        (" I live in Oslo,", (1, 0, 1, 1), 0),
        (" I live in Oslo..", (1, 0, 1, 1), 0),
        (" I live in Oslo.  I feel sad.", (1, 0, 1, 1), 0),
        (" I live in Oslo, I am fine, I feel sad.", (2, 0, 0, 1), 1),
        (" I live in Oslo I feel sad.", (0, 0, 2, 1), -1),
        (" I live in Oslo.\n\nI feel sad.", (0, 0, 2, 1), -1),
        (" My aunt lives in Oslo.", (0, 0, 2, 1), -1),
        (" I LIVE IN Oslo.", (0, 0, 2, 1), -1),
    ],
)
def test_every_piece_is_accounted_for(summary, expected, reward):
    found = count(POST, summary, BOTH)
    assert tuple(found) == expected and found.reward == reward


def test_a_true_fact_that_is_not_wanted_is_nothing_and_a_false_one_wrong():
    assert count(POST, " I live in Oslo. I feel sad.", {"feeling"}) == Count(1, 0, 0, 0)
    assert count(POST, " I live in Rome. I feel sad.", {"feeling"}) == Count(1, 1, 0, 0)


def test_to_leave_a_fact_out_costs_what_stating_it_would_have_given():
    for one in drawn(Task(), 50):
        wanted, pieces = kinds(one.chosen), clauses(one.chosen)
        rewards = [
            count(one.prompt, " " + ". ".join(pieces[:most]) + "." * (most > 0), wanted).reward
            for most in range(len(pieces) + 1)
        ]
        assert rewards == list(range(Task().stated + 1))


def test_no_clause_is_two_facts_and_holds_a_joint():
    every = [
        clause.format(value)
        for kind in synthetic.KINDS.values()
        for clause in kind.summary
        for value in kind.values
    ]
    assert len(set(every)) == len(every) == len(oracle._CLAUSES)
    for clause in every:
        assert len(kinds(f" {clause}.")) == 1  # a joint within would make two pieces of it


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I live in Oslo.",
        POST.replace("TL;DR:", ""),
        POST.replace("SUBREDDIT", "subreddit"),
        POST.replace("Please be kind.", "Please be cruel."),
        POST.replace("Oslo", "Atlantis"),
        POST.replace("My aunt", "My uncle"),
        POST.replace("I feel sad.", "I feel sad. I feel angry."),  # of a kind, one or the other
        POST + " ",
    ],
)
def test_a_text_that_is_no_post_of_the_task_is_named(text):
    with pytest.raises(InputError, match="stands in no post of the built-in task") as error:
        facts(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", " ", " I live in Oslo. I am fine.", " I feel", " ."])
def test_a_reference_that_is_no_summary_of_the_task_is_named(text):
    with pytest.raises(InputError, match="no whole summary"):
        kinds(text)
    with pytest.raises(InputError, match="no whole summary"):
        list(oracle_judge({POST: text}).ask([Question(POST, " a", " b")]))


def test_what_the_post_does_not_tell_cannot_be_wanted():
    with pytest.raises(InputError, match="tells nothing of the wanted pet"):
        count(POST, " I feel sad.", {"feeling", "pet"})


def test_a_prompt_without_a_right_summary_is_named():
    asked = oracle_judge({}).ask([Question(POST, " a", " b")])
    with pytest.raises(InputError, match="has no right summary"):
        next(asked)


def test_the_judge_prefers_the_higher_reward_and_says_both_counts():
    judge = oracle_judge({POST: " I live in Oslo. I feel sad."})
    right, wrong, empty = " I live in Oslo.", " I live in Rome.", ""
    asked = [(right, wrong), (wrong, right), (right, " I feel sad."), (empty, wrong), ("", "")]
    found = dict(judge.ask([Question(POST, *one) for one in asked]))
    preferred = [found[place].preferred for place in range(len(asked))]
    assert preferred == [FIRST, SECOND, TIE, FIRST, TIE]
    assert found[0].reason == (
        "1 right, 0 wrong, 1 missing, 0 other | 0 right, 1 wrong, 1 missing, 0 other"
    )


@pytest.mark.parametrize("both_orders", [False, True])
def test_the_chosen_wins_every_pair_in_any_order(both_orders):
    sample = drawn(REPHRASED, 200)
    judge = oracle_judge({one.prompt: one.chosen for one in sample})
    asked = [
        Comparison(one.prompt, one.chosen, one.rejected, str(at)) for at, one in enumerate(sample)
    ]
    found = judged(judge, asked, seed=0, both_orders=both_orders)
    assert judge.fair and {one.winner for one in found} == {"left"}
    turned = [one._replace(left=one.right, right=one.left) for one in asked]
    assert {one.winner for one in judged(judge, turned, seed=0)} == {"right"}


STATED = oracle._stated
EVERYBODY = {text: ("pet", "cat") for text in oracle._OTHERS}
# What is changed, and a summary of a writer without a pet that is then counted otherwise.
MUTATIONS = {
    "other pieces are forgotten": ("_stated", lambda text: (STATED(text)[0], 0), " I am fine."),
    "a cut clause is forgotten": (
        "_stated",
        lambda text: STATED(text.rpartition(".")[0] or text),
        " I live in Oslo. I feel",
    ),
    "others' facts are the writer's": ("_OWN", oracle._OWN | EVERYBODY, " I have a pet cat."),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_count_is_noticed(name, monkeypatch):
    attribute, changed, summary = MUTATIONS[name]
    right = count(POST, summary, BOTH)
    monkeypatch.setattr(oracle, attribute, changed)
    assert count(POST, summary, BOTH) != right
