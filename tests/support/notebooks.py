"""Notebooks in a kernel of this very Python, wherever else there are some."""

import os
from pathlib import Path
from unittest import mock

import goldens
import pytest

nbclient = pytest.importorskip("nbclient")
kernelspec = pytest.importorskip("ipykernel.kernelspec")
nbformat = pytest.importorskip("nbformat")


def executed(notebook, folder: Path, **options):
    """The notebook with its outputs, executed in a folder; CellExecutionError for one that fails."""
    kernelspec.write_kernel_spec(folder / ".jupyter" / "kernels" / "this")
    environment = {
        "JUPYTER_PATH": str(folder / ".jupyter"),
        "PYTHONPATH": str(goldens.ROOT),
        "IPYTHONDIR": str(folder / ".ipython"),  # no profile of the user's
        "OMP_NUM_THREADS": "1",  # several would wait for each other beside other tests
    }
    with mock.patch.dict(os.environ, environment):
        client = nbclient.NotebookClient(
            notebook, kernel_name="this", resources={"metadata": {"path": str(folder)}}, **{"timeout": 120, **options}
        )
        return _merged(client.execute())


def _merged(notebook):
    """What was printed line by line as one text, as a notebook shows it."""
    for cell in notebook.cells:
        whole = []
        for output in cell.get("outputs", []):
            if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
                whole[-1].text += output.text
            else:
                whole.append(output)
        if whole:
            cell.outputs = whole
    return notebook


def outputs(notebook) -> list:
    """Those of all cells, in order."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def cells(*sources: str):
    """A notebook with these cells of code."""
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
