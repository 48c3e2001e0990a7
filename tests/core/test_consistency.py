"""Consistency training and its sampler on Gaussian data, where the consistency function is known, and by hand.

For pixels x_0 ~ N(μ, s²), the probability flow ODE only stretches the deviation of x_t from its mean √α̅ μ. So the
consistency function, which maps every x_t to the end of its path, is f(x_t, t) = μ + s (x_t - √α̅ μ) / √(α̅ s² + 1 - α̅).
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import differences
from test_samplers import MU, S, best_predictor, law, noise
from test_training import IMAGES, LABELS, learner
from torch import Tensor, nn

from src.diffusion import HUBER_C, Diffusion
from src.model import autocast
from src.samplers import consistency, time_grid
from src.training import STAGES, consistency_gap, loss_of

EPS32 = torch.finfo(torch.float32).eps
GAPS = [2.0**-k for k in range(1, STAGES + 1)]


def as_v(diffusion: Diffusion, f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The network whose estimate of x_0 is f(x_t, α̅)."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alpha_bar[t][:, None, None, None]
        return ((a.sqrt() * x_t - f(x_t, a)) / (1 - a).sqrt()).float()

    return predict


def exact(x_t: Tensor, a: Tensor) -> Tensor:
    return MU + S * (x_t - a.sqrt() * MU) / (a * S**2 + 1 - a).sqrt()


# ---- the sampler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_any_number_of_steps_with_the_exact_function_gives_the_data(schedule, steps):
    """But for what is left of the image in x_T, √α̅_T = 0.006 on the linear schedule, and for 1 - α̅_T < 1."""
    diffusion = Diffusion(1000, schedule, prediction="v")
    found = law(consistency, diffusion, steps, as_v(diffusion, exact))
    left = diffusion.alpha_bar[-1].sqrt().item()
    assert found == pytest.approx((MU, S), abs=left * MU + 1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_mean_of_the_data_is_no_consistency_function(steps):
    """E[x_0 | x_t], which an ordinary training learns, loses variance with every step that is as large."""
    diffusion = Diffusion(1000, "cosine", prediction="v")
    _, deviation = law(consistency, diffusion, steps, best_predictor(diffusion))
    assert deviation < 0.7 * S


def test_every_step_but_the_last_adds_fresh_noise():
    diffusion, drawn = Diffusion(100, "cosine", prediction="v"), []
    draw = lambda: drawn.append(noise(2, 1, 4, 4, seed=len(drawn))) or drawn[-1]  # noqa: E731
    grid = time_grid(diffusion, 4)
    states = list(consistency(as_v(diffusion, exact), diffusion, noise(2, 1, 4, 4, seed=9), draw, grid))
    assert (len(states), len(drawn)) == (4, 3)
    assert states[-1].abs().max() <= 1


# ---- the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("gap", GAPS)
def test_r_is_the_noisiest_timestep_within_the_gap(schedule, gap):
    diffusion = Diffusion(1000, schedule)
    r = diffusion.less_noisy(torch.arange(1000), gap).tolist()
    sigma = [math.sqrt(1 / a - 1) for a in diffusion.alpha_bar.tolist()]
    for t in range(1000):
        wanted = sigma[t] * (1 - gap * (1 + 8 / (1 + math.exp(min(sigma[t], 700)))))
        assert -1 <= r[t] < t
        assert r[t] == -1 or sigma[r[t]] < wanted * (1 + 1e-9)
        assert sigma[r[t] + 1] >= wanted * (1 - 1e-9) - 1e-12


def wild(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2 * x_t + t[:, None, None, None] / 100) + 0.3


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("weight", ["uniform", "min_snr"])
def test_the_loss_is_the_distance_of_two_estimates_by_hand(gap, weight):
    diffusion = Diffusion(1000, "cosine", prediction="v", loss_weight=weight)
    t = torch.tensor([0, 3, 100, 400, 700, 990])
    x0, eps, scale = noise(6, 1, 8, 8).clamp(-1, 1), noise(6, 1, 8, 8, seed=1), torch.ones(1, requires_grad=True)
    loss = diffusion.consistency_loss(lambda x, t: scale * wild(x, t), x0, t, eps, gap)
    (slope,) = torch.autograd.grad(loss, scale)

    total, by_hand = 0.0, torch.ones(1, dtype=torch.float64, requires_grad=True)
    for i, (now, before) in enumerate(zip(t.tolist(), diffusion.less_noisy(t, gap).tolist(), strict=True)):
        estimates = []
        for k, factor in (now, by_hand), (before, by_hand.detach()):
            a = diffusion.alpha_bar[k] if k >= 0 else torch.ones((), dtype=torch.float64)
            x = a.sqrt() * x0[i].double() + (1 - a).sqrt() * eps[i].double()
            estimates.append(a.sqrt() * x - (1 - a).sqrt() * factor * wild(x, torch.tensor([k]))[0])
        error = ((estimates[0] - estimates[1]) ** 2).mean() / (1 - diffusion.alpha_bar[now])
        error = error * diffusion.weight(torch.tensor([now])).item()
        total = total + ((error + HUBER_C**2).sqrt() - HUBER_C) / 6
    (expected,) = torch.autograd.grad(total, by_hand)
    # The noisy end subtracts nearly equal numbers: 1 / √(1 - α̅_0) = 155 magnifies the rounding of t = 0.
    torch.testing.assert_close(loss.double(), total, rtol=1e-3, atol=155 * 8 * EPS32)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-3, atol=155 * 8 * EPS32)


def test_from_the_clean_image_the_estimate_is_that_image():
    """Then the error is that of ordinary training, and the network's answer for x_r = x_0 does not matter."""
    diffusion, t = Diffusion(1000, "cosine", prediction="v"), torch.full((4,), 5)
    x0, eps = noise(4, 1, 8, 8).clamp(-1, 1), noise(4, 1, 8, 8, seed=1)
    assert (diffusion.less_noisy(t, 0.5) == -1).all()
    loss = diffusion.consistency_loss(lambda x, t: wild(x, t) + 1e6 * (x == x0), x0, t, eps, 0.5)
    error = (wild(diffusion.q_sample(x0, t, eps), t) - diffusion.target(x0, t, eps)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, ((error + HUBER_C**2).sqrt() - HUBER_C).mean(), rtol=1e-4, atol=1e-5)


