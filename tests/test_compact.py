"""compact: for networks of many forms, the same function as the masked network, with fewer parameters."""
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from sparselab.learn.models import build
from sparselab.sparse.channels import Channels, links
from sparselab.sparse.compaction import compact
from sparselab.sparse.masks import prunable
from sparselab.sparse.paths import effective
from sparselab.sparse.sparsify import sparsify


class Model(nn.Module):
    """Modules and parameters by name, and a function of them and the input."""

    def __init__(self, forward: Callable, **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2} | options)


def chain() -> nn.Module:
    return nn.Sequential(conv(2, 7), nn.BatchNorm2d(7), nn.ReLU(), nn.MaxPool2d(2), conv(7, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.Linear(54, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def functional() -> nn.Module:
    def run(m, x):
        return m.c(F.relu(m.b(F.max_pool2d(F.relu(m.a(x)), 2))).view(x.shape[0], -1))
    return Model(run, a=conv(2, 6), b=conv(6, 5), c=nn.Linear(45, 3))


def residual() -> nn.Module:
    def run(m, x):
        x = F.relu(m.stem(x))
        x = F.relu(m.bn2(m.c2(F.relu(m.bn1(m.c1(x))))) + x)
        x = F.relu(m.c4(F.relu(m.c3(x))) + m.short(x))
        return m.fc(F.avg_pool2d(x, 3).flatten(1))
    return Model(run, stem=conv(2, 6), c1=conv(6, 5), bn1=nn.BatchNorm2d(5), c2=conv(5, 6, bias=False), bn2=nn.BatchNorm2d(6), c3=conv(6, 4),
                 c4=conv(4, 7), short=conv(6, 7, 1), fc=nn.Linear(28, 3))


def concat() -> nn.Module:
    def run(m, x):
        for layer in (m.a, m.b):
            x = torch.cat([x, F.relu(layer(x))], 1)
        return m.c(F.max_pool2d(x, 2).flatten(1))
    return Model(run, a=conv(2, 5), b=conv(7, 4), c=nn.Linear(99, 3))


def gate() -> nn.Module:
    def run(m, x):
        x = F.relu(m.a(x))
        return m.c((x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))[:, :, None, None]).flatten(1))
    return Model(run, a=conv(2, 6), down=nn.Linear(6, 4), up=nn.Linear(4, 6), c=nn.Linear(216, 3))


def layer_used_twice() -> nn.Module:
    return Model(lambda m, x: m.c(F.relu(m.b(F.relu(m.b(F.relu(m.a(x)))))).flatten(1)), a=conv(2, 6), b=conv(6, 6), c=nn.Linear(216, 3))


def two_names() -> nn.Module:
    layer, act = nn.Linear(6, 6), nn.PReLU()
    return nn.Sequential(nn.Linear(7, 6), act, layer, act, layer, nn.Linear(6, 3))


def model_used_twice() -> nn.Module:
    body = nn.Sequential(nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.ReLU())
    return Model(lambda m, x: m.head(torch.cat([m.body(x), m.body(x.flip(1))], 1)), body=body, head=nn.Linear(10, 3))


def tied() -> nn.Module:
    def run(m, x):
        return m.c(F.relu(m.b(F.relu(m.a(F.relu(m.first(x)))))))
    model = Model(run, first=nn.Linear(7, 6), a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3))
    model.b.weight = model.a.weight
    return model


def autoencoder() -> nn.Module:
    return Model(lambda m, x: F.linear(F.softplus(m.a(x)), m.a.weight.t(), m.bias), a=nn.Linear(7, 6), bias=nn.Parameter(torch.rand(7)))


