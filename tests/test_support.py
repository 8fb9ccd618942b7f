"""Where README says that an engine supports an operation, it bounds a network with it, soundly; one network for every operation."""
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselab.program import operation, read
from sparselab.robust.bounds import METHODS, bounds, engine_table
from sparselab.robust.curves import Curve
from sparselab.robust.layers import Layer
from sparselab.robust.lirpa import SOUND
from sparselab.robust.neurons import stability
from sparselab.robust.relu import ReLU
from sparselab.robust.rules import FAMILY, ONLY_LIRPA, RULES, UnsupportedLayer, rule

SCALE = torch.linspace(0.5, 1.5, 8)
VECTORS = {  # ATen operation -> what stands between two linear layers of 8 neurons
    "addmm": lambda h: h, "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "abs": torch.abs,
    "sin": torch.sin, "cos": torch.cos, "neg": lambda h: -h, "add": lambda h: h + 0.5, "sub": lambda h: h - SCALE,
    "rsub": lambda h: 1 - h, "mul": lambda h: h * SCALE, "clone": lambda h: h.clone(), "detach": lambda h: h.detach(),
    "view": lambda h: h.view(-1, 2, 4).flatten(1), "permute": lambda h: h.view(-1, 2, 4).permute(0, 2, 1).flatten(1),
    "transpose": lambda h: h.view(-1, 2, 4).transpose(1, 2).flatten(1), "unsqueeze": lambda h: h.unsqueeze(1).flatten(1),
    "squeeze": lambda h: h.view(-1, 8, 1).squeeze(2), "slice": lambda h: torch.cat([h[:, 4:], h[:, :4]], 1),
    "select": lambda h: torch.stack([h, h], 1)[:, 1],
    "cat": lambda h: torch.cat([h[:, :4], h[:, 4:]], 1), "stack": lambda h: torch.stack([h[:, :4], h[:, 4:]], 1).flatten(1),
    "mean": lambda h: h - h.mean(1, keepdim=True), "sum": lambda h: h - h.sum(1, keepdim=True), "leaky_relu": lambda h: F.leaky_relu(h, 0.3),
    "pow": lambda h: h**2, "div": lambda h: h / 2,
}
IMAGES = {  # between a convolution to (4, 6, 6) and a linear layer
    "convolution": nn.Conv2d(4, 4, 3, padding=1), "native_batch_norm": nn.BatchNorm2d(4), "avg_pool2d": nn.AvgPool2d(2),
    "max_pool2d_with_indices": nn.MaxPool2d(2), "_adaptive_avg_pool2d": nn.AdaptiveAvgPool2d(1), "constant_pad_nd": nn.ZeroPad2d(1),
}


class Vectors(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(4, 8), nn.Linear(8, 3), middle

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Images(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, size = nn.Conv2d(2, 4, 3), middle, middle(torch.zeros(1, 4, 6, 6)).numel()
        self.last = nn.Linear(size, 3)

    def forward(self, x):
        return self.last(self.middle(F.relu(self.first(x))).flatten(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_an_engine_that_claims_an_operation_bounds_it(name, method):
    net, shape = (Vectors(VECTORS[name]), (4,)) if name in VECTORS else (Images(IMAGES[name]), (2, 8, 8))
    net, lower = net.eval(), torch.rand(3, *shape)
    upper = lower + 0.1
    with torch.no_grad():
        outputs = torch.stack([net(lower + share * (upper - lower)) for share in torch.rand(100, 3, *shape).round()])
        for engine, table in {"native": RULES, "auto_lirpa": SOUND}.items():
            if name in table:
                lb, ub = bounds(net, lower, upper, method, engine=engine)
                assert (lb - 1e-4 <= outputs).all() and (outputs <= ub + 1e-4).all(), engine


def test_every_claim_for_auto_lirpa_has_a_network():
    same = {"mm", "t", "_unsafe_view", "_native_batch_norm_legit_no_training", "_adaptive_avg_pool2d"}  # other names of these
    assert set(SOUND) - same <= set(VECTORS) | set(IMAGES)
    for name, middle in VECTORS.items():
        assert name in {operation(node) for node in read(Vectors(middle), torch.rand(2, 4)).nodes}, name


class Sin(Curve):
    """sin x, for |x| <= pi / 2."""

    shares = (-0.5, 0.5)

    def function(self, x):
        return x.sin()

    def derivative(self, x):
        return x.cos()

    def touching(self, slope):
        x = slope.clamp(-1, 1).acos()
        return [x, -x]


class Gate(ReLU):
    """A switch of another name."""


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_and_a_rule_are_all_that_an_operation_needs(method):
    torch.manual_seed(0)
    net, x = Vectors(torch.sin), torch.rand(4, 4)
    net.first.weight.data /= 4
    with pytest.raises(UnsupportedLayer, match="no bound rule"):
        bounds(net, x, x, method)
    with mock.patch.dict(RULES), mock.patch.dict(FAMILY):
        rule("sin", of=ONLY_LIRPA["sin"])(lambda x: Sin())
        rule("cos", of=ONLY_LIRPA["cos"])(lambda x: Sin())
        lb, ub = bounds(net, x - 0.05, x + 0.05, method)
        for _ in range(100):
            y = net(x + 0.1 * torch.rand_like(x).round() - 0.05)
            assert bool((lb <= y + 1e-6).all() and (y <= ub + 1e-6).all())
        assert "| sine and cosine | yes | yes |" in engine_table() and not stability(net, x, x), "a curve is no switch"
        RULES["sin"] = lambda x: Gate()
        assert list(stability(Vectors(torch.sin), x, x, method)) == ["sin"], "what a layer says is enough"


def test_nothing_about_a_rule_can_be_forgotten():
    class Silent(Layer):
        linear, entrywise = True, True

        def interval(self, x):
            return x

        def backward(self, A, x, y):
            return [A], 0.0

    with pytest.raises(TypeError, match="switch"):
        Silent()
    with pytest.raises(TypeError, match="of"):
        rule("sin")
    with pytest.raises(ValueError, match="'relu' has a rule already"):
        rule("relu", of="ReLU")(lambda x: x)
