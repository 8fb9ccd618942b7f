"""The workbench on one screen: what is in sight at 1440 x 900, and what wheel, click and zoom do, in a real browser."""
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("playwright", reason="playwright is not installed: pip install 'sparselab[dev]'")

from lab import Notebook, browser, server, until

from sparselab.learn import Run, examples
from sparselab.view import PANELS

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
MASK, NEURONS = 0, 1


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """nbs/explore.ipynb after Run All, in a window of 1440 x 900."""
    root, scratch = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "nbs" / "explore.ipynb", root)
    shutil.copytree(ROOT / "nbs" / "example", root / "example")
    with browser() as chrome, server(root, scratch) as url:
        book = Notebook(chrome, url, "explore.ipynb", scratch, size=(1440, 900))
        book.run_all()
        drawn = "() => document.querySelectorAll('.sparselab-canvas[data-drawn]').length >= 4"
        until(lambda: book.page.evaluate(drawn), 90, lambda: f"{book.errors} {book.tracebacks()}")
        until(lambda: book.value("len(live.snapshot.metrics)") > 1, 90)
        assert book.value("live.snapshot.step") > 5
        book.do("live.stop()")
        yield book
        assert book.errors == [] and book.tracebacks() == []


def test_the_server_has_loaded_what_sends_messages_at_once(book):
    """Without it the mask may wait, up to 40 ms, until the page has acknowledged that the kernel is busy."""
    assert "sparselab.server | extension was successfully loaded" in (book.scratch / "lab.log").read_text()


def places(book: Notebook, explorer: int) -> dict[str, list[float]]:
    """[left, top, right, bottom] of what answers "what is the mask doing", and of the notebook's part of the window."""
    return book.page.evaluate("""at => {
        const all = document.querySelectorAll('.sparselab-explorer')[at], box = element => {
            const { left, top, right, bottom } = element.getBoundingClientRect();
            return [left, top, right, bottom]; };
        const [mask, neurons] = all.querySelectorAll('.sparselab-canvas');
        return { timeline: box(all.querySelector('.noUi-handle')), metrics: box(all.querySelector('.sparselab-plot .main-svg')), mask: box(mask),
                 neurons: box(neurons), window: box(document.querySelector('.jp-WindowedPanel-outer')) }; }""", explorer)


def in_sight(book: Notebook, explorer: int) -> list[str]:
    """What of it lies outside the window."""
    found = places(book, explorer)
    left, top, right, bottom = found.pop("window")
    bottom = min(bottom, book.page.viewport_size["height"])
    return [name for name, (x0, y0, x1, y1) in found.items() if x0 < left or y0 < top or x1 > right or y1 > bottom]


def test_no_panel_has_a_problem(book):
    assert book.value("[block.problem.value for block in explorer.sides[0].blocks]") == [""] * len(PANELS)


def scroll(book: Notebook, explorer: int, down: int = 0) -> None:
    book.page.evaluate("""([at, down]) => {
        const page = document.querySelector('.jp-WindowedPanel-outer'), all = document.querySelectorAll('.sparselab-explorer')[at];
        page.scrollTop += all.getBoundingClientRect().top - page.getBoundingClientRect().top + down; }""", [explorer, down])


def test_run_all_shows_timeline_metrics_mask_and_neurons_without_scrolling(book):
    until(lambda: in_sight(book, 1) == [], 20, lambda: f"{in_sight(book, 1)} {places(book, 1)}")
    found = places(book, 1)
    assert found["mask"][2] <= found["neurons"][0] and abs(found["mask"][1] - found["neurons"][1]) < 40  # beside each other
    scroll(book, 0)
    assert in_sight(book, 0) == []
    scroll(book, 0, 400)
    assert places(book, 0)["timeline"][1] > places(book, 0)["window"][1]  # it stays while the page scrolls