def depthwise() -> nn.Module:
    return nn.Sequential(conv(2, 6, 1), nn.ReLU(), conv(6, 6, groups=6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, 1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(180, 3))


def patches() -> nn.Module:
    return Model(lambda m, x: m.c(F.gelu(m.b(F.relu(m.a(x)).flatten(2).transpose(1, 2))).mean(1)), a=conv(2, 6, 2, stride=2, padding=0),
                 b=nn.Linear(6, 7), c=nn.Linear(7, 3))


def shortcut_by_padding() -> nn.Module:
    def run(m, x):
        x = F.relu(m.a(x))
        return m.fc(F.relu(m.b(x) + F.pad(x, (0, 0, 0, 0, 1, 1))).mean((2, 3)))
    return Model(run, a=conv(2, 4), b=conv(4, 6), fc=nn.Linear(6, 3))


def own_parameters() -> nn.Module:
    model = Model(lambda m, x: m.c(F.relu(m.a(x) * m.scale + m.shift).flatten(1)), a=conv(2, 6), scale=nn.Parameter(torch.rand(6, 1, 1) + 0.5),
                  c=nn.Linear(216, 3))
    model.register_buffer("shift", torch.rand(1, 6, 1, 1))
    return model


def attention() -> nn.Module:
    def run(m, x):
        return m.c(F.scaled_dot_product_attention(m.q(x), m.k(x), F.relu(m.v(x))).flatten(1))
    return Model(run, q=nn.Linear(5, 6), k=nn.Linear(5, 6), v=nn.Linear(5, 6), c=nn.Linear(24, 3))


def hooked() -> nn.Module:
    model = chain()
    model[4].register_forward_hook(lambda module, args, output: output.flip(1) * 2)
    model[9].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def mixer() -> nn.Module:
    def run(m, x):
        x = x + m.b(F.gelu(m.a(x.transpose(1, 2)))).transpose(1, 2)
        return m.c((x + m.e(F.gelu(m.d(x)))).mean(1))
    return Model(run, a=nn.Linear(4, 7), b=nn.Linear(7, 4), d=nn.Linear(5, 8), e=nn.Linear(8, 5), c=nn.Linear(5, 3))


def fresh(model: nn.Module) -> nn.Module:
    """A copy with weights of its own: the table below is built while pytest collects, before a test has set its seed."""
    model = deepcopy(model)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def lines(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: fresh(nn.Sequential(*layers))


def function(forward: Callable, **parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: fresh(Model(forward, **parts))


IMAGE, ROWS, TOKENS = (3, 2, 6, 6), (5, 7), (3, 4, 5)
# these lose parameters
SHRUNK: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (chain, IMAGE), "functional": (functional, IMAGE), "residual": (residual, IMAGE), "concat": (concat, IMAGE), "gate": (gate, IMAGE),
    "depthwise": (depthwise, IMAGE), "layer used twice": (layer_used_twice, IMAGE), "layer with two names": (two_names, ROWS), "tied": (tied, ROWS),
    "model used twice": (model_used_twice, ROWS), "autoencoder": (autoencoder, ROWS), "patches to tokens": (patches, IMAGE), "hooks": (hooked, IMAGE),
    "mixer": (mixer, TOKENS), "flipped": (function(lambda m, x: m.c(F.relu(m.a(x)).flip(1)), a=nn.Linear(7, 6), c=nn.Linear(6, 3)), ROWS),
    "where": (function(lambda m, x: m.c(torch.where(m.a(x) > 0, m.b(x), m.a(x))), a=nn.Linear(7, 6), b=nn.Linear(7, 6), c=nn.Linear(6, 3)), ROWS),
    "shortcut by padding": (shortcut_by_padding, IMAGE), "own parameters": (own_parameters, IMAGE),
    "without padding": (lines(conv(2, 7, padding=0), nn.Sigmoid(), conv(7, 5, padding=0, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
                        IMAGE),
    "in place": (lines(conv(2, 6), nn.BatchNorm2d(6), nn.ReLU(True), conv(6, 4), nn.ELU(inplace=True), nn.Flatten(), nn.Linear(144, 3)), IMAGE),
    "tokens, flatten": (lines(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 7), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)), TOKENS),
    "tokens without bias": (lines(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)), TOKENS),
    "conv, flatten(2)": (lines(conv(2, 6), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 4), nn.Flatten(), nn.Linear(24, 3)),
                         IMAGE),
    "batchnorm over time": (lines(nn.Linear(5, 6), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)),
                            TOKENS),
    "conv over time": (lines(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.AvgPool1d(2, 1), nn.Conv1d(6, 5, 1), nn.Softplus(), nn.Flatten(),
                             nn.Linear(10, 3)), TOKENS),
    "sum over itself": (function(lambda m, x: m.c(m.a(x) + F.relu(m.b(m.a(x)))), a=nn.Linear(7, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3)), ROWS),
    "transposed conv": (lines(conv(2, 6), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 3, 1),
                              nn.Flatten(), nn.Linear(432, 3)), IMAGE),
    "conv3d": (lines(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 5, (2, 3, 3)), nn.BatchNorm3d(5), nn.ReLU(), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(5, 4, 1),
                     nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), IMAGE),
    "channels last, flatten": (function(lambda m, x: m.c(F.relu(m.a(x)).permute(0, 2, 3, 1).reshape(len(x), -1)), a=conv(2, 6), c=nn.Linear(216, 3)),
                               IMAGE),
    "pixel slices": (function(lambda m, x: m.c(F.relu(m.a(x))[:, :, ::2, 1:].flatten(1)), a=conv(2, 6), c=nn.Linear(90, 3)), IMAGE),
    "adaptive pool": (lines(conv(2, 6), nn.Sigmoid(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.Sigmoid(), nn.Linear(5, 3)), IMAGE),
    "upsampling": (lines(conv(2, 6), nn.Tanh(), nn.Upsample(scale_factor=2), conv(6, 4, padding=0), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3)), IMAGE),
    "paddings": (lines(conv(2, 6), nn.ZeroPad2d(1), nn.Sigmoid(), nn.ReflectionPad2d(1), conv(6, 4, padding=0), nn.ConstantPad2d(1, 0.3), nn.ReLU(),
                       nn.Flatten(), nn.Linear(400, 3)), IMAGE),
    "padding modes": (lines(conv(2, 6, padding_mode="reflect"), nn.Sigmoid(), conv(6, 5, padding_mode="replicate"), nn.Sigmoid(),
                            conv(5, 4, padding_mode="reflect"), nn.Flatten(), nn.Linear(144, 3)), IMAGE),
    "prelu": (lines(conv(2, 6), nn.PReLU(6), conv(6, 5, 1), nn.PReLU(5), nn.Flatten(), nn.Linear(180, 3)), IMAGE),
    "instance norm": (lines(conv(2, 6), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), conv(6, 4), nn.Flatten(), nn.Linear(144, 3)), IMAGE),
    "no statistics": (lines(conv(2, 6), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)), IMAGE),
    "no scale": (lines(conv(2, 6), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)), IMAGE),
    "batchnorm first": (lines(nn.BatchNorm2d(2), conv(2, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 3, 1), nn.Flatten(), nn.Linear(108, 3)), IMAGE),
    "dilated, strided": (lines(conv(2, 6, stride=2), nn.GELU(), conv(6, 5, dilation=2, padding=2), nn.GELU(), nn.Flatten(), nn.Linear(45, 3)), IMAGE),
    **{type(act).__name__: (lines(nn.Linear(7, 8), act, nn.Linear(8, 6), act, nn.Linear(6, 3)), ROWS) for act in (
        nn.ReLU(), nn.LeakyReLU(0.2), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Hardtanh(), nn.Hardswish(),
        nn.Hardsigmoid(), nn.Mish(), nn.ReLU6(), nn.Threshold(0.1, 2.0), nn.SELU(), nn.Softsign(), nn.Dropout(0.3))},
}
# a part of each, or all, is not understood, and stays
KEPT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (attention, TOKENS), "one layer": (lambda: nn.Linear(7, 3), ROWS),
    "grouped": (lines(conv(2, 6), nn.ReLU(), conv(6, 4, groups=2), nn.ReLU(), conv(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3)), IMAGE),
    "multiplied channels": (lines(conv(2, 4), nn.ReLU(), conv(4, 8, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)), IMAGE),
    "slices": (function(lambda m, x: m.c(torch.cat([m.a(x)[:, :3], F.relu(m.a(x))[:, 2:]], 1)), a=nn.Linear(7, 6), c=nn.Linear(7, 3)), ROWS),
    "chunks": (function(lambda m, x: m.c(F.glu(m.a(x))), a=nn.Linear(7, 8), c=nn.Linear(4, 3)), ROWS),
    "norms over channels": (lines(conv(2, 6), nn.GroupNorm(2, 6), nn.ReLU(), conv(6, 4), nn.Flatten(), nn.Linear(144, 6), nn.LayerNorm(6),
                                  nn.Linear(6, 3)), IMAGE),
    "channel shuffle": (lines(conv(2, 6), nn.ChannelShuffle(3), nn.ReLU(), conv(6, 4), nn.PixelShuffle(2), conv(1, 4), nn.ReLU(), nn.Flatten(),
                              nn.Linear(576, 3)), IMAGE),
    "split channels": (function(lambda m, x: m.c(m.a(x).view(len(x), 2, 3).amax(1)), a=nn.Linear(7, 6), c=nn.Linear(3, 3)), ROWS),
    "softmax": (lines(nn.Linear(7, 6), nn.Softmax(1), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), ROWS),
    "sum of channels": (function(lambda m, x: F.relu(m.a(x)).sum(1, keepdim=True), a=nn.Linear(7, 6)), ROWS),
    "recurrent": (function(lambda m, x: m.c(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(5, 6, batch_first=True), c=nn.Linear(6, 3)), TOKENS),
    "parametrised": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(7, 6)), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(),
                                           nn.Linear(5, 3)), ROWS),
    "outer product": (function(lambda m, x: m.c((m.a(x)[:, :, None] * F.relu(m.b(x))[:, None]).flatten(1)), a=nn.Linear(7, 4), b=nn.Linear(7, 5),
                               c=nn.Linear(20, 3)), ROWS),
    "constants": (function(lambda m, x: m.c(F.relu(m.a(x)) + torch.linspace(0, 1, 6)), a=nn.Linear(7, 6), c=nn.Linear(6, 3)), ROWS),
    "rolled": (function(lambda m, x: m.c(F.relu(m.a(x)).roll(1, 1)), a=nn.Linear(7, 6), c=nn.Linear(6, 3)), ROWS),
    "index": (function(lambda m, x: m.c(F.relu(m.a(x))[:, [5, 4, 3, 2, 1, 0]]), a=nn.Linear(7, 6), c=nn.Linear(6, 3)), ROWS),
    "einsum": (function(lambda m, x: m.c(torch.einsum("bi,oi->bo", F.relu(m.a(x)), m.b.weight)), a=nn.Linear(7, 6), b=nn.Linear(6, 5),
                        c=nn.Linear(5, 3)), ROWS),
    "log sigmoid": (lines(nn.Linear(7, 6), nn.LogSigmoid(), nn.Linear(6, 3)), ROWS),
    "tokens stacked": (function(lambda m, x: m.c(torch.stack([m.a(x), F.relu(m.b(x))], 1)).flatten(1), a=nn.Linear(7, 6), b=nn.Linear(7, 6),
                                c=nn.Linear(6, 3)), ROWS),
}


