"""The zoo: every model on every image size, the literature's weight counts, traceable graphs, initialisation."""
import math
import operator
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from sparselab.learn.assembly import Start, make_learner
from sparselab.learn.config import Config
from sparselab.learn.init import ibp_init_
from sparselab.learn.models import MODELS, Normalize, build, summary
from sparselab.sparse.masks import prunable

SHAPES = [(1, 28, 28), (3, 32, 32), (2, 40, 24)]
MEAN_STD = {1: ((0.1307,), (0.3081,)), 2: ((0.2, 0.3), (0.4, 0.5)), 3: ((0.49, 0.48, 0.44), (0.25, 0.24, 0.26))}


def narrow(name):
    """Options that make the model small enough to test."""
    small = {"width": 2, "widths": [9, 8, 7], "hidden": [8] * len(MODELS[name].options.get("hidden", ()))}
    return {key: small[key] for key in MODELS[name].options}


def relus(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.ReLU)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_every_image(name, shape):
    model = build(name, shape, 7, *MEAN_STD[shape[0]], **narrow(name))
    x = torch.rand(3, *shape)
    assert model(x).shape == (3, 7) and isinstance(model[0], Normalize) and isinstance(model[-1], nn.Linear)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(type(m).__module__.startswith(("torch.nn", "sparselab.learn")) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_traced_and_uses_each_module_once(name):
    model = build(name, (3, 32, 32), 10, *MEAN_STD[3], **narrow(name)).eval()
    traced = fx.symbolic_trace(model)
    x = torch.rand(2, 3, 32, 32)
    before = x.clone()
    assert torch.equal(traced(x), model(x)) and torch.equal(x, before)  # no layer works in place on its input
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called)) and relus(model) <= set(called)
    functions = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert functions <= {operator.add, torch.nn.functional.batch_norm} and not any(
        node.op == "call_method" for node in traced.graph.nodes)
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_name_tells_whether_there_is_batchnorm(name):
    model = build(name, (3, 32, 32), **narrow(name))
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert bool(norms) == ("_bn" in name) and "normalize" not in dict(model.named_children())
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all((conv.bias is None) == bool(norms) for conv in convs)
    assert model[-1].bias is not None and all(
        (layer.bias is None) == (name.startswith(("cnn", "ctbench")) and "_bn" in name and "_conv" not in name)
        for layer in model if isinstance(layer, nn.Linear) and layer is not model[-1])


def test_batchnorm_stands_where_the_papers_put_it():
    def kinds(name):
        layers = build(name, width=4, hidden=[8])
        return " ".join(n.rstrip("0123456789") for n, _ in layers.named_children())

    conv = "conv bn relu "
    assert kinds("cnn7_bn") == conv * 5 + "flatten fc bn relu fc"
    assert kinds("cnn7_bn_conv") == conv * 5 + "flatten fc relu fc"
    assert kinds("cnn7") == "conv relu " * 5 + "flatten fc relu fc"
    assert kinds("cnn5_bn") == conv * 3 + "flatten fc bn relu fc"


@pytest.mark.parametrize("name, shape, weights", [
    ("cnn4", (1, 28, 28), 166_248),
    ("cnn4", (3, 32, 32), 214_760),
    ("cnn7", (3, 32, 32), 17_189_568),
    ("cnn7_bn", (3, 32, 32), 17_189_568),
    ("lenet300", (1, 28, 28), 266_200),
    ("gowal_small", (1, 28, 28), 16 * 16 + 16 * 32 * 16 + 3200 * 100 + 1000),  # 28 -> 13 -> 10
    ("gowal_medium", (1, 28, 28), 288 + 16_384 + 18_432 + 65_536 + 64 * 16 * 512 + 512 * 512 + 5120),  # 26, 12, 10, 4
    ("crown_ibp_cnn", (3, 32, 32), 864 + 16_384 + 18_432 + 65_536 + 4096 * 512 + 512 * 512 + 5120),
    ("ctbench_cnn4", (3, 32, 32), 1200 + 8192 + 2048 * 512 + 5120),
    ("cnn5", (3, 32, 32), 1728 + 65_536 + 131_072 + 8192 * 512 + 5120),
    ("cnn7_bn_tiny", (3, 64, 64), 1728 + 36_864 + 73_728 + 2 * 147_456 + 32_768 * 512 + 5120),
])
def test_weights_are_those_of_the_literature(name, shape, weights):
    with torch.device("meta"):
        assert sum(w.numel() for w in prunable(build(name, shape)).values()) == weights


