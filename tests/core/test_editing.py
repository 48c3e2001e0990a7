"""Starting from an image, and keeping some of its pixels: exactly, and where the answer is known, on Gaussian data."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from test_samplers import MU, PREDICTIONS, SCHEDULES, VARIANTS, S, best_predictor, last, wild
from torch import Tensor, nn

from src.diffusion import Diffusion
from src.generation import Generator, ImageNoise, Inpainting
from src.samplers import SAMPLERS, consistency, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, time_grid

GREYS = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)  # every grey level once
IMAGE = GREYS.float() / 127.5 - 1
RIGHT = torch.zeros(1, 16, 16, dtype=torch.bool).index_fill(2, torch.arange(8, 16), True)  # the right half
NONE, ALL = torch.zeros_like(RIGHT), torch.ones_like(RIGHT)
STRENGTHS = [0.0, 1e-9, 0.001, 0.3, 0.5, 0.7, 0.999, 1.0]


class Function(nn.Module):
    """A function of x_t and t as the network of a Generator; keeps what it was called with."""

    channels, image_size, label = 1, 16, None

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor] = wild) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(1))
        self.function = function
        self.calls: list[tuple[Tensor, int]] = []  # x_t and t

    def forward(self, x_t: Tensor, t: Tensor, y: None) -> Tensor:
        self.calls.append((x_t, t.item()))
        return self.function(x_t, t)


# ---- the grid of timesteps -------------------------------------------------------------------------------


@pytest.mark.parametrize("time_steps", [1, 2, 7, 40, 1000])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_grid_is_the_last_part_of_the_way(time_steps, strength, power):
    diffusion = Diffusion(time_steps, "cosine")
    for steps in {1, 2, 3, 20, time_steps - 1, time_steps} & set(range(1, time_steps + 1)):
        grid = time_grid(diffusion, steps, strength, power)
        if not grid:  # the clean image is the nearest start
            assert time_steps * strength <= 0.5
            continue
        assert abs(grid[0][0] + 1 - time_steps * strength) <= 0.5
        assert grid[-1][1] == -1
        assert all(t > s for t, s in grid)
        assert all(before[1] == after[0] for before, after in pairwise(grid))
        assert abs(len(grid) - max(1, steps * strength)) <= 0.5  # so never more than its timesteps


def test_a_power_shortens_the_steps_near_the_image():
    diffusion = Diffusion(1000, "cosine")
    assert [t for t, _ in time_grid(diffusion, 5, power=3)] == [999, 511, 215, 63, 7]  # 1000 · (k/5)³ - 1
    crowded = [t for t, _ in time_grid(diffusion, 100, power=3)]  # 1000 · (k/100)³ < k for k < 31.6
    assert crowded[-31:] == list(range(30, -1, -1))


def test_two_steps_of_consistency_sampling_start_at_999_and_124():
    """The timesteps of the published scores."""
    assert Generator(Function(), Diffusion(1000, "cosine"), "consistency").grid == [(999, 124), (124, -1)]


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_strength_1_is_the_whole_way(steps):
    diffusion = Diffusion(40, "cosine")
    assert time_grid(diffusion, steps, 1.0) == time_grid(diffusion, steps)
    assert time_grid(diffusion, steps, 0.0) == []


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_strengths_out_of_range_are_refused(strength):
    with pytest.raises(ValueError, match=f"strength is {strength}: choose 0 to 1"):
        time_grid(Diffusion(20, "cosine"), 5, strength)


# ---- starting from an image ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_gives_the_image_back_and_asks_no_network(sampler):
    network = Function()
    generator = partial(Generator, network, Diffusion(50, "cosine"), sampler, 10, image=IMAGE)
    states = []
    assert torch.equal(generator(strength=0.0).images(0, range(3), states.append), GREYS.expand(3, -1, -1, -1))
    assert torch.equal(generator(strength=0.0).interpolate(0, 3, 2), GREYS.expand(3, -1, -1, -1))
    assert not network.calls and not states
    changed = generator(strength=0.1).images(0, range(3))
    assert (changed != GREYS).float().mean() > 0.5  # negative control


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_1_is_ordinary_sampling_whatever_the_image(sampler):
    generator = partial(Generator, Function(), Diffusion(50, "cosine"), sampler, 10)
    ordinary = generator().images(0, range(3))
    assert torch.equal(generator(image=IMAGE).images(0, range(3)), ordinary)
    assert not torch.equal(generator(image=IMAGE, strength=0.9).images(0, range(3)), ordinary)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("strength", "t", "evaluations"), [(0.02, 0, 1), (0.3, 14, 3), (0.5, 24, 5), (0.98, 48, 10)])
def test_it_starts_with_the_noise_of_its_strength(schedule, sampler, strength, t, evaluations):
    """x_t = √α̅_t x_0 + √(1 - α̅_t) eps, with the noise eps that would else have been x_T."""
    diffusion, network = Diffusion(50, schedule), Function()
    Generator(network, diffusion, sampler, 10, image=IMAGE, strength=strength).images(7, [4, 2])
    a, eps = diffusion.alpha_bar[t], ImageNoise(7, [4, 2], (1, 16, 16))()
    x_t, first = network.calls[0]
    assert first == t
    torch.testing.assert_close(x_t, (a.sqrt() * IMAGE + (1 - a).sqrt() * eps).float(), rtol=0, atol=1e-6)
    assert len(network.calls) == evaluations


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"mask": RIGHT}, {"strength": 0.0, "mask": RIGHT}])
def test_strength_and_mask_without_an_image_are_refused(options):
    with pytest.raises(ValueError, match="need an image"):
        Generator(Function(), Diffusion(50, "cosine"), **options)


def test_interpolations_start_from_the_image_too():
    """The first and the last frame are images 0 and 1, and all resemble the image more than those from noise do."""
    data = best_predictor(diffusion := Diffusion(50, "cosine"))
    generator = partial(Generator, Function(data), diffusion, "dpmpp_2m", 20)
    edit = generator(image=IMAGE, strength=0.5)
    frames = edit.interpolate(3, 5, 2)
    assert (frames[[0, -1]].int() - edit.images(3, range(2)).int()).abs().max() <= 1  # rounding
    distance = lambda images: (images.float() - GREYS).abs().mean(dim=(1, 2, 3))  # noqa: E731
    assert distance(frames).max() < distance(generator().interpolate(3, 5, 2)).min()


def edited(sampler, diffusion: Diffusion, strength: float, x0: float) -> tuple[float, float]:
    """Mean and standard deviation of images of Gaussian data that start from x0, with all steps.

    As in `test_samplers.law`: pixel 0 gets no noise, pixel 1 only that of the start, pixel 2 + k only the k-th fresh.
    """
    grid = time_grid(diffusion, diffusion.time_steps, strength)
    inputs = iter(torch.eye(len(grid) + 2)[1:])
    draw = lambda: next(inputs).view(1, 1, 1, -1)  # noqa: E731
    start = diffusion.q_sample(torch.full((1, 1, 1, len(grid) + 2), x0), torch.tensor([grid[0][0]]), draw())
    answer = last(sampler(best_predictor(diffusion), diffusion, start, draw, grid)).double().flatten()
    return answer[0].item(), (answer - answer[0]).norm().item()


def in_theory(diffusion: Diffusion, strength: float, x0: float, stochastic: bool) -> tuple[float, float]:
    """The same for infinitely many steps. x_t ~ N(√α̅ x0, 1 - α̅), where the data have the variance u = α̅ s² + 1 - α̅.

    The reverse SDE then draws from the posterior p(x_0 | x_t), of mean μ + √α̅ s² / u (x_t - √α̅ μ) and variance
    s² (1 - α̅) / u. The ODE stretches the deviation from √α̅ μ by s / √u.
    """
    a = diffusion.alpha_bar[round(diffusion.time_steps * strength) - 1].item()
    u = a * S**2 + 1 - a
    gain = math.sqrt(a) * S**2 / u if stochastic else S / math.sqrt(u)
    posterior = S**2 * (1 - a) / u if stochastic else 0.0
    return MU + gain * math.sqrt(a) * (x0 - MU), math.sqrt(posterior + gain**2 * (1 - a))


def agree(found: tuple[float, float], expected: tuple[float, float]) -> bool:
    """But for what a thousand steps instead of infinitely many may cost: 3% of the deviation."""
    return abs(found[0] - expected[0]) < 0.03 * S and abs(found[1] / expected[1] - 1) < 0.03


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", [ddpm, ddim, dpmpp_2m, dpmpp_2m_sde])
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8])
def test_on_gaussian_data_it_has_the_law_of_the_theory(schedule, sampler, strength):
    diffusion, stochastic = Diffusion(1000, schedule), SAMPLERS[sampler.__name__].stochastic
    assert agree(edited(sampler, diffusion, strength, 0.6), in_theory(diffusion, strength, 0.6, stochastic))


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpmpp_2m, dpmpp_2m_sde])
def test_another_image_strength_or_kind_of_sampler_has_another_law(sampler):
    diffusion, stochastic = Diffusion(1000, "cosine"), SAMPLERS[sampler.__name__].stochastic
    found = edited(sampler, diffusion, 0.3, 0.6)
    assert agree(found, in_theory(diffusion, 0.3, 0.6, stochastic))
    for other in (0.3, 0.5, stochastic), (0.4, 0.6, stochastic), (0.3, 0.6, not stochastic):
        assert not agree(found, in_theory(diffusion, *other))


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_the_more_strength_the_less_is_left_of_the_image(sampler):
    diffusion = Diffusion(1000, "cosine")
    left = [edited(sampler, diffusion, strength, 0.6)[0] - MU for strength in (0.02, 0.1, 0.3, 0.5, 0.8, 1.0)]
    assert left == sorted(left, reverse=True)
    assert left[0] > 0.3 and abs(left[-1]) < 0.002


# ---- keeping pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_the_mask_keeps_is_kept_to_the_grey_level(schedule, prediction, sampler, strength):
    diffusion = Diffusion(50, schedule, prediction=prediction)
    generator = Generator(Function(), diffusion, sampler, 10, image=IMAGE, strength=strength, mask=RIGHT)
    images = generator.images(0, range(3))
    kept = images == GREYS
    assert kept[..., :8].all()
    assert kept[..., 8:].float().mean() < 0.5
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_black_mask_keeps_the_image_and_a_white_one_nothing(sampler):
    generator = partial(Generator, Function(), Diffusion(50, "cosine"), sampler, 10, image=IMAGE)
    assert torch.equal(generator(mask=NONE).images(0, range(2)), GREYS.expand(2, -1, -1, -1))
    for strength in 1.0, 0.5:
        ordinary = generator(strength=strength).images(0, range(2))
        assert torch.equal(generator(strength=strength, mask=ALL).images(0, range(2)), ordinary)
        assert not torch.equal(generator(strength=strength, mask=RIGHT).images(0, range(2)), ordinary)


def test_colours_are_kept_together():
    """One mask for all channels."""
    image, network = IMAGE.expand(3, -1, -1), Function()
    network.channels = 3
    images = Generator(network, Diffusion(50, "cosine"), "ddim", 10, image=image, mask=RIGHT).images(0, [0])
    assert images.shape == (1, 3, 16, 16)
    assert torch.equal(images[0, ..., :8], GREYS.expand(3, -1, -1)[..., :8])
    assert all((channel[:, 8:] != GREYS[0, :, 8:]).any() for channel in images[0])


def test_the_model_s_own_process_is_left_as_it_was():
    """It serves other generators: only the estimates of the generator with a mask know the image."""
    diffusion, network = Diffusion(50, "cosine"), Function()
    ordinary = Generator(network, diffusion, "ddim", 10).images(0, [0])
    Generator(network, diffusion, "ddim", 10, image=IMAGE, mask=NONE).images(0, [0])
    assert torch.equal(Generator(network, diffusion, "ddim", 10).images(0, [0]), ordinary)
    assert type(diffusion) is Diffusion


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", [*(run for run, _ in VARIANTS.values()), dpmpp_2m, dpmpp_2m_sde, consistency])
@pytest.mark.parametrize("steps", [4, 40])
def test_known_pixels_pass_through_the_forward_process_backwards(schedule, sampler, steps):
    """After every step they are N(√α̅_s x_0, 1 - α̅_s): q(x_s | x_0), whatever the network thinks.

    Pixel 0 gets no noise, pixel 1 + k only the k-th, the first of which is that of the start.
    """
    diffusion, x0 = Diffusion(40, schedule), 0.4
    grid = time_grid(diffusion, steps)

    def states(mask: bool) -> list[Tensor]:
        inputs = iter(torch.eye(steps + 1)[1:])
        draw = lambda: next(inputs).view(1, 1, 1, -1)  # noqa: E731
        image = torch.full((1, 1, steps + 1), x0)
        known = Inpainting(diffusion, image, torch.full_like(image, mask, dtype=torch.bool))
        start = diffusion.q_sample(image, torch.tensor([grid[0][0]]), draw())
        return [x_s.double().flatten() for x_s in sampler(lambda x_t, t: 0.1 * x_t, known, start, draw, grid)]

    def fits(x_s: Tensor, s: int) -> bool:
        a = diffusion.alpha_bar[s].item() if s >= 0 else 1.0
        law = x_s[0].item(), (x_s - x_s[0]).norm().item()
        return law == pytest.approx((math.sqrt(a) * x0, math.sqrt(1 - a)), rel=1e-3, abs=1e-5)

    assert all(fits(x_s, s) for x_s, (_, s) in zip(states(mask=False), grid, strict=True))
    assert not all(fits(x_s, s) for x_s, (_, s) in zip(states(mask=True), grid, strict=True))  # negative control


def pair_predictor(diffusion: Diffusion, correlation: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] for two pixels x_0 ~ N(μ, Σ) of variance s²: μ + √α̅ Σ (α̅ Σ + (1 - α̅) I)⁻¹ (x_t - √α̅ μ)."""
    covariance = S**2 * torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alpha_bar[t].item()
        gain = math.sqrt(a) * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2))
        return (MU + (x_t.double() - math.sqrt(a) * MU) @ gain).float()

    return predict


