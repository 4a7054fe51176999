"""From a pair of texts to token ids: one tokenisation, one truncation, one place.

Prompt and response are tokenised apart and joined as ids, so that no token straddles
the boundary; there is no BOS, and EOS is appended to every response before truncation
(the official DPO code's order). What comes out is a `TokenStore`: one flat, memory-mapped
array with an index, kept on disk under a key made of everything that shaped it.

Left out: what the rows of a batch look like (`batching`), and which row of a file is
good (`pairs`).
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxdpo import InputError
from jaxdpo.pairs import Pair
from jaxdpo.records import read_json

TRUNCATIONS = ("official", "official_keep_end", "keep_start", "keep_end", "drop")
FORMAT_VERSION = 1  # part of every key: raise it when the stored ids would differ


class Limits(NamedTuple):
    """How long an example may be, and what gives when it is longer.

    `truncation` is one of

    - "official": the rules of the official DPO code. If prompt and longer response exceed
      `max_length`, the prompt is cut to its first `max_prompt_length` tokens; if they
      still do, both responses are cut to `max_length - max_prompt_length`, even where the
      prompt is shorter than its share. A cut response loses its EOS.
    - "official_keep_end": the same, keeping the prompt's *last* tokens, as that code does
      for Anthropic HH.
    - "keep_start", "keep_end": the prompt is cut by no more than is needed, and not below
      `max_prompt_length`; then a response is cut to the room that is left to it.
    - "drop": an example that does not fit is left out and counted.
    """

    max_length: int
    max_prompt_length: int | None
    truncation: str

    def check(self) -> None:
        """Raise `InputError` for a limit that cannot hold or has no effect."""
        if self.truncation not in TRUNCATIONS:
            raise InputError(
                f"truncation: {self.truncation!r} is unknown; choose from {', '.join(TRUNCATIONS)}"
            )
        if self.truncation == "drop":
            if self.max_prompt_length is not None:
                raise InputError(
                    "max_prompt_length: has no effect with truncation='drop'; set it to None"
                )
        elif self.max_prompt_length is None or not 0 < self.max_prompt_length < self.max_length:
            raise InputError(
                f"max_prompt_length: must lie between 1 and max_length - 1 = "
                f"{self.max_length - 1}, not {self.max_prompt_length}"
            )


@dataclass(frozen=True)
class TokenReport:
    """What tokenisation did to a data set, as counts of examples.

    `prompts_cut` and `responses_cut` lost tokens to the limits, `eos_lost` have a response
    without its EOS, `dropped` did not fit, `empty` had a prompt or response without
    tokens (these two are left out; their source lines are listed), `identical` have
    chosen equal to rejected once cut, and teach nothing.
    """

    examples: int
    prompts_cut: int
    responses_cut: int
    eos_lost: int
    identical: int
    dropped: list[int]
    empty: list[int]
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.examples} examples, {self.tokens} tokens; cut: {self.prompts_cut} prompts, "
            f"{self.responses_cut} with a cut response, {self.eos_lost} lost an EOS; "
            f"dropped: {len(self.dropped)} too long, {len(self.empty)} empty; "
            f"{self.identical} with chosen equal to rejected"
        )


class Example(NamedTuple):
    """One tokenised example; `rejected` is empty for SFT."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True)
