"""Two real processes on this machine: they agree, they compute what one does, and end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import local

from jaxdpo import InputError, completions, processes, prompts, runs, transcript
from jaxdpo.metrics import read_metrics
from jaxdpo.records import read_log

ROOT = Path(__file__).parents[1]
SMALL = {
    "stages": "('dpo',)",
    "synthetic.sft_train": 8,
    "synthetic.sft_test": 8,
    "synthetic.pairs_train": 48,
    "synthetic.pairs_test": 12,
    "model.overrides.num_layers": 1,
    "model.overrides.num_heads": 2,
    "model.overrides.width": 16,
    "model.overrides.mlp_width": 32,
    "dpo.batch_size": 8,
    "dpo.eval_batch_size": 12,
    "dpo.eval_every": 4,
    "dpo.checkpoint_every": 2,
    "dpo.epochs": 2,
    "dpo.num_buckets": 1,
    "dpo.samples": 2,
    "dpo.sample_tokens": 8,
    "dpo.trajectories": 8,
    "dpo.trajectories_every": 0,
}


def environment(devices=1, **given):
    """Without what tells of processes and devices; compiled quickly, and kept by this session."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "NPROC"))}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}",
        **given,
    }


def started(count, *command, devices=1, **given):
    """A command as so many processes; with one, by itself."""
    several = [ROOT / "launch/cluster/local.py", "--processes", str(count), "--", sys.executable]
    return subprocess.Popen(
        [sys.executable, *(several if count > 1 else []), *map(str, command)],
        env=environment(devices, **given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process, seconds=240):
    """What it said and its exit status; a test must not outlive it."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said


def run(*args, **kwargs):
    return ended(started(*args, **kwargs))


def program(tmp_path, text):
    """A launcher whose main is `text`."""
    body = "\n".join("    " + line for line in text.strip().splitlines())
    file = tmp_path / "program.py"
    file.write_text(
        "import door\nimport atexit, os, signal, sys, threading, time\nimport jax, numpy as np\n"
        "from jax.sharding import NamedSharding, PartitionSpec\n"
        "from ml_collections import ConfigDict\n"
        "from jaxdpo import InputError, processes, recipe, sharding\n"
        "from jaxdpo.stopping import Stop, Stopped\n"
        f"def main():\n    me = jax.process_index()\n{body}\n"
        "if __name__ == '__main__':\n    door.run(main)\n"
    )
    return file


AGREE = """
assert processes.several() and processes.is_first() == (me == 0)
assert processes.from_first(lambda: [me, "x"]) == [0, "x"]
large = np.array([2**62 + me, 7])  # which 32 bits would not hold
assert processes.of_each(large).tolist() == [[2**62, 7], [2**62 + 1, 7]]
# Four devices: rows over two, of which each process has one or, crossed, half of both.
for devices in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 0, 2, 1]):
    mesh = sharding.make_mesh(tensor=2, devices=[jax.devices()[i] for i in devices])
    mine, count = sharding.row_parts(mesh)
    whole = np.arange(24.0).reshape(8, 3)
    rows = whole.reshape(count, -1, 3)[list(mine)].reshape(-1, 3)
    placed = sharding.put_rows({"x": rows}, mesh)["x"]
    assert placed.shape == (8, 3)
    np.testing.assert_array_equal(sharding.fetched({"x": placed})["x"], whole)
    np.testing.assert_array_equal(sharding.own_rows(placed), rows)
os.write(2, f"agreed {me} \\n".encode())  # at once: the other one writes too
# A thread that comes back from JAX's code to an interpreter that is ending aborts the process.
atexit.register(lambda: threading.active_count() == 1 or os._exit(9))
"""


def test_they_agree(tmp_path):
    status, said = run(2, program(tmp_path, AGREE), devices=2)
    assert status == 0, said
    assert len(re.findall(r"agreed [01] ", said)) == 2


WAITS = {
    "the store": "processes.from_first(lambda: time.sleep(120))",
    "a device": "processes.of_each(np.zeros(3))",
}
ENDS = {
    "mistake": ("raise InputError('row 3: is no pair; mend it')", 2, "error: row 3: is no pair"),
    "bug": ("raise ValueError('of a bug')", 1, "error: ValueError: of a bug"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", None, ""),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", None, ""),  # outside a loop
}


@pytest.mark.parametrize(
    "how, which, waiting",
    [
        ("mistake", 1, "a device"),
        ("bug", 1, "the store"),
        ("killed", 1, "a device"),
        ("killed", 0, "the store"),
        ("terminated", 1, "a device"),
    ],
)
def test_one_that_fails_ends_all_within_seconds(tmp_path, how, which, waiting):
    act, expected, words = ENDS[how]
    text = f"""
