"""Training on the nonzeros against training dense: losses, masks, moments, bits after a kill, with and without numba."""
import copy
import random
import re
import time
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine import Parts, machine, numba_or_not
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparselab.learn import Config, Unrolled, build, objective, train
from sparselab.learn.assembly import make_learner
from sparselab.learn.expressive import CCIBP
from sparselab.learn.fusion import Fused
from sparselab.learn.losses import Shares
from sparselab.learn.models import Normalize
from sparselab.learn.objectives import OBJECTIVES, CrownIBP
from sparselab.learn.rows import (
    READERS,
    Rows,
    Sparse,
    Unsupported,
    certified,
    dense_gradients,
    logits,
    norm_forward,
    norm_forward_in_torch,
)
from sparselab.learn.sparse_steps import OnRows, SparseSteps
from sparselab.robust import bounds, input_box, margin_matrix, pgd
from sparselab.sparse import METHODS, sparsify

ATTACKED = ("pgd", "sabr", "mtl_ibp", "cc_ibp", "exp_ibp")
SMALL = {"dataset": "digits", "model": "cnn4", "epochs": 2, "batch_size": 64, "eps": 0.05, "train_samples": 320, "lr": 0.005}
MODELS = {"mlp": (1, 8, 8), "cnn4": (1, 8, 8), "ctbench_cnn4_bn": (1, 8, 8), "resnet5": (3, 8, 8), "resnet5_bn": (3, 8, 8), "pools": (2, 9, 9),
          "parts": (2, 6, 6), "fixed": (2, 6, 6)}


def pools() -> nn.Module:
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.AvgPool2d(3, 2, 1), nn.LeakyReLU(0.1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 10))


class Summed(Parts):
    """Sums alone, as differences have no training step on the nonzeros."""

    def forward(self, x):
        x = self.first((x - 0.5) * self.scale).relu()
        y = F.leaky_relu(self.second(x), 0.2) + x
        return self.last(torch.cat([y[:, :1].flip(3), x[:, 2:3].transpose(2, 3)], 1).flatten(1))


class Fixed(nn.Module):
    """A BatchNorm of constants, of which one channel is turned around."""

    def __init__(self, channels: int):
        super().__init__()
        for name, low, high in (("mean", 0.2, 0.6), ("var", 0.5, 2.0), ("weight", -1.5, 1.5), ("bias", -0.5, 0.5)):
            self.register_buffer(name, torch.linspace(low, high, channels))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=0.1)


def fixed() -> nn.Module:
    """Pixels by their mean and deviation, BatchNorms in eval mode with and without numbers of their own, and one in train mode."""
    after = nn.BatchNorm2d(4, affine=False).eval()
    after.running_mean.uniform_(-0.5, 0.5), after.running_var.uniform_(0.5, 2)
    return nn.Sequential(Normalize([0.3, 0.6], [0.4, 2.0]), nn.Conv2d(2, 4, 3), after, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False), Fixed(4),
                         nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10))


OWN = {"pools": pools, "parts": Summed, "fixed": fixed}


def sparse_model(name: str, sparsity: float = 0.9, seed: int = 0):
    torch.manual_seed(seed)
    model = OWN[name]() if name in OWN else build(name, MODELS[name], 10)
    sparsifier = sparsify(model, torch.optim.Adam(model.parameters()), method="static", sparsity=sparsity, total_steps=10)
    if name not in OWN:
        model.train()
    return model, {mask: sparsifier.masks[mask].numpy() for mask in sparsifier.masks}


@numba_or_not
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_dense_network(name, every, numba):
    """Loss, gradients of what exists and of what does not, and running statistics. The reference is the dense network in float64."""
    model, masks = sparse_model(name)
    x, y, eps = torch.rand(6, *MODELS[name]), torch.randint(0, 10, (6,)), 0.001
    reference = copy.deepcopy(model).double()
    with machine(numba):
        net = Rows(model, x[:2])
        net.index(masks, every)
        flat, kept = torch.from_numpy(net.values.flat).requires_grad_(), {}
        z, lb = certified(net, flat, x, *input_box(x, eps), y, kept if every else None)
        loss = torch.nn.functional.cross_entropy(z, y) + torch.logsumexp(-lb, 1).mean()
        loss.backward()
        grown = dense_gradients(net, kept) if every else {}
    goal = objective("ibp", eps, train_eps_factor=1.0, kappa_start=0.5, kappa_end=0.5)
    truth = 2 * goal(reference, x.double(), y, 1.0)
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=2e-4)
    for name, parameter in reference.named_parameters():
        off = torch.ones(parameter.shape, dtype=torch.bool) if name in grown else torch.zeros(parameter.shape, dtype=torch.bool)
        room = 2e-3 * float(parameter.grad.abs().max()) + 1e-7
        own = torch.from_numpy(net.values.of(name, flat.grad.numpy()))
        assert torch.allclose(own, net.values.gather(name, parameter.grad).float(), atol=room), name
        if name in grown:
            off &= ~torch.from_numpy(masks[name])
            assert torch.allclose(grown[name][off], parameter.grad[off].float(), atol=room), name
    for (name, ours), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5), name


