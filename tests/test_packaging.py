"""`pip install .` alone gives a working library, and `import sparselab` stays cheap."""
import ast
import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("plotly", "ipywidgets", "anywidget", "papermill", "auto_LiRPA", "nbdev", "fastcore", "datasets", "IPython",
            "pyarrow", "PIL", "pytest", "kaleido", "matplotlib", "numba", "pandas", "ray", "submitit", "optuna")
HEAVY = ("torch", "numpy", "sklearn", *OPTIONAL)
WINGS = ("sparse", "robust", "learn", "view", "scale")
PUBLIC = ("sparselab", *(f"sparselab.{wing}" for wing in WINGS))


def python(*arguments, executable=sys.executable, cwd=None):
    """Standard output of a Python that sees neither this process's path nor the user's packages."""
    done = subprocess.run([executable, "-I", *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(distribution: metadata.Distribution, seen: set[str]) -> set[str]:
    """Names of the installed distributions that `distribution` requires, directly or not, without extras."""
    for requirement in map(Requirement, distribution.requires or ()):
        name = canonical(requirement.name)
        if name not in seen and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            seen.add(name)
            required(metadata.distribution(name), seen)
    return seen


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, so that build/ and *.egg-info do not appear in the repository."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "settings.ini", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in [*(path for kind in ("*.py", "*.js", "*.css") for path in (ROOT / "sparselab").rglob(kind)), ROOT / "sparselab/py.typed"]:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", target, source)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def packed(wheel):
    """What the wheel says of itself."""
    info = next(path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return metadata.PathDistribution(info)


@pytest.fixture(scope="module")
def bare(wheel, packed, tmp_path_factory):
    """Python of a new venv that holds sparselab's wheel and exactly what its metadata requires.

    The required packages are linked from this environment; pip, kept offline, then has to find nothing missing.
    """
    folder = tmp_path_factory.mktemp("bare")
    python("-m", "venv", "--without-pip", folder)
    executable = next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())
    packages = Path(python("-c", "import sysconfig as s; print(s.get_path('purelib'))", executable=executable).strip())
    for name in required(packed, set()):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                os.symlink(distribution.locate_file(top), link)
    python("-m", "pip", "--isolated", "--python", executable, "install", "--quiet", "--no-index", wheel)
    return executable


def test_the_wheel_holds_every_module(wheel):
    kinds = (".py", ".js", ".css")  # what runs in the browser is package data
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(kinds)}
    assert packed == {path.relative_to(ROOT).as_posix() for kind in kinds for path in (ROOT / "sparselab").rglob(f"*{kind}")}
    assert "sparselab/view/explorer/canvas.js" in packed


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "sparselab").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_wheel_says_who_it_is(packed):
    assert packed.metadata["Name"] == "sparselab" and packed.metadata["Requires-Python"] == ">=3.11"
    assert packed.metadata.get_all("Provides-Extra") == ["lab", "hub", "text", "fast", "onnx", "lirpa", "ray", "slurm", "search", "dev"]
    assert any(file.name == "LICENSE" for file in packed.files)
    plain = [Requirement(line) for line in packed.requires if "extra ==" not in line]
    assert sorted(requirement.name for requirement in plain) == ["filelock", "joblib", "numpy", "safetensors", "scikit-learn", "scipy", "torch"]


def test_runtime_requirements_suffice(bare, tmp_path):
    code = f"""
import importlib, json, pkgutil, sys
for name in {OPTIONAL!r}:
    assert importlib.util.find_spec(name) is None, f"{{name}} is in the bare environment, which then proves nothing"
import sparselab
names = [m.name for m in pkgutil.walk_packages(sparselab.__path__, "sparselab.", onerror=lambda name: None)]
names = [name for name in names if name.split(".")[1] != "view"]
for name in names:
    importlib.import_module(name)
for public in sparselab.__all__:
    getattr(sparselab, public)
try:
    import sparselab.view
    message = ""
except ImportError as error:
    message = str(error)
print(json.dumps([sparselab.__file__, names, message]))
"""
    where, names, message = json.loads(python("-c", code, executable=bare, cwd=tmp_path))
    assert str(ROOT) not in where
    assert {"sparselab.sparse", "sparselab.robust", "sparselab.learn"} <= set(names)
    assert "plotly" in message and "pip install 'sparselab[lab]'" in message


def loaded_by(code: str) -> set[str]:
    return set(json.loads(python("-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")))


