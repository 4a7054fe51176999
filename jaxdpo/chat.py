"""A chat server that speaks OpenAI's protocol: asked within limits, its failures told in one line.

The `openai` client does the retries and their back-off. What it cannot know is added around each
request that leaves, also one that it sends again: a budget, a pace, whether the answer is one at
all, and which failures no retry mends. Left out: what is asked (`judge_server`), and where answers
are kept (`judge_cache`).
"""

import json
import os
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from socket import gaierror
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jaxdpo import InputError

URL, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
OFFICIAL = "https://api.openai.com/v1"
SAID = 200  # the most characters of what a server says that are shown
NO_COMPLETION = 599  # stands for 200 with something else; no server sends it, clients retry it
UNREACHABLE = ConnectionRefusedError, gaierror, ssl.SSLCertVerificationError


class Reply(NamedTuple):
    """What a server answered: tokens are None where it does not count them."""

    text: str
    finish_reason: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    seconds: float


class Chat:
    """One model of the server of OPENAI_BASE_URL, to be asked by several threads at once.

    `max_requests` are all that are sent, retries included, for as long as this object lives;
    `requests_per_minute` spaces them evenly. Used as a context manager, as often as wanted. Raises
    `InputError` where the environment names no server or key.
    """

    def __init__(
        self,
        model: str,
        *,
        temperature: float,
        timeout: float,
        retries: int,
        requests_per_minute: float | None = None,
        max_requests: int | None = None,
    ):
        self.model, self.temperature = model, temperature
        self.timeout, self.retries = timeout, retries
        self.url, self.sent = _url(), 0
        self.apart = 60 / requests_per_minute if requests_per_minute else 0.0  # seconds
        self._key, self._most = _key(), max_requests
        self._next = time.monotonic()
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def __enter__(self) -> "Chat":
        import openai  # takes most of a second

        self._stopped.clear()
        self._openai = openai
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=self.url,
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=_watched(self._before, _checked),
        )
        return self

    def __exit__(self, *_) -> None:
        self._client.close()

    def stop(self) -> None:
        """Send nothing more; who is about to gets `CancelledError`. Lasts until entered again."""
        self._stopped.set()

    def reply(self, text: str) -> Reply:
        """What the model answers to a text; `InputError` that says why there is no answer."""
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "user", "content": text}],
                temperature=self.temperature,
            )
        except self._openai.OpenAIError as error:  # says more than people may read: the key
            raise InputError(self._failure(error)) from None
        found = _completion(raw.http_response)
        assert found is not None
        said = self._secretless(found.text), found.finish_reason, self._secretless(found.model)
        return Reply(*said, *found[3:])

    def _before(self) -> None:
        """Wait until a request may leave."""
        with self._lock:
            if self._stopped.is_set():
                raise CancelledError
            if self._most is not None and self.sent >= self._most:
                raise InputError(f"max_requests={self._most}: so many are sent")
            self.sent += 1
            at = max(self._next, time.monotonic())
            self._next = at + self.apart
        if self._stopped.wait(at - time.monotonic()):
            raise CancelledError

    def _failure(self, error: Any) -> str:
        """Why there is no answer, on one line, and the remedy."""
        retried = int(error.request.headers.get("x-stainless-retry-count", 0))
        again = f", and {retried} retries did not help" if retried else ""
        if isinstance(error, self._openai.APITimeoutError):
            return f"{self.url}: no answer within {self.timeout:g} s{again}; raise timeout"
        if isinstance(error, self._openai.APIStatusError):
            meaning = _meaning(error.response, again)
            return f"{self.url}: {meaning} (model {self.model}; {self._shown(error.response)})"
        cause = _root(error)
        why = self._printable(f"{type(cause).__name__}: {cause}")
        if isinstance(cause, UNREACHABLE):
            return f"{self.url}: cannot be reached; is {URL} right, and the server up? ({why})"
        return f"{self.url}: the connection broke{again} ({why})"

    def _shown(self, response: Any) -> str:
        """What the server says of an error."""
        status = "200" if response.status_code == NO_COMPLETION else response.status_code
        said = _error(response).get("message") or response.text or "no reason given"
        return f"{status}: {self._printable(str(said))}"

    def _printable(self, said: str) -> str:
        plain = "".join(c if c.isprintable() else " " for c in said.replace(self._key, "***"))
        return " ".join(plain.split())[:SAID]

    def _secretless(self, text: str) -> str:
        # A local server takes any word for a key, and any word may stand in an answer.
        return text.replace(self._key, "***") if len(self._key) >= 8 else text


def _url() -> str:
    url = os.environ.get(URL, "").strip() or OFFICIAL
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none
        good = False
    if not good:  # which is not shown: it may hold a password
        raise InputError(f"{URL}: is no URL; set it to one such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:  # a user is sent in the key's place
        raise InputError(f"{URL}: must end with its path, and hold no user; the key is {KEY}'s")
    return url


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise InputError(f"{KEY}: is not set; set it to the server's key (a local one takes any)")
    if not all("!" <= character <= "~" for character in key):
        raise InputError(f"{KEY}: holds a space or a character that no key has; set it anew")
    return key


def _watched(before: Callable[[], None], checked: Callable[[Any], Any]) -> Any:
    """The client's own HTTP client, which asks before each request and looks at each response."""
    import openai

    class Watched(openai.DefaultHttpxClient):
        def send(self, request, **options):
            before()
            try:
                return checked(super().send(request, **options))
            except Exception as error:
                if isinstance(_root(error), UNREACHABLE):  # which the client does not retry then
                    raise openai.APIConnectionError(request=request) from error
                raise

    return Watched()


def _checked(response: Any) -> Any:
    """The response, marked for the client: what is no answer is retried, an empty purse is not."""
    if response.is_success and _completion(response) is None:
        response.status_code = NO_COMPLETION
    elif _out_of_budget(response):
        response.headers["x-should-retry"] = "false"
    return response


def _completion(response: Any) -> Reply | None:
    """The reply that a response holds; None where its body is no chat completion."""
    try:
        body = json.loads(response.content)
        choice = body["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
        model, usage = body.get("model"), body.get("usage") or {}
        tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    if not isinstance(text, str | None):
        return None
    words = [_plain(word) if isinstance(word, str) else "" for word in (text, reason, model)]
    counted = [count if type(count) is int and count >= 0 else None for count in tokens]
    return Reply(*words, *counted, response.elapsed.total_seconds())


def _plain(text: str) -> str:
    """The text without lone surrogates, which JSON can hold and no file."""
    return text.encode(errors="replace").decode()


def _out_of_budget(response: Any) -> bool:
    if response.status_code == 402:
        return True
    return response.status_code == 429 and "insufficient_quota" in _error(response).values()


def _error(response: Any) -> dict[str, Any]:
    """The error that a response's body tells, as OpenAI and those who follow it do."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    found = body.get("error", body) if isinstance(body, dict) else {}
    return found if isinstance(found, dict) else {"message": found}


def _meaning(response: Any, again: str) -> str:
    """What a status says, and what to do."""
    status = response.status_code
    if _out_of_budget(response):
        return "the account's budget is exhausted; add to it"
    if status == NO_COMPLETION:
        return f"answers without a chat completion{again}; is {URL} right?"
    if status in (401, 403):
        return f"refuses the key; set {KEY} to one that it takes"
    if status == 404:
        return f"does not know the model, or {URL} is not right"
    if status == 429:
        return f"has too many requests{again}; lower requests_per_minute or concurrency"
    if status >= 500 or status in (408, 409):
        return f"fails{again}"
    return "refuses the model or what it is asked"


def _root(error: BaseException) -> BaseException:
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
