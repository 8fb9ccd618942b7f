"""What is not computed where nobody asks for it: proofs at radius 0, a reading that is known, statistics that no bound needs."""
import math

import pytest
import torch
from torch import nn

from sparselab import program
from sparselab.learn import evaluation, losses
from sparselab.learn.data import Split
from sparselab.learn.objectives import objective
from sparselab.learn.recordings import NeuronSums
from sparselab.robust.ibp import interval_pass
from sparselab.robust.modes import eval_mode
from sparselab.robust.neurons import as_row
from sparselab.robust.verification import verify


class Rounded(nn.Module):
    """A layer that nobody can read: what it does depends on the values of its activations."""

    def forward(self, x):
        return x if bool((x > 0).any()) else 2 * x


def task(net: nn.Module = None):
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8), torch.randint(0, 3, (60,)))
    return net or nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), split


def test_at_radius_0_the_answer_is_the_proof_and_no_bound_or_attack_runs(monkeypatch):
    net, split = task()
    x, y = next(iter(split.batches(60, shuffle=False)))
    bounded = verify(net, x, y, 0.0)
    monkeypatch.setattr(evaluation, "verify", None)
    monkeypatch.setattr(evaluation, "survivors", None)
    for eps in (0.0, 0):
        found = evaluation.evaluate(net, split, eps)
        assert all(torch.equal(part, bounded.verified) for part in (found.clean, found.pgd, found.verified)) and 0 < found.clean.sum() < 60
        assert found.summary()["verified_by"] == bounded.verified_by
    assert net.training, "the mode is what it was"


@pytest.mark.parametrize("eps", [-0.1, math.nan])
def test_a_bad_radius_is_not_taken_for_0(eps):
    with pytest.raises(ValueError, match="eps"):
        evaluation.evaluate(*task(), eps)


def test_at_radius_0_nothing_is_verified_of_a_network_without_bounds():
    found = evaluation.evaluate(*task(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Softmin(1), nn.Threshold(0.3, 0.1))), 0.0)
    assert "bound" in found.no_bounds and found.clean.any() and not found.verified.any() and found.proved_by == {}


@pytest.mark.parametrize("name", ["natural", "pgd"])
def test_a_loss_without_bounds_does_not_record_the_statistics_of_batch_norm(monkeypatch, name):
    net, split = task(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    x, y = next(iter(split.batches(60, shuffle=False)))
    monkeypatch.setattr(losses, "recorded_statistics", None)
    before = net[2].running_mean.clone()
    loss = objective(name, 0.1)(net, x, y, 0.0)
    assert loss.isfinite() and not torch.equal(net[2].running_mean, before)
    with pytest.raises(TypeError):
        objective("ibp", 0.1)(net, x, y, 0.0)


def test_validation_reads_the_model_once_for_all_epochs_unless_its_parts_change(monkeypatch):
    net, split = task()
    read, readings = program.read, []
    monkeypatch.setattr(program, "read", lambda model, x: readings.append(len(x)) or read(model, x))
    reading = program.LastReading()
    for _ in range(3):
        with torch.no_grad():
            net[1].weight += 0.1 * torch.randn_like(net[1].weight)
        found = evaluation.validate(net, split, 0.1, batch_size=20, reading=reading)
        assert found == evaluation.validate(net, split, 0.1, batch_size=20) and 0 < found[0]["verified"] < found[0]["clean"]
    assert readings == [20] * 4, "once for the three epochs, and once for each validation by itself"
    net[2] = nn.LeakyReLU(0.1)
    assert evaluation.validate(net, split, 0.1, batch_size=20, reading=reading) == evaluation.validate(net, split, 0.1, batch_size=20)
    assert len(readings) == 6


def bounded(net: nn.Module, split: Split) -> NeuronSums:
    (x, _), sums = next(iter(split.batches(60, shuffle=False))), NeuronSums()
    with eval_mode(net), torch.no_grad():
        sums.add(interval_pass(net, x, x).preactivations)
    return sums


def test_validation_at_radius_0_bounds_once_and_then_asks_the_network_alone(monkeypatch):
    convolution = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.1)
    net, split = task(nn.Sequential(*convolution, nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))
    calls, reading = [], program.LastReading()

    def counted(name, run):
        return lambda *args, **options: calls.append(name) or run(*args, **options)

    for name in ("interval_pass", "without_bounds", "sparse_network"):
        monkeypatch.setattr(evaluation, name, counted(name, getattr(evaluation, name)))
    for _ in range(3):
        with torch.no_grad():
            net[4].weight += 0.1 * torch.randn_like(net[4].weight)
        sums, wanted = NeuronSums(), bounded(net, split)
        shares, row = evaluation.validate(net, split, 0.0, neurons=sums, kernels="auto", reading=reading)
        with eval_mode(net), torch.no_grad():
            right = net(split.images / 255).argmax(1) == split.labels
        assert shares["clean"] == shares["verified"] == int(right.sum()) / 60 and net.training
        assert row == as_row(wanted.counts) and sums.counts.keys() == wanted.counts.keys() == {"2", "5"}
        assert all(torch.allclose(sums.sums[name], wanted.sums[name], atol=1e-4) for name in wanted.sums)
    assert sorted(calls) == ["interval_pass", "without_bounds"]


@pytest.mark.parametrize("layers", [[nn.Softmin(1), nn.Threshold(0.3, 0.1)], [nn.Dropout(0.5), Rounded()]], ids=["no bounds", "no reading"])
def test_validation_at_radius_0_verifies_nothing_of_a_network_without_bounds(layers):
    net, split = task(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), *layers))
    shares, row = evaluation.validate(net, split, 0.0)
    assert shares["clean"] > 0 and shares["verified"] == 0 and row == {}


def test_layers_are_named_by_one_reading_of_all_epochs(monkeypatch):
    net, split = task()
    read, readings, naming = program.read, [], program.LastReading()
    monkeypatch.setattr(program, "read", lambda model, x: readings.append(len(x)) or read(model, x))
    x, _ = next(iter(split.batches(1, shuffle=False)))
    assert all(NeuronSums(net, x, naming).weights["2"] == "1.weight" for _ in range(3)) and readings == [1]
    assert NeuronSums(net, x).weights["2"] == "1.weight" and readings == [1, 1]
