"""The logs of a training: scalars.jsonl says what TensorBoard shows, through resumption, crashes and full disks."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.utils.monitor import Monitor

TRAIN = ["loss/train", "gradient_norm", "learning_rate", "images_per_second"]


def lines(log_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log_path / "scalars.jsonl").read_text().splitlines()]


def show(log_path: Path, first: int, last: int, log_every: int = 1) -> None:
    """Log steps `first` to `last`, of which every fourth ends an epoch."""
    with Monitor(log_path, first - 1, 100, 10, log_every) as monitor:
        monitor.start_epoch(1, 25, first - 1)
        for step in range(first, last + 1):
            monitor.count_step(step, torch.tensor(1 / step), torch.tensor(2.0), 1e-3)
            if step % 4 == 0:
                monitor.show_validation(step, 0.5 / step, None)


def curves(log_path: Path) -> dict[str, list[int]]:
    """What `scalars` reads from TensorBoard's files, from scalars.jsonl."""
    found: dict[str, list[int]] = {}
    for line in lines(log_path):
        for name in line.keys() - {"step"}:
            found.setdefault(name, []).append(line["step"])
    return found


def test_every_scalar_is_in_both_logs(tmp_path):
    show(tmp_path, 1, 8, log_every=2)
    events = lines(tmp_path)
    assert [list(event) for event in events[:3]] == [["step", *TRAIN]] * 2 + [["step", "loss/validation"]]
    assert [event["step"] for event in events] == [2, 4, 4, 6, 8, 8]
    assert curves(tmp_path) == scalars(tmp_path)
    tensorboard = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in [*TRAIN, "loss/validation"]:
        ours = [event[name] for event in events if name in event]
        assert ours == pytest.approx([event.value for event in tensorboard.Scalars(name)], rel=1e-6)


def test_a_resumed_run_replaces_what_was_logged_after_its_checkpoint(tmp_path):
    show(tmp_path, 1, 11)
    show(tmp_path, 9, 12)  # resumed from a checkpoint of step 8
    assert curves(tmp_path) == scalars(tmp_path)
    assert curves(tmp_path)["loss/train"] == list(range(1, 13))
    assert curves(tmp_path)["loss/validation"] == [4, 8, 12]
    show(tmp_path, 1, 2)  # a new run
    assert [event["step"] for event in lines(tmp_path)] == [1, 2]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["scalars.jsonl"]


@pytest.mark.parametrize("kept", [0, 1, 20, -1], ids=["none", "one byte", "half", "all but the newline"])
def test_a_last_line_that_a_crash_cut_off_is_dropped(kept, tmp_path):
    show(tmp_path, 1, 3)
    path = tmp_path / "scalars.jsonl"
    *whole, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + last[:kept])
    show(tmp_path, 4, 4)
    assert [event["step"] for event in lines(tmp_path)] == ([1, 2, 3, 4, 4] if kept == -1 else [1, 2, 4, 4])


@pytest.mark.parametrize("torn", [b"\0" * 50, b"\xff\xfe", b"7", b"[]", b"{}", b'{"step": null}'])
def test_a_line_that_is_no_event_is_dropped(torn, tmp_path):
    """A power failure may leave bytes that were never written."""
    show(tmp_path, 1, 2)
    with open(tmp_path / "scalars.jsonl", "ab") as file:
        file.write(torn)
    show(tmp_path, 3, 3)
    assert [event["step"] for event in lines(tmp_path)] == [1, 2, 3]


def test_what_was_flushed_outlives_a_kill(tmp_path):
    monitor = Monitor(tmp_path, 0, 100, 10, 1)
    monitor.count_step(1, torch.tensor(0.5), torch.tensor(2.0), 1e-3)
    monitor.flush()
    assert [event["step"] for event in lines(tmp_path)] == [1]  # while the file is still open
    assert scalars(tmp_path)["loss/train"] == [1]
    monitor.__exit__(None, None, None)


def test_each_log_is_written_without_the_other(tmp_path, monkeypatch, caplog):
    """A package that is missing or broken, something else in the place of a file."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        (tmp_path / "a").mkdir()
        show(tmp_path / "a", 1, 8)
    assert [event["step"] for event in lines(tmp_path / "a")] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    (tmp_path / "b/scalars.jsonl").mkdir(parents=True)
    show(tmp_path / "b", 1, 8)
    assert scalars(tmp_path / "b")["loss/train"] == list(range(1, 9))
    told = [record.getMessage().partition(" (")[0] for record in caplog.records]
    assert told == [f"cannot write {tmp_path}/{name}" for name in ("a/tensorboard", "b/scalars.jsonl")]


def test_numbers_that_json_lacks_are_null(tmp_path):
    with Monitor(tmp_path, 0, 100, 10, 1) as monitor:
        monitor.show_validation(1, float("nan"), None)
        monitor.show_validation(2, float("inf"), None)
    assert lines(tmp_path) == [{"step": 1, "loss/validation": None}, {"step": 2, "loss/validation": None}]


FULL = """
import resource, signal, sys, torch.utils.tensorboard
from pathlib import Path
from src.utils import errors, monitor

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

class Nowhere:  # TensorBoard's files do not fill up, so that ours does
    def __getattr__(self, name):
        return lambda *args: None

torch.utils.tensorboard.SummaryWriter = lambda *args, **kwargs: Nowhere()

def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with monitor.Monitor(Path("."), 0, 100, 10, 1) as shown:
        for step in range(1, 100):
            shown.count_step(step, torch.tensor(0.5), torch.tensor(2.0), 1e-3)
    return 0

errors.run(main, "train.py", True)
"""


def test_a_full_disk_costs_curves_and_a_warning(tmp_path):
    """A limit on the size of files stands in for the disk. What fitted in is read by the next run."""
    command = [sys.executable, "-c", FULL]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    warning = f"cannot write scalars.jsonl ([Errno 27] {os.strerror(errno.EFBIG)}): the run goes on without it\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, warning, "")
    whole = [line for line in (tmp_path / "scalars.jsonl").read_text().split("\n") if line.endswith("}")]
    show(tmp_path, len(whole) + 1, len(whole) + 1)
    assert [event["step"] for event in lines(tmp_path)][: len(whole) + 1] == list(range(1, len(whole) + 2))
