"""A judge that asks any OpenAI-compatible chat server which of two summaries is better, and why.

The server is that of OPENAI_BASE_URL, its key that of OPENAI_API_KEY, and they stand nowhere else.
What a summary or a reply says is data: a template is filled in one pass, and a reply that does not
keep to the format is asked for again, then counted as no verdict, never guessed at. Left out: how a
request is sent (`chat`), where answers are kept (`judge_cache`), what verdicts come to
(`analysis.win_rates`).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from jaxdpo import InputError
from jaxdpo.chat import Chat
from jaxdpo.judge import FIRST, NONE, SECOND, Judge, Question, Verdict
from jaxdpo.judge_cache import Answer, JudgeCache
from jaxdpo.metrics import ProgressLine, console

TEMPLATE = """\
Which of the following summaries does a better job of summarizing the most important points in \
the given forum post, without including unimportant or irrelevant details? A good summary is both \
precise and concise.

Post:
{post}

Summary A:
{summary_a}

Summary B:
{summary_b}

FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why. \
SECOND, on a new line, state only "A" or "B" to indicate your choice. Your response should use the \
format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""
"""The summarisation prompt of arXiv 2404.12358, Appendix H."""

_PLACES = ("post", "summary_a", "summary_b")
_PLACEHOLDER = re.compile(r"\{(post|summary_a|summary_b)\}")
_CHOICE = re.compile(r"""Preferred:\s*(["']?)([AB])\1\.?""")
_LIKE_A_CHOICE = re.compile(r"\W*preferred\W*:", re.IGNORECASE)  # counted, however it is dressed up


def server_judge(
    *,
    model: str,
    template: str | Path | None = None,
    cache: str | Path,
    concurrency: int = 8,
    requests_per_minute: float | None = None,
    timeout: float = 60.0,
    retries: int = 5,
    attempts: int = 3,
    max_requests: int | None = None,
    price: tuple[float, float] | None = None,
    temperature: float = 0.0,
) -> Judge:
    """A judge that asks `model` of the server that the environment names.

    `template` is a file with {post}, {summary_a} and {summary_b}, each once (None: `TEMPLATE`).
    Every answer is kept in `cache` and never asked for again. A request that fails is sent again
    `retries` times, a reply that cannot be read is asked for `attempts` times in all; then the
    verdict is NONE. `max_requests` are all that are sent, `timeout` is in seconds, `price` in USD
    for a million input and output tokens. Raises `InputError` for what is wrong with any of these;
    so does asking the judge, with what is answered kept.

    >>> import os, tempfile
    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, OPENAI_API_KEY="any"), tempfile.TemporaryDirectory() as folder:
    ...     server_judge(model="llama", cache=f"{folder}/answers.jsonl").name
    'server llama'
    """
    if not model.strip():
        raise InputError(f"model={model!r}: name one of the server's")
    _check(1.0, concurrency=concurrency, attempts=attempts, max_requests=max_requests)
    _check(0.001, timeout=timeout, requests_per_minute=requests_per_minute)
    _check(0.0, retries=retries, temperature=temperature)
    for amount in price or ():
        _check(0.0, price=amount)
    text = TEMPLATE if template is None else _template(Path(template))
    chat = Chat(
        model,
        temperature=float(temperature),
        timeout=timeout,
        retries=retries,
        requests_per_minute=requests_per_minute,
        max_requests=max_requests,
    )
    settings = {
        "model": model,
        "template": hashlib.sha256(text.encode()).hexdigest(),
        "temperature": float(temperature),
    }
    kept = JudgeCache(cache, settings, notes={"base_url": chat.url})
    server = _Server(chat, kept, text, concurrency, attempts, price)
    return Judge(f"server {model}", {"kind": "server"} | settings, server.ask, fair=False)