def test_a_bookmark_is_kept_changed_and_removed_on_one_screen(book):
    """By hand, and nothing is written into the run that comes with sparselab."""
    all_of_it, step = book.page.locator(".sparselab-explorer").first, book.value("explorer.step")

    def click(name: str) -> None:
        all_of_it.get_by_role("button", name=name, exact=True).click()

    def seen() -> list[str]:
        scroll(book, 0)
        return in_sight(book, 0)

    click("bookmark")
    field = all_of_it.get_by_placeholder("a note on this step")
    field.fill("most change")
    assert "in this session alone" in all_of_it.text_content() and seen() == []
    click("keep")
    kept = all_of_it.get_by_role("button", name=f"step {step:,}: most change", exact=True)
    until(lambda: kept.is_visible() and not field.is_visible())
    book.do("explorer.go(0)")
    click("✎")
    until(lambda: field.is_visible() and field.input_value() == "most change" and book.value("explorer.step") == step)
    assert seen() == []
    field.fill("the layer moves")
    click("keep")
    until(lambda: all_of_it.get_by_role("button", name=f"step {step:,}: the layer moves", exact=True).is_visible())
    click("✎")
    click("remove")
    until(lambda: all_of_it.get_by_role("button", name="✎", exact=True).count() == 0)
    assert not (examples() / "sparsevlr" / "bookmarks.jsonl").exists()


def test_a_large_window_is_used(book):
    """At 1920 x 1080 all of it is still in sight, wider and higher; back at 1440 x 900 it is as before."""
    def sizes() -> tuple[float, float, float]:
        found = places(book, 0)
        (left, top, right, bottom), window = found["mask"], found["window"]
        return right - left, bottom - top, window[2] - found["neurons"][2]

    book.page.evaluate("() => document.activeElement.blur()")
    small = sizes()
    book.page.set_viewport_size({"width": 1920, "height": 1080})
    try:
        until(lambda: sizes()[0] > 1.3 * small[0] and sizes()[1] > 50 + small[1], 20, lambda: f"{small} {sizes()}")
        scroll(book, 0)
        assert sizes()[2] < 60 and in_sight(book, 0) == []
        plots = "() => [...document.querySelectorAll('.sparselab-plot')].map(plot => [plot.clientWidth, plot._fullLayout?.width])"
        until(lambda: all(abs(box - drawn) < 2 for box, drawn in book.page.evaluate(plots) if box and drawn), 20)
    finally:
        book.page.set_viewport_size({"width": 1440, "height": 900})
    until(lambda: np.allclose(sizes(), small, atol=2), 20, lambda: f"{small} {sizes()}")


def test_a_finished_run_opens_at_the_moment_with_most_change(book):
    history = Run(examples() / "sparsevlr").history
    masks = {name: [mask.numpy() for _, mask in history.replay(name)] for name in history.names}
    moved = [sum(int((after != before).sum()) for all in masks.values() for before, after in [all[i:i + 2]]) for i in range(len(history.steps) - 1)]
    assert book.value("explorer.step") == history.steps[1 + moved.index(max(moved))]


def test_no_text_of_a_figure_is_cut_off(book):
    """Titles, notes, legends and numbers at bars, in a panel that is half a window wide."""
    until(lambda: book.page.evaluate("() => document.querySelectorAll('.sparselab-plot[data-ready]').length") >= 6)
    cut = book.page.evaluate("""() => [...document.querySelectorAll('.sparselab-explorer')[0].querySelectorAll('.sparselab-plot')]
        .filter(plot => plot.clientWidth).flatMap(plot => [...plot.querySelectorAll('text')].filter(text => {
            const at = text.getBoundingClientRect(), frame = plot.getBoundingClientRect();
            return at.width && (at.right > frame.right + 1 || at.left < frame.left - 1); }).map(text => text.textContent))""")
    assert cut == []
    headings = book.page.evaluate("""() => [...document.querySelectorAll('.sparselab-explorer .sparselab-heading')]
        .filter(each => each.clientWidth).map(each => [each.textContent, each.scrollHeight - each.clientHeight])""")
    assert len(headings) >= len(PANELS) and max(over for _, over in headings) <= 1
    assert any("both axes are logarithmic" in text for text, _ in headings)
    ticks = book.page.evaluate("""() => { const plot = [...document.querySelectorAll('.sparselab-explorer .sparselab-plot')]
            .find(plot => plot.layout?.meta?.title === 'Density by layer');
        const boxes = [...plot.querySelectorAll('.xtick text, .x2tick text')].map(text => text.getBoundingClientRect());
        return boxes.map(box => [box.left, box.right]); }""")
    ends = sorted(ticks)
    assert len(ends) > 3 and all(after[0] - before[1] > 12 for before, after in zip(ends, ends[1:], strict=False)), ends
    notes = book.page.evaluate("""() => [...document.querySelectorAll('.sparselab-explorer .sparselab-note')]
        .filter(note => note.clientWidth).map(note => [note.textContent, note.scrollWidth - note.clientWidth])""")
    assert any("grown" in text for text, _ in notes) and max(over for _, over in notes) <= 1


