"""Runs a command on this machine as if it were bare: no Chrome of any kind, no data sets of Debian's packages.

`python tests/bare.py COMMAND ...`; Linux, where this user may make a mount namespace (`unshare`). What is hidden is hidden from the command
and its children only.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path("/usr/share/datasets")


def browsers() -> set[str]:
    """Every file that kaleido would take for a browser."""
    from choreographer.browsers._chrome_constants import chromium_based_browsers
    from choreographer.cli._cli_utils import get_chrome_download_path

    found = {path for kind in chromium_based_browsers.values() for path in (*map(shutil.which, kind.exe_names), *kind.typical_paths) if path}
    found |= {str(Path(folder) / name) for kind in chromium_based_browsers.values() for name in kind.exe_names
              for folder in os.environ["PATH"].split(os.pathsep)} | {str(get_chrome_download_path(mkdir=False) or "")}
    return {os.path.realpath(path) for path in found if path and os.access(path, os.X_OK) and os.path.isfile(path)}


def bare(command: list[str], **options) -> subprocess.CompletedProcess:
    """The command, done where neither exists. Raises OSError where something would have to be hidden and cannot be."""
    environment = {key: value for key, value in os.environ.items() if key not in ("BROWSER_PATH", "SPARSELAB_DATA")} | options.pop("env", {})
    if not browsers() and not DATA.is_dir():
        return subprocess.run(command, env=environment, **options)
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        raise OSError("no mount namespace can be made here (unshare -rm), so nothing can be hidden")
    with tempfile.TemporaryDirectory() as empty:
        hide = [f"mount --bind /dev/null '{path}'" for path in sorted(browsers())] + [f"mount --bind '{empty}' '{DATA}'"] * DATA.is_dir()
        script = " && ".join([*hide, 'exec "$@"'])
        return subprocess.run(["unshare", "-rm", "sh", "-c", script, "bare", *command], env=environment, **options)


if __name__ == "__main__":
    sys.exit(bare(sys.argv[1:]).returncode)
