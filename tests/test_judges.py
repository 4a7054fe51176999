"""A judge by its name, with the options that it obeys and no others."""

import sys
import types

import pytest

from jaxdpo import InputError, judges
from jaxdpo.judge import Comparison, Judge, Judged, Verdict, record
from jaxdpo.records import write_log


@pytest.mark.parametrize(
    "kind, given, said",
    [
        ("human", {}, "judge='human': is unknown; choose from oracle, reward, likelihood"),
        ("oracle", {"judge_model": "x"}, "judge_model: has no effect on the oracle judge; leave"),
        ("likelihood", {"judge_model": "x", "timeout": 3.0}, "timeout: has no effect on the likel"),
        ("reward", {"judge_policy": "x"}, "judge_reference: is missing; the reward judge needs"),
        ("server", {}, "judge_model: is missing; the server judge needs it"),
        ("replay", {}, "recorded: is missing; the replay judge needs it"),
        ("replay", {"recorded": "x", "cache": "y"}, "cache: has no effect on the replay judge"),
        ("server", {"judge_model": "x", "price_output": 1.0}, "price_output: alone says no price"),
    ],
)
def test_an_option_that_is_missing_or_without_effect_is_named(kind, given, said):
    with pytest.raises(InputError, match=said):
        judges.check(kind, given)


def test_what_is_none_is_not_given():
    assert judges.check("oracle", dict.fromkeys(judges.OPTIONS)) == {}


def stub(monkeypatch, module, **functions):
    """A module of the package that holds these functions alone."""
    fake = types.ModuleType(f"jaxdpo.{module}")
    vars(fake).update(functions)
    monkeypatch.setitem(sys.modules, f"jaxdpo.{module}", fake)


@pytest.fixture
def made(monkeypatch):
    """What judges are made with, by name, once `judge` has been called."""
    calls = {}

    def maker(name):
        def make(*arguments, **options):
            calls[name] = arguments, options
            return Judge(name, {}, lambda questions: iter(()), True)

        return make

    stub(monkeypatch, "oracle", oracle_judge=maker("oracle"))
    stub(monkeypatch, "judge_server", server_judge=maker("server"))
    of = {name: maker(name) for name in ("reward_judge", "likelihood_judge")}
    stub(monkeypatch, "scored_judges", **of)
    return calls


def test_each_judge_is_made_of_its_options(made, tmp_path):
    make = lambda kind, **given: judges.judge(
        kind, given, references={"p": "a"}, cache=tmp_path / "c", dtype="float32"
    )
    make("oracle")
    make("likelihood", judge_model="m")
    make("reward", judge_policy="p", judge_reference="r", judge_beta=0.1)
    make("server", judge_model="m")
    assert made == {
        "oracle": (({"p": "a"},), {}),
        "likelihood_judge": (("m",), {"dtype": "float32"}),
        "reward_judge": (("p", "r", 0.1), {"dtype": "float32"}),
        "server": ((), {"model": "m", "cache": tmp_path / "c", "price": None}),
    }
    limits = {"template": "t", "cache": "other", "concurrency": 2, "max_requests": 9}
    make("server", judge_model="m", price_input=0.5, price_output=2.0, **limits)
    assert made["server"] == ((), {"model": "m", "price": (0.5, 2.0)} | limits)


def test_the_real_ones_take_what_they_are_given():
    """By name: an option that a judge does not know would be a mistake of ours."""
    import inspect

    from jaxdpo import judge_server, scored_judges

    known = set(inspect.signature(judge_server.server_judge).parameters)
    assert {"model", "price", *judges.SERVER} - {"price_input", "price_output"} <= known
    for name in ("reward_judge", "likelihood_judge"):
        assert "dtype" in inspect.signature(getattr(scored_judges, name)).parameters


def test_a_replay_is_of_its_file(tmp_path):
    asked = Comparison("p", "a", "b", "line 1")
    said = Judged("left", ((True, Verdict("first", "why")),))
    write_log(tmp_path / "said.jsonl", [record(asked, said)])
    given = {"recorded": str(tmp_path / "said.jsonl")}
    replay = judges.judge("replay", given, references={}, cache=tmp_path / "c")
    assert replay.identity["kind"] == "replay" and not replay.fair


def test_every_judge_is_listed_once():
    assert set(judges.FAIR) | {"server", "replay"} == set(judges.NEEDED)
    assert set(judges.WITH_MODELS) <= set(judges.FAIR)
    assert len(set(judges.OPTIONS)) == len(judges.OPTIONS)
