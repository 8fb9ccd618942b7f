"""A run is killed, starved of disk and given nonsense; it must continue to the same bits or say a sentence, and lose nothing."""
import importlib.util
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from sparselab.learn.assembly import load_data, make_learner, new_model
from sparselab.learn.config import Config
from sparselab.learn.data import to_float
from sparselab.learn.evaluation import validate
from sparselab.learn.experiments import ALL_METHODS, PROCEDURES, train
from sparselab.learn.learner import TrainingStopped
from sparselab.learn.runs import Run
from sparselab.sparse.compaction import compact
from sparselab.sparse.masks import prunable
from sparselab.sparse.sparsify import METHODS, method_options

SMALL = dict(model="mlp", model_options={"widths": [24, 24]}, epochs=4, eps=0.02, test_samples=60, device="cpu",
             method_options={"update_every": 3})


@cache
def warm() -> None:
    """Train once in this process: what that imports and compiles, the processes forked from it have, and are killed while they train."""
    with tempfile.TemporaryDirectory() as folder:
        train(Config(**SMALL | {"epochs": 1, "test_samples": 2}, runs_dir=folder), [])


def in_child(config: Config, killed_after: float | None = None) -> None:
    """Train `config` in a forked process; kill -9 it after some seconds, or wait for it to end."""
    warm()
    child = os.fork()
    if child == 0:
        try:
            train(config)
            os._exit(0)
        except BaseException as error:
            print(repr(error))
            os._exit(1)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert killed_after is not None or status == 0


def left_by(run: Run) -> dict:
    summary = {k: v for k, v in run.summary.items() if k not in ("seconds", "config")}
    masks = [(run.path / "masks" / name).read_bytes() for name in ("start.bin", "updates.bin", "updates.jsonl")]
    return {"model": (run.path / "model.safetensors").read_bytes(), "summary": summary, "masks": masks,
            "metrics": run.metrics, "stability": run.stability,
            "recordings": {str(path.relative_to(run.path)): path.read_bytes() for folder in ("stability", "weights", ".")
                           for path in sorted((run.path / folder).glob("*.safetensors"))},
            "rounds": {nested.path.name: left_by(nested) for nested in run.rounds}}


def killed_and_resumed(tmp_path: Path, moments: int, **options) -> None:
    whole = Config(**SMALL | options, runs_dir=str(tmp_path / "whole"))
    warm()
    started = time.perf_counter()
    in_child(whole)
    length = time.perf_counter() - started
    expected = left_by(Run(tmp_path / "whole" / whole.run_id))
    rng = random.Random(0)
    for i in range(moments):
        config = replace(whole, runs_dir=str(tmp_path / str(i)))
        in_child(config, killed_after=rng.uniform(0, length))
        in_child(config)
        assert left_by(Run(tmp_path / str(i) / config.run_id)) == expected, f"moment {i}"


def test_killed_at_random_moments_a_run_resumes_to_the_same_bits(tmp_path):
    killed_and_resumed(tmp_path, 5)


# what makes each method do all that it does within a few steps, on a network that it can prune
TINY = {"slimming": {"model": "cnn5_bn", "model_options": {"width": 2}}, "imp": {"method_options": {"rate": 0.5, "rewind_epochs": 1}},
        "colt": {"sparsity": 0.7, "method_options": {"rate": 0.45}}, "gap": {"sparsity": 0.7}, "scratch_b": {"method_options": {"most": 2}},
        "dst_ensemble": {"method_options": {"members": 2, "update_every": 3}}, "nrs": {"method_options": {"rate": 0.5}},
        "hydra": {"method_options": {"search_epochs": 1}},
        "card": {"method_options": {"rate": 0.8, "augmentations": ["gaussian", "blur"]}}}


def tiny(method: str) -> dict:
    """Options of a configuration in which `method` shows all of itself."""
    update = {"update_every": 3} if "update_every" in method_options(method if method in METHODS else "static") else {}
    return {"method": method, "sparsity": 0.8, "epochs": 2, "method_options": update, "train_samples": 200, "test_samples": 20} | TINY.get(method, {})


@pytest.mark.parametrize("method", sorted(PROCEDURES))
def test_killed_between_and_within_rounds_a_procedure_resumes_to_the_same_bits(tmp_path, method):
    killed_and_resumed(tmp_path, 2, **tiny(method), objective="natural")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["natural", "crown_ibp"])
