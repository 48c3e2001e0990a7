"""Progress: bars on a terminal, lines without one, never a long silence, and the forecast of a training's length.

No test waits for real seconds: the clock is replaced, or whatever takes long lasts until the next line has come.
"""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, quick_arguments
from torch import Tensor, nn

import train
from src.diffusion import Diffusion
from src.generation import Generator
from src.model import UNet
from src.scores import classifier, copies, evaluation, metrics
from src.training import Learner
from src.utils import cache, checkpoint, progress
from src.utils.distributed import World

log = logging.getLogger("test")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of `src.utils.progress`; the lines are not written by a thread, but asked for."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    nothing = SimpleNamespace(start=lambda: None, join=lambda: None)
    monkeypatch.setattr(progress, "threading", SimpleNamespace(Event=threading.Event, Thread=lambda **_: nothing))
    return clock


@pytest.fixture
def info(caplog) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


# ---- lines -------------------------------------------------------------------------------------------------


def test_a_line_says_what_is_done_how_fast_and_what_is_left(clock, info):
    with progress.progress(log, total=11_600_000, initial=100_000, unit=" images", desc="epoch 1/200") as bar:
        clock.now += 100  # of compilation, for example, which is no part of the rate
        assert bar.line() == "epoch 1/200: 100,000 of 11,600,000 images"
        clock.now += 10
        bar.update(3000)
        bar.set_postfix_str("loss 0.5")
        assert bar.line() == "epoch 1/200, loss 0.5: 103,000 of 11,600,000 images, 300 images/s, 10 h 39 min left"
        clock.now += 60
        assert "103,000 of 11,600,000 images, 42.9 images/s, 74 h 31 min left" in bar.line()  # stalled


def test_the_rate_is_that_of_the_last_ten_lines(clock, info):
    with progress.progress(log, total=100_000, unit=" images", desc="sampling") as bar:
        for rate in [100] * 5 + [10] * 11:
            clock.now += 60
            bar.update(60 * rate)
            line = bar.line()
    assert line == "sampling: 36,600 of 100,000 images, 10.0 images/s, 1 h 46 min left"


def test_the_first_line_comes_early_then_one_every_minute(clock, info):
    waits: list[float] = []
    bar = progress.progress(log, total=10, unit=" images", desc="sampling")
    bar.closed = SimpleNamespace(wait=lambda seconds: waits.append(seconds) or len(waits) == 5, set=lambda: None)
    bar._log_lines()
    assert waits == [10, 60, 60, 60, 60] and len(info.messages) == 4
    bar.close()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (89, "89 s"), (91, "2 min"), (5910, "98 min"), (6000, "1 h 40 min"), (129_600, "36 h 0 min")],
)
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words


def test_what_is_done_by_sampling_steps_ends_at_the_total(clock, info):
    """As a sum of fractions it would end at 16.00000000000002, of which tqdm warns; with several processes, at 20."""
    for items in (16, 20):
        with progress.progress_in_steps(log, 30, total=16, unit=" images", desc="sampling") as advance:
            bar = next(iter(progress.Lines._instances))
            for _ in range(15):
                advance(items)
            assert bar.n == items / 2
            for _ in range(15):
                advance(items)
            assert bar.n == 16


# ---- terminals, pipes, --quiet -----------------------------------------------------------------------------

SHOW = """
import logging, sys, time
from src.utils import progress

logging.basicConfig(level=sys.argv[1], stream=sys.stdout, format="%(message)s")
progress.FIRST_LINE = progress.NEXT_LINES = 0.01
log = logging.getLogger("x")
lines = []
log.addFilter(lambda record: lines.append(record) or True)
with progress.progress(log, total=8, unit=" images", desc="sampling") as bar:
    for _ in range(8):
        bar.update()
        while isinstance(bar, progress.Lines) and not lines:
            time.sleep(0.01)
"""


def show(level: str, stderr: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SHOW, level]
    return subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=100)


@pytest.fixture
def terminal() -> Iterator[Callable[[int], tuple[int, Callable[[], str]]]]:
    """`terminal(columns)` opens one: the file descriptor for a program, and a function that reads what it wrote."""
    opened = []

    def terminal(columns: int) -> tuple[int, Callable[[], str]]:
        ours, theirs = pty.openpty()
        opened.extend((ours, theirs))
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

        def read() -> str:
            os.write(theirs, b"$")  # so that there is something to read
            return os.read(ours, 100_000).decode()

        return theirs, read

    yield terminal
    for descriptor in opened:
        os.close(descriptor)


def test_a_terminal_gets_the_bar_and_the_log_no_lines(terminal):
    theirs, read = terminal(90)
    assert show("INFO", theirs).stdout == ""
    assert "\rsampling: 100%|" in read()


def test_a_log_file_gets_lines_and_no_debris(tmp_path):
    with open(tmp_path / "errors", "w") as errors:
        lines = show("INFO", errors.fileno()).stdout
    assert re.match(r"sampling: \d of 8 images(, [\d.]+k? images/s, \d+ s left)?\n", lines)
    assert not re.search(r"[\r\x1b]", lines) and (tmp_path / "errors").read_text() == ""


