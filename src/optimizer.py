"""Adam, and the size of its steps over the course of a training."""

import torch
from torch import nn


def adam(model: nn.Module, beta2: float) -> torch.optim.Adam:
    """Adam (Kingma & Ba 2015) on all weights; its learning rate is set anew before every step."""
    return torch.optim.Adam(model.parameters(), betas=(0.9, beta2), fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """The learning rate of step number `step` of `steps`, counting from 1: a trapezoid of height `peak`.

    It rises linearly over the first `warmup` steps, and falls linearly over the last share `decay` of all steps, so
    that the one after the last would have 0. It is a function of the step alone: a resumed run needs no state for it.
    """
    risen = min(1.0, step / max(warmup, 1))
    to_fall = min(1.0, (steps + 1 - step) / (decay * steps)) if decay > 0 else 1.0
    return peak * min(risen, to_fall)
