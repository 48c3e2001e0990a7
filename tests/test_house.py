"""The architecture, read from the sources: who imports whom, what a start costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train.py", "sample.py", "eval.py"]
SOURCES = sorted((ROOT / "src").glob("*.py"))
HUBS = {"pipeline"}  # the one file of src whose trade is to join siblings
COMMON = {"errors"}  # what every file may use to speak to the user


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, source line) of every import in a file, wherever it stands; `from src import x` counts as src.x."""
    text = path.read_text()
    found = []
    for node in ast.walk(ast.parse(text)):
        line = text.splitlines()[node.lineno - 1] if hasattr(node, "lineno") else ""
        if isinstance(node, ast.Import):
            found += [(alias.name, line) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"src.{alias.name}" for alias in node.names] if node.module == "src" else [node.module]
            found += [(name, line) for name in names]
    return found


def test_config_uses_the_standard_library_only():
    for module, _ in imports(ROOT / "config.py"):
        assert module.split(".")[0] in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_src_knows_neither_config_nor_scripts(path):
    for module, _ in imports(path):
        assert module not in {"config", "train", "sample", "eval"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem not in HUBS], ids=lambda p: p.name)
def test_a_file_of_src_imports_a_sibling_only_with_its_reason_beside_it(path):
    for module, line in imports(path):
        if module.startswith("src."):
            assert "#" in line, f"{path.name}: {line}"


def test_the_mathematics_imports_no_input_or_output():
    for name in ("diffusion", "samplers", "model", "ema"):
        modules = {module.split(".")[0] for module, _ in imports(ROOT / "src" / f"{name}.py")}
        assert not modules & {"os", "pathlib", "tqdm", "logging", "matplotlib", "PIL"}, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_public_functions_of_src_have_docstrings_and_annotations(path):
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in members:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                assert function.returns is not None, function.name
                if function.name != "forward":  # what a layer does stands in its class's docstring
                    assert ast.get_docstring(function), function.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistakes_are_answered_without_loading_torch(script, tmp_path):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    for arguments, status in (["--help"], 0), (["--batch_size", "0"], 2), (["--no_such_flag"], 2):
        command = [sys.executable, "-c", code, str(ROOT / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (status, "False")
    assert not list(tmp_path.iterdir())  # and nothing was made on the way
