"""The diffusion process of DDPM: noise schedules, the forward process q, its posterior and the training loss.

Notation is Ho et al. 2020's (https://arxiv.org/abs/2006.11239), with two habits of code: timesteps count from 0,
so `t` here is the paper's t + 1; and α̅ (alpha_bar) is the one quantity that everything is computed from.
Timesteps are one an image, (B,), or one for all of them, (1,).

What lives where: images, noises and the network are on a device of any kind. Timesteps and the schedule's tables are
on the CPU, the tables in float64, which some devices lack (Apple's, most of Intel's). Coefficients are computed
there, in float64; only rounded to float32 do they go to the images' device, where the network is given t, too. So
nothing here makes the CPU wait for a device.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from src.devices import send  # the way from the CPU to a device

Network = Callable[[Tensor, Tensor], Tensor]  # x_t (B,C,H,W), t (B,) or (1,) → its prediction of `target` (B,C,H,W)


def linear_betas(time_steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Betas from `beta_start` to `beta_end` in equal steps (Ho et al. 2020, §4), (T,) float64.

    The paper's values are meant for T = 1000. For another T both ends are scaled by 1000 / T, so that the sum of
    the betas, and with it the noise at the end, stays the same; 0.999 caps what that makes of a very small T.
    """
    scale = 1000 / time_steps
    betas = torch.linspace(scale * beta_start, scale * beta_end, time_steps, dtype=torch.float64)
    return betas.clamp(max=0.999)


def cosine_betas(time_steps: int, s: float = 0.008) -> Tensor:
    """Betas whose α̅ follows a squared cosine (Nichol & Dhariwal 2021, eq. 17), (T,) float64, at most 0.999."""
    u = torch.arange(time_steps + 1, dtype=torch.float64) / time_steps  # (T+1,): t/T, both ends included
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)  # β_t = 1 - α̅_t / α̅_{t-1}


def draw_times(count: int, time_steps: int, how: str) -> Tensor:
    """Timesteps to train on, (count,) int64, each uniform from 0 to T - 1, from torch's global generator.

    "uniform" draws them one by one. "stratified" draws one from each of `count` equal parts of the range: every batch
    sees them all, and its loss varies less from batch to batch (akin to Kingma et al. 2021, appendix I.1, where the
    parts share one offset).
    """
    if how == "uniform":
        return torch.randint(time_steps, (count,))
    u = (torch.arange(count) + torch.rand(count)) / count  # (count,) in [0, 1]
    return (time_steps * u).long().clamp(max=time_steps - 1)


