"""Sweeps: what is refused at once, what is skipped, continued and tried again, and that a run of a sweep is the single run to the bit."""
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pytest

from sparselab.learn import Config, own_data, train
from sparselab.learn.experiments import dense_partner
from sparselab.learn.files import locked, read_rows, write_sealed
from sparselab.scale import Executor, Job, Local, execute_all, expand, front, read_sweep, search, sweep
from sparselab.scale import executors as executors_module
from sparselab.scale.sweeps import Crew, job_of, train_notebook
from sparselab.view import show

ROOT = Path(__file__).parent.parent
SMALL = {"epochs": 1, "objective": "natural", "model": "mlp", "model_options": {"widths": [16]}, "train_samples": 200, "test_samples": 40,
         "eps": 0.05, "batch_size": 50}
needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is not installed (extra search)")


@pytest.fixture(autouse=True)
def without_chrome(monkeypatch):
    """matplotlib draws the pictures, in the workers too: a browser costs seconds."""
    monkeypatch.setenv("BROWSER_PATH", "none")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def notebook(path: Path, *cells: str) -> Path:
    """A notebook of these cells, the first with its parameters; it stands in for train.ipynb where training is not the question."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(made, path)
    return path


PARAMETERS = "method: str = ''\nsparsity: float = 0.0\nseed: int = 0\nruns_dir: str = ''\nwith_dense: bool = True"
BEGIN = "from pathlib import Path\n(folder,) = Path(runs_dir).glob(f'{method}-*-s{seed}')"
END = "with open(folder / 'trained', 'a') as log:\n    log.write('x')\n(folder / 'summary.json').write_text('{}')"


def trained(runs: Path) -> Counter:
    """Run -> how often it has been trained by the stand-in."""
    return Counter({path.parent.name: len(path.read_text()) for path in runs.glob("*/trained")})


# what is refused, in a sentence, before anything is trained

@pytest.mark.parametrize("base, grid, sentence", [
    ({}, {"sparsty": [0.9]}, "There is no parameter called 'sparsty'. Did you mean 'sparsity'?"),
    ({"epoch": 3}, {"seed": 0}, "There is no parameter called 'epoch'. Did you mean 'epochs'?"),
    ({}, {"metod_options.zeta": [0.3]}, "Did you mean 'method_options'?"),
    ({}, {"runs_dir": ["a", "b"]}, "runs_dir is one for the whole sweep"),
    ({"resume": False}, {"seed": 0}, "A sweep goes on with what is there"),
    ({}, {"sparsity": [0.9, 99]}, "sparsity is a share from 0 up to but not including 1; got 99"),
    ({}, {"seed": []}, "seed has no values"),
    ({}, {"seed": "4..0"}, "seed has no values"),
    ({}, [{"seed": 0}, 3], "or a list of them; got 3"),
    ({}, {"method": ["rigl", "rigel"]}, "There is no method called 'rigel'. Did you mean 'rigl'?"),
    ({}, {"method": "rigl", "method_options.update_evry": [5, 10]}, "There is no option of method rigl called 'update_evry'"),
    ({}, {"method": "imp", "method_options.ruonds": [5, 10]}, "There is no option of method imp called 'ruonds'"),
    ({"model": "cnn44"}, {"seed": 0}, "There is no model called 'cnn44'"),
    ({}, {"objective": ["ibp", "ipb"]}, "There is no objective called 'ipb'. Did you mean 'ibp'?"),
    ({}, {"objective_options.kapa": [0.5]}, "'kapa'"),
    ({}, {"optimizer": "adm"}, "There is no optimizer called 'adm'. Did you mean 'adam'?"),
    ({}, {"schedule": "cosin"}, "There is no schedule of the learning rate called 'cosin'")])
def test_a_grid_that_cannot_be_is_refused_at_once(tmp_path, base, grid, sentence):
    with pytest.raises(ValueError) as refused:
        sweep({"runs_dir": str(tmp_path / "runs"), **base}, grid)
    assert sentence in str(refused.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("base", [["epochs"], "epochs: 3", 3])
def test_a_base_that_is_none_is_a_sentence(base):
    with pytest.raises(ValueError, match="^The base of a sweep is a Config, or a dictionary of its fields"):
        sweep(base, {"seed": 0})


@pytest.mark.skipif(os.name != "posix", reason="there is no /proc that nobody can write")
def test_a_folder_that_cannot_be_written_is_a_sentence():
    with pytest.raises(OSError, match="cannot be written .*free space or choose another runs_dir"):
        sweep({"runs_dir": "/proc/runs"}, {"seed": 0}, with_dense=False)


@pytest.mark.parametrize("options, sentence", [
    ({"executor": "locl"}, "There is no executor called 'locl'. Did you mean 'local'?"),
    ({"options": {"worker": 2}}, "Did you mean 'workers'?"),
    ({"options": {"workers": -1}}, "workers is at least 0"),
    ({"options": {"workers": "two"}}, "workers is a number such as"), ({"options": {"workers": 1.5}}, "workers is a whole number; got 1.5"),
    ({"options": {"gpus": "all"}}, "gpus is how many GPUs, or a list of their names"), ({"options": {"gpus": True}}, "gpus is how many GPUs"),
    ({"options": {"gpus": 99}}, "and 99 are asked for"),
    ({"notebook": "no/such.ipynb"}, "There is no notebook")])
def test_an_executor_that_cannot_be_is_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?")):
        sweep({}, {"seed": 0}, **options)


@pytest.mark.parametrize("executor, module, extra", [("ray", "ray", "ray"), ("slurm", "submitit", "slurm"), ("local", "papermill", "lab")])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, executor, module, extra):
    there = importlib.util.find_spec
    monkeypatch.setattr(executors_module, "find_spec", lambda name: None if name == module else there(name))
    with pytest.raises(ImportError, match=rf"needs {module}, which is not installed: pip install 'sparselab\[{extra}\]'"):
        sweep({}, {"seed": 0}, executor=executor)
    assert f"\n{extra}_requirements" in (ROOT / "settings.ini").read_text()


@pytest.mark.parametrize("package, call, sentence", [
    ("pandas", lambda: front(None), r"^The table of a front needs pandas, which is not installed: pip install 'sparselab\[lab\]'"),
    ("yaml", lambda: read_sweep("sweep.yaml"), r"^A sweep in a file needs yaml, which is not installed: pip install 'sparselab\[lab\]'"),
    ("IPython", lambda: show(None), r"IPython is not installed: pip install 'sparselab\[lab\]'"),
    ("transformers", lambda: Config(model="hub:some/net").run_id, "^model 'hub:some/net' is built by transformers, which cannot be imported")])
def test_a_package_that_is_missing_is_a_sentence(monkeypatch, package, call, sentence):
    monkeypatch.delenv("IN_TEST", raising=False)
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:  # also those that another test has loaded
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises((ImportError, ValueError), match=sentence):
        call()


# grids

def test_a_list_of_grids_is_their_union_and_every_point_is_there_once():
    points = expand({"epochs": 3}, [{"method": ["set", "rigl"], "seed": [0, 1]}, {"method": "rigl", "seed": "1..2"}], with_dense=False)
    assert [(point.config.method, point.config.seed) for point in points] == [("set", 0), ("set", 1), ("rigl", 0), ("rigl", 1), ("rigl", 2)]


def test_without_a_grid_the_base_is_the_only_point():
    assert [point.config for point in expand({"method": "rigl", "seed": 3}, with_dense=False)] == [Config(method="rigl", seed=3)]


def test_options_are_axes_too_and_keep_the_others():
    points = expand(Config(method="rigl", method_options={"update_every": 7}), {"method_options.drop_fraction": [0.1, 0.5]}, with_dense=False)
    assert [point.config.method_options for point in points] == [{"update_every": 7, "drop_fraction": 0.1}, {"update_every": 7, "drop_fraction": 0.5}]


def test_partners_come_first_and_only_once_each():
    points = expand({"eps": 0.05}, {"method": ["rigl", "dense"], "sparsity": [0.9, 0.99], "eps": [0.05, 0.1], "seed": "0..1"})
    partners = [point for point in points if point.config.method == "dense"]
    assert points[:len(partners)] == partners and len(partners) == 2 * 2 and len(points) == 4 + 8
    assert all(point.config == dense_partner(point.config) and not point.with_dense for point in partners)


@pytest.mark.parametrize("text, sentence", [("base: [", "is not YAML"), ("- 1", "is no sweep"), ("bse: {}", "Did you mean 'base'")])
def test_a_file_that_is_no_sweep_is_refused(tmp_path, text, sentence):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_sweep(tmp_path / "sweep.yaml")


def test_json_is_read_as_well(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"base": {"eps": "8/255"}, "grid": {"seed": "0..2"}, "with_dense": False}))
    assert [point.config.eps for point in expand(**read_sweep(tmp_path / "sweep.json"))] == [8 / 255] * 3


# the loop, with an executor that executes nothing

class Told(Executor):
    """Writes what a run leaves; `script`: run's method -> what happens to its process, one after another ("" is a run that ends)."""

    def __init__(self, slots, script=None):
        self.slots, self.script, self.now, self.got = slots, script or {}, [], []

    def room(self):
        return self.slots - len(self.now)

    def submit(self, jobs):
        assert len(jobs) <= self.room()
        self.now += jobs
        self.got += jobs

    def ended(self):
        done, self.now = self.now, []
        return [(job, self.play(job)) for job in done]

    def play(self, job):
        acts = self.script.get(job.parameters.get("method", "dense"), [])
        act = acts.pop(0) if acts else ""
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        if act == "fails":
            error = nbformat.v4.new_output("error", ename="ValueError", evalue="a sentence.", traceback=[])
            nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[error])]), job.failed)
            return ""
        if not act:
            job.executed.write_text("{}")
            (Path(job.folder) / "summary.json").write_text("{}")
        return act

    def close(self):
        self.now = None


