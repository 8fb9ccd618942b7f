"""Invariants of masks, budgets, selection, history and methods, for whatever hypothesis thinks of."""
import copy
import gc
import io
import math
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from sparselab.learn.costs import FlopCount, layer_flops
from sparselab.sparse.cht import drawn, link_scores
from sparselab.sparse.distributions import DISTRIBUTIONS, budget, layer_budgets, share_out
from sparselab.sparse.drop_grow import Updating, drop_and_grow
from sparselab.sparse.fan_in import fan_in
from sparselab.sparse.history import MaskHistory, pack_sorted, unpack_sorted
from sparselab.sparse.history_files import from_tensors, load, save, to_tensors
from sparselab.sparse.masks import Masks, assign, mask_gradients, mask_weights, new_state, prunable
from sparselab.sparse.pruning import VLRProjection
from sparselab.sparse.schedules import CubicSparsity, Periodic
from sparselab.sparse.scores import generator_for, top
from sparselab.sparse.sparsifier import Sparsifier
from sparselab.sparse.sparsify import METHODS, method_options, sparsify
from sparselab.sparse.srigl import constant_fan_in

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


@given(st.lists(st.tuples(st.sampled_from([-math.inf, -1, 0, 2]), st.booleans()), min_size=1, max_size=100), st.data())
def test_top_never_returns_a_place_that_is_taken(places, data):
    scores, taken = torch.tensor([score for score, _ in places], dtype=torch.float), torch.tensor([gone for _, gone in places])
    free = [i for i, (_, gone) in enumerate(places) if not gone]
    k = data.draw(st.integers(0, len(free)))
    assert top(scores, k, taken).tolist() == sorted(sorted(free, key=lambda i: -places[i][0])[:k])
    with pytest.raises(ValueError, match=f"the {len(free) + 1} highest of {len(free)} scores that are not taken"):
        top(scores, len(free) + 1, taken)


@pytest.mark.parametrize("k", [1000, 200_000])
def test_top_of_a_million_scores_returns_no_place_that_is_taken(k):
    scores = torch.full((1_100_000,), -math.inf)
    taken = torch.zeros(1_100_000, dtype=torch.bool)
    taken[:900_001] = True
    scores[:900_000] = 1.0
    assert top(scores, k - 1, taken).tolist() == list(range(900_001, 900_000 + k))
    with pytest.raises(ValueError, match="that are not taken"):
        top(scores, 200_000, taken)


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
            kept = [] if method == "vlr_projection" else moments  # its projections leave them alone, as the released code does
            assert all(bool((t[off] == 0).all()) for t in (weight.detach(), *kept)), name
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


def test_shuffled_jackpots_begin_with_the_counts_of_the_largest_weights_at_other_places():
    def first(**options):
        torch.manual_seed(0)
        net, _ = _network("cnn")
        return sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "jackpots", 0.7, 12, **options).masks
    largest, shuffled, again = first(), first(shuffle=True), first(shuffle=True)
    for name, mask in largest.items():
        assert int(mask.sum()) == int(shuffled[name].sum()) and torch.equal(shuffled[name], again[name])
    assert any(not torch.equal(largest[name], shuffled[name]) for name in largest)


@pytest.mark.parametrize("refine", [True, False])
def test_masks_of_edst_move_while_a_member_settles_and_rest_at_its_end(refine):
    torch.manual_seed(0)
    net, x = _network("mlp")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    edst, moved = sparsify(net, optimizer, "edst", 0.7, 90, update_every=6, refine=refine), []
    for step in range(1, 91):
        before = {name: mask.clone() for name, mask in edst.masks.items()}
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(16) % 4).backward()
        optimizer.step()
        edst.step()
        moved += [step] * any(not torch.equal(mask, edst.masks[name]) for name, mask in before.items())
    settling = [36, 42, 56, 62, 76, 82] if refine else []  # members end after 50, 70 and 90 steps
    assert set(moved) <= {6, 12, 18, 24, 30, *settling, 50, 70} and {50, 70} <= set(moved)
    assert bool(set(settling) & set(moved)) == refine


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

    whole, saved, done = start(), {}, 0
    for cut in (1, 10, 11, 24):
        run(*whole, cut - done)
        done, saved[cut] = cut, copy.deepcopy([whole[part].state_dict() for part in (0, 2, 3)])
    for cut, states in saved.items():
        second = start()
        for part, state in zip((0, 2, 3), states, strict=True):
            second[part].load_state_dict(state)
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


# ---- whoever steps: the weights are counted, not the masks

TORCH_OPTIMIZERS = {name: kind for name, kind in vars(torch.optim).items()
                    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer}
