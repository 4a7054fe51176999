"""Wrong summaries made from right ones by rule, so that the wrong characters are known.

A rule swaps a value of a summary for another of its kind that the post does not hold: a
number, a name, or a unit. All else stays as it is, and grammar too: no number becomes "one",
"1 week" becomes "1 month" and "an hour" no "an week". Rules are cautious: what they do not
recognise with certainty they leave alone. They know English.

Left out: whether the summary was right to begin with.
"""

import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from jaxdpo import InputError
from jaxdpo.synthetic import Error

RULES = ("number", "name", "unit")

_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve".split()
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# "one" is also a pronoun, and what follows it is singular.
_NUMBER_WORDS = {word: words for words in (_TWELVE[2:], _TEENS, _TENS) for word in words}
_SPELLED = {str(n): word for n, word in enumerate(_TWELVE + _TEENS)}
_SPELLED |= {str(20 + 10 * n): word for n, word in enumerate(_TENS)}
_DIGITS = re.compile(
    r"(?<![\w.,/:#–-])\d+(?:,\d{3})*(?:\.\d+)?"
    r"(?=(?:[mfk]|[ap]m|lbs?|kgs?|cm|mg|gb|yo|yrs?|hrs?|mins?)?(?!\w))"  # 22M is an age
    r"(?![/:–]|-\d|[.,]\d)",
    re.IGNORECASE,
)
_WORDED = re.compile(rf"(?<![\w-])(?:{'|'.join(_NUMBER_WORDS)})(?!\w)", re.IGNORECASE)

_UNITS = [  # what may stand for each other: (after one, after more)
    [(name, f"{name}s") for name in "minute hour day week month year".split()],
    [("hr", "hrs"), ("min", "mins"), ("wk", "wks"), ("yr", "yrs")],
    [("dollar", "dollars"), ("euro", "euros"), ("peso", "pesos")],
    [("pound", "pounds"), ("kilo", "kilos"), ("ounce", "ounces")],
    [("lb", "lbs"), ("kg", "kg"), ("oz", "oz")],
    [("inch", "inches"), ("foot", "feet"), ("yard", "yards"), ("meter", "meters")]
    + [("mile", "miles"), ("kilometer", "kilometers")],
    [("mph", "mph"), ("kph", "kph")],
]
_UNIT_OF = {unit[n]: (group, n) for n in (0, 1) for group in _UNITS for unit in group}
_AFTER_AN = ("hour", "ounce", "inch")
_QUANTITIES = "few several couple couple[ ]of many last next past each every per another an? one"
_QUANTITY = f"{'|'.join([*_QUANTITIES.split(), *_NUMBER_WORDS])}|[0-9][0-9,.]*"
_UNIT = re.compile(
    rf"(?<![\w.,-])(?P<quantity>{_QUANTITY})[ -](?P<unit>{'|'.join(_UNIT_OF)})(?!\w)",
    re.IGNORECASE,
)

_NAME = re.compile(r"(?<=[a-z0-9,;] )[A-Z][a-z]{2,}(?: [A-Z][a-z]{2,})*(?=(?:['’]s)?(?![\w'’-]))")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February April June July August September October November December".split()
_BEFORE_PLACES = re.compile(r"\b(?:in|at|near|into) $")


class Site(NamedTuple):
    """Characters `start:end` of a text, and what could stand there instead."""

    start: int
    end: int
    rule: str
    values: list[str]


def corrupted(
    text: str,
    post: str,
    *,
    rules: Collection[str],
    errors: int,
    names: Mapping[str, str],
    seed: int,
    index: int,
) -> tuple[str, tuple[Error, ...]] | None:
    """The text with so many errors by these rules, from left to right; None if it has no such.

    `names` (see `names`) is where other examples' names come from. A pure function of its
    arguments: `seed` and `index` decide which values are swapped and for what. No wrong value
    stands in the post, or elsewhere in the text. Raises `InputError` for an unknown rule.

    >>> rule = dict(rules=["unit"], errors=1, names={}, seed=0, index=1)
    >>> corrupted(" ran 3 miles", "I ran.", **rule)
    (' ran 3 kilometers', (Error(kind='unit', start=7, end=17, right='miles', wrong='kilometers'),))
    """
    if unknown := set(rules) - set(RULES):
        raise InputError(f"rules: {min(unknown)!r} is unknown; choose from {', '.join(RULES)}")
    rng = random.Random(f"{seed}/{index}")
    sites = _sites(text, post, rules, names)
    if len(sites) < errors:
        return None
    pieces, marked, at, taken = [], [], 0, set()
    for site in sorted(rng.sample(sites, errors)):
        wrong = rng.choice([value for value in site.values if value not in taken] or site.values)
        taken.add(wrong)
        pieces += [text[at : site.start], wrong]
        end, at = sum(map(len, pieces)), site.end
        right = text[site.start : site.end]
        marked.append(Error(site.rule, end - len(wrong), end, right, wrong))
    return "".join([*pieces, text[at:]]), tuple(marked)


