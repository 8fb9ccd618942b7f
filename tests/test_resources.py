"""What a network needs, against counts by hand, by brute force and by storing it."""
import io
import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

from sparselab.learn import build
from sparselab.learn.footprint import energy, latency, peak_activations, resources, stored_bytes
from sparselab.learn.int8 import int8
from sparselab.program import read
from sparselab.sparse import sparsify


def sparse(name="mlp", sparsity=0.9):
    net = build(name, (1, 8, 8), 10)
    sparsify(net, torch.optim.SGD(net.parameters(), 0.1), "static", sparsity, total_steps=1)
    return net.eval()


def test_bytes_are_those_that_are_stored():
    net = sparse()
    weights = [p.detach().numpy() for p in net.parameters() if p.dim() > 1]
    rest = sum(p.numel() for p in net.parameters() if p.dim() == 1) * 4
    found = stored_bytes(net)
    assert found["dense"] == rest + sum(w.nbytes for w in weights)
    rows = [csr_matrix(w) for w in weights]
    assert found["CSR"] == rest + sum(r.data.nbytes + r.indices.astype(np.int32).nbytes + r.indptr.astype(np.int32).nbytes for r in rows)
    masked = 0
    for w in weights:
        file = io.BytesIO()
        file.write(np.packbits(w != 0).tobytes())
        file.write(w[w != 0].tobytes())
        masked += len(file.getvalue())
    assert found["bit mask and values"] == rest + masked
    assert found["int8"] == rest + sum(w.astype(np.int8).nbytes + 4 * len(w) for w in weights)


def test_effective_macs_are_the_products_with_weights_that_exist():
    net, x = sparse("cnn4", 0.8), torch.rand(2, 1, 8, 8)
    found = resources(net, x, repeats=0)
    assert found.nnz == sum(int(p.count_nonzero()) for p in net.parameters()) + sum(int((p == 0).sum()) for p in net.parameters() if p.dim() == 1)
    positions, hooks = {}, []
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda m, a, y, name=name: positions.update({f"{name}.weight": math.prod(y.shape[2:])})))
    net(x)
    for name, weight in net.named_parameters():
        if name in positions:
            assert found.macs[name] == weight.numel() * positions[name]
            assert found.effective_macs[name] == pytest.approx(int(weight.count_nonzero()) * positions[name])
    assert {how for _, _, how in found.rows} == {"counted", "modelled"}, "nothing was measured"


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.back = nn.Linear(4, 40), nn.Linear(40, 4)

    def forward(self, x):
        return torch.relu(x + self.back(self.wide(x).view(-1, 40)))


def test_peak_activations_by_hand():
    assert peak_activations(read(nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 5)), torch.rand(1, 10))) == 4 * 60
    assert peak_activations(read(Branch(), torch.rand(1, 4))) == 4 * (4 + 40 + 4), "the input lives until it is added; the view is free"
    assert peak_activations(read(Branch(), torch.rand(7, 4))) == 7 * 4 * (4 + 40 + 4)
    assert peak_activations(read(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), torch.rand(1, 1, 3, 3))) == 4 * (9 + 2)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"x": torch.rand(0, 1, 8, 8)}, r"a batch of at least one in torch.float32 .* got torch.float32 of shape \(0, 1, 8, 8\)"),
    ({"x": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "to_float makes it of uint8 images.*; got torch.uint8"),
    ({"x": torch.rand(2, 1, 8, 8).half()}, "got torch.float16"), ({"x": torch.rand(2, 1, 8, 8).double()}, "got torch.float64"),
    ({"x": [1.0]}, "got list"), ({"batches": ()}, r"batches is a list of batch sizes, .* got \(\)"), ({"batches": (0,)}, r"got \(0,\)"),
    ({"batches": 8}, "got 8"), ({"batches": [1.5]}, r"got \[1.5\]"), ({"repeats": -1}, "repeats is how many calls .* got -1"),
    ({"repeats": None}, "got None"), ({"sparse": 3}, "sparse is a function of a batch .* got 3")])
def test_what_cannot_be_run_is_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        resources(sparse(), **{"x": torch.rand(2, 1, 8, 8), "repeats": 1} | change)


def test_a_network_whose_weights_are_elsewhere_is_a_sentence():
    net, x = sparse().eval(), torch.rand(8, 1, 8, 8)
    small = int8(net, x)
    for weightless in (nn.Flatten(), small):
        with pytest.raises(ValueError, match="counts the weights of a model, and .* has none"):
            resources(weightless, x, repeats=0)
    assert set(resources(net, x, repeats=1, int8=small).latencies) == {"dense", "int8"}


def test_inputs_of_the_weights_type_are_run_whatever_it_is():
    found = resources(sparse().double(), torch.rand(2, 1, 8, 8, dtype=torch.float64), repeats=1)
    assert found.parameters == resources(sparse(), torch.rand(2, 1, 8, 8), repeats=0).parameters and found.latencies["dense"][0].p50 > 0


def test_latency_is_ordered_and_says_how_it_was_measured():
    calls = []
    found = latency(lambda x: calls.append(len(x)), torch.rand(3, 1), repeats=20, warm_up=4)
    assert calls == [3] * 24 and 0 <= found.p50 <= found.p95
    assert (found.batch, found.repeats, found.threads) == (3, 20, torch.get_num_threads())


def test_a_sleeping_network_takes_as_long_as_it_sleeps():
    import time

    found = latency(lambda x: time.sleep(0.01), torch.rand(1, 1), repeats=5, warm_up=0)
    assert found.p50 >= 10


def test_energy_is_its_formula():
    assert energy(1e6, 0) == pytest.approx(4.6) and energy(1e6, 0, "int8") == pytest.approx(0.23) and energy(0, 1e6) == pytest.approx(160)


def test_all_of_it_is_shown_with_its_labels():
    net, x = sparse(), torch.rand(2, 1, 8, 8)
    found = resources(net, x, batches=(1, 5), repeats=2, other=net)
    assert [(kind, t.batch) for kind, times in found.latencies.items() for t in times] == [("dense", 1), ("dense", 5), ("other", 1), ("other", 5)]
    assert {how for _, _, how in found.rows} == {"counted", "measured", "modelled"}
    page = found._repr_html_()
    assert "measured" in page and "160 pJ a stored byte" in page and f"{found.peak_bytes:,}" in page
