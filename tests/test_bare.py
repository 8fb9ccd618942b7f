"""A machine without Chrome and without Debian's data packages: notebooks run, experiments keep their pictures."""
import base64
import json
import os
import struct
import sys
from pathlib import Path

import nbformat
import pytest
from bare import bare

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.bare


def run(*command: str, **options):
    try:
        return bare([str(part) for part in command], capture_output=True, text=True, **options)
    except OSError as error:
        if os.environ.get("CI"):  # there the proof must run
            pytest.fail(str(error))
        pytest.skip(str(error))


def test_the_machine_is_bare():
    code = ("import shutil, kaleido, pathlib\n"
            "from sparselab.view.figures.panels import _camera\n"
            "print(_camera(0), shutil.which('chromium'), list(pathlib.Path('/usr/share/datasets').glob('*')))")
    done = run(sys.executable, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "None None []"), done.stderr


DRAW = """
import os, sys
from execnb.nbio import read_nb
from execnb.shell import CaptureShell

for path in sys.argv[1:]:
    os.chdir(os.path.dirname(path))
    notebook = read_nb(path)
    CaptureShell(path).run_all(notebook, exc_stop=True)
    shown = [output["data"] for cell in notebook.cells for output in cell.get("outputs") or () if "data" in output]
    figures = [data for data in shown if {"application/vnd.plotly.v1+json", "image/png"} & set(data)]
    assert figures and all("image/png" in data for data in figures), f"{path}: {len(figures)} figures, not all with a picture"
    print(path, len(figures))
"""


def draws_with_plotly(path: Path) -> bool:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return any("application/vnd.plotly.v1+json" in output.get("data", ()) for cell in cells for output in cell.get("outputs", ()))


@pytest.mark.parametrize("half", [0, 1])
def test_every_library_notebook_that_draws_with_plotly_has_its_pictures(half):
    """The others draw with matplotlib, which has never heard of a browser. Two halves, for two cores."""
    drawing = sorted(filter(draws_with_plotly, (ROOT / "nbs").rglob("[0-9]*.ipynb")))[half::2]
    assert len(drawing) > 4
    done = run(sys.executable, "-c", DRAW, *drawing, cwd=ROOT, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(drawing), done.stdout[-3000:] + done.stderr[-3000:]


def test_an_experiment_keeps_its_pictures(tmp_path):
    done = run(sys.executable, ROOT / "nbs" / "run.py", ROOT / "nbs" / "train.ipynb", "out.ipynb", "-p", "epochs", "3", "-p", "train_samples", "300",
               "-p", "test_samples", "50", "-p", "runs_dir", "runs", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stdout + done.stderr and (tmp_path / "out.ipynb").stat().st_size < 1e6
    figures = [output["data"] for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for output in cell.get("outputs", ())
               if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(figures) >= 6
    for figure in figures:
        png = base64.b64decode(figure["image/png"])
        assert png.startswith(b"\x89PNG") and struct.unpack(">I", png[16:20]) == (900,), json.dumps(figure["text/plain"])
