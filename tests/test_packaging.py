"""`pip install .` alone gives a working library, and `import sparselab` stays cheap."""
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
            "pyarrow", "PIL", "pytest", "kaleido", "matplotlib")
HEAVY = ("torch", "numpy", "sklearn", *OPTIONAL)
# what a user imports from sparselab itself, and the wing that defines it
PUBLIC = {"Masks": "sparse", "Sparsifier": "sparse", "sparsify": "sparse", "bounds": "robust", "verify": "robust",
          "Config": "learn", "train": "learn"}


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
    for path in (ROOT / "sparselab").rglob("*.py"):
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
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in (ROOT / "sparselab").rglob("*.py")}


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "sparselab").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_wheel_says_who_it_is(packed):
    assert packed.metadata["Name"] == "sparselab" and packed.metadata["Requires-Python"] == ">=3.11"
    assert packed.metadata.get_all("Provides-Extra") == ["lab", "hub", "lirpa", "dev"]
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
    assert {name for name in new if name.startswith("sparselab")} == {"sparselab"}
    assert sorted(new & set(HEAVY)) == []


def test_the_library_loads_no_notebook_tools():
    """A public name brings torch, not the notebook: plotly, widgets, papermill, auto_LiRPA and nbdev stay out."""
    new = loaded_by("import sparselab\nfor name in sparselab.__all__: getattr(sparselab, name)") - loaded_by("")
    assert "torch" in new
    assert sorted(new & set(OPTIONAL)) == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_offered_where_a_module_exports_them(name):
    import sparselab

    folder = ROOT / "sparselab" / PUBLIC[name]
    homes = [path for path in folder.glob("*.py") if re.search(rf"^__all__ = [^]]*'{name}'", path.read_text(), re.M)]
    assert [name in sparselab.__all__, name in dir(sparselab)] == [bool(homes)] * 2, \
        f"_HOME in sparselab/__init__.py has to name the module of {name!r}: {[str(home) for home in homes]}"
    if homes:
        module = importlib.import_module(f"sparselab.{folder.name}.{homes[0].stem}")
        assert getattr(sparselab, name) is getattr(module, name)


def test_nothing_else_is_public():
    import sparselab

    assert set(sparselab.__all__) <= {"__version__", *PUBLIC}


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
