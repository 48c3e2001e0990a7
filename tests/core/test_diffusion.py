"""`src/diffusion.py` against closed forms, Bayes' theorem, Monte Carlo and the schedules of diffusers.

Statistical bounds are 4.5 standard errors (1 failure in 150,000 if the seeds were not fixed); the rest is exact
up to float32's rounding.
"""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from src.diffusion import Diffusion, cosine_betas, draw_times, linear_betas

SCHEDULES = ["linear", "cosine"]
PREDICTIONS = ["noise", "x0", "v"]
HO = (1e-4, 0.02)  # the ends of Ho et al.'s linear schedule
SIGMAS = 4.5  # standard errors that a Monte-Carlo estimate may be off
EPS32 = torch.finfo(torch.float32).eps


def at(t: int, batch: int = 1) -> torch.Tensor:
    """The timestep of a batch, (B,)."""
    return torch.full((batch,), t)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alpha_bar_by_hand(diffusion: Diffusion, t: int) -> float:
    """∏ (1 - β_i) up to and with t, in Python's floats; 1 for t = -1, an empty product."""
    return math.prod(1 - beta for beta in diffusion.betas[: t + 1].tolist())


# ---- schedules -------------------------------------------------------------------------------------------


def test_linear_betas_are_those_of_the_paper():
    betas = linear_betas(1000, *HO)
    assert len(betas) == 1000
    by_hand = {0: 0.0001, 333: 0.1 / 15 + 0.1 / 1500, 666: 0.2 / 15 + 0.05 / 1500, 999: 0.02}
    for t, beta in by_hand.items():  # thirds of the way: 0.0001 + 0.0199/3 and 0.0001 + 2·0.0199/3
        assert betas[t].item() == pytest.approx(beta, rel=1e-12)


def test_linear_betas_equal_diffusers_at_every_t():
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_start=HO[0], beta_end=HO[1], beta_schedule="linear")
    torch.testing.assert_close(linear_betas(1000, *HO).float(), theirs.betas, rtol=1e-5, atol=0)


def test_cosine_betas_are_those_of_the_paper():
    betas = cosine_betas(1000)
    # 1 - cos² b / cos² a = sin(b - a) sin(b + a) / cos² a, with a step of b - a = π/2 / 1008 = 1.558330e-3:
    by_hand = {0: 1.558330e-3 * 2.648851e-2 / 0.9998446, 499: 1.558330e-3 * 0.9999405 / 0.4953251}
    # and towards the end, where the cosine falls linearly to 0, of k steps left one is taken: 1 - ((k - 1) / k)²
    by_hand |= {997: 1 - (2 / 3) ** 2, 998: 1 - (1 / 2) ** 2, 999: 0.999}
    for t, beta in by_hand.items():
        assert betas[t].item() == pytest.approx(beta, rel=1e-5)


