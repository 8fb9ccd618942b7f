"""Attacks stay in the box, find the worst corner where it is known, and leave the model as they found it."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselab.robust.attacks import LOSSES, fgsm, pgd, survivors
from sparselab.robust.boxes import input_box
from sparselab.robust.modes import eval_mode, worst_margin


def mlp(inputs=6, classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))


def batch(model, n=64, inputs=6, seed=1):
    """Images in [0, 1], black and white ones among them, with the labels that the model gives them."""
    x = torch.rand(n, inputs, generator=torch.Generator().manual_seed(seed)).mul(1.4).sub(0.2).clamp(0, 1)
    return x, model(x).argmax(1)


@given(seed=st.integers(0, 10**6), eps=st.floats(1e-6, 2), size=st.floats(1e-6, 10), loss=st.sampled_from(list(LOSSES)))
@settings(max_examples=60, deadline=None)
def test_attacks_stay_in_the_box_of_the_bounds(seed, eps, size, loss):
    model = mlp(seed=seed)
    x, y = batch(model, seed=seed)
    lower, upper = input_box(x, eps)
    for points in (fgsm(model, x, y, eps), pgd(model, x, y, eps, steps=3, step_size=size, loss=loss)):
        assert (lower <= points).all() and (points <= upper).all()
        assert points.shape == x.shape and points.dtype == x.dtype


@pytest.mark.parametrize("loss", LOSSES)
def test_pgd_and_fgsm_find_the_worst_corner_of_a_linear_network(loss):
    linear = nn.Linear(30, 2)
    x, y = torch.rand(200, 30), torch.randint(0, 2, (200,))
    lower, upper = input_box(x, 0.07)
    w = linear.weight[y] - linear.weight[1 - y]
    exact = (w * torch.where(w > 0, lower, upper)).sum(1) + linear.bias[y] - linear.bias[1 - y]
    for points in (pgd(linear, x, y, 0.07, loss=loss), fgsm(linear, x, y, 0.07)):
        assert torch.allclose(worst_margin(linear(points), y), exact, atol=1e-6)


def test_pgd_comes_close_to_a_grid_search_in_two_dimensions():
    model = mlp(inputs=2, classes=3, seed=3)
    model[2].weight.data.mul_(50)  # margins as large as those of a trained network
    x, y = batch(model, n=20, inputs=2)
    lower, upper = input_box(x, 0.2)
    t = torch.linspace(0, 1, 201)
    grid = lower.unsqueeze(1) + torch.cartesian_prod(t, t) * (upper - lower).unsqueeze(1)
    worst = worst_margin(model(grid.flatten(0, 1)), y.repeat_interleave(201**2)).view(20, -1).amin(1)
    found = worst_margin(model(pgd(model, x, y, 0.2, steps=100, restarts=10)), y)
    fell, could = worst_margin(model(x), y) - found, worst_margin(model(x), y) - worst
    assert fell.sum() > 0.98 * could.sum()
    assert (found >= worst - 0.02 * could).all(), "by no more than the mesh of the grid"


@pytest.mark.parametrize("loss", LOSSES)
def test_never_better_than_the_image_and_more_restarts_never_worse(loss):
    model = mlp(seed=5)
    x, _ = batch(model)
    y = torch.randint(0, 4, (64,))  # most of them misclassified
    margins = [worst_margin(model(x), y)]
    margins += [worst_margin(model(pgd(model, x, y, 0.1, steps=4, restarts=r, loss=loss)), y) for r in (1, 2, 5)]
    for weaker, stronger in zip(margins, margins[1:], strict=False):
        assert (stronger <= weaker + 1e-6).all()
    assert margins[-1].sum() < margins[1].sum() < margins[0].sum()


def test_twenty_falling_steps_beat_a_hundred_short_ones():
    model = mlp(inputs=6, classes=4, seed=3)
    model[2].weight.data.mul_(50)
    x, y = batch(model, n=300)
    falling, short = (
        worst_margin(model(pgd(model, x, y, 0.2, **o)), y).mean() for o in ({}, {"steps": 100, "step_size": 0.005})
    )
    assert falling < short


def test_early_stop_breaks_the_same_samples_and_evaluates_fewer():
    model, seen = mlp(seed=7), []
    x, y = batch(model, n=300)
    model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    full = worst_margin(model(pgd(model, x, y, 0.08, restarts=3)), y) > 0
    everything = sum(seen)
    seen.clear()
    early = worst_margin(model(pgd(model, x, y, 0.08, restarts=3, early_stop=True)), y) > 0
    assert torch.equal(full, early) and 0 < full.sum() < 300
    assert sum(seen) < 0.8 * everything


def test_survivors_do_not_depend_on_the_order_of_evaluation_and_are_clean():
    model = mlp(seed=7)
    x, _ = batch(model, n=100)
    y = torch.randint(0, 4, (100,))
    left = survivors(model, x, y, 0.01, batch_size=100)
    assert not (left & (model(x).argmax(1) != y)).any() and left.any()
    assert torch.equal(left, worst_margin(model(pgd(model, x, y, 0.01)), y) > 0)
    assert torch.equal(survivors(model, x, y, 0.0, batch_size=7), model(x).argmax(1) == y)
    assert survivors(model, x[:0], y[:0], 0.1).shape == (0,)


def test_repeats_itself_and_draws_from_the_generator_it_is_given():
    model = mlp()
    x, y = batch(model)
    before = torch.get_rng_state()
    assert torch.equal(pgd(model, x, y, 0.1, steps=2), pgd(model, x, y, 0.1, steps=2))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not used"
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(*(pgd(model, x, y, 0.1, steps=2, generator=g) for g in generators))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    again = pgd(model, x, y, 0.1, steps=2, generator=generators[0])
    assert not torch.equal(again, pgd(model, x, y, 0.1, steps=2)), "another start"


def test_eps_zero_returns_the_image():
    model = mlp()
    x, y = batch(model)
    assert torch.equal(pgd(model, x, y, 0), x) and torch.equal(fgsm(model, x, y, 0), x)


class Messy(nn.Module):
    """BatchNorm, dropout, a frozen layer and a layer with a mode of its own."""

    def __init__(self):
        super().__init__()
        self.fc1, self.bn, self.drop, self.fc2 = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4)
        self.fc1.requires_grad_(False)
        self.train()
        self.drop.eval()

    def forward(self, x):
        return self.fc2(self.drop(F.relu(self.bn(self.fc1(x)))))


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize("grad", [True, False])
def test_leaves_the_model_as_it_was(attack, grad):
    model, fired = Messy(), []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.fc2.weight.grad = torch.ones(4, 16)
    model.fc2.weight.register_hook(lambda g: fired.append("hook"))
    model.fc2.weight.register_post_accumulate_grad_hook(lambda p: fired.append("post"))
    x, y = torch.rand(8, 6), torch.randint(0, 4, (8,))
    x.requires_grad_()
    with torch.set_grad_enabled(grad):
        points = attack(model, x, y, 0.1)
        assert torch.is_grad_enabled() == grad
    assert not points.requires_grad and x.grad is None and x.requires_grad and not fired
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in (model, model.fc1, model.bn, model.drop)] == [True, True, True, False]
    assert not model.fc1.weight.requires_grad and model.fc2.weight.requires_grad
    assert torch.equal(model.fc2.weight.grad, torch.ones(4, 16)) and model.bn.weight.grad is None


def test_modes_come_back_after_an_error():
    model = Messy()
    with pytest.raises(RuntimeError):
        pgd(model, torch.rand(8, 5), torch.zeros(8, dtype=torch.long), 0.1)
    assert model.bn.training and not model.drop.training
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert model.bn.training and not model.drop.training


LEGACY = """torch.set_float32_matmul_precision('high')
def read(): return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
"""
NEW = """matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
if not hasattr(matmul, 'fp32_precision'): raise SystemExit
matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = 'tf32', 'tf32', 'ieee'
def read(): return matmul.fp32_precision, conv.fp32_precision
"""


@pytest.mark.parametrize(("choose", "full"), [(LEGACY, ("highest", False)), (NEW, ("ieee", "ieee"))])
def test_precision_is_full_inside_and_comes_back_after_an_error(choose, full):
    """Either way to choose TF32 works; in a process of its own, since torch refuses a mix of both."""
    program = f"""
