"""Token rewards add up to what training optimises, each with its token; mistakes are named."""

import functools
import io
import json

import jax
import numpy as np
import pytest
from html_document import Document
from rich.console import Console
from speakers import MODEL, TEXTS, checkpoint
from test_token_scores import all_logps, bytes_tokenizer

from jaxdpo import InputError, convert, losses, runs, sharding, step, synthetic
from jaxdpo.analysis import credit, marked
from jaxdpo.analysis.token_scores import token_logps, whole_store
from jaxdpo.batching import Batches
from jaxdpo.language_models import language_model
from jaxdpo.pairs import read_pairs
from jaxdpo.pythia import init_params
from jaxdpo.records import read_json

BETA = 0.1
TASK = synthetic.Task(facts=1, stated=1, distractors=1, fillers=0, errors=(1, 1))
MARKED = {
    "prompt": TEXTS[0],
    "responses": [
        {
            "name": "both",
            "text": TEXTS[1] + TEXTS[3],
            "spans": [
                {"char_start": 8, "char_end": 11, "label": "feeling"},
                {"char_start": 45, "char_end": 50, "tokens": [" Cairo"]},
            ],
        },
        {"name": "short", "text": TEXTS[2]},
    ],
}


initial = jax.jit(functools.partial(init_params, MODEL))


def saved(folder, seed) -> str:
    """A checkpoint with logits of a real size, so that float32 has them to 1e-5."""
    params = initial(jax.random.key(seed))
    params["unembedding"] *= 3
    synthetic.tokenizer().save(str(folder.with_suffix(".json")))
    convert.save_hf(folder, MODEL, params, tokenizer_from=folder.with_suffix(".json"))
    return str(folder)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return saved(folder / "policy", seed=1), saved(folder / "reference", seed=2)


@pytest.fixture(scope="module")
def models(names):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return [language_model(name, mesh) for name in names]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.write(folder, TASK, seed=0, sft_train=1, sft_test=1, pairs_train=1, pairs_test=5)
    return str(folder / "pairs_test.jsonl")


@pytest.fixture(scope="module")
def record(models, data):
    return credit.credit(*models, marked.from_data(data)[0], beta=BETA, source="test")


@pytest.fixture
def examples(tmp_path):
    def write(items):
        (tmp_path / "marked.json").write_text(json.dumps(items))
        return str(tmp_path / "marked.json")

    return write


@pytest.fixture
def write(names, tmp_path):
    models = {"model": names[0], "reference": names[1], "beta": BETA}
    return functools.partial(credit.write, **models, out=str(tmp_path / "out"))


def responses(record):
    return [response for item in record["items"] for response in item["responses"]]


def column(record, name):
    return [np.array([token[name] for token in one["tokens"]]) for one in responses(record)]


def test_token_rewards_add_up_to_the_rewards_of_training(record, models, data):
    """The objective of DPO, on rows where chosen and rejected share their prompt, says the same."""
    policy, reference = models
    store = whole_store(read_pairs(data, format="pairs")[0], policy.tokenizer, 0, 64)
    logps = token_logps(reference, store, label="reference")
    dpo = functools.partial(losses.dpo_loss, beta=BETA)
    objective = step.preference_objective(policy.lm.model.config, dpo, beta=BETA)
    batches = Batches(store, batch_size=1, reference=logps)
    evaluate = jax.jit(lambda batch: objective(policy.lm.params, batch)[2])
    for index, item in enumerate(record["items"]):
        metrics = step.means(evaluate(batches[index]))
        for response in item["responses"]:
            expected = metrics[f"rewards/{response['name']}"]
            assert response["reward"] == pytest.approx(expected, abs=1e-5)
            total = sum(token["reward"] for token in response["tokens"])
            assert response["reward"] == pytest.approx(total, abs=1e-12)
            assert abs(expected) > 1e-2  # so that a wrong token would show


def aligned(record, params, prompts) -> bool:
    """Whether each token has the log-probability that one plain pass says it has in its place."""
    tokenizer = synthetic.tokenizer()
    for prompt, response in zip(prompts, responses(record), strict=True):
        before, ids = tokenizer.encode(prompt).ids, [token["id"] for token in response["tokens"]]
        row = np.zeros((1, 64), np.int32)
        row[0, : len(before) + len(ids)] = before + ids
        logs = np.asarray(all_logps(params, row))
        expected = [logs[len(before) + at - 1, token] for at, token in enumerate(ids)]
        found = [token["logp"] for token in response["tokens"]]
        if not np.allclose(found, expected, atol=1e-5):  # float32
            return False
    return True


SHIFTS = {
    "none": lambda logps: logps,
    "by one to the right": lambda logps: np.roll(logps, 1),
    "by one to the left": lambda logps: np.roll(logps, -1),
    "a prompt's token counted": lambda logps: np.concatenate([[-1.0], logps[:-1]], dtype="float32"),
}


