"""The training loop on 60 images, in this process: averages, saves, stops and resumes, logs, refusals."""

import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    NETWORK,
    ROOT,
    SMALL,
    TINIEST,
    arguments,
    differences,
    quick_arguments,
    read_png,
    scalars,
    share_apart,
)
from torch import Tensor

import config
import train
from src.data import datasets
from src.ema import EMA
from src.model import UNet
from src.training import Learner
from src.utils import checkpoint, cores, devices, errors, lock, pictures, settings
from src.utils.distributed import World
from src.utils.signals import StopSignals

STEPS = 4  # an epoch of `quick`: 40 images in batches of 10
CHECKS = STEPS + 2 + 3  # how often an epoch asks whether to stop: steps, validation batches, sampling steps


@pytest.fixture
def failing(quick, capsys) -> Callable[..., str]:
    """`failing(status, name, *flags)`: `quick`, which must exit with this status and the one line that is returned."""

    def run(status: int, name: str, *flags: object) -> str:
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: quick(name, *flags), "train.py", quiet=False)
        error = capsys.readouterr().err
        assert stop.value.code == status
        assert error.startswith("train.py: error: ") and error.count("\n") == 1
        return error

    return run


@pytest.fixture(scope="module")
def memory() -> dict[Any, dict[str, Any]]:
    return {}


@pytest.fixture
def once(memory, quick, saved) -> Callable[..., dict[str, Any]]:
    """`once(*flags)`: the checkpoints of an undisturbed `quick`, by file name, trained once for all tests here."""

    def run(*flags: object) -> dict[str, Any]:
        if flags not in memory:
            assert quick("once", "--fresh", "--overwrite", *flags) == 0
            memory[flags] = {name: saved("once", name) for name in ("best.pth", "latest.pth", "final.pth")}
        return memory[flags]

    return run


# ---- the average of the weights ----------------------------------------------------------------------------


def test_the_average_follows_its_recurrence_at_every_step(quick, saved, monkeypatch):
    """Replayed from the weights after each optimiser step; an update an epoch would be far off."""
    expected: list[Tensor] = []
    adam_step, ema_init = torch.optim.Adam.step, EMA.__init__

    steps = count(1)

    def spy_init(self: EMA, model: torch.nn.Module, decay: float) -> None:
        expected.extend(p.detach().double().clone() for p in model.parameters())
        ema_init(self, model, decay)

    def spy_step(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> None:
        adam_step(self, *args, **kwargs)
        decay = min(0.5, (n := next(steps)) / (n + 9))  # 0.1, 2/11, 3/12, … 0.5 at last, from step 9 on
        for average, p in zip(expected, self.param_groups[0]["params"], strict=True):
            average.mul_(decay).add_(p.detach().double(), alpha=1 - decay)

    monkeypatch.setattr(EMA, "__init__", spy_init)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    quick("run", "--epochs", 3, "--ema_decay", 0.5)
    state = saved("run")
    for (name, average), truth in zip(state["ema"].items(), expected, strict=True):
        torch.testing.assert_close(average.double(), truth, rtol=1e-5, atol=1e-7, msg=name)
    assert differences(state["ema"], state["model"])


def test_images_reach_the_network_normalised_once(quick, monkeypatch):
    seen = []
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, x0, *rest: seen.append(x0) or step(self, x0, *rest))
    quick("run", "--epochs", 1)
    images = torch.cat(seen)
    assert (len(images), images.dtype) == (STEPS * 10, torch.float32)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert (images == -1).float().mean() > 0.3  # the background of clothes is black, not grey


# ---- what is saved, and when -------------------------------------------------------------------------------


@pytest.fixture
def power_cut(monkeypatch) -> Callable[[int], AbstractContextManager[None]]:
    """`with power_cut(step)`: training dies before it can do the step after `step`."""

    @contextmanager
    def cut(step: int) -> Iterator[None]:
        whole_step = Learner.step

        def fatal_step(self: Learner, *batch: object) -> tuple[Tensor, Tensor]:
            if self.steps == step:
                raise RuntimeError("power cut")
            return whole_step(self, *batch)

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "step", fatal_step)
            yield

    return cut


@pytest.fixture
def validation(monkeypatch) -> Callable[..., None]:
    """`validation(*losses)`: what the coming epochs' validation shall find."""

    def plan(*losses: float) -> None:
        left = list(losses)
        monkeypatch.setattr(train.Trainer, "validate", lambda self, signals: left.pop(0))

    return plan


