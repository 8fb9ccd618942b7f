"""What sparsity does to robustness: RS and NRS, certified tickets, HYDRA, robust ADMM, Deadwooding."""
import copy
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import in_child, left_by
from torch import nn

from sparselab.learn import build, losses
from sparselab.learn.assembly import make_learner
from sparselab.learn.certified_tickets import steadiness, tickets
from sparselab.learn.config import Config
from sparselab.learn.distillation import Distilled, distilled
from sparselab.learn.experiments import train
from sparselab.learn.objectives import OBJECTIVES, objective
from sparselab.learn.relu_stability import batchnorm_scales, instability, stability_loss
from sparselab.learn.runs import Run
from sparselab.robust import bounds, input_box, pgd
from sparselab.robust.crown import crown_pass
from sparselab.robust.ibp import interval_pass
from sparselab.sparse.admm import ADMM
from sparselab.sparse.deadwooding import Deadwooding
from sparselab.sparse.distributions import layer_budgets
from sparselab.sparse.sparsify import sparsify

QUICK = dict(model="mlp", model_options={"widths": [12, 12]}, epochs=2, eps=0.02, train_samples=100, test_samples=10, batch_size=50, device="cpu",
             sparsity=0.8)
SHORT = {"nrs": {"rate": 0.5, "weight": 0.1}, "hydra": {"search_epochs": 1, "record_every": 1}, "admm": {"updates": 2}, "deadwooding": {"updates": 2},
         "cactus": {"bits": 4, "rates": [0.5]}}


def config(method: str, tmp_path: Path, **changes) -> Config:
    return Config(**QUICK | {"method": method, "method_options": SHORT.get(method, {}), "runs_dir": str(tmp_path)} | changes)


@pytest.mark.parametrize("goal", ["pgd", "crown_ibp"])
@pytest.mark.parametrize("method", SHORT)
def test_a_method_trains_by_its_configuration_and_its_count_is_exact(tmp_path, method, goal):
    """The first objective attacks, the second bounds; a dictionary as text is what papermill hands over."""
    options = json.dumps(SHORT[method])
    run = train(Config.read({**QUICK, "method": method, "method_options": options, "objective": goal, "runs_dir": str(tmp_path)}), [])
    total = run.summary["total"]
    assert run.summary["nnz"] == round(0.2 * total) == sum(int((w != 0).sum()) for name, w in run.weights.items() if name in run.summary["layers"])
    assert [nested.finished for nested in run.rounds] == [True] * len(run.rounds) and not run.damage
    if method in ("admm", "deadwooding"):
        assert [row["nnz"] for row in run.metrics] == [round(0.2 * total)] * 2, "cut at the end of the first epoch"


@pytest.mark.parametrize("method", SHORT)
def test_killed_anywhere_a_method_resumes_to_the_same_bits(tmp_path, method):
    whole = config(method, tmp_path / "whole", objective="pgd", epochs=3)
    in_child(whole)
    run = Run(Path(whole.runs_dir) / whole.run_id)
    expected, rng = left_by(run), random.Random(method)
    for i in range(2):
        one = replace(whole, runs_dir=str(tmp_path / str(i)))
        in_child(one, killed_after=rng.uniform(0, max(0.3, run.summary["seconds"])))
        in_child(one)
        assert left_by(Run(Path(one.runs_dir) / one.run_id)) == expected