def played(tmp_path, script, retries=2, slots=2):
    told = Told(slots, script)
    done = sweep({"runs_dir": str(tmp_path / "runs")}, {"method": ["rigl", "set"], "seed": 0}, told, retries=retries, progress=False)
    return told, done


def test_a_process_that_dies_is_started_again_and_a_cell_that_raises_is_not(tmp_path):
    told, done = played(tmp_path, {"rigl": ["killed", "killed"], "set": ["fails", ""]})
    assert [job.parameters["method"] for job in told.got] == ["dense", "rigl", "set", "rigl", "rigl"]
    assert list(done.failed.values()) == ["ValueError: a sentence."] and [run.path.name[:4] for run in done.runs] == ["dens", "rigl"]
    assert told.now is None, "the executor is closed"


def test_a_process_that_dies_too_often_is_listed(tmp_path):
    _, done = played(tmp_path, {"rigl": ["it was killed"] * 5})
    assert list(done.failed.values()) == ["it was killed; it was tried 3 times"]


def test_a_run_whose_partner_has_failed_is_compared_with_nothing(tmp_path):
    told, done = played(tmp_path, {"dense": ["fails"]})
    assert [job.parameters["with_dense"] for job in told.got] == [False, False, False] and len(done.runs) == 2
    told, done = played(tmp_path, {})  # tried again at the next call; the others have finished
    assert [job.parameters["method"] for job in told.got] == ["dense"] and not done.failed