@pytest.mark.parametrize("time_steps", [50, 1000, 4000])
def test_cosine_betas_equal_diffusers_at_every_t(time_steps):
    theirs = DDPMScheduler(num_train_timesteps=time_steps, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(cosine_betas(time_steps).float(), theirs.betas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("time_steps", [50, 1000])
def test_cosine_alpha_bar_follows_the_squared_cosine(time_steps):
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = Diffusion(time_steps, "cosine").alpha_bar
    for t in range(time_steps - 1):  # the last beta is the only one that is clipped
        assert alpha_bar[t].item() == pytest.approx(f((t + 1) / time_steps) / f(0), rel=1e-9)


def test_cosine_betas_are_clipped_from_above_and_never_from_below():
    betas = cosine_betas(1000)
    assert betas.max() == 0.999  # the formula alone gives 1, from which no step leads back
    assert betas.min().item() == pytest.approx(4.128422e-5, rel=1e-6)  # not 1e-4, where some codes cut it
    assert betas.argmin() == 0
    assert (betas.diff() > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time_steps", [1, 2, 10, 100, 1000])
def test_every_length_of_schedule_only_ever_adds_noise(schedule, time_steps):
    diffusion = Diffusion(time_steps, schedule)
    assert diffusion.betas.shape == diffusion.alpha_bar.shape == (time_steps,)
    assert ((diffusion.betas > 0) & (diffusion.betas <= 0.999)).all()
    assert (diffusion.alpha_bar.diff() < 0).all()
    assert diffusion.alpha_bar[-1] > 0


@pytest.mark.parametrize("time_steps", [100, 250, 500])
def test_linear_schedule_ends_at_noise_whatever_its_length(time_steps):
    # Its sum of betas is that of T = 1000, and ln α̅_T = Σ ln(1 - β) is minus that sum up to a second-order term.
    assert linear_betas(time_steps, *HO).sum().item() == pytest.approx(linear_betas(1000, *HO).sum().item())
    end = Diffusion(time_steps, "linear", *HO).alpha_bar[-1].item()
    assert math.log(end) == pytest.approx(math.log(Diffusion(1000, "linear", *HO).alpha_bar[-1].item()), rel=0.08)
    assert math.sqrt(end) < 0.01  # at most 1% of the image is left

    unscaled = (1 - torch.linspace(*HO, time_steps, dtype=torch.float64)).prod().item()
    assert math.sqrt(unscaled) > 0.07  # negative control: 60% of it at T = 100, 28% at 250, 8% at 500


def test_the_linear_schedule_has_the_paper_s_ends_unless_told_otherwise():
    assert torch.equal(Diffusion(1000, "linear").betas, linear_betas(1000, *HO))
    assert not torch.equal(Diffusion(1000, "linear", 2e-4, 0.02).betas, linear_betas(1000, *HO))


def test_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'sigmoid'.*linear.*cosine"):
        Diffusion(1000, "sigmoid")


def test_unknown_prediction_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'score'.*noise.*x0.*v"):
        Diffusion(1000, "cosine", prediction="score")


# ---- the forward process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_small_steps_add_up_to_the_closed_form(schedule):
    """T steps of q(x_t | x_{t-1}) = N(√(1-β) x_{t-1}, β) (eq. 2), mean and variance carried along in float64."""
    diffusion = Diffusion(1000, schedule)
    t = torch.arange(1000)
    signal, sigma = (z.flatten() for z in diffusion.signal_and_noise(t))
    mean, variance = 1.0, 0.0
    for i, beta in enumerate(diffusion.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert signal[i].item() == pytest.approx(mean, rel=2 * EPS32)
        assert sigma[i].item() == pytest.approx(math.sqrt(variance), rel=2 * EPS32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_q_sample_has_the_mean_and_variance_of_eq_4(schedule, t):
    diffusion, n = Diffusion(1000, schedule), 40_000
    alpha_bar = alpha_bar_by_hand(diffusion, t)
    x0 = torch.tensor([-1.0, 0.3]).view(2, 1, 1, 1).expand(2, 1, 200, 200)
    x_t = diffusion.q_sample(x0, at(t, 2), noise(2, 1, 200, 200)).double().flatten(1)
    for value, pixels in zip([-1.0, 0.3], x_t, strict=True):
        variance = 1 - alpha_bar
        error_of_mean = math.sqrt(variance / n)
        error_of_variance = variance * math.sqrt(2 / (n - 1))  # of Gaussian samples
        assert abs(pixels.mean().item() - math.sqrt(alpha_bar) * value) < SIGMAS * error_of_mean
        assert abs(pixels.var().item() - variance) < SIGMAS * error_of_variance


def test_every_image_of_a_batch_has_its_own_timestep():
    diffusion = Diffusion(1000, "cosine")
    x0, eps, t = noise(4, 1, 8, 8), noise(4, 1, 8, 8, seed=1), torch.tensor([0, 999, 250, 600])
    together = diffusion.q_sample(x0, t, eps)
    for i in range(4):
        alone = diffusion.q_sample(x0[i : i + 1], t[i : i + 1], eps[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_before_the_first_step_there_is_no_noise():
    signal, sigma = Diffusion(1000, "cosine").signal_and_noise(torch.tensor([-1, 0]))
    assert signal[0].item() == 1
    assert sigma[0].item() == 0
    assert sigma[1].item() > 0


def test_half_log_snr_is_the_logarithm_of_signal_over_noise_and_infinite_without_noise():
    diffusion, t = Diffusion(1000, "cosine"), torch.arange(-1, 1000)
    found = diffusion.half_log_snr(t).flatten()
    signal, sigma = (z.flatten().double() for z in diffusion.signal_and_noise(t[1:]))
    torch.testing.assert_close(found[1:], (signal / sigma).log(), rtol=0, atol=1e-6)
    assert found[0] == math.inf and found.dtype == torch.float64
    assert (found.diff() < 0).all()


def test_coefficients_are_precise_near_t_0():
    """There 1 - α̅ is 4e-5, a difference of nearly equal numbers: in float32 all but three digits are lost."""
    diffusion = Diffusion(1000, "cosine")
    betas = diffusion.betas[:20]
    exact = -torch.log1p(-betas).cumsum(0).expm1()  # 1 - exp(Σ log(1 - β)), in which nothing cancels
    sigma = diffusion.signal_and_noise(torch.arange(20))[1].flatten()
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma, exact.sqrt().float(), rtol=2 * EPS32, atol=0)

    naive = (1 - torch.cumprod(1 - betas.float(), dim=0)).sqrt()
    assert ((naive / exact.sqrt() - 1).abs() > 20 * EPS32).any()  # negative control


# ---- what the network predicts ----------------------------------------------------------------------------


def test_v_is_x_t_a_quarter_turn_further():
    """With the angle φ of √α̅ = cos φ, x_t = cos φ x_0 + sin φ eps turns from image to noise, and v = dx_t / dφ."""
    diffusion, x0, eps = Diffusion(1000, "cosine", prediction="v"), noise(1, 1, 8, 8), noise(1, 1, 8, 8, seed=1)
    for t in (0, 300, 700, 999):
        phi = math.acos(math.sqrt(alpha_bar_by_hand(diffusion, t)))
        v = math.cos(phi + math.pi / 2) * x0 + math.sin(phi + math.pi / 2) * eps
        torch.testing.assert_close(diffusion.target(x0, at(t), eps), v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_v_equals_diffusers(schedule):
    diffusion, t = Diffusion(1000, schedule, prediction="v"), torch.tensor([0, 10, 300, 998])
    theirs = DDPMScheduler(trained_betas=diffusion.betas.numpy(), prediction_type="v_prediction")
    x0, eps = noise(4, 1, 8, 8), noise(4, 1, 8, 8, seed=1)
    # theirs is computed in float32, which knows 1 - α̅_0 = 4e-5 to three digits
    torch.testing.assert_close(diffusion.target(x0, t, eps), theirs.get_velocity(x0, eps, t), rtol=0, atol=1e-4)


def test_noise_itself_is_the_target_of_ho():
    x0, eps = noise(2, 1, 8, 8), noise(2, 1, 8, 8, seed=1)
    assert torch.equal(Diffusion(1000, "cosine").target(x0, at(500, 2), eps), eps)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 1, 100, 500, 900, 999])
def test_x0_and_eps_can_be_had_back_from_x_t_and_the_target(schedule, prediction, t):
    diffusion = Diffusion(1000, schedule, prediction=prediction)
    x0, eps = noise(1, 1, 32, 32).clamp(-1, 1), noise(1, 1, 32, 32, seed=1)
    x_t, target = diffusion.q_sample(x0, at(t), eps), diffusion.target(x0, at(t), eps)
    # x_t, of size 4 at most, is rounded to float32; dividing by √α̅ or √(1 - α̅) magnifies what was lost.
    rounding, alpha_bar = 4 * 4 * EPS32, alpha_bar_by_hand(diffusion, t)
    magnified = rounding / math.sqrt(alpha_bar) if prediction == "noise" else rounding
    torch.testing.assert_close(diffusion.predict_x0(x_t, at(t), target), x0, rtol=0, atol=magnified)
    magnified = rounding / math.sqrt(1 - alpha_bar)
    torch.testing.assert_close(diffusion.predict_eps(x_t, at(t), x0), eps, rtol=0, atol=magnified)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_is_clipped_to_the_range_of_the_data(prediction):
    diffusion = Diffusion(1000, "linear", prediction=prediction)
    x0, eps = torch.linspace(-3, 3, 61).view(1, 1, 1, 61), noise(1, 1, 1, 61)
    for t in (0, 300):
        x_t, target = diffusion.q_sample(x0, at(t), eps), diffusion.target(x0, at(t), eps)
        back = diffusion.denoise(lambda *_, target=target: target, x_t, at(t))
        torch.testing.assert_close(back, x0.clamp(-1, 1), rtol=0, atol=1e-5)
        assert back.min() == -1
        assert back.max() == 1


def test_an_error_in_v_stays_small_where_one_in_the_noise_saturates_the_pixel():
    """At the noisy end of the cosine schedule, x_0 from the noise is the error divided by √α̅ = 5e-5."""
    x0, eps, t = noise(1, 1, 32, 32).clamp(-0.9, 0.9), noise(1, 1, 32, 32, seed=1), at(999)
    error = 0.01 * noise(1, 1, 32, 32, seed=2)

    def estimate(prediction: str) -> torch.Tensor:
        diffusion = Diffusion(1000, "cosine", prediction=prediction)
        output = diffusion.target(x0, t, eps) + error
        return diffusion.denoise(lambda *_: output, diffusion.q_sample(x0, t, eps), t)

    assert (estimate("v") - x0).abs().max() <= error.abs().max() + 4 * EPS32
    assert (estimate("noise").abs() == 1).float().mean() > 0.95  # negative control


# ---- the posterior ---------------------------------------------------------------------------------------


def bayes(diffusion: Diffusion, t: int, s: int, x0: float, x_t: float) -> tuple[float, float]:
    """Mean and variance of q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), multiplied out as two Gaussians in x_s.

    Precisions add up; the mean is that of the two means, weighted with the precisions. Nothing of eq. 7 is used.
    """
    alpha_bar_s = alpha_bar_by_hand(diffusion, s)
    alpha = math.prod(1 - beta for beta in diffusion.betas[s + 1 : t + 1].tolist())  # of the jump from s to t
    prior = 1 / (1 - alpha_bar_s)  # precision of q(x_s | x_0), around √α̅_s x_0
    likelihood = alpha / (1 - alpha)  # precision of q(x_t | x_s) as a function of x_s, around x_t / √α
    variance = 1 / (prior + likelihood)
    return variance * (prior * math.sqrt(alpha_bar_s) * x0 + likelihood * x_t / math.sqrt(alpha)), variance


JUMPS = [(1, 0), (2, 1), (500, 499), (998, 997), (999, 998), (999, 979), (500, 400), (999, 0), (20, 10), (700, 3)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), JUMPS)
def test_posterior_is_what_bayes_theorem_gives(schedule, t, s):
    diffusion = Diffusion(1000, schedule)
    for x0, x_t in ((1.0, 0.0), (0.0, 1.0), (-0.7, 1.9)):
        mean, variance = bayes(diffusion, t, s, x0, x_t)
        ours = diffusion.posterior_mean(torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), x_t), at(t), at(s))
        assert ours.item() == pytest.approx(mean, rel=1e-5, abs=1e-7)
        assert diffusion.posterior_variance(at(t), at(s)).item() == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0, 10, 999])