@numba_or_not
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "pools"])
def test_crown_ibp_and_its_gradients_are_those_of_the_dense_network(name, every, numba):
    """Over boxes in which many neurons are unstable, with IBP and CROWN-IBP mixed. The reference is the dense network in float64.

    Biases are random and rows have many weights: a neuron at 0, or a coefficient of 0, has a gradient that depends on the last digit.
    """
    model, masks = sparse_model(name, 0.5)
    x, y = torch.rand(6, *MODELS[name]), torch.randint(0, 10, (6,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
    goal = objective("crown_ibp", 0.03, kappa_start=0.5, kappa_end=0.5)
    moment, reference = goal.ramp(0.15), copy.deepcopy(model).double()
    assert 0.2 < goal.fused_share(moment) < 0.8 and moment.eps > 0.005
    with machine(numba):
        net = Rows(model, x[:2])
        net.index(masks, every)
        for _ in range(2):  # the second finds what the first has left in the passes
            made, grad, kept = Fused(net, x, y, eps=moment.eps, every=every, update=False), torch.zeros(len(net.values.flat)).numpy(), {}
            loss, by_lb = made.cross_entropy(1.0, goal.fused_share(moment))
            made.backward(0 * made.z, by_lb, grad, kept if every else None)
            grown = dense_gradients(net, kept) if every else {}
    natural = F.cross_entropy(reference(x.double()), y)
    truth = 2 * goal(reference, x.double(), y, 0.15) - natural
    truth.backward()
    assert loss == pytest.approx(truth.item(), rel=2e-4)
    if name == "fixed":  # with so few channels coefficients are near 0, and gradients of the dense network in float32 are as far from float64
        return
    for name, parameter in reference.named_parameters():
        room = 1e-4 * float(parameter.grad.abs().max()) + 1e-7
        own = torch.from_numpy(net.values.of(name, grad))
        assert torch.allclose(own, net.values.gather(name, parameter.grad).float(), atol=room), name
        if name in grown:
            off = ~torch.from_numpy(masks[name])
            assert torch.allclose(grown[name][off], parameter.grad[off].float(), atol=room), name


def test_bounds_are_those_of_the_dense_network():
    model, masks = sparse_model("cnn4", 0.95)
    x, y = torch.rand(20, 1, 8, 8), torch.randint(0, 10, (20,))
    net = Rows(model, x[:2])
    net.index(masks)
    flat = torch.from_numpy(net.values.flat)
    for eps in (0.0, 0.01, 0.2):
        z, lb = certified(net, flat, x, *input_box(x, eps), y)
        truth, _ = bounds(model, *input_box(x, eps), C=margin_matrix(y, 10))
        assert torch.allclose(z, model(x), atol=1e-5)
        assert torch.allclose(lb[torch.arange(10) != y.unsqueeze(1)].view(20, 9), truth, atol=1e-5)


def test_gradients_of_the_input_are_right():
    model, masks = sparse_model("cnn4", 0.9)
    net = Rows(model, torch.rand(2, 1, 8, 8))
    net.index(masks)
    x = torch.rand(5, 1, 8, 8, requires_grad=True)
    weights = torch.randn(5, 10)
    (ours,) = torch.autograd.grad((logits(net, torch.from_numpy(net.values.flat), x) * weights).sum(), x)
    (truth,) = torch.autograd.grad((model(x) * weights).sum(), x)
    assert torch.allclose(ours, truth, atol=1e-6)


@numba_or_not
@pytest.mark.parametrize("method, goal", [*((method, "ibp") for method in ("rigl", "set", "sparsevlr", "gmp", "snip", "static", "granet",
                                                                          "mest", "gse", "srigl", "cht")), ("rigl", "crown_ibp")])
def test_a_training_is_that_of_the_dense_kernels(method, goal, numba):
    options = {"update_every": 4} if method not in ("snip", "static") else {}
    base = Config(**SMALL, method=method, objective=goal, sparsity=0.9, method_options=options)
    found = {}
    with machine(numba):
        for kernels in ("sparse", "dense"):
            learner = make_learner(Config(**{**SMALL, "kernels": kernels}, method=method, objective=goal, sparsity=0.9, method_options=options))
            steps, rows = 0, []
            original = learner.on_nonzeros.step

            def counted(*args, original=original):
                nonlocal steps
                steps += 1
                return original(*args)

            learner.on_nonzeros.step = counted
            for _ in range(base.epochs):
                learner.train_epoch()
                rows.append(learner.row["loss"])
                weights = learner.sparsifier.masks.weights
                assert sum(int(w.count_nonzero()) for w in weights.values()) <= learner.sparsifier.masks.nnz == learner.sparsifier.budget
            found[kernels] = rows, learner.sparsifier.masks, steps
    assert found["sparse"][0] == pytest.approx(found["dense"][0], rel=1e-3)
    assert found["sparse"][1].counts == found["dense"][1].counts
    assert found["sparse"][2] > 0 and found["dense"][2] == 0


@pytest.mark.parametrize("seen, goal", [("never", "ibp"), ("at every step", "ibp"), ("at every step", "crown_ibp")])
def test_a_training_that_stops_anywhere_continues_to_the_same_bits(seen, goal):
    """From the state after every step, saved while the moments are in the flat vector; and reading in between changes nothing."""
    rising = {"objective_options": {"until": 0.8}} if goal == "crown_ibp" else {}
    config = Config(**{**SMALL, "kernels": "sparse", "epochs": 1}, method="rigl", objective=goal, sparsity=0.9, method_options={"update_every": 2},
                    **rising)
    straight = make_learner(config)
    states = []

    class Save:
        def after_step(self, learner):
            if seen == "at every step":
                states.append(copy.deepcopy(learner.state_dict()))

        def before_fit(self, learner):
            pass

        after_epoch = before_fit

    straight.callbacks = [Save()]
    straight.fit()
    end = straight.state_dict()
    if seen == "never":
        again = make_learner(config)
        again.callbacks = [Save()]
        again.fit()
        states = [end]
        assert all(torch.equal(v, again.state_dict()["model"][k]) for k, v in end["model"].items())
    for state in states[:-1]:
        learner = make_learner(config)
        learner.load_state_dict(state)
        learner.fit()
        assert all(torch.equal(v, learner.state_dict()["model"][k]) for k, v in end["model"].items())
        for key, moments in end["optimizer"]["state"].items():
            assert torch.equal(moments["exp_avg"], learner.state_dict()["optimizer"]["state"][key]["exp_avg"])
        assert learner.losses == end["losses"]


def test_weights_written_by_others_are_taken_up():
    config = Config(**{**SMALL, "kernels": "sparse"}, method="static", sparsity=0.9)
    learner = make_learner(config)
    x, y = next(iter(learner.data.train.batches(32, 0, 0)))
    learner.train_step(x, y)
    with torch.no_grad():
        for weight in learner.sparsifier.masks.weights.values():
            weight.mul_(0.5)
    before = {name: w.clone() for name, w in learner.sparsifier.masks.weights.items()}
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.0
    learner.peak_lr = [0.0]
    learner.train_step(x, y)
    assert all(torch.equal(w, before[name]) for name, w in learner.sparsifier.masks.weights.items())


def test_what_cannot_be_done_sparsely_says_so():
    unfused = {"objective": "crown_ibp", "objective_options": {"fused": False}}
    with pytest.raises(ValueError, match='kernels="sparse" cannot be had: the objective CrownIBP.*Choose kernels="auto"'):
        make_learner(Config(**{**SMALL, "kernels": "sparse"}, **unfused, sparsity=0.9))
    with pytest.raises(Unsupported, match="'0' .view.: it moves entries into the batch"):
        Rows(nn.Sequential(nn.Linear(6, 8), nn.Flatten(), nn.Linear(32, 10)), torch.rand(2, 4, 6))
    with pytest.raises(ValueError, match="kernels"):
        Config(kernels="spare")
    learner = make_learner(Config(**SMALL, kernels="auto", **unfused, sparsity=0.9))
    learner.train_epoch()
    assert "CrownIBP" in learner.on_nonzeros.reason


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_busy_in_every_step_says_so(method):
    model = "ctbench_cnn4_bn" if method == "slimming" else "cnn4"
    config = Config(**{**SMALL, "model": model}, method=method, sparsity=0.95, kernels="auto")
    with mock.patch("sparselab.learn.sparse_steps.PAYS", {True: (1.0, 1.0), False: (1.0, 1.0)}):  # a dense network too
        learner = make_learner(config)
        learner.train_epoch(), learner.train_epoch()
    why = learner.sparsifier.always_busy
    assert (learner.on_nonzeros.count > 0) == (not why)
    assert learner.on_nonzeros.reason == why
    if why:
        with pytest.raises(ValueError, match=re.escape(f'kernels="sparse" cannot be had: {why}. Choose kernels="auto"')):
            make_learner(replace(config, kernels="sparse"))


def test_a_network_that_has_many_weights_when_it_is_read_is_checked_when_it_has_few():
    config = Config(**{**SMALL, "epochs": 6}, method="granet", method_options={"initial": 0.0, "update_every": 2}, sparsity=0.97)
    learner, checked = make_learner(config), []
    check = SparseSteps._check
    with mock.patch.object(SparseSteps, "_check", lambda steps, x: (checked.append(steps.count), check(steps, x))):
        for _ in range(6):
            learner.train_epoch()
    assert learner.on_nonzeros.count > 0 and checked == [0]

    def misread(steps, x):
        raise Unsupported("it was misread")

    learner = make_learner(config)
    with mock.patch.object(SparseSteps, "_check", misread):
        for _ in range(6):
            learner.train_epoch()
    assert learner.on_nonzeros.count == 0 and "it was misread" in learner.on_nonzeros.reason


def test_regrowth_that_scales_every_step_is_named_in_the_log(capsys, tmp_path):
    train(Config(**SMALL | {"epochs": 1}, method="rigl", method_options={"regrow_warmup": 5}, sparsity=0.95, runs_dir=str(tmp_path)))
    assert "Training steps use all weights, zeros too, because RigL with regrow_warmup scales every step." in capsys.readouterr().out


def test_a_method_that_begins_with_all_weights_is_named_in_the_log(capsys, tmp_path):
    train(Config(**SMALL | {"epochs": 4}, method="admm", sparsity=0.95, runs_dir=str(tmp_path)))
    assert "In the first epoch training steps used all weights, zeros too, because ADMM had something to do in each." in capsys.readouterr().out


def test_functions_are_carried_back_through_max_pooling_by_the_dense_network():
    torch.manual_seed(0)
    goal, x, y = objective("crown_ibp", 0.01), torch.rand(6, 2, 9, 9), torch.randint(0, 10, (6,))
    steps, _ = both(pools().train(), goal)
    with pytest.raises(ValueError, match='kernels="sparse" cannot be had: a function is carried back through max pooling by the dense network'):
        steps.ready(x, 0.2)
    steps.kernels = "auto"
    with mock.patch("sparselab.learn.sparse_steps.PAYS", {True: (1.0, 1.0), False: (1.0, 1.0)}):
        assert not steps.ready(x, 0.2) and "max pooling" in steps.reason and not steps.closed
        assert steps.ready(x, 0.9)  # what is left is IBP
        steps.step(x, y, 0.9)
        assert not steps.ready(x, 0.2)


def test_a_run_trains_on_its_nonzeros_and_says_it(tmp_path):
    run = train(Config(**SMALL, kernels="auto", method="rigl", sparsity=0.95, runs_dir=str(tmp_path)), callbacks=())
    assert run.summary["nnz"] == sum(int(w.count_nonzero()) for name, w in run.weights.items() if w.dim() > 1)


class Scaled(nn.Module):
    """A network whose input is scaled by a buffer."""

    def __init__(self):
        super().__init__()
        self.body = build("mlp", (1, 8, 8), 10)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        return self.body(x * self.scale)


class Centred(nn.Module):
    """A network behind a BatchNorm that stays as it is, while the network trains."""

    def __init__(self):
        super().__init__()
        self.norm, self.body = nn.BatchNorm2d(1, affine=False).eval(), build("mlp", (1, 8, 8), 10)

    def forward(self, x):
        return self.body(self.norm(x))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_fixed_average_that_is_changed_is_read_again(name):
    torch.manual_seed(0)
    steps, _ = both(Centred(), objective("natural", 0.1))
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    stepped(steps, x, y, 2)
    getattr(steps.model.norm, name).fill_(3.0)
    truth = F.cross_entropy(steps.model(x), y).item()
    assert steps.ready(x)
    assert steps.step(x, y, 0.5).item() == pytest.approx(truth, rel=1e-5)


def test_a_fixed_norm_with_trained_numbers_is_dense():
    with pytest.raises(Unsupported, match="a BatchNorm in eval mode is not trained"):
        Rows(nn.Sequential(nn.BatchNorm2d(1).eval(), nn.Flatten(), nn.Linear(64, 10)), torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("change", ["a hook", "a buffer", "a layer", "a class"])
def test_a_model_that_is_changed_is_read_again(change, monkeypatch):
    torch.manual_seed(0)
    model = Scaled().train()
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = sparsify(model, optimizer, method="static", sparsity=0.8, total_steps=100)
    steps = SparseSteps(model, optimizer, sparsifier, objective("natural", 0.1), "sparse")
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    for _ in range(2):
        assert steps.ready(x)
        steps.step(x, y, 0.5)
    if change == "a hook":
        model.body.relu1.register_forward_hook(lambda module, args, output: 3 * output)
    elif change == "a buffer":
        model.scale.mul_(0.5)
    elif change == "a class":
        monkeypatch.setattr(Scaled, "forward", lambda self, x: self.body(0.5 * x))
    else:
        model.body.relu1 = nn.LeakyReLU(0.3)
    with torch.no_grad():
        model.body.fc1.bias.mul_(1.0)  # what makes the next step take up anew
    truth = F.cross_entropy(model(x), y).item()
    assert steps.ready(x)
    assert steps.step(x, y, 0.5).item() == pytest.approx(truth, rel=1e-5)


def test_a_model_that_is_not_what_was_read_is_not_trained_on_rows():
    """The second net: here the reading is broken on purpose."""
    torch.manual_seed(0)
    model = build("mlp", (1, 8, 8), 10).train()
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = sparsify(model, optimizer, method="static", sparsity=0.8, total_steps=100)
    steps = SparseSteps(model, optimizer, sparsifier, objective("natural", 0.1), "auto")
    with mock.patch("sparselab.learn.rows.READERS", {**READERS, "relu": READERS["clone"]}):
        assert not steps.ready(torch.rand(16, 1, 8, 8))
    assert "its outputs or gradients differ from those of the model" in steps.reason


OPTIONS = {
    "adam": {}, "amsgrad": {"amsgrad": True, "weight_decay": 0.01}, "adamw": {"weight_decay": 0.05},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, "decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_optimizer_that_acts_on_single_weights_steps_as_on_the_dense_network(name):
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}.get(name, torch.optim.Adam)
    found = []
    for kernels in ("sparse", "dense"):
        torch.manual_seed(0)
        model = build("mlp", (1, 8, 8), 10).train()
        optimizer = kind(model.parameters(), lr=0.01, **OPTIONS[name])
        sparsifier = sparsify(model, optimizer, method="static", sparsity=0.9, total_steps=100)
        steps, goal = SparseSteps(model, optimizer, sparsifier, objective("ibp", 0.02), kernels), objective("ibp", 0.02)
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            x, y = torch.rand(16, 1, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator)
            if steps.ready(x):
                steps.step(x, y, step / 6)
            else:
                optimizer.zero_grad()
                goal(model, x, y, step / 6).backward()
                optimizer.step()
                sparsifier.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), float((ours - theirs).abs().max())


def refused(model: nn.Module, x: torch.Tensor, optimizer=None, before=lambda model, optimizer: None) -> str:
    """Why "auto" trains a model dense."""
    optimizer = optimizer or torch.optim.Adam(model.parameters())
    sparsifier = sparsify(model, optimizer, method="static", sparsity=0.9, total_steps=9)
    before(model, optimizer)
    steps = SparseSteps(model, optimizer, sparsifier, objective("ibp", 0.02), "auto")
    assert not steps.ready(x)
    return steps.reason


def test_what_sparse_steps_would_do_wrongly_is_dense_with_a_sentence():
    def mlp() -> nn.Module:
        torch.manual_seed(0)
        return build("mlp", (1, 8, 8), 10).train()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()).relu())

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 40), nn.Linear(40, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.a(x).relu()
            return self.b(x)

    x, wide = torch.rand(16, 1, 8, 8), torch.rand(16, 8)
    assert "fc1.bias is frozen" in refused(mlp(), x, before=lambda model, _: model.fc1.bias.requires_grad_(False))
    assert "has hooks" in refused(mlp(), x, before=lambda _, optimizer: optimizer.register_step_post_hook(lambda *_: None))
    assert "fc2.weight is frozen, trained by nobody, laid out by channels, or has a hook" in refused(
        mlp(), x, before=lambda model, _: model.fc2.weight.register_hook(lambda g: -g))
    assert "a.weight is used twice" in refused(Twice(), wide)
    assert "its outputs or gradients differ" in refused(Blind(), wide)
    assert "its last layer is not linear" in refused(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), x)


