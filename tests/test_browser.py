"""The workbench in a real browser: each control is used as a person uses it, and what is then drawn is checked on its data."""
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

pytest.importorskip("playwright", reason="playwright is not installed: pip install 'sparselab[dev]'")

from lab import Notebook, browser, server, until

from sparselab.learn.config import Config
from sparselab.learn.experiments import train
from sparselab.learn.reading import record_at
from sparselab.learn.runs import Run
from sparselab.view import margins_panel, metrics_panel

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(model="mlp", model_options={"widths": [24, 20]}, method="rigl", sparsity=0.8, eps=0.02, test_samples=40,
             method_options={"update_every": 4, "drop_fraction": 0.3}, device="cpu")
DROP = ".sparselab-live .widget-hslider .noUi-handle"


def notebook(path: Path, *cells: str) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel), path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    folder = str(tmp_path_factory.mktemp("runs"))
    return [train(Config(**SMALL, epochs=3, seed=seed, runs_dir=folder), callbacks=[]) for seed in (0, 1)]


@pytest.fixture(scope="module")
def chrome():
    with browser() as chrome:
        yield chrome


@pytest.fixture(scope="module")
def lab(tmp_path_factory, chrome):
    root, scratch = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    with server(root, scratch) as url:
        yield root, lambda path, script="": Notebook(chrome, url, path, scratch, script=script)


@pytest.fixture(scope="module")
def opened(lab, runs):
    """A notebook with an explorer of one run and one of two."""
    root, open_notebook = lab
    notebook(root / "runs.ipynb", "from sparselab.view import Explorer",
             f"one = Explorer({str(runs[0].path)!r})\none", f"two = Explorer({tuple(str(run.path) for run in runs)!r})\ntwo")
    book = open_notebook("runs.ipynb")
    book.run_all()
    wait_for_figures(book, 14, 6)
    yield book
    assert book.errors == [] and book.tracebacks() == []


def wait_for_figures(book: Notebook, plots: int, canvases: int) -> None:
    drawn = "() => [document.querySelectorAll('.sparselab-plot[data-ready]').length, " \
            "document.querySelectorAll('.sparselab-canvas[data-drawn]').length]"
    until(lambda: (found := book.page.evaluate(drawn))[0] >= plots and found[1] >= canvases, 60,
          lambda: f"{book.page.evaluate(drawn)} {book.errors} {book.tracebacks()}")


IMPATIENT = "const wait = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = time => wait(time === 2000 ? 0 : time);"


def test_an_explorer_lives_where_scripts_take_longer_to_load_than_anywidget_waits(lab, runs):
    """anywidget gives a model two seconds, here none; what the kernel sent to it before, while and after is drawn."""
    root, open_notebook = lab
    notebook(root / "slow.ipynb", "from sparselab.view import Explorer", f"one = Explorer({str(runs[0].path)!r})\none", "one.timeline.value = 3")
    book = open_notebook("slow.ipynb", IMPATIENT)
    book.run_all()
    wait_for_figures(book, 6, 2)
    assert any("Failed to initialize model" in text for text in book.errors), "anywidget waits as long as it takes: listen.js may go"
    assert until(lambda: codes(book, 0) == expected(runs[0], *shown(book)), 20)
    press(book, ".sparselab-canvas canvas", "ArrowRight")
    until(lambda: book.value("one.timeline.value") == 4)
    assert until(lambda: codes(book, 0) == expected(runs[0], *shown(book)), 20)
    assert book.tracebacks() == []
    book.page.close()


def codes(book: Notebook, canvas: int) -> list[int]:
    return book.page.evaluate("i => Array.from(document.querySelectorAll('.sparselab-canvas canvas')[i].codes())", canvas)


def expected(run: Run, name: str, step: int) -> list[int]:
    """The picture's codes from whole masks: 1 off, 5 kept, 9 grown, 13 dropped."""
    record = record_at(run.history, step)
    now, before = (np.asarray(run.history.mask(max(0, at), name)) for at in (record, record - 1))
    return np.where(now, np.where(before, 5, 9), np.where(before, 13, 1)).ravel().tolist()


def shown(book: Notebook, explorer: str = "one") -> tuple[str, int]:
    """The layer and the step of an explorer's first mask, as the kernel has them at one moment."""
    return tuple(book.value(f"({explorer}.sides[0].mask.layer.value, {explorer}.step)"))


