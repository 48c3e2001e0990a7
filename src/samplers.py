"""Reverse processes: from noise x_T to an image x_0, each a generator that yields every x_t on its way.

A sampler takes the network, the diffusion, the start x_T (B,C,H,W), `draw()` for fresh noise of that
shape, and the number of steps. The last tensor that it yields is the image, in [-1, 1].
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from src.diffusion import Diffusion, Network  # a reverse process is made of the forward process's formulae

Draw = Callable[[], Tensor]  # () → fresh N(0, I) noise shaped like x_T


def time_grid(diffusion: Diffusion, steps: int) -> list[tuple[int, int]]:
    """The (t, s) pairs of `steps` jumps from t = T-1 to the clean image s = -1, evenly spaced."""
    if not 1 <= steps <= diffusion.time_steps:
        raise ValueError(f"steps is {steps}: choose 1 to {diffusion.time_steps}, the diffusion's own timesteps")
    times = torch.linspace(diffusion.time_steps - 1, -1, steps + 1, dtype=torch.float64).round().int().tolist()
    return list(pairwise(times))


@torch.inference_mode()
def ddpm(network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, steps: int) -> Iterator[Tensor]:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) with the posterior's variance, σ_t² = β̃_t.

    With fewer steps than the diffusion has, it samples the posteriors of the coarser grid.
    """
    x_t = x_T
    for t, s in _jumps(diffusion, steps):
        x0 = diffusion.denoise(network, x_t, t)
        x_t = diffusion.posterior_mean(x0, x_t, t, s)
        if s[0] >= 0:  # no noise after the last step, whose variance is 0
            x_t = x_t + diffusion.posterior_variance(t, s).sqrt() * draw()
        yield x_t


@torch.inference_mode()
def ddim(
    network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, steps: int, eta: float = 0.0
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, eqs. 12 and 16): eta = 0 is deterministic, eta = 1 is DDPM on the same grid."""
    x_t = x_T
    for t, s in _jumps(diffusion, steps):
        x0 = diffusion.denoise(network, x_t, t)
        eps = diffusion.predict_eps(x_t, t, x0)  # not the network's own: clipping moved x0, and eps must follow
        signal, _ = diffusion.signal_and_noise(s)
        sigma, direction = diffusion.ddim_noise(t, s, eta)
        x_t = signal * x0 + direction * eps  # eq. 12
        if eta > 0 and s[0] >= 0:
            x_t = x_t + sigma * draw()
        yield x_t


@torch.inference_mode()
def dpmpp_2m(network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, steps: int) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): DDIM, but with x_0 extrapolated to the middle of the jump."""
    x_t, before = x_T, None
    for t, s in _jumps(diffusion, steps):
        x0 = diffusion.denoise(network, x_t, t)
        h = diffusion.half_log_snr(s) - diffusion.half_log_snr(t)
        signal, noise = diffusion.signal_and_noise(s)
        _, noise_before = diffusion.signal_and_noise(t)
        x0_ahead = _extrapolate(diffusion, x0, h, before)
        x_t = noise / noise_before * x_t - signal * diffusion.per_image(torch.expm1(-h)) * x0_ahead
        before = x0, h
        yield x_t


@torch.inference_mode()
def dpmpp_2m_sde(network: Network, diffusion: Diffusion, x_T: Tensor, draw: Draw, steps: int) -> Iterator[Tensor]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): `ddpm`, but with x_0 extrapolated to the middle of the jump."""
    x_t, before = x_T, None
    for t, s in _jumps(diffusion, steps):
        x0 = diffusion.denoise(network, x_t, t)
        h = diffusion.half_log_snr(s) - diffusion.half_log_snr(t)
        x_t = diffusion.posterior_mean(_extrapolate(diffusion, x0, h, before), x_t, t, s)
        if s[0] >= 0:
            x_t = x_t + diffusion.posterior_variance(t, s).sqrt() * draw()
        before = x0, h
        yield x_t


def _extrapolate(diffusion: Diffusion, x0: Tensor, h: Tensor, before: tuple[Tensor, Tensor] | None) -> Tensor:
    """The D of Lu et al. 2022, Algorithm 2: x_0 on the line through this step's and the last one's, h / 2 further on.

    That makes a step second-order in h, the jump of λ. The first step has no line yet, and the one to the clean image
    has h = ∞: both take x_0 as it is.
    """
    if before is None or h.isinf():
        return x0
    x0_before, h_before = before
    return x0 + diffusion.per_image(h / (2 * h_before)) * (x0 - x0_before)


def _jumps(diffusion: Diffusion, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each (t, s) of the grid as two (1,) tensors on the CPU: one time for all images, its embedding computed once."""
    for t, s in time_grid(diffusion, steps):
        yield torch.tensor([t]), torch.tensor([s])


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": dpmpp_2m_sde}
