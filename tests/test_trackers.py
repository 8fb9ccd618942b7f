"""Metrics in trackers: TensorBoard's own files, and modules with the calls of W&B and Trackio."""
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from sparselab.learn import Callback, Config, Track, train
from sparselab.learn.trackers import TRACKERS, send

CONFIG = Config(model="mlp", epochs=3, eps=0.02, sparsity=0.9, train_samples=200, test_samples=20)


class Stop(Callback):
    def after_epoch(self, learner):
        if learner.epoch == 2:
            raise KeyboardInterrupt


class Run:
    """Writes down what a run of W&B or Trackio is told."""

    def __init__(self, **options):
        self.options, self.rows, self.finished = options, [], 0

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def config(tmp_path):
    return replace(CONFIG, runs_dir=str(tmp_path))


def scalars(folder, name):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder)).Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]


def test_tensorboard_has_every_epoch_once_after_a_stop_too(config):
    with pytest.raises(KeyboardInterrupt):
        train(config, (Track("tensorboard", config), Stop()))
    run = train(config, (Track("tensorboard", config),))
    for name in ("verified", "loss", "nnz"):
        assert scalars(run.path / "tensorboard", name) == [(row["step"], row[name]) for row in run.metrics]
    assert len(run.metrics) == 3


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_opened_by_name_and_closed(name, config, monkeypatch):
    opened, module = [], ModuleType(name)
    module.init = lambda **options: opened.append(Run(**options)) or opened[-1]
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(KeyboardInterrupt):
        train(config, (Track(name, config), Stop()))
    run = train(config, (Track(name, config),))
    first, second = opened
    assert first.options["name"] == second.options["name"] == config.run_id and second.options["resume"] == "allow"
    assert first.options["config"]["eps"] == 0.02
    assert [*first.rows, *second.rows] == [(row["step"], {n: v for n, v in row.items() if n != "step"}) for row in run.metrics]
    assert (first.finished, second.finished) == (0, 1)
    assert send(run, name) == 3 and opened[2].rows == [*first.rows, *second.rows] and opened[2].finished == 1


def test_an_open_tracker_stays_open(config):
    tracker = Run()
    train(config, (Track(tracker),))
    assert len(tracker.rows) == 3 and not tracker.finished


def test_what_cannot_be_tracked_is_a_sentence(config, monkeypatch):
    with pytest.raises(ValueError, match="Did you mean 'wandb'"):
        Track("wandbb", config)
    with pytest.raises(ValueError, match="A tracker has log"):
        Track(object())
    with pytest.raises(ValueError, match="is opened for a configuration"):
        Track("tensorboard")
    with pytest.raises(ValueError, match="imp is several trainings"):
        Track("tensorboard", replace(config, method="imp"))
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ImportError, match=f"{name} is not installed: pip install {name}"):
            Track(name, config)
