"""The native engine and auto_LiRPA give the same bounds: every method, every model of the zoo, dense and masked."""
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselab.learn.models import MODELS, build
from sparselab.robust.bounds import METHODS, bounds, input_box, margin_matrix
from sparselab.sparse.sparsify import sparsify

pytestmark = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")
DEEP = ("resnet32", "resnet56", "resnet18", "vgg", "wrn")  # minutes under full CROWN: `make slow`


def narrow(name: str) -> dict:
    """Options that make a model small; its layers and how they are connected stay."""
    width = 4 if name.startswith("vgg") else 1 if name.startswith("wrn") else 2
    small = {"width": width, "widths": (12, 12), "hidden": (12,) * 2}
    return {key: small[key][:len(value)] if isinstance(value, tuple) else small[key]
            for key, value in MODELS[name].options.items()}


def side(name: str) -> int:
    """Pixels of an image's edge, as few as leave each layer its strides; full CROWN's time grows with the fourth power of them."""
    return 32 if name.startswith(("vgg", "resnet18")) else 8 if name.startswith("resnet20") else 16


def masked(name: str, sparsity: float, seed: int) -> nn.Module:
    """The model with random BatchNorm statistics and a random mask, rescaled so that signals survive."""
    torch.manual_seed(seed)
    model = build(name, (1, side(name), side(name)), 5, mean=[0.3], std=[0.4], **narrow(name))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    total = sum(w.numel() for w in model.parameters() if w.dim() > 1)
    sparsity = min(sparsity, 1 - 30 / total)
    if sparsity:
        masks = sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "static", sparsity, total_steps=1).masks
        with torch.no_grad():
            for weight in masks.weights.values():
                weight.mul_((1 - sparsity) ** -0.5)
    return model.eval()


def differences(model: nn.Module, size: int, methods: tuple[str, ...], logits: bool) -> dict:
    """The largest difference of the engines, relative to the largest bound, by method, of margins and, if `logits`, of logits."""
    x = torch.rand(2, 1, size, size).to(next(model.parameters()))
    box, C = input_box(x, 0.02), margin_matrix(torch.tensor([0, 3]), 5, x.dtype)
    found = {}
    with torch.no_grad():
        for method in methods:
            for rows in (C, None)[:1 + logits]:
                ours, theirs = (torch.cat(bounds(model, *box, method, rows, engine)) for engine in ("native", "auto_lirpa"))
                found[method, rows is None] = float((ours - theirs).abs().max() / theirs.abs().max())
    return found


@pytest.fixture
def ties_broken_alike(monkeypatch):
    """Max pooling picks the first of the inputs that agree to nine decimals, in both engines, and in double precision.

    Any input of a window with the largest lower bound gives a plane below, and in sparse networks several have it: where
    all that a convolution adds to its bias can be 0 and not less, the lower bound is the bias, at each place of a window.
    Engines round such bounds differently, the last bit picks the plane, and the results are sound but percents apart.
    """
    pool = F.max_pool2d

    def pool_rounded(x, *args, return_indices=False, **kwargs):
        if not return_indices:
            return pool(x, *args, **kwargs)
        best = pool(x.round(decimals=9), *args, return_indices=True, **kwargs)[1]
        return x.flatten(2).gather(2, best.flatten(2)).view_as(best), best

    monkeypatch.setattr(F, "max_pool2d", pool_rounded)
    torch.set_default_dtype(torch.float64)  # auto_LiRPA 0.3 pools in the default precision


def assert_equal_engines(name: str, methods: tuple[str, ...], sparsity: float) -> None:
    """Of margins at every sparsity, of logits, which have the same bounds before the last layer, at one."""
    assert max(differences(masked(name, sparsity, 0).double(), side(name), methods, logits=sparsity == 0.9).values()) < 1e-8


ALL_SPARSITIES = ("mlp", "cnn4", "cnn5_bn", "resnet5")  # the others have 0.0 and 0.99 in `make slow`


@pytest.mark.parametrize(("name", "sparsity"), [
    pytest.param(name, sparsity, marks=() if sparsity == 0.9 or name in ALL_SPARSITIES else pytest.mark.slow)
    for name in MODELS if not name.startswith(DEEP) for sparsity in (0.0, 0.9, 0.99)])
def test_every_method_on_every_model(name, sparsity):
    assert_equal_engines(name, METHODS, sparsity)


@pytest.mark.usefixtures("ties_broken_alike")
@pytest.mark.parametrize(("name", "sparsity"), [
    pytest.param(name, sparsity, marks=() if sparsity == 0.9 and name in ("resnet18_bn", "vgg11_bn", "wrn22_2_bn") else pytest.mark.slow)
    for name in MODELS if name.startswith(DEEP) for sparsity in (0.0, 0.9)])
def test_one_pass_over_the_deepest_models(name, sparsity):
    assert_equal_engines(name, ("ibp", "crown_ibp"), sparsity)


@pytest.mark.usefixtures("ties_broken_alike")
@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(DEEP)])
def test_full_crown_on_the_deepest_models(name, sparsity):
    assert_equal_engines(name, ("crown",), sparsity)


class Gaps(nn.Module):
    """The maximum of two numbers minus each of them, for images (1, 1, 2)."""

    def __init__(self):
        super().__init__()
        self.pool, self.twice, self.each = nn.MaxPool2d((1, 2)), nn.Linear(1, 2), nn.Linear(2, 2, bias=False)
        self.twice.weight.data, self.twice.bias.data, self.each.weight.data = torch.ones(2, 1), torch.zeros(2), torch.eye(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.pool(x).flatten(1)) - self.each(x.flatten(1))


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
@pytest.mark.parametrize(("second", "expected"), [(1.0, [0, -4]), (1 + 2**-20, [-1, 0]), (1 - 2**-20, [0, -4])])
def test_among_equal_lower_bounds_the_last_bit_picks_a_plane_and_no_choice_is_the_best(engine, second, expected):
    """max(a, b) >= a bounds max - a by 0 and max - b by min a - max b; max(a, b) >= b does the reverse."""
    lower, upper = torch.tensor([[[[1.0, second]]]]), torch.tensor([[[[2.0, 5.0]]]])
    lb, _ = bounds(Gaps(), lower, upper, "crown", engine=engine)
    torch.testing.assert_close(lb, torch.tensor([expected]).float(), atol=1e-5, rtol=0)
