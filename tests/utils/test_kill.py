"""SIGKILL for real: no moment of it damages a checkpoint, blocks the next run or changes what training ends with."""

import faulthandler
import itertools
import logging
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from conftest import ENVIRONMENT, NETWORK, ROOT, SMALL, differences, run_script, scalars
from tqdm import tqdm

from src.utils import checkpoint, errors

Save = Callable[[Path, dict[str, Any]], None]

# ---- one file, written again and again ---------------------------------------------------------------------


def numbered(count: int) -> dict[str, Any]:
    """A state of 4 MB in which every number is `count`: of two that are mixed up, it shows."""
    return {"count": count, "weights": [torch.full((250_000,), float(count)) for _ in range(4)]}


def read_count(path: Path) -> int | None:
    """The count of the `numbered` state in a file; None if it cannot be loaded or is a mixture."""
    try:
        state = checkpoint.load(path)
    except errors.UserError:
        return None
    return state["count"] if all((w == state["count"]).all() for w in state["weights"]) else None


def save_in_place(path: Path, state: dict[str, Any]) -> None:
    """What everybody writes first, and the negative control of the tests below."""
    torch.save({"program": checkpoint.PROGRAM, "format": checkpoint.FORMAT, **state}, path)


def save_for_ever(save: Save, path: Path, first: int) -> None:
    for count in itertools.count(first):
        save(path, numbered(count))


@contextmanager
def saving(save: Save, path: Path, first: int) -> Iterator[BaseProcess]:
    """A process that saves one count after the other; forked, since loading torch would take seconds each time.

    The block begins when it has begun, which takes long on a busy machine.
    """
    before = path.stat().st_mtime_ns
    process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(save, path, first))
    process.start()
    try:
        while process.is_alive() and path.stat().st_mtime_ns == before:
            time.sleep(0.001)
        yield process
        assert process.is_alive(), "it ended by itself"
    finally:
        process.kill()
        process.join()


def counts_after_kills(save: Save, path: Path, rounds: int = 25) -> tuple[list[int | None], int]:
    """What a file holds after each of many saving processes was killed at a random moment; None: nothing whole.

    Also how many kills hit a save: they left a ruin, or a temporary file, which the next save has to clear away. Where
    the disk is so fast that none of `rounds` kills did, there are more.
    """
    temporary, delays, found, hits = path.with_name(path.name + ".tmp"), random.Random(0), [], 0
    checkpoint.save(path, numbered(0))
    for kill in range(10 * rounds):
        if kill >= rounds and hits:
            break
        with saving(save, path, 1000 * kill + 1):
            time.sleep(delays.uniform(0, 0.1))
        found.append(read_count(path))
        hits += temporary.exists() or found[-1] is None
        checkpoint.save(path, numbered(1000 * (kill + 1)))
        assert not temporary.exists()
    return found, hits


def test_a_save_killed_at_any_moment_leaves_the_old_checkpoint_or_the_new_one_whole(tmp_path, one_thread):
    found, hits = counts_after_kills(checkpoint.save, tmp_path / "latest.pth")
    assert None not in found
    assert all(1000 * kill <= count < 1000 * (kill + 1) for kill, count in enumerate(found))
    assert hits > 0, "no kill hit a save, so the test proved nothing"


def test_a_save_in_place_is_caught_by_the_same_kills(tmp_path, one_thread):
    found, _ = counts_after_kills(save_in_place, tmp_path / "latest.pth")
    assert None in found


Seen = list[int | None]


def counts_while_saving(save: Save, path: Path, enough: Callable[[Seen], bool], reads: int = 150) -> Seen:
    """What a reader sees of a file that another process writes all the time.

    How the two processes take turns is the system's affair, so it may read on until it has seen `enough`.
    """
    checkpoint.save(path, numbered(0))
    with saving(save, path, 1):
        seen = [read_count(path) for _ in range(reads)]
        while not enough(seen) and len(seen) < 20 * reads:
            seen.append(read_count(path))
    return seen


def test_a_reader_sees_whole_checkpoints_in_their_order_while_another_process_saves(tmp_path, one_thread):
    seen = counts_while_saving(checkpoint.save, tmp_path / "latest.pth", lambda seen: len(set(seen)) > 10)
    assert None not in seen
    assert seen == sorted(seen) and len(set(seen)) > 10