STEPS = 10


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as commonly written: up the gradient, a second gradient there, back, and an ordinary step."""

    def __init__(self, params, base, **options):
        super().__init__(params, {"rho": 0.05})
        self.base = base([p for group in self.param_groups for p in group["params"]], **options)

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        moved = [(p, p.clone()) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, _ in moved]).norm()
        for p, _ in moved:
            p.add_(p.grad, alpha=0.05 / float(norm + 1e-12))
        torch.enable_grad()(closure)()
        for p, before in moved:
            p.data = before
        self.base.step()
        return loss


def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4))


IMAGES, LABELS = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def _sparsified(method: str, net: nn.Module, optimizer, steps: int = STEPS, sparsity: float | None = None, **options):
    small = {"update_every": 4, "accumulate": 2, "rounds": 3, "iterations": 3, "record_every": 4,
             "example": IMAGES.to(next(net.parameters()))}
    options = {name: value for name, value in small.items() if name in method_options(method)} | options
    sparsity = (0.3 if method == "slimming" else 0.7) if sparsity is None else sparsity
    return sparsify(net, optimizer, method, sparsity, steps, **options)


def _loss(net: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(net(IMAGES.to(next(net.parameters()))), LABELS)


def _closure(net, *optimizers):
    def closure():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = _loss(net)
        loss.backward()
        return loss
    return closure


def _check(sparsifier, what: str = "") -> None:
    """Nothing is alive outside the masks, the promise holds, and the optimizers treat pruned weights as new ones."""
    net, masks = sparsifier.model, sparsifier.masks
    for name, weight in prunable(net).items():
        assert not bool((weight.detach() != 0)[~masks[name]].any()), f"{what}: {name} lives outside its mask"
        assert not bool(weight.detach().signbit()[~masks[name]].any()), f"{what}: {name} holds -0.0"
        trained = isinstance(sparsifier, VLRProjection)  # the next step trains all weights, with the moments that they have
        for optimizer in () if trained else sparsifier.optimizers:
            group = next((g for g in optimizer.param_groups if any(p is weight for p in g["params"])), {})
            for key, value in optimizer.state.get(weight, {}).items():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    slack = group.get("eps", 0.0) if key == "exp_inf" else 0.0  # Adamax adds eps to every |gradient|
                    off = value[~masks[name]] - new_state(key, group)
                    assert bool((off.abs() <= slack).all()), f"{what}: {key} of {name}"
    assert masks.nnz == sum(masks.counts.values()) == sparsifier.budget, what


def _train(net, optimizer, sparsifier, steps: int = STEPS) -> None:
    for _ in range(steps):
        sparsifier.see_loss(lambda: _loss(net))
        _closure(net, optimizer)()
        optimizer.step()
        sparsifier.step()
        _check(sparsifier)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_optimizer_of_torch_keeps_every_mask(method):
    for number, (name, kind) in enumerate(sorted(TORCH_OPTIMIZERS.items()), sorted(METHODS).index(method)):
        if name == "SparseAdam":
            continue
        closed = name == "LBFGS" or number % 2 == 0  # the next method has it the other way round
        net = _tiny()
        matrices = [p for p in net.parameters() if p.dim() == 2]
        optimizers = [kind(matrices if name == "Muon" else net.parameters(), lr=0.05)]
        if name == "Muon":  # it takes matrices only: a second optimizer has the others
            optimizers.append(torch.optim.SGD([p for p in net.parameters() if p.dim() != 2], 0.05))
        sparsifier = _sparsified(method, net, optimizers[0])
        closure = _closure(net, *optimizers)
        for _ in range(STEPS):
            sparsifier.see_loss(lambda net=net: _loss(net))
            if not closed:
                closure()
            for optimizer in optimizers:
                optimizer.step(closure) if closed else optimizer.step()
            sparsifier.step()
            _check(sparsifier, f"{name}, {closed=}")


def test_sparse_adam_is_refused_by_name():
    net = _tiny()
    with pytest.raises(ValueError, match="SparseAdam takes sparse gradients"):
        sparsify(net, torch.optim.SparseAdam(list(net.parameters())), "rigl", 0.5, 10)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}, {"maximize": True}], ids=str)
def test_every_implementation_of_adam_keeps_the_mask(options):
    net = _tiny()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, **options)
    _train(net, optimizer, _sparsified("rigl", net, optimizer))


def _sam(net, sparsifier, optimizer):
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        sparsifier.see_loss(lambda: _loss(net))
        optimizer.step(_closure(net, optimizer))
        sparsifier.step()
        _check(sparsifier)


def _two_steps(net, sparsifier, optimizer):
    for _ in range(STEPS):
        sparsifier.see_loss(lambda: _loss(net))
        for _ in range(2):
            _closure(net, optimizer)()
            optimizer.step()
            _check(sparsifier)
        sparsifier.step()
        _check(sparsifier)


def _accumulated(net, sparsifier, optimizer):
    for _ in range(STEPS):
        sparsifier.see_loss(lambda: _loss(net))
        optimizer.zero_grad()
        for _ in range(3):
            (_loss(net) / 3).backward()
        optimizer.step()
        sparsifier.step()
        _check(sparsifier)


def _two_optimizers(net, sparsifier, optimizer):
    optimizers = [torch.optim.AdamW(net[:3].parameters(), 1e-2), torch.optim.SGD(net[3:].parameters(), 0.1, 0.9)]
    for _ in range(STEPS):
        sparsifier.see_loss(lambda: _loss(net))
        _closure(net, *optimizers)()
        for optimizer in optimizers:
            optimizer.step()
            _check(sparsifier)
        sparsifier.step()
        _check(sparsifier)


def _late_backward(net, sparsifier, optimizer):
    for _ in range(STEPS):
        sparsifier.see_loss(lambda: _loss(net))
        _closure(net, optimizer)()
        sparsifier.mask_gradients()
        _loss(net).backward()
        optimizer.step()
        _check(sparsifier)
        sparsifier.step()
        _check(sparsifier)


def _scaled(net, sparsifier, optimizer, fused=False):
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    for i in range(STEPS):
        factor = torch.inf if i in (0, 3, 7) else 1.0
        optimizer.zero_grad()
        sparsifier.see_loss(lambda factor=factor: factor * _loss(net))
        scaler.scale(factor * _loss(net)).backward()
        if i % 2:
            scaler.unscale_(optimizer)
            sparsifier.mask_gradients()  # as a loop does that clips
        scaler.step(optimizer)
        scaler.update()
        sparsifier.step()
        _check(sparsifier)


def _averaged(net, sparsifier, optimizer):
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    for i in range(STEPS):
        _train(net, optimizer, sparsifier, 1)
        average.update_parameters(net)
        if i % 4 == 2:  # trained on from the average, whose weights are those of all masks so far
            update_bn([IMAGES], average)
            net.load_state_dict(average.module.state_dict())
            assert sparsifier.masks.nnz == sum(sparsifier.masks.counts.values())
    for mine, theirs in zip(net.parameters(), average.module.parameters(), strict=True):
        mine.data.copy_(theirs)  # by hand: nobody hears of it, and nnz counts what is there
    alive = sum(int(w.count_nonzero()) for w in prunable(net).values())
    assert sparsifier.masks.nnz >= alive
    sparsifier.mask_weights()
    _check(sparsifier)


def _copied(net, sparsifier, optimizer):
    _train(net, optimizer, sparsifier, 5)
    net2, optimizer2, sparsifier2 = copy.deepcopy((net, optimizer, sparsifier))
    _train(net, optimizer, sparsifier, STEPS - 5)
    _train(net2, optimizer2, sparsifier2, STEPS - 5)
    for a, b in zip(net.parameters(), net2.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


def _pickled(net, sparsifier, optimizer):
    for _ in range(3):
        file = io.BytesIO()
        torch.save((net, optimizer, sparsifier), file)
        file.seek(0)
        net, optimizer, sparsifier = torch.load(file, weights_only=False)  # our own file, made a line before
        _train(net, optimizer, sparsifier, 4)


def _alone(net, sparsifier, optimizer):
    _train(net, optimizer, sparsifier, 5)
    copied = copy.deepcopy(net)
    _train(net, optimizer, sparsifier, 2)
    other = torch.optim.SGD(copied.parameters(), 0.5)
    _closure(copied, other)()
    other.step()
    if sparsifier.budget < sparsifier.masks.total and type(sparsifier).__name__ != "Slimming":  # a channel that is gone has no gradient
        assert sum(int(w.count_nonzero()) for w in prunable(copied).values()) > sparsifier.masks.nnz
    _check(sparsifier)


def _new_optimizer(net, sparsifier, optimizer):
    _train(net, optimizer, sparsifier, 5)
    _train(net, torch.optim.AdamW(net.parameters(), 1e-2), sparsifier, STEPS - 5)


def _older_state(net, sparsifier, optimizer):
    _train(net, optimizer, sparsifier, 1)
    state = copy.deepcopy(optimizer.state_dict())
    _train(net, optimizer, sparsifier, 7)
    optimizer.load_state_dict(state)
    for _ in range(STEPS - 8):  # moments of another mask: they move pruned weights, unless somebody masks these
        sparsifier.see_loss(lambda: _loss(net))
        _closure(net, optimizer)()
        optimizer.step()
        sparsifier.step()
        assert sparsifier.masks.nnz == sparsifier.budget


def _infinite(net, sparsifier, optimizer):
    _train(net, optimizer, sparsifier, 1)
    _closure(net, optimizer)()
    net[3].weight.grad.fill_(torch.inf)
    optimizer.step()
    for name, weight in prunable(net).items():
        assert bool((weight[~sparsifier.masks[name]] == 0).all()), name


def _double(net, sparsifier, optimizer):
    _train(net, optimizer, sparsifier, 5)
    net.double()
    _train(net, torch.optim.Adam(net.parameters(), 1e-2), sparsifier, STEPS - 5)


@pytest.mark.parametrize("loop", [_sam, _two_steps, _two_optimizers, _accumulated, _late_backward, _scaled, partial(_scaled, fused=True), _averaged,
                                  _copied, _pickled, _alone, _new_optimizer, _older_state, _infinite, _double],
                         ids=lambda loop: getattr(loop, "__name__", "_scaled_fused").strip("_"))
def test_every_method_keeps_its_masks_in_loops_that_are_not_ours(loop):
    for method in sorted(METHODS):
        net = _tiny()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        loop(net, _sparsified(method, net, optimizer), optimizer)


def _bits(net: nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in net.state_dict().values()]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_model_optimizer_and_sparsifier_are_restored_in_any_order(method):
    whole = [_tiny()]
    whole.append(torch.optim.Adam(whole[0].parameters(), 1e-2))
    whole.append(_sparsified(method, *whole))
    _train(*whole, 6)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in whole], saved)
    _train(*whole, STEPS - 6)
    for order in permutations(("sparsify", 0, 1, 2)):
        if order.index("sparsify") > order.index(2):
            continue  # there is nothing to load into yet
        parts = [_tiny()]
        with torch.no_grad():
            for parameter in parts[0].parameters():
                parameter += 0.1  # not the weights that the saved training began with
        parts.append(torch.optim.Adam(parts[0].parameters(), 1e-2))
        saved.seek(0)
        states = torch.load(saved)
        for what in order:
            if what == "sparsify":
                parts.append(_sparsified(method, *parts, seed=1))
                parts[-1].seed = whole[-1].seed
            else:
                parts[what].load_state_dict(states[what])
        _train(*parts, STEPS - 6)
        assert _bits(parts[0]) == _bits(whole[0]), order
        assert parts[2].history.flow() == whole[2].history.flow(), order


def _tensors(value) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for part in parts for t in _tensors(part)]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_state_shares_memory_with_nobody(method):
    net = _tiny()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    sparsifier = _sparsified(method, net, optimizer)
    for steps in (2, 3, 5):
        _train(net, optimizer, sparsifier, steps)
        state = sparsifier.state_dict()
        before = [t.clone() for t in _tensors(state)]
        loaded = copy.deepcopy(state)
        sparsifier.load_state_dict(loaded)
        _train(net, optimizer, sparsifier, 1)
        for kept in (state, loaded):
            assert all(torch.equal(a, b) for a, b in zip(before, _tensors(kept), strict=True))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_skipped_step_postpones_what_needs_gradients_and_nothing_is_lost(method):
    for skipped in ({0}, {3}, {0, 1, 2, 3, 4}):
        net = _tiny()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        sparsifier = _sparsified(method, net, optimizer)
        for i in range(STEPS):
            factor = torch.inf if i in skipped else 1.0
            sparsifier.see_loss(lambda net=net, factor=factor: factor * _loss(net))
            _closure(net, optimizer)()
            if i not in skipped:
                optimizer.step()
            sparsifier.step()
            _check(sparsifier)
        total = sparsifier.masks.total
        assert method in ("dense", "slimming") or sparsifier.masks.nnz == budget(sparsifier.sparsity, total)


class _Partly(nn.Module):
    """A layer that is frozen, one that no output depends on, or one of size zero, among others."""

    def __init__(self, kind: str):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        if kind == "frozen":
            self.b.weight.requires_grad_(False)
        if kind == "unused":
            self.head = nn.Linear(5, 7)
        if kind == "empty":
            self.head = nn.Linear(5, 7)
            self.head.weight = nn.Parameter(torch.empty(0, 5))

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"slimming"}))
@pytest.mark.parametrize("kind", ["frozen", "unused", "empty"])
def test_layers_without_gradients_are_pruned_all_the_same_or_kept_whole(kind, method):
    torch.manual_seed(0)
    net = _Partly(kind)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    if kind == "frozen":
        with pytest.raises(ValueError, match=r"b.weight is frozen .*dense=\['b.weight'\]"):
            _sparsified(method, net, optimizer)
    sparsifier = _sparsified(method, net, optimizer, sparsity=0.3, **{"dense": ["b.weight"]} if kind == "frozen" else {})
    _train(net, optimizer, sparsifier)
    assert kind != "frozen" or sparsifier.masks.counts["b.weight"] == 100
    assert kind != "empty" or "head.weight" not in sparsifier.masks


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_dense_layer_is_whole_at_every_step(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    sparsifier = _sparsified(method, net, optimizer, sparsity=0.3, dense=["5.weight"])
    for _ in range(STEPS):
        _train(net, optimizer, sparsifier, 1)
        assert sparsifier.masks.counts["5.weight"] == 32 == int(net[5].weight.count_nonzero())


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last_changes_no_bit_of_the_masks(method, when):
    def trained(last: bool):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
        net = net.to(memory_format=torch.channels_last) if last and when == "before" else net
        optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
        x = torch.rand(8, 3, 6, 6)
        example = {"example": x} if method == "slimming" else {}
        sparsifier = _sparsified(method, net, optimizer, sparsity=0.3, **example)
        net = net.to(memory_format=torch.channels_last) if last and when == "after" else net
        for _ in range(6):
            sparsifier.see_loss(lambda: nn.functional.cross_entropy(net(x), LABELS))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), LABELS).backward()
            optimizer.step()
            sparsifier.step()
            _check(sparsifier)
        return sparsifier
    assert trained(True).masks.nnz == trained(False).masks.nnz


def _tied(how: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    weight = net[0].weight
    if how == "buffer":
        net[1].register_buffer("view", weight.detach()[2:4])
    elif how == "rows":  # next to each other in one memory: no conflict
        both = torch.rand(12, 6)
        net[0].weight, net[2].weight = nn.Parameter(both[:6]), nn.Parameter(both[6:])
    elif how == "expanded":
        net[0].weight = nn.Parameter(torch.rand(1, 6).expand(6, 6))
    else:
        net[2].weight = {"same": weight, "transposed": nn.Parameter(weight.t()), "copied": nn.Parameter(weight.detach()),
                         "part": nn.Parameter(weight.detach().view(-1)[6:].view(5, 6))}[how]
    return net


@pytest.mark.parametrize("how", ["same", "rows", "transposed", "copied", "part", "buffer", "expanded"])
def test_tied_weights_are_one_weight_or_refused_by_name(how):
    net = _tied(how)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    if how not in ("same", "rows"):
        with pytest.raises(ValueError, match="0.weight .*memory"):
            sparsify(net, optimizer, "rigl", 0.5, 8)
        return
    sparsifier = sparsify(net, optimizer, "rigl", 0.5, 8, update_every=2)
    for _ in range(8):
        optimizer.zero_grad()
        net(torch.rand(4, 6)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        _check(sparsifier)
    assert sparsifier.masks.total == (36 if how == "same" else 72)


@pytest.mark.parametrize("how", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, weight_norm,
                                 spectral_norm, partial(prune.random_unstructured, name="weight", amount=0.3)],
                         ids=lambda how: f"{how.__module__}.{how.__name__}" if hasattr(how, "__name__") else "prune")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_is_refused_by_name_at_construction_and_later(how):
    net = _tiny()
    how(net[0])
    with pytest.raises(ValueError, match="0.weight is no parameter: it is computed from others"):
        sparsify(net, torch.optim.Adam(net.parameters()), "static", 0.5, 10)
    net = _tiny()
    optimizer = torch.optim.Adam(net.parameters())
    sparsifier = _sparsified("rigl", net, optimizer)
    how(net[0])
    with pytest.raises(ValueError, match="0.weight of the model is not the parameter that is masked"):
        _train(net, optimizer, sparsifier)


def test_a_lazy_layer_is_refused_until_it_knows_its_shape():
    net = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="0.weight has no shape yet"):
        sparsify(net, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), "static", 0.5, 10)


def test_what_was_replaced_is_said_at_the_next_step():
    def replace(what: str):
        net = _tiny()
        optimizer = torch.optim.Adam(net.parameters())
        sparsifier = _sparsified("rigl", net, optimizer)
        if what == "layer":
            net[3] = nn.Linear(10, 4)
        elif what == "parameter":
            net[3].weight = nn.Parameter(torch.rand(4, 10))
        elif what == "gone":
            net[3] = nn.Identity()
        elif what == "assigned":
            net.load_state_dict(_tiny().state_dict(), assign=True)
            assert sparsifier.masks.nnz == sparsifier.budget >= int(net[3].weight.count_nonzero() + net[0].weight.count_nonzero())
        elif what == "sparsifier":
            _sparsified("set", net, optimizer)
        sparsifier.step()
    for what in ("layer", "parameter", "gone"):
        with pytest.raises(ValueError, match="3.weight of the model is not the parameter that is masked"):
            replace(what)
    with pytest.raises(ValueError, match=r"load_state_dict\(assign=True\) has replaced 0.weight"):
        replace("assigned")
    with pytest.raises(ValueError, match="0.weight is masked by another sparsifier that was made after this one"):
        replace("sparsifier")


def test_a_refused_sparsifier_leaves_the_weights_as_they_were():
    net = _tiny()
    before = [p.detach().clone() for p in net.parameters()]
    nothing = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in prunable(net).items()}
    with pytest.raises(ValueError, match="begin holds 0 weights"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "static", 0.5, 10, begin=nothing)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_masks_are_kept_when_nobody_remembers_the_sparsifier_but_its_optimizer():
    net = _tiny()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    promised = sparsify(net, optimizer, "static", 0.7, STEPS).budget
    gc.collect()
    for _ in range(3):
        _closure(net, optimizer)()
        optimizer.step()
    assert sum(int(w.count_nonzero()) for w in prunable(net).values()) == promised


def test_two_parts_of_a_model_have_a_sparsifier_each_under_one_optimizer():
    net = _tiny()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    promised = [sparsify(part, optimizer, "static", 0.7, STEPS).budget for part in (net[:1], net[3:])]
    gc.collect()
    for _ in range(3):
        optimizer.step(_closure(net, optimizer))
    assert [int(net[i].weight.count_nonzero()) for i in (0, 3)] == promised


def test_the_gradients_that_growth_sees_are_unscaled_also_by_a_fused_optimizer():
    def grown(scale: float | None, fused: bool):
        net = _tiny()
        optimizer = torch.optim.SGD(net.parameters(), 0.05, fused=fused)
        sparsifier = _sparsified("rigl", net, optimizer, accumulate=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=2, enabled=scale is not None)
        for _ in range(8):  # the scale doubles within a window of gradients that are added up
            optimizer.zero_grad()
            scaler.scale(_loss(net)).backward()
            scaler.step(optimizer)
            scaler.update()
            sparsifier.step()
        return {name: mask.tolist() for name, mask in sparsifier.masks.items()}
    assert grown(None, False) == grown(256.0, False) == grown(256.0, True)


@pytest.fixture(scope="module")
def late() -> tuple[nn.Module, torch.optim.Adam]:
    """A network and its Adam late in a training, when the correction of the bias has gone."""
    net = _tiny()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, betas=(0.9, 0.999))
    for _ in range(200):
        _closure(net, optimizer)()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("method", ["set", "rigl", "snfs", "ctre_sim", "edst", "granet", "mest", "gse", "srigl", "cht", "sparsevlr"])
def test_the_warm_up_of_grown_weights_bounds_their_steps_and_is_resumed(method, late):
    def start(warmup: int):
        net, optimizer = copy.deepcopy(late)
        return net, optimizer, _sparsified(method, net, optimizer, steps=40, regrow_warmup=warmup)

    def largest(net, optimizer, sparsifier) -> float:
        """The largest step that any weight has taken at its first chance, as a multiple of the learning rate."""
        found, before = 0.0, {}
        for _ in range(20):
            sparsifier.see_loss(lambda: _loss(net))
            _closure(net, optimizer)()
            optimizer.step()
            for name, (old, weight) in before.items():
                grown = sparsifier.masks[name] & ~old
                moved = (sparsifier.masks.weights[name].detach() - weight)[grown].abs()
                found = max(found, float(moved.max()) / 1e-2 if moved.numel() else 0.0)
            before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
            sparsifier.step()
            before = {name: (old, sparsifier.masks.weights[name].detach().clone()) for name, old in before.items()}
            _check(sparsifier)
        return found
    naive, clock, warm = (largest(*start(warmup)) for warmup in (0, 1, 10))
    assert naive > 1.3 and clock <= 1.01 and warm <= 0.11

    whole, again = start(10), start(10)
    _train(*whole, 10)
    states = copy.deepcopy([part.state_dict() for part in whole])
    _train(*whole, 10)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    _train(*again, 10)
    assert _bits(again[0]) == _bits(whole[0])


def test_the_warm_up_is_refused_where_it_mends_nothing():
    net = _tiny()
    with pytest.raises(ValueError, match="mends how Adam and AdamW begin with a grown weight; SGD does not begin so"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", 0.5, 10, regrow_warmup=5)
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match="regrow_warmup is a whole number of steps, 0 for none"):
            sparsify(net, torch.optim.Adam(net.parameters()), "rigl", 0.5, 10, regrow_warmup=value)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_is_masked_to_positive_zero(kind):
    net = nn.Linear(5, 4).to(kind)
    masks = Masks(prunable(net))
    net.weight.grad = torch.full_like(net.weight, torch.nan)
    assign(masks, "weight", torch.rand(4, 5) < 0.5)
    mask_gradients(masks)
    with torch.no_grad():
        net.weight.fill_(-torch.inf)
    assert masks.nnz == 20
    mask_weights(masks)
    off = ~masks["weight"]
    for tensor in (net.weight.detach(), net.weight.grad):
        assert bool((tensor[off] == 0).all()) and not bool(tensor[off].signbit().any()) and not bool(tensor[~off].isfinite().any())
    assert masks.nnz == masks.counts["weight"]


def test_a_method_that_does_not_say_what_others_ask_is_refused_where_it_is_defined():
    facts = {"keeps_weights": False, "knobs": (), "from_training": {}, "overhead": lambda self, step, sparse, dense: 0.0}
    with pytest.raises(TypeError, match=r"Toy has to say its family, one of dense, static, .* got None"):
        type("Toy", (Sparsifier,), facts)
    with pytest.raises(TypeError, match="got 'dynmic'"):
        type("Toy", (Sparsifier,), facts | {"family": "dynmic"})
    for missing in facts:
        with pytest.raises(TypeError, match=f"Toy has to say {missing}: "):
            type("Toy", (Sparsifier,), {"family": "dynamic"} | {name: fact for name, fact in facts.items() if name != missing})
    with pytest.raises(TypeError, match="Toy has to say set_knob: "):
        type("Toy", (Sparsifier,), facts | {"family": "dynamic", "knobs": ("drop",)})
    with pytest.raises(TypeError, match=r"'epochs' or 'example'; got \['epoch'\]"):
        type("Toy", (Sparsifier,), facts | {"family": "dynamic", "from_training": {"rounds": "epoch"}})
    type("Toy", (Sparsifier,), facts | {"family": "dynamic"})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_a_method_says_is_what_it_does(method):
    """Weights that it keeps a copy of come back after somebody scales the model's; its knobs can be set; its options are there to fill."""
    torch.manual_seed(0)
    kind, x = METHODS[method], torch.rand(2, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    example = {option: x for option, source in kind.from_training.items() if source == "example"}
    sparsifier = sparsify(model, torch.optim.SGD(model.parameters(), 0.0), method, 0.5, 100, **example)
    assert set(kind.from_training) <= set(method_options(method))
    for knob in kind.knobs:
        sparsifier.set_knob(knob, getattr(sparsifier, knob))
    with pytest.raises(ValueError, match="There is no knob of"):
        sparsifier.set_knob("colour", 0.5)
    with torch.no_grad():
        for weight in sparsifier.masks.weights.values():
            weight.mul_(2)
    scaled = [weight.detach().clone() for weight in sparsifier.masks.weights.values()]
    sparsifier.see_loss(lambda: model(x).square().sum())
    model(x).square().sum().backward()
    sparsifier.optimizer.step()
    sparsifier.step()
    stayed = all(bool(((weight == 0) | (weight == before)).all())
                 for weight, before in zip(sparsifier.masks.weights.values(), scaled, strict=True))
    assert stayed != kind.keeps_weights


TRANSPOSED = {"1d": (nn.Conv1d, nn.ConvTranspose1d, (2, 7)), "2d": (nn.Conv2d, nn.ConvTranspose2d, (2, 7, 7)),
              "3d": (nn.Conv3d, nn.ConvTranspose3d, (2, 5, 5, 5))}


@pytest.mark.parametrize("kind", sorted(TRANSPOSED))
def test_transposed_convolutions_are_masked_like_others(kind):
    conv, transposed, shape = TRANSPOSED[kind]
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 6, 3), nn.ReLU(), transposed(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.rand(8, *shape)
    model(x)
    assert list(prunable(model)) == ["0.weight", "2.weight", "5.weight"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    sparsifier = sparsify(model, optimizer, "rigl", 0.8, 20, update_every=4)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        sparsifier.step()
        assert int((model[2].weight != 0).sum()) <= sparsifier.masks.counts["2.weight"] < model[2].weight.numel()
        assert sparsifier.masks.nnz == sparsifier.budget
    dense = layer_flops(model, x[:1])
    with FlopCount() as counted:
        model(x[:1])
    assert sum(dense.values()) == counted.total
    with pytest.raises(ValueError, match="transposed convolution 2"):
        sparsify(model, optimizer, "ctre_sim", 0.8, 20)


@pytest.mark.parametrize("kind", sorted(TRANSPOSED))
@pytest.mark.parametrize("groups", [1, 2])
def test_fan_in_is_what_an_output_hears_of(kind, groups):
    """Counted by brute force: how many entries of the weight an output channel depends on."""
    conv, transposed, shape = TRANSPOSED[kind]
    for layer in (conv(4, 6, 2, groups=groups, bias=False), transposed(4, 6, 2, groups=groups, bias=False)):
        mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4
        active = fan_in(mask, layer).expand(mask.shape)
        layer.weight.data = mask.float()
        made = layer(torch.ones(1, 4, *shape[1:]))
        for channel in range(6):
            reached = torch.autograd.grad(made[0, channel].sum(), layer.weight, retain_graph=True)[0] != 0
            assert (active[reached] == int((reached & mask).sum())).all()


def test_what_is_no_state_of_a_sparsifier_is_a_sentence():
    net = _tiny()
    sparsifier = sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", 0.5, 10)
    with pytest.raises(ValueError, match=r"no state of a RigL sparsifier: steps, masks, .* are missing among \[\]"):
        sparsifier.load_state_dict({})
    static = sparsify(_tiny(), torch.optim.SGD(net.parameters(), 0.1), "static", 0.5, 10).state_dict()
    with pytest.raises(ValueError, match="gradients, waiting, updated, born are missing among"):
        sparsifier.load_state_dict(static)


def test_synaptic_flow_leaves_every_module_in_its_mode():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 2))
    net[1].eval()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sparsifier = sparsify(net, optimizer, "synflow", 0.5, 10, iterations=3)
    net(torch.rand(5, 4)).sum().backward()
    before = {name: value.clone() for name, value in net[1].named_buffers()}
    optimizer.step()
    sparsifier.step()
    assert [module.training for module in net] == [True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net[1].named_buffers())