def filled(template: str, question: Question) -> str:
    """The template with a question in it; whatever looks like a placeholder there is left alone.

    The post is the prompt without the marker "TL;DR:" that asks for a summary.

    >>> filled("{post}: {summary_a} or {summary_b}?", Question("P\\n\\nTL;DR:", " {post}", ""))
    'P: {post} or ?'
    """
    post = question.prompt.rstrip().removesuffix("TL;DR:")
    texts = (post.strip(), question.first.strip(), question.second.strip())
    values = dict(zip(_PLACES, texts, strict=True))
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


def preference(reply: str, finish_reason: str = "stop") -> Verdict:
    """What a reply says: a comparison, then as the last line, and once, "Preferred: A" or B.

    A verdict NONE has as its reason why nothing can be read.

    >>> preference("Comparison: A names the town.\\nPreferred: A")
    Verdict(preferred='first', reason='A names the town.')
    >>> preference("A. Preferred: A or B")
    Verdict(preferred='none', reason='does not end with a line "Preferred: A" or B')
    """
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    if finish_reason == "length":
        return Verdict(NONE, "was cut off")
    if not lines:
        return Verdict(NONE, "is empty")
    if (choices := sum(map(bool, map(_LIKE_A_CHOICE.match, lines)))) > 1:
        return Verdict(NONE, f"has {choices} lines that begin with Preferred")
    if not (choice := _CHOICE.fullmatch(lines[-1])):
        return Verdict(NONE, 'does not end with a line "Preferred: A" or B')
    comparison = " ".join(lines[:-1]).removeprefix("Comparison:").strip()
    if not comparison:
        return Verdict(NONE, "compares nothing")
    return Verdict(FIRST if choice[2] == "A" else SECOND, comparison)


class _Task(NamedTuple):
    """A question that is asked once, for all the places where it stands."""

    key: str
    prompt: str
    places: list[int]


