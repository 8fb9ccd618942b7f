"""Masks on attention: which tensors, exact counts, growth, FLOPs, the fast path of eval mode, and what is refused; against attention by hand."""
import copy
import math
from dataclasses import fields
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm, relu
from torch.nn.utils.parametrizations import weight_norm

from sparselab.learn.costs import layer_flops, without_fast_path
from sparselab.learn.footprint import resources
from sparselab.robust import bounds
from sparselab.sparse import METHODS, compact, effective, layer_budgets, prunable, sparsify
from sparselab.sparse.attention import by_head, projections
from sparselab.sparse.fan_in import scale_to_fan_in_
from sparselab.sparse.masks import Masks, assign

DIM, HEADS, CLASSES = 8, 2, 3
LAYER = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]


class Encoder(nn.Module):
    """PyTorch's encoder over tokens, 0 for padding; the first position is classified."""

    def __init__(self, dropout: float = 0.1, layers: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(20, DIM, padding_idx=0)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 16, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0)[:, 0])


class Separate(nn.Module):
    """An attention layer as Hugging Face's encoders have it: three layers for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x):
        return self.dense(attention(self.query(x), self.key(x), self.value(x)))


class Blocks(nn.Module):
    """A classifier of tokens with two such layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.one, self.two, self.head = nn.Embedding(20, DIM), Separate(), Separate(), nn.Linear(DIM, CLASSES)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.one(x)
        return self.head((x + self.two(x))[:, 0])


def attention(q, k, v, there=None):
    """Multi-head attention by its formula; `there` (B, L): which keys exist."""
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if there is not None:
        scores = scores.masked_fill(~there[:, None, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def by_hand(layer, x, there, masks, name):
    """A TransformerEncoderLayer in eval mode, every weight multiplied by its mask."""
    weights = {own: layer.get_parameter(own) * masks[f"{name}.{own}"] for own in LAYER}
    attn = layer.self_attn
    q, k, v = (x @ weights[LAYER[0]].t() + attn.in_proj_bias).chunk(3, -1)
    x = x + attention(q, k, v, there) @ weights[LAYER[1]].t() + attn.out_proj.bias
    x = layer_norm(x, (DIM,), layer.norm1.weight, layer.norm1.bias)
    inner = relu(x @ weights[LAYER[2]].t() + layer.linear1.bias)
    return layer_norm(x + inner @ weights[LAYER[3]].t() + layer.linear2.bias, (DIM,), layer.norm2.weight, layer.norm2.bias)


def data():
    torch.manual_seed(1)
    tokens = torch.randint(1, 20, (12, 6))
    tokens[:6, 4:] = 0
    return tokens, torch.arange(12) % CLASSES


def made(make=Encoder, method="set", sparsity=0.7, steps=8, **options):
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)
    if "update_every" in {field.name for field in fields(METHODS[method])}:
        options = {"update_every": 2} | options
    return net, optimizer, sparsify(net, optimizer, method, sparsity, steps, **options)


def fit(net, optimizer, sparsifier, steps=8):
    tokens, y = data()
    for _ in range(steps):
        torch.manual_seed(sparsifier.steps)  # of dropout
        optimizer.zero_grad()
        sparsifier.see_loss(lambda: cross_entropy(net(tokens), y))
        cross_entropy(net(tokens), y).backward()
        optimizer.step()
        sparsifier.step()


def test_projections_and_linear_layers_are_prunable_and_embeddings_biases_and_norms_are_not():
    assert list(prunable(nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True))) == ["in_proj_weight", "out_proj.weight"]
    other = prunable(nn.MultiheadAttention(DIM, HEADS, kdim=5, vdim=7))
    assert {name: tuple(w.shape) for name, w in other.items()} == {
        "q_proj_weight": (8, 8), "k_proj_weight": (8, 5), "v_proj_weight": (8, 7), "out_proj.weight": (8, 8)}
    names = list(prunable(Encoder()))
    assert names == [f"encoder.layers.{i}.{name}" for i in range(2) for name in LAYER] + ["head.weight"]
    decoder = nn.TransformerDecoderLayer(DIM, HEADS, 16)
    assert list(prunable(decoder)) == [*LAYER[:2], "multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight", *LAYER[2:]]
    assert len(prunable(Blocks())) == 9 and "embedding.weight" not in prunable(Blocks())


