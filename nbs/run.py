"""papermill for the notebooks here: `python nbs/run.py NOTEBOOK OUT -p name value ...` takes what papermill takes.

The folder of OUT is made. What a cell prints appears as it is printed. A cell that fails ends the command with 1, and with what the cell shows:
the sentence alone of an error that sparselab raises on purpose, for a bad parameter say. A file that cannot be read or written is a sentence
too. What goes between papermill and the kernel is encrypted, so that the kernel has nothing to warn of.
"""
import sys
from pathlib import Path

import click
from nbformat.reader import NotJSONError
from papermill.cli import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError, strip_color
from traitlets.config import Config
from yaml import YAMLError

FIRST = "from sparselab.notebooks import short_errors, to_a_log; short_errors()"


class Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        first = FIRST if sys.stdout.isatty() else f"{FIRST}; to_a_log()"
        options |= {"config": Config({"KernelManager": {"transport_encryption": "auto"}}), "extra_arguments": [f"--IPKernelApp.exec_lines={first}"]}
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


def local(path: str | None) -> bool:
    """Whether `path` is one on this machine; papermill also takes "-" for a pipe, and addresses."""
    return bool(path) and path != "-" and "://" not in path


def make_ready(notebook: str | None, out: str | None, parameter_files: tuple[str, ...]) -> None:
    """Make the folder of `out`. Raises ClickException, a sentence, where a file that is to be read is missing, or the folder cannot be made."""
    if out and local(notebook) and not Path(notebook).is_file():
        raise click.ClickException(f"There is no notebook {notebook}.")
    for file in filter(local, parameter_files):
        if not Path(file).is_file():
            raise click.ClickException(f"There is no file of parameters {file}.")
    if local(out):
        folder = Path(out).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.ClickException(f"The folder {folder} cannot be made ({error.strerror}); choose another place for the output.") from error
        if Path(out).is_dir():
            raise click.ClickException(f"{out} is a folder; name the notebook to write, such as {Path(out) / 'out.ipynb'}.")


def run(**given: object) -> None:
    """What papermill does, after `make_ready`; a file that cannot be read or written is a ClickException."""
    make_ready(given["notebook_path"], given["output_path"], given["parameters_file"])
    try:
        papermill.callback(**given)
    except OSError as error:
        raise click.ClickException(f"{error.filename or given['output_path']} cannot be read or written ({error.strerror or error}).") from error
    except NotJSONError as error:
        raise click.ClickException(f"{given['notebook_path']} is not a notebook.") from error
    except YAMLError as error:
        raise click.ClickException(f"The parameters are not YAML: {' '.join(str(error).split())}.") from error


def main(arguments: list[str]) -> int:
    papermill_engines.register(None, Engine)
    command = click.Command("run.py", papermill.context_settings, run, papermill.params, papermill.help)
    streams = ["--no-progress-bar", "--stdout-file", "-", "--stderr-file", "-"]
    try:
        command([*streams, *arguments], prog_name="nbs/run.py")
    except PapermillExecutionError as error:
        print(strip_color("\n".join(error.traceback)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