def test_the_summary_counts_what_is_built():
    rows = {row["name"]: row for row in summary((1, 28, 28), 10)}
    assert list(rows) == list(MODELS) and all(row["source"] for row in rows.values())
    for name in ("mlp", "cnn4", "resnet5_bn"):
        model = build(name)
        assert rows[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert rows[name]["relus"] == len(relus(model))
    assert {row["name"]: row["weights"] for row in summary((1, 8, 8))}["gowal_medium"] is None


def test_layers_have_names_that_a_report_can_use():
    assert list(dict(build("cnn4").named_children())) == "conv1 relu1 conv2 relu2 flatten fc1 relu3 fc2".split()
    assert relus(build("resnet5")) == {"relu1", "block1.branch.relu1", "block1.relu2", "block2.branch.relu1",
                                       "block2.relu2", "relu2"}


def test_the_same_seed_makes_the_same_model():
    def made(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build("cnn4").parameters()])

    assert torch.equal(made(3), made(3)) and not torch.equal(made(3), made(4))


def test_normalisation_is_exact_constant_and_part_of_the_model():
    model = build("cnn4", mean=(0.1307,), std=(0.3081,))
    assert "normalize.mean" in model.state_dict() and "normalize.mean" not in dict(model.named_parameters())
    x = torch.rand(4, 1, 28, 28)
    plain = build("cnn4")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("normalize")})
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), plain((x - 0.1307) / 0.3081))
    x = x.double()
    torch.testing.assert_close(model.double()(x), plain.double()((x - 0.1307) / 0.3081), rtol=1e-6, atol=1e-7)


def test_the_identity_is_left_out():
    for arguments in ({}, {"mean": (0.0,), "std": (1.0,)}):
        assert isinstance(build("cnn4", **arguments)[0], nn.Conv2d)
    assert isinstance(build("cnn4", mean=(0.0,), std=(0.5,))[0], Normalize)


