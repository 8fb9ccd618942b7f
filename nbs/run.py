"""papermill for the notebooks here: `python nbs/run.py NOTEBOOK OUT -p name value ...` takes what papermill takes.

What a cell prints appears as it is printed. A cell that fails ends the command with 1, and with what the cell shows: the sentence alone of an
error that sparselab raises on purpose, for a bad parameter say. What goes between papermill and the kernel is encrypted, so that the kernel
has nothing to warn of.
"""
import sys

from papermill.cli import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError, strip_color
from traitlets.config import Config

FIRST = "from sparselab.notebooks import short_errors; short_errors()"


class Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        options |= {"config": Config({"KernelManager": {"transport_encryption": "auto"}}), "extra_arguments": [f"--IPKernelApp.exec_lines={FIRST}"]}
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


def main(arguments: list[str]) -> int:
    papermill_engines.register(None, Engine)
    streams = ["--no-progress-bar", "--stdout-file", "-", "--stderr-file", "-"]
    try:
        papermill([*streams, *arguments], prog_name="nbs/run.py")
    except PapermillExecutionError as error:
        print(strip_color("\n".join(error.traceback)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
