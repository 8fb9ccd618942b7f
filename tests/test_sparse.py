"""Invariants of masks, budgets, selection, history and methods, for whatever hypothesis thinks of."""
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sparselab.sparse.distributions import DISTRIBUTIONS, budget, layer_budgets, share_out
from sparselab.sparse.drop_grow import drop_and_grow
from sparselab.sparse.history import MaskHistory, pack_sorted, unpack_sorted
from sparselab.sparse.history_files import from_tensors, load, save, to_tensors
from sparselab.sparse.masks import prunable
from sparselab.sparse.schedules import CubicSparsity, Periodic
from sparselab.sparse.scores import top
from sparselab.sparse.sparsify import METHODS, method_options, sparsify

settings.register_profile("any speed", deadline=None)  # a busy machine is not a wrong result
settings.load_profile("any speed")

layer_shapes = st.one_of(st.tuples(st.integers(1, 60), st.integers(1, 60)),
                         st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5)))
networks = st.lists(layer_shapes, min_size=1, max_size=6).map(lambda shapes: {f"l{i}": s for i, s in enumerate(shapes)})
sparsities = st.floats(0, 0.999, allow_nan=False)


@given(networks, sparsities, st.sampled_from(DISTRIBUTIONS))
def test_budgets_sum_exactly_and_fit(shapes, sparsity, distribution):
    total = sum(map(math.prod, shapes.values()))
    assume(budget(sparsity, total) >= len(shapes))
    counts = layer_budgets(shapes, sparsity, distribution)
    assert sum(counts.values()) == budget(sparsity, total)
    assert all(1 <= counts[name] <= math.prod(shape) for name, shape in shapes.items())


@given(networks, sparsities, sparsities)
def test_a_smaller_budget_takes_weights_from_no_layer_to_another_by_more_than_rounding(shapes, a, b):
    total, (low, high) = sum(map(math.prod, shapes.values())), sorted((a, b))
    assume(budget(high, total) >= len(shapes))
    more, fewer = layer_budgets(shapes, low), layer_budgets(shapes, high)
    assert all(fewer[name] <= more[name] + 1 for name in shapes)


@given(networks, st.data())
def test_infeasible_budgets_name_a_sparsity_that_is_feasible(shapes, data):
    total = sum(map(math.prod, shapes.values()))
    assume(len(shapes) > 1)
    sparsity = data.draw(st.floats(1 - (len(shapes) - 1) / total, 1, exclude_max=True))
    assume(budget(sparsity, total) < len(shapes))
    with pytest.raises(ValueError, match="largest feasible sparsity is") as error:
        layer_budgets(shapes, sparsity)
    feasible = float(str(error.value).rsplit(" ", 1)[1].rstrip("."))
    assert sum(layer_budgets(shapes, feasible).values()) == budget(feasible, total)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 50)), min_size=1, max_size=8), st.data())
def test_what_is_shared_out_is_exact_and_fits(layers, data):
    shares, room = ({str(i): layer[part] for i, layer in enumerate(layers)} for part in (0, 1))
    total = data.draw(st.integers(0, sum(room.values())))
    found = share_out(total, shares, room)
    assert sum(found.values()) == total and all(0 <= found[name] <= room[name] for name in room)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=200), st.data())
def test_top_is_a_stable_sort(values, data):
    scores, k = torch.tensor(values, dtype=torch.float), data.draw(st.integers(0, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: -values[i])[:k])
    assert top(scores, k).tolist() == expected


@given(st.sets(st.integers(0, 2**40)))
def test_sorted_integers_survive_packing(values):
    values = np.array(sorted(values), dtype=np.int64)
    assert (unpack_sorted(pack_sorted(values)) == values).all()


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_history_replays_any_sequence_of_masks(densities, seed):
    rng = torch.Generator().manual_seed(seed)
    masks = [{name: torch.rand(shape, generator=rng) < d for name, shape in [("a", (7, 5)), ("b", (3, 2, 3, 3))]}
             for d in densities]
    history = MaskHistory(masks[0])
    for step, mask in enumerate(masks[1:], 1):
        history.record(step, mask)
    for version in (history, from_tensors(to_tensors(history))):
        for name in ("a", "b"):
            assert all(torch.equal(mask[name], m) for mask, (_, m) in zip(masks, version.replay(name), strict=True))
    rows = history.flow()
    for name in ("a", "b"):
        grown, dropped = (sum(row[key] for row in rows if row["name"] == name) for key in ("grown", "dropped"))
        assert int(masks[-1][name].sum()) == int(masks[0][name].sum()) + grown - dropped


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 200), st.integers(0, 200))
def test_a_history_folder_cut_anywhere_is_mended_by_the_next_save(tmp_path_factory, updates, kept, cut_bytes, cut_index):
    folder, rng = tmp_path_factory.mktemp("history"), torch.Generator().manual_seed(updates)
    masks = [torch.rand(40, 30, generator=rng) < 0.3 for _ in range(updates + 1)]
    history = MaskHistory({"w": masks[0]})
    for step, mask in enumerate(masks[1:], 1):
        history.record(step, {"w": mask})
    save(history, folder)
    for name, cut in (("updates.bin", cut_bytes), ("updates.jsonl", cut_index)):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:max(0, len(data) - cut)])
    found = load(folder)
    assert all(torch.equal(a, b) for a, (_, b) in zip(masks, found.replay("w"), strict=False))
    shorter = MaskHistory({"w": masks[0]})
    for update in history.updates[:kept]:
        shorter.extend(update)
    save(shorter, folder)
    assert load(folder).steps == shorter.steps
    save(history, folder)
    assert load(folder).steps == history.steps and torch.equal(load(folder).mask(-1, "w"), masks[-1])


