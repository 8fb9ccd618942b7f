"""What every committed notebook keeps to, and what the README promises about them."""
import ast
import importlib
import json
import os
import re
import struct
import subprocess
import sys
from base64 import b64decode
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
from lab import AT_ONCE

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = sorted(path for path in (ROOT / "sparselab").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py", "_surface.py"))
LIMIT = {"nbs/train.ipynb": 1_000_000}  # bytes; 300 kB for all others
BELOW = {  # wing -> the wings that it may import
    "sparse": set(),
    "robust": set(),
    "learn": {"sparse", "robust"},
    "view": {"learn", "sparse", "robust"},
    "scale": {"view", "learn", "sparse", "robust"},
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@lru_cache
def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def default_exp(path: Path) -> str | None:
    found = [re.match(r"#\|\s*default_exp\s+(\S+)", source(cell)) for cell in code_cells(path)]
    return next((match[1] for match in found if match), None)


def is_experiment(path: Path) -> bool:
    """Every notebook that exports no module is run through papermill."""
    return default_exp(path) is None


LIBRARY = [path for path in NOTEBOOKS if not is_experiment(path)]
EXPERIMENTS = [path for path in NOTEBOOKS if is_experiment(path)]
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
library = pytest.mark.parametrize("path", LIBRARY, ids=relative)


@every
def test_is_small_and_without_widget_state_or_errors(path):
    notebook = load(path)
    assert path.stat().st_size <= LIMIT.get(relative(path), 300_000)
    assert "widgets" not in notebook["metadata"], "a FigureWidget or slider was displayed; show a plain figure"
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert [output["evalue"] for output in outputs if output["output_type"] == "error"] == []


def shows(cell: dict) -> bool:
    """Whether a cell prints or draws whatever happens: by a call of print or show in no function, under no condition, in a loop over a display."""
    lines = ast.parse(source(cell)).body
    for line in lines:
        over = getattr(line, "iter", None)
        over = over.func.value if isinstance(over, ast.Call) and isinstance(over.func, ast.Attribute) else over
        lines += line.body if isinstance(line, ast.For) and isinstance(over, ast.Dict | ast.List | ast.Tuple) else []
    calls = [line.value.func for line in lines if isinstance(line, ast.Expr) and isinstance(line.value, ast.Call)]
    return any(getattr(call, "id", getattr(call, "attr", "")) in ("print", "show") for call in calls)


@every
def test_a_cell_that_prints_or_draws_has_its_output(path):
    """What the text around it speaks of is there for who reads the notebook on a page."""
    assert [i for i, cell in enumerate(code_cells(path)) if shows(cell) and not cell["outputs"]] == []


@pytest.mark.parametrize("name", ["explorer", "live_explorer"])
def test_the_workbench_shows_its_panels_where_there_is_no_kernel(name):
    """As pictures, made by tests/screenshot.py: what a widget shows is gone with its kernel."""
    (cell,) = [cell for cell in code_cells(ROOT / "nbs" / "explore.ipynb") if source(cell).endswith(f"\n{name}")]
    (output,) = cell["outputs"]
    png = b64decode(output["data"]["image/png"])
    width, height = struct.unpack(">II", png[16:24])
    assert width > 900 and height > 600 and set(output["data"]) == {"image/png", "text/plain"}


@every
def test_can_be_executed_by_papermill_and_traced_by_nbdev(path):
    notebook = load(path)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5), "cell ids need nbformat 4.5"


@every
def test_begins_with_a_title_and_one_line(path):
    first = load(path)["cells"][0]
    assert first["cell_type"] == "markdown" and re.match(r"# .+\n+> .+", source(first))


@library
def test_library_notebook_is_numbered_and_takes_no_parameters(path):
    assert re.match(r"\d\d", path.name), "nbdev_test in `make test` runs the notebooks whose name begins with a number"
    assert not any("parameters" in cell["metadata"].get("tags", ()) for cell in code_cells(path))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=relative)
def test_experiment_has_one_parameters_cell_and_exports_nothing(path):
    cells = code_cells(path)
    tags = Counter(tag for cell in cells for tag in cell["metadata"].get("tags", ()))
    assert tags["parameters"] == 1 and tags["injected-parameters"] == 0
    assert not any(re.match(r"#\|\s*export", source(cell)) for cell in cells)


def test_no_two_notebooks_share_a_module():
    modules = Counter(map(default_exp, LIBRARY))
    assert [name for name, count in modules.items() if count > 1] == []


def test_every_module_has_its_notebook_and_the_reverse():
    exported = {f"sparselab/{default_exp(path).replace('.', '/')}.py" for path in LIBRARY}
    assert exported == set(map(relative, MODULES))


