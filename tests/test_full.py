"""The full scale of the notebooks about papers as sweeps, and what a training is said to cost."""
import importlib.util
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sparselab.learn import Config
from sparselab.learn.assembly import make_learner
from sparselab.scale import estimate, expand, read_sweep

ROOT = Path(__file__).parent.parent
FULL = sorted((ROOT / "nbs" / "papers" / "full").glob("*.yaml"))
DIGITS = Config(method="rigl", sparsity=0.9, model="mlp", epochs=3, eps=0.05)


@pytest.fixture(scope="module")
def full():
    spec = importlib.util.spec_from_file_location("full", ROOT / "nbs" / "papers" / "full.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(configs) -> list[dict]:
    return [{**asdict(config), "runs_dir": "", "data_dir": ""} for config in configs]


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_a_sweep_of_a_paper_has_as_many_trainings_as_it_says(path):
    told = "\n".join(read_sweep(path) and re.findall(r"[\d,]+ trainings?: ", path.read_text()))
    points = expand(**read_sweep(path))
    assert points and f"{len(points):,} training" in told
    assert {point.config.runs_dir for point in points} == {"runs/papers"}, "where the notebook looks for them"


def test_a_sweep_is_what_its_notebook_trains(full):
    """One of the quick ones: nothing is trained, and the rows come back from the file's two parts as they were."""
    configs = full.configs_of(ROOT / "nbs" / "papers" / "sparsevlr_wide.ipynb")
    base, grid = full.grids(configs)
    assert configs and settings(point.config for point in expand(base, grid, with_dense=False)) == settings(configs)
    assert {config.dataset for config in configs} == {"mnist"}
    assert settings(point.config for point in expand(**read_sweep(ROOT / "nbs/papers/full/sparsevlr_wide.yaml"))) == settings(configs)


def test_rows_that_differ_in_more_than_seeds_stay_apart(full):
    configs = [replace(DIGITS, seed=seed, sparsity=s, method_options=o) for s, o in ((0.5, {}), (0.9, {"end": 0.5})) for seed in (2, 3)]
    base, grid = full.grids(configs)
    assert "sparsity" not in base and [row["seed"] for row in grid] == [[2, 3], [2, 3]]
    assert settings(point.config for point in expand(base, grid, with_dense=False)) == settings(configs)


def test_flops_are_those_that_a_run_has_counted():
    from sparselab.learn.costs import cost

    config = replace(DIGITS, objective="crown_ibp", method="dense", sparsity=0.0)
    learner = make_learner(config)
    learner.fit()
    assert estimate(config, 0).flops == pytest.approx(cost(learner)["training_dense"], rel=1e-6)
    assert estimate(config, 0).steps == learner.step


def test_memory_grows_with_the_batch_and_the_network():
    small, large = (estimate(replace(DIGITS, batch_size=n, objective="natural"), 0).bytes for n in (16, 64))
    activations = large - small
    assert activations == pytest.approx(48 * 4 * (64 + 2 * sum((100, 100)) + 10), rel=0.6)
    wide = estimate(replace(DIGITS, batch_size=16, objective="natural", model_options={"widths": [500, 500]}), 0).bytes
    assert wide - small > 4 * 4 * (64 * 500 + 500 * 500 + 5000 - 64 * 100 - 100 * 100 - 1000) * 0.9  # weights, gradients and two moments


def test_a_method_in_rounds_says_so():
    found = estimate(replace(DIGITS, method="imp"), 0)
    assert found.in_rounds and str(found).endswith("for each of its trainings")
    assert found.flops == estimate(replace(DIGITS, method="dense", sparsity=0.0), 0).flops


def test_what_cannot_be_estimated_is_a_sentence():
    with pytest.raises(ValueError, match="steps=-1, but so many steps are measured"):
        estimate(DIGITS, -1)
    with pytest.raises(ValueError, match="There is no method called 'rigel'"):
        estimate(replace(DIGITS, method="rigel"), 0)