def test_a_damaged_start_is_a_sentence(tmp_path):
    save(MaskHistory({"w": torch.ones(8, 8, dtype=torch.bool)}), tmp_path)
    (tmp_path / "start.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="does not hold a readable mask history .*train the run again"):
        load(tmp_path)


@given(st.integers(1, 50), st.integers(0, 100), st.integers(1, 200))
def test_periodic_ends_on_its_end_and_last_agrees_with_due(every, start, length):
    updates = Periodic(every, start, start + length)
    due = [t for t in range(start + length + 20) if updates.due(t)]
    assert due[-1] == start + length
    for t in range(start + length + 20):
        assert updates.last(t) == max((d for d in due if d <= t), default=0)


@given(sparsities, st.integers(0, 50), st.integers(1, 100))
def test_cubic_is_monotone_between_its_ends(final, start, length):
    cubic = CubicSparsity(0.0, final, start, start + length)
    values = [cubic(t) for t in range(start + length + 5)]
    assert values[start] == 0 or start == 0 and values[0] == 0
    assert values[start + length] == final and all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))


@given(st.integers(1, 80), st.data())
def test_drop_and_grow_keeps_the_strongest_and_counts_exactly(n, data):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    active = data.draw(st.integers(1, n))
    count, fraction = data.draw(st.integers(1, active)), data.draw(st.floats(0, 1))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=rng)[:active]] = True
    weight, slope = torch.rand(n, generator=rng) * mask, torch.rand(n, generator=rng)
    keep = count - int(fraction * count)
    new = drop_and_grow(mask, weight[mask], slope, keep, count)
    assert int(new.sum()) == count
    must_stay = min(keep, active)
    strongest = top(torch.where(mask, weight, -1.0), must_stay)
    assert bool(new[strongest].all())


def _network(kind: str) -> tuple[nn.Module, torch.Tensor]:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4)), torch.rand(16, 12)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(),
                        nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    return net, torch.rand(16, 2, 6, 6)


# of the layer that slimming can thin out: its channels, the weights that go with each, and those of the whole network
CHANNELS = {"mlp": {"count": 20, "per": 12 + 4, "total": 320},
            "cnn": {"count": 6, "per": 2 * 9 + 4 * 9, "total": 6 * 18 + 4 * 54 + 6 * 2 + 4 * 96}}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05), "momentum": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True), "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.sampled_from(sorted(OPTIMIZERS)), st.sampled_from(["mlp", "cnn"]),
       st.floats(0, 0.95), st.integers(5, 30), st.integers(0, 3), st.booleans())
def test_every_method_keeps_its_promise_with_every_optimizer(method, optimizer, kind, sparsity, steps, seed, micro):
    torch.manual_seed(seed)
    net, x = _network(kind)
    y = torch.arange(16) % 4
    opt = OPTIMIZERS[optimizer](net.parameters())
    options = {name: value for name, value in {"update_every": 3, "rounds": 2, "example": x}.items() if name in method_options(method)}
    channels = CHANNELS[kind] if method == "slimming" else None
    assume(channels is None or budget(sparsity, channels["total"]) >= channels["total"] - channels["per"] * (channels["count"] - 1))
    sparsifier = sparsify(net, opt, method, sparsity, steps, seed, **options)
    for _ in range(steps):
        opt.zero_grad()
        sparsifier.see_loss(lambda: nn.functional.cross_entropy(net(x), y))
        for part in ([slice(0, 8), slice(8, 16)] if micro else [slice(0, 16)]):
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
        opt.step()
        sparsifier.step()
        assert sparsifier.masks.nnz == sparsifier.budget == sum(int(m.sum()) for m in sparsifier.masks.values())
        for name, weight in prunable(net).items():
            off = ~sparsifier.masks[name]
            moments = [t for t in opt.state[weight].values() if torch.is_tensor(t) and t.shape == weight.shape]
            assert all(bool((t[off] == 0).all()) for t in (weight.detach(), *moments)), name
    total = sparsifier.masks.total
    if channels:
        assert total == channels["total"] and abs(sparsifier.masks.nnz - budget(sparsity, total)) <= channels["per"] / 2
    else:
        assert sparsifier.masks.nnz == (total if method == "dense" else budget(sparsity, total))
    for name, mask in sparsifier.masks.items():
        assert torch.equal(sparsifier.history.mask(-1, name), mask)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_jackpots_leaves_every_parameter_bit_by_bit_as_it_was(optimizer):
    torch.manual_seed(0)
    net, x = _network("cnn")
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt = OPTIMIZERS[optimizer](net.parameters())
    sparsifier = sparsify(net, opt, "jackpots", 0.7, 12)
    masks = [{name: mask.clone() for name, mask in sparsifier.masks.items()}]
    for _ in range(12):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(16) % 4).backward()
        opt.step()
        sparsifier.step()
        for name, parameter in net.named_parameters():
            mask = sparsifier.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
            assert torch.equal(parameter[mask], trained[name][mask]), name
    masks.append(sparsifier.masks)
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0]), "the mask has not moved"
    assert all(int(masks[0][name].sum()) == int(masks[1][name].sum()) for name in masks[0])


