"""The built-in data set: a summarisation task whose wrong tokens are known exactly.

A hidden record of facts (where the writer lives, what is missing, how they feel, ...) is
told in a post of shuffled sentences, among facts about other people or other times. A
summary states some of the facts; a rejected one states some of them with a wrong value of
the same kind. So the true reward of every token is known: the wrong values are to blame,
and nothing else is. The word before a value tells its kind and whose fact it is, so that a
very small causal model can learn to look a fact up. Posts alone, of writers who come back and
tell their facts again, are what such a model can learn it from before it sees a summary.

What is left out: reading the files back (`pairs`) and truncation and EOS (`tokens`).
"""

import json
import os
import random
import uuid
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxdpo import InputError


class _Kind(NamedTuple):
    """One kind of fact: its values, and the wordings in which it can be told."""

    values: list[str]  # every value is one word that belongs to no other kind
    own: list[str]  # sentences about the writer, now: the truth
    others: list[str]  # sentences about someone else or another time: distractors
    summary: list[str]  # clauses of a summary


KINDS = {
    "city": _Kind(
        "Oslo Paris Rome Madrid Vienna Dublin Berlin Athens Boston Denver Seattle Toronto "
        "Sydney Tokyo Cairo Lima".split(),
        ["I live in {}.", "I rent a flat in {}.", "My home is in {}.", "I am based in {}."],
        ["{who} comes from {}.", "{who} is visiting {}.", "Years ago I left {}."],
        ["I live in {}", "my home is in {}", "I am based in {}"],
    ),
    "pet": _Kind(
        "dog cat rabbit parrot hamster turtle goldfish pony ferret lizard canary gecko goat "
        "snake mouse duck".split(),
        ["I have a pet {}.", "I adopted a pet {}.", "I live with a pet {}."],
        ["{who} owns a {}.", "{who} found a {}.", "As a child I owned a {}."],
        ["I have a pet {}", "I live with a pet {}"],
    ),
    "item": _Kind(
        "bike phone laptop camera wallet backpack jacket guitar scooter suitcase necklace "
        "tablet ladder tent drill blender".split(),
        ["I lost my new {}.", "I cannot find my new {}.", "I am missing my new {}."],
        ["{who} bought a {}.", "{who} sold a {}.", "Last summer I repaired a {}."],
        ["I cannot find my new {}", "I am missing my new {}"],
    ),
    "person": _Kind(
        "roommate landlord boss sister brother father mother neighbor coworker coach tutor "
        "professor nephew niece grandmother stepfather".split(),
        ["I often fight with my {}.", "I argue with my {}.", "I have trouble with my {}."],
        ["{who} called their {}.", "{who} likes their {}.", "{who} wrote to their {}."],
        ["I do not get along with my {}", "I have trouble with my {}"],
    ),
    "amount": _Kind(
        "45 60 85 110 130 150 175 220 260 300 340 400 480 550 720 900".split(),
        ["I paid {} dollars.", "So far I have paid {} dollars.", "I already paid {} dollars."],
        ["{who} won {} dollars.", "{who} saved {} dollars.", "Back then rent was {} dollars."],
        ["I paid {} dollars", "so far I have paid {} dollars"],
    ),
    "year": _Kind(
        "2003 2004 2005 2006 2007 2008 2009 2010 2011 2012 2013 2014 2015 2016 2017 2018".split(),
        [
            "I have been here since {}.",
            "I have lived here since {}.",
            "I have stayed here since {}.",
        ],
        ["{who} married around {}.", "{who} retired before {}.", "I was a student until {}."],
        ["I have been here since {}", "I have lived here since {}"],
    ),
    "feeling": _Kind(
        "worried angry sad lonely confused nervous guilty hopeful jealous tired bored proud "
        "scared ashamed frustrated relieved".split(),
        ["Honestly I feel {}.", "All this makes me feel {}.", "I feel {}.", "Lately I feel {}."],
        ["{who} seemed {}.", "{who} sounded {}.", "At first I was {}."],
        ["I feel {}", "all this makes me feel {}"],
    ),
    "plan": _Kind(
        "wait leave apologize complain quit move cancel confess refuse negotiate retire sue "
        "compromise relax protest return".split(),
        ["I wonder if I should {}.", "Do you think I should {}?", "Maybe I should {}."],
        ["{who} told me not to {}.", "{who} decided to {}.", "Once I had to {}."],
        ["I wonder if I should {}", "maybe I should {}"],
    ),
}
OTHERS = ["My cousin", "My aunt", "My best friend", "A friend of mine", "An old classmate"]
FILLERS = [
    "Sorry for the long post.",
    "Thanks for reading.",
    "Any help is welcome.",
    "I hope this makes sense.",
    "Please be kind.",
    "This is a throwaway account.",
    "It is a long story.",
    "Nobody else knows about this.",
]
_SUBREDDITS = ["advice", "relationships", "finance", "family", "work"]
_TITLES = [
    "I need some advice",
    "What would you do?",
    "A strange week",
    "Not sure what comes next",
    "Please help me think",
    "Am I wrong here?",
]
_HEADER = "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST:"
PROMPT = _HEADER + " {}\n\nTL;DR:"
JOINTS = [(". ", ". "), (", ", " and "), ("; ", "; ")]  # between clauses, before the last
_MOST_VALUES = min(len(kind.values) for kind in KINDS.values())