def names(texts: Iterable[str]) -> dict[str, str]:
    """The names that stand inside sentences of the texts, and what each names.

    A name is a run of capitalised words none of which stands anywhere in lower case; it names
    a "day", a "month", a "place" if it was ever met after "in", "at", "near" or "into", or
    "other".

    >>> names([" I met Anna in Rome.", "Then I left Rome. My mom stayed", "so did Mom too."])
    {'Anna': 'other', 'Rome': 'place'}
    """
    texts = list(texts)
    lower = {word for text in texts for word in re.findall(r"\b[a-z]+\b", text)}
    kinds: dict[str, str] = {}
    for text in texts:
        for found in _names_in(text):
            if lower.isdisjoint(found[0].lower().split()):
                place = _BEFORE_PLACES.search(text[: found.start()])
                kinds[found[0]] = "place" if place else kinds.get(found[0], "other")
    calendar = {name: "day" for name in _DAYS} | {name: "month" for name in _MONTHS}
    return {name: calendar.get(name, kinds[name]) for name in sorted(kinds)}


def _sites(text: str, post: str, rules: Collection[str], names: Mapping[str, str]) -> list[Site]:
    """Where something else could stand, by these rules; no two sites share a character."""
    kept: list[Site] = []
    for site in sorted(site for rule in rules for site in _SITES[rule](text, post, names)):
        if site.values and (not kept or kept[-1].end <= site.start):
            kept.append(site)
    return kept


def _numbers(text: str, post: str, names: Mapping[str, str]) -> Iterable[Site]:
    del names
    known = f"{post}\n{text}"
    for found in _DIGITS.finditer(text):
        values = [value for value in _other_numbers(found[0]) if not _holds_number(known, value)]
        yield Site(*found.span(), "number", values)
    for found in _WORDED.finditer(text):
        words = _NUMBER_WORDS[found[0].lower()]
        values = [_cased(word, found[0]) for word in words if not _holds_number(known, word)]
        yield Site(*found.span(), "number", values)


def _other_numbers(shown: str) -> list[str]:
    """Numbers that look alike: as many digits, as round, of about the size; never 0 or 1."""
    digits = re.sub("[.,]", "", shown)
    number = int(digits)
    if digits[0] == "0" or number < 2:
        return []
    step = 10 ** (len(digits) - len(digits.rstrip("0")))
    low, high = number // 2, number * 2
    if len(digits) == 4 and 1900 <= number < 2100 and digits == shown:  # a year
        step, low, high = 1, number - 10, number + 10
    first, last = max(low, 10 ** (len(digits) - 1), 2), min(high, 10 ** len(digits) - 1)
    others = [n for n in range(-(-first // step) * step, last + 1, step) if n != number]
    return [_punctuated(str(n), shown) for n in others]


def _punctuated(digits: str, shown: str) -> str:
    """As many digits as `shown` has, with its commas and point."""
    rest = iter(digits)
    return "".join(next(rest) if mark.isdigit() else mark for mark in shown)


def _holds_number(text: str, value: str) -> bool:
    """Whether a number stands in the text, in digits or spelled."""
    spelled = {number for number, word in _SPELLED.items() if word == value}
    ways = {value, _SPELLED.get(value, value), *spelled}
    pattern = rf"(?<![^\W_])(?<!\d[.,])(?:{'|'.join(map(re.escape, ways))})(?!\d)(?![.,]\d)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def _units(text: str, post: str, names: Mapping[str, str]) -> Iterable[Site]:
    del names
    known = set(re.findall(r"[a-z]+", f"{post}\n{text}".lower()))
    for found in _UNIT.finditer(text):
        quantity, shown = found["quantity"].lower(), found["unit"]
        group, number = _UNIT_OF[shown.lower()]
        wants_an = {"a": False, "an": True}.get(quantity)
        units = [unit for unit in group if known.isdisjoint(unit)]
        if wants_an is not None:
            units = [unit for unit in units if (unit[0] in _AFTER_AN) == wants_an]
        single = quantity == "1" or quantity == "one"
        values = [_cased(unit[0 if single else number], shown) for unit in units]
        yield Site(*found.span("unit"), "unit", values)


def _names(text: str, post: str, names: Mapping[str, str]) -> Iterable[Site]:
    known = set(re.findall(r"\w+", f"{post}\n{text}".lower()))
    for found in _names_in(text):
        if (kind := names.get(found[0])) is None:
            continue
        elsewhere = [
            name
            for name, other in names.items()
            if other == kind and known.isdisjoint(name.lower().split())
        ]
        as_long = [name for name in elsewhere if len(name.split()) == len(found[0].split())]
        yield Site(*found.span(), "name", as_long or elsewhere)


def _names_in(text: str) -> Iterable[re.Match[str]]:
    """Runs of capitalised words inside sentences, unless the text is written Like A Title."""
    words = [word for word in re.findall(r"[A-Za-z]+", text) if word != "I"]
    if 2 * sum(word[0].isupper() for word in words[1:]) <= len(words):
        yield from _NAME.finditer(text)


def _cased(word: str, like: str) -> str:
    return word.upper() if like.isupper() else word.capitalize() if like[0].isupper() else word


_SITES: dict[str, Callable[[str, str, Mapping[str, str]], Iterable[Site]]] = {
    "number": _numbers,
    "name": _names,
    "unit": _units,
}
