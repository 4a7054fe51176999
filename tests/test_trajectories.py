"""What is drawn and said of measured rewards is what their numbers bear out."""

import pytest

from jaxdpo import InputError
from jaxdpo.analysis import trajectories
from jaxdpo.analysis.trajectories import PARTS, SAID, SIDES, captions, draw


def told(**changes):
    """A record as if measured, with some numbers changed."""
    zero = {f"{x}/{who}": 0.0 for x in ("rewards", "errors", "lengths") for who in SAID}
    zero |= {f"rewards/{who}/{part}": 0.0 for who in SAID for part in PARTS}
    names = ("logps", "expected", "kl", "expected_rewards")
    zero |= {f"{name}/{who}": 0.0 for name in names for who in SIDES}
    zero |= {"rewards/margins": 0.0, "errors/margins": 0.0, "rewards/margins_per_token": 0.0}
    zero |= {"rewards/averages": 0.0, "errors/averages": 0.0}
    zero |= {"step": 5, "pairs": 4, "beta": 0.1, "residual": 1e-7, "ended/samples": 1.0}
    return zero | {name.replace("__", "/"): value for name, value in changes.items()}


FALLING = dict(rewards__chosen=-0.1, rewards__rejected=-0.4, rewards__margins=0.3)


@pytest.mark.parametrize(
    "changes, verdicts",
    [
        (dict(expected__chosen=-1e-3), ["seen", "seen"]),
        (dict(residual=2e-5), ["NOT seen", "seen"]),
        (dict(residual=None), ["NOT seen", "seen"]),
        (dict(expected__rejected=1e-4), ["NOT seen", "seen"]),
        (dict(expected__rejected=None), ["NOT seen", "seen"]),
        (dict(rewards__samples=-0.1), ["seen", "NOT seen"]),
        (dict(rewards__samples=-0.1, errors__samples=0.06), ["seen", "seen"]),
        (dict(rewards__samples=None), ["seen", "NOT seen"]),
        (dict(errors__samples=None), ["seen", "NOT seen"]),
    ],
)
def test_what_was_seen_is_read_off_the_numbers(changes, verdicts):
    said = captions([told(step=0, expected__chosen=1e-6), told(**changes)])
    found = [("NOT seen" if "NOT seen" in text else "seen") for text in said if "seen" in text]
    assert found == verdicts


@pytest.mark.parametrize("earlier", [[], [0.1], [-0.1, -0.2]])
def test_one_measurement_that_is_not_finite_spoils_the_verdict(earlier):
    records = [told(step=0), *[told(step=3)] * len(earlier), told(step=4, residual=None), told()]
    assert "inf nats at any state" in captions(records)[1] and "NOT seen" in captions(records)[1]


def test_section_5_4_is_told_and_not_judged():
    [said] = [text for text in captions([told(step=0), told(**FALLING)]) if "5.4" in text]
    assert "chosen fell (-0.100 ± 0.000), rejected fell" in said and "margin rose" in said
    assert "seen" not in said


def moves(*values, error=0.01):
    records = [told(step=step, rewards__chosen=x) for step, x in enumerate(values)]
    records[-1]["errors/chosen"] = error
    return trajectories.moved(records, "chosen")


def test_what_moved_is_beyond_its_error_and_lasts():
    assert moves(0.0, 0.1) == "rose" and moves(0.0, -0.1) == "fell"
    assert moves(0.0, 0.1, error=0.06) == moves(0.0, 0.1, error=None) == "stayed"
    assert moves(0.0, -0.1, 0.1, 0.1, 0.1) == "rose"
    assert moves(0.0, 0.1, -0.1, 0.1, 0.1) == moves(0.0, -0.1, 0.1) == "stayed"
    assert moves(0.0, 0.1, None, 0.1) == moves(0.0, 0.1, None) == moves(0.1) == "stayed"


def test_the_extent_of_the_measurements_is_told():
    assert captions([told(step=0)])[1:] == [
        "Every implicit reward is zero there: nothing has moved yet."
    ]
    records = [told(step=100, pairs=64, rewards__chosen=0.2), told(step=200, pairs=8)]
    said = captions(records)
    assert said[0].startswith("Measured on 8 to 64 held-out pairs at 2 steps, 100 to 200")
    assert "standard errors over the pairs, of one training run" in said[0]
    assert "From step 100 to 200 the log-likelihood" in said[4]


def test_a_figure_has_what_was_measured():
    figure = draw([told(step=0), told(**FALLING)])
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    assert drawn["chosen"].get_ydata().tolist() == [0.0, -0.1]
    assert drawn["rejected"].get_xdata().tolist() == [0, 5]
    for nothing in (draw, captions):
        with pytest.raises(InputError, match="none were measured"):
            nothing([])


def test_a_stage_that_measured_nothing_has_no_records(tmp_path):
    assert trajectories.read(tmp_path) == []
