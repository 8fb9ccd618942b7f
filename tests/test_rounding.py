"""sound=True: no float32 computation of a network, in whatever order, leaves its bounds, and no false margin is proved."""
from fractions import Fraction

import pytest
import torch
from test_soundness import BOXES, POINTS, conv_net, points_in, random_box, random_net
from torch import nn

from sparselab.program import BATCH_NORMS, aten, fetch, operation, read
from sparselab.robust import Contradiction, bounds, input_box, margin_matrix, verify, worst_margin
from sparselab.robust.bounds import METHODS
from sparselab.robust.boxes import Interval
from sparselab.robust.layers import Linear
from sparselab.robust.replay import check_bounds
from sparselab.robust.rounding import RoundedReLU, gamma, outer_box, terms

# ---------------------------------------------------------------- float32, in any order


def one_by_one(order):
    """Sums the last dimension in `order`, a permutation, one term after the other."""
    def total(parts):
        result = torch.zeros_like(parts[..., 0])
        for i in order(parts.shape[-1]):
            result = result + parts[..., i]
        return result

    return total


def pairwise(parts):
    """Neighbours are added until one number is left."""
    while parts.shape[-1] > 1:
        if parts.shape[-1] % 2:
            parts = nn.functional.pad(parts, (0, 1))
        parts = parts[..., ::2] + parts[..., 1::2]
    return parts[..., 0]


def chunked(parts, width=4):
    """`width` running sums, as of a vector unit, which are added at the end."""
    parts = nn.functional.pad(parts, (0, -parts.shape[-1] % width)).unflatten(-1, (-1, width))
    return one_by_one(range)(one_by_one(range)(parts.transpose(-1, -2)))


def shuffled(seed):
    return one_by_one(lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist())


ORDERS = {"forward": one_by_one(range), "backward": one_by_one(lambda n: range(n - 1, -1, -1)), "shuffled": shuffled(1), "other": shuffled(2),
          "pairwise": pairwise, "chunked": chunked}


def with_bias(products, bias, place):
    """The bias (shaped like products without the last dimension, or broadcast) as one more term, first or last."""
    if bias is None:
        return products
    bias = bias.unsqueeze(-1).expand(*products.shape[:-1], 1)
    return torch.cat([bias, products] if place else [products, bias], -1)


def addmm(total, place, bias, x, weight):
    return total(with_bias(x.unsqueeze(-2) * weight.t(), bias, place))


