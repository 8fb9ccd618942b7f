"""A notebook executed in a fork of the tests: no process starts, no kernel, and nothing is imported that the tests have imported before."""
import os
import sys
import traceback
from pathlib import Path

import nbformat
import papermill.iorw
import papermill.parameterize


def executed(notebook: Path, folder: Path, **parameters) -> nbformat.NotebookNode:
    """`notebook` as executed in `folder` with parameters put in by papermill; it is saved as out.ipynb there. Figures are drawn by matplotlib.

    What papermill's command line, its kernel and its errors do is tested elsewhere, with all three.
    """
    given = papermill.parameterize.parameterize_notebook(papermill.iorw.load_notebook_node(str(notebook)), parameters)
    for cell in given.cells:
        cell |= {"outputs": []} if cell.cell_type == "code" else {}
    nbformat.write(given, folder / "out.ipynb")
    child = os.fork()
    if child == 0:
        try:
            from execnb.nbio import read_nb, write_nb
            from execnb.shell import CaptureShell

            os.chdir(folder)
            os.environ["BROWSER_PATH"] = "none"  # a browser costs seconds, and test_browser.py has one
            cells = read_nb("out.ipynb")
            CaptureShell("out.ipynb").run_all(cells, exc_stop=True)
            write_nb(cells, "out.ipynb")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the notebook failed; what it said is in the captured output"
    return nbformat.read(folder / "out.ipynb", 4)