def test_a_dense_or_hardly_sparse_network_is_never_written_down_as_entries():
    with mock.patch("sparselab.learn.rows.Rows.index", side_effect=AssertionError("indexed")):
        for method, sparsity in (("dense", 0.0), ("static", 0.5)):
            learner = make_learner(Config(**SMALL, kernels="auto", method=method, sparsity=sparsity))
            learner.train_epoch()
            assert learner.on_nonzeros.reason == ""


def test_images_of_another_size_are_read_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).train()
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = sparsify(model, optimizer, method="static", sparsity=0.5, total_steps=9)
    steps, y = SparseSteps(model, optimizer, sparsifier, objective("natural", 0.02), "sparse"), torch.randint(0, 4, (6,))
    for size in (8, 5, 12):
        x = torch.rand(6, 1, size, size)
        truth = F.cross_entropy(model(x), y).item()
        assert steps.ready(x)
        assert steps.step(x, y, 0.5).item() == pytest.approx(truth, rel=1e-5)


def test_what_others_write_into_pruned_places_does_not_stay():
    learner = make_learner(Config(**SMALL, kernels="sparse", method="static", sparsity=0.9))
    x, y = next(iter(learner.data.train.batches(32, 0, 0)))
    learner.train_step(x, y)
    with torch.no_grad():
        for weight in learner.sparsifier.masks.weights.values():
            weight.add_(0.01)
    learner.train_step(x, y)
    assert sum(int(w.count_nonzero()) for w in learner.sparsifier.masks.weights.values()) == learner.sparsifier.budget