REFUSED = [
    ("granet", {"initial": 1.5}, "initial is a share, from 0 to 1; got 1.5"),
    ("granet", {"initial": 0.2, "shrink_until": 0.9, "end": 0.5}, "shrink_until = 0.9 must not exceed end = 0.5"),
    ("mest", {"importance": -1.0}, "importance weighs .* 0 or more; got -1.0"),
    ("mest", {"importance": math.nan}, "importance .* got nan"),
    ("mest", {"soft": "yes"}, "soft is true or false; got 'yes'"),
    ("gse", {"sample": 0}, "sample is how many .* above 0; got 0"),
    ("gse", {"sample": math.inf}, "sample .* got inf"),
    ("srigl", {"ablation": -0.1}, "ablation is a share"),
    ("srigl", {"across": True}, "leave across false"),
    ("cht", {"across": True}, "leave across false"),
    ("cht", {"soft": 1}, "soft is true or false; got 1"),
    ("cht", {"initial": "half"}, "initial is a share, from 0 to 1; got 'half'"),
    ("cht", {"initial": 0.2, "shrink_until": 0.9}, "shrink_until = 0.9 must not exceed end = 0.75"),
    ("cht", {"inflate": 0.5}, "cht begins with the sparsity `initial`, 1.0; leave inflate at 1, not 0.5"),
    ("granet", {"inflate": 0.5}, "granet begins with the sparsity `initial`, 0.5; leave inflate at 1, not 0.5"),
    ("snfs", {"inflate": 0.5}, "snfs .* holds its budget; leave inflate at 1, not 0.5"),
    ("set", {"inflate": 1.5}, "inflate is a share, from 0 to 1; got 1.5"),
    ("sparsevlr", {"floor": -0.1}, "floor is a share, from 0 to 1; got -0.1"),
    ("edst", {"inflate": 0.5}, "shrink_until = 0.7 must not exceed end = 0.3"),
    ("sparsevlr", {"update_every": -3}, "update_every is a whole number of steps, at least 1; got -3"),
    ("rigl", {"update_every": 1.5}, "update_every is a whole number of steps, at least 1; got 1.5"),
]
NO_NAMES = [({"dense": None}, r"dense is a list of names, such as \['fc1.weight'\]; got None"),
            ({"dense": "0.weight"}, "got '0.weight'"), ({"dense": 3}, "got 3"),
            ({"dense": [["0.weight"]]}, "dense is a list of names"), ({"dense": [None]}, r"got \[None\]"),
            ({"method": ["rigl"]}, "Did you mean 'rigl'"),
            ({"method": None}, "no method called None"), ({"distribution": ["erk"]}, "distribution .* is unknown"),
            ({"total_steps": None}, "total_steps is the number of training steps, .* got None"), ({"total_steps": "5"}, "got '5'"),
            ({"total_steps": 1.5}, "got 1.5"), ({"total_steps": True}, "got True")]
