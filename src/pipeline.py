"""Where the parts meet: settings → U-Net and diffusion, checkpoint → images.

This is the one file of src that knows several siblings, so that no script has to assemble them twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import checkpoint
from src.diffusion import Diffusion
from src.model import UNet
from src.samplers import SAMPLERS
from src.utils import ImageNoise

DDIM_STEPS = 50  # steps of a few-step sampler unless asked otherwise


def build(settings: Mapping[str, Any], device: torch.device) -> tuple[UNet, Diffusion]:
    """A fresh U-Net and its diffusion from the settings of config.py, or those that a checkpoint carries."""
    unet = UNet(settings["image_size"], settings["channels"], settings["unet_dim"], settings["unet_dim_mults"])
    diffusion = Diffusion(
        settings["time_steps"],
        settings["schedule_type"],
        settings["beta_start"],
        settings["beta_end"],
        device,
    )
    return unet.to(device, memory_format=torch.channels_last), diffusion


class Generator:
    """A network and a sampler, ready to make images.

    Args:
        unet, diffusion: as `build` returns them.
        sampler: a name in SAMPLERS.
        steps: network evaluations an image; 0 means all timesteps for ddpm, DDIM_STEPS for the others.
        eta: DDIM's share of fresh noise, 0 to 1; ddpm has none to set.
    """

    def __init__(self, unet: UNet, diffusion: Diffusion, sampler: str, steps: int = 0, eta: float = 0.0) -> None:
        self.unet, self.diffusion = unet, diffusion
        self.device = next(unet.parameters()).device
        self.shape = (unet.channels, unet.image_size, unet.image_size)
        self.sampler = sampler
        self.steps = steps or (diffusion.time_steps if sampler == "ddpm" else min(DDIM_STEPS, diffusion.time_steps))
        self.options = {"eta": eta} if sampler == "ddim" else {}

    def noise(self, seed: int, indices: Sequence[int]) -> ImageNoise:
        """The random streams of images `indices` of a seed."""
        return ImageNoise(seed, indices, self.shape, self.device)

    def trajectory(self, x_T: Tensor, draw: ImageNoise) -> Iterator[Tensor]:
        """Every x_t (B,C,H,W) from noise x_T to the image, which is the last, in [-1, 1]."""
        sampler = SAMPLERS[self.sampler]
        return sampler(self.unet, self.diffusion, x_T, draw, self.steps, **self.options)

    def images(self, seed: int, indices: Sequence[int]) -> Iterator[Tensor]:
        """The trajectory of images `indices` of a seed; image i is the same whatever its company."""
        draw = self.noise(seed, indices)
        return self.trajectory(draw(), draw)


def restore(path: Path, device: torch.device, use_ema: bool = True) -> tuple[UNet, Diffusion, dict[str, Any]]:
    """The network, the diffusion and the whole state of a checkpoint, rebuilt from the settings that it carries.

    Raises:
        UserError: see `checkpoint.load`.
    """
    state = checkpoint.load(path)
    unet, diffusion = build(state["settings"], device)
    unet.load_state_dict(state["ema" if use_ema else "model"])
    return unet.eval().requires_grad_(False), diffusion, state
