"""The diffusion process of DDPM: noise schedules, the forward process q, its posterior and the training loss.

The notation is that of Ho et al. 2020 (https://arxiv.org/abs/2006.11239), except that timesteps count from 0: `t` is
the paper's t - 1. t = -1 is the clean image, still called x_0, and t = T - 1 the noisiest, still called x_T. Every
coefficient is computed from α̅ (`alpha_bar`). A tensor of timesteps holds one per image, (B,), or one for all, (1,).

Images and the network may be on any device. Timesteps and the schedule stay on the CPU, the schedule in float64, which
some devices lack (Apple's, most of Intel's). Coefficients are computed in float64, rounded to float32, and then copied
to the device, without waiting where it allows that.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOGIT_MEAN, LOGIT_SCALE = -0.2, 1.2  # of logit-normal timesteps: half of them lie between 0.27 T and 0.65 T
GAP = 1 / 32  # of consistency distillation: the length of the teacher's step, as a fraction of T

Network = Callable[[Tensor, Tensor], Tensor]  # x_t (B,C,H,W), t (B,) or (1,) → prediction of `target` (B,C,H,W)

# src/utils/settings.py reads these tables, and SCHEDULES, from the source text: keep them literal.
PREDICTIONS = ("noise", "x0", "v")  # what the network predicts; see `Diffusion.target`
LOSS_WEIGHTS = ("uniform", "min_snr")  # weight of each timestep in the loss; see `Diffusion.weight`
TIME_SAMPLINGS = ("uniform", "stratified", "logit_normal")  # how training timesteps are drawn; see `draw_times`
OBJECTIVES = ("denoising", "consistency")  # what the network learns: `Diffusion.loss` or `consistency_loss`


def linear_betas(time_steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Betas equally spaced from `beta_start` to `beta_end` (Ho et al. 2020, §4), (T,) float64.

    The paper's values are meant for T = 1000. For other T both ends are scaled by 1000 / T, which keeps the sum of the
    betas, and so roughly α̅_T (at T = 100, it is half). Betas are capped at 0.999, which matters for T ≤ 20 only.
    """
    scale = 1000 / time_steps
    return torch.linspace(scale * beta_start, scale * beta_end, time_steps, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(time_steps: int, s: float = 0.008) -> Tensor:
    """Betas for which α̅ is a squared cosine of t (Nichol & Dhariwal 2021, eq. 17), (T,) float64, at most 0.999."""
    u = torch.arange(time_steps + 1, dtype=torch.float64) / time_steps  # (T+1,): t/T, both ends included
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)  # β_t = 1 - α̅_t / α̅_{t-1}


SCHEDULES = {  # name → betas (T,) from time_steps, beta_start, beta_end
    "linear": linear_betas,
    "cosine": lambda time_steps, _start, _end: cosine_betas(time_steps),
}


