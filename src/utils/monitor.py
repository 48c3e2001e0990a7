"""Progress of a training: a bar or lines, and logs for TensorBoard and for pandas."""

import argparse
import json
import logging
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from src.utils import checkpoint
from src.utils.devices import describe_device
from src.utils.distributed import World
from src.utils.errors import by_product
from src.utils.progress import progress

log = logging.getLogger(__name__)

LOSS_SECONDS = 5  # between looks at the loss that the progress shows, because a look waits for the device


def describe(args: argparse.Namespace, model: nn.Module, world: World, precision: torch.dtype, images: int) -> str:
    """Summarise a training in four lines: device and precision, network, data, and directories of the results."""
    counts = f"{images:,} images to train on, {args.val_size:,} held out; batch {args.batch_size}"
    processes = f", {world.size} processes" if world.size > 1 else ""
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"device   {describe_device(world.device, precision)}{processes}\n"
        f"network  U-Net, {parameters:,} parameters; {args.schedule_type} schedule, {args.time_steps} timesteps\n"
        f"data     {args.dataset}: {counts}\n"
        f"results  {args.checkpoint_path} (weights), {args.output_path} (pictures), {args.log_path} (TensorBoard)"
    )


def commands(args: argparse.Namespace) -> str:
    """The command lines that sample from and score what train.py has trained with the flags `args`."""
    best, final = (Path(args.checkpoint_path, name) for name in ("best.pth", "final.pth"))
    model = ["--checkpoint", str(best if best.exists() else final)]
    if args.run and best.exists() and "checkpoint_path" not in args.given:
        model = ["--run", args.run]
    data = ["--data_path", args.data_path] if "data_path" in args.given else []
    return f"python sample.py {shlex.join(model)}, or python eval.py {shlex.join(model + data)}"


class Silence:
    """Stands in for `Monitor` in the processes that log nothing: all methods can be called and do nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


class Monitor:
    """Shows the progress, and logs scalars and pictures of a training, which goes on if a log cannot be written.

    log_path/tensorboard has the files for TensorBoard. log_path/scalars.jsonl has the scalars for other programs, with
    one JSON object per line, which pandas.read_json(path, lines=True) reads:

        {"step": 50, "loss/train": 0.1, "gradient_norm": 0.5, "learning_rate": 0.0005, "images_per_second": 300.0}
        {"step": 906, "loss/validation": 0.05}

    A resumed run logs the steps after its checkpoint again. Their earlier values are hidden in TensorBoard (by
    purge_step) and removed from scalars.jsonl, so that no step is there twice.

    Args:
        log_path: directory of the logs.
        step: optimiser steps done so far; 0 in a new run.
        total_steps: optimiser steps of the whole run.
        batch_size: images per optimiser step, over all processes.
        log_every: optimiser steps between logged scalars.
    """

    def __init__(self, log_path: Path, step: int, total_steps: int, batch_size: int, log_every: int) -> None:
        self.batch_size, self.log_every = batch_size, log_every
        self.tensorboard, path = str(log_path / "tensorboard"), log_path / "scalars.jsonl"
        self.path = str(path)
        self.writer: Any = Silence()  # unless they can be opened
        self.scalars: Any = Silence()
        with by_product(self.tensorboard):
            from torch.utils.tensorboard import SummaryWriter  # here, because the package may be broken

            self.writer = SummaryWriter(self.tensorboard, purge_step=step + 1)
        with by_product(self.path):
            _remove_later_lines(path, step)
            self.scalars = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed in __exit__)
        self.bar = progress(
            log,
            total=total_steps * batch_size,
            initial=step * batch_size,
            unit=" images",
            unit_scale=True,
        )
        self.since = time.perf_counter(), step  # start of the measurement of images per second: time, step
        self.epoch = "training"  # what the progress shows until the number is known
        self.look = 0.0  # when the loss is shown next, as `time.monotonic()`

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        with by_product(self.tensorboard):
            self.writer.close()
        with by_product(self.path):
            self.scalars.close()

    def start_epoch(self, epoch: int, epochs: int, step: int) -> None:
        """Show the number of the epoch, from 1, in the progress, and start to measure images per second."""
        self.epoch = f"epoch {epoch}/{epochs}"
        self.bar.set_description_str(self.epoch)
        self.since = time.perf_counter(), step

    def count_step(self, step: int, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Advance the progress by one optimiser step; log its scalars if `step` is a multiple of `log_every`."""
        self.bar.set_description_str(f"{self.epoch}, step {step:,}", refresh=False)
        if time.monotonic() >= self.look:
            self.bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
            self.look = time.monotonic() + LOSS_SECONDS
        self.bar.update(self.batch_size)
        if step % self.log_every:
            return
        (before, first), now = self.since, time.perf_counter()
        scalars = {
            "loss/train": loss.item(),
            "gradient_norm": gradient_norm.item(),
            "learning_rate": learning_rate,
            "images_per_second": (step - first) * self.batch_size / (now - before),
        }
        self._write(step, scalars)
        self.since = now, step

    def show_validation(self, step: int, loss: float, samples: Tensor | None) -> None:
        """Log the validation loss after an epoch that ended with `step`, and a picture (C,H,W) uint8 unless None."""
        self._write(step, {"loss/validation": loss})
        if samples is not None:
            with by_product(self.tensorboard):
                self.writer.add_image("samples", samples, step)
        self.flush()

    def flush(self) -> None:
        """Write to disk what was logged so far, to be called before a checkpoint: a resumed run does not repeat it."""
        with by_product(self.tensorboard):
            self.writer.flush()
        with by_product(self.path):
            self.scalars.flush()

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        with by_product(self.tensorboard):
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        event = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no NaN
        with by_product(self.path):
            self.scalars.write(json.dumps({"step": step, **event}) + "\n")


def _remove_later_lines(path: Path, step: int) -> None:
    """Remove the lines of steps after `step` from a scalars.jsonl, and a last line that a crash has cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
            if event["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):  # not the whole line of an event
            continue
    checkpoint.write(path, "".join(kept).encode())
