"""Gibbs pruning draws from the paper's distribution, and gradual pruning takes whole kernels and filters."""
import itertools

import pytest
import torch
from torch import nn

from sparselab import sparsify
from sparselab.sparse.gibbs import ANNEALED, COUPLING, draw_filters, draw_kernels, kernel_law
from sparselab.sparse.pruning import group_energy, group_size, largest_groups

STATES = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9)), dtype=torch.double)


def enumerated(excess, coupling, beta):
    """exp(-beta H) / Z of all 512 states, H = x A x + b x with A = -c off the diagonal and b = Q - w^2, as the released code has it."""
    pairs = -coupling * (1 - torch.eye(9, dtype=torch.double))
    energy = torch.einsum("si,ij,sj->s", STATES, pairs, STATES) + STATES @ -excess.double()
    return torch.softmax(-beta * energy, 0)


def sampled(excess, coupling, beta):
    """The probability with which the sampler's two steps reach each of the 512 states."""
    counts, last = kernel_law(excess, coupling, beta)
    found = []
    for state in STATES.tolist():
        left = sum(x > 0 for x in state)
        p = float(counts[left])
        for i in reversed(range(9)):
            on = float(last[i, left])
            p *= on if state[i] > 0 else 1 - on
            left -= state[i] > 0
        found.append(p)
    return torch.tensor(found, dtype=torch.double)


