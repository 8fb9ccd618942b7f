"""Random small networks over every operation that has a bound rule, and over the ways in which Python hides what a network computes.

`build(seed)` draws a network, `examine(seed)` holds it against its bounds, `broken(seed)` against a reader that was broken on
purpose. `python tests/fuzzing.py 100000 --workers 2 --seed 1` does so for 100,000 seeds and prints what was found.
"""

import argparse
import copy
import itertools
import logging
import multiprocessing
import operator
import os
import random
import sys
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

from sparselab.program import BATCH_NORMS, Program, fetch, operation, read, run
from sparselab.robust import verification as verify_module
from sparselab.robust.bounds import METHODS, bounds, input_box, margin_matrix
from sparselab.robust.boxes import Interval
from sparselab.robust.ibp import apply_rows, recorded_statistics
from sparselab.robust.layers import Layer
from sparselab.robust.modes import worst_margin
from sparselab.robust.replay import Contradiction
from sparselab.robust.rules import RULES
from sparselab.robust.verification import verify

aten = torch.ops.aten
CLASSES = 3
LARGEST = 64  # entries of an activation
OTHER_DEVICES = {"cudnn_batch_norm", "miopen_batch_norm"}


# --- parts of networks ----------------------------------------------------------------------------------------------------


class Plain:
    """A tensor that a module holds as an attribute, not as a parameter or buffer."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Part(nn.Module):
    """`function(self, x)`, with its modules, parameters, buffers and attributes by name."""

    def __init__(self, function: Callable, **things):
        super().__init__()
        self.function = function
        for name, thing in things.items():
            if isinstance(thing, Tensor) and not isinstance(thing, nn.Parameter):
                self.register_buffer(name, thing)
            else:
                setattr(self, name, thing.tensor if isinstance(thing, Plain) else thing)

    def forward(self, x):
        return self.function(self, x)


def constant(r: random.Random, *shape: int, low: float = -1.5, high: float = 1.5):
    """A parameter, a buffer or a plain attribute."""
    tensor = torch.empty(shape).uniform_(low, high)
    return r.choice([nn.Parameter, lambda t: t, Plain])(tensor)


def beside(r: random.Random, shape: tuple) -> tuple:
    """A shape that broadcasts to the sample shape: whole, with ones, or without leading dimensions."""
    shape = tuple(n if r.random() < 0.6 else 1 for n in shape)
    return r.choice([shape[r.randrange(len(shape)) :], (1, *shape)])


def mask(r: random.Random, shape: tuple) -> Tensor:
    return torch.rand(beside(r, shape)) < 0.5


PARTS: dict[str, tuple[set[int], Callable]] = {}  # name -> (dimensions of a sample, a function of a generator and the sample's shape)
ANY = {1, 2, 3, 4}


def part(name: str, dims: set[int], make: Callable | None = None, keeps: bool = False):
    """Enter a part; `make(r, shape)` gives a module, or a function of x."""

    def enter(make: Callable) -> Callable:
        PARTS[name] = dims, make
        if keeps:
            KEEPS.append(name)
        return make

    return enter if make is None else enter(make)


KEEPS: list[str] = []  # parts that keep the shape of their input


def expressions(dims: set[int], keeps: bool, **functions: Callable) -> None:
    for name, function in functions.items():
        part(name, dims, lambda r, s, f=function: Part(lambda self, x: f(x)), keeps)


def modules(dims: set[int], keeps: bool, **kinds: Callable) -> None:
    for name, kind in kinds.items():
        part(name, dims, lambda r, s, k=kind: k(r, s), keeps)


# linear layers
modules(
    ANY,
    False,
    linear=lambda r, s: nn.Linear(s[-1], r.randint(2, 5), bias=r.random() < 0.7),
    product=lambda r, s: Part(lambda self, x: x @ self.w, w=constant(r, s[-1], r.randint(2, 4))),
)
part("einsum", {1, 2}, lambda r, s: Part(lambda self, x: torch.einsum("b...i,oi->b...o", x, self.w), w=constant(r, 3, s[-1])))
part("left_product", {2, 3}, lambda r, s: Part(lambda self, x: self.w @ x, w=constant(r, r.randint(2, 4), s[-2])))
part("batched_product", {2, 3}, lambda r, s: Part(lambda self, x: x @ self.w, w=constant(r, *(1,) * (len(s) - 1), s[-1], 3)))


def _conv(r: random.Random, s: tuple) -> nn.Module:
    dims, groups = len(s) - 1, r.choice([g for g in (1, 2) if s[0] % g == 0])
    kernel = tuple(r.randint(1, min(3, n)) for n in s[1:])
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    options = {"groups": groups, "bias": r.random() < 0.7, "dilation": r.choice([1, 1, 2])}
    if r.random() < 0.2:
        return kind(s[0], 2 * groups, kernel, padding="same", **options)
    if r.random() < 0.15:
        options["padding_mode"] = r.choice(["reflect", "replicate"])
    return kind(s[0], 2 * groups, kernel, r.choice([1, 2]), r.choice([0, 1, 1]), **options)


def _transposed(r: random.Random, s: tuple) -> nn.Module:
    groups = r.choice([g for g in (1, 2) if s[0] % g == 0])
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(s) - 2]
    stride = r.choice([1, 2])
    return kind(s[0], groups * r.randint(1, 2), r.choice([1, 2, 3]), stride, r.choice([0, 1]), r.randrange(stride), groups, r.random() < 0.7)


modules({2, 3, 4}, False, convolution=_conv, transposed_convolution=_transposed)


@part("overridden_convolution", {3})
def _overridden(r, s):
    class Centred(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)

    return Centred(s[0], 3, 2)


def _norm(r: random.Random, s: tuple) -> nn.Module:
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(s) - 1](s[0], affine=r.random() < 0.7)
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.3, 2)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return norm


NORMS = {
    "functional": lambda self, x: F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=0.01),
    "legit": lambda self, x: aten._native_batch_norm_legit(x, self.weight, self.bias, self.mean, self.var, False, 0.1, 0.01)[0],
    "legit_functional": lambda self, x: aten._native_batch_norm_legit_functional(x, self.weight, self.bias, self.mean, self.var, False, 0.1, 0.01)[0],
    "no_training": lambda self, x: aten._native_batch_norm_legit_no_training(x, self.weight, self.bias, self.mean, self.var, 0.1, 0.01)[0],
    "no_update": lambda self, x: aten._batch_norm_no_update(x, self.weight, self.bias, self.mean, self.var, 0.1, 0.01)[0],
}
for name, form in NORMS.items():
    part(
        f"{name}_batch_norm",
        ANY,
        lambda r, s, form=form: Part(form, mean=torch.rand(s[0]), var=torch.rand(s[0]) + 0.3, weight=constant(r, s[0]), bias=constant(r, s[0])),
        keeps=True,
    )
part("batch_norm", ANY, _norm, keeps=True)
part("convolution_batch_norm", {2, 3, 4}, lambda r, s: _in_a_row(conv := _conv(r, s), _norm(r, (conv.out_channels, *s[1:]))))
part("transposed_batch_norm", {2, 3, 4}, lambda r, s: _in_a_row(conv := _transposed(r, s), _norm(r, (conv.out_channels, *s[1:]))))
part("batch_norm_twice", ANY, lambda r, s: Part(lambda self, x: self.norm(F.relu(self.norm(x)) - 0.3), norm=_norm(r, s)), keeps=True)


def _in_a_row(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


# pooling
def _window(r: random.Random, s: tuple) -> tuple[list[int], list[int], list[int]]:
    kernel = [r.randint(1, min(3, n)) for n in s[1:]]
    return kernel, [r.randint(1, 3) for _ in kernel], [r.randint(0, k // 2) for k in kernel]


@part("average_pooling", {2, 3, 4})
def _average(r, s):
    kernel, stride, padding = _window(r, s)
    options = {"padding": padding, "ceil_mode": r.random() < 0.4, "count_include_pad": r.random() < 0.5}
    if len(s) > 2 and r.random() < 0.4:
        options["divisor_override"] = r.choice([-2, 1, 3])
    if r.random() < 0.5:
        return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[len(s) - 2](kernel, stride, **options)
    return Part(lambda self, x: (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3](x, kernel, stride, **options))


@part("max_pooling", {2, 3, 4})
def _maximum(r, s):
    kernel, stride, padding = _window(r, s)
    options = {"padding": padding, "ceil_mode": r.random() < 0.4, "dilation": r.choice([1, 1, 2])}
    if r.random() < 0.5:
        return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[len(s) - 2](kernel, stride, **options)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(s) - 2]
    return Part(lambda self, x: pool(x, kernel, stride, return_indices=True, **options)[0])


part("adaptive_pooling", {2, 3}, lambda r, s: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[len(s) - 2](r.randint(1, 3)))

# curves
expressions(
    ANY,
    True,
    relu=F.relu,
    relu_method=lambda x: x.relu(),
    abs=torch.abs,
    hardsigmoid=F.hardsigmoid,
    hardswish=F.hardswish,
    sigmoid=torch.sigmoid,
    tanh=torch.tanh,
    silu=F.silu,
    mish=F.mish,
    relu6=F.relu6,
    selu=F.selu,
    exp=lambda x: (0.5 * x).exp(),
    log=lambda x: (x.clamp(-3, 3) + 4).log(),
    sqrt=lambda x: (x.sigmoid() + 0.1).sqrt(),
    square=torch.square,
    rsqrt=lambda x: (x * x + 0.5).rsqrt(),
    reciprocal=lambda x: (x.abs() + 0.5).reciprocal(),
    ratio=lambda x: 2 / (x.exp() + 1),
    softsign_by_hand=lambda x: x * (1 / (1 + x.abs())),
    tanhshrink=F.tanhshrink,
    softmin_by_hand=lambda x: (1 + (-x).exp()).log(),
    clamp_min=lambda x: torch.clamp_min(x, 0.1),
    clamp_max=lambda x: torch.clamp_max(x, 0.6),
    clone=torch.clone,
    detach=torch.detach,
    alias=lambda x: aten.alias(x),
    lift_fresh=lambda x: aten.lift_fresh(x),
    to_copy=lambda x: x.to(x.dtype, copy=True),
    swish_by_hand=lambda x: x * x.sigmoid(),
    cube=lambda x: x * x * x,
    twice=lambda x: x + x,
    itself=lambda x: x * x,
    nothing=lambda x: x,
)
modules(
    ANY,
    True,
    leaky_relu=lambda r, s: nn.LeakyReLU(r.choice([0.0, 0.01, 0.3, 0.7, 1.0, 1.5, -0.5])),
    prelu=lambda r, s: nn.PReLU(r.choice([1, s[0]]), r.choice([0.25, -0.5, 1.3])),
    clamp=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: x.clamp(-0.5, 0.7),
                lambda self, x: x.clamp(min=0),
                lambda self, x: x.clamp(max=0.4),
                lambda self, x: x.clamp(min=-0.2),
                lambda self, x: x.clamp(self.low, self.high),
                lambda self, x: torch.clamp_min(x, self.low),
                lambda self, x: torch.clamp_max(x, self.high),
            ]
        ),
        low=constant(r, *beside(r, s), high=-0.1),
        high=constant(r, *beside(r, s), low=0.1),
    ),
    hardtanh=lambda r, s: nn.Hardtanh(*r.choice([(-1, 1), (0, 0.5), (-0.2, 0.9)])),
    threshold=lambda r, s: Part(lambda self, x: F.threshold(x, self.at, self.at), at=r.choice([0.0, 0.3, -0.4])),
    gelu=lambda r, s: nn.GELU(approximate=r.choice(["none", "tanh"])),
    elu=lambda r, s: nn.ELU(r.choice([1.0, 0.5, 2.0, -1.0])),
    celu=lambda r, s: nn.CELU(r.choice([1.0, 0.5, 2.0])),
    softplus=lambda r, s: nn.Softplus(r.choice([1.0, 0.5, 3.0]), r.choice([20, 1, 2])),
    power=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: x**2,
                lambda self, x: x**3,
                lambda self, x: x**4,
                lambda self, x: x**1,
                lambda self, x: (x.relu() + 0.3) ** 1.5,
                lambda self, x: (x.sigmoid() + 0.2) ** -2,
                lambda self, x: (x.clamp(-1, 1) + 2) ** 0.5,
                lambda self, x: torch.pow(x, 2.0),
            ]
        )
    ),
    module_form=lambda r, s: r.choice(
        [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.ReLU6, nn.SELU, nn.Identity, nn.Dropout]
    )(),
)

# arithmetic with numbers, parameters, buffers and attributes
modules(
    ANY,
    True,
    numbers=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: 1.5 * x - 0.2,
                lambda self, x: 1 - x,
                lambda self, x: torch.rsub(x, 0.5, alpha=2),
                lambda self, x: -x,
                lambda self, x: x / -1.7,
                lambda self, x: torch.add(x, 1, alpha=0.3),
                lambda self, x: torch.sub(x, 0.4, alpha=2),
                lambda self, x: x + True,
                lambda self, x: x * 0,
                lambda self, x: torch.tensor(0.5, dtype=x.dtype) - x,
                lambda self, x: x.true_divide(2),
                lambda self, x: torch.add(self.a, x, alpha=-0.5),
            ]
        ),
        a=torch.randn(s),
        b=torch.randn(s),
    ),
    scale=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: x * self.a + self.b,
                lambda self, x: self.a - x * self.b,
                lambda self, x: (x - self.a) / self.b,
                lambda self, x: self.b * x.sub(self.a),
                lambda self, x: torch.sub(self.a, x, alpha=0.5),
            ]
        ),
        a=constant(r, *beside(r, s)),
        b=constant(r, *beside(r, s), low=0.5),
    ),
    half_weights=lambda r, s: Part(lambda self, x: x * self.a.to(x.dtype), a=torch.randn(beside(r, s)).to(r.choice([torch.float16, torch.bfloat16]))),
    bits=lambda r, s: Part(r.choice([lambda self, x: x * self.m, lambda self, x: self.m.to(x.dtype) - x]), m=mask(r, s)),
    maxima=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: torch.maximum(x, self.a),
                lambda self, x: torch.minimum(self.a, x),
                lambda self, x: torch.maximum(x, -x),
                lambda self, x: torch.minimum(0.5 * x, 1 - x),
                lambda self, x: torch.maximum(x, x.flip(-1)),
                lambda self, x: torch.max(x, self.a),
            ]
        ),
        a=constant(r, *s),
    ),
    masks=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: torch.where(self.m, x, self.a),
                lambda self, x: x.masked_fill(self.m, -0.7),
                lambda self, x: torch.where(self.m, x, -x),
                lambda self, x: torch.where(self.m, 0.3, x),
                lambda self, x: torch.where(self.m, x, x.relu()),
            ]
        ),
        m=mask(r, s),
        a=constant(r, *s),
    ),
    copies=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: x.clone(),
                lambda self, x: x.contiguous(),
                lambda self, x: x.type_as(x),
                lambda self, x: torch.empty_like(x).copy_(x),
                lambda self, x: torch.empty_like(x[:1]).expand_as(x).clone().copy_(x),
            ]
        )
    ),
)

modules(
    ANY,
    False,
    spread=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: x[:, :1] * self.a,
                lambda self, x: self.a - x[..., :1],
                lambda self, x: torch.maximum(x[:, :1], self.a),
                lambda self, x: x[:, :1] + self.a,
                lambda self, x: torch.where(self.m, x[:, :1], self.a),
                lambda self, x: x[..., :1].clamp(min=self.a),
                lambda self, x: x[:, :1].masked_fill(self.m, 0.3),
                lambda self, x: torch.minimum(x[:, :1], x),
                lambda self, x: x[:, :1] * x,
                lambda self, x: torch.where(self.m, x[:, :1], x),
            ]
        ),
        a=constant(r, *s),
        m=torch.rand(s) < 0.5,
    ),
    like=lambda r, s: Part(
        r.choice(
            [
                lambda self, x: torch.cat([x, torch.zeros_like(x)], 1),
                lambda self, x: x - torch.full_like(x, 0.3),
                lambda self, x: torch.stack([x, x.new_ones(x.shape)], 1).flatten(1, 2),
                lambda self, x: torch.maximum(x, x.new_zeros(())),
                lambda self, x: self.filled(x, x.new_zeros(x.shape)),
                lambda self, x: self.filled(x, x * 1),
            ]
        ),
        filled=lambda x, y: (operator.setitem(y, (slice(None), slice(0, 1)), x[:, -1:]), y)[1],
    ),
)

# moving values
expressions(
    ANY,
    False,
    flatten=lambda x: x.flatten(1),
    view=lambda x: x.contiguous().view(x.shape[0], -1),
    reshape=lambda x: x.reshape(len(x), -1),
    unsqueeze=lambda x: x.unsqueeze(1).relu(),
    squeeze=lambda x: x[:, :1].squeeze(1) if x.dim() > 2 else x.unsqueeze(-1).squeeze(-1),
    mean=lambda x: x.mean(-1, keepdim=True),
    sum=lambda x: x.sum(1, keepdim=True),
    flip=lambda x: x.flip(1),
    roll=lambda x: x.roll(1, -1),
    roll_twice=lambda x: x.roll((1, -1), (1, -1)),
    repeat=lambda x: x.repeat(1, 2, *(1,) * (x.dim() - 2)),
    repeat_interleave=lambda x: x.repeat_interleave(2, 1),
    expand=lambda x: x[:, :1].expand(-1, 3, *x.shape[2:]),
    first=lambda x: x[:, :2],
    step=lambda x: x[..., ::2],
    narrow=lambda x: x.narrow(1, 0, 1),
    outer_slice=lambda x: x[:, 1:] - x[:, :-1],
    picked=lambda x: x[:, [0, -1, 0]],
    index_select=lambda x: x.index_select(1, torch.tensor([1, 0, 1])),
    pad=lambda x: F.pad(x, (1, 1), value=0.3),
    crop=lambda x: F.pad(x, (-1, 1)),
    split=lambda x: torch.cat(x.split(1, 1)[::-1], 1),
    split_sizes=lambda x: operator.sub(*x.split([1, x.shape[1] - 1], 1)),
    chunk=lambda x: torch.maximum(*(x.chunk(2, 1) if x.shape[1] % 2 == 0 else (x, -x))),
    cat=lambda x: torch.cat([x, -x.relu()], 1),
    cat_constant=lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1),
    cat_twice=lambda x: torch.cat([x, x], -1),
    stack=lambda x: torch.stack([x, x.relu()], 1).flatten(1, 2),
    slice_scatter=lambda x: torch.slice_scatter(x, x[:, :1].relu(), 1, 1, 2),
    select_scatter=lambda x: torch.select_scatter(x, x.select(1, 0).tanh(), 1, 1),
    gated=lambda x: x[:, :1] * x[:, 1:].sigmoid(),
    sums=lambda x: x.relu() + x.sum(1, keepdim=True),
    scatter_constant=lambda x: torch.slice_scatter(torch.ones_like(x).detach(), x[:, :1], 1, 0, 1),
    shuffle=lambda x: x.movedim(1, -1).relu().movedim(-1, 1),
    unflatten=lambda x: x.unflatten(1, (1, -1)),
    one_number=lambda x: x.flatten(1)[:, 0].relu().unsqueeze(1) * x.flatten(1),
    one_sum=lambda x: (x.flatten(1).sum(1).tanh() - x.flatten(1)[:, 0]).unsqueeze(1) - x.flatten(1),
    squared_norm=lambda x: x.pow(2).sum(-1, keepdim=True),
)
expressions(
    {2, 3, 4},
    False,
    transpose=lambda x: x.transpose(1, -1),
    permute=lambda x: x.permute(0, *range(x.dim() - 1, 0, -1)),
    select=lambda x: x[:, -1],
    unbind=lambda x: x.unbind(1)[0] * x.unbind(1)[-1].sigmoid(),
    means=lambda x: x.mean((1, 2), keepdim=True),
    mean_tokens=lambda x: x.mean(1),
    mT=lambda x: x.mT.contiguous(),
    swap=lambda x: x.swapaxes(1, 2),
    channel_shuffle=lambda x: F.channel_shuffle(x, 2),
    mean_all=lambda x: x.mean(tuple(range(1, x.dim()))).unsqueeze(1) + x.flatten(1),
)
for dims in (2, 3, 4):
    part(f"replicate_{dims}", {dims}, lambda r, s: Part(lambda self, x: F.pad(x[:, :2], (1, 0) * (x.dim() - 2), mode="replicate")))
    part(f"reflect_{dims}", {dims}, lambda r, s: Part(lambda self, x: F.pad(x[:, :2], (1, 0) * (x.dim() - 2), mode="reflect")))
    part(f"nearest_{dims}", {dims}, lambda r, s: Part(lambda self, x: F.interpolate(x, size=(self.size,) * (x.dim() - 2)), size=r.choice([2, 3])))
expressions({2}, False, linear_interpolation=lambda x: F.interpolate(x, scale_factor=2, mode="linear"))
expressions(
    {3},
    False,
    bilinear=lambda x: F.interpolate(x, size=(3, 5), mode="bilinear"),
    pixel_shuffle=lambda x: F.pixel_shuffle(x, 2),
    bilinear_corners=lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    pixel_unshuffle=lambda x: F.pixel_unshuffle(x, 2),
)


# --- ways in which Python hides what is computed --------------------------------------------------------------------------

SETTINGS = {"factor": 1.0, "lift": 0.0}  # read by networks when they run, and changed between two calls

IN_PLACE = {
    "mul_": lambda y: y.mul_(1.5),
    "add_": lambda y: y.add_(0.2),
    "neg_": lambda y: y.neg_(),
    "clamp_": lambda y: y.clamp_(-0.5, 1),
    "relu_": F.relu_,
    "tanh_": lambda y: y.tanh_(),
    "sigmoid_": lambda y: y.sigmoid_(),
    "leaky_relu_": lambda y: F.leaky_relu_(y, 0.1),
    "elu_": F.elu_,
    "abs_": lambda y: y.abs_(),
    "pow_": lambda y: y.pow_(2),
    "hardtanh_": F.hardtanh_,
    "silu": lambda y: F.silu(y, inplace=True),
    "div_": lambda y: y.div_(2),
    "iadd": lambda y: operator.iadd(y, 0.3),
    "copy_": lambda y: y.copy_(y.detach() * 0.5 + 0.1),
    "out": lambda y: torch.mul(y.detach(), 0.5, out=y) if not y.requires_grad else y.mul_(0.5),
    "data": lambda y: y.data.mul_(1.5),
    "detached": lambda y: y.detach().mul_(1.5),
    "module": nn.ReLU(inplace=True),
}
ALIASES = {
    "view": lambda y: y.view_as(y).view(*y.shape, 1),
    "half": lambda y: y[:, : (y.shape[1] + 1) // 2],
    "step": lambda y: y[..., ::2],
    "first": lambda y: y.select(1, 0),
    "transposed": lambda y: y.transpose(1, -1),
    "last": lambda y: y[:, -1:],
    "chunk": lambda y: y.chunk(2, 1)[0],
    "unbound": lambda y: y.unbind(1)[-1],
    "unsqueezed": lambda y: y.unsqueeze(1),
    "detached": lambda y: y.detach(),
    "itself": lambda y: y,
    "split": lambda y: y.split(1, -1)[0],
    "view_as": lambda y: y.view_as(y),
}
WRITES = {
    "first from last": lambda y: y[:, 0].copy_(y[:, -1].clone()),
    "set": lambda y: operator.setitem(y, (slice(None), 0), y[:, -1] * 0.5),
    "masked": lambda y: y.masked_fill_(torch.ones_like(y[0], dtype=torch.bool).tril_() if y.dim() > 2 else torch.arange(y.shape[1]) == 0, 0.25),
    "number": lambda y: operator.setitem(y, (slice(None), 0), 0.5),
    "zeros": lambda y: y[:, -1].zero_(),
    "fill": lambda y: y[:, :1].fill_(0.3),
    "row": lambda y: operator.setitem(y, (slice(None), 0), torch.ones(y.shape[2:], dtype=y.dtype)),
    "swap": lambda y: y.transpose_(1, 1),
    "flipped": lambda y: y.copy_(y.flip(1)),
    "iadd of a slice": lambda y: operator.setitem(y, (slice(None), slice(0, 1)), y[:, :1] + y[:, -1:]),
}


def _unused(r: random.Random, s: tuple) -> nn.Module:
    name, alias = r.choice(list(IN_PLACE)), r.choice(list(ALIASES))
    change, seen = IN_PLACE[name], ALIASES[alias]
    return Part(_changing(lambda y: change(seen(y))), fresh=r.random() < 0.5)


def _changing(change: Callable) -> Callable:
    def function(self, x):
        y = x * 1.0 if self.fresh else x.clone()
        change(y)  # the result is not used
        return y

    return function


part("in_place", ANY, _unused, keeps=True)
for name, write in WRITES.items():
    part(f"{name}_in_place", ANY, lambda r, s, write=write: Part(_changing(write), fresh=r.random() < 0.5), keeps=True)


@part("in_place_on_the_input", ANY, keeps=True)
def _on_input(r, s):
    def function(self, x):
        self.act(x)
        return x

    return Part(function, act=nn.LeakyReLU(0.2, inplace=True))


@part("hook", ANY, keeps=True)
def _hooked(r, s):
    module = r.choice([nn.Identity, nn.ReLU, nn.Tanh])()
    kind = r.randrange(5)
    if kind == 0:
        module.register_forward_hook(lambda module, args, output: 1.5 * output - 0.1)
    elif kind == 1:
        module.register_forward_pre_hook(lambda module, args: (args[0] * -1.2,))
    elif kind == 2:
        module.register_forward_hook(lambda module, args, output: output.mul_(2) and None if output.numel() == 1 else (output * 2))
    elif kind == 3:
        module.register_forward_hook(lambda module, args, kwargs, output: output + args[0], with_kwargs=True)
    else:

        def in_place(module, args, output):
            output += 0.3  # nothing is returned

        return Part(lambda self, x: self.inner(x.clone()), inner=_with_hook(module, in_place))
    return module


def _with_hook(module: nn.Module, hook: Callable) -> nn.Module:
    module.register_forward_hook(hook)
    return module


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight.tanh()


@part("parametrized", ANY)
def _parametrized(r, s):
    layer = nn.Linear(s[-1], 3)
    kind = r.randrange(4)
    if kind == 0:
        parametrize.register_parametrization(layer, "weight", Doubled())
    elif kind == 1:
        parametrizations.weight_norm(layer)
    elif kind == 2:
        parametrizations.spectral_norm(layer)
    else:
        torch.nn.utils.weight_norm(layer)
    return layer


@part("tuples", ANY, keeps=True)
def _tuples(r, s):
    inner = Part(lambda self, x: {"out": (x.tanh(), x * self.a), "rest": [x]}, a=constant(r, *beside(r, s)))
    return Part(lambda self, x: (lambda found: found["out"][0] - found["out"][1] + found["rest"][0])(self.inner(x)), inner=inner)


@part("settings", ANY, keeps=True)
def _settings(r, s):
    return Part(
        lambda self, x: (SETTINGS["factor"] * x + SETTINGS["lift"]) * self.gain if self.flag else self.other(x), gain=0.8, flag=True, other=nn.Tanh()
    )


@part("attributes", ANY, keeps=True)
def _attributes(r, s):
    """A count of calls, written by forward, and a table made from a buffer when it is first needed."""

    def function(self, x):
        self.calls += 1
        self.seen = x.shape
        if self.table is None:
            self.table = self.a.exp()
        return x * self.table

    return Part(function, calls=torch.zeros((), dtype=torch.long), seen=None, table=None, a=torch.rand(beside(r, s)) - 0.5)


@part("residual", ANY, keeps=True)
def _residual(r, s):
    function = r.choice(
        [
            torch.add,
            torch.sub,
            torch.mul,
            torch.maximum,
            torch.minimum,
            lambda x, y: torch.cat([x, y], 1)[:, : x.shape[1]],
            lambda x, y: torch.stack([x, y], 1).mean(1),
            lambda x, y: x - 0.5 * y,
        ]
    )
    return Part(lambda self, x: function(x, self.inner(x)), inner=_shape_keeper(r, s))


@part("branches", ANY, keeps=True)
def _branches(r, s):
    function = r.choice([torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum])
    return Part(lambda self, x: function(self.one(x), self.two(x)), one=_shape_keeper(r, s), two=_shape_keeper(r, s))


@part("reused", ANY, keeps=True)
def _reused(r, s):
    return Part(lambda self, x: self.inner(0.7 * self.inner(x) - 0.2), inner=_shape_keeper(r, s))


def _shape_keeper(r: random.Random, s: tuple) -> nn.Module:
    return PARTS[r.choice(KEEPS)][1](r, s)


# --- a network ------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Parts in a row, then logits."""

    def __init__(self, parts: list[nn.Module], names: list[str], head: nn.Module):
        super().__init__()
        self.parts, self.head, self.names, self.globally = nn.ModuleList(parts), head, names, 0

    def forward(self, x: Tensor) -> Tensor:
        for module in self.parts:
            x = module(x)
        return self.head(x.flatten(1))

    @contextmanager
    def world(self) -> Iterator[None]:
        """Inside, torch has the global hooks that belong to the network."""
        with ExitStack() as stack:
            if self.globally == 1:
                hook = register_module_forward_hook(lambda module, args, output: output * 0.9 if isinstance(module, nn.Linear) else None)
                stack.callback(hook.remove)
            if self.globally == 2:
                hook = register_module_forward_pre_hook(lambda module, args: (args[0] + 0.1,) if isinstance(module, nn.Linear) else None)
                stack.callback(hook.remove)
            yield


