"""A machine without Chrome and without Debian's data packages: notebooks run, experiments keep their pictures."""
import base64
import json
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
        pytest.skip(str(error))


def test_the_machine_is_bare():
    code = ("import shutil, kaleido, pathlib\n"
            "from sparselab.view.theme import _camera\n"
            "print(_camera(0), shutil.which('chromium'), list(pathlib.Path('/usr/share/datasets').glob('*')))")
    done = run(sys.executable, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "None None []"), done.stderr


def test_every_notebook_that_draws_runs():
    drawing = [path for path in (ROOT / "nbs").rglob("[0-9]*.ipynb") if "show(" in path.read_text() and path.parent.name not in ("bench", "papers")]
    names = "|".join(sorted(path.stem for path in drawing))
    assert len(drawing) > 25
    done = run(Path(sys.executable).with_name("nbdev_test"), "--path", "nbs", "--file_re", f"^({names})[.]ipynb$", "--n_workers", "2",
               cwd=ROOT, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


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
