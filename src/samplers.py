"""Samplers: reverse processes from noise x_T to an image x_0, each a generator that yields x_t after every step.

A sampler takes the network, the diffusion, the initial x_T (B,C,H,W), a function `draw()` that returns fresh noise of
that shape (unused if the sampler is deterministic), and the grid of its steps: pairs (t, s) as `time_grid` returns
them. Each step evaluates the network once, at t, and goes to s. The last tensor that it yields is the image, in
[-1, 1].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from src.diffusion import Diffusion, Network

Draw = Callable[[], Tensor]  # () → fresh N(0, I) noise shaped like x_T
Grid = Sequence[tuple[int, int]]  # (t, s) of each step


def time_grid(diffusion: Diffusion, steps: int, strength: float = 1.0, power: int = 1) -> Grid:
    """The (t, s) pairs of `steps` steps from t = T - 1 to the clean image s = -1.

    The k-th step from the end starts at t = T · (k / steps)^power - 1, rounded: with a power of 1, steps are evenly
    spaced, and a higher one shortens those near the image, but not below one timestep.

    `strength`, from 0 to 1, shortens the way: T becomes T · strength and the number of steps becomes steps · strength,
    at least one, both rounded. The power spaces these steps. If their first t is -1, the clean image, there are none.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}: choose 0 to 1")
    if not 1 <= steps <= diffusion.time_steps:
        raise ValueError(f"steps is {steps}, but must be from 1 to the model's {diffusion.time_steps} timesteps")
    start = round(diffusion.time_steps * strength) - 1
    count = min(max(1, round(steps * strength)), start + 1)
    remaining = torch.linspace(count, 0, count + 1, dtype=torch.float64)  # steps left, at each time
    times = ((start + 1) * remaining**power / max(count, 1) ** power).maximum(remaining) - 1
    return list(pairwise(times.round().int().tolist()))


@torch.inference_mode()
def ddpm(network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, grid: Grid) -> Iterator[Tensor]:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) with the posterior's variance, σ_t² = β̃_t, and clipped x_0.

    With fewer steps than T, each step samples q(x_s | x_t, x_0) for the next timestep s of the coarser grid.
    """
    x_t = x_T
    for t, s in _timesteps(grid):
        x0 = diffusion.denoise(network, x_t, t)
        x_t = diffusion.posterior_mean(x0, x_t, t, s)
        if s[0] >= 0:  # the last step has variance 0
            x_t = x_t + diffusion.posterior_variance(t, s).sqrt() * draw()
        yield x_t


@torch.inference_mode()
def ddim(
    network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, grid: Grid, eta: float = 0.0
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, eqs. 12 and 16): deterministic for eta = 0, equal to `ddpm` for eta = 1."""
    x_t = x_T
    for t, s in _timesteps(grid):
        x0 = diffusion.denoise(network, x_t, t)
        eps = diffusion.predict_eps(x_t, t, x0)  # recomputed, because x0 was clipped
        signal, _ = diffusion.signal_and_noise(s)
        sigma, direction = diffusion.ddim_noise(t, s, eta)
        x_t = signal * x0 + direction * eps  # eq. 12
        if eta > 0 and s[0] >= 0:
            x_t = x_t + sigma * draw()
        yield x_t


@torch.inference_mode()
def dpmpp_2m(network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, grid: Grid) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): DDIM with x_0 extrapolated to the middle of each step."""
    x_t, previous = x_T, None
    for t, s in _timesteps(grid):
        x0 = diffusion.denoise(network, x_t, t)
        h = diffusion.half_log_snr(s) - diffusion.half_log_snr(t)
        signal, noise = diffusion.signal_and_noise(s)
        _, noise_t = diffusion.signal_and_noise(t)
        D = _extrapolate(diffusion, x0, h, previous)
        x_t = noise / noise_t * x_t - signal * diffusion.per_image(torch.expm1(-h)) * D  # Algorithm 2, line 9
        previous = x0, h
        yield x_t


@torch.inference_mode()
def dpmpp_2m_sde(network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, grid: Grid) -> Iterator[Tensor]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): `ddpm` with x_0 extrapolated to the middle of each step."""
    x_t, previous = x_T, None
    for t, s in _timesteps(grid):
        x0 = diffusion.denoise(network, x_t, t)
        h = diffusion.half_log_snr(s) - diffusion.half_log_snr(t)
        D = _extrapolate(diffusion, x0, h, previous)
        x_t = diffusion.posterior_mean(D, x_t, t, s)
        if s[0] >= 0:
            x_t = x_t + diffusion.posterior_variance(t, s).sqrt() * draw()
        previous = x0, h
        yield x_t


@torch.inference_mode()
def consistency(network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, grid: Grid) -> Iterator[Tensor]:
    """Consistency sampling (Song et al. 2023, Algorithm 1) for a network trained by OBJECTIVE consistency.

    Each step estimates x_0 and adds fresh noise of the next level.
    """
    x_t = x_T
    for t, s in _timesteps(grid):
        x_t = diffusion.denoise(network, x_t, t)
        if s[0] >= 0:
            x_t = diffusion.q_sample(x_t, s, draw())
        yield x_t


def _extrapolate(diffusion: Diffusion, x0: Tensor, h: Tensor, previous: tuple[Tensor, Tensor] | None) -> Tensor:
    """D of Lu et al. 2022, Algorithm 2: x_0 + h / (2 h_previous) · (x_0 - x_0_previous), (B,C,H,W).

    h is the increase of λ over a step. With D, the sampler is of second order. `previous` is (x_0, h) of the step
    before. The first step has none, and the last one has h = ∞: both return x_0 unchanged.
    """
    if previous is None or h.isinf():
        return x0
    x0_previous, h_previous = previous
    return x0 + diffusion.per_image(h / (2 * h_previous)) * (x0 - x0_previous)


def _timesteps(grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of a grid as (1,) tensors: one timestep for the batch, so that it is embedded once."""
    for t, s in grid:
        yield torch.tensor([t]), torch.tensor([s])


@dataclass(frozen=True)
class Sampler:
    """A sampler, its default number of steps, their spacing, and whether it draws noise in each step."""

    run: Callable[..., Iterator[Tensor]]
    steps: int  # chosen by FID: docs/speed.md
    stochastic: bool
    power: int = 1  # of the spacing of its steps, see `time_grid`; chosen by FID, too: docs/recipe.md


# src/utils/settings.py reads this table from the source text: keep it a literal dictionary.
SAMPLERS = {
    "ddpm": Sampler(ddpm, steps=50, stochastic=True),
    "ddim": Sampler(ddim, steps=50, stochastic=False),
    "dpmpp_2m": Sampler(dpmpp_2m, steps=20, stochastic=False),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, steps=50, stochastic=True),
    "consistency": Sampler(consistency, steps=2, stochastic=True, power=3),
}
