"""A proof is never wrong, methods see what is left, and the result adds up."""
import importlib.util
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselab.learn import Unrolled
from sparselab.robust import verification as module
from sparselab.robust.attacks import pgd, survivors
from sparselab.robust.bounds import METHODS, bounds, input_box, margin_matrix
from sparselab.robust.boxes import Interval, moves
from sparselab.robust.cascade import decide
from sparselab.robust.lirpa import load
from sparselab.robust.modes import worst_margin
from sparselab.robust.relu import ReLU
from sparselab.robust.replay import Contradiction
from sparselab.robust.rules import RULES, UnsupportedLayer
from sparselab.robust.verification import Verification, check_order, verify


def network(seed=0, inputs=4, width=12, classes=3, sparsity=0.0):
    torch.manual_seed(seed)
    first, second, last = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, classes)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
        layer.weight.data *= torch.rand_like(layer.weight) >= sparsity
    last.bias.data -= net(torch.rand(1000, inputs)).mean(0).detach()  # every class occurs
    return net


def samples(net, n=100, inputs=4, wrong=10):
    """Images, and labels of which the first `wrong` are wrong."""
    x = torch.rand(n, inputs, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % net(x).shape[1]
    return x, y


@given(seed=st.integers(0, 10**6), eps=st.floats(0.001, 0.3), sparsity=st.sampled_from([0.0, 0.7, 0.95]))
@settings(max_examples=30, deadline=None)
def test_verified_samples_cannot_be_attacked(seed, eps, sparsity):
    net = network(seed, sparsity=sparsity)
    x, y = samples(net, n=40)
    result = verify(net, x, y, eps)
    left = survivors(net, x, y, eps, steps=10, restarts=2)
    check_order(result.clean, left, result.verified)
    lower, upper = input_box(x, eps)
    points = lower + torch.rand(50, *x.shape) * (upper - lower)
    margins = worst_margin(net(points.flatten(0, 1)), y.repeat(50)).view(50, -1)
    assert (result.margins <= margins.amin(0) + 1e-5).all()


def test_result_is_that_of_the_bounds_and_adds_up():
    net = network(2)
    x, y = samples(net)
    result = verify(net, x, y, 0.05, batch_size=7)
    alone = {m: bounds(net, *input_box(x, 0.05), m, margin_matrix(y, 3))[0].amin(1) for m in METHODS}
    assert torch.equal(result.clean, net(x).argmax(1) == y) and int(result.clean.sum()) == 90
    left = result.clean
    for method in METHODS:
        assert torch.equal(result.tried[method], left)
        assert torch.equal(result.by_method[method], left & (alone[method] > 0))
        assert result.by_method[method].any()
        left = left & ~result.by_method[method]
    best = torch.stack(list(alone.values())).amax(0)
    assert torch.equal(result.verified, result.clean & (best > 0))
    unproved = result.clean & ~result.verified
    assert 0 < unproved.sum() and torch.allclose(result.margins[unproved], best[unproved], atol=1e-5)
    assert (result.margins[~result.clean] == -math.inf).all()
    counts = {m: result.proved_by.count(m) for m in METHODS}
    assert counts == {m: int(result.by_method[m].sum()) for m in METHODS}
    assert result.proved_by.count(None) == 100 - int(result.verified.sum())
    assert result.verified_by == {m: n / 100 for m, n in counts.items()}
    assert sum(result.verified_by.values()) == pytest.approx(result.accuracy["verified"])
    assert result.accuracy["clean"] == 0.9


def test_order_and_repetition_of_methods_change_nothing_and_one_may_be_a_string():
    net = network(2)
    x, y = samples(net)
    one, other = verify(net, x, y, 0.05, METHODS), verify(net, x, y, 0.05, ["crown", "ibp", "crown_ibp", "ibp"])
    assert list(one.by_method) == list(other.by_method) == list(METHODS)
    assert torch.equal(one.margins, other.margins)
    assert list(verify(net, x, y, 0.05, "crown").by_method) == ["crown"]


def test_the_proof_is_strict_and_needs_a_right_answer():
    net = nn.Linear(1, 2)
    net.weight.data = torch.tensor([[1.0], [0.0]])
    net.bias.data = torch.tensor([0.0, 0.25])  # the margin of class 0 is x - 0.25
    x = torch.tensor([[0.5], [0.5], [0.75], [0.125], [0.25]])
    y = torch.tensor([0, 1, 0, 0, 0])
    for methods in METHODS:
        result = verify(net, x, y, 0.25, methods)
        assert result.clean.tolist() == [True, False, True, False, False], "a tie is not right"
        assert result.verified.tolist() == [False, False, True, False, False], "a margin of zero is not proved"
        assert result.margins.tolist() == [0.0, -math.inf, 0.25, -math.inf, -math.inf]


def test_what_an_attack_broke_is_a_test_of_every_method():
    net = network()
    x, y = samples(net)
    eps = 0.08
    left = survivors(net, x, y, eps)
    full, less = verify(net, x, y, eps), verify(net, x, y, eps, robust=left)
    assert torch.equal(full.verified, less.verified) and not left.all()
    assert torch.equal(less.tried["ibp"], less.clean)
    for method in ("crown_ibp", "crown"):
        broken = (full.tried[method] & ~left).nonzero().flatten()
        assert torch.equal((less.tried[method] & ~left).nonzero().flatten(), broken[: module.BROKEN]) and len(broken)


def test_a_contradiction_between_bound_and_attack_is_not_passed_over():
    net = network()
    x, y = samples(net)
    proved = verify(net, x, y, 0.03).by_method["ibp"].nonzero().flatten()
    lie = torch.ones(100, dtype=torch.bool)
    lie[proved[:2]] = False
    with pytest.raises(AssertionError, match=rf"2 samples are verified.*{proved[:2].tolist()}".replace("[", r"\[")):
        verify(net, x, y, 0.03, robust=lie)


def test_a_contradiction_of_the_size_of_rounding_goes_to_the_attack():
    net = nn.Linear(1, 2)
    net.weight.data = torch.tensor([[1.0], [0.0]])
    net.bias.data = torch.tensor([0.0, 0.25 - 2**-20])
    x, y, broken = torch.tensor([[0.5]]), torch.tensor([0]), torch.tensor([False])
    assert verify(net, x, y, 0.25).verified.item()
    result = verify(net, x, y, 0.25, robust=broken)
    assert not result.verified.item() and result.margins.item() == 0 and result.proved_by == [None]


@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bounds_that_are_not_finite_prove_nothing(methods, bad, monkeypatch):
    net = network()
    x, y = samples(net, wrong=0)

    def spoiled(*args, **options):
        lb, ub = bounds(*args, **options)
        lb[::2, 0] = bad
        return lb, ub

    monkeypatch.setattr(module, "bounds", spoiled)
    result = verify(net, x, y, 0.001, methods, batch_size=100)
    assert not result.verified[::2].any() and result.verified[1::2].any()
    assert (result.margins[::2] == -math.inf).all()


def test_batches_are_small_where_models_are_large(monkeypatch):
    net, seen = network(), []
    x, y = samples(net)

    def watched(model, lower, *args, **options):
        seen.append((args[1], len(lower)))
        return bounds(model, lower, *args, **options)

    whole = verify(net, x, y, 0.03)
    monkeypatch.setattr(module, "bounds", watched)
    monkeypatch.setattr(module, "FLOATS", 4 * 10 * (4 + 12 * 4 + 2 * 3 + 2 * 12))
    again = verify(net, x, y, 0.03)
    assert torch.allclose(again.margins, whole.margins, atol=1e-5)
    largest = {m: max(n for name, n in seen if name == m) for m in METHODS}
    assert 90 > largest["ibp"] > largest["crown_ibp"] == largest["crown"] > 1
    seen.clear()
    monkeypatch.setattr(module, "FLOATS", 1)
    verify(net, x[:20], y[:20], 0.03)
    assert {n for _, n in seen} == {1}


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).train()
    net[3].eval()
    x, y = torch.rand(20, 4), torch.randint(0, 3, (20,))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    result = verify(net, x, y, 0.01)
    assert [m.training for m in net] == [True, True, True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters()) and not result.margins.requires_grad
    net.eval()
    assert torch.equal(verify(net, x, y, 0.01).margins, result.margins)


