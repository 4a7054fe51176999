"""A chat server on this machine, whose answers and faults are known beforehand.

It answers by a rule from prompt to reply, and misbehaves as a plan says; what came is counted.
"""

import contextlib
import json
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

SUMMARIES = re.compile(r"\nSummary A:\n(.*)\n\nSummary B:\n(.*)\n\nFIRST provide", re.DOTALL)
FAULTS = ("429", "500", "503", "slow", "cut", "broken", "choiceless", "format")  # which pass
ERRORS = {  # name -> (status, message, code)
    "401": (401, "Incorrect API key provided: {key}.", "invalid_api_key"),
    "403": (403, "Not for the key {key}", "forbidden"),
    "400": (400, "model `nope` is not served", "bad_request"),
    "404": (404, "The model `nope` does not exist", "model_not_found"),
    "402": (402, "Insufficient balance", "payment_required"),
    "quota": (429, "You exceeded your current quota", "insufficient_quota"),
    "429": (429, "Slow down", "rate_limit_exceeded"),
    "500": (500, "The server had an error", "server_error"),
    "503": (503, "Overloaded", "overloaded"),
}


def longer(prompt: str) -> str:
    """Prefers the longer summary, and the first of two that are as long."""
    first, second = SUMMARIES.search(prompt).groups()
    choice = "A" if len(first) >= len(second) else "B"
    return f"Comparison: {choice} has {max(len(first), len(second))} letters.\nPreferred: {choice}"


def plan(seed: int, share: float, faults: tuple[str, ...] = FAULTS):
    """A fault, or none, for the n-th time that a prompt comes: the same in any order of prompts."""

    def fault(prompt: str, times: int) -> str | None:
        rng = np.random.default_rng([seed, times, zlib.crc32(prompt.encode())])
        return str(rng.choice(faults)) if rng.random() < share else None

    return fault


class ChatServer:
    """The server, on a port of its own for as long as the block runs.

    `came` counts the requests for each prompt, `answered` the whole and right answers, `faults` all
    answers by what was wrong with them (None: nothing); `at` are the times of the requests. A
    fault is a name of `FAULTS` or `ERRORS`, "page" (a web page) or "late" (right, but slow).
    """

    def __init__(
        self,
        rule: Callable[[str], str] = longer,
        fault: Callable[[str, int], str | None] = lambda prompt, times: None,
        *,
        seconds: float = 0.0,
        slow: float = 1.5,
        usage: bool = True,
        finish_reason: str = "stop",
        retry_after: str = "0",
    ):
        self.rule, self.fault, self.usage, self.finish_reason = rule, fault, usage, finish_reason
        self.seconds, self.slow, self.retry_after = seconds, slow, retry_after
        self.came, self.answered, self.faults = Counter(), Counter(), Counter()
        self.at, self.keys = [], set()
        self.now = self.most_at_once = 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    def __enter__(self) -> "ChatServer":
        handler = type("Handler", (_Handler,), {"chat": self})
        self._http = _Quiet(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def completion(self, prompt: str, reply: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-0601"}
        body["choices"] = [choice]
        if self.usage:
            sizes = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(reply.split())}
            body["usage"] = sizes | {"total_tokens": sum(sizes.values())}
        return body


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_) -> None:
        """Clients that hang up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 20
    chat: ChatServer

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        chat = self.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with chat.lock:
            chat.at.append(time.monotonic())
            chat.keys.add(self.headers["Authorization"])
            chat.came[prompt] += 1
            fault = chat.fault(prompt, chat.came[prompt])
            chat.faults[fault] += 1
            chat.now += 1
            chat.most_at_once = max(chat.most_at_once, chat.now)
        try:
            chat.closing.wait({"slow": chat.slow, "late": 0.2}.get(fault, chat.seconds))
            with contextlib.suppress(ConnectionError):
                self._answer(prompt, fault)
        finally:
            with chat.lock:
                chat.now -= 1

    def _answer(self, prompt: str, fault: str | None) -> None:
        chat = self.chat
        if not self.path.endswith("/v1/chat/completions"):
            self._send(404, b"<html>no such page</html>", "text/html")
        elif fault in ERRORS:
            status, said, code = ERRORS[fault]
            said = said.format(key=self.headers["Authorization"].removeprefix("Bearer "))
            error = {"error": {"message": said, "type": code, "code": code}}
            self._send(status, json.dumps(error).encode())
        elif fault == "choiceless":
            self._send(200, b'{"id": "1", "object": "chat.completion", "choices": []}')
        elif fault == "page":
            self._send(200, b"<html>welcome</html>", "text/html")
        else:
            reply = "I prefer A." if fault == "format" else chat.rule(prompt)
            text = json.dumps(chat.completion(prompt, reply)).encode()
            if fault == "broken":
                return self._send(200, text[:-20])
            if fault == "cut":
                return self._send(200, text, whole=False)
            if fault is None:  # before the client can know, so that nothing is counted late
                with chat.lock:
                    chat.answered[prompt] += 1
            self._send(200, text)

    def _send(self, status: int, text: bytes, kind="application/json", whole=True) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        if status == 429:
            self.send_header("Retry-After", self.chat.retry_after)
        self.end_headers()
        self.wfile.write(text if whole else text[: len(text) // 2])
        self.wfile.flush()
        self.close_connection = self.close_connection or not whole