FORMS = [("mest", {"soft": True}), ("mest", {"soft": True, "across": True}), ("granet", {"initial": 0.0}), ("granet", {"across": True}),
         ("cht", {"initial": 0.3}), ("cht", {"soft": False}), ("srigl", {"ablation": 0.0}), ("gse", {"sample": 0.01}),
         *((method, {"inflate": 0.5, "shrink_until": 0.3}) for method in ("set", "rigl", "mest", "gse", "srigl", "ctre_seq", "ctre_sim", "edst")),
         ("mest", {"inflate": 0.5, "soft": True}), ("set", {"inflate": 0.0, "across": True}),
         ("rigl", {"across": True, "floor": 0.3}), ("granet", {"floor": 0.5}), ("snfs", {"floor": 0.9}),
         ("mest", {"soft": True, "across": True, "floor": 1.0})]


@pytest.mark.parametrize("method, options, sentence", REFUSED)
def test_options_of_the_growth_methods_are_refused_by_name_and_nothing_is_masked(method, options, sentence):
    net = _tiny()
    before = _bits(net)
    with pytest.raises(ValueError, match=sentence):
        sparsify(net, torch.optim.Adam(net.parameters()), method, 0.5, 100, **options)
    assert _bits(net) == before


def test_a_training_whose_length_is_not_said_is_refused():
    net = _tiny()
    with pytest.raises(ValueError, match="total_steps is the number of training steps, .* got None"):
        sparsify(net, torch.optim.Adam(net.parameters()), "rigl", 0.5)


