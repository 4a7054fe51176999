"""What transformers answers to the stored cases: the answers of `data/beam_answers.json`.

    python tests/test_transformers_beams.py    # writes the file anew

`test_beams.py` compares the project with the file, so that the comparison needs no torch.
The "total" answers are the slow twin's, which is compared with an independent transcription
of version 4.29.2 where that is at hand.
"""

import json
import sys
import tempfile
from functools import cache

import jax
import numpy as np
import pytest
from decoding_cases import ANSWERS, answers, cases, config, logits_after, params, total_cases
from examples import SHARED
from slow_beams import beams_429

from jaxdpo import convert

torch = pytest.importorskip("torch")


@cache
def torch_model(case):
    from transformers import GPTNeoXForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        convert.save_hf(f"{folder}/model", config(case.vocab_size), params(case))
        model = GPTNeoXForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    return model.eval()


def transformers_answers(case):
    """[(tokens, score)] for each prompt, from one left-padded batch.

    With `no_repeat_ngram` one prompt at a time: transformers counts padding as text.
    """
    prompts = case.prompts
    if case.no_repeat_ngram:
        return [generated(case, [prompt])[0] for prompt in prompts]
    return generated(case, prompts)


def generated(case, prompts):
    width = max(map(len, prompts))
    tokens = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        found = torch_model(case._replace(**PLAIN)).generate(
            tokens,
            attention_mask=mask,
            num_beams=case.beam_size,
            num_return_sequences=case.beam_size,
            do_sample=False,
            max_new_tokens=case.max_new_tokens,
            length_penalty=case.length_penalty,
            early_stopping=case.early_stopping,
            eos_token_id=list(case.eos_ids),
            pad_token_id=1,  # never among the prompts or answers
            min_new_tokens=case.min_new_tokens or None,
            no_repeat_ngram_size=case.no_repeat_ngram or None,
            return_dict_in_generate=True,
            output_scores=True,
        )
    texts = found.sequences[:, width:].reshape(len(prompts), case.beam_size, -1).tolist()
    scores = found.sequences_scores.reshape(len(prompts), case.beam_size).tolist()
    return [
        [[cut(text, case.eos_ids), round(score, 6)] for text, score in zip(*each, strict=True)]
        for each in zip(texts, scores, strict=True)
    ]


# What makes no difference to the model of a case.
PLAIN = dict(beam_size=2, max_new_tokens=1, length_penalty=0.0, early_stopping=False)
PLAIN |= dict(min_new_tokens=0, no_repeat_ngram=0, length_norm="generated")


def cut(tokens, eos_ids):
    """Up to the first end token; padding follows."""
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def twin_answers(case):
    found = []
    for prompt in case.prompts:
        logits = logits_after(case, prompt)
        logps = lambda sequences, logits=logits: np.asarray(jax.nn.log_softmax(logits(sequences)))
        best = beams_429(
            logps,
            case.beam_size,
            case.max_new_tokens,
            case.eos_ids,
            case.length_penalty,
            case.early_stopping,
            prompt_length=len(prompt),
        )
        found.append([(tokens, round(score, 6)) for tokens, score in best])
    return found


def assert_same(found, stored):
    for mine, theirs in zip(found, stored, strict=True):
        assert [list(m[0]) for m in mine] == [t[0] for t in theirs]
        scores = [m[1] for m in mine], [t[1] for t in theirs]
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beam_size", (2, 3, 5, 10, 20))
def test_transformers_gives_the_stored_answers(beam_size):
    pytest.importorskip("transformers", minversion="5.0")
    for case, stored in zip(cases(), answers()["generated"], strict=True):
        if case.beam_size == beam_size:
            assert_same(transformers_answers(case), stored)


@pytest.mark.skipif(not (SHARED / "oracles").exists(), reason="the transcription is not at hand")
def test_the_twin_of_4_29_2_equals_an_independent_one(monkeypatch):
    monkeypatch.syspath_prepend(SHARED / "oracles")
    from hf_beam_reference import beam_hf429

    for case, stored in zip(total_cases(), answers()["total"], strict=True):
        for prompt, theirs in zip(case.prompts[:1], stored, strict=False):
            logits, start = logits_after(case, prompt), len(prompt)
            found = beam_hf429(
                lambda rows, f=logits, start=start: f([row[start:] for row in rows]),
                prompt,
                case.beam_size,
                case.max_new_tokens,
                case.eos_ids,
                case.length_penalty,
                case.early_stopping,
                num_return=case.beam_size,
            )
            assert_same([[(tokens[start:], score) for tokens, score in found]], [theirs])


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    written = {
        "generated": [transformers_answers(case) for case in cases()],
        "total": [twin_answers(case) for case in total_cases()],
    }
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(c, separators=(",", ":")) for c in each) + "\n]"
        for name, each in written.items()
    ]
    ANSWERS.parent.mkdir(exist_ok=True)
    ANSWERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.exit(0)
