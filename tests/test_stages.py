"""The whole path in small: two stages, resume, hand-over, and every mistake a user can make."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdpo import InputError, runs, stages, train
from jaxdpo.analysis import trajectories
from jaxdpo.checkpoint import Checkpoints, abstract
from jaxdpo.fingerprint import identity
from jaxdpo.metrics import read_metrics
from jaxdpo.pythia import init_params
from jaxdpo.pythia_config import PythiaConfig
from jaxdpo.records import read_log
from jaxdpo.tokens import load_tokenizer
from jaxdpo.train import Observer

ROOT = Path(__file__).parents[1]
TINY = {
    "synthetic.sft_train": 48,
    "synthetic.sft_test": 12,
    "synthetic.pairs_train": 48,
    "synthetic.pairs_test": 12,
    "model.overrides.num_layers": 1,
    "model.overrides.num_heads": 2,
    "model.overrides.width": 16,
    "model.overrides.mlp_width": 32,
    **{f"{stage}.batch_size": 8 for stage in ("sft", "dpo")},
    **{f"{stage}.eval_batch_size": 12 for stage in ("sft", "dpo")},  # in eight rows
    **{f"{stage}.eval_every": 4 for stage in ("sft", "dpo")},
    **{f"{stage}.checkpoint_every": 2 for stage in ("sft", "dpo")},
    **{f"{stage}.epochs": 2 for stage in ("sft", "dpo")},
    **{f"{stage}.samples": 0 for stage in ("sft", "dpo")},
    "dpo.trajectories": 0,
    "dpo.trajectories_every": 0,
}
TOTAL = 12  # 48 examples, 8 to a batch, two epochs


def recipe(name="quickstart", **changes):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict(TINY | {k.replace("__", "."): v for k, v in changes.items()})
    return config.lock()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    stages.run(recipe(), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_leaves_all_that_it_should(finished):
    for name in ("config.json", "versions.json", "rewards.png", "sft_loss.png", "summary.md"):
        assert (finished / name).stat().st_size > 0, name
    for stage in ("sft", "dpo"):
        records = read_metrics(finished / stage)
        assert [r["step"] for r in records] == list(range(TOTAL + 1))  # each step once
        evaluated = [r["step"] for r in records if "eval/loss" in r]
        assert evaluated == [0, 4, 8, 12]  # at the start, every four, at the end
        assert stage == "dpo" or records[-1]["eval/loss"] < records[0]["eval/loss"]
        assert list((finished / stage / "tensorboard").iterdir())
        report = json.loads((finished / stage / "data_report.json").read_text())
        assert report["rows"]["train"]["kept"] == 48
        assert report["truncation"]["train"]["examples"] == 48


@pytest.mark.slow
def test_dpo_begins_at_log_2_and_the_reference_is_data(finished):
    first = read_metrics(finished / "dpo")[:2]
    assert first[0]["eval/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first[1]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first[0]["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)
    for split in ("train", "eval"):
        values = np.load(finished / f"dpo/reference/{split}.npy")
        assert values.dtype == np.float32 and (values < 0).all()


@pytest.mark.slow
def test_all_is_compiled_before_the_first_step_and_speed_is_told(finished):
    for stage in ("sft", "dpo"):
        before, *records = read_log(finished / stage / "speed.jsonl")
        assert before["step"] == before["steps"] == 0
        assert before["programs"] >= {"sft": 2, "dpo": 3}[stage]  # DPO has two row shapes here
        assert ("seconds/reference" in before) == (stage == "dpo")
        assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
        assert {record["programs"] for record in records} == {0}
        assert sum(record["pairs"] for record in records) == 96
        for record in records:
            assert 0 < record["model_tflops_per_second"] < record["hardware_tflops_per_second"]
            assert 0 < record["real_positions_share"] <= 1 and "mfu" not in record


@pytest.mark.slow
def test_dpo_starts_from_the_last_checkpoint_of_sft(finished):
    manifest = json.loads((finished / "dpo/reference/train.json").read_text())["manifest"]
    assert manifest["weights"] == identity(params_of(finished / "sft/checkpoints"))


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(finished, capfd):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*/metrics.jsonl")}
    stages.run(recipe(), finished)
    assert {p: p.stat().st_mtime_ns for p in finished.glob("*/metrics.jsonl")} == before
    assert "finished at step 12" in capfd.readouterr().err


@pytest.mark.slow
def test_no_second_copy_of_the_parameters_lives_in_training(finished, tmp_path):
    """Also where the reference was loaded to look at its numbers, and training goes on."""
    counted = lambda: sum(array.shape == (320, 16) for array in jax.live_arrays())
    before, found = counted(), []

    def looked(loop, state, first, batches, checkpoints, *_):
        found.append((first, counted() - before))
        if first == 0:
            checkpoints.save(1, state, loss=None)
        raise KeyboardInterrupt

    def restored(*arguments):
        found.append(("restored beside", counted() - before))
        return restore(*arguments)

    def drawn(*arguments, seed, **options):
        seeds.append(seed)
        return draw(*arguments, seed=seed, **options)

    restore, draw, seeds = Checkpoints.restore, stages.reference.drawn, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.reference, "drawn", drawn)
        patch.setattr(stages, "train_loop", looked)
        patch.setattr(Checkpoints, "restore", restored)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                stages.run(after_sft(finished), tmp_path)
    # Embedding and unembedding, and the two moments of each.
    assert found == [(0, 6), ("restored beside", 0), (1, 6)]
    assert list(dict.fromkeys(seeds)) == [(0, 0), (0, 1)]  # each start checks another batch


def after_sft(finished, **changes):
    config = recipe(stages=("dpo",), model__weights=f"{finished}:sft", model__name="", **changes)
    config.model.overrides = ConfigDict()
    return config


@pytest.mark.slow
def test_a_reference_is_packed_compiled_and_computed_once(finished, tmp_path, monkeypatch, capfd):
    """What is computed again at each start fits what a step fits: a micro-batch."""
    packed, checked, steps = [], [], []
    in_rows, check = stages.in_rows, stages.reference.check

    def packing(*arguments):
        packed.append(arguments[-1])
        return in_rows(*arguments)

    def checking(logps, batch, **options):
        checked.append(len(batch.tokens))
        return check(logps, batch, **options)

    def loop(*_):
        steps.append(re.findall(r"dpo reference: compiling (\d+)", capfd.readouterr().err))
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "in_rows", packing)
    monkeypatch.setattr(stages.reference, "check", checking)
    monkeypatch.setattr(stages, "train_loop", loop)
    monkeypatch.setattr(stages, "compiled_ahead", lambda loop, *_, **__: loop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stages.run(after_sft(finished, dpo__batch_size=16, dpo__micro_batches=2), tmp_path)
    assert packed == ["eval_batch_size"]  # of train, once; evaluation's batches are there
    assert checked == [8, 8, 8, 8]  # of training's 16 rows half
    # Two passes and a half of a training batch; then what is checked, of either.
    assert steps == [["3"], ["2"]]


@pytest.mark.slow
def test_checkpoints_keep_the_latest_and_the_best(finished):
    with Checkpoints(finished / "dpo/checkpoints", keep=2) as checkpoints:
        latest, best = checkpoints.latest_step, checkpoints.best_step
    steps = sorted(int(p.name) for p in (finished / "dpo/checkpoints").iterdir())
    losses = {r["step"]: r["eval/loss"] for r in read_metrics(finished / "dpo") if "eval/loss" in r}
    del losses[0]  # before the first update there is no checkpoint
    assert steps[-2:] == [10, 12] and latest == 12
    assert best == min(losses, key=losses.get)
    assert len(steps) <= 3


@pytest.mark.slow
def test_another_configuration_or_other_data_is_refused(finished):
    with pytest.raises(InputError, match="another configuration.*dpo.beta"):
        stages.run(recipe(dpo__beta=0.2), finished)
    stages.run(recipe(mesh__fsdp=2), finished)  # the mesh may change
    stages.run(recipe(), finished)


def command(workdir, *more):
    watched = {"dpo.trajectories": 8, "dpo.trajectories_every": 5, "dpo.sample_tokens": 6}
    flags = [f"--config.{key}={value}" for key, value in (TINY | watched).items()]
    return [
        sys.executable, "launch/train.py", "--config", "configs/quickstart.py",
        "--workdir", str(workdir), *flags, *more,
    ]  # fmt: skip


def launch(workdir, *more, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command(workdir, *more), cwd=ROOT, env=environment, stderr=subprocess.PIPE, **options
    )


def killed_at(workdir, stage, step, how=signal.SIGKILL):
    """Start the run, and signal it once `stage` has logged `step`; its status and what it said."""
    run = launch(workdir)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and run.poll() is None:
        records = read_metrics(workdir / stage)
        if records and records[-1]["step"] >= step:
            break
        time.sleep(0.01)
    assert run.poll() is None, run.stderr.read().decode()
    run.send_signal(how)
    _, errors = run.communicate(timeout=240)
    return run.returncode, errors.decode()


@pytest.mark.slow
def test_killed_and_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path):
    whole, broken = both = tmp_path / "whole", tmp_path / "broken"
    _, errors = launch(whole).communicate(timeout=240)
    assert (whole / "dpo/done.json").exists(), errors.decode()
    for stage, step in (("sft", 5), ("dpo", 3)):
        killed_at(broken, stage, step)
    # Asked to stop, it saves the step that it is at, where no checkpoint is due.
    status, said = killed_at(broken, "dpo", 6, how=signal.SIGTERM)
    stopped = re.search(r"dpo: stopped after step (\d+) of 12, which is saved", said)
    assert status == 143 and stopped, said
    _, errors = launch(broken).communicate(timeout=240)
    assert f"resumed from step {stopped[1]}\n" in errors.decode()
    for stage in ("sft", "dpo"):
        one, two = read_metrics(whole / stage), read_metrics(broken / stage)
        assert [r["step"] for r in two] == list(range(TOTAL + 1))
        hexes = [[{k: float(v).hex() for k, v in r.items()} for r in run] for run in (one, two)]
        assert hexes[0] == hexes[1]
        final = [params_of(run / stage / "checkpoints") for run in (whole, broken)]
        for a, b in zip(*map(jax.tree.leaves, final), strict=True):
            np.testing.assert_array_equal(a, b)
        covered = [sum(r["steps"] for r in read_log(run / stage / "speed.jsonl")) for run in both]
        assert covered == [TOTAL, TOTAL]
    one, two = (trajectories.read(run / "dpo") for run in (whole, broken))
    assert one == two and [record["step"] for record in two] == [0, 5, 10, TOTAL]


def params_of(folder):
    config = PythiaConfig.from_name("pythia-14m", **recipe().model.overrides)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    here = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_params(TOTAL, abstract(shapes, here))


MISTAKES = {
    "dtype that the device lacks": (dict(model__dtype="float16"), "model.dtype: float16"),
    "missing data": (dict(sft__data__train="nowhere.jsonl"), "nowhere.jsonl"),
    "missing tokenizer": (dict(tokenizer="nowhere.json"), "nowhere.json"),
    "two evaluation sets": (dict(sft__data__test_fraction=0.1), "test_fraction"),
    "no evaluation set": (dict(dpo__data__eval=""), "test_fraction"),
    "stage twice": (dict(stages=("sft", "sft")), "stages"),
    "unknown stage": (dict(stages=("rlhf",)), "stages"),
    "vocabulary too small": (dict(model__overrides__vocab_size=256), "tokenizer"),
    "batch over devices": (dict(sft__batch_size=4), r"sft \(batch_size=4\): batch_size: 4 pairs"),
    "rows over devices": (
        dict(sft__eval_batch_size=12, sft__row_length=0),
        r"sft \(eval_batch_size=12\): .* give a multiple",
    ),
    "batch over micro-batches": (dict(sft__micro_batches=3), "batch_size: 8 .* multiple of 24"),
    "rows too short": (dict(dpo__row_length=16), "row_length: 16 is less than the .* line"),
    "separate rows cannot be packed": (
        dict(dpo__layout="separate"),
        r"^dpo \(batch_size=8\): row_length: 2048 has no effect",
    ),
    "heads over tensor": (dict(mesh__tensor=8, mesh__data=1), "num_heads"),
    "mesh over devices": (dict(mesh__data=3), "devices"),
    "folder without weights": (dict(model__weights="{workdir}", model__name=""), "config.json"),
    "weights and a name": (dict(model__weights="{workdir}"), "model"),
    "weight decay without effect": (dict(sft__optimizer="rmsprop", sft__weight_decay=0.1), "decay"),
    "unknown optimizer": (dict(sft__optimizer="lion"), "optimizer"),
    "unknown loss": (dict(dpo__loss="hinge", stages=("dpo",)), "dpo.loss"),
    "smoothed ipo": (dict(dpo__loss="ipo", dpo__label_smoothing=0.1, stages=("dpo",)), "smoothing"),
    "pairs without rejected": (
        dict(
            dpo__data__train="{data}/sft_train.jsonl",
            dpo__data__eval="{data}/sft_test.jsonl",
            dpo__data__format="completions",
            stages=("dpo",),
        ),
        "rejected",
    ),
    "no mesh axis": (dict(mesh={"data": 1, "fdsp": 1}), "mesh"),
    "learning rate": (dict(dpo__learning_rate=-1.0), "dpo.learning_rate"),
    "no data": (dict(dpo__data__train=""), "dpo.data.train"),
    "later stage's mistake": (dict(dpo__loss="hinge"), "dpo.loss"),
    "best without evaluations": (dict(sft__hand_on="best", sft__eval_every=0), "sft.hand_on"),
    "empty after filtering": (
        dict(sft__truncation="drop", sft__max_length=8, sft__max_prompt_length=None),
        "no example is left",
    ),
    "unknown truncation": (dict(sft__truncation="middle"), "truncation"),
    "no room for samples": (
        dict(dpo__samples=1, model__overrides__max_positions=100, dpo__sample_tokens=60),
        "dpo.sample_tokens: 60 more than",
    ),
    "synthetic knob": (dict(synthetic__sft_train=-1), "sft_train"),
    "no file of no rows": (dict(synthetic__sft_train=0), "sft_train.jsonl: no such file"),
    "cadence of nothing": (
        dict(dpo__trajectories_every=5),
        "dpo.trajectories_every: has no effect without dpo.trajectories",
    ),
    "more pairs than there are": (
        dict(dpo__trajectories=13),
        "dpo.trajectories: 13 are more than the 12 held-out pairs",
    ),
    "no room for trajectories": (
        dict(dpo__trajectories=1, model__overrides__max_positions=100, dpo__sample_tokens=60),
        "dpo.sample_tokens: 60 more than",
    ),
    "completions have no other responses": (
        dict(sft__data__responses="all"),
        "sft.data.responses: 'all', but line 1: has no rejected response",
    ),
    "unknown responses": (dict(sft__data__responses="best"), "sft.data.responses: 'best'"),
    "a run has no runs": (dict(runs={"a": {"seed": 1}}), "runs: a run has no runs"),
}


def test_a_mistake_does_not_spoil_the_folder(tmp_path):
    """What failed before anything was trained may be set right in the same work directory."""
    for changes, named in (
        (dict(tokenizer="no.json"), "no.json"),
        (dict(dpo__loss="no"), "dpo.loss"),
    ):
        with pytest.raises(InputError, match=named):
            stages.run(recipe(stages=("dpo",), **changes), tmp_path)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_that_does_not_fit_has_begun_nothing(tmp_path, monkeypatch, stage):
    """Not even a reference."""

    def full(programs):
        raise InputError("does not fit")

    monkeypatch.setattr(train, "compile_all", full)
    for batch_size in (16, 8):  # or the second would be another configuration
        with pytest.raises(InputError, match=f"^{stage}: does not fit"):
            stages.run(recipe(stages=(stage,), **{f"{stage}__batch_size": batch_size}), tmp_path)
    assert not (tmp_path / stage / "reference").exists()


@pytest.mark.parametrize("changes, named", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_in_one_line(tmp_path, changes, named):
    with pytest.raises(InputError, match=named) as caught:
        stages.run(recipe(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_losses_that_are_not_finite_stop_the_run_and_name_the_rows(tmp_path):
    config = recipe(
        sft__learning_rate=1e30, sft__warmup_steps=0, stages=("sft",), sft__max_skipped_in_a_row=2
    )
    with pytest.raises(InputError, match="2 steps in a row.* lines [0-9]+, .*sft_train.jsonl"):
        stages.run(config, tmp_path)
    skipped = [r["train/skipped"] for r in read_metrics(tmp_path / "sft")[1:]]
    assert skipped == sorted(skipped)


@pytest.mark.slow
def test_other_versions_are_told_and_both_kept(finished, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    file = workdir / "versions.json"
    now = json.loads(file.read_text())
    file.write_text(json.dumps(now | {"jax": "0.0.1", "kind": "abacus"}))
    stages.run(recipe(), workdir)
    assert "warning: jax, kind changed since this run" in capfd.readouterr().err
    assert json.loads(file.read_text()) == now | {"earlier": [{"jax": "0.0.1", "kind": "abacus"}]}
    stages.run(recipe(), workdir)
    assert "warning" not in capfd.readouterr().err
    assert len(json.loads(file.read_text())["earlier"]) == 1


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (4, 2)], ids=str)
@pytest.mark.slow
def test_another_mesh_goes_on_from_the_same_examples(finished, tmp_path, capfd, mesh):
    """To rounding: other sums over other devices."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / f"dpo/checkpoints/{TOTAL}")
    (workdir / "dpo/done.json").unlink()
    data, fsdp = mesh
    stages.run(recipe(mesh__data=data, mesh__fsdp=fsdp), workdir)
    assert "resumed from step 10" in capfd.readouterr().err
    ours, theirs = read_metrics(workdir / "dpo"), read_metrics(finished / "dpo")
    assert ours[: TOTAL - 1] == theirs[: TOTAL - 1]  # up to there nothing is computed again
    for record, other in zip(ours[TOTAL - 1 :], theirs[TOTAL - 1 :], strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_samples_are_shown_and_kept_over_a_kill_and_change_nothing(finished, tmp_path, capfd):
    config = recipe(
        stages=("sft",), sft__samples=3, sft__sample_tokens=6, sft__eval_every=3
    )  # checkpoints stand at even steps
    look = Observer.look

    def killed(observer, step, params):
        look(observer, step, params)
        if step == 9:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "look", killed)
        with pytest.raises(KeyboardInterrupt):
            stages.run(config, tmp_path)
    with open(tmp_path / "sft/samples.jsonl", "a") as log:
        log.write('{"step": 12, "pro')
    before = read_log(tmp_path / "sft/samples.jsonl")
    assert [r["step"] for r in before] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    stages.run(config, tmp_path)
    said = read_log(tmp_path / "sft/samples.jsonl")
    assert said[:12] == before and [r["step"] for r in said[12:]] == [12, 12, 12]
    rows = read_log(tmp_path / "data/sft_test.jsonl")
    assert [r["prompt"] for r in said] == [row["prompt"] for row in rows[:3]] * 5
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer.json")
    assert {len(tokenizer.encode(r["text"]).ids) for r in said} == {6}  # or it had learnt to end
    shown = capfd.readouterr().err
    assert f"sft 12: …{rows[0]['prompt'][-60:]}".replace("\n", "⏎") in shown
    assert shown.count(f"▸{said[-1]['text']}…".replace("\n", "⏎")) >= 1
    with_samples, without = (read_metrics(folder / "sft") for folder in (tmp_path, finished))
    train = [{k: v for k, v in r.items() if k.startswith("train/")} for r in with_samples]
    assert train == [{k: v for k, v in r.items() if k.startswith("train/")} for r in without]
    assert with_samples[-1] == without[-1] and not (finished / "sft/samples.jsonl").exists()