@pytest.mark.parametrize(("given", "sentence"), NO_NAMES)
def test_what_is_no_name_and_no_list_of_names_is_a_sentence(given, sentence):
    net = _tiny()
    before = _bits(net)
    with pytest.raises(ValueError, match=sentence):
        sparsify(net, torch.optim.Adam(net.parameters()), **{"method": "static", "sparsity": 0.5, "total_steps": 5} | given)
    assert _bits(net) == before
    if "dense" in given:
        with pytest.raises(ValueError, match=sentence):
            layer_budgets({"0.weight": (4, 4)}, 0.5, **given)


@pytest.mark.parametrize("method, options", FORMS)
def test_the_other_forms_of_the_growth_methods_are_exact_and_resume_to_the_same_bits(method, options):
    def start():
        net = _tiny()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        return [net, optimizer, _sparsified(method, net, optimizer, **options)]
    whole, again = start(), start()
    for _ in range(5):
        _train(*whole, 1)
        _check(whole[2])
        assert whole[2].masks.nnz == whole[2].budget
    states = copy.deepcopy([part.state_dict() for part in whole])
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for trained in (whole, again):
        _train(*trained, STEPS - 5)
    assert _bits(again[0]) == _bits(whole[0]) and again[2].history.flow() == whole[2].history.flow()
    assert whole[2].masks.nnz == budget(whole[2].sparsity, whole[2].masks.total)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=4), st.floats(0, 1), st.data())