class Diffusion:
    """A noise schedule and the distributions that follow from it.

    Args:
        time_steps: T, the number of noise levels.
        schedule: "linear" or "cosine".
        beta_start, beta_end: the ends of the linear schedule; the cosine schedule has none.
        prediction: what the network predicts, "noise" (Ho et al.), "x0" or "v" (Salimans & Ho 2022); see `target`.
        loss_weight: of the timesteps in the loss, "uniform" or "min_snr"; see `weight`.
        device: where x_t will live.

    Attributes:
        betas, alpha_bar: (T,) float64, on the CPU. Near t = 0, 1 - α̅ is 4e-5: float32 would keep only three of its
            digits, so coefficients are computed in float64 and rounded last.
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
        if schedule == "linear":
            betas = linear_betas(time_steps, beta_start, beta_end)
        elif schedule == "cosine":
            betas = cosine_betas(time_steps)
        else:
            raise ValueError(f"unknown schedule {schedule!r}: choose linear or cosine")
        if prediction not in ("noise", "x0", "v"):
            raise ValueError(f"unknown prediction {prediction!r}: choose noise, x0 or v")
        if loss_weight not in ("uniform", "min_snr"):
            raise ValueError(f"unknown loss weight {loss_weight!r}: choose uniform or min_snr")
        self.time_steps, self.prediction, self.loss_weight = time_steps, prediction, loss_weight
        self.device, self.betas = torch.device(device), betas
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√α̅_t and √(1 - α̅_t), float32, shaped (B,1,1,1) to multiply images; t (B,), -1 for the clean image."""
        alpha_bar = self._alpha_bar_or_one(t)
        return self.per_image(alpha_bar.sqrt()), self.per_image((1 - alpha_bar).sqrt())

    def half_log_snr(self, t: Tensor) -> Tensor:
        """λ_t = log(√α̅_t / √(1 - α̅_t)), (B,) float64 on the CPU, and infinite for the clean image, t = -1.

        It grows as the noise goes, and is the time in which fast solvers count (Lu et al. 2022).
        """
        alpha_bar = self._alpha_bar_or_one(t)
        return (alpha_bar / (1 - alpha_bar)).log() / 2

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), given its noise eps ~ N(0, I) (Ho et al., eq. 4); images (B,C,H,W), t (B,)."""
        signal, noise = self.signal_and_noise(t)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network is to predict from x_t: the noise, x_0, or v = √α̅_t eps - √(1 - α̅_t) x_0.

        Any of them, with x_t, fixes the others. But to get x_0 from the noise one divides by √α̅_t, which on the
        cosine schedule ends at 5e-5: there any error of the network becomes a saturated pixel. From v one never
        divides (Salimans & Ho 2022, appendix D).
        """
        if self.prediction == "noise":
            return eps
        if self.prediction == "x0":
            return x0
        signal, noise = self.signal_and_noise(t)
        return signal * eps - noise * x0

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The x_0 that the network's output for x_t stands for, clipped to the data's range [-1, 1]."""
        signal, noise = self.signal_and_noise(t)
        if self.prediction == "noise":
            output = (x_t - noise * output) / signal
        elif self.prediction == "v":
            output = signal * x_t - noise * output
        return output.clamp(-1, 1)

    def denoise(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of x_0 from x_t, clipped to [-1, 1], (B,C,H,W)."""
        return self.predict_x0(x_t, t, network(x_t, send(t, self.device)))

    def predict_eps(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise that leads from x_0 to x_t: eq. 4 solved for eps."""
        signal, noise = self.signal_and_noise(t)
        return (x_t - signal * x0) / noise

    def posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """β̃, the variance of q(x_s | x_t, x_0) for s < t, float32 (B,1,1,1); with s = t - 1, Ho et al.'s eq. 7."""
        return self.per_image(self._beta_tilde(t, s))

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """μ̃, the mean of q(x_s | x_t, x_0) for s < t, (B,C,H,W); with s = t - 1, Ho et al.'s eq. 7.

        For the jumps of a coarser grid the derivation is the same with α̅_t / α̅_s for α_t (Nichol & Dhariwal
        2021, §4).
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bar_or_one(t), self._alpha_bar_or_one(s)
        alpha = alpha_bar_t / alpha_bar_s
        of_x0 = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t)
        of_x_t = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        return self.per_image(of_x0) * x0 + self.per_image(of_x_t) * x_t

    def ddim_noise(self, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Factors of the fresh noise and of eps in DDIM's step from t to s < t, float32 (B,1,1,1) each.

        They are σ (Song et al. 2021, eq. 16) and √(1 - α̅_s - σ²) (eq. 12). With eta near 1 and t near T the
        difference is too small for float32, which may round it below 0.
        """
        variance = eta**2 * self._beta_tilde(t, s)
        left = (1 - self._alpha_bar_or_one(s) - variance).clamp(min=0)
        return self.per_image(variance.sqrt()), self.per_image(left.sqrt())

    def loss(self, network: Network, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The mean squared error of the prediction, a scalar; of the noise, it is L_simple (Ho et al., eq. 14)."""
        output = network(self.q_sample(x0, t, eps), send(t, self.device))
        error = F.mse_loss(output, self.target(x0, t, eps), reduction="none")
        return (self.weight(t) * error).mean()

    def weight(self, t: Tensor, gamma: float = 5.0) -> Tensor:
        """How much timestep t counts in the loss, float32 (B,1,1,1); 1 where weights are uniform.

        "min_snr" counts errors of x_0 by min(SNR, γ), γ = 5 (Hang et al. 2023, §3.4). An error of the noise makes one
        of x_0 that is 1/√SNR as large, an error of v one that is 1/√(SNR + 1) as large.
        """
        if self.loss_weight == "uniform":
            return torch.ones(len(t), 1, 1, 1, device=self.device)
        snr = self.alpha_bar[t] / (1 - self.alpha_bar[t])
        return self.per_image(snr.clamp(max=gamma) / {"noise": snr, "x0": 1, "v": snr + 1}[self.prediction])

    def per_image(self, coefficient: Tensor) -> Tensor:
        """(B,) float64 on the CPU → (B,1,1,1) float32 on the images' device, to multiply them by."""
        return send(coefficient.float()[:, None, None, None], self.device)

    def _beta_tilde(self, t: Tensor, s: Tensor) -> Tensor:
        """β̃ (Ho et al., eq. 7) for any s < t, (B,) float64: callers round only what they make of it."""
        alpha_bar_t, alpha_bar_s = self._alpha_bar_or_one(t), self._alpha_bar_or_one(s)
        return (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)

    def _alpha_bar_or_one(self, t: Tensor) -> Tensor:
        """α̅_t, (B,) float64; 1 where t = -1, before the first noise."""
        return torch.where(t >= 0, self.alpha_bar[t.clamp(min=0)], 1.0)
