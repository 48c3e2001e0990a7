"""Training: one step of Algorithm 1 (Ho et al. 2020), the learning-rate schedule and the validation loss."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from src.diffusion import Diffusion, Network, draw_times, send
from src.ema import EMA
from src.model import UNet, autocast


class Diverged(Exception):
    """A gradient was not finite; weights, average and optimiser stay as they were before that step."""


class Processes(Protocol):
    """The processes of a data-parallel training, as `src.utils.distributed.World` connects them."""

    size: int

    def share(self, count: int) -> slice:
        """This process's part of `count` items."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """The same network, whose gradients are averaged over all processes."""

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Context in which gradients of a wrapped network accumulate without being averaged."""


class Learner:
    """The state of a training: network, average of its weights, optimiser and progress.

    The CPU queues steps on an accelerator without waiting for them, so it cannot look at each gradient. A gradient
    that is not finite is therefore handled on the device: from then on, weights, average and optimiser do not change.
    `synchronize` reports it.

    Args:
        model, diffusion: as returned by `generation.build`.
        world: the processes that train together.
        precision: of the network's arithmetic; the weights stay float32.
        settings: the constants of config.py with lower-case names.

    Attributes:
        teacher: for OBJECTIVE consistency, the network that is distilled, else None.
    """

    PROGRESS = ("epoch", "batch", "best", "history")

    def __init__(
        self, model: UNet, diffusion: Diffusion, world: Processes, precision: torch.dtype, settings: Mapping[str, Any]
    ) -> None:
        self.model, self.diffusion, self.world, self.precision = model, diffusion, world, precision
        self.settings, self.device = settings, diffusion.device
        self.ema = EMA(model, settings["ema_decay"])
        distils = settings["objective"] == "consistency"
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False) if distils else None
        if settings["compile"]:
            for network in filter(None, (model, self.teacher)):
                network.compile()  # in place, so that the state_dict keeps its names
        self.network = world.wrap(model)  # shares its weights with `model`
        self.optimizer = torch.optim.Adam(model.parameters(), fused=True)
        self.steps, self.epoch, self.batch = 0, 0, 0  # optimiser steps; epochs finished; batches of the present epoch
        self.best = math.inf  # lowest validation loss
        self.history: dict[str, list[float]] = {"train": [], "val": []}  # losses of every finished epoch
        self.losses: list[Tensor] = []  # scalars on the device, of the steps since the last call of `synchronize`
        self.loss_sum = torch.zeros((), dtype=torch.float64)  # of the earlier steps of the present epoch
        self.bad_step = torch.zeros((), dtype=torch.int64, device=self.device)  # first non-finite gradient; 0 = none
        self.bad_norm = torch.zeros((), device=self.device)  # norm of that gradient

    def start_from_network(self) -> None:
        """Give the network's present weights to the average and to the teacher."""
        for other in filter(None, (self.ema.model, self.teacher)):
            other.load_state_dict(self.model.state_dict())

    def step(self, x0: Tensor, y: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One step of Ho et al. 2020, Algorithm 1; with a teacher, of Song et al. 2023, Algorithm 2.

        It takes this process's share of a batch: images x0 (b,C,H,W) float32 in [-1, 1] and their classes y (b,). It
        returns the loss of the whole batch and the norm of its gradient before clipping, scalars on the device.
        """
        settings, batch_size = self.settings, self.settings["batch_size"]
        x0, y = send(x0, self.device), send(y, self.device)  # line 2: x_0 ~ q(x_0)
        # Every process draws for the whole batch and keeps its share, so that the random numbers do not depend on the
        # number of processes. (Dropout masks do: the network draws them for the images that it is given.)
        share = self.world.share(batch_size)
        t = draw_times(batch_size, self.diffusion.time_steps, settings["time_sampling"])  # (B,), on the CPU; line 3
        t = t[share]  # (b,)
        eps = torch.randn(batch_size, *x0.shape[1:], device=self.device)[share]  # (b, C, H, W); line 4
        dropped = torch.rand(batch_size, device=self.device)[share] < settings["class_dropout"]  # (b,)
        y = y.masked_fill(dropped, self.model.no_class)  # Ho & Salimans 2022, Algorithm 1

        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        parts = list(zip(*(z.chunk(settings["accumulate"]) for z in (x0, y, t, eps)), strict=True))
        for number, (x0_i, y_i, t_i, eps_i) in enumerate(parts, start=1):
            known = y_i if self.model.label is not None else None
            loss_of_part = loss_of(self.diffusion, self.network, self.teacher, known)
            with nullcontext() if number == len(parts) else self.world.no_sync(self.network):  # one average per step
                with autocast(self.device, self.precision):
                    part_loss = loss_of_part(x0_i, t_i, eps_i) / len(parts)
                part_loss.backward()  # line 5
            loss += part_loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings["grad_clip"])
        self.steps += 1
        self._update(norm, learning_rate)
        self.losses.append(loss := self.world.mean(loss))
        return loss, norm

    def _update(self, norm: Tensor, learning_rate: float) -> None:
        """Update weights and average, unless `norm`, the gradient's norm before clipping, is or was not finite."""
        first = ~norm.isfinite() & (self.bad_step == 0)  # then clipping makes the gradients 0 or NaN
        self.bad_step += first * self.steps
        self.bad_norm = torch.where(first, norm, self.bad_norm)
        skip = self.bad_step > 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # Fused Adam changes nothing if found_inf is 1. On Apple's GPUs it does so only since June 2026 (pytorch pull
        # request 186360); with an older torch the weights in memory are lost, but `synchronize` keeps them off disk.
        self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.ema.update(self.model, self.steps, skip)

    def synchronize(self) -> None:
        """Wait for the device, then add to `loss_sum` the losses of the steps since the last call.

        Raises Diverged if the gradient of some step was not finite.
        """
        if step := self.bad_step.item():
            lr = self.optimizer.param_groups[0]["lr"]
            raise Diverged(f"the gradient of step {step} is {self.bad_norm.item()} (learning rate {lr:g})")
        _add(self.loss_sum, self.losses)
        self.losses.clear()

    def finish_epoch(self, val_loss: float) -> bool:
        """Record the losses of an epoch of `batch` batches and begin the next; returns whether `val_loss` is best."""
        self.history["train"].append(self.loss_sum.item() / self.batch)
        self.history["val"].append(val_loss)
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum.zero_()
        improved, self.best = val_loss < self.best, min(val_loss, self.best)
        return improved

    def state(self) -> dict[str, Any]:
        """Everything that further steps depend on, for `load`. Raises Diverged as `synchronize` does."""
        self.synchronize()
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            **({} if self.teacher is None else {"teacher": self.teacher.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(self.device),
            "step": self.steps,
            "loss_sum": self.loss_sum,
            **{name: getattr(self, name) for name in self.PROGRESS},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Raises KeyError, RuntimeError or ValueError if it does not fit."""
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"], self.device)
        self.steps, self.loss_sum = state["step"], state["loss_sum"].clone()
        for name in self.PROGRESS:
            setattr(self, name, state[name])


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """The learning rate of step number `step` of `steps`, counting from 1.

    It is the smaller of two lines: one rises to `peak` over the first `warmup` steps, the other falls from `peak` to 0
    over the last fraction `decay` of all steps. Where they overlap, the rate stays below `peak`. It depends on the
    step alone, so a resumed run needs no state for it.
    """
    rise = min(1.0, step / max(warmup, 1))
    fall = max(0.0, (steps + 1 - step) / (decay * steps)) if decay > 0 else 1.0
    return peak * min(rise, fall)


def loss_of(
    diffusion: Diffusion, network: Callable[..., Tensor], teacher: Callable[..., Tensor] | None, y: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of a network as a function of x0, t and eps: that of consistency distillation if there is a teacher.

    The images have the classes y (B,). For None, the networks are given no classes.
    """

    def given_y(network: Callable[..., Tensor]) -> Network:
        return network if y is None else partial(network, y=y)

    if teacher is None:
        return partial(diffusion.loss, given_y(network))
    return partial(diffusion.consistency_loss, given_y(network), given_y(teacher))


@torch.inference_mode()
def validation_loss(
    network: Callable[..., Tensor],
    diffusion: Diffusion,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    count: int,
    seed: int,
    world: Processes,
    on_batch: Callable[[], None] = lambda: None,
    teacher: Callable[..., Tensor] | None = None,
) -> float:
    """The loss on `count` held-out images, with the same t and eps at every call, so that epochs can be compared.

    The `batches` are images (B,C,H,W) float32 in [-1, 1] and their classes (B,) on the CPU, of which each process
    evaluates its share; None instead of classes if the network is to be given none. The timesteps are spread evenly
    over all noise levels, and `seed` determines eps. `on_batch` is called after each batch. The `teacher` is that of
    consistency distillation.
    """
    generator = torch.Generator().manual_seed(seed)
    losses, first = [], 0  # scalars on the device, each the sum over this process's share of a batch
    for x0, y in batches:
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.arange(first, first + len(x0)) * diffusion.time_steps // count  # (B,)
        first += len(x0)
        share = world.share(len(x0))
        if len(t[share]):  # the last batch may have fewer images than there are processes
            x0_i, eps_i = send(x0[share], diffusion.device), send(eps[share], diffusion.device)
            y_i = None if y is None else send(y[share], diffusion.device)
            losses.append(loss_of(diffusion, network, teacher, y_i)(x0_i, t[share], eps_i) * len(t[share]))
        on_batch()
    _add(total := torch.zeros((), dtype=torch.float64), losses)
    return (world.mean(total) * world.size / count).item()


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the global generators that training on `device` draws from, by device type."""
    own = {} if device.type == "cpu" else {device.type: torch.get_device_module(device).get_rng_state(device)}
    return {"cpu": torch.get_rng_state(), **own}


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore what `rng_state` returned; on another type of device, only the CPU's generator."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)


def _add(total: Tensor, values: list[Tensor]) -> None:
    """Add scalars on a device to `total`, float64 on the CPU, one by one after a single copy."""
    if values:
        for value in torch.stack(values).cpu():
            total += value