def test_a_learner_can_be_copied_between_steps():
    learner = make_learner(Config(**SMALL, kernels="sparse", method="static", sparsity=0.9))
    x, y = next(iter(learner.data.train.batches(32, 0, 0)))
    learner.train_step(x, y)
    twin = copy.deepcopy(learner)
    for each in (learner, twin):
        each.train_step(x, y)
    for p, q in zip(learner.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)
    moments = [each.optimizer.state_dict()["state"][0]["exp_avg"] for each in (learner, twin)]
    assert torch.equal(*moments)


def both(model: nn.Module, goal, sparsity: float = 0.8, kernels: str = "sparse"):
    """The steps of a sparse model, and a twin whose network is dense."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = sparsify(model, optimizer, method="static", sparsity=sparsity, total_steps=100)
    return SparseSteps(model, optimizer, sparsifier, goal, kernels), copy.deepcopy(model)


@numba_or_not
@pytest.mark.parametrize("moment", ["rising", "arrived"])
@pytest.mark.parametrize("name", ["cnn4", "ctbench_cnn4_bn", "resnet5_bn"])
@pytest.mark.parametrize("goal", OBJECTIVES)
def test_every_objective_has_the_loss_and_gradients_of_the_dense_network(goal, name, moment, numba):
    """Those of missing weights and the running statistics included; TAPS and STAPS are dense, and say so."""
    progress = {"rising": 0.2, "arrived": 0.9}[moment]
    options = {"attack_steps": 3} if goal in ATTACKED else {}
    options |= {"alpha": 0.4} if goal in ("mtl_ibp", "cc_ibp", "exp_ibp") else {}
    dense = goal in ("taps", "staps")
    goal = objective(goal, 0.003, **options)
    torch.manual_seed(1)
    with machine(numba):
        steps, twin = both(build(name, MODELS[name], 10).train(), goal, kernels="auto" if goal.dense_because(goal.ramp(0.2)) else "sparse")
        x, y = torch.rand(12, *MODELS[name]), torch.randint(0, 10, (12,))
        assert bool(goal.dense_because(goal.ramp(progress))) == dense
        if dense:
            assert not steps.ready(x, progress) and goal.dense_because(goal.ramp(progress)) in steps.reason
            return
        same_as_dense(steps, twin, goal, x, y, progress)


def same_as_dense(steps: SparseSteps, twin: nn.Module, goal, x, y, progress: float, rounding: float = 0.0) -> None:
    """Loss, gradients, those of missing weights too, and buffers are those of the dense twin.

    `rounding`: of the largest gradient, what is allowed of a bias: that of a bias before a BatchNorm is nothing but rounding.
    """
    with mock.patch.object(steps, "kernels", "sparse"), mock.patch.object(type(steps.sparsifier), "busy", lambda _: True), \
            mock.patch.object(type(steps.sparsifier), "grows_by_gradients", True):
        assert steps.grows(x, progress)
        loss = steps.gradients(x, y, progress)
    truth = goal(twin, x, y, progress)
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)
    slopes = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}
    least = 1e-7 + rounding * max(float(slope.abs().max()) for slope in slopes.values())
    for name, p in steps.model.named_parameters():
        room = 2e-3 * float(slopes[name].abs().max()) + (least if p.dim() == 1 else 1e-6)
        assert torch.allclose(p.grad, slopes[name], atol=room), name
    for (key, ours), theirs in zip(steps.model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), key


class Joined(nn.Module):
    """Two ways through the same activation, added or side by side."""

    def __init__(self, one: nn.Module, other: nn.Module, add: bool):
        super().__init__()
        self.one, self.other, self.add = one, other, add

    def forward(self, x):
        return self.one(x) + self.other(x) if self.add else torch.cat([self.one(x), self.other(x)], 1)


def drawn(r: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A random convolutional network of what sparse steps do, and the shape of its images."""
    shape = channels, side, _ = r.randint(1, 3), *2 * (r.randint(5, 9),)
    layers = []
    for _ in range(r.randint(1, 3)):
        if r.random() < 0.2 and side > 4:
            layers.append(r.choice([nn.AvgPool2d(2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=r.random() < 0.5), nn.MaxPool2d(2, 1)]))
        else:
            groups = r.choice([g for g in (1, channels) if channels % g == 0])
            more = channels * r.randint(1, 2) if groups > 1 else r.randint(1, 6)
            convolution = lambda: nn.Conv2d(channels, more, r.choice([1, 3]), r.choice([1, 1, 2]), 1, r.choice([1, 1, 2]), groups, r.random() < 0.7)  # noqa: E731, B023
            layers += [convolution(), *([nn.BatchNorm2d(more)] if r.random() < 0.4 else [])]
            channels = more
        layers.append(r.choice([nn.ReLU(), nn.LeakyReLU(r.choice([0.01, 0.3])), nn.ReLU()]))
        if r.random() < 0.3:
            sides = nn.Conv2d(channels, channels, 3, padding=1), nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU())
            layers.append(Joined(*r.choice([sides, (nn.Identity(), sides[0])]), r.random() < 0.5))
        with torch.no_grad():
            channels, side = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1:3]
        if side < 3:  # a dilated kernel is five wide, with a margin of one
            break
    for norm in (layer for layer in layers if isinstance(layer, nn.BatchNorm2d) and layer.affine):
        nn.init.uniform_(norm.bias, -0.2, 0.2)  # where it is 0 as well, a channel without weights is 0 give or take a rounding
    layers += [nn.Flatten(), *([nn.Linear(channels * side * side, 12), nn.ReLU()] if r.random() < 0.6 else [])]
    with torch.no_grad():
        width = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(width, 10)), shape