@pytest.mark.parametrize("shift", SHIFTS)
def test_each_reward_lies_with_its_token(shift, models, data, monkeypatch):
    scored = lambda *args, **kwargs: SHIFTS[shift](token_logps(*args, **kwargs))
    monkeypatch.setattr(credit, "token_logps", scored)
    items = marked.from_data(data, limit=2)[0]
    record = credit.credit(*models, items, beta=BETA, source="test")
    prompts = [item.prompt for item in items for _ in item.responses]
    assert aligned(record, models[0].lm.params, prompts) == (shift == "none")


def test_a_token_has_what_both_models_say_of_it(record):
    for reward, logp, reference in zip(
        *(column(record, name) for name in ("reward", "logp", "reference_logp")), strict=True
    ):
        np.testing.assert_allclose(reward, BETA * (logp - reference), atol=1e-6)  # float32
    for response in responses(record):
        *tokens, end = response["tokens"]
        assert "".join(token["piece"] for token in tokens) == response["text"]
        assert (end["piece"], end["id"], end["span"]) == ("<|endoftext|>", 0, None)


def test_a_model_rewards_nothing_over_itself(models, data):
    record = credit.credit(
        models[0], models[0], marked.from_data(data)[0], beta=BETA, source="test"
    )
    assert all((rewards == 0).all() for rewards in column(record, "reward"))
    html = str(credit.section(record))
    assert html.count('tabindex="0"') == html.count(", below the noise<br>")


def test_the_noise_floor_is_of_both_models(record):
    floors = [model["noise_floor"] for model in record["models"].values()]
    assert 0 < record["noise_floor"] == pytest.approx(BETA * sum(floors))
    assert max(floors) <= 1e-5 and record["models"]["policy"]["name"].endswith("policy")


def test_marked_spans_have_their_tokens_and_sums(models, examples):
    """I feel sad . I have a pet dog . My home is in Cairo . : sad is token 2, Cairo token 14."""
    record = credit.credit(*models, marked.from_file(examples([MARKED])), beta=BETA, source="test")
    both, short = responses(record)
    spans = [token["span"] for token in both["tokens"]]
    assert spans == [None, None, 0, *[None] * 11, 1, None, None]
    rewards = [token["reward"] for token in both["tokens"]]
    assert [span["reward"] for span in both["spans"]] == [rewards[2], rewards[14]]
    assert both["marked_reward"] == rewards[2] + rewards[14]
    assert both["spans"][0]["label"] == "feeling"
    assert (len(short["tokens"]), short["spans"], short["marked_reward"]) == (2, [], 0)