@dataclass(frozen=True)
class Task:
    """The difficulty of the task; a field out of its range is an `InputError` naming it."""

    facts: int = 5  # facts about the writer in a post, each of another kind
    stated: int = 3  # how many of them a summary states
    distractors: int = 3  # facts about others, of the kinds stated first
    fillers: int = 1  # sentences in a post that tell nothing
    values: int = 12  # possible values of a kind
    errors: tuple[int, int] = (1, 2)  # fewest and most wrong values in a wrong summary
    from_post: float = 0.2  # probability that a wrong value is the post's distractor
    rephrase: float = 0.0  # probability that the rejected is worded independently
    sft_error_rate: float = 0.2  # share of the SFT completions that are wrong

    def __post_init__(self):
        _check_count("facts", self.facts, 1, len(KINDS))
        _check_count("stated", self.stated, 1, self.facts)
        _check_count("distractors", self.distractors, 0, self.facts)
        _check_count("fillers", self.fillers, 0, len(FILLERS))
        _check_count("values", self.values, 3, _MOST_VALUES)
        if not (isinstance(self.errors, tuple | list) and len(self.errors) == 2):
            raise InputError(f"errors: {self.errors!r} must be a pair (fewest, most)")
        _check_count("errors (most)", self.errors[1], 1, self.stated)
        _check_count("errors (fewest)", self.errors[0], 1, self.errors[1])
        for name in ("from_post", "rephrase", "sft_error_rate"):
            share = getattr(self, name)
            if not (isinstance(share, int | float) and 0 <= share <= 1):
                raise InputError(f"{name}: {share!r} must be a probability from 0 to 1")
        if self.from_post > 0 and self.distractors < self.stated:
            raise InputError(
                f"from_post: {self.from_post} needs a distractor for every stated fact: "
                f"set distractors to {self.stated} or more, or from_post to 0"
            )


class Error(NamedTuple):
    """A wrong value: characters `start:end` of the summary are `wrong`, not `right`."""

    kind: str
    start: int
    end: int
    right: str
    wrong: str


class Example(NamedTuple):
    """One post with its preference pair and its SFT completion."""

    prompt: str
    chosen: str
    rejected: str
    errors: tuple[Error, ...]  # in `rejected`, from left to right; all else in it is true
    completion: str
    completion_errors: tuple[Error, ...]


def example(task: Task, *, seed: int, split: str, index: int) -> Example:
    """The example number `index` of a split: a pure function of its arguments.

    A prompt's own hash says to which split it belongs, so `"train"` and `"test"` share no
    prompt, whatever the seeds. Raises `InputError` for any other split.

    >>> one = example(Task(), seed=0, split="train", index=0)
    >>> error = one.errors[0]
    >>> one.rejected[error.start : error.end] == error.wrong
    True
    """
    rng, facts, distractors, prompt = _of_split(task, f"{seed}/{split}/{index}", split)
    facts = dict(list(facts.items())[: task.stated])
    wording = _wording(list(facts), rng)
    other = _wording(list(facts), rng) if rng.random() < task.rephrase else wording
    rejected = _wrong_summary(task, rng, other, facts, distractors)
    completion = _summary(wording, facts), ()
    if rng.random() < task.sft_error_rate:
        completion = _wrong_summary(task, rng, wording, facts, distractors)
    return Example(prompt, _summary(wording, facts), *rejected, *completion)