def draw_times(count: int, time_steps: int, sampling: str) -> Tensor:
    """Draw training timesteps, (count,) int64 in 0 ... T - 1, with torch's global generator.

    "uniform" draws them independently. "stratified" divides the range into `count` equal strata and draws one timestep
    from each, in ascending order. Every batch then covers all noise levels, and its loss varies less (similar to
    Kingma et al. 2021, appendix I.1, where all strata share one offset). "logit_normal" maps such stratified numbers
    to u = sigmoid(LOGIT_MEAN + LOGIT_SCALE z), z ~ N(0, 1), so that the middle is trained most (Esser et al. 2024,
    eq. 19). Of a million timesteps, 11 are then below 0.005 T and 2 above 0.995 T: there, the network extrapolates.
    """
    if sampling == "uniform":
        return torch.randint(time_steps, (count,))
    u = (torch.arange(count) + torch.rand(count).double()) / count  # (count,) in [0, 1): in float32, 1 might come out
    if sampling == "logit_normal":
        z = torch.special.ndtri(u)  # the inverse of the distribution function of N(0, 1)
        u = torch.sigmoid(LOGIT_MEAN + LOGIT_SCALE * z)
    return (time_steps * u).long()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`, if possible without waiting (CUDA may wait if it is large and not pinned).

    MPS is the exception: its asynchronous copies may read memory that was freed meanwhile (pytorch issue 189690).
    """
    return tensor.to(device, non_blocking=device.type != "mps")


class Diffusion:
    """A noise schedule and the distributions that follow from it.

    Args:
        time_steps: T, the number of noise levels.
        schedule: a name in SCHEDULES.
        beta_start, beta_end: first and last beta of the linear schedule; the cosine schedule ignores them.
        prediction: what the network predicts, one of PREDICTIONS; see `target`.
        loss_weight: weight of each timestep in the loss, one of LOSS_WEIGHTS; see `weight`.
        device: the device of x_t.
    """

    def __init__(
        self,
        time_steps: int,
        schedule: str,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction: str = "noise",
        loss_weight: str = "uniform",
        device: torch.device | str = "cpu",
    ) -> None:
        for choice, known in ((schedule, SCHEDULES), (prediction, PREDICTIONS), (loss_weight, LOSS_WEIGHTS)):
            if choice not in known:
                raise ValueError(f"unknown setting {choice!r}: choose from {', '.join(known)}")
        self.time_steps, self.prediction, self.loss_weight = time_steps, prediction, loss_weight
        self.device, self.betas = torch.device(device), SCHEDULES[schedule](time_steps, beta_start, beta_end)
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)  # (T,) float64: in float32, 1 - α̅_0 would have 3 digits

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√α̅_t and √(1 - α̅_t), the factors of x_0 and eps in x_t, each float32 (B,1,1,1); t (B,)."""
        alpha_bar = self._alpha_bar_or_one(t)
        return self.per_image(alpha_bar.sqrt()), self.per_image((1 - alpha_bar).sqrt())

    def half_log_snr(self, t: Tensor) -> Tensor:
        """λ_t = log(√α̅_t / √(1 - α̅_t)), half the log signal-to-noise ratio, (B,) float64; infinite for t = -1.

        DPM-Solver++ uses λ as its time variable (Lu et al. 2022).
        """
        alpha_bar = self._alpha_bar_or_one(t)
        return (alpha_bar / (1 - alpha_bar)).log() / 2

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Sample x_t ~ q(x_t | x_0) with the noise eps ~ N(0, I) (Ho et al., eq. 4); x0 and eps (B,C,H,W), t (B,)."""
        signal, noise = self.signal_and_noise(t)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The regression target: the noise eps, x_0, or v = √α̅_t eps - √(1 - α̅_t) x_0 (Salimans & Ho 2022).

        Given x_t, each of the three determines the others. x_0 follows from eps by a division by √α̅_t, which falls to
        5e-5 on the cosine schedule: there, a small error of the network saturates pixels. v needs no division
        (Salimans & Ho 2022, appendix D).
        """
        if self.prediction == "noise":
            return eps
        if self.prediction == "x0":
            return x0
        signal, noise = self.signal_and_noise(t)
        return signal * eps - noise * x0

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Convert the network's output for x_t into an estimate of x_0, (B,C,H,W)."""
        signal, noise = self.signal_and_noise(t)
        if self.prediction == "noise":
            return (x_t - noise * output) / signal
        if self.prediction == "v":
            return signal * x_t - noise * output
        return output

    def denoise(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """Evaluate the network at x_t and return its estimate of x_0, clipped to [-1, 1]; (B,C,H,W)."""
        return self.predict_x0(x_t, t, network(x_t, send(t, self.device))).clamp(-1, 1)

    def predict_eps(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise eps in x_t, given x_0: Ho et al., eq. 4, solved for eps; (B,C,H,W)."""
        signal, noise = self.signal_and_noise(t)
        return (x_t - signal * x0) / noise

    def posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """β̃, the variance of q(x_s | x_t, x_0) for s < t, float32 (B,1,1,1); Ho et al., eq. 7, where s = t - 1."""
        return self.per_image(self._beta_tilde(t, s))

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """μ̃, the mean of q(x_s | x_t, x_0) for s < t, (B,C,H,W); Ho et al., eq. 7, where s = t - 1.

        With fewer sampling steps than T, α_t becomes α̅_t / α̅_s (Nichol & Dhariwal 2021, §4).
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bar_or_one(t), self._alpha_bar_or_one(s)
        alpha = alpha_bar_t / alpha_bar_s
        x0_factor = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t)
        x_t_factor = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        return self.per_image(x0_factor) * x0 + self.per_image(x_t_factor) * x_t

    def ddim_noise(self, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """σ (Song et al. 2021, eq. 16) and √(1 - α̅_s - σ²) (eq. 12) for the step from t to s < t, float32 (B,1,1,1).

        They are the factors of fresh noise and of the predicted eps. Rounding may push 1 - α̅_s - σ² below 0 where eta
        is near 1 and t near T, hence the clamp.
        """
        variance = eta**2 * self._beta_tilde(t, s)
        remaining = (1 - self._alpha_bar_or_one(s) - variance).clamp(min=0)
        return self.per_image(variance.sqrt()), self.per_image(remaining.sqrt())

    def loss(self, network: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Weighted mean squared error, a scalar; L_simple (Ho et al., eq. 14) for noise with uniform weights and t."""
        output = network(self.q_sample(x0, t, eps), send(t, self.device))
        error = torch.nn.functional.mse_loss(output, self.target(x0, t, eps), reduction="none")
        return (self.weight(t) * error).mean()

    def consistency_loss(
        self, network: Network, teacher: Network, x0: Tensor, t: Tensor, eps: Tensor, gap: float = GAP
    ) -> Tensor:
        """The loss of consistency distillation, a scalar, for prediction v (Song et al. 2023, Algorithm 2).

        The estimate of x_0 from x_t learns to equal that from x_r, r = t - gap · T, to which a step of DDIM with the
        `teacher` leads from x_t. So all points of a path get the estimate of its end: at t = -1, the clean image, the
        estimate is the image itself, since v has the factor √(1 - α̅) = 0 there. r is at least one timestep below t,
        and no further than -1. Algorithm 2 takes the estimate from x_r from an average of the network's weights. Here
        the network itself gives it: Song & Dhariwal 2024 (§3.2) drop the average in training without a teacher. The
        error is that of v, which is that of x_0 over √(1 - α̅_t).
        """
        r = (t - max(1, round(gap * self.time_steps))).clamp(min=-1)  # (B,)
        x_t = self.q_sample(x0, t, eps)  # (B, C, H, W)
        generators = [] if self.device.type == "cpu" else [self.device]
        # fork_rng restores the generator, so that the second evaluation has the dropout masks of the first one.
        with torch.no_grad(), torch.random.fork_rng(generators, device_type=self.device.type):
            x0_by_teacher = self.denoise(teacher, x_t, t)
            x_r = self.q_sample(x0_by_teacher, r, self.predict_eps(x_t, t, x0_by_teacher))
            x0_from_r = self.predict_x0(x_r, r, network(x_r, send(r.clamp(min=0), self.device)))
        x0_from_t = self.predict_x0(x_t, t, network(x_t, send(t, self.device)))
        _, noise = self.signal_and_noise(t)
        error = (x0_from_t - x0_from_r) / noise  # (B, C, H, W)
        return (self.weight(t) * error.square()).mean()

    def weight(self, t: Tensor) -> Tensor:
        """The weight of timestep t in the loss, float32 (B,1,1,1); 1 for "uniform".

        "min_snr" weights the squared error of x_0 by min(SNR, 5) (Hang et al. 2023, §3.4, with γ = 5). That error is
        the squared error of eps divided by SNR, or that of v divided by SNR + 1.
        """
        if self.loss_weight == "uniform":
            return torch.ones(len(t), 1, 1, 1, device=self.device)
        snr = self.alpha_bar[t] / (1 - self.alpha_bar[t])
        ratio = {"noise": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.prediction]  # squared error over x_0's
        return self.per_image(snr.clamp(max=5) / ratio)

    def per_image(self, coefficient: Tensor) -> Tensor:
        """Round coefficients (B,) float64 to float32, shape them (B,1,1,1) and copy them to the images' device."""
        return send(coefficient.float()[:, None, None, None], self.device)

    def _beta_tilde(self, t: Tensor, s: Tensor) -> Tensor:
        """β̃ (Ho et al., eq. 7) for any s < t, (B,) float64."""
        alpha_bar_t, alpha_bar_s = self._alpha_bar_or_one(t), self._alpha_bar_or_one(s)
        return (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)

    def _alpha_bar_or_one(self, t: Tensor) -> Tensor:
        """α̅_t, (B,) float64; 1 for t = -1, the clean image."""
        return torch.where(t >= 0, self.alpha_bar[t.clamp(min=0)], 1.0)