def imported(module: Path) -> list[list[str]]:
    """Dotted names imported anywhere in a module, at its top or inside a function, in parts."""
    package = list(module.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return [name.split(".") for name in names if name.startswith("sparselab.")]


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_imports_point_downward(module):
    wing = module.relative_to(ROOT / "sparselab").parts[0]
    allowed = BELOW[wing] | {wing} if wing in BELOW else set()  # a module outside the wings stands below all of them
    assert {parts[1] for parts in imported(module)} & set(BELOW) <= allowed


def test_a_notebook_of_view_imports_only_what_one_reads_before_it():
    """In figures/, runs/ and explorer/ the number of a notebook is its place in the reading order, and imports point to smaller ones."""
    place = {default_exp(path): int(path.name[:2]) for path in LIBRARY if path.parent.parent == ROOT / "nbs" / "view"}
    assert sorted(place.values()) == list(range(len(place)))
    for name, number in place.items():
        module = ROOT / "sparselab" / f"{name.replace('.', '/')}.py"
        for parts in imported(module):
            assert place.get(".".join(parts[1:4]), -1) < number, f"{name} imports {'.'.join(parts)}"


LATER = {("robust.verification", "robust.cascade")}  # verify(budget=...) is decide(...), which begins with verify: the call itself goes round


def test_no_imports_go_round():
    """Not through a function and not for types either, but for LATER. A name of a wing stands for the module that defines it."""
    modules = {relative(path)[len("sparselab/"):-len(".py")].replace("/", "."): path for path in MODULES}
    homes = {f"{wing}.{name}": f"{wing}.{home}" for wing in BELOW for name, home in importlib.import_module(f"sparselab.{wing}")._HOME.items()}
    below = {}
    for name, path in modules.items():
        dotted = [".".join(parts[1:]) for parts in imported(path)]
        places = [homes.get(each, each) for each in dotted]
        found = {place if place in modules else place.rpartition(".")[0] for place in places}
        below[name] = {each for each in found & modules.keys() if each != name and (name, each) not in LATER}
    assert sum(map(len, below.values())) > 3 * len(modules), "the imports are not read"
    while settled := [name for name, needs in below.items() if not needs & below.keys()]:
        for name in settled:
            del below[name]
    assert below == {}, "these modules import each other"


def tracked() -> list[Path]:
    """Files of the repository: git's list, or without git everything that is not hidden or generated."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    tops = [ROOT / name for name in ("nbs", "sparselab", "tests")]
    return [path for top in tops for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_no_file_names_a_place_on_somebody_s_machine():
    anywhere = re.compile(r"(?<![\w.~}])/(?:home|root|Users|work|mnt|srv|private)/[\w.]|\b[A-Z]:\\\\?Users")
    here = [str(place) for place in (ROOT, Path(sys.prefix), Path.home()) if len(str(place)) > len("/root")]
    found = []
    for path in tracked():
        if path.suffix not in {".png", ".svg", ".jpg", ".gz", ".npz", ".safetensors", ".bin"}:
            text = path.read_text(encoding="utf-8")
            found += [f"{relative(path)}: {match[0]}" for match in anywhere.finditer(text)]
            found += [f"{relative(path)}: {place}" for place in here if place in text]
    assert found == []


@every
def test_outputs_name_no_temporary_folder(path):
    outputs = json.dumps([cell["outputs"] for cell in code_cells(path)])
    assert re.findall(r"/tmp/\w+|/var/folders/\w+", outputs) == []


def commands(document: str) -> list[str]:
    """Lines of the fenced shell blocks of a document, without comments; continued lines joined."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_the_documents_exist(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {line.split()[1] for line in commands(document) if line.startswith("make ")}
    assert named and named <= targets


def test_papermill_lines_of_the_readme_name_real_parameters():
    from papermill import inspect_notebook

    lines = [line for line in commands("README.md") if "papermill " in line]
    assert lines
    for line in lines:
        notebook = re.search(r"\S+\.ipynb", line)[0]
        named = set(re.findall(r"-p (\S+)", line))
        assert named <= set(inspect_notebook(str(ROOT / notebook))), line


def markdown(path: Path) -> str:
    """The text of a document, or of the Markdown cells of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(source(cell) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")


def anchors(path: Path) -> set[str]:
    """What a link may name after #: the headings as code hosts write them, and as JupyterLab does."""
    text = re.sub(r"^```.*?^```", "", markdown(path), flags=re.M | re.S)
    heads = [re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", head).strip() for head in re.findall(r"^#+ (.+)$", text, re.M)]
    hosts = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
    return {*hosts, *(head.replace(" ", "-") for head in heads), *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


def links(path: Path) -> list[str]:
    """Targets inside the project that a document or a notebook links to or shows."""
    text = re.sub(r"^```.*?^```", "", markdown(path), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def broken_links(path: Path) -> list[str]:
    broken = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    return broken


DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "data").glob("*.md")), *NOTEBOOKS]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if links(path)], ids=relative)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "a.md").write_text("# A `b` c!\n[1](a.md#a-b-c) [2](a.md#a-b) [3](c.md) [4](#a-b-c) `[5](d.md)` [6](https://x.org/e.md)")
    assert broken_links(tmp_path / "a.md") == ["a.md#a-b", "c.md"]


@pytest.mark.parametrize("script", ["nbs/run.py", "nbs/papers/table.py", "nbs/example/make.py", "tests/screenshot.py"])
def test_a_script_that_is_asked_for_help_helps_and_does_nothing(script):
    before = {path: path.stat().st_mtime_ns for path in tracked()}
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.lower().startswith("usage: "), done.stderr
    assert {path: path.stat().st_mtime_ns for path in tracked()} == before


def test_root_may_open_jupyterlab():
    lab = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "-m jupyterlab" in lab and ("--allow-root" in lab) == (os.getuid() == 0)
    assert AT_ONCE in lab  # as the browser tests and the bench have it


def test_python_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