@pytest.mark.parametrize("method", sorted(ALL_METHODS))
def test_killed_at_random_moments_every_method_resumes_to_the_same_bits(tmp_path, method, objective):
    killed_and_resumed(tmp_path, 3, **tiny(method), objective=objective)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"method": "gmp", "objective": "crown_ibp"}, {"method": "vlr_projection",
                                     "method_options": {}, "model": "cnn5_bn", "model_options": {"width": 4}}])
def test_killed_at_twenty_random_moments(tmp_path, options):
    killed_and_resumed(tmp_path, 20, **options)


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(**SMALL, runs_dir=str(tmp_path / "runs"))


def test_a_finished_run_is_returned_and_a_fresh_one_keeps_the_old(config, capsys):
    first = train(config)
    written = (first.path / "summary.json").stat().st_mtime_ns
    assert (train(config).path / "summary.json").stat().st_mtime_ns == written
    assert "has finished before" in capsys.readouterr().out
    again = train(replace(config, resume=False))
    kept = Run(first.path.with_name(first.path.name + ".old-1"))
    assert left_by(kept) == left_by(again)


def test_the_log_is_a_table_with_nothing_between_its_lines_and_says_above_it_when_masks_hardly_move(tmp_path, capsys):
    short = Config(method="rigl", model="mlp", sparsity=0.9, epochs=3, eps=0.0, train_samples=300, test_samples=20, runs_dir=str(tmp_path))
    train(short)
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("epoch     loss"))
    assert [line.split()[0] for line in lines[head + 1:head + 4]] == ["1", "2", "3"]
    assert [line for line in lines[:head] if line.startswith("In ") and "RigL never replaces a weight" in line and "update_every" in line]
    assert [line for line in lines[:head] if "nonzero weights alone" in line or "use all weights" in line]
    train(replace(short, method_options={"update_every": 1}))
    assert "RigL" not in capsys.readouterr().out


def test_a_network_that_loses_most_of_its_accuracy_says_so_wherever_it_is_shown(tmp_path, capsys):
    """Pruned to 118 weights by magnitude, it stays above chance, so it is not stopped; its last epochs are a fifth of its best."""
    pruned = Config(**SMALL | {"epochs": 12, "eps": 0.0, "method_options": {}}, method="gmp", sparsity=0.95, objective="natural")
    run = train(replace(pruned, runs_dir=str(tmp_path)), [])
    clean = [row["clean"] for row in run.metrics]
    said = run.summary["collapse"]
    assert 0.12 < clean[-1] < max(clean) / 2 and f"{max(clean):.1%}" in said and f"is {clean[-1]:.1%} at the end, with 118 weights" in said
    assert said in capsys.readouterr().out and said in run._repr_html_()
    kept = train(replace(pruned, sparsity=0.5, runs_dir=str(tmp_path)), [])
    assert "collapse" not in kept.summary and "collapse" not in kept._repr_html_()


def test_the_summary_says_what_the_files_say(config):
    run = train(config)
    summary = run.summary
    assert summary["nnz"] == round(0.01 * summary["total"]) == sum(layer["nnz"] for layer in summary["layers"].values())
    assert summary["nnz"] == sum(run.history.counts(-1).values())
    assert sum(int((w != 0).sum()) for name, w in run.weights.items() if name in summary["layers"]) <= summary["nnz"]
    accuracy = summary["accuracy"]
    assert accuracy["verified"] <= accuracy["pgd"] <= accuracy["clean"]
    assert abs(sum(summary["verified_by"].values()) - accuracy["verified"]) < 1e-6
    assert Config.read(summary["config"]) == config
    assert [row["epoch"] for row in run.metrics] == [row["epoch"] for row in run.stability] == [1, 2, 3, 4]


def test_a_truncated_checkpoint_costs_an_epoch_not_the_run(config):
    expected = left_by(train(config))
    aside = replace(config, runs_dir=config.runs_dir + "2")
    run = train(aside)
    for name in ("summary.json", "model.safetensors"):
        (run.path / name).unlink()
    newest = max((run.path / "checkpoint").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="not a readable checkpoint .* checkpoint before it is used"):
        assert left_by(train(aside)) == expected
    (run.path / "summary.json").unlink()
    for path in (run.path / "checkpoint").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No checkpoint .* can be read.*resume=False"):
        train(aside)
    assert run.metrics == expected["metrics"]