SHAPES = {1: [(3,), (4,), (6,)], 2: [(2, 4), (3, 4), (4, 3)], 3: [(1, 4, 4), (2, 3, 4), (4, 2, 2)], 4: [(2, 2, 2, 3), (1, 3, 2, 2)]}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(seed: int, dtype: torch.dtype | None = None) -> tuple[Network, Tensor]:
    """A network and a batch of images for it, in double or single precision; the first part goes by turns through all of PARTS."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    SETTINGS.update(factor=1.0, lift=0.0)
    drawn = r.choice([torch.float64, torch.float32])
    dtype = dtype or drawn
    first = list(PARTS)[seed % len(PARTS)]
    with default_dtype(dtype), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9):
            parts, names, x = [], [], torch.rand(6, *r.choice(SHAPES[r.choice(sorted(PARTS[first][0]))]))
            value = _extend(parts, names, r.choice(["scale", "linear", "nothing"]), r, x.clone())
            value = _extend(parts, names, first, r, value)
            if first in names:
                break
        for _ in range(r.randint(0, 3)):
            value = _extend(parts, names, r.choice([name for name in PARTS if value.dim() - 1 in PARTS[name][0]]), r, value)
        net = Network(parts, names, nn.Linear(value[0].numel(), CLASSES)).eval()
        net.globally = r.choice([0] * 18 + [1, 2])
        with net.world():
            logits = net(x.clone())
            spread = logits.std(0)
            spread[spread < 0.02] = 1
            net.head.weight.div_(spread.unsqueeze(1))
            net.head.bias.div_(spread)
            net.head.bias.sub_(net(x.clone()).mean(0))
    return net.requires_grad_(r.random() < 0.5), x[:2]


def _extend(parts: list, names: list, name: str, r: random.Random, value: Tensor) -> Tensor:
    """Append a part, if it fits the activations, and what brings its outputs to the size of 1."""
    s = tuple(value.shape[1:])
    repeated = any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True))
    if len(s) not in PARTS[name][0] or (repeated and "in_place" in name):  # PyTorch refuses to write into what expand() repeats
        return value
    try:
        module = PARTS[name][1](r, s).eval()
        after = module(value.clone() if "in_place" in name else value)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return value
    if not (1 < after.dim() < 6 and len(after) == len(value) and 0 < after[0].numel() <= LARGEST and bool(after.isfinite().all())):
        return value
    parts.append(module)
    names.append(name)
    if (most := float(after.abs().max())) > 4:
        parts.append(Part(lambda self, x: x * self.factor, factor=2 / most))
        after = after * (2 / most)
    return after


# --- changes between two calls --------------------------------------------------------------------------------------------


def change(net: Network, r: random.Random) -> str:
    """Change what `net` computes, as a user or a training step would; its kind. The old reading is worth nothing afterwards."""
    kinds = [kind for kind in CHANGES if kind.__name__[1:] != "train"]
    for kind in r.sample(kinds, len(kinds)):
        with torch.no_grad():
            if kind(net, r):
                return kind.__name__[1:]
    raise AssertionError("nothing could be changed")


def _data(net: Network, r: random.Random) -> bool:
    net.head.weight.data.mul_(-1)
    return True


def _weight(net: Network, r: random.Random) -> bool:
    net.head.weight = nn.Parameter(net.head.weight.flip(0))
    return True


def _hook(net: Network, r: random.Random) -> bool:
    r.choice([*net.parts, net.head]).register_forward_hook(lambda module, args, output: output * 0.6)
    return True


def _pre_hook(net: Network, r: random.Random) -> bool:
    net.head.register_forward_pre_hook(lambda module, args: (args[0] + 0.2,))
    return True


def _module(net: Network, r: random.Random) -> bool:
    net.head = nn.Sequential(net.head, nn.Tanh())
    return True


def _global(net: Network, r: random.Random) -> bool:
    if "settings" not in net.names:
        return False
    SETTINGS.update(factor=-0.7, lift=0.3)
    return True


def _flag(net: Network, r: random.Random) -> bool:
    for module in net.modules():
        if hasattr(module, "flag"):
            module.flag = not module.flag
            return True
    return False


def _attribute(net: Network, r: random.Random) -> bool:
    for module in net.modules():
        for name in ("negative_slope", "gain", "eps"):
            if hasattr(module, name):
                setattr(module, name, 0.4)
                return True
        if isinstance(getattr(module, "a", None), Tensor) and "a" not in module._buffers and "a" not in module._parameters:
            module.a = module.a * 0.5
            return True
    return False


def _buffer(net: Network, r: random.Random) -> bool:
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    for buffer in buffers:
        buffer.mul_(0.5)
    return bool(buffers)


CHANGES = [_data, _weight, _hook, _pre_hook, _module, _global, _flag, _attribute, _buffer]


# --- points ---------------------------------------------------------------------------------------------------------------

Forward = Callable[[Tensor], Tensor]


def answers(
    forward: Forward, lower: Tensor, upper: Tensor, rows: Tensor, r: torch.Generator, corners: int = 6, steps: int = 2
) -> tuple[Tensor, Tensor]:
    """Many points of every box, (P, B, ...), and what the model says there, (P, B, K): corners, random points, and ascents of rows (B, S, K)."""
    share = torch.rand(2 * corners, *lower.shape, generator=r, dtype=torch.float64).to(lower.dtype)
    share[:corners] = share[:corners].round()
    points = torch.cat([lower[None], upper[None], (lower + share * (upper - lower)).clamp(lower, upper)])
    found = [_ask(forward, points)]
    best = torch.einsum("bsk,pbk->psb", rows, found[0].to(rows)).argmax(0)  # (S, B)
    here = points[best, torch.arange(len(lower))]
    points = [points]
    for step in range(steps):
        start = here.clone().requires_grad_()
        try:
            with torch.enable_grad():
                y = forward((start + 0).flatten(0, 1)).unflatten(0, here.shape[:2])
                (slope,) = torch.autograd.grad((y * rows.transpose(0, 1).to(y)).sum(), start, allow_unused=True, materialize_grads=True)
        except RuntimeError:  # changed in place, so that autograd refuses
            break
        target = torch.where(slope > 0, upper, torch.where(slope < 0, lower, here))
        length = 1.0 if step == 0 else 0.3
        here = (here + length * (target - here)).clamp(lower, upper).detach()
        points.append(here)
        found.append(_ask(forward, here))
    return torch.cat(points), torch.cat(found)


def _ask(forward: Forward, points: Tensor) -> Tensor:
    with torch.no_grad():
        return forward(points.flatten(0, 1).clone()).unflatten(0, points.shape[:2]).clone()


class _Fixed(TorchFunctionMode):
    """BatchNorms in train mode take the given statistics, in the order in which they run."""

    def __init__(self, statistics: list):
        super().__init__()
        self.left = iter(statistics)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.batch_norm and (kwargs or {}).get("training", len(args) > 5 and args[5]):
            given = dict(zip(("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), args, strict=False)) | (
                kwargs or {}
            )
            mean, var = next(self.left)
            return F.batch_norm(given["input"], mean.detach(), var.detach(), given["weight"], given["bias"], False, 0.0, given["eps"])
        return function(*args, **(kwargs or {}))


# --- the examination ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was found, to be added up."""

    networks: int = 0
    checks: int = 0  # bounds held against points
    points: int = 0
    samples: int = 0
    proved: int = 0
    operations: Counter = field(default_factory=Counter)  # networks in which an operation was bounded
    refusals: Counter = field(default_factory=Counter)
    outcomes: Counter = field(default_factory=Counter)  # of broken readers
    faults: list = field(default_factory=list)

    def __add__(self, other: "Report") -> "Report":
        return Report(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def __str__(self) -> str:
        head = (
            f"{self.networks} networks, {self.checks} bounds, {self.points} points, {self.samples} samples, {self.proved} proved, "
            f"{len(self.faults)} faults"
        )
        parts = [
            f"  {title}: " + ", ".join(f"{name} {n}" for name, n in counts.most_common())
            for title, counts in (("operations", self.operations), ("outcomes", self.outcomes))
            if counts
        ]
        return "\n".join([head, *parts, *(f"  refused {n:6}  {name}" for name, n in self.refusals.most_common()), *map(str, self.faults)])


class Fault(AssertionError):
    """A wrong bound, a wrong proof, or an error that is no sentence."""


def _outside(y: Tensor, lb: Tensor, ub: Tensor, slack: float, what: str) -> None:
    """Fault if a point's output y (P, B, K) lies outside of [lb, ub] (B, K), or lb > ub."""
    y, lb, ub = y.double(), lb.detach().double(), ub.detach().double()
    if bool(lb.isnan().any() | ub.isnan().any()):
        raise Fault(f"{what}: a bound is NaN")
    room = slack * (1 + y.abs().amax(0))
    apart = torch.stack([lb - y.amin(0), lb - y.amax(0), y.amax(0) - ub, lb - ub]) - room
    if bool((apart > 0).any()):
        raise Fault(f"{what}: a point is outside of the bounds by {float((apart + room).max()):.3g}")


SLACK = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}