def test_posterior_of_the_clean_image_is_x0_itself(schedule, t):
    diffusion = Diffusion(1000, schedule)
    x0, x_t = noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1)
    assert torch.equal(diffusion.posterior_mean(x0, x_t, at(t), at(-1)), x0)
    assert diffusion.posterior_variance(at(t), at(-1)).item() == 0


@pytest.mark.parametrize(("t", "s"), [(500, 499), (999, 700), (60, 20)])
def test_posterior_after_the_forward_process_is_the_forward_process(t, s):
    """∫ q(x_s | x_t, x_0) q(x_t | x_0) dx_t = q(x_s | x_0): a posterior that passes may take any path back."""
    diffusion = Diffusion(1000, "cosine")
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    of_x0 = diffusion.posterior_mean(one, zero, at(t), at(s)).double().item()
    of_x_t = diffusion.posterior_mean(zero, one, at(t), at(s)).double().item()
    alpha_bar_t, alpha_bar_s = alpha_bar_by_hand(diffusion, t), alpha_bar_by_hand(diffusion, s)
    variance = diffusion.posterior_variance(at(t), at(s)).item() + of_x_t**2 * (1 - alpha_bar_t)
    assert of_x0 + of_x_t * math.sqrt(alpha_bar_t) == pytest.approx(math.sqrt(alpha_bar_s), rel=1e-6)
    assert variance == pytest.approx(1 - alpha_bar_s, rel=1e-6)