def convolution(total, place, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    assert not transposed
    windows = nn.functional.unfold(x, weight.shape[2:], dilation, padding, stride)  # (B, in * k, L): moves values
    windows = windows.unflatten(1, (groups, 1, -1)).movedim(3, 4)  # (B, g, 1, L, n)
    products = windows * weight.flatten(1).unflatten(0, (groups, -1)).unsqueeze(2)  # (B, g, out / g, L, n)
    bias = None if bias is None else bias.view(groups, -1, 1)
    size = aten.convolution(x[:1], weight, None, stride, padding, dilation, transposed, output_padding, groups).shape[2:]
    return total(with_bias(products, bias, place)).flatten(1, 2).unflatten(2, size)


def batch_norm(total, place, x, weight, bias, mean, var, *_):
    eps = torch.tensor(1e-5, dtype=x.dtype)
    weight, bias, mean, var = (t.view(-1, 1, 1) for t in (weight, bias, mean, var))
    root = 1 / (var + eps).sqrt()
    if place:
        return (x - mean) * weight * root + bias
    return x * (root * weight) + (bias - mean * (root * weight))


def computed(program, model, x, total, place=False):
    """The program at x, in the type of x, with every sum of products in another order."""
    double = x.dtype == torch.float64
    values = {node: t.double() if double and t.is_floating_point() else t for node, t in fetch(program, model).items()} | {program.input: x}
    for node in program.nodes:
        if node.op != "call_function":
            continue
        args = torch.fx.node.map_arg(node.args, values.__getitem__)
        what = operation(node)
        if what == "addmm":
            values[node] = addmm(total, place, *args)
        elif what == "mm":
            values[node] = addmm(total, place, None, *args)
        elif what == "convolution":
            values[node] = convolution(total, place, *args)
        elif what in BATCH_NORMS:
            values[node] = (batch_norm(total, place, *args),)
        elif what == "avg_pool2d":
            windows = nn.functional.unfold(x := args[0], args[1], stride=args[1]).unflatten(1, (x.shape[1], -1)).movedim(2, 3)
            values[node] = (total(windows) / windows.shape[-1]).unflatten(2, [n // k for n, k in zip(x.shape[2:], args[1], strict=True)])
        else:
            function = aten.reshape if node.target is aten.view.default else node.target
            values[node] = function(*args, **torch.fx.node.map_arg(node.kwargs, values.__getitem__))
    return values[program.output]


def violations(seed):
    """How many of BOXES * POINTS points, in float64 and in every order, lie outside of the sound bounds of a random network."""
    net, (lower, upper) = random_net(seed), random_box(seed)
    method, rng = METHODS[seed % 3], torch.Generator().manual_seed(seed)
    lb, ub = bounds(net, lower, upper, method, program=read(net, lower), sound=True)
    points = points_in(lower, upper, rng).flatten(0, 1)
    program = read(net, points)
    outputs = [computed(program, net, points.double(), ORDERS["forward"])]
    outputs += [computed(program, net, points, total, bool(i % 2)) for i, total in enumerate(ORDERS.values())]
    outputs.append(net(points).detach())
    found = 0
    for y in outputs:
        y = y.double().view(POINTS, BOXES, -1)
        found += int(((y < lb) | (y > ub)).any(2).sum())
    return found


def test_the_orders_are_those_of_the_network_and_differ():
    net = conv_net(2, 1, True).eval()
    x = torch.rand(50, 2, 6, 6)
    program, y = read(net, x), net(x).detach()
    found = [computed(program, net, x, total) for total in ORDERS.values()]
    for z in found:
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    assert sum(bool((a != b).any()) for i, a in enumerate(found) for b in found[:i]) > 10  # of 15 pairs
    torch.testing.assert_close(computed(program, net, x.double(), pairwise), net.double()(x.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(26))
def test_no_computation_leaves_the_bounds(seed):
    """With 26 networks, 4 boxes and 100 points: 10,400 triples, each in float64 and in seven orders of float32."""
    assert violations(seed) == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_no_computation_leaves_the_bounds_in_a_million_triples(part):
    for seed in range(1000 + part * 250, 1250 + part * 250):
        assert violations(seed) == 0, seed


@pytest.mark.parametrize("method, seed", [(method, seed) for method in METHODS for seed in range(6 if method == "crown" else 12)])
def test_sound_bounds_contain_the_plain_ones_and_are_hardly_wider(method, seed):
    """By less than a thousandth of the outputs. From seed 6 on rows are zero, and CROWN refines others."""
    net, (lower, upper) = random_net(seed), random_box(seed)
    program, C = read(net, lower), margin_matrix(torch.arange(BOXES) % 4, 4)
    for rows in (None, C):
        with torch.no_grad():
            plain = [end.double() for end in bounds(net, lower, upper, method, rows, program=program)]
            exact = bounds(net.double(), lower.double(), upper.double(), method, rows if rows is None else rows.double())
        sound = bounds(net.float(), lower, upper, method, rows, program=program, sound=True)
        close = torch.stack(plain).abs().amax()
        assert (plain[0] - sound[0] <= 1e-3 * close).all() and (sound[1] - plain[1] <= 1e-3 * close).all()
        if method != "crown":  # real numbers are one way to compute; plain bounds themselves are rounded to either side
            assert (sound[0] <= exact[0]).all() and (exact[1] <= sound[1]).all()
            assert (sound[0] <= plain[0] + 1e-6 * close).all() and (plain[1] <= sound[1] + 1e-6 * close).all()


# ---------------------------------------------------------------- networks built against rounding


def chain(*layers):
    """Linear layers with these weights (lists of rows) and biases, and a ReLU where None stands."""
    modules = []
    for part in layers:
        if part is None:
            modules.append(nn.ReLU())
            continue
        weight, bias = torch.tensor(part[0], dtype=torch.float32), torch.tensor(part[1], dtype=torch.float32)
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, bias
        modules.append(layer)
    return nn.Sequential(*modules).eval()


def absorbed(k):
    """Cancellation: 2^k + x ulp is rounded to 2^k for x < 1/2, and 2^k is taken off again. Margin (rounded) - 0.35 ulp."""
    big = 2.0**k
    ulp = big * 2.0**-23
    net = chain(([[ulp]], [big]), None, ([[1.0]], [-big]), ([[1.0], [0.0]], [-0.35 * ulp, 0.0]))
    return net, [0.3], [0.9], [0.3], "forward"


def reordered(k, n):
    """Order of summation: n terms 2^k / 2^25 between 2^k and -2^k, which a sum that starts with 2^k forgets one by one."""
    big, small = 2.0**k, 2.0 ** (k - 25)
    weight = [[-big, *[small] * n, big], [0.0] * (n + 2)]
    net = chain((weight, [0.0, 0.0]), ([[1.0, 0.0], [0.0, 1.0]], [-0.5 * small, 0.0]))
    return net, [1.0] * (n + 2), [1.0] * (n + 2), [1.0] * (n + 2), "forward"


def vanishing(k):
    """Tiny weights: 2^-149 x, through 2^-k and 2^(k - 149), is zero for x < 1/2, and is then made large. Margin (0 or 1) - 1/2."""
    first, second = 2.0**-k, 2.0 ** (k - 149)
    net = chain(([[first]], [0.0]), ([[second]], [0.0]), ([[2.0**75]], [0.0]), ([[2.0**74]], [0.0]), ([[1.0], [0.0]], [-0.5, 0.0]))
    return net, [0.4], [0.7], [0.45], "forward"


def overflowing(n):
    """Huge weights: -w, w, -w, w add to zero, and -w, -w, w, w to minus infinity. Margin 1."""
    w = 2.0**127
    net = chain(([[-w, w] * n, [0.0] * 2 * n], [1.0, 0.0]),)
    return net, [1.0] * 2 * n, [1.0] * 2 * n, [1.0] * 2 * n, "even first"


ADVERSARIES = ([absorbed(k) for k in (-30, -10, 0, 10, 16, 20, 27, 34, 60, 90)] + [reordered(k, n) for k in (0, 25, 60) for n in (30, 46, 62)]
               + [vanishing(k) for k in (20, 40, 60, 75, 90)] + [overflowing(n) for n in (2, 3, 4)])
EVEN_FIRST = one_by_one(lambda n: [*range(0, n, 2), *range(1, n, 2)])


@pytest.mark.parametrize("number", range(len(ADVERSARIES)))
def test_a_false_margin_is_proved_without_sound_and_never_with_it(number):
    net, lower, upper, point, order = ADVERSARIES[number]
    lower, upper, point = (torch.tensor([t]) for t in (lower, upper, point))
    total = EVEN_FIRST if order == "even first" else ORDERS[order]
    C, program = margin_matrix(torch.tensor([0]), 2), read(net, point)
    z = computed(program, net, point, total)
    assert not (z[0, 0] - z[0, 1] > 0)  # in this order the network is wrong at this point
    plain, sound = ([bounds(net, lower, upper, method, C, program=program, sound=mode)[0].item() for method in METHODS] for mode in (False, True))
    assert max(plain) > 0, "the plain bounds make no false claim"
    assert max(sound) <= min(0.0, (z[0, 0] - z[0, 1]).item())


def test_at_least_twenty_networks_fool_the_plain_bounds():
    assert len(ADVERSARIES) >= 20


def rounds_its_input_away():
    """2^27 + 16 t x - 2^27 with t = 2 is a multiple of 16; the margin of class 0 at 0.55 is 9.6 and at 0.45 it is -6.4, in float32."""
    big, ulp, t, c = 2.0**27, 16.0, 0.2, 0.15
    gain = t * ulp / 0.1 / 2
    net = chain(([[gain]], [big]), None, ([[1.0]], [-big]), ([[1.0], [0.0]], [c * ulp - gain * 0.55, 0.0]))
    return nn.Sequential(nn.Flatten(), *net), torch.tensor([[0.55]]), 0.1


def test_verify_proves_no_false_margin_with_sound():
    net, x, eps = rounds_its_input_away()
    y, points = torch.zeros(1, dtype=torch.long), torch.linspace(0.4500001, 0.6499999, 101).view(-1, 1)
    lowest = worst_margin(net(points), y.expand(101)).min().item()
    claimed = bounds(net, *input_box(x, eps), "crown", margin_matrix(y, 2), program=read(net, x))[0].item()
    assert claimed > 7 and lowest == pytest.approx(-6.4, abs=0.1)
    with pytest.raises(Contradiction):  # the plain proof is false: the model itself says so at a corner
        verify(net, x, y, eps)
    sound = verify(net, x, y, eps, sound=True)
    assert sound.clean[0] and not sound.verified[0] and sound.margins[0] <= lowest


# ---------------------------------------------------------------- one rounding at a time


def test_terms_count_live_weights_and_the_bias():
    weight = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).double()
    box = Interval.ends(torch.tensor([[0.0, 0, 0, -1], [0, 0, 0, 0]]).double(), torch.tensor([[0.0, 0, 1, 1], [0, 2, 0, 0]]).double())
    assert terms(Linear(weight, None), box).tolist() == [[1, 0, 2], [0, 0, 1]]  # each sample by the inputs that live in its own box
    assert terms(Linear(weight, torch.zeros(3).double()), box).tolist() == [[2, 1, 3], [1, 1, 2]]


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_has_the_same_sound_bounds_alone_and_in_its_batch(method):
    """The neurons that are dead in one box are alive in others of the batch."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 3)), torch.rand(20, 4)
    together = bounds(net, x - 0.01, x + 0.01, method, sound=True)
    for i in range(20):
        alone = bounds(net, x[i : i + 1] - 0.01, x[i : i + 1] + 0.01, method, sound=True)
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[i], rtol=0, atol=1e-12)  # 0.01 of the roundings: 1e-6


@pytest.mark.parametrize(("alpha", "roundings"), [(1.0, 3), (0.5, 3), (0.1, 4)])
def test_a_number_of_float32_is_not_rounded_when_it_is_read(alpha, roundings):
    """x1 + alpha x2: a product, a sum, one for what is flushed to zero, and one for an alpha that float32 rounds."""
    class Sum(nn.Module):
        def forward(self, x):
            return torch.add(x[:, :2], x[:, 2:], alpha=alpha)

    x = torch.tensor([[0.5, 1.0, 0.25, 0.75]])
    lb, ub = bounds(Sum(), x, x, "ibp", sound=True)
    mass = (x[:, :2] + alpha * x[:, 2:]).double()
    torch.testing.assert_close((ub - lb) / 2 / mass, torch.full_like(mass, gamma(roundings)), rtol=0.1, atol=0)


def test_a_masked_network_has_the_error_of_its_live_weights():
    """1,000 inputs of which 10 have a weight: the bounds at a point are as wide as those of the compacted row, not of 1,000 terms."""
    torch.manual_seed(0)
    whole, small = nn.Linear(1000, 1), nn.Linear(10, 1)
    live = torch.arange(0, 1000, 100)
    x = torch.rand(1, 1000)
    with torch.no_grad():
        whole.weight.zero_()[:, live] = small.weight
        whole.bias.copy_(small.bias)
    widths = []
    for net, point in ((whole, x), (small, x[:, live])):
        lb, ub = bounds(net, point, point, sound=True)
        widths.append((ub - lb).item())
    assert widths[0] == pytest.approx(widths[1], rel=1e-6)
    mass = (small.weight.double().abs() @ x[0, live].double() + small.bias.abs()).item()
    assert 2 * gamma(11) * mass < widths[0] < 2 * gamma(13) * mass


def test_underflow_to_zero_is_inside_the_bounds():
    """On a processor that flushes subnormal numbers to zero the product 2^-70 * 2^-70 is 0 and 2^-140 is read as 0; made large again, it matters."""
    net = chain(([[2.0**-70]], [0.0]), ([[2.0**70]], [0.0]), ([[2.0**70]], [0.0]))
    x = torch.tensor([[2.0**-70]])
    lb, ub = bounds(net, x, x, sound=True)
    assert lb <= 0 and ub >= 1 and net(x).item() == 1
    tiny = chain(([[2.0**100]], [0.0]))
    x = torch.tensor([[2.0**-140]])
    lb, ub = bounds(tiny, x, x, sound=True)
    assert lb <= 0 and ub >= 2.0**-40


def test_where_a_sum_may_overflow_there_are_no_bounds():
    net = chain(([[2.0**127, 2.0**127, -(2.0**127)], [1.0, 1.0, 1.0]], [0.0, 0.0]))
    x = torch.tensor([[1.0, 1.0, 1.0], [2.0**-10] * 3])
    lb, ub = bounds(net, x, x, program=read(net, x), sound=True)
    assert lb[0].isneginf().all() and ub[0].isposinf().all()
    assert lb[1].isfinite().all() and (lb[1] <= net(x)[1]).all() and (net(x)[1] <= ub[1]).all()  # the other sample keeps its own


AVERAGES = {
    "mean": lambda x: x.mean((2, 3)), "avg_pool2d": lambda x: nn.functional.avg_pool2d(x, 10).flatten(1),
    "adaptive": lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
    "divisor": lambda x: nn.functional.avg_pool2d(x, 10, divisor_override=10**6).flatten(1) * 1e4,
}


@pytest.mark.parametrize("average", AVERAGES)
def test_where_the_sum_of_an_average_may_overflow_there_are_no_bounds(average):
    """A hundred numbers of 1e37 have a mean of 1e37, and a sum beyond float32."""
    net = Calls(lambda x: AVERAGES[average](x * 1e37) * 1e-37)
    x = torch.cat([torch.ones(1, 1, 10, 10), torch.full((1, 1, 10, 10), 1e-3)])
    assert not net(x)[0].isfinite().any() and net(x)[1].isfinite().all()
    lb, ub = bounds(net, x, x, sound=True, program=read(net, x))
    assert lb[0].isneginf().all() and ub[0].isposinf().all() and (lb[1] <= net(x)[1]).all() and (net(x)[1] <= ub[1]).all()


@pytest.mark.parametrize("scale, var, weight", [(1e37, 0.0, 1e-37), (1e38, 1e4, 10.0)])
def test_where_a_batch_norm_may_overflow_before_its_scale_there_are_no_bounds(scale, var, weight):
    """x - m times r, or times w, is beyond float32; the output is not."""
    norm = nn.BatchNorm1d(1).eval()
    norm.running_var.fill_(var), norm.weight.data.fill_(weight), norm.bias.data.fill_(1.0)
    net, x = nn.Sequential(chain(([[scale]], [0.0])), norm), torch.tensor([[0.9], [1e-4]])
    h, r = net[0](x), torch.rsqrt(norm.running_var + norm.eps)
    orders = [(h * r) * norm.weight + norm.bias, (h * norm.weight) * r + norm.bias, h * (norm.weight * r) + norm.bias]
    assert not all(order[0].isfinite().all() for order in orders) and all(order[1].isfinite().all() for order in orders)
    lb, ub = bounds(net, x, x, sound=True)
    assert lb[0].isneginf().all() and ub[0].isposinf().all()
    assert all(((lb[1] <= order[1]) & (order[1] <= ub[1])).all() for order in orders)


class Product(nn.Module):
    """A linear layer whose weights are a product of numbers."""

    def __init__(self, *factors):
        super().__init__()
        self.factors = nn.ParameterList([torch.tensor([[factor], [0.0]]) for factor in factors])

    def forward(self, x):
        weight = self.factors[0]
        for factor in [*self.factors][1:]:
            weight = weight * factor
        return nn.functional.linear(x, weight)


ROUNDED_UP = (1 - 2.0**-24, 2.0**-63, 2.0**-63, 2.0**126)  # the first three give 2^-126 by rounding, and 0 where they are flushed


@pytest.mark.parametrize("factors", [(2.0**-70, 2.0**-60, 2.0**126), (2.0**-130, 2.0**126), ROUNDED_UP])
def test_a_weight_that_grows_out_of_a_subnormal_number_is_refused(factors):
    net, x = Product(*factors), torch.tensor([[0.5]])
    value = net(x)
    if torch.set_flush_denormal(True):
        try:
            assert net(x)[0, 0] == 0 != value[0, 0]
        finally:
            torch.set_flush_denormal(False)
    with pytest.raises(ValueError, match="at most 2\\^-126"):
        bounds(net, x, x, sound=True)
    for harmless in ((2.0**-70, 2.0**-20, 2.0**80), (3.0, 0.0, 2.0), (2.0**-70, 2.0**-70)):
        lb, ub = bounds(Product(*harmless), x, x, sound=True)
        assert (lb <= Product(*harmless)(x)).all() and (Product(*harmless)(x) <= ub).all()


MASKED = {
    "bool": lambda w, mask: w * mask, "bool as a number": lambda w, mask: w * (mask * 1.0), "in place": lambda w, mask: w.clone().mul_(mask)}


@pytest.mark.parametrize("masked", MASKED)
def test_a_weight_times_a_bool_mask_is_bounded(masked):
    torch.manual_seed(0)
    layer, mask, x = nn.Linear(6, 3), torch.rand(3, 6) < 0.5, torch.rand(20, 6)
    net = Calls(lambda x, layer: nn.functional.linear(x, MASKED[masked](layer.weight, mask), layer.bias), layer)
    lb, ub = bounds(net, x, x, sound=True)
    assert (lb <= net(x)).all() and (net(x) <= ub).all() and (ub - lb < 1e-4).all()


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_lines_of_a_relu_lie_around_it(slope):
    generator = torch.Generator().manual_seed(0)
    lb = -(10 ** (16 * torch.rand(2000, generator=generator).double() - 8)).view(-1, 1)
    ub = (10 ** (16 * torch.rand(2000, generator=generator).double() - 8)).view(-1, 1)
    x = Interval.ends(lb, ub)
    below, above, height = RoundedReLU(slope).lines(x)
    for t in (lb, ub, lb / 3, ub / 3, torch.zeros_like(lb)):  # piecewise linear: ends and kink are enough; in exact numbers
        for low, high, at, value in zip(below[:, 0].tolist(), above[:, 0].tolist(), t[:, 0].tolist(), height[:, 0].tolist(), strict=True):
            f = Fraction(at) * (1 if at > 0 else Fraction(slope))
            assert Fraction(low) * Fraction(at) <= f <= Fraction(high) * Fraction(at) + Fraction(value)


@pytest.mark.parametrize("slope", [1e-46, 1e-45, 1e-40])
@pytest.mark.parametrize("method", METHODS)
def test_a_slope_that_float32_has_not_or_flushes_is_bounded(slope, method):
    """1e-46 is 0 in float32, 1e-45 is 1.4e-45, and 1e-40 is 0 on a machine without subnormal numbers."""
    net = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(slope), nn.Linear(2, 2))
    with torch.no_grad():
        for layer, scale in ((net[0], -1e20), (net[2], 1e25)):
            layer.weight.copy_(scale * torch.eye(2))
            layer.bias.zero_()
    lower, upper = torch.full((1, 2), 0.4), torch.full((1, 2), 0.6)
    lb, ub = bounds(net, lower, upper, method, sound=True)
    for share in torch.linspace(0, 1, 11):
        x = lower + share * (upper - lower)
        for y in (net(x), torch.zeros(1, 2), net.double()(x.double())):
            assert (lb <= y).all() and (y <= ub).all()
        net.float()


def test_a_division_by_a_subnormal_number_is_refused():
    net, x = Calls(lambda x: x / 1e-40), torch.full((1, 2), 1e-4)
    with pytest.raises(ValueError, match="divides by a number so small"):
        bounds(net, x, x, sound=True)


def test_batch_norm_is_bounded_in_both_forms():
    """A BatchNorm whose mean is far from zero cancels: its two forms differ by more than the plain bounds are wide."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    net[0].running_mean.fill_(1000.0)
    net[0].running_var.fill_(1e-4)
    x = 1000 + torch.rand(20, 3, 2, 2)
    program = read(net, x)
    outputs = [computed(program, net, x, pairwise, place) for place in (False, True)]
    assert (outputs[0] != outputs[1]).any()
    lb, ub = bounds(net, x, x, program=program, sound=True)
    for y in (*outputs, net(x).detach()):
        assert (lb <= y).all() and (y <= ub).all()
    exact = (x.double() - 1000) / (torch.tensor(1e-4).double() + 1e-5).sqrt()
    assert (lb <= exact).all() and (exact <= ub).all() and (ub - lb < 10).all()


@pytest.mark.parametrize("var, eps", [(0.0, 1e39), (3e38, 1e38), (-9e-6, 1e-5), (1e-40, 0.0), (0.0, 1e-40), (0.0, 2.0**-110)])
def test_a_batch_norm_whose_variance_no_float32_holds_is_refused(var, eps):
    norm = nn.BatchNorm1d(2, eps=eps).eval()
    norm.running_var.fill_(var)
    with pytest.raises(ValueError, match="its variance"):
        bounds(norm, torch.zeros(1, 2), torch.ones(1, 2), sound=True)
    if not 0 < var + eps < 1e38:
        with pytest.raises(ValueError, match="its variance"):
            bounds(norm, torch.zeros(1, 2), torch.ones(1, 2))


def test_normalisation_of_the_input_counts():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.1307, 0.5]))
            self.register_buffer("std", torch.tensor([0.3081, 0.001]))

        def forward(self, x):
            return (x - self.mean) / self.std

    net, x = Normalised(), torch.rand(100, 2)
    lb, ub = bounds(net, x, x, sound=True)
    reciprocal = (x - net.mean) * (1 / net.std)
    for y in (net(x), reciprocal, (x.double() - net.mean.double()) / net.std.double()):
        assert (lb <= y).all() and (y <= ub).all()
    assert (net(x) != reciprocal).any() and (ub - lb < 1e-3).all()