def law_of_the_unknown(sampler, diffusion: Diffusion, correlation: float, x_1: float) -> tuple[float, float]:
    """Mean and standard deviation of the second pixel where the first is known to be x_1, in 100 steps."""
    steps = 100
    draw = iter(torch.eye(2 * steps + 1)[:, 1:].view(-1, steps, 1, 1, 2).unbind(1)).__next__
    known = Inpainting(diffusion, torch.tensor([[[x_1, 0.0]]]), torch.tensor([[[False, True]]]))
    x = last(sampler(pair_predictor(diffusion, correlation), known, draw(), draw, time_grid(diffusion, steps)))
    assert (x[..., 0] == x_1).all()
    unknown = x[..., 1].double().flatten()
    return unknown[0].item(), (unknown - unknown[0]).norm().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", [ddpm, ddim, dpmpp_2m, dpmpp_2m_sde])
@pytest.mark.parametrize("correlation", [0.9, 0.5, -0.7])
def test_an_unknown_pixel_follows_the_known_one_to_which_it_is_correlated(schedule, sampler, correlation):
    """It moves towards E[x_2 | x_1] = μ + ρ (x_1 - μ), a third of the way at least, and varies less than the data do.

    Replacement is an approximation: at each t, the network sees x_1 with the noise of x_t only. One image of the batch
    gets no noise, each other a single 1 in one pixel of one draw.
    """
    x_1, diffusion = 0.5, Diffusion(1000, schedule, prediction="x0")
    mean, deviation = law_of_the_unknown(sampler, diffusion, correlation, x_1)
    assert 0.35 < (mean - MU) / (correlation * (x_1 - MU)) < 1
    assert deviation < 0.95 * S


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpmpp_2m, dpmpp_2m_sde])
def test_an_unknown_pixel_ignores_one_to_which_it_is_not_correlated(sampler):
    diffusion = Diffusion(1000, "cosine", prediction="x0")
    mean, deviation = law_of_the_unknown(sampler, diffusion, 0.0, 0.5)
    assert mean == pytest.approx(MU, abs=1e-4)
    assert deviation == pytest.approx(S, rel=0.1)  # of 100 steps, even first-order ones