# ---- the loss --------------------------------------------------------------------------------------------


def test_loss_is_zero_for_the_true_noise():
    diffusion, x0, eps = Diffusion(1000, "cosine"), noise(8, 1, 8, 8), noise(8, 1, 8, 8, seed=1)
    assert diffusion.loss(lambda x_t, t: eps, x0, torch.arange(8), eps).item() == 0


def test_loss_is_zero_for_the_true_v_and_not_for_the_noise():
    diffusion, t = Diffusion(1000, "cosine", prediction="v"), torch.arange(300, 308)
    x0, eps = noise(8, 1, 8, 8), noise(8, 1, 8, 8, seed=1)
    v = diffusion.target(x0, t, eps)
    assert diffusion.loss(lambda x_t, t: v, x0, t, eps).item() == 0
    assert diffusion.loss(lambda x_t, t: eps, x0, t, eps).item() > 0.1


def test_loss_of_a_zero_predictor_is_one():
    diffusion, n = Diffusion(1000, "cosine"), 100 * 32 * 32
    x0, eps = noise(100, 1, 32, 32), noise(100, 1, 32, 32, seed=1)
    loss = diffusion.loss(lambda x_t, t: torch.zeros_like(x_t), x0, torch.arange(100), eps).item()
    assert abs(loss - 1) < SIGMAS * math.sqrt(2 / n)  # E[eps²] = 1, and Var[eps²] = 2