class Calls(nn.Module):
    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


@pytest.mark.parametrize("function", [
    lambda x: x.mean((2, 3)), lambda x: x.sum(3).flatten(1), lambda x: nn.functional.adaptive_avg_pool2d(x, 2).flatten(1),
    lambda x: nn.functional.avg_pool2d(x, 2).flatten(1), lambda x: nn.functional.max_pool2d(x, 2).flatten(1), lambda x: (2 - x / 3).flatten(1),
    lambda x: torch.cat([x, -x * 0.1], 1).flatten(1), lambda x: (x + x.flip(2) - 0.3).relu().flatten(1),
    lambda x: nn.functional.pad(x, (1, 1), value=0.1).flatten(1), lambda x: nn.functional.leaky_relu(x - 0.5, 0.3).flatten(1),
    lambda x: nn.functional.prelu(x - 0.5, torch.tensor([0.25, 0.75], dtype=x.dtype)).flatten(1),
    lambda x: torch.bmm(x.flatten(1, 2), torch.full((len(x), 4, 3), 0.125, dtype=x.dtype)).flatten(1),
])
@pytest.mark.parametrize("method", METHODS)
def test_operations_with_a_model(function, method):
    torch.manual_seed(0)
    net, lower = Calls(function), torch.rand(3, 2, 4, 4)
    upper = lower + 0.2 * torch.rand(3, 2, 4, 4)
    lb, ub = bounds(net, lower, upper, method, sound=True)
    for share in (0.0, 1.0, *(torch.rand(3, 2, 4, 4) for _ in range(30))):
        point = torch.minimum(lower + share * (upper - lower), upper)
        for y in (net(point), net(point.double())):
            assert (lb <= y).all() and (y <= ub).all()


