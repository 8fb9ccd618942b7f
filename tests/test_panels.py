"""Panels and recordings: what they draw against masks, models and bounds; whatever is missing or damaged is a sentence."""
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_view import decode

pytest.importorskip("plotly", reason="figures need the extra lab")
from sparselab.learn import Given, Live, growth_scores
from sparselab.learn.arrays import Unavailable
from sparselab.learn.assembly import make_learner
from sparselab.learn.config import Config
from sparselab.learn.data import load
from sparselab.learn.margins import margins_of
from sparselab.learn.models import build
from sparselab.learn.reading import record_at
from sparselab.learn.recordings import STATES, NeuronRecordings, NeuronSums
from sparselab.learn.runs import Run
from sparselab.robust.bounds import METHODS, input_box
from sparselab.robust.ibp import interval_pass
from sparselab.robust.verification import verify
from sparselab.sparse.cursor import Cursor
from sparselab.sparse.history import MaskHistory
from sparselab.view import (
    PANELS,
    Explorer,
    Report,
    difference_panel,
    filters_panel,
    layers_panel,
    margins_panel,
    mask_panel,
    masks_panel,
    metrics_panel,
    neuron_panel,
    neurons_panel,
    stability_panel,
    updates_panel,
)
from sparselab.view.figures.masks import erk_densities
from sparselab.view.figures.pixels import COLOURINGS, EMPTY, LEGENDS, PALETTES, mask_raster, tiles
from sparselab.view.figures.theme import COLORS

pytestmark = pytest.mark.usefixtures("all_radii")
EXAMPLE = Path(__file__).resolve().parents[1] / "nbs" / "example"
NAMES = ("sparsevlr", "rigl")


@pytest.fixture(scope="module")
def run():
    return Run(EXAMPLE / "sparsevlr")


@pytest.fixture(scope="module")
def model(run):
    model = build(run.config.model, (1, 8, 8), 10, **run.config.model_options)
    model.load_state_dict(run.weights)
    return model.eval()


def every_panel(run):
    layer = next(iter(run.neurons.layers))
    name = run.history.names[0]
    return [*(panel(run) for panel in PANELS.values()), *(panel(run, 200) for panel in PANELS.values()),
            metrics_panel(run, others=[Run(EXAMPLE / "rigl")]), *(mask_panel(run, layer=name, colour=colour) for colour in COLOURINGS),
            masks_panel(run), masks_panel(run, 200, name), updates_panel(run, layer=name), updates_panel(run, most=2),
            neurons_panel(run, sort="flips"), neuron_panel(run, layer=layer), neuron_panel(run, 200, layer, 5), stability_panel(run, layers=(layer,)),
            *(margins_panel(run, method=method) for method in run.margins.lb)]


# --- the bundled runs ---------------------------------------------------------------------------------------------------

