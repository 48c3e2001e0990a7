"""Held-out images → bits per dimension, from the variational bound on -log p(x_0) (Ho et al. 2020, eq. 5).

    L = L_T + Σ_{t ≥ 1} L_{t-1} + L_0    (t counts from 0, as in `src.diffusion`, so that L_0 is the term of t = 0)

The model whose bound it is steps as the DDPM sampler with all T steps does: by the posterior of the predicted x_0,
which is clipped to [-1, 1], with the variance β̃. A dimension is a pixel as the network sees it, of the padding too:
only models of one image size can be compared.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from src.dataset import normalise  # the decoder's grey levels are the ones of that scale
from src.devices import float32_kernels  # a bound is no place for rounded factors
from src.diffusion import Diffusion, Network  # the bound is made of the process's coefficients


@torch.inference_mode()
def bits_per_dim(
    network: Network,
    diffusion: Diffusion,
    images: Tensor,
    seed: int,
    times_per_image: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[float, float]:
    """An unbiased estimate of the bound, and its standard error, in bits per dimension.

    Image i has its L_T in closed form and its L_0 from one noise. Of the other terms it has K - 1, where K is
    `times_per_image`, each with a fresh noise, at the times t_ik with the probabilities p_t of `choose_times`:

        L(i) ≈ L_T(i) + L_0(i) + 1/(K-1) Σ_k L_{t_ik - 1}(i) / p_{t_ik}

    K = T takes every term once instead, so that nothing but the noise is random.

    The standard error is that of the mean over all images of which these are a sample: it holds the differences
    between images as well as times and noises. A single image has none (NaN).

    Args:
        network: is given (x_t, t) as by a sampler, t being (B,).
        images: (N,C,H,W) uint8, on the CPU, as all is but what the network is given.
        seed: of times and noises; the global random state is neither read nor changed.
        times_per_image: K, network evaluations an image, from 2 to T.
        batch_size: images a network evaluation; the estimate does not depend on it (but for float rounding).
        on_batch: is told after each network evaluation how many images that was; they add up to N·K.
    """
    if not 2 <= times_per_image <= diffusion.time_steps:
        raise ValueError(f"times_per_image is {times_per_image}: choose 2 to {diffusion.time_steps}, all timesteps")
    n = len(images)
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(n, generator=generator)]  # neighbours in time, compared below, are to be any two
    times, factors = choose_times(diffusion, n, times_per_image, generator)
    nats = prior_kl(diffusion, normalise(images))
    for k in range(times_per_image):
        for rows in torch.arange(n).split(batch_size):
            eps = torch.randn(images[rows].shape, generator=generator)
            with float32_kernels(diffusion.device, fast=False):
                term = bound_term(network, diffusion, images[rows], times[rows, k], eps)
            nats[rows] += factors[rows, k] * term
            if on_batch is not None:
                on_batch(len(rows))
    bits = nats / (math.log(2) * images[0].numel())
    # The variance of one image by those of successive differences, as for any systematic sample (Wolter 2007, ch. 8):
    # neighbours have nearly the same times, so what the strata take out of the mean is not in it either.
    return bits.mean().item(), (bits.diff().square().mean() / 2 / n).sqrt().item()


def choose_times(
    diffusion: Diffusion, n: int, times_per_image: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Timesteps for n images, (N,K) int64, and the factors (N,K) float64 that make a sum of terms unbiased.

    The first time is 0, with the factor 1: that term is the largest. The others have p_t ∝ log(σ_t / σ_{t-1}), with
    σ² = 1 - α̅: in small steps, L_{t-1} for white noise as data. Real images have less at every t, but in
    proportions so similar that the summands L_{t-1} / p_t differ by a factor of ten, the terms themselves by 10⁴.

    The unit interval, cut in the proportions p, is sampled at N (K-1) equal distances: image i has every N-th point,
    from the i-th. So each image covers all noise levels, and all images together cover them finely and evenly.
    """
    if times_per_image == diffusion.time_steps:
        times = torch.arange(diffusion.time_steps).expand(n, -1)
        return times, torch.ones(times.shape, dtype=torch.float64)
    p = torch.log1p(-diffusion.alpha_bar).diff()  # 2 log(σ_t / σ_{t-1}) for t = 1 ... T-1
    p = p / p.sum()
    strata = times_per_image - 1
    phase = (torch.arange(n) + torch.rand(1, generator=generator, dtype=torch.float64)) / n  # (N,), in [0, 1)
    points = (torch.arange(strata) + phase[:, None]) / strata  # (N, K-1)
    drawn = torch.searchsorted(p.cumsum(0), points, right=True).clamp(max=len(p) - 1)  # rounding may pass the end
    times = torch.cat([torch.zeros(n, 1, dtype=torch.long), drawn + 1], dim=1)
    return times, torch.cat([torch.ones(n, 1, dtype=torch.float64), 1 / (strata * p[drawn])], dim=1)


def bound_term(network: Network, diffusion: Diffusion, images: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """L_{t-1} or L_0 of images (B,C,H,W) uint8 with their noises eps, (B,) float64 in nats; t (B,), all or none 0."""
    x0 = normalise(images)
    x_t = diffusion.q_sample(x0.to(diffusion.device), t, eps.to(diffusion.device))
    predicted = diffusion.denoise(network, x_t, t).cpu()  # from here on float64
    if t[0] > 0:
        return posterior_kl(diffusion, x0, predicted, t)
    # The last posterior has the predicted x_0 as mean and the variance 0: it is given that of the step before, as in
    # the code of Nichol & Dhariwal (2021).
    return -decoder_log_mass(images, predicted, diffusion.posterior_variance(t + 1, t).cpu()).sum((1, 2, 3))


def prior_kl(diffusion: Diffusion, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of x0 (B,C,H,W), (B,) float64, in nats."""
    alpha_bar = diffusion.alpha_bar[-1]  # float64: the cosine schedule's is 2e-9, and float32 would make 1 - α̅ = 1
    return (alpha_bar * x0.double() ** 2 - alpha_bar - torch.log1p(-alpha_bar)).sum((1, 2, 3)) / 2


def posterior_kl(diffusion: Diffusion, x0: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) ‖ q(x_{t-1} | x_t, predicted)), (B,) float64, in nats; t (B,), at least 1.

    The variances are equal. What is left of it, the squared distance of the means over 2 β̃, is that of the x_0 times
    (SNR(t-1) - SNR(t)) / 2, with SNR = α̅ / (1 - α̅) (Kingma et al. 2021, §4).
    """
    snr_s, snr_t = ((2 * diffusion.half_log_snr(time)).exp() for time in (t - 1, t))
    return ((snr_s - snr_t)[:, None, None, None] / 2 * (x0.double() - predicted.double()) ** 2).sum((1, 2, 3))


def decoder_log_mass(images: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The log-probability, in nats, of each pixel of images, uint8, under the decoder: float64 of the same shape.

    A grey level has the mass of N(mean, variance) within half a level of it; 0 and 255 also have the tails beyond
    them (Ho et al. 2020, eq. 13). It stays finite and exact however improbable the pixel is.
    """
    x0, half = images.double() / 127.5 - 1, 1 / 255
    deviation = variance.double().sqrt()
    low = ((x0 - half - mean) / deviation).masked_fill(images == 0, -math.inf)
    high = ((x0 + half - mean) / deviation).masked_fill(images == 255, math.inf)
    # Φ(high) - Φ(low) = Φ(-low) - Φ(-high): on the side of the lower tail, no two numbers near 1 are subtracted.
    low, high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)
    below, up_to = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return up_to + torch.log1p(-(below - up_to).exp())
