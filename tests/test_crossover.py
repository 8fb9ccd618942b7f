"""Where sparse steps begin to pay is measured once on a machine, kept, and gone by."""
import json
import threading
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from sparselab.learn import Config, crossover, objective, train
from sparselab.learn.assembly import make_learner
from sparselab.learn.crossover import cache_folder, crossing, machine
from sparselab.learn.sparse_steps import SparseSteps, usual
from sparselab.sparse import sparsify
from sparselab.sparse.products import with_numba, without_numba

SMALL = Config(dataset="digits", train_samples=300, epochs=4, batch_size=100, eps=0.02, method="static", sparsity=0.9)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """An empty folder for measurements, and a stand-in for the measurement that lists what it was asked for."""
    asked = []
    monkeypatch.setenv("SPARSELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(crossover, "measured", lambda large, fused: asked.append((large, fused)) or 0.2)
    return asked


def test_each_kind_of_step_is_measured_once_and_kept(asked):
    kinds = [(large, fused) for large in (False, True) for fused in (False, True)]
    assert [crossover.crossover(*kind) for kind in kinds * 2] == [0.2] * 8
    assert asked == kinds
    kept = json.loads((cache_folder() / "crossover.json").read_text())
    assert kept == {machine(): {"small": 0.2, "small fused": 0.2, "large": 0.2, "large fused": 0.2}}
    if with_numba():
        with without_numba():
            assert crossover.crossover(False, False) == 0.2 and len(asked) == 5  # other kernels are another machine
    torch.set_num_threads(2)
    assert crossover.crossover(False, False) == 0.2 and asked[-1] == (False, False) and len(asked) == (6 if with_numba() else 5)


@pytest.mark.parametrize("found, large, bound", [(9.0, False, "timed"), (float("inf"), True, "timed"), (-3.0, False, "third"), (0.0, True, "third")])
def test_a_measurement_is_believed_within_what_is_likely(asked, monkeypatch, found, large, bound):
    monkeypatch.setattr(crossover, "measured", lambda *kind: found)
    timed = crossover.DENSITIES[with_numba()][large][1]
    likely = usual(large, False)
    assert crossover.crossover(large, False) == pytest.approx(min(timed, 3 * likely) if bound == "timed" else likely / 3, abs=1e-4)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": {"small": 7.0}}', '{"a": {"small": "much"}}'])
def test_a_file_that_nobody_has_written_counts_as_nothing(asked, text):
    cache_folder().mkdir()
    (cache_folder() / "crossover.json").write_text(text)
    assert crossover.crossover(False, False) == 0.2 and len(asked) == 1
    assert crossover.crossover(False, False) == 0.2 and len(asked) == 1


@pytest.mark.parametrize("where", ["", "a file"])
def test_where_nothing_can_be_kept_nothing_is_measured(asked, monkeypatch, tmp_path, where):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("SPARSELAB_CACHE", where and str(tmp_path / where))
    assert crossover.crossover(False, False) == usual(False, False) and not asked


def test_a_share_that_was_kept_counts_where_nothing_can_be_written(asked, monkeypatch):
    assert crossover.crossover(False, False) == 0.2
    monkeypatch.setattr(crossover, "FileLock", mock.Mock(side_effect=PermissionError("read only")))
    assert crossover.crossover(False, False) == 0.2 and len(asked) == 1
    assert crossover.crossover(True, False) == usual(True, False) and len(asked) == 1


def test_what_was_measured_of_other_steps_is_measured_anew(asked, monkeypatch):
    crossover.crossover(False, False)
    monkeypatch.setattr(crossover, "GENERATION", crossover.GENERATION + 1)
    assert crossover.crossover(False, False) == 0.2 and len(asked) == 2


def test_what_cannot_be_kept_is_measured_once(asked):
    (cache_folder() / "crossover.json").mkdir(parents=True)
    assert [crossover.crossover(False, False) for _ in range(3)] == [usual(False, False)] * 3 and len(asked) == 1


def test_a_user_without_a_home_and_one_with_a_tilde(asked, monkeypatch):
    monkeypatch.setenv("SPARSELAB_CACHE", "~/measured")
    assert "~" not in str(cache_folder())
    monkeypatch.delenv("SPARSELAB_CACHE")
    monkeypatch.setattr(crossover.Path, "home", mock.Mock(side_effect=RuntimeError("Could not determine home directory.")))
    assert crossover.crossover(False, False) == usual(False, False) and not asked


def test_another_default_type_trains_dense_and_says_so():
    torch.set_default_dtype(torch.float64)
    try:
        steps = make_learner(SMALL).on_nonzeros
    finally:
        torch.set_default_dtype(torch.float32)
    assert steps.closed and "what PyTorch makes by default is torch.float64" in steps.reason


def test_a_step_that_would_not_pay_is_named_in_the_log(asked, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(crossover, "measured", lambda *kind: 0.05)
    monkeypatch.setattr(crossover, "usual", lambda *kind: 0.05)
    train(replace(SMALL, sparsity=0.5, epochs=1, runs_dir=str(tmp_path / "runs")))
    log = capsys.readouterr().out
    assert "In the first epoch training steps used all weights" in log and "more than 5%, up to which that saves time here" in log


def test_a_network_with_a_number_that_is_none_diverges_with_the_same_sentence_sparse_and_dense():
    for kernels in ("auto", "dense"):
        learner = make_learner(replace(SMALL, kernels=kernels))
        with torch.no_grad():
            learner.sparsifier.masks.weights["fc1.weight"][learner.sparsifier.masks["fc1.weight"]] = float("nan")
        with pytest.raises(FloatingPointError, match="the loss is nan"):
            learner.train_epoch()


def test_of_many_who_ask_at_once_one_measures(asked):
    given = []
    threads = [threading.Thread(target=lambda: given.append(crossover.crossover(True, True))) for _ in range(6)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert given == [0.2] * 6 and asked == [(True, True)]


def test_a_measurement_leaves_the_random_state_and_the_shares_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELAB_CACHE", str(tmp_path))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    share = crossover.crossover(False, False)
    assert torch.equal(state, torch.get_rng_state())
    assert usual(False, False) / 3 - 1e-4 <= share <= 0.8


def test_the_crossing_is_where_two_lines_meet():
    line = 1.5, 7.0  # 1.5 ms and 7 ms for every weight
    times = tuple(line[0] + line[1] * density for density in (0.1, 0.4))
    assert crossing((0.1, 0.4), times, line[0] + line[1] * 0.23) == pytest.approx(0.23)
    assert crossing((0.1, 0.4), (2.0, 1.0), 5.0) == float("inf")


def test_a_training_goes_by_the_share_that_was_measured(asked, monkeypatch):
    found = {}
    for share in (0.05, 0.8):
        monkeypatch.setattr(crossover, "usual", lambda *kind, share=share: share)
        monkeypatch.setattr(crossover, "measured", lambda *kind, share=share: share)
        learner = make_learner(replace(SMALL, sparsity=0.8))
        learner.train_epoch()
        found[share] = learner.on_nonzeros.count
        assert learner.on_nonzeros.shares == {"small": share}
        (cache_folder() / "crossover.json").unlink()
    assert found == {0.05: 0, 0.8: 3}


def test_a_resumed_training_goes_on_with_the_share_that_it_began_with(asked, monkeypatch):
    def begun():
        return make_learner(replace(SMALL, sparsity=0.8, epochs=3))
    monkeypatch.setattr(crossover, "measured", lambda *kind: 0.8)
    monkeypatch.setattr(crossover, "usual", lambda *kind: 0.4)
    whole, first = begun(), begun()
    for _ in range(3):
        whole.train_epoch()
    first.train_epoch()
    (cache_folder() / "crossover.json").unlink()
    monkeypatch.setattr(crossover, "measured", lambda *kind: 0.01)  # the machine is busy now, or is another one
    second = begun()
    second.load_state_dict(first.state_dict())
    second.train_epoch(), second.train_epoch()
    assert second.on_nonzeros.count == 2 * whole.on_nonzeros.count / 3 > 0
    assert all(torch.equal(one, other) for one, other in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True))


def test_a_loss_that_stops_being_one_linear_bound_is_decided_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    optimizer, asked = torch.optim.Adam(model.parameters()), []

    def pays(large, fused):
        asked.append(fused)
        return 0.01 if fused else 0.9

    sparsifier = sparsify(model, optimizer, "static", 0.7, 100)
    steps = SparseSteps(model, optimizer, sparsifier, objective("crown_ibp", 0.02), "auto", pays)
    x, y = torch.rand(20, 1, 8, 8), torch.randint(0, 10, (20,))
    for progress, sparse in ((0.1, False), (0.2, False), (0.9, True), (0.9, True), (0.1, False), (0.9, True)):
        assert steps.ready(x, progress) == sparse
        if sparse:
            steps.step(x, y, progress)
    assert asked == [True, False] and steps.shares == {"small fused": 0.01, "small": 0.9}
    with mock.patch.object(SparseSteps, "_take_up", side_effect=AssertionError("taken up again")):
        assert steps.ready(x, 0.95)
