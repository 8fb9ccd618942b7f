"""A network unrolled on its nonzeros against the dense engine: outputs, gradients, bounds, proofs; with and without numba."""
import copy
import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import torch
from engine import Parts, machine, numba_or_not
from fuzzing import build as random_network
from torch import Tensor, nn

from sparselab.learn import Config, build, evaluate
from sparselab.learn.assembly import make_learner
from sparselab.learn.callbacks import Progress, Validate
from sparselab.learn.rows import Unsupported
from sparselab.learn.training import sample_margins, summarise
from sparselab.learn.unrolled import Unrolled
from sparselab.program import Unreadable
from sparselab.robust import METHODS, Contradiction, bounds, eval_mode, input_box, margin_matrix, survivors, verify
from sparselab.sparse import sparsify


def pools() -> nn.Module:
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AvgPool2d(2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.7)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 20), nn.ReLU(), nn.Linear(20, 10))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv1d(5, 4, 3, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 10), nn.ReLU())


MODELS = {"mlp": (1, 8, 8), "cnn4": (1, 8, 8), "ctbench_cnn4_bn": (1, 8, 8), "resnet5": (3, 8, 8), "resnet5_bn": (3, 8, 8), "parts": (2, 6, 6),
          "pools": (2, 9, 9), "tokens": (5, 6)}
OWN = {"parts": Parts, "pools": pools, "tokens": tokens}