@pytest.mark.parametrize(("method", "options", "sentence"), [
    ("nrs", {"regularizer": "nsr"}, "regularizer of method nrs called 'nsr'. Did you mean 'nrs'"), ("nrs", {"score": "size"}, "score of method nrs"),
    ("nrs", {"bounds": ["ibp"]}, "bounds of method nrs called"),
    ("nrs", {"bounds": "crwn"}, "Did you mean 'crown'"), ("nrs", {"weight": -1}, "nrs weighs .* got -1"), ("nrs", {"rate": 0}, "rate above 0"),
    ("hydra", {"search_epochs": -1}, "search_epochs is a whole number of at least 0; got -1"),
    ("hydra", {"lr_factor": 0}, "lr_factor is a number above 0; got 0"),
    ("hydra", {"search_objective": "naturel"}, "Did you mean 'natural'"), ("hydra", {"search_objective": ["pgd"]}, "objective is a name in quotes"),
    ("hydra", {"mask_lr": 0}, "mask_lr is a number above 0; got 0"), ("hydra", {"mask_lrs": 0.1}, "Did you mean 'mask_lr'"),
    ("admm", {"rho": 0}, "rho is a number above 0; got 0"),
    ("admm", {"updates": 0}, "updates is a whole number of at least 1; got 0"), ("admm", {"end": 1.5}, "end is a share"),
    ("admm", {"growth": 0.5}, "growth is a number of at least 1; got 0.5"),
    ("deadwooding", {"dual_lr": -1}, "dual_lr is a number above 0; got -1"),
    ("deadwooding", {"teaching": 2}, "teaching is a share"), ("deadwooding", {"tolerence": 0.1}, "Did you mean 'tolerance'"),
    ("admm", {"growth": 1e300}, r"growth 1e\+300 \*\* .* is no float32 any more")])