@numba_or_not
@pytest.mark.parametrize("block", range(3))
def test_a_random_network_has_the_loss_and_gradients_of_the_dense_one(block, numba):
    """Every objective that has sparse steps, at a random moment, sparsity and number of images, at the same points: a rounding turns an attack."""

    def attacked(model, x, y, eps, steps, **options):
        return (x + eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x))).sign()).clamp(0, 1)

    goals = [name for name in OBJECTIVES if name not in ("taps", "staps")]
    for seed in range(40 * block, 40 * (block + 1)):
        r = random.Random(seed)
        torch.manual_seed(seed)
        model, shape = drawn(r)
        name, progress = goals[seed % len(goals)], r.choice([0.05, 0.2, 0.9])
        fused = name == "crown_ibp" and any(isinstance(layer, nn.MaxPool2d) for layer in model)  # is carried back through no maximum
        goal = objective("ibp" if fused else name, r.choice([0.001, 0.003]), **{"attack_steps": 2} if name in ATTACKED else {})
        x, y = torch.rand(r.randint(3, 20), *shape), torch.randint(0, 10, (20,))
        with machine(numba), mock.patch("sparselab.learn.losses.pgd", attacked):
            steps, twin = both(model.train(), goal, r.choice([0.0, 0.5, 0.9]))
            try:
                same_as_dense(steps, twin, goal, x, y[: len(x)], progress, 1e-3)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {name} at {progress}, {model}") from error


@dataclass(kw_only=True)
class Everything(CCIBP, CrownIBP):
    """A loss of all four shares, whose boxes are bounded by loss fusion while eps rises."""

    def robust_shares(self):
        return Shares(0.1, 0.3, 0.2, 0.4)


