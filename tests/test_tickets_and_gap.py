"""Hard concrete gates against sampling and autograd, robust tickets, greedy adversarial pruning by brute force, and int8."""
import copy
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sparselab.learn import certified_tickets, gap
from sparselab.learn.assembly import Start, load_data, make_learner, new_model, peak_lr
from sparselab.learn.config import Config
from sparselab.learn.experiments import train
from sparselab.learn.gap import GAP, RANKS, adversarial, summed_gradients, without_highest
from sparselab.learn.int8 import int8, int8_weights, saved_bytes
from sparselab.learn.learner import Callback
from sparselab.learn.runs import Run
from sparselab.robust import METHODS, bounds, input_box
from sparselab.sparse.hard_concrete import BETA, HardConcrete, hard_concrete, log_alpha_of, open_probability, typical_gate
from sparselab.sparse.masks import prunable
from sparselab.sparse.sparsify import sparsify

SMALL = dict(model="mlp", model_options={"widths": [20, 16]}, sparsity=0.6, epochs=2, eps=0.05, device="cpu", train_samples=200, test_samples=40)
OPTIONS = {"hard_concrete": {"retrain_epochs": 1}, "gap": {"pretrain_epochs": 1, "quantise": True}}


@pytest.mark.parametrize("log_alpha", [-3.0, -1.6, 0.0, 0.7, 2.5])
def test_a_gate_is_open_and_whole_as_often_as_the_formulas_say(log_alpha):
    n = 10**6
    m = hard_concrete(torch.full((n,), log_alpha, dtype=torch.float64), torch.rand(n, dtype=torch.float64))
    whole = 1 / (1 + math.exp(BETA * math.log(11) - log_alpha))  # s > 11/12
    for share, p in (((m != 0), float(open_probability(torch.tensor(log_alpha)))), ((m == 1), whole)):
        assert abs(float(share.double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert bool(((m >= 0) & (m <= 1)).all())


def test_the_typical_gate_by_hand():
    assert float(typical_gate(torch.zeros(()))) == 0.5
    assert math.isclose(log_alpha_of(0.9), math.log(1.0 / 0.2))
    assert math.isclose(float(typical_gate(torch.tensor(log_alpha_of(0.9)))), 0.9, rel_tol=1e-6)
    below, above = (torch.tensor(-math.log(11) + shift) for shift in (-1e-3, 1e-3))  # sigmoid is 1/12 between them
    assert typical_gate(below) == 0 < typical_gate(above)


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4)), torch.rand(32, 6), torch.arange(32) % 4


def learn(net, x, y, gates, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        gates.see_loss(lambda: cross_entropy(net(x), y))
        cross_entropy(net(x), y).backward()
        optimizer.step()
        gates.step()


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_ticket_is_the_highest_log_alpha_and_no_weight_has_moved(sparsity):
    net, x, y = network()
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.1)
    gates = sparsify(net, optimizer, "hard_concrete", sparsity, 20)
    learn(net, x, y, gates, optimizer, 19)
    assert gates.masks.nnz == gates.masks.total == 100, "the promise before the draw"
    assert not torch.equal(net[0].weight, trained["0.weight"]) and torch.equal(net[0].bias, trained["0.bias"])
    learn(net, x, y, gates, optimizer, 1)
    ranked = sorted(((-float(v), name, i) for name, a in gates.log_alpha.items() for i, v in enumerate(a.detach().flatten())))
    kept = {(name, i) for _, name, i in ranked[:round((1 - sparsity) * 100)]}
    assert gates.masks.nnz == len(kept) == sum(int(w.count_nonzero()) for w in prunable(net).values())
    assert {(name, int(i)) for name, mask in gates.masks.items() for i in mask.flatten().nonzero()} == kept
    for name, p in net.named_parameters():
        assert torch.equal(p, trained[name] * gates.masks.get(name, 1)), name


