"""`src/samplers.py` where the answer is known exactly, against each other, and against diffusers.

The known answer: for Gaussian data x_0 ~ N(μ, s²) the best prediction has a closed form, and a sampler is then a
chain of affine maps of its noises. So is the whole: x = m + a x_T + Σ r_k z_k, which is N(m, a² + Σ r_k²), and
feeding it zeros and single ones reads off m, a and every r_k, without any statistics.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from src.diffusion import Diffusion
from src.generation import ImageNoise, slerp
from src.samplers import SAMPLERS, consistency, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, time_grid

SCHEDULES = ["linear", "cosine"]
PREDICTIONS = ["noise", "x0", "v"]
MU, S = 0.2, 0.15  # the Gaussian data; clipping at ±1 is more than 5 s away
VARIANTS = {  # sampler, and the eta that it stands for in the exact recursion
    "ddpm": (ddpm, 1.0),
    "ddim": (ddim, 0.0),
    "ddim, eta 0.5": (partial(ddim, eta=0.5), 0.5),
    "ddim, eta 1": (partial(ddim, eta=1.0), 1.0),
}
THEIR_NAME = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}  # of a prediction, in diffusers
Law = tuple[float, float]  # mean and standard deviation of a Gaussian


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(*shape: int, seed: int = 1):
    """A `draw` that gives the same noises each time it is made."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def never() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def last(states: Iterator[Tensor]) -> Tensor:
    *_, x = states
    return x


def wild(x_t: Tensor, t: Tensor) -> Tensor:
    """A nonlinear network, so far from any true prediction that clipping is active all the way."""
    t = t[:, None, None, None]
    return torch.sin(3 * x_t + t / 100) + 0.7 * x_t.roll(1, dims=-1) + 0.1


def best_predictor(diffusion: Diffusion, mu: float = MU, s: float = S):
    """E[eps | x_t], E[x_0 | x_t] or E[v | x_t] for x_0 ~ N(μ, s²): x_t has the variance u = α̅ s² + 1 - α̅, and with
    eps the covariance √(1 - α̅), with x_0 √α̅ s², with v √(α̅(1 - α̅)) (1 - s²).
    """

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alpha_bar[t][:, None, None, None]
        standard = (x_t - a.sqrt() * mu) / (a * s**2 + 1 - a)
        if diffusion.prediction == "noise":
            return ((1 - a).sqrt() * standard).float()
        if diffusion.prediction == "x0":
            return (mu + a.sqrt() * s**2 * standard).float()
        return ((a * (1 - a)).sqrt() * (1 - s**2) * standard - (1 - a).sqrt() * mu).float()

    return predict


def law(sampler, diffusion: Diffusion, steps: int, model=None, scale: float = 1.0) -> Law:
    """The law of the sampler's images, read off its responses; `scale` multiplies each fresh noise.

    Pixel 0 gets no noise at all and answers m; pixel 1 only x_T = 1; pixel 2 + k only the k-th fresh noise.
    """
    inputs = iter(torch.eye(steps + 2)[1:])
    draw = lambda: scale * next(inputs).view(1, 1, 1, -1)  # noqa: E731
    x_T = next(inputs).view(1, 1, 1, -1)
    grid = time_grid(diffusion, steps)
    answer = last(sampler(model or best_predictor(diffusion), diffusion, x_T, draw, grid)).double().flatten()
    return answer[0].item(), (answer - answer[0]).norm().item()


def exact_law(diffusion: Diffusion, steps: int, eta: float) -> Law:
    """The same by theory: mean and variance carried through the grid in Python's floats."""
    alpha_bars = [*diffusion.alpha_bar.tolist(), 1.0]  # index -1 is the clean image
    mean, variance = 0.0, 1.0
    for t, s in time_grid(diffusion, steps):
        a, b = alpha_bars[t], alpha_bars[s]
        gain = math.sqrt(a) * S**2 / (a * S**2 + 1 - a)  # E[x_0 | x_t] = μ + gain (x_t - √α̅ μ)
        sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)  # Song et al. 2021, eq. 16
        to_eps = math.sqrt(1 - b - sigma2) / math.sqrt(1 - a)
        of_x_t = math.sqrt(b) * gain + to_eps * (1 - math.sqrt(a) * gain)  # eq. 12, as an affine map of x_t
        constant = (math.sqrt(b) - to_eps * math.sqrt(a)) * (1 - math.sqrt(a) * gain) * MU
        mean, variance = constant + of_x_t * mean, of_x_t**2 * variance + sigma2
    return mean, math.sqrt(variance)