HEIGHTS = """() => {
    const all = document.querySelectorAll('.sparselab-explorer')[0], page = document.querySelector('.jp-WindowedPanel-outer');
    return [page.scrollTop, ...[...all.querySelectorAll('.sparselab-canvas canvas')].map(canvas => {
        const { top, height } = canvas.getBoundingClientRect(); return [top, height]; })]; }"""


def test_a_click_on_a_neuron_leaves_the_rasters_as_high_as_they_are(book):
    book.do("explorer.sides[0].neurons.layer.value = next(relu for relu in explorer.sides[0].neurons.links)")
    book.page.evaluate("() => document.activeElement.blur()")
    scroll(book, 0, 150)
    book.page.wait_for_timeout(500)
    before, plots = book.page.evaluate(HEIGHTS), "() => document.querySelectorAll('.sparselab-plot[data-ready]').length"
    count, box = book.page.evaluate(plots), canvas(book, NEURONS)[1]
    book.page.mouse.click(box["x"] + 60, box["y"] + box["height"] * 0.7)
    until(lambda: book.page.evaluate(plots) > count, 20)
    book.page.wait_for_timeout(500)
    assert book.page.evaluate(HEIGHTS) == before


def canvas(book: Notebook, which: int) -> tuple[object, dict]:
    found = book.page.locator(".sparselab-canvas canvas").nth(which)
    return found, found.bounding_box()


def zoom(book: Notebook, which: int = MASK) -> float:
    book.page.wait_for_timeout(150)
    return float(book.page.evaluate("i => document.querySelectorAll('.sparselab-canvas')[i].dataset.zoom", which))


def test_the_wheel_scrolls_the_page_and_zooms_only_with_ctrl_or_after_a_click(book):
    scroll(book, 0)
    book.page.evaluate("() => document.activeElement.blur()")
    found, box = canvas(book, MASK)
    book.page.mouse.move(box["x"] + 100, box["y"] + 150)
    book.page.mouse.wheel(0, 120)
    until(lambda: canvas(book, MASK)[1]["y"] < box["y"] - 50)
    assert zoom(book) == 1
    assert "Ctrl" in book.page.locator(".sparselab-how").first.text_content()
    assert "Ctrl + wheel" in book.page.locator(".sparselab-explorer").first.text_content()
    scroll(book, 0)
    book.page.keyboard.down("Control")
    book.page.mouse.wheel(0, -300)
    book.page.keyboard.up("Control")
    until(lambda: zoom(book) > 1.5)
    assert canvas(book, MASK)[1]["y"] == box["y"]
    book.page.mouse.dblclick(box["x"] + 100, box["y"] + 150)
    until(lambda: zoom(book) == 1)
    book.page.mouse.wheel(0, -300)  # the double click was into the canvas
    until(lambda: zoom(book) > 1.5)


def test_another_layer_is_shown_whole(book):
    scroll(book, 0)
    box = canvas(book, MASK)[1]
    book.page.mouse.click(box["x"] + 100, box["y"] + 150)
    book.page.mouse.wheel(0, -300)
    until(lambda: zoom(book) > 1.5)
    layers = book.value("[name for _, name in explorer.sides[0].mask.layer.options]")
    other = next(name for name in layers if name != book.value("explorer.sides[0].mask.layer.value"))
    book.do(f"explorer.sides[0].mask.layer.value = {other!r}")
    until(lambda: zoom(book) == 1)


def test_a_click_takes_the_place_at_pointer_down(book):
    """With the canvas partly out of sight, taking the focus must not move what was clicked."""
    scroll(book, 0)
    box = canvas(book, NEURONS)[1]
    top = places(book, 0)["window"][1]
    scroll(book, 0, int(box["y"] - top + box["height"] / 2))
    box = canvas(book, NEURONS)[1]
    count = book.value("len(explorer.sides[0].neurons.order)")
    row = int(count * 0.8)
    book.page.evaluate("() => document.activeElement.blur()")
    book.page.mouse.move(box["x"] + 60, box["y"] + (row + 0.5) / count * box["height"])
    book.page.mouse.down()
    book.page.evaluate("() => { document.querySelector('.jp-WindowedPanel-outer').scrollTop -= 40; }")  # as a browser does for a focus
    book.page.mouse.up()
    until(lambda: book.value("explorer.sides[0].neurons.neuron") == book.value(f"int(explorer.sides[0].neurons.order[{row}])"))


