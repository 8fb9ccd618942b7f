"""nbs/train.ipynb and the tour are run by papermill as a user would, and what they leave is read."""
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import nbformat
import papermill
import pytest
from executing import executed as executed_here

from sparselab.learn.config import Config
from sparselab.learn.experiments import ALL_METHODS, dense_partner
from sparselab.learn.files import locked
from sparselab.learn.known import DATASETS
from sparselab.learn.objectives import OBJECTIVES
from sparselab.learn.optimizers import OPTIMIZERS, SCHEDULES
from sparselab.learn.runs import Run, runs_in
from sparselab.learn.sparse_steps import KERNELS
from sparselab.sparse.distributions import DISTRIBUTIONS

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "nbs" / "train.ipynb"
PLAIN = os.environ | {"BROWSER_PATH": "none"}  # matplotlib draws the pictures: a browser costs seconds, and test_browser.py has one


def run_papermill(folder: Path, *parameters: str, notebook: Path = TRAIN) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "--no-progress-bar", "-p", "runs_dir", "runs"]
    return subprocess.run([*command, *parameters], cwd=folder, env=PLAIN, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("papermill")
    done = run_papermill(folder, "-p", "sparsity", "0.95", "-p", "epochs", "6", "-p", "eps", "8/255", "-p", "test_samples", "20",
                         "--inject-paths", "-y", "{method_options: {update_every: 6}}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def outputs(path: Path) -> list[dict]:
    notebook = nbformat.read(path, 4)
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_run_is_sparse_compared_with_dense_and_readable(executed):
    runs = {run.config.method: run for run in runs_in(executed / "runs")}
    assert set(runs) == {"sparsevlr", "dense"} and all(isinstance(run, Run) for run in runs.values())
    summary = runs["sparsevlr"].summary
    assert summary["nnz"] == round(0.05 * summary["total"]) and summary["config"]["eps"] == 8 / 255
    text = "".join(json.dumps(output) for output in outputs(executed / "out.ipynb"))
    for value in (f"{summary['accuracy']['verified']:.2%}", f"{summary['nnz']:,}"):
        assert value in text, f"{value} is in summary.json but not in the notebook"


def test_the_saved_notebook_is_small_and_lives_without_a_kernel(executed):
    path = executed / "out.ipynb"
    assert path.stat().st_size < 1e6
    assert "widgets" not in nbformat.read(path, 4).metadata
    figures = [output["data"]["application/vnd.plotly.v1+json"] for output in outputs(path)
               if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(figures) >= 6
    sliders = [figure for figure in figures if figure["layout"].get("sliders")]
    assert sliders, "no figure has a slider"
    history = next(run for run in runs_in(executed / "runs") if run.config.method == "sparsevlr").history
    steps = sliders[0]["layout"]["sliders"][0]["steps"]
    frames = sliders[0].get("frames") or steps
    assert len(steps) == len(frames) and 2 <= len(steps) <= len(history.steps)
    progress = [o["text"] for o in outputs(path) if o["output_type"] == "stream" and o["name"] == "stdout"]
    assert sum(bool(re.search(r"^ +6 ", text, re.M)) for text in progress) == 2


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["natural", "crown_ibp"])
@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_runs_through_papermill(tmp_path, method, objective):
    done = run_papermill(tmp_path, "-p", "method", method, "-p", "objective", objective, "-p", "sparsity", "0.6", "-p", "epochs", "2",
                         "-p", "model", "cnn5_bn", "-y", "{model_options: {width: 2}}", "-p", "test_samples", "10", "-p", "train_samples",
                         "200", "-p", "with_dense", "False")
    assert done.returncode == 0, done.stderr[-3000:]
    run, = runs_in(tmp_path / "runs")
    expected = run.summary["total"] if method == "dense" else round(0.4 * run.summary["total"])
    assert run.summary["nnz"] == expected or method == "slimming" and abs(run.summary["nnz"] - expected) < 0.1 * run.summary["total"]


QUICK = ("-p", "epochs", "2", "-p", "objective", "natural", "-p", "model", "mlp", "-p", "test_samples", "10", "-p", "sparsity", "0.5")


def test_the_dense_partner_that_another_process_trains_is_waited_for(tmp_path):
    config = Config(epochs=2, objective="natural", model="mlp", test_samples=10, sparsity=0.5)
    sparse, dense = (tmp_path / "runs" / each.run_id for each in (config, dense_partner(config)))
    whole = nbformat.read(TRAIN, 4)
    trained = 1 + next(i for i, cell in enumerate(whole.cells) if "dense_partner(" in cell.source)
    whole.cells = whole.cells[:trained]  # without its figures
    nbformat.write(whole, tmp_path / "train.ipynb")
    with ThreadPoolExecutor() as pool:
        with locked(dense):  # as another notebook does whose dense network is being trained
            running = pool.submit(run_papermill, tmp_path, *QUICK, notebook=tmp_path / "train.ipynb")
            while not (sparse / "summary.json").exists() and not running.done():
                time.sleep(0.1)
            time.sleep(1)
            assert not running.done()
        done = running.result()
    assert done.returncode == 0, done.stderr[-3000:]
    assert Run(sparse).finished and Run(dense).finished
    assert "is being trained by another process: waiting for it to end, to use it" in "".join(map(json.dumps, outputs(tmp_path / "out.ipynb")))


def test_without_the_dense_network_none_is_trained(tmp_path):
    executed_here(TRAIN, tmp_path, epochs=2, objective="natural", model="mlp", test_samples=10, sparsity=0.5, with_dense="false", runs_dir="runs")
    assert [run.config.method for run in runs_in(tmp_path / "runs")] == ["sparsevlr"]


def test_a_misspelt_parameter_stops_the_notebook_with_a_sentence(tmp_path):
    done = run_papermill(tmp_path, "-p", "sparsty", "0.9")
    assert done.returncode == 1
    sentence = next(line for line in done.stderr.splitlines() if line.startswith("ValueError: "))
    assert sentence.startswith("ValueError: There is no parameter called 'sparsty'. Did you mean 'sparsity'?")
    assert "sparselab/learn" not in done.stderr, "no way through the library around the sentence"
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def launcher():
    """nbs/run.py as a module: what it refuses before it starts a kernel needs no process of its own."""
    spec = importlib.util.spec_from_file_location("launcher", ROOT / "nbs" / "run.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize("notebook, wrong, sentence", [
    ("train", ("-p", "sparsity", "99"), "got 99.0"), ("papers/acdc", ("-p", "scale", "fulll"), "Did you mean 'full'?")])
def test_the_launcher_shows_the_sentence_alone(tmp_path, notebook, wrong, sentence):
    path = ROOT / "nbs" / f"{notebook}.ipynb"
    done = subprocess.run([sys.executable, ROOT / "nbs" / "run.py", path, "out.ipynb", "-p", "runs_dir", "runs", *wrong],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "WARNING" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"\w+Error: ", last) and sentence in last
    shown = [output for output in outputs(tmp_path / "out.ipynb") if output["output_type"] == "error"]
    assert len(shown) == 1 and len(shown[0]["traceback"]) == 1 and sentence in shown[0]["traceback"][0]


@pytest.mark.parametrize("arguments, sentence", [
    (("no/such.ipynb", "a/out.ipynb"), "There is no notebook no/such.ipynb."),
    ((str(TRAIN), "file/a/out.ipynb"), "The folder file/a cannot be made (Not a directory); choose another place for the output."),
    ((str(TRAIN), "."), ". is a folder; name the notebook to write, such as out.ipynb."),
    ((str(TRAIN), "a/out.ipynb", "-f", "none.yaml"), "There is no file of parameters none.yaml."),
    ((str(TRAIN), "a/out.ipynb", "-y", "{a: ["), "The parameters are not YAML"),
    (("file", "a/out.ipynb"), "file is not a notebook.")])
def test_the_launcher_says_in_a_sentence_what_cannot_be_read_or_written(launcher, tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "file").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        launcher.main(list(arguments))
    shown = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in shown
    assert shown.strip().splitlines()[-1].startswith(f"Error: {sentence}")


def test_the_launcher_makes_the_folder_of_its_output_and_tells_progress_in_lines(tmp_path):
    source = "from sparselab.notebooks import writes_over\nprint(6 * 7, writes_over())"
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(made, tmp_path / "in.ipynb")
    done = subprocess.run([sys.executable, ROOT / "nbs" / "run.py", "in.ipynb", "runs/deep/out.ipynb"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "42" in done.stdout, done.stderr[-2000:]
    assert outputs(tmp_path / "runs" / "deep" / "out.ipynb")[0]["text"] == "42 False\n"


def test_every_parameter_is_a_field_with_its_default_and_a_description():
    parameters = papermill.inspect_notebook(str(TRAIN))
    defaults = {field.name: getattr(Config(), field.name) for field in fields(Config)}
    assert set(parameters) - {"with_dense", "track"} == set(defaults)
    for name, parameter in parameters.items():
        assert len(parameter["help"]) > 10, f"{name} has no description"
        if name in defaults:
            assert parameter["inferred_type_name"] == type(defaults[name]).__name__
            assert eval(parameter["default"]) == defaults[name], name


def test_the_readme_names_every_method():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [method for method in ALL_METHODS if f"`{method}`" not in text] == []


CHOICES = {"objective": OBJECTIVES, "dataset": DATASETS, "distribution": DISTRIBUTIONS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES,
           "kernels": KERNELS}


@pytest.mark.parametrize("parameter", CHOICES)
def test_the_comment_of_a_parameter_names_every_choice(parameter):
    """Who adds an objective or a data set is told that the notebook does not name it yet."""
    comment = re.search(rf"^{parameter}: .*?#(.*)$", "\n".join(cell.source for cell in nbformat.read(TRAIN, 4).cells), re.M)[1]
    assert [name for name in CHOICES[parameter] if not re.search(rf"\b{name}\b", comment)] == []


def test_the_tour_runs_in_two_minutes_and_shows_each_stop(tmp_path):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "index.ipynb"), "out.ipynb", "--no-progress-bar", "-p", "seed", "1"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, env=PLAIN, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120  # of the processor: a busy machine takes longer
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    stops = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and re.search(r"^## \d\. ", cell.source, re.M)]
    assert len(stops) == 8
    for first, last in zip(stops, [*stops[1:], len(cells)], strict=True):
        assert any(cell.get("outputs") for cell in cells[first:last]), cells[first].source
    run, = runs_in(tmp_path / "runs")
    assert run.finished and run.config.seed == 1 and run.summary["nnz"] == round(0.1 * run.summary["total"])