def masked(form: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A model with random weights and statistics, of which some rows, some columns and some single weights are pruned."""
    torch.manual_seed(seed)
    create, shape = (SHRUNK | KEPT)[form]
    return prune(create()), torch.randn(shape)


@torch.no_grad()
def prune(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, _NormBase):
            for value in filter(torch.is_tensor, (module.weight, module.bias, module.running_mean, module.running_var)):
                value.copy_(torch.rand(len(value)) + 0.1)
            if module.affine:
                module.weight[torch.rand(len(module.weight)) < 0.1] = 0
    for weight in prunable(model).values():
        weight.mul_(torch.rand(weight.shape) < 0.8)
        rows, columns = torch.rand(len(weight)) < 0.25, torch.rand(weight.shape[1]) < 0.3
        pixels = next((n for n in (36, 9, 4) if weight.ndim == 2 and weight.shape[1] % n == 0 and weight.shape[1] > n), 1)
        columns = columns[:weight.shape[1] // pixels].repeat_interleave(pixels)  # whole channels, where there was a flattening
        weight.mul_((~rows).view(-1, *[1] * (weight.ndim - 1))).mul_((~columns).view(-1, *[1] * (weight.ndim - 2)))
    return model.eval()


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("first", [0, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", SHRUNK | KEPT)
def test_the_compact_network_is_the_same_function(form, first):
    smaller = []
    for seed in range(first, first + 10):
        model, x = masked(form, seed)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        small = compact(model, x)
        for _ in range(3):
            assert (small(x) - model(x)).abs().max() <= 1e-5, seed
            x = torch.randn(x.shape) * 2
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model itself has changed"
        assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
        smaller.append(size(small) < size(model))
        assert size(small) <= size(model)
    assert sum(smaller) >= 4 or form in KEPT, f"{sum(smaller)} of 10 were smaller"


def test_a_chain_keeps_exactly_the_weights_on_paths_from_input_to_output():
    checked = 0
    for seed in range(40):
        torch.manual_seed(seed)
        act = [nn.Sigmoid(), nn.ReLU(), nn.Softplus()][seed % 3]
        model = prune(nn.Sequential(nn.Linear(7, 9), act, nn.Linear(9, 8), act, nn.Linear(8, 6), act, nn.Linear(6, 3)))
        on_path = effective(model, {name: weight != 0 for name, weight in prunable(model).items()}, (7,))
        units = [int(mask.any(1).sum()) for mask in on_path.values()][:-1]
        if min(units) > 0:  # else one unit of the layer is left
            small, checked = compact(model, torch.randn(2, 7)), checked + 1
            assert [len(weight) for weight in prunable(small).values()][:-1] == units, seed
            for (name, weight), mask in zip(prunable(small).items(), on_path.values(), strict=True):
                assert torch.equal(weight[weight != 0], prunable(model)[name][mask]), name
    assert checked >= 20


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name.removesuffix(".weight"): tuple(weight.shape[:2]) for name, weight in prunable(model).items()}


@torch.no_grad()
def without(form: str, rows: dict[str, list[int]], columns: dict[str, list[int]]) -> tuple[nn.Module, Tensor]:
    """The model with these rows and columns of its weights pruned, and no others."""
    torch.manual_seed(0)
    model, x = SHRUNK[form][0]().eval(), torch.randn(SHRUNK[form][1])
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.running_mean.uniform_(0.1, 1)
            module.bias.uniform_(0.1, 1)
    for name, gone in rows.items():
        model.get_parameter(f"{name}.weight")[gone] = 0
    for name, gone in columns.items():
        model.get_parameter(f"{name}.weight")[:, gone] = 0
    return model, x


@pytest.mark.parametrize(("form", "rows", "columns", "expected"), [
    # nobody reads channel 2 of the first layer
    ("chain", {}, {"4": [2]}, {"0": (6, 2), "4": (6, 6), "9": (8, 54), "12": (3, 8)}),
    # nor channel 1 of the second, of nine pixels each; the third reads the first no more
    ("chain", {}, {"9": [*range(9, 18)]}, {"0": (7, 2), "4": (5, 7), "9": (8, 45), "12": (3, 8)}),
    ("functional", {}, {"c": [*range(18)]}, {"a": (6, 2), "b": (3, 6), "c": (3, 27)}),
    # dead, and constants that are not 0: the bias of the next layer takes them where there is no padding
    ("chain", {"9": [0, 5]}, {}, {"0": (7, 2), "4": (6, 7), "9": (6, 54), "12": (3, 6)}),
    ("chain", {"0": [3]}, {}, {"0": (7, 2), "4": (6, 7), "9": (8, 54), "12": (3, 8)}),
    ("without padding", {"0": [3]}, {}, {"0": (6, 2), "2": (5, 6), "5": (3, 20)}),
    ("tokens without bias", {"0": [1]}, {}, {"0": (5, 5), "2": (7, 5), "4": (3, 7)}),
    # both summands, or none: channel 0 of the first sum has two makers and three readers
    ("residual", {}, {"c1": [0], "c3": [0], "short": [0]},
     {"stem": (5, 2), "c1": (5, 5), "c2": (5, 5), "c3": (4, 5), "c4": (7, 4), "short": (7, 5), "fc": (3, 28)}),
    ("residual", {}, {"c1": [0], "c3": [0]}, None),
    ("residual", {"c2": [0], "stem": [1]}, {}, None),
    # channel 1 of a is column 1 + 2 of what follows
    ("concat", {}, {"b": [3], "c": [*range(27, 36)]}, {"a": (4, 2), "b": (4, 6), "c": (3, 90)}),
    ("concat", {}, {"b": [3]}, None),
    ("depthwise", {}, {"5": [1, 4]}, {"0": (4, 2), "2": (4, 1), "5": (5, 4), "8": (3, 180)}),
    ("tokens, flatten", {}, {"5": [t * 7 + 2 for t in range(4)]}, {"0": (6, 5), "2": (6, 6), "5": (3, 24)}),
    ("tokens, flatten", {}, {"5": [*range(7)]}, None),
    ("channels last, flatten", {}, {"c": [p * 6 + 2 for p in range(36)]}, {"a": (5, 2), "c": (3, 180)}),
    ("tied", {"a": [2]}, {"a": [2], "c": [2]}, {"first": (5, 7), "a": (5, 5), "c": (3, 5)}),
    ("autoencoder", {"a": [0, 3]}, {}, {"a": (4, 7)}),
    ("conv over time", {}, {"4": [0]}, {"0": (5, 4), "4": (5, 5), "7": (3, 10)}),
    ("transposed conv", {"5": []}, {"2": [1]}, {"0": (6, 2), "2": (6, 4), "5": (4, 3), "7": (3, 432)}),
])
def test_by_hand(form, rows, columns, expected):
    model, x = without(form, rows, columns)
    if form == "transposed conv":  # its weight is (inputs, outputs)
        model[5].weight.data[1] = 0
    small = compact(model, x)
    assert shapes(small) == (expected or shapes(model))
    assert torch.allclose(small(x), model(x), atol=1e-6)


@pytest.mark.parametrize(("forward", "sentence"), [
    (lambda m, x: m.c(F.relu(m.a(x)).view(-1, 216)), "took channels out of a, c.*does not run.*size written into it.*x.flatten"),
    (lambda m, x: m.c((F.relu(m.a(x)) / m.a(x).shape[1]).flatten(1)), "took channels out of a, c.*computes with the number of channels"),
    (lambda m, x: m.c(F.relu(F.conv2d(x, m.a.weight, m.a.bias, padding=1)).flatten(1)[:, None].view(-1, 6, 36).flatten(1)), "written into it"),
    (lambda m, x: m.c(F.relu(m.a(x)).flatten(1)) * float(x.sum()), "cannot be read"),
])
def test_what_cannot_be_compact_is_refused_in_a_sentence(forward, sentence):
    torch.manual_seed(0)
    model = Model(forward, a=conv(2, 6), c=nn.Linear(216, 3))
    with torch.no_grad():
        model.c.weight[:, 36:72] = 0
    with pytest.raises(ValueError, match=sentence):
        compact(model, torch.randn(IMAGE))


def test_modes_hooks_and_sharing_are_those_of_the_model():
    model, x = without("model used twice", {}, {"head": [1, 6]})
    model.train()
    model.body[0].weight.requires_grad_(False)
    small = compact(model, x)
    assert shapes(small) == {"body.0": (6, 7), "body.2": (4, 6), "head": (3, 8)}
    assert small.training and small.body[0].training and model.training and not small.body[0].weight.requires_grad
    assert (small.body[2].out_features, small.head.in_features) == (4, 8)
    model, x = without("tied", {"a": [2]}, {"a": [2], "c": [2]})
    small = compact(model, x)
    assert small.b.weight is small.a.weight and len(list(small.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["lenet300", "cnn5", "cnn7_bn", "resnet5_bn", "resnet20", "vgg11_bn", "wrn22_2_bn"])
def test_models_of_the_zoo(name):
    torch.manual_seed(0)
    model = build(name, (1, 16, 16), **{} if name == "lenet300" else {"width": 4})
    model = prune(model)
    x = torch.rand(2, 1, 16, 16)
    small = compact(model, x)
    assert size(small) < size(model)
    assert torch.allclose(small(x), model(x), atol=1e-5)


@pytest.mark.parametrize(("form", "sparsity"), [("chain", 0.3), ("residual", 0.3), ("in place", 0.3), ("conv over time", 0.3), ("hooks", 0.3),
                                                ("batchnorm first", 0.2), ("transposed conv", 0.06)])
def test_slimming_masks_the_channels_that_compact_takes_out(form, sparsity):
    torch.manual_seed(0)
    model, x = SHRUNK[form][0](), torch.randn(SHRUNK[form][1])
    optimizer = torch.optim.SGD(model.parameters(), 0.005)
    slimming = sparsify(model, optimizer, "slimming", sparsity, 6, penalty=1e-2, example=x)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        slimming.step()
    small = compact(model, x)
    assert sum(weight.numel() for weight in prunable(small).values()) == slimming.masks.nnz < slimming.masks.total
    assert torch.allclose(small.eval()(x), model.eval()(x), atol=1e-5)


def test_slimming_leaves_what_is_no_channel_of_one_layer():
    found = links(Channels.of(residual(), torch.randn(IMAGE)))
    assert [(link.producer, link.norm, list(link.readers)) for link in found] == [("c1", "bn1", ["c2"])], "a sum has two makers"
    model, shape = SHRUNK["batchnorm over time"][0](), TOKENS
    with pytest.raises(ValueError, match="none of 1 scales the channels that one layer makes"):
        sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "slimming", 0.5, 10, example=torch.randn(shape))
    model, shape = depthwise(), IMAGE
    with pytest.raises(ValueError, match="none of 3 scales the channels that one layer makes"):
        sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "slimming", 0.5, 10, example=torch.randn(shape))