def exact_flow(diffusion: Diffusion, x_T: Tensor, t: int) -> Tensor:
    """Where the probability flow ODE brings x_T by t: x - √α̅ μ only grows and shrinks as the deviation of x_t does."""
    start, end = diffusion.alpha_bar[-1], diffusion.alpha_bar[t]
    growth = ((end * S**2 + 1 - end) / (start * S**2 + 1 - start)).sqrt()
    return end.sqrt() * MU + growth * (x_T - start.sqrt() * MU)


def recovers_the_data(found: Law) -> bool:
    """Is it N(μ, s²), but for the 3% of s that 1000 steps instead of infinitely many may cost?"""
    return abs(found[0] - MU) < 0.001 and abs(found[1] / S - 1) < 0.03


# ---- on Gaussian data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [2, 10, 50, 400])
def test_samplers_follow_their_exact_law(schedule, prediction, variant, steps):
    diffusion = Diffusion(400, schedule, prediction=prediction)
    sampler, eta = VARIANTS[variant]
    assert law(sampler, diffusion, steps) == pytest.approx(exact_law(diffusion, steps, eta), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_samplers_with_all_steps_recover_the_data(schedule, variant):
    assert recovers_the_data(law(VARIANTS[variant][0], Diffusion(1000, schedule), 1000))


@pytest.mark.parametrize("variant", ["ddpm", "ddim"])
def test_a_predictor_of_other_data_does_not_recover_it(variant):
    diffusion = Diffusion(1000, "cosine")
    mean, deviation = law(VARIANTS[variant][0], diffusion, 1000, best_predictor(diffusion, mu=MU + 0.05))
    assert not recovers_the_data((mean, deviation))
    assert mean == pytest.approx(MU + 0.05, abs=0.001)  # instead it gives what its predictor has learned
    _, deviation = law(VARIANTS[variant][0], diffusion, 1000, best_predictor(diffusion, s=2 * S))
    assert deviation == pytest.approx(2 * S, rel=0.03)


@pytest.mark.parametrize("variant", ["ddpm", "ddim, eta 0.5", "ddim, eta 1"])
def test_doubled_variance_of_the_noise_does_not_recover_the_data(variant):
    assert not recovers_the_data(law(VARIANTS[variant][0], Diffusion(1000, "cosine"), 1000, scale=math.sqrt(2)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_halves_when_the_steps_double(schedule, variant):
    """The discretisation of a stochastic or an ordinary differential equation by such steps is of first order."""
    coarse, fine = (S - law(VARIANTS[variant][0], Diffusion(t, schedule), t)[1] for t in (300, 600))
    assert 0.45 < fine / coarse < 0.6


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "bounds"), [(dpmpp_2m, (3.5, 4.2)), (ddim, (1.9, 2.1))], ids=["2m", "ddim"])
@pytest.mark.parametrize("steps", [20, 40])
def test_doubled_steps_quarter_the_error_of_the_second_order_only(schedule, prediction, sampler, bounds, steps):
    """Measured where the grids of all step numbers meet, at t = 199: the last jump is of first order in both."""
    diffusion, x_T = Diffusion(1000, schedule, prediction=prediction), torch.linspace(-2, 2, 5).view(1, 1, 1, 5)
    exact, errors = exact_flow(diffusion, x_T, 199), []
    for n in (steps, 2 * steps):
        states = sampler(best_predictor(diffusion), diffusion, x_T, never, time_grid(diffusion, n))
        (x_t,) = (x for (_, s), x in zip(time_grid(diffusion, n), states, strict=True) if s == 199)
        errors.append((x_t - exact).norm().item())
    coarse, fine = errors
    assert bounds[0] < coarse / fine < bounds[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", [dpmpp_2m, dpmpp_2m_sde])
def test_the_second_order_recovers_the_data(schedule, sampler):
    assert recovers_the_data(law(sampler, Diffusion(1000, schedule), 1000))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [80, 200])
def test_the_second_order_needs_far_fewer_steps_to_the_data_s_variance(schedule, prediction, steps):
    """Jumps of first order take x_0 for as blurred as it was at their start: too little variance is left of it."""
    diffusion = Diffusion(1000, schedule, prediction=prediction)
    first, second = (law(sampler, diffusion, steps)[1] / S - 1 for sampler in (ddpm, dpmpp_2m_sde))
    assert first < -0.05
    assert abs(second) < 0.22 * abs(first)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("variant", "steps"), [("ddpm", 1000), ("ddim", 50), ("ddim", 1000), ("ddim, eta 0.5", 50)])