def test_a_floor_keeps_the_best_of_every_layer_and_ranks_the_others_together(shapes, floor, data):
    """Against a loop over sorted lists."""
    seed, sparsity, share = data.draw(st.integers(0, 2**20)), data.draw(st.floats(0, 0.8)), data.draw(st.floats(0, 1))
    torch.manual_seed(seed)
    net = nn.ModuleList([nn.Linear(ins, outs, bias=False) for outs, ins in shapes])
    total = sum(outs * ins for outs, ins in shapes)
    assume(round((1 - sparsity) * total) >= len(shapes))
    rigl = sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "rigl", sparsity, 10, across=True, floor=floor, update_every=1)
    rigl.fraction = lambda step: share
    for weight in net.parameters():
        weight.grad = torch.randn(weight.shape)
    rigl.see_gradients()
    before = {name: mask.clone() for name, mask in rigl.masks.items()}
    weights = {name: weight.detach().clone() for name, weight in rigl.masks.weights.items()}
    budgets, count = layer_budgets(rigl.shapes, sparsity), rigl.budget
    keep, least = count - int(share * count), {name: math.ceil(floor * own - 1e-9) for name, own in budgets.items()}
    ranked, safe = [], []
    for name, mask in before.items():
        own = sorted(((float(weights[name].view(-1)[i].abs()), name, i) for i in mask.view(-1).nonzero().view(-1).tolist()), reverse=True)
        safe, ranked = safe + own[:least[name]], ranked + own[least[name]:]
    kept = safe + sorted(ranked, reverse=True)[:max(0, keep - len(safe))]
    rigl.replace_weights()
    assert rigl.masks.nnz == count
    if len(safe) <= keep:
        assert len(kept) == keep and all(rigl.masks[name].view(-1)[i] for _, name, i in kept)
    assert all(rigl.masks.counts[name] >= least[name] for name in before)