def test_no_samples_and_eps_zero():
    net = network()
    x, y = samples(net)
    none = verify(net, x[:0], y[:0], 0.1)
    assert none.proved_by == [] and none.accuracy == {"clean": 0.0, "verified": 0.0}
    point = verify(net, x, y, 0.0)
    assert torch.equal(point.verified, point.clean)


def test_check_order_names_the_samples():
    yes, no = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])
    check_order(yes, yes, no)
    with pytest.raises(AssertionError, match=r"1 samples are verified, but an attack broke them .*\[1\]"):
        check_order(yes, no, yes)
    with pytest.raises(AssertionError, match="misclassified"):
        check_order(no, yes, no)


def test_wider_boxes_have_fewer_proofs():
    net = network()
    x, y = samples(net)
    counts = [int(verify(net, x, y, eps).verified.sum()) for eps in (0, 0.01, 0.03, 0.1, 0.5)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 90 and counts[-1] < 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ["ibp", "crwn"]}, "no bound method called 'crwn'. Did you mean 'crown'"),
        ({"methods": []}, "No method was named"),
        ({"engine": "lirpa"}, "no bound engine called 'lirpa'"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"y": torch.zeros(4, dtype=torch.long)}, "5 images need 5 labels"),
        ({"y": torch.full((5,), 3)}, "from 3 to 3, but the model tells 3 classes apart"),
        ({"x": torch.rand(5, 4) * 255}, r"pixels must be in \[0, 1\]"),
        ({"eps": True}, "eps is True"),
        ({"eps": 10**400}, "eps is a number of thousands of digits"),
        ({"eps": torch.tensor(0.1)}, r"eps is tensor\(0.1000\), .*eps.item\(\)"),
        ({"methods": None}, "methods is None"),
        ({"robust": [True] * 5}, "robust is list"),
        ({"robust": torch.ones(5)}, r"robust is torch.float32 of shape \(5,\)"),
        ({"x": torch.rand(5, 4).to_sparse()}, "x is not a dense tensor, but torch.sparse_coo"),
        ({"x": torch.rand(5, 4, device="meta")}, "x is on the device 'meta'"),
        ({"y": torch.zeros(5, dtype=torch.long, device="meta")}, "y is on the device 'meta'"),
    ],
)
def test_bad_input_is_refused(options, said):
    given = {"x": torch.rand(5, 4), "y": torch.zeros(5, dtype=torch.long), "eps": 0.1} | options
    with pytest.raises((ValueError, RuntimeError), match=said):
        verify(network(), **given)


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


