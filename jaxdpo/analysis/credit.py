"""Which tokens a policy rewards: the implicit reward of every token of given responses.

A heat map as in 2404.12358, Figure 1, as a page and as a picture, and all of its numbers in a
file. Where the responses come from, and how spans are marked in them, is said in `marked`. Left
out: how well the rewards find what is wrong (`credit_benchmark`).
"""

import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from jaxdpo import InputError, runs, sharding
from jaxdpo.analysis import heat_map, marked, page
from jaxdpo.analysis.token_scores import (
    Piece,
    marked_tokens,
    noise_floor,
    pieces,
    token_logps,
    whole_store,
)
from jaxdpo.language_models import LanguageModel, check_same_vocabulary, language_model
from jaxdpo.pairs import Pair
from jaxdpo.qfunction import token_rewards
from jaxdpo.records import Record, write_json
from jaxdpo.tokens import TokenStore

ROWS_READ = 4  # of a data set, if no limit is given
TOP = 12  # tokens of the printed table


def write(
    *,
    run: str | None = None,
    model: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    dtype: str | None = None,
    data: str | None = None,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    examples: str | None = None,
    out: str | None = None,
) -> list[Any]:
    """Write `credit.json`, `credit.html` and `credit.png` into `out`; returns what to print.

    The responses are those of a data set (`data`, its first four rows unless `limit` says so)
    or of a file of `examples`; see `marked`. A `run` gives the models, beta, data and `out`
    that are not given. Raises `InputError` for what is missing, wrong or without effect.
    """
    given = {"model": model, "reference": reference, "beta": beta, "out": out}
    source = {"data": data, "examples": examples, "format": format, "split": split, "limit": limit}
    if run is not None:
        given, source = _filled(run, given, source)
    for name, value in given.items():
        if value is None:
            raise InputError(f"{name}: is missing; give it, or a run to take it from")
    if not 0 < given["beta"] < math.inf:
        raise InputError(f"beta={given['beta']}: must be above 0; give that of the training")
    items, report = _items(**source)
    into, mesh = folder(given["out"]), sharding.make_mesh()
    models = [language_model(given[role], mesh, dtype=dtype) for role in ("model", "reference")]
    read = str(source["data"] or source["examples"])
    record = credit(*models, items, beta=given["beta"], source=read)
    return report + _written(record, into)


def credit(
    policy: LanguageModel,
    reference: LanguageModel,
    items: Sequence[marked.Item],
    *,
    beta: float,
    source: str,
) -> Record:
    """The rewards of every token of the items' responses, EOS included, as a JSON object.

    `reward` of a token is beta (log pi - log pi_ref) (2404.12358, Eq. 10-11), of a response or a
    span the sum of its tokens'. `noise_floor` is how far rounding alone can move a token's
    reward: beta times what it does to the log-probabilities of both models. `source` says where
    the items are from. Raises `InputError` for models that do not go together, and names the
    response that cannot be scored.
    """
    check_same_vocabulary([policy, reference])
    room = min(one.lm.model.config.max_positions for one in (policy, reference))
    asked = [(item.prompt, response) for item in items for response in item.responses]
    read = [_read(prompt, response, policy) for prompt, response in asked]
    pairs = [Pair(prompt, one.text, None, line) for line, (prompt, one) in enumerate(asked)]
    place = lambda line: asked[line][1].place
    store = whole_store(pairs, policy.tokenizer, policy.eos_ids[0], room, named=place)
    models, values = _scored(policy, reference, store, beta)
    told = zip(asked, read, values, strict=True)
    responses = (_response(one, *found, numbers) for (_, one), found, numbers in told)
    return {
        "source": source,
        "models": models,
        "beta": beta,
        "noise_floor": beta * sum(model["noise_floor"] for model in models.values()),
        "items": [
            {"name": item.name, "prompt": item.prompt}
            | {"responses": list(itertools.islice(responses, len(item.responses)))}
            for item in items
        ],
    }


def folder(out: str | Path) -> Path:
    """The folder `out`, made if need be; `InputError` if it cannot be written into."""
    made = Path(out)
    try:
        made.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=made).close()
    except OSError as error:
        raise InputError(f"out={out}: cannot be written into ({error.strerror})") from error
    return made


def section(record: Record) -> Markup:
    """The heat maps of a record of `credit`, as a part of a page."""
    return page.macros("credit.html").credit(record, heat_map)