@pytest.mark.parametrize("method", ["set", "rigl", "sparsevlr", "mest", "gse", "granet", "edst", "ctre_sim", "snfs"])
@pytest.mark.parametrize("floor, options", [(1.0, {"drop_fraction": 0.5}), (0.9, {"drop_fraction": 1.0}), (0.3, {"drop_fraction": 0.3})])
def test_no_layer_falls_below_its_floor_in_any_step(method, floor, options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 1), nn.Linear(1, 3))
    with torch.no_grad():
        net[2].weight.mul_(1e-3), net[3].weight.mul_(1e-3)
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    across = {} if method in ("granet", "snfs") else {"across": True}
    if method == "ctre_sim" and floor + options["drop_fraction"] > 1:
        with pytest.raises(ValueError, match="let the two add up to 1 at most"):
            sparsify(net, torch.optim.SGD(net.parameters(), 1e-6), method, 0.8, 60, floor=floor, **options | across)
        return
    sparsifier = sparsify(net, optimizer, method, 0.8, 60, floor=floor, update_every=5, **options | across)
    for _ in range(60):
        optimizer.zero_grad()
        net(torch.rand(8, 20)).square().sum().backward()
        optimizer.step()
        sparsifier.step()
        own = layer_budgets(sparsifier.shapes, sparsifier.sparsity_now, sparsifier.distribution)
        assert all(count >= floor * own[name] - 1e-6 for name, count in sparsifier.masks.counts.items())
        assert sparsifier.masks.nnz == sparsifier.budget


def test_rigl_on_the_same_budget_with_all_layers_ranked_together_is_sparsevlr():
    """So that `inflate` makes controls that differ in one thing alone."""
    found = []
    for method, options in (("sparsevlr", {}), ("rigl", {"inflate": 0.5, "across": True, "floor": 0.1, "drop_fraction": 0.1, "update_every": 25})):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        sparsifier = sparsify(net, optimizer, method, 0.9, 200, **options)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(torch.rand(16, 20)), torch.randint(0, 4, (16,))).backward()
            optimizer.step()
            sparsifier.step()
        found.append((_bits(net), sparsifier.history.flow()))
    assert found[0] == found[1] and len(sparsifier.history.flow()) > 4


