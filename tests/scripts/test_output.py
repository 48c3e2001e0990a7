"""Whatever becomes of what a script prints, its work is done: streams closed, unread, full, or without accents."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, ROOT

from src.scores import evaluation, report
from src.utils import errors, pictures
from src.utils.distributed import World

SCRIPT = """
import logging
from pathlib import Path
from src.utils import errors

errors.prepare("eval.py")

def main():
    with open("results", "w") as file:
        assert file.fileno() > 2, "the results would get what is meant for stderr"
    for _ in range(1000):
        logging.getLogger("eval").info("a line that fills the pipe")
    errors.print_results("Fr\u00e9chet distance")
    Path("done").touch()
    return 0

errors.run(main, "eval.py", False)
"""


def shell(redirection: str, command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with its streams redirected as in a shell."""
    line = ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *command]
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "redirection", ["2>&-", ">&-", "<&- >&- 2>&-", "| true", "2>&1 | true", ">/dev/full", "1</dev/null"]
)
def test_a_stream_that_cannot_be_written_is_no_error(redirection, tmp_path):
    done = shell(redirection, [sys.executable, "-c", SCRIPT], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").exists()


def test_a_character_that_the_terminal_lacks_is_replaced(tmp_path):
    done = shell("", [sys.executable, "-c", SCRIPT], tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "Fr?chet distance", "")


@pytest.mark.parametrize("redirection", ["2>&-", "<&- >&- 2>&-", "2>&1 | true"])
def test_an_error_keeps_its_status_though_its_line_is_lost(redirection, tmp_path):
    command = [sys.executable, "-c", SCRIPT.replace("return 0", "raise errors.SettingError('wrong')")]
    assert shell(redirection, command, tmp_path).returncode == 2


def test_images_are_made_without_any_stream(trained, tmp_path):
    flags = ["--checkpoint", trained.checkpoint, "--num_samples", 2, "--steps", 2, "--device", "cpu"]
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, flags), "--output_dir", str(tmp_path)]
    assert shell("<&- >&- 2>&-", command, tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "sample_00000.png", "sample_00001.png"]


@pytest.mark.parametrize("help_of", ["train.py", "sample.py", "eval.py"])
def test_help_may_be_cut_off(help_of, tmp_path):
    done = shell("| true", [sys.executable, str(ROOT / help_of), "--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def evaluated(monkeypatch) -> Callable[..., None]:
    """Runs an evaluation, in a directory, that takes no time and has no scores."""
    generator = SimpleNamespace(device=torch.device("cpu"), precision=torch.float32, sampler="ddim", steps=2)
    model = SimpleNamespace(generator=generator, file="best.pth", sha256="")
    data = SimpleNamespace(reference=[], test=[], test_labels=[], notes=[])
    copies = SimpleNamespace(picture=lambda: None)
    monkeypatch.setattr(evaluation, "load_data", lambda *_: data)
    monkeypatch.setattr(evaluation, "make_scorers", lambda *_: SimpleNamespace(all=list, networks={}, copies=copies))
    monkeypatch.setattr(evaluation, "generate", lambda *_: None)
    monkeypatch.setattr(evaluation, "collect", lambda *_: {"notes": []})
    monkeypatch.setattr(evaluation, "protocol", lambda *_: {})
    monkeypatch.setattr(report, "table", lambda *_: "the table")
    monkeypatch.setattr(pictures, "image_grid", lambda _: None)
    monkeypatch.setattr(pictures, "save_png", lambda _, path: path.touch())

    def run(directory: Path, **options: bool) -> None:
        evaluation.run(model, evaluation.Options(2, 2, 0, "", None, **options), directory, World(torch.device("cpu")))

    return run


def test_scores_that_cannot_be_written_are_printed_all_the_same(evaluated, tmp_path, capsys):
    """They took an hour, in which somebody has deleted the directory."""
    with pytest.raises(errors.UserError, match=r"cannot write .*metrics.json"):
        evaluated(tmp_path / "gone", classifier_only=True)
    assert capsys.readouterr().out == "the table\n"


def test_an_interrupt_during_the_bound_costs_only_the_bound(evaluated, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "bits_per_dim", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "grid.png", "neighbours.png"}
    assert json.loads((tmp_path / "metrics.json").read_text())["scores"] == {"notes": []}
    assert capsys.readouterr().out == "the table\n"