def test_a_reader_of_a_save_in_place_sees_ruins(tmp_path, one_thread):
    assert None in counts_while_saving(save_in_place, tmp_path / "latest.pth", lambda seen: None in seen)


# ---- train.py ----------------------------------------------------------------------------------------------


@contextmanager
def training(folder: Path, *command: object) -> Iterator[subprocess.Popen[str]]:
    """A process of `command` in `folder`; both outputs are one pipe. Killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(start: str, stdout: IO[str]) -> None:
    """Until a process prints a line that begins so."""
    lines = []
    while not (lines and lines[-1].startswith(start)):
        lines.append(stdout.readline())
        assert lines[-1], "".join(lines)


SHORT_EPOCHS = [*SMALL, *NETWORK, "--image_size", 28, "--val_size", 900, "--save_every", 1]  # of two steps each


def test_the_same_command_goes_on_after_a_kill(data, tmp_path):
    epochs = 8  # so many that the kill comes before the last one, also where this process has to wait its turn
    flags = ["--data_path", data, *SHORT_EPOCHS, "--epochs", epochs]
    with training(tmp_path, ROOT / "train.py", *flags) as first:
        wait_for(f"epoch 1/{epochs}: loss", first.stdout)
    assert first.returncode == -signal.SIGKILL
    second = run_script("train.py", *flags, cwd=tmp_path)
    assert (second.returncode, second.stderr) == (0, "")
    assert re.search(rf"^RESUMING .* \d+ of {epochs} epochs done", second.stdout, re.MULTILINE)
    assert checkpoint.load(tmp_path / "checkpoints/final.pth")["epoch"] == epochs


def test_a_second_training_in_the_same_place_is_refused_with_the_first_one_s_process(data, tmp_path):
    flags = ["--data_path", data, *SHORT_EPOCHS, "--epochs", 10_000]
    with training(tmp_path, ROOT / "train.py", *flags) as first:
        wait_for("epoch 1/10000: loss", first.stdout)
        second = run_script("train.py", *flags, cwd=tmp_path)
        assert first.poll() is None
    assert (second.returncode, second.stdout) == (1, "")
    message = rf"train\.py: error: process {first.pid} is training in checkpoints: wait .*--log_path\)\n"
    assert re.fullmatch(message, second.stderr)


# ---- fifty kills of one training ---------------------------------------------------------------------------


ALONE = {"OMP_NUM_THREADS": "1"}  # all have the same number of threads, whatever is set from outside


def run_witness(output: int, folder: Path, *flags: object) -> None:
    """train.py, started in a fork of this process, with both outputs to the file descriptor `output`.

    It notes on SIGUSR1 what it is at.
    """
    os.chdir(folder)
    os.environ.update(ALONE)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logging.getLogger().handlers.clear()  # those of pytest
    tqdm.set_lock(threading.RLock())  # a thread of tqdm's, which is not forked, may hold the other one for ever
    with open(1, "w", buffering=1) as sys.stdout, open(2, "w", buffering=1) as sys.stderr, open("stack", "w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        sys.argv = ["train.py", *map(str, flags)]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


@contextmanager
def witness(folder: Path, *flags: object) -> Iterator[tuple[BaseProcess, IO[str]]]:
    """A training in `folder` and its output; forked, since loading torch would take seconds each time. Killed at the
    end of the block."""
    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=run_witness, args=(writing, folder, *flags))
    process.start()
    os.close(writing)
    with open(reading) as stdout:
        try:
            yield process, stdout
        finally:
            process.kill()
            process.join()


# A function, and what a process that is within it is at; the first one found decides.
MOMENTS = {
    "resume": "resuming",
    "save": "saving",
    "step": "in training steps",
    "validate": "validating",
    "sample_grid": "sampling",
    "plot_losses": "drawing",
    "save_png": "drawing",
    "run": "between these",
}


def ask(process: BaseProcess, stack: Path) -> str:
    """What a witness, whose notes go to the file `stack`, is at."""
    if not stack.exists():
        return "starting"  # it would not understand yet
    os.kill(process.pid, signal.SIGUSR1)
    while stack.stat().st_size == 0:
        assert process.is_alive(), "it ended by itself"
    time.sleep(0.002)  # for the rest of the note
    functions = re.findall(
        r"/(?:train|src/training|src/utils/(?:run|pictures))\.py\", line \d+ in (\w+)", stack.read_text()
    )
    return next((moment for name, moment in MOMENTS.items() if name in functions), "starting")


def temporaries(folder: Path) -> set[tuple[str, int]]:
    """The names and times of the unfinished saves in a training's folder."""
    with suppress(FileNotFoundError):  # finished, or begun anew, while we look
        return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("checkpoints/*.tmp")}
    return set()