def check(net: Network, x: Tensor, eps: float, report: Report, r: random.Random, verified: bool = True) -> None:
    """Hold bounds and proofs against many points. What has no bounds is counted by its reason; Fault for anything wrong."""
    lower, upper = input_box(x, eps)
    program = read(net, x)
    y = _ask(net, x[None])[0]
    labels = y.argmax(1)
    C = margin_matrix(labels, CLASSES, torch.float64)
    eye = torch.eye(CLASSES, dtype=torch.float64).expand(len(x), -1, -1)
    _, seen = answers(net, lower, upper, torch.cat([eye, -C], 1), torch.Generator().manual_seed(r.randrange(2**31)))
    report.points += seen.shape[0] * seen.shape[1]
    slack, methods = SLACK[x.dtype], r.sample(METHODS, 2)
    for method, rows in ((methods[0], None), (methods[1], C.to(x.dtype))):
        with refusals(report):
            lb, ub = bounds(net, lower, upper, method, rows, program=program)
            values = seen if rows is None else torch.einsum("bsk,pbk->pbs", C, seen.double())
            _outside(values, lb, ub, slack, method)
            report.checks += 1
    with refusals(report):
        lb, ub = bounds(net, x, x, r.choice(METHODS), program=r.choice([program, program, None]))
        apart = float(((torch.stack([lb, ub]).detach() - y).abs() / (1 + y.abs().amax())).max())
        if not apart <= slack:
            raise Fault(f"the bounds of a point are {apart:.3g} from the output")
        report.operations.update({operation(node) for node in program.names})
    if verified:
        with refusals(report):
            result = verify(net, x, labels, eps)
            worst = torch.stack([worst_margin(z, labels) for z in seen.double()]).amin(0)
            report.samples += len(x)
            report.proved += int(result.verified.sum())
            room = slack * (1 + seen.double().abs().amax((0, 2)))
            if bool((result.verified & (worst < -room / 10)).any()):
                raise Fault(f"false proof: a point has the margin {float(worst[result.verified].min()):.3g}")
            if bool((result.margins > worst + room).any()):
                raise Fault(f"verify gives the margin {result.margins.tolist()}, a point {worst.tolist()}")


