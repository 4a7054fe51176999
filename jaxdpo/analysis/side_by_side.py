"""What models said, as text side by side: one prompt, and what was made of it.

Reads the samples of a training run (`samples`) and files of completions (`transcript`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from jaxdpo.analysis import page
from jaxdpo.records import Record, read_json, read_log

MOST = 12  # prompts of a page; evaluations of a prompt
MOST_OF_ONE = 3  # completions that one file has of a prompt
LIMITS = ("max_new_tokens", "min_new_tokens", "no_repeat_ngram")


class Card(NamedTuple):
    """A text with what stands above and below it."""

    heading: str
    text: str
    note: str


class Column(NamedTuple):
    """What a file of completions holds: how it was decoded, and cards by prompt."""

    name: str
    settings: list[tuple[str, str]]
    cards: dict[str, list[Card]]


def samples(file: Path) -> Markup:
    """The samples of a stage, `samples.jsonl`: by prompt, over the steps of training."""
    by_prompt: dict[str, list[Record]] = {}
    for record in read_log(file):
        by_prompt.setdefault(record["prompt"], []).append(record)
    steps = max(map(len, by_prompt.values()), default=0)
    notes = [f"{file.parent.name}: greedy, after so many steps of training"]
    if steps > MOST:
        notes.append(f"{MOST} of {steps} evaluations are shown; all are in the file")
    cards = {
        prompt: [_card(f"step {one['step']}", one) for one in _spread(said)]
        for prompt, said in by_prompt.items()
    }
    return _groups(notes, cards)


def column(file: Path) -> Column:
    """A file of completions with its settings, if they are known; raises where it is not one."""
    settings, said = _known_settings(file.with_name(file.name + ".settings.json")), {}
    for record in read_log(file):
        prompt = record["prompt"] if "prompt" in record else "\n\n".join(record["prompts"])
        said.setdefault(prompt, []).extend(record["completions"])  # it may stand there twice
    most = max(map(len, said.values()), default=0)
    if most > MOST_OF_ONE:
        settings.append(("shown", f"the first {MOST_OF_ONE} of {most} completions"))
    return Column(file.stem, settings, {prompt: _cards(file.stem, x) for prompt, x in said.items()})


def completions(columns: Sequence[Column]) -> Markup:
    """Files of completions: by prompt, a card for each completion of each file."""
    cards: dict[str, list[Card]] = {}
    for one in columns:
        for prompt, found in one.cards.items():
            cards.setdefault(prompt, []).extend(found)
    template = page.macros("side_by_side.html")
    settings = [template.settings(one.name, one.settings) for one in columns]
    return Markup("").join([*settings, _groups([], cards)])


def _groups(notes: list[str], cards: dict[str, list[Card]]) -> Markup:
    if len(cards) > MOST:
        notes = [*notes, f"the first {MOST} of {len(cards)} prompts"]
    return page.macros("side_by_side.html").groups("; ".join(notes), list(cards.items())[:MOST])


def _cards(name: str, said: Sequence[Record]) -> list[Card]:
    """The first completions of a prompt, numbered where there are several."""
    headings = [name] if len(said) == 1 else [f"{name} {n + 1}" for n in range(MOST_OF_ONE)]
    return [_card(heading, one) for heading, one in zip(headings, said, strict=False)]


def _card(heading: str, said: Record) -> Card:
    """The text of a sample or completion, and the numbers that are known of it."""
    numbers = []
    if said.get("logps") is not None:
        numbers.append(f"logps {said['logps']:.2f}")
    if "implicit_reward" in said:
        numbers.append(f"implicit reward {said['implicit_reward']:+.3f}")
    if "length" in said:
        numbers.append(f"{said['length']} tokens")
    if not said["ended"]:
        numbers.append("cut at the limit")
    return Card(heading, said["text"], " · ".join(numbers))


def _known_settings(file: Path) -> list[tuple[str, str]]:
    """How it was decoded, or that nobody knows: what was said can be read all the same."""
    try:
        return _settings(read_json(file))
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else "cannot be read"
        return [("settings", f"not known ({file.name} {why})")]


def _settings(settings: Record) -> list[tuple[str, str]]:
    """Who was decoded and how, for people; what is None or zero has no effect."""
    rule = dict(settings["rule"])
    method, warp = rule.pop("kind").lower(), rule.pop("warp")
    models = {
        role: name if step is None else f"{name}, step {step}"
        for role, (name, step) in settings["notes"]["models"].items()
    }
    if "model_1" not in models:
        models = {"model": models.pop("model_0")} | models
    drawn = warp | {"seed": settings["seed"]} if warp else {}
    greedy = rule == {"num_samples": 1} and not warp
    how = {"method": "greedy"} if greedy else {"method": method} | rule | drawn
    limits = {name: settings[name] or None for name in LIMITS}
    said = models | {name: settings[name] for name in ("beta", "exponents")} | how | limits
    return [(key.replace("_", " "), str(one)) for key, one in said.items() if one is not None]


def _spread(records: Sequence[Record]) -> list[Record]:
    """As many as are shown, the first and the last among them."""
    places = np.linspace(0, len(records) - 1, min(len(records), MOST)).round().astype(int)
    return [records[place] for place in places]
