"""Random networks against their bounds, broken readers against `verify`, and what the two have found."""

import itertools
from unittest import mock

import pytest
import torch
from fuzzing import BROKEN_READERS, OTHER_DEVICES, PARTS, Report, broken, examine, shrunk_rule
from torch import Tensor, nn

from sparselab.robust.bounds import METHODS, bounds
from sparselab.robust.rules import RULES
from sparselab.robust.verification import verify

NETWORKS = 40  # of each block, so that every part comes at least once; `python tests/fuzzing.py 100000` examines more


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """All blocks together have every part at least once."""
    return []


@pytest.mark.parametrize("block", range(5))
def test_no_point_of_a_random_network_leaves_its_bounds_and_no_proof_is_false(block, reports):
    found = sum((examine(seed) for seed in range(NETWORKS * block, NETWORKS * (block + 1))), Report())
    assert not found.faults, "\n".join(found.faults)
    assert found.checks > 2 * NETWORKS and found.points > 40 * NETWORKS and found.proved > NETWORKS // 2
    reports.append(found)


def test_the_networks_have_every_operation_that_has_a_rule(reports):
    if len(reports) < 5:
        pytest.skip("needs all blocks of the test above")
    found = sum(reports, Report())
    assert found.networks >= len(PARTS) and set(RULES) - OTHER_DEVICES <= set(found.operations)


@pytest.mark.parametrize("name", ["tanh", "max_pooling", "stack", "number_in_place"])
def test_a_rule_that_is_too_tight_is_found(name):
    operation = {"max_pooling": "max_pool2d_with_indices", "number_in_place": "select_scatter"}.get(name, name)
    seeds = range(list(PARTS).index(name), 9 * len(PARTS), len(PARTS))
    with mock.patch.dict(RULES, shrunk_rule(operation, 0.5)):
        assert any(examine(seed).faults for seed in seeds)


def test_a_broken_reader_proves_nothing():
    found = sum((broken(seed) for seed in range(200)), Report())
    assert not found.faults, "\n".join(found.faults)
    unnoticed = [name for name in found.outcomes if "not noticed, proofs" in name and not name.startswith("shrunk_rule")]
    assert not unnoticed, unnoticed
    for reader in BROKEN_READERS:
        assert found.outcomes[f"{reader.__name__}: contradiction"] >= 5, found


class Called(nn.Module):
    """A network of one function, and a linear layer for logits."""

    def __init__(self, function, entries: int = 0):
        super().__init__()
        self.function, self.head = function, nn.Linear(entries, 3) if entries else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x))


# --- what the fuzz found: each function grows with every input, so that its range is known --------------------------------


def written(h: Tensor, value) -> Tensor:
    h = h * 1
    h[:, 0] = value(h) if callable(value) else value
    return h


def zeroed(h: Tensor) -> Tensor:
    h = h * 1
    h[:, 0].zero_()
    h[:, 1].fill_(0.3)
    return h


def copied(h: Tensor) -> Tensor:
    (y := torch.empty_like(h)).copy_(h)
    return y


RISING = {
    "a column from another": lambda h: written(h, lambda h: h[:, -1] * 0.5),
    "a column from a row": lambda h: written(h, h.new_full(h.shape[2:], 0.25)),
    "a column is a number": lambda h: written(h, 0.5),
    "zeros and numbers": zeroed,
    "a new tensor": copied,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2)])
@pytest.mark.parametrize("name", RISING)
def test_what_is_written_over_has_gone(name, shape, method):
    x, net = torch.rand(shape), Called(RISING[name])
    lb, ub = bounds(net, x - 0.1, x + 0.2, method)
    torch.testing.assert_close((lb, ub), (net(x - 0.1), net(x + 0.2)))


ONE_NUMBER = {  # an activation (B,) of one number per sample
    "select": lambda x: x[:, 0].unsqueeze(1) + x,
    "relu": lambda x: (x[:, 0] - 0.5).relu(),
    "sum": lambda x: x.sum(1).sigmoid(),
    "maximum": lambda x: torch.maximum(x[:, 0], x[:, 1]),
    "square": lambda x: (x[:, 0] + 1) ** 2,
    "product": lambda x: (x[:, 0] + 1) * (x[:, 1] + 1),
    "linear": lambda x: x[:, 0] * 2 + x[:, 1],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ONE_NUMBER)