def test_the_bundled_runs_are_small_whole_and_nobodys():
    files = [path for path in EXAMPLE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 600_000
    for name in NAMES:
        run = Run(EXAMPLE / name)
        assert run.finished and run.config.method == name and run.config.seed == 0
        assert run.config.runs_dir == run.summary["config"]["runs_dir"] == ".new"
        assert len(run.neurons.steps) == len(run.values.steps) == len(run.metrics) == run.config.epochs
        assert not run.neurons.skipped and len(run.margins.labels) == 100


@pytest.mark.parametrize("shape", [(6, 1, 4, 4), (32, 3, 3, 3), (3, 2, 5, 5), (48, 1, 8, 8)])
def test_pictures_of_units_fill_their_panel(shape):
    """In a column of the explorer, 500 pixels wide, a quarter of the figure or more is pictures; the rest is title, legend and lines between."""
    dense = np.ones(shape, bool)
    history = MaskHistory({"conv.weight": torch.from_numpy(dense)})
    fig = filters_panel(Given("dense", history=history)).figure
    high, wide = decode(fig.data[0].source).shape[:2]
    margin = fig.layout.margin
    scale = min((500 - margin.l - margin.r) / (wide + 1), (fig.layout.height - margin.t - margin.b) / (high + 1))
    assert (decode(fig.data[0].source) != EMPTY).sum() * scale**2 > 500 * fig.layout.height / 4


def test_every_panel_draws_says_how_to_read_it_and_can_be_called_again(run):
    for panel in every_panel(run):
        assert panel.figure.data and panel.how_to_read.endswith(".") and len(panel.how_to_read) > 40
        names = {}
        exec(panel.call.rsplit("\n", 1)[0], names)
        again = eval(panel.call.rsplit("\n", 1)[1], names)
        assert again.figure.to_json() == panel.figure.to_json(), panel.title
        assert panel.csv().startswith("unit,input,value\n" if panel.title == "Filters" else "trace,x,y,text\n")


def test_two_runs_are_compared_on_one_timeline(run):
    other = Run(EXAMPLE / "rigl")
    panel = metrics_panel(run, 200, others=[other])
    lines = {trace.name: trace for trace in panel.figure.data if trace.showlegend is False}
    named = [trace for trace in panel.figure.data if trace.showlegend is not False]  # by the legend: each measure once, in its colour
    assert [trace.name for trace in named] == ["loss", "train_eps", "clean", "pgd", "verified", "unstable", "nnz"]
    assert all(line.line.color == next(each.line.color for each in named if each.name == name.split()[1]) for name, line in lines.items())
    assert "sparsevlr (solid), step" in panel.figure.layout.meta["note"] and "rigl (dashed), step" in panel.figure.layout.meta["note"]
    assert list(lines["sparsevlr verified"].y) == [row["verified"] for row in run.metrics]
    assert list(lines["rigl verified"].y) == [row["verified"] for row in other.metrics]
    assert {(name.split()[0], line.line.dash) for name, line in lines.items()} == {("sparsevlr", "solid"), ("rigl", "dash")}
    drawn = {title: panel for title, panel, reason in Report(run, other, step=200)}
    assert list(drawn)[:3] == ["Metrics", "Mask of sparsevlr", "Mask of rigl"] and len(drawn) == 1 + 2 * (len(PANELS) - 1) and all(drawn.values())
    assert drawn["Mask of rigl"].figure.to_json() == mask_panel(other, 200).figure.to_json()
    with pytest.raises(ValueError, match="Did you mean"):
        mask_panel(other, 200, run.history.names[-1][:-1])


def test_runs_of_one_name_are_told_apart(run):
    names = {trace.name for trace in metrics_panel(run, others=[run]).figure.data}
    assert {"sparsevlr clean", "sparsevlr (2) clean"} <= names


def test_each_run_of_a_figure_has_its_own_line_and_too_many_are_said(run):
    lines = {trace.line.dash for trace in metrics_panel(run, others=[run] * 5).figure.data if trace.name.endswith(" clean")}
    assert lines == {"solid", "dash", "dot", "dashdot", "longdash", "longdashdot"}
    with pytest.raises(ValueError, match="6 kinds of lines, one for each run, and 7 runs were given"):
        metrics_panel(run, others=[run] * 6)


# --- sources ----------------------------------------------------------------------------------------------------------

def test_a_training_without_a_folder_is_a_source_too():
    """Its metrics, masks and weights are those of this moment; what only a folder has is a sentence."""
    config = Config(model="mlp", model_options={"widths": [24, 20]}, method="rigl", sparsity=0.8, eps=0.02, test_samples=20, epochs=2,
                    method_options={"update_every": 4}, device="cpu")
    learner = make_learner(config)
    live = Live(learner)
    with pytest.raises(Unavailable, match="has not started"):
        mask_panel(live)
    live.start()
    while live.alive:
        time.sleep(0.01)
    assert live.snapshot.status == "finished" and not live.finished and live.networks == {}
    assert live.moments == sorted({*live.history.steps, *(row["step"] for row in live.metrics)}) and len(live.metrics) == 2
    drawn = {title: (panel, reason) for title, panel, reason in Report(live)}
    assert {title for title, (panel, _) in drawn.items() if panel is None} == {"Neurons", "Margins", "Stability", "Filters"}
    assert "writes no run folder" in drawn["Margins"][1]
    name = live.history.names[0]
    cursor = Cursor(live.history, name).seek(-1)
    weight = dict(learner.model.named_parameters())[name].detach().numpy().ravel()
    assert np.array_equal(live.weights_at(cursor), weight[cursor.active])
    assert mask_panel(live, layer=name, colour="weight").figure.data[0].source


def test_a_run_is_read_again_when_it_has_changed_and_only_then(broken):
    history, neurons = broken.history, broken.neurons
    assert broken.history is history and broken.neurons is neurons and broken.metrics == broken.metrics
    rows = (broken.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (broken.path / "metrics.jsonl").write_bytes(b"".join(rows[:3]))
    assert len(broken.metrics) == 3 and broken.history is history
    (broken.path / "stability" / f"step-{neurons.steps[-1]:09d}.safetensors").unlink()
    assert broken.neurons.steps == neurons.steps[:-1] and max(broken.moments) == history.steps[-1]


def test_a_source_of_what_is_at_hand_says_what_it_lacks(run):
    source = Given(history=run.history)
    assert source.moments == run.history.steps and mask_panel(source).figure.data[0].source == mask_panel(run).figure.data[0].source
    with pytest.raises(Unavailable, match="no margins: it was made of history"):
        margins_panel(source)
    with pytest.raises(Unavailable, match="^The disk is gone.$"):
        metrics_panel(Given("The disk is gone."))
    with pytest.raises(ValueError, match="no part 'metric'"):
        Given(metric=[])


# --- recordings against the model -----------------------------------------------------------------------------------------

def test_recorded_values_are_the_weights_of_the_model(run):
    for name, values in run.values.read(run.values.steps[-1])[0].items():
        weight, mask = run.weights[name], run.history.mask(-1, name)
        assert np.array_equal(values, weight[mask].half().numpy()) and not weight[~mask].any()
        assert np.array_equal(run.weights_at(Cursor(run.history, name).seek(-1)), values.astype(np.float32))


def test_recorded_neurons_are_those_of_the_trained_model(run, model):
    valid = load("digits", validation=run.config.validation, seed=run.config.seed).valid
    (x, _), = valid.batches(len(valid), shuffle=False)
    with torch.no_grad():
        bounds = interval_pass(model, *input_box(x, run.config.eps)).preactivations
    for layer, (lb, ub) in bounds.items():
        lb, ub = lb.flatten(1), ub.flatten(1)
        off, on = (ub <= 0), (lb >= 0) & (ub > 0)
        for neuron, state in enumerate(run.neurons.over_time(layer)[-1]):
            count = [int(on[:, neuron].sum()), int(off[:, neuron].sum())]
            count.append(len(x) - sum(count))
            assert STATES[state] == ("dead" if count[1] == len(x) else STATES[count.index(max(count))])
        assert np.allclose(run.neurons.over_time(layer, "lb")[-1], lb.mean(0), rtol=2e-3, atol=1e-4)
        assert np.allclose(run.neurons.over_time(layer, "ub")[-1], ub.mean(0), rtol=2e-3, atol=1e-4)


def test_recorded_margins_prove_what_verify_proves(run, model):
    test = load("digits").test
    x, y = next(iter(test.take(slice(100)).batches(100, shuffle=False)))
    margins = run.margins
    assert np.array_equal(margins.labels, y) and np.array_equal(margins.predictions, model(x).argmax(1))
    assert (margins.images == (x * 255).round().byte().numpy()).all()
    assert np.abs(margins.attacks.astype(int) - margins.images).max() <= 255 * margins.eps + 1
    for at in (0, 5, 10, 20):
        for method in METHODS:
            proved = verify(model, x, y, float(margins.grid[at]), methods=(method,)).verified.numpy()
            lb = margins.method(method)[at]
            assert ((lb > 0) & (margins.predictions == margins.labels) == proved)[np.abs(lb) > 1e-5].all()
    assert (margins.attacked == margins.labels)[margins.at("crown", margins.eps) > 0].all()


def test_margins_fall_with_eps():
    torch.manual_seed(0)
    model = build("mlp", (1, 4, 4), 3, widths=[12])
    found = margins_of(model, torch.rand(7, 1, 4, 4), torch.arange(7) % 3, 0.1, radii=6)
    for method in METHODS:
        assert (np.diff(found.method(method), axis=0) < 1e-6).all()
    with pytest.raises(ValueError, match="Did you mean 'crown'"):
        found.method("crow")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10 ** 6), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_batches_of_neurons_add_up(seed, sizes):
    rng = torch.Generator().manual_seed(seed)
    mid, rad = torch.randn(sum(sizes), 5, generator=rng), torch.rand(sum(sizes), 5, generator=rng)
    parts, whole = NeuronSums(), NeuronSums()
    whole.add({"r": (mid - rad, mid + rad)})
    for m, r in zip(mid.split(sizes), rad.split(sizes), strict=True):
        parts.add({"r": (m - r, m + r)})
    for (name, a), b in zip(parts.arrays()[0].items(), whole.arrays()[0].values(), strict=True):
        assert np.allclose(a.astype(float), b.astype(float), rtol=2e-3, atol=2e-3), name


# --- flow, by brute force ---------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(1, 12))
def test_flow_against_sets(seed, updates):
    rng = np.random.default_rng(seed)
    masks = [{name: rng.random(shape) < 0.4 for name, shape in (("a", (3, 5)), ("b", (2, 2, 3, 3)))}]
    for _ in range(updates):
        masks.append({name: mask ^ (rng.random(mask.shape) < 0.2) for name, mask in masks[-1].items()})
    history = MaskHistory({name: torch.from_numpy(mask) for name, mask in masks[0].items()})
    for step, mask in enumerate(masks[1:], 1):
        history.record(step, {name: torch.from_numpy(m) for name, m in mask.items()})
    on = [{(name, i) for name, mask in m.items() for i in np.flatnonzero(mask)} for m in masks]
    traces = updates_panel(Given(history=history)).figure.data
    drawn = {trace.name: trace for trace in (*traces[:3], *traces[9:])}
    ever = set()
    for at, now in enumerate(on):
        before = on[max(at - 1, 0)]
        if at:
            assert drawn["grown"].y[at - 1] + drawn["regrown"].y[at - 1] == len(now - before)
            assert drawn["regrown"].y[at - 1] == len((now - before) & ever) and -drawn["dropped"].y[at - 1] == len(before - now)
        ever |= now
        for name, other in (("first", on[0]), ("previous", before)):
            together = len(now | other)
            assert not together or drawn[f"overlap with the {name}"].y[at] == pytest.approx(len(now & other) / together)
        assert drawn["ever active"].y[at] == pytest.approx(len(ever) / 51)
    if erk := erk_densities(history, -1):
        assert round(erk["a"] * 15) + round(erk["b"] * 36) == len(on[-1])


# --- codes ------------------------------------------------------------------------------------------------------------------

def test_large_layers_are_summarised_and_say_so():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1200, 900, generator=generator) < 0.01
    history = MaskHistory({"fc": mask})
    panel = mask_panel(Given(history=history))
    assert "summarised" in panel.figure.layout.title.text and "block of 2 x 1" in panel.figure.layout.title.text
    raster, at = mask_raster(Cursor(history, "fc")), tiles((1200, 900))
    assert raster.codes.size <= 1024 * 1024
    assert ((raster.codes > 1) == mask.view(600, 2, 900).any(1).numpy()).all()
    assert divmod(int(at.place(np.array(900 * 5 + 7))), at.size[1]) == (2, 7) and at.index(2, 7) == (4, 7)
    assert tiles((1000, 1000)).block == (1, 1)