def test_axes_have_ticks_that_fit_the_raster(book):
    scroll(book, 0)
    book.do("mask = explorer.sides[0].mask\n"
            "mask.layer.value = next(name for name, shape in mask.source.history.shapes.items() if len(shape) == 2)")
    until(lambda: book.value("len(explorer.sides[0].mask.tiles.shape)") == 2)
    book.page.wait_for_timeout(500)
    book.page.evaluate("() => document.querySelectorAll('.sparselab-canvas canvas')[0].ondblclick()")
    zoom(book)
    read = """() => { const box = document.querySelector('.sparselab-canvas'), frame = box.querySelector('canvas').getBoundingClientRect();
        return ['upright', 'level'].map(name => { const svg = box.querySelector('.sparselab-' + name), lines = [...svg.querySelectorAll('line')];
            const texts = [...svg.querySelectorAll('text')].map(text => text.textContent);
            return [lines.map(line => { const at = line.getBoundingClientRect();
                        return name === 'level' ? (at.x - frame.x) / frame.width : (at.y - frame.y) / frame.height; }), texts]; }); }"""
    shape = book.value("list(explorer.sides[0].mask.tiles.shape)")
    for (at, texts), size, title in zip(book.page.evaluate(read), shape, ("output unit", "input unit"), strict=False):
        *ticks, name = texts
        assert name.startswith(title) and len(ticks) >= 2
        for place, tick in zip(at, ticks, strict=True):  # a tick stands at the middle of its unit
            assert place == pytest.approx((float(tick.replace(",", "")) + 0.5) / size, abs=0.01)


def test_a_saved_picture_of_a_mask_has_axes_title_and_legend(book):
    image = pytest.importorskip("PIL.Image")
    import io

    with book.page.expect_download() as expected:
        book.page.locator(".sparselab-explorer").first.get_by_role("button", name="PNG", exact=True).nth(1).click()
    assert expected.value.suggested_filename == book.value("explorer.sides[0].mask.name") + ".png"
    picture = np.asarray(image.open(io.BytesIO(Path(expected.value.path()).read_bytes())).convert("RGBA")).astype(int)
    codes = np.array(book.page.evaluate("() => Array.from(document.querySelector('.sparselab-canvas canvas').codes())"))
    palette = np.array(book.value("explorer.sides[0].mask.content.palette"))
    used = [code for code in np.unique(codes) if palette[code][3] == 255]
    share = [((np.abs(picture[..., :3] - palette[code][:3]).max(-1) < 3) & (picture[..., 3] == 255)).sum() for code in used]
    held = [(codes == code).sum() for code in used]
    assert np.allclose(np.array(share) / sum(share), np.array(held) / sum(held), atol=0.05)  # the weights
    pixels = np.argwhere((np.abs(picture[..., :3] - palette[used[0]][:3]).max(-1) < 3) & (picture[..., 3] == 255))
    low, high = np.percentile(pixels, 1, axis=0), np.percentile(pixels, 99, axis=0)
    drawn = picture[..., 3] > 100  # text is on all sides but the right
    assert all(part.sum() > 300 for part in (drawn[:int(low[0]) - 8], drawn[int(high[0]) + 12:], drawn[:, :int(low[1]) - 12]))


def test_a_hidden_mask_is_drawn_when_it_is_in_sight_again(book):
    """JupyterLab hides a notebook for a moment while it changes its theme. Drawn then, a mask was one pixel wide, and stayed so."""
    first = "document.querySelector('.sparselab-canvas canvas')"
    width, drawn = book.page.evaluate(f"() => [{first}.width, Number({first}.parentElement.dataset.drawn)]")
    hidden = book.page.evaluate(f"""() => new Promise(resolve => {{
        const canvas = {first};
        Object.defineProperty(canvas, 'clientWidth', {{ configurable: true, get: () => 0 }});
        canvas.parentElement.dispatchEvent(new Event('transitionend'));  // it is to be drawn in the next frame
        requestAnimationFrame(() => {{ delete canvas.clientWidth; resolve(canvas.width); }}); }})""")
    assert hidden == width > 100
    until(lambda: book.page.evaluate(f"() => Number({first}.parentElement.dataset.drawn)") > drawn, 10)
    assert book.page.evaluate(f"() => {first}.width") == width
