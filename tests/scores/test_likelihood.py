"""`src/scores/likelihood.py` against closed forms, torch.distributions and the entropy of data whose law is known.

The exact predictor of such data is known, too, and the bound then follows from variances alone. Statistical bounds
are 4.5 standard errors, as in test_diffusion.py.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from src.data.datasets import normalise
from src.diffusion import Diffusion, Network
from src.scores import likelihood
from src.scores.likelihood import bits_per_dim, choose_times, decoder_log_mass, posterior_kl, prior_kl

SCHEDULES = ["linear", "cosine"]
PREDICTIONS = ["noise", "v"]
SIGMAS = 4.5
S = 0.2  # the standard deviation of the Gaussian data; clipping at ±1 is 5 S away
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # the data's values, on the scale of x_0


def at(t: int) -> Tensor:
    return torch.tensor([t])


def masses(s: float) -> Tensor:
    """Of N(0, s²) rounded to the 256 levels, (256,) float64."""
    edges = torch.cat([LEVELS - 1 / 255, LEVELS[-1:] + 1 / 255])
    cdf = torch.special.ndtr(edges / s)
    cdf[0], cdf[-1] = 0, 1
    return cdf.diff()


def entropy_bits(p: Tensor) -> float:
    return -torch.special.xlogy(p, p).sum().item() / math.log(2)


def gaussian_images(n: int, side: int = 8, s: float = S, seed: int = 0) -> Tensor:
    """Pixels N(0, s²), rounded to grey levels, (n, 1, side, side) uint8.

    They are the quantiles, shuffled: so their own entropy is that of the law, without a sample's fluctuation.
    """
    generator, count = torch.Generator().manual_seed(seed), n * side * side
    quantiles = s * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    pixels = ((quantiles + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels[torch.randperm(count, generator=generator)].view(n, 1, side, side)


def network_of(diffusion: Diffusion, estimate: Callable[[Tensor, Tensor], Tensor]) -> Network:
    """The network whose output stands for the x_0 that `estimate` makes of x_t and α̅_t, both float64."""

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alpha_bar[t][:, None, None, None]
        x0 = estimate(x_t.double(), a)
        of_x_t = a.sqrt() if diffusion.prediction == "v" else 1.0
        of_x0 = 1.0 if diffusion.prediction == "v" else a.sqrt()
        return ((of_x_t * x_t - of_x0 * x0) / (1 - a).sqrt()).float()

    return network


def linear(s: float = S) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] for x_0 ~ N(0, s²): the covariance √α̅ s² over the variance of x_t."""
    return lambda x_t, a: a.sqrt() * s**2 / (a * s**2 + 1 - a) * x_t


# ---- the terms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_kl_of_posteriors_equals_torch_distributions(schedule, t):
    diffusion, generator = Diffusion(1000, schedule), torch.Generator().manual_seed(0)
    x0, predicted, x_t = (torch.rand(3, 1, 4, 4, generator=generator) * 2 - 1 for _ in range(3))
    deviation = diffusion.posterior_variance(at(t), at(t - 1)).double().sqrt()
    # The means in float32 would hide their small difference at t = 999. It is that of the x_0 times the factor of x_0
    # in the mean, and float32 knows this factor, as it does the variance, to half an EPS32.
    of_x0, of_x_t = (
        diffusion.posterior_mean(*(torch.full((1, 1, 1, 1), v) for v in ends), at(t), at(t - 1)).double()
        for ends in ((1.0, 0.0), (0.0, 1.0))
    )
    q, p = (Normal(of_x0 * x.double() + of_x_t * x_t.double(), deviation) for x in (x0, predicted))
    expected = kl_divergence(q, p).sum((1, 2, 3))
    found = posterior_kl(diffusion, x0, predicted, at(t))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=3 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kl_of_the_prior_equals_torch_distributions(schedule):
    for diffusion in (Diffusion(1000, schedule), Diffusion(3, schedule)):
        a, x0 = diffusion.alpha_bar[-1], torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
        q = Normal(a.sqrt() * x0.double(), (1 - a).sqrt())
        expected = kl_divergence(q, Normal(torch.zeros_like(a), torch.ones_like(a))).sum((1, 2, 3))
        torch.testing.assert_close(prior_kl(diffusion, x0), expected, rtol=1e-9, atol=1e-14)
        assert (prior_kl(diffusion, x0) > 0).all()