processes.of_each(np.zeros(1))  # they have met
if me == {which}:
    time.sleep(0.5)
    print("fails", file=sys.stderr, flush=True)
    {act}
{"time.sleep(120)" if which == 1 and waiting == "the store" else WAITS[waiting]}
"""
    process = started(2, program(tmp_path, text))
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("fails"):
                began = time.monotonic()
    said = "".join(lines)
    assert time.monotonic() - began < 15, said
    assert process.returncode == expected if expected else process.returncode not in (0, 2, 143)
    if words:
        who = "process 1 on " if which else ""
        assert re.search(f"^{who}.*{re.escape(words)}", said, re.MULTILINE), said


STUCK = """
processes.of_each(np.zeros(1))
with Stop(hang_seconds=3) as stop:
    if me == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    stop.alive()
    processes.of_each(np.zeros(1))
"""


def test_a_host_that_stands_still_ends_the_others_with_their_stacks(tmp_path):
    file, address = program(tmp_path, STUCK), f"127.0.0.1:{local.free_port()}"
    told = [dict(zip(processes.TOLD, (address, "2", me), strict=True)) for me in "01"]
    first, still = (started(1, file, **each) for each in told)
    status, said = ended(first, 90)
    still.kill()
    ended(still)
    assert status == 1 and "Timeout" in said and "of_each" in said, said  # where it stood


def test_a_mistake_of_all_is_told_once(tmp_path):
    text = "raise InputError('recipe: no such key')"
    status, said = run(2, program(tmp_path, text))
    assert status == 2 and said.count("no such key") == 1 and "Traceback" not in said


def test_processes_that_were_started_otherwise_are_named(tmp_path):
    text = "recipe.check_alike(ConfigDict({'dpo': {'beta': 0.1 * (1 + me)}, 'seed': 3}))"
    status, said = run(2, program(tmp_path, text))
    assert status == 2 and "process 1 was started with another configuration.dpo.beta" in said


STOP = """
with Stop() as stop:
    for step in range(1, 10**6):
        time.sleep(0.01 * (1 + me))  # one is ahead of the other
        if step == 20:
            open(f"{sys.argv[0]}.{me}", "w").write(str(os.getpid()))
        if stop.after(step):
            print(f"stops after {step}", file=sys.stderr, flush=True)
            raise Stopped("saved")
        if step % 4 == 0:
            processes.of_each(np.zeros(3))  # no process may wait for one that has stopped
