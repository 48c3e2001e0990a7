"""Consistency distillation and its sampler on Gaussian data, where the consistency function is known, and by hand.

For pixels x_0 ~ N(μ, s²), the probability flow ODE only stretches the deviation of x_t from its mean √α̅ μ. So the
consistency function, which maps every x_t to the end of its path, is f(x_t, t) = μ + s (x_t - √α̅ μ) / √(α̅ s² + 1 - α̅).
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import differences
from test_samplers import MU, S, best_predictor, law, noise
from test_training import IMAGES, LABELS, learner
from torch import Tensor, nn

from src.diffusion import GAP, Diffusion
from src.model import autocast
from src.samplers import consistency, ddim, time_grid
from src.training import Learner, loss_of

EPS32 = torch.finfo(torch.float32).eps


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


def wild(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2 * x_t + t[:, None, None, None] / 100) + 0.3


def tame(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cos(x_t - t[:, None, None, None] / 500)


@pytest.mark.parametrize("gap", [1, 0.25, GAP, 0.001])
@pytest.mark.parametrize("weight", ["uniform", "min_snr"])
def test_the_loss_is_the_distance_of_two_estimates_by_hand(gap, weight):
    """x_r comes from the sampler `ddim`, in one step."""
    diffusion = Diffusion(1000, "cosine", prediction="v", loss_weight=weight)
    t = torch.tensor([0, 3, 100, 400, 700, 990])
    x0, eps, scale = noise(6, 1, 8, 8).clamp(-1, 1), noise(6, 1, 8, 8, seed=1), torch.ones(1, requires_grad=True)
    loss = diffusion.consistency_loss(lambda x, t: scale * wild(x, t), tame, x0, t, eps, gap)
    (slope,) = torch.autograd.grad(loss, scale)

    total, by_hand = 0.0, torch.ones(1, dtype=torch.float64, requires_grad=True)
    for i, now in enumerate(t.tolist()):
        before = max(now - round(1000 * gap), -1)
        a = diffusion.alpha_bar[now]
        x_t = a.sqrt() * x0[i].double() + (1 - a).sqrt() * eps[i].double()
        (x_r,) = ddim(tame, diffusion, x_t[None].float(), None, [(now, before)])
        estimates = []
        for k, x, factor in (now, x_t, by_hand), (before, x_r[0].double(), by_hand.detach()):
            b = diffusion.alpha_bar[k] if k >= 0 else torch.ones((), dtype=torch.float64)
            estimates.append(b.sqrt() * x - (1 - b).sqrt() * factor * wild(x, torch.tensor([k]))[0])
        error = ((estimates[0] - estimates[1]) ** 2).mean() / (1 - a)
        error = error * diffusion.weight(torch.tensor([now])).item()
        total = total + error / 6
    (expected,) = torch.autograd.grad(total, by_hand)
    # The noisy end subtracts nearly equal numbers: 1 / √(1 - α̅_0) = 155 magnifies the rounding of t = 0.
    torch.testing.assert_close(loss.double(), total, rtol=1e-3, atol=155 * 8 * EPS32)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-3, atol=155 * 8 * EPS32)


def test_where_a_step_of_the_teacher_leads_to_the_end_the_network_learns_what_the_teacher_says():
    """At x_{-1} the estimate is that image, so that the network's answer there does not matter."""
    diffusion, t = Diffusion(1000, "cosine", prediction="v"), torch.full((4,), 20)
    x0, eps = noise(4, 1, 8, 8).clamp(-1, 1), noise(4, 1, 8, 8, seed=1)
    loss = diffusion.consistency_loss(lambda x, t: wild(x, t) + 1e6 * (t == 0)[:, None, None, None], tame, x0, t, eps)
    x_t, (signal, deviation) = diffusion.q_sample(x0, t, eps), diffusion.signal_and_noise(t)
    x0_by_teacher = (signal * x_t - deviation * tame(x_t, t)).clamp(-1, 1)
    error = (signal * x_t - deviation * wild(x_t, t) - x0_by_teacher).div(deviation).square().mean()
    torch.testing.assert_close(loss, error, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time_steps", [2, 10, 40])
def test_r_is_below_t_however_few_timesteps_there_are(time_steps):
    diffusion, asked = Diffusion(time_steps, "cosine", prediction="v"), []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(t.tolist())
        return wild(x_t, t)

    t = torch.arange(1, time_steps)
    diffusion.consistency_loss(network, tame, noise(len(t), 1, 8, 8), t, noise(len(t), 1, 8, 8, seed=1))
    assert asked == [(t - 1).tolist(), t.tolist()]  # r first


def test_both_estimates_have_the_same_dropout_masks_and_the_next_ones_others():
    masks = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        masks.append(nn.functional.dropout(torch.ones_like(x_t)))
        return masks[-1]

    diffusion, x0 = Diffusion(100, "cosine", prediction="v"), noise(2, 1, 8, 8)
    for _ in range(2):
        diffusion.consistency_loss(network, tame, x0, torch.tensor([50, 90]), noise(2, 1, 8, 8, seed=1))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])


