"""The architecture, read from the sources: who imports whom, what the core needs, what a start costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ["train.py", "sample.py", "eval.py", "export.py"]
SOURCES = sorted(path for path in (ROOT / "src").rglob("*.py") if path.name != "__init__.py")
CORE = ["diffusion", "samplers", "model", "ema", "training", "generation"]
# What each room may import of src, beside itself.
MAY_IMPORT = {"core": set(), "utils": set(), "data": {"utils"}, "scores": {"data", "utils", "core"}}


def imports(path: Path) -> list[str]:
    """Every module that a file imports, wherever the import stands; `from src import x` counts as src.x."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            modules += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "src" else [node.module]
            )
    return modules


def room(module: str) -> str:
    """The wing of a module of src, or "core": src.data.fetch → data, src.model → core."""
    second = module.split(".")[1]
    return second if second in MAY_IMPORT else "core"


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_config_holds_constants_and_nothing_else():
    body = ast.parse((ROOT / "config.py").read_text(encoding="utf-8")).body
    docstring, *constants = body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.AnnAssign) for node in constants)


def test_the_core_is_six_files():
    assert sorted(path.stem for path in (ROOT / "src").glob("*.py") if path.name != "__init__.py") == sorted(CORE)


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_src_imports_neither_config_nor_scripts(path):
    assert not {module.split(".")[0] for module in imports(path)} & {"config", "train", "sample", "eval"}


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_a_room_imports_only_from_the_rooms_below_it(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    siblings = {room(module) for module in imports(path) if module.startswith("src.")}
    assert siblings <= {own} | MAY_IMPORT[own]


def test_the_core_does_no_input_or_output():
    allowed = {"torch", "einops", "numpy", "src", *sys.stdlib_module_names}
    forbidden = {"os", "io", "sys", "pathlib", "logging", "argparse", "json"}
    for name in CORE:
        modules = {module.split(".")[0] for module in imports(ROOT / "src" / f"{name}.py")}
        assert modules <= allowed - forbidden, name


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_public_functions_of_src_have_docstrings_and_annotations(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in members:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                assert function.returns is not None, function.name
                if function.name != "forward":  # the class's docstring says what a layer does
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