def press(book: Notebook, selector: str, *keys: str, nth: int = 0) -> None:
    book.page.locator(selector).nth(nth).focus()
    for key in keys:
        book.page.keyboard.press(key)


def marker(book: Notebook, plot: int) -> float | None:
    """Where the timeline's marker stands in a figure, as the browser has drawn it."""
    return book.page.evaluate("i => document.querySelectorAll('.sparselab-plot')[i].layout?.shapes"
                              "?.filter(shape => shape.name === 'now')[0]?.x0 ?? null", plot)


SLIDER = ".sparselab-explorer .widget-hslider .noUi-handle"


def test_the_slider_moves_every_panel(opened, runs):
    press(opened, SLIDER, "Home", "ArrowRight", "ArrowRight")
    until(lambda: opened.value("one.timeline.value") == 2)
    name, step = shown(opened)
    until(lambda: codes(opened, 0) == expected(runs[0], name, step))
    assert 9 in codes(opened, 0) and 13 in codes(opened, 0)
    until(lambda: marker(opened, 0) == step)
    neurons = runs[0].neurons
    column = neurons.steps.index(neurons.nearest(step))
    mark = "() => document.querySelectorAll('.sparselab-canvas')[1].dataset.mark.split(',')[1]"
    until(lambda: opened.page.evaluate(mark) == str(column))


def test_the_mask_is_right_at_every_moment_also_where_nothing_changed(opened, runs):
    """An epoch ends between two updates: a moment with the mask of the one before."""
    moments = opened.value("one.moments")
    assert {0, *runs[0].history.steps} < set(moments)
    press(opened, SLIDER, "Home")
    for moment, step in enumerate(moments):
        until(lambda moment=moment: opened.value("one.timeline.value") == moment)
        name, _ = shown(opened)
        until(lambda name=name, step=step: codes(opened, 0) == expected(runs[0], name, step))
        press(opened, SLIDER, "ArrowRight")


def test_a_picture_that_missed_a_change_asks_for_the_whole(opened, runs):
    opened.do("canvas = one.sides[0].mask.content\ncanvas.version += 2  # as if what stood between had got lost")
    until(lambda: opened.value("canvas.missed == canvas.whole - 1 == canvas.version - 1"))
    until(lambda: codes(opened, 0) == expected(runs[0], *shown(opened)))


def test_keys_on_the_mask_step_and_play_plays(opened, runs):
    press(opened, ".sparselab-canvas canvas", "Home", "ArrowRight", "ArrowRight", "ArrowLeft")
    until(lambda: opened.value("(one.sides[0].mask.content.presses[0] % 4, one.timeline.value)") == [0, 1])
    name, step = shown(opened)
    until(lambda: codes(opened, 0) == expected(runs[0], name, step))
    opened.page.locator(".sparselab-explorer .widget-play button").first.click()
    end = opened.value("one.timeline.max")
    until(lambda: opened.value("one.timeline.value") == end)
    name, step = shown(opened)
    until(lambda: codes(opened, 0) == expected(runs[0], name, step))


def test_the_layer_selector_shows_another_layer(opened, runs):
    for at, name in reversed(list(enumerate(runs[0].history.names))):
        opened.page.locator(".sparselab-explorer .widget-dropdown select").first.select_option(index=at)
        until(lambda name=name: shown(opened)[0] == name)
        step = shown(opened)[1]
        until(lambda name=name, step=step: codes(opened, 0) == expected(runs[0], name, step))


def test_a_click_on_a_neuron_selects_its_weights_and_shows_its_bounds(opened, runs):
    raster = opened.page.locator(".sparselab-canvas canvas").nth(1)
    raster.scroll_into_view_if_needed()
    box, count = raster.bounding_box(), opened.value("len(one.sides[0].neurons.order)")
    neuron = 7
    raster.click(position={"x": 20, "y": (neuron + 0.5) / count * box["height"]})
    until(lambda: opened.value("one.sides[0].neurons.neuron") == neuron)
    linked = opened.value("one.sides[0].neurons.links[one.sides[0].neurons.layer.value]")
    until(lambda: opened.value("one.sides[0].mask.layer.value") == linked)
    first = "i => document.querySelectorAll('.sparselab-canvas')[i].dataset.mark.split(',')[0]"
    until(lambda: opened.page.evaluate(first, 0) == str(neuron) and opened.page.evaluate(first, 1) == str(neuron))
    neurons = runs[0].neurons
    bounds = neurons.over_time(opened.value("one.sides[0].neurons.layer.value"), "ub")[:, neuron].astype(float).tolist()
    drawn = "() => [...document.querySelectorAll('.sparselab-plot')].flatMap(plot => (plot.data || []).map(trace => " \
            "Array.from(trace.y?._inputArray || trace.y || [])))"
    until(lambda: any(np.allclose(y, bounds, atol=1e-3) for y in opened.page.evaluate(drawn) if len(y) == len(bounds)
                      and all(isinstance(value, (int, float)) for value in y)))


