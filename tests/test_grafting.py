"""Grafted networks: exact lines in every engine, sound bounds, the masks that the score promises, sparse training that is the dense one's."""
import copy
import importlib.util
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from engine import machine, numba_or_not
from torch import nn

from sparselab.learn import Config, Unrolled, build, corruption_accuracy, objective, train
from sparselab.learn.assembly import load_data, make_learner, trained_model
from sparselab.learn.data import to_float
from sparselab.learn.rows import Rows, Unsupported, certified
from sparselab.robust import bounds, eval_mode, graft, grafted_like, input_box, margin_matrix, stability, verify, written_out
from sparselab.robust.grafting import Grafted, neurons_to_graft, random_neurons, ranks, significance, sites
from sparselab.sparse import compact, sparsify

METHODS = ("ibp", "crown_ibp", "crown")
MODELS = {"mlp": (1, 8, 8), "cnn4": (1, 8, 8), "ctbench_cnn4_bn": (1, 8, 8), "resnet5_bn": (3, 8, 8)}
SMALL = dict(model="mlp", model_options={"widths": [24, 24]}, method="grafting", sparsity=0.8, objective="pgd", epochs=2, eps=0.02, test_samples=40,
             train_samples=200, device="cpu")


def lines(model: nn.Module) -> list[Grafted]:
    return [module for module in model.modules() if isinstance(module, Grafted)]


def grafted(name: str, share: float = 0.5, seed: int = 0, sparsity: float = 0.0, slope: float | None = 0.4) -> nn.Module:
    """A model with lines of random slopes, also negative ones, in a random share of its neurons."""
    torch.manual_seed(seed)
    model = build(name, MODELS[name], 10)
    if sparsity:
        sparsify(model, torch.optim.Adam(model.parameters()), method="static", sparsity=sparsity, total_steps=10)
    graft(model, random_neurons(sites(model, torch.rand(1, *MODELS[name])), share, torch.Generator().manual_seed(seed)), slope)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1), nn.init.uniform_(module.running_var, 0.5, 2)
    for module in lines(model) if slope is not None else ():
        nn.init.normal_(module.slope), nn.init.normal_(module.shift, std=0.2)
    return model


def by_formula(module: Grafted, z: torch.Tensor) -> torch.Tensor:
    on = module.keep == 0
    return torch.where(on, module.slope * z + module.shift, z.clamp(min=0))


