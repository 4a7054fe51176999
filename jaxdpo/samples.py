"""What a model says while it trains: greedy completions of a few evaluation prompts.

Curves say that a model got better; its text says at what. Left out: any other decoding of a
trained model (`completions`).
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.text import Text
from tokenizers import Tokenizer

from jaxdpo import InputError, decoding
from jaxdpo.completions import completion, memory, rows_of
from jaxdpo.metrics import console
from jaxdpo.prompts import tail
from jaxdpo.pythia_cache import decoding_params
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import Record, cut_log, line
from jaxdpo.tokens import TokenStore


@dataclasses.dataclass(frozen=True)
class Hearing:
    """Called with a step and parameters: hears what they say, and appends it to `file`.

    `prompts` are token ids. A record has `step`, `prompt`, `text` (without the end token),
    `ended` (by an end token) and `logps`, the log-probability of the text and its end token.
    """

    name: str  # of the stage
    file: Path
    model: PythiaConfig
    mesh: Mesh
    tokenizer: Tokenizer
    prompts: list[list[int]]
    constraints: decoding.Constraints

    def check(self) -> None:
        """Raise `InputError` where a completion has no room after the longest prompt."""
        longest, most = max(map(len, self.prompts)), self.constraints.max_new_tokens
        if longest + most > self.model.max_positions:
            raise InputError(
                f"{self.name}.sample_tokens: {most} more than the {longest} of a prompt are over "
                f"the model's {self.model.max_positions} positions"
            )

    def cut(self, after: int) -> None:
        """Forget what was said past a step that training goes on from, and all before step 1."""
        if self.file.exists():
            cut_log(self.file, lambda record: 0 < after and record["step"] <= after)

    def __call__(self, step: int, params: Any) -> None:
        records = list(self._records(step, params))
        with open(self.file, "a", encoding="utf-8") as log:
            log.writelines(map(line, records))
        for record in records:
            said = record["text"].replace("\n", "⏎") + ("" if record["ended"] else "…")
            before = f"{self.name} {step}: {tail(record['prompt'])} ▸"
            console.print(Text.assemble(before, (said, "bold")))

    def _records(self, step: int, params: Any) -> Iterator[Record]:
        found = decoding.greedy(
            decoding.LM(*decoding_params(self.model, params, self.mesh)),
            self.prompts,
            self.constraints,
            batch_size=rows_of(self.mesh, len(self.prompts)),
            mesh=self.mesh,
            memory_limit=memory(self.mesh),
        )
        for prompt, hypothesis in zip(self.prompts, found, strict=True):
            said = completion(hypothesis, self.tokenizer)
            yield {
                "step": step,
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=False),
                "text": said["text"],
                "ended": said["ended"],
                "logps": said["logps"] if math.isfinite(said["logps"]) else None,
            }


def first_prompts(store: TokenStore, count: int) -> list[list[int]]:
    """The ids of the first `count` prompts that differ, or of as many as there are."""
    found: dict[tuple[int, ...], None] = {}
    for index in range(len(store)):
        if len(found) == count:
            break
        found[tuple(store[index].prompt.tolist())] = None
    return [list(prompt) for prompt in found]
