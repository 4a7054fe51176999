"""The doors: what they print, and that a mistake is one line and exit status 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from speakers import TEXTS, checkpoint

from jaxdpo import synthetic

ROOT = Path(__file__).parents[1]


def run(launcher, *arguments, **environment):
    return subprocess.run(
        [sys.executable, f"launch/{launcher}.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"COLUMNS": "400"} | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sizes = dict(sft_train=3, sft_test=1, pairs_train=3, pairs_test=1)
    synthetic.write(folder, synthetic.Task(), seed=0, **sizes)
    return folder


def test_inspect_data_shows_the_row_that_was_asked_for(data):
    shown = run(
        "inspect_data", "--data", data / "pairs_train.jsonl", "--row", 2,
        "--tokenizer", data / "tokenizer.json",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "line 3:" in shown.stdout and "<|endoftext|>" in shown.stdout
    assert "tokens are scored" in shown.stdout
    for part in ("prompt", "chosen", "rejected"):
        assert part in shown.stdout


def test_a_folder_for_programs_that_cannot_be_written_is_one_line_of_warning(data, tmp_path):
    (tmp_path / "file").write_text("")
    shown = run(
        "inspect_data", "--data", data / "pairs_train.jsonl",
        "--tokenizer", data / "tokenizer.json",
        JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/file/programs",
    )  # fmt: skip
    assert shown.returncode == 0 and "tokens are scored" in shown.stdout
    warning, *others = shown.stderr.splitlines()
    assert warning.startswith(f"warning: {tmp_path}/file/programs: cannot be written")
    assert not any("warning" in line for line in others)


FLAGS = """
import importlib, importlib.metadata, os, sys

sys.path.append("launch")
os.environ["XLA_FLAGS"], installed = "", importlib.metadata.version
for platforms in ("", "cpu", "tpu,cpu", "cuda"):
    for version in ("0.10.1", "0.12.0.1", "0.13.0", "0.9.2"):
        os.environ |= {"JAX_PLATFORMS": platforms, "XLA_FLAGS": "--mine"}
        importlib.metadata.version = lambda name: version if name == "jaxlib" else installed(name)
        sys.modules.pop("xla", None)
        import xla
        print(platforms or "any", version, os.environ["XLA_FLAGS"])
"""


def test_the_flag_for_cpus_is_set_where_it_is_known_and_of_use():
    """Before the user's own, which count more; XLA ends a process at a flag that it lacks."""
    done = subprocess.run(
        [sys.executable, "-c", FLAGS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false --mine"
    for line in done.stdout.splitlines():
        platforms, version, flags = line.split(maxsplit=2)
        known = version in ("0.10.1", "0.12.0.1")
        assert flags == (flag if known and platforms != "cuda" else "--mine"), line
    assert len(done.stdout.splitlines()) == 16


def test_decode_shows_and_writes_what_a_model_says(tmp_path):
    out, file = tmp_path / "said.jsonl", tmp_path / "asked.jsonl"
    rows = [{"prompt": text, "chosen": " a", "rejected": " b"} for text in (*TEXTS, "")]
    file.write_text("\n".join(map(json.dumps, rows)))
    done = run(
        "decode", "--model", checkpoint(tmp_path / "policy", seed=1), "--data", file,
        "--method", "sample", "--num_samples", 2, "--max_new_tokens", 5, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == list(TEXTS)
    for record in records:
        assert record["prompt"] in done.stdout
        for one in record["completions"]:
            assert 1 <= one["length"] <= 5 and f"{one['logps']:.3f}" in done.stdout
    settings = json.loads((tmp_path / "said.jsonl.settings.json").read_text())
    assert (settings["rule"]["num_samples"], settings["max_new_tokens"]) == (2, 5)
    assert "decoded 4/4" in done.stderr and f"{file} " in done.stderr.splitlines()[0]


def test_analyze_shows_and_draws_the_reward_of_every_token(data, tmp_path):
    policy, reference = checkpoint(tmp_path / "policy", 0), checkpoint(tmp_path / "reference", 1)
    rows = [{"prompt": text, "chosen": " I feel sad.", "rejected": " I feel"} for text in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run(
        "analyze", "credit", "--model", policy, "--reference", reference, "--beta", 0.1,
        "--data", tmp_path / "pairs.jsonl", "--format", "pairs", "--out", tmp_path / "[out]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "·sad" in done.stdout and f"{tmp_path}/[out]/credit.html" in done.stdout
    written = {"credit.html", "credit.json", "credit.png"}
    assert {file.name for file in (tmp_path / "[out]").iterdir()} == written


@pytest.mark.parametrize(
    "launcher", ["analyze", "convert", "decode", "evaluate", "inspect_data", "train"]
)
def test_help_says_what_a_launcher_does_and_each_flag(launcher):
    done = run(launcher, "--help")
    assert done.returncode == 0 and f"python launch/{launcher}.py " in done.stdout
    source = (ROOT / f"launch/{launcher}.py").read_text()
    names = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)
    shown = done.stdout.replace("--[no]", "--")
    assert len(names) >= 2 and all(f"  --{name}:" in shown for name in names)


@pytest.mark.parametrize(
    "launcher, arguments, named",
    [
        ("inspect_data", ["--data", "nowhere.jsonl", "--tokenizer", "x"], "nowhere.jsonl"),
        ("inspect_data", ["--data", "{data}/pairs_train.jsonl"], "tokenizer"),
        (
            "inspect_data",
            ["--data", "{data}/pairs_train.jsonl", "--tokenizer", "{data}", "--row", "3"],
            "--row 3",
        ),
        (
            "decode",
            ["--model", "x", "--prompt", "a", "--temperature", "0.5"],
            "temperature: has no effect on greedy",
        ),
        ("decode", ["--model", "x", "--prompt", "a", "--out", ""], "out='': names no file"),
        ("analyze", [], "a command is missing; choose credit, credit-benchmark, report"),
        ("analyze", ["report", "--run", "x", "--beta", "1"], "--beta: has no effect on report"),
        ("analyze", ["report", "--run", "nowhere"], "nowhere: no run there"),
        ("evaluate", ["sweep", "--subset", "x"], "--subset: has no effect on sweep"),
        ("convert", ["--check", "{data}"], "config.json"),
        ("convert", ["--workdir", "{data}", "--to", "x"], "no run there"),
        ("convert", ["--check", "{data}", "--to", "x"], "give either"),
        (
            "train",
            ["--config", "configs/quickstart.py", "--config.dpo.bta=1", "--workdir", "x"],
            "bta",
        ),
        ("train", ["--config", "configs/nowhere.py", "--workdir", "x"], "nowhere.py"),
        ("train", ["--config", "configs/quickstart.py"], "workdir"),
        ("train", ["--config", "configs/quickstart.py", "--workdir", "x", "more"], "more"),
        (
            "train",
            ["--config", "configs/quickstart.py", "--config.dpo.beta=high", "--workdir", "x"],
            "beta",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_status_2(data, launcher, arguments, named):
    done = run(launcher, *(argument.replace("{data}", str(data)) for argument in arguments))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