class TokenStore:
    """Tokenised examples in one flat array: `store[i]` is the i-th `Example`.

    `lengths` [n, 3] holds the number of tokens of prompt, chosen and rejected, `lines`
    [n] the line of the source that example came from, `key` the hash of all that shaped
    the ids.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    key: str
    report: TokenReport

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        prompt, chosen, rejected = self.lengths[index]
        start = self.starts[index]
        ids = np.asarray(self.tokens[start : start + prompt + chosen + rejected], np.int32)
        return Example(ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :])

    @cached_property
    def scored_offsets(self) -> np.ndarray:
        """Where each example's scored tokens start in a flat array of them all, [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths[:, 1] + self.lengths[:, 2])])

    @cached_property
    def has_pairs(self) -> bool:
        """Whether the examples have a rejected response."""
        return bool(self.lengths[:, 2].any())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`-like file, or of a folder with tokenizer files.

    Special tokens written out in a text are tokenised as the plain characters they are:
    user text can never produce a real EOS. Padding and truncation stored in the file are
    switched off. Raises `InputError` if there is no such file or it is no tokenizer.
    """
    file = Path(path)
    if file.is_dir() and (file / "tokenizer.json").is_file():
        file = file / "tokenizer.json"
    if not file.is_file() and not (file / "vocab.json").is_file():
        raise InputError(f"{file}: no tokenizer there; give a tokenizer.json or its folder")
    try:
        tokenizer = _vocab_and_merges(file) if file.is_dir() else Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises a bare Exception
        raise InputError(f"{file}: not a tokenizer file ({error})") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _vocab_and_merges(folder: Path) -> Tokenizer:
    """The tokenizer of a folder from before tokenizer.json, as transformers reads it."""
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer


def eos_id(tokenizer: Tokenizer, eos_token: str = "<|endoftext|>") -> int:
    """The id of the token that ends a response; `InputError` if the tokenizer has none."""
    token_id = tokenizer.token_to_id(eos_token)
    if token_id is None:
        raise InputError(f"eos_token: {eos_token!r} is not in the tokenizer's vocabulary")
    return token_id


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt's or a response's text, nothing added.

    Raises `InputError` for a text that the tokenizer cannot spell.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the Rust side raises a bare Exception, or one for odd strings
        cause = str(error).partition("\n")[0]
        raise InputError(f"the tokenizer cannot encode the text ({cause})") from error


def num_tokens(tokenizer: Tokenizer) -> int:
    """How many ids a text can be made of; what a model has beyond them is padding."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, source: str | Path) -> None:
    """Raise `InputError` where the tokenizer (of `source`) has ids that the model has not."""
    if num_tokens(tokenizer) > vocab_size:
        raise InputError(
            f"tokenizer: {source} has ids up to {num_tokens(tokenizer) - 1}, but the model's "
            f"vocabulary holds {vocab_size}; use the tokenizer the model was made with"
        )


def truncate(example: Example, limits: Limits) -> Example | None:
    """The example within `limits` (EOS already appended), or None if it is dropped.

    >>> ids = np.arange(20)
    >>> limits = Limits(max_length=10, max_prompt_length=5, truncation="official")
    >>> [len(part) for part in truncate(Example(ids[:3], ids[:10], ids[:3]), limits)]
    [3, 5, 3]
    """
    prompt, chosen, rejected = example
    longer = max(len(chosen), len(rejected))
    excess = len(prompt) + longer - limits.max_length
    if excess <= 0:
        return example
    if limits.truncation == "drop":
        return None
    kept = min(len(prompt), limits.max_prompt_length)
    if not limits.truncation.startswith("official"):
        kept = max(kept, len(prompt) - excess)
    keep_end = limits.truncation.endswith("keep_end")
    prompt = prompt[len(prompt) - kept :] if keep_end else prompt[:kept]
    if kept + longer > limits.max_length:
        official = limits.truncation.startswith("official")
        room = limits.max_length - (limits.max_prompt_length if official else kept)
        chosen, rejected = chosen[:room], rejected[:room]
    return Example(prompt, chosen, rejected)


def tokenize(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    eos: int,
    limits: Limits,
    folder: str | Path,
) -> TokenStore:
    """The token store of `pairs`, read from `folder` if it is there, else made and kept.

    A store lives in `folder/<key>`; the key is the SHA-256 of the texts, the tokenizer,
    the limits and the format, so a changed input can only miss, never be served stale.
    Raises `InputError` if nothing is left to train on, if a text holds the EOS id, or if what is
    in `folder` is not what was written there.
    """
    limits.check()
    key = _key(pairs, tokenizer, eos, limits)
    path = Path(folder) / key
    if not path.is_dir():
        _write(path, *_tokenized(pairs, tokenizer, eos, limits))
    return _open(path)


def _key(pairs: Iterable[Pair], tokenizer: Tokenizer, eos: int, limits: Limits) -> str:
    digest = hashlib.sha256()
    settings = {"version": FORMAT_VERSION, "eos": eos, **limits._asdict()}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer.to_str().encode())
    for pair in pairs:
        digest.update(json.dumps(pair).encode())
    return digest.hexdigest()[:32]


def _tokenized(
    pairs: Sequence[Pair], tokenizer: Tokenizer, eos: int, limits: Limits
) -> tuple[list[Example], list[int], TokenReport]:
    counts = dict(prompts_cut=0, responses_cut=0, eos_lost=0, identical=0)
    dropped, empty, examples, lines = [], [], [], []
    for pair in pairs:
        whole = _encoded(pair, tokenizer, eos)
        if min(len(whole.prompt), len(whole.chosen) - 1) == 0 or len(whole.rejected) == 1:
            empty.append(pair.line)
            continue
        example = truncate(whole, limits)
        if example is None:
            dropped.append(pair.line)
            continue
        cut = [len(now) < len(was) for now, was in zip(example, whole, strict=True)]
        counts["prompts_cut"] += cut[0]
        counts["responses_cut"] += cut[1] or cut[2]
        counts["eos_lost"] += cut[1] or cut[2]
        counts["identical"] += np.array_equal(example.chosen, example.rejected)
        examples.append(example)
        lines.append(pair.line)
    if not examples:
        raise InputError(
            f"no example is left of {len(pairs)}: {len(dropped)} too long for max_length="
            f"{limits.max_length}, {len(empty)} empty; raise max_length or choose a truncation"
        )
    total = sum(len(part) for example in examples for part in example)
    report = TokenReport(len(examples), **counts, dropped=dropped, empty=empty, tokens=total)
    return examples, lines, report


def _encoded(pair: Pair, tokenizer: Tokenizer, eos: int) -> Example:
    parts = []
    for text in (pair.prompt, pair.chosen, pair.rejected):
        try:
            ids = [] if text is None else text_ids(text, tokenizer)
        except InputError as error:
            raise InputError(f"line {pair.line}: {error}") from error
        if eos in ids:
            raise InputError(
                f"line {pair.line}: the text itself encodes to the EOS id {eos}; remove that row, "
                "or use a tokenizer whose EOS no text can spell"
            )
        parts.append(np.asarray(ids, np.int32))
    prompt, chosen, rejected = parts
    end = np.array([eos], np.int32)
    rejected = rejected if pair.rejected is None else np.concatenate([rejected, end])
    return Example(prompt, np.concatenate([chosen, end]), rejected)


def _write(path: Path, examples: list[Example], lines: list[int], report: TokenReport) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    lengths = np.array([[len(part) for part in example] for example in examples], np.int64)
    flat = np.concatenate([part for example in examples for part in example])
    starts = np.concatenate([[0], np.cumsum(lengths.sum(1))[:-1]])
    np.save(building / "tokens.npy", flat.astype(np.uint16 if flat.max() < 2**16 else np.uint32))
    np.save(building / "index.npy", np.column_stack([starts, lengths, lines]).astype(np.int64))
    record = {"report": asdict(report), "sha256": _checksum(building, asdict(report))}
    (building / "report.json").write_text(json.dumps(record))
    try:
        building.rename(path)
    except OSError:  # another process finished the same store first; theirs is identical
        if not path.is_dir():
            raise
        shutil.rmtree(building)


def _open(path: Path) -> TokenStore:
    try:
        record = read_json(path / "report.json")
        if _checksum(path, record["report"]) != record["sha256"]:
            raise InputError("its bytes have changed since they were written")
        index, report = np.load(path / "index.npy"), TokenReport(**record["report"])
        tokens = np.load(path / "tokens.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: these tokens cannot be trusted ({error}); delete that folder to have them "
            "made again"
        ) from error
    starts, lengths, lines = index[:, 0], index[:, 1:4], index[:, 4]
    return TokenStore(tokens, starts, lengths, lines, path.name, report)


def _checksum(folder: Path, report: Any) -> str:
    digest = hashlib.sha256(json.dumps(report).encode())
    for name in ("tokens.npy", "index.npy"):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
