"""Makes images/explorer.png: the workbench as a browser shows it, over the run in nbs/example; and the pictures in nbs/explore.ipynb.

`python tests/screenshot.py [target.png]`; needs chromium and playwright. A widget lives as long as its kernel, so that the notebook, wherever it is
read without one, shows both explorers as pictures.
"""
import argparse
import io
import json
import shutil
import tempfile
from base64 import b64encode
from pathlib import Path

from lab import Notebook, browser, server

ROOT = Path(__file__).resolve().parents[1]
EXPLORE = ROOT / "nbs" / "explore.ipynb"


def small(png: bytes) -> bytes:
    """The picture in 256 colours, those of thin lines among them."""
    from PIL import Image

    made = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(made, "png", optimize=True)
    return made.getvalue()


def keep(pictures: dict[str, bytes]) -> None:
    """Write into the notebook, for each cell that ends with one of these names, the picture of what it shows."""
    notebook = json.loads(EXPLORE.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            name = "".join(cell["source"]).rsplit("\n", 1)[-1]
            data = {"image/png": b64encode(pictures[name]).decode()} if name in pictures else None
            cell["outputs"] = [{"data": data | {"text/plain": [f"<{name}>"]}, "metadata": {}, "output_type": "display_data"}] if data else []
    EXPLORE.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, scratch = Path(folder) / "notebooks", Path(folder) / "lab"
        shutil.copytree(ROOT / "nbs" / "example", place / "example")
        shutil.copy(EXPLORE, place)
        with server(place, scratch) as url, browser() as chrome:
            book = Notebook(chrome, url, "explore.ipynb", scratch, size=(1440, 900))
            book.run_all()
            page = book.page
            page.wait_for_function("() => document.querySelectorAll('.sparselab-plot[data-ready]').length >= 10", timeout=60_000)
            book.do("side = explorer.sides[0]\nside.neurons.layer.value = list(side.neurons.links)[-1]\nside.neurons.sort.value = 'flips'")
            page.wait_for_timeout(5000)
            book.do("live.stop()\nlive_explorer.go(live_explorer.moments[-1])")
            pictures = {}
            for at, name in enumerate(("explorer", "live_explorer")):
                page.evaluate("""at => {
                    const page = document.querySelector('.jp-WindowedPanel-outer'), all = document.querySelectorAll('.sparselab-explorer')[at];
                    page.scrollTop += all.getBoundingClientRect().top - page.getBoundingClientRect().top; }""", at)
                page.wait_for_timeout(2000)
                if not at:
                    page.screenshot(path=str(target))  # one screen: what the window shows
                box, window = (page.locator(css).nth(n).bounding_box() for css, n in ((".sparselab-explorer", at), (".jp-WindowedPanel-outer", 0)))
                bottom = min(box["y"] + box["height"], window["y"] + window["height"])
                pictures[name] = small(page.screenshot(clip=box | {"y": window["y"], "height": bottom - window["y"]}))
    keep(pictures)
    print(f"{target}, {target.stat().st_size:,} bytes; {EXPLORE}, {EXPLORE.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the picture of the workbench that the README shows, and those in nbs/explore.ipynb.")
    parser.add_argument("target", nargs="?", type=Path, default=ROOT / "images" / "explorer.png", help="the file to write (default: %(default)s)")
    main(parser.parse_args().target)
