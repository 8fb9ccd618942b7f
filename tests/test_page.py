"""The explorer as one file: its data against the panels of every step, and what a browser without kernel and network shows of it."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("plotly", reason="figures need the extra lab")
pytest.importorskip("anywidget", reason="the explorer needs the extra lab")

from sparselab.learn import Given, Run, examples
from sparselab.learn.reading import record_at
from sparselab.sparse.cursor import Cursor
from sparselab.view import PANELS, Explorer, explorer_html, save_html
from sparselab.view.explorer.blocks import shared
from sparselab.view.explorer.explorer import OPTIONS, metrics_of
from sparselab.view.explorer.page import changes, plain, thinned, tiles_of
from sparselab.view.figures.masks import raster_of
from sparselab.view.figures.neurons import neurons_panel

NAMES = ("sparsevlr", "rigl")
JSON = st.recursive(st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from("abc"),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3), max_leaves=12)


class Written:
    """A page as it was written: `data`, and the parts with their titles."""

    def __init__(self, page: str):
        self.page = page
        self.data = json.loads(page.split("id=data type=application/json>")[1].split("</script>")[0])
        self.sections = re.findall(r"<section .*?</section>", page, re.S)
        self.titles = [re.search('data-title="([^"]*)"', section)[1] for section in self.sections]
        self.moments, self.start = self.data["moments"], int(re.search(r"id=timeline [^>]* value=(\d+)", page)[1])

    def films(self, title: str) -> dict:
        return self.data["films"][self.titles.index(title)]

    def section(self, title: str) -> str:
        return self.sections[self.titles.index(title)]


def frame(film: dict, moment: int) -> dict:
    return film["frames"][film["at"][moment]]


def played(figure: dict, steps: list) -> dict:
    """`figure` after the changes `steps`."""
    root = {"": json.loads(json.dumps(figure))}
    for path, value in steps:
        place = root
        for key in ["", *path][:-1]:
            place = place[key]
        place[path[-1] if path else ""] = value
    return root[""]


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [Run(examples() / name) for name in NAMES]


@pytest.fixture(scope="module")
def single(runs, tmp_path_factory):
    return save_html(runs[0], tmp_path_factory.mktemp("page") / "run.html", most=6)


@pytest.fixture(scope="module")
def double(runs, tmp_path_factory):
    return save_html(tuple(runs), tmp_path_factory.mktemp("page") / "pair.html", most=4)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 5000), min_size=1, max_size=90), st.integers(3, 60), st.data())
def test_a_page_keeps_the_first_the_last_and_the_moment_at_which_it_opens(steps, most, data):
    moments = sorted(steps)
    kept = data.draw(st.sampled_from(moments))
    few = thinned(moments, most, kept)
    assert few == sorted(set(few)) and set(few) <= steps and len(few) == min(most, len(moments))
    assert {moments[0], moments[-1], kept} <= set(few)


@settings(max_examples=300, deadline=None)
@given(JSON, JSON)
def test_changes_make_one_figure_of_another(before, after):
    assert json.dumps(played(before, changes(before, after)), sort_keys=True) == json.dumps(after, sort_keys=True)


def test_a_page_opens_where_the_explorer_does_and_says_how_many_moments_it_holds(runs, single):
    written = Written(single.read_text())
    assert written.moments[written.start] == Explorer(runs[0]).step == 10  # the update that changed most
    assert f"6 of {len(runs[0].moments)} moments are in this page" in written.page and len(written.moments) == 6
    assert written.titles == ["Margins of the final network" if title == "Margins" else title for title in PANELS]


def test_every_part_of_a_page_shows_the_panel_of_the_step(runs, single):
    run, written = runs[0], Written(single.read_text())
    for moment, step in enumerate(written.moments):
        for title, panel in PANELS.items():
            films = written.films("Margins of the final network" if title == "Margins" else title)
            if title == "Mask":
                for name in run.history.names:
                    cursor = Cursor(run.history, name).seek(record_at(run.history, step))
                    raster = raster_of(run, cursor, at=tiles_of(cursor.shape))
                    assert frame(films[name], moment) == {"note": raster.note, "picture": raster.source}
                continue
            drawn = {relu: neurons_panel(run, step, relu) for relu in run.neurons.layers} if title == "Neurons" else {
                "": metrics_of([run], step, folded=True) if title == "Metrics" else panel(run, step, **OPTIONS.get(title, {}))}
            assert films.keys() == drawn.keys()
            for name, expected in drawn.items():
                shown = frame(films[name], moment)
                assert played(films[name]["figure"], shown["changes"]) == plain(expected.figure), (title, step)
                assert shown["note"] == expected.figure.layout.meta["note"]


def test_two_runs_stand_side_by_side_with_the_difference_of_their_masks(runs, double):
    one, other = runs
    written = Written(double.read_text())
    assert written.moments[written.start] == Explorer(tuple(runs)).step
    assert set(written.moments) <= {step for run in runs for step in run.moments} and written.moments[-1] == max(run.moments[-1] for run in runs)
    pairs = [title for title in written.titles if title not in ("Metrics", "Difference")]
    assert pairs == [f"{'Margins of the final network' if title == 'Margins' else title} of {name}" for title in list(PANELS)[1:] for name in NAMES]
    for moment, step in enumerate(written.moments):
        for name in one.history.names:
            masks = [set(Cursor(run.history, name).seek(record_at(run.history, step)).active.tolist()) for run in runs]
            counts = len(masks[0] - masks[1]), len(masks[1] - masks[0]), len(masks[0] & masks[1])
            note = f"{counts[0]:,} only in {one.name}, {counts[1]:,} only in {other.name}, {counts[2]:,} in both"
            assert frame(written.films("Difference")[name], moment)["note"].startswith(note)
        updates = [PANELS["Updates"](run, step, **OPTIONS["Updates"]).figure for run in runs]
        for run, mine, yours in zip(runs, updates, updates[::-1], strict=True):
            film = written.films(f"Updates of {run.name}")[""]
            assert played(film["figure"], frame(film, moment)["changes"]) == plain(shared(mine, yours))


def test_a_page_is_made_of_a_folder_and_its_own_folder_is_made(tmp_path, runs, single):
    file = save_html(str(runs[0].path), str(tmp_path / "new" / "pages" / "run.html"), most=6)
    assert file.read_text() == single.read_text() and file.stat().st_size < 6_000_000 and file.read_text().count("plotly.js v") == 1


def test_a_page_says_how_far_it_is_while_it_is_made(tmp_path, runs, capsys):
    save_html(runs[0], tmp_path / "run.html", most=3)
    said = capsys.readouterr().err
    assert all(f"{title}:" in said for title in PANELS) and f"{len(PANELS)}/{len(PANELS)}" in said and "\r" in said


def test_a_layer_and_a_relu_can_be_chosen_and_a_layer_of_a_wrong_name_is_refused(runs, single):
    written = Written(single.read_text())
    assert re.findall('<option value="([^"]*)"', written.section("Mask")) == runs[0].history.names
    assert re.findall('<option value="([^"]*)"', written.section("Neurons")) == list(runs[0].neurons.layers)
    assert re.search(r'value="([^"]*)" data-weight="[^"]*" selected', written.section("Mask"))[1] == Explorer(runs[0]).sides[0].mask.layer.value
    chosen = Written(explorer_html(runs[0], ("conv1.weight",), most=3))
    assert list(chosen.films("Mask")) == ["conv1.weight"]
    with pytest.raises(ValueError, match="no layer called 'conv9.weight'"):
        explorer_html(runs[0], ("conv9.weight",))
    with pytest.raises(ValueError, match="list of names"):
        explorer_html(runs[0], "conv1.weight")


def test_what_cannot_be_written_is_a_sentence(tmp_path, runs):
    with pytest.raises(ValueError, match="There is no run folder"):
        save_html(tmp_path / "nowhere", tmp_path / "run.html")
    with pytest.raises(ValueError, match="two side by side.*got 3"):
        save_html((*runs, runs[0]), tmp_path / "run.html")
    with pytest.raises(ValueError, match="is a folder"):
        save_html(runs[0], tmp_path)
    with pytest.raises(ValueError, match="most=2"):
        save_html(runs[0], tmp_path / "run.html", most=2)
    assert list(tmp_path.iterdir()) == []


def test_parts_that_are_missing_are_sentences_beside_those_that_are_there(tmp_path, runs):
    folder = tmp_path / "damaged"
    shutil.copytree(runs[0].path, folder)
    shutil.rmtree(folder / "stability")
    (folder / "masks" / "start.json").write_bytes(b"{")
    written = Written(explorer_html(folder, most=3))
    without = [title for title, films in zip(written.titles, written.data["films"], strict=True) if not films]
    assert without == ["Mask", "Neurons", "Updates", "Layers", "Filters"]
    assert all(len(re.search("<p class=problem>(.*?)</p>", written.section(title))[1]) > 20 for title in without)
    rows = [{"step": step, "epoch": step // 4, "loss": 1.0, "clean": 0.5} for step in (4, 8)]
    dense = Written(explorer_html(Given("nothing else was kept", metrics=rows)))
    assert dense.moments == [0, 4, 8] and dense.moments[dense.start] == 8 and "all 3 moments" in dense.page
    assert dense.films("Metrics") and "nothing else was kept" in dense.section("Mask")


@pytest.fixture(scope="module")
def chrome():
    pytest.importorskip("playwright", reason="playwright is not installed: pip install 'sparselab[dev]'")
    from lab import browser
    with browser() as chrome:
        yield chrome


@pytest.fixture
def opened(chrome):
    """Opens a file offline; the page has raised nothing by the end."""
    pages, failed = [], []

    def open_page(file, **options):
        page = chrome.new_page(viewport={"width": 1440, "height": 900}, **options)
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("request", lambda request: failed.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
        page.context.set_offline(True)
        page.goto(file.as_uri(), timeout=90_000)
        settled(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert failed == []


@pytest.mark.browser
def test_a_page_fills_a_large_window(opened, single):
    page = opened(single)
    size = "() => [document.querySelector('main').clientWidth, ...[...document.querySelectorAll('img')].map(each => each.clientHeight)]"
    narrow = page.evaluate(size)
    page.set_viewport_size({"width": 1920, "height": 1080})
    wide = page.evaluate(size)
    assert narrow[0] > 1380 and wide[0] > 1860 and min(wide[1:]) > 340 > 320 > narrow[1]


def settled(page) -> dict:
    """title -> what the part shows, when every figure is drawn for the moment of the timeline."""
    page.wait_for_function("() => parts.every(part => !part.querySelector('.plotly-graph-div') || part.dataset.drawn === wanted(part))")
    return page.evaluate("""() => Object.fromEntries(parts.map(part => {
        const { layout, data } = part.querySelector('.plotly-graph-div') || {}, marks = (layout?.shapes || []).filter(shape => shape.name === 'now');
        return [part.dataset.title, { note: part.querySelector('.note').textContent, now: marks.map(shape => shape.x0),
            words: (layout?.annotations || []).map(each => each.text), picture: part.querySelector('img')?.src ?? data?.[0].source }]; }))""")


@pytest.mark.browser
def test_every_panel_follows_the_slider_in_a_browser(opened, runs, single):
    run, page = runs[0], opened(single)
    moments = Written(single.read_text()).moments
    assert page.locator("#label").text_content() == f"step 10 of {moments[-1]}"
    page.locator("#timeline").focus()
    page.keyboard.press("Home")
    for step in moments:
        shown = settled(page)
        assert page.locator("#label").text_content() == f"step {step} of {moments[-1]}"
        record = record_at(run.history, step)
        cursors = {name: Cursor(run.history, name).seek(record) for name in run.history.names}
        largest = max(cursors.values(), key=lambda cursor: np.prod(cursor.shape))
        at = f"step {run.history.steps[record]:,}: "
        assert shown["Mask"]["picture"] == raster_of(run, largest).source and shown["Mask"]["note"].startswith(at)
        kept = [f"{len(cursor.active):,} of {int(np.prod(cursor.shape)):,}" for cursor in cursors.values()]
        assert shown["Layers"]["words"] == kept and shown["Layers"]["note"].startswith(at)
        assert shown["Updates"]["note"].startswith(at) and shown["Filters"]["note"].startswith(at)
        assert shown["Filters"]["picture"] == PANELS["Filters"](run, step).figure.data[0].source
        assert set(shown["Metrics"]["now"]) == set(shown["Updates"]["now"]) == {step}
        rows = [row for row in run.stability if row["step"] <= step] or run.stability[:1]
        assert set(shown["Stability"]["now"]) == {rows[-1]["epoch"]} and set(shown["Neurons"]["now"]) == {rows[-1]["step"]}
        assert (f"measured at step {rows[-1]['step']}" in shown["Neurons"]["note"]) == (rows[-1]["step"] != step)
        page.keyboard.press("ArrowRight")
    assert settled(page) == shown  # the last moment stays


@pytest.mark.browser
@pytest.mark.parametrize("width", [pytest.param(1440, marks=pytest.mark.slow), 1000])
def test_no_button_of_a_figure_covers_its_legend(opened, double, width):
    page = opened(double)
    page.set_viewport_size({"width": width, "height": 900})
    settled(page)
    page.wait_for_function("() => [...document.querySelectorAll('.plotly-graph-div')]"
                           ".every(box => Math.abs(box._fullLayout.width - box.clientWidth) < 2)")
    boxes = page.evaluate("""() => [...document.querySelectorAll('.plotly-graph-div')].flatMap(plot => {
        const box = each => { const { left, top, right, bottom } = each.getBoundingClientRect(); return [left, top, right, bottom]; };
        const others = [...plot.querySelectorAll('.legend .traces, .plot')].map(box);
        return [...plot.querySelectorAll('.modebar-btn')].map(button => [box(button), others]); })""")
    assert len(boxes) > 20
    for (left, top, right, bottom), others in boxes:
        for x0, y0, x1, y1 in others:
            assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top


@pytest.mark.browser
def test_a_page_plays_faster_and_stops(opened, single):
    page = opened(single)
    at = "() => Number(document.getElementById('timeline').value)"
    page.keyboard.press("Home")
    for pace in ("2 x", "4 x", "8 x", "1 x", "2 x"):
        page.locator("#speed").click()
        assert page.locator("#speed").text_content() == pace
    page.locator("h2").first.click()
    page.keyboard.press(" ")
    page.wait_for_function("() => document.getElementById('play').textContent === '❚❚'")
    page.wait_for_function("() => Number(document.getElementById('timeline').value) === moments.length - 1")
    page.wait_for_function("() => document.getElementById('play').textContent === '▶'")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(at) == 4
    page.locator("#play").click()
    page.locator("#play").click()
    stood = page.evaluate(at)
    page.wait_for_timeout(500)
    assert page.evaluate(at) == stood


@pytest.mark.browser
def test_a_layer_that_is_chosen_brings_its_neurons_in_both_runs(opened, runs, double):
    page, (one, other) = opened(double), NAMES
    layer = "conv2.weight"
    relu = next(relu for relu, about in runs[0].neurons.layers.items() if about.get("weight") == layer)
    page.locator(f'section[data-title="Mask of {other}"] select').select_option(layer)
    shown = settled(page)
    chosen = dict(page.evaluate("() => parts.map(part => [part.dataset.title, part.querySelector('select')?.value])"))
    assert chosen[f"Mask of {one}"] == chosen[f"Mask of {other}"] == chosen["Difference"] == layer
    assert chosen[f"Neurons of {one}"] == chosen[f"Neurons of {other}"] == relu
    for run in runs:
        step = page.evaluate("() => moments[moment()]")
        assert shown[f"Neurons of {run.name}"]["picture"] == neurons_panel(run, step, relu).figure.data[0].source
        assert shown[f"Mask of {run.name}"]["picture"] == raster_of(
            run, Cursor(run.history, layer).seek(record_at(run.history, step)), at=tiles_of(run.history.shapes[layer])).source


@pytest.mark.browser
def test_a_click_on_the_metrics_goes_to_a_moment_and_a_dark_theme_is_dark(opened, single):
    page = opened(single, color_scheme="dark")
    background, text, figure = page.evaluate("""() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        document.querySelector('.plotly-graph-div').layout.font.color]""")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60 and min(map(int, re.findall(r"\d+", text)[:3])) > 200 and figure == text
    page.emulate_media(color_scheme="light")
    settled(page)
    assert page.evaluate("() => document.querySelector('.plotly-graph-div').layout.font.color") == "rgb(0, 0, 0)"
    page.evaluate("() => document.querySelector('.plotly-graph-div').emit('plotly_click', { points: [{ x: 1e9 }] })")
    assert page.locator("#label").text_content().startswith(f"step {Written(single.read_text()).moments[-1]} of")


def test_a_pair_of_runs_that_end_at_different_steps_has_every_panel(tmp_path):
    from sparselab.learn import Config, train

    torch.set_num_threads(1)
    pair = [train(Config(dataset="digits", model="mlp", epochs=epochs, train_samples=256, test_samples=10, batch_size=64, runs_dir=str(tmp_path),
                         method_options={"update_every": 2}, device="cpu"), callbacks=[]) for epochs in (1, 3)]
    written = Written(explorer_html(tuple(pair), most=4))
    assert written.moments[-1] == 12 and Written(explorer_html(pair[0])).moments[-1] == 4
    for title in written.titles:
        assert written.films(title), title
