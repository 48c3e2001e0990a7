"""Exponential moving average (EMA) of a model's weights, which gives better samples than the weights themselves."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """A second model whose weights are the moving average of those of `model`.

    After every optimiser step, average ← d · average + (1 - d) · weights with d = min(decay, step / (step + 9)).
    Early on this averages over about the last tenth of the steps. With a constant d, the initial weights would keep
    a large share for about 1 / (1 - decay) steps.

    Args:
        model: the model in training; the average starts from its present weights.
        decay: in [0, 1). 0.995 averages over about 1 / (1 - decay) = 200 steps, from step 1,800 on.

    Raises ValueError if the model keeps buffers in its state_dict, as BatchNorm does: they would not be averaged.
    """

    def __init__(self, model: Model, decay: float) -> None:
        if buffers := model.state_dict().keys() - dict(model.named_parameters()).keys():
            raise ValueError(f"EMA averages parameters only, and the model has buffers: {', '.join(sorted(buffers))}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skip: Tensor | None = None) -> None:
        """Update the average after optimiser step number `step`, counting from 1.

        Nothing changes if `skip`, a boolean scalar on the model's device, is true. The CPU does not wait for it.
        """
        averages, weights = tuple(self.model.parameters()), tuple(model.parameters())
        one_minus_d = torch.full((), 1 - min(self.decay, step / (step + 9)), device=weights[0].device)
        if skip is not None:
            one_minus_d = one_minus_d.masked_fill(skip, 0)
        torch._foreach_lerp_(averages, weights, [one_minus_d] * len(averages))