def test_what_cannot_be_is_a_sentence_and_writes_nothing(tmp_path, method, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(config(method, tmp_path / "runs", method_options=options, objective="pgd"), [])
    assert not (tmp_path / "runs").exists()


NUMBERS = {"nrs": ["rewind_epochs", "weight"], "hydra": ["pretrain_epochs", "search_epochs", "lr_factor", "mask_lr", "mask_decay", "record_every"],
           "admm": ["rho", "growth", "updates", "end"], "deadwooding": ["pretrain_epochs", "teaching", "dual_lr", "updates", "tolerance"],
           "grafting": ["share", "slope", "samples", "pretrain_epochs", "lr_factor"], "edge_popup": ["mask_lr", "mask_momentum"],
           "hard_concrete": ["pretrain_epochs", "retrain_epochs", "penalty", "mask_lr", "mask_decay", "first_gate"],
           "gap": ["attack_steps", "test_steps", "pretrain_epochs", "lr_factor"], "card": ["rate", "rewind_epochs"]}


@pytest.mark.parametrize("value", ["x", None, [1], True, math.nan, math.inf])
@pytest.mark.parametrize("method", NUMBERS)
def test_what_is_no_number_is_refused_by_the_name_of_its_option(tmp_path, method, value):
    for name in NUMBERS[method]:
        with pytest.raises(ValueError, match=rf"(?s)({name}|nrs weighs|rewind).*{re.escape(repr(value))}"):
            train(config(method, tmp_path / "runs", method_options={name: value}, objective="pgd"), [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", [None, 0, {}, ["pgd"], "naturel"])
@pytest.mark.parametrize(("method", "name"), [("hydra", "search_objective"), ("hard_concrete", "pretrain"), ("hard_concrete", "retrain")])
def test_what_is_no_objective_is_refused_by_the_name_of_its_option(tmp_path, method, name, value):
    with pytest.raises(ValueError, match=rf"^{name}(: There is no objective called| is a name in quotes; got) {re.escape(repr(value))}"):
        train(config(method, tmp_path / "runs", method_options={name: value}, objective="pgd"), [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", ["grafting", "scratch_e", "scratch_b"])
def test_a_source_that_prunes_nothing_is_refused_where_weights_have_to_go(tmp_path, method):
    with pytest.raises(ValueError, match="source 'dense' prunes nothing, and sparsity is 0.8"):
        train(config(method, tmp_path / "runs", method_options={"source": "dense"}, objective="pgd"), [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("method", "name", "value"), [("grafting", "source_options", "end"), ("scratch_e", "source_options", None),
                                                       ("cactus", "rates", [0.5, 1])])
def test_what_is_none_of_its_kind_is_refused_by_the_name_of_its_option(tmp_path, method, name, value):
    with pytest.raises(ValueError, match=rf"{name}.* got {value if method != 'cactus' else 1!r}"):
        train(config(method, tmp_path / "runs", method_options={name: value}, objective="pgd"), [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", ["hydra", "edge_popup"])
@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(6, 4, 3, groups=2), nn.ConvTranspose1d(3, 8, 5), nn.Conv2d(6, 4, 3, groups=2),
                                   nn.Linear(12, 5)])
def test_first_scores_are_scaled_by_the_inputs_of_an_output(method, layer):
    """Counted by PyTorch: with weights of 1 and inputs of 1 the largest output is the number of inputs that reach it."""
    with torch.no_grad():
        counter = copy.deepcopy(layer)
        counter.weight.fill_(1), counter.bias.zero_()
        size = {2: (1, 12), 3: (1, counter.weight.shape[0], 20), 4: (1, 6, 9, 9)}[counter.weight.dim()]
        inputs = int(counter(torch.ones(size)).max())
    net = nn.Sequential(copy.deepcopy(layer))
    weight = net[0].weight.detach().clone()
    scores = sparsify(net, torch.optim.SGD(net.parameters(), 0.1), method, 0.5, 5).scores["0.weight"]
    if method == "hydra":
        assert torch.allclose(scores, weight / weight.abs().max() * math.sqrt(6 / inputs))
    else:
        assert 0.8 * inputs**-0.5 < float(scores.abs().max()) <= inputs**-0.5


def test_more_updates_than_steps_are_one_a_step():
    for method in (ADMM, Deadwooding):
        net = torch.nn.Linear(4, 3)
        made = method(model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1), sparsity=0.5, total_steps=12, updates=10**12)
        assert made.due == {1, 2, 3, 4, 5, 6}


def test_nrs_refuses_what_it_sets_itself_and_a_radius_of_zero(tmp_path):
    with pytest.raises(ValueError, match="nrs sets rs of the objective itself"):
        train(config("nrs", tmp_path, objective="pgd", objective_options={"rs": 0.1}), [])
    with pytest.raises(ValueError, match="so eps is above 0; got 0.0"):
        train(config("nrs", tmp_path, eps=0.0, objective="natural"), [])


@pytest.mark.parametrize(("options", "sentence"), [
    ({"rs": 0.1, "nrs": 0.1}, "choose one of them"), ({"rs": -0.1}, "rs weighs .* got -0.1"), ({"nrs": float("nan")}, "got nan"),
    ({"nrs": "much"}, "got 'much'"), ({"rs": True}, "got True"), ({"rs": 0.1, "eps": 0.0}, "they need eps above 0"),
    ({"stability_bounds": ["ibp"]}, "Did you mean 'ibp'"), ({"shape": ["smooth"]}, "Did you mean 'smooth'"),
    ({"rs": 0.1, "engine": "auto_lirpa"}, "engine='native'"), ({"stability_bounds": "lp"}, "There is no bound method for stable ReLUs called 'lp'")])
def test_rs_and_nrs_say_what_they_cannot_do(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        objective("pgd", **{"eps": 0.1} | options)


def normed() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([1.0, 0.5, -0.25, 2.0, 0.1, 0.0]))
        net[2].bias.normal_()
        net[2].running_mean.normal_()
        net[2].running_var.uniform_(0.5, 2)
    return net.double().eval()


def test_nrs_by_hand():
    """The bounds of a layer and a BatchNorm are exact on a box, so they follow from the corners of each row alone."""
    net, x = normed(), torch.rand(4, 1, 3, 3).double()
    lower, upper = input_box(x, 0.1)
    scale = net[2].weight / (net[2].running_var + net[2].eps).sqrt()
    rows, shift = net[1].weight * scale[:, None], scale * (net[1].bias - net[2].running_mean) + net[2].bias
    centre, radius = (lower + upper).flatten(1) / 2, (upper - lower).flatten(1) / 2
    middle, width = centre @ rows.T + shift, radius @ rows.abs().T
    first = [(middle - width).tolist(), (middle + width).tolist()]
    low, high = (middle - width).relu(), (middle + width).relu()
    centre, radius = (low + high) / 2, (high - low) / 2
    middle, width = centre @ net[4].weight.T + net[4].bias, radius @ net[4].weight.abs().T
    gammas = net[2].weight.detach().square().tolist()
    expected = [-math.tanh(1 + lo * up / max(g, 1e-12)) for a, b in zip(*first, strict=True) for lo, up, g in zip(a, b, gammas, strict=True)]
    expected += [-math.tanh(1 + lo * up) for lo, up in zip((middle - width).flatten().tolist(), (middle + width).flatten().tolist(), strict=True)]
    pass_ = interval_pass(net, lower, upper)
    assert math.isclose(stability_loss(pass_, batchnorm_scales(net, pass_)).item(), sum(expected) / 44, abs_tol=1e-9)


def test_the_gradient_of_nrs_takes_gamma_for_a_constant_in_the_division():
    net, x = normed(), torch.rand(4, 1, 3, 3).double()
    pass_ = interval_pass(net, *input_box(x, 0.1))
    scales = batchnorm_scales(net, pass_)
    found, = torch.autograd.grad(stability_loss(pass_, scales), net[2].weight, retain_graph=True)
    step, held = 1e-6, {name: scale.clone() for name, scale in scales.items()}
    for i in range(5):  # the last channel is divided by LEAST
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                net[2].weight[i] += sign * step
                values.append(stability_loss(interval_pass(net, *input_box(x, 0.1)), held).item())
                net[2].weight[i] -= sign * step
        assert math.isclose(found[i].item(), (values[0] - values[1]) / (2 * step), rel_tol=1e-4, abs_tol=1e-7)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("bounds", ["ibp", "crown"])
def test_every_objective_adds_the_loss_of_its_own_box(name, bounds):
    net, x, y = normed().float(), torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        plain, steady = objective(name, 0.1), objective(name, 0.1, nrs=0.3, stability_bounds=bounds)
        pass_ = {"ibp": interval_pass, "crown": crown_pass}[bounds](net, *input_box(x, plain.ramp(1.0).eps))
        expected = 0.3 * stability_loss(pass_, batchnorm_scales(net, pass_))
        assert torch.isclose(steady(net, x, y, 1.0) - plain(net, x, y, 1.0), expected, atol=1e-5)
        assert "stable ReLUs need the dense network" in steady.dense_because(steady.ramp(1.0))
        assert torch.equal(steady(net, x, y, 0.0), plain(net, x, y, 0.0)), "no boxes yet"


def test_training_with_nrs_leaves_fewer_unstable_neurons(tmp_path):
    plain = Config(**QUICK | {"epochs": 10, "train_samples": 400, "eps": 0.05}, method="dense", objective="pgd", runs_dir=str(tmp_path))
    found = [train(replace(plain, objective_options=options), []).stability[-1]["layers"] for options in ({}, {"rs": 1.0})]
    without, with_rs = (sum(layer["unstable"] for layer in layers.values()) for layers in found)
    assert with_rs < 0.8 * without


def test_the_score_by_nrs_spares_the_weights_of_settled_neurons():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight.fill_(1)
        net[1].bias.copy_(torch.tensor([-2.0, 3.0, -9.0]))
    x = torch.full((5, 1, 2, 2), 0.5)
    factor = steadiness(net, x, 0.25)["1.weight"].flatten()
    lower, upper = torch.tensor([-1.0, 4.0, -8.0]), torch.tensor([1.0, 6.0, -6.0])
    assert torch.allclose(factor, (1 - instability(lower[None], upper[None])[0]) / 2) and factor[0] == 0.5 and factor[1:].min() > 0.99


def test_a_certified_ticket_is_as_accurate_and_as_verified_as_dense():
    rows = [{"nnz": 10 - i, "total": 10, "accuracy": {"clean": clean, "pgd": 0.5, "verified": verified}}
            for i, (clean, verified) in enumerate([(0.9, 0.3), (0.9, 0.4), (0.8, 0.5), (0.95, 0.2), (0.9, 0.3)])]
    assert [row["certified"] for row in tickets(rows)] == [True, True, False, False, True]


def test_every_round_of_nrs_begins_with_the_same_first_weights_and_is_in_the_table(tmp_path):
    run = train(config("nrs", tmp_path, objective="pgd"), [])
    stages = [*run.rounds, run]
    assert [row["nnz"] for row in run.summary["tickets"]] == [stage.summary["nnz"] for stage in stages] and len(stages) == 4
    assert [row["verified"] for row in run.summary["tickets"]] == [stage.summary["accuracy"]["verified"] for stage in stages]
    assert all(stage.config.objective_options["nrs"] == 0.1 for stage in run.rounds)
    assert "nrs" not in run.config.objective_options, "the run is called what was asked for"
    other = train(config("nrs", tmp_path, objective="pgd", method_options={**SHORT["nrs"], "score": "nrs"}), [])
    assert any(not torch.equal(run.history.mask(0, name), other.history.mask(0, name)) for name in run.history.names)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_hydra_without_a_search_is_the_magnitude_of_each_layer(kind):
    """Also where scores that are scaled weights tie and the weights do not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))
    if kind == "cnn":
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    with torch.no_grad():
        net[0].weight.flatten()[::2] = torch.nextafter(net[0].weight.flatten()[1::2], torch.tensor(9.0))  # pairs that differ in the last bit
    weights = {name: p.detach().clone() for name, p in net.named_parameters() if p.dim() > 1}
    sparsifier = sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "hydra", 0.7, 5)
    for name, count in layer_budgets(sparsifier.shapes, 0.7, "uniform").items():
        order = sorted(range(weights[name].numel()), key=lambda i: (-abs(weights[name].flatten()[i].item()), i))
        assert sparsifier.masks[name].flatten().nonzero().flatten().tolist() == sorted(order[:count])


def test_the_procedure_hydra_without_a_search_fine_tunes_the_magnitude_mask(tmp_path):
    run = train(config("hydra", tmp_path, objective="pgd", lr=0.01, method_options={"search_epochs": 0}), [])
    dense, = run.rounds
    for name in run.history.names:
        sizes, mask = dense.weights[name].abs(), run.history.mask(0, name)
        assert sizes[mask].min() >= sizes[~mask].max()
    searched = train(config("hydra", tmp_path, objective="pgd", lr=0.01), [])
    assert [nested.path.name for nested in searched.rounds] == ["dense", "search"]
    assert all(torch.equal(searched.rounds[1].history.mask(-1, name), searched.history.mask(0, name)) for name in run.history.names)
    for slow, fast in zip(searched.metrics, searched.rounds[0].metrics, strict=True):
        assert math.isclose(slow["lr"], 0.1 * fast["lr"])
    natural = train(config("hydra", tmp_path, objective="pgd", lr=0.01, method_options=SHORT["hydra"] | {"search_objective": "natural"}), [])
    assert [nested.config.objective for nested in natural.rounds] == ["pgd", "natural"] and natural.rounds[1].config.eps == 0.02
    assert all(torch.equal(natural.rounds[0].weights[name], value) for name, value in searched.rounds[0].weights.items())


def test_the_scores_of_hydra_follow_the_gradient_of_the_masked_weights():
    """Against numbers: the slope of the loss in b_i at the mask, times the sign of the score."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.rand(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sparsifier = sparsify(net, optimizer, "hydra", 0.5, 10, mask_decay=0.0, mask_momentum=0.0)
    before, masks = {n: s.clone() for n, s in sparsifier.scores.items()}, {n: m.clone() for n, m in sparsifier.masks.items()}

    def loss(name, i, change):
        values = {n: p * masks[n] if n in masks else p for n, p in trained.items()}
        values[name] = values[name].clone()
        values[name].view(-1)[i] += change * trained[name].view(-1)[i]
        return nn.functional.cross_entropy(torch.func.functional_call(net, values, x), y).item()

    expected = {n: torch.tensor([(loss(n, i, 1e-5) - loss(n, i, -1e-5)) / 2e-5 for i in range(m.numel())]).view_as(m) for n, m in masks.items()}
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    for name, score in sparsifier.scores.items():
        assert torch.allclose(score, before[name] - 0.1 * before[name].sign() * expected[name], atol=1e-7)


def test_admm_minimises_the_augmented_lagrangian_between_two_updates():
    """On a quadratic loss the fixed point of W is known: (t + rho (Z - U)) / (1 + rho)."""
    target = torch.tensor([[3.0, -2.0, 0.4, 0.1]])
    net = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(target)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    admm = sparsify(net, optimizer, "admm", 0.5, 200, rho=1.0, updates=2, end=1.0, distribution="uniform")
    for step in range(200):
        optimizer.zero_grad()
        (0.5 * (net.weight - target).square().sum()).backward()
        optimizer.step()
        if step in (98, 198):
            goal = (target + admm.Z["weight"] - admm.U["weight"]) / 2
            assert torch.allclose(net.weight, goal, atol=1e-5)
        admm.step()
        if step == 99:  # Z = (3, -2, 0, 0), W = (3, -2, .2, .05), U = W - Z
            assert torch.allclose(admm.U["weight"], torch.tensor([[0.0, 0.0, 0.2, 0.05]]), atol=1e-5)
    assert admm.masks["weight"].tolist() == [[True, True, False, False]] and admm.masks.nnz == 2


def test_growth_scales_the_multipliers_of_admm_by_one_over_rho():
    found = {}
    for growth in (1.0, 4.0):
        net = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[3.0, -2.0, 0.4, 0.1]]))
        admm = sparsify(net, torch.optim.SGD(net.parameters(), 0.0), "admm", 0.5, 8, rho=0.5, growth=growth, updates=4, end=1.0)
        (0 * net.weight.sum()).backward()
        for _ in range(2):
            admm.optimizer.step()
            admm.step()
        found[growth] = admm.pull, admm.U["weight"].clone()
    assert found[4.0][0] == 4 * found[1.0][0] and torch.allclose(4 * found[4.0][1], found[1.0][1])


def test_the_price_of_deadwooding_is_on_the_smallest_weights_alone_and_they_go_early_when_they_are_small():
    net = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -2.0, 1.0, 0.02, -0.03, 0.01]]))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    dual = sparsify(net, optimizer, "deadwooding", 0.5, 40, dual_lr=10.0, updates=20, end=1.0, tolerance=0.005)
    cut = None
    for step in range(1, 41):
        optimizer.zero_grad()
        (0 * net.weight).sum().backward()
        optimizer.step()
        dual.step()
        assert torch.equal(net.weight[0, :3], torch.tensor([3.0, -2.0, 1.0])), "nothing pulls at the large ones"
        assert dual.masks.nnz == dual.budget == (3 if dual.cut else 6)
        cut = cut or (step if dual.cut else None)
    assert cut is not None and cut < 40