def test_the_loss_of_the_exact_function_vanishes_with_the_gap():
    """One step of DDIM, a method of first order, has an error of second order in the gap."""
    diffusion, t = Diffusion(4000, "cosine", prediction="v"), torch.arange(1000, 3800, 50)
    x0, eps = MU + S * noise(56, 1, 16, 16), noise(56, 1, 16, 16, seed=1)
    networks = as_v(diffusion, exact), best_predictor(diffusion)
    errors = [diffusion.consistency_loss(*networks, x0, t, eps, gap).sqrt().item() for gap in (1 / 8, 1 / 16, 1 / 32)]
    assert all(later < earlier / 3 for earlier, later in pairwise(errors))


def test_distillation_of_the_best_predictor_approaches_the_exact_function():
    """One weight w: f = μ + (1 + w) × the exact deviation, for t where that is left to learn; ordinary training, which
    shrinks it to the mean of the data, is the negative control.
    """
    diffusion = Diffusion(1000, "cosine", prediction="v")
    generator = torch.Generator().manual_seed(0)

    def trained(teacher: Callable[[Tensor, Tensor], Tensor] | None) -> float:
        w = torch.tensor(0.5, requires_grad=True)
        network = as_v(diffusion, lambda x, a: MU + (1 + w * (1 - a)) * (exact(x, a) - MU))
        optimizer = torch.optim.Adam([w], lr=0.02)
        for _ in range(300):
            t = torch.randint(100, 1000, (64,), generator=generator)
            x0 = MU + S * torch.randn(64, 1, 8, 8, generator=generator)
            eps = torch.randn(64, 1, 8, 8, generator=generator)
            optimizer.zero_grad()
            loss_of(diffusion, network, teacher, None)(x0, t, eps).backward()
            optimizer.step()
        return w.item()

    assert abs(trained(best_predictor(diffusion))) < 0.15
    assert trained(None) < -0.4


def test_in_bfloat16_too_every_weight_has_a_gradient():
    """Older torch would keep the casts of the weights from the pass without gradients, if autocast cached them."""
    ours = learner()
    nn.init.normal_(ours.model.conv_out.weight)  # it starts at 0, and would give the others no gradient
    diffusion, t = ours.diffusion, torch.tensor([10, 20, 30, 49])
    networks = partial(ours.model, y=LABELS[:4]), partial(copy.deepcopy(ours.model), y=LABELS[:4])
    with autocast(torch.device("cpu"), torch.bfloat16):
        loss = diffusion.consistency_loss(*networks, IMAGES[:4], t, noise(4, 1, 8, 8))
    loss.backward()
    assert [name for name, p in ours.model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- in training -------------------------------------------------------------------------------------------


def distilling(**settings: object) -> Learner:
    """A learner whose teacher has weights of its own, and gives every class another image."""
    torch.manual_seed(7)
    ours = learner(objective="consistency", **settings)
    for weight in ours.teacher.parameters():
        nn.init.normal_(weight, std=0.1)
    return ours


def test_a_step_of_distillation_from_a_saved_state_is_the_step_that_would_have_been():
    ours, other = distilling(dropout=0.5), learner(objective="consistency", dropout=0.5)
    ours.step(IMAGES, LABELS, 1e-3)
    saved = copy.deepcopy(ours.state())
    ours.step(IMAGES, LABELS, 1e-3)
    other.load(saved)
    other.step(IMAGES, LABELS, 1e-3)
    assert not differences(ours.state(), other.state())
    ordinary = learner(dropout=0.5)
    ordinary.load(saved)
    ordinary.step(IMAGES, LABELS, 1e-3)
    assert differences(ordinary.state()["model"], ours.state()["model"])


def test_the_teacher_starts_as_the_network_and_stays():
    ours = learner(objective="consistency")
    nn.init.normal_(ours.model.conv_out.weight)
    ours.start_from_network()
    start = copy.deepcopy(ours.model.state_dict())
    ours.step(IMAGES, LABELS, 1e-3)
    assert not differences(ours.teacher.state_dict(), start)
    assert differences(ours.model.state_dict(), start)
    assert not ours.teacher.training and learner().teacher is None


def test_the_teacher_is_given_the_classes():
    one, other = distilling(class_dropout=0.0), distilling(class_dropout=0.0)
    other.teacher.label.weight.data += 1
    losses = []
    for each in one, other:
        torch.manual_seed(0)
        losses.append(each.step(IMAGES, LABELS, 1e-3)[0].item())
    assert losses[0] != losses[1]