@pytest.mark.parametrize("net, sentence", [
    (nn.Sequential(nn.Flatten(), nn.Linear(32, 3), nn.Sigmoid()), "its rounding has no model"),
    (Calls(lambda x: (x * x.flip(2)).flatten(1)), "its rounding has no model"),
    (nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(32, 3))), "computes a weight by"),
    (nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double(), "float32"),
    (nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()), "train mode"),
    (Calls(lambda x: torch.addmm(torch.ones(3), x.flatten(1), torch.full((32, 3), 1e38), alpha=1e-38)), "alpha or beta"),
])
def test_what_has_no_model_is_refused_with_a_sentence(net, sentence):
    x = torch.rand(2, 2, 4, 4, dtype=next((p.dtype for p in net.parameters()), torch.float32))
    with pytest.raises(ValueError, match=sentence):
        bounds(net, x, x, sound=True)


def test_other_arithmetic_and_other_engines_are_refused():
    net, x, y = nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 4), torch.zeros(2, dtype=torch.long)
    for call in (lambda: bounds(net, x, x, sound=True), lambda: verify(net, x, y, 0.1, sound=True)):
        torch.set_float32_matmul_precision("medium")
        try:
            with pytest.raises(ValueError, match="bfloat16"):
                call()
        finally:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
            call()
        onednn = getattr(torch.backends.mkldnn, "conv", None)
        if hasattr(onednn, "fp32_precision"):
            before, onednn.fp32_precision = onednn.fp32_precision, "bf16"
            try:
                with pytest.raises(ValueError, match="bfloat16"):
                    call()
            finally:
                onednn.fp32_precision = before
    with pytest.raises(ValueError, match="native engine"):
        bounds(net, x, x, engine="auto_lirpa", sound=True)