@pytest.mark.parametrize(("values", "sentence"), [
    ({"sparsity": 1.0}, "share of weights removed|from 0 up to but not including 1; got 1.0"),
    ({"sparsity": -1}, "got -1"), ({"sparsity": "abc"}, "sparsity is a number .* got 'abc'"),
    ({"sparsity": float("nan")}, "got nan"), ({"sparsty": 0.9}, "'sparsty'. Did you mean 'sparsity'"),
    ({"method": "rigel"}, "method called 'rigel'. Did you mean 'rigl'"), ({"dataset": "mnits"}, "mnist"),
    ({"model": "cnn44"}, "model called 'cnn44'. Did you mean 'cnn4'"), ({"objective": "crownibp"}, "crown_ibp"),
    ({"eps": "eight"}, "eps is a number such as .* got 'eight'"), ({"engine": "lirpa"}, "auto_lirpa"),
    ({"dataset": "kmnist"}, "kmnist"), ({"device": "tpu0"}, "device 'tpu0' cannot be used here"),
    ({"optimizer": "lion"}, "optimizer called 'lion'"), ({"distribution": "erkk"}, "'erkk'"),
    ({"method_options": {"drop_fracton": 1}}, "Did you mean 'drop_fraction'"),
    ({"objective_options": {"kapa_end": 1}}, "Did you mean 'kappa_end'"),
    ({"sparsity": 0.9999}, "largest feasible sparsity is"), ({"init": "kaimng"}, "init called 'kaimng'. Did you mean 'kaiming'"),
    ({"init": "sparse_kaiming", "method": "gibbs", "method_options": {}}, "gibbs goes on drawing .* choose init 'kaiming'"),
])
def test_bad_input_is_a_sentence_and_writes_nothing(tmp_path, monkeypatch, values, sentence):
    monkeypatch.delenv("SPARSELAB_DATA", raising=False)
    runs = tmp_path / "runs"
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        train(Config.read({**SMALL, "model_options": {} if "model" in values else SMALL["model_options"],
                           "runs_dir": str(runs), **values}))
    assert not runs.exists()


def test_eps_may_be_a_fraction_of_255():
    assert Config.read({"eps": "8/255"}).eps == 8 / 255


def test_a_read_only_runs_dir_is_a_sentence(config):
    with pytest.raises(OSError, match="/proc/runs.* cannot be written .*choose another runs_dir"):
        train(replace(config, runs_dir="/proc/runs"))


def test_a_full_disk_loses_nothing_and_the_run_continues_when_there_is_room(config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk of its own needs the right to mount one")
    try:
        small = replace(config, runs_dir=str(disk), epochs=8)
        with pytest.raises(OSError, match="No space left on device.*run the same command again"):
            train(small)
        run = Run(disk / small.run_id)
        assert not run.finished and run.config == small
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        expected = train(replace(small, runs_dir=config.runs_dir))
        assert left_by(train(small)) == left_by(expected)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_divergence_is_reported_before_anything_of_it_is_saved(config):
    with pytest.raises(TrainingStopped, match=r"diverged in epoch 1 \(.*\) at learning rate 1e\+30. Lower lr"):
        train(replace(config, lr=1e30, grad_clip=0.0, optimizer="sgd", method="dense", method_options={}))
    run = next(Path(config.runs_dir).iterdir())
    assert not Run(run).metrics and not (run / "summary.json").exists()


def test_a_collapsed_network_is_reported(config):
    hopeless = replace(config, eps=0.5, epochs=12, sparsity=0.999, model_options={"widths": [400, 400]},
                       objective_options={"until": 0.1, "kappa_end": 0.0})
    for _ in range(2):  # continued, it counts the epochs before
        with pytest.raises(TrainingStopped, match="chance level .* has collapsed"):
            train(hopeless)
        assert len(next(Run(path) for path in Path(config.runs_dir).iterdir()).metrics) == 8, "the ninth epoch is the third at chance"


def test_two_processes_do_not_write_one_run(config):
    child = os.fork()
    if child == 0:
        train(replace(config, epochs=400))
        os._exit(0)
    try:
        folder = Path(config.runs_dir) / replace(config, epochs=400).run_id
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.05)
        with pytest.raises(RuntimeError, match="Another process is writing"):
            train(replace(config, epochs=400))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("objective", ["natural", "pgd", "crown_ibp", "sabr", "mtl_ibp", "cc_ibp", "exp_ibp", "taps", "staps"])
def test_every_objective_trains_a_batchnorm_network_sparse(config, objective):
    run = train(replace(config, objective=objective, model="cnn5_bn", model_options={"width": 4}, epochs=2, sparsity=0.8,
                        train_samples=300, test_samples=1, objective_options={"attack_steps": 3} if objective == "pgd" else {}))
    assert run.summary["nnz"] == round(0.2 * run.summary["total"]) and len(run.metrics) == 2