def sparse_model(name: str, sparsity: float = 0.9, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = OWN[name]() if name in OWN else build(name, MODELS[name], 10)
    sparsify(model, torch.optim.Adam(model.parameters()), method="static", sparsity=sparsity, total_steps=10)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
        elif getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def check(ours, theirs, exact) -> None:
    """Bounds that differ no more from those in double precision than rounding explains."""
    for end, other, truth in zip(ours, theirs, exact, strict=True):
        room = 2e-5 * (1 + truth.abs().max()) + 4 * (other - truth).abs().max()
        assert torch.allclose(end.double(), truth, rtol=0, atol=float(room)), float((end - truth).abs().max() / room)


@cache
def dense_bounds(name: str) -> tuple[nn.Module, Tensor, list[tuple]]:
    """A model, images, and the dense engine's bounds, which need no numba, in both precisions: (box, method, C, float32, float64)."""
    model, found = sparse_model(name), []
    reference = copy.deepcopy(model).double()
    x, y = torch.rand(5, *MODELS[name]), torch.randint(0, 10, (5,))
    for method in METHODS:
        for eps in (0.0, 0.03, 0.2):
            for C in (margin_matrix(y, 10), None, torch.randn(5, 4, 10)):
                box = input_box(x, eps)
                with torch.no_grad():
                    theirs = bounds(model, *box, method, C)
                    exact = bounds(reference, *(end.double() for end in box), method, None if C is None else C.double())
                found.append((box, method, C, theirs, exact))
    return model, x, found


@numba_or_not
@pytest.mark.parametrize("name", MODELS)
def test_bounds_are_those_of_the_dense_engine(name, numba):
    model, x, found = dense_bounds(name)
    with machine(numba):
        net = Unrolled(model, x[:2])
        assert torch.allclose(net(x), model(x), atol=1e-4)
        for box, method, C, theirs, exact in found:
            check(net.bounds(*box, method, C), theirs, exact)


@numba_or_not
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_images_are_those_of_the_model(name, numba):
    model, x = sparse_model(name), torch.rand(7, *MODELS[name], requires_grad=True)
    weights = torch.randn(7, 10)
    with machine(numba):
        net = Unrolled(model, x.detach()[:2])
        again = net(x)  # another pass that is open at the same time
        (ours,) = torch.autograd.grad((net(x) * weights).sum(), x)
        (other,) = torch.autograd.grad((again * weights).sum(), x)
    (truth,) = torch.autograd.grad((model(x) * weights).sum(), x)
    assert torch.allclose(ours, truth, atol=1e-5) and torch.equal(ours, other)


@numba_or_not
def test_no_point_leaves_its_bounds(numba):
    for seed in range(6):
        name = ("cnn4", "resnet5", "parts")[seed % 3]
        model, x = sparse_model(name, (0.5, 0.95)[seed % 2], seed), torch.rand(9, *MODELS[name])
        lower, upper = input_box(x, 0.1)
        with machine(numba):
            found = [Unrolled(model, x[:2]).bounds(lower, upper, method) for method in METHODS]
        for _ in range(40):
            points = torch.where(torch.rand(x.shape) < 0.5, lower, upper) if seed % 2 else lower + torch.rand(x.shape) * (upper - lower)
            y = model(points)
            for lb, ub in found:
                assert (lb <= y + 1e-4).all() and (y <= ub + 1e-4).all()


def pruned(net: nn.Module, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.mul_((torch.rand(parameter.shape, generator=generator) < share).to(parameter))


@pytest.mark.parametrize("block", range(4))
def test_a_random_network_is_bounded_as_the_dense_engine_does_or_refused(block):
    done = 0
    for seed in range(50 * block, 50 * block + 50):
        net, x = random_network(seed, torch.float32)
        pruned(net, 0.4, seed)
        box = x - 0.03, x + 0.03
        with eval_mode(net):
            try:
                unrolled = Unrolled(net, x)
            except (Unsupported, Unreadable, ValueError):
                continue
            with torch.no_grad():
                theirs = [bounds(net, *box, method) for method in METHODS]
            ours = [unrolled.bounds(*box, method) for method in METHODS]
        if not all(end.isfinite().all() for pair in theirs for end in pair):
            continue
        done += 1
        for method, pair, other in zip(METHODS, ours, theirs, strict=True):
            for end, truth in zip(pair, other, strict=True):
                assert torch.allclose(end, truth, rtol=2e-3, atol=2e-3 * float(truth.abs().max()) + 1e-5), (seed, method)
    assert done >= 5


def test_what_is_not_finite_proves_nothing():
    model = sparse_model("mlp")
    x, last = torch.rand(3, 1, 8, 8), [m for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        last[0].weight[0, 0] = 3e38
        last[1].weight[:, 0] = 3e38
    net = Unrolled(model, torch.zeros(2, 1, 8, 8))
    for method in METHODS:
        lb, ub = net.bounds(*input_box(x, 0.1), method)
        assert (lb == -math.inf).all() and (ub == math.inf).all()
    with torch.no_grad():
        last[0].weight[0, 0] = math.nan
    with pytest.raises(Unsupported, match="not finite"):
        Unrolled(model, x)


def test_what_cannot_be_unrolled_is_refused_with_the_reason():
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(Unsupported, match="neither linear nor a ReLU"):
        Unrolled(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10)), x)
    with pytest.raises(Unsupported, match="float64"):
        Unrolled(sparse_model("mlp").double(), x.double())
    with pytest.raises(Unsupported, match="more than 20%"):
        Unrolled(sparse_model("cnn4", 0.5), x, most=0.2)
    net = Unrolled(sparse_model("mlp"), x)
    for call in (lambda: net(x[:, :, :4]), lambda: net.bounds(x.double(), x.double()), lambda: net.bounds(x, x, "ipb"),
                 lambda: net.bounds(x, x, "ibp", torch.zeros(2, 3, 4))):
        with pytest.raises(ValueError):
            call()


@numba_or_not
def test_pixels_that_nobody_reads_have_no_gradient_whatever_was_computed_before(numba):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.LeakyReLU(1.0), nn.Linear(3, 10))
    with torch.no_grad():
        model[1].weight[:, 1] = 0
    with machine(numba):
        net = Unrolled(model, torch.rand(2, 4))
        for B in (9, 1, 5, 0, 130):
            x = torch.rand(B, 4, requires_grad=True)
            (slope,) = torch.autograd.grad(net(x).sum(), x)
            (truth,) = torch.autograd.grad(model(x).sum(), x)
            assert torch.allclose(slope, truth, atol=1e-5) and (slope[:, 1] == 0).all()
            assert torch.allclose(net(x.detach()), model(x), atol=1e-5) and net(x.detach()).shape == (B, 10)
        assert len(net._free) < 5


