"""Where the parts meet: settings → U-Net and diffusion, checkpoint → images, held-out images → loss.

This is the one file of src that knows several siblings, so that no script has to assemble them twice.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import checkpoint
from src.dataset import ImageFiles, normalise
from src.diffusion import Diffusion
from src.errors import SettingError, UserError
from src.model import UNet
from src.samplers import SAMPLERS
from src.utils import ImageNoise, autocast, to_uint8

DEFAULT_STEPS = {"ddpm": 50, "ddim": 50, "dpmpp_2m": 20}  # more gain little: see the README


def build(settings: Mapping[str, Any], device: torch.device) -> tuple[UNet, Diffusion]:
    """A fresh U-Net and its diffusion from the settings of config.py, or those that a checkpoint carries."""
    unet = UNet(settings["image_size"], settings["channels"], settings["unet_dim"], settings["unet_dim_mults"])
    diffusion = Diffusion(
        settings["time_steps"],
        settings["schedule_type"],
        settings["beta_start"],
        settings["beta_end"],
        settings["prediction"],
        device,
    )
    return unet.to(device, memory_format=torch.channels_last), diffusion


def restore(path: Path, device: torch.device, use_ema: bool = True) -> tuple[UNet, Diffusion, dict[str, Any]]:
    """The network, the diffusion and the settings of a checkpoint, rebuilt from nothing but the file.

    Raises:
        UserError: see `checkpoint.load`; or the file holds no weights of the kind asked for.
    """
    state = checkpoint.load(path)
    weights = "ema" if use_ema else "model"
    if weights not in state or "settings" not in state:
        raise UserError(
            f"{path} holds no {'averaged' if use_ema else 'raw'} weights: give another file, or other weights"
        )
    try:
        unet, diffusion = build(state["settings"], device)
        unet.load_state_dict(state[weights])
    except (KeyError, RuntimeError) as error:  # settings or weights that this version does not know
        raise checkpoint.other_version(path) from error
    return unet.eval().requires_grad_(False), diffusion, state["settings"]


@torch.inference_mode()
def validation_loss(
    unet: UNet,
    diffusion: Diffusion,
    images: Tensor | ImageFiles,
    seed: int,
    batch_size: int,
    on_batch: Callable[[], None],
) -> float:
    """The loss on images (N,C,H,W) uint8 with fixed eps and t, which are spread evenly over all timesteps."""
    total, n, device = 0.0, len(images), next(unet.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for first, part in zip(range(0, n, batch_size), images.split(batch_size), strict=True):
        x0 = normalise(part)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.arange(first, first + len(x0)) * diffusion.time_steps // n
        loss = diffusion.loss(unet, *(z.to(device) for z in (x0, t, eps)))
        total += loss.item() * len(x0)
        on_batch()
    return total / n


class Generator:
    """A network and a sampler, ready to make images.

    Args:
        unet, diffusion: as `build` and `restore` return them.
        sampler: a name in SAMPLERS.
        steps: network evaluations an image; 0 means DEFAULT_STEPS, or all timesteps if those are fewer.
        eta: DDIM's share of fresh noise, 0 to 1; the other samplers have none to set.
        precision: of the network's arithmetic; the sampler's own stays float32.

    Raises:
        SettingError: there are more steps than the diffusion has timesteps.
    """

    def __init__(
        self,
        unet: UNet,
        diffusion: Diffusion,
        sampler: str,
        steps: int = 0,
        eta: float = 0.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.unet, self.diffusion, self.precision = unet, diffusion, precision
        self.shape = (unet.channels, unet.image_size, unet.image_size)
        self.device = next(unet.parameters()).device
        self.sampler = sampler
        self.steps = steps or min(DEFAULT_STEPS[sampler], diffusion.time_steps)
        self.options = {"eta": eta} if sampler == "ddim" else {}
        if self.steps > diffusion.time_steps:
            raise SettingError(f"--steps is {steps}, but the model has {diffusion.time_steps} timesteps: use fewer")

    def generate(
        self, seed: int, count: int, batch_size: int, on_step: Callable[[Tensor], None] | None = None
    ) -> Iterator[Tensor]:
        """Images 0 to count - 1 of a seed, uint8 (B,C,H,W), a batch at a time.

        Image i is the same whatever `count` and `batch_size` (but for float rounding, which on the CPU in float32
        may move a pixel by one grey level). `on_step` gets every x_t (B,C,H,W) on the way, from x_T - 1 to the image.
        """
        for first in range(0, count, batch_size):
            draw = ImageNoise(seed, range(first, min(first + batch_size, count)), self.shape, self.device)
            yield self._follow(draw(), draw, on_step)

    def interpolate(self, seed: int, frames: int, batch_size: int) -> Tensor:
        """From image 0 of a seed to image 1 in `frames` images, ends included, uint8 (frames,C,H,W).

        Meant for a deterministic sampler: only there are the ends images 0 and 1 of `generate`, and neighbours alike.
        """
        draw = ImageNoise(seed, range(2), self.shape, self.device)
        noises = slerp(*draw(), torch.linspace(0, 1, frames, device=self.device))  # (frames, C, H, W)
        return torch.cat([self._follow(x_T, draw) for x_T in noises.split(batch_size)])

    def _follow(self, x_T: Tensor, draw: ImageNoise, on_step: Callable[[Tensor], None] | None = None) -> Tensor:
        for x_t in SAMPLERS[self.sampler](self._network, self.diffusion, x_T, draw, self.steps, **self.options):
            if on_step is not None:
                on_step(x_t)
        return to_uint8(x_t).cpu()

    def _network(self, x_t: Tensor, t: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.unet(x_t, t).float()


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985) from a at weight 0 to b at weight 1: (C,H,W), (F,) → (F,C,H,W).

    Gaussian noise in many dimensions lies near a sphere. A straight line between two noises leaves it: its middle
    has 0.7 of their norm, unlike any noise that the network was trained on. The arc stays on it.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights[:, None, None, None]
    return (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()