def test_the_eps_slider_draws_the_proofs_of_that_radius(opened, runs):
    margins = "one.sides[0].margins"
    old = opened.value(f"{margins}.content.figure")
    handles = opened.page.locator(".sparselab-explorer").first.locator(".widget-hslider .noUi-handle")
    handles.last.focus()
    opened.page.keyboard.press("ArrowRight")
    until(lambda: opened.value(f"{margins}.content.figure") != old)
    eps, method = opened.value(f"{margins}.eps.value"), opened.value(f"{margins}.method.value")
    assert abs(eps - (runs[0].margins.eps + runs[0].margins.grid[1])) < 1e-9
    pure = margins_panel(runs[0], method=method, eps=eps).figure
    assert json.loads(opened.value(f"{margins}.content.figure"))["data"] == json.loads(pure.to_json())["data"]
    titles = "() => [...document.querySelectorAll('.sparselab-plot')].map(plot => plot.layout?.meta?.note)"
    until(lambda: pure.layout.meta["note"] in opened.page.evaluate(titles))
    assert pure.layout.meta["note"] in opened.page.locator(".sparselab-note").all_text_contents()


def test_two_runs_move_on_one_timeline(opened, runs):
    assert opened.page.locator(".sparselab-canvas canvas").count() == 7  # the last is the difference of two masks
    handle = opened.page.locator(".sparselab-explorer").nth(1).locator(".widget-hslider .noUi-handle").first
    handle.focus()
    for moment, key in enumerate(("Home", "ArrowRight", "ArrowRight", "ArrowRight")):
        opened.page.keyboard.press(key)
        until(lambda moment=moment: opened.value("two.timeline.value") == moment)
        name, step = shown(opened, "two")
        for canvas, run in ((2, runs[0]), (4, runs[1])):
            until(lambda canvas=canvas, run=run, name=name, step=step: codes(opened, canvas) == expected(run, name, step))
    assert codes(opened, 2) != codes(opened, 4)
    both = "() => { const plot = document.querySelectorAll('.sparselab-explorer')[1].querySelector('.sparselab-plot');" \
           " const lines = plot.data?.filter(trace => trace.showlegend === false);" \
           " return [lines?.map(trace => trace.line?.dash === 'dash'), plot.layout?.shapes?.map(shape => shape.x0)]; }"
    until(lambda: step in (opened.page.evaluate(both)[1] or []))
    dashed = opened.page.evaluate(both)[0]
    assert 0 < sum(dashed) == len(dashed) / 2  # one panel: every metric solid and dashed


def test_two_runs_have_room_for_their_metrics_and_share_the_axes_of_a_neuron(opened):
    """However long the names of the runs are, the legend is one line."""
    strip = """() => { const plot = document.querySelectorAll('.sparselab-explorer')[1].querySelector('.sparselab-plot');
        const rows = [...plot.querySelectorAll('.legend .traces')].map(each => Math.round(each.getBoundingClientRect().top));
        return [new Set(rows).size, plot._fullLayout._size.h / plot._fullLayout.height]; }"""
    rows, share = opened.page.evaluate(strip)
    assert rows == 1 and share > 0.4
    opened.do("two.sides[0].neuron_clicked(two.sides[0].neurons.layer.value, 5)")
    ranges = """() => [...document.querySelectorAll('.sparselab-explorer')[1].querySelectorAll('.sparselab-plot')]
        .filter(plot => plot._fullData?.some(trace => trace.name === 'upper bound'))
        .map(plot => [plot._fullLayout.yaxis.range, plot._fullLayout.yaxis2.range])"""
    until(lambda: len(found := opened.page.evaluate(ranges)) == 2 and np.allclose(*found), 20, lambda: opened.page.evaluate(ranges))