def test_batches_of_any_size_give_the_same_bits():
    model = sparse_model("cnn4")
    x = torch.rand(300, 1, 8, 8)
    net = Unrolled(model, x[:2])
    whole = net(x)
    for size in (1, 7, 128):
        assert torch.equal(whole, torch.cat([net(part) for part in x.split(size)]))
    assert net(x[:0]).shape == (0, 10)
    box = input_box(x, 0.05)
    one, other = (net.bounds(*box, "crown") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name, shape", [("resnet5_bn", (3, 40, 40)), ("cnn4", (1, 28, 28)), ("resnet5", (3, 9, 9)), ("mlp", (1, 8, 8))])
def test_an_image_alone_has_the_bits_that_it_has_in_a_batch(name, shape):
    """Outputs and gradients: alone it is computed block by block, by vectors of its own neighbours."""
    torch.manual_seed(0)
    model, x = build(name, shape, 10).eval(), torch.rand(5, *shape, requires_grad=True)
    sparsify(model, torch.optim.Adam(model.parameters()), method="static", sparsity=0.9, total_steps=10)
    net, weights = Unrolled(model, x.detach()[:2]), torch.randn(5, 10)
    y = net(x)
    (g,) = torch.autograd.grad((y * weights).sum(), x)
    for i in range(len(x)):
        alone = x[i : i + 1].detach().requires_grad_()
        z = net(alone)
        assert torch.equal(z, y[i : i + 1]) and torch.equal(z, net(alone.detach()))
        (slope,) = torch.autograd.grad((z * weights[i]).sum(), alone)
        assert torch.equal(slope, g[i : i + 1])


class Sums(nn.Module):
    """Sums of what they alone read, of what others read too, of an input, with a factor, and at the end."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2, 2, 3, 1, 1) for _ in range(6))

    def forward(self, x):
        a, b, c, d, e, f = self.layers
        y = x + (a(x) + b(x))  # one place: all of it is read by sums alone
        z = torch.add(y.relu(), c(y), alpha=-0.5)  # c has a factor
        w = d(z)
        z = (w + z).relu() + w.relu()  # d is read twice
        return (e(z) + f(z)).flatten(1)


@numba_or_not
def test_a_layer_that_a_sum_alone_reads_has_no_place_and_the_same_bounds(numba):
    torch.manual_seed(0)
    model, x = Sums().eval(), torch.rand(4, 2, 5, 5)
    with machine(numba):
        net = Unrolled(model, x[:2])
        assert net.places.sources[1] == [0, 0, 0] and len(net.net.bias) == sum(map(math.prod, net.places.shapes))
        assert torch.allclose(net(x), model(x), atol=1e-5) and torch.allclose(net(x[:1]), model(x[:1]), atol=1e-5)
        reference = copy.deepcopy(model).double()
        for method in METHODS:
            box = input_box(x, 0.05)
            with torch.no_grad():
                theirs, exact = bounds(model, *box, method), bounds(reference, *(end.double() for end in box), method)
            check(net.bounds(*box, method), theirs, exact)


@numba_or_not
def test_verify_proves_the_same_by_an_unrolled_network(numba):
    model, x = sparse_model("cnn4", 0.5, seed=3), torch.rand(60, 1, 8, 8)
    y, eps = model(x).argmax(1), 0.05
    with machine(numba):
        net = Unrolled(model, x[:2])
        ours, left = verify(model, x, y, eps, engine=net), survivors(net, x, y, eps)
    theirs = verify(model, x, y, eps)
    assert 0 < int(theirs.verified.sum()) < 60 and ours.proved_by == theirs.proved_by
    assert torch.allclose(ours.margins, theirs.margins, atol=1e-5)
    assert torch.equal(left, survivors(model, x, y, eps))


class Gated(nn.Module):
    """A linear layer under a mask of bools, kept as a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mask", torch.arange(12).view(3, 4) % 2 == 0)

    def forward(self, x):
        return torch.relu(nn.functional.linear(x, self.linear.weight * self.mask, self.linear.bias))


@pytest.mark.parametrize("change", [
    lambda model: model.mask.fill_(True), lambda model: model.register_forward_hook(lambda module, given, output: 2 * output),
    lambda model: setattr(model, "forward", model.linear.forward)], ids=["buffer of bools", "hook", "forward"])
def test_a_network_that_was_unrolled_before_its_code_or_its_buffers_changed_proves_nothing(change):
    model, x = Gated().eval(), torch.rand(5, 4)
    net = Unrolled(model, x[:2])
    bounds(model.train(), *input_box(x, 0.01), engine=net), bounds(model.eval(), *input_box(x, 0.01), engine=net)
    one, other = pickle.loads(pickle.dumps((model, net)))  # as for another process
    bounds(one, *input_box(x, 0.01), engine=other)
    change(model)
    with pytest.raises(Contradiction, match="make an Unrolled of the model as it is now"):
        bounds(model, *input_box(x, 0.01), engine=net)


def test_a_network_that_was_unrolled_before_its_weights_changed_proves_nothing():
    model, x = sparse_model("mlp"), torch.rand(5, 1, 8, 8)
    net, y = Unrolled(model, x[:2]), model(x).argmax(1)
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.mul_(1.5)
    for ask in (lambda: bounds(model, *input_box(x, 0.01), engine=net), lambda: verify(model, x, y, 0.01, engine=net)):
        with pytest.raises(Contradiction):
            ask()
    closed = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():  # 0 for every x in [0, 1] at first; later the ReLU opens at x > .45, where no point of a small box is tried
        closed[0].weight.fill_(1), closed[0].bias.fill_(-2)
        closed[2].weight.copy_(torch.tensor([[-9.0], [9.0]])), closed[2].bias.copy_(torch.tensor([1.0, 0.0]))
    net = Unrolled(closed, torch.rand(2, 1))
    closed[0].bias.data.fill_(-0.45)
    with pytest.raises(Contradiction, match="make an Unrolled of the model as it is now"):
        bounds(closed, torch.tensor([[0.4]]), torch.tensor([[0.5]]), engine=net)
    norm = sparse_model("resnet5_bn")
    x = torch.rand(3, 3, 8, 8)
    net = Unrolled(norm, x)
    norm(x)  # counts no batch and moves no average in eval mode
    bounds(norm, *input_box(x, 0.01), engine=net)
    with pytest.raises(ValueError, match="model.eval"):
        bounds(norm.train(), *input_box(x, 0.01), engine=net)
    for nothing in (None, 3, "unrolled", torch.zeros(2)):
        with pytest.raises(ValueError, match="no bound engine"):
            bounds(norm.eval(), *input_box(x, 0.01), engine=nothing)


@numba_or_not
def test_what_a_run_evaluates_is_equal_on_the_nonzeros(numba, capsys):
    """Validate, margins over radii and the final evaluation of one trained network, by both kernels."""
    config = Config(dataset="digits", model="cnn4", epochs=2, batch_size=64, eps=0.05, train_samples=320, sparsity=0.9, method="rigl")
    learner = make_learner(config, callbacks=[Validate(0.05, kernels="sparse"), Progress()])
    found = {}
    with machine(numba):
        learner.on_nonzeros.kernels = "sparse"
        learner.fit()
        for kernels in ("dense", "sparse"):
            learner.row, validation, chosen = dict(learner.row), Validate(config.eps, kernels=kernels), replace(config, kernels=kernels)
            validation.after_epoch(learner)
            margins, summary = sample_margins(learner, chosen), summarise(learner, chosen)
            found[kernels] = learner.row, validation, margins, summary
    assert "Validation and proofs use" not in capsys.readouterr().out
    (row, validation, margins, summary), (other_row, other_validation, other_margins, other_summary) = found["dense"], found["sparse"]
    assert row == other_row and summary["accuracy"] == other_summary["accuracy"] and summary["verified_by"] == other_summary["verified_by"]
    assert list(validation.stability["layers"]) == list(other_validation.stability["layers"])
    for layer, shares in validation.stability["layers"].items():
        assert shares == pytest.approx(other_validation.stability["layers"][layer], abs=1e-3)
    same = (margins.attacks == other_margins.attacks).reshape(len(margins.attacks), -1).all(1)
    assert margins.lb.keys() == other_margins.lb.keys() and same.mean() > 0.9  # where rounding decides a sign, an attack goes another way
    for method, lb in margins.lb.items():
        assert torch.allclose(torch.from_numpy(lb), torch.from_numpy(other_margins.lb[method]), atol=1e-4), method


def test_a_model_that_cannot_be_unrolled_is_evaluated_densely_and_a_sentence_says_so(capsys):
    config = Config(dataset="digits", model="mlp", epochs=1, eps=0.05, train_samples=320, sparsity=0.5, kernels="auto")
    learner = make_learner(config, callbacks=[Validate(0.05, kernels="auto"), Progress()])
    learner.fit()
    assert re.search("Validation and proofs use all weights, zeros too, because the network has no faster form: 50% of its multiplications "
                     "have a nonzero weight, more than [0-9]+%, up to which skipping zeros saves time[.]\n", capsys.readouterr().out)
    for bad in ({"kernels": "fast"}, {"kernels": "Sparse"}):
        with pytest.raises(ValueError, match="kernels"):
            evaluate(learner.model, learner.data.test, 0.05, **bad)


def test_threads_that_share_an_unrolled_network_get_what_one_gets():
    model = sparse_model("cnn4")
    net, boxes = Unrolled(model, torch.rand(2, 1, 8, 8)), [input_box(torch.rand(40, 1, 8, 8), eps) for eps in (0.01, 0.05, 0.1, 0.2)]
    alone = [net.bounds(*box, "crown") for box in boxes]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for (lb, ub), found in zip(alone, pool.map(lambda box: net.bounds(*box, "crown"), boxes), strict=True):
                assert torch.equal(found[0], lb) and torch.equal(found[1], ub)


def test_what_is_no_box_or_no_layer_is_refused_by_a_sentence():
    net = Unrolled(sparse_model("mlp"), torch.rand(2, 1, 8, 8))
    lower, upper = input_box(torch.rand(5, 1, 8, 8), 0.1)
    for ends, said in (((upper, lower), "lower > upper"), ((lower, upper[:3]), "both need one shape"), ((lower * math.nan, upper), "NaN")):
        with pytest.raises(ValueError, match=said):
            net.bounds(*ends, "crown")
    with pytest.raises(Unsupported, match="no weights"):
        Unrolled(nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 2)), torch.rand(2, 4))


