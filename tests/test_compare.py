"""Many runs side by side: grouping and sums by hand, paths and overlaps by brute force, and nbs/compare.ipynb as a user runs it."""
import csv
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from re import findall
from statistics import mean, stdev

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from executing import executed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("plotly", reason="figures need the extra lab")
from sparselab.learn.config import Config
from sparselab.learn.experiments import train
from sparselab.learn.files import append_row, write_sealed
from sparselab.learn.models import build
from sparselab.learn.runs import Run, runs_in
from sparselab.sparse.history import MaskHistory
from sparselab.sparse.history_files import save as save_history
from sparselab.sparse.masks import prunable
from sparselab.sparse.overlap import chance_overlap, mask_overlap
from sparselab.sparse.paths import effective
from sparselab.view import (
    RunBrowser,
    accuracy_by_flops,
    accuracy_by_sparsity,
    effective_sparsity,
    layer_densities,
    left_out,
    ordered,
    overlap_by_method,
    run_csv,
    run_rows,
    run_table,
    selected,
    stability_by_method,
    trade_off,
)
from sparselab.view.explorer.browser import FIGURES
from sparselab.view.figures.metrics import DASHES
from sparselab.view.runs.networks import pairs_of
from sparselab.view.runs.table import COLUMNS, finished, groups_of, table_of
from sparselab.view.runs.trade_offs import STYLES, style