@pytest.mark.parametrize("name, arguments, words", [
    ("cnn-4", {}, "no model called 'cnn-4'. Did you mean 'cnn4'?"),
    ("RESNET18", {}, "Did you mean 'resnet18'?"),
    (None, {}, "no model called None"),
    ("mlp", {"width": [3]}, "no option of model 'mlp' called 'width'. Did you mean 'widths'?"),
    ("mlp", {"widths": []}, None),
    ("mlp", {"widths": [64, 0]}, r"widths=\[64, 0\] of model 'mlp' must be a list of positive integers"),
    ("mlp", {"widths": "64"}, "widths='64' of model 'mlp' must be a list"),
    ("mlp", {"widths": [6.5]}, r"widths=\[6.5\]"),
    ("cnn7", {"width": True}, "width=True of model 'cnn7' must be a positive integer"),
    ("cnn7", {"width": -1}, "width=-1"),
    ("cnn4", {"classes": 1}, "classes=1 must be an integer of at least 2"),
    ("cnn4", {"classes": "ten"}, "classes='ten'"),
    ("cnn4", {"shape": (28, 28)}, r"shape=\(28, 28\) is not the shape of an image"),
    ("cnn4", {"mean": (0.5,)}, r"mean=\(0.5,\) and std=None need one number per channel \(1\)"),
    ("cnn4", {"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "one number per channel"),
    ("cnn4", {"mean": (0.5,), "std": (0.0,)}, r"std=\(0.0,\) must be positive"),
    ("cnn4", {"mean": (0.5,), "std": (float("nan"),)}, "must be positive"),
    ("gowal_medium", {"shape": (1, 8, 8)}, "too small for this model: 2x2 pixels are left of it when it reaches conv3"),
])
def test_what_cannot_be_built_is_refused_in_a_sentence(name, arguments, words):
    if words is None:  # no hidden layer: a linear classifier
        assert [type(m) for m in build(name, **arguments)] == [nn.Flatten, nn.Linear]
        return
    with pytest.raises(ValueError, match=words):
        build(name, **arguments)


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_image_works_or_is_refused(name):
    for shape in ((1, 1, 1), (3, 3, 5), (1, 8, 8)):
        try:
            model = build(name, shape, **narrow(name)).eval()
        except ValueError as error:
            assert "too small" in str(error) and str(shape) in str(error)
        else:
            assert model(torch.rand(2, *shape)).shape == (2, 10)


# IBP initialisation --------------------------------------------------------------------------------------------------

def scale(layer):
    """A layer's standard deviation in units of sqrt(2 pi) / fan_in."""
    return layer.weight.std().item() * layer.weight[0].numel() / math.sqrt(2 * math.pi)


AFTER_A_SUM = {"block2.branch.conv1", "block3.branch.conv1", "block3.shortcut.conv", "block4.branch.conv1", "fc1"}


@pytest.mark.parametrize("name, halved", [("cnn7_bn", set()), ("resnet9", AFTER_A_SUM), ("resnet9_bn", AFTER_A_SUM)])
def test_weights_after_an_addition_are_halved_and_no_others(name, halved):
    torch.manual_seed(0)
    model = build(name, (3, 32, 32), 10, *MEAN_STD[3], width=16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert ibp_init_(model, torch.zeros(2, 3, 32, 32)) is model
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer_name, layer in layers[:-1]:
        assert scale(layer) == pytest.approx(0.5 if layer_name in halved else 1.0, rel=0.15), layer_name
    weights = {f"{layer_name}.weight" for layer_name, _ in layers[:-1]}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == weights  # biases, BatchNorm, statistics and the last layer stay


class Sums(nn.Module):
    """One layer after each way of writing an addition, one after a product, and an output layer."""

    def __init__(self):
        super().__init__()
        for name in ("plus", "function", "method", "inplace", "assigned", "product", "last"):
            setattr(self, name, nn.Linear(100, 100))

    def forward(self, x):
        x = self.plus((x + x).relu())
        x = self.function(torch.relu(torch.add(x, 1)))
        x = self.method(x.add(x).flatten(1))
        y = x.clone()
        y += x
        x = self.assigned(y)
        x = self.inplace(x.clone().add_(x))
        return self.last(self.product(x * x))


def test_additions_are_recognised_however_they_are_written():
    torch.manual_seed(0)
    model = ibp_init_(Sums(), torch.rand(1, 100))
    halved = [name for name, layer in model.named_children() if scale(layer) < 0.75 and name != "last"]
    assert halved == ["plus", "function", "method", "inplace", "assigned"]


@pytest.mark.parametrize("name, shape", [("cnn7", (1, 16, 16)), ("gowal_medium", (1, 28, 28)), ("mlp", (1, 28, 28))])
def test_interval_radii_keep_their_order_only_with_ibp_init(name, shape):
    from sparselab.robust.ibp import interval_pass

    hidden = [128] * len(MODELS[name].options.get("hidden", ()))
    options = {"widths": [128] * 6} if name == "mlp" else {"width": 16, "hidden": hidden}
    x, ratio = torch.rand(4, *shape), {}
    for init in ("kaiming", "ibp"):
        model = build(name, shape, **options)
        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
        if init == "ibp":
            ibp_init_(model, x)
        with torch.no_grad():
            found = interval_pass(model.eval(), (x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1)).preactivations.values()
        radii = [((ub - lb) / 2).mean().item() for lb, ub in found]
        ratio[init] = radii[-1] / radii[0]
    assert 0.1 < ratio["ibp"] < 10 < 1000 < ratio["kaiming"]


@pytest.mark.parametrize("model", ["mlp", "cnn5_bn"])
def test_sparse_kaiming_is_kaiming_by_the_inputs_that_are_left(model):
    """Every row is that of the dense network times sqrt(inputs / active inputs); a given start is not touched, a dense one neither."""
    config = Config(model=model, method="static", sparsity=0.9, init="sparse_kaiming", objective="natural", eps=0.0, epochs=1, device="cpu")
    sparse, plain = make_learner(config), make_learner(replace(config, init="kaiming"))
    for name, mask in sparse.sparsifier.masks.items():
        rows, weight = (part.sparsifier.masks.weights[name].detach().flatten(1) for part in (plain, sparse))
        for row, scaled, kept in zip(rows, weight, mask.flatten(1), strict=True):
            assert torch.allclose(scaled, row * (len(row) / max(1, int(kept.sum()))) ** 0.5)
    given = make_learner(config, start=Start(plain.model.state_dict()))
    dense = [make_learner(replace(config, method="dense", sparsity=0.0, init=init)) for init in ("sparse_kaiming", "kaiming")]
    for one, other in ((given, plain), dense):
        assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items())
