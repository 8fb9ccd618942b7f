"""No point of a box ever leaves the bounds: 100,000 random (network, box, point) triples and the properties of boxes."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselab.robust.bounds import METHODS, bounds, margin_matrix

CLASSES, BOXES, POINTS = 4, 8, 100


class Residual(nn.Module):
    """x + f(x) and [x, g(x)] in one network."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.side, self.relus = nn.Conv2d(4, 3, 1), nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.1)])
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(7 * 9, CLASSES)

    def forward(self, x):
        x = self.relus[0](self.norm(self.first(x)))
        x = self.relus[1](x + self.second(x))
        x = torch.cat([x, self.relus[2](self.side(x))], 1)
        return self.last(nn.functional.avg_pool2d(x, 2).flatten(1))


def conv_net(stride: int, dilation: int, pool: bool) -> nn.Module:
    layers = [nn.Conv2d(2, 5, 3, stride=stride, padding=2, dilation=dilation), nn.BatchNorm2d(5), nn.ReLU()]
    layers += [nn.MaxPool2d(2)] if pool else [nn.Conv2d(5, 4, (3, 2), bias=False), nn.LeakyReLU(0.2)]
    size = nn.Sequential(*layers, nn.Flatten()).eval()(torch.zeros(1, 2, 6, 6)).shape[1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def mlp(depth: int) -> nn.Module:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(14, 14), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 14), nn.ReLU(), *hidden, nn.Linear(14, CLASSES))


KINDS = [lambda: mlp(0), lambda: mlp(3), lambda: conv_net(1, 1, False), lambda: conv_net(2, 1, True),
         lambda: conv_net(2, 2, False), Residual]


def random_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = KINDS[seed % len(KINDS)]()
    keep = (1.0, 0.3, 0.1)[seed // len(KINDS) % 3]
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
                module.weight.normal_()
            elif isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) < keep).mul_(3)
    return net.eval()


def random_box(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    centre = torch.rand(BOXES, 2, 6, 6, generator=rng)
    radius = torch.rand(BOXES, 2, 6, 6, generator=rng) * (0.001, 0.05, 0.5)[seed % 3]
    return centre - radius, centre + radius


def points_in(lower: torch.Tensor, upper: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of them uniform, half at corners, where the extremes of piecewise linear functions are."""
    share = torch.rand(POINTS, *lower.shape, generator=rng)
    share[: POINTS // 2] = share[: POINTS // 2].round()
    return (lower + share * (upper - lower)).clamp(lower, upper)


@pytest.mark.parametrize("block", range(5))
def test_no_point_leaves_its_bounds(block):
    triples = 0
    for seed in range(25 * block, 25 * (block + 1)):
        net, (lower, upper) = random_net(seed), random_box(seed)
        points = points_in(lower, upper, torch.Generator().manual_seed(seed))
        C = margin_matrix(torch.arange(BOXES) % CLASSES, CLASSES)
        with torch.no_grad():
            z = net(points.flatten(0, 1)).view(POINTS, BOXES, CLASSES)
            values = {None: z, "margins": torch.einsum("bsk,pbk->pbs", C, z)}
            for method in METHODS:
                for rows in values:
                    lb, ub = bounds(net, lower, upper, method, None if rows is None else C)
                    slack = 1e-5 * (1 + torch.maximum(lb.abs(), ub.abs()))  # float32 sums in another order
                    low, high = values[rows].amin(0) - lb, ub - values[rows].amax(0)
                    assert bool((low >= -slack).all() and (high >= -slack).all()), (seed, method, rows)
        triples += POINTS * BOXES
    assert triples == 20_000


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(METHODS), st.floats(0, 1))
def test_a_box_inside_another_has_bounds_inside_the_others(seed, method, share):
    net, (lower, upper) = random_net(seed).double(), random_box(seed)
    lower, upper = lower.double(), upper.double()
    middle = (lower + upper) / 2
    inner = [middle + share * (end - middle) for end in (lower, upper)]
    wide, narrow = bounds(net, lower, upper, method), bounds(net, *inner, method)
    if method == "ibp":  # CROWN's adaptive slope may jump, so that only IBP is monotone everywhere
        assert bool((narrow[0] >= wide[0] - 1e-9).all() and (narrow[1] <= wide[1] + 1e-9).all())
    at = net(middle)
    for lb, ub in (wide, narrow):
        assert bool((lb <= at + 1e-9).all() and (at <= ub + 1e-9).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(6))
def test_a_box_that_is_a_point_gives_the_function_and_width_grows_with_eps(method, seed):
    net, x = random_net(seed).double(), torch.rand(3, 2, 6, 6, dtype=torch.float64)
    lb, ub = bounds(net, x, x, method)
    torch.testing.assert_close(lb, net(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ub, net(x), rtol=1e-9, atol=1e-9)
    widths = [(ub - lb).mean().item() for lb, ub in (bounds(net, x - eps, x + eps, method) for eps in (0.0, 0.01, 0.03, 0.1))]
    assert all(a <= b + 1e-9 for a, b in zip(widths, widths[1:], strict=False))


@pytest.mark.parametrize("seed", range(12))
def test_crown_is_no_looser_than_crown_ibp_on_average_and_affine_networks_are_exact(seed):
    net, (lower, upper) = random_net(seed), random_box(seed)
    width = {m: float((ub - lb).mean().detach()) for m in METHODS for lb, ub in [bounds(net, lower, upper, m)]}
    assert width["crown"] <= 1.05 * width["crown_ibp"] + 1e-5
    affine = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Linear(5, CLASSES)).double()
    weight = affine[2].weight @ affine[1].weight
    reach = (weight.abs() * ((upper - lower) / 2).double().flatten(1).unsqueeze(1)).sum(2)
    for method in ("crown_ibp", "crown"):
        lb, ub = bounds(affine, lower.double(), upper.double(), method)
        torch.testing.assert_close((ub - lb) / 2, reach)


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_scales_the_dimension_that_torch_scales(method):
    """After a linear layer it is the second dimension, which of (B, C, L) is not the one that the layer wrote."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(36, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, CLASSES))
    net[2].running_mean.normal_(), net[2].running_var.uniform_(0.2, 3)
    x = torch.rand(BOXES, 2, 6, 6)
    for end in bounds(net.eval(), x, x, method):
        torch.testing.assert_close(end, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_box_that_is_wider_than_the_type_has_bounds(method):
    """The ends of a neuron are finite in float32, their distance is not."""
    net = nn.Sequential(nn.Linear(2, 1), nn.LeakyReLU(0.5), nn.LeakyReLU(0.1), nn.Linear(1, 1)).requires_grad_(False)
    net[0].weight[:], net[0].bias[:] = torch.tensor([[3.2e38, -3.2e38]]), 0.0
    net[3].weight[:], net[3].bias[:] = -1e-38, 3.0
    lb, ub = bounds(net, torch.zeros(1, 2), torch.ones(1, 2), method)
    corners = net(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    assert lb.isfinite().all() and (lb <= corners + 1e-5).all() and (corners - 1e-5 <= ub).all()