def test_import_sparselab_loads_nothing_heavy():
    new = loaded_by("import sparselab") - loaded_by("")
    assert {name for name in new if name.startswith("sparselab")} == {"sparselab", "sparselab._surface"}
    assert sorted(new & set(HEAVY)) == []


def test_the_library_loads_no_notebook_tools():
    """A public name brings torch, not the notebook: plotly, widgets, papermill, auto_LiRPA and nbdev stay out."""
    new = loaded_by("import sparselab\nfor name in sparselab.__all__: getattr(sparselab, name)") - loaded_by("")
    assert "torch" in new
    assert sorted(new & set(OPTIONAL)) == []


@pytest.fixture(scope="module")
def first_uses() -> dict[str, str]:
    """Package -> what went wrong with its names, each in a process that has never imported sparselab, but torch and plotly already."""
    code = f"""
import importlib, json, os, pkgutil, sys, traceback
import numpy, torch
try:
    import ipywidgets, plotly.graph_objects, sklearn
except ImportError:
    pass
wrong = {{}}
for name in {PUBLIC!r}:
    reads, writes = os.pipe()
    if os.fork() == 0:
        try:
            assert not [each for each in sys.modules if each.startswith("sparselab")]
            package = importlib.import_module(name)
            first = {{each: getattr(package, each) for each in package.__all__}}
            assert set(package.__all__) <= set(dir(package)), set(package.__all__) - set(dir(package))
            for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
            assert {{each: getattr(package, each) for each in package.__all__}} == first, "a module has taken the place of a public name"
            os.write(writes, b"fine")
        except BaseException:
            os.write(writes, traceback.format_exc()[-3000:].encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        wrong[name] = pipe.read()
    os.wait()
print(json.dumps(wrong))
"""
    return json.loads(python("-c", code))


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_what_they_say(package, first_uses):
    """Every public name is there at first use, in `dir`, and still there once every module has been imported."""
    assert first_uses[package] == "fine"


@pytest.mark.parametrize("package", PUBLIC)
def test_type_checkers_are_told_of_every_public_name(package):
    """What a wing imports under TYPE_CHECKING is what it offers, from the module that it offers it from."""
    wing = importlib.import_module(package)
    tree = ast.parse(Path(wing.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert {name for name in told if name not in WINGS} == set(wing.__all__) - {"__version__"}
    for name, module in told.items():
        if module is not None:
            assert getattr(importlib.import_module(f"{package}.{module}"), name) is getattr(wing, name)


EXAMPLE = re.search(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_know_the_readme_example(checker, bare, tmp_path):
    """Against the built wheel: README's example has no errors, and `bounds` is a function with its own parameters."""
    (tmp_path / "example.py").write_text(EXAMPLE)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\n[mypy-torch.*,numpy.*,scipy.*,sklearn.*,safetensors.*]\nfollow_imports = skip\n")
    (tmp_path / "wrong.py").write_text(f"{EXAMPLE}\nbounds(model, method=3)\nsparsifier.stepp()\n")
    options = {"mypy": "--python-executable", "pyright": "--pythonpath"}
    done = subprocess.run([sys.executable, "-m", checker, options[checker], bare, "example.py", "wrong.py"],
                          cwd=tmp_path, capture_output=True, text=True)
    found = done.stdout + done.stderr
    assert done.returncode == 1 and not re.search(r"example\.py:.*error", found), found
    assert all(word in found for word in ("wrong.py", "upper", "stepp")), found


@pytest.mark.parametrize("wrong, right", [("Mask", "'Masks'"), ("sparce", "'sparse'"), ("zzz", "Masks")])
def test_unknown_names_are_answered_with_the_nearest(wrong, right):
    import sparselab

    with pytest.raises(AttributeError, match=f"no attribute '{wrong}'.*{right}"):
        getattr(sparselab, wrong)


def test_version_is_that_of_settings():
    import sparselab

    assert f"\nversion = {sparselab.__version__}\n" in (ROOT / "settings.ini").read_text()
    assert f"\nversion: {sparselab.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {sparselab.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned(packed):
    """constraints.txt has one exact version for each requirement in settings.ini, and that version satisfies it."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) and "auto_LiRPA" in pins
    pins = {canonical(name): version for name, version in pins.items()}
    for requirement in map(Requirement, packed.requires):
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), f"{requirement} in constraints.txt"