def test_static_takes_a_mask_that_was_found_elsewhere_and_refuses_one_that_breaks_the_promise():
    net, x = _network("mlp")
    found = {name: torch.rand(w.shape) < 0.4 for name, w in prunable(net).items()}
    nnz, total = (sum(map(int, (m.sum() if i else m.numel() for m in found.values()))) for i in (1, 0))
    opt = torch.optim.SGD(net.parameters(), 0.1)
    sparsifier = sparsify(net, opt, "static", 1 - nnz / total, 5, begin=found)
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in found.items())
    with pytest.raises(ValueError, match=f"begin holds {nnz:,} weights, but sparsity 0.0 promises {total:,}"):
        sparsify(net, opt, "static", 0.0, 5, begin=found)
    with pytest.raises(ValueError, match="begin has masks of 0.weight, but the model has 0.weight, 3.weight"):
        sparsify(net, opt, "static", 0.5, 5, begin={"0.weight": found["0.weight"]})


def test_slimming_says_which_models_and_sparsities_it_can_do():
    bare = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="this model has no BatchNorm between two layers; choose one that has"):
        sparsify(bare, torch.optim.SGD(bare.parameters(), 0.1), "slimming", 0.5, 10, example=torch.rand(2, 4))
    net, x = _network("mlp")
    with pytest.raises(ValueError, match="keeps 3 weights, but one channel in each layer .* 16; the largest feasible .* 0.95"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "slimming", 0.99, 10, example=x)
    with pytest.raises(ValueError, match="give it a small batch of inputs"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "slimming", 0.5, 10)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_saved_in_the_middle_a_method_continues_to_the_same_bits(method):
    def start():
        torch.manual_seed(0)
        net, x = _network("cnn")
        opt = torch.optim.Adam(net.parameters(), 1e-2)
        options = {k: v for k, v in {"update_every": 4, "accumulate": 3, "example": x}.items() if k in method_options(method)}
        return net, x, opt, sparsify(net, opt, method, 0.3 if method == "slimming" else 0.8, 24, **options)

    def run(net, x, opt, sparsifier, steps):
        for _ in range(steps):
            opt.zero_grad()
            sparsifier.see_loss(lambda: nn.functional.cross_entropy(net(x), torch.arange(16) % 4))
            nn.functional.cross_entropy(net(x), torch.arange(16) % 4).backward()
            opt.step()
            sparsifier.step()

    whole = start()
    run(*whole, 24)
    for cut in (1, 10, 11, 24):
        first, second = start(), start()
        run(*first, cut)
        second[0].load_state_dict(first[0].state_dict())
        second[2].load_state_dict(first[2].state_dict())
        second[3].load_state_dict(first[3].state_dict())
        run(*second, 24 - cut)
        for a, b in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
            assert a.numpy().tobytes() == b.numpy().tobytes()  # also the sign of a zero
        assert second[3].history.flow() == whole[3].history.flow()


def test_growth_uses_the_gradient_of_the_trained_loss():
    net = nn.Linear(4, 1, bias=False)
    opt = torch.optim.SGD(net.parameters(), 0.0)
    sparsifier = sparsify(net, opt, "rigl", 0.5, 10, update_every=1, drop_fraction=0.6, end=1.0)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[5.0, 1.0, 0.0, 0.0]]))
        sparsifier.load_state_dict(sparsifier.state_dict() | {"masks": {"weight": net.weight != 0}})
    (net.weight * torch.tensor([[0.0, 2.0, -1.0, 3.0]])).sum().backward()
    opt.step()
    sparsifier.step()
    assert sparsifier.masks["weight"].tolist() == [[True, False, False, True]]
    assert net.weight.tolist() == [[5.0, 0.0, 0.0, 0.0]]


def test_a_model_without_prunable_layers_is_refused():
    net = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="BatchNorm1d has no Linear or Conv layer"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "static", 0.5, 10)
