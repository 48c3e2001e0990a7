"""Bits per dimension of held-out images, from the variational bound on -log p(x_0) (Ho et al. 2020, eq. 5).

    L = L_T + Σ_{t ≥ 1} L_t + L_0    (t counts from 0, as in `src.diffusion`: L_t is the paper's L_{t-1} for its t)

The model is the DDPM sampler with all T steps: each step samples the posterior of the predicted x_0, which is clipped
to [-1, 1], with the variance β̃. All pixels of the network's input count as dimensions, those of the padding included,
so only models of one image size can be compared.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from src.data.datasets import normalise
from src.data.images import Images
from src.diffusion import Diffusion, Network
from src.utils.devices import float32_kernels


@torch.inference_mode()
def bits_per_dim(
    network: Callable[..., Tensor],
    diffusion: Diffusion,
    images: Images,
    seed: int,
    times_per_image: int,
    batch_size: int,
    on_batch: Callable[[int], object] | None = None,
    labels: Tensor | None = None,
    class_counts: Sequence[float] = (),
) -> tuple[float, float]:
    """Estimate the bound without bias, in bits per dimension, and the standard error of the estimate.

    For each image i, L_T is computed in closed form and L_0 is estimated with one noise. K - 1 of the other terms,
    where K is `times_per_image`, are estimated with one noise each. Their timesteps t_ik are drawn by `choose_times`
    with the probabilities p_t:

        L(i) ≈ L_T(i) + L_0(i) + 1/(K-1) Σ_k L_{t_ik}(i) / p_{t_ik}

    With K = T, every term is estimated once, and only the noise is random.

    The standard error refers to the mean over the population from which the images are a sample. It includes the
    variation between images, timesteps and noises. For a single image it is NaN.

    With the classes y of the images, the bound is that of p(x_0, y), which is at most p(x_0) = Σ_y p(y) p(x_0 | y):
    -log p(y) is added to the bound of p(x_0 | y).

    Args:
        network: maps (x_t, t) to a prediction, t (B,), or with classes (x_t, t, y).
        diffusion: the process for which the network was trained.
        images: (N,C,H,W) uint8, on the CPU. Only the network's inputs are copied to its device.
        seed: of timesteps and noises; the global random state is neither read nor changed.
        times_per_image: K, network evaluations per image, from 2 to T.
        batch_size: images per network evaluation; the estimate does not depend on it, except for rounding.
        on_batch: called after each network evaluation with the number of images in it; the sum of them is N·K.
        labels: the classes y of the images, (N,), or None for a bound without classes.
        class_counts: relative frequencies p(y) of the classes; ignored without `labels`.

    Raises:
        ValueError: `times_per_image` is out of range.
    """
    if not 2 <= times_per_image <= diffusion.time_steps:
        raise ValueError(f"times_per_image is {times_per_image}: choose 2 to {diffusion.time_steps}, all timesteps")
    n = len(images)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)  # the standard error assumes a random order
    images, y = images[order], None if labels is None else labels[order]  # (N, C, H, W), (N,)
    times, factors = choose_times(diffusion, n, times_per_image, generator)
    nats = prior_kl(diffusion, normalise(images))
    if y is not None:
        p_y = torch.tensor(class_counts, dtype=torch.float64)
        nats -= (p_y / p_y.sum()).log()[y]
    for k in range(times_per_image):
        for rows in torch.arange(n).split(batch_size):
            eps = torch.randn(images[rows].shape, generator=generator)
            with float32_kernels(diffusion.device, fast=False):
                predict = network if y is None else partial(network, y=y[rows].to(diffusion.device))
                term = bound_term(predict, diffusion, images[rows], times[rows, k], eps)
            nats[rows] += factors[rows, k] * term
            if on_batch is not None:
                on_batch(len(rows))
    bits = nats / (math.log(2) * images[0].numel())
    # Variance per image from successive differences, as for systematic samples (Wolter 2007, ch. 8). Successive images
    # have nearly the same timesteps, so the differences leave out the variance that stratification removes.
    return bits.mean().item(), (bits.diff().square().mean() / 2 / n).sqrt().item()


def choose_times(
    diffusion: Diffusion, n: int, times_per_image: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw timesteps for n images, (N,K) int64, and the factors (N,K) float64 that make the sum of terms unbiased.

    The first timestep of each image is 0, the largest term, with factor 1. The others are drawn with probabilities
    p_t ∝ log(σ_t / σ_{t-1}), where σ² = 1 - α̅. For small steps and white noise as data, p_t is proportional to
    L_t. For real images it is close enough: the terms L_t differ by a factor of 10⁴, the quotients
    L_t / p_t by only 10.

    Sampling is systematic. N (K-1) equidistant points with a random offset are mapped through the inverse cumulative
    distribution of p; image i gets every N-th of them, from the i-th. So each image covers all noise levels, and all
    images together cover them finely and evenly. With K = T, each image gets every timestep once, with factor 1.
    """
    if times_per_image == diffusion.time_steps:
        times = torch.arange(diffusion.time_steps).expand(n, -1)
        return times, torch.ones(times.shape, dtype=torch.float64)
    p = torch.log1p(-diffusion.alpha_bar).diff()  # 2 log(σ_t / σ_{t-1}) for t = 1 ... T-1
    p = p / p.sum()
    strata = times_per_image - 1
    phase = (torch.arange(n) + torch.rand(1, generator=generator, dtype=torch.float64)) / n  # (N,), in [0, 1)
    points = (torch.arange(strata) + phase[:, None]) / strata  # (N, K-1)
    drawn = torch.searchsorted(p.cumsum(0), points, right=True).clamp(max=len(p) - 1)  # rounding may exceed it
    times = torch.cat([torch.zeros(n, 1, dtype=torch.long), drawn + 1], dim=1)
    return times, torch.cat([torch.ones(n, 1, dtype=torch.float64), 1 / (strata * p[drawn])], dim=1)


