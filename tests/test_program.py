"""What is read is what runs: hooks, in-place operations, aliases, flags, wrappers; and what cannot be read is refused."""
import copy
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from sparselab.program import LastReading, Unreadable, read, run, structure
from sparselab.robust.bounds import METHODS, bounds
from sparselab.robust.boxes import input_box, margin_matrix
from sparselab.robust.ibp import interval_pass, recorded_statistics
from sparselab.robust.neurons import stability
from sparselab.robust.verification import verify
from sparselab.sparse.sparsify import sparsify


class Net(nn.Module):
    """Linear, something of the test's, Linear."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.relu, self.last, self.middle = nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3), middle
        self.scale, self.twice, self.table = 1.0, False, {"factor": 1.0}
        self.plain = torch.ones(8)
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x):
        return self.last(self.middle(self, self.first(x)))


def agree(net, method="crown"):
    """Bounds of a box hold at many points, and those of a point are the output."""
    lower = torch.rand(5, 4)
    upper = lower + 0.2
    with torch.no_grad():
        lb, ub = bounds(net, lower, upper, method)
        for share in (0, 1, *torch.rand(200, 5, 4), *torch.rand(200, 5, 4).round()):
            y = net(lower + share * (upper - lower))
            assert ((lb <= y + 1e-5) & (y <= ub + 1e-5)).all()
        for end in bounds(net, lower, lower, method):
            torch.testing.assert_close(end, net(lower))


def _zeroed_column(self, h):
    h[:, 0].zero_()
    return h


def _through_a_view(self, h):
    h.view(-1, 2, 4)[:, 1].mul_(-3)
    return h


def _transposed(self, h):
    h.t().add_(torch.arange(8.0).view(8, 1))
    return h


def _both_names(self, h):
    other = h
    h += 1
    return other * 2


def _into_out(self, h):
    out = torch.empty_like(h)
    torch.mul(h, 3, out=out)
    return out


def _data(self, h):
    h.data = h.data * 3
    return h


def _unused(name, *args):
    def middle(self, h):
        getattr(h, name)(*args)
        return h

    middle.__name__ = f"unused_{name}"
    return middle


def _relu_module(self, h):
    self.relu(h)
    return h


def _functional(self, h):
    F.leaky_relu(h, 0.2, inplace=True)
    return h


def _tuple(self, h):
    parts = {"a": h.chunk(2, 1), "b": [h]}
    return torch.cat([*parts["a"][::-1]], 1) + parts["b"][0]


def _loop(self, h):
    for _ in range(3):
        h = F.relu_(h - 0.1)
    return h


IN_PLACE = [_zeroed_column, _through_a_view, _both_names, _into_out, _data, _relu_module, _functional, _tuple, _loop,
            _unused("mul_", 5), _unused("add_", 5), _unused("clamp_", 0), _unused("tanh_"), _unused("relu_"),
            _unused("copy_", torch.ones(8)),
            _unused("masked_fill_", torch.arange(8) < 3, 0.5), _unused("neg_"), _unused("sigmoid_")]


@pytest.mark.parametrize("middle", IN_PLACE, ids=lambda f: f.__name__)
def test_in_place_operations_and_aliases_are_read(middle):
    agree(Net(middle))


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class ScaledConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 3 * weight, bias)


def _hook(net):
    net[1].register_forward_hook(lambda module, args, output: output * 3)


def _pre_hook(net):
    net[2].register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def _hook_of_the_model(net):
    net.register_forward_hook(lambda module, args, output: -output)


def _pruned(net):
    prune.l1_unstructured(net[0], "weight", 0.5)
    net[0].weight_orig.data.mul_(-3)


def _weight_norm(net):
    weight_norm(net[0])
    net[0].weight_g.data.mul_(4)


def _new_weight_norm(net):
    parametrizations.weight_norm(net[0])
    net[0].parametrizations.weight.original0.data.mul_(4)


def _spectral(net):
    spectral_norm(net[0])
    net.eval()
    net[0].weight_orig.data.mul_(4)


def _own_forward(net):
    net[0] = Scaled(4, 8)


def _instance_forward(net):
    plain = net[1].forward
    net[1].forward = lambda x: plain(x) * 2


def _own_convolution(net):
    net[0] = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), ScaledConv(1, 8, 2), nn.Flatten())


def _tied(net):
    net[0] = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    net[0][3].weight = net[0][2].weight


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [_hook, _pre_hook, _hook_of_the_model, _pruned, _weight_norm, _new_weight_norm, _spectral,
                                    _own_forward, _instance_forward, _own_convolution, _tied])
def test_whatever_changes_a_layer_is_read(change):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    change(net)
    agree(net.eval())


def test_a_global_hook_is_read():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, z: z * 3 if isinstance(m, nn.ReLU) else None)
    try:
        agree(net)
    finally:
        handle.remove()


FACTOR = 1.0


def _attribute(self, h):
    return h * self.scale


def _flag(self, h):
    return h * 5 if self.twice else h


def _entry(self, h):
    return h * self.table["factor"]


def _plain(self, h):
    return h * self.plain


def _buffer(self, h):
    return h + self.shift


def _number_of_buffer(self, h):
    return h + float(self.shift.sum())


def _global(self, h):
    return h * FACTOR


@pytest.mark.parametrize("middle", [_attribute, _flag, _entry, _plain, _buffer, _number_of_buffer, _global], ids=lambda f: f.__name__)
def test_what_changes_between_two_calls_is_read_again(middle, monkeypatch):
    net = Net(middle).eval()
    agree(net)
    net.scale, net.twice, net.plain = 4.0, True, torch.full((8,), 4.0)
    net.table["factor"] = 4.0
    net.shift.fill_(2.0)
    monkeypatch.setitem(globals(), "FACTOR", 4.0)
    agree(net)


def _asks(h):
    try:
        return bool((h > 0.5).all())
    except Exception:  # of the reading, which a model may catch
        return False


@pytest.mark.parametrize("ask", [_asks, lambda h: "0.6" in repr(h), lambda h: "0.6" in f"{h}", lambda h: "0.6" in str(h)],
                         ids=["caught", "repr", "format", "str"])
def test_a_model_that_looks_at_values_is_not_read_whatever_it_catches(ask):
    net = Net(lambda self, h: h * (1.0 + ask(h)))
    with pytest.raises(Unreadable):
        read(net, torch.rand(3, 4))


def test_a_training_loop_reads_again_when_something_has_changed():
    net, x, last = Net(_attribute), torch.rand(3, 4), LastReading()
    assert last(net, x)[1] and not last(net, x)[1]
    for change in (lambda: setattr(net, "scale", 2.0), lambda: setattr(net, "twice", True), lambda: net.table.update(factor=2.0),
                   lambda: net.eval(), lambda: setattr(net, "plain", torch.ones(8)), lambda: net.relu.register_forward_hook(_hook),
                   lambda: setattr(net, "first", nn.Linear(4, 8)), lambda: setattr(net.last, "weight", nn.Parameter(torch.rand(3, 8)))):
        change()
        assert last(net, x)[1] and not last(net, x)[1]
    with torch.no_grad():
        net.first.weight.mul_(2)
        net.shift.add_(1)
    assert not last(net, x)[1], "values may change"
    assert last(net, x[:2])[1], "another shape"
    other = Net(_number_of_buffer)
    assert last(other, x)[1] and last(other, x)[1], "a value that was read in Python may mean other operations"


@pytest.mark.parametrize(("middle", "said"), [
    (lambda self, h: h * 2 if h.sum() > 0 else h, "depends on the values"),
    (lambda self, h: h * h.max().item(), "depends on the values"),
    (lambda self, h: h[:, h[0] > 0], "depends on the values"),
    (lambda self, h: h * torch.rand(8), "random"),
    (lambda self, h: F.dropout(h, 0.5, True), r"call model.eval\(\) first"),
    (lambda self, h: torch.from_numpy(h.detach().numpy() * 2), "Tensor.numpy"),
    (lambda self, h: h + torch.tensor(h.tolist()), "Tensor.tolist"),
    (lambda self, h: h + torch.from_dlpack(h), "__dlpack__"),
    (lambda self, h: h * self.plain.add_(1), "neither a buffer nor its own"),
    (lambda self, h: F.pad(h.view(-1, 1, 2, 4), (1, 1, 0, 0), mode="circular"), "in place"),
    (lambda self, h: (h, h), "does not fit"),
    (lambda self, h: h[:, :5], "does not fit"),
    (lambda self, h: torch.ones(5, 8), "does not depend on its input"),
    (_unused("zero_"), "does not depend on its input"),
])
def test_what_is_no_list_of_operations_is_refused(middle, said):
    net, x = Net(middle), torch.rand(5, 4)
    state, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.raises(Unreadable, match=said):
        read(net, x)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(ValueError):
        bounds(net, torch.zeros(5, 4), torch.ones(5, 4))


def test_an_operation_across_the_batch_is_refused():
    for middle in (_transposed, lambda self, h: h - h.mean(0), lambda self, h: h.flip(0), lambda self, h: h.cumsum(0),
                   lambda self, h: h.roll(1, 0), lambda self, h: h[torch.tensor([1, 0, 2, 3, 4])], lambda self, h: h + h.mean()):
        with pytest.raises(ValueError, match="batch|no bound rule"):
            bounds(Net(middle), torch.zeros(5, 4), torch.ones(5, 4))


class Apart(nn.Module):
    """Two index tensors that are not neighbours put what they pick in front of the batch."""

    def __init__(self):
        super().__init__()
        self.fc, self.i, self.j = nn.Linear(6, 3), torch.tensor([0, 1]), torch.tensor([1, 0])

    def forward(self, x):
        return self.fc(x.view(-1, 2, 3, 2)[:, self.i, :, self.j].flatten(1))


def test_what_one_sample_gets_from_another_is_never_proved():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 3)

        def forward(self, x):
            return self.fc(x - x.mean(0))

    class Sized(Centred):
        def forward(self, x):
            return self.fc(x) * (1 if len(x) > 1 else -1)

    for net in (Apart(), Centred(), Sized()):
        x = torch.rand(2, 12)
        for engine in ("native", "auto_lirpa"):
            for method in METHODS:
                with pytest.raises(ValueError):
                    bounds(net, x, x + 0.1, method, engine=engine)
            with pytest.raises(ValueError):
                verify(net, x, net(x).argmax(1), 0.01, engine=engine)


def test_a_plain_tensor_that_is_changed_in_place_is_read_again():
    net, x = Net(_plain), torch.rand(3, 4)
    for engine in ("native", "auto_lirpa"):
        before = bounds(net, x, x + 0.1, engine=engine)[0]
        net.plain.mul_(3)
        after = bounds(net, x, x + 0.1, engine=engine)[0]
        assert not torch.equal(before, after)
    last = LastReading()
    looked = Net(lambda self, h: h * self.plain[0].item())
    assert last(looked, x)[1] and last(looked, x)[1], "the value of a constant was read in Python"


def test_rows_of_batch_and_tokens_are_no_output():
    class Rows(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(0, 1))

    with pytest.raises(Unreadable, match="batch must stay in front"):
        bounds(Rows(3, 2), torch.zeros(4, 2, 3), torch.ones(4, 2, 3))


def test_a_forward_that_python_makes_random_has_no_bounds():
    net = Net(lambda self, h: h * (1 + os.urandom(1)[0]))
    with pytest.raises(ValueError, match="not a fixed function of its input|depends on the others"):
        bounds(net, torch.zeros(5, 4), torch.ones(5, 4))
    with pytest.raises(ValueError, match="not a fixed function of its input|depends on the others"):
        verify(net, torch.rand(5, 4), torch.zeros(5, dtype=torch.int64), 0.1)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_dice_of_python_and_numpy_are_noticed_and_put_back(draw):
    net = Net(lambda self, h: h if draw() < 0.9 else -h)
    states = random.getstate(), np.random.get_state()[1].copy()
    for _ in range(10):
        with pytest.raises(Unreadable, match="random numbers from Python or NumPy"):
            read(net, torch.rand(2, 4))
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])


def test_an_output_that_depends_on_a_buffer_that_every_call_changes_is_refused():
    class Turning(Net):
        def forward(self, x):
            self.shift += 1
            return super().forward(x)

    net = Turning(_buffer).eval()
    with pytest.raises(Unreadable, match="depends on 'shift', which every call changes"):
        verify(net, torch.rand(2, 4), torch.zeros(2, dtype=torch.int64), 0.01)
    assert not net.shift.any()


def test_what_a_model_keeps_from_call_to_call_stays_plain():
    class Keeping(Net):
        def forward(self, x):
            if "grid" not in self.table:
                self.table["grid"] = torch.arange(8.0) * 2
            return super().forward(x)

    net, x = Keeping(lambda self, h: h + self.table["grid"]), torch.rand(2, 4)
    bounds(net, x, x + 0.1)
    verify(net, x, net(x).argmax(1), 0.01)
    assert net.table["grid"].tolist() == [2.0 * i for i in range(8)] and net(x).detach().numpy().shape == (2, 3)
    copy.deepcopy(net)


def test_eval_mode_is_what_the_model_makes_of_it():
    class Stubborn(Net):
        def train(self, mode=True):
            super().train(mode)
            self.twice = mode
            return self

    net, x = Stubborn(_flag).train(), torch.rand(20, 4)
    labels = copy.deepcopy(net).eval()(x).argmax(1)
    assert verify(net, x, labels, 1e-4).clean.all() and net.training and net.twice

    class Dicing(nn.Dropout):
        def train(self, mode=True):
            return super().train(True)

    with pytest.raises(Unreadable, match="random"):
        verify(nn.Sequential(nn.Linear(4, 8), Dicing(), nn.Linear(8, 3)), x, labels, 0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_refused():
    net = nn.Sequential(torch.jit.script(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(Unreadable, match="scripted"):
        bounds(net, torch.zeros(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="scripted"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "static", 0.5, 10)


def test_outputs_that_are_not_real_numbers_are_refused():
    for middle in (lambda self, h: h * 1j, lambda self, h: h > 0):
        net = Net(middle)
        net.last = nn.Identity()
        with pytest.raises(Unreadable, match="floating-point"):
            bounds(net, torch.zeros(2, 4), torch.ones(2, 4))


def test_a_model_that_returns_more_than_one_tensor_is_told_what_to_do():
    class Two(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    with pytest.raises(Unreadable, match=r"\(Two\) returns a dict: it must return one tensor"):
        read(Two(4, 3), torch.rand(2, 4))


def test_reading_leaves_the_model_as_it_was():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.calls, self.seen = nn.Linear(4, 3), nn.BatchNorm1d(3), 0, None
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n += 1
            self.calls, self.seen = self.calls + 1, x
            return self.norm(self.fc(x))

    net = Counting().train()
    state = copy.deepcopy(net.state_dict())
    read(net, torch.rand(5, 4))
    net.eval()
    bounds(net, torch.zeros(5, 4), torch.ones(5, 4))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert (net.calls, net.seen) == (0, None) and not net._forward_hooks


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, lambda net: nn.Sequential(net),
                                  lambda net: torch.compile(net, backend="eager")])
def test_wrapped_models_are_read(wrap):
    agree(wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).eval())


def test_a_model_that_returns_its_input_or_a_view_of_it():
    class Same(nn.Module):
        def forward(self, x):
            return x

    class First(nn.Module):
        def forward(self, x):
            return x[:, :3]

    lower = torch.rand(5, 4)
    for net, width in ((Same(), 4), (First(), 3), (nn.Identity(), 4), (nn.Flatten(), 4)):
        for method in METHODS:
            lb, ub = bounds(net, lower, lower + 1, method)
            torch.testing.assert_close(lb, lower[:, :width]), torch.testing.assert_close(ub, lower[:, :width] + 1)


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_norm_that_runs_twice_has_two_statistics(shared):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.BatchNorm1d(6)
            self.other = self.norm if shared else nn.BatchNorm1d(6)

        def forward(self, x):
            return self.c(self.other(self.b(self.norm(self.a(x)).relu())).relu())

    net, x = Twice().double().train(), torch.rand(16, 4, dtype=torch.float64)
    with recorded_statistics() as statistics:
        clean = net(x)
    assert len(statistics) == 2
    for end in interval_pass(net, x, x, statistics).output():
        torch.testing.assert_close(end, clean)
    with pytest.raises(ValueError, match=r"\(1 recorded, 2 needed\)"):
        interval_pass(net, x, x, statistics[:1])


def test_a_program_runs_with_the_weights_of_now_and_keeps_no_gradient():
    net, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval(), torch.rand(2, 1, 4, 4)
    program = read(net, x)
    assert not program.value.requires_grad and program.steady
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    torch.testing.assert_close(run(program, net, x), net(x))


def test_a_class_that_is_patched_is_another_structure(monkeypatch):
    """The method of a class is no attribute of the module; a reading that is kept must not outlive it."""
    net, x, reading = Net(_attribute).eval(), torch.rand(2, 4), LastReading()
    reading(net, x)
    assert not reading(net, x)[1]
    for patched in (lambda self, x: -self.first(x), lambda self, x: self.first(x)):  # the second may lie where the first lay
        monkeypatch.setattr(Net, "forward", patched)
        program, new = reading(net, x)
        assert new and torch.equal(program.value, net(x))


def test_structure_does_not_look_at_values():
    net = Net(_attribute)
    before = structure(net)
    with torch.no_grad():
        net.first.weight.zero_()
    assert structure(net) == before


NONSENSE = {
    "a list as C": (lambda net, x: bounds(net, x, x, C=[[1, 0, -1]]), "C is a list, but a tensor is needed"),
    "an array as C": (lambda net, x: bounds(net, x, x, C=np.eye(3)), "C is a ndarray"),
    "C without rows": (lambda net, x: bounds(net, x, x, C=torch.ones(1, 0, 3)), r"C has shape \(1, 0, 3\)"),
    "C without rows for the other engine": (lambda net, x: bounds(net, x, x, C=torch.ones(1, 0, 3), engine="auto_lirpa"), r"C has shape \(1, 0, 3\)"),
    "C of two dimensions for the other engine": (lambda net, x: bounds(net, x, x, C=torch.eye(3), engine="auto_lirpa"), r"C has shape \(3, 3\)"),
    "C without values": (lambda net, x: bounds(net, x, x, C=torch.ones(1, 1, 3, device="meta")), "C is on the device 'meta'"),
    "C with NaN": (lambda net, x: bounds(net, x, x, C=torch.full((1, 1, 3), torch.nan)), "C holds complex, NaN or infinite values"),
    "a box without values": (lambda net, x: bounds(net, x.to("meta"), x.to("meta")), "lower is on the device 'meta'"),
    "a sparse box": (lambda net, x: bounds(net, x, x.to_sparse()), "upper is not a dense tensor, but torch.sparse_coo"),
    "a list as box": (lambda net, x: bounds(net, [0.0], [1.0]), "The ends of a box are tensors, not list and list"),
    "a function as model": (lambda net, x: bounds(torch.relu, x, x), "The model is a builtin_function_or_method"),
    "a number as program": (lambda net, x: bounds(net, x, x, program=3), "program is a int"),
    "a list as images": (lambda net, x: input_box([0.5], 0.1), "x is a list"),
    "a half class": (lambda net, x: margin_matrix(torch.zeros(2, dtype=torch.long), 2.5), "at least 2 classes, not 2.5"),
    "a list as labels": (lambda net, x: margin_matrix([0, 1], 3), "labels is a list"),
    "a list as box of stability": (lambda net, x: stability(net, [0.0], [1.0]), "lower is a list"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_answered_by_a_sentence(name):
    ask, said = NONSENSE[name]
    with pytest.raises(ValueError, match=said):
        ask(nn.Linear(4, 3), torch.rand(2, 4))


def test_a_default_device_without_values_is_refused():
    net, x, y = nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1])
    torch.set_default_device("meta")
    try:
        for ask in (lambda: bounds(net, x, x), lambda: verify(net, x, y, 0.1)):
            with pytest.raises(ValueError, match="default device of torch is 'meta'"):
                ask()
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("method", METHODS)
def test_a_detach_inside_the_model_does_not_stop_the_gradient_of_a_bound(method):
    """As the docstring of `bounds` says: the gradient is that of the function which the model computes."""
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            with torch.no_grad():
                h = self.first(x).detach()
            return self.last(h.relu())

    torch.manual_seed(0)
    net, x = Detached(), torch.rand(5, 4)
    plain = nn.Sequential(net.first, nn.ReLU(), net.last)
    found, expected = (torch.autograd.grad(bounds(m, x - 0.1, x + 0.1, method)[0].sum(), net.first.weight)[0] for m in (net, plain))
    assert expected.any() and torch.equal(found, expected)


def test_the_table_in_the_readme_is_that_of_the_engines():
    from pathlib import Path

    from sparselab.robust.bounds import engine_table

    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    assert readme.split("<!-- engines -->")[1].split("<!-- end of engines -->")[0].strip() == engine_table()
