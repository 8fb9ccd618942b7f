"""Makes images/explorer.png: the workbench as a browser shows it, over the run in nbs/example.

`python tests/screenshot.py [target.png]`; needs chromium and playwright.
"""
import argparse
import shutil
import tempfile
from pathlib import Path

from lab import Notebook, browser, server

ROOT = Path(__file__).resolve().parents[1]


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, scratch = Path(folder) / "notebooks", Path(folder) / "lab"
        shutil.copytree(ROOT / "nbs" / "example", place / "example")
        shutil.copy(ROOT / "nbs" / "explore.ipynb", place)
        with server(place, scratch) as url, browser() as chrome:
            book = Notebook(chrome, url, "explore.ipynb", scratch, size=(1440, 900))
            book.run_all()
            book.do("live.stop()")
            page = book.page
            page.wait_for_function("() => document.querySelectorAll('.sparselab-plot[data-ready]').length >= 5", timeout=60_000)
            book.do("side = explorer.sides[0]\nside.neurons.layer.value = list(side.neurons.links)[-1]\nside.neurons.sort.value = 'flips'")
            page.wait_for_timeout(5000)
            page.evaluate("""() => { const page = document.querySelector('.jp-WindowedPanel-outer');
                page.scrollTop += document.querySelector('.sparselab-explorer').getBoundingClientRect().top - page.getBoundingClientRect().top; }""")
            page.wait_for_timeout(1000)
            page.screenshot(path=str(target))  # one screen: what the window shows
    print(f"{target}, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the picture of the workbench that the README shows.")
    parser.add_argument("target", nargs="?", type=Path, default=ROOT / "images" / "explorer.png", help="the file to write (default: %(default)s)")
    main(parser.parse_args().target)
