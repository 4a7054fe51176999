"""Every recipe is complete, consistent, and says where it comes from; every key is checked."""

import importlib.util
import inspect
import json
import math
from pathlib import Path

import pytest

from jaxdpo import InputError, experiment, recipe
from jaxdpo.pairs import FORMATS
from jaxdpo.tokens import Limits

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_run_and_says_what_to_expect(path):
    module = load(path)
    for word in ("Source:", "Command:", "Hardware:", "Time:", "Expect:"):
        assert word in inspect.getdoc(module), word
    config = module.get_config()
    for one in [*experiment.configurations(config, Path("/runs")).values()] or [config]:
        recipe.check(one)
        for name in one.stages:
            stage = one[name]
            Limits(stage.max_length, stage.max_prompt_length, stage.truncation).check()
            assert stage.data.format in FORMATS
            recipe.optimizer(name, stage, 10)
            # Rows that eight devices can share.
            assert stage.batch_size % (stage.micro_batches * 8) == 0
            assert stage.eval_batch_size % 8 == 0


def test_the_papers_recipe_is_the_papers():
    dpo = load(next(p for p in RECIPES if p.stem == "tldr_pythia_2_8b")).get_config().dpo
    found = {key: dpo[key] for key in ("learning_rate", "warmup_steps", "batch_size", "epochs")}
    assert found == dict(learning_rate=5e-7, warmup_steps=150, batch_size=32, epochs=1)
    assert (dpo.beta, dpo.max_grad_norm, dpo.max_length, dpo.optimizer) == (0.1, 10, 512, "rmsprop")
    _, schedule = recipe.optimizer("dpo", dpo, 1000)
    assert float(schedule(0)) == pytest.approx(5e-7 / 151, rel=1e-6)
    assert float(schedule(999)) == pytest.approx(5e-7, rel=1e-6)  # no decay


def test_a_misspelt_key_is_an_error_in_a_recipe_too():
    config = recipe.blank()
    with pytest.raises(AttributeError, match="betta"):
        config.dpo.betta = 0.5
    with pytest.raises(AttributeError, match="epoch"):
        config.sft.epoch = 3


@pytest.mark.parametrize("key", sorted(recipe.RANGES))
@pytest.mark.parametrize("value", [-1, math.nan, math.inf], ids=["negative", "nan", "infinite"])
def test_every_number_has_a_range(key, value):
    config = recipe.blank()
    config.model.name = "pythia-70m"
    for name in config.stages:
        config[name].data.train = config[name].data.eval = "some.jsonl"
    recipe.check(config)
    with config.dpo.ignore_type():
        config.dpo[key] = value
    with pytest.raises(InputError, match=f"dpo.{key}"):
        recipe.check(config)


def test_decay_reaches_its_end():
    config = recipe.blank()
    config.sft.update(optimizer="adamw", learning_rate=1.0, warmup_steps=0)
    config.sft.final_learning_rate = 0.1
    _, schedule = recipe.optimizer("sft", config.sft, 10)
    rates = [float(schedule(step)) for step in (0, 5, 10)]
    assert rates == pytest.approx([1.0, 0.55, 0.1], rel=1e-6)


@pytest.fixture
def begun(tmp_path):
    """A work directory in which dpo has begun."""
    recipe.claim(recipe.blank(), tmp_path)
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo/metrics.jsonl").write_text("")
    return tmp_path


def test_what_only_observes_may_change_while_a_run_goes_on(begun):
    config = recipe.blank()
    config.dpo.samples, config.dpo.sample_tokens = 4, 7
    config.dpo.trajectories, config.dpo.trajectories_every = 8, 5
    config.prediction = "chosen falls"
    recipe.claim(config, begun)
    file = begun / "config.json"
    old = json.loads(file.read_text())
    del old["dpo"]["samples"], old["dpo"]["sample_tokens"]
    file.write_text(json.dumps(old))  # as one from before there were such keys
    recipe.claim(config, begun)
    assert json.loads(file.read_text())["dpo"]["samples"] == 4
    config.sft.epochs, config.dpo.beta, config.seed = 3, 0.2, 1  # sft has not begun
    with pytest.raises(InputError, match="these keys differ: dpo.beta, seed. "):
        recipe.claim(config, begun)


def test_nothing_looks_on_once_a_stage_is_finished(begun):
    (begun / "dpo/done.json").write_text("{}")
    config = recipe.blank()
    recipe.claim(config, begun)
    config.dpo.trajectories = 8
    with pytest.raises(InputError, match="these keys differ: dpo.trajectories. "):
        recipe.claim(config, begun)


def test_a_run_of_an_older_version_goes_on(begun):
    file = begun / "config.json"
    old = json.loads(file.read_text())
    del old["runs"], old["prediction"], old["dpo"]["data"]["limit"]
    for stage in ("sft", "dpo"):  # which packed consecutive pairs
        del old[stage]["row_length"]
        old[stage]["pairs_per_row"] = 1
    file.write_text(json.dumps(old))
    config = recipe.blank()
    recipe.claim(config, begun)
    file.write_text(json.dumps(old))
    config.dpo.data.limit = 7  # the older version read all
    with pytest.raises(InputError, match="these keys differ: dpo.data.limit. "):
        recipe.claim(config, begun)


def test_a_spoilt_config_is_named(begun):
    (begun / "config.json").write_text('{"seed": ')
    with pytest.raises(InputError, match="config.json: does not hold a whole JSON object"):
        recipe.claim(recipe.blank(), begun)


def test_a_number_that_no_file_can_hold_is_refused(tmp_path):
    config = recipe.blank()
    config.dpo.data.max_bad_fraction = math.nan
    with pytest.raises(InputError, match="every number must be finite"):
        recipe.claim(config, tmp_path)
