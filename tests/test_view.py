"""Figures show what happened: their data against masks, histories, rows and summaries, on random cases."""
import base64
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from html import unescape
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("plotly", reason="figures need the extra lab")
import plotly.graph_objects as go

from sparselab.learn import Given
from sparselab.learn.recordings import STATES
from sparselab.png import data_uri, fewer_colours, indexed_png
from sparselab.sparse.cursor import Cursor
from sparselab.sparse.history import MaskHistory
from sparselab.view import (
    accuracy_bars,
    layers_panel,
    mask_panel,
    masks_panel,
    metrics_panel,
    results_table,
    show,
    stability_panel,
    titled,
    updates_panel,
)
from sparselab.view.figures import drawing, panels, theme
from sparselab.view.figures.pixels import EMPTY, OFF, PALETTES, mask_raster, tiles
from sparselab.view.runs.results import RESULTS

SHAPES = {"conv1.weight": (6, 1, 3, 3), "point.weight": (5, 6, 1, 1), "fc1.weight": (9, 37), "fc2.weight": (3, 9)}


def chunks(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {}
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at:at + 8])
        body = png[at + 8:at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + body)
        found[kind] = found.get(kind, b"") + body
        at += size + 12
    return found


def decode(source):
    """Palette indices of an indexed PNG (bytes or data URI), read bit by bit."""
    found = chunks(base64.b64decode(source.split(",")[1]) if isinstance(source, str) else source)
    width, height, depth, kind = struct.unpack(">IIBB", found[b"IHDR"][:10])
    assert kind == 3 and set(found) == {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
    rows = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    bits = np.unpackbits(rows[:, 1:], axis=1)[:, :width * depth].reshape(height, width, depth)
    return bits @ (1 << np.arange(depth)[::-1])


def random_history(shapes=SHAPES, updates=7, seed=0, density=0.3):
    """Masks that change at random: also in number, with layers that stay and weights that come back."""
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
    history, all_masks = MaskHistory(masks), [dict(masks)]
    for i in range(updates):
        for j, (name, mask) in enumerate(masks.items()):
            if (i + j) % 3:
                masks[name] = mask ^ (torch.rand(mask.shape, generator=generator) < 0.15)
        history.record(10 * (i + 1), masks)
        all_masks.append(dict(masks))
    return history, all_masks


def updated(before, now):
    """A cursor at the update that made `now` of `before`, bool arrays."""
    history = MaskHistory({"w": torch.from_numpy(before)})
    history.record(1, {"w": torch.from_numpy(now)})
    return Cursor(history, "w").seek(1)


def of(history):
    return Given(history=history)


# --- png and raster ---------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 256), st.integers(1, 21), st.integers(1, 9), st.integers(0, 2 ** 32 - 1))
def test_indexed_png_round_trip(colours, width, height, seed):
    image = np.random.default_rng(seed).integers(0, colours, (height, width))
    palette = [(i, 255 - i, i // 2, 255 - i // 3) for i in range(colours)]
    png = indexed_png(image, palette)
    assert (decode(png) == image).all() and (decode(data_uri(png)) == image).all()
    found = chunks(png)
    assert [tuple(c) for c in np.frombuffer(found[b"PLTE"], np.uint8).reshape(-1, 3)] == [c[:3] for c in palette]
    assert list(found[b"tRNS"]) == [c[3] for c in palette]


def test_a_png_that_is_not_of_chrome_stays_as_it_is():
    png = indexed_png(np.zeros((3, 3), int), [(1, 2, 3, 255)])
    assert fewer_colours(png) == png


def naive(now, before, at):
    """The picture of masks, one kernel and one block at a time."""
    if not at.summarised:
        codes = np.select([now & before, now & ~before, before & ~now], [5, 9, 13], OFF)
        kernels = codes.reshape(*codes.shape[:2], *at.kernel)
        rows = [np.concatenate([np.pad(kernel, ((0, at.gap), (0, at.gap)), constant_values=EMPTY) for kernel in row], 1) for row in kernels]
        return np.concatenate(rows)[:at.size[0], :at.size[1]]
    now, before = (mask.reshape(len(mask), -1) for mask in (now, before))
    image = np.full((-(-now.shape[0] // at.block[0]), -(-now.shape[1] // at.block[1])), OFF)
    for i, j in np.ndindex(image.shape):
        n, b = (m[i * at.block[0]:(i + 1) * at.block[0], j * at.block[1]:(j + 1) * at.block[1]] for m in (now, before))
        counts = [(n & ~b).sum(), (b & ~n).sum(), (n & b).sum()]  # grown, dropped, kept: the first wins a tie
        if sum(counts):
            image[i, j] = 4 * (2, 3, 1)[int(np.argmax(counts))] - 3 + -(-4 * sum(counts) // n.size)
    return image


def at_once(now, before, at):
    """`naive` for a large layer: every block as a row of its weights, those beyond the edge counted out."""
    if not at.summarised:
        return naive(now, before, at)
    now, before = (mask.reshape(len(mask), -1) for mask in (now, before))
    (h, w), (rows, columns) = at.block, at.size

    def blocks(mask):
        padded = np.pad(mask, ((0, rows * h - mask.shape[0]), (0, columns * w - mask.shape[1])))
        return padded.reshape(rows, h, columns, w).transpose(0, 2, 1, 3).reshape(rows, columns, h * w).sum(-1)

    counts = np.stack([blocks(now & ~before), blocks(before & ~now), blocks(now & before)])
    strength, event = -(-4 * counts.sum(0) // blocks(np.ones_like(now))), np.array((2, 3, 1))[counts.argmax(0)]
    return np.where(counts.any(0), 4 * event - 3 + strength, OFF)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 11), st.integers(1, 13), st.sampled_from([(), (1, 1), (3,), (2, 3)]), st.integers(1, 300),
       st.integers(1, 12), st.sampled_from([0.02, 0.3, 1.0]), st.integers(0, 2 ** 32 - 1))
def test_pixels_are_the_masks_block_by_block(outputs, inputs, kernel, most, side, density, seed):
    random = np.random.default_rng(seed)
    now, before = random.random((2, outputs, inputs, *kernel)) < density
    at = tiles(now.shape, most, side)
    image = mask_raster(updated(before, now), at=at).codes
    assert at.weights.sum() == now.size and (not at.summarised or max(image.shape) <= side)
    assert image.shape == at.size and image.max() < len(PALETTES["event"])
    assert (image == naive(now, before, at)).all() and (image == at_once(now, before, at)).all()


def test_long_rows_of_kernels_are_one_pixel_a_kernel_or_several_kernels():
    assert tiles((4, 10, 3), 100, 35).block == (1, 1)
    assert tiles((4, 10, 3), 100, 29).size == (4, 10) and tiles((4, 10, 3), 100, 9).block == (1, 6)


@pytest.mark.parametrize("shape", [(10, 7), (10, 7, 3, 3), (300, 900), (300, 900, 3, 3), (7, 900, 1, 1), (4, 90, 5, 5), (1200, 1100), (3, 5, 4)])
def test_axes_count_output_and_input_units(shape):
    at = tiles(shape)
    axes, half = at.axes, 0.5 + 1e-9
    for first, step, size, units in [("x0", "dx", at.size[1], shape[1]), ("y0", "dy", at.size[0], shape[0])]:
        left, right = axes[first] - axes[step] / 2, axes[first] + axes[step] * (size - 0.5)
        assert -half <= left and right >= units - 0.5 - axes[step] - 1e-9  # the pixels cover the units
        assert right < units - 0.5 + axes[step]
    if at.gap:  # the middle of a kernel is a whole number
        for first, step, length in (("x0", "dx", at.kernel[1]), ("y0", "dy", at.kernel[0])):
            assert axes[first] + axes[step] * ((length - 1) / 2 + 3 * (length + 1)) == pytest.approx(3)


LAYERS = {"linear": lambda: torch.nn.Linear(37, 9), "wide linear": lambda: torch.nn.Linear(1025, 2049),
          "long linear": lambda: torch.nn.Linear(70_001, 15), "conv1d": lambda: torch.nn.Conv1d(5, 7, 3),
          "conv2d": lambda: torch.nn.Conv2d(3, 6, (2, 3)), "point": lambda: torch.nn.Conv2d(8, 4, 1),
          "grouped": lambda: torch.nn.Conv2d(6, 8, 3, groups=2), "depthwise": lambda: torch.nn.Conv2d(6, 6, 3, groups=6),
          "wide conv2d": lambda: torch.nn.Conv2d(333, 401, 3), "wide conv1d": lambda: torch.nn.Conv1d(1201, 301, 3)}


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("kind", LAYERS)
def test_report_and_explorer_draw_the_same_pixels(kind, density):
    """Every layer kind: the report's last picture, its slider and the explorer's canvas, pixel by pixel, and each against the masks."""
    pytest.importorskip("ipywidgets", reason="the explorer needs the extra lab")
    from sparselab.view.explorer.mask_block import MaskBlock

    shape = tuple(LAYERS[kind]().weight.shape)
    masks = np.random.default_rng(0).random((2, *shape)) < density
    source = of(updated(*masks).history)
    block = MaskBlock(source, selected=print, pressed=print)
    slider = masks_panel(source).figure
    for step, before, now in ((0, masks[0], masks[0]), (1, *masks)):
        block.show(step)
        canvas = np.frombuffer(block.content.get_state("codes")["codes"], np.uint8).reshape(block.content.shape)
        drawn = decode(mask_panel(source, step).figure.data[0].source)
        assert (drawn == canvas).all() and (decode(slider.frames[step].data[0].source) == canvas).all()
        assert (canvas == at_once(now, before, tiles(shape))).all()
        if density == 1:
            assert set(np.unique(canvas)) <= {EMPTY, 5}, "a dense layer is as strong at its edges as inside"


# --- masks ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SHAPES)
def test_every_frame_of_an_evolution_is_the_masks(name):
    history, masks = random_history()
    fig = masks_panel(of(history), layer=name).figure
    assert len(fig.frames) == len(masks) == len(fig.layout.sliders[0].steps)
    assert fig.data[0].source == fig.frames[fig.layout.sliders[0].active].data[0].source
    for i, frame in enumerate(fig.frames):
        now, before = masks[i][name].numpy(), masks[max(0, i - 1)][name].numpy()
        assert (decode(frame.data[0].source) == naive(now, before, tiles(SHAPES[name]))).all()
        assert fig.layout.sliders[0].steps[i].args[0] == (frame.name,) and frame.traces == (0,)
        counts = now.sum(), now.size, (now & ~before).sum(), (before & ~now).sum()
        assert frame.name == f"step {10 * i}: {counts[0]} of {counts[1]} weights, {counts[2]} grown and {counts[3]} dropped here"


def test_too_many_updates_are_thinned_and_said():
    history, masks = random_history(updates=50)
    fig = masks_panel(of(history), layer="fc1.weight", most=7).figure
    steps = [int(frame.name.split(":")[0].split()[1]) for frame in fig.frames]
    assert len(steps) == 7 and steps[0] == 0 and steps[-1] == 500 and "7 of 51 masks" in fig.layout.meta["note"]
    at = steps[3] // 10  # events compare with the update just before, which is not shown
    grown = (masks[at]["fc1.weight"] & ~masks[at - 1]["fc1.weight"]).sum()
    assert f"{grown} grown" in fig.frames[3].name and (decode(fig.frames[3].data[0].source) == 9).sum() == grown


def test_pictures_stay_within_their_bytes():
    history, _ = random_history({"big.weight": (300, 1000)}, updates=12)
    free, tight = (masks_panel(of(history), max_bytes=size).figure for size in (10 ** 9, 400_000))
    assert len(free.frames) == 13 and sum(len(f.data[0].source) for f in free.frames) > 440_000
    assert 2 <= len(tight.frames) < 13 and sum(len(f.data[0].source) for f in tight.frames) < 440_000
    assert f"{len(tight.frames)} of 13" in tight.layout.meta["note"]


def test_one_image_is_that_record():
    history, masks = random_history()
    for step, record in ((0, 0), (9, 0), (30, 3), (39.5, 3), (None, -1), (70, -1)):
        image = decode(mask_panel(of(history), step, "fc1.weight").figure.data[0].source)
        now = masks[record]["fc1.weight"].numpy()
        before = now if record == 0 else masks[record - 1]["fc1.weight"].numpy()
        assert (image == naive(now, before, tiles((9, 37)))).all()


def test_a_static_history_has_figures_without_slider():
    history = MaskHistory({"fc.weight": torch.eye(4).bool()})
    fig = masks_panel(of(history)).figure
    assert not fig.layout.sliders and (decode(fig.data[0].source) == np.where(np.eye(4), 5, OFF)).all()
    updates = updates_panel(of(history)).figure
    assert "no update has changed the masks" in updates.layout.meta["note"]
    assert [list(trace.y) for trace in updates.data[3:]] == [[1], [1], [0.25]]


@pytest.mark.parametrize("draw", [mask_panel, masks_panel, updates_panel])
def test_unknown_layers_are_answered_with_the_nearest(draw):
    with pytest.raises(ValueError, match="'fc1.wieght'.*Did you mean 'fc1.weight'"):
        draw(of(random_history()[0]), layer="fc1.wieght")


@pytest.mark.parametrize("draw", [updates_panel, layers_panel, mask_panel, masks_panel])
def test_a_history_without_layers_is_refused_in_words(draw):
    with pytest.raises(ValueError, match="no layers.*dense"):
        draw(of(MaskHistory({})))


def test_layers_are_the_history_counted():
    from sparselab.sparse import layer_budgets

    history, masks = random_history()
    for step, record in ((0, 0), (35, 3), (None, -1)):
        drawn = {trace.name: list(trace.x) for trace in layers_panel(of(history), step).figure.data}
        assert drawn["kept weights"] == (kept := [int(mask.sum()) for mask in masks[record].values()])
        assert drawn["all weights"] == (total := [mask.numel() for mask in masks[record].values()])
        assert drawn["density"] == [float(mask.float().mean(dtype=torch.float64)) for mask in masks[record].values()]
        erk = layer_budgets(SHAPES, 1 - sum(kept) / sum(total), "erk")
        assert drawn["ERK"] == [erk[name] / count for name, count in zip(SHAPES, total, strict=True)]


# --- updates ----------------------------------------------------------------------------------------------------------

def as_sets(masks, names):
    return [{(name, i) for name in names for i in m[name].flatten().nonzero().flatten().tolist()} for m in masks]


def test_parts_of_a_sequential_are_called_layers():
    history, _ = random_history({"0.weight": (6, 8), "2.1.weight": (9, 6), "head.weight": (3, 9)})
    assert [theme.short(name) for name in history.names] == ["layer 0", "layer 2.1", "head"]
    assert mask_panel(of(history), layer="0.weight").figure.layout.title.text.startswith("Mask of layer 0 by event<")
    shares = {"active": 0.5, "unstable": 0.5, "inactive": 0.0, "dead": 0.0}
    fig = stability_panel(Given(stability=[{"step": 0, "epoch": 0, "layers": {"0": shares, "relu1": shares}}])).figure
    assert {"layer 0", "relu1"} <= {note.text for note in fig.layout.annotations}


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.03, 0.0004])
def test_the_density_axis_has_two_ticks_and_holds_every_layer(density):
    fig = layers_panel(of(MaskHistory({"a": (torch.arange(10_000) < round(density * 10_000)).view(100, 100), "b": torch.ones(10, 10).bool()}))).figure
    low, high = fig.layout.xaxis.range
    assert low < np.log10(density) < high and np.floor(high) - np.ceil(low) >= 1


@pytest.mark.parametrize("seed", range(5))
def test_flow_and_overlap_against_sets(seed):
    history, masks = random_history(seed=seed, updates=9)
    fig = updates_panel(of(history)).figure
    for panel, name in enumerate(SHAPES, 1):  # the first is their sum
        sets = as_sets(masks, [name])
        new, again, dropped = (np.array(trace.y) for trace in fig.data[3 * panel:3 * panel + 3])
        for i, (before, now) in enumerate(zip(sets, sets[1:], strict=False)):
            tried = set().union(*sets[:i + 1])
            assert (new[i], again[i], -dropped[i]) == (len(now - tried), len(now - before & tried), len(before - now))
        rows = [row for row in history.flow() if row["name"] == name]
        assert (new + again).tolist() == [row["grown"] for row in rows]
        assert (-dropped).tolist() == [row["dropped"] for row in rows]
        assert (new + again + dropped).sum() == len(sets[-1]) - len(sets[0])
    sets, total = as_sets(masks, SHAPES), sum(np.prod(shape) for shape in SHAPES.values())
    drawn = {trace.name: list(trace.y) for trace in fig.data[3 * 5:]}
    assert drawn["overlap with the first"] == pytest.approx([len(s & sets[0]) / len(s | sets[0]) for s in sets])
    pairs = zip([sets[0], *sets], sets, strict=False)
    assert drawn["overlap with the previous"] == pytest.approx([len(a & b) / len(a | b) for a, b in pairs])
    assert drawn["ever active"] == pytest.approx([len(set().union(*sets[:i + 1])) / total for i in range(len(sets))])


def test_many_layers_show_the_busiest_below_the_sum():
    shapes = {f"l{i}.weight": (4, 4 + 4 * (i % 5)) for i in range(9)}
    history, _ = random_history(shapes)
    fig = updates_panel(of(history)).figure
    titles = [note.text for note in fig.layout.annotations if note.text.startswith(("all", "l"))]
    assert titles[0] == "all 9 layers" and len(titles) == 7 and "busiest" in fig.layout.meta["title"]
    moved = {name: sum(r["grown"] + r["dropped"] for r in history.flow() if r["name"] == name) for name in shapes}
    left_out = [moved[name] for name in shapes if name.removesuffix(".weight") not in titles]
    assert max(left_out) <= min(moved[f"{title}.weight"] for title in titles[1:])
    unseen = [name for name in (key.removesuffix(".weight") for key in shapes) if name not in titles]
    assert len(unseen) == 3 and fig.layout.meta["note"].endswith(f"own, as less changed: {', '.join(unseen)}")
    assert "without bars" not in updates_panel(of(history), most=9).figure.layout.meta["note"]
    deep = updates_panel(of(history), most=1).figure.layout.meta["note"]
    assert deep.endswith(", 2 others")
    assert (np.array(fig.data[0].y) + fig.data[1].y).sum() == sum(r["grown"] for r in history.flow())


# --- training, stability, results -------------------------------------------------------------------------------------

def test_curves_skip_what_rows_lack_and_sort_by_step():
    rows = [{"step": 30, "loss": 1.0, "clean": 0.5, "train_eps": 0.1},
            {"step": 10, "loss": 3.0, "verified": 0.25, "clean": None},
            {"step": 20, "nnz": 7, "sparsity": 0.5, "train_eps": 0.0}]
    drawn = {trace.name: (list(trace.x), list(trace.y)) for trace in metrics_panel(Given(metrics=rows)).figure.data}
    assert drawn == {"loss": ([10, 30], [3.0, 1.0]), "clean": ([30], [0.5]), "verified": ([10], [0.25]),
                     "train_eps": ([20, 30], [0.0, 0.1]), "nnz": ([20], [7])}


@pytest.mark.parametrize("present", [c for n in range(1, 5) for c in combinations(("loss", "clean", "nnz", "train_eps"), n)])
def test_curves_of_any_choice_of_columns_and_one_row(present):
    row = {"step": 1, **dict.fromkeys(present, 0.5)}
    if present == ("train_eps",):
        with pytest.raises(ValueError, match="nothing to draw in 1 rows"):
            metrics_panel(Given(metrics=[row]))
        return
    panels = len({"loss", "clean", "nnz"} & set(present))
    fig = metrics_panel(Given(metrics=[row])).figure
    assert len([axis for axis in fig.layout if axis.startswith("xaxis")]) == panels
    assert {t.name for t in fig.data} == set(present) - ({"train_eps"} if "clean" not in present else set())


@pytest.mark.parametrize("eps", [None, 0.0, 0.1])
def test_every_quantity_has_its_own_panel(eps):
    rows = [{"step": i, "loss": 1.0, "clean": 0.5, "verified": 0.5, "nnz": 9, "train_eps": eps} for i in range(3)]
    fig = metrics_panel(Given(metrics=rows)).figure
    axes = {trace.name: fig.layout["yaxis" + trace.yaxis[1:]] for trace in fig.data}
    domain = {name: (fig.layout["yaxis" + axis.overlaying[1:]] if axis.overlaying else axis).domain
              for name, axis in axes.items()}
    assert ("train_eps" in axes) == bool(eps) and domain["clean"] == domain["verified"] == domain.get("train_eps", domain["clean"])
    assert domain["nnz"][1] < domain["clean"][0] < domain["clean"][1] < domain["loss"][0]
    if eps:  # an axis that lies over another needs traces below it
        assert axes["clean"].overlaying == next(trace.yaxis for trace in fig.data if trace.name == "train_eps")
    else:
        assert not axes["clean"].overlaying


def test_curves_survive_a_diverged_run_and_refuse_an_empty_one():
    fig = metrics_panel(Given(metrics=[{"step": 1, "loss": 2.0, "clean": 0.1, "train_eps": 0.0}, {"step": 2, "loss": float("nan")}])).figure
    assert np.isnan(fig.data[0].y[1]) and json.loads(fig.to_json())
    with pytest.raises(ValueError, match="^No epoch has ended yet"):
        metrics_panel(Given(metrics=[]))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 4, 10]), st.integers(1, 6), st.integers(0, 2 ** 32 - 1))
def test_stability_bars_fill_every_layer_at_every_row(layers, rows, seed):
    random = np.random.default_rng(seed)

    def measured():
        active, unstable, inactive = random.dirichlet([1, 1, 1])
        return {"active": active, "unstable": unstable, "inactive": inactive, "dead": inactive * random.random()}

    table = [{"step": 5 * i, "epoch": i, "layers": {f"l{j}": measured() for j in range(layers) if i + j != 1}}
             for i in range(rows)]
    shown = [name for name in dict.fromkeys(n for row in table for n in row["layers"])][:9]
    if not shown:
        return
    fig = stability_panel(Given(stability=table[::-1])).figure  # rows in any order
    assert len(fig.data) == 4 * len(shown)
    for at, name in enumerate(shown):
        bars = {trace.name: np.array(trace.y) for trace in fig.data[4 * at:4 * at + 4]}
        have = [row for row in table if name in row["layers"]]
        assert list(fig.data[4 * at].x) == [row["epoch"] for row in have] and tuple(bars) == STATES
        assert np.allclose(sum(bars.values()), 1) and min(map(min, bars.values())) >= 0
        for state in ("active", "unstable", "dead"):
            assert np.allclose(bars[state], [row["layers"][name][state] for row in have])
    assert ("layers shown" in fig.layout.meta["note"]) == (len({n for r in table for n in r["layers"]}) > 9)


@pytest.mark.parametrize("layer", [{"active": 0.5, "unstable": 0.5, "inactive": 0.5, "dead": 0},
                                   {"active": 0.5, "unstable": 0.25, "inactive": 0.25, "dead": 0.5}])
def test_stability_that_is_no_share_names_layer_and_step(layer):
    with pytest.raises(ValueError, match="layer fc1 at step 7"):
        stability_panel(Given(stability=[{"step": 7, "layers": {"fc1": layer}}]))


def test_stability_names_are_checked():
    rows = [{"step": 7, "layers": {"relu1": {"active": 0.5, "unstable": 0.25, "inactive": 0.25, "dead": 0}}}]
    assert len(stability_panel(Given(stability=rows), layers=("relu1",)).figure.data) == 4
    with pytest.raises(ValueError, match="'relu2'.*'relu1'"):
        stability_panel(Given(stability=rows), layers=("relu2",))


def summary(clean, pgd, verified, **more):
    return {"accuracy": {"clean": clean, "pgd": pgd, "verified": verified}, **more}


def test_bars_are_means_and_spreads_of_the_summaries():
    runs = {"dense": [summary(0.9, 0.8, 0.7), summary(0.8, 0.7, 0.5)], "one": summary(0.5, 0.4, 0.25),
            "no pgd": [summary(0.5, None, 0.125)]}
    clean, pgd, verified = accuracy_bars(runs, dense="dense").data
    assert list(clean.x) == ["dense", "one", "no pgd"]
    assert clean.y[:2] == pytest.approx((0.85, 0.5)) and pgd.y[2] is None and verified.y[2] == 0.125
    assert verified.error_y.array[0] == pytest.approx(np.std([0.7, 0.5], ddof=1)) and verified.error_y.array[1] == 0
    assert verified.text[0] == "60.0%" and verified.text[1] == "25.0%<br>-35.0" and pgd.text[2] == ""
    assert not accuracy_bars({"a": summary(1, 1, 1)}).data[0].error_y.visible
    with pytest.raises(ValueError, match="'dence'.*'dense'"):
        accuracy_bars(runs, dense="dence")


@pytest.mark.parametrize("count, angle", [(2, 0), (4, 0), (5, -90), (9, -90)])
def test_the_text_of_narrow_bars_is_turned(count, angle):
    fig = accuracy_bars({str(i): summary(0.9, 0.8, 0.7 - i / 100) for i in range(count)}, dense="0")
    assert {bar.textangle for bar in fig.data} == {angle}
    assert fig.data[2].text[0] == "70.0%" and re.fullmatch(r"69\.0%\D+-1\.0", fig.data[2].text[1])


@pytest.mark.parametrize("nothing", [{}, {"a": []}, {"a": {"nnz": 3}}, {"a": [summary(1, 1, 1), {}]}])
def test_results_without_accuracy_are_refused_in_words(nothing):
    for draw in (accuracy_bars, results_table):
        with pytest.raises(ValueError, match="summary.json"):
            draw(nothing)


def test_the_table_holds_the_numbers_and_escapes_names():
    one = summary(0.911, 0.85, 0.84, verified_by={"ibp": 0.83, "crown": 0.01}, nnz=1662, total=166248, sparsity=0.99,
                  seconds=61.4, config={"method": "sparsevlr"})
    assert results_table(one).rows == [["sparsevlr", "91.10%", "85.00%", "84.00%", "ibp 83.00%, crown 1.00%", "1,662",
                                        "166,248", "99.00%", "-", "-", "61"]]
    counted = one | {"flops": {"training": 30, "training_dense": 400, "inference": 1, "inference_dense": 8}}
    assert results_table(counted).rows[0][8:10] == ["7.50%", "12.50%"]
    other = one | summary(0.891, 0.85, 0.8, verified_by={"ibp": 0.81, "crown": 0.03})
    table = results_table({"<b>|both": [one, other], "one": one})
    assert table.rows[0][:4] == ["<b>|both", "90.10% ± 1.41%", "85.00%", "82.00% ± 2.83%"]
    assert "&lt;b&gt;|both" in table._repr_html_() and "<b>" not in table._repr_html_()
    lines = table._repr_markdown_().splitlines()
    assert len(lines) == 4 and {line.replace("\\|", "").count("|") for line in lines} == {len(RESULTS) + 1}
    assert results_table(summary(1, 1, 1, verified_by={"ibp": 1, "crown": 0})).rows[0][4] == "ibp 1, crown 0"


# --- theme ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def no_browser(monkeypatch):
    monkeypatch.setattr(panels, "_photograph", lambda fig, width, timeout: None)


def test_every_figure_wears_the_theme(no_browser):
    history, _ = random_history()
    source = Given(history=history, metrics=[{"step": 1, "loss": 1.0}])
    drawn = [panel(source).figure for panel in (updates_panel, masks_panel, mask_panel, layers_panel, metrics_panel)]
    for fig in (*drawn, accuracy_bars({"a": summary(1, 1, 1)})):
        assert fig.layout.template.layout.paper_bgcolor == theme.CLEAR and fig.layout.width is None
        bundle = panels.mimebundle(fig)
        assert bundle["text/plain"] == f"Figure: {fig.layout.meta['title']}"
        png = base64.b64decode(bundle.pop("image/png"))
        assert struct.unpack(">II", png[16:24]) == (900, fig.layout.height) and len(png) < 40_000
        assert len(json.dumps(bundle)) < 40_000  # plotly's own template alone would be 7 kB of each figure


def colours_in(png):
    """Colour -> how many pixels of an indexed PNG have it."""
    palette = np.frombuffer(chunks(png)[b"PLTE"], np.uint8).reshape(-1, 3)
    return Counter("#" + bytes(palette[i]).hex().upper() for i in decode(png).ravel())


def test_a_picture_without_a_browser_shows_the_numbers(no_browser):
    rows = [{"step": i, "loss": 1 / (i + 1), "clean": i / 9} for i in range(9)]
    drawn = colours_in(panels.picture(metrics_panel(Given(metrics=rows)).figure))
    assert {theme.COLORS["loss"], theme.COLORS["clean"]} <= set(drawn) and theme.COLORS["pgd"] not in drawn
    taller = [colours_in(panels.picture(accuracy_bars({"a": summary(share, share / 2, 0.1)})))[theme.COLORS["clean"]] for share in (0.4, 0.8)]
    assert 1.9 < taller[1] / taller[0] < 2.1, "a bar twice as high has twice the pixels"
    history, _ = random_history()
    mask = panels.picture(mask_panel(of(history), layer="fc1.weight").figure)
    assert theme.COLORS["grown"] in colours_in(mask) and theme.COLORS["dropped"] in colours_in(mask)


def test_a_figure_of_which_less_than_all_can_be_drawn_has_no_picture(no_browser):
    fig = titled(go.Figure(go.Pie(values=[1, 2])), "shares")
    with pytest.warns(UserWarning, match="without a picture.*pie"):
        assert "image/png" not in panels.mimebundle(fig)


def test_the_flipbook_has_the_frames_of_the_figure(no_browser):
    history, _ = random_history()
    fig = masks_panel(of(history), layer="fc1.weight").figure
    book = panels.mimebundle(fig)["text/html"]
    frames = json.loads(unescape(book.split('data-frames="')[1].split('"')[0]))
    assert frames == [[frame.name, frame.data[0].source] for frame in fig.frames]
    assert f'src="{frames[-1][1]}"' in book and f'max="{len(frames) - 1}"' in book and "http" not in book
    assert "text/html" not in panels.mimebundle(updates_panel(of(history)).figure)


def test_show_does_nothing_in_tests_and_displays_otherwise(no_browser, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append((bundle, raw)))
    panel = metrics_panel(Given(metrics=[{"step": 1, "loss": 1.0}]))
    fig = panel.figure
    monkeypatch.setenv("IN_TEST", "1")
    show(fig)
    assert shown == []
    monkeypatch.delenv("IN_TEST")
    show(fig)
    show(fig, still=True)
    show(panel)
    (bundle, raw), (still, _), (same, _) = shown
    assert same == bundle
    assert raw and "application/vnd.plotly.v1+json" in bundle and set(still) == {"image/png", "text/plain"}


def test_a_browser_that_never_answers_is_given_up_once(monkeypatch):
    import asyncio

    class Stuck:
        calls = 0

        async def calc_fig(self, fig, opts):
            Stuck.calls += 1
            await asyncio.sleep(3600)

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    monkeypatch.setattr(panels, "_camera", lambda process: (loop, Stuck()))
    monkeypatch.setattr(panels, "_blind", set())
    fig = metrics_panel(Given(metrics=[{"step": 1, "loss": 1.0}])).figure
    with pytest.warns(UserWarning, match="failed.*matplotlib draws"):
        png = panels.picture(fig, timeout=0.2)
    assert png == panels.picture(fig) and png.startswith(b"\x89PNG") and Stuck.calls == 1
    loop.call_soon_threadsafe(loop.stop)


@pytest.mark.browser
def test_a_real_browser_draws_the_figure_small():
    pytest.importorskip("kaleido")
    code = ("import sys\nfrom sparselab import learn, view\n"
            "panel = view.metrics_panel(learn.Given(metrics=[{'step': i, 'loss': 1 / (i + 1), 'clean': i / 9} for i in range(9)]))\n"
            "sys.stdout.buffer.write(panel.png())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=240, env=os.environ)
    assert done.returncode == 0, done.stderr.decode()
    image = decode(done.stdout)
    palette = np.frombuffer(chunks(done.stdout)[b"PLTE"], np.uint8).reshape(-1, 3)
    colours = {"#" + bytes(palette[i]).hex().upper() for i in np.unique(image)}
    assert image.shape[1] == 900 and len(done.stdout) < 40_000
    assert {theme.COLORS["loss"], theme.COLORS["clean"]} <= colours  # both curves are there, in their exact colours


def drawn(monkeypatch, fig):
    """(page on which `fig` is drawn, its one panel)"""
    pages, notes = [], drawing._notes
    monkeypatch.setattr(drawing, "_notes", lambda page, margins: (pages.append(page), notes(page, margins)))
    drawing.draw(fig)
    page, = pages
    panel, = page.panels.values()
    return page, panel


def test_a_shape_on_a_logarithmic_axis_is_at_its_number_and_a_note_at_its_power(monkeypatch):
    fig = go.Figure(go.Scatter(x=[1, 2], y=[1, 1000])).update_yaxes(type="log").add_hline(y=5000).add_hline(y=0)
    page, panel = drawn(monkeypatch, fig.add_annotation(x=1, y=2, text="a hundred", showarrow=False))
    line, note = page.paper.artists[0], page.paper.texts[-1]
    y = [panel.transData.inverted().transform((0, at * page.paper.bbox.height))[1] for at in (line.get_ydata()[0], note.get_position()[1])]
    assert y == pytest.approx([5000, 100]) and panel.get_ylim()[1] == pytest.approx(5000)


def test_a_shape_is_on_the_first_axes_unless_it_says_so_and_nowhere_where_it_is_hidden(monkeypatch):
    fig = go.Figure(go.Scatter(x=[1, 2], y=[1, 2])).add_shape(type="line", x0=1, x1=5, y0=7, y1=7)
    page, panel = drawn(monkeypatch, fig.add_shape(type="rect", x0=0, x1=90, y0=0, y1=90, xref="x", yref="y", visible=False))
    assert (panel.get_xlim()[1], panel.get_ylim()[1]) == (5, 7) and len(page.paper.artists) == 1


def test_a_rectangle_is_as_clear_as_its_colour_says(monkeypatch):
    fig = go.Figure(go.Scatter(x=[1, 2], y=[1, 2])).add_shape(type="rect", x0=1, x1=2, y0=1, y1=2, xref="x", yref="y", fillcolor="rgba(0,0,255,0.2)")
    page, _ = drawn(monkeypatch, fig.add_shape(type="rect", x0=1, x1=2, y0=1, y1=2, xref="x", yref="y"))
    boxes = [box for box in page.paper.get_children() if type(box).__name__ == "Rectangle" and box is not page.paper.patch]
    assert [box.get_facecolor()[3] for box in boxes] == pytest.approx([0.2, 0])


def test_panels_below_a_legend_that_is_higher_than_the_figure_are_not_upside_down(monkeypatch):
    fig = titled(go.Figure([go.Scatter(y=[0, 1], name=f"a layer with a long name, {i}") for i in range(60)]), "A title", "and a note", height=300)
    _, panel = drawn(monkeypatch, fig)
    assert panel.get_window_extent().height > 20 and panel.transData.transform((0, 1))[1] > panel.transData.transform((0, 0))[1]


@pytest.mark.parametrize("names", [2, 20])
def test_the_panels_begin_below_the_last_row_of_the_legend(monkeypatch, names):
    fig = titled(go.Figure([go.Scatter(y=[0, 1], name=f"a layer with a long name, {i}") for i in range(names)]), "A title", "and a note")
    page, panel = drawn(monkeypatch, fig)
    legend, = page.paper.legends
    assert legend.get_window_extent().y0 >= panel.get_window_extent().y1 + drawing.TITLES - 1


@pytest.mark.browser
def test_the_slider_of_a_saved_notebook_works_as_html_without_network(tmp_path, no_browser):
    sync_api = pytest.importorskip("playwright.sync_api")
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    fig = masks_panel(of(random_history()[0]), layer="conv1.weight").figure
    output = nbformat.v4.new_output("display_data", data=panels.mimebundle(fig))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show(fig)", outputs=[output])])
    page_file = tmp_path / "saved.html"
    page_file.write_text(nbconvert.HTMLExporter().from_notebook_node(notebook)[0])
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.context.set_offline(True)
        page.goto(page_file.as_uri())
        slider, seen = page.locator("input[type=range]"), []
        slider.focus()
        for _ in fig.frames:
            seen.append((page.locator("output").text_content(), page.locator("img").get_attribute("src")))
            page.keyboard.press("ArrowLeft")
        browser.close()
    assert seen == [(frame.name, frame.data[0].source) for frame in reversed(fig.frames)]


def test_figures_are_plain_figures():
    history, _ = random_history()
    assert type(masks_panel(of(history)).figure) is go.Figure  # a FigureWidget would save 5 MB of JavaScript


def test_explorer_and_live_are_imported_only_when_used_and_live_needs_no_widgets():
    code = ("import sys, sparselab.view; from sparselab.learn import Live; assert not {'ipywidgets', 'plotly'} & set(sys.modules); "
            "from sparselab.view import Explorer; print(Explorer.__module__, Live.__module__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sparselab.view.explorer.explorer", "sparselab.learn.live"]


def test_every_panel_of_the_explorer_saves_a_page_and_a_table(monkeypatch):
    pytest.importorskip("ipywidgets", reason="the explorer needs the extra lab")
    from pathlib import Path

    from sparselab.view import PANELS, Explorer
    from sparselab.view.explorer.plot import Plot

    saved = {}
    monkeypatch.setattr(Plot, "save", lambda self, name, data, media: saved.update({name: (data.decode(), media)}))
    explorer = Explorer(Path(__file__).parents[1] / "nbs" / "example" / "sparsevlr")
    explorer.go(130)
    explorer._settle()
    blocks = explorer.sides[0].blocks
    assert [block.title for block in blocks] == list(PANELS)
    for block in blocks:
        for button in block.buttons.children:
            if button.description in ("HTML", "CSV"):
                button.value = True
    assert sorted(saved) == sorted(f"{block.name}.{kind}" for block in blocks for kind in ("html", "csv"))
    assert all("Plotly.newPlot" in text and media == "text/html" for name, (text, media) in saved.items() if name.endswith("html"))
    assert all(text.count("\n") > 5 and media == "text/csv" for name, (text, media) in saved.items() if name.endswith("csv"))
