"""CACTUS: the loss of the set by hand, rounding against PyTorch's own, BatchNorm of the pruned copy, counts and what is refused."""
import copy

import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.nn.functional import cross_entropy

from sparselab.learn import Config, objective, train
from sparselab.learn.files import read_tensors
from sparselab.sparse import sparsify
from sparselab.sparse.cactus import quantised
from sparselab.sparse.masks import prunable

SMALL = dict(model="mlp", model_options={"widths": [16]}, method="cactus", sparsity=0.8, eps=0.02, epochs=2, train_samples=100, test_samples=20,
             batch_size=50, device="cpu")


def network(norm: bool = False) -> nn.Module:
    middle = [nn.BatchNorm1d(12)] if norm else []
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 12), *middle, nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_that_of_pytorch_s_quantisation(bits):
    weight = torch.randn(6, 5, 3, 3)
    top = 2 ** (bits - 1) - 1
    for dim in (0, 1):
        scale = weight.abs().amax([d for d in range(4) if d != dim]) / top
        theirs = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale, dtype=torch.int32), dim, -top, top)
        found = quantised(weight, bits, dim)
        assert torch.allclose(found, theirs, atol=1e-6) and all(len(part.unique()) <= 2 * top + 1 for part in found.unbind(dim))
    weight[weight.abs() < 0.5] = 0
    assert not quantised(weight, bits)[weight == 0].any(), "pruned weights stay zero"


@pytest.mark.parametrize(("goal", "progress"), [("natural", 0.5), ("pgd", 1.0), ("ibp", 1.0), ("crown_ibp", 0.2), ("sabr", 1.0)])
@pytest.mark.parametrize(("rates", "bits"), [((), 0), ((), 3), ((0.3, 0.0, 0.8), 3)])
def test_the_gradient_is_that_of_the_mean_loss_of_the_set(goal, progress, rates, bits):
    """Every copy built by hand as a network of its own; pruning passes the gradient of what it keeps, rounding all of it."""
    net, x, y = network(), torch.rand(20, 1, 3, 3), torch.arange(20) % 3
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loss = objective(goal, 0.05)
    cactus = sparsify(net, optimizer, "cactus", 0.8, 5, rates=list(rates), bits=bits)
    cactus.see_loss(lambda: loss(net, x, y, progress))
    loss(net, x, y, progress).backward()
    cactus.mask_gradients()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    sizes = sorted(((-abs(v), name, i) for name, p in trained.items() if p.dim() > 1 for i, v in enumerate(p.flatten().tolist())))
    total, members = {name: torch.zeros_like(p) for name, p in trained.items()}, [(0.0, 0)]
    members += list(dict.fromkeys((rate, 0) for rate in (*rates, 0.8) if rate)) + ([(0.8, bits)] if bits else [])
    for rate, digits in members:
        member = copy.deepcopy(net)
        keep = {name: torch.zeros(p.numel()) for name, p in trained.items() if p.dim() > 1}
        for _, name, i in sizes[:round((1 - rate) * len(sizes))]:
            keep[name][i] = 1
        for name, p in member.named_parameters():
            if p.dim() > 1:
                kept = trained[name] * keep[name].view_as(p)
                p.data.copy_(quantised(kept, digits) if digits else kept)
        member.zero_grad()
        objective(goal, 0.05)(member, x, y, progress).backward()
        for name, p in member.named_parameters():
            total[name] += p.grad * keep[name].view_as(p) if p.dim() > 1 else p.grad
    for name, slope in total.items():
        assert torch.allclose(found[name], slope / len(members), atol=1e-6), name
        assert torch.equal(net.get_parameter(name), trained[name]), "the weights come back"


