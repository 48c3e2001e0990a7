"""The exponential moving average of a model's weights, which samples better than the weights themselves."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """A shadow of `model`: after every optimiser step, shadow ← decay · shadow + (1 - decay) · weights.

    The shadow is a model of its own, so evaluating it never touches the weights in training.

    Args:
        model: the model in training; its present weights are the average's start.
        decay: in [0, 1). 0.995 remembers about 1 / (1 - decay) = 200 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)  # torch's own, all tensors in one fused call

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of the recurrence. Call it after every optimiser step."""
        self._average(list(self.model.parameters()), list(model.parameters()), None)