def test_the_teacher_of_deadwooding_is_the_dense_network(tmp_path):
    from sparselab.learn.deadwooding import RobustDeadwooding

    one = config("deadwooding", tmp_path, objective="pgd", method_options={"teaching": 0.7})
    run = train(one, [])
    last, start = RobustDeadwooding.of(one, run.path).last()
    goal = make_learner(last, start=start).objective
    assert isinstance(goal, Distilled) and goal.share == 0.7
    assert all(torch.equal(value, run.rounds[0].weights[name]) for name, value in goal.teacher.state_dict().items())


@pytest.mark.parametrize("goal", ["pgd", "sabr", "mtl_ibp"])
def test_a_taught_step_attacks_once_and_to_the_points_of_the_loss(monkeypatch, goal):
    points, real = [], losses.pgd
    monkeypatch.setattr(losses, "pgd", lambda *args, **options: points.append(real(*args, **options)) or points[-1])
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3)) for _ in range(2))
    x, y = torch.rand(20, 1, 3, 3), torch.arange(20) % 3
    taught, plain = distilled(objective(goal, 0.1), teacher, 0.25), objective(goal, 0.1)
    found = taught(student, x, y, 1.0)
    assert len(points) == 1
    kl = torch.nn.functional.kl_div(student(points[0]).log_softmax(1), teacher(x).log_softmax(1), reduction="batchmean", log_target=True)
    assert torch.isclose(found, 0.75 * plain(student, x, y, 1.0) + 0.25 * kl)
    taught(student, x, y, 1.0)
    assert len(points) == 3, "another step attacks anew"


@pytest.mark.parametrize("ask", [lambda name: objective(name, 0.1), lambda name: build(name),
                                 lambda name: pgd(None, torch.rand(1, 1), torch.zeros(1).long(), 0.1, loss=name),
                                 lambda name: bounds(nn.Linear(1, 1), torch.zeros(1, 1), torch.ones(1, 1), name)])
@pytest.mark.parametrize("name", [["ibp"], None, 3, ("crown",), {}])
def test_what_is_no_text_is_no_name(ask, name):
    with pytest.raises(ValueError, match=re.escape(f"called {name!r}")):
        ask(name)