import torch
from sparselab.robust.modes import full_precision
{choose}
before = read()
try:
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision("cpu"):
            assert read() == {full!r} != before, read()
            assert not torch.is_autocast_enabled("cpu")
            raise KeyError
except KeyError:
    assert read() == before, read()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("attack", [fgsm, lambda *args: pgd(*args, loss="ce")])
def test_a_sure_network_is_still_attacked(attack):
    """With margins of hundreds, softmax rounds to 0 and 1 and cross-entropy has no gradient left."""
    linear = nn.Linear(20, 2)
    linear.weight.data.mul_(1e4)
    x = torch.rand(50, 20)
    y = linear(x).argmax(1)
    assert not (F.softmax(linear(x), 1).amax(1) < 1).all()
    w = linear.weight[y] - linear.weight[1 - y]
    lower, upper = input_box(x, 0.01)
    exact = (w * torch.where(w > 0, lower, upper)).sum(1) + linear.bias[y] - linear.bias[1 - y]
    assert torch.allclose(worst_margin(linear(attack(linear, x, y, 0.01)), y), exact, rtol=1e-4, atol=0.1)


def test_nan_outputs_count_as_broken():
    class Spoiled(nn.Linear):
        def forward(self, x):
            return super().forward(x) / (x[:, :1] <= 0.5)  # infinite, and its differences NaN, where a pixel is bright

    model = Spoiled(3, 2)
    x = torch.full((4, 3), 0.4)
    y = model(x).argmax(1)
    assert survivors(model, x, y, 0.001).all() and not survivors(model, x, y, 0.3).any()
    assert worst_margin(torch.tensor([[float("nan"), 1.0]]), torch.tensor([0])).item() == -float("inf")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"restarts": True}, "restarts=True"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"step_size": float("nan")}, "step_size=nan"),
        ({"loss": "margins"}, "Did you mean 'margin'"),
        ({"eps": -0.1}, "eps is -0.1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"y": torch.zeros(4, dtype=torch.long)}, "5 images need 5 labels"),
        ({"y": torch.zeros(5)}, "torch.float32"),
        ({"x": torch.rand(5, 6) * 255}, r"pixels must be in \[0, 1\]"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(options, said):
    given = {"x": torch.rand(5, 6), "y": torch.zeros(5, dtype=torch.long), "eps": 0.1} | options
    with pytest.raises(ValueError, match=said):
        pgd(mlp(), **given)