@numba_or_not
@pytest.mark.parametrize("progress", [0.2, 0.9])
def test_a_loss_of_four_shares_has_the_gradients_of_the_dense_network(progress, numba):
    goal = Everything(eps=0.003, attack_steps=3, alpha=0.3, kappa_end=0.2)
    torch.manual_seed(1)
    with machine(numba):
        steps, twin = both(build("ctbench_cnn4_bn", MODELS["ctbench_cnn4_bn"], 10).train(), goal)
        x, y = torch.rand(12, *MODELS["ctbench_cnn4_bn"]), torch.randint(0, 10, (12,))
        assert steps.ready(x, progress)
        loss = steps._gradient(x, y, progress)
    truth = goal(twin, x, y, progress)
    truth.backward()
    assert loss == pytest.approx(truth.item(), rel=1e-4)
    for name, p in twin.named_parameters():
        expected = steps.net.values.gather(name, p.grad).numpy()
        assert np.allclose(steps.net.values.of(name, steps.grad), expected, atol=2e-3 * abs(expected).max() + 1e-7), name


@numba_or_not
@pytest.mark.parametrize("batch", [12, 16])  # 16: whole vectors, for which a compiled step has another loop
@pytest.mark.parametrize("goal", ["natural", "ibp"])
@pytest.mark.parametrize("name", ["mlp", "cnn4"])
def test_a_weight_that_is_no_number_makes_none_of_the_loss(name, goal, batch, numba):
    """A compiled ReLU might take it for nothing."""
    torch.manual_seed(0)
    with machine(numba):
        steps, _ = both(build(name, MODELS[name], 10).train(), objective(goal, 0.01))
        x, y = torch.rand(batch, *MODELS[name]), torch.randint(0, 10, (batch,))
        assert steps.ready(x, 0.9)
        layer, mask = next(iter(steps.sparsifier.masks.items()))
        with torch.no_grad():
            steps.sparsifier.masks.weights[layer][mask] = torch.nan
        assert steps.ready(x, 0.9) and np.isnan(steps._gradient(x, y, 0.9))


def test_entries_are_kept_while_the_mask_is():
    model, masks = sparse_model("cnn4", 0.9)
    net = Rows(model, torch.rand(2, 1, 8, 8))
    net.index(masks)
    entries = {layer.weight: layer.entries for layer in net.layers}
    changed = masks["conv2.weight"].copy()
    changed.flat[[changed.argmax(), changed.argmin()]] = False, True  # as many weights as before, in other places
    with torch.no_grad():
        model.conv2.weight[:] = torch.from_numpy(changed).float()
    net.index(masks | {"conv2.weight": changed}, every=True)
    assert [layer.weight for layer in net.layers if layer.entries is not entries[layer.weight]] == ["conv2.weight"]
    net.index(masks | {"conv2.weight": changed})
    x = torch.rand(5, 1, 8, 8)
    assert torch.allclose(logits(net, torch.from_numpy(net.values.flat), x), model(x), atol=1e-5)


@numba_or_not
def test_images_come_and_go_in_any_layout(numba):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    net = Rows(model, torch.rand(2, 3, 7, 7))
    with machine(numba):
        net.index({})
    x, weights = torch.rand(20, 3, 7, 7), torch.randn(20, 2, 3, 3)
    truth = torch.autograd.grad((model(x.requires_grad_()) * weights).sum(), [x, *model.parameters()])
    for turned in (False, True):
        given, pull = (part.detach().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) if turned else part.detach() for part in (x, weights))
        given, flat = given.requires_grad_(), torch.from_numpy(net.values.flat.copy()).requires_grad_()
        with machine(numba):
            z = logits(net, flat, given)
            gx, gflat = torch.autograd.grad(z, [given, flat], pull)
        assert torch.allclose(z, model(x), atol=1e-5) and torch.allclose(gx, truth[0], atol=1e-5)
        for (name, _), g in zip(model.named_parameters(), truth[1:], strict=True):
            assert torch.allclose(torch.from_numpy(net.values.of(name, gflat.numpy())), g.reshape(-1), rtol=1e-4, atol=1e-4)


def test_an_attack_on_the_rows_ends_where_that_on_the_network_ends():
    for name in ("cnn4", "ctbench_cnn4_bn"):
        torch.manual_seed(0)
        steps, twin = both(build(name, MODELS[name], 10).train(), objective("ibp", 0.05))
        x, y = torch.rand(20, *MODELS[name]), torch.randint(0, 10, (20,))
        assert steps.ready(x)
        ours, theirs = (pgd(net, x, y, 0.05, 5, generator=torch.Generator().manual_seed(3)) for net in (OnRows(steps.net), twin))
        assert (ours - theirs).abs().lt(1e-5).float().mean() > 0.999
        assert all(torch.equal(a, b) for a, b in zip(steps.model.buffers(), twin.buffers(), strict=True))


def stepped(steps: SparseSteps, x: torch.Tensor, y: torch.Tensor, count: int) -> None:
    for _ in range(count):
        assert steps.ready(x)
        steps.step(x, y, 0.5)


def test_an_optimizer_that_others_step_has_its_moments():
    """The same steps, one of them by somebody else, on the nonzeros and dense."""
    found = []
    for kernels in ("sparse", "dense"):
        torch.manual_seed(0)
        steps, _ = both(build("mlp", (1, 8, 8), 10).train(), objective("natural", 0.1), kernels=kernels)
        model, optimizer, sparsifier = steps.model, steps.optimizer, steps.sparsifier
        for step in range(6):
            x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
            if step != 3 and steps.ready(x):
                assert not any(optimizer.state.values()) or not step  # dense moments take no memory meanwhile
                steps.step(x, y, 0.5)
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            sparsifier.step()
        found.append(([p.detach().clone() for p in model.parameters()], optimizer.state_dict()["state"]))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for key, state in found[1][1].items():
        assert found[0][1][key]["step"] == state["step"] == 6
        assert torch.allclose(found[0][1][key]["exp_avg"], state["exp_avg"], atol=1e-6)


def test_moments_that_others_clear_begin_anew():
    torch.manual_seed(0)
    steps, _ = both(build("mlp", (1, 8, 8), 10).train(), objective("natural", 0.1))
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    stepped(steps, x, y, 3)
    state = steps.optimizer.state_dict()
    for moments in state["state"].values():
        moments["step"].zero_()
        moments["exp_avg"].zero_()
        moments["exp_avg_sq"].zero_()
    steps.optimizer.load_state_dict(state)
    stepped(steps, x, y, 1)
    assert steps.optimizer.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("change", ["in a masked weight", "in a bias", "other memory", "outside the mask"])