@given(st.integers(1, 8), st.integers(1, 9), st.data())
def test_a_constant_fan_in_is_exact_and_even_over_the_neurons_that_are_left(rows, size, data):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    mask = torch.rand(rows, size, generator=rng) < data.draw(st.floats(0, 1))
    count, fraction = data.draw(st.integers(1, rows * size)), data.draw(st.floats(0, 1))
    weight, slope = torch.randn(rows, size, generator=rng) * mask, torch.randn(rows, size, generator=rng)
    keep, ablation = count - int(fraction * count), data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    new = constant_fan_in(mask, weight, slope, keep, count, ablation)
    alive = new.sum(1)[new.sum(1) > 0]
    assert int(new.sum()) == count and int(alive.max() - alive.min()) <= 1
    if not ablation and count >= rows:
        assert len(alive) == rows
    kept = torch.zeros(rows * size, dtype=torch.bool)
    kept[top(weight.abs().masked_fill(~mask, -1.0), min(keep, int(mask.sum())))] = True
    for row, of_layer in enumerate(kept.view(rows, size)):  # of what the layer keeps, a neuron keeps the strongest
        quota = min(int(new[row].sum()), int(of_layer.sum()))
        assert bool(new[row, top(weight[row].abs().masked_fill(~of_layer, -1.0), quota)].all())


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**20))
def test_link_scores_are_the_sums_over_neighbours_of_neighbours(rows, size, seed):
    mask = torch.rand(rows, size, generator=torch.Generator().manual_seed(seed)) < 0.4

    def side(links, node, target):
        found = 0.0
        for other in links:
            shared = sum(a and b for a, b in zip(links[node], other, strict=True))
            found += (1 + shared) / (1 + max(sum(other) - shared - 1, 0)) if shared and other[target] else 0.0
        return found
    expected = torch.tensor([[side(mask.tolist(), i, j) + side(mask.T.tolist(), j, i) for j in range(size)] for i in range(rows)])
    torch.testing.assert_close(link_scores(mask), expected)


def test_drawing_by_ranked_noise_is_drawing_without_replacement():
    scores, pairs = torch.tensor([1.0, 2.0, 3.0]), {}
    for i in range(4000):
        pair = tuple(top(drawn(scores, generator_for("pair", i)), 2).tolist())
        pairs[pair] = pairs.get(pair, 0) + 1 / 4000
    # P{a, b} = p_a p_b / (1 - p_a) + p_b p_a / (1 - p_b), with p = 1/6, 2/6, 3/6
    expected = {(0, 1): 1 / 15 + 1 / 12, (0, 2): 1 / 10 + 1 / 6, (1, 2): 1 / 4 + 1 / 3}
    assert all(abs(pairs[pair] - chance) < 0.04 for pair, chance in expected.items())


def test_gse_grows_only_what_it_has_drawn_while_that_lasts():
    net = nn.Linear(40, 25, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    gse = sparsify(net, optimizer, "gse", 0.95, 40, update_every=1, drop_fraction=0.2, sample=3.0)
    seen = 0
    for _ in range(19):
        before = gse.masks["weight"].clone()
        net(torch.rand(8, 40)).square().sum().backward()
        optimizer.step()
        gse.steps += 1
        drawn_places = gse.candidates("weight")
        gse.steps -= 1
        gse.step()
        grown = gse.masks["weight"] & ~before
        assert not bool((drawn_places & before).any()) and not bool((grown & ~drawn_places).any())
        seen += int(grown.sum())
    assert seen > 20


def test_srigl_has_no_neurons_in_a_transposed_convolution():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3))
    with pytest.raises(ValueError, match="srigl cannot share out the weights of the transposed convolution 2 by neurons"):
        sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "srigl", 0.5, 10)


def test_granet_prunes_over_all_layers_and_regenerates_each_by_itself():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20, bias=False), nn.ReLU(), nn.Linear(20, 10, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    granet = sparsify(net, optimizer, "granet", 0.9, 100, update_every=10, initial=0.0)
    weights = {name: weight.detach().clone() for name, weight in granet.masks.weights.items()}
    for _ in range(10):
        net(torch.rand(8, 30)).square().sum().backward()
        optimizer.step()
        granet.step()
    held = round((1 - granet.schedule(10)) * 800)
    flat = torch.cat([weight.abs().view(-1) for weight in weights.values()])
    floor = flat.topk(held).values.min()
    assert granet.masks.counts == {name: int((weight.abs() >= floor).sum()) for name, weight in weights.items()}
    for name, weight in weights.items():
        stays = granet.masks.counts[name] - int(granet.fraction(10) * granet.masks.counts[name])
        assert bool(granet.masks[name].view(-1)[weight.abs().view(-1).topk(stays).indices].all())


@pytest.mark.parametrize("steps", [5064, 10128, 20256])
def test_sparsevlr_has_as_many_updates_in_a_training_of_any_length(steps):
    net = _tiny()
    method = sparsify(net, torch.optim.Adam(net.parameters()), "sparsevlr", 0.5, steps)
    assert 148 <= sum(method.updates.due(step) for step in range(1, steps + 1)) <= 152


@pytest.mark.parametrize("method", [name for name in METHODS if issubclass(METHODS[name], Updating)])
@pytest.mark.parametrize("total, every", [(96, 100), (200, 100), (300, 100), (400, 100), (1000, 100), (7, 3), (3, 1)])
def test_a_schedule_with_few_updates_is_named_with_one_that_has_enough(method, total, every):
    """The steps at which weights are replaced are counted one by one; with the advised schedule there are three or more."""
    def count_and_advice(every: int) -> tuple[int, str]:
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        made = sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method, 0.5, total, update_every=every, accumulate=1)
        return sum(made.updates.due(step) and made.fraction(step) > 0 for step in range(1, total + 1)), made.advice

    if "members" in method_options(method) and total <= 3:
        pytest.skip("three members need more than three steps")
    count, advice = count_and_advice(every)
    assert (advice == "") == (count >= 3), (count, advice)
    if advice:
        assert f"{METHODS[method].__name__} " in advice and ("more epochs" in advice)
        words = advice.split()
        if "update_every" in words:
            assert count_and_advice(int(words[words.index("update_every") + 1]))[0] >= 3, advice


def test_a_schedule_that_is_to_replace_nothing_is_not_named():
    model = nn.Linear(20, 30)
    for options in ({"drop_fraction": 0.0}, {"end": 0.0}):
        assert sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), "rigl", 0.5, 96, **options).advice == ""
    assert sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), "static", 0.5, 96).advice == ""