@pytest.mark.parametrize("mean", [0.0, 0.3, -1.0, 1.0, 1 / 255])
@pytest.mark.parametrize("deviation", [1e-3, 0.005, 0.3, 5.0])
def test_the_decoders_masses_are_those_of_a_gaussian_and_sum_to_one(mean, deviation):
    levels, variance = torch.arange(256, dtype=torch.uint8), torch.tensor(deviation**2, dtype=torch.float64)
    found = decoder_log_mass(levels, torch.tensor(mean), variance)
    assert found.dtype == torch.float64
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    edges = Normal(torch.tensor(mean).double(), variance.sqrt()).cdf((LEVELS[1:] + LEVELS[:-1]) / 2)
    expected = torch.cat([edges[:1], edges.diff(), 1 - edges[-1:]])
    torch.testing.assert_close(found.exp(), expected, rtol=0, atol=1e-12)


def test_the_decoder_stays_exact_where_the_probability_is_no_longer_a_number():
    """At z = 400 standard deviations the mass is 10^-35000: near the edge that is closer, as log φ(z) - log z."""
    for image, mean in ((0, 1.0), (200, -1.0), (255, -1.0), (30, 1.0)):
        found = decoder_log_mass(torch.tensor([image], dtype=torch.uint8), torch.tensor(mean), torch.tensor(2e-5))
        z = (abs(LEVELS[image].item() - mean) - 1 / 255) / math.sqrt(2e-5)
        assert found.item() == pytest.approx(-(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)), rel=1e-5)


# ---- the bound on data whose law is known -------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_knows_the_only_image_pays_for_the_ends_alone(prediction):
    diffusion = Diffusion(50, "linear", 1e-4, 1e-3, prediction)  # a schedule that stops early, at α̅ = 0.57
    image = torch.tensor([0, 255, 100, 101, 3, 7, 0, 200] * 8, dtype=torch.uint8).view(1, 1, 8, 8)
    images, x0 = image.expand(6, 1, 8, 8), normalise(image)
    found, error = bits_per_dim(network_of(diffusion, lambda x_t, a: x0.double()), diffusion, images, 0, 50, 4)
    z = 1 / 255 / diffusion.posterior_variance(at(1), at(0)).sqrt().item()  # from a level's middle to its edge
    inside = math.log2(math.erf(z / math.sqrt(2)))
    ends = math.log2((1 + math.erf(z / math.sqrt(2))) / 2)
    prior = prior_kl(diffusion, x0).item() / 64 / math.log(2)
    assert prior > 0.1
    assert found == pytest.approx(prior - (5 * inside + 3 * ends) / 8, rel=1e-5)
    assert error < 1e-6


