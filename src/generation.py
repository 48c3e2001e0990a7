"""Generation: checkpoint → network, seed → noise, network and sampler → images; interpolation, editing of an image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.diffusion import Diffusion, Network
from src.model import UNet, autocast
from src.samplers import SAMPLERS, Draw, time_grid


def build(settings: Mapping[str, Any], device: torch.device | str = "cpu") -> tuple[UNet, Diffusion]:
    """A U-Net with random weights and its diffusion process, on `device`.

    `settings` are those of a checkpoint: the constants of config.py with lower-case names, and "classes", the list of
    class names, which is empty for an unconditional model.
    """
    unet = UNet(
        image_size=settings["image_size"],
        channels=settings["channels"],
        dim=settings["unet_dim"],
        dim_mults=settings["unet_dim_mults"],
        num_classes=len(settings["classes"]),
        dropout=settings["dropout"],
        encoder_attention=settings["encoder_attention"],
    )
    diffusion = Diffusion(
        time_steps=settings["time_steps"],
        schedule=settings["schedule_type"],
        beta_start=settings["beta_start"],
        beta_end=settings["beta_end"],
        prediction=settings["prediction"],
        loss_weight=settings["loss_weight"],
        device=device,
    )
    return unet.to(device).to(memory_format=torch.channels_last), diffusion


def restore(state: dict[str, Any], device: torch.device | str = "cpu", weights: str = "ema") -> tuple[UNet, Diffusion]:
    """The trained network, in evaluation mode, and the diffusion process of a checkpoint, on `device`.

    `state` is what `src.utils.checkpoint.load` returns; `weights` is "ema" for the averaged weights, "model" for those
    of the last step. Raises KeyError, RuntimeError or ValueError if they do not fit this version of the network.
    """
    unet, diffusion = build(state["settings"], device)
    unet.load_state_dict(state[weights])
    return unet.eval().requires_grad_(False), diffusion


class ImageNoise:
    """N(0, I) noise for the images `indices` of a seed, each of `shape` (C, H, W), with one random stream per image.

    Stream i depends on (seed, i) alone, mixed by SeedSequence. So the noise of image i is the same in every batch,
    beside any other images, and on every device: the numbers are drawn on the CPU.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.device = shape, device
        seeds = [int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0]) for i in indices]
        self.streams = [torch.Generator().manual_seed(number) for number in seeds]

    def __call__(self) -> Tensor:
        """The next noise of every stream, (B, C, H, W) float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.streams]).to(self.device)


def draw_classes(counts: Sequence[float], seed: int, indices: Sequence[int]) -> Tensor:
    """Draw y ~ p(y) for the images `indices` of a seed, (B,) int64; `counts` are the relative frequencies p(y).

    The class of image i depends on (seed, i) alone, and is independent of its noise.
    """
    # The first word of each SeedSequence seeds the noise. The upper 53 bits of the second give u, uniform in [0, 1).
    words = [int(np.random.SeedSequence((seed, i)).generate_state(2, np.uint64)[1]) for i in indices]
    u = np.array([word >> 11 for word in words]) / 2**53  # (B,)
    cumulative = np.cumsum(counts)  # (K,)
    return torch.from_numpy(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


class Inpainting(Diffusion):
    """A diffusion process in which some pixels of x_0 are known: there, the known value replaces the estimate.

    So the known pixels of x_t follow q(x_t | x_0), and the network, which sees them, fits the others to them. The
    inpainting of Song et al. 2023 (https://arxiv.org/abs/2303.01469) replaces the estimate in the same way.

    Args:
        diffusion: the process that the model was trained for.
        image: x_0, (C,H,W) in [-1, 1], on the device of the process.
        mask: True where x_0 is unknown, (1,H,W) bool, on the same device.
    """

    def __init__(self, diffusion: Diffusion, image: Tensor, mask: Tensor) -> None:
        vars(self).update(vars(diffusion))  # the same process, except for what it knows
        self.image, self.mask = image, mask

    def denoise(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x_0 where the mask is True, the known image elsewhere; (B,C,H,W)."""
        return torch.where(self.mask, super().denoise(network, x_t, t), self.image)


class Generator:
    """A network with a sampler, for generating images.

    Args:
        unet, diffusion: as returned by `restore`.
        sampler: a name in SAMPLERS; "consistency" for a distilled model, and for no other.
        steps: sampling steps, at most T (else ValueError); 0 means the sampler's default, or T if that is less.
        eta: noise of DDIM, from 0 (deterministic) to 1 (as DDPM); other samplers ignore it.
        precision: of the network's arithmetic; the sampler computes in float32.
        classes: the labels to generate in turn; empty for classes that are drawn.
        class_counts: relative frequencies p(y) of the classes. Without `classes`, each image is sampled from p(x) by
            drawing its class y from p(y), then x from p(x | y). Empty: such images have no class.
        guidance_scale: of classifier-free guidance; 1 = conditional prediction only, 0 = unconditional.
        image: to be changed, (C,H,W) in [-1, 1]; None for generation from noise alone.
        strength: how much of `image` is generated anew, from 0 to 1. Sampling starts from q(x_t | image) with t near
            strength · T instead of from x_T (SDEdit, Meng et al. 2022), and takes about strength · steps steps. 0
            returns the image, 1 starts from noise alone.
        mask: True where `image` is generated, (1,H,W) bool; its other pixels are kept. None for everywhere.
    """

    def __init__(
        self,
        unet: UNet,
        diffusion: Diffusion,
        sampler: str = "dpmpp_2m_sde",
        steps: int = 0,
        eta: float = 0.0,
        precision: torch.dtype = torch.float32,
        classes: Sequence[int] = (),
        class_counts: Sequence[float] = (),
        guidance_scale: float = 1.0,
        image: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
    ) -> None:
        self.unet, self.diffusion, self.precision = unet, diffusion, precision
        self.sampler, self.guidance_scale = sampler, guidance_scale
        self.classes, self.class_counts = classes, class_counts
        self.shape = (unet.channels, unet.image_size, unet.image_size)
        self.device = next(unet.parameters()).device
        self.steps = steps or min(SAMPLERS[sampler].steps, diffusion.time_steps)
        self.options = {"eta": eta} if sampler == "ddim" else {}
        if guidance_scale != 1 and unet.label is None:
            raise ValueError("--guidance_scale is for models that were trained with classes")
        if image is None and (strength != 1 or mask is not None):
            raise ValueError("strength and mask need an image")
        self.grid = time_grid(diffusion, self.steps, strength, SAMPLERS[sampler].power)
        self.image = None if image is None else image.to(self.device)
        if self.image is not None and mask is not None:
            self.diffusion = Inpainting(diffusion, self.image, mask.to(self.device))

    def images(self, seed: int, indices: Sequence[int], on_step: Callable[[Tensor], None] | None = None) -> Tensor:
        """Generate one batch, the images `indices` of a seed, uint8 (B,C,H,W) on the CPU.

        Image i does not depend on the rest of the batch, except for rounding: on a CPU in float32, a pixel may change
        by one grey level. `on_step` is called with every x_t (B,C,H,W), the last of which is x_0.
        """
        draw = ImageNoise(seed, indices, self.shape, self.device)
        return self._sample(draw(), draw, self.labels(seed, indices), on_step)

    def labels(self, seed: int, indices: Sequence[int]) -> Tensor | None:
        """The class of each of these images, (B,) int64: `classes` in turn, or drawn. None without classes."""
        if self.classes:
            return torch.tensor([self.classes[i % len(self.classes)] for i in indices], device=self.device)
        if not len(self.class_counts):
            return None
        return draw_classes(self.class_counts, seed, indices).to(self.device)

    def interpolate(
        self, seed: int, frames: int, batch_size: int, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Images between images 0 and 1 of a seed, uint8 (frames,C,H,W), all of the class of image 0.

        x_T and all later noise lie on the arcs between those of the two images. So neighbouring frames are similar,
        the first frame is image 0, and the last is image 1 if that has the same class. `on_step` is that of `images`.
        """

        def images(weights: Tensor) -> Tensor:
            noise = ImageNoise(seed, range(2), self.shape, self.device)

            def draw() -> Tensor:
                first, last = noise()
                return slerp(first, last, weights)  # (F, C, H, W)

            return self._sample(draw(), draw, self.labels(seed, [0] * len(weights)), on_step)

        return torch.cat([images(w) for w in torch.linspace(0, 1, frames, device=self.device).split(batch_size)])

    def _sample(
        self, x_T: Tensor, draw: Draw, y: Tensor | None, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        x_t = start = self._start(x_T)  # the result if there are no steps
        run = SAMPLERS[self.sampler].run
        for x_t in run(self.network(y), self.diffusion, start, draw, self.grid, **self.options):
            if on_step is not None:
                on_step(x_t)
        return to_uint8(x_t).cpu()

    def _start(self, x_T: Tensor) -> Tensor:
        """x_t for the first t of the grid: the noise x_T itself, or the image with this noise."""
        t = self.grid[0][0] if self.grid else -1
        if self.image is None or t == self.diffusion.time_steps - 1:
            return x_T
        return self.diffusion.q_sample(self.image, torch.tensor([t]), x_T)  # (B, C, H, W); the image for t = -1

    def network(self, y: Tensor | None = None) -> Network:
        """The U-Net as a function of x_t and t, with classifier-free guidance towards the classes y (B,)."""

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            with autocast(self.device, self.precision):
                if y is None or self.guidance_scale == 1:
                    return self.unet(x_t, t, y).float()  # (B, C, H, W)
                no_class = torch.full_like(y, self.unet.no_class)
                times = t if len(t) == 1 else torch.cat([t, t])
                both = self.unet(torch.cat([x_t, x_t]), times, torch.cat([y, no_class])).float()  # (2B, C, H, W)
            conditional, unconditional = both.chunk(2)
            # Ho & Salimans 2022, eq. 6, with guidance_scale = 1 + w
            return unconditional + self.guidance_scale * (conditional - unconditional)

        return predict


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation from a (weight 0) to b (weight 1), Shoemake 1985: (C,H,W), (F,) → (F,C,H,W).

    High-dimensional Gaussian noise lies close to a sphere. Linear interpolation leaves it: halfway, the norm is only
    0.7 times that of the noise on which the network was trained.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights[:, None, None, None]
    return (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()


def to_uint8(x: Tensor) -> Tensor:
    """Round images in [-1, 1] to 256 grey levels, uint8 of the same shape."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