class _Server(NamedTuple):
    """What asking takes; `ask` is the judge's."""

    chat: Chat
    cache: JudgeCache
    template: str
    concurrency: int
    attempts: int
    price: tuple[float, float] | None

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        tasks, new, unreadable = self._tasks(questions), [], 0
        with self.cache:
            if (url := self.cache.notes.get("base_url")) != self.chat.url:
                self._say(f"the answers in {self.cache.file} came from {url}")
            known = [(task, self._verdict(task)) for task in tasks]
            left = [task for task, verdict in known if verdict is None]
            there = [(task, verdict) for task, verdict in known if verdict is not None]
            sent, cached = self.chat.sent, sum(len(task.places) for task, _ in there)
            with closing(self._settled(left, cached, new)) as settled:
                for task, verdict in chain(there, settled):
                    unreadable += len(task.places) * (verdict.preferred == NONE)
                    yield from ((place, verdict) for place in task.places)
        again = sum(answer.attempt > 1 for answer in new)
        tokens = (sum(answer.tokens[side] for answer in new) for side in (0, 1))
        self._say(
            f"{len(questions)} comparisons answered, {cached} of them from {self.cache.file}; "
            f"{again} asked again for a reply that can be read, "
            f"{self.chat.sent - sent - len(new)} after a failure; {unreadable} unreadable; "
            f"{self._cost(*tokens)}"
        )

    def _tasks(self, questions: Sequence[Question]) -> list[_Task]:
        """The different questions."""
        tasks: dict[str, _Task] = {}
        for place, question in enumerate(questions):
            key = _key(self.chat.model, self.chat.temperature, self.template, question)
            if key not in tasks:
                tasks[key] = _Task(key, _sendable(filled(self.template, question), place), [])
            tasks[key].places.append(place)
        return list(tasks.values())

    def _verdict(self, task: _Task) -> Verdict | None:
        """What the answers that are there come to; None where another one is wanted."""
        answers = self.cache.answers(task.key)[: self.attempts]
        verdicts = [preference(answer.reply, answer.finish_reason) for answer in answers]
        for verdict in verdicts:
            if verdict.preferred != NONE:
                return verdict
        if len(verdicts) < self.attempts:
            return None
        return Verdict(
            NONE, f"unreadable {self.attempts} times; the last one {verdicts[-1].reason}"
        )

    def _settled(
        self, left: Sequence[_Task], cached: int, new: list[Answer]
    ) -> Iterator[tuple[_Task, Verdict]]:
        """The verdicts of what is left: the first alone, which shows what the rest takes."""
        if not left:
            return
        places = cached + sum(len(task.places) for task in left)
        try:
            with self.chat:
                verdict = self._answered(left[0], new)
                self._say(self._estimate(left, cached, places, new[-1]))
                yield left[0], verdict
                yield from self._side_by_side(left[1:], cached + len(left[0].places), places, new)
        except InputError as error:
            done = places - sum(len(task.places) for task in left if not self._verdict(task))
            raise InputError(
                f"{error}; {done} of {places} comparisons are answered, in {self.cache.file}: "
                "the same command goes on"
            ) from None

    def _side_by_side(
        self, tasks: Sequence[_Task], start: int, places: int, new: list[Answer]
    ) -> Iterator[tuple[_Task, Verdict]]:
        """Verdicts as they come; whatever ends this, no more is sent, and what was is kept."""
        pool, done = ThreadPoolExecutor(self.concurrency), start
        try:
            futures = {pool.submit(self._answered, task, new): task for task in tasks}
            with ProgressLine("judged", places, start=start, unit="comparisons") as progress:
                for future in as_completed(futures):
                    task, verdict = futures[future], future.result()
                    done += len(task.places)
                    progress.update(done, seen=done - start)
                    yield task, verdict
        except KeyboardInterrupt:
            self._say("stops as soon as what is under way is answered")
            raise
        finally:
            self.chat.stop()
            pool.shutdown(cancel_futures=True)

    def _answered(self, task: _Task, new: list[Answer]) -> Verdict:
        """A task's verdict, asked for until it can be read or often enough."""
        while (verdict := self._verdict(task)) is None:
            attempt = len(self.cache.answers(task.key)) + 1
            answer = Answer(task.key, attempt, task.prompt, *self.chat.reply(task.prompt))
            self.cache.add(answer)
            new.append(answer)
        return verdict

    def _estimate(self, left: Sequence[_Task], cached: int, places: int, first: Answer) -> str:
        """What a first answer says of all that are left."""
        same = places - cached - len(left)
        given, taken = first.tokens
        letters = sum(len(task.prompt) for task in left)
        cost = self._cost(given * letters // len(first.prompt), taken * len(left), "about ")
        seconds = len(left) * max(first.seconds / self.concurrency, self.chat.apart)
        return (
            f"{places} comparisons, {cached} cached, {len(left)} to ask"
            f"{f' ({same} more are the same)' if same else ''}: "
            f"about {seconds / 60:.1f} min at {self.concurrency} at a time, {cost}"
        )

    def _cost(self, given: int, taken: int, about: str = "") -> str:
        said = f"{about}{given} input and {taken} output tokens"
        if self.price is None:
            return said
        return f"{said}, {about}${(given * self.price[0] + taken * self.price[1]) / 1e6:.3f}"

    def _say(self, what: str) -> None:
        console.print(f"{self.chat.model}: {what}", markup=False)


def _key(model: str, temperature: float, template: str, question: Question) -> str:
    """Of all that decides an answer, the order of the summaries included."""
    what = json.dumps([model, temperature, template, *question])
    return hashlib.sha256(what.encode()).hexdigest()


def _sendable(text: str, place: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"comparison {place}: holds a lone surrogate; write the character"
        ) from error
    return text


def _template(file: Path) -> str:
    """A template's text; `InputError` for a placeholder that does not stand in it once."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable text file ({error})") from error
    found = _PLACEHOLDER.findall(text)
    for name in _PLACES:
        if (count := found.count(name)) != 1:
            raise InputError(f"{file}: has {{{name}}} {count} times; it must stand there once")
    return text


def _check(least: float, **values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{name}={value}: must be at least {least:g}")
