"""Programs that are compiled once: counted, made ahead for every shape, kept for the next run."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo import InputError, compilation
from jaxdpo.compilation import Compilations, Programs, check_dtype, compile_all, persist

SHAPES = [jax.ShapeDtypeStruct((n, 3), "float32") for n in (2, 4)]
STATE = jax.ShapeDtypeStruct((3,), "float32")


def made(function=lambda x, batch: (x + batch.sum(0), x.sum())):
    step = Programs(jax.jit(function, donate_argnums=0), STATE, SHAPES)
    compile_all([step])
    return step


def test_compilations_are_counted_while_entered_only():
    x = jnp.ones(3)
    with Compilations() as found:
        for scale in (2.0, 3.0):
            jax.jit(lambda x, scale=scale: x * scale)(x)
    jax.jit(lambda x: x * 5.0)(x)
    assert found.so_far()["programs"] == 2 and found.so_far()["compile_seconds"] > 0


def test_programs_run_every_shape_without_compiling_and_donate():
    step, state = made(), jnp.ones(3)
    batches = [jnp.ones(shape.shape) for shape in SHAPES]
    with Compilations() as found, jax.transfer_guard("disallow"):
        for batch in (*batches, *batches):
            old = state
            state, _ = step(state, batch)
            assert old.is_deleted()
    assert len(step) == 2 and found.so_far()["programs"] == 0
    assert state.tolist() == [13.0] * 3


@pytest.mark.parametrize(
    "batch",
    [np.ones((8, 3), "f4"), np.ones((2, 3), "i4"), {"rows": np.ones((2, 3), "f4")}],
    ids=["shape", "dtype", "tree"],
)
def test_what_was_not_foreseen_is_an_error(batch):
    with pytest.raises(KeyError):
        made()(jnp.ones(3), batch)


def test_all_programs_go_to_whom_they_belong():
    add, multiply = (
        Programs(jax.jit(function), STATE, SHAPES)
        for function in (lambda x, y: x + y.sum(), lambda x, y: x * y.sum())
    )
    assert compile_all([add, multiply]) > 0
    for shape in SHAPES:
        x, y = jnp.full(3, 2.0), jnp.ones(shape.shape)
        assert (add(x, y)[0], multiply(x, y)[0]) == (2 + y.size, 2 * y.size)


def test_what_does_not_fit_a_device_says_so(monkeypatch):
    small = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 16})
    monkeypatch.setattr(jax, "local_devices", lambda: [small])
    with pytest.raises(InputError, match="does not fit.*batch_size"):
        made()


def test_what_the_compiler_finds_too_large_says_so(monkeypatch):
    def full(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm\n trace")

    monkeypatch.setattr(jax.stages.Lowered, "compile", full)
    with pytest.raises(InputError, match="micro_batches.*Ran out of memory in hbm[)]$"):
        made()


def test_a_dtype_that_the_device_lacks_is_named(monkeypatch):
    check_dtype("bfloat16")

    def lacking(*_, **__):
        raise ValueError("The precision 'F16_F16_F32' is not supported by dot_general on CPU")

    with monkeypatch.context() as patch:
        patch.setattr(compilation.qfunction, "token_logps", lacking)
        with pytest.raises(InputError, match="model.dtype: float16.*cpu.*dot_general"):
            check_dtype("float16")

    def refusing(_):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no F16 kernel\n trace")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refusing)
    with pytest.raises(InputError, match=r"float16.*\(UNIMPLEMENTED: no F16 kernel\); choose"):
        check_dtype("float16")


@pytest.fixture
def settings():
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_unless_another_is_given(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert persist() is None
    folder = tmp_path / "caches/jaxdpo/jax"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700  # what lies there is executed
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    assert persist() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, settings):
    (tmp_path / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file/cache"))
    warning = persist()
    assert "\n" not in warning and f"{tmp_path}/file/cache: cannot be written" in warning
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path, settings, mode):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    assert "not trusted (others own it or may write to it)" in persist()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_of_another_user_is_not_trusted(tmp_path, settings, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert "not trusted (others own it or may write to it)" in persist()


def test_without_a_home_nothing_is_written(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    jax.config.update("jax_compilation_cache_dir", None)
    assert "~/.cache/jaxdpo/jax: cannot be written to" in persist()
    assert not list(tmp_path.iterdir())


def test_the_users_own_folder_keeps_what_was_used_last(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation, "_ROOM", 5)
    folder = tmp_path / "jaxdpo/jax"
    folder.mkdir(mode=0o700, parents=True)
    # Made in this order, read in another one; the last was never read again.
    for name, read, made in [("a", 30, 10), ("b", 20, 20), ("c", 10, 25)]:
        (folder / f"{name}-cache").write_text("xx")
        os.utime(folder / f"{name}-cache", (read, made))
    for given, left in [(str(folder), "abc"), (None, "ac")]:
        jax.config.update("jax_compilation_cache_dir", given)
        assert persist() is None
        assert sorted(file.name for file in folder.iterdir()) == [f"{x}-cache" for x in left]


def test_it_can_be_turned_off(tmp_path, settings):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    jax.config.update("jax_enable_compilation_cache", False)
    assert persist() is None
    assert not (tmp_path / "cache").exists()


def test_the_next_process_compiles_nothing(tmp_path):
    program = (
        "import json, jax; from jaxdpo.compilation import Compilations, persist\n"
        "persist()\n"
        "with Compilations() as found: jax.jit(lambda x: x * 7.0)(3.0)\n"
        "print(json.dumps(found.so_far()))"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    first, second = (
        json.loads(subprocess.check_output([sys.executable, "-c", program], env=environment))
        for _ in range(2)
    )
    assert first["programs"] == second["programs"] > 0
    assert (first["programs_from_cache"], second["programs_from_cache"]) == (0, second["programs"])
    # What is counted when old ones are removed.
    kept = [file for file in (tmp_path / "cache").iterdir() if file.name.endswith("-cache")]
    assert len(kept) == first["programs"]
