"""What a model says while it trains: greedy completions of a few evaluation prompts.

Curves say that a model got better; its text says at what. Left out: any other decoding of a
trained model (`completions`).
"""

import dataclasses
import math
from collections.abc import Iterator
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
from jaxdpo.records import Record
from jaxdpo.tokens import TokenStore


@dataclasses.dataclass(frozen=True)
class Hearing:
    """Hears what parameters say to `prompts`, which are token ids.

    A record has `step`, `prompt`, `text` (without the end token),
    `ended` (by an end token) and `logps`, the log-probability of the text and its end token.
    """

    name: str  # of the stage
    model: PythiaConfig
    mesh: Mesh
    tokenizer: Tokenizer
    prompts: list[list[int]]
    constraints: decoding.Constraints

    def records(self, step: int, params: Any) -> list[Record]:
        """A record for each prompt; they are shown on the console too."""
        records = list(self._records(step, params))
        for record in records:
            said = record["text"].replace("\n", "⏎") + ("" if record["ended"] else "…")
            before = f"{self.name} {step}: {tail(record['prompt'])} ▸"
            console.print(Text.assemble(before, (said, "bold")))
        return records

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


def check_room(key: str, most: int, store: TokenStore, model: PythiaConfig) -> None:
    """Raise `InputError`, naming the key, where so many tokens have no room after a prompt."""
    longest = int(store.lengths[:, 0].max())
    if longest + most > model.max_positions:
        raise InputError(
            f"{key}: {most} more than the {longest} of a prompt are over the model's "
            f"{model.max_positions} positions"
        )


def first_prompts(store: TokenStore, count: int) -> list[list[int]]:
    """The ids of the first `count` prompts that differ, or of as many as there are."""
    found: dict[tuple[int, ...], None] = {}
    for index in range(len(store)):
        if len(found) == count:
            break
        found[tuple(store[index].prompt.tolist())] = None
    return [list(prompt) for prompt in found]