def test_what_is_written_past_pytorch_is_taken_up_or_does_not_stay(change):
    torch.manual_seed(0)
    steps, _ = both(build("mlp", (1, 8, 8), 10).train(), objective("natural", 0.1))
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    stepped(steps, x, y, 2)
    weight, mask = steps.model.fc1.weight, steps.sparsifier.masks["fc1.weight"]
    version = weight._version
    if change == "in a masked weight":
        weight.data.mul_(0.5)
    elif change == "in a bias":
        steps.model.fc2.bias.data[0] = 3.0
    elif change == "other memory":
        weight.data = weight.data * 0.5
    else:
        weight.data.masked_fill_(~mask, 1.0)
        stepped(steps, x, y, 1)
        assert steps.sparsifier.masks.nnz == steps.sparsifier.budget
        return
    assert weight._version == version
    truth = F.cross_entropy(steps.model(x), y).item()
    assert steps.ready(x)
    assert steps.step(x, y, 0.0).item() == pytest.approx(truth, rel=1e-5)
    with torch.no_grad():
        assert torch.equal(steps.net.values.gather("fc1.weight", weight), torch.from_numpy(steps.net.values.of("fc1.weight")))


class Counting(nn.Module):
    """A network that keeps books while it runs."""

    def __init__(self, how: str):
        super().__init__()
        self.body, self.how, self.calls = build("mlp", (1, 8, 8), 10), how, 0
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, x):
        z = self.body(x)
        if self.how == "a number":
            self.calls += 1
        elif self.how == "a buffer":
            self.count += 1
        else:
            self.mean = z.detach().mean(0)
        return z


@pytest.mark.parametrize("how", ["a number", "a buffer", "another buffer"])
def test_a_model_that_keeps_books_while_it_runs_is_dense(how):
    torch.manual_seed(0)
    steps, _ = both(Counting(how).train(), objective("natural", 0.1), kernels="auto")
    assert not steps.ready(torch.rand(16, 1, 8, 8))
    assert "changes what the model holds" in steps.reason or "differ from those of the model" in steps.reason
    assert steps.model.calls == 0 and not steps.model.count.any() and not steps.model.mean.any()


def test_a_hook_that_watches_is_called():
    """Also when it comes between two steps."""
    torch.manual_seed(0)
    steps, _ = both(build("mlp", (1, 8, 8), 10).train(), objective("natural", 0.1), kernels="auto")
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    with mock.patch("sparselab.learn.sparse_steps.PAYS", {True: (1.0, 1.0), False: (1.0, 1.0)}):
        stepped(steps, x, y, 2)
        steps.model.relu1.register_forward_hook(lambda module, args, output: None)
        assert not steps.ready(x) and "'relu1' has hooks, which sparse steps would not call" in steps.reason


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("what", ["a hook", "a hook of all optimizers", "a step", "a hook of all modules", "a second group", "fewer parameters"])
def test_whatever_else_an_optimizer_does_is_not_left_out(what, when):
    """Nor what a hook of all modules does."""
    torch.manual_seed(0)
    steps, _ = both(build("mlp", (1, 8, 8), 10).train(), objective("natural", 0.1), kernels="auto")
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    optimizer, handle = steps.optimizer, None
    group = optimizer.param_groups[0]
    with mock.patch("sparselab.learn.sparse_steps.PAYS", {True: (1.0, 1.0), False: (1.0, 1.0)}):
        if when == "between":
            stepped(steps, x, y, 2)
        if what == "a hook":
            optimizer.register_step_post_hook(lambda *_: None)
        elif what == "a hook of all optimizers":
            handle = register_optimizer_step_post_hook(lambda *_: None)
        elif what == "a step":
            optimizer.step = lambda closure=None, step=optimizer.step: step(closure)
        elif what == "a hook of all modules":
            handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        else:
            bias = group["params"].pop()
            if what == "a second group":
                optimizer.add_param_group({"params": [bias], "lr": 0.0})
        try:
            assert not steps.ready(x) and steps.closed and steps.reason
        finally:
            if handle:
                handle.remove()


def test_a_scheduler_that_counts_steps_does_not_make_them_dense():
    torch.manual_seed(0)
    steps, _ = both(build("mlp", (1, 8, 8), 10).train(), objective("natural", 0.1))
    torch.optim.lr_scheduler.StepLR(steps.optimizer, 1)
    stepped(steps, torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,)), 2)
    assert steps.count == 2 and not steps.reason


def test_two_learners_of_one_optimizer_hand_the_moments_over():
    torch.manual_seed(0)
    first, _ = both(build("mlp", (1, 8, 8), 10).train(), objective("natural", 0.1))
    second = SparseSteps(first.model, first.optimizer, first.sparsifier, first.goal, "sparse")
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    for count, steps in enumerate((first, second, second, first), 1):
        stepped(steps, x, y, 1)
        assert first.optimizer.state_dict()["state"][0]["step"] == count


