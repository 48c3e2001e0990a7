"""Progress of a training: a progress bar, and logs for TensorBoard and for pandas."""

import argparse
import json
import logging
import math
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from src.utils.devices import describe_device
from src.utils.distributed import World
from src.utils.progress import counted, progress

log = logging.getLogger(__name__)


def describe(args: argparse.Namespace, model: nn.Module, world: World, precision: torch.dtype, images: int) -> str:
    """Summarise a training in four lines: device and precision, network, data, and directories of the results."""
    processes = f", {world.size} processes" if world.size > 1 else ""
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"device   {describe_device(world.device, precision)}{processes}\n"
        f"network  U-Net, {parameters:,} parameters; {args.schedule_type} schedule, {args.time_steps} timesteps\n"
        f"data     {args.dataset}: {counted(images, 'image')} to train on, {args.val_size:,} held out\n"
        f"results  {args.checkpoint_path} (weights), {args.output_path} (pictures), {args.log_path} (TensorBoard)"
    )


def commands(args: argparse.Namespace) -> str:
    """The command lines that sample from and score what train.py has trained with the flags `args`."""
    model = ["--checkpoint", str(Path(args.checkpoint_path, "best.pth"))]
    if args.run and "checkpoint_path" not in args.given:
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
    """Shows a progress bar, and logs scalars and pictures of a training.

    log_path/tensorboard has the files for TensorBoard. log_path/scalars.jsonl has the scalars for other programs, with
    one JSON object per line, which pandas.read_json(path, lines=True) reads:

        {"step": 50, "loss/train": 0.1, "gradient_norm": 0.5, "learning_rate": 0.001, "images_per_second": 300.0}
        {"step": 906, "loss/validation": 0.05}

    A resumed run logs the steps after its checkpoint again. Their earlier values are hidden in TensorBoard (by
    purge_step) and removed from scalars.jsonl, so that no step is there twice.

    Args:
        log_path: directory of the logs.
        step: optimiser steps done so far; 0 in a new run.
        total_steps: optimiser steps of the whole run.
        batch_size: images per optimiser step, over all processes.
        log_every: optimiser steps between logged scalars.

    Raises:
        OSError: by any method, if a log cannot be written. TensorBoard's thread writes later than the call that fails.
    """

    def __init__(self, log_path: Path, step: int, total_steps: int, batch_size: int, log_every: int) -> None:
        self.batch_size, self.log_every = batch_size, log_every
        self.writer = SummaryWriter(log_path / "tensorboard", purge_step=step + 1)
        path = log_path / "scalars.jsonl"
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

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        try:
            self.writer.close()
        finally:
            self.scalars.close()

    def start_epoch(self, epoch: int, epochs: int, step: int) -> None:
        """Show the number of the epoch, from 1, in the progress bar, and start to measure images per second."""
        self.bar.set_description(f"epoch {epoch}/{epochs}")
        self.since = time.perf_counter(), step

    def count_step(self, step: int, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Advance the progress bar by one optimiser step; log its scalars if `step` is a multiple of `log_every`."""
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
        self.bar.set_postfix(loss=f"{scalars['loss/train']:.4f}", refresh=False)
        self.since = now, step

    def show_validation(self, step: int, loss: float, samples: Tensor | None) -> None:
        """Log the validation loss after an epoch that ended with `step`, and a picture (C,H,W) uint8 unless None."""
        self._write(step, {"loss/validation": loss})
        if samples is not None:
            self.writer.add_image("samples", samples, step)
        self.flush()

    def flush(self) -> None:
        """Write to disk what was logged so far, to be called before a checkpoint: a resumed run does not repeat it."""
        self.writer.flush()
        self.scalars.flush()

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        event = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no NaN
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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