def tip(book: Notebook, row: int, column: int, shape: tuple[int, int]) -> str:
    """What is written beside the mouse when it rests on a pixel of the mask."""
    canvas = book.page.locator(".sparselab-canvas canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    book.page.mouse.move(box["x"] - 5, box["y"] - 5)
    book.page.mouse.move(box["x"] + (column + 0.5) / shape[1] * box["width"], box["y"] + (row + 0.5) / shape[0] * box["height"])
    return until(lambda: book.page.locator(".sparselab-tip").first.text_content())


def test_the_mouse_on_the_mask_tells_index_age_and_value(opened, runs):
    name, history = runs[0].history.names[0], runs[0].history
    opened.page.locator(".sparselab-explorer .widget-dropdown select").first.select_option(index=0)
    masks = np.stack([mask.numpy() for _, mask in history.replay(name)])
    shape = masks.shape[1:]

    def first(places: np.ndarray) -> tuple[int, int]:
        return tuple(map(int, np.argwhere(places)[len(np.argwhere(places)) // 2]))

    press(opened, SLIDER, "End")
    until(lambda: shown(opened) == (name, opened.value("one.moments[-1]")))
    born = len(masks) - 1 - (~masks[::-1]).argmax(0) + 1  # the record since which a weight of the last mask is on
    born[masks.all(0)] = 0
    for place in (first(masks.all(0)), first(masks[-1] & (born == 2))):
        words, value = tip(opened, *place, shape).split(", value ")
        assert words == f"fc1{list(place)}: on since record {born[place]}, for {len(masks) - 1 - born[place]} updates"
        assert float(value) == pytest.approx(float(runs[0].weights[name][place]), rel=1e-3)  # recorded in half precision
    press(opened, SLIDER, "Home", "ArrowRight", "ArrowRight")
    until(lambda: shown(opened) == (name, history.steps[2]))
    for words, places in (("grown now", masks[2] & ~masks[1]), ("dropped now", masks[1] & ~masks[2]), ("off", ~masks[1] & ~masks[2])):
        place = first(places)
        assert tip(opened, *place, shape).startswith(f"fc1{list(place)}: {words}")


# where on the screen the middle of a bar of a figure is
BAR = """([title, trace, point]) => {
    const plot = [...document.querySelectorAll('.sparselab-plot')].find(plot => plot.layout?.meta?.title?.includes(title));
    plot.scrollIntoView({ block: 'center' });
    const found = plot._fullData.find(each => each.name === trace), { xaxis: x, yaxis: y } = plot._fullLayout;
    const at = values => Array.from(values._inputArray || values), box = plot.getBoundingClientRect();
    return [box.x + x._offset + x.d2p(at(found.x)[point]), box.y + y._offset + y.d2p(at(found.y)[point] / 2)]; }"""


def test_the_mouse_on_a_margin_shows_image_attack_and_bound(opened, runs):
    margins, block = runs[0].margins, "one.sides[0].margins"
    method, eps = opened.value(f"{block}.method.value"), opened.value(f"{block}.eps.value")
    panel = margins_panel(runs[0], method=method, eps=eps)
    bars = next(trace for trace in panel.figure.data if trace.type == "bar" and len(trace.x))
    point = int(np.argmax(np.abs(np.asarray(bars.y, float))))
    sample = int(bars.customdata[point])
    opened.page.mouse.move(*opened.page.evaluate(BAR, ["Margins", bars.name, point]))
    text = until(lambda: (found := opened.value(f"{block}.sample.value")) and f"sample {sample}," in found and found)
    assert f"class {margins.labels[sample]}, predicted {margins.predictions[sample]}" in text
    assert f"margin at least {margins.at(method, eps)[sample]:.3f} at eps {eps:.3f}" in text
    images = [decoded(b64decode(found)) for found in re.findall("base64,([^\"]+)", text)]
    for image, truth in zip(images, (margins.images[sample], margins.attacks[sample]), strict=True):
        assert np.abs(image[..., 0].astype(int) - truth[0]).max() <= 2  # few grey levels
    until(lambda: f"sample {sample}: label" in "".join(opened.page.locator(".hoverlayer").all_text_contents()))


def decoded(png: bytes) -> np.ndarray:
    """(H, W, 4) of a picture, by a decoder that is not ours."""
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(png)).convert("RGBA"))


def download(book: Notebook, button: str, block: int) -> bytes:
    """What a button of a panel of the first explorer hands to the browser."""
    with book.page.expect_download() as expected:
        book.page.locator(".sparselab-explorer").first.get_by_role("button", name=button, exact=True).nth(block).click()
    assert expected.value.suggested_filename == f"{book.value(f'one.sides[0].blocks[{block}].name')}.{button.lower()}"
    return Path(expected.value.path()).read_bytes()


def test_csv_png_and_html_are_what_is_on_display(opened, runs, tmp_path):
    metrics, mask = 0, 1
    rows = list(csv.DictReader(io.StringIO(download(opened, "CSV", metrics).decode())))
    clean = [(float(row["x"]), float(row["y"])) for row in rows if row["trace"] == "clean"]
    assert clean == [(row["step"], pytest.approx(row["clean"])) for row in runs[0].metrics]
    press(opened, SLIDER, "Home", "ArrowRight")
    until(lambda: opened.value("one.timeline.value") == 1)
    name, step = shown(opened)
    until(lambda: codes(opened, 0) == expected(runs[0], name, step))
    active = [int(row["weight"]) for row in csv.DictReader(io.StringIO(download(opened, "CSV", mask).decode()))]
    assert active == np.flatnonzero(runs[0].history.mask(1, name)).tolist()
    picture = decoded(download(opened, "PNG", mask)).astype(int)  # with axes, title and legend around the weights
    palette = np.array(opened.value("one.sides[0].mask.content.palette"))
    for code in set(codes(opened, 0)) - {1}:
        assert (np.abs(picture - palette[code]).max(-1) < 3).sum() > 50 * codes(opened, 0).count(code)
    chart = decoded(download(opened, "PNG", metrics))
    assert min(chart.shape[:2]) > 300 and len(np.unique(chart.reshape(-1, 4), axis=0)) > 20
    page = tmp_path / "metrics.html"
    page.write_bytes(download(opened, "HTML", metrics))
    alone = opened.page.context.browser.new_page()
    alone.context.set_offline(True)
    alone.goto(page.as_uri())
    drawn = "() => document.querySelector('.plotly-graph-div')?.data?.length"
    until(lambda: alone.evaluate(drawn) == len(metrics_panel(runs[0]).figure.data))
    assert "metrics_panel(learn.Run(" in alone.locator("pre").text_content()
    alone.close()


def test_copy_as_code_shows_the_call_and_puts_it_on_the_clipboard(opened, runs):
    opened.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = opened.page.locator(".sparselab-explorer").first.get_by_role("button", name="copy as code").nth(1)
    call = opened.value("one.sides[0].mask.code.value")
    button.click()
    until(lambda: opened.page.evaluate("() => navigator.clipboard.readText()") == call)
    assert "mask_panel(learn.Run(" in call
    assert [box.input_value() for box in opened.page.locator(".sparselab-explorer textarea:visible").all()] == [call]
    opened.page.evaluate("() => { navigator.clipboard.writeText = () => { throw new Error('not allowed'); };"
                         " document.execCommand = what => { window.copied = [what, document.activeElement.value]; }; }")
    button.click()
    until(lambda: opened.page.evaluate("() => window.copied") == ["copy", call])


# the contrast of a text and what is behind it, as WCAG 2 defines it
CONTRAST = """element => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    let behind = element, under = [255, 255, 255];
    for (; behind; behind = behind.parentElement) {
        const found = numbers(getComputedStyle(behind).backgroundColor);
        if (found.length === 3 || found[3] === 1) { under = found; break; }
    }
    const style = getComputedStyle(element), text = numbers(element.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(text), light(under)].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), light(under)]; }"""
CARDS = """import torch
from sparselab.learn.runs import Run
from sparselab.robust.verification import verify
from sparselab.sparse.sparsify import sparsify
from sparselab.view import Explorer
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
sparsifier = sparsify(model, torch.optim.SGD(model.parameters(), 0.1), method="rigl", sparsity=0.9, total_steps=40)
x = torch.rand(20, 1, 8, 8)"""


def show_in(book: Notebook, theme: str) -> None:
    """Choose JupyterLab's theme, as its menu does, and run all cells in it."""
    book.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
    until(lambda: book.page.evaluate("() => document.body.dataset.jpThemeName") == theme)
    book.run_all()
    wait_for_figures(book, 5, 2)


def test_cards_and_panels_can_be_read_in_light_and_dark(lab, runs):
    """What a name in a cell shows, and the explorer: every text stands out from the page, at least 4.5 to 1."""
    root, open_notebook = lab
    notebook(root / "cards.ipynb", CARDS, "sparsifier.masks", "sparsifier", f"Run({str(runs[0].path)!r})",
             "verify(model, x, model(x).argmax(1), 0.001)", f"Explorer({str(runs[0].path)!r})")
    book = open_notebook("cards.ipynb")
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        show_in(book, theme)
        cards = book.page.locator(".jp-RenderedHTMLCommon > div > div:first-child > b")
        assert cards.all_text_contents() == ["Masks", "RigL", runs[0].path.name, "Verification"]
        pictures = book.page.locator(".jp-RenderedHTMLCommon img").evaluate_all("all => all.map(each => each.naturalWidth)")
        assert pictures == [32, 32, 32, 32]
        for card in cards.all():
            card.scroll_into_view_if_needed()
            assert card.is_visible()
        texts = ".jp-RenderedHTMLCommon b, .jp-RenderedHTMLCommon td, .sparselab-line, .sparselab-note, .sparselab-heading, " \
                ".sparselab-plot .xtick text, .sparselab-plot .legendtext"
        seen = book.page.locator(texts).evaluate_all(f"all => all.map({CONTRAST})")
        assert len(seen) > 60 and min(contrast for contrast, _ in seen) > 4.5
        assert all((behind < 0.1) == (theme == "JupyterLab Dark") for _, behind in seen)
    assert book.errors == [] and book.tracebacks() == []
    book.page.close()


# the red, 0..255, of the line above the selected one of `rows` neurons
OUTLINE = """rows => { const canvas = document.querySelectorAll('.sparselab-canvas canvas')[1], [row] = canvas.parentElement.dataset.mark.split(',');
    return canvas.getContext('2d').getImageData(40, Math.floor(row / rows * canvas.height), 1, 1).data[0]; }"""


def test_another_theme_reaches_what_is_drawn_already(lab, runs):
    """No cell is run again, and nothing is drawn again but the rasters, whose outlines have a colour of the theme."""
    root, open_notebook = lab
    notebook(root / "theme.ipynb", "from sparselab.view import Explorer", f"one = Explorer({str(runs[0].path)!r})\none")
    book = open_notebook("theme.ipynb")
    show_in(book, "JupyterLab Light")
    wait_for_figures(book, 6, 2)
    book.do("one.sides[0].neuron_clicked(one.sides[0].neurons.layer.value, 3)")
    wait_for_figures(book, 7, 2)
    count = book.value("len(one.sides[0].neurons.order)")
    plots, texts = "all => all.map(plot => plot.dataset.drawn)", ".sparselab-plot .main-svg text"
    drawn = book.page.locator(".sparselab-plot").evaluate_all(plots)
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        book.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
        dark = theme == "JupyterLab Dark"
        until(lambda dark=dark: (book.page.evaluate(OUTLINE, count) > 128) == dark, 10, lambda: book.page.evaluate(OUTLINE, count))
        seen = book.page.locator(texts).evaluate_all(f"all => all.map({CONTRAST})")
        assert len(seen) > 60 and min(contrast for contrast, _ in seen) > 4.5
        assert all((behind < 0.1) == dark for _, behind in seen)
    assert book.page.locator(".sparselab-plot").evaluate_all(plots) == drawn
    assert book.errors == [] and book.tracebacks() == []
    book.page.close()


# seconds from a click on pause, by the page's clock, until the kernel's snapshot says so
PAUSE = """() => { const at = Date.now(); [...document.querySelectorAll('.sparselab-live button')]
    .find(button => button.textContent.includes('pause')).click(); return at / 1000; }"""
WATCH = """import threading, time
def look():
    while live.snapshot.status != 'paused': time.sleep(.002)
    paused.append(time.time())
paused = []
threading.Thread(target=look, daemon=True).start()"""


def seconds_to_pause(book: Notebook) -> float:
    book.do("live.start()")
    until(lambda: book.value("live.snapshot.status") == "running")
    book.do(WATCH)
    clicked = book.page.evaluate(PAUSE)
    return until(lambda: book.value("paused"))[0] - clicked


def test_live_pauses_at_once_writes_changes_and_survives_a_restart(lab):
    root, open_notebook = lab
    config = Config(**SMALL, epochs=2000, runs_dir=str(root / "live"))
    notebook(root / "live.ipynb", "from sparselab.learn.config import Config\nfrom sparselab.learn.live import Live\n"
             f"from sparselab.view import Explorer\nlive = Live(Config.read({config.__dict__!r}))",
             "explorer = Explorer(live.start())\nexplorer")
    book = open_notebook("live.ipynb")
    book.run_all()
    until(lambda: book.value("live.snapshot.step") > 12, 60)
    # other work on the machine may hold up one click, but not each of five
    assert any(seconds_to_pause(book) < 0.5 for _ in range(5))
    paused = book.value("live.snapshot.step")
    press(book, DROP, "ArrowRight")
    events = root / "live" / config.run_id / "events.jsonl"
    row = json.loads(until(lambda: events.exists() and events.read_text().endswith("\n") and events.read_text()))
    assert (row["step"], row["name"], row["old"]) == (paused, "drop_fraction", 0.3) and row["new"] == pytest.approx(0.31)
    assert book.value("live.snapshot.step") == paused
    book.page.get_by_role("button", name="one update").click()
    until(lambda: book.value("live.snapshot.step") > paused and book.value("live.snapshot.status") == "paused")
    later = book.value("live.snapshot.step")
    assert later % 4 == 0 and book.errors == [] and book.tracebacks() == []
    book.restart()
    book.run_all()
    until(lambda: book.value("live.snapshot.step") >= later, 60)
    assert book.value("live.snapshot.knobs['drop_fraction']") == pytest.approx(0.31)
    book.do("live.stop()")
    assert book.errors == [] and book.tracebacks() == []


def test_runs_are_chosen_sorted_and_drawn_by_hand(lab):
    root, open_notebook = lab
    shutil.copy(ROOT / "nbs" / "compare.ipynb", root)
    shutil.copytree(ROOT / "nbs" / "example", root / "example", dirs_exist_ok=True)
    book = open_notebook("compare.ipynb")
    book.run_all()
    chosen, drawn = "list(browser.chosen['run'])", "() => document.querySelector('.sparselab-plot')?.data?.length"
    until(lambda: book.page.evaluate(drawn) == len(json.loads(book.value("browser.block.panel.figure.to_json()"))["data"]))
    box = book.page.locator(".jp-OutputArea .widget-select select[multiple]").first
    dropdowns = book.page.locator(".jp-OutputArea .widget-dropdown select")
    dropdowns.nth(0).select_option("verified")
    book.page.locator(".jp-OutputArea .widget-checkbox input").first.check()
    until(lambda: book.value(chosen) == ["sparsevlr", "rigl"])
    box.select_option("rigl")
    until(lambda: book.value(chosen) == ["rigl"])
    until(lambda: book.page.locator(".widget-html table tr").count() == 2)
    dropdowns.nth(1).select_option("stability by layer")
    until(lambda: book.page.evaluate(drawn) == 12)
    assert book.errors == [] and book.tracebacks() == []


def test_an_executed_experiment_keeps_its_mask_slider_as_html_without_network(tmp_path, chrome):
    out = tmp_path / "train.ipynb"
    parameters = dict(SMALL, epochs=3, runs_dir=str(tmp_path / "runs"), with_dense=False)
    papermill.execute_notebook(ROOT / "nbs" / "train.ipynb", out, parameters=parameters, progress_bar=False, cwd=tmp_path)
    book = nbformat.read(out, 4)
    assert "widgets" not in book.metadata and out.stat().st_size < 1_000_000
    pictures = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
                if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert pictures and all("image/png" in output.data for output in pictures), "a figure has no picture to fall back on"
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", out], check=True, capture_output=True)
    page = chrome.new_page()
    page.context.set_offline(True)
    page.goto(out.with_suffix(".html").as_uri())
    slider = page.locator("input[type=range]").first
    current = "() => { const box = document.querySelector('input[type=range]').parentNode; " \
            "return [box.querySelector('img').src, box.querySelector('output').textContent]; }"
    last = page.evaluate(current)
    slider.focus()
    page.keyboard.press("Home")
    first = page.evaluate(current)
    assert first[0] != last[0] and first[1] != last[1] and first[1].startswith("step 0")
