"""The native engine and auto_LiRPA give the same bounds: every method, every model of the zoo, dense and masked."""
import importlib.util
from statistics import median

import pytest
import torch
from torch import nn

from sparselab.learn.models import MODELS, build
from sparselab.robust.bounds import METHODS, bounds, input_box, margin_matrix
from sparselab.sparse.sparsify import sparsify

pytestmark = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")
DEEP = ("resnet32", "resnet56", "resnet18", "vgg")  # minutes under full CROWN: `make slow`


def narrow(name: str) -> dict:
    """Options that make a model small; its layers and how they are connected stay."""
    small = {"width": 4 if name.startswith("vgg") else 2, "widths": (12, 12), "hidden": (12,) * 2}
    return {key: small[key][:len(value)] if isinstance(value, tuple) else small[key]
            for key, value in MODELS[name].options.items()}


def side(name: str) -> int:
    return 32 if name.startswith(("vgg", "resnet18")) else 16


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


def differences(model: nn.Module, size: int, methods: tuple[str, ...]) -> dict:
    """The largest difference of the engines, relative to the largest bound, by method and whether margins are asked for."""
    x = torch.rand(2, 1, size, size).to(next(model.parameters()))
    box, C = input_box(x, 0.02), margin_matrix(torch.tensor([0, 3]), 5, x.dtype)
    found = {}
    with torch.no_grad():
        for method in methods:
            for rows in (C, None):
                ours, theirs = (torch.cat(bounds(model, *box, method, rows, engine)) for engine in ("native", "auto_lirpa"))
                found[method, rows is None] = float((ours - theirs).abs().max() / theirs.abs().max())
    return found


def assert_equal_engines(name: str, methods: tuple[str, ...], sparsity: float) -> None:
    """Equal to 1e-8 in double precision.

    auto_LiRPA 0.3 pools in single precision only, where rounding decides a near tie within a window and with it the
    relaxation that either engine may choose; so models with pooling must agree to 1e-4 in the median of three networks.
    """
    if not name.startswith("vgg"):
        assert max(differences(masked(name, sparsity, 0).double(), side(name), methods).values()) < 1e-8
        return
    each = [differences(masked(name, sparsity, seed), side(name), methods) for seed in range(3)]
    for key in each[0]:
        assert median(found[key] for found in each) < 1e-4, (key, each)


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(DEEP)])
def test_every_method_on_every_model(name, sparsity):
    assert_equal_engines(name, METHODS, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(DEEP)])
def test_one_pass_over_the_deepest_models(name, sparsity):
    assert_equal_engines(name, ("ibp", "crown_ibp"), sparsity)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(DEEP)])
def test_full_crown_on_the_deepest_models(name, sparsity):
    assert_equal_engines(name, ("crown",), sparsity)