def test_the_penalty_closes_gates_and_only_the_penalty_acts_without_a_loss():
    shares = []
    for penalty in (0.0, 0.5):
        net, x, _ = network()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        gates = sparsify(net, optimizer, "hard_concrete", 0.5, 60, penalty=penalty)
        for _ in range(60):
            gates.see_loss(lambda: None)
            (0 * net(x).sum()).backward()
            optimizer.step()
            gates.step()
        shares.append(float(torch.cat([open_probability(a.detach()).flatten() for a in gates.log_alpha.values()]).mean()))
    start = float(open_probability(torch.tensor(log_alpha_of(0.9))))
    assert shares[0] == pytest.approx(start, abs=1e-3) and shares[1] < start - 0.2


def test_the_gates_of_a_step_are_its_own_and_follow_from_the_seed():
    net, *_ = network()
    gates = sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "hard_concrete", 0.5, 9, seed=1)
    first = gates.gate("0.weight")
    assert torch.equal(first, gates.gate("0.weight"))
    gates.steps = 1
    assert not torch.equal(first, gates.gate("0.weight"))
    gates.steps, gates.seed = 0, 2
    assert not torch.equal(first, gates.gate("0.weight"))


def test_without_a_look_at_the_loss_the_gates_say_what_to_call():
    net, x, y = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sparsify(net, optimizer, "hard_concrete", 0.5, 9)
    cross_entropy(net(x), y).backward()
    with pytest.raises(ValueError, match="call sparsifier.see_loss"):
        optimizer.step()