def bound_term(network: Network, diffusion: Diffusion, images: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """L_t of the bound, in nats, (B,) float64.

    Args:
        network, diffusion: as for `bits_per_dim`.
        images: (B,C,H,W) uint8.
        t: (B,), either all 0 or none.
        eps: the noise in x_t, (B,C,H,W).
    """
    x0 = normalise(images)
    x_t = diffusion.q_sample(x0.to(diffusion.device), t, eps.to(diffusion.device))
    predicted = diffusion.denoise(network, x_t, t).cpu()  # the rest is computed in float64
    if t[0] > 0:
        return posterior_kl(diffusion, x0, predicted, t)
    # The posterior of the last step has the predicted x_0 as mean and variance 0. As in the code of Nichol & Dhariwal
    # (2021), the decoder uses the variance of the step before it.
    return -decoder_log_mass(images, predicted, diffusion.posterior_variance(t + 1, t).cpu()).sum((1, 2, 3))


def prior_kl(diffusion: Diffusion, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of x0 (B,C,H,W), (B,) float64, in nats."""
    alpha_bar = diffusion.alpha_bar[-1]  # float64: in float32, 1 - α̅ of the cosine schedule (2e-9) would be 1
    return (alpha_bar * x0.double() ** 2 - alpha_bar - torch.log1p(-alpha_bar)).sum((1, 2, 3)) / 2


def posterior_kl(diffusion: Diffusion, x0: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) ‖ q(x_{t-1} | x_t, predicted)), (B,) float64, in nats; t (B,), at least 1.

    Both have the variance β̃, so the divergence is the squared distance of the means over 2 β̃. This equals the
    squared distance of x0 and predicted times (SNR(t-1) - SNR(t)) / 2, with SNR = α̅ / (1 - α̅) (Kingma et al. 2021,
    §4).
    """
    snr_s, snr_t = ((2 * diffusion.half_log_snr(time)).exp() for time in (t - 1, t))
    return ((snr_s - snr_t)[:, None, None, None] / 2 * (x0.double() - predicted.double()) ** 2).sum((1, 2, 3))


def decoder_log_mass(images: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The log-probability, in nats, of each pixel under the decoder (Ho et al. 2020, eq. 13).

    The probability of a grey level is the mass of N(mean, variance) within half a level of it; 0 and 255 also get the
    tails. The result is finite and exact even for very improbable pixels.

    Args:
        images: uint8.
        mean, variance: of the decoder, on the scale [-1, 1] of x_0, broadcast to the shape of the images.

    Returns:
        float64 of the same shape.
    """
    x0, half = images.double() / 127.5 - 1, 1 / 255
    deviation = variance.double().sqrt()
    low = ((x0 - half - mean) / deviation).masked_fill(images == 0, -math.inf)
    high = ((x0 + half - mean) / deviation).masked_fill(images == 255, math.inf)
    # Φ(high) - Φ(low) = Φ(-low) - Φ(-high). In the lower tail the difference is not one of two numbers near 1.
    low, high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)
    below, up_to = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return up_to + torch.log1p(-(below - up_to).exp())