def test_a_terminal_without_a_width_gets_lines(terminal):
    """As in some containers and build servers; tqdm would draw bars of no width there, that is, nothing."""
    theirs, read = terminal(0)
    assert show("INFO", theirs).stdout.startswith("sampling: ")
    assert read() == "$"


@pytest.mark.parametrize("columns", [90, None])
def test_quiet_silences_bar_and_lines(columns, terminal, tmp_path):
    if columns:
        theirs, read = terminal(columns)
        assert show("WARNING", theirs).stdout == "" and read() == "$"
    else:
        done = show("WARNING", subprocess.PIPE)
        assert (done.stdout, done.stderr) == ("", "")


# ---- never a long silence ----------------------------------------------------------------------------------


class Awaited(logging.Handler):
    """Collects the lines of the log; `hang(pattern)` lasts until such a line has come after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.news = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self.news:
            self.lines.append(record.getMessage())
            self.news.notify_all()

    def hang(self, pattern: str) -> None:
        with self.news:
            before = len(self.lines)
            found = self.news.wait_for(lambda: any(re.match(pattern, line) for line in self.lines[before:]), 60)
        assert found, f"silence instead of {pattern}: {self.lines}"

    def before(self, call: Callable[..., Any], pattern: str) -> Callable[..., Any]:
        """`call`, as on a slow machine."""

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.hang(pattern)
            return call(*args, **kwargs)

        return slow


@pytest.fixture
def slowly(monkeypatch, caplog) -> Iterator[Awaited]:
    monkeypatch.setattr(progress, "FIRST_LINE", 0.02)
    monkeypatch.setattr(progress, "NEXT_LINES", 0.02)
    caplog.set_level(logging.INFO)
    logging.getLogger().addHandler(handler := Awaited())
    yield handler
    logging.getLogger().removeHandler(handler)


def test_no_phase_of_a_training_is_silent(quick, slowly, monkeypatch):
    epoch = r"epoch 1/1, step \d+, loss \d\.\d{4}: \d+ of 40 images"
    monkeypatch.setattr(Learner, "step", slowly.before(Learner.step, r"epoch 1/1(, step \d.*)?: \d+ of 40 images"))
    monkeypatch.setattr(train, "validation_loss", slowly.before(train.validation_loss, "validating: 0 of 2 batches"))
    monkeypatch.setattr(Generator, "images", slowly.before(Generator.images, "drawing samples: 0 of 2 images"))
    monkeypatch.setattr(checkpoint, "save", slowly.before(checkpoint.save, epoch))
    assert quick("run", "--epochs", 1) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(_log_lines)")]


class Slow:
    """Something of an evaluation, with the interface of all of them, that hangs until a line comes."""

    num_features, has_logits, name, sha256 = 4, False, "slow", "none"
    shape, dtype = torch.Size((3, 1, 8, 8)), torch.uint8

    def __init__(self, hang: Callable[[], None]) -> None:
        self.hang = hang

    def __call__(self, images: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.hang()
        return torch.zeros(len(images), 4), torch.zeros(len(images), 2)

    def compute(self) -> dict[str, Any]:
        self.hang()
        return {"notes": []}

    def split(self, size: int) -> Iterator[Tensor]:
        self.hang()
        yield torch.zeros(self.shape, dtype=self.dtype)

    def __len__(self) -> int:
        return 3


class SlowUNet(UNet):
    """Hangs in its first call."""

    hang: Callable[[], None] | None = None

    def forward(self, *args: Any) -> Tensor:
        if self.hang:
            self.hang, hang = None, self.hang
            hang()
        return super().forward(*args)


IMAGES = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)


def generated(hang: Callable[[], None], tmp_path: Any, monkeypatch: Any) -> None:
    unet = SlowUNet(8, 1, 8, [1], 0)
    unet.hang = hang
    generator = Generator(unet, Diffusion(10, "cosine"), steps=2)
    evaluation.generate(generator, evaluation.Options(3, 2, 0, "", None, False), [], World(torch.device("cpu")))


def bounded(hang: Callable[[], None], tmp_path: Any, monkeypatch: Any) -> None:
    unet = SlowUNet(8, 1, 8, [1], 0)
    unet.hang = hang
    labels = torch.zeros(len(IMAGES), dtype=torch.long)
    evaluation.bits_per_dim(Generator(unet, Diffusion(10, "cosine")), IMAGES, labels, 0)


def classified(hang: Callable[[], None], tmp_path: Any, monkeypatch: Any) -> None:
    class Loss(nn.CrossEntropyLoss):
        def forward(self, *args: Any) -> Tensor:
            if not hung:
                hung.append(hang())
            return super().forward(*args)

    hung: list[None] = []
    monkeypatch.setattr(nn, "CrossEntropyLoss", Loss)
    images = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    classifier.trained(images, torch.tensor([0, 1, 0, 1]), 2, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize(
    ("phase", "line"),
    [
        (
            lambda hang, place, _: metrics.reference_features(IMAGES, Slow(hang), place),
            "reference images: 0 of 3 images",
        ),
        (
            lambda hang, *_: copies.nearest(IMAGES, Slow(hang), "test images"),
            "neighbours of test images: 0 of 1 chunks",
        ),
        (
            lambda hang, *_: evaluation.collect(evaluation.Scorers(None, None, Slow(hang), {})),
            "computing scores: 0 of 1 parts",
        ),
        (lambda hang, *_: cache.key("", Slow(hang)), "hashing images: 0 of 1 chunks"),
        (
            lambda hang, *_: classifier.Classifier(classifier._network(1, 2)).accuracy(Slow(hang), torch.zeros(3)),
            "testing the classifier: 0 of 1 batches",
        ),
        (generated, "scoring: 0 of 3 images"),
        (bounded, r"bits per dimension: 0 of \d+ evaluations"),
        (classified, r"training the classifier: 0 of \d+ batches"),
    ],
    ids=["features", "neighbours", "scores", "hash", "accuracy", "generation", "likelihood", "classifier"],
)
def test_no_phase_of_an_evaluation_is_silent(phase, line, slowly, tmp_path, monkeypatch):
    phase(lambda: slowly.hang(line), tmp_path, monkeypatch)


def test_chunks_are_counted_once(clock, info, monkeypatch):
    bars = []
    make = progress.progress
    monkeypatch.setattr(copies, "progress", lambda *args, **options: bars.append(make(*args, **options)) or bars[0])
    monkeypatch.setattr(copies, "CHUNK", 1)
    copies.nearest(IMAGES, IMAGES)
    assert (bars[0].n, bars[0].total) == (3, 3)


# ---- how long a training takes -----------------------------------------------------------------------------


def test_the_pace_is_that_of_the_steps_after_the_first(clock):
    """Without the slow first steps, and without what happens between two epochs."""
    pace, waited, measured = progress.Pace(), [], []
    for step in range(1, 131):
        if step % 30 == 1:
            clock.now += 5000  # validation, samples
            pace.start()
        clock.now += 90 if step <= 20 else 0.25
        measured.append(pace.count(lambda step=step: waited.append(step)))
    assert [step for step, seconds in enumerate(measured, start=1) if seconds] == [100]
    assert measured[99] == pytest.approx(0.25)
    assert waited == [20, 100]  # a device that queues steps is waited for where the clock is read


@pytest.fixture
def forecasts(quick, clock, info, monkeypatch) -> Callable[..., list[str]]:
    """`forecasts(*flags)` trains with steps of 2 s, 4 an epoch; its lines of the forecast, here after ten steps."""
    monkeypatch.setattr(progress, "WARM_UP", 4)
    monkeypatch.setattr(progress, "MEASURED", 6)
    step = Learner.step

    def steadily(self: Learner, *args: Any) -> Any:
        clock.now += 2
        return step(self, *args)

    def long(*_args: Any) -> float:
        clock.now += 1000
        return 1.0

    monkeypatch.setattr(Learner, "step", steadily)
    monkeypatch.setattr(train.Trainer, "validate", long)

    def run(*flags: object) -> list[str]:
        info.clear()
        assert quick("run", "--num_samples", 1, "--steps", 1, "--sample_every", 99, *flags) == 0
        return [message.partition(" come")[0] for message in info.messages if "images/s" in message]

    return run


def test_the_log_says_once_how_long_the_run_takes(forecasts, info, tmp_path):
    (line,) = forecasts("--epochs", 3)
    assert line == "3 epochs take about 24 s at 5 images/s; the next samples"  # the first are there since epoch 1
    assert f"come in about 4 s: {tmp_path}/run/output/samples_epoch_0003.png" in info.text
    (line,) = forecasts("--epochs", 6)
    assert line == "the rest of the 6 epochs takes about 24 s at 5 images/s; the next samples"
    assert forecasts("--epochs", 7) == []  # too few steps


def test_the_first_samples_come_after_the_first_epoch(quick, data, tmp_path):
    trainer = train.Trainer(quick_arguments(data, tmp_path, "--epochs", 200), World(torch.device("cpu")))
    trainer.batches_per_epoch, trainer.steps = 906, 200 * 906  # Fashion-MNIST
    trainer.args.batch_size, trainer.args.sample_every = 64, 10
    trainer.learner.steps = trainer.pace.steps = 100
    assert trainer.forecast(64 / 300) == (
        "200 epochs take about 10 h 44 min at 300 images/s; the first samples come in about 3 min: "
        f"{tmp_path}/output/samples_epoch_0001.png"
    )
    trainer.learner.steps, trainer.learner.epoch = 150 * 906 + 100, 150
    assert trainer.forecast(64 / 90) == (
        "the rest of the 200 epochs takes about 8 h 57 min at 90 images/s; the next samples come in about 1 h 46 min: "
        f"{tmp_path}/output/samples_epoch_0160.png"
    )