def test_images_and_labels_that_cannot_be_are_refused_before_a_step():
    torch.manual_seed(0)
    steps, _ = both(build("mlp", (1, 8, 8), 10).train(), objective("ibp", 0.1))
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    stepped(steps, x, y, 1)
    before = [p.detach().clone() for p in steps.model.parameters()]
    for images, labels in ((x + 1, y), (x.where(x < 0.9, torch.nan), y), (x, y + 5), (x, y.float())):
        with pytest.raises(ValueError):
            stepped(steps, images, labels, 1)
    assert all(torch.equal(p, q) for p, q in zip(before, steps.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["cnn4", "ctbench_cnn4_bn"])
def test_a_model_that_nobody_changes_is_read_and_taken_up_once(name):
    torch.manual_seed(0)
    steps, _ = both(build(name, MODELS[name], 10).train(), objective("ibp", 0.02))
    x, y = torch.rand(16, *MODELS[name]), torch.randint(0, 10, (16,))
    stepped(steps, x, y, 1)
    with mock.patch.object(steps, "_take_up", side_effect=AssertionError("taken up again")):
        stepped(steps, x, y, 3)
        steps.optimizer.state_dict()
        steps.model.state_dict()
        stepped(steps, x, y, 1)


@pytest.mark.parametrize(("method", "sparsity"), [("dense", 0.0), ("static", 0.5), ("gmp", 0.95)])
def test_dense_steps_look_at_the_model_once_until_there_are_fewer_weights(method, sparsity):
    options = {"begin": 0.5, "end": 0.5} if method == "gmp" else {}
    learner = make_learner(Config(**SMALL, kernels="auto", method=method, sparsity=sparsity, method_options=options))
    asked, holds = [], SparseSteps._reading_holds
    with mock.patch.object(SparseSteps, "_reading_holds", lambda self, x: asked.append(self.sparsifier.masks.nnz) or holds(self, x)):
        learner.fit()
    total = learner.sparsifier.masks.total
    assert (sum(nnz > 0.4 * total for nnz in asked) == 1) and learner.step > 8
    assert (learner.on_nonzeros.count > 0) == (method == "gmp")


def test_the_same_masks_are_indexed_once_and_the_values_are_those_of_the_model():
    model, masks = sparse_model("cnn4", 0.9)
    net, x = Rows(model, torch.rand(2, 1, 8, 8)), torch.rand(5, 1, 8, 8)

    def products():
        return [layer.product for layer in net.layers if isinstance(layer, Sparse)]

    net.index(masks)
    before = products()
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(torch.from_numpy(mask)).mul_(0.5)
    net.index(masks)
    assert all(a is b for a, b in zip(before, products(), strict=True))
    assert torch.allclose(logits(net, torch.from_numpy(net.values.flat), x), model(x), atol=1e-5)
    net.index(masks, every=True)
    assert not any(a is b for a, b in zip(before, products(), strict=True)) and all(rows.all() for rows in net.live)


@pytest.mark.parametrize("seed", range(8))
def test_a_bias_before_a_batch_norm_and_channels_without_weights_are_no_reason_to_train_dense(seed):
    """The gradient of such a bias, and the sign of such a channel where its shift is 0, are nothing but rounding."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * 36, 10)).train()
    steps, _ = both(model, objective("ibp", 0.01), 0.97)
    assert steps.sparsifier.masks["3.weight"].flatten(1).any(1).sum() < 8
    assert steps.ready(torch.rand(16, 1, 8, 8), 0.9)


def test_a_channel_without_weights_is_the_shift_of_its_batch_norm_to_the_last_bit():
    z = np.repeat(np.float32([0.1, -2.7]), 9).reshape(-1, 3).repeat(11, 1)  # 2 channels of 3 rows, 33 columns: 11 clean, 22 ends
    for run in (norm_forward, norm_forward_in_torch):
        y, beta = np.empty_like(z), np.float32([0.3, 0.0])
        mean, var = run(z, np.float32([0.7, 1.9]), beta, 1e-5, 3, 11, np.float32(1), y)
        assert (y == beta.repeat(3)[:, None]).all() and (mean == z[::3, 0]).all() and (var == 0).all()


@numba_or_not
def test_the_bits_of_a_gradient_do_not_depend_on_the_number_of_threads(numba):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            with machine(numba):
                steps, _ = both(build("cnn4", (1, 28, 28), 10, width=32, hidden=[400]).train(), objective("crown_ibp", 0.1), 0.99)
                x, y = torch.rand(64, 1, 28, 28), torch.randint(0, 10, (64,))
                assert steps.ready(x, 0.2)
                found.append((steps._gradient(x, y, 0.2), steps.grad.tobytes()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def seconds(*functions) -> list[float]:
    """Of the processor, the least of five calls each, in turns."""
    took = []
    for _ in range(6):
        took.append([])
        for function in functions:
            started = time.process_time()
            function()
            took[-1].append(time.process_time() - started)
    return [min(times) for times in zip(*took[1:], strict=True)]


@numba_or_not
def test_at_99_percent_a_step_is_several_times_as_fast_and_crown_more(numba):
    """Far below what nbs/bench/kernels and proofs measure, as machines that run tests do other work as well."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    model = build("cnn4", (1, 28, 28), 10).train()
    x, y = torch.rand(128, 1, 28, 28), torch.randint(0, 10, (128,))
    try:
        torch.set_num_threads(1)
        with machine(numba):
            steps, twin = both(model, objective("ibp", 0.1), 0.99)
            assert steps.ready(x, 0.9)
            dense, sparse = seconds(lambda: steps.goal(twin, x, y, 0.9).backward(), lambda: steps.step(x, y, 0.9, 10.0))
            assert dense > (3 if numba else 1.5) * sparse
            with torch.no_grad():
                net, C, box = Unrolled(twin.eval(), x[:2]), margin_matrix(y[:32], 10), input_box(x[:32], 0.01)
                dense, sparse = seconds(lambda: bounds(twin, *box, "crown", C), lambda: net.bounds(*box, "crown", C))
            assert dense > (8 if numba else 1.5) * sparse
    finally:
        torch.set_num_threads(before)


def test_moments_and_entries_of_a_large_network_take_less_than_its_weights():
    """Ten million weights at 99 %, as nbs/bench/kernels counts them, which measures 13 %."""
    wide = nn.Sequential(nn.Flatten(), nn.Linear(784, 3000), nn.ReLU(), nn.Linear(3000, 2500), nn.ReLU(), nn.Linear(2500, 10)).train()
    steps, _ = both(wide, objective("ibp", 0.1), 0.99)
    x, y = torch.rand(32, 1, 28, 28), torch.randint(0, 10, (32,))
    for _ in range(2):
        assert steps.ready(x, 0.9)
        steps.step(x, y, 0.9)
    held = {}
    todo = [steps.net.layers, steps.net.values, steps.flat, *steps._own.state.values(), *steps.optimizer.state.values()]
    while todo:
        thing = todo.pop()
        if isinstance(thing, torch.Tensor):
            held[thing.data_ptr()] = thing.numel() * thing.element_size()
        elif isinstance(thing, np.ndarray):
            held[thing.ctypes.data] = thing.nbytes
        elif isinstance(thing, dict | list | tuple):
            todo += thing.values() if isinstance(thing, dict) else thing
        elif type(thing).__module__.startswith("sparselab"):
            todo += vars(thing).values()
    assert 2 * 4 * steps.sparsifier.masks.nnz < sum(held.values()) < 4 * steps.sparsifier.masks.total / 5
