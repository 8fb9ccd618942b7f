"""The notebooks about papers, their records, and the README's table of them say the same; their runs train side by side."""
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import joblib
import nbformat
import papermill
import pytest
import torch
from executing import executed

from sparselab.learn import claims, papers
from sparselab.learn.claims import Claim, accuracies, collapsed, side_by_side, train_rows
from sparselab.learn.config import Config
from sparselab.learn.experiments import ALL_METHODS, train
from sparselab.learn.learner import TrainingStopped
from sparselab.learn.runs import runs_in

ROOT = Path(__file__).resolve().parents[1]
PAPERS = sorted((ROOT / "nbs" / "papers").glob("*.ipynb"))
RECORDS = sorted((ROOT / "nbs" / "papers" / "records").glob("*.json"))
SECTIONS = ["The idea", "The formula", "By hand", "The claim", "The result", "The verdict", "Deviations", "Limits"]
PARAMETERS = {"scale": "small", "device": "auto", "data_dir": "", "runs_dir": "runs/papers", "records": ""}

every_paper = pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
every_record = pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)


def text(path: Path, kind: str) -> str:
    return "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == kind)


def test_the_readme_shows_the_records(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (copy := tmp_path / "README.md").write_text(readme, encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "nbs" / "papers" / "table.py", "--readme", copy], check=True)
    assert copy.read_text(encoding="utf-8") == readme, "python nbs/papers/table.py writes it"


def test_every_paper_has_claims_or_says_why_not():
    papers = json.loads((ROOT / "nbs" / "papers" / "papers.json").read_text(encoding="utf-8"))
    known = {paper["arxiv"] for paper in papers}
    assert len(papers) == len(known) == 27 and {Claim.load(record).arxiv for record in RECORDS} <= known, "every claim is counted in a row"
    for paper in papers:
        claims = {Claim.load(record).paper for record in RECORDS if Claim.load(record).arxiv == paper["arxiv"]}
        assert bool(claims) != bool(paper.get("instead")), paper["name"]
        assert claims <= set(paper["notebooks"]) and set(paper["methods"]) <= set(ALL_METHODS), paper["name"]


@every_record
def test_a_record_says_what_its_values_say(path):
    record, claim = json.loads(path.read_text()), Claim.load(path)
    assert path.stem == claim.name and (record["verdict"], record["verdicts"]) == (claim.verdict, claim.verdicts)
    for comparison in claim.comparisons:
        assert len(claim.values[comparison.better]) == len(claim.values[comparison.worse]) == len(claim.seeds)
    assert claim.scale in ("small", "full") and claim.seconds >= 0 and record["versions"]["torch"]
    assert claim.whose == "ours" or claim.whose.startswith("paper, ")
    assert all(share > 0 for share in claim.flops.values()) and claim.flops.get("dense", 1) == 1


@every_record
def test_a_record_belongs_to_a_notebook_that_cites_its_paper(path):
    claim = Claim.load(path)
    notebook = ROOT / "nbs" / "papers" / f"{claim.paper}.ipynb"
    assert notebook in PAPERS and claim.arxiv in text(notebook, "markdown")


@every_paper
def test_a_notebook_has_its_record(path):
    assert path.stem in {Claim.load(record).paper for record in RECORDS}


@every_paper
def test_a_notebook_has_the_sections_in_order(path):
    assert re.findall(r"^## (.+)$", text(path, "markdown"), re.M) == SECTIONS
    assert re.search(r"^\| \| paper \| its code \| here \|$", text(path, "markdown"), re.M), "the table of deviations"
    assert "show(" in text(path, "code"), "a picture"


@every_paper
def test_a_notebook_takes_the_parameters_of_all(path):
    found = papermill.inspect_notebook(str(path))
    defaults = {name: eval(parameter["default"]) for name, parameter in found.items()}
    assert PARAMETERS.items() <= defaults.items() and len(set(defaults["seeds"])) == len(defaults["seeds"]) >= 3
    assert all(len(parameter["help"]) > 10 for parameter in found.values())
    assert found["seeds"]["inferred_type_name"] == "list", "declared, so that a text is read as a list"


def places(folder: Path) -> dict[str, str]:
    """Parameters of a notebook that writes to `folder` alone."""
    return {"runs_dir": str(folder / "runs"), "records": str(folder / "records"), "device": "cpu"}


def check_one_seed(folder: Path, paper: str) -> None:
    found = [Claim.load(record) for record in (folder / "records").glob("*.json")]
    assert found and all(claim.paper == paper and claim.verdict == "undecided" for claim in found), "one seed decides nothing"