def steps(net, cactus, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        cactus.see_loss(lambda x=x, y=y: cross_entropy(net(x), y))
        cross_entropy(net(x), y).backward()
        optimizer.step()
        cactus.step()


def test_the_count_is_the_total_until_the_last_step_and_the_whole_network_is_kept():
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    cactus = sparsify(net, optimizer, "cactus", 0.7, 6)
    batches = [(torch.rand(8, 1, 3, 3), torch.arange(8) % 3) for _ in range(6)]
    steps(net, cactus, optimizer, batches[:5])
    assert cactus.masks.nnz == cactus.budget == cactus.masks.total and "full" not in cactus.snapshots
    steps(net, cactus, optimizer, batches[5:])
    whole = cactus.snapshots["full"]
    assert cactus.masks.nnz == cactus.budget == round(0.3 * cactus.masks.total) == sum(int(w.count_nonzero()) for w in prunable(net).values())
    least = torch.cat([whole[name].abs()[mask] for name, mask in cactus.masks.items()]).min()
    for name, mask in cactus.masks.items():
        assert torch.equal(net.get_parameter(name), whole[name] * mask) and (not (~mask).any() or whole[name].abs()[~mask].max() <= least)


def test_the_pruned_network_has_the_statistics_of_its_own_passes():
    """Against a plain network that is given the pruned weights of every step."""
    net = network(norm=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    cactus, twin = sparsify(net, optimizer, "cactus", 0.7, 5, bits=4), copy.deepcopy(net)
    alone = copy.deepcopy(net)
    for _ in range(5):
        x, y = torch.rand(16, 1, 3, 3), torch.arange(16) % 3
        for model, rate in ((twin, 0.7), (alone, 0.0)):
            model.load_state_dict({name: p for name, p in net.state_dict().items() if "running" not in name and "batches" not in name}, strict=False)
            with torch.no_grad():
                for name, weight in cactus.compressed(rate, 0)[0].items():
                    model.get_parameter(name).copy_(weight)
                model(x)
        steps(net, cactus, optimizer, [(x, y)])
    for name, value in twin.named_buffers():
        assert torch.equal(net.get_buffer(name), value), name
        assert torch.equal(cactus.snapshots["full"][name], alone.get_buffer(name)), name
    assert not torch.allclose(net[2].running_mean, alone[2].running_mean)


def test_without_copies_it_is_dense_training_and_a_cut():
    net = network()
    twin = copy.deepcopy(net)
    optimizer, plain = torch.optim.Adam(net.parameters(), 0.01), torch.optim.Adam(twin.parameters(), 0.01)
    cactus = sparsify(net, optimizer, "cactus", 0.7, 4, copies=False)
    for _ in range(4):
        x, y = torch.rand(8, 1, 3, 3), torch.arange(8) % 3
        cross_entropy(twin(x), y).backward()
        plain.step(), plain.zero_grad()
        steps(net, cactus, optimizer, [(x, y)])
    assert all(torch.equal(cactus.snapshots["full"][name], p) for name, p in twin.named_parameters())


def test_a_step_that_was_not_offered_the_loss_says_what_to_call():
    net, x = network(), torch.rand(4, 1, 3, 3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sparsify(net, optimizer, "cactus", 0.5, 9)
    net(x).sum().backward()
    with pytest.raises(ValueError, match="call sparsifier.see_loss"):
        optimizer.step()


def test_a_run_keeps_both_networks_and_its_cost_is_that_of_the_set(tmp_path):
    run, alone = (train(Config(**SMALL, objective="ibp", method_options=options, runs_dir=str(tmp_path)), []) for options in ({}, {"copies": False}))
    assert run.summary["nnz"] == round(0.2 * run.summary["total"]) and 0 <= run.summary["full_accuracy"] <= 1
    assert run.summary["flops"]["training"] == pytest.approx(3 * alone.summary["flops"]["training"], rel=1e-6)
    whole = read_tensors(run.path / "full.safetensors", load)[0]
    for name in run.history.names:
        assert torch.equal(run.weights[name], whole[name] * run.history.mask(-1, name)) and (whole[name] != 0).all()


@pytest.mark.parametrize(("options", "sentence"), [
    ({"bits": 1}, "bits is from 2 to 16, or 0 for no rounded copy; got 1"), ({"bits": 17}, "got 17"), ({"bits": 4.0}, "got 4.0"),
    ({"bits": True}, "got True"),
    ({"rates": 0.5}, "rates is a list of sparsities, .* got 0.5"), ({"rates": [1.5]}, "each of rates is a share, from 0 to 1; got 1.5"),
    ({"rates": ["much"]}, "got 'much'"), ({"rates": [0.999]}, "largest feasible sparsity"), ({"copies": 1}, "copies is true or false; got 1"),
    ({"bit": 4}, "Did you mean 'bits'"), ({"dense": None}, "dense is a list of names")])
def test_what_cannot_be_is_a_sentence_and_writes_nothing(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(Config(**SMALL | {"model_options": {"widths": [4]}}, method_options=options, objective="natural", runs_dir=str(tmp_path / "runs")), [])
    assert not (tmp_path / "runs").exists()