def test_the_next_call_trains_what_is_missing(tmp_path):
    first, done = played(tmp_path, {"set": ["fails"]})
    second, again = played(tmp_path, {})
    assert [job.parameters["method"] for job in second.got] == ["set"] and len(again.runs) == 3 and (done.trained, again.trained) == (3, 1)


def test_data_that_are_missing_are_a_failure_of_their_runs_alone(tmp_path):
    told = Told(2)
    done = sweep({"runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path)}, {"dataset": ["digits", "nowhere"], "method": "rigl", "seed": 0},
                 told, progress=False)
    assert len(done.runs) == 2 and len(told.got) == 2 and list(done.failed) == ["dense-nowhere-s0", "rigl-nowhere-s0"]
    assert "nowhere" in done.failed["rigl-nowhere-s0"]
    states = done.table.set_index("dataset")["state"]
    assert "nowhere" in states["nowhere"].iloc[1]


def test_a_job_that_another_sweep_executes_comes_last(tmp_path):
    jobs = [Job("n.ipynb", str(tmp_path / name)) for name in "abc"]
    with locked(jobs[0].claim):
        assert [job.name for job in Crew(Told(1), jobs).ready()] == ["b", "c", "a"]


def test_a_cluster_that_goes_away_is_a_sentence_and_the_executor_is_closed(tmp_path):
    class Gone(Told):
        def ended(self):
            raise ConnectionError("The cluster does not answer any more.")
    gone = Gone(2)
    with pytest.raises(ConnectionError, match="does not answer"):
        execute_all([Job("n.ipynb", str(tmp_path / "a"))], gone, progress=False)
    assert gone.now is None


def test_the_parameters_of_a_job_give_the_run_its_name():
    config = Config(method="rigl", sparsity=0.9, eps=8 / 255, method_options={"update_every": 9}, seed=2**53 + 1, runs_dir="runs")
    (point,) = expand(config, {"seed": config.seed}, with_dense=False)
    job = job_of(point, train_notebook())
    read = Config.read({name: value for name, value in json.loads(json.dumps(job.parameters)).items() if name != "with_dense"})
    assert read.run_id == job.name == config.run_id and Path(read.runs_dir) == Path.cwd() / "runs"


def test_a_data_set_of_two_names_is_trained_once(tmp_path, monkeypatch):
    """A path counts from where the sweep is, and a notebook may count from elsewhere."""
    path = own_data((np.random.default_rng(0).random((40, 3)), [0, 1] * 20), folder=tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    short, executor = str(Path(path).relative_to(tmp_path)), Told(2)
    stand_in = notebook(tmp_path / "stand_in.ipynb", PARAMETERS)
    done = sweep({"runs_dir": "runs", "model": "mlp"}, {"dataset": [short, path]}, executor=executor, with_dense=False, notebook=str(stand_in),
                 progress=False)
    assert [job.parameters["dataset"] for job in executor.got] == [path] and len(done.points) == 2 and not done.failed


# the search for fronts

class Formula(Told):
    """Writes accuracies that a formula gives; with `until`, the process that asks is killed at that call."""

    def __init__(self, until=None):
        super().__init__(2)
        self.until = until

    def ended(self):
        if self.until is not None:
            self.until -= 1
            if self.until < 0:
                raise KeyboardInterrupt
        return super().ended()

    def play(self, job):
        eps = job.parameters.get("eps", 0.1)
        Path(job.folder).mkdir(parents=True)
        job.executed.write_text("{}")
        write_sealed(Path(job.folder) / "summary.json", {"accuracy": {"clean": 1 - eps, "verified": min(eps, 0.2 - eps)}})
        return ""


@needs_optuna
def test_a_search_that_was_killed_goes_on_with_what_was_being_trained(tmp_path):
    base, space, killed, after = {"runs_dir": str(tmp_path)}, {"eps": "0.0..0.2"}, Formula(until=2), Formula()
    with pytest.raises(KeyboardInterrupt):
        search(base, space, 8, executor=killed, progress=False)
    study = search(base, space, 8, executor=after, progress=False)
    trials = [trial for trial in study.trials if trial.values]
    assert len(trials) == 8 and [job.folder for job in after.got[:2]] == [job.folder for job in killed.got[-2:]]
    best = front(study)
    assert not any((best[best["clean"] > row.clean]["verified"] >= row.verified).any() for row in best.itertuples()), "one row is worse in both"
    assert search(base, space, 8, executor=(idle := Formula()), progress=False).trials and idle.got == []
    with pytest.raises(ValueError, match="is about clean, verified, not clean"):
        search(base, space, 8, goals=("clean",), executor=Formula(), progress=False)


@needs_optuna
def test_a_search_is_never_that_of_other_data_or_of_another_base(tmp_path):
    """It returned the trials of the first base as those of the second."""
    table = np.random.default_rng(0).random((40, 3)), [0, 1] * 20
    one, other = (own_data((table[0] * share, table[1]), folder=tmp_path / "data") for share in (1.0, 0.5))
    base, space = {"runs_dir": str(tmp_path / "runs"), "dataset": one, "epochs": 3, "model": "mlp"}, {"eps": [0.1, 0.2]}
    search(base, space, 2, executor=Formula(), progress=False)
    for changes, name in (({"dataset": other}, "dataset"), ({"epochs": 4}, "epochs"), ({"seed": 1}, "seed"), ({"method": "rigl"}, "method")):
        with pytest.raises(ValueError, match=f"^The study in .* is about other trials: {name} was "):
            search({**base, **changes}, space, 2, executor=Formula(), progress=False)
    assert len(search(base, {"eps": [0.1, 0.2], "seed": "0..9"}, 3, executor=Formula(), progress=False).trials) == 3, "the space may grow"


@needs_optuna
@pytest.mark.parametrize("space, goals, sentence", [({"epz": "0..1"}, ("clean",), "Did you mean 'eps'"),
                                                    ({"eps": [0.1]}, ("cleen",), "Did you mean 'clean'")])
def test_a_search_for_what_there_is_not_is_refused(tmp_path, space, goals, sentence):
    with pytest.raises(ValueError, match=sentence):
        search({"runs_dir": str(tmp_path / "runs")}, space, 2, goals=goals)
    assert not (tmp_path / "runs").exists()


@needs_optuna
def test_a_proposal_that_cannot_be_trained_is_told_and_counts(tmp_path):
    study = search({"runs_dir": str(tmp_path)}, {"dataset": ["nowhere"]}, 2, executor=Formula(), progress=False)
    assert ["nowhere" in trial.user_attrs["sentence"] for trial in study.trials] == [True, True] and len(front(study)) == 0


def test_a_search_without_optuna_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(executors_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"A search for fronts needs optuna, .*'sparselab\[search\]'"):
        search({"runs_dir": str(tmp_path)}, {"eps": "0..0.1"}, 2, executor=Formula())


# with processes

def test_a_failure_stops_no_other_and_is_listed_and_every_run_is_trained_once(tmp_path):
    stand_in = notebook(tmp_path / "stand_in.ipynb", PARAMETERS, BEGIN, "if seed == 1:\n    raise ValueError('one is too few')", END)
    grid = {"method": "rigl", "seed": "0..2"}
    done, again = (sweep({"runs_dir": str(tmp_path / "runs")}, grid, notebook=str(stand_in), with_dense=False, options={"workers": 2}, progress=False)
                   for _ in range(2))
    assert done.failed == again.failed == {done.points[1].name: "ValueError: one is too few"}
    assert len(done.runs) == 2 and set(trained(tmp_path / "runs").values()) == {1} and (done.trained, again.trained) == (3, 1)
    assert again.table["state"].tolist()[1] == "ValueError: one is too few"


def alive(pid: int) -> bool:
    """Whether there is a process of this number that is no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_when_a_sweep_is_killed_its_workers_and_kernels_end(tmp_path):
    stand_in = notebook(tmp_path / "stand_in.ipynb", PARAMETERS, BEGIN,
                        "import os, time\n(folder / 'pids').write_text(f'{os.getppid()} {os.getpid()}')\ntime.sleep(600)")
    code = (f"from sparselab.scale import sweep\nsweep({{'runs_dir': {str(tmp_path / 'runs')!r}}}, {{'method': 'rigl', 'seed': 0}}, "
            f"with_dense=False, notebook={str(stand_in)!r}, options={{'workers': 1}})")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as killed:
        try:
            while not (found := list((tmp_path / "runs").glob("*/pids"))) or len(found[0].read_text().split()) < 2:
                assert killed.poll() is None
                time.sleep(0.1)
        finally:
            killed.kill()
    pids = [int(pid) for pid in found[0].read_text().split()]
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_every_gpu_slot_sees_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    local = Local(gpus=2, per_gpu=2)
    assert (local.room(), local._devices) == (4, ["4", "6", "4", "6"])
    stand_in = notebook(tmp_path / "stand_in.ipynb", "folder: str = ''",
                        "import os\nopen(f'{folder}/summary.json', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'] + os.environ['OMP_NUM_THREADS'])")
    job = Job(str(stand_in), str(tmp_path / "run"), {"folder": str(tmp_path / "run")})
    execute_all([job], Local(gpus=["6"]), progress=False)
    assert (tmp_path / "run" / "summary.json").read_text() == "61"


def test_the_worker_and_its_kernel_keep_the_environment_and_the_package(tmp_path):
    stand_in = notebook(tmp_path / "stand_in.ipynb", "folder: str = ''",
                        "import json, sys, sparselab\njson.dump([sys.prefix, sparselab.__file__], open(f'{folder}/summary.json', 'w'))")
    job = Job(str(stand_in), str(tmp_path / "run"), {"folder": str(tmp_path / "run")}, cwd=str(tmp_path))
    execute_all([job], Local(1), progress=False)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == [sys.prefix, str(ROOT / "sparselab" / "__init__.py")]


# a run of a sweep is the single run, to the bit

CLOCK = ("seconds", "runs_dir", "data_dir", "blake2b")


def untimed(value):
    """`value` without what a clock or the place of the folder has put into it."""
    if isinstance(value, dict):
        return {key: untimed(part) for key, part in value.items() if key not in CLOCK}
    return [untimed(part) for part in value] if isinstance(value, list) else value


def facts(folder: Path) -> dict:
    """Every file of a run that is no notebook: tensors and masks as bytes, texts without times."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".safetensors", ".bin") and "checkpoint" not in name:
            found[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            found[name] = untimed(read_rows(path))
        elif path.suffix == ".json":
            found[name] = untimed(json.loads(path.read_text()))
    return found


def same_as_single_runs(done, tmp_path) -> int:
    """Train every point of a sweep alone, in this process, and compare all files; returns how many there were."""
    count = 0
    for point in done.points:
        one = Config.read({**done_values(point), "runs_dir": str(tmp_path / "single")})
        alone, other = facts(train(one, callbacks=()).path), facts(done.folder / point.name)
        assert alone.keys() == other.keys()
        for name in alone:
            assert alone[name] == other[name], f"{point.name}/{name}"
            count += 1
    return count


def done_values(point) -> dict:
    return {name: getattr(point.config, name) for name in Config.readers()}


@pytest.mark.usefixtures("all_radii")  # as the runs of other processes do
def test_the_runs_of_a_sweep_are_the_single_runs_to_the_bit(tmp_path):
    base = {**SMALL, "runs_dir": str(tmp_path / "runs")}
    done = sweep(base, {"method": "rigl", "sparsity": [0.5], "seed": 0}, options={"workers": 2}, progress=False)
    assert not done.failed and done.trained == 2
    assert same_as_single_runs(done, tmp_path) > 15
    assert all(json.loads((run.path / "train.ipynb").read_text())["metadata"]["papermill"]["exception"] is None for run in done.runs)
    assert done.table["nnz"].tolist() == [1184, 592] and done.table["state"].tolist() == ["finished", "finished"]
