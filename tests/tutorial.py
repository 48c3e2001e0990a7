"""Run docs/tutorial.ipynb anew and keep its outputs: python tests/tutorial.py

What it prints and draws is kept, but no times and no versions, so that the file changes only with its content.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs/tutorial.ipynb"
# The most that a cell, the start and an output may take: the machine may be busy.
SECONDS = {"timeout": 1800, "startup_timeout": 600, "iopub_timeout": 60}


def run(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its folder and return it with the new outputs. Raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    options = {"kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=folder, **SECONDS, **options).execute()
    notebook.metadata.language_info = {"name": "python"}
    return notebook


if __name__ == "__main__":
    nbformat.write(run(NOTEBOOK), NOTEBOOK)