def test_samples_have_the_exact_law(schedule, variant, steps):
    """The same by Monte Carlo, with real noise and clipping in force; bounds are 4.5 standard errors."""
    diffusion, n = Diffusion(1000, schedule), 4 * 64 * 64
    sampler, eta = VARIANTS[variant]
    mean, deviation = exact_law(diffusion, steps, eta)
    x_T, draw = noise(4, 1, 64, 64), stream(4, 1, 64, 64)
    x = last(sampler(best_predictor(diffusion), diffusion, x_T, draw, time_grid(diffusion, steps))).double()
    assert abs(x.mean().item() - mean) < 4.5 * deviation / math.sqrt(n)
    assert abs(x.std().item() - deviation) < 4.5 * deviation / math.sqrt(2 * n)


# ---- against each other and against diffusers ------------------------------------------------------------

# Each step of diffusers starts from our x_t, so that `wild` does not magnify the rounding of one step in the next.
ONE_STEP = 1e-4  # what the rounding of a single one may come to, as they compute 1 - alpha_bar in float32


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("time_steps", "steps"), [(300, 300), (1000, 50), (1000, 10), (1000, 3)])
def test_ddim_with_eta_1_is_ddpm(schedule, time_steps, steps):
    """Given the same x_t and noises, every step is the same, also where clipping moves x_0.

    Both compute a step from the same x_0 and x_t, of size 5 at most. No term is magnified on the way, as the factors
    are at most 1. About eight roundings make the difference.
    """
    diffusion, x_T = Diffusion(time_steps, schedule), noise(2, 1, 8, 8)
    ancestral = ddpm(wild, diffusion, x_T, stream(2, 1, 8, 8), time_grid(diffusion, steps))
    implicit = ddim(wild, diffusion, x_T, stream(2, 1, 8, 8), time_grid(diffusion, steps), eta=1.0)
    for ours, theirs in zip(ancestral, implicit, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=8 * 5 * torch.finfo(torch.float32).eps)
        with torch.inference_mode():
            theirs.copy_(ours)  # the next step of both starts here, or `wild` would magnify the difference


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_another_eta_is_not_ddpm(schedule):
    diffusion, x_T = Diffusion(1000, schedule), noise(2, 1, 8, 8)
    ancestral = last(ddpm(wild, diffusion, x_T, stream(2, 1, 8, 8), time_grid(diffusion, 50)))
    for eta in (0.0, 0.5, 0.9):
        implicit = last(ddim(wild, diffusion, x_T, stream(2, 1, 8, 8), time_grid(diffusion, 50), eta=eta))
        assert (ancestral - implicit).abs().max() > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_is_finite_on_every_grid(schedule):
    """1 - α̅_s - σ² is nearly 0 where a jump starts from pure noise: rounded below 0, its root would be NaN."""
    grids = [(time_steps, steps) for time_steps in range(1, 19) for steps in range(1, time_steps + 1)]
    for time_steps, steps in grids + [(1000, steps) for steps in range(1, 13)]:
        diffusion = Diffusion(time_steps, schedule)
        x = last(ddim(wild, diffusion, noise(1, 1, 2, 2), stream(1, 1, 2, 2), time_grid(diffusion, steps), eta=1.0))
        assert x.isfinite().all(), f"NaN with {steps} of {time_steps} timesteps"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("time_steps", "steps"), [(1000, 50), (1000, 10), (40, 40)])