@pytest.mark.slow
def test_bfloat16_parameters_resume_bit_for_bit(tmp_path):
    """Moments are float32 whatever the parameters; a restored run must not round them."""
    config = recipe(stages=("sft",), model__param_dtype="bfloat16", model__dtype="bfloat16")
    stages.run(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping_after(4, Checkpoints.save))
        with pytest.raises(KeyboardInterrupt):
            stages.run(config, tmp_path / "broken")
    # Killed right after a save: the speed of the steps before it is on disk as their metrics are.
    assert [r["step"] for r in read_log(tmp_path / "broken/sft/speed.jsonl")] == [0, 2, 4]
    stages.run(config, tmp_path / "broken")
    runs = [read_metrics(tmp_path / name / "sft") for name in ("whole", "broken")]
    assert runs[0] == runs[1]
    speed = read_log(tmp_path / "broken/sft/speed.jsonl")
    assert sum(record["steps"] for record in speed) == TOTAL
    assert speed[2]["seconds/checkpoint"] > 0  # of the save at step 2


def stopping_after(step, save):
    def saved(checkpoints, at, *arguments, **options):
        save(checkpoints, at, *arguments, **options)
        if at == step:
            raise KeyboardInterrupt

    return saved


@pytest.mark.slow
def test_export_is_what_the_run_ended_with(finished, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    runs.export(finished, "dpo", tmp_path / "hf")
    params = params_of(finished / "dpo/checkpoints")
    model, notes = transformers.GPTNeoXForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    embedding = model.gpt_neox.embed_in.weight.detach()
    assert torch.equal(embedding, torch.tensor(np.array(params["embedding"])))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id == 0
    for changes, named in (
        (dict(workdir=tmp_path), "no run"),
        (dict(stage="rlhf"), "no checkpoints"),
        (dict(to=tmp_path / "hf"), "not empty"),
    ):
        with pytest.raises(InputError, match=named):
            runs.export(**dict(workdir=finished, stage="dpo", to=tmp_path / "other") | changes)
