"""What is not computed where nobody asks for it: proofs at radius 0, a reading that is known, statistics that no bound needs."""
import math

import pytest
import torch
from torch import nn

from sparselab import program
from sparselab.learn import evaluation, losses
from sparselab.learn.data import Split
from sparselab.learn.objectives import objective
from sparselab.robust.verification import verify


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
