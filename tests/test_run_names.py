"""A run is what its name says: its configuration, its data and its seed; and it is read, not trained, where it has finished."""
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data import idx_bytes

from sparselab.learn import assembly, experiments
from sparselab.learn.assembly import load_data, make_learner
from sparselab.learn.callbacks import StopWhenLost
from sparselab.learn.config import Config
from sparselab.learn.experiments import PROCEDURES, dense_partner, train
from sparselab.learn.files import locked, write_sealed
from sparselab.learn.find import fingerprint
from sparselab.learn.runs import Run

SHORT = dict(model="mlp", model_options={"widths": [6]}, epochs=1, eps=0.0, batch_size=20, device="cpu", method="static", sparsity=0.5,
             objective="natural")


def scans(folder: Path, classes: int, seed: int, count: int = 30) -> Path:
    """A data set of small images in `folder`; each shows its class in one pixel."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for stem in ("train", "t10k"):
        labels = np.repeat(np.arange(classes), count)
        images = rng.integers(0, 60, (len(labels), 5, 5))
        images[np.arange(len(labels)), 0, labels] = 220
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


@pytest.fixture
def config(tmp_path) -> Config:
    scans(tmp_path / "a" / "scans", 2, seed=1)
    return Config(**SHORT, dataset="scans", data_dir=str(tmp_path / "a"), runs_dir=str(tmp_path / "runs"))


def test_two_data_sets_of_one_name_have_runs_and_dense_partners_of_their_own(tmp_path, config):
    scans(tmp_path / "b" / "scans", 3, seed=2)
    other = replace(config, data_dir=str(tmp_path / "b"))
    assert config.run_id != other.run_id and dense_partner(config).run_id != dense_partner(other).run_id
    assert [train(each, []).summary["samples"] for each in (config, other)] == [60, 90]
    assert [train(dense_partner(each), []).summary["samples"] for each in (config, other)] == [60, 90]


def test_data_that_move_keep_the_name_and_one_pixel_changes_it(tmp_path, config):
    run = train(config, [])
    shutil.move(tmp_path / "a", tmp_path / "moved")
    moved = replace(config, data_dir=str(tmp_path / "moved"))
    path = replace(config, data_dir="", dataset=str(tmp_path / "moved" / "scans"))
    assert moved.run_id == path.run_id == run.path.name
    assert train(moved, []).path == train(path, []).path == run.path
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        file = tmp_path / "moved" / "scans" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert moved.run_id != run.path.name
        file.write_bytes(whole)
    assert moved.run_id == run.path.name


def test_a_file_changed_within_one_tick_of_the_clock_is_read_again(tmp_path, config):
    file = tmp_path / "a" / "scans" / "train-images-idx3-ubyte"
    whole, times = file.read_bytes(), file.stat()
    seen = {fingerprint("scans", tmp_path / "a")}
    for value in range(20):
        file.write_bytes(whole[:-1] + bytes([value]))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        seen.add(fingerprint("scans", tmp_path / "a"))
    assert len(seen) == 20 + (whole[-1] not in range(20))


def test_a_folder_of_another_run_is_neither_returned_nor_continued(tmp_path, config):
    run = train(config, [])
    begun = {**run._begun}
    for change, sentence in (({"fingerprint": "0" * 32}, "begun with other data"), ({"sparsity": 0.25}, "begun with sparsity 0.25, not 0.5")):
        write_sealed(run.path / "config.json", begun | change)
        for finished in (True, False):
            if not finished:
                (run.path / "summary.json").rename(run.path / "kept")
            with pytest.raises(ValueError, match=sentence):
                train(config, [])
            if not finished:
                (run.path / "kept").rename(run.path / "summary.json")
    write_sealed(run.path / "config.json", begun)
    assert train(config, []).path == run.path


def test_a_finished_run_is_read_and_nothing_else(config, monkeypatch):
    run = train(config, [])
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}

    def never(*args, **options):
        raise AssertionError("data were loaded or a model was built")

    monkeypatch.setattr(assembly, "load_data", never)
    monkeypatch.setattr(experiments, "make_learner", never)
    assert train(config, []).path == run.path
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_fresh_run_loads_its_data_and_builds_its_model_once(config, monkeypatch):
    calls = []
    for module, name, function in ((assembly, "load_data", load_data), (experiments, "make_learner", make_learner)):
        monkeypatch.setattr(module, name, lambda *args, name=name, function=function, **options: calls.append(name) or function(*args, **options))
    train(config, [])
    assert sorted(calls) == ["load_data", "make_learner"]


def test_a_run_that_another_process_trains_is_waited_for_and_used(config, capfd):
    longer = replace(config, epochs=40)
    child = os.fork()
    if child == 0:
        train(longer, [])
        os._exit(0)
    folder = Path(longer.runs_dir) / longer.run_id
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match="Another process is writing"):
        train(longer, [])
    run = train(longer, [], wait=True)
    assert os.waitpid(child, 0)[1] == 0 and run.finished and len(run.metrics) == 40
    said = capfd.readouterr().out
    assert "is being trained by another process: waiting for it to end, to use it" in said and "has finished before" in said


def test_a_run_whose_trainer_was_killed_is_continued_by_the_one_that_waits(config):
    child = os.fork()
    folder = Path(config.runs_dir) / config.run_id
    if child == 0:
        with locked(folder):
            time.sleep(1)
        os._exit(0)
    while not (folder / ".lock").exists():
        time.sleep(0.02)
    assert train(config, [], wait=True).finished
    os.waitpid(child, 0)


def test_a_perfect_network_on_uneven_classes_is_not_stopped_and_a_constant_one_is(tmp_path):
    """Nine of ten images are of one class: answering it always gives 90 %, and is no skill."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for stem, count in (("train", 400), ("t10k", 50)):
        labels = (np.arange(count) < count // 10).astype(int)
        images = np.zeros((count, 8, 8))
        images[np.arange(count), labels] = 220
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    config = Config(**SHORT | {"epochs": 8, "sparsity": 0.0, "method": "dense"}, dataset=str(folder), runs_dir=str(tmp_path / "runs"))
    run = train(config, [])
    assert run.metrics[-1]["skill"] == run.metrics[-1]["balanced"] == 1 and "collapse" not in run.summary
    lost = [{"epoch": epoch, "clean": 0.9, "balanced": 0.5, "skill": 0.0, "nnz": 9} for epoch in (6, 7, 8)]
    stop = StopWhenLost(tmp_path / "none.jsonl", patience=1)
    learner = make_learner(config)
    learner.row = lost[-1]
    with pytest.raises(RuntimeError, match=r"chance level \(90.0%, 50.0% in the mean over classes\)"):
        stop.after_epoch(learner)


@pytest.mark.parametrize("images", [21, 41])
def test_a_last_image_alone_joins_the_batch_before(tmp_path, images):
    scans(tmp_path / "scans", 2, seed=1, count=60)
    config = Config(**SHORT | {"model": "cnn5_bn", "model_options": {"width": 2}}, dataset=str(tmp_path / "scans"), train_samples=images,
                    runs_dir=str(tmp_path / "runs"))
    run = train(config, [])
    assert run.metrics[-1]["step"] == images // 20
    for single in ({"batch_size": 1}, {"train_samples": 1}):
        with pytest.raises(ValueError, match="is a BatchNorm, which trains on two or more images at a time"):
            train(replace(config, **single), [])


def test_a_part_of_the_training_images_is_looked_at_with_a_part_of_the_others(tmp_path):
    whole, part = (load_data(Config(dataset="digits", train_samples=count)) for count in (0, 100))
    assert len(part.train) == 100 and len(part.valid) == -(-100 * len(whole.valid) // len(whole.train)) == 12
    assert len(load_data(Config(dataset="digits", train_samples=100, validation=0.0)).valid) == 0


@pytest.mark.parametrize("method", ["static", "rigl", "gibbs", "snip", *sorted(PROCEDURES)])
def test_the_largest_seed_trains(tmp_path, method):
    options = {"colt": {"rate": 0.4}, "imp": {"rate": 0.5}, "dst_ensemble": {"members": 2}, "hydra": {"search_epochs": 1},
               "nrs": {"rate": 0.5, "regularizer": "none"}, "grafting": {"choose": "random"}}.get(method, {})
    attacked = {"eps": 0.1} if method == "gap" else {}
    config = Config(**SHORT | attacked | {"method": method, "method_options": options}, seed=2**64 - 1, train_samples=40, test_samples=10,
                    runs_dir=str(tmp_path / "runs"))
    run = train(config, [])
    assert run.path.name.endswith("-s18446744073709551615") and run.config.seed == 2**64 - 1 and Run(run.path).of(config)


def test_seeds_that_are_equal_in_their_lower_bits_start_from_other_weights():
    weights = [next(make_learner(Config(**SHORT, seed=seed)).model.parameters()).flatten()[:5].tolist() for seed in (0, 2**32, 2**53, 2**53 + 2**32)]
    assert len(set(map(tuple, weights))) == 4


def test_a_folder_in_an_unknown_form_is_answered_with_what_was_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "place" / "scans"
    (folder / "train").mkdir(parents=True)
    for name in ("a.npy", "b.npy", "train/c.txt"):
        (folder / name).touch()
    for dataset, data_dir in ((str(folder), ""), ("place/scans", ""), ("scans", str(tmp_path / "place"))):
        with pytest.raises(ValueError, match="scans holds 2 .npy files, train/; .*train holds 1 .txt file. A data set is four IDX files"):
            train(Config(**SHORT, dataset=dataset, data_dir=data_dir), [])
    for dataset, sentence in ((str(folder / "a.npy"), "is a file; dataset is the folder"), ("./nowhere", "nowhere does not exist")):
        with pytest.raises(ValueError, match=sentence):
            train(Config(**SHORT, dataset=dataset), [])
    assert not (tmp_path / "runs").exists()
