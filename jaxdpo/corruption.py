"""Wrong summaries made from right ones by rule, so that the wrong characters are known.

A rule swaps a value of a summary for another of its kind that the post does not hold: a
number, a name, or a unit. All else stays as it is, and grammar too: no number becomes "one",
"1 week" becomes "1 month", "an hour" no "an week" and "an 8 hour shift" no "an 7 hour shift".
Rules are cautious: they leave alone what may be a time of day, a date, a height or money of
an unclear kind, and names of which no text says what they name. They know English, and they
read words, not meanings: an idiom ("100 times better") can be swapped like any other value.

Left out: whether the summary was right to begin with.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from jaxdpo import InputError
from jaxdpo.synthetic import Error

RULES = ("number", "name", "unit")

_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve".split()
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# "one" is also a pronoun, and what follows it is singular.
_NUMBER_WORDS = {word: words for words in (_TWELVE[2:], _TEENS, _TENS) for word in words}
_WORTH = {word: n for n, word in enumerate(_TWELVE + _TEENS)} | {"a": 1, "couple": 2}
_WORTH |= {word: 20 + 10 * n for n, word in enumerate(_TENS)}
_TIMES = {"k": 1e3, "grand": 1e3, "m": 1e6, "dozen": 12, "hundred": 100}
_TIMES |= {"thousand": 1e3, "million": 1e6}
_TAIL = re.compile(rf"[ -]?({'|'.join(_TIMES)})(?!\w)", re.IGNORECASE)
_AMOUNT = re.compile(
    r"(?P<digits>[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)"
    rf"|\b(?P<tens>{'|'.join(_TENS)})[ -](?=(?P<ones>{'|'.join(_TWELVE[1:10])})\b)"
    rf"|\b(?P<word>{'|'.join(_WORTH)})\b"
)
_DIGITS = re.compile(
    r"(?<![\w.,/:#–-])[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?"
    r"(?=(?:[mfk]|lbs?|kgs?|cm|mg|gb|yo|yrs?|hrs?|mins?)?(?!\w))"  # 22M is an age
    r"(?![/:–]|-\d|[.,]\d)",
    re.IGNORECASE,
)
_WORDED = re.compile(rf"(?<![\w-])(?:{'|'.join(_NUMBER_WORDS)})(?!\w)", re.IGNORECASE)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November".split()
_MONTHS.append("December")
_DATED = rf"(?:{'|'.join(_MONTHS)}|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?"
_COUNT = rf"(?:{'|'.join(_NUMBER_WORDS)}|one)"
# What makes a number part of something longer: a date, a height, a time, a number of two words.
_PART_BEFORE = re.compile(
    rf"(?:\b{_DATED}|(?:\b|[0-9])(?:foot|feet|ft)|['’]|\b(?:hundred|thousand)(?: and)?|\b{_COUNT})"
    r"[ -]?$",
    re.IGNORECASE,
)
_PART_AFTER = re.compile(
    rf"[ -]?(?:[ap]\.?m\b|o['’]?clock|(?:of )?{_DATED}|(?:foot|feet|ft)\b|['’\"″]|{_COUNT}\b"
    r"|(?:thirds?|quarters?|fifths?|halves)\b)",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"[0-9]{1,2}\.[0-5][0-9]")
_ARTICLE = re.compile(r"\b(an?) [$£€(\[~]?$", re.IGNORECASE)
_NUMBER_AFTER_AN = re.compile(
    r"8|1[18](?:,?[0-9]{3})*(?![0-9])|1[18][0-9]{2}(?![0-9])|eight|eleven", re.IGNORECASE
)

_UNITS = [  # what may stand for each other: (after one, after more)
    [(name, f"{name}s") for name in "minute hour day week month year".split()],
    [("hr", "hrs"), ("min", "mins"), ("wk", "wks"), ("yr", "yrs")],
    [("dollar", "dollars"), ("euro", "euros"), ("peso", "pesos")],
    [("kilo", "kilos"), ("ounce", "ounces")],  # a pound may be money
    [("lb", "lbs"), ("kg", "kg"), ("oz", "oz")],
    [("inch", "inches"), ("yard", "yards"), ("meter", "meters")]  # feet may be a height
    + [("mile", "miles"), ("kilometer", "kilometers")],
    [("mph", "mph"), ("kph", "kph")],
]
_UNIT_OF = {unit[n]: (group, n) for n in (0, 1) for group in _UNITS for unit in group}
_ALSO = "minute minutes min mins,hour hours hr hrs,week weeks wk wks,month months mo mos,"
_ALSO += "year years yr yrs,dollar dollars bucks $,euro euros €,kilo kilos kg kgs,"
_ALSO += "ounce ounces oz,kilometer kilometers km kms,lb lbs pound pounds"
_WAYS = [set(ways.split()) for ways in _ALSO.split(",")]  # to write the same unit
_AFTER_AN = ("hour", "ounce", "inch")
_QUANTITIES = "few several couple couple[ ]of many last next past each every per another an? one"
_QUANTITY = f"{'|'.join([*_QUANTITIES.split(), *_NUMBER_WORDS])}|[0-9][0-9,.]*"
_UNIT = re.compile(
    rf"(?<![\w.,-])(?!last minute)(?P<quantity>{_QUANTITY})[ -]"
    rf"(?P<unit>{'|'.join(_UNIT_OF)})(?!\w)",
    re.IGNORECASE,
)

_NAME = re.compile(r"(?<=[a-z0-9,;] )[A-Z][a-z]{2,}(?: [A-Z][a-z]{2,})*(?=(?:['’]s)?(?![\w'’-]))")
_KIN = "friend girlfriend boyfriend gf bf fiance fiancee husband wife brother sister son daughter"
_KIN += " cousin uncle aunt roommate coworker boss neighbor neighbour dog cat"
_BEFORE_PERSONS = re.compile(
    rf"\b(?:named|call (?:him|her)|(?:my|his|her) (?:\w+ )?(?:{'|'.join(_KIN.split())}),?) [(]?$",
    re.IGNORECASE,
)
_AFTER_PERSONS = re.compile(r" and I (?:are|were)\b")
_BEFORE_SURE_PLACES = re.compile(
    r"\b(?:(?:liv(?:e|es|ed|ing)|born|raised|grew up|based) in|mov(?:e|es|ed|ing) (?:back )?to) $",
    re.IGNORECASE,
)
_BEFORE_PLACES = re.compile(r"\b(?:in|near|into|around) $", re.IGNORECASE)
_CALENDAR = dict.fromkeys(_DAYS, "day")  # less what may be a verb
_CALENDAR |= {month: "month" for month in _MONTHS if month not in ("March", "May")}
_BEFORE_BOTH = re.compile(r"\b(?:to|from) $", re.IGNORECASE)


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
    stands in the post or in the text, nor does an equal one written otherwise ("20k", "20,000",
    "twenty thousand"; "hrs"); of several errors two can have the same wrong value only where
    nothing else is left. Raises `InputError` for an unknown rule.

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
    """The names inside sentences of the texts of which these say what they name.

    A name is a run of capitalised words none of which stands anywhere in lower case. It is a
    "place" if it was met where only places are ("live in", "moved to") and never but after
    "in", "near", "into", "around", "to" or "from"; a "person" (or a pet) if it was met after
    "named" or "my sister", or before "and I are", and nowhere as a place. Days and most months
    are known; what is neither is left out.

    >>> names([" my sister Anna lives in Rome.", "We saw Anna near Rome on Monday, so Thai was"])
    {'Anna': 'person', 'Monday': 'day', 'Rome': 'place'}
    >>> names([" I lived in Rome, but Rome is dear."])
    {}
    """
    texts = list(texts)
    lower = {word for text in texts for word in re.findall(r"\b[a-z]+\b", text)}
    frames: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        for found in _names_in(text):
            frames[found[0]].add(_frame(text, found))
    named = lambda name: name in _CALENDAR or lower.isdisjoint(name.lower().split())
    kinds = {name: _kind(name, frames[name]) for name in sorted(frames) if named(name)}
    return {name: kind for name, kind in kinds.items() if kind}


def _frame(text: str, found: re.Match[str]) -> str:
    """What the words around a name say that it names: nothing, a person, a place, or either."""
    before = text[max(0, found.start() - 40) : found.start()]
    if _BEFORE_PERSONS.search(before) or _AFTER_PERSONS.match(text, found.end()):
        return "person"
    if text.startswith(("'s", "’s"), found.end()):
        return ""
    if _BEFORE_SURE_PLACES.search(before):
        return "surely place"
    return "place" if _BEFORE_PLACES.search(before) else "both" * bool(_BEFORE_BOTH.search(before))


def _kind(name: str, frames: set[str]) -> str:
    if name in _CALENDAR:
        return "" if "person" in frames else _CALENDAR[name]
    if "surely place" in frames and frames <= {"surely place", "place", "both"}:
        return "place"
    return "person" if "person" in frames and frames <= {"person", "both", ""} else ""


def _sites(text: str, post: str, rules: Collection[str], names: Mapping[str, str]) -> list[Site]:
    """Where something else could stand, by these rules; no two sites share a character."""
    kept: list[Site] = []
    for site in sorted(site for rule in rules for site in _SITES[rule](text, post, names)):
        if site.values and (not kept or kept[-1].end <= site.start):
            kept.append(site)
    return kept


def _numbers(text: str, post: str, names: Mapping[str, str]) -> Iterable[Site]:
    del names
    both = f"{post}\n{text}"
    known = {*_amounts(both), *map(float, re.findall("[0-9]+", both))}
    for pattern in (_DIGITS, _WORDED):
        for found in pattern.finditer(text):
            if not _is_part(text, found):
                tail = (_TAIL.match(text, found.end()) or [""])[0]  # "20" of "20k"
                others = _other_numbers(found[0])
                values = [value for value in others if known.isdisjoint(_amounts(value + tail))]
                yield Site(*found.span(), "number", _fitting(values, text[: found.start()]))


def _is_part(text: str, found: re.Match[str]) -> bool:
    """Whether a number is, or may be, part of a date, a time, a height or a longer number."""
    before = text[max(0, found.start() - 24) : found.start()]
    clock = _CLOCK.fullmatch(found[0]) and not before.endswith(("$", "£", "€"))
    return bool(clock or _PART_BEFORE.search(before) or _PART_AFTER.match(text, found.end()))


def _fitting(values: list[str], before: str) -> list[str]:
    """The values that can stand after what stands before, be it "a", "an" or anything else."""
    if (article := _ARTICLE.search(before)) is None:
        return values
    an = article[1].lower() == "an"
    return [value for value in values if bool(_NUMBER_AFTER_AN.match(value)) == an]


def _other_numbers(shown: str) -> list[str]:
    """Numbers that look alike: as many digits, as round, of about the size; never 0 or 1.

    In words: those of the same length of name, "two" to "twelve", the teens, or the tens.
    """
    if words := _NUMBER_WORDS.get(shown.lower()):
        return [_cased(word, shown) for word in words if word != shown.lower()]
    digits = re.sub("[.,]", "", shown)
    number = int(digits) if len(digits) <= 12 else 0
    if digits[0] == "0" or number < 2:
        return []
    step = 10 ** (len(digits) - len(digits.rstrip("0")))
    low, high = number // 2, number * 2
    if len(digits) == 4 and 1900 <= number < 2100 and digits == shown:  # a year
        step, low, high = 1, number - 10, number + 10
    elif step == number:  # 10, 100: there is but one as round
        step //= 10
    elif number >= 1000 * step:
        step = 10 ** (len(digits) - 2)  # all later digits stay
    first, last = max(low, 10 ** (len(digits) - 1), 2), min(high, 10 ** len(digits) - 1)
    others = range(first + (number - first) % step, last + 1, step)
    return [_punctuated(str(n), shown) for n in others if n != number]


def _punctuated(digits: str, shown: str) -> str:
    """As many digits as `shown` has, with its commas and point."""
    rest = iter(digits)
    return "".join(next(rest) if mark.isdigit() else mark for mark in shown)


def _amounts(text: str) -> Iterator[float]:
    """What the numbers of a text are worth, in digits or in words, each alone and multiplied.

    >>> list(_amounts("1,500 and 2k, thirty-two, a hundred"))
    [1500.0, 2.0, 2000.0, 30, 32, 2, 1, 100]
    """
    for found in _AMOUNT.finditer(text.lower()):
        digits, word = found["digits"], found["tens"] or found["word"]
        amount = float(digits.replace(",", "")) if digits else _WORTH[word]
        yield amount
        if found["ones"]:
            amount += _WORTH[found["ones"]]
            yield amount
        if times := _TAIL.match(text, found.end("ones") if found["ones"] else found.end()):
            yield amount * _TIMES[times[1].lower()]


def _units(text: str, post: str, names: Mapping[str, str]) -> Iterable[Site]:
    del names
    known = set(re.findall(r"[a-z]+|[$€]", f"{post}\n{text}".lower()))
    known = known.union(*(ways for ways in _WAYS if not known.isdisjoint(ways)))
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
