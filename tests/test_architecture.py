"""Who may import whom: arrows point inward only, and torch stays out of the package's imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Pure: arrays in, arrays out. Each may import only these modules of the project.
PURE = {"qfunction": {"scored_logps"}, "token_mdp": set(), "losses": {"qfunction"}}
PURE |= {"sharding": set(), "scored_logps": set(), "packing": set()}
PURE |= {"accounting": {"attention", "pythia_config"}}
PURE |= {"pythia": {"attention", "pythia_config"}, "pythia_config": set(), "attention": set()}
PURE |= {"pythia_cache": {"attention", "pythia", "pythia_config", "sharding"}}
# Decoding knows no model: it is given one.
DECODING = {"scorers", "hypotheses", "top_k", "sample", "beam", "loop", "schedule"}
PURE |= dict.fromkeys(
    [f"decoding/{module}" for module in (*DECODING, "__init__")], DECODING | {"sharding"}
)
# Libraries that bring files, flags, clocks or other people's models.
EFFECTS = {"orbax", "transformers", "datasets", "ml_collections", "absl", "tokenizers", "grain"}
EFFECTS |= {"safetensors", "huggingface_hub", "os", "time", "pathlib", "json", "rich", "pyarrow"}
MODULES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("jaxdpo/**/*.py"))


def imports(path, top_level_only=False):
    """(library, names taken from it) of every import in a file."""
    tree = ast.parse((ROOT / path).read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", {alias.name for alias in node.names}


def of_the_project(path):
    modules = {Path(m).stem for m in MODULES}
    for library, names in imports(path):
        if library == "jaxdpo" or library.startswith("jaxdpo."):
            yield from (set(library.split(".")[1:]) | names) & modules


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_pure_ring_imports_inward_only(module):
    path = f"jaxdpo/{module}.py"
    assert set(of_the_project(path)) <= PURE[module]
    assert not {library.split(".")[0] for library, _ in imports(path)} & EFFECTS


def test_stages_are_imported_by_experiments_alone_and_those_by_launchers():
    importing = lambda name: [path for path in MODULES if name in of_the_project(path)]
    assert importing("stages") == ["jaxdpo/experiment.py"] and not importing("experiment")


@pytest.mark.parametrize("path", MODULES)
def test_slow_libraries_are_imported_inside_functions_only(path):
    libraries = {library.split(".")[0] for library, _ in imports(path, top_level_only=True)}
    assert not libraries & {"torch", "datasets", "transformers", "openai"}


def test_launchers_are_thin_and_shadow_no_standard_module():
    import sys

    for path in sorted(ROOT.glob("launch/*.py")):
        assert path.stem not in sys.stdlib_module_names, path
        most = 90 if path.stem == "door" else 64  # which all of them go through
        assert len(path.read_text().splitlines()) <= most, path
