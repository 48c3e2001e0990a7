"""The exponential moving average of a model's weights, which samples better than the weights themselves."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


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
    def update(self, model: nn.Module, step: int) -> None:
        """The recurrence's step number `step`, from 1. Call it after every optimiser step."""
        average = get_ema_multi_avg_fn(min(self.decay, step / (step + 9)))  # torch's own, all tensors in one call
        average(list(self.model.parameters()), list(model.parameters()), None)