def test_latest_is_written_at_every_save_whether_or_not_the_loss_improved(quick, validation, monkeypatch):
    written = []
    save = checkpoint.save

    def spy(path: Path, state: dict[str, Any]) -> None:
        written.append((path.name, state["epoch"], state.get("best")))
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", spy)
    validation(0.5, 0.4, 0.6, 0.3, 0.7, 0.9, 0.9)
    quick("run", "--epochs", 7, "--save_every", 6)
    assert written == [
        ("latest.pth", 0, math.inf),  # or a run that fails in the next saves would go on as if they were made
        ("best.pth", 1, 0.5),
        ("latest.pth", 1, 0.5),  # with every best.pth, or a resumed run would not know what it has to beat
        ("best.pth", 2, 0.4),
        ("latest.pth", 2, 0.4),
        ("best.pth", 4, 0.3),
        ("latest.pth", 4, 0.3),
        ("latest.pth", 6, 0.3),  # save_every
        ("weights.pth", 7, None),
        ("final.pth", 7, 0.3),  # before latest.pth, which says that nothing is left to do
        ("latest.pth", 7, 0.3),  # the last epoch is saved even where it is no multiple of save_every
    ]


def test_what_a_crash_can_cost_is_bounded_by_time(quick, saved, once, power_cut):
    """`--save_minutes 0` saves after every step, so nothing at all is lost here."""
    flags = ["--epochs", 2, "--save_minutes", 0, "--save_every", 9]
    with power_cut(STEPS + 2), pytest.raises(RuntimeError, match="power cut"):
        quick("run", *flags)
    assert (saved("run")["epoch"], saved("run")["batch"]) == (1, 2)
    quick("run", *flags)
    assert not differences(saved("run", "final.pth"), once(*flags)["final.pth"])


def test_the_best_model_survives_a_resumed_run_that_does_worse(quick, saved, validation):
    validation(0.5)
    quick("run", "--epochs", 1)
    best = saved("run", "best.pth")
    validation(0.9)
    quick("run", "--epochs", 2)
    assert not differences(saved("run", "best.pth"), best)
    assert saved("run")["best"] == 0.5 and saved("run")["epoch"] == 2
    validation(0.4)
    quick("run", "--epochs", 3)
    assert saved("run", "best.pth")["epoch"] == 3 and saved("run", "best.pth")["best"] == 0.4


def test_a_checkpoint_holds_all_that_a_run_depends_on(quick, saved):
    quick("run", "--epochs", 2)
    state = saved("run", "final.pth")
    conditions = "program format settings data trained_on init_from precision threads"
    learnt = "model ema optimizer rng epoch batch step loss_sum best history"
    assert set(state) == {*conditions.split(), *learnt.split()}
    assert (state["epoch"], state["batch"], state["step"]) == (2, 0, 2 * STEPS)
    assert len(state["history"]["train"]) == len(state["history"]["val"]) == 2
    assert state["best"] == min(state["history"]["val"])
    assert not any(name.startswith("_orig_mod.") or "module." in name for name in state["model"])
    assert not any("/" in str(value) for value in state["settings"].values()), "a path of this machine"


def test_a_diverging_run_stops_before_it_saves_ruined_weights(quick, failing, saved, monkeypatch):
    quick("run", "--epochs", 1)
    good = saved("run")
    monkeypatch.setitem(settings.SETTINGS, "LEARNING_RATE", settings.SETTINGS["EPOCHS"])  # else 1e30 is refused
    message = failing(1, "run", "--epochs", 3, "--learning_rate", "1e30")
    assert re.search(r"gradient of step \d+ is (nan|inf)", message) and "--learning_rate" in message
    assert not differences(saved("run"), good)
    assert all(w.isfinite().all() for w in saved("run", "best.pth")["ema"].values())


@pytest.mark.parametrize(
    ("flags", "stop", "noticed"),
    [
        (["--log_every", 7], [], 7),
        (["--log_every", 99], [], 2 * STEPS),  # before the validation
        (["--log_every", 99], [CHECKS + 3], 7),  # before the save that a signal asks for
        (["--log_every", 99, "--save_minutes", 0], [], 6),
    ],
    ids=["when logging", "before validating", "before saving when stopped", "before saving in time"],
)
def test_a_gradient_that_is_not_finite_is_noticed_before_it_shows(
    flags, stop, noticed, quick, failing, saved, tmp_path, stop_at, monkeypatch
):
    """Step 6, in the middle of the second epoch, is spoilt."""
    stop_at(*stop)
    last = 0
    step, validate = Learner.step, train.Trainer.validate

    def spoilt(self: Learner, x0: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        nonlocal last
        last = self.steps + 1
        return step(self, x0 * float("nan") if last == 6 else x0, *rest)

    def watched(self: train.Trainer, signals: StopSignals) -> float:
        assert last < 6
        return validate(self, signals)

    monkeypatch.setattr(Learner, "step", spoilt)
    monkeypatch.setattr(train.Trainer, "validate", watched)
    assert "gradient of step 6 is nan" in failing(1, "run", "--epochs", 3, *flags)
    assert last == noticed
    states = [checkpoint.load(path) for path in (tmp_path / "run/checkpoint").glob("*.pth")]
    assert len(states) == 2 and all(state["step"] < 6 for state in states)
    assert set(scalars(tmp_path / "run/log").get("loss/train", [])) <= set(range(1, 6))


# ---- speed without a price ---------------------------------------------------------------------------------


def test_auto_is_bfloat16_where_the_processor_has_it_and_float32_elsewhere(monkeypatch):
    """And where torch was told to compute as an older one (ATEN_CPU_CAPABILITY), it is float32, too."""
    cpu, half, single = torch.device("cpu"), torch.bfloat16, torch.float32
    for amx, avx, used, chosen in [
        (0, 0, "AVX512", single),
        (1, 0, "AVX512", half),
        (0, 1, "AVX512", half),
        (1, 1, "AVX2", single),
        (1, 1, "DEFAULT", single),
    ]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda used=used: used)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: bool(amx))
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: bool(avx))
        assert devices.pick_precision("auto", cpu) == chosen
        assert devices.pick_precision("float32", cpu) == torch.float32