def test_a_decoder_that_shares_the_embedding_is_one_weight_with_it_and_may_be_kept_whole():
    def tied():
        net = Encoder()
        net.head = nn.Linear(DIM, 20, bias=False)
        net.head.weight = net.embedding.weight
        return net

    for dense, kept in (((), False), (("head.weight",), True)):
        net, *_, sparsifier = made(tied, "static", 0.5, dense=dense)
        assert list(sparsifier.masks)[-1] == "head.weight" and net.embedding.weight is sparsifier.masks.weights["head.weight"]
        assert bool(sparsifier.masks["head.weight"].all()) == kept and sparsifier.masks.nnz == round(0.5 * sparsifier.masks.total)
        assert torch.equal(net.embedding.weight != 0, sparsifier.masks["head.weight"] & (torch.arange(20) > 0)[:, None])


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_three_projections_in_one_tensor_have_the_budget_of_the_linear_layer_that_computes_the_same(distribution):
    *_, sparsifier = made(method="static", sparsity=0.83, distribution=distribution)
    linear = {name: tuple(nn.Linear(DIM, 3 * DIM).weight.shape) if "in_proj" in name else shape for name, shape in sparsifier.shapes.items()}
    assert sparsifier.masks.counts == layer_budgets(linear, 0.83, distribution)
    assert sum(int(w.count_nonzero()) for w in prunable(sparsifier.model).values()) == round(0.17 * sparsifier.masks.total)


REFUSED = {"synflow": "no input where tokens", "slimming": "no BatchNorm", "ctre_seq": "MultiheadAttention", "ctre_sim": "MultiheadAttention"}


@pytest.mark.parametrize("make", [Encoder, Blocks])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_promise_on_transformer_blocks_or_says_why_not(method, make):
    sparsity, options = 0.0 if method == "dense" else 0.7, {"rounds": 4} if method == "vlr_projection" else {}
    if method in REFUSED and not (make is Blocks and "ctre" in method):
        with pytest.raises(ValueError, match=REFUSED[method]):
            fit(*made(make, method, sparsity))
        return
    net, optimizer, sparsifier = made(make, method, sparsity, **options)
    table = net.embedding.weight.detach().clone()
    fit(net, optimizer, sparsifier)
    assert sparsifier.masks.nnz == sparsifier.budget == round((1 - sparsity) * sparsifier.masks.total)
    for name, weight in prunable(net).items():
        assert not weight[~sparsifier.masks[name]].any(), name
        assert int(sparsifier.masks[name].sum()) == sparsifier.masks.counts[name]
    used = torch.zeros(20, dtype=torch.bool)
    used[data()[0]] = True
    if not hasattr(sparsifier, "frozen"):
        assert bool((net.embedding.weight != table)[used & (torch.arange(20) > 0)].any(1).all()), "embeddings train densely"


def test_fused_and_separate_projections_compute_and_train_the_same_under_the_same_masks():
    torch.manual_seed(0)
    fused, parts = nn.MultiheadAttention(DIM, HEADS, batch_first=True), Separate()
    three = (parts.query, parts.key, parts.value)
    with torch.no_grad():
        fused.in_proj_weight.copy_(torch.cat([layer.weight for layer in three]))
        fused.in_proj_bias.copy_(torch.cat([layer.bias for layer in three]))
        fused.out_proj.load_state_dict(parts.dense.state_dict())
    optimizers = [torch.optim.AdamW(net.parameters(), 1e-2) for net in (fused, parts)]
    one, many = (sparsify(net, optimizer, "static", 0.6, 5) for net, optimizer in zip((fused, parts), optimizers, strict=True))
    for name, mask in zip(("query", "key", "value"), one.masks["in_proj_weight"].chunk(3), strict=True):
        assign(many.masks, f"{name}.weight", mask.clone())
    assign(many.masks, "dense.weight", one.masks["out_proj.weight"].clone())
    with torch.no_grad():  # `static` has zeroed other places of the second network
        parts.dense.weight.copy_(fused.out_proj.weight)
        for layer, weight in zip(three, fused.in_proj_weight.chunk(3), strict=True):
            layer.weight.copy_(weight)
    x = torch.randn(4, 6, DIM)
    for _ in range(5):
        for net, optimizer, sparsifier in ((fused, optimizers[0], one), (parts, optimizers[1], many)):
            out = net(x, x, x)[0] if net is fused else net(x)
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            sparsifier.step()
    torch.testing.assert_close(fused.in_proj_weight, torch.cat([layer.weight for layer in three]), atol=1e-6, rtol=0)
    assert one.masks.nnz == many.masks.nnz == round(0.4 * 256)