def expected_bits(diffusion: Diffusion, s: float = S, decoder_variance: float | None = None) -> float:
    """The bound, by theory, of the linear predictor g x_t on rounded Gaussian data.

    The error of g x_t has the variance (1 - g √α̅)² Var x_0 + g² (1 - α̅) whatever the law of x_0. The decoder's
    expectation is the sum over x_0's levels of an integral over eps, which the trapezium rule gives exactly.
    """
    p, a = masses(s), diffusion.alpha_bar
    variance, snr = (p * LEVELS**2).sum(), a / (1 - a)
    g = a.sqrt() * s**2 / (a * s**2 + 1 - a)
    squared_error = (1 - g * a.sqrt()) ** 2 * variance + g**2 * (1 - a)
    nats = ((snr[:-1] - snr[1:]) / 2 * squared_error[1:]).sum()
    nats += (a[-1] * variance - a[-1] - torch.log1p(-a[-1])) / 2
    eps = torch.linspace(-8, 8, 161, dtype=torch.float64)
    predicted = (g[0] * (a[0].sqrt() * LEVELS[:, None] + (1 - a[0]).sqrt() * eps)).clamp(-1, 1)  # (256, 161)
    decoder = Normal(predicted, (decoder_variance or diffusion.posterior_variance(at(1), at(0)).item()) ** 0.5)
    upper, lower = decoder.cdf(LEVELS[:, None] + 1 / 255), decoder.cdf(LEVELS[:, None] - 1 / 255)
    mass = torch.where(LEVELS[:, None] == 1, 1.0, upper) - torch.where(LEVELS[:, None] == -1, 0.0, lower)
    weights = torch.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi) * 0.1
    nats -= (p[:, None] * weights * mass.clamp(min=1e-300).log()).sum()
    return nats.item() / math.log(2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_on_gaussian_data_the_bound_is_what_variances_say(schedule, prediction):
    diffusion, images = Diffusion(1000, schedule, prediction=prediction), gaussian_images(1024)
    found, error = bits_per_dim(network_of(diffusion, linear()), diffusion, images, 0, 20, 1024)
    expected = expected_bits(diffusion)
    assert abs(found - expected) < SIGMAS * error
    assert error < 0.02
    assert expected > entropy_bits(masses(S))
    # Negative control: with β_0 as the decoder's variance, the other choice of eq. 13's authors, it is another bound.
    assert abs(expected_bits(diffusion, decoder_variance=diffusion.betas[0].item()) - found) > SIGMAS * error


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_worse_network_has_a_higher_bound(prediction):
    diffusion, images = Diffusion(100, "cosine", prediction=prediction), gaussian_images(16)

    def bits(s: float) -> float:
        return bits_per_dim(network_of(diffusion, linear(s)), diffusion, images, 0, 100, 16)[0]

    assert bits(0.5 * S) > bits(0.8 * S) > bits(S) < bits(1.25 * S) < bits(2 * S)


def log_spaced(time_steps: int) -> Diffusion:
    """Equal steps of log SNR, down from where neighbouring grey levels cannot be mistaken to where nothing is seen.

    The usual schedules start with steps that double the noise, at which no bound with the variance β̃ is tight. Here
    the first variance is so small that the decoder is sure, and every step is as small as the others.
    """
    diffusion = Diffusion(time_steps, "cosine", prediction="v")
    diffusion.alpha_bar = torch.linspace(math.log(2.5e6), math.log(1e-4), time_steps, dtype=torch.float64).sigmoid()
    return diffusion


def grey(s: float, first: int, last: int) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] for the rounded Gaussian: the grey levels first ... last, weighted with their probabilities."""
    levels, logits = LEVELS[first : last + 1], masses(s)[first : last + 1].log()

    def estimate(x_t: Tensor, a: Tensor) -> Tensor:
        # log N(x_t; √α̅ x_0, 1 - α̅) without the part that is the same for all x_0
        slope, curve = a.sqrt() / (1 - a) * x_t, a / (1 - a) / 2
        score = logits + slope[..., None] * levels - curve[..., None] * levels**2
        return score.sub(score.amax(-1, keepdim=True)).float().softmax(-1).double() @ levels

    return estimate


def test_with_the_exact_predictor_the_bound_comes_down_on_the_entropy_as_the_steps_shrink():
    """For a decreasing mmse the bound is an upper Riemann sum: what it has too much is proportional to the step."""
    s, gaps = 0.01, []
    for time_steps in (100, 1000):
        diffusion = log_spaced(time_steps)
        network = network_of(diffusion, grey(s, 120, 135))
        found, _ = bits_per_dim(network, diffusion, gaussian_images(16, 16, s), 0, time_steps, 16)
        gaps.append(found - entropy_bits(masses(s)))
    assert 0 < gaps[1] < 0.05  # of 2.43 bits; the noises move it by 0.003
    assert 7 < gaps[0] / gaps[1] < 14


@pytest.mark.parametrize(("wrong", "of"), [("posterior_kl", 0.8), ("posterior_kl", 1.25), ("variance", 10**5)])
def test_a_wrong_variance_leads_away_from_the_entropy(wrong, of, monkeypatch):
    """The negative control of the last test. Dividing by a larger variance alone even passes below the entropy."""
    s, diffusion = 0.01, log_spaced(1000)

    def gap() -> float:
        network, images = network_of(diffusion, grey(s, 120, 135)), gaussian_images(16, 16, s)
        return bits_per_dim(network, diffusion, images, 0, 100, 16)[0] - entropy_bits(masses(s))

    assert abs(gap()) < 0.1
    right = posterior_kl if wrong == "posterior_kl" else diffusion.posterior_variance
    place = (likelihood, wrong) if wrong == "posterior_kl" else (diffusion, "posterior_variance")
    monkeypatch.setattr(*place, lambda *arguments: of * right(*arguments))
    assert gap() < -0.3 if of < 1 else gap() > 0.3


# ---- the estimate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("n", "k"), [(500, 5), (40, 2), (7, 60)])
def test_times_cover_the_noise_levels_evenly_and_their_factors_undo_the_choice(schedule, n, k):
    diffusion = Diffusion(100, schedule)
    times, factors = choose_times(diffusion, n, k, torch.Generator().manual_seed(0))
    assert times.shape == factors.shape == (n, k)
    assert (times[:, 0] == 0).all() and (factors[:, 0] == 1).all()
    assert times[:, 1:].min() >= 1 and times.max() <= 99
    sigma = (1 - diffusion.alpha_bar).sqrt()
    p = (sigma[1:] / sigma[:-1]).log() / (sigma[-1] / sigma[0]).log()
    counts = torch.bincount(times[:, 1:].flatten(), minlength=100)[1:]
    assert ((counts - n * (k - 1) * p).abs() <= 1 + 1e-9).all()
    torch.testing.assert_close(factors[:, 1:], 1 / (p[times[:, 1:] - 1] * (k - 1)), rtol=1e-9, atol=0)


def test_every_time_once_has_no_factors():
    times, factors = choose_times(Diffusion(20, "cosine"), 3, 20, torch.Generator())
    assert torch.equal(times, torch.arange(20).expand(3, 20))
    assert (factors == 1).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_point_that_is_rounded_up_to_the_interval_s_end_is_of_the_last_time(schedule, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, **__: torch.full((1,), 1 - 2**-53, dtype=dtype))
    for time_steps in (6, 10, 50, 100, 1000):
        times, factors = choose_times(Diffusion(time_steps, schedule), 1, 5, torch.Generator())
        assert times[0, -1] == time_steps - 1 and factors.isfinite().all()


def test_the_network_is_evaluated_without_gradients():
    weight, enabled = torch.ones(1, requires_grad=True), []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return weight * x_t

    bits_per_dim(network, Diffusion(10, "cosine"), contrasty(2, 0), 0, 2, 2)
    assert enabled == [False, False]


def contrasty(n: int, seed: int) -> Tensor:
    """Images that differ in how hard they are: each Gaussian with a contrast of its own."""
    generator = torch.Generator().manual_seed(seed)
    contrast = 0.05 + 0.2 * torch.rand(n, 1, 1, 1, generator=generator)
    x = contrast * torch.randn(n, 1, 4, 4, generator=generator)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("k", [2, 5])
def test_drawn_times_agree_with_all_times_and_the_standard_error_is_honest(k):
    """Fresh images each time, as the standard error speaks of them; 150 of them know a deviation to 1 / √300 = 6%."""
    diffusion = Diffusion(100, "cosine", prediction="v")
    network, runs = network_of(diffusion, linear(0.15)), 150
    found = torch.tensor([bits_per_dim(network, diffusion, contrasty(40, i), i, k, 40) for i in range(runs)])
    means, errors = found.double().T
    exact, exact_error = bits_per_dim(network, diffusion, contrasty(2000, 1000), 0, 100, 2000)
    assert abs(means.mean() - exact) < SIGMAS * math.hypot(means.std() / math.sqrt(runs), exact_error)
    ratio = errors.square().mean().sqrt() / means.std()
    assert 0.8 < ratio < 1.25


def test_the_same_images_are_estimated_alike_with_few_times_and_with_all():
    diffusion, images = Diffusion(1000, "cosine", prediction="v"), contrasty(100, 0)
    network = network_of(diffusion, linear(0.15))
    exact, _ = bits_per_dim(network, diffusion, images, 0, 1000, 100)
    for seed in range(5):
        few, error = bits_per_dim(network, diffusion, images, seed, 4, 100)
        assert abs(few - exact) < 4 * error


def test_the_standard_error_does_not_shrink_when_the_images_come_sorted():
    diffusion, images = Diffusion(100, "cosine", prediction="v"), contrasty(400, 0)
    by_contrast = images[normalise(images).std((1, 2, 3)).argsort()]
    network = network_of(diffusion, linear(0.15))
    mixed, in_order = (bits_per_dim(network, diffusion, z, 0, 5, 400)[1] for z in (images, by_contrast))
    assert 0.85 < in_order / mixed < 1.15


def test_the_estimate_depends_on_the_seed_but_not_on_the_batches_nor_on_the_global_random_state():
    diffusion, images, seen = Diffusion(100, "cosine"), contrasty(20, 0), []
    network = network_of(diffusion, linear())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = bits_per_dim(network, diffusion, images, 5, 4, 20)
    assert torch.equal(torch.get_rng_state(), before)
    other = bits_per_dim(network, diffusion, images, 5, 4, 7, seen.append)
    assert other == pytest.approx(one, rel=1e-9)
    assert seen == [7, 7, 6] * 4
    assert bits_per_dim(network, diffusion, images, 6, 4, 20) != one


def test_a_single_image_has_no_standard_error():
    diffusion = Diffusion(10, "cosine")
    found, error = bits_per_dim(network_of(diffusion, linear()), diffusion, contrasty(1, 0), 0, 10, 1)
    assert found > 0
    assert math.isnan(error)


@pytest.mark.parametrize("k", [0, 1, 11])
def test_impossible_numbers_of_times_are_refused(k):
    with pytest.raises(ValueError, match="choose 2 to 10"):
        bits_per_dim(lambda x_t, t: x_t, Diffusion(10, "cosine"), contrasty(2, 0), 0, k, 2)


def test_with_classes_the_bound_is_of_image_and_class_together():
    """A network that ignores the class: the bound grows by -log2 p(y) for each image, divided among its pixels."""
    diffusion, images = Diffusion(50, "cosine", prediction="v"), contrasty(20, 0)
    network = network_of(diffusion, linear())
    without, _ = bits_per_dim(network, diffusion, images, 0, 4, 8)
    labels, counts = torch.tensor([0] * 15 + [1] * 5), [6, 2, 0]
    both, _ = bits_per_dim(lambda x, t, y: network(x, t), diffusion, images, 0, 4, 8, None, labels, counts)
    surprise = (15 * math.log2(8 / 6) + 5 * math.log2(8 / 2)) / 20
    assert both == pytest.approx(without + surprise / images[0].numel(), rel=1e-9)


def test_each_image_keeps_its_class_when_the_order_changes():
    """Images that the class determines, and a network that knows them: as cheap as one that knows the only image."""
    diffusion = Diffusion(50, "cosine", prediction="x0")
    labels = torch.arange(12) % 3
    grey = torch.tensor([40, 120, 240], dtype=torch.uint8)[labels]
    images = grey[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    known = normalise(torch.tensor([40, 120, 240]))

    def bits(shift: int) -> float:
        def network(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return known[(y + shift) % 3][:, None, None, None].expand_as(x_t)

        return bits_per_dim(network, diffusion, images, 0, 50, 5, None, labels, [1, 1, 1])[0]

    one = bits_per_dim(lambda x_t, t: known[0].expand_as(x_t), diffusion, images[labels == 0], 0, 50, 5)[0]
    assert bits(0) == pytest.approx(one + math.log2(3) / 16, abs=0.05)
    assert bits(1) > 10 * bits(0)  # negative control
