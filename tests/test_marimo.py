"""The widgets in marimo, a host of anywidget that is not Jupyter: what goes to the browser, and what comes back."""
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: pip install 'sparselab[dev]'")
if importlib.util.find_spec("marimo") is None:
    pytest.skip("marimo is not installed: pip install 'sparselab[dev]'", allow_module_level=True)

from lab import answers, browser, ended, until

pytestmark = pytest.mark.browser
APP = '''import marimo

app = marimo.App()


@app.cell
def _():
    import json
    from pathlib import Path

    import marimo as mo
    import numpy as np
    import plotly.graph_objects as go

    from sparselab.view.explorer.canvas import Canvas
    from sparselab.view.explorer.plot import Plot

    said = Path({said!r})
    canvas = Canvas(np.ones((4, 6), np.uint8), [(0, 0, 0, 0), (200, 0, 0, 255), (0, 0, 200, 255)], subject="a",
                    axes={{"x": {{"title": "in", "x0": 0, "dx": 1}}, "y": {{"title": "out", "x0": 0, "dx": 1}}}})
    plot = Plot(go.Figure(go.Scatter(x=[0, 10], y=[0, 1]), layout={{"height": 300}}))

    def tell(name, value):
        with said.open("a") as file:
            file.write(json.dumps([name, value]) + "\\n")

    def step(keys):
        raster = canvas._raster.copy()
        raster[1, len([key for key in keys if key == "ArrowRight"])] = 2
        canvas.show(raster, "after " + " ".join(keys))
        plot.at = 5
        tell("keys", keys)

    canvas.on_presses(step)
    canvas.observe(lambda change: tell("clicked", change["new"]), "clicked")
    plot.observe(lambda change: tell("plot", change["new"]["x"]), "clicked")
    mo.vstack([mo.ui.anywidget(canvas), mo.ui.anywidget(plot)])
    return


if __name__ == "__main__":
    app.run()
'''


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(the page of a marimo app with a Canvas and a Plot, a function that returns what its kernel was told)."""
    folder = tmp_path_factory.mktemp("marimo")
    said = folder / "said.jsonl"
    said.touch()
    (folder / "app.py").write_text(APP.format(said=str(said)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        host = subprocess.Popen([sys.executable, "-m", "marimo", "run", "--headless", "--no-token", "--port", str(port), "app.py"],
                                cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), 90, lambda: (folder / "log").read_text()[-2000:])
        with browser() as chrome:
            page = chrome.new_page(viewport={"width": 1200, "height": 900})
            page.goto(f"http://127.0.0.1:{port}")
            page.locator(".sparselab-canvas[data-drawn]").wait_for(timeout=120_000)
            yield page, lambda: [json.loads(line) for line in Path(said).read_text().splitlines()]
    finally:
        ended(host)


def test_keys_reach_python_and_the_changed_codes_reach_the_canvas(page):
    page, told = page
    canvas = page.locator(".sparselab-canvas canvas")
    codes = "canvas => Array.from(canvas.codes())"
    assert canvas.evaluate(codes) == [1] * 24
    canvas.focus()
    page.keyboard.press("ArrowRight")
    until(lambda: ["keys", ["ArrowRight"]] in told())
    until(lambda: canvas.evaluate(codes) == [2 if i == 7 else 1 for i in range(24)])
    page.keyboard.press("End")
    until(lambda: canvas.evaluate(codes) == [2 if i in (6, 7) else 1 for i in range(24)])
    until(lambda: page.locator(".sparselab-line").text_content() == "after End")


def test_a_click_on_a_pixel_reaches_python(page):
    page, told = page
    box = page.locator(".sparselab-canvas canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 2.5 / 6, box["y"] + box["height"] * 3.5 / 4)
    until(lambda: any(name == "clicked" and value[:2] == [3, 2] for name, value in told()))


def test_plotly_comes_by_message_and_the_figure_is_drawn_marked_and_clicked(page):
    page, told = page
    plot = page.locator(".sparselab-plot")
    page.locator(".sparselab-plot[data-ready]").wait_for(timeout=60_000)
    assert plot.evaluate("plot => Array.from(plot.data[0].x)") == [0, 10]
    until(lambda: plot.evaluate("plot => plot.layout.shapes?.[0]?.x0") == 5)  # of the key before
    plot.scroll_into_view_if_needed()
    x, y = plot.evaluate("""plot => { const { xaxis: x, yaxis: y } = plot._fullLayout, box = plot.getBoundingClientRect();
        return [box.x + x._offset + x.d2p(7), box.y + y._offset + y.d2p(0.2)]; }""")
    page.mouse.click(x, y)
    until(lambda: any(name == "plot" and abs(value - 7) < 0.2 for name, value in told()))
