"""`src/ema.py`: the recurrence itself, that it runs every step, and that the shadow is nobody else's."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from src.ema import EMA
from src.model import UNet

LATE = 10**9  # a step so late that every decay has long been reached


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all weights, in float64."""
    return [p.detach().double().clone() for p in model.parameters()]


@torch.no_grad()
def train_a_step(model: nn.Module, generator: torch.Generator) -> None:
    """Any change of the weights will do; this one is large and never the same."""
    for p in model.parameters():
        p += torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.995, 0.9999])
def test_shadow_follows_the_recurrence_at_every_step(model, decay):
    ema, generator = EMA(model, decay), torch.Generator().manual_seed(1)
    by_hand = weights(model)
    for step in range(1, 51):
        train_a_step(model, generator)
        ema.update(model, step)
        d = min(decay, step / (step + 9))
        by_hand = [d * old + (1 - d) * new for old, new in zip(by_hand, weights(model), strict=True)]
        for ours, expected in zip(weights(ema.model), by_hand, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_shadow_starts_as_the_model(model):
    for ours, theirs in zip(weights(EMA(model, 0.995).model), weights(model), strict=True):
        assert torch.equal(ours, theirs)


def test_decay_0_is_the_model_itself(model):
    ema = EMA(model, 0.0)
    train_a_step(model, torch.Generator().manual_seed(1))
    ema.update(model, LATE)
    for ours, theirs in zip(weights(ema.model), weights(model), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("decay", [0.995, 0.999])
def test_after_1000_steps_the_start_has_faded_to_decay_to_the_1000(decay):
    """From 1 to weights that are 0 ever after. 200 epochs with one update each would leave 37% of a random start."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, decay)
    nn.init.zeros_(model.weight)
    for _ in range(1000):
        ema.update(model, LATE)
    assert ema.model.weight.item() == pytest.approx(decay**1000, rel=1e-3)  # 0.7% and 37%


def test_the_start_has_faded_after_ten_steps_whatever_the_decay():
    """The ramp: n! · 9! / (n + 9)! of the start is left after n steps, where a constant 0.9999 would leave it all."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.9999)
    nn.init.zeros_(model.weight)
    for step in range(1, 11):
        ema.update(model, step)
    left = math.factorial(10) * math.factorial(9) / math.factorial(19)
    assert ema.model.weight.item() == pytest.approx(left, rel=1e-5)  # a hundred-thousandth


def test_training_moves_the_model_and_not_its_shadow(model):
    ema = EMA(model, 0.9)
    before, start = weights(ema.model), weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(5, 3)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(weights(model), start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(ema.model), before, strict=True))
    ema.update(model, LATE)
    assert all(not torch.equal(a, b) for a, b in zip(weights(ema.model), before, strict=True))


def test_updating_moves_the_shadow_and_not_the_model(model):
    ema = EMA(model, 0.9)
    train_a_step(model, torch.Generator().manual_seed(1))
    before = weights(model)
    ema.update(model, LATE)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_shadow_and_model_share_no_memory(model):
    ema = EMA(model, 0.0)
    ema.update(model, LATE)  # with decay 0 a careless update could hand over the tensor itself
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not theirs & {p.untyped_storage().data_ptr() for p in ema.model.parameters()}


def test_shadow_is_outside_of_every_gradient(model):
    ema = EMA(model, 0.9)
    ema.update(model, LATE)
    assert not ema.model.training
    assert model.training
    assert all(not p.requires_grad and p.is_leaf for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not ema.model(torch.ones(1, 3)).requires_grad


def test_shadow_of_the_unet_averages_every_weight():
    """None is forgotten: after one step of decay 0.5 from w to w + 1, each of them stands at w + 0.5."""
    torch.manual_seed(0)
    model = UNet(image_size=16, dim=8, dim_mults=(1, 2))
    start = copy.deepcopy(model)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update(model, LATE)
    expected = {name: w + 0.5 for name, w in start.state_dict().items()}
    torch.testing.assert_close(ema.model.state_dict(), expected)


def test_a_model_whose_buffers_would_not_be_averaged_is_refused():
    with pytest.raises(ValueError, match=r"buffers: 1\.num_batches_tracked, 1\.running_mean, 1\.running_var"):
        EMA(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), 0.9)
    EMA(nn.BatchNorm2d(2, track_running_stats=False), 0.9)