def gated() -> nn.Module:
    """A network whose weights are multiplied by the typical gates of a few steps, many of them closed."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    gates = sparsify(net, optimizer, "hard_concrete", 0.5, 60, penalty=20.0, mask_lr=0.3)
    learn(net, torch.rand(40, 1, 4, 4), torch.arange(40) % 5, gates, optimizer, 26)
    shares = torch.cat([typical_gate(a.detach()).flatten() for a in gates.log_alpha.values()])
    assert 0.05 < float((shares == 0).float().mean()) < 0.95 and bool(((shares > 0) & (shares < 1)).any())
    return net.eval()


def test_bounds_under_hard_concrete_gates_equal_auto_lirpa_and_hold_on_sampled_points():
    net, x = gated(), torch.rand(2, 1, 4, 4)
    box = input_box(x, 0.1)
    points = box[0] + torch.rand(50_000, 2, 1, 4, 4) * (box[1] - box[0])
    with torch.no_grad():
        logits = net(points.flatten(0, 1)).view(50_000, 2, 5)
        for method in METHODS:
            lb, ub = bounds(net, *box, method)
            assert bool((lb - 1e-5 <= logits).all() and (logits <= ub + 1e-5).all()), method
            if importlib.util.find_spec("auto_LiRPA"):
                theirs = bounds(net, *box, method, engine="auto_lirpa")
                assert torch.allclose(lb, theirs[0], atol=1e-4) and torch.allclose(ub, theirs[1], atol=1e-4), method


@pytest.mark.parametrize("options", [{"penalty": -1.0}, {"mask_lr": 0.0}, {"mask_decay": -1e-3}, {"first_gate": 1.0}, {"first_gate": 0.0}])
def test_bad_options_of_the_gates_are_refused_by_name(options):
    (name, value), = options.items()
    net, *_ = network()
    with pytest.raises(ValueError, match=rf"(?s){name}.*{value!r}"):
        HardConcrete(model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1), sparsity=0.5, total_steps=5, **options)


@pytest.mark.parametrize(("method", "options", "sentence"), [
    ("hard_concrete", {"penalti": 1}, "Did you mean 'penalty'"), ("hard_concrete", {"pretrain": "naturel"}, "Did you mean 'natural'"),
    ("hard_concrete", {"retrain": "fgsm"}, "objective called 'fgsm'"),
    ("hard_concrete", {"pretrain_epochs": -1}, "pretrain_epochs is a whole number of at least 0; got -1"),
    ("hard_concrete", {"first_gate": 2.0}, "first_gate is strictly between"), ("gap", {"rank": "sined"}, "Did you mean 'signed'"),
    ("gap", {"attack_steps": 0}, "attack_steps is a whole number of at least 1; got 0"),
    ("gap", {"lr_factor": -1.0}, "lr_factor is a number above 0; got -1.0"), ("gap", {"test_steps": 0}, "test_steps is a whole number of at least 1"),
    ("gap", {"rank": ["signed"]}, "rank of method gap called"),
    ("gap", {"quantise": "no"}, "quantise is true or false; got 'no'"),
    ("gap", {"penalty": 1}, "no option of method gap called 'penalty'")])
def test_bad_options_of_the_procedures_are_refused_and_nothing_is_written(tmp_path, method, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(Config(**SMALL, method=method, method_options=options, runs_dir=str(tmp_path / "runs")), [])
    assert not (tmp_path / "runs").exists()


def test_a_sparsity_that_would_take_the_last_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the dense ones whole"):
        train(Config(**SMALL | {"sparsity": 0.95}, method="gap", runs_dir=str(tmp_path / "runs")), [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("objective", ["pgd", "ibp"])
@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_under_any_objective_the_count_is_exact(tmp_path, method, objective):
    run = train(Config(**SMALL, method=method, method_options=OPTIONS[method], objective=objective, runs_dir=str(tmp_path)), [])
    assert run.summary["nnz"] == round(0.4 * run.summary["total"])
    for name in run.history.names:
        assert bool((run.weights[name] == 0)[~run.history.mask(-1, name)].all()), name
    if method == "gap":
        assert bool(run.history.mask(-1, run.history.names[-1]).all()), "the last layer stays whole"
        assert set(run.summary["int8"]) == {"clean", "pgd_of_float", "transfer", "bytes", "float_bytes"} and 0 <= run.summary["transfer"] <= 1
    else:
        assert [each.config.objective for each in run.rounds] == ["natural", objective]


class Stop(Callback):
    """Ends the program, as it seems to the training, after so many steps of all rounds."""

    def __init__(self, left: int):
        self.left = left

    def after_step(self, learner) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def bits(run: Run) -> list:
    files = [(run.path / "model.safetensors").read_bytes(), *((run.path / "masks" / name).read_bytes() for name in ("start.bin", "updates.bin"))]
    summary = {name: value for name, value in run.summary.items() if name not in ("seconds", "config")}
    return [files, summary, run.metrics, [bits(each) for each in run.rounds]]


@pytest.mark.parametrize(("method", "times"), [("gap", 2), ("hard_concrete", 3)])
def test_stopped_in_every_round_a_procedure_resumes_to_the_same_bits(tmp_path, method, times):
    config = Config(**SMALL, method=method, method_options=OPTIONS[method], objective="pgd", runs_dir=str(tmp_path / "whole"))
    expected = bits(train(config, []))
    stopped = replace(config, runs_dir=str(tmp_path / "stopped"))
    for _ in range(times):  # an epoch has 2 steps: each time in another epoch or round
        with pytest.raises(KeyboardInterrupt):
            train(stopped, [Stop(3)])
    assert bits(train(stopped, [])) == expected


@pytest.mark.parametrize(("module", "function", "changes"), [
    (gap, "summed_gradients", {"method": "gap"}),
    (certified_tickets, "steadiness", {"method": "nrs", "method_options": {"score": "nrs", "rate": 0.6}})])
def test_what_is_computed_between_two_rounds_does_not_depend_on_the_threads(tmp_path, monkeypatch, module, function, changes):
    before, seen, real = torch.get_num_threads(), [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: seen.append(torch.get_num_threads()) or real(*args))
    torch.set_num_threads(2)
    try:
        train(Config(**SMALL | {"epochs": 1} | changes, objective="natural", runs_dir=str(tmp_path)), [])
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_procedures_are_their_steps_by_hand(tmp_path):
    """Bit by bit: dense training, gates or adversarial gradients, masks, training from the dense weights."""
    for method in OPTIONS:
        short = {"epochs": 1, "method_options": {"pretrain_epochs": 2}} if method == "gap" else {"method_options": {"retrain_epochs": 1}}
        config = Config(**SMALL | short, method=method, objective="natural", runs_dir=str(tmp_path))
        run, data = train(config, []), load_data(config)
        by_hand = replace(config, method_options={}, epochs=2)
        dense = make_learner(replace(by_hand, method="dense", sparsity=0.0), data=data)
        dense.fit()
        weights = {name: value.clone() for name, value in dense.model.state_dict().items()}
        if method == "gap":
            slopes = summed_gradients(dense.model, adversarial(dense.model, data.train, config.eps, 10, config.seed))
            masks = without_highest(slopes, config.sparsity, "global", list(slopes)[-1:])
        else:
            gates = make_learner(by_hand, start=Start(weights), data=data)
            gates.fit()
            masks = {name: mask.clone() for name, mask in gates.sparsifier.masks.items()}
        rate = peak_lr(replace(by_hand, method="dense"))  # one rate for both trainings
        last = make_learner(replace(by_hand, method="static", epochs=1, lr=rate), start=Start(weights, masks), data=data)
        last.fit()
        for name, value in last.model.state_dict().items():
            assert torch.equal(value, run.weights[name]), f"{method}: {name}"


@pytest.mark.parametrize("distribution", ["global", "uniform"])
@pytest.mark.parametrize("rank", sorted(RANKS))
def test_what_greedy_pruning_removes_by_brute_force(rank, distribution):
    """Gradients image by image in double precision; the weights ranked by Python's sort."""
    config = Config(**SMALL, method="dense", runs_dir="unused")
    data = load_data(config)
    model = new_model(config, data, 0).double()
    x = torch.rand(30, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(30) % 10
    weights = prunable(model)
    slopes = {name: torch.zeros_like(w) for name, w in weights.items()}
    for i in range(30):
        for slope, g in zip(slopes.values(), torch.autograd.grad(cross_entropy(model(x[i:i + 1]), y[i:i + 1]), list(weights.values())), strict=True):
            slope += g
    found = summed_gradients(model, [(x[:7], y[:7]), (x[7:], y[7:])])
    for name in slopes:
        assert torch.allclose(found[name], slopes[name], atol=1e-10), name
    scores = {name: RANKS[rank](w, found[name], torch.Generator().manual_seed(3)) for name, w in weights.items()}
    plain = {"signed": lambda w, g: g, "absolute": lambda w, g: abs(g), "product": lambda w, g: g * w, "magnitude": lambda w, g: -abs(w)}
    if rank in plain:
        for name, w in weights.items():
            pairs = zip(w.flatten().tolist(), found[name].flatten().tolist(), strict=True)
            assert scores[name].flatten().tolist() == [plain[rank](*pair) for pair in pairs]
    names = list(weights)
    masks = without_highest(scores, 0.6, distribution, names[-1:])
    total = sum(w.numel() for w in weights.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.4 * total) and bool(masks[names[-1]].all())
    groups = [names[:-1]] if distribution == "global" else [[name] for name in names[:-1]]
    for group in groups:
        ranked = sorted((float(v), name, i) for name in group for i, v in enumerate(scores[name].flatten()))
        kept = sum(int(masks[name].sum()) for name in group)
        assert {(name, i) for _, name, i in ranked[:kept]} == {(name, int(i)) for name in group for i in masks[name].flatten().nonzero()}


def test_an_attack_on_the_dense_network_lies_in_the_ball_and_lowers_its_accuracy(tmp_path):
    config = Config(**SMALL | {"epochs": 1, "train_samples": 0}, method="gap", objective="natural", runs_dir=str(tmp_path),
                    method_options={"pretrain_epochs": 8})
    run, data = train(config, []), load_data(config)
    procedure = GAP.of(config, Path(tmp_path))
    procedure.rounds = run.rounds
    dense, test = procedure.dense_model(), data.test.take(slice(40))
    (points, y), = adversarial(dense, test, config.eps, 40, config.seed)
    (x, labels), = test.batches(40, shuffle=False)
    assert float((points - x).abs().max()) <= config.eps + 1e-6 and torch.equal(y, labels)
    model = new_model(config, data, 0).eval()
    model.load_state_dict(run.weights)
    with torch.no_grad():
        assert run.summary["transfer"] == pytest.approx(float((model(points).argmax(1) == y).double().mean()))
        assert float((dense(points).argmax(1) == y).double().mean()) <= run.rounds[0].summary["accuracy"]["clean"]


def test_gap_needs_a_radius_and_tests_with_its_own_steps(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="gap ranks and tests by attacks of radius eps, so eps is above 0; got 0.0"):
        train(Config(**SMALL | {"eps": 0.0}, method="gap", objective="natural", runs_dir=str(tmp_path / "runs")), [])
    assert not (tmp_path / "runs").exists()
    seen, real = [], gap.pgd
    monkeypatch.setattr(gap, "pgd", lambda model, x, y, eps, steps, **options: seen.append(steps) or real(model, x, y, eps, steps, **options))
    options = {"attack_steps": 2, "test_steps": 3}
    train(Config(**SMALL | {"epochs": 1}, method="gap", objective="natural", runs_dir=str(tmp_path), method_options=options), [])
    assert set(seen) == {2, 3}


@pytest.mark.parametrize("changes", [{}, {"lr": 0.01}, {"lr": 0.01, "method_options": {"lr_factor": 0.5}}])
@pytest.mark.parametrize("method", ["gap", "hard_concrete", "hydra", "grafting"])
def test_the_last_rate_is_in_proportion_to_the_first(tmp_path, method, changes):
    """Also where the configuration leaves both to the defaults, which are others for dense and for sparse methods."""
    short = {"hydra": {"search_epochs": 0}}.get(method, {})
    options = short | changes.get("method_options", {})
    config = Config(**SMALL | {"epochs": 1, "sparsity": 0.0 if method == "grafting" else 0.6} | changes | {"method_options": options}, method=method,
                    objective="natural", runs_dir=str(tmp_path))
    run = train(config, [])
    factor = options.get("lr_factor", {"gap": 1.0, "hard_concrete": 1.0}.get(method, 0.1))
    assert run.metrics[-1]["lr"] == pytest.approx(factor * run.rounds[0].metrics[-1]["lr"])


def test_int8_keeps_zeros_and_takes_fewer_bytes_and_refuses_what_cannot_be_traced():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    with torch.no_grad():
        for weight in prunable(net).values():
            weight[torch.rand(weight.shape) < 0.7] = 0
    x = torch.rand(200, 1, 8, 8)
    small = int8(net, x)
    weights = int8_weights(small)
    assert set(weights) == {"1", "3"} and all(w.dtype == torch.int8 for w in weights.values())
    for name, w in weights.items():
        assert int((w != 0).sum()) <= int(net[int(name)].weight.count_nonzero()) and not bool(w[net[int(name)].weight == 0].any())
    assert saved_bytes(small) < 0.4 * saved_bytes(net)
    with torch.no_grad():
        assert float((small(x) - net(x)).abs().max()) < 0.05 * float(net(x).abs().max())

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branch cannot be quantised"):
        int8(Branch(), x)


def test_int8_refuses_what_it_cannot_calibrate_or_run():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.rand(8, 1, 8, 8)
    for images, got in ((x[:0], r"torch.float32 of shape \(0, 1, 8, 8\)"), ((255 * x).to(torch.uint8), "torch.uint8"), (x.double(), "torch.float64"),
                        (x.tolist(), "list")):
        with pytest.raises(ValueError, match=f"calibrated on a batch of at least one image in torch.float32 .* got {got}"):
            int8(net, images)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="TransformerEncoder cannot be quantised: torch.fx cannot trace it"):
        int8(encoder, torch.rand(2, 3, 8))
    with pytest.raises(ValueError, match="Sequential cannot be quantised: it does not run in 8 bits"):
        int8(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), x)
    torch.testing.assert_close(int8(copy.deepcopy(net).double(), x)(x), int8(net, x)(x))


def test_without_pytorch_s_quantisation_int8_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
    with pytest.raises(ImportError, match="int8 needs PyTorch's own quantisation, torch.ao.quantization, and PyTorch .* does not have it"):
        int8(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.rand(8, 1, 8, 8))