def test_ddpm_equals_diffusers(schedule, prediction, time_steps, steps):
    diffusion, x_t = Diffusion(time_steps, schedule, prediction=prediction), noise(2, 1, 8, 8)
    ours = ddpm(wild, diffusion, x_t, stream(2, 1, 8, 8), time_grid(diffusion, steps))
    theirs = DDPMScheduler(
        num_train_timesteps=time_steps,
        trained_betas=diffusion.betas.numpy(),
        variance_type="fixed_small",
        prediction_type=THEIR_NAME[prediction],
    )
    theirs.set_timesteps(timesteps=[t for t, _ in time_grid(diffusion, steps)])
    generator = torch.Generator().manual_seed(1)
    for t, x in zip(theirs.timesteps.tolist(), ours, strict=True):
        expected = theirs.step(wild(x_t, torch.tensor([t])), t, x_t, generator=generator).prev_sample
        torch.testing.assert_close(x, expected, rtol=0, atol=ONE_STEP)
        x_t = x


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("time_steps", "steps"), [(1000, 50), (1000, 10), (40, 40)])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_equals_diffusers(schedule, prediction, time_steps, steps, eta):
    diffusion, x_t, clipped = Diffusion(time_steps, schedule, prediction=prediction), noise(2, 1, 8, 8), []
    ours = ddim(wild, diffusion, x_t, stream(2, 1, 8, 8), time_grid(diffusion, steps), eta=eta)
    theirs = DDIMScheduler(
        num_train_timesteps=time_steps,
        trained_betas=diffusion.betas.numpy(),
        prediction_type=THEIR_NAME[prediction],
    )
    theirs.set_timesteps(1)
    draw = stream(2, 1, 8, 8)
    for (t, s), x in zip(time_grid(diffusion, steps), ours, strict=True):
        theirs.register_to_config(num_train_timesteps=t - s)  # all that it is read for now is the jump's length
        step = theirs.step(
            wild(x_t, torch.tensor([t])), t, x_t, eta, use_clipped_model_output=True, variance_noise=draw()
        )
        clipped.append((step.pred_original_sample.abs() == 1).float().mean().item())
        torch.testing.assert_close(x, step.prev_sample, rtol=0, atol=ONE_STEP)
        x_t = x
    assert 0.1 < sum(clipped) / steps < 0.9  # the test saw both sides of the clipping


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("time_steps", "steps"), [(1000, 50), (1000, 10), (40, 40), (1000, 3)])
@pytest.mark.parametrize(("sampler", "algorithm"), [(dpmpp_2m, "dpmsolver++"), (dpmpp_2m_sde, "sde-dpmsolver++")])
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # their own
def test_dpmpp_2m_equals_diffusers(schedule, prediction, time_steps, steps, sampler, algorithm):
    diffusion, x_t, clipped = Diffusion(time_steps, schedule, prediction=prediction), noise(2, 1, 8, 8), []
    ours, draw = sampler(wild, diffusion, x_t, stream(2, 1, 8, 8), time_grid(diffusion, steps)), stream(2, 1, 8, 8)
    theirs = DPMSolverMultistepScheduler(
        num_train_timesteps=time_steps,
        trained_betas=diffusion.betas.numpy(),
        prediction_type=THEIR_NAME[prediction],
        algorithm_type=algorithm,
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        thresholding=True,  # between -1 and 1 it is clipping
        sample_max_value=1.0,
    )
    theirs.set_timesteps(timesteps=[t for t, _ in time_grid(diffusion, steps)])
    for t, x in zip(theirs.timesteps, ours, strict=True):
        expected = theirs.step(wild(x_t, t[None]), t, x_t, variance_noise=draw()).prev_sample
        clipped.append((theirs.model_outputs[-1].abs() == 1).float().mean().item())
        torch.testing.assert_close(x, expected, rtol=0, atol=ONE_STEP)
        x_t = x
    assert 0.1 < sum(clipped) / steps < 1  # the test saw clipping


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("second", "first"), [(dpmpp_2m, ddim), (dpmpp_2m_sde, ddpm)])
def test_the_second_order_begins_and_ends_as_the_first_and_differs_in_between(schedule, second, first):
    diffusion, x_T = Diffusion(1000, schedule), noise(2, 1, 8, 8)
    for steps, equal in (1, [True]), (2, [True, True]), (5, [True, False, False, False, False]):
        grid = time_grid(diffusion, steps)
        states = (sampler(wild, diffusion, x_T, stream(2, 1, 8, 8), grid) for sampler in (second, first))
        assert [torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*states, strict=True)] == equal