def test_what_a_radius_moves():
    """A radius that float32 has not moves a box of float64, and whole numbers may be large."""
    assert [moves(eps) for eps in (0, 0.0, 1e-300, 10**19, torch.zeros(3), torch.tensor([0, 1e-40, 0]))] == [False, False, True, True, False, True]


@pytest.mark.parametrize("options", [{}, {"budget": 1.0}, {"sound": True}])
def test_images_that_the_model_cannot_read_are_refused_by_a_sentence(options):
    with pytest.raises(ValueError, match="not a single number"):
        verify(network(), torch.tensor(0.5), torch.tensor([0]), 0.1, **options)
    with pytest.raises(ValueError, match="does not fit what reaches it"):
        verify(network(), torch.rand(2, 4).double(), torch.tensor([0, 1]), 0.1, **options)


def test_an_unsupported_layer_is_named_and_the_mode_comes_back():
    net = nn.Sequential(nn.Linear(4, 3), Sine(), nn.Linear(3, 2)).train()
    with torch.no_grad():
        net[2].bias.copy_(torch.tensor([100.0, 0.0]))
    with pytest.raises(UnsupportedLayer, match="'1.sin'.*auto_lirpa"):
        verify(net, torch.rand(2, 4), torch.zeros(2, dtype=torch.long), 0.1)
    assert net.training and net[1].training


def test_pgd_points_of_unproved_samples_show_the_gap_not_a_proof():
    """Bounds may be loose, never the other way round: where PGD breaks a sample, every margin bound is negative."""
    net = network(3)
    x, y = samples(net)
    broken = worst_margin(net(pgd(net, x, y, 0.1, restarts=3)), y) <= 0
    result = verify(net, x, y, 0.1)
    assert broken.any() and (result.margins[broken] <= 0).all()


def test_verification_of_given_tensors():
    bits = torch.tensor([True, True, False])
    empty = Verification(bits, torch.full((3,), -math.inf))
    assert empty.proved_by == [None] * 3 and empty.accuracy["verified"] == 0 and empty.verified_by == {}


def test_a_machine_without_auto_lirpa_is_told_both_commands_in_order(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "auto_LiRPA"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed.*pip install 'sparselab\[lirpa\]'.*"
                                          r"pip install --no-deps auto_LiRPA==0\.3`.*engine=\"native\""):
        bounds(network(), *input_box(torch.rand(1, 4), 0.1), engine="auto_lirpa")


@pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")
def test_what_auto_lirpa_imports_and_lacks_is_named():
    code = "import sys; sys.modules['appdirs'] = None; from sparselab.robust.lirpa import load; load()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: auto_LiRPA is installed, but not appdirs") and "'sparselab[lirpa]'" in last


class Elsewhere:
    """An engine that knows the model at the images alone: at every other point it computes other outputs."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def bounds(self, lower, upper, method, C):
        lb, ub = bounds(self.model, lower, upper, method, C)
        known = torch.equal(lower, upper) and torch.equal(lower, self.x)
        return (lb, ub) if known or not torch.equal(lower, upper) else (lb + 0.1, ub + 0.1)


def test_an_engine_of_the_model_is_held_against_it_away_from_the_images():
    torch.manual_seed(0)
    model, x = network(), torch.rand(6, 4)
    with pytest.raises(Contradiction, match="boxes of width zero differ"):
        verify(model, x, model(x).argmax(1), 0.05, engine=Elsewhere(model, x))


def test_a_point_that_the_attack_broke_is_not_verified_by_rounding(monkeypatch):
    """A bound a little above zero where the attack ends at zero: less than rounding, and broken all the same."""
    model, x = nn.Linear(1, 2, bias=False), torch.tensor([[0.5]])
    model.weight.data = torch.tensor([[1.0], [0.0]])
    monkeypatch.setattr(module, "_hunted", lambda *given: torch.zeros(1, 2))
    monkeypatch.setattr(module, "check_bounds", lambda *given, **options: None)
    assert not verify(model, x, torch.tensor([0]), 0.1).verified.any()
    monkeypatch.setattr(module, "_hunted", lambda *given: torch.tensor([[1.0, 0.0]]))
    assert verify(model, x, torch.tensor([0]), 0.1).verified.all()


@pytest.mark.parametrize("method", METHODS)
def test_bounds_of_tiny_numbers_are_bounds(method):
    """The same network with its first layer times 1e-33 and its second over that: widths far below 1e-30 are widths."""
    for seed in range(5):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)).eval()
        with torch.no_grad():
            net[0].weight *= 1e-33
            net[0].bias *= 1e-33
            net[2].weight /= 1e-33
        lower, upper = input_box(torch.rand(1, 6), 0.2)
        points = net(lower + (upper - lower) * torch.randint(0, 2, (5000, 6)))
        for engine in ("native", Unrolled(net, lower)):
            lb, ub = bounds(net, lower, upper, method, engine=engine)
            assert (lb <= points + 1e-6).all() and (points <= ub + 1e-6).all()


def test_both_engines_prove_the_same():
    try:
        load()
    except ImportError as error:
        pytest.skip(str(error))
    net = network(2)
    x, y = samples(net, n=40)
    native, other = (verify(net, x, y, 0.05, engine=engine, batch_size=16) for engine in ("native", "auto_lirpa"))
    assert torch.equal(native.verified, other.verified) and native.verified.any()
    assert native.proved_by == other.proved_by
    assert torch.allclose(native.margins, other.margins, rtol=1e-4, atol=1e-5)


class Halved(ReLU):
    """A wrong rule: the upper end of an unstable ReLU is half of what it is."""

    def interval(self, x):
        y = super().interval(x)
        return Interval.ends(y.lb, torch.where(y.lb == 0, y.ub / 2, y.ub))


def test_a_short_attack_finds_a_false_proof_that_no_fixed_point_shows(monkeypatch):
    """In the middle of the box the margin falls away from the corner where, behind a kink, it is negative."""
    net, h = nn.Sequential(nn.Linear(30, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(30)
    h[::2] = -1
    with torch.no_grad():  # the margin is 2.4 + 0.1 h d - relu(h d - 0.2) for d = x - 1/2
        net[0].weight.copy_(torch.stack([h, 0.1 * h]))
        net[0].bias.copy_(torch.tensor([-0.2, 10.0]) - net[0].weight.sum(1) / 2)
        net[2].weight.copy_(torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
        net[2].bias.copy_(torch.tensor([2.4 - 10.0, 0.0]))
    x, y = 0.5 + 0.001 * torch.randn(20, 30), torch.zeros(20, dtype=torch.long)
    assert (worst_margin(net(x + 0.1 * h), y) < 0).all() and not verify(net, x, y, 0.1).verified.any()
    monkeypatch.setitem(RULES, "relu", lambda x: Halved())
    with pytest.raises(Contradiction, match="A bound is wrong"):
        verify(net, x, y, 0.1, "ibp")
    monkeypatch.setattr(module, "ATTACKED", 0)
    assert verify(net, x, y, 0.1, "ibp").verified.all(), "the corners and points that are always asked do not show it"


SWITCHES = {"sound of verify": lambda value, *task: verify(*task, sound=value),
            "early_stop of pgd": lambda value, *task: pgd(*task, early_stop=value),
            "sound of bounds": lambda value, model, x, y, eps: bounds(model, *input_box(x, eps), sound=value),
            "sound of verify with a budget": lambda value, *task: verify(*task, budget=1, sound=value),
            "progress of decide": lambda value, *task: decide(*task, 1, progress=value)}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["no", "False", 0, 1, None, [], 0.0])
def test_a_switch_is_true_or_false(name, value):
    """The text "no" counts as True in Python, and is refused like every other value."""
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(2, 1, 2, 2)
    with pytest.raises(ValueError, match=f"{name.split()[0]}=.*{'function' if 'progress' in name else 'True or False'}"):
        SWITCHES[name](value, model, x, torch.zeros(2, dtype=torch.long), 0.1)


def beyond_float32(activation: nn.Module, weight: float = 1.0) -> nn.Module:
    """A sum that is infinite near the corner where 24 inputs are 0.55, which a BatchNorm, and a weight of zero, would make small."""
    net = nn.Sequential(nn.Linear(24, 2), nn.BatchNorm1d(2, eps=0.0), activation, nn.Linear(2, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[weight * torch.finfo().max / 12.9], [0.0]]).expand(2, 24))
        net[1].running_var.fill_(1e38), net[1].weight.fill_(1e-19)
        net[3].weight.zero_(), net[3].bias.copy_(torch.tensor([2.0, 0.0])), net[0].bias.zero_()
    return net


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(-0.5)])
@pytest.mark.parametrize("options", [{}, {"methods": "alpha_crown"}, {"budget": 3.0}], ids=str)
def test_a_network_that_overflows_in_a_corner_of_its_box_alone_is_not_verified(options, activation):
    """Its bounds are finite, and so is every output that is asked for; at one corner of 2^24 it is NaN."""
    net, x, y = beyond_float32(activation), torch.full((3, 24), 0.5), torch.zeros(3, dtype=torch.long)
    x[1:] = torch.tensor([[0.3], [0.1]])
    assert net(x).isfinite().all() and not net(x + 0.05)[0].isfinite().any()
    found = verify(net, x, y, 0.05, **options)
    assert found.verified.tolist() == [False, False, True] and sum(int(proved.sum()) for proved in found.by_method.values()) == 1
    assert verify(beyond_float32(activation, 0.25), x, y, 0.05).verified.all()


def test_a_network_that_overflows_in_some_order_is_not_searched():
    """Half of the terms are negative: the sum is small, but those of one sign may be beyond float32 together."""
    net, x, y = beyond_float32(nn.ReLU()), torch.tensor([[0.5], [0.1]]).expand(2, 24), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        net[0].weight[:, ::2] *= -1
    first, second = decide(net, x, y, 0.05, 3.0, methods=()).records
    assert first.verdict == "unknown" and "may overflow in float32" in first.reason and second.verdict == "verified"


def test_an_engine_without_the_zeros_of_a_network_does_not_hide_that_it_overflows():
    """Only a zero reads the first neuron, which is infinite near one corner of the box; infinity times zero is NaN."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.4e38, 3.4e38], [1.0, 0.0]])), net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]])), net[2].bias.copy_(torch.tensor([1.0, 0.0]))

    class Nonzeros:
        def bounds(self, lower, upper, method, C):
            small = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)).requires_grad_(False)
            small[0].weight[:], small[0].bias[:], small[2].weight[:], small[2].bias[:] = net[0].weight[1:], 0.0, net[2].weight[:, 1:], net[2].bias
            return bounds(small, lower, upper, method, C)

    x, y = torch.tensor([[0.45, 0.45]]), torch.tensor([0])
    assert net(x).isfinite().all() and not net(x + 0.051).isfinite().all()
    assert not verify(net, x, y, 0.051, engine=Nonzeros()).verified.any()
    assert verify(net, x / 4, y, 0.01, engine=Nonzeros()).verified.all()
