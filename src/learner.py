"""What learns: the network, the average of its weights and the optimiser; and how it takes one step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from src import devices  # what depends on the kind of device
from src.diffusion import Diffusion, draw_times  # the loss, and the times at which it is taken
from src.distributed import World  # a step is taken by all processes together
from src.ema import EMA  # every step ends with the average
from src.errors import UserError  # a divergence is something the user can mend
from src.model import UNet  # the weights that it changes


class Learner:
    """A network in training. Its whole state is in `state()`; a step depends on nothing else.

    Args:
        model, diffusion: as `pipeline.build` returns them.
        world: the processes that train together.
        precision: of the network's arithmetic.
        settings: config.py's, in lower case.

    Attributes:
        steps: optimiser steps taken so far.
        loss_sum: of all steps since somebody set it to 0, but for those since the last `settle`.

    A device works behind the CPU, which queues one step after the other and would lose time by asking how a step went.
    So a gradient that is not finite is dealt with on the device: from that step on, weights, average and the
    optimiser's state stay as they are. `settle` asks, and `state` does before it returns anything.
    """

    def __init__(
        self, model: UNet, diffusion: Diffusion, world: World, precision: torch.dtype, settings: Mapping[str, Any]
    ) -> None:
        self.model, self.diffusion, self.world, self.precision = model, diffusion, world, precision
        self.settings, self.device = settings, world.device
        self.ema = EMA(model, settings["ema_decay"])
        if settings["compile"]:
            model.compile()  # in place: its state_dict stays that of the plain network
        self.network = world.wrap(model)  # the same weights
        self.optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, settings["adam_beta2"]), fused=True)
        self.steps = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.losses: list[Tensor] = []  # scalars on the device, of the steps since the last `settle`
        # The first step whose gradient is not finite, 0 while there is none, and the norm of that gradient.
        self.bad_step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.bad_norm = torch.zeros((), device=self.device)

    def step(self, x0: Tensor, y: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One step of Ho et al.'s Algorithm 1 on this process's share of a batch: images x0 (b,C,H,W), classes y (b,).

        Returns:
            The loss of the whole batch and the norm of its gradient, before clipping; scalars, on the device.
        """
        settings, batch = self.settings, self.settings["batch_size"]
        # Every process draws for the whole batch, so that the random numbers are the same however many there are. (Not
        # those of DROPOUT, which the network draws for what it is given: there, processes draw alike.)
        mine = self.world.share(batch)
        t = draw_times(batch, self.diffusion.time_steps, settings["time_sampling"])[mine]  # (b,), on the CPU
        eps = torch.randn(batch, *x0.shape[1:], device=self.device)[mine]  # (b, C, H, W)
        hidden = torch.rand(batch, device=self.device)[mine] < settings["class_dropout"]  # (b,)
        y = y.masked_fill(hidden, self.model.no_class)  # Ho & Salimans 2022, Algorithm 1

        self.optimizer.zero_grad()
        *parts, last = zip(*(z.chunk(settings["accumulate"]) for z in (x0, y, t, eps)), strict=True)
        loss = torch.zeros((), device=self.device)
        with devices.float32_kernels(self.device, fast=True):
            with self.world.alone(self.network):  # gradients travel between processes once a step, with the last part
                for part in parts:
                    loss += self.backward(*part)
            loss += self.backward(*last)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings["grad_clip"])
        self.steps += 1
        self.update(norm, learning_rate)
        self.losses.append(loss := self.world.mean(loss))
        return loss, norm

    def update(self, norm: Tensor, learning_rate: float) -> None:
        """Change weights and average by the gradient, unless `norm`, its norm before clipping, is not finite."""
        first = ~norm.isfinite() & (self.bad_step == 0)  # clipping has spread it to every gradient
        self.bad_step += first * self.steps
        self.bad_norm = torch.where(first, norm, self.bad_norm)
        skip = self.bad_step > 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused Adam changes nothing where this is 1. (On Apple's GPUs only since June 2026, pytorch/pytorch pull
        # request 186360. With an older torch the weights in memory are lost there; `settle` keeps them out of files.)
        self.optimizer.found_inf = skip.float()
        self.optimizer.step()
        self.ema.update(self.model, self.steps, skip)

    def settle(self) -> None:
        """Wait for the device and bring `loss_sum` up to date.

        Raises:
            UserError: the gradient of some step was not finite; weights and average are as they were before that step.
        """
        if step := self.bad_step.item():
            raise UserError(
                f"training diverged: the gradient of step {step} is {self.bad_norm.item()}; nothing was saved since "
                f"latest.pth. Reduce --learning_rate (now {self.optimizer.param_groups[0]['lr']:g})"
            )
        devices.add_up(self.loss_sum, self.losses)
        self.losses.clear()

    def backward(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Add to the gradient that of one of the ACCUMULATE parts of a batch; returns what it adds to the loss."""

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            return self.network(x_t, t, y if self.model.label is not None else None)

        with devices.autocast(self.device, self.precision):
            loss = self.diffusion.loss(network, x0, t, eps) / self.settings["accumulate"]
        loss.backward()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Everything that further steps depend on. Raises UserError as `settle` does."""
        self.settle()
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": devices.rng_state(self.device),
            "step": self.steps,
            "loss_sum": self.loss_sum,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned. Raises KeyError, RuntimeError or ValueError if it does not fit."""
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        devices.set_rng_state(state["rng"], self.device)
        self.steps, self.loss_sum = state["step"], state["loss_sum"].clone()


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """The learning rate of step number `step` of `steps`, counting from 1: a trapezoid of height `peak`.

    It rises linearly over the first `warmup` steps, and falls linearly over the last share `decay` of all steps, so
    that the one after the last would have 0. It is a function of the step alone: a resumed run needs no state for it.
    """
    risen = min(1.0, step / max(warmup, 1))
    to_fall = max(0.0, (steps + 1 - step) / (decay * steps)) if decay > 0 else 1.0
    return peak * min(risen, to_fall, 1.0)
