"""The tutorial notebook: its code fits this repository, its kept outputs are whole, and it runs from top to bottom."""

import ast
import importlib
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.font_manager  # noqa: F401  # fills its cache, about which the notebook would warn
import nbformat
import pytest
from conftest import ROOT
from nbclient.exceptions import CellExecutionError
from tutorial import NOTEBOOK, run

LARGEST = 1_500_000  # bytes of the file, most of them pictures
NEEDED = ["config.py", "src", "weights", "tests/images", "docs/tutorial.ipynb"]
# A path that exists on one machine only: absolute, in a home or temporary folder.
LOCAL = re.compile(r"(?<![\w.])/(root|home|Users|tmp|var|work|mnt|opt|usr|content)/|[A-Z]:\\\\|site-packages")


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """Everything that a cell shows as text."""
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]


def pictures(cell: nbformat.NotebookNode) -> list[str]:
    """The PNG files that a cell shows, in base 64."""
    data = [output.get("data", {}) for output in cell.outputs]
    return [content["image/png"] for content in data if "image/png" in content]


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def code(notebook) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_a_valid_notebook_for_any_machine(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}  # no version
    assert all(not cell.metadata for cell in notebook.cells)  # no times
    assert NOTEBOOK.stat().st_size < LARGEST


def test_its_imports_and_what_it_uses_of_modules_exist(code):
    modules: dict[str, ModuleType] = {}
    trees = [ast.parse(cell.source) for cell in code]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(parent, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                if isinstance(value := getattr(parent, alias.name), ModuleType):
                    modules[alias.asname or alias.name] = value
    assert {"torch", "datasets", "checkpoint"} <= modules.keys()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)


def test_code_cells_are_short(code):
    assert max(len(cell.source.splitlines()) for cell in code) <= 16


def test_outputs_are_kept_and_are_of_one_whole_run(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        kinds = {output.output_type for output in cell.outputs}
        assert kinds <= {"stream", "display_data", "execute_result"}, cell.source
        assert all(output.get("name") != "stderr" for output in cell.outputs), cell.source
        calls = sum(line.startswith(("show(", "plt.show(")) for line in cell.source.splitlines())
        assert len(pictures(cell)) == calls and all(len(png) > 1000 for png in pictures(cell)), cell.source
        printed = [output for output in cell.outputs if output.output_type == "stream"]
        assert bool(printed) == ("print(" in cell.source), cell.source


def test_nothing_in_it_belongs_to_one_machine(notebook, code):
    for text in [cell.source for cell in notebook.cells] + [text for cell in code for text in texts(cell)]:
        assert not LOCAL.search(text), text


def test_its_links_to_files_lead_somewhere(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", prose) if "://" not in link]
    assert links
    assert not [link for link in links if not (NOTEBOOK.parent / link).exists()]


def test_the_first_cell_finds_the_repository_or_says_what_to_do(code, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="clone the repository"):
        exec(code[0].source, {})
    monkeypatch.chdir(ROOT / "docs")
    exec(code[0].source, {})
    assert Path.cwd() == ROOT and sys.path[0] == str(ROOT)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_writes_nothing(code, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    folder = tmp_path / "repository"
    for name in NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / name)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = run(folder / "docs/tutorial.ipynb")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    new = [cell for cell in result.cells if cell.cell_type == "code"]
    assert [len(pictures(cell)) for cell in new] == [len(pictures(cell)) for cell in code]
    assert [output.get("name") for cell in new for output in cell.outputs].count("stderr") == 0  # no warnings


@pytest.mark.slow
def test_a_cell_that_fails_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(tmp_path / "broken.ipynb")