@pytest.mark.parametrize("beta", [1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("coupling", [0.0, COUPLING["kernel"], 1.0])
def test_a_kernel_has_the_probabilities_of_the_paper(coupling, beta):
    torch.manual_seed(0)
    for scale in (0.02, 0.3):
        excess = (scale * torch.randn(9)).square() - scale**2
        assert (sampled(excess, coupling, beta) - enumerated(excess, coupling, beta)).abs().max() < 1e-6


def test_a_kernel_is_eighteen_times_as_cold_as_its_mean():
    """Between all in and all out the pairs cancel, and what is left is sigma(2 * 9 * beta * mean(w^2 - Q))."""
    excess = torch.linspace(-0.02, 0.05, 9)
    law = enumerated(excess, COUPLING["kernel"], 3.0)
    assert torch.isclose(law[-1] / (law[-1] + law[0]), torch.sigmoid(18 * 3.0 * excess.mean().double()))


def test_kernels_are_drawn_as_often_as_their_probabilities_say():
    excess, n = torch.tensor([0.3, -0.2, 0.1]).expand(20_000, 3), 20_000
    drawn = draw_kernels(excess, 0.2, 1.5, torch.Generator().manual_seed(0))
    counts, last = kernel_law(excess[0], 0.2, 1.5)
    all_in, none = (drawn.all(1).double().mean(), counts[3]), ((~drawn).all(1).double().mean(), counts[0])
    alone = (drawn[:, 0] & ~drawn[:, 1] & ~drawn[:, 2]).double().mean(), counts[1] * (1 - last[2, 1]) * (1 - last[1, 1]) * last[0, 1]
    for frequency, p in (all_in, none, alone):
        assert abs(frequency - p) < 4.5 * (p * (1 - p) / n) ** 0.5


def test_a_cold_filter_is_in_or_out_as_a_whole():
    excess = torch.stack([torch.full((6, 9), 0.01), torch.full((6, 9), -0.01)])
    excess[0, 0], excess[1, 0] = -0.5, 0.5  # of one kernel, against the rest
    excess[0, 1:] += 0.2
    excess[1, 1:] -= 0.2
    drawn = draw_filters(excess, COUPLING["filter"], ANNEALED["filter"][1], 50, torch.Generator().manual_seed(0))
    assert drawn[0].all() and not drawn[1].any()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_filter_of_few_channels_is_drawn(channels):
    hot = draw_filters(torch.zeros(4000, channels, 4), COUPLING["filter"], 1e-9, 3, torch.Generator().manual_seed(0))
    assert hot.shape == (4000, channels, 4) and abs(hot.double().mean() - 0.5) < 0.02


def trained(method, steps=12, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    x, y, optimizer = torch.rand(16, 2, 6, 6), torch.arange(16) % 4, torch.optim.Adam(net.parameters(), 1e-2)
    sparsifier = sparsify(net, optimizer, method, 0.6, steps, distribution="uniform", **options)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        sparsifier.step()
        assert sparsifier.masks.nnz == sparsifier.budget
    return net, sparsifier


@pytest.mark.parametrize("method", ["gmp", "gibbs"])
@pytest.mark.parametrize("structure", ["kernel", "filter"])
def test_groups_end_whole(method, structure):
    net, sparsifier = trained(method, structure=structure, **({"update_every": 3} if method == "gmp" else {"sweeps": 3}))
    for name, keep in (("0.weight", {"kernel": 5, "filter": 2}), ("2.weight", {"kernel": 19, "filter": 3})):  # 40 % of 12, 6, 48 and 8
        mask = sparsifier.masks[name].flatten({"kernel": 2, "filter": 1}[structure])
        assert torch.equal(mask.any(-1), mask.all(-1)) and int(mask.any(-1).sum()) == keep[structure]
    assert int(sparsifier.masks["5.weight"].sum()) == round(0.4 * 512)


def test_the_largest_groups_are_kept_by_their_mean_square():
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for structure, dims in (("kernel", (2, 3)), ("filter", (1, 2, 3))):
        energy = weight.square().mean(dims)
        assert torch.allclose(group_energy(weight, structure), energy)
        mask = largest_groups(weight, 2, structure)
        assert int(mask.sum()) == 2 * group_size(weight.shape, structure)
        assert set(energy[mask.any(dim=dims)].tolist()) == set(energy.flatten().sort().values[-2:].tolist())


def test_whole_groups_over_all_layers_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match="Whole filters are counted layer by layer: choose distribution 'uniform' or 'erk'"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "gmp", 0.5, 10, structure="filter")
    with pytest.raises(ValueError, match="no structure called 'kernels'"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "gmp", 0.5, 10, structure="kernels")


def test_a_projection_leaves_the_moments_alone():
    """VeriCompress' loop is that of its code: Adam that trains all weights, which are set to zero now and then behind its back."""
    torch.manual_seed(0)
    x, y, seen = torch.rand(32, 12), torch.arange(32) % 4, []
    for by_hand in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        sparsifier = None if by_hand else sparsify(net, optimizer, "vlr_projection", 0.8, 12, rounds=3, distribution="uniform")

        def project(net=net):
            for layer in (net[0], net[2]):
                size = layer.weight.detach().abs()
                layer.weight.data[size < size.flatten().sort(descending=True).values[round(0.2 * size.numel()) - 1]] = 0
        if by_hand:
            project()
        for step in range(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            if by_hand and (step + 1) % 4 == 0:
                project()
            elif not by_hand:
                sparsifier.step()
        seen.append([*net.state_dict().values(), *(s["exp_avg"] for s in optimizer.state.values())])
    assert all(map(torch.equal, *seen)) and seen[0][4].count_nonzero() > 0.5 * seen[0][4].numel()


@pytest.mark.parametrize("structure", ["weight", "kernel", "filter"])
def test_every_layer_is_cold_before_the_mask_is_fixed(structure):
    """Also linear layers, and filters of one channel: drawn, at the end of the annealing, they are nearly what they will be."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 4))
    sparsifier = sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "gibbs", 0.75, 100, structure=structure)
    for weight in sparsifier.shadow.values():
        weight.copy_(weight.sign() * torch.linspace(0.1, 2, weight.numel()).view(weight.shape))  # groups far apart
    hot = {name: float(mask.double().mean()) for name, mask in sparsifier.masks.items()}
    sparsifier.steps = 80
    sparsifier.draw()
    for name, mask in sparsifier.masks.items():
        assert abs(hot[name] - 0.5) < 0.25 and abs(float(mask.double().mean()) - 0.25) < 0.02, name


@pytest.mark.parametrize("method, options", [("vlr_projection", {"rounds": 3}), ("gibbs", {"structure": "kernel"}),
                                             ("gibbs", {"structure": "filter", "sweeps": 3}), ("gmp", {"structure": "filter", "update_every": 3})])
@pytest.mark.parametrize("stopped", [4, 6])  # vlr_projection: projected, and between two projections
def test_a_training_that_was_stopped_resumes_to_the_same_bits(method, options, stopped):
    x, y = torch.rand(16, 2, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4

    def begun(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        return net, optimizer, sparsify(net, optimizer, method, 0.6, 12, distribution="uniform", **options)

    def train(net, optimizer, sparsifier, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            sparsifier.step()

    whole, first, second = begun(0), begun(0), begun(1)
    train(*whole, 12)
    train(*first, stopped)
    for part, state in zip(second, [part.state_dict() for part in first], strict=True):
        part.load_state_dict(state)
    train(*second, 12 - stopped)
    for one, other in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    moments = [[t for state in optimizer.state.values() for t in state.values()] for _, optimizer, _ in (whole, second)]
    assert all(map(torch.equal, *moments))


def test_sweeps_and_betas_that_cannot_be_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    for options, sentence in (({"sweeps": 0}, "sweeps is a whole number of at least 1; got 0"), ({"beta_start": 2e4}, "beta rises from")):
        with pytest.raises(ValueError, match=sentence):
            sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "gibbs", 0.5, 10, **options)


def test_a_loop_of_projections_costs_dense_training():
    net = nn.Sequential(nn.Linear(12, 4))
    sparsifier = sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "vlr_projection", 0.9, 8, rounds=2)
    assert [3 * 10.0 + sparsifier.overhead(step, 10.0, 100.0) for step in (1, 4, 5)] == [300.0] * 3, "all weights are trained in every step"