def test_what_is_written_can_be_read_again(write, data, tmp_path, models):
    shown = write(data=data, limit=2)
    held = read_json(tmp_path / "out/credit.json")
    direct = credit.credit(*models, marked.from_data(data, limit=2)[0], beta=BETA, source="test")
    assert held["source"] == data and [item["name"] for item in held["items"]] == [
        "line 1",
        "line 2",
    ]
    for name in ("logp", "reward"):  # rows of another mesh, float32
        for found, expected in zip(column(held, name), column(direct, name), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert json.loads(json.dumps(direct)) == direct
    document = Document((tmp_path / "out/credit.html").read_text())
    assert document.faults == [] and "line 2" in document.text
    assert (tmp_path / "out/credit.png").stat().st_size > 10_000
    out = io.StringIO()
    for part in shown:
        Console(width=200, file=out).print(part)
    said = out.getvalue()
    assert "2 rows, 2 kept" in said and "is right" in said and "credit.html" in said
    largest = max(np.concatenate(column(held, "reward")), key=abs)
    assert f"{largest:.3f}" in said


def test_any_text_is_shown_as_text(models, tmp_path, examples):
    speaks_bytes = checkpoint(tmp_path / "bytes", seed=1, tokenizer=bytes_tokenizer())
    model = language_model(speaks_bytes, sharding.make_mesh(devices=jax.devices()[:1]))
    text = "<script>\"'&é\u202e\u200b\n😀"
    items = marked.from_file(
        examples([{"prompt": "<b>", "responses": [{"name": "<i>", "text": text}]}])
    )
    record = credit.credit(model, model, items, beta=BETA, source="test")
    (response,) = responses(record)
    assert len(response["tokens"]) == len(text.encode()) + 1
    assert [token["part"] for token in response["tokens"]].count(None) == 11 + 1 + 1
    html = str(credit.section(record))
    assert not any(raw in html for raw in ("<script>", "<i>", "\u202e", "\u200b"))
    assert html.count("<b>") == 2 * len(response["tokens"])  # none but the template's own
    assert "&lt;b&gt;" in html
    assert "⟨U+202E⟩</bdi><small>1/3</small>" in html and "😀</bdi><small>4/4</small>" in html
    assert "part 1 of 2 of é" in html


def one(**change):
    return [{"prompt": "Where?", "responses": [{"name": "a", "text": " I live in Oslo."} | change]}]


@pytest.mark.parametrize(
    "items, said",
    [
        (one(text=" Atlantis"), "response 1: the tokenizer cannot encode the text"),
        ([MARKED | {"prompt": "Atlantis"}], "response 1: the tokenizer cannot encode the text"),
        (
            one(text=" I" * 70),
            "response 1: prompt and response are 72 tokens, more than 64; shorten",
        ),
        (one(spans=[{"char_start": 11, "char_end": 14}]), "response 1: span 1 .* cuts the token"),
        (one(spans=[{"char_start": 11, "char_end": 99}]), "response 1: span 1 .* outside the text"),
        (one(spans=[{"char_start": 0, "char_end": 1}]), "response 1: span 1 .* marks no token"),
        (
            one(spans=[{"char_start": 11, "char_end": 15, "tokens": [" Os", "lo"]}]),
            r"response 1, span 1: tokens should be \[' Os', 'lo'\], .* holds \[' Oslo'\]",
        ),
        (
            one(spans=[{"char_start": 2, "char_end": 6}, {"char_start": 1, "char_end": 6}]),
            r"response 1: span 2 \(1:6\) overlaps span 1",
        ),
    ],
)
def test_a_response_that_cannot_be_scored_is_named(models, examples, items, said):
    items = [{**item, "prompt": item["prompt"].replace("Where?", TEXTS[2])} for item in items]
    with pytest.raises(InputError, match=said) as raised:
        credit.credit(*models, marked.from_file(examples(items)), beta=BETA, source="test")
    assert "marked.json item 1, response 1" in str(raised.value) and "\n" not in str(raised.value)


def test_no_text_may_hold_the_end_token(models, examples):
    items = marked.from_file(examples(one()))
    model = models[0]._replace(eos_ids=(model_id(" Oslo"), 0))
    with pytest.raises(InputError, match="response 1: the text itself holds an end token"):
        credit._read(TEXTS[2], items[0].responses[0], model)


def model_id(piece):
    return synthetic.tokenizer().token_to_id(piece)


def test_models_of_other_words_are_refused(models, data):
    words = synthetic.tokenizer()
    words.add_tokens([" more"])
    other = models[1]._replace(tokenizer=words)
    with pytest.raises(InputError, match="tokenizers differ in 1 entries"):
        credit.credit(models[0], other, marked.from_data(data)[0], beta=BETA, source="test")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(), "give either data or examples, or a run"),
        (dict(data="a.jsonl", examples="b.json"), "give either data or examples"),
        (dict(examples="b.json", limit=3), "limit: has no effect on examples"),
        (dict(examples="b.json", format="pairs"), "format: has no effect on examples"),
        (dict(data="nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (dict(data="nowhere.jsonl", model=None), "model: is missing"),
        (dict(data="nowhere.jsonl", reference=None), "reference: is missing"),
        (dict(data="nowhere.jsonl", beta=None), "beta: is missing"),
        (dict(data="nowhere.jsonl", out=None), "out: is missing"),
        (dict(data="nowhere.jsonl", beta=0.0), "beta=0.0: must be above 0"),
        (dict(data="nowhere.jsonl", beta=-0.1), "beta=-0.1: must be above 0"),
        (dict(data="nowhere.jsonl", beta=float("nan")), "beta=nan: must be above 0"),
        (dict(data="nowhere.jsonl", beta=float("inf")), "beta=inf: must be above 0"),
    ],
)
def test_what_is_missing_or_without_effect_is_said(write, change, said):
    with pytest.raises(InputError, match=said):
        write(**change)


def test_a_folder_that_cannot_be_written_into_is_named(write, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be written into"):
        write(data=data, out=str(tmp_path / "file"))


def test_a_run_gives_what_is_not_given(names, data, tmp_path, monkeypatch, examples):
    roles = runs.Roles(*names, base=names[1], beta=BETA, data=data, format="pairs")
    monkeypatch.setattr(runs, "roles", lambda workdir: roles)
    run = str(tmp_path / "run")
    credit.write(run=run)
    held = read_json(tmp_path / "run/credit.json")
    assert (held["source"], held["beta"], len(held["items"])) == (data, BETA, credit.ROWS_READ)
    credit.write(run=run, examples=examples([MARKED]), beta=2 * BETA, out=str(tmp_path / "other"))
    other = read_json(tmp_path / "other/credit.json")
    assert (other["source"][-11:], other["beta"]) == ("marked.json", 2 * BETA)
    given = dict(model=names[0], reference=names[1], beta=BETA, out=run)
    with pytest.raises(InputError, match="run: has no effect"):
        credit.write(run=run, data=data, **given)
    monkeypatch.setattr(runs, "roles", lambda workdir: roles._replace(data=None))
    with pytest.raises(InputError, match="has no file of pairs for evaluation; give data"):
        credit.write(run=run)
    assert MODEL.max_positions == 64  # what the test of a long text relies on