def test_the_activation_is_its_formula_and_only_lines_learn():
    module = Grafted(torch.rand(3, 4, 4) < 0.5)
    nn.init.normal_(module.slope), nn.init.normal_(module.shift)
    z = torch.randn(6, 3, 4, 4)
    assert torch.allclose(module(z), by_formula(module, z), atol=1e-6)
    (module(z) * torch.randn(z.shape)).sum().backward()
    off = module.keep == 1
    assert module.slope.grad[off].count_nonzero() == module.shift.grad[off].count_nonzero() == 0
    assert (module.slope.grad[~off] != 0).all() and (module.shift.grad[~off] != 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_bounds_hold_on_100_000_points_and_grafted_neurons_are_settled(name):
    model = grafted(name).eval()
    x = torch.rand(4, *MODELS[name])
    lower, upper = input_box(x, 0.05)
    found = {method: bounds(model, lower, upper, method) for method in METHODS}
    with torch.no_grad():
        for _ in range(25):
            points = lower + (upper - lower) * torch.rand(1000, *lower.shape)
            y = model(points.flatten(0, 1)).view(1000, 4, 10)
            for method, (lb, ub) in found.items():
                assert bool((y >= lb - 1e-5).all() and (y <= ub + 1e-5).all()), method
    states = stability(model, lower, upper)
    for path, module in model.named_modules():
        if isinstance(module, Grafted):
            assert states[f"{path}.relu"].counts[(module.keep == 0).flatten(), 2].sum() == 0


@pytest.mark.parametrize("slope", [0.4, None])
@pytest.mark.parametrize("name", MODELS)
def test_bounds_are_those_of_auto_lirpa(name, slope):
    if importlib.util.find_spec("auto_LiRPA") is None:
        pytest.skip("auto_LiRPA is not installed")
    model = grafted(name, slope=slope).eval()
    x = torch.rand(2, *MODELS[name])
    for method in METHODS:
        with torch.no_grad():
            ours, theirs = (bounds(model, *input_box(x, 0.05), method, engine=engine) for engine in ("native", "auto_lirpa"))
        for end, other in zip(ours, theirs, strict=True):
            assert float((end - other).abs().max()) < 1e-4 * float(1 + other.abs().max()), method


def test_a_network_of_lines_has_the_bounds_of_its_affine_map():
    model = grafted("cnn4", share=1.0).double().eval()
    x = torch.rand(3, *MODELS["cnn4"], dtype=torch.float64)
    lower, upper = input_box(x, 0.1)
    J = torch.func.vmap(torch.func.jacrev(lambda image: model(image.unsqueeze(0))[0]))(x).flatten(2)
    middle, reach = model((lower + upper) / 2), (J.abs() @ ((upper - lower) / 2).flatten(1).unsqueeze(2)).squeeze(2)
    for method in ("crown_ibp", "crown"):
        lb, ub = bounds(model, lower, upper, method)
        assert torch.allclose(lb, middle - reach, atol=1e-9) and torch.allclose(ub, middle + reach, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_sparse_engine_is_exact(name):
    model = grafted(name, sparsity=0.9).eval()
    x, y = torch.rand(6, *MODELS[name]), torch.randint(0, 10, (6,))
    net, C = Unrolled(model, x[:2]), margin_matrix(y, 10)
    assert torch.allclose(net(x), model(x), atol=1e-5)
    for method in METHODS:
        for ours, theirs in zip(*(bounds(model, *input_box(x, 0.02), method, C, engine) for engine in (net, "native")), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4), method
    assert torch.equal(verify(model, x, y, 0.02, engine=net).verified, verify(model, x, y, 0.02).verified)


@numba_or_not
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_on_rows_are_those_of_the_dense_network(name, numba):
    model = grafted(name, sparsity=0.9).train()
    x, y, eps = torch.rand(6, *MODELS[name]), torch.randint(0, 10, (6,)), 0.001
    reference = copy.deepcopy(model).double()
    with machine(numba):
        net = Rows(model, x[:2])
        net.index({path: (weight != 0).numpy() for path, weight in model.named_parameters() if path in net.weights})
        flat = torch.from_numpy(net.values.flat).requires_grad_()
        z, lb = certified(net, flat, x, *input_box(x, eps), y)
        (F.cross_entropy(z, y) + torch.logsumexp(-lb, 1).mean()).backward()
    (2 * objective("ibp", eps, train_eps_factor=1.0, kappa_start=0.5, kappa_end=0.5)(reference, x.double(), y, 1.0)).backward()
    for path, parameter in reference.named_parameters():
        own = torch.from_numpy(net.values.of(path, flat.grad.numpy()))
        truth = net.values.gather(path, parameter.grad).float()
        assert torch.allclose(own, truth, atol=2e-3 * float(truth.abs().max()) + 1e-6), path  # a shift before a BatchNorm has none


@pytest.mark.parametrize("goal", ["pgd", "ibp"])
def test_sparse_steps_train_the_grafted_network_of_dense_ones(tmp_path, goal):
    runs = {kernels: train(Config(**SMALL | {"objective": goal}, kernels=kernels, runs_dir=str(tmp_path)), []) for kernels in ("sparse", "dense")}
    for name, value in runs["dense"].weights.items():
        assert torch.allclose(runs["sparse"].weights[name], value, atol=5e-3), name


def test_a_parameter_that_is_no_line_is_refused_on_rows():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.last = nn.Parameter(torch.ones(1)), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(x * self.scale)

    with pytest.raises(Unsupported, match="neither a weight nor a bias"):
        Rows(Odd(), torch.rand(2, 4))


def test_the_masks_are_those_of_the_score_counted_by_hand():
    torch.manual_seed(3)
    unstable = {"a": torch.randint(0, 4, (7, 2)).float(), "b": torch.randint(0, 4, (9,)).float()}
    significant = {name: torch.rand(value.shape) for name, value in unstable.items()}
    u, s = (torch.cat([value.flatten() for value in parts.values()]).tolist() for parts in (unstable, significant))
    rank = [[(sum(b < a for b in v) + (sum(b == a for b in v) - 1) / 2) / (len(v) - 1) for a in v] for v in (u, s)]
    assert ranks(torch.tensor(u)).tolist() == pytest.approx(rank[0])
    for share in (0.0, 0.3, 0.5, 1.0):
        left, count = list(range(23)), round(share * 23)
        for i, g in enumerate((2, 1.5, 1, 0)):
            left.sort(key=lambda j, g=g: (-round(g * rank[0][j] - rank[1][j], 9), j))
            left = left[count * (i + 1) // 4 - count * i // 4 :]
        masks = neurons_to_graft(unstable, significant, share)
        chosen = torch.cat([mask.flatten() for mask in masks.values()])
        assert chosen.sum() == count and sorted(left) == (~chosen).nonzero().flatten().tolist()


def test_significance_is_the_mean_size_of_the_gradient_of_every_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    h = model[:2](x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model[2](h), y, reduction="sum"), h)
    assert torch.allclose(significance(model, x, y, batch=3)["1"], slope.abs().mean(0))
    assert all(parameter.grad is None for parameter in model.parameters())


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last, self.act = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3), nn.ReLU()

    def forward(self, x):
        return self.last(torch.relu(self.second(self.act(self.act(self.first(x)) - 0.2).relu())))


class Moody(Functions):
    def forward(self, x):
        return self.last(F.relu(self.first(x)) * (2 if self.training else 1))


class Branching(Functions):
    def forward(self, x):
        return self.last(F.relu(self.first(x))) if x.sum() > 0 else self.last(self.first(x))


def test_relus_that_are_no_modules_are_written_out_or_refused():
    torch.manual_seed(0)
    model, x = Functions(), torch.rand(5, 4)
    with pytest.raises(ValueError, match="runs more than once, so that no module can take its place"):
        sites(model, x)
    whole = written_out(model)
    assert len(sites(whole, x)) == 4 and torch.equal(whole(x), model(x))
    graft(whole, {name: torch.ones(shape, dtype=torch.bool) for name, shape in sites(whole, x).items()}, 1.0)
    straight = model.last(model.second(model.first(x) - 0.2))
    assert torch.allclose(whole(x), straight, atol=1e-6) and not sites(whole, x)
    with pytest.raises(ValueError, match="another in train mode than in eval mode"):
        written_out(Moody())
    with pytest.raises(ValueError, match="torch.fx cannot follow the forward of Branching"):
        written_out(Branching())
    with pytest.raises(ValueError, match="no nn.ReLU module called 'axt'. Did you mean 'act'"):
        graft(model, {"axt": torch.ones(5, dtype=torch.bool)})


@pytest.mark.parametrize("name", MODELS)
def test_the_compact_grafted_network_has_the_same_outputs_and_bounds(name):
    """Units that nobody reads go, whether they are lines or ReLUs."""
    model, x = grafted(name, sparsity=0.97).eval(), torch.rand(4, *MODELS[name])
    small = compact(model, x[:2])
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, small))
    assert after < before and len(lines(small)) == len(lines(model)) > 0
    torch.testing.assert_close(small(x), model(x), atol=1e-6, rtol=0)
    for method in METHODS:
        for mine, theirs in zip(bounds(small, *input_box(x, 0.02), method), bounds(model, *input_box(x, 0.02), method), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_run_says_what_it_grafted_and_its_weights_can_be_loaded(tmp_path):
    config = Config(**SMALL, method_options={"share": 0.25}, runs_dir=str(tmp_path))
    run = train(config, [])
    assert run.summary["nnz"] == round(0.2 * run.summary["total"]) == run.rounds[0].summary["nnz"]
    assert sum(layer["grafted"] for layer in run.summary["grafted"].values()) == 12
    assert sum(layer["neurons"] for layer in run.summary["grafted"].values()) == 48
    data = load_data(config)
    model = trained_model(config, data, run.weights)
    test = data.test.take(slice(40))
    with eval_mode(model), torch.no_grad():
        right = (model(to_float(test.images)).argmax(1) == test.labels).double().mean().item()
    assert right == pytest.approx(run.summary["accuracy"]["clean"]) == corruption_accuracy(run, names=["contrast"], severities=[1]).clean
    assert run.summary["flops"]["training"] > run.rounds[0].summary["flops"]["training"]
    masks = [each.history.mask(-1, name) for each in (run, run.rounds[0]) for name in run.history.names]
    assert all(torch.equal(a, b) for a, b in zip(masks[:3], masks[3:], strict=True))


@pytest.mark.parametrize(("options", "zeroed"), [
    ({"zeroed": True}, True), ({"choose": "random"}, False), ({"bounds": "ibp", "ranking": "layer"}, False)])
def test_the_controls_graft_as_many_neurons(tmp_path, options, zeroed):
    run = train(Config(**SMALL | {"sparsity": 0.0, "epochs": 1}, method_options=options, runs_dir=str(tmp_path)), [])
    assert sum(layer["grafted"] for layer in run.summary["grafted"].values()) == 24
    assert run.summary["nnz"] == run.summary["total"] and run.rounds[0].config.method == "dense"
    assert any("slope" in name for name in run.weights) != zeroed
    if "ranking" in options:
        assert [layer["grafted"] for layer in run.summary["grafted"].values()] == [12, 12]


def test_the_second_training_is_at_the_full_radius_and_a_tenth_of_the_rate(tmp_path):
    run = train(Config(**SMALL, runs_dir=str(tmp_path)), [])
    radii, rates = ([row[key] for row in run.metrics] for key in ("train_eps", "lr"))
    first = run.rounds[0].metrics
    assert radii == [0.02, 0.02] and first[0]["train_eps"] == 0.02 and rates == pytest.approx([0.1 * row["lr"] for row in first])


@pytest.mark.parametrize(("options", "changes", "sentence"), [
    ({"share": 1.5}, {}, "share is a share, from 0 to 1; got 1.5"), ({"choose": "scores"}, {}, "Did you mean 'score'"),
    ({"bounds": "crown_ipb"}, {}, "bound of instability called 'crown_ipb'"), ({"zeroed": 1}, {}, "zeroed is true or false; got 1"),
    ({"ranking": "local"}, {}, "ranking of neurons called 'local'"), ({"samples": 0}, {}, "samples is a whole number of at least 1; got 0"),
    ({"lr_factor": 0}, {}, "lr_factor is a number above 0; got 0"), ({"slope": "steep"}, {}, "slope is a number; got 'steep'"),
    ({"pretrain_epochs": -1}, {}, "pretrain_epochs is a whole number of at least 0; got -1"), ({"slop": 1}, {}, "Did you mean 'slope'"),
    ({"source": ["gmp"]}, {}, "method to prune with called"),
    ({}, {"eps": 0.0, "objective": "natural"}, "eps is 0: give eps, or choose 'random'"),
    ({"source": "magnitude"}, {}, "method to prune with called 'magnitude'"), ({"source_options": {"ends": 1}}, {}, "Did you mean 'end'")])
def test_what_cannot_be_is_a_sentence_and_writes_nothing(tmp_path, options, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(replace(Config(**SMALL | changes, method_options=options), runs_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_learner_of_a_grafted_start_continues_from_its_state():
    config = Config(**SMALL, method_options={})
    learner = make_learner(replace(config, method="dense", sparsity=0.0, kernels="dense"))
    graft(learner.model, random_neurons(sites(learner.model, torch.rand(1, 1, 8, 8)), 0.5, torch.Generator().manual_seed(0)))
    assert len(lines(grafted_like(build("mlp", (1, 8, 8), 10, widths=[24, 24]), learner.model.state_dict()))) == 2


@pytest.mark.parametrize(("mask", "kind"), [(torch.ones(6, dtype=torch.uint8), "torch.uint8"), (torch.ones(6), "torch.float32"),
                                            ([True] * 6, "list")])
def test_a_mask_that_is_not_bool_is_refused_and_nothing_is_grafted(mask, kind):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6), torch.nn.ReLU())
    with pytest.raises(ValueError, match=f"mask of 3 is a bool tensor, .* got {kind}"):
        graft(model, {"1": torch.ones(6, dtype=torch.bool), "3": mask})
    assert not lines(model)


@pytest.mark.parametrize(("mask", "shape"), [((1,), (3, 6)), ((3, 1), (2, 3, 4)), ((4,), (2, 6, 4)), ((7,), (3, 6)), ((), (3, 6))])
def test_a_mask_of_another_shape_is_refused_where_it_would_be_broadcast(mask, shape):
    model = graft(nn.Sequential(nn.ReLU()), {"0": torch.ones(mask, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"mask of a grafted ReLU has the shape .*give it the shape of one sample's neurons"):
        model(torch.rand(shape))


def test_bounds_of_a_mask_of_another_shape_are_refused_too():
    model = graft(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), {"1": torch.ones(1, dtype=torch.bool)})
    for engine in ("native", "auto_lirpa") if importlib.util.find_spec("auto_LiRPA") else ("native",):
        with pytest.raises(ValueError, match=r"mask of a grafted ReLU has the shape \(1,\)"):
            bounds(model, torch.zeros(2, 4), torch.ones(2, 4), engine=engine)


def test_a_module_that_runs_twice_is_not_grafted():
    shared = nn.ReLU()
    chain = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared, nn.Linear(4, 3))
    for model, names in ((Functions(), ["act"]), (chain, ["1", "3"])):
        for name in names:
            with pytest.raises(ValueError, match=f"module of ReLU '{name}' runs more than once.*robust.written_out"):
                graft(model, {name: torch.ones(4, dtype=torch.bool)})
        assert not lines(model)
    whole, x = written_out(chain), torch.rand(5, 4)
    one = graft(whole, {"1": torch.ones(4, dtype=torch.bool)}, 1.0)
    assert torch.allclose(one(x), chain[4](chain[2](chain[0](x)).relu()), atol=1e-6), "the first is a line, the second is not"


@pytest.mark.parametrize("given", [{"slope": math.nan}, {"slope": "x"}, {"slope": True}, {"shift": math.inf}])
def test_a_line_begins_at_finite_numbers(given):
    net, mask = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{next(iter(given))} is a finite number; got "):
        graft(net, {"1": mask}, **given)
    assert type(net[1]) is nn.ReLU
