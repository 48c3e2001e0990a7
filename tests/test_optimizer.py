"""The learning rate over a training: its corners, its slopes, and that Adam takes the steps that it says."""

import pytest
import torch
from torch import nn

from src.optimizer import adam, learning_rate


def rates(steps: int, warmup: int, decay: float) -> list[float]:
    return [learning_rate(step, steps, 2.0, warmup, decay) for step in range(1, steps + 2)]


def test_without_warmup_and_decay_it_is_constant():
    assert rates(10, 0, 0.0) == [2.0] * 11


def test_it_rises_in_equal_steps_and_reaches_its_peak_at_the_last_of_them():
    assert rates(10, 4, 0.0) == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 8)


def test_it_falls_in_equal_steps_and_would_be_0_after_the_last():
    assert rates(10, 0, 0.5) == pytest.approx([2.0] * 6 + [1.6, 1.2, 0.8, 0.4, 0.0])


def test_decay_over_the_whole_training_is_a_straight_line():
    assert rates(4, 0, 1.0) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_where_rise_and_fall_overlap_the_lower_counts():
    assert rates(4, 4, 1.0) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_adam_remembers_squared_gradients_as_it_is_told(beta2):
    """After gradients 1 and then 0, the second step is lr · m̂ / √v̂ (Kingma & Ba 2015, Algorithm 1)."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = adam(model, beta2)
    optimizer.param_groups[0]["lr"] = 0.1
    for gradient in (1.0, 0.0):
        before = model.weight.item()
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
    m = (0.1 * 0.9) / (1 - 0.9**2)
    v = ((1 - beta2) * beta2) / (1 - beta2**2)
    assert before - model.weight.item() == pytest.approx(0.1 * m / v**0.5, rel=1e-4)
