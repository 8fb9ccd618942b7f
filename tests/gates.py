"""The two gates that only nbdev can answer: is sparselab/ what nbs/ exports, and are the notebooks clean?

`python tests/gates.py` exports and cleans a copy, so it needs no git and leaves uncommitted work as it is.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BY_HAND = ("__init__.py", "_surface.py")


def copy_project(target: Path) -> None:
    """settings.ini, notebooks and hand-written files; every generated module is left out, so that an export that
    does nothing cannot pass, nor a module whose notebook is gone."""
    shutil.copy(ROOT / "settings.ini", target)
    hidden = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(ROOT / "nbs", target / "nbs", ignore=hidden)
    for path in (path for name in BY_HAND for path in (ROOT / "sparselab").rglob(name)):
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def nbdev(command: str, cwd: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}  # it switches nbdev_export off
    script = Path(sys.executable).with_name(command)
    done = subprocess.run([script], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode or "Failed" in done.stderr:
        sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def differing(first: Path, second: Path, pattern: str) -> list[str]:
    """Relative paths of the files that are missing on one side or differ."""
    names = {path.relative_to(side) for side in (first, second) for path in side.rglob(pattern)
             if not any(part.startswith(".") for part in path.relative_to(side).parts)}
    return sorted(str(Path(first.name, name)) for name in names if read(first / name) != read(second / name))


def gate(title: str, command: str, folder: str, pattern: str, copy: Path) -> bool:
    print(f"{title}: ", end="", flush=True)
    nbdev(command, copy)
    found = differing(ROOT / folder, copy / folder, pattern)
    print("ok" if not found else f"{command} would change {len(found)} file(s). Run it, look at the change, commit it:")
    for name in found:
        print(f"  {name}")
    return not found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_project(copy)
        in_sync = gate("library in sync with the notebooks", "nbdev_export", "sparselab", "*.py", copy)
        clean = gate("notebooks clean", "nbdev_clean", "nbs", "*.ipynb", copy)
    return 0 if in_sync and clean else 1


if __name__ == "__main__":
    sys.exit(main())
