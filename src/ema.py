"""The exponential moving average of a model's weights, which samples better than the weights themselves."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A shadow of `model`: after every optimiser step, shadow ← d · shadow + (1 - d) · weights.

    d = min(decay, step / (step + 9)): an average over about the last tenth of the steps, until that is as long as
    `decay` wants it. With a constant d the initial weights would weigh as much as 1 / (1 - decay) steps.

    The shadow is a model of its own, so evaluating it never touches the weights in training.

    Args:
        model: the model in training; its present weights are the average's start.
        decay: in [0, 1). 0.995 remembers about 1 / (1 - decay) = 200 steps, once there have been 1,800.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skip: Tensor | None = None) -> None:
        """The recurrence's step number `step`, from 1. Call it after every optimiser step.

        Where `skip`, a boolean scalar on the model's device, is true, the average stays as it is.
        """
        shadows, weights = list(self.model.parameters()), list(model.parameters())
        share = torch.full((), 1 - min(self.decay, step / (step + 9)), device=weights[0].device)  # of the weights
        if skip is not None:
            share = share.masked_fill(skip, 0)  # a tensor, for the CPU need not know what the device found out
        torch._foreach_lerp_(shadows, weights, [share] * len(shadows))