def test_weights_and_scores_keep_sign_order_and_unknowns():
    history = MaskHistory({"fc": torch.tensor([[True, True, True, False, True]])})
    codes = mask_raster(Cursor(history, "fc"), "weight", np.array([-2.0, 0.1, 1.0, np.nan])).codes[0]
    assert codes[0] == 2 and 34 <= codes[1] < codes[2] < 66 and codes[3] == 1 and codes[4] == LEGENDS["weight"]["value not recorded"]
    score = mask_raster(Cursor(history, "fc"), "score", np.array([0.0, 0.5, 1.0, 0.25, np.nan])).codes[0]
    assert score[0] == 1 and score[4] == 1 and score[3] < score[1] < score[2] == LEGENDS["score"]["high"]
    with pytest.raises(ValueError, match="needs 4 values, not 3"):
        mask_raster(Cursor(history, "fc"), "weight", np.zeros(3))


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def colour_blind(rgb, kind):
    """Full protanopia or deuteranopia (Vienot, Brettel, Mollon 1999), on linear RGB."""
    linear = np.array([c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255])
    blind = {"protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
             "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]}[kind]
    return np.clip(np.array(blind) @ linear, 0, 1) ** (1 / 2.4)


def test_colours_stand_out_on_white_and_dark_and_are_told_apart_by_the_colour_blind():
    pairs = [("event", "kept", "grown now"), ("event", "grown now", "dropped now"), ("event", "kept", "dropped now"),
             ("age", "new", "old"), ("weight", "negative", "positive")]
    for page in ((255, 255, 255), (17, 17, 17)):
        for colour in COLOURINGS:
            for word, code in LEGENDS[colour].items():
                r, g, b, opacity = PALETTES[colour][code]
                if opacity == 255:
                    assert contrast((r, g, b), page) >= 3, (colour, word, page)
    for colour, first, second in pairs:
        a, b = (PALETTES[colour][LEGENDS[colour][word]][:3] for word in (first, second))
        for kind in ("protan", "deutan"):
            assert np.abs(colour_blind(a, kind) - colour_blind(b, kind)).max() > 0.15, (first, second, kind)
    states = [tuple(int(COLORS[s][i:i + 2], 16) for i in (1, 3, 5)) for s in STATES]
    for i, a in enumerate(states):
        for b in states[:i]:
            for kind in ("protan", "deutan"):
                assert np.abs(colour_blind(a, kind) - colour_blind(b, kind)).max() > 0.1


# --- what is missing is said -----------------------------------------------------------------------------------------------

@pytest.fixture
def broken(tmp_path):
    shutil.copytree(EXAMPLE / "sparsevlr", tmp_path / "run")
    return Run(tmp_path / "run")


def test_what_is_missing_is_a_sentence(broken):
    for part in ("stability", "weights", "masks"):
        shutil.rmtree(broken.path / part)
    for part in ("margins.safetensors", "metrics.jsonl"):
        (broken.path / part).unlink()
    asks = [lambda: neuron_panel(broken, layer="relu1"), lambda: broken.values, *(lambda draw=draw: draw(broken) for draw in
            (neurons_panel, margins_panel, metrics_panel, updates_panel, layers_panel, mask_panel, masks_panel))]
    for ask in asks:
        with pytest.raises(ValueError, match=r"(?s)^.*(No epoch has ended|when training has ended|has no|does not hold).*\.$"):
            ask()


@pytest.mark.parametrize("left", [0, 7, 300])
def test_files_that_were_cut_short_are_skipped_or_said(broken, left):
    newest = broken.path / "stability" / f"step-{broken.neurons.steps[-1]:09d}.safetensors"
    newest.write_bytes(newest.read_bytes()[:left])
    assert len(broken.neurons.skipped) == 1 and "1 recording cannot be read" in neurons_panel(broken).figure.layout.title.text
    margins = broken.path / "margins.safetensors"
    margins.write_bytes(margins.read_bytes()[:left])
    with pytest.raises(Unavailable, match="cannot be read .* cut short"):
        margins_panel(broken)
    for path in (broken.path / "stability").iterdir():
        path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(Unavailable, match="cannot be read .* cut short"):
        NeuronRecordings(broken.path / "stability")


def test_wrong_names_are_answered_with_the_nearest(run):
    for ask, near in [(lambda: mask_panel(run, layer="conv1.weigth"), "conv1.weight"), (lambda: neurons_panel(run, layer="relu11"), "relu1"),
                      (lambda: masks_panel(run, layer="conv1.weigth"), "conv1.weight"),
                      (lambda: updates_panel(run, layer="conv1.weigth"), "conv1.weight"),
                      (lambda: neurons_panel(run, sort="flip"), "flips"), (lambda: margins_panel(run, method="crwn"), "crown"),
                      (lambda: mask_panel(run, layer="conv1.weight", colour="ages"), "age"),
                      (lambda: stability_panel(run, layers=("relu11",)), "relu1")]:
        with pytest.raises(ValueError, match=f"Did you mean '{near}'"):
            ask()
    with pytest.raises(ValueError, match="there is no 9999"):
        neuron_panel(run, layer="relu1", neuron=9999)


def test_growth_scores_are_there_wherever_the_whole_network_was_saved(tmp_path):
    """Of a training that is paused: the gradients of its last checkpoint; at its end, those of the result; else a sentence."""
    config = Config(model="mlp", model_options={"widths": [24, 20]}, method="rigl", sparsity=0.8, eps=0.02, test_samples=20, epochs=2,
                    method_options={"update_every": 4}, runs_dir=str(tmp_path), device="cpu")
    live = Live(config).step()
    while not live.networks:
        time.sleep(0.01)
    source = Run(live.folder)
    (step, network), = source.networks.items()
    cursor = Cursor(source.history, source.history.names[0]).seek(-1)
    assert step == cursor.step == 4

    def gradient(state: dict, step: int) -> np.ndarray:
        learner = make_learner(config)
        learner.model.load_state_dict(state)
        x, y = next(iter(learner.data.train.batches(learner.batch_size, 0)))
        learner.objective(learner.model.train(), x, y, step / learner.total_steps).backward()
        return learner.model.get_parameter(cursor.name).grad.abs().flatten().numpy()

    assert np.array_equal(growth_scores(source, cursor), gradient(network(), 4)) and (growth_scores(source, cursor) > 0).mean() > 0.5
    assert np.array_equal(growth_scores(live, cursor), growth_scores(source, cursor))
    with pytest.raises(ValueError, match="saved at step 4: move the timeline there"):
        growth_scores(source, cursor.seek(0))
    live.start()
    while live.alive:
        time.sleep(0.01)
    cursor = Cursor(source.history, cursor.name).seek(-1)  # the same source: it reads again what has changed
    assert cursor.step > 4 and np.array_equal(growth_scores(source, cursor), gradient(source.weights, source.moments[-1]))


DRAWN = [*PANELS.values(), masks_panel, neuron_panel]


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
def test_every_panel_takes_the_folder_of_a_run_and_refuses_what_is_no_source_and_no_step(draw):
    run = Run(EXAMPLE / "rigl")
    assert draw(EXAMPLE / "rigl", 200).figure == draw(str(run.path), 200).figure == draw(run, 200).figure
    for wrong in (None, 3, Config()):
        with pytest.raises(ValueError, match=r"^What is drawn is a learn\.Run, the folder of a run, or a learn\.Live; got .*\.$"):
            draw(wrong)
    with pytest.raises(ValueError, match="There is no run folder no/such/run"):
        draw("no/such/run")
    for wrong in (-5, 10**9, float("nan"), "5"):
        with pytest.raises(ValueError, match=r"^rigl has steps 0 to 630; there is no step .*\.$"):
            draw(run, wrong)
    assert draw(run, 0) and draw(run, 630) and draw(run, np.float32(1.5))


def test_every_panel_function_is_checked():
    import sparselab.view as view

    assert {getattr(view, name) for name in view.__all__ if name.endswith("_panel")} == {*DRAWN, difference_panel}
    assert {filters_panel, mask_panel} < set(DRAWN) and all(hasattr(draw, "__wrapped__") for draw in (*DRAWN, difference_panel))


def test_a_second_run_is_checked_as_the_first_and_may_be_longer(tmp_path):
    short, run = Given(metrics=[{"step": 4, "loss": 1.0}]), Run(EXAMPLE / "rigl")
    other = EXAMPLE / "sparsevlr"
    assert difference_panel(run, 200, str(other)).figure == difference_panel(run, 200, Run(other)).figure
    assert metrics_panel(run, 200, [other]).figure == metrics_panel(run, 200, other).figure == metrics_panel(run, 200, [Run(other)]).figure
    assert metrics_panel(short, 600, [run])
    for wrong in (lambda: difference_panel(run, 200, 3), lambda: metrics_panel(run, others=[None]), lambda: Report(None)):
        with pytest.raises(ValueError, match="^What is drawn is"):
            wrong()
    with pytest.raises(ValueError, match="given and rigl has steps 0 to 630; there is no step 631"):
        metrics_panel(short, 631, [run])
    with pytest.raises(ValueError, match="one run or several"):
        Report()


def test_an_explorer_refuses_what_it_cannot_show():
    run = Run(EXAMPLE / "rigl")
    for wrong in (None, 3, Config(), (run, None)):
        with pytest.raises(ValueError, match="^What is drawn is"):
            Explorer(wrong)
    for wrong, count in (((), 0), ((run, run, run), 3)):
        with pytest.raises(ValueError, match=f"one run, or two side by side; got {count}"):
            Explorer(wrong)


def test_two_runs_of_different_length_share_a_timeline(tmp_path):
    """At a moment after the end of the shorter one, its panels are those of its end."""
    short = Run(shutil.copytree(EXAMPLE / "rigl", tmp_path / "short"))
    (short.path / "summary.json").unlink()
    for name in ("metrics.jsonl", "stability.jsonl"):
        lines = (short.path / name).read_text().splitlines(keepends=True)
        (short.path / name).write_text("".join(lines[:5]))
    for name in ("updates.jsonl", "updates.bin"):
        (short.path / "masks" / name).write_bytes(b"")
    explorer = Explorer((short, EXAMPLE / "sparsevlr"))
    explorer.go(1e9)
    explorer._settle()
    assert short.reached == 105 and explorer.step == 630
    assert not [block.problem.value for block in explorer.sides[0].blocks if block.problem.value and block.title != "Neurons"]
    assert explorer.sides[0].mask.step == 105 and explorer.sides[1].mask.step == 630
    call, names = explorer.sides[0].mask.code.value.rsplit("\n", 1), {}
    exec(call[0], names)
    assert eval(call[1], names).figure


def test_a_live_training_refuses_what_it_cannot_train():
    for wrong in ("x", None, Run(EXAMPLE / "rigl")):
        with pytest.raises(ValueError, match=r"^Live trains a learn\.Config or a learn\.Learner; got .*learn\.Run\(folder\)"):
            Live(wrong)


# --- one rule for what is shown at a step ----------------------------------------------------------------------------------

def test_every_panel_shows_at_a_step_what_was_last_measured_at_or_before_it(run):
    """Between two epochs: metrics, stability, neurons and weights are those of the end of the epoch before."""
    ends = [row["step"] for row in run.metrics]
    assert ends == run.neurons.steps == run.values.steps
    step = next(step for step in run.history.steps if ends[0] < step < ends[-1] and step not in ends)  # an update within an epoch
    before = max(end for end in ends if end < step)
    assert metrics_panel(run, step).figure.layout.meta["note"].startswith(f"step {before:,}:")
    neurons = neurons_panel(run, step).figure
    assert {shape.x0 for shape in neurons.layout.shapes if shape.name == "now"} == {before} == {run.neurons.nearest(step)}
    measured = f"measured at step {before:,}"
    assert measured in neurons.layout.meta["note"] and measured in stability_panel(run, step).figure.layout.meta["note"]
    for name in run.history.names:
        cursor = Cursor(run.history, name).seek(record_at(run.history, step))
        then = run.history.mask(record_at(run.history, before), name).numpy().ravel()
        values = np.full(then.size, np.nan, np.float32)
        values[then] = run.values.read(before)[0][name]
        assert run.weights_step(cursor, step) == before and np.array_equal(run.weights_at(cursor, step), values[cursor.active], equal_nan=True)
        assert measured in mask_panel(run, step, name, "weight").figure.layout.meta["title"]
    assert measured in filters_panel(run, step).figure.layout.meta["note"]
    assert measured in neuron_panel(run, step, next(iter(run.neurons.layers))).figure.layout.meta["note"]
    for panel in (neurons_panel, stability_panel, filters_panel, mask_panel):  # of the end of an epoch nothing is said
        assert "measured" not in panel(run, before).figure.layout.title.text


def test_before_the_first_epoch_ends_the_first_is_shown_and_named(run):
    first = run.metrics[0]["step"]
    assert run.neurons.nearest(0) == first and run.neurons.nearest(first) == first and run.neurons.nearest(1e9) == run.neurons.steps[-1]
    assert f"the line: measured at step {first:,}" in neurons_panel(run, 0).figure.layout.meta["note"]
    assert "nothing was measured before" in metrics_panel(run, 0).figure.layout.meta["note"]