def test_convolutions_that_are_transformed_are_refused(monkeypatch):
    convolution, linear, x = nn.Sequential(nn.Conv2d(2, 1, 3), nn.Flatten()), nn.Sequential(nn.Flatten(), nn.Linear(32, 2)), torch.rand(2, 2, 4, 4)
    monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: True)
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.backends.nnpack.flags(True):
            bounds(linear, x, x, sound=True)
            labels = torch.zeros(2, dtype=torch.long)
            for call in (lambda: bounds(convolution, x, x, sound=True), lambda: verify(convolution, x, labels, 0.1, sound=True)):
                with pytest.raises(ValueError, match=r"Winograd.*nnpack.set_flags\(False\)"):
                    call()
        with torch.backends.nnpack.flags(False):
            bounds(convolution, x, x, sound=True)
    bounds(convolution, x, x, sound=True)


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_shorter_products_by_an_environment_variable_are_refused(name, monkeypatch):
    net, x = nn.Linear(4, 2), torch.rand(1, 4)
    for harmless in ("", "strict"):
        monkeypatch.setenv(name, harmless)
        bounds(net, x, x, sound=True)
    monkeypatch.setenv(name, "BF16")
    for ask in (lambda: bounds(net, x, x, sound=True), lambda: verify(net, x, torch.tensor([0]), 0.1, sound=True)):
        with pytest.raises(ValueError, match=f"{name} is BF16"):
            ask()