def test_a_notebook_writes_its_record(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # processes for rows side by side take longer to start than these rows to train
    monkeypatch.setattr(papers, "at_scale", lambda scale, small, full: replace(small, epochs=8))  # in the fork, too
    notebook = ROOT / "nbs" / "papers" / "sparsevlr.ipynb"
    executed(notebook, tmp_path, **places(tmp_path), seeds="[10]", sparsities="[0.9]")  # as papermill's -p hands it over
    check_one_seed(tmp_path, "sparsevlr")
    assert all(Claim.load(record).seeds == [10] for record in (tmp_path / "records").glob("*.json"))


@pytest.mark.slow
@every_paper
def test_a_notebook_runs_at_small_scale(path, tmp_path):
    try:
        papermill.execute_notebook(str(path), str(tmp_path / path.name), places(tmp_path) | {"seeds": [0]}, progress_bar=False, cwd=tmp_path)
    except papermill.PapermillExecutionError as error:
        if "was not found on this machine" in error.evalue:
            pytest.skip(error.evalue)
        raise
    check_one_seed(tmp_path, path.stem)


def test_rows_that_train_side_by_side_have_the_bits_of_one_run_alone(tmp_path):
    base = Config(model="mlp", model_options={"widths": [16]}, objective="natural", eps=0.0, epochs=2, sparsity=0.8, train_samples=200)
    rows = {"set": {"method": "set"}, "rigl": {"method": "rigl"}, "again": {"method": "set"}}
    runs = train_rows(replace(base, runs_dir=str(tmp_path / "rows")), rows, [0, 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone = train_rows(replace(base, runs_dir=str(tmp_path / "alone")), {"rigl": {"method": "rigl"}}, [1])["rigl"][0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    model = runs["rigl"][1].path / "model.safetensors"
    assert model.read_bytes() == (alone.path / "model.safetensors").read_bytes()
    assert [run.path for run in runs["again"]] == [run.path for run in runs["set"]] and len(runs_in(tmp_path / "rows")) == 4


def test_the_longest_trainings_begin_first_and_rows_come_back_as_they_were_asked_for(monkeypatch):
    begun = []
    monkeypatch.setattr(claims, "side_by_side", lambda work, configs: begun.extend(configs) or [f"{c.method}, {c.epochs}, {c.seed}" for c in configs])
    rows = {"dense": {"method": "dense"}, "5x": {"method": "rigl", "epochs": 15}, "imp": {"method": "imp", "sparsity": 0.9}}
    found = train_rows(Config(dataset="digits", epochs=3), rows, [4, 5])
    assert [(c.method, c.seed) for c in begun] == [("imp", 4), ("imp", 5), ("rigl", 4), ("rigl", 5), ("dense", 4), ("dense", 5)]
    assert found == {"dense": ["dense, 3, 4", "dense, 3, 5"], "5x": ["rigl, 15, 4", "rigl, 15, 5"], "imp": ["imp, 3, 4", "imp, 3, 5"]}


def test_rows_may_be_of_a_method_that_was_added(tmp_path):
    """One that a notebook defines, and puts into METHODS; the processes are others. In both ways: several at a time, and one."""
    code = "\n".join([
        "from dataclasses import dataclass", "from sparselab.learn import Config", "from sparselab.learn.claims import train_rows",
        "from sparselab.sparse.drop_grow import SET", "from sparselab.sparse.sparsify import METHODS",
        "@dataclass(kw_only=True, eq=False, repr=False)", "class Mine(SET):", "    family = 'dynamic'", "METHODS['mine'] = Mine",
        f"base = Config(runs_dir={str(tmp_path)!r}, model='mlp', objective='natural', sparsity=0.9, epochs=1, train_samples=200, test_samples=40)",
        "for seeds in ([0, 1], [2]):", "    for run in train_rows(base, {'mine': {'method': 'mine'}}, seeds)['mine']:",
        "        print(run.name, run.summary['sparsity'])"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split("-")[0] for line in done.stdout.splitlines()] == ["mine"] * 3


def workers(_: object = None) -> set[tuple]:
    """Who works side by side, where, and with which environment."""
    with tempfile.TemporaryDirectory() as folder:
        def work(config: Config) -> tuple:
            (Path(folder) / str(os.getpid())).touch()
            end = time.monotonic() + 20
            while len(os.listdir(folder)) < 2 and time.monotonic() < end:  # so that one worker does not do it all
                time.sleep(0.01)
            return os.getpid(), os.getcwd(), os.environ.get("SPARSELAB_DATA")

        return set(side_by_side(work, [Config(seed=seed, device="cpu") for seed in range(4)]))


def test_workers_stay_unless_folder_or_environment_are_others_and_a_child_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    monkeypatch.setenv("SPARSELAB_DATA", "here")
    first = workers()
    assert len(first) == 2 and workers() == first
    monkeypatch.setenv("SPARSELAB_DATA", "there")
    assert {found[1:] for found in workers()} == {(os.getcwd(), "there")}
    monkeypatch.chdir(tmp_path)
    assert {found[1:] for found in workers()} == {(str(tmp_path), "there")}
    child = multiprocessing.get_context("fork").Process(target=workers)  # whose parent has idle workers, which are not the child's
    child.start()
    child.join(50)  # idle workers end after a minute by themselves
    assert child.exitcode == 0


def test_a_row_that_fails_side_by_side_says_why(tmp_path):
    base = Config(model="mlp", model_options={"widths": [16]}, objective="natural", eps=0.0, epochs=2, runs_dir=str(tmp_path))
    with pytest.raises(TrainingStopped, match="has diverged .* Lower lr"):
        train_rows(base, {"high": {"lr": 1e30, "optimizer": "sgd", "grad_clip": 0.0}, "low": {}}, [0])


def test_a_ticket_whose_rounds_stay_at_chance_is_a_row(tmp_path):
    base = Config(model="mlp", model_options={"widths": [16] * 8}, objective="natural", eps=0.0, epochs=6, optimizer="sgd", lr=1e-7,
                  method="imp", sparsity=0.3, method_options={"rate": 0.2}, train_samples=200, runs_dir=str(tmp_path))
    with pytest.raises(TrainingStopped, match="has been at chance level"):
        train(replace(base, seed=1), [])
    runs = train_rows(base, {"imp": {}}, [0])
    assert runs["imp"][0].finished and len(runs["imp"][0].rounds) == 2 and collapsed(runs) == {"imp": [0]}
    assert 0.02 < accuracies(runs)["imp"][0] < 0.25
