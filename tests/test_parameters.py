"""Every parameter of every notebook is read as what it means, however papermill was given it; nothing but the reading is executed."""
import base64
import json
from functools import lru_cache
from pathlib import Path

import nbformat
import pytest
import yaml
from papermill.cli import _resolve_type
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from sparselab.learn.runs import examples

NBS = Path(__file__).resolve().parents[1] / "nbs"


def has_parameters(path: Path) -> bool:
    return any("parameters" in cell["metadata"].get("tags", ()) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])


NOTEBOOKS = [path for path in sorted(NBS.rglob("*.ipynb")) if has_parameters(path)]
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem if path.parent == NBS else f"{path.parent.name}/{path.stem}")


@lru_cache
def opened(path: Path) -> nbformat.NotebookNode:
    """The notebook as papermill opens it, up to the cell in which the parameters are read."""
    notebook = load_notebook_node(str(path))
    codes = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    notebook.cells = notebook.cells[:codes[1] + 1]
    return notebook


def executed(path: Path, parameters: dict) -> dict:
    """The globals of the notebook, given `parameters` by papermill, after the cell in which they are read."""
    notebook = parameterize_notebook(opened(path), parameters)
    namespace = {"In": [""]}
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        namespace["In"].append(cell.source)
        exec(cell.source, namespace)
        if "read_parameters(" in cell.source or "from_notebook(" in cell.source:
            return namespace
    raise AssertionError(f"{path} does not read its parameters")


@lru_cache
def defaults(path: Path) -> dict:
    namespace = executed(path, {})
    return {name: namespace[name] for name in namespace["__annotations__"]}


def text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@every
def test_the_parameters_are_read_before_anything_else_is_done(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", ()))
    assert at == 0 and any(word in cells[1].source for word in ("read_parameters(globals())", "from_notebook(globals()"))


WAYS = {"-p": lambda value: _resolve_type(text(value)), "-r": text, "-y": lambda value: yaml.safe_load(json.dumps(value)),
        "-b": lambda value: yaml.safe_load(base64.b64decode(base64.b64encode(json.dumps(value).encode())))}


@every
@pytest.mark.parametrize("way", WAYS)
def test_each_default_given_as_papermill_gives_it_is_the_default(path, way):
    wanted = defaults(path)
    found = executed(path, {name: WAYS[way](value) for name, value in wanted.items()})
    for name, value in wanted.items():
        assert found[name] == value and type(found[name]) is type(value), name


OTHERS = {int: ("3", 3), float: ("8/255", 8 / 255), bool: ("false", False), list: ("[10, 11]", [10, 11]),
          dict: ("{'cnn4': {'width': 2}}", {"cnn4": {"width": 2}}), str: ("elsewhere", "elsewhere")}
CHECKED = {"dataset", "method", "model", "objective", "engine", "kernels", "device", "optimizer", "schedule", "distribution",
           "init"}  # by whoever looks them up


@every
@pytest.mark.parametrize("way", ["-p", "-r"])
def test_other_values_are_read_as_what_they_mean(path, way):
    wanted = {name: OTHERS[type(value)] for name, value in defaults(path).items() if name not in CHECKED}
    found = executed(path, {name: WAYS[way](given) for name, (given, _) in wanted.items()})
    for name, (_, value) in wanted.items():
        assert found[name] == value and type(found[name]) is type(value), name


@every
def test_a_name_that_is_no_parameter_is_refused_with_the_nearest(path):
    name = max(defaults(path), key=len)
    with pytest.raises(ValueError, match=f"no parameter called '{name}x'. Did you mean '{name}'"):
        executed(path, {f"{name}x": 1})


@every
def test_the_names_that_papermill_injects_are_accepted(path):
    injected = {f"PAPERMILL_{name.upper()}": str(path) for name in ("input_path", "output_path")}
    assert executed(path, injected)["PAPERMILL_INPUT_PATH"] == str(path)


@every
@pytest.mark.parametrize(("kind", "value"), [(int, "1.5"), (float, "eight"), (bool, "maybe"), (list, 3), (dict, "50"), (str, 7)])
def test_a_value_of_another_type_is_refused_by_name(path, kind, value):
    for name, default in defaults(path).items():
        if type(default) is kind:
            with pytest.raises(ValueError, match=f"^{name} .*got {value!r}"):
                executed(path, {name: value})


def test_a_large_seed_keeps_its_digits():
    train = NBS / "train.ipynb"
    for given in ("9007199254740993", 2**53 + 1):
        assert executed(train, {"seed": given})["config"].run_id.endswith("-s9007199254740993")


def test_without_dense_is_without_dense():
    assert executed(NBS / "train.ipynb", {"with_dense": _resolve_type("false")})["with_dense"] is False


def test_a_notebook_finds_its_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (examples() / "sparsevlr" / "config.json").is_file()
    for name in ("explore", "compare"):
        namespace = executed(NBS / f"{name}.ipynb", {"run" if name == "explore" else "runs_dir": str(examples() / "rigl")})
        cells = [cell for cell in nbformat.read(NBS / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
        exec(cells[2].source.rsplit("\n", 1)[0], namespace)
        found = namespace["first"].path if name == "explore" else Path(namespace["folder"])
        assert found == examples() / "rigl"