@contextmanager
def refusals(report: Report) -> Iterator[None]:
    """Count what is refused by a sentence. A contradiction means that something is wrong with a network that is not."""
    try:
        yield
    except (Contradiction, Fault):
        raise
    except ValueError as error:
        text = str(error)
        for quoted in ("'", '"'):
            text = quoted.join(part for i, part in enumerate(text.split(quoted)) if not i % 2)
        report.refusals["".join(c for c in f"{type(error).__name__}: {text}"[:170] if not c.isdigit())] += 1


def check_training(net: Network, x: Tensor, eps: float, report: Report, r: random.Random) -> None:
    """BatchNorm in train mode: the network with the statistics of the clean batch."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    lower, upper = input_box(x, eps)
    with refusals(report):
        before = copy.deepcopy(net.state_dict())
        with recorded_statistics() as statistics, torch.no_grad():
            net(x.clone())
        net.load_state_dict(before)
        method = r.choice(METHODS)
        lb, ub = bounds(net, lower, upper, method, statistics=statistics)

        def forward(points: Tensor) -> Tensor:
            with _Fixed(statistics):
                return net(points)

        eye = torch.eye(CLASSES, dtype=torch.float64).expand(len(x), -1, -1)
        _, seen = answers(forward, lower, upper, torch.cat([eye, -eye], 1), torch.Generator().manual_seed(r.randrange(2**31)))
        _outside(seen, lb, ub, SLACK[x.dtype], f"{method} in train mode")
        report.checks += 1
        report.outcomes["BatchNorm in train mode"] += len(statistics) > 0
    net.eval()


def examine(seed: int, dtype: torch.dtype | None = None, lirpa: bool = False) -> Report:
    """Draw a network and hold it against its bounds, change it, and do so again."""
    report, r = Report(networks=1), random.Random(seed + 10**9)
    what = "build"
    try:
        net, x = build(seed, dtype)
        eps = r.choice([0.003, 0.03, 0.1, 0.4])
        with net.world(), refusals(report), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what = "first call"
            check(net, x, eps, report, r)
            if r.random() < 0.4:
                what = "after a change of the " + change(net, r)
                check(net, x, eps, report, r, verified=r.random() < 0.3)
            if lirpa:
                what = "auto_LiRPA"
                _other_engine(net, x, eps, report, r)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
            what, (net, x) = "in train mode", build(seed, torch.float64)  # a batch variance near zero multiplies rounding
            with net.world(), refusals(report), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_training(net, x, eps, report, r)
    except Exception as error:
        fault = f"seed {seed} {str(x.dtype if what != 'build' else '').removeprefix('torch.')} {what}: {type(error).__name__}: {str(error)[:300]}"
        report.faults.append(f"  FAULT {fault} | {net.names if what != 'build' else ''}")
    return report


def _other_engine(net: Network, x: Tensor, eps: float, report: Report, r: random.Random) -> None:
    lower, upper = input_box(x, eps)
    eye = torch.eye(CLASSES, dtype=torch.float64).expand(len(x), -1, -1)
    _, seen = answers(net, lower, upper, torch.cat([eye, -eye], 1), torch.Generator().manual_seed(0))
    for method in METHODS:
        with refusals(report):
            lb, ub = bounds(net, lower, upper, method, engine="auto_lirpa")
            _outside(seen, lb, ub, max(1e-5, SLACK[x.dtype]), f"auto_LiRPA, {method}")
            report.outcomes["auto_LiRPA bounds"] += 1


# --- readers that are broken on purpose -----------------------------------------------------------------------------------

Reader = Callable[[nn.Module, Tensor], Program]


def _cut(program: Program, node: fx.Node, other: fx.Node) -> Program:
    """`other` in the place of `node`."""
    node.replace_all_uses_with(other)
    program.output = other if program.output is node else program.output
    return _kept(program)


def _kept(program: Program) -> Program:
    """The program without what has no use any more, and with the activations that depend on the input now."""
    needed, reached = {program.output}, {program.input}
    for node in reversed(program.nodes):
        needed |= set(node.all_input_nodes) if node in needed else set()
    for node in program.nodes:
        reached |= {node} if reached & set(node.all_input_nodes) else set()
    program.nodes = [node for node in program.nodes if node in needed or node is program.input]
    program.activations = reached & set(program.nodes)
    program.names = {node: name for node, name in program.names.items() if node in program.activations}
    program.state = {node: name for node, name in program.state.items() if node in program.nodes}
    program.constants = {node: tensor for node, tensor in program.constants.items() if node in program.nodes}
    return program


def _operations(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes if node in program.names and isinstance(node.meta.get("shape"), torch.Size)]


def deleted(model: nn.Module, x: Tensor, r: random.Random) -> Program:
    """An operation is left out."""
    program = read(model, x)
    pairs = [
        (node, before)
        for node in _operations(program)
        for before in node.all_input_nodes
        if before in program.activations and before.meta["shape"] == node.meta["shape"]
    ]
    return _cut(program, *r.choice(pairs)) if pairs else program


def _constant(program: Program, tensor: Tensor) -> fx.Node:
    graph = program.input.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(f"frozen_{len(program.constants)}")
    program.constants[node] = tensor
    program.nodes.insert(0, node)
    return node


def frozen(model: nn.Module, x: Tensor, r: random.Random) -> Program:
    """An activation is a constant."""
    program = read(model, x)
    node = r.choice(_operations(program))
    part = Program(
        program.nodes[: program.nodes.index(node) + 1], program.input, node, program.state, program.constants, program.activations, program.names, x
    )
    return _cut(program, node, _constant(program, run(part, model, x).detach()))


def stale_weight(model: nn.Module, x: Tensor, r: random.Random) -> Program:
    """A parameter or buffer is what it was."""
    program = read(model, x)
    tensors = fetch(program, model)
    if found := [node for node in program.state if tensors[node].is_floating_point()]:
        node = r.choice(found)
        del program.state[node]
        program.constants[node] = tensors[node].detach() * r.choice([0.5, 1.1, -1.0])
    return program


def swapped(model: nn.Module, x: Tensor, r: random.Random) -> Program:
    """Two operations change places, or the two operands of one."""
    program = read(model, x)
    alone = [node for node in _operations(program) if len(node.args) == 1 and isinstance(node.args[0], fx.Node)]
    pairs = [(a, b) for a in alone for b in alone if a.args[0] is b and a.target is not b.target and a.meta["shape"] == b.args[0].meta.get("shape")]
    if pairs:
        a, b = r.choice(pairs)
        a.target, b.target = b.target, a.target
    elif found := [node for node in _operations(program) if operation(node) in ("sub", "div") and len(node.all_input_nodes) == 2]:
        node = r.choice(found)
        node.args = (node.args[1], node.args[0])
    return program


def wrong_number(model: nn.Module, x: Tensor, r: random.Random) -> Program:
    """A number among the arguments is another."""
    program = read(model, x)
    if found := [(node, i) for node in _operations(program) for i, value in enumerate(node.args) if isinstance(value, float)]:
        node, i = r.choice(found)
        node.update_arg(i, node.args[i] * 0.5 + 0.1)
    return program


def without_hooks(model: nn.Module, x: Tensor, r: random.Random) -> Program:
    """Hooks are not seen."""
    kept = [(module, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    try:
        for module, *_ in kept:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        return read(model, x)
    finally:
        for module, hooks, pre_hooks in kept:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks


def stale_reading(model: nn.Module, x: Tensor, r: random.Random) -> Program:
    """The reading from before a change; `broken` keeps it."""
    return read(model, x)


BROKEN_READERS = [deleted, frozen, stale_weight, swapped, wrong_number, without_hooks, stale_reading]


class Shrunk(Layer):
    """A layer whose bounds are too tight by a factor."""

    linear, entrywise, switch = False, False, False

    def __init__(self, layer: Layer, share: float):
        self.layer, self.share = layer, share

    def interval(self, *xs: Interval) -> Interval:
        y = self.layer.interval(*xs)
        return Interval.ball(y.mid, y.rad * self.share)

    def backward(self, A: Tensor, *boxes: Interval) -> tuple[list[Tensor], Any]:
        *xs, y = boxes
        parts, constant = self.layer.backward(A, *xs, y)
        reach = sum(apply_rows(part.abs(), x.rad) for part, x in zip(parts, xs, strict=True))
        return parts, constant + (1 - self.share) * reach


def shrunk_rule(name: str, share: float) -> dict[str, Callable]:
    """The table in which the bounds of one operation are too tight."""
    right = RULES[name]

    def rule(*args, **kwargs):
        layer = right(*args, **kwargs)
        if isinstance(layer, list):
            return [*layer[:-1], Shrunk(layer[-1], share)]
        return tuple(Shrunk(part, share) for part in layer) if isinstance(layer, tuple) else None if layer is None else Shrunk(layer, share)

    return {name: rule}


def differs(program: Program, net: nn.Module, points: Tensor, seen: Tensor) -> bool:
    """Does the program give something else than `seen` (P, B, K) at one of the points, by more than rounding?"""
    room = 1e-3 * float(1 + seen.abs().max())
    return not all(torch.allclose(run(program, net, point), y, rtol=0, atol=room) for point, y in zip(points, seen, strict=True))


def broken(seed: int) -> Report:
    """What `verify` says when its reader, or a rule, is broken: it must refuse, or prove nothing that the points deny.

    A reader is broken from the first reading on, or only from the third, with which the bounds are computed.
    """
    report, r = Report(networks=1), random.Random(seed + 2 * 10**9)
    net, x = build(seed)
    eps, breaker, late, choice = r.choice([0.003, 0.03, 0.1, 0.4]), r.choice([*BROKEN_READERS, shrunk_rule]), r.choice([0, 2]), r.randrange(2**31)
    name = breaker.__name__
    with net.world(), ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            old = {len(part): read(net, part) for part in (x[:1], x)}
        except ValueError:
            report.outcomes["not readable"] += 1
            return report
        if breaker in (stale_reading, without_hooks):
            with torch.no_grad():
                (r.choice([_pre_hook, _hook, _module, _global, _flag, _attribute]) if breaker is stale_reading else _hook)(net, r)
        labels = _ask(net, x[None])[0].argmax(1)
        points, seen = answers(net, *input_box(x, eps), -margin_matrix(labels, CLASSES, torch.float64), torch.Generator().manual_seed(seed))
        if breaker is shrunk_rule:
            known = sorted({operation(node) for node in old[len(x)].names} & set(RULES) - {*BATCH_NORMS, "convolution"} - {"view", "_unsafe_view"})
            if not known:
                return report
            stack.enter_context(mock.patch.dict(RULES, shrunk_rule(r.choice(known), r.choice([0.0, 0.5, 0.9]))))
        else:
            calls = itertools.count(-late)
            wrong = (lambda model, x: old[len(x)]) if breaker is stale_reading else lambda model, x: breaker(model, x, random.Random(choice))
            try:
                if not differs(wrong(net, x), net, points, seen):
                    report.outcomes[f"{name}: the same network"] += 1
                    return report
            except (RuntimeError, LookupError, AttributeError):  # a program that does not run: `verify` runs it first
                report.outcomes[f"{name}: no program"] += 1
                return report
            stack.enter_context(mock.patch.object(verify_module, "read", lambda model, x: (read if next(calls) < 0 else wrong)(model, x)))
        try:
            result = verify(net, x, labels, eps)
        except Contradiction:
            report.outcomes[f"{name}: contradiction"] += 1
            return report
        except Exception as error:
            report.outcomes[f"{name}: {type(error).__name__}"] += 1
            return report
    worst = torch.stack([worst_margin(z, labels) for z in seen.double()]).amin(0)
    found = "proofs" if result.verified.any() else "no proof" if result.clean.any() else "nothing to prove"
    report.outcomes[f"{name}: not noticed, {found}"] += 1
    report.samples, report.proved = len(x), int(result.verified.sum())
    if bool((false := result.verified & (worst < -SLACK[x.dtype] / 10)).any()):
        report.faults.append(f"  FAULT seed {seed}, {name}, from reading {late}: false proof, margin {float(worst[false].min()):.3g} | {net.names}")
    return report


# --- the command ----------------------------------------------------------------------------------------------------------


def _block(job: tuple[int, int, bool]) -> tuple[Report, Report, float]:
    start, stop, lirpa = job
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # auto_LiRPA reports what it does not support
    began, found, breaks = time.process_time(), Report(), Report()
    for seed in range(start, stop):
        found += examine(seed, lirpa=lirpa and seed % 50 == 0)
        if seed % 5 == 0:
            breaks += broken(seed)
    return found, breaks, time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", type=int)
    parser.add_argument("--seed", type=int, default=0, help="the first seed is seed * 10**6")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lirpa", action="store_true", help="bound every 50th network with auto_LiRPA too")
    options = parser.parse_args()
    first, size = options.seed * 10**6, 100
    jobs = [(first + i, min(first + i + size, first + options.networks), options.lirpa) for i in range(0, options.networks, size)]
    total, breaks, seconds = Report(), Report(), 0.0
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=50) as pool:
        for found, part, spent in pool.imap_unordered(_block, jobs):
            total, breaks, seconds = total + found, breaks + part, seconds + spent
            for fault in found.faults + part.faults:
                print(fault, flush=True)
            if total.networks % 500 == 0:
                print(f"{total.networks} networks, {len(total.faults) + len(breaks.faults)} faults, {seconds:.0f} s", flush=True)
    print(total)
    print("readers broken on purpose:", breaks)
    missing = set(RULES) - OTHER_DEVICES - set(total.operations)
    print(f"operations that no network had: {sorted(missing) or 'none'}")
    print(f"{seconds:.0f} s of processor time, {1e3 * seconds / max(1, total.networks):.0f} ms for each network")
    return 1 if total.faults or breaks.faults else 0


if __name__ == "__main__":
    sys.exit(main())