def test_bfloat16_learns_as_float32_does(quick, saved):
    """The same seed, so the same images, timesteps and noises: the curves differ by rounding alone."""
    curves = {}
    for precision in ("float32", "bfloat16"):
        quick(precision, "--epochs", 30, "--save_every", 30, "--sample_every", 30, "--precision", precision)
        state = saved(precision)
        assert all(w.dtype == torch.float32 for w in state["model"].values())
        curves[precision] = torch.tensor([state["history"]["train"], state["history"]["val"]])
    exact, rounded = curves["float32"], curves["bfloat16"]
    assert (exact[:, -1] < 0.6 * exact[:, 0]).all()  # there is something to follow
    assert 0 < (rounded / exact - 1).abs().max() < 5 * 2**-8  # a few roundings of bfloat16, which keeps 8 bits


@pytest.mark.slow
def test_a_compiled_run_leaves_the_checkpoint_of_a_plain_one(quick, saved, tmp_path, monkeypatch):
    # Code that torch compiled and cached under other limits on the processor's instructions yields NaN under these.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    # With 8 channels, each group of a GroupNorm has one, and the gradient of a bias before it is only rounding.
    flags = "--precision float32 --unet_dim 16 --learning_rate 1e-3".split()
    quick("plain", "--epochs", 1, *flags)
    quick("compiled", "--epochs", 1, *flags, "--compile")
    plain, compiled = saved("plain"), saved("compiled")
    for part in ("model", "ema"):
        assert list(compiled[part]) == list(plain[part])
        assert share_apart(compiled[part], plain[part], 1e-4) < 0.01  # after four steps of 1e-3
    assert quick("compiled", "--epochs", 2, *flags) == 0  # and a plain run goes on from it


# ---- stopping and resuming ---------------------------------------------------------------------------------


@pytest.fixture
def stop_at(monkeypatch) -> Callable[..., None]:
    """`stop_at(*counts, number=SIGINT)`: a real signal comes just before those checks, counted over all runs."""

    def plan(*counts: int, number: int = signal.SIGINT) -> None:
        done = 0
        check = StopSignals.check

        def interrupted_check(self: StopSignals) -> None:
            nonlocal done
            done += 1
            if done in counts:
                os.kill(os.getpid(), number)
            check(self)

        monkeypatch.setattr(StopSignals, "check", interrupted_check)

    return plan


MOMENTS = {
    "in the middle of the first epoch": (2,),
    "after an epoch's last batch": (STEPS,),
    "during validation": (STEPS + 1,),
    "during sampling": (STEPS + 2 + 2,),
    "after an epoch's last check": (CHECKS,),
    "in the middle of a later epoch": (CHECKS + 1,),
    "after the last batch of all": (CHECKS + STEPS,),
    "at the very last check": (2 * CHECKS,),
    "again and again": (1, 3, 5, 12),
}


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
def test_stopped_and_resumed_equals_uninterrupted_to_the_last_bit(moments, quick, saved, stop_at, once):
    uninterrupted = once("--epochs", 2)
    stop_at(*moments)
    for _ in moments:
        assert quick("run", "--epochs", 2) == 130
        torch.manual_seed(99)  # whatever the process drew before must not matter
    assert quick("run", "--epochs", 2) == 0
    for name, state in uninterrupted.items():
        assert not differences(saved("run", name), state), name


def test_a_run_that_was_to_be_short_goes_on_as_one_that_was_to_be_long(quick, saved, once):
    quick("run", "--epochs", 1)
    quick("run", "--epochs", 2)
    assert not differences(saved("run", "final.pth"), once("--epochs", 2)["final.pth"])


FORGOTTEN = {
    "nothing": lambda state: {},
    "model": lambda state: {"model": state["ema"]},
    "ema": lambda state: {"ema": state["model"]},
    "optimizer": lambda state: {"optimizer": {**state["optimizer"], "state": {}}},
    "rng": lambda state: {"rng": {"cpu": torch.Generator().manual_seed(0).get_state()}},
    "epoch": lambda state: {"epoch": 0},
    "batch": lambda state: {"batch": 0},
    "step": lambda state: {"step": 0},
    "loss_sum": lambda state: {"loss_sum": torch.zeros_like(state["loss_sum"])},
    "history": lambda state: {"history": {"train": [], "val": []}},
}