def test_loss_shows_the_model_x_t_and_t():
    diffusion, t = Diffusion(1000, "linear"), torch.tensor([3, 700])
    x0, eps, seen = noise(2, 1, 4, 4), noise(2, 1, 4, 4, seed=1), []
    diffusion.loss(lambda *inputs: seen.extend(inputs) or eps, x0, t, eps)
    assert torch.equal(seen[0], diffusion.q_sample(x0, t, eps))
    assert torch.equal(seen[1], t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [50, 300, 700])
def test_loss_of_the_best_predictor_is_what_cannot_be_known(prediction, t):
    """For x_0 ~ N(0, s²) all is jointly Gaussian, and x_t has the variance u = α̅ s² + 1 - α̅.

    The noise has the covariance √(1-α̅) with x_t: the best guess is √(1-α̅) x_t / u, the unknown rest of it
    1 - (1-α̅) / u = α̅ s² / u. For x_0 the covariance is √α̅ s², and the rest (1-α̅) s² / u; for v √(α̅(1-α̅)) (1 - s²),
    and s² / u.
    """
    diffusion, s, n = Diffusion(1000, "cosine", prediction=prediction), 0.5, 100 * 32 * 32
    a = alpha_bar_by_hand(diffusion, t)
    u = a * s**2 + 1 - a
    covariances = {"noise": math.sqrt(1 - a), "x0": math.sqrt(a) * s**2, "v": math.sqrt(a * (1 - a)) * (1 - s**2)}
    covariance = covariances[prediction]
    least = {"noise": a, "x0": 1 - a, "v": 1}[prediction] * s**2 / u
    x0, eps = s * noise(100, 1, 32, 32), noise(100, 1, 32, 32, seed=1)

    def loss_of(factor: float) -> float:
        return diffusion.loss(lambda x_t, t: factor * covariance / u * x_t, x0, at(t, 100), eps).item()

    assert abs(loss_of(1) - least) < SIGMAS * least * math.sqrt(2 / n)
    assert loss_of(0.8) > loss_of(1)  # negative controls: any other factor does worse
    assert loss_of(1.2) > loss_of(1)


