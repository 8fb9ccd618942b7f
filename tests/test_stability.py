"""Counts of stable neurons agree with the bounds they come from, with brute force, and with each other over batches."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselab.robust.boxes import input_box
from sparselab.robust.ibp import interval_pass
from sparselab.robust.neurons import PASSES, LayerStability, as_row, merge, stability
from sparselab.robust.rules import UnsupportedLayer


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 3 * 3, 12), nn.LeakyReLU(0.1), nn.Dropout(), nn.Linear(12, 3),
    )


def images(n=20):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


ends = st.tuples(st.sampled_from([-1.0, -0.0, 0.0, 1.0]), st.sampled_from([0.0, 0.5]))  # l and u - l


@given(st.lists(ends, min_size=6, max_size=6))
@settings(max_examples=100, deadline=None)
def test_every_neuron_is_in_one_state_and_the_shares_are_those_of_the_counts(pairs):
    lb = torch.tensor([low for low, _ in pairs]).view(2, 3)
    ub = lb + torch.tensor([width for _, width in pairs]).view(2, 3)
    layer = LayerStability.of(lb, ub)
    assert (layer.counts.sum(1) == 2).all() and layer.samples == 2 and layer.counts.sum() == 6
    for neuron in range(3):
        states = [
            "inactive" if u <= 0 else "active" if l >= 0 else "unstable"
            for l, u in zip(lb[:, neuron].tolist(), ub[:, neuron].tolist(), strict=True)  # noqa: E741
        ]
        assert layer.counts[neuron].tolist() == [states.count(s) for s in ("active", "inactive", "unstable")]
    assert layer.active * 6 + layer.inactive * 6 + layer.unstable * 6 == pytest.approx(6, abs=1e-12)
    assert layer.dead == sum(bool((ub[:, j] <= 0).all()) for j in range(3)) / 3


def test_a_bound_that_is_not_a_number_counts_as_unstable():
    nan = torch.full((1, 2), float("nan"))
    assert LayerStability.of(nan, nan).unstable == 1
    assert LayerStability.of(torch.zeros(1, 2), nan).unstable == 1


@pytest.mark.parametrize("method", PASSES)
def test_stable_neurons_never_switch_on_points_of_the_box(method):
    torch.manual_seed(1)
    model = convolutional().eval()
    x = images(1)
    lower, upper = input_box(x, 0.05)
    layers = stability(model, lower, upper, method=method)
    assert list(layers) == ["2", "5"] and layers["2"].shape == (4, 3, 3) and layers["5"].shape == (12,)
    points = lower + torch.rand(2000, 1, 8, 8) * (upper - lower)
    seen = {"2": model[:2](points), "5": model[:5](points)}
    for name, z in seen.items():
        active, inactive, unstable = layers[name].counts.bool().unbind(1)
        z = z.flatten(1)
        assert (z[:, active] >= -1e-6).all() and (z[:, inactive] <= 1e-6).all()
        assert 0 < unstable.sum() < len(unstable)


def test_at_eps_zero_hardly_anything_is_unstable_and_wider_boxes_have_more():
    model, x = convolutional().eval(), images()
    last = [0.0, 0.0]
    for eps in (0.0, 0.02, 0.05, 0.2):
        now = [layer.unstable for layer in stability(model, *input_box(x, eps)).values()]
        assert eps > 0 or now == [0.0, 0.0]
        assert all(a >= b for a, b in zip(now, last, strict=True))
        last = now
    assert min(last) > 0.3


def test_crown_settles_at_least_what_ibp_settles_in_the_last_layer():
    model, x = convolutional().eval(), images()
    box = input_box(x, 0.05)
    ibp, crown = stability(model, *box), stability(model, *box, method="crown")
    assert torch.equal(ibp["2"].counts, crown["2"].counts), "the first layer is exact under both"
    assert crown["5"].unstable < ibp["5"].unstable
    alike = stability(model, *box, method="crown_ibp")
    assert all(torch.equal(alike[name].counts, ibp[name].counts) for name in ibp)


@given(cuts=st.lists(st.integers(1, 19), max_size=4))
@settings(max_examples=15, deadline=None)
def test_batches_add_up(cuts):
    torch.manual_seed(0)
    model, x = convolutional().eval(), images()
    whole = stability(model, *input_box(x, 0.05))
    edges = [0, *sorted(set(cuts)), 20]
    parts = merge(stability(model, *input_box(x[a:b], 0.05)) for a, b in zip(edges, edges[1:], strict=False))
    assert list(parts) == list(whole)
    for name in whole:
        assert torch.equal(parts[name].counts, whole[name].counts) and parts[name].samples == 20
    assert as_row(parts) == as_row(whole)
    assert merge([]) == {}


def test_dead_means_inactive_on_every_sample_of_all_batches():
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    net[0].weight.data.fill_(1.0)
    net[0].bias.data.fill_(-0.5)
    dark, bright = (stability(net, *input_box(torch.full((5, 1), v), 0.1)) for v in (0.1, 0.9))
    assert dark["1"].dead == 1 and bright["1"].dead == 0
    both = merge([dark, bright])["1"]
    assert (both.dead, both.inactive, both.active) == (0, 0.5, 0.5)


def test_the_model_is_seen_in_eval_mode_and_left_as_it_was():
    model, x = convolutional().train(), images()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = stability(model, *input_box(x, 0.05))
    assert [m.training for m in model] == [True, False, True, True, True, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    bounds = interval_pass(model.eval(), *input_box(x, 0.05)).preactivations
    assert layers["2"].active == int((bounds["2"][0] >= 0).sum()) / (20 * 36)
    assert not layers["2"].counts.requires_grad


def test_rows_are_plain_numbers_in_the_order_of_the_graph():
    import json

    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)
            self.b, self.a = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.last(self.b(F.relu(self.a(self.first(x)))))

    row = as_row(stability(Reversed(), *input_box(torch.rand(4, 3), 0.1)))
    assert list(row) == ["a", "relu", "b"]
    assert json.loads(json.dumps(row)) == row
    assert set(row["a"]) == {"active", "inactive", "unstable", "dead"}


def test_a_model_without_relus_has_no_rows_and_bad_input_is_refused():
    box = input_box(torch.rand(2, 3), 0.1)
    assert as_row(stability(nn.Linear(3, 2), *box)) == {}
    with pytest.raises(ValueError, match="no bound method called 'crow'. Did you mean 'crown'"):
        stability(nn.Linear(3, 2), *box, method="crow")
    with pytest.raises(ValueError, match="lower > upper"):
        stability(nn.Linear(3, 2), box[1], box[0])
    with pytest.raises(UnsupportedLayer, match="1.*softmax"):
        stability(nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)), *box)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        LayerStability.of(*torch.rand(2, 1, 2)) + LayerStability.of(*torch.rand(2, 1, 3))


class Functional(nn.Module):
    """Linear layers with nonlinearities that are no modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.second(self.first(x.flatten(1)).relu()).tanh())


def test_neurons_are_what_goes_into_layers_that_are_not_linear_however_they_are_written(monkeypatch):
    from sparselab.learn import margins

    net, x = Functional(), torch.rand(5, 1, 2, 2)
    assert interval_pass(net, x, x).neurons == 8 + 6
    assert interval_pass(nn.Sequential(nn.Flatten(), net.first, nn.MaxPool1d(2), nn.Linear(4, 3)), x, x).neurons == 8
    monkeypatch.setattr(margins, "CROWN_NEURONS", 13)
    found = margins.margins_of(net, x, torch.zeros(5, dtype=torch.long), 0.1, radii=3)
    assert "14 neurons are more than 13" in found.left_out["crown"] and set(found.lb) == {"ibp", "crown_ibp"}