"""


def test_all_stop_after_the_same_step_when_one_is_asked(tmp_path):
    file = program(tmp_path, STOP)
    process = started(2, file)
    there = file.with_name(f"{file.name}.1")
    deadline = time.monotonic() + 60
    while not (there.exists() and there.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int(there.read_text()), signal.SIGTERM)
    status, said = ended(process, 60)
    assert status == 143, said
    first, second = re.findall(r"stops after (\d+)", said)
    assert first == second and said.count("saved\n") == 1


@pytest.mark.parametrize(
    "told, said",
    [
        (dict(JAX_NUM_PROCESSES="2"), "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not set"),
        (
            dict(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="2"),
            "JAX_PROCESS_ID=2 must",
        ),
        (
            dict(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES="two", JAX_PROCESS_ID="0"),
            "JAX_NUM_PROCESSES=two",
        ),
        (
            dict(JAX_COORDINATOR_ADDRESS="host", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"),
            "host is not HOST:PORT",
        ),
    ],
)
def test_what_a_process_is_told_is_checked(monkeypatch, told, said):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said) as caught:
        processes.begin()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "told, several",
    [
        ({}, False),
        (dict(SLURM_NTASKS="4"), False),  # a shell of salloc: one process until srun makes more
        (dict(SLURM_NTASKS="1", SLURM_STEP_NODELIST="a"), False),
        (dict(SLURM_NTASKS="4", SLURM_STEP_NODELIST="a,b"), True),
        (dict(OMPI_COMM_WORLD_SIZE="2"), True),
        (dict(TPU_WORKER_HOSTNAMES="a"), False),
        (dict(TPU_WORKER_HOSTNAMES="a,b"), True),
    ],
)
def test_a_scheduler_says_whether_there_are_several(monkeypatch, told, several):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", *processes.TOLD):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(processes, "_initialize", lambda *given: asked.append(given))
    processes.begin()
    assert asked == ([()] if several else [])


def test_one_of_one_meets_nobody(monkeypatch):
    for name, value in zip(processes.TOLD, ("h:1", "1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    processes.begin()
    assert not processes.several() and processes.is_first()


# --- the whole path ----------------------------------------------------------------------


def train(count, workdir, *flags, devices=1, **changes):
    keys = [f"--config.{key}={value}" for key, value in (SMALL | changes).items()]
    command = ["launch/train.py", "--config", ROOT / "configs/quickstart.py", "--workdir", workdir]
    command[0] = ROOT / command[0]
    return started(count, *command, *keys, *flags, devices=devices)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    status, said = ended(train(2, workdir))
    assert status == 0, said
    return workdir


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    status, said = ended(train(1, workdir, devices=2))
    assert status == 0, said
    return workdir


def numbers(records):
    return {(r["step"], k): v for r in records for k, v in r.items() if isinstance(v, float)}


def saved(workdir, stage):
    """The fingerprints of all checkpoints that are kept, which say what every array was."""
    files = sorted((workdir / stage / "checkpoints").glob("*[0-9]/_CHECKPOINT_METADATA"))
    found = [json.loads(file.read_text())["custom_metadata"]["fingerprints"] for file in files]
    assert found
    return found


@pytest.mark.slow
def test_two_processes_compute_what_one_does(one, two):
    """Losses and rewards of training and evaluation, the reference, trajectories, samples."""
    ours, theirs = (read_metrics(workdir / "dpo") for workdir in (two, one))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(13))
    # Sums over two devices, in either case.
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-6, abs=1e-6)
    texts = lambda records: [(r["step"], r["prompt"], r["text"]) for r in records]
    ours, theirs = (texts(read_log(x / "dpo/samples.jsonl")) for x in (two, one))
    assert len(ours) == 8 and ours == theirs
    ours, theirs = (numbers(read_log(x / "dpo/trajectories.jsonl")) for x in (two, one))
    assert len(ours) > 60 and ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    for side in ("train", "eval"):
        ours, theirs = (np.load(x / f"dpo/reference/{side}.npy") for x in (two, one))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_work_of_both_is_counted_once(one, two):
    """Pairs, tokens and FLOPs are of all rows, whoever holds them."""
    counted = ("step", "steps", "pairs", "tokens")
    shares = ("real_positions_share", "real_scored_share")
    for ours, theirs in zip(*(read_log(x / "dpo/speed.jsonl") for x in (two, one)), strict=True):
        assert [ours[key] for key in counted] == [theirs[key] for key in counted]
        assert [ours.get(key) for key in shares] == [theirs.get(key) for key in shares]


@pytest.mark.slow
def test_a_host_that_is_killed_costs_nothing(two, tmp_path):
    """A run of two, one of them killed while it trains, goes on to the same bits."""
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "dpo")  # as if nothing had been trained
    process = train(2, workdir)
    evaluated = workdir / "dpo/checkpoints/4"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not evaluated.is_dir():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    status, said = ended(process, 60)
    assert status not in (0, 2, 143), said
    assert not (workdir / "dpo/done.json").exists()
    # And a file that cannot be read, which the first process finds and the other is told of.
    (evaluated / "metrics/metrics").write_text('{"lo')
    status, said = ended(train(2, workdir))
    assert status == 0 and evaluated.with_suffix(".spoilt").is_dir(), said
    assert read_metrics(workdir / "dpo") == read_metrics(two / "dpo")
    assert saved(workdir, "dpo") == saved(two, "dpo")


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(two, tmp_path):
    """From the same examples, on as many devices: the same numbers to rounding."""
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "dpo/checkpoints/12")
    (workdir / "dpo/done.json").unlink()
    status, said = ended(train(1, workdir, devices=2))
    assert status == 0 and "resumed from step 10" in said, said
    ours, theirs = (numbers(read_metrics(x / "dpo")) for x in (workdir, two))
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.slow
def test_what_two_processes_decode_and_export_is_what_one_does(two, tmp_path):
    data = dict(data=str(two / "data/pairs_test.jsonl"), limit=5)
    command = ["--model", f"{two}:dpo", "--reference", f"{two}:start", "--beta", 0.1]
    command += ["--method", "beam", "--beam_size", 3, "--max_new_tokens", 8]
    command += [word for key, value in data.items() for word in (f"--{key}", value)]
    status, said = run(2, ROOT / "launch/decode.py", *command, "--out", tmp_path / "two.jsonl")
    assert status == 0, said
    status, said = run(2, ROOT / "launch/convert.py", "--workdir", two, "--to", tmp_path / "hf2")
    assert status == 0, said

    asked, _ = prompts.collected(**data)
    scoring = completions.scoring(model=f"{two}:dpo", reference=f"{two}:start", beta=0.1)
    beams = dict.fromkeys(completions.OPTIONS) | {"beam_size": 3}
    method = completions.method("beam", beams)
    ready = completions.decoder(scoring, **method, max_new_tokens=8)
    theirs = transcript.decode(ready, asked, out=None)
    runs.export(two, "dpo", tmp_path / "hf1")
    for ours, other in zip(read_log(tmp_path / "two.jsonl"), theirs, strict=True):
        for found, wanted in zip(ours["completions"], other["completions"], strict=True):
            assert found["text"] == wanted["text"]
            assert found["implicit_reward"] == pytest.approx(wanted["implicit_reward"], abs=1e-5)
    files = [sorted(p.name for p in (tmp_path / f"hf{count}").iterdir()) for count in (1, 2)]
    assert files[0] == files[1]
    for name in files[0]:
        pair = [(tmp_path / f"hf{count}" / name).read_bytes() for count in (1, 2)]
        assert pair[0] == pair[1], name