@numba_or_not
def test_neurons_as_wide_as_float32_are_bounded_soundly(numba):
    with machine(numba):
        model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            model[0].weight.fill_(2.15e38), model[0].bias.fill_(-1.15e38), model[2].weight.fill_(1e-38)
        lower, upper = torch.tensor([[-1.0]]), torch.tensor([[1.0]])  # -3.3e38 to 1e38 before the ReLU
        for method in METHODS:
            lb, ub = Unrolled(model, torch.rand(2, 1)).bounds(lower, upper, method)
            assert lb.item() <= 0 and ub.item() >= model(upper).item() * (1 - 1e-6)


@numba_or_not
def test_a_neuron_that_zeros_alone_read_is_not_forgotten_where_it_overflows(numba):
    """A dense network multiplies infinity by zero, and gives NaN."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).requires_grad_(False)
    model[0].weight[:], model[0].bias[:] = torch.tensor([[3.4e38, 3.4e38], [1.0, 0.0]]), 0.0
    model[2].weight[:], model[2].bias[:] = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])
    near, far = torch.full((2, 2), 0.4), torch.full((2, 2), 0.6)
    assert model(far).isnan().all()
    with machine(numba):
        net = Unrolled(model, near)
        torch.testing.assert_close(net(near), model(near))
        for x in (far, far[:1], far.clone().requires_grad_(), far * math.nan):
            with pytest.raises(ValueError, match="beyond the largest float32: call the model itself"):
                net(x)
        for method in METHODS:
            lb, ub = net.bounds(torch.stack([near[0], near[0]]), torch.stack([near[0], far[0]]), method)
            assert lb.isfinite().all(1).tolist() == ub.isfinite().all(1).tolist() == [True, False]
        with pytest.raises(Unsupported, match="beyond the largest float32"):
            Unrolled(model, far)