def _filled(
    run: str, given: dict[str, Any], source: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is given, and from the run what is not."""
    roles = runs.roles(run)
    if not (source["data"] or source["examples"]):
        if roles.data is None:
            raise InputError(f"{run}: has no file of pairs for evaluation; give data or examples")
        source = source | {"data": roles.data, "format": source["format"] or roles.format}
    elif None not in given.values():
        raise InputError("run: has no effect where all else is given; leave it out")
    own = {"model": roles.policy, "reference": roles.reference, "beta": roles.beta, "out": run}
    return own | {name: value for name, value in given.items() if value is not None}, source


def _items(
    data: str | None, examples: str | None, **about: Any
) -> tuple[list[marked.Item], list[str]]:
    """The responses of the one source that there is, and what to print about it."""
    if bool(data) == bool(examples):
        raise InputError("give either data or examples, or a run to take data from")
    about = {name: value for name, value in about.items() if value is not None}
    if data:
        items, report = marked.from_data(data, **{"limit": ROWS_READ} | about)
        return items, [str(report)]
    for name in about:
        raise InputError(f"{name}: has no effect on examples, only on data; leave it out")
    return marked.from_file(examples), []


def _written(record: Record, folder: Path) -> list[Any]:
    files = {kind: folder / f"credit.{kind}" for kind in ("json", "html", "png")}
    write_json(files["json"], record)
    html = page.page(
        "Credit: the reward of every token", [page.Section("Heat maps", section(record))]
    )
    files["html"].write_text(html, encoding="utf-8")
    left_out = heat_map.draw(record, files["png"])
    said = [f"wrote {', '.join(map(str, files.values()))}"]
    if left_out:
        said.append(f"the picture shows {heat_map.MOST} prompts; {left_out} more are on the page")
    return [_largest(record), *said]


def _largest(record: Record) -> Table:
    """The tokens with the largest rewards by their size."""
    found = [
        (token, response, item)
        for item in record["items"]
        for response in item["responses"]
        for token in heat_map.cells(response, top=1.0, noise_floor=record["noise_floor"])
    ]
    found.sort(key=lambda one: -abs(one[0].token["reward"]))
    table = Table("where", "response", "token", title=f"largest of {len(found)} token rewards")
    for name in ("reward", "log pi", "log pi_ref"):
        table.add_column(name, justify="right")
    table.add_column("marked")
    for cell, response, item in found[:TOP]:
        numbers = (cell.token[name] for name in ("reward", "logp", "reference_logp"))
        span = cell.token["span"]
        label = "" if span is None else response["spans"][span]["label"] or "yes"
        words = item["name"], response["name"], cell.text
        table.add_row(*map(Text, words), *(f"{number:.3f}" for number in numbers), Text(label))
    below = sum(cell.noise for cell, _, _ in found)
    table.caption = f"noise floor {record['noise_floor']:.2g}: {below} of {len(found)} are below it"
    return table


def _read(
    prompt: str, response: marked.Response, model: LanguageModel
) -> tuple[list[Piece], list[int]]:
    """The pieces of a response, EOS included, and the span of each; -1: none.

    `InputError` names the place of a response that is wrong.
    """
    place = response.place
    try:
        before, found = (pieces(text, model.tokenizer) for text in (prompt, response.text))
        spans = [mark.span for mark in response.marks]
        spans = marked_tokens(response.text, spans, model.tokenizer)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if {piece.id for piece in before + found} & set(model.eos_ids):
        raise InputError(f"{place}: the text itself holds an end token; take it out")
    marked.check(response, spans, [piece.text for piece in found])
    end = Piece(model.eos_ids[0], model.tokenizer.id_to_token(model.eos_ids[0]), None)
    return [*found, end], [*spans.tolist(), -1]


def _scored(
    policy: LanguageModel, reference: LanguageModel, store: TokenStore, beta: float
) -> tuple[dict[str, Record], list[np.ndarray]]:
    """What the models are, and of each example [3, T] rewards and log-probabilities of both."""
    known, logps = {}, []
    for role, model in (("policy", policy), ("reference", reference)):
        logps.append(token_logps(model, store, label=f"credit, {role}"))
        noise = noise_floor(model, store, logps[-1])
        known[role] = {"name": model.name, "step": model.step, "noise_floor": noise}
        known[role] |= model.identity
    rewards = token_rewards(*map(jnp.asarray, logps), beta=beta)
    values = np.stack([np.asarray(rewards), *logps])
    return known, np.split(values, store.scored_offsets[1:-1], axis=1)


def _response(
    response: marked.Response, found: Sequence[Piece], spans: Sequence[int], values: np.ndarray
) -> Record:
    """A response's record; `found`, `spans` and the [3, T] values are of its tokens and EOS."""
    tokens = [_token(*one) for one in zip(found, spans, values.T, strict=True)]
    sums = dict.fromkeys([None, *range(len(response.marks))], 0.0)
    for token in tokens:
        sums[token["span"]] += token["reward"]
    of_spans = [sums[number] for number in range(len(response.marks))]
    return {
        "name": response.name,
        "text": response.text,
        "tokens": tokens,
        "reward": sum(sums.values()),
        "marked_reward": sum(of_spans),
        "spans": [
            mark.span._asdict() | {"reward": reward}
            for mark, reward in zip(response.marks, of_spans, strict=True)
        ],
    }


def _token(piece: Piece, span: int, values: np.ndarray) -> Record:
    reward, logp, reference_logp = (float(str(number)) for number in values)  # fewest digits
    return {
        "piece": piece.text,
        "id": piece.id,
        "part": piece.part and piece.part._asdict(),
        "reward": reward,
        "logp": logp,
        "reference_logp": reference_logp,
        "span": None if span < 0 else span,
    }