@pytest.mark.slow
def test_a_training_killed_fifty_times_ends_as_one_that_never_was(data, tmp_path, one_thread):
    """`--save_minutes 0` saves after every step. The summary that it prints is shown by pytest -s."""
    often = "--save_minutes 0 --save_every 1 --sample_every 1 --log_every 1"
    sizes = "--image_size 28 --val_size 400 --batch_size 20 --num_samples 20 --steps 15"  # each phase takes its time
    steady = "--lr_warmup 0 --lr_decay 0"  # so that it does not depend on the number of epochs
    flags = ["--data_path", data, *SMALL, *NETWORK, *often.split(), *sizes.split(), *steady.split()]
    killed, undisturbed, clocked = [tmp_path / name for name in ("killed", "undisturbed", "clocked")]
    folders = [killed, undisturbed]
    for folder in (*folders, clocked):
        folder.mkdir()
    with witness(clocked, *flags) as (_, stdout):  # how long is an epoch on this machine, today?
        wait_for("results", stdout)
        epoch = -time.monotonic()
        wait_for("epoch 1/", stdout)
        epoch += time.monotonic()
    delays, moments, steps, leftovers = random.Random(0), Counter(), [0], 0
    for number in range(50):
        (killed / "stack").unlink(missing_ok=True)
        before = temporaries(killed)
        with witness(killed, *flags, "--epochs", 1000) as (process, stdout):
            if delays.random() < 0.85:  # else at its start
                wait_for("results", stdout)  # the last line before it trains or resumes
            time.sleep(delays.uniform(0, epoch))
            if number % 2:  # to answer takes milliseconds, in which a save may end: the others are not asked
                moments[ask(process, killed / "stack")] += 1
            elif number % 4:  # in the midst of a save, which is short
                limit = time.monotonic() + 600
                while not temporaries(killed) - before:
                    assert process.is_alive() and time.monotonic() < limit, "it ended by itself, or hangs"
        assert process.exitcode == -signal.SIGKILL
        states = {path.name: checkpoint.load(path) for path in killed.glob("checkpoints/*.pth")}
        steps.append(states.get("latest.pth", {"step": 0})["step"])
        leftovers += bool(temporaries(killed) - before)

    flags += ["--epochs", states["latest.pth"]["epoch"] + 1]
    for folder in folders:
        done = run_script("train.py", *flags, cwd=folder, env=ENVIRONMENT | ALONE)
        assert (done.returncode, done.stderr) == (0, "")
    for name in ("best.pth", "latest.pth", "final.pth"):
        end, expected = (checkpoint.load(folder / "checkpoints" / name) for folder in folders)
        assert {**expected["settings"], "epochs": 1000} == {**end.pop("settings"), "epochs": 1000}, name
        assert not differences(end, {part: expected[part] for part in end}), name
    for folder in ("checkpoints", "outputs"):  # the same files, with no leftover
        assert not differences(*(sorted(path.name for path in (run / folder).iterdir()) for run in folders))
    curves = scalars(killed / "logs")
    assert curves == scalars(undisturbed / "logs") and curves["loss/train"] == list(range(1, end["step"] + 1))
    assert steps == sorted(steps)
    asked = ", ".join(f"{count} {moment}" for moment, count in moments.most_common())
    print(f"\n50 kills; half of them were asked before: {asked}; {leftovers} left a .tmp; latest.pth at {steps[1:]};")
    print(f"{end['epoch']} epochs, {end['step']} steps, every curve whole; final weights identical to the last bit")
    assert leftovers > 0 and len(moments) >= 4 and len(set(steps)) > 10, "the kills were not spread over the run"