# ---- what every sampler promises -------------------------------------------------------------------------


def test_samplers_go_by_the_names_that_the_readme_gives_and_each_has_a_default_number_of_steps():
    functions = {f.__name__: f for f in (ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, consistency)}
    assert {name: sampler.run for name, sampler in SAMPLERS.items()} == functions
    assert all(sampler.steps >= 1 for sampler in SAMPLERS.values())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_every_sampler_yields_each_step_and_ends_on_an_image(name, steps):
    diffusion, x_T = Diffusion(20, "cosine"), noise(2, 1, 4, 4)
    before = x_T.clone()
    states = list(SAMPLERS[name].run(wild, diffusion, x_T, stream(2, 1, 4, 4), time_grid(diffusion, steps)))
    assert len(states) == steps
    assert all(x.shape == x_T.shape and x.dtype == torch.float32 for x in states)
    assert states[-1].abs().max() <= 1
    assert torch.equal(x_T, before)  # nobody's noise is overwritten


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_evaluates_the_model_once_a_step_at_the_grids_times(name):
    diffusion, times = Diffusion(100, "linear"), []
    model = lambda x_t, t: times.append(t) or wild(x_t, t)  # noqa: E731
    grid = time_grid(diffusion, 9)
    last(SAMPLERS[name].run(model, diffusion, noise(3, 1, 4, 4), stream(3, 1, 4, 4), grid))
    assert [t.tolist() for t in times] == [[t] for t, _ in grid]  # one time for all three images


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_image_i_alone_as_among_others(name):
    diffusion = Diffusion(50, "cosine")
    sample = partial(SAMPLERS[name].run, wild, diffusion, grid=time_grid(diffusion, 20))
    together, alone = ImageNoise(3, range(4), (1, 8, 8)), ImageNoise(3, [2], (1, 8, 8))
    batch, image = last(sample(together(), together)), last(sample(alone(), alone))
    torch.testing.assert_close(batch[2:3], image, rtol=0, atol=1e-5)
    assert (batch[1] - image[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_needs_no_gradients_and_leaves_the_caller_his(name):
    weight = torch.ones(1, requires_grad=True)
    model = lambda x_t, t: weight * wild(x_t, t)  # noqa: E731
    diffusion = Diffusion(5, "linear")
    grid = time_grid(diffusion, 5)
    for x_t in SAMPLERS[name].run(model, diffusion, noise(1, 1, 4, 4), stream(1, 1, 4, 4), grid):
        assert not x_t.requires_grad
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("steps", [-1, 0, 21])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, but must be from 1 to the model's 20"):
        time_grid(Diffusion(20, "cosine"), steps)


def test_dpmpp_2m_draws_no_noise():
    diffusion = Diffusion(100, "cosine")
    assert last(dpmpp_2m(wild, diffusion, noise(2, 1, 4, 4), never, time_grid(diffusion, 20))).isfinite().all()


def test_ddim_with_eta_0_draws_no_noise():
    diffusion, x_T = Diffusion(100, "cosine"), noise(2, 1, 4, 4)
    grid = time_grid(diffusion, 20)
    x = last(ddim(wild, diffusion, x_T, never, grid))
    assert torch.equal(x, last(ddim(wild, diffusion, x_T, never, grid, eta=0.0)))
    with pytest.raises(AssertionError):  # negative control
        last(ddim(wild, diffusion, x_T, never, grid, eta=0.1))


@pytest.mark.parametrize("sampler", [ddpm, partial(ddim, eta=0.3), dpmpp_2m_sde])
def test_noise_is_drawn_after_every_step_but_the_last(sampler):
    diffusion, drawn = Diffusion(100, "cosine"), []
    draw = lambda: drawn.append(1) or torch.zeros(1, 1, 4, 4)  # noqa: E731
    last(sampler(wild, diffusion, noise(1, 1, 4, 4), draw, time_grid(diffusion, 20)))
    assert len(drawn) == 19


# ---- the grid of timesteps -------------------------------------------------------------------------------


@pytest.mark.parametrize("time_steps", [1, 2, 7, 100, 1000])
def test_time_grid_goes_from_noise_to_the_clean_image(time_steps):
    diffusion = Diffusion(time_steps, "cosine")
    for steps in range(1, time_steps + 1):
        grid = time_grid(diffusion, steps)
        assert len(grid) == steps
        assert grid[0][0] < time_steps
        assert grid[-1][1] == -1
        assert all(t > s for t, s in grid)
        assert all(before[1] == after[0] for before, after in pairwise(grid))
        assert max(t - s for t, s in grid) <= 2 * math.ceil(time_steps / steps)  # nothing is skipped


@pytest.mark.parametrize("time_steps", [1, 7, 1000])
def test_time_grid_of_all_steps_is_every_timestep(time_steps):
    assert time_grid(Diffusion(time_steps, "cosine"), time_steps) == [(t, t - 1) for t in reversed(range(time_steps))]


@pytest.mark.parametrize("time_steps", [10, 100, 1000])
def test_time_grid_is_of_the_whole_numbers_nearest_to_even_spacing(time_steps):
    """The k-th time is within 1/2 of T - 1 - k T / steps; multiplied by 2 · steps, that is in whole numbers."""
    for steps in {1, 2, 3, 7, time_steps // 3, time_steps - 1, time_steps}:
        grid = time_grid(Diffusion(time_steps, "cosine"), steps)
        assert {type(time) for pair in grid for time in pair} == {int}
        for k, (t, _) in enumerate(grid):
            assert abs(2 * steps * (t - time_steps + 1) + 2 * k * time_steps) <= steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_grid_starts_where_noise_alone_is_a_fair_start(schedule):
    diffusion = Diffusion(1000, schedule)
    for steps in range(1, 1001):
        start, _ = time_grid(diffusion, steps)[0]
        assert diffusion.alpha_bar[start] < 0.02  # of the variance of x_T = noise, at most this is amiss


# ---- noise by the image ----------------------------------------------------------------------------------


def test_image_noise_of_an_index_depends_on_no_other():
    whole = ImageNoise(7, range(6), (1, 8, 8))
    some = ImageNoise(7, [4, 1], (1, 8, 8))
    for _ in range(3):  # and so on along the stream
        a, b = whole(), some()
        assert torch.equal(b, a[[4, 1]])


def test_image_noise_differs_between_seeds_indices_and_draws():
    """Also where seed and index change places, or have the same sum: no two pairs share a stream."""
    drawn = []
    for seed in range(5):
        draw = ImageNoise(seed, range(5), (1, 4, 4))
        drawn += [*draw(), *draw()]
    pixels = torch.stack(drawn).flatten(1)
    assert len(pixels.unique(dim=0)) == 50
    correlation = pixels.double().corrcoef()
    # 1225 pairs of 16 pixels: of independent ones, the squared correlations are 1/15 on average, ± 0.0025 (1 SE)
    squares = correlation[torch.triu_indices(50, 50, offset=1).unbind()].square()
    assert abs(squares.mean().item() - 1 / 15) < 4.5 * 0.0025


def test_image_noise_is_standard_normal():
    z = ImageNoise(0, range(100), (1, 32, 32))().double().flatten()
    n = len(z)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # k: E[z^k] and Var[z^k] = E[z^2k] - E[z^k]²
    for k, (mean, variance) in moments.items():
        assert abs(z.pow(k).mean().item() - mean) < 4.5 * math.sqrt(variance / n)


def test_image_noise_neither_reads_nor_moves_the_global_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw = ImageNoise(0, range(2), (1, 4, 4))
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(ImageNoise(0, range(2), (1, 4, 4))(), first)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_does_not_move_the_global_random_state(name):
    before = torch.get_rng_state()
    diffusion, draw = Diffusion(20, "cosine"), ImageNoise(0, range(2), (1, 4, 4))
    last(SAMPLERS[name].run(wild, diffusion, draw(), draw, time_grid(diffusion, 20)))
    assert torch.equal(torch.get_rng_state(), before)


# ---- interpolation of noises -----------------------------------------------------------------------------


def angle(a: Tensor, b: Tensor) -> float:
    cosine = (a.double() * b.double()).sum() / (a.double().norm() * b.double().norm())
    return math.acos(cosine.clamp(-1, 1).item())


@pytest.fixture
def ends() -> Tensor:
    """Two noises on the sphere of radius √(pixels), near to which all Gaussian noise of that size lies."""
    z = noise(2, 1, 32, 32)
    return z / z.flatten(1).norm(dim=1).view(2, 1, 1, 1) * 32


@pytest.mark.parametrize("frames", [2, 3, 10])
def test_slerp_starts_and_ends_exactly_on_its_ends(ends, frames):
    path = slerp(*ends, torch.linspace(0, 1, frames))
    assert path.shape == (frames, 1, 32, 32)
    torch.testing.assert_close(path[[0, -1]], ends, rtol=1e-6, atol=1e-6)


def test_slerp_stays_on_the_sphere_that_a_line_would_leave(ends):
    """Two noises are nearly at right angles: the middle of their chord is at cos 45° = 0.71 of the radius.

    The cosine of 1024 pixels' noises is N(0, 1/1024), so that is 0.707 ± 0.011 (1 SE).
    """
    weights = torch.linspace(0, 1, 21)
    arc = slerp(*ends, weights)
    torch.testing.assert_close(arc.flatten(1).norm(dim=1), torch.full((21,), 32.0), rtol=1e-5, atol=0)
    line = torch.lerp(*ends, weights.view(-1, 1, 1, 1))
    torch.testing.assert_close(arc[[0, -1]], line[[0, -1]], rtol=1e-6, atol=1e-6)
    assert abs(line[10].norm().item() / 32 - math.sqrt(0.5)) < 4.5 * 0.011
    cosine = torch.nn.functional.cosine_similarity(arc[10].flatten(), line[10].flatten(), dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-5)  # the same direction, further out


def test_slerp_divides_the_angle_evenly(ends):
    path = slerp(*ends, torch.linspace(0, 1, 11))
    whole = angle(*ends)
    for k in range(11):
        assert angle(path[0], path[k]) == pytest.approx(k / 10 * whole, abs=1e-3)
        assert angle(path[k], path[-1]) == pytest.approx((1 - k / 10) * whole, abs=1e-3)


def test_slerp_stays_in_the_plane_of_its_ends(ends):
    """What is new between them is a mix of the two and nothing else: its part outside their plane is 0."""
    path = slerp(*ends, torch.linspace(0, 1, 5)).flatten(1).double()
    basis, _ = torch.linalg.qr(ends.flatten(1).double().T)  # (pixels, 2), orthonormal
    torch.testing.assert_close(path @ basis @ basis.T, path, rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [30, 60, 90, 120, 150])
def test_slerp_turns_by_that_share_of_the_angle_which_the_weight_says(degrees):
    """In a plane, from (1, 0) to (cos θ, sin θ), weight w leads to (cos wθ, sin wθ), be θ acute or obtuse."""
    theta, weights = math.radians(degrees), torch.linspace(0, 1, 5)
    a, b = (torch.tensor([math.cos(phi), math.sin(phi)]).view(1, 1, 2) for phi in (0.0, theta))
    expected = torch.stack([(weights * theta).cos(), (weights * theta).sin()], dim=1).view(5, 1, 1, 2)
    torch.testing.assert_close(slerp(a, b, weights), expected, rtol=0, atol=1e-5)