@pytest.fixture
def stopped(memory, quick, saved, stop_at) -> dict[str, Any]:
    """latest.pth of two epochs that were stopped in the second; also trained once."""
    if "stopped" not in memory:
        stop_at(CHECKS + 2)
        assert quick("stopped", "--epochs", 2) == 130
        memory["stopped"] = saved("stopped")
    return memory["stopped"]


@pytest.mark.parametrize("part", FORGOTTEN)
def test_a_resume_that_forgets_a_part_of_the_checkpoint_ends_elsewhere(part, quick, saved, stopped, once, tmp_path):
    """The negative control of the tests above (the best score has a test of its own)."""
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    checkpoint.save(tmp_path / "run/checkpoint/latest.pth", {**stopped, **FORGOTTEN[part](stopped)})
    assert quick("run", "--epochs", 2) == 0
    changed = differences(saved("run", "final.pth"), once("--epochs", 2)["final.pth"])
    assert bool(changed) == (part != "nothing")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_gives_the_status_of_its_kind(number, status, quick, saved, stop_at):
    stop_at(3, number=number)
    assert quick("run", "--epochs", 2) == status
    assert (saved("run")["step"], saved("run")["batch"], saved("run")["epoch"]) == (3, 3, 0)


def test_a_stop_while_sampling_saves_the_raw_weights_and_no_picture(quick, saved, stop_at, tmp_path):
    stop_at(STEPS, STEPS + CHECKS - 1)
    assert quick("after the last batch", "--epochs", 1) == 130
    assert quick("in sampling", "--epochs", 1) == 130
    before, within = saved("after the last batch"), saved("in sampling")
    assert not differences(before, within)
    assert differences(within["model"], within["ema"])
    assert not list((tmp_path / "in sampling").glob("output/*"))


def test_a_second_signal_quits_at_once_without_saving(quick, tmp_path, monkeypatch, capsys):
    def impatient(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    monkeypatch.setattr(Learner, "step", impatient)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    try:
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: quick("run", "--epochs", 1), "train.py", quiet=False)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "train.py: error: interrupted\n"
    assert not (tmp_path / "run/checkpoint/latest.pth").exists()