@pytest.mark.parametrize("fast", [True, False])
def test_the_encoder_in_eval_mode_sees_the_zeros_with_and_without_its_fast_path(fast):
    net, optimizer, sparsifier = made(method="rigl", sparsity=0.8)
    fit(net, optimizer, sparsifier)
    net.eval()
    tokens = data()[0]
    x = net.embedding(tokens).detach()
    with torch.no_grad(), patch.object(torch, "_transformer_encoder_layer_fwd", wraps=torch._transformer_encoder_layer_fwd) as ran:
        if fast:
            found = net(tokens)
        else:
            with without_fast_path():
                found = net(tokens)
        assert ran.call_count == (2 if fast else 0)
        for i, layer in enumerate(net.encoder.layers):
            x = by_hand(layer, x, tokens != 0, sparsifier.masks, f"encoder.layers.{i}")
        expected = x[:, 0] @ (net.head.weight * sparsifier.masks["head.weight"]).t() + net.head.bias
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_growth_takes_the_largest_gradients_of_all_three_projections_by_brute_force():
    net, optimizer, sparsifier = made(lambda: Encoder(dropout=0.0), "rigl", steps=20)
    fit(net, optimizer, sparsifier, 1)
    with torch.no_grad():
        net.encoder.layers[0].self_attn.in_proj_weight[:2 * DIM].mul_(9)  # so that queries and keys have slopes like those of values
    name, (tokens, y) = "encoder.layers.0.self_attn.in_proj_weight", data()
    before, weight = sparsifier.masks[name].clone(), sparsifier.masks.weights[name]
    optimizer.zero_grad()
    cross_entropy(net(tokens), y).backward()
    slopes = weight.grad.clone()
    optimizer.step()
    sparsifier.step()  # step 2: an update
    after = sparsifier.masks[name]
    grown, dropped = after & ~before, before & ~after
    assert 0 < int(grown.sum()) == int(dropped.sum())
    candidates = sorted(slopes.abs()[~before].tolist(), reverse=True)
    assert sorted(slopes.abs()[grown].tolist(), reverse=True) == candidates[:int(grown.sum())]
    assert bool((weight[grown] == 0).all()) and len({row // DIM for row in grown.nonzero()[:, 0].tolist()}) > 1, "in more than one projection"


def test_scores_of_grasp_are_second_derivatives_through_attention():
    net, optimizer, sparsifier = made(lambda: Encoder(dropout=0.0, layers=1).double(), "grasp")
    tokens, y = data()
    sparsifier.see_loss(lambda: cross_entropy(net(tokens), y))
    name = "encoder.layers.0.self_attn.in_proj_weight"
    weights = list(sparsifier.masks.weights.values())

    def slopes():
        return torch.autograd.grad(cross_entropy(net(tokens), y), weights)

    g, step = slopes(), 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, part in zip(weights, g, strict=True):
                weight.add_(part, alpha=sign * step)
        ends.append(slopes())
        with torch.no_grad():
            for weight, part in zip(weights, g, strict=True):
                weight.sub_(part, alpha=sign * step)
    expected = (ends[0][0] - ends[1][0]) / (2 * step)
    torch.testing.assert_close(sparsifier.curvature[name], expected, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("method", ["rigl", "hard_concrete", "granet"])
def test_killed_and_resumed_to_the_same_bits(method):
    whole = made(method=method)
    fit(*whole)
    net, optimizer, sparsifier = made(method=method)
    fit(net, optimizer, sparsifier, 5)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    net, optimizer, sparsifier = made(method=method)
    for part, state in zip((net, optimizer, sparsifier), saved, strict=True):
        part.load_state_dict(state)
    fit(net, optimizer, sparsifier, 3)
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name
    assert all(torch.equal(mask, sparsifier.masks[name]) for name, mask in whole[2].masks.items())


def test_a_state_that_is_loaded_is_masked_also_where_the_parameter_is_replaced():
    net, optimizer, sparsifier = made()
    dense = Encoder().state_dict()
    net.load_state_dict(dense)
    assert sparsifier.masks.nnz == sum(int(w.count_nonzero()) for w in prunable(net).values()) == sparsifier.budget
    net.load_state_dict(copy.deepcopy(dense), assign=True)
    name = "encoder.layers.1.self_attn.in_proj_weight"
    assert sparsifier.masks.weights[name] is net.encoder.layers[1].self_attn.in_proj_weight
    assert sum(int(w.count_nonzero()) for w in prunable(net).values()) == sparsifier.budget
    with pytest.raises(ValueError, match="has replaced"):
        sparsifier.step()


def test_flops_by_hand_of_self_attention_and_of_attention_to_another_sequence():
    tokens = data()[0][6:7]
    found = layer_flops(Encoder(), tokens)  # 6 positions
    assert found["encoder.layers.0.self_attn.in_proj_weight"] == 2 * 3 * DIM * DIM * 6
    assert found["encoder.layers.0.self_attn.out_proj.weight"] == 2 * DIM * DIM * 6
    assert found["encoder.layers.1.linear1.weight"] == found["encoder.layers.1.linear2.weight"] == 2 * DIM * 16 * 6
    assert found["head.weight"] == 2 * DIM * CLASSES and torch.backends.mha.get_fastpath_enabled()

    class Cross(nn.Module):
        def __init__(self, **sizes):
            super().__init__()
            self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **sizes)

        def forward(self, x):
            memory = torch.zeros(1, 5, 4) if self.attn.kdim == 4 else torch.zeros(1, 5, DIM)
            return self.attn(x, key=memory, value=memory)[0]

    x = torch.zeros(1, 3, DIM)
    assert layer_flops(Cross(), x) == {"attn.in_proj_weight": 2 * DIM * DIM * (3 + 5 + 5), "attn.out_proj.weight": 2 * DIM * DIM * 3}
    assert layer_flops(Cross(kdim=4, vdim=4), x) == {
        "attn.q_proj_weight": 2 * DIM * DIM * 3, "attn.k_proj_weight": 2 * DIM * 4 * 5, "attn.v_proj_weight": 2 * DIM * 4 * 5,
        "attn.out_proj.weight": 2 * DIM * DIM * 3}


def test_rows_of_a_fused_projection_are_scaled_to_their_own_fan_in():
    net = nn.MultiheadAttention(DIM, HEADS)
    masks, before = Masks(prunable(net)), net.in_proj_weight.detach().clone()
    assign(masks, "in_proj_weight", (torch.arange(24)[:, None] + torch.arange(DIM)) % 3 == 0)
    scale_to_fan_in_(masks, net)
    for row, mask in enumerate(masks["in_proj_weight"]):
        expected = before[row][mask] * math.sqrt(DIM / int(mask.sum()))
        torch.testing.assert_close(net.in_proj_weight[row][mask], expected)


def test_projections_and_heads_are_counted_by_brute_force():
    for net in (nn.MultiheadAttention(DIM, HEADS), nn.MultiheadAttention(DIM, HEADS, kdim=5, vdim=7)):
        masks = Masks(prunable(net))
        for name, weight in masks.weights.items():
            assign(masks, name, torch.rand(weight.shape) < 0.4)
        [(layer, parts)] = projections(net, masks).items()
        assert layer == "" and [tuple(part.shape) for part in parts.values()] == [(8, 8), (8, net.kdim), (8, net.vdim), (8, 8)]
        assert sum(int(part.sum()) for part in parts.values()) == masks.nnz
        counts = by_head(net, masks)[""]
        for which, part in enumerate(parts.values()):
            for head in range(HEADS):
                units = [4 * head + i for i in range(4)]
                assert int(counts[which, head]) == sum(int((part[:, j] if which == 3 else part[j]).sum()) for j in units)


def test_compact_takes_dead_units_out_of_the_mlp_and_leaves_the_outputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(DIM, HEADS, 16, batch_first=True), nn.Flatten(), nn.Linear(48, 3)).eval()
    with torch.no_grad():
        net[0].linear2.weight[:, [1, 5, 9]] = 0
    x = torch.randn(3, 6, DIM)
    small = compact(net, x)
    assert small[0].linear1.out_features == small[0].linear2.in_features == 13 and small[0].self_attn.in_proj_weight.shape == (24, 8)
    torch.testing.assert_close(small(x), net(x), atol=1e-5, rtol=0)
    found = resources(small, x, repeats=0)
    assert found.macs["0.linear1.weight"] == DIM * 13 * 6 and found.nnz == found.parameters == sum(p.numel() for p in small.parameters())


def test_what_cannot_be_done_is_said_in_a_sentence():
    attn = nn.MultiheadAttention(DIM, HEADS)
    with pytest.raises(ValueError, match="Paths through layer .*MultiheadAttention"):
        effective(nn.Sequential(attn), {f"0.{name}": w != 0 for name, w in prunable(attn).items()}, (6, DIM))
    for net, sentence in ((weight_norm(nn.MultiheadAttention(DIM, HEADS), "in_proj_weight"), "in_proj_weight is no parameter"),
                          (nn.MultiheadAttention(DIM, HEADS).requires_grad_(False), "in_proj_weight is frozen")):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        with pytest.raises(ValueError, match=sentence):
            sparsify(net, optimizer, "static", 0.5, 1)
    with pytest.raises(ValueError, match="no MultiheadAttention, so there is nothing to prune"):
        prunable(nn.Embedding(5, 3))
    block, x = nn.Sequential(nn.Unflatten(1, (6, DIM)), nn.TransformerEncoderLayer(DIM, HEADS, 16, batch_first=True)).eval(), torch.rand(2, 48)
    with pytest.raises(ValueError, match="self_attn.*softmax.* has no bound rule"):
        bounds(block, x, x + 0.1)
