"""What people see of a running training: a progress bar and TensorBoard's curves and pictures."""

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from src.devices import describe_device  # how it is named
from src.distributed import World  # who trains together
from src.utils import progress  # the one rule of when a bar is shown

log = logging.getLogger(__name__)


def describe(args: argparse.Namespace, model: nn.Module, world: World, precision: torch.dtype, images: int) -> str:
    """A training in a few lines: where and in which precision, of what, on how many images, and with which results."""
    processes = f", {world.size} processes" if world.size > 1 else ""
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"device   {describe_device(world.device, precision)}{processes}\n"
        f"network  U-Net, {parameters:,} parameters; {args.schedule_type} schedule, {args.time_steps} timesteps\n"
        f"data     {args.dataset}: {images:,} images to train on, {args.val_size:,} held out\n"
        f"results  {args.checkpoint_path} (weights), {args.output_path} (pictures), {args.log_path} (TensorBoard)"
    )


class Silence:
    """What a process has in place of a `Monitor` when another one does the showing: it takes every call mutely."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


class Monitor:
    """Counts the steps of a training and shows them.

    Args:
        directory: of TensorBoard's event files. What an earlier process wrote there of steps that are now to be
            done again is hidden (TensorBoard's purge_step), so that a resumed run shows no point twice.
        step: optimiser steps done already.
        total_steps: optimiser steps of the whole run.
        batch_size: images a step.
        log_every: steps between scalars.
    """

    def __init__(self, directory: Path, step: int, total_steps: int, batch_size: int, log_every: int) -> None:
        self.batch_size, self.log_every = batch_size, log_every
        self.writer = SummaryWriter(directory, purge_step=step + 1)
        self.bar = progress(
            log,
            total=total_steps * batch_size,
            initial=step * batch_size,
            unit=" images",
            unit_scale=True,
        )
        self.since = time.perf_counter(), step  # when, and at which step, images/s began to be measured

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        self.writer.close()

    def start_epoch(self, epoch: int, epochs: int, step: int) -> None:
        """Name the epoch, from 1, in the bar, and start the clock behind images/s."""
        self.bar.set_description(f"epoch {epoch}/{epochs}")
        self.since = time.perf_counter(), step

    def count_step(self, step: int, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Take note of an optimiser step, and show it every `log_every` steps."""
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
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.bar.set_postfix(loss=f"{scalars['loss/train']:.4f}", refresh=False)
        self.since = now, step

    def show_validation(self, step: int, loss: float, samples: Tensor | None) -> None:
        """The validation loss of an epoch that ended with `step`, and its picture (C,H,W) uint8, if it has one."""
        self.writer.add_scalar("loss/validation", loss, step)
        if samples is not None:
            self.writer.add_image("samples", samples, step)
        self.flush()

    def flush(self) -> None:
        """Put on disk what was shown so far: a checkpoint that counts these steps will not repeat them."""
        self.writer.flush()
