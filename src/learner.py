"""What learns: the network, the average of its weights and the optimiser; and how it takes one step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from src.diffusion import Diffusion, draw_times  # the loss, and the times at which it is taken
from src.distributed import World  # a step is taken by all processes together
from src.ema import EMA  # every step ends with the average
from src.errors import UserError  # a divergence is something the user can mend
from src.model import UNet  # the weights that it changes
from src.utils import autocast, rng_state, set_rng_state  # precision; the state of what a step draws


class Learner:
    """A network in training. Its whole state is in `state()`; a step depends on nothing else.

    Args:
        model, diffusion: as `pipeline.build` returns them.
        world: the processes that train together.
        precision: of the network's arithmetic.
        settings: config.py's, in lower case.

    Attributes:
        steps: optimiser steps taken so far.
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

    def step(self, x0: Tensor, y: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One step of Ho et al.'s Algorithm 1 on this process's share of a batch: images x0 (b,C,H,W), classes y (b,).

        Returns:
            The loss of the whole batch and the norm of its gradient, before clipping; scalars.

        Raises:
            UserError: the gradient is not finite; weights and average are as before the step.
        """
        settings, batch = self.settings, self.settings["batch_size"]
        # Every process draws for the whole batch, so that the random numbers are the same however many there are. (Not
        # those of DROPOUT, which the network draws for what it is given: there, processes draw alike.)
        mine = self.world.share(batch)
        t = draw_times(batch, self.diffusion.time_steps, settings["time_sampling"], self.device)[mine]  # (b,)
        eps = torch.randn(batch, *x0.shape[1:], device=self.device)[mine]  # (b, C, H, W)
        hidden = torch.rand(batch, device=self.device)[mine] < settings["class_dropout"]  # (b,)
        y = y.masked_fill(hidden, self.model.no_class)  # Ho & Salimans 2022, Algorithm 1

        self.optimizer.zero_grad()
        *parts, last = zip(*(z.chunk(settings["accumulate"]) for z in (x0, y, t, eps)), strict=True)
        loss = torch.zeros((), device=self.device)
        with self.world.alone(self.network):  # gradients travel between processes once a step, with the last part
            for part in parts:
                loss += self.backward(*part)
        loss += self.backward(*last)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings["grad_clip"])
        if not norm.isfinite():  # clipping has spread it to every gradient: the step would ruin the weights
            raise UserError(
                f"training diverged: the gradient of step {self.steps + 1} is {norm.item()}; nothing was saved since "
                f"latest.pth. Reduce --learning_rate (now {learning_rate:g})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.steps += 1
        self.ema.update(self.model, self.steps)
        return self.world.mean(loss), norm

    def backward(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Add to the gradient that of one of the ACCUMULATE parts of a batch; returns what it adds to the loss."""

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            return self.network(x_t, t, y if self.model.label is not None else None)

        with autocast(self.device, self.precision):
            loss = self.diffusion.loss(network, x0, t, eps) / self.settings["accumulate"]
        loss.backward()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Everything that further steps depend on."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(self.device),
            "step": self.steps,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned. Raises KeyError, RuntimeError or ValueError if it does not fit."""
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"], self.device)
        self.steps = state["step"]


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """The learning rate of step number `step` of `steps`, counting from 1: a trapezoid of height `peak`.

    It rises linearly over the first `warmup` steps, and falls linearly over the last share `decay` of all steps, so
    that the one after the last would have 0. It is a function of the step alone: a resumed run needs no state for it.
    """
    risen = min(1.0, step / max(warmup, 1))
    to_fall = max(0.0, (steps + 1 - step) / (decay * steps)) if decay > 0 else 1.0
    return peak * min(risen, to_fall, 1.0)