def test_masks_that_are_multiplied_in_have_a_model():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("mask", torch.tensor([[1.0, 0, 0, 1]] * 3))

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight * self.mask, self.layer.bias)

    net, x = Masked(), torch.rand(2, 4)
    lb, ub = bounds(net, x, x, sound=True)
    net.layer.weight.data *= net.mask
    baked = bounds(net.layer, x, x, sound=True)
    assert torch.equal(lb, baked[0]) and torch.equal(ub, baked[1])


@pytest.mark.parametrize("eps", [0.1, 8 / 255, 1e-9, 0.0])
def test_the_box_of_a_proof_contains_both_boxes(eps):
    x = torch.cat([torch.rand(10_000), torch.tensor([0.0, 1.0])])
    lower, upper = outer_box(x, eps)
    for pixel, low, high in zip(x[-500:].tolist(), lower[-500:].tolist(), upper[-500:].tolist(), strict=True):
        assert Fraction(low) <= max(Fraction(pixel) - Fraction(eps), 0) and Fraction(high) >= min(Fraction(pixel) + Fraction(eps), 1)
    inner = input_box(x, eps)
    assert (lower <= inner[0]).all() and (inner[1] <= upper).all() and (lower >= 0).all() and (upper <= 1).all()
    assert (upper - lower <= 2 * eps + 1e-7).all()


def test_verify_with_sound_agrees_where_margins_are_not_rounding():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3))
    x = torch.rand(200, 4)
    y = net(x).argmax(1)
    plain, sound = (verify(net, x, y, 0.03, sound=mode) for mode in (False, True))
    assert 20 < int(plain.verified.sum()) < 200 and sound.margins.dtype == torch.float64
    clear = plain.margins.abs() > 1e-4
    assert torch.equal(plain.verified[clear], sound.verified[clear]) and not (sound.verified & ~plain.verified).any()


def test_a_contradiction_is_found_to_the_last_bit():
    """With sound=True the network's own outputs must lie between the bounds: the replay leaves no room for rounding."""
    y = torch.tensor([[1.0, 2.0]])
    lb, ub = y.double() - 1e-7, y.double() + 1e-7
    check_bounds(y, lb, ub, exactly=True)
    with pytest.raises(Contradiction):
        check_bounds(y + 2e-7, lb, ub, exactly=True)
    check_bounds(y + 2e-7, lb, ub)