ROOT = Path(__file__).resolve().parents[1]
COMPARE, EXAMPLE = ROOT / "nbs" / "compare.ipynb", ROOT / "nbs" / "example"
SMALL = dict(model="mlp", model_options={"widths": [24, 16]}, objective="natural", epochs=2, batch_size=32, eps=0.02, test_samples=20,
             device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three methods and two seeds, one run on another network, one that was killed and one that is damaged."""
    folder = tmp_path_factory.mktemp("runs")
    chosen = [("dense", 0.0, 0), ("static", 0.9, 0), ("static", 0.9, 1), ("rigl", 0.8, 0), ("rigl", 0.9, 0), ("rigl", 0.9, 1)]
    for method, sparsity, seed in chosen:
        train(Config(method=method, sparsity=sparsity, seed=seed, runs_dir=str(folder), **SMALL), callbacks=[])
    train(Config(method="static", sparsity=0.9, runs_dir=str(folder), **SMALL | {"model": "cnn4", "model_options": {"width": 2}}),
          callbacks=[])
    for name, source in (("killed", "rigl"), ("damaged", "sparsevlr")):
        shutil.copytree(EXAMPLE / source, folder / name)
    (folder / "killed" / "summary.json").unlink()
    (folder / "damaged" / "summary.json").write_text('{"accuracy": {"clean"')
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> pd.DataFrame:
    return run_rows(folder)


# --- the table ----------------------------------------------------------------------------------------------------------

def test_every_run_is_a_row_whatever_its_state(rows):
    states = dict(zip(rows["run"], rows["state"], strict=True))
    assert len(rows) == 9 and states.pop("killed") == "epoch 30 of 30" and "is damaged" in states.pop("damaged")
    assert set(states.values()) == {"finished"} and len(finished(rows)) == 7
    assert "2 of 9 runs are in no figure: " in left_out(rows) and "killed (epoch 30 of 30)" in left_out(rows)
    assert len(run_table(rows).rows) == 9 and run_table(rows[:0]).rows == [] and "no run here" in left_out(rows[:0])


def test_a_run_that_was_changed_while_it_trained_is_no_repetition_of_one_that_was_not(tmp_path):
    later, before = ({"step": step, "name": "lr", "old": 0.01, "new": new} for step, new in ((140, 0.002), (100, 0.01)))
    for name, events in (("plain", []), ("live", [later]), ("withdrawn", [later, before])):
        (tmp_path / name).mkdir()
        write_sealed(tmp_path / name / "config.json", asdict(Config()))
        for row in events:
            append_row(tmp_path / name / "events.jsonl", row)
    found = run_rows(tmp_path).set_index("run")["changed"]
    assert found["live"] == "lr 0.002 at step 140" and found["withdrawn"] == "lr 0.01 at step 100" and found.isna()["plain"]
    rows = table_of([made(run=f"rigl-s{seed}", method="rigl", seed=seed, clean=0.9, epochs=60, changed=changed)
                     for seed, changed in ((0, None), (1, None), (0, "lr 0.002 at step 140"))])
    assert {group.label: len(group.rows) for group in groups_of(rows)} == {"rigl": 2, "rigl · changed lr 0.002 at step 140": 1}
    assert run_table(rows).columns[-1] == "changed" and "changed" not in run_table(rows[:2]).columns


def test_a_run_that_goes_on_from_another_is_told_from_one_that_began_anew(tmp_path):
    fresh = [made(run=f"rigl-s{seed}", method="rigl", seed=seed, clean=0.9, epochs=60) for seed in (0, 1)]
    gone_on = [row | {"run": f"rigl-s{row['seed']}.to-60", "continues": f"rigl-30-s{row['seed']}", "clean": 0.8} for row in fresh]
    rows = table_of([*fresh, *gone_on])
    assert {group.label: len(group.rows) for group in groups_of(rows)} == {"rigl": 2, "rigl · continues rigl-30": 2}
    assert run_table(rows).columns[-1] == "continues" and "continues" not in run_table(rows[:2]).columns
    run = tmp_path / "made.to-2"
    run.mkdir()
    write_sealed(run / "config.json", {**asdict(Config()), "continues": "made"})
    assert run_rows(tmp_path)["continues"].tolist() == ["made"]


def test_the_csv_holds_every_number_of_the_summaries(folder, rows):
    lines = {line["run"]: line for line in csv.DictReader(io.StringIO(run_csv(rows)))}
    for name in finished(rows)["run"]:
        line, summary = lines[name], json.loads((folder / name / "summary.json").read_text())
        for measure, value in summary["accuracy"].items():
            assert float(line[measure]) == value
        assert (int(line["nnz"]), int(line["total"])) == (summary["nnz"], summary["total"])
        assert float(line["training_share"]) == summary["flops"]["training"] / summary["flops"]["training_dense"]
        assert Config.read({name: line[name] for name in line if name in Config.readers()}) == Config.read(
            summary["config"] | {"runs_dir": "runs", "device": "auto"})


def test_filters_take_values_lists_and_texts_and_refuse_other_columns(rows):
    assert set(selected(rows, {"method": ["static", "dense"], "seed": 0})["run"]) == {
        row["run"] for _, row in rows.iterrows() if row["method"] in ("static", "dense") and row["seed"] == 0} != set()
    one, other = selected(rows, '{"sparsity": "9/10", "method": "rigl"}'), selected(rows, {"sparsity": 0.9, "method": ["rigl"]})
    assert one.equals(other) and len(one) == 2
    assert len(selected(rows, {"model": "resnet18"})) == 0 and selected(rows, {}).equals(rows)
    assert set(selected(rows, {"model_options": [{"width": 2}]})["model"]) == {"cnn4"}
    with pytest.raises(ValueError, match="'datset'. Did you mean 'dataset'"):
        selected(rows, {"datset": "mnist"})


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_sorts_both_ways_with_what_is_missing_last(rows, column):
    up, down = ordered(rows, column), ordered(rows, f"-{column}")
    known = up[column].dropna().tolist()
    for found in (up, down):
        assert set(found.index) == set(rows.index)
        assert found[column].iloc[len(known):].isna().all()
    if known and not isinstance(known[0], dict):
        assert known == sorted(known) and down[column].iloc[:len(known)].tolist() == sorted(known, reverse=True)
    ties = up.groupby(up[column].map(str), sort=False)
    assert all(list(group.index) == sorted(group.index) for _, group in ties), "ties stay as they were"


def test_rounds_of_a_run_are_not_runs_of_the_folder(tmp_path):
    for place in ("b", "a", "b/rounds/2", "b/rounds/1", "b/rounds/1/rounds/x", "rounds/c", "deep/er/d"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "config.json").write_text("{}")
    assert [run.path.relative_to(tmp_path).as_posix() for run in runs_in(tmp_path)] == ["a", "b", "deep/er/d", "rounds/c"]
    rounds = Run(tmp_path / "b").rounds
    assert [run.path.name for run in rounds] == ["1", "2"] and [run.path.name for run in rounds[0].rounds] == ["x"]
    assert Run(tmp_path / "a").rounds == [] and len(run_rows(tmp_path)) == 4
    with pytest.raises(ValueError, match="no folder"):
        run_rows(tmp_path / "nowhere")


# --- groups and their curves --------------------------------------------------------------------------------------------

def made(**values) -> dict:
    """A finished row without a run."""
    return {"state": "finished", "dataset": "digits", "model": "mlp", "objective": "ibp", "eps": 0.1, "sparsity": 0.9, "method_options": {}} | values


def test_only_runs_that_differ_in_the_seed_are_averaged():
    rows = [made(method="rigl", seed=seed, clean=clean) for seed, clean in enumerate((0.5, 0.7, 0.9))]
    found = [(group.label, group.spread("clean")) for group in groups_of(table_of(rows))]
    assert found == [("rigl", (mean((0.5, 0.7, 0.9)), stdev((0.5, 0.7, 0.9))))]
    for change, label in (({"dataset": "mnist"}, "rigl · mnist"), ({"eps": 0.2}, "rigl · eps 0.2"), ({"batch_size": 64}, "rigl · batch_size 64"),
                          ({"method_options": {"update_every": 5}}, "rigl · update_every 5"), ({"epochs": 9}, "rigl · epochs 9")):
        groups = {group.label: group for group in groups_of(table_of([*rows, made(method="rigl", seed=0, clean=0.1, **change)]))}
        assert len(groups) == 2 and groups[label].spread("clean") == (0.1, 0.0), label
    other = groups_of(table_of([*rows, made(method="set", seed=0, clean=0.1, method_options={"update_every": 5})]))
    assert [group.name for group in other] == ["rigl 90 %", "set 90 %"]
    assert [group.name for group in groups_of(table_of([made(method="dense", clean=1.0, sparsity=0.0), rows[0]]))] == ["dense", "rigl 90 %"]
    with pytest.raises(ValueError, match="none of these runs has finished"):
        groups_of(table_of([made(method="rigl", clean=None), made(method="set", clean=0.5, state="epoch 1 of 2")]))


def test_curves_are_means_and_deviations_in_the_order_of_sparsity():
    rows = [made(method="set", seed=seed, sparsity=sparsity, clean=sparsity / 2 + seed / 10, verified=sparsity / 3, training_flops=100 + seed)
            for sparsity in (0.99, 0.9, 0.95) for seed in (0, 1)]
    rows = table_of(rows)
    clean, verified = accuracy_by_sparsity(rows).data
    assert np.allclose(clean.x, [0.1, 0.05, 0.01]) and np.allclose(clean.y, [0.5, 0.525, 0.545])
    assert np.allclose(clean.error_y.array, stdev((0, 0.1))) and not verified.error_y.visible
    curve = trade_off(rows).data[0]
    assert np.allclose(curve.x, clean.y) and np.allclose(curve.y, verified.y) and np.allclose(curve.error_x.array, clean.error_y.array)
    assert np.allclose(accuracy_by_flops(rows).data[0].x, 100.5)
    for draw, what in ((accuracy_by_flops, "training flops"), (trade_off, "verified")):
        with pytest.raises(ValueError, match=f"the summary of no finished run has {what}"):
            draw(table_of([made(method="set", clean=0.5), made(method="dense", sparsity=0.0, clean=0.5)]))
    assert len(accuracy_by_sparsity(table_of([made(method="dense", sparsity=0.0, clean=0.5)])).data) == 2


def test_a_method_looks_the_same_in_every_figure(rows):
    for draw in (accuracy_by_sparsity, trade_off, accuracy_by_flops, effective_sparsity):
        for trace in draw(rows).data:
            if trace.name.split(" ")[0] in ("dense", "static", "rigl"):
                assert trace.line.color == style(trace.name.split(" ")[0])["color"]


def test_settings_of_one_method_are_told_apart_where_each_is_a_single_point():
    options = {"update_every": 10, "drop_fraction": 0.3, "grow_by": "gradient"}
    found = table_of([made(method="rigl", seed=0, clean=0.9, verified=0.8, training_flops=9, epochs=60, eps=0.05, method_options=options),
                      made(method="rigl", seed=0, clean=0.1, verified=0.1, training_flops=8, epochs=3)])
    for draw in (accuracy_by_sparsity, trade_off, accuracy_by_flops):
        lines = {trace.name: trace for trace in draw(found).data if trace.name.startswith("rigl")}
        assert len(lines) == 2 and len({trace.marker.symbol for trace in lines.values()}) == len({trace.line.dash for trace in lines.values()}) == 2


def test_settings_of_one_method_have_the_dashes_of_the_metrics_and_no_two_look_the_same():
    found = table_of([made(method="rigl", seed=0, clean=0.5, verified=0.4, epochs=epochs) for epochs in range(3, 21)])
    looks = [(trace.line.dash, trace.marker.symbol) for trace in trade_off(found).data if trace.name.startswith("rigl")]
    assert len(set(looks)) == len(looks) == 18 and [dash for dash, _ in looks[:len(DASHES)]] == list(DASHES)


def test_groups_with_long_names_have_markers_of_their_own_and_room_for_what_is_drawn(rows):
    """A name beside an axis is broken into lines, and none of it is lost."""
    one, two = rows[rows["method"].eq("rigl")].copy(), rows[rows["method"].eq("rigl")].copy()
    two["method_options"] = [{"update_every": 10, "drop_fraction": 0.3, "grow_by": "gradient"}] * len(two)
    found = pd.concat([one, two], ignore_index=True)
    names = [group.name for group in groups_of(found)]
    assert max(map(len, names)) > 60
    densities = layer_densities(found).data
    assert [trace.name for trace in densities] == names and len({trace.marker.symbol for trace in densities}) == 3 < len(names)
    for fig, drawn in ((stability_by_method(found), names), (overlap_by_method(found, "all"), [pair.name for pair in pairs_of(found)])):
        shown = {name for trace in fig.data for name in trace.y}
        assert {name.replace("<br>", " ") for name in shown} == set(drawn)
        assert max(len(line) for name in shown for line in name.split("<br>")) <= 40


def test_a_method_without_a_look_is_refused_loudly(monkeypatch):
    with pytest.raises(ValueError, match="Did you mean 'rigl'"):
        style("rigll")
    monkeypatch.delitem(STYLES, "dynamic")
    with pytest.raises(ValueError, match="family 'dynamic', which has no style"):
        style("rigl")


# --- overlap ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [[(3, 3, 10)], [(5, 90, 100), (40, 1, 60)], [(20, 30, 50), (6, 4, 900), (50, 50, 2000)]])
def test_overlap_by_chance_is_that_of_drawn_masks(layers):
    drawn = np.random.default_rng(0)

    def masks(side: int) -> dict[str, torch.Tensor]:
        return {str(i): torch.from_numpy(np.isin(np.arange(layer[2]), drawn.choice(layer[2], layer[side], replace=False)))
                for i, layer in enumerate(layers)}

    found = [mask_overlap(masks(0), masks(1)) for _ in range(3000)]
    indices = np.array([overlap.jaccard for overlap in found])
    expected, spread = chance_overlap(layers)
    assert {(overlap.chance, overlap.spread) for overlap in found} == {(expected, spread)}
    assert abs(indices.mean() - expected) < 4 * indices.std() / len(indices) ** 0.5 + 0.02 * expected
    assert abs(spread / indices.std() - 1) < 0.15


def test_overlap_at_its_ends_and_of_other_networks():
    whole, none = {"a": torch.ones(2, 3, dtype=torch.bool)}, {"a": torch.zeros(2, 3, dtype=torch.bool)}
    assert mask_overlap(whole, whole) == (1.0, 1.0, 0.0) and mask_overlap(none, none) == (1.0, 1.0, 0.0)
    assert mask_overlap(whole, none) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"a has the shape \(2, 3\) in one and \(6,\)"):
        mask_overlap(whole, {"a": torch.ones(6, dtype=torch.bool)})


def test_pairs_are_of_one_network_and_never_dense(rows):
    pairs = pairs_of(rows)
    assert len(pairs) == 10 and {run.config.model for pair in pairs for run in (pair.first, pair.second)} == {"mlp"}
    for pair in pairs:
        both = [np.concatenate([run.history.mask(-1, name).numpy().ravel() for name in run.history.names]) for run in (pair.first, pair.second)]
        assert pair.overlap.jaccard == pytest.approx((both[0] & both[1]).sum() / (both[0] | both[1]).sum())
        assert pair.same_seed == (pair.first.config.seed == pair.second.config.seed)


def test_the_overlap_says_what_is_compared_with_what(rows, monkeypatch):
    def told(reference: str) -> str:
        return overlap_by_method(rows, reference).layout.meta["note"]

    groups = [group.name for group in groups_of(rows) if group.method != "dense"]
    every = len({pair.name for pair in pairs_of(rows)})
    assert "two runs" in told("all") and "every pair of groups;" in told("all") and "two standard deviations of one pair" in told("all")
    lines = {pair.name for pair in pairs_of(rows) if groups[0] in pair.groups}
    assert f"{groups[0]} with every group, {len(lines)} pairs of {every};" in told(groups[0]) and 1 < len(lines) < every
    networks = importlib.import_module("sparselab.view.runs.networks")
    monkeypatch.setattr(networks, "MOST_LINES", 2)
    assert f"every pair of groups, the first 2 of {every} are shown;" in told("all")
    monkeypatch.setattr(networks, "MOST_RUNS", 3)
    assert "; of 6 runs the first 3 are compared;" in told("all")


# --- effective sparsity -------------------------------------------------------------------------------------------------

def edges_of(layer: nn.Module, image: tuple[int, ...]) -> tuple[list[tuple], tuple[int, ...]]:
    """Every edge (from unit, to unit, weight index or None) that a layer has, unit by unit, and the shape that comes out."""
    if isinstance(layer, nn.Linear):
        return [((i,), (o,), (o, i)) for o in range(layer.out_features) for i in range(layer.in_features)], (layer.out_features,)
    if isinstance(layer, nn.Flatten):
        return [(unit, (at,), None) for at, unit in enumerate(np.ndindex(image))], (int(np.prod(image)),)
    if isinstance(layer, nn.ReLU):
        return [(unit, unit, None) for unit in np.ndindex(image)], image
    conv = isinstance(layer, nn.Conv2d)
    kernel, stride, padding = ((layer.kernel_size[0], layer.stride[0], layer.padding[0]) if conv
                               else (layer.kernel_size, layer.stride, layer.padding))
    shape = (layer.out_channels if conv else image[0], *((size + 2 * padding - kernel) // stride + 1 for size in image[1:]))
    found = []
    for o, y, x in np.ndindex(shape):
        for i in range(image[0]) if conv else (o,):
            for ky, kx in np.ndindex(kernel, kernel):
                at = (i, y * stride - padding + ky, x * stride - padding + kx)
                if 0 <= at[1] < image[1] and 0 <= at[2] < image[2]:
                    found.append((at, (o, y, x), (o, i, ky, kx) if conv else None))
    return found, shape


def path_counts(net: nn.Sequential, masks: dict, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Weight name -> how many paths from an input to an output lead over each weight: exact whole numbers."""
    stages = []
    for name, layer in net.named_children():
        edges, after = edges_of(layer, shape)
        stages.append((name, [edge for edge in edges if edge[2] is None or masks[f"{name}.weight"][edge[2]]], after))
        shape = after
    into = [dict.fromkeys({start for start, *_ in stages[0][1]}, 1)]
    for _, edges, _ in stages:
        into.append({})
        for start, end, _ in edges:
            into[-1][end] = into[-1].get(end, 0) + into[-2].get(start, 0)
    out, counts = dict.fromkeys(np.ndindex(shape), 1), {name: np.zeros(mask.shape, object) for name, mask in masks.items()}
    for at, (name, edges, _) in reversed(list(enumerate(stages))):
        before: dict = {}
        for start, end, weight in edges:
            before[start] = before.get(start, 0) + out.get(end, 0)
            if weight is not None:
                counts[f"{name}.weight"][weight] += into[at].get(start, 0) * out.get(end, 0)
        out = before
    return counts


@settings(max_examples=40, deadline=None)
@given(density=st.floats(0.02, 0.7), seed=st.integers(0, 10**6), kernel=st.integers(1, 3), stride=st.integers(1, 2),
       padding=st.integers(0, 1), pool=st.booleans(), widths=st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_a_weight_is_effective_if_and_only_if_a_path_leads_over_it(density, seed, kernel, stride, padding, pool, widths):
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Conv2d(2, widths[0], kernel, stride, padding), nn.ReLU()] + pool * [nn.MaxPool2d(2, 1)]
    layers += [nn.Conv2d(widths[0], widths[1], 2, 1, padding), nn.ReLU(), nn.Flatten()] if stride == 1 else [nn.Flatten()]
    features = nn.Sequential(*layers)(torch.zeros(1, 2, 5, 5)).shape[1]
    net = nn.Sequential(*layers, nn.Linear(features, widths[2]), nn.ReLU(), nn.Linear(widths[2], 2))
    masks = {name: torch.rand(weight.shape, generator=generator) < density for name, weight in prunable(net).items()}
    found, counts = effective(net, masks, (2, 5, 5)), path_counts(net, masks, (2, 5, 5))
    for name in masks:
        assert np.array_equal(found[name].numpy(), counts[name] > 0), name


def test_paths_that_outnumber_every_float_are_still_found():
    """300 layers of 64 units, each connected to 63: some 63^299 paths lead over each weight, and infinity times 0 is no number."""
    net = nn.Sequential(*[layer for _ in range(300) for layer in (nn.Linear(64, 64), nn.ReLU())])
    masks = {name: ~torch.eye(64, dtype=torch.bool) for name in prunable(net)}
    assert all(torch.equal(mask, masks[name]) for name, mask in effective(net, masks, (64,)).items())


@pytest.mark.parametrize("name, options", [("resnet5_bn", {"width": 2}), ("cnn5_bn", {"width": 2, "hidden": [8]}), ("mlp", {"widths": [9]})])
def test_outputs_depend_on_the_effective_weights_and_on_no_other(name, options):
    """All effects are positive here, so none cancels; half of the weights are tried, one by one."""
    generator = torch.Generator().manual_seed(0)
    net = build(name, (1, 8, 8), 3, **options).double().eval()
    masks = {key: torch.rand(weight.shape, generator=generator) < 0.12 for key, weight in prunable(net).items()}
    alive, x = effective(net, masks, (1, 8, 8)), 0.5 + torch.rand(2, 1, 8, 8, generator=generator).double()
    kinds = set()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.copy_(masks[key] * (0.5 + torch.rand(parameter.shape, generator=generator)) if key in masks
                            else torch.full_like(parameter, float("bias" not in key)))
        before = net(x)
        for key, weight in prunable(net).items():
            for at in masks[key].flatten().nonzero().flatten()[::2]:
                weight.view(-1)[at] *= 2
                assert bool((net(x) != before).any()) == bool(alive[key].view(-1)[at]), (key, at)
                weight.view(-1)[at] /= 2
                kinds.add(bool(alive[key].view(-1)[at]))
    assert kinds == {True, False}


def test_wrong_masks_and_unknown_layers_are_refused_in_words():
    net = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    masks = {"0.weight": torch.ones(3, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"layer 1 \(Softmax\) are not known"):
        effective(net, masks, (4,))
    with pytest.raises(ValueError, match=r"0.weight needs a mask of shape \(3, 4\); got none"):
        effective(net, {}, (4,))
    with pytest.raises(ValueError, match=r"got one of shape \(4, 3\)"):
        effective(net, {"0.weight": masks["0.weight"].T}, (4,))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert effective(nn.Sequential(net[0]), masks, (4,))["0.weight"].all() and effective(net[0], {"weight": masks["0.weight"]}, (4,))["weight"].all()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


def test_a_run_whose_paths_cannot_be_followed_is_left_out_and_named(tmp_path, folder):
    known = finished(selected(run_rows(folder), {"method": "rigl"}))["source"].iloc[0]
    for name in ("known", "strange"):
        shutil.copytree(known.path, tmp_path / name)
    shutil.rmtree(tmp_path / "strange" / "masks")
    save_history(MaskHistory({"fc1.weight": torch.ones(3, 64, dtype=torch.bool)}), tmp_path / "strange" / "masks")
    fig = effective_sparsity(run_rows(tmp_path))
    assert "without 1 of 2 runs, the first strange: fc1.weight needs a mask" in fig.layout.meta["note"]
    with pytest.raises(ValueError, match="paths of no run"):
        effective_sparsity(run_rows(tmp_path).query("run == 'strange'"))


# --- the browser and the notebook ---------------------------------------------------------------------------------------

def test_the_browser_filters_sorts_and_hands_out_the_same_call(folder):
    browser = RunBrowser(folder)
    assert set(browser.filters) == {"method", "sparsity", "model", "objective", "eps", "seed"}
    browser.filters["method"].value, browser.filters["model"].value = ("rigl", "static"), ("mlp",)
    browser.sort.value, browser.falling.value = "verified", True
    values = browser.chosen["verified"].tolist()
    assert len(values) == 5 and values == sorted(values, reverse=True)
    heads = findall("<th[^>]*>([^<]*)</th>", browser.table.value)
    assert "training FLOPs" in heads and [label for label, _ in browser.sort.options if label not in ("continues", "changed")] == heads
    for name in FIGURES:
        browser.figure.value = name
        shown = browser.block.heading.value + browser.block.note.value
        assert shown.count(browser.block.panel.figure.layout.meta["note"]) == 1, name
        call, names = browser.block.panel.call.rsplit("\n", 1), {}
        exec(call[0], names)
        assert not browser.block.problem.value and len(eval(call[1], names).data) == len(browser.block.panel.figure.data), name
    browser.filters["method"].value, browser.figure.value = ("dense",), "density by layer"
    assert "none of the finished runs is sparse" in browser.block.problem.value


def test_a_browser_of_an_empty_folder_says_so(tmp_path):
    browser = RunBrowser(tmp_path)
    assert len(browser.chosen) == 0 and "no run here" in browser.note.value and "nothing to draw" in browser.block.problem.value


def shown(notebook: nbformat.NotebookNode) -> tuple[str, list[dict]]:
    """(all text, all figures) of an executed notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)
    figures = [output["data"]["application/vnd.plotly.v1+json"] for output in outputs
               if "application/vnd.plotly.v1+json" in output.get("data", {})]
    return text, figures


def test_the_notebook_shows_the_example_runs_by_itself(tmp_path):
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    text, figures = shown(executed(COMPARE, tmp_path))
    assert len(figures) == 8 and "Every run has finished (2)." in text and "sparsevlr" in text


def test_the_notebook_compares_a_folder_of_runs_and_writes_it(tmp_path, folder):
    command = [sys.executable, "-m", "papermill", str(COMPARE), "out.ipynb", "--no-progress-bar", "-p", "runs_dir", str(folder), "-p", "sort",
               "-verified", "-p", "csv", "table/runs.csv", "-y", "{where: {model: [mlp, cnn4], method: [rigl, static, dense]}}"]
    plain = os.environ | {"BROWSER_PATH": "none"}  # matplotlib draws the pictures: a browser costs seconds
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text, figures = shown(nbformat.read(tmp_path / "out.ipynb", 4))
    assert len(figures) == 8 and "1 of 8 runs is in no figure: killed" in text and "8 rows are in table/runs.csv." in text
    lines = list(csv.DictReader((tmp_path / "table" / "runs.csv").read_text().splitlines()))
    verified = [float(line["verified"]) for line in lines if line["verified"]]
    assert len(lines) == 8 and len(verified) == 7 and verified == sorted(verified, reverse=True)
    assert (tmp_path / "out.ipynb").stat().st_size < 1e6


def test_the_notebook_says_that_a_folder_is_empty(tmp_path):
    (tmp_path / "runs").mkdir()
    text, figures = shown(executed(COMPARE, tmp_path, runs_dir="runs"))
    assert figures == [] and "There is no run here." in text and "nothing to draw" in text


def test_every_parameter_of_the_notebook_is_described():
    parameters = papermill.inspect_notebook(str(COMPARE))
    assert set(parameters) == {"runs_dir", "where", "sort", "csv", "side_by_side", "panels", "reference"}
    assert all(len(parameter["help"]) > 20 for parameter in parameters.values())
