"""Every linear and window layer against brute force: the matrix of the torch function, column by column, and points of random boxes."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselab.robust.bounds import METHODS, bounds
from sparselab.robust.boxes import Interval
from sparselab.robust.layers import Add, Concat, Linear, MatMul, Move, Reshape, Scale
from sparselab.robust.windows import AvgPool, Conv, MaxPool

B, S = 3, 4
PRECISIONS = [torch.float32, torch.float64]
SLACK = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05, torch.float16: 0.01}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes(*shapes, dtype=torch.float64, kind="ball") -> list[Interval]:
    """Random boxes, of which some entries are points; known by centre and radius or by their ends."""
    rng, found = seeded(len(shapes)), []
    for shape in shapes:
        mid, rad = torch.randn(B, *shape, generator=rng).to(dtype), torch.rand(B, *shape, generator=rng).to(dtype)
        rad = rad * (torch.rand(rad.shape, generator=rng) < 0.8)
        found.append(Interval.ball(mid, rad) if kind == "ball" else Interval.ends(mid - rad, mid + rad))
    return found


def jacobians(function, xs: list[Interval]) -> list[torch.Tensor]:
    """For each input (B, out, in): what the output of each sample changes by when one entry of the input grows by one."""
    zeros = [torch.zeros(x.shape, dtype=x.dtype) for x in xs]
    base, found = function(*zeros), []
    for i, zero in enumerate(zeros):
        columns = []
        for entry in range(zero[0].numel()):
            unit = torch.zeros_like(zero).flatten(1)
            unit[:, entry] = 1
            columns.append((function(*zeros[:i], unit.view(zero.shape), *zeros[i + 1 :]) - base).flatten(1))
        found.append(torch.stack(columns, 2))
    return found


def check_affine(layer, function, *shapes, kinds=("ball", "ends"), dtypes=PRECISIONS):
    """`layer` is `function`: its box is the image of the box, and its backward the transpose of the matrix."""
    for dtype, kind in itertools.product(dtypes, kinds):
        if dtype == torch.float32 and torch.float64 in dtypes and kind == "ends":
            continue
        xs = boxes(*shapes, dtype=dtype, kind=kind)
        close = dict(rtol=SLACK[dtype], atol=SLACK[dtype] * 10)
        y, at_centre, L = layer.interval(*xs), function(*(x.mid for x in xs)), jacobians(function, xs)
        radius = sum(torch.einsum("boi,bi->bo", m.abs(), x.rad.flatten(1).to(m)) for m, x in zip(L, xs, strict=True)).view(at_centre.shape)
        assert y.lb.shape == y.ub.shape == y.mid.shape == y.rad.shape == at_centre.shape and y.mid.dtype == at_centre.dtype
        torch.testing.assert_close(y.mid, at_centre, **close)
        torch.testing.assert_close(y.rad, radius, **close)
        torch.testing.assert_close(y.lb, at_centre - radius, **close)
        torch.testing.assert_close(y.ub, at_centre + radius, **close)
        for rows in (B, 1):  # rows of each sample, and rows that all samples share
            A = torch.randn(rows, S, *at_centre.shape[1:], generator=seeded(7)).to(y.mid)
            parts, constant = layer.backward(A, *xs, y)
            assert constant == 0 and len(parts) == len(xs)
            for part, m, x in zip(parts, L, xs, strict=True):
                assert part.shape[0] in (1, B) and part.shape[1:] == (S, *x.shape[1:]) and part.dtype == x.dtype
                expected = torch.einsum("bso,boi->bsi", A.flatten(2).expand(B, S, -1), m).to(x.dtype)
                torch.testing.assert_close(part.flatten(2).expand(B, S, -1), expected, **close)


def check_gradients(layer, function, *shapes, leaves=()):
    """Box and coefficients are differentiable twice in the boxes, the rows and the weights."""
    xs = boxes(*shapes)
    A = torch.randn(B, 2, *function(*(x.mid for x in xs)).shape[1:], generator=seeded(3), dtype=torch.float64)
    ends = [end.detach() + (0.1 if i else 0.0) for x in xs for i, end in enumerate((x.mid, x.rad))]  # radii off the kink

    def run(A, *ends):
        xs = [Interval.ball(*ends[i : i + 2]) for i in range(0, len(ends), 2)]
        y = layer.interval(*xs)
        parts, _ = layer.backward(A, *xs, y)
        return y.mid, y.rad, *(part**2 for part in parts)

    inputs = [t.clone().requires_grad_() for t in (A, *ends)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    for leaf in leaves:  # the layer holds the leaf itself
        outputs = run(*inputs)
        total = sum((out * torch.randn(out.shape, generator=seeded(5), dtype=out.dtype)).sum() for out in outputs)
        (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
        step = torch.randn(leaf.shape, generator=seeded(6), dtype=leaf.dtype) * 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                leaf.add_(sign * step)
                values.append(sum((out * torch.randn(out.shape, generator=seeded(5), dtype=out.dtype)).sum() for out in run(*inputs)))
                leaf.sub_(sign * step)
        torch.testing.assert_close((grad * step).sum(), (values[0] - values[1]) / 2, rtol=1e-4, atol=1e-10)


def weight_of(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(11), dtype=dtype)


# --- layers ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_linear_acts_on_the_last_dimension(shape, dtype):
    weight, bias = weight_of(6, 5, dtype=dtype), weight_of(6, dtype=dtype)
    check_affine(Linear(weight, bias), lambda x: F.linear(x, weight, bias), shape, dtypes=[dtype])


CONSTANTS = [  # shape of the activation's sample, of the constant
    ((8,), (8,)), ((8,), ()), ((4, 8), (8,)), ((4, 8), (4, 1)), ((4, 8), (1, 4, 1)), ((4, 8), (B, 4, 8)), ((4, 8), (B, 1, 1)),
    ((1, 8), (4, 1)), ((1, 8), (B, 4, 1)), ((4, 1), (1, 8)), ((1, 1), (4, 8)), ((1,), (5,)), ((2, 1, 3), (4, 1)), ((1, 3, 1), (B, 2, 1, 4)),
]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape,constant", CONSTANTS)
def test_constants_scale_shift_and_enlarge(shape, constant, dtype):
    c, d = weight_of(*constant, dtype=dtype), -2 * weight_of(*constant, dtype=dtype)
    for scale, shift in [(c, None), (None, c), (c, d), (-1.5, c), (c, 2.0)]:
        def function(x, scale=scale, shift=shift):
            y = x if scale is None else x * scale
            return y if shift is None else y + shift

        check_affine(Scale(scale, shift), function, shape, dtypes=[dtype])


def test_constants_of_other_types():
    keep = torch.tensor([True, False, True])
    check_affine(Scale(keep, None), lambda x: x * keep, (2, 3))
    whole = torch.tensor([[-2], [3]])
    check_affine(Scale(whole, whole), lambda x: x * whole + whole, (1, 3))
    wide = weight_of(3)  # float64, which widens a float32 activation
    check_affine(Scale(wide, None), lambda x: x * wide, (2, 3))


@pytest.mark.parametrize("layer,shapes", [
    (Scale(None, torch.zeros(2, 1, 4, 8)), [(4, 8)]), (Scale(torch.ones(1, 1, 8), None), [(8,)]),
    (Add(), [(B,), (4, B)]), (Add(), [(4, B), (B,)]), (MatMul(weight_of(4, B), left=True), [(5,)]), (MatMul(weight_of(2, 5, 4)), [(5,)]),
    (MatMul(weight_of(5)), [(5,)]), (Move(lambda x: x.sum(0)), [(8,)]), (Move(lambda x: x.flatten()), [(8,)]),
    (Move(lambda x: x.transpose(0, 1)), [(8,)]),
    (Conv(torch.ones(2, B, 3, 3)), [(8, 8)]), (MaxPool((2, 2), 1, 1, 2), [(2, 1, 1)]),
])
def test_what_would_mix_or_lose_samples_is_refused_with_a_sentence(layer, shapes):
    with pytest.raises(ValueError, match=r"\(.*\)"):
        layer.interval(*boxes(*shapes))


@pytest.mark.parametrize("alpha", [1, -1, 2, -0.5, 0])
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 1), (1, 4)), ((1, 4), (3, 4)), ((2, 3, 1), (2, 1, 5)), ((1,), (6,))])
def test_branches_are_added(shapes, alpha):
    check_affine(Add(alpha), lambda x, z: torch.add(x, z, alpha=alpha), *shapes)


@pytest.mark.parametrize("dim", [1, 2])
def test_branches_are_joined_and_reshaped(dim):
    shapes = [(2, 3), (2, 3), (2, 3)] if dim == 2 else [(1, 3), (4, 3), (2, 3)]
    check_affine(Concat(dim), lambda *xs: torch.cat(xs, dim), *shapes)
    check_affine(Reshape((B, 2, 6), (B, 3, 2, 2)), lambda x: x.reshape(B, 3, 2, 2), (2, 6))


PRODUCTS = [  # sample, weight, left
    ((5,), (5, 4), False), ((3, 5), (5, 4), False), ((3, 5), (B, 5, 4), False), ((3, 5), (1, 5, 4), False), ((2, 3, 5), (2, 5, 4), False),
    ((1, 3, 5), (2, 5, 4), False), ((2, 3, 5), (B, 1, 5, 4), False), ((3, 5), (4, 3), True), ((3, 5), (B, 4, 3), True),
    ((2, 3, 5), (2, 4, 3), True), ((1, 3, 5), (2, 4, 3), True), ((2, 3, 5), (B, 2, 4, 3), True),
]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape,weight,left", PRODUCTS)
def test_products_with_a_constant_matrix(shape, weight, left, dtype):
    w = weight_of(*weight, dtype=dtype)
    check_affine(MatMul(w, left), lambda x: w @ x if left else x @ w, shape, dtypes=[dtype])


INDEX, MASK = torch.tensor([3, 0, 0, 2]), torch.ones(4, 4).tril() > 0
MOVES = {
    "permute": (lambda x: x.permute(0, 3, 1, 2), (2, 3, 4)),
    "transpose": (lambda x: x.transpose(1, 2), (2, 3)),
    "unsqueeze": (lambda x: x.unsqueeze(1), (3,)),
    "squeeze": (lambda x: x.squeeze(2), (2, 1, 3)),
    "view of a fixed batch": (lambda x: x.view(B, 3, 2), (6,)),
    "slice": (lambda x: x[:, 1:, ::2], (3, 5)),
    "select": (lambda x: x[:, -1], (3, 4)),
    "split": (lambda x: x.split([1, 3], 1)[1], (4, 2)),
    "chunk": (lambda x: x.chunk(2, 2)[0], (2, 5)),
    "unbind": (lambda x: x.unbind(1)[1], (3, 2)),
    "flip": (lambda x: x.flip(1, 2), (3, 2)),
    "roll": (lambda x: x.roll((1, -1), (1, 2)), (3, 4)),
    "index_select": (lambda x: x.index_select(1, INDEX), (4, 2)),
    "fancy index": (lambda x: x[:, INDEX, [0, 1, 1, 0]], (4, 2)),
    "gather": (lambda x: x.gather(1, INDEX.expand(B, 4)), (5,)),
    "diagonal": (lambda x: x.diagonal(0, 1, 2), (4, 3)),
    "tril": (lambda x: x.tril(), (4, 4)),
    "where": (lambda x: torch.where(MASK, x, torch.full((), -3.0, dtype=x.dtype)), (4, 4)),
    "masked_fill": (lambda x: x.masked_fill(MASK, 2.0), (4, 4)),
    "repeat": (lambda x: x.repeat(1, 2, 3), (2, 3)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), (2, 3)),
    "expand": (lambda x: x.expand(B, 4, 3), (1, 3)),
    "constant padding": (lambda x: F.pad(x, (1, 2, 0, 1), value=-7.0), (2, 3)),
    "huge constant": (lambda x: F.pad(x, (1, 2), value=1e9), (3,)),
    "cropping": (lambda x: F.pad(x, (-1, 0, 1, -1), value=2.0), (3, 3)),
    "reflection": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), (2, 3, 4)),
    "replication": (lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), (2, 3, 2)),
    "circular padding": (lambda x: F.pad(x, (1, 2), mode="circular"), (2, 4)),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), (2, 3, 4)),
    "sum": (lambda x: x.sum(-1), (2, 3)),
    "cumsum": (lambda x: x.cumsum(1), (4, 2)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (2, 3, 2)),
    "nearest, odd": (lambda x: F.interpolate(x, size=(5, 3)), (2, 3, 4)),
    "nearest-exact": (lambda x: F.interpolate(x, size=(5,), mode="nearest-exact"), (2, 3)),
    "linear": (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), (2, 3)),
    "bilinear": (lambda x: F.interpolate(x, size=(4, 5), mode="bilinear"), (1, 3, 2)),
    "bilinear, corners": (lambda x: F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=True), (1, 2, 2)),
    "trilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), (1, 2, 2, 2)),
    "area": (lambda x: F.interpolate(x, size=(3, 2), mode="area"), (1, 4, 5)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (4, 2, 3)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (1, 4, 2)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (4, 2)),
    "unfold": (lambda x: F.unfold(x, 2), (2, 3, 3)),
    "fold": (lambda x: F.fold(x, (3, 3), 2), (4, 4)),
    "windows": (lambda x: x.unfold(1, 3, 2), (7,)),
    "adaptive average, 1": (lambda x: F.adaptive_avg_pool1d(x, 3), (2, 7)),
    "adaptive average, 2": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 5, 3)),
    "adaptive average, 3": (lambda x: F.adaptive_avg_pool3d(x, (2, 1, 2)), (1, 3, 2, 3)),
    "global average": (lambda x: F.adaptive_avg_pool2d(x, 1), (2, 3, 3)),
    "identity": (lambda x: x, (3,)),
    "wider type": (lambda x: x.to(torch.float64), (3,)),
    "stack": (lambda x, z: torch.stack([x, z, x], 1), (3,), (3,)),
    "slice_scatter": (lambda x, z: torch.slice_scatter(x, z, 1, 1, 3), (4, 2), (2, 2)),
    "select_scatter": (lambda x, z: torch.select_scatter(x, z, 2, 1), (4, 2), (4,)),
    "copy": (lambda z: z.expand(B, 4, 2), (1, 2)),
    "constant joined": (lambda x: torch.cat([x, torch.ones(B, 2, dtype=x.dtype)], 1), (3,)),
    "constants of samples": (lambda x: torch.slice_scatter(torch.arange(4.0 * B, dtype=x.dtype).view(B, 4), x, 1, 0, 2), (2,)),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    function, *shapes = MOVES[name]
    check_affine(Move(function), function, *shapes, dtypes=[torch.float64] if name == "huge constant" else PRECISIONS)
    if name == "huge constant":  # the radius survives it
        (x,) = boxes(*shapes, dtype=torch.float32)
        assert Move(function).interval(x).rad[:, 1:-2].equal(x.rad)


def test_a_move_that_needs_no_arithmetic_is_exact():
    for kind, name in itertools.product(("ball", "ends"), ("permute", "slice", "flip", "reflection", "nearest", "constant padding")):
        function, shape = MOVES[name]
        (x,) = boxes(shape, dtype=torch.float32, kind=kind)
        y = Move(function).interval(x)
        assert y.lb.equal(function(x.lb)) and y.ub.equal(function(x.ub)), name


@pytest.mark.parametrize("function", [torch.detach, lambda x: x.detach().clone(), lambda x: torch.ones_like(x), lambda x: torch.ops.aten.copy(x, x)])
def test_a_function_that_autograd_does_not_see_is_refused(function):
    """A coefficient of zero in its place would be a false bound."""
    (x,) = boxes((3,))
    with pytest.raises(RuntimeError):
        Move(function).backward(torch.ones(B, S, 3, dtype=torch.float64), x, x)


def test_moves_without_gradients():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check_affine(Move(MOVES["bilinear"][0]), *MOVES["bilinear"])
            check_affine(Move(MOVES["stack"][0]), *MOVES["stack"])


@pytest.mark.parametrize("name", [
    "permute", "mean", "bilinear", "reflection", "slice_scatter", "adaptive average, 2", "fancy index", "constant padding",
])
def test_moves_are_differentiable_twice(name):
    function, *shapes = MOVES[name]
    check_gradients(Move(function), function, *shapes)


def test_other_layers_are_differentiable_twice():
    w = weight_of(4, 1).requires_grad_()
    check_gradients(Scale(w, w), lambda x: x * w + w, (1, 3), leaves=[w])
    check_gradients(MatMul(w, left=False), lambda x: x @ w, (3, 4), leaves=[w])
    check_gradients(MatMul(w.mT, left=True), lambda x: w.mT @ x, (4, 3), leaves=[w])
    check_gradients(Add(-0.5), lambda x, z: x - 0.5 * z, (3, 1), (1, 4))
    check_gradients(Concat(1), lambda x, z: torch.cat([x, z], 1), (3,), (2,))


# --- windows --------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = [  # dims, kernel, stride, padding, dilation, groups
    (1, 3, 1, 0, 1, 1), (1, 3, 2, 1, 2, 2), (1, 4, 3, 2, 1, 2), (1, 2, 3, 0, 1, 1),
    (2, (3, 2), 1, 0, 1, 1), (2, (3, 2), (2, 1), (1, 2), (1, 2), 2), (2, 4, 3, (0, 1), 1, 1),
    (2, 1, 2, 0, 1, 2), (2, (2, 3), 1, (0, 2), 2, 2),
    (3, (1, 2, 2), 1, (0, 1, 0), 1, 1), (3, 2, (2, 1, 3), 1, (1, 2, 1), 2), (3, 2, 1, 0, 1, 2),
]
SIZES = {1: (9,), 2: (7, 6), 3: (3, 4, 4)}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("dims,kernel,stride,padding,dilation,groups", CONVOLUTIONS)
def test_convolutions(dims, kernel, stride, padding, dilation, groups, dtype):
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 4, kernel, stride, padding, dilation, groups).to(dtype).requires_grad_(False)
    layer = Conv(module.weight, module.bias, stride, padding, dilation, groups=groups)
    check_affine(layer, module, (2, *SIZES[dims]), dtypes=[dtype])
    scale, shift = weight_of(4, dtype=dtype), weight_of(4, dtype=dtype)
    spread = (-1, *(1,) * dims)
    scaled = lambda x: module(x) * scale.view(spread) + shift.view(spread)  # noqa: E731
    check_affine(layer.scaled(scale, shift), scaled, (2, *SIZES[dims]), dtypes=[dtype], kinds=["ball"])


SIGNALS = {
    "average": nn.AvgPool1d(3, 2, 1), "maximum": nn.MaxPool1d(3, 2, 1), "same": nn.Conv1d(2, 2, 4, padding="same"),
    "strided average": nn.AvgPool1d(2, 3, ceil_mode=True),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SIGNALS)
def test_layers_that_torch_takes_apart_are_bounded(name, method):
    """Pooling of a signal is that of an image with one row; an even kernel with padding="same" pads on one side first."""
    net, x = nn.Sequential(SIGNALS[name], nn.Flatten()).double(), torch.rand(3, 2, 7, generator=seeded(3), dtype=torch.float64)
    lb, ub = bounds(net, x - 0.1, x + 0.1, method)
    for _ in range(50):
        y = net(x + 0.2 * torch.rand_like(x).round() - 0.1)
        assert bool((lb <= y + 1e-9).all() and (y <= ub + 1e-9).all())
    torch.testing.assert_close(bounds(net, x, x, method), (net(x), net(x)))


def test_lists_of_one():
    weight = weight_of(4, 2, 3, 3)
    check_affine(Conv(weight, None, [2], [1], [1], False, [0], 1), lambda x: F.conv2d(x, weight, None, 2, 1), (2, 6, 5), dtypes=[torch.float64])


TRANSPOSED = [  # dims, kernel, stride, padding, output_padding, dilation, groups
    (1, 3, 1, 0, 0, 1, 1), (1, 3, 3, 1, 2, 1, 2), (1, 2, 2, 2, 2, 3, 2), (1, 1, 3, 0, 1, 1, 1),
    (2, (3, 2), 2, 1, 1, 1, 1), (2, 2, (1, 3), 0, (1, 2), (2, 1), 2), (2, 3, 2, (0, 1), (1, 0), 2, 2),
    (3, 2, 2, 0, 1, 1, 2), (3, (1, 2, 2), (1, 2, 1), (0, 1, 0), 0, 1, 1),
]
SMALL = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("dims,kernel,stride,padding,output_padding,dilation,groups", TRANSPOSED)
def test_transposed_convolutions(dims, kernel, stride, padding, output_padding, dilation, groups, dtype):
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    module = kind(4, 6, kernel, stride, padding, output_padding, groups, True, dilation).to(dtype).requires_grad_(False)
    layer = Conv(module.weight, module.bias, stride, padding, dilation, True, output_padding, groups)
    check_affine(layer, module, (4, *SMALL[dims]), dtypes=[dtype])
    scale, shift = weight_of(6, dtype=dtype), weight_of(6, dtype=dtype)
    spread = (-1, *(1,) * dims)
    scaled = lambda x: module(x) * scale.view(spread) + shift.view(spread)  # noqa: E731
    check_affine(layer.scaled(scale, shift), scaled, (4, *SMALL[dims]), dtypes=[dtype], kinds=["ball"])


def test_convolutions_are_differentiable_twice():
    weight, bias = weight_of(4, 1, 3, 2).requires_grad_(), weight_of(4).requires_grad_()
    layer = Conv(weight, bias, 2, 1, 1, groups=2)
    check_gradients(layer, lambda x: F.conv2d(x, weight, bias, 2, 1, 1, 2), (2, 4, 3), leaves=[weight, bias])
    weight, bias = weight_of(4, 1, 3).requires_grad_(), weight_of(2).requires_grad_()
    layer = Conv(weight, bias, 2, 1, 1, True, 1, 2)
    check_gradients(layer, lambda x: F.conv_transpose1d(x, weight, bias, 2, 1, 1, 2), (4, 3), leaves=[weight, bias])


AVERAGES = list(itertools.product([2, 3], [None, 1, 2], [0, 1], [False, True], [False, True]))


@pytest.mark.parametrize("kernel,stride,padding,ceil_mode,count_include_pad", AVERAGES)
def test_average_pooling(kernel, stride, padding, ceil_mode, count_include_pad):
    options = (stride, padding, ceil_mode, count_include_pad)
    given = (() if stride is None else stride, *options[1:])
    for divisor in (None, 5, -3):
        check_affine(AvgPool((kernel, 2), *given, divisor), lambda x, d=divisor: F.avg_pool2d(x, (kernel, 2), *options, d), (2, 6, 5))
    deep = (kernel, 2, 2)
    check_affine(AvgPool(deep, *given, -2), lambda x: F.avg_pool3d(x, deep, *options, -2), (1, 4, 3, 3), dtypes=[torch.float64])


def test_average_pooling_is_differentiable_twice():
    check_gradients(AvgPool((3, 2), 2, 1, True, False), lambda x: F.avg_pool2d(x, (3, 2), 2, 1, True, False), (2, 4, 3))
    check_gradients(AvgPool((2, 2), (), 0, False, True, -3), lambda x: F.avg_pool2d(x, 2, divisor_override=-3), (2, 4, 4))


def torch_maximum(pool: MaxPool):
    function = (F.max_pool2d, F.max_pool3d)[len(pool.kernel) - 2]
    return lambda x: function(x, pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)


def windows(shape, pool: MaxPool) -> dict[tuple, list[tuple]]:
    """By hand: output place -> the input places of its window, in the order of torch."""
    dims, found = len(pool.kernel), {}
    for o in itertools.product(*map(range, torch_maximum(pool)(torch.zeros(1, 1, *shape)).shape[2:])):
        entries = itertools.product(*map(range, pool.kernel))
        places = (tuple(o[i] * pool.stride[i] - pool.padding[i] + pool.dilation[i] * k[i] for i in range(dims)) for k in entries)
        found[o] = [place for place in places if all(0 <= p < n for p, n in zip(place, shape, strict=True))]
    return found


MAXIMA = [  # input, kernel, stride, padding, dilation, ceil_mode
    ((1, 9), (1, 3), (), 0, 1, False), ((1, 9), (1, 3), 2, (0, 1), 2, False), ((1, 8), (1, 2), 3, (0, 1), 1, True),
    ((1, 10), (1, 4), 3, (0, 2), 1, True),
    ((6, 5), (2, 2), (), 0, 1, False), ((6, 5), (3, 3), 2, 1, 1, False), ((6, 5), (3, 2), (2, 1), 1, (1, 2), False),
    ((7, 6), (2, 3), 3, (1, 1), (2, 2), True), ((5, 5), (2, 2), 2, 0, 1, True), ((4, 4), (3, 3), 1, 1, 1, False), ((5, 6), (2, 2), 4, 1, 3, True),
    ((3, 4, 3), (2, 2, 2), 1, 0, 1, False), ((4, 4, 3), (2, 3, 2), 2, (1, 1, 0), 1, True), ((5, 3, 4), (2, 2, 2), (2, 1, 1), 1, (2, 1, 2), False),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape,kernel,stride,padding,dilation,ceil_mode", MAXIMA)
def test_max_pooling(shape, kernel, stride, padding, dilation, ceil_mode, ties):
    pool, rng = MaxPool(kernel, stride, padding, dilation, ceil_mode), seeded(0)
    function, by_hand = torch_maximum(pool), windows(shape, pool)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        centre = torch.randn(B, 2, *shape, generator=rng) if not ties else torch.randint(-2, 3, (B, 2, *shape), generator=rng).float()
        reach = torch.rand(centre.shape, generator=rng) if not ties else torch.randint(0, 3, centre.shape, generator=rng).float()
        x = Interval.ends((centre - reach / 2).to(dtype), (centre + reach / 2).to(dtype))
        y, (best, exact, above) = pool.interval(x), pool.planes(x)
        assert y.shape[2:] == tuple(n + 1 for n in max(by_hand)), "as many outputs as by hand"
        for o, places in by_hand.items():
            lbs, ubs = (torch.stack([end[(..., *place)] for place in places]) for end in (x.lb, x.ub))
            flat = torch.tensor([sum(p * math.prod(shape[i + 1 :]) for i, p in enumerate(place)) for place in places])
            chosen = flat.view(-1, 1, 1) == best[(..., *o)]
            assert chosen.sum(0).eq(1).all() and lbs[chosen.nonzero(as_tuple=True)].numel() == B * 2
            lowest = lbs.amax(0)
            assert torch.where(chosen, lbs, -math.inf).amax(0).equal(lowest), "i* has the largest lower bound"
            others = torch.where(chosen, -math.inf, ubs).amax(0)
            assert exact[(..., *o)].equal(lowest >= others) and above[(..., *o)].equal(ubs.amax(0))
            assert y.lb[(..., *o)].equal(lowest) and y.ub[(..., *o)].equal(ubs.amax(0))
        A = torch.randn(B, S, *y.shape[1:], generator=rng).to(dtype)
        A[0, 0] = 0
        parts, constant = pool.backward(A, x, y)
        shared, _ = pool.backward(A[:1], x, y)
        torch.testing.assert_close(shared[0][0], parts[0][0])
        assert parts[0].shape == (B, S, *x.shape[1:]) and parts[0].isfinite().all() and constant.isfinite().all()
        share = torch.rand(60, *x.shape, generator=rng)
        share[:30] = share[:30].round()
        points = (x.lb + share.to(dtype) * (x.ub - x.lb)).clamp(x.lb, x.ub).double()
        pooled = function(points.flatten(0, 1)).view(60, *y.shape)
        values = (A.double() * (pooled - y.mid.double()).unsqueeze(2)).flatten(3).sum(3)
        bound = (parts[0].double() * (points - x.mid.double()).unsqueeze(2)).flatten(3).sum(3) + constant.double()
        assert bool((bound <= values + SLACK[dtype] * (1 + A.double().abs().flatten(2).sum(2) + constant.double().abs())).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_max_pooling_knows_every_place_of_a_large_image_in_half_precision(dtype):
    """Two neighbours have indices that their type cannot tell apart; the second can exceed the first."""
    lb, ub = torch.zeros(1, 1, 70, 64), torch.zeros(1, 1, 70, 64)
    lb[0, 0, 66, 62], ub[0, 0, 66, 62], lb[0, 0, 66, 63], ub[0, 0, 66, 63] = 0.5, 0.625, 0.375, 0.875
    x, pool = Interval.ends(lb.to(dtype), ub.to(dtype)), MaxPool((2, 2))
    assert torch.tensor(66 * 64 + 62).to(dtype) == torch.tensor(66 * 64 + 63).to(dtype)
    best, exact, above = pool.planes(x)
    assert best[0, 0, 33, 31] == 66 * 64 + 62 and not exact[0, 0, 33, 31] and above[0, 0, 33, 31] == 0.875


def test_a_maximum_of_points_is_exact_and_has_no_constant():
    for dtype in PRECISIONS:
        x = torch.randint(-1, 2, (B, 2, 7, 7), generator=seeded(1)).to(dtype)  # many ties
        pool = MaxPool((3, 3), 2, 1)
        box = Interval.ends(x, x)
        y = pool.interval(box)
        assert pool.planes(box)[1].all() and y.lb.equal(y.ub)
        A = torch.randn(B, S, *y.shape[1:], generator=seeded(2)).to(dtype)
        parts, constant = pool.backward(A, box, y)
        assert not constant.any() and parts[0].sum().isclose(A.sum(), rtol=1e-3)


def test_max_pooling_is_differentiable_twice():
    for pool, shape in [(MaxPool((2, 2), 1, 1, 1, True), (2, 3, 4)), (MaxPool((1, 3), 2, (0, 1)), (2, 1, 6)), (MaxPool((2, 2, 2)), (1, 2, 4, 2))]:
        (x,) = boxes(shape)

        def run(A, mid, rad, pool=pool):
            box = Interval.ball(mid, rad)
            y = pool.interval(box)
            (part,), constant = pool.backward(A, box, y)
            return y.lb, y.ub, part**2, constant

        A = torch.randn(B, 2, *pool.interval(x).shape[1:], generator=seeded(4), dtype=torch.float64)
        inputs = [t.clone().requires_grad_() for t in (A, x.mid, x.rad + 0.1)]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True) and torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