def test_one_number_for_each_sample(name, method):
    x, net = torch.rand(5, 3), Called(ONE_NUMBER[name])
    lb, ub = bounds(net, x - 0.1, x + 0.1, method)
    assert bool((lb <= net(x - 0.1) + 1e-6).all() and (net(x + 0.1) <= ub + 1e-6).all()) and lb.shape == net(x).shape
    torch.testing.assert_close(bounds(net, x, x, method), (net(x), net(x)))


def overwritten(x: Tensor) -> Tensor:
    x.sub_(0.5).relu_()
    return x


def halved(x: Tensor) -> Tensor:
    first, second = (x * 1).chunk(2, 1)
    first.mul_(2)  # autograd refuses to go through it
    return torch.cat([first, second.tanh()], 1)


def spoiled(x: Tensor) -> Tensor:
    y = x.tanh()
    return y.mul_(2)


@pytest.mark.parametrize("function", [overwritten, halved, spoiled])
def test_a_network_that_autograd_cannot_go_through_is_verified(function):
    torch.manual_seed(0)
    net, x = Called(function, 4), torch.rand(20, 4)
    before, labels = x.clone(), net(x.clone()).argmax(1)
    result = verify(net, x, labels, 0.02)
    assert torch.equal(x, before) and result.verified.any() and torch.equal(result.clean, torch.ones(20, dtype=torch.bool))


def test_a_reading_is_for_points_in_any_layout():
    """flatten is a view where its input is contiguous, and a copy where it is not."""
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), torch.rand(2, 3, 4, 2)
    transposed = Called(lambda x: net(x.permute(0, 2, 1, 3).relu()))  # its gradient has other strides than x
    for images in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert verify(transposed, images, transposed(images).argmax(1), 1e-4).verified.all()


@pytest.mark.parametrize("method", METHODS)
def test_what_takes_the_shape_of_an_activation_and_not_its_values_is_a_constant(method):
    net = Called(lambda x: torch.cat([x, torch.ones_like(x), x.new_zeros(x.shape), torch.full_like(x, 3) - x], 1) + x.new_full((1,), 2))
    x = torch.rand(3, 2)
    lb, ub = bounds(net, x, x + 0.5, method)
    low, high = net(x), net(x + 0.5)
    torch.testing.assert_close((lb, ub), (torch.minimum(low, high), torch.maximum(low, high)))


SPREAD = {  # a constant repeats the activation
    "clamp": lambda x, a: x.clamp(min=a),
    "clamp_max": lambda x, a: torch.clamp_max(x, a),
    "maximum": torch.maximum,
    "minimum": lambda x, a: torch.minimum(a, x),
    "add": torch.add,
    "where": lambda x, a: torch.where(a > 0.5, x, a),
    "mask": lambda x, a: x.masked_fill(a > 0.5, 0.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPREAD)
def test_a_constant_repeats_an_activation(name, method):
    x, a = torch.rand(2, 1, 3), torch.rand(2, 3)
    net = Called(lambda x: SPREAD[name](x * 1, a).flatten(1), 6)
    lb, ub = bounds(net, x, x + 0.2, method)
    for point in (x, x + 0.1, x + 0.2):
        assert bool((lb <= net(point) + 1e-5).all() and (net(point) <= ub + 1e-5).all())
    torch.testing.assert_close(bounds(net, x, x, method), (net(x), net(x)))
    for high in (torch.rand(2, 2, 3), torch.rand(2, 1, 3)):  # it would repeat, or move, the two samples
        wrong = Called(lambda x, a=high: SPREAD[name](x * 1, a).flatten(1))
        with pytest.raises(ValueError, match="batch must stay in front|with the batch in front"):
            bounds(wrong, torch.rand(2, 3), torch.rand(2, 3) + 1, method)


SUBTRACTIONS = {
    "a number": lambda x: torch.rsub(x, 0.5, alpha=2),
    "another": lambda x: torch.rsub(x, x.flip(1).tanh(), alpha=2),
    "from a constant": lambda x: torch.rsub(x.new_full((3,), 0.3), x, alpha=2),
    "plain": lambda x: 1 - x,
    "added": lambda x: torch.add(x, 1, alpha=0.3),
    "by position": lambda x: torch.ops.aten.sub.Scalar(x, 0.4, 2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SUBTRACTIONS)
def test_subtractions_with_a_factor(name, method):
    x, net = torch.rand(4, 3), Called(SUBTRACTIONS[name])
    torch.testing.assert_close(bounds(net, x, x, method), (net(x), net(x)))
    lb, ub = bounds(net, x, x + 0.2, method)
    for corner in itertools.product([0, 0.2], repeat=3):
        y = net(x + torch.tensor(corner))
        assert bool((lb <= y + 1e-5).all() and (y <= ub + 1e-5).all())