@pytest.mark.parametrize("objective", [pytest.param("natural", marks=pytest.mark.slow), "crown_ibp"])
@pytest.mark.parametrize("method", sorted(ALL_METHODS))
def test_every_method_trains_a_convolutional_network_under_any_loss(config, method, objective):
    small = dict(model="cnn5_bn", model_options={"width": 2}, objective=objective, test_samples=1, batch_size=40, train_samples=200, epochs=1)
    options = tiny(method) | {"sparsity": 0.6 if method in ("colt", "gap") else 0.8}
    options |= {"imp": {"method_options": {"rate": 0.5}},  # one epoch leaves nothing to rewind to
                "colt": {"method_options": {"rate": 0.7}}}.get(method, {})  # three rounds of two parts
    run = train(replace(config, **options | small), callbacks=[])
    flops, total, kept = run.summary["flops"], run.summary["total"], round((1 - options["sparsity"]) * run.summary["total"])
    if method == "slimming":
        assert abs(run.summary["nnz"] - kept) < 0.05 * total and run.summary["nnz"] == compact_weights(run)
    else:
        assert run.summary["nnz"] == (total if method == "dense" else kept)
    assert flops["inference"] <= flops["inference_dense"] and 0 < flops["training"]
    assert flops["loss_multiples"][-1] > 2 or objective == "natural" or method == "hard_concrete"  # its last training is natural
    assert set(flops["layers"]) == set(run.summary["layers"])
    assert (run.path / "dense.safetensors").exists() == ("dense_accuracy" in run.summary) == (method == "acdc")
    assert ("ensemble" in run.summary) == (method in ("edst", "dst_ensemble", "card"))


def compact_weights(run: Run) -> int:
    """How many weights the physically smaller network has; it must be the same function."""
    config = run.config
    data = load_data(config)
    model = new_model(config, data, 0).eval()
    model.load_state_dict(run.weights)
    x = to_float(data.test.images[:20])
    small = compact(model, x[:2])
    assert torch.allclose(small(x), model(x), atol=1e-5)
    return sum(weight.numel() for weight in prunable(small).values())


@pytest.mark.parametrize(("method", "options", "sentence"), [
    ("imp", {"rate": 0}, "rate above 0"), ("imp", {"rewind_epochs": 4}, "rewind_epochs is from 0 to below epochs = 4; got 4"),
    ("colt", {"parts": 1}, "parts is from 2 to the 10 classes"), ("jackpots", {"pretrain_epochs": -1}, "at least 0; got -1"),
    ("scratch_e", {"source": "magnitude"}, "method to prune with called 'magnitude'"), ("scratch_b", {"most": 0.5}, "at least 1; got 0.5"),
    ("colt", {"parts": None}, "parts is from 2 to the 10 classes"), ("dst_ensemble", {"members": None}, "members is at least 1; got None"),
    ("scratch_e", {"source": ["gmp"]}, "Did you mean 'gmp'"), ("scratch_b", {"most": None}, "most is a number of at least 1; got None"),
    ("hydra", {"dense": None}, "dense is a list of names"),
    ("dst_ensemble", {"members": 0}, "members is at least 1; got 0"), ("dst_ensemble", {"membrs": 2}, "Did you mean 'members'"),
    ("imp", {"dense": []}, "no option of method imp called 'dense'"), ("scratch_b", {"update_every": 3}, "called 'update_every'"),
    ("edst", {"members": 0}, "members is from 1 to"), ("slimming", {}, "no BatchNorm between two layers")])
def test_what_a_procedure_cannot_do_is_a_sentence_and_writes_nothing(config, method, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(replace(config, method=method, sparsity=0.8, method_options=options))
    assert not Path(config.runs_dir).exists()


def test_the_second_engine_trains_the_same_network(config):
    if importlib.util.find_spec("auto_LiRPA") is None:
        pytest.skip("auto_LiRPA is not installed")
    one = replace(config, epochs=1, method="static", method_options={}, test_samples=20)
    native, other = train(one), train(replace(one, engine="auto_lirpa"))
    for name, weight in native.weights.items():
        assert torch.allclose(weight, other.weights[name], atol=1e-4), name
    assert json.loads((other.path / "config.json").read_text())["engine"] == "auto_lirpa"


@pytest.mark.slow
def test_sparsevlr_is_not_worse_for_four_times_the_epochs():
    found = []
    for epochs in (50, 200):
        learner = make_learner(Config(dataset="digits", model="mlp", sparsity=0.97, eps=0.05, epochs=epochs))
        for _ in range(epochs):
            learner.train_epoch()
        found.append(validate(learner.model, learner.data.test, 0.05)[0]["verified"])
    assert 0.75 < found[0] < found[1] + 0.01