def post(task: Task, *, seed: int, split: str, index: int) -> tuple[str, str]:
    """The header and the text of a post to pre-train on: a pure function of its arguments.

    The writer posts twice, and the second time tells all the facts again, in their own order
    and words: which a model can predict, once it looks them up. No summary follows. As with
    examples, `"train"` and `"test"` share no first post.

    >>> header, text = post(Task(), seed=0, split="train", index=2)
    >>> header.splitlines()[-1], text.count("POST:")
    ('POST:', 1)
    """
    rng, facts, _, prompt = _of_split(task, f"{seed}/{split}/post/{index}", split)
    header, told = prompt.removesuffix("\n\nTL;DR:").split("POST:")
    again = _told(facts, rng)
    rng.shuffle(again)
    return header + "POST:", f"{told}\n\nPOST: {' '.join(again)}"


def tokenizer() -> Tokenizer:
    """The word-level tokenizer of the task: lossless, and without an unknown token.

    A piece is a word with the space before it, a punctuation mark or a blank line. As in
    Pythia `<|endoftext|>` is id 0; `<|padding|>` is id 1. It holds every value, so it is
    the same for all tasks; text with a word outside the task makes `encode` raise.

    >>> pieces = tokenizer()
    >>> pieces.encode(" I live in Oslo.").tokens
    [' I', ' live', ' in', ' Oslo', '.']
    """
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z0-9]+|\n\n|[^A-Za-z0-9 ]"), "isolated")
    special = ["<|endoftext|>", "<|padding|>"]
    words = {piece for text in _texts() for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {piece: i for i, piece in enumerate(special + sorted(words))}
    pieces = Tokenizer(models.WordLevel(vocabulary))
    pieces.pre_tokenizer = split
    pieces.decoder = decoders.Fuse()
    pieces.add_special_tokens(special)
    return pieces


def write(
    folder: str | os.PathLike,
    task: Task,
    *,
    seed: int,
    sft_train: int,
    sft_test: int,
    pairs_train: int,
    pairs_test: int,
    posts_train: int = 0,
    posts_test: int = 0,
) -> None:
    """Write the data set: JSONL files and `tokenizer.json`, the same bytes each time.

    `sft_{train,test}.jsonl` have prompt, completion and errors, `pairs_{train,test}.jsonl`
    prompt, chosen, rejected and errors, `posts_{train,test}.jsonl` prompt and completion; the
    counts are their rows, and of 0 rows no file is made. Pairs take the indices after the SFT
    rows, so that the two stages see different posts. Each file is replaced in one step, and one
    of now no rows removed. Raises `InputError` for a negative count, before anything is written,
    or an unusable folder.
    """
    splits = {
        "train": {"sft": sft_train, "pairs": pairs_train, "posts": posts_train},
        "test": {"sft": sft_test, "pairs": pairs_test, "posts": posts_test},
    }
    check_sizes({f"{n}_{split}": x for split, counts in splits.items() for n, x in counts.items()})
    for split, counts in splits.items():
        for name, rows in _rows(task, seed, split, **counts).items():
            file = Path(folder, f"{name}_{split}.jsonl")
            if counts[name]:
                _replace(file, map(json.dumps, rows))
            else:
                _remove(file)
    _replace(Path(folder, "tokenizer.json"), [tokenizer().to_str(pretty=True)])


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise `InputError` for a count of rows that is negative or no whole number."""
    for name, count in sizes.items():
        _check_count(name, count, 0)


def _rows(task: Task, seed: int, split: str, *, sft: int, pairs: int, posts: int) -> dict:
    """The rows of each file of a split, drawn as they are asked for."""
    of = dict(seed=seed, split=split)
    draw = lambda indices: (example(task, **of, index=index) for index in indices)
    labels = lambda errors: {"errors": [error._asdict() for error in errors]}
    return {
        "sft": (
            {"prompt": one.prompt, "completion": one.completion} | labels(one.completion_errors)
            for one in draw(range(sft))
        ),
        "pairs": (
            {"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected}
            | labels(one.errors)
            for one in draw(range(sft, sft + pairs))
        ),
        "posts": (
            dict(zip(("prompt", "completion"), post(task, **of, index=index), strict=True))
            for index in range(posts)
        ),
    }


def _check_count(name: str, value: Any, low: int, high: int = 10**9) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name}: {value!r} must be a whole number from {low} to {high}")


def _of_split(task: Task, seed: str, split: str) -> tuple[random.Random, dict, dict, str]:
    """The first post of a seed that belongs to the split, and the randomness that is left."""
    if split not in ("train", "test"):
        raise InputError(f"split: {split!r} is neither 'train' nor 'test'")
    rng = random.Random(seed)
    facts, distractors, prompt = _post(task, rng)
    while (zlib.crc32(prompt.encode()) % 2 == 0) != (split == "train"):
        facts, distractors, prompt = _post(task, rng)
    return rng, facts, distractors, prompt


def _post(task: Task, rng: random.Random) -> tuple[dict, dict, str]:
    """Kind -> value of the writer's facts and of the distractors, and the prompt."""
    kinds = rng.sample(list(KINDS), task.facts)
    drawn = {kind: rng.sample(KINDS[kind].values[: task.values], 2) for kind in kinds}
    facts = {kind: own for kind, (own, _) in drawn.items()}
    distractors = {kind: drawn[kind][1] for kind in kinds[: task.distractors]}
    sentences = _told(facts, rng)
    for kind, value in distractors.items():
        others = rng.choice(KINDS[kind].others)
        sentences.append(others.format(value, who=rng.choice(OTHERS)))
    sentences += rng.sample(FILLERS, task.fillers)
    rng.shuffle(sentences)
    header = rng.choice(_SUBREDDITS), rng.choice(_TITLES)
    return facts, distractors, PROMPT.format(*header, " ".join(sentences))


def _told(facts: dict[str, str], rng: random.Random) -> list[str]:
    """A sentence for each fact."""
    return [rng.choice(KINDS[kind].own).format(value) for kind, value in facts.items()]


def _wording(kinds: list[str], rng: random.Random) -> list[tuple[str, str, str]]:
    """Clauses in a random order, as (kind, text before the value, text after it)."""
    inner, last = rng.choice(JOINTS)
    kinds = rng.sample(kinds, len(kinds))
    joints = [" ", *[inner] * (len(kinds) - 2), last][: len(kinds)]
    wording = []
    for kind, joint in zip(kinds, joints, strict=True):
        before, after = rng.choice(KINDS[kind].summary).split("{}")
        if joint in (" ", ". "):
            before = before[0].upper() + before[1:]
        wording.append((kind, joint + before, after))
    return wording


def _summary(wording: list[tuple[str, str, str]], facts: dict[str, str]) -> str:
    return "".join(before + facts[kind] + after for kind, before, after in wording) + "."


def _wrong_summary(task, rng, wording, facts, distractors) -> tuple[str, tuple[Error, ...]]:
    stated = dict(facts)
    for kind in rng.sample(list(facts), rng.randint(*task.errors)):
        elsewhere = {facts[kind], distractors.get(kind)}
        absent = [v for v in KINDS[kind].values[: task.values] if v not in elsewhere]
        from_post = rng.random() < task.from_post
        stated[kind] = distractors[kind] if from_post else rng.choice(absent)
    errors, end = [], 0
    for kind, before, after in wording:
        start = end + len(before)
        end = start + len(stated[kind])
        if stated[kind] != facts[kind]:
            errors.append(Error(kind, start, end, facts[kind], stated[kind]))
        end += len(after)
    return _summary(wording, stated), tuple(errors)


def _texts() -> Iterable[str]:
    """Texts that together hold every piece of every text that a task can make."""
    for subreddit in _SUBREDDITS:
        yield from (PROMPT.format(subreddit, title, FILLERS[0]) for title in _TITLES)
    yield from (" " + text for text in FILLERS + OTHERS)
    yield from (f"{inner}I{last}I" for inner, last in JOINTS)
    for kind in KINDS.values():
        for template in kind.own + kind.others + kind.summary:
            for text in (template, template[0].upper() + template[1:]):
                yield " " + text.format(kind.values[0], who=OTHERS[0])
        yield from (" " + value for value in kind.values)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be removed ({error.strerror or error})") from error


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write a file under another name and move it into place, so no half file is seen."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(line + "\n" for line in lines)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}); name another folder") from error