# ---- how timesteps are drawn and weighed -----------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_min_snr_counts_errors_of_x0_by_the_smaller_of_snr_and_5(schedule, prediction):
    """Whatever the network predicts: an x_0 that is wrong by 0.1 costs min(SNR, 5) · 0.01."""
    diffusion = Diffusion(1000, schedule, prediction=prediction, loss_weight="min_snr")
    x0, eps = torch.zeros(1, 1, 4, 4), torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (torch.tensor([t]) for t in (0, 100, 300, 500, 900)):
        wrong = x0 + 0.1
        x_t = diffusion.q_sample(x0, t, eps)
        output = diffusion.target(wrong, t, diffusion.predict_eps(x_t, t, wrong))  # of a network that believes in it
        loss = diffusion.loss(lambda x_t, t, output=output: output, x0, t, eps)
        snr = (diffusion.alpha_bar[t] / (1 - diffusion.alpha_bar[t])).item()
        assert loss.item() == pytest.approx(min(snr, 5) * 0.01, rel=2e-3)


def test_uniform_weights_are_1():
    t = torch.arange(1000)
    assert torch.equal(Diffusion(1000, "cosine", prediction="v").weight(t), torch.ones(1000, 1, 1, 1))


def test_an_unknown_weight_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'snr'.*uniform.*min_snr"):
        Diffusion(1000, "cosine", loss_weight="snr")


@pytest.mark.parametrize("how", ["uniform", "stratified"])
def test_every_timestep_is_as_likely_as_any_other(how):
    torch.manual_seed(0)
    t = torch.cat([draw_times(64, 10, how) for _ in range(500)])  # 32,000 of them
    counts = t.bincount(minlength=10).double()
    assert (t.dtype, len(counts)) == (torch.int64, 10)
    chi2 = ((counts - 3200) ** 2 / 3200).sum()
    assert chi2 < 27.9  # the 99.9th percentile for 9 degrees of freedom


def test_stratified_times_hold_one_of_every_part_and_uniform_ones_do_not():
    torch.manual_seed(0)
    for _ in range(20):
        assert torch.equal(draw_times(50, 1000, "stratified") // 20, torch.arange(50))
    assert not torch.equal(draw_times(50, 1000, "uniform").sort().values // 20, torch.arange(50))


@pytest.mark.parametrize("how", ["stratified", "logit_normal"])
def test_times_stay_in_range(how, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 1 - 2**-24))
    assert draw_times(64, 1000, how).max() == 999
    monkeypatch.setattr(torch, "rand", torch.zeros)
    assert draw_times(64, 1000, how).min() == 0


def test_logit_normal_times_are_normal_after_the_logit_and_others_are_not():
    """Of each stratum there is one; a normal variable's distribution function turns t back into the strata."""

    def strata(how):
        t = draw_times(64, 1_000_000, how).double()  # so many timesteps that rounding them down does not count
        return ((torch.special.ndtr((((t + 0.5) / 1_000_000).logit() + 0.2) / 1.2)) * 64).long()

    torch.manual_seed(0)
    for _ in range(20):
        assert (strata("logit_normal") - torch.arange(64)).abs().max() <= 1  # 1: float32 rounds u at a stratum's edge
    assert (strata("stratified") - torch.arange(64)).abs().max() > 1