def test_signals_act_as_before_once_training_is_over(quick):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    quick("run", "--epochs", 1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_real_process_is_answered_in_one_line_with_what_to_do(number, data, tmp_path):
    """Sent in the midst of a long run; the output is all that the user sees."""
    short_epochs = ["--image_size", 28, "--val_size", 900, "--epochs", 10_000]
    command = [sys.executable, ROOT / "train.py", "--data_path", data, *SMALL, *NETWORK, *short_epochs]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 1/10000: loss"):  # not a line of progress
                process.send_signal(number)
                break
        output = process.stdout.read()
        assert process.wait(timeout=600) == 128 + number
    finally:
        process.kill()
    state = checkpoint.load(tmp_path / "checkpoints/latest.pth")
    last_words = rf"{number.name}: saved step {state['step']} in checkpoints/latest\.pth; .*same command.*"
    assert re.fullmatch(last_words, output.splitlines()[-1])
    assert state["step"] == 2 * state["epoch"] + state["batch"] >= 2
    assert not re.search(r"\b(done|completed?|finished)\b|Traceback|KeyboardInterrupt|\r", output, re.IGNORECASE)
    pictures_drawn = {path.name for path in tmp_path.glob("outputs/samples_*.png")}
    assert pictures_drawn == {"samples_epoch_0001.png"} and not (tmp_path / "checkpoints/final.pth").exists()


# ---- flags -------------------------------------------------------------------------------------------------

LINEAR = ["--schedule_type", "linear"]
SHAPING = [
    ("model", [], ["--learning_rate", "1e-2"]),
    ("model", [], ["--grad_clip", "1e-3"]),
    ("model", [], ["--lr_warmup", "3"]),
    ("model", [], ["--lr_decay", "0.5"]),
    ("model", [], ["--dropout", "0.1"]),
    ("model", [], ["--no-class_conditional"]),
    ("model", [], ["--class_dropout", "0.5"]),
    ("model", [], ["--loss_weight", "min_snr"]),
    ("model", [], ["--time_sampling", "uniform"]),
    ("ema", [], ["--ema_decay", "0.2"]),
    ("model", [], ["--seed", "1"]),
    ("model", [], ["--batch_size", "20"]),
    ("model", [], ["--val_size", "30"]),
    ("model", [], ["--image_size", "32"]),
    ("model", [], ["--precision", "bfloat16"]),
    ("model", [], ["--unet_dim", "16"]),
    ("model", [], ["--unet_dim_mults", "1", "1"]),
    ("model", [], ["--time_steps", "40"]),
    ("model", [], ["--prediction", "noise"]),
    ("model", [], ["--prediction", "x0"]),
    ("model", [], LINEAR),
    ("model", LINEAR, ["--beta_start", "1e-3"]),
    ("model", LINEAR, ["--beta_end", "0.01"]),
]


@pytest.mark.parametrize(("part", "base", "flag"), SHAPING, ids=[" ".join(flag) for _, _, flag in SHAPING])
def test_a_flag_of_training_changes_the_weights(part, base, flag, once):
    base = ["--epochs", 1, "--precision", "float32", *base]
    assert differences(once(*base)["final.pth"][part], once(*base, *flag)["final.pth"][part])


def test_defaults_fit_the_training(data, tmp_path):
    def trained_by(*flags):
        return train.Trainer(quick_arguments(data, tmp_path, *flags), World(torch.device("cpu"))).args

    few_steps = "--objective", "consistency"
    assert trained_by().time_sampling == config.TIME_SAMPLING != "stratified"
    assert trained_by(*few_steps).time_sampling == "stratified"
    assert trained_by(*few_steps, "--time_sampling", "uniform").time_sampling == "uniform"
    flags = [*SMALL, *NETWORK, "--data_path", data, "--epochs"]  # 8 steps an epoch
    short, long = (
        train.Trainer(arguments(train, *flags, epochs), World(torch.device("cpu"))).args for epochs in (10, 1000)
    )
    assert (short.lr_warmup, long.lr_warmup) == (8, config.LR_WARMUP)
    given = arguments(train, *flags, 10, "--lr_warmup", 20)
    assert train.Trainer(given, World(torch.device("cpu"))).args.lr_warmup == 20


def test_the_same_seed_gives_the_same_run(quick, saved):
    quick("one", "--epochs", 1, "--seed", 5)
    torch.manual_seed(99)
    quick("two", "--epochs", 1, "--seed", 5)
    assert not differences(saved("one"), saved("two"))


@pytest.mark.parametrize(
    "flag", [["--num_samples", "5"], ["--sampler", "dpmpp_2m"], ["--steps", "7"], ["--sampler", "ddim"]], ids=" ".join
)
def test_a_flag_of_sampling_changes_the_pictures_of_training(flag, quick, data, tmp_path):
    base, changed = (
        train.Trainer(quick_arguments(data, tmp_path, "--epochs", 1, *flags), World(torch.device("cpu")))
        for flags in ([], flag)
    )
    for trainer in (base, changed):  # a network that predicts something, without having to train it
        weight = trainer.learner.ema.model.conv_out.weight
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    with StopSignals() as signals:
        assert not differences(base.sample_grid(signals), base.sample_grid(signals))
        assert differences(base.sample_grid(signals), changed.sample_grid(signals))


def test_pictures_come_at_their_epochs_and_fit_the_number_of_samples(quick, tmp_path):
    quick("run", "--epochs", 5, "--sample_every", 2, "--num_samples", 5)
    pictures = sorted(path.name for path in (tmp_path / "run/output").iterdir())
    assert pictures == [f"samples_epoch_000{epoch}.png" for epoch in (1, 2, 4, 5)]  # the first and the last, too
    assert read_png(tmp_path / "run/output/samples_epoch_0002.png").shape == (2 * 30, 3 * 30)  # 28 pixels and a gap


# ---- TensorBoard -------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_and_resumed_draws_every_step_once(quick, tmp_path, power_cut):
    """Killed in its second epoch, it does again the steps since its last save; the old points of these are hidden."""
    with power_cut(STEPS + 2), pytest.raises(RuntimeError, match="power cut"):
        quick("run", "--epochs", 3)
    assert scalars(tmp_path / "run/log")["loss/train"] == [1, 2, 3, 4, 5, 6]
    quick("run", "--epochs", 3)
    curves = scalars(tmp_path / "run/log")
    assert curves["loss/train"] == curves["gradient_norm"] == list(range(1, 3 * STEPS + 1))
    assert curves["loss/validation"] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_the_curves_are_on_disk_before_a_checkpoint_that_counts_their_steps(quick, tmp_path, monkeypatch):
    """Else a power cut right after the save leaves a gap that the resumed run does not fill."""
    save, behind = checkpoint.save, []

    def spy(path: Path, state: dict[str, Any]) -> None:
        curves = scalars(tmp_path / "run/log")
        behind.append(state["step"] - len(curves["loss/train"]))
        behind.append(state["epoch"] - len(curves.get("loss/validation", [])))
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", spy)
    quick("run", "--epochs", 1, "--save_minutes", 0)
    assert behind == [0] * 2 * (STEPS - 1 + 4)  # the steps within the epoch; best, weights, final, latest at its end


def test_a_picture_is_on_disk_before_a_latest_that_counts_its_epoch(quick, tmp_path, monkeypatch):
    """Else a run killed between the two never draws it."""
    save, seen = checkpoint.save, []

    def spy(path: Path, state: dict[str, Any]) -> None:
        if path.name == "latest.pth":
            seen.append(sorted(picture.name for picture in (tmp_path / "run/output").iterdir()))
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", spy)
    quick("run", "--epochs", 2)
    assert seen == [[], ["samples_epoch_0001.png"], ["samples_epoch_0001.png", "samples_epoch_0002.png"]]


def test_log_every_thins_the_curves(quick, tmp_path):
    quick("run", "--epochs", 2, "--log_every", 3)
    assert scalars(tmp_path / "run/log")["loss/train"] == [3, 6]


# ---- refusals ----------------------------------------------------------------------------------------------


def test_a_resume_with_other_settings_is_refused_with_both_values(quick, failing, saved):
    quick("run", "--epochs", 1)
    before = saved("run")
    message = failing(2, "run", "--epochs", 2, "--unet_dim", 16, "--schedule_type", "linear", "--seed", 3)
    for sentence in (
        "UNET_DIM was 8 and is now 16",
        "SCHEDULE_TYPE was 'cosine' and is now 'linear'",
        "SEED was 0 and is now 3",
    ):
        assert sentence in message
    assert not differences(saved("run"), before)


def test_a_learning_rate_given_on_resume_is_used_and_said(quick, saved, caplog):
    quick("run", "--epochs", 1)
    quick("run", "--epochs", 2, "--learning_rate", "1e-4")
    assert f"LEARNING_RATE was {config.LEARNING_RATE} and is now 0.0001" in caplog.text
    assert saved("run")["optimizer"]["param_groups"][0]["lr"] == 1e-4


def test_a_damaged_latest_is_refused_and_left_as_it_is(quick, failing, tmp_path):
    quick("run", "--epochs", 1)
    latest = tmp_path / "run/checkpoint/latest.pth"
    latest.write_bytes(latest.read_bytes()[:5000])
    assert str(latest) in failing(1, "run", "--epochs", 2)
    assert latest.stat().st_size == 5000


def test_a_latest_that_holds_no_training_is_refused(failing, tmp_path):
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    checkpoint.save(tmp_path / "run/checkpoint/latest.pth", {"statistics": torch.zeros(3)})
    assert "no training" in failing(1, "run", "--epochs", 1)


@pytest.mark.parametrize("left", ["best.pth", "final.pth"])
def test_a_run_whose_latest_is_missing_goes_on_from_what_is_left(left, quick, saved, once, tmp_path):
    """Killed before it wrote latest.pth, or tidied up: nothing is silently trained over."""
    quick("run", "--epochs", 1)
    for path in (tmp_path / "run/checkpoint").glob("*.pth"):
        if path.name != left:
            path.unlink()
    assert quick("run", "--epochs", 2) == 0
    assert not differences(saved("run", "final.pth"), once("--epochs", 2)["final.pth"])


def test_fresh_is_refused_where_a_run_would_be_lost(quick, failing, saved):
    quick("run", "--epochs", 1)
    before = {name: saved("run", f"{name}.pth") for name in ("latest", "best", "final")}
    message = failing(2, "run", "--epochs", 1, "--fresh")
    assert "--overwrite" in message and all(f"{name}.pth" in message for name in before)
    assert not differences({name: saved("run", f"{name}.pth") for name in before}, before)


def test_fresh_with_overwrite_starts_anew(quick, saved, once):
    quick("run", "--epochs", 1, "--seed", 1, "--time_steps", 40)
    assert quick("run", "--epochs", 2, "--fresh", "--overwrite") == 0
    assert not differences(saved("run", "final.pth"), once("--epochs", 2)["final.pth"])


def test_fresh_with_overwrite_leaves_no_pictures_or_curves_of_the_old_run(quick, tmp_path):
    quick("run", "--epochs", 3)
    (mine := tmp_path / "run/output/samples").mkdir()
    assert quick("run", "--epochs", 1, "--fresh", "--overwrite") == 0
    assert {path.name for path in mine.parent.iterdir()} == {"samples", "samples_epoch_0001.png"}
    assert len(list((tmp_path / "run/log/tensorboard").iterdir())) == 1
    assert max(map(max, scalars(tmp_path / "run/log").values())) == STEPS


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        (["--run", "my runs/a"], "--run 'my runs/a'"),
        (["--run", "runs", "--checkpoint_path", "best ones"], "--checkpoint 'best ones/best.pth'"),
    ],
)
def test_the_last_line_names_commands_that_fit(flags, model, quick, data, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    train.main(arguments(train, *TINIEST, *NETWORK, "--epochs", 1, "--data_path", data, *flags))
    assert caplog.messages[-1] == f"done; next: python sample.py {model}, or python eval.py {model} --data_path {data}"


def test_weights_alone_are_not_lost_to_a_new_run_either(quick, failing, saved, tmp_path):
    quick("run", "--epochs", 1, "--seed", 1)
    weights, before = tmp_path / "run/checkpoint/weights.pth", saved("run", "weights.pth")
    for path in checkpoint.of_run(weights.parent):
        path.unlink()
    for flags in ([], ["--fresh"]):
        assert f"would lose {weights}" in failing(2, "run", "--epochs", 1, *flags)
        assert not differences(saved("run", "weights.pth"), before)
    assert quick("run", "--epochs", 1, "--fresh", "--overwrite") == 0
    assert differences(saved("run", "weights.pth"), before)


def test_fresh_with_overwrite_deletes_nothing_if_the_new_run_cannot_start(quick, failing, saved, tmp_path):
    quick("run", "--epochs", 1)
    before = saved("run")
    for flags in (["--dataset", "fashion-mnist-large"], ["--batch_size", 5000]):
        failing(2, "run", "--fresh", "--overwrite", *flags)
        assert (tmp_path / "run/checkpoint/latest.pth").exists(), flags
        assert not differences(saved("run"), before)


def test_two_trainings_never_write_to_the_same_place(quick, failing, tmp_path):
    directory = tmp_path / "run/checkpoint"
    directory.mkdir(parents=True)
    with lock.hold(directory):
        message = failing(1, "run", "--epochs", 1, "--fresh", "--overwrite")
        assert f"process {os.getpid()} " in message and str(directory) in message
    assert quick("run", "--epochs", 1) == 0


def test_too_few_images_are_refused_with_the_numbers_to_change(failing):
    message = failing(2, "run", "--batch_size", 50)
    assert "60 training images" in message and "--val_size 20" in message and "--batch_size 50" in message


@pytest.mark.parametrize("path", ["checkpoint", "output", "log"])
def test_a_place_that_cannot_be_written_is_refused_before_training(path, failing, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "step", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / path).write_text("a file where the directory belongs")
    assert f"--{path}_path" in failing(2, "run")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
@pytest.mark.parametrize("place", ["output", "log"])
def test_a_directory_that_is_deleted_costs_its_files_alone(place, quick, saved, tmp_path, monkeypatch, caplog):
    """Somebody cleans up the disk long after the start. Each loss is told once."""
    validate = train.Trainer.validate

    def clean_up(self: train.Trainer, signals: StopSignals) -> float:
        shutil.rmtree(tmp_path / "run" / place, ignore_errors=True)
        return validate(self, signals)

    monkeypatch.setattr(train.Trainer, "validate", clean_up)
    assert quick("run", "--epochs", 3) == 0
    assert saved("run", "final.pth")["epoch"] == 3
    name = {"output": "output/samples_epoch_*.png", "log": "log/tensorboard"}[place]
    (warning,) = warnings(caplog)
    assert warning.startswith(f"cannot write {tmp_path}/run/{name} (")


def test_a_plot_that_cannot_be_drawn_is_known_at_the_start(quick, saved, tmp_path, monkeypatch, caplog):
    told = []

    def fail(*curves: object) -> None:
        raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file, …")

    step = Learner.step
    monkeypatch.setattr(pictures, "plot_losses", fail)
    monkeypatch.setattr(Learner, "step", lambda *args: told.append(warnings(caplog)) or step(*args))
    assert quick("run", "--epochs", 2) == 0
    assert saved("run")["epoch"] == 2
    reason = "Descriptors cannot be created directly."
    line = f"cannot write {tmp_path}/run/output/losses.png ({reason}): the run goes on without it"
    assert told[0] == warnings(caplog) == [line]


def test_the_losses_are_plotted_whatever_display_a_notebook_names(tmp_path):
    """Its variable reaches the programs that it starts, whose packages are others."""
    code = "from pathlib import Path; from src.utils.pictures import plot_losses\n"
    code += "for losses in [], [0.5], [0.5, 0.4]: plot_losses({'train': losses, 'val': losses}, Path('losses.png'))"
    environment = {**ENVIRONMENT, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr, (tmp_path / "losses.png").exists()) == (0, "", True)


@pytest.mark.parametrize("name", ["best.pth", "weights.pth", "final.pth"])
def test_a_save_that_fails_at_the_end_of_an_epoch_is_made_up_for(name, quick, saved, monkeypatch, tmp_path):
    """The same command repeats the end of the epoch, and all files are there."""
    save, failed = checkpoint.save, []

    def fail_once(path: Path, state: dict[str, Any]) -> None:
        if path.name == name and not failed:
            failed.append(path)
            raise errors.UserError(f"cannot write {path}")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", fail_once)
    with pytest.raises(errors.UserError, match="cannot write"):
        quick("run", "--epochs", 1)
    assert saved("run")["epoch"] == 0  # as before the end of the epoch
    assert quick("run", "--epochs", 1) == 0
    assert {path.name for path in (tmp_path / "run/checkpoint").glob("*.pth")} == {
        *("best.pth", "weights.pth", "final.pth", "latest.pth")
    }


def test_the_checkpoint_that_is_named_in_the_end_is_there(quick, validation, tmp_path, caplog):
    caplog.set_level("INFO")
    validation(1.0, 2.0)
    for epochs, name in (1, "best.pth"), (2, "final.pth"):
        quick("run", "--epochs", epochs)
        assert f"done; next: python sample.py --checkpoint {tmp_path}/run/checkpoint/{name}, or" in caplog.messages[-1]
        (tmp_path / "run/checkpoint/best.pth").unlink(missing_ok=True)  # somebody moves it to a safer place


def test_without_a_compiler_the_training_is_not_compiled(quick, saved, monkeypatch, caplog):
    class InductorError(RuntimeError):
        pass

    def compiler(*_: object, **__: object) -> None:
        raise InductorError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(UNet, "compile", None)
    assert quick("run", "--epochs", 1, "--compile") == 0
    line = "training without --compile, for torch.compile fails here: No working C++ compiler found"
    assert warnings(caplog) == [line]
    assert saved("run")["settings"]["compile"] is False


def test_a_compiler_that_fails_at_the_network_is_one_line(failing, monkeypatch):
    InductorError = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def fail(*_: object) -> None:
        raise InductorError("CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp")

    monkeypatch.setattr(Learner, "step", fail)
    line = "torch.compile failed: train without --compile (CppCompileError: C++ compile error)"
    assert line in failing(1, "run")


def test_a_checkpoint_of_another_version_is_one_line(quick, failing, saved, tmp_path):
    quick("run", "--epochs", 1)
    state = saved("run")
    for part in ("rng", "history"):
        checkpoint.save(tmp_path / "run/checkpoint/latest.pth", {k: v for k, v in state.items() if k != part})
        assert "another version" in failing(1, "run", "--epochs", 2)
    renamed = {f"{name}_": weights for name, weights in state["model"].items()}
    checkpoint.save(tmp_path / "run/checkpoint/latest.pth", {**state, "model": renamed})
    assert "another version" in failing(1, "run", "--epochs", 2)


def test_a_link_that_leads_nowhere_is_no_reason_to_start_anew(failing, tmp_path):
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    (tmp_path / "run/checkpoint/latest.pth").symlink_to("/media/unplugged/latest.pth")
    assert "no checkpoint at" in failing(1, "run", "--epochs", 1)


def test_where_best_pth_is_not_yet_there_another_checkpoint_of_the_run_is_named(quick, tmp_path):
    quick("run", "--epochs", 1)
    best = tmp_path / "run/checkpoint/best.pth"
    best.unlink()
    with pytest.raises(errors.UserError, match=f"such as {best.parent}/latest.pth"):
        checkpoint.load(best)


def test_a_finished_run_says_so_and_changes_nothing(quick, saved, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    quick("run", "--epochs", 1)
    before = saved("run")
    caplog.clear()
    monkeypatch.setattr(train.Trainer, "run", None)
    assert quick("run", "--epochs", 1) == 0
    assert "nothing to do" in caplog.text and "--epochs" in caplog.text
    assert not differences(saved("run"), before)


@pytest.mark.parametrize("change", ["order", "number", "classes"])
def test_a_resume_with_other_data_is_refused(change, quick, failing, monkeypatch):
    """As when somebody adds pictures to a folder, or renames a class, between two nights."""
    quick("run", "--epochs", 1)
    load, names = datasets.load, datasets.classes

    def changed(*where: Any) -> tuple[Tensor, Tensor]:
        images, labels = load(*where)
        return (images.flip(0), labels.flip(0)) if change == "order" else (images[1:], labels[1:])

    if change == "classes":
        monkeypatch.setattr(datasets, "classes", lambda *where: names(*where)[::-1])
    else:
        monkeypatch.setattr(datasets, "load", changed)
    assert "are not those that it was trained on" in failing(2, "run", "--epochs", 2)


def test_a_resumed_run_says_that_it_computes_in_another_precision(quick, caplog, monkeypatch):
    """PRECISION auto is the same setting everywhere, and something else on another processor."""
    monkeypatch.setattr(devices, "pick_precision", lambda *_: torch.bfloat16)
    quick("run", "--epochs", 1)
    quick("run", "--epochs", 2)
    assert "computes in" not in caplog.text
    monkeypatch.setattr(devices, "pick_precision", lambda *_: torch.float32)
    quick("run", "--epochs", 3)
    assert "computes in torch.float32, not in torch.bfloat16 as before" in caplog.text


def test_a_resumed_epoch_goes_on_with_its_number_of_threads(quick, saved, stop_at, monkeypatch, caplog):
    used = []
    monkeypatch.setattr(cores, "share", lambda device: used.append("shared anew"))
    monkeypatch.setattr(cores, "use", lambda threads, why: used.append(threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    stop_at(2)
    quick("run")
    assert saved("run")["threads"] == 7
    used.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)  # as if OMP_NUM_THREADS did not let it have seven
    quick("run", "--epochs", 2)
    # When it starts, then what the checkpoint says for the rest of the first epoch, then at the second epoch.
    assert used == ["shared anew", 7, "shared anew"]
    assert "from here on, 5 threads compute, not 7 as before" in caplog.text


def test_a_run_that_is_resumed_between_epochs_chooses_its_threads_anew(quick, monkeypatch):
    used = []
    monkeypatch.setattr(cores, "use", lambda threads, why: used.append(threads))
    quick("run", "--epochs", 1)
    used.clear()
    monkeypatch.setattr(cores, "share", lambda device: None)
    quick("run", "--epochs", 2)
    assert used == []


def test_a_longer_training_says_that_its_learning_rate_is_another(quick, caplog):
    quick("run", "--epochs", 1, "--lr_decay", 1)
    quick("run", "--epochs", 2, "--lr_decay", 1)
    assert "the learning rate is that of a training of 2 epochs" in caplog.text