def test_both_estimates_have_the_same_dropout_masks_and_the_next_ones_others():
    masks = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        masks.append(nn.functional.dropout(torch.ones_like(x_t)))
        return masks[-1]

    diffusion, x0 = Diffusion(100, "cosine", prediction="v"), noise(2, 1, 8, 8)
    for _ in range(2):
        diffusion.consistency_loss(network, x0, torch.tensor([50, 90]), noise(2, 1, 8, 8, seed=1), 0.25)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])


def test_the_loss_of_the_exact_function_vanishes_with_the_gap():
    """x_t and x_r share the noise but not the path, so that it has a loss, too, which falls as their distance does."""
    diffusion, t = Diffusion(4000, "cosine", prediction="v"), torch.arange(400, 3600, 50)
    x0, eps = MU + S * noise(64, 1, 16, 16), noise(64, 1, 16, 16, seed=1)
    network = as_v(diffusion, exact)
    losses = [diffusion.consistency_loss(network, x0, t, eps, gap).item() for gap in GAPS]
    assert all(later < 0.75 * earlier for earlier, later in pairwise(losses[1:]))


def test_training_from_a_perturbed_start_approaches_the_exact_function():
    """One weight w: f = μ + (1 + w) × the exact deviation, for t where that is left to learn; ordinary training, which
    shrinks it to the mean of the data, is the negative control.
    """
    diffusion = Diffusion(1000, "cosine", prediction="v")
    generator = torch.Generator().manual_seed(0)

    def trained(consistent: bool) -> float:
        w = torch.tensor(0.5, requires_grad=True)
        network = as_v(diffusion, lambda x, a: MU + (1 + w * (1 - a)) * (exact(x, a) - MU))
        optimizer = torch.optim.Adam([w], lr=0.02)
        for _ in range(300):
            t = torch.randint(100, 1000, (64,), generator=generator)
            x0 = MU + S * torch.randn(64, 1, 8, 8, generator=generator)
            eps = torch.randn(64, 1, 8, 8, generator=generator)
            optimizer.zero_grad()
            loss_of(diffusion, GAPS[-1] if consistent else None)(network, x0, t, eps).backward()
            optimizer.step()
        return w.item()

    assert abs(trained(consistent=True)) < 0.15
    assert trained(consistent=False) < -0.4


def test_in_bfloat16_too_every_weight_has_a_gradient():
    """Older torch would keep the casts of the weights from the pass without gradients, if autocast cached them."""
    ours = learner()
    nn.init.normal_(ours.model.conv_out.weight)  # it starts at 0, and would give the others no gradient
    diffusion, t = ours.diffusion, torch.tensor([10, 20, 30, 49])
    with autocast(torch.device("cpu"), torch.bfloat16):
        loss = diffusion.consistency_loss(partial(ours.model, y=LABELS[:4]), IMAGES[:4], t, noise(4, 1, 8, 8), 0.25)
    loss.backward()
    assert [name for name, p in ours.model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- in training -------------------------------------------------------------------------------------------


def test_the_gap_starts_at_a_half_and_is_halved_at_equal_intervals():
    gaps = [consistency_gap(step, 10 * STAGES) for step in range(1, 10 * STAGES + 1)]
    assert gaps == [gap for gap in GAPS for _ in range(10)]
    assert consistency_gap(1, 1) == 0.5


def test_a_step_of_consistency_training_from_a_saved_state_is_the_step_that_would_have_been():
    ours, other = learner(dropout=0.5), learner(dropout=0.5)
    ours.step(IMAGES, LABELS, 1e-3, 0.25)
    saved = copy.deepcopy(ours.state())
    ours.step(IMAGES, LABELS, 1e-3, 0.125)
    other.load(saved)
    other.step(IMAGES, LABELS, 1e-3, 0.125)
    assert not differences(ours.state(), other.state())
    ordinary = learner(dropout=0.5)
    ordinary.load(saved)
    ordinary.step(IMAGES, LABELS, 1e-3)
    assert differences(ordinary.state()["model"], ours.state()["model"])
