"""Where the parts meet: settings → U-Net and diffusion, checkpoint → images, held-out images → loss.

This is the one file of src that knows several siblings, so that no script has to assemble them twice.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import checkpoint
from src.dataset import ImageFiles, normalise
from src.diffusion import Diffusion, Network
from src.distributed import World
from src.errors import SettingError, UserError
from src.model import UNet
from src.samplers import SAMPLERS
from src.utils import ImageNoise, autocast, to_uint8

log = logging.getLogger(__name__)

DEFAULT_STEPS = {"ddpm": 50, "ddim": 50, "dpmpp_2m": 20, "dpmpp_2m_sde": 30}  # measured: see the README

# Settings that older checkpoints do not record, with the value that describes their network.
UNRECORDED = {"encoder_attention": False}


def build(settings: Mapping[str, Any], device: torch.device) -> tuple[UNet, Diffusion]:
    """A fresh U-Net and its diffusion from settings, as a checkpoint carries them.

    They are config.py's, and "classes": the names of those that the network is told, none for the plain model.
    """
    unet = UNet(
        settings["image_size"],
        settings["channels"],
        settings["unet_dim"],
        settings["unet_dim_mults"],
        len(settings["classes"]),
        settings["dropout"],
        settings["encoder_attention"],
    )
    diffusion = Diffusion(
        settings["time_steps"],
        settings["schedule_type"],
        settings["beta_start"],
        settings["beta_end"],
        settings["prediction"],
        settings["loss_weight"],
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
        settings = UNRECORDED | state["settings"]
        unet, diffusion = build(settings, device)
        unet.load_state_dict(state[weights])
    except (KeyError, RuntimeError, ValueError) as error:  # settings or weights that this version does not know
        raise checkpoint.other_version(path) from error
    return unet.eval().requires_grad_(False), diffusion, settings


DATA_LAYERS = {"conv_in", "conv_out", "label"}  # whose shapes depend on the channels and classes of the data
SHAPE_SETTINGS = "image_size channels unet_dim unet_dim_mults encoder_attention classes".split()
OBJECTIVE_SETTINGS = "prediction schedule_type time_steps".split()


def initialise(unet: UNet, settings: Mapping[str, Any], path: Path, ignore_mismatched_sizes: bool = False) -> str:
    """Start `unet` from the averaged weights of another checkpoint, or of a weights.pth.

    Args:
        unet: a fresh network, as `build` makes it from `settings`.
        settings: of the new training.
        path: the checkpoint.
        ignore_mismatched_sizes: let the layers that depend on the data (first and last convolution, class embedding)
            keep their random weights where their shape differs. Other layers have to fit.

    Returns:
        The SHA-256 of the file.

    Raises:
        UserError: see `checkpoint.load`; or the file holds no averaged weights.
        SettingError: the weights are those of another network.
    """
    state = checkpoint.load(path)
    if "ema" not in state or "settings" not in state:
        raise UserError(f"{path} holds no averaged weights: give another file as --init_from")
    theirs, own = state["ema"], unet.state_dict()
    fitting = {name: weight for name, weight in theirs.items() if name in own and weight.shape == own[name].shape}
    misfits = {name.split(".")[0] for name in (theirs.keys() | own.keys()) - fitting.keys()}
    before = UNRECORDED | state["settings"]
    if misfits and not (ignore_mismatched_sizes and misfits <= DATA_LAYERS):
        changes = [
            f"{name.upper()} is {before.get(name)} there and {settings[name]} here"
            for name in SHAPE_SETTINGS
            if before.get(name) != settings[name]
        ]
        remedy = "use the same values"
        if misfits <= DATA_LAYERS:
            remedy += f", or add --ignore_mismatched_sizes to start {', '.join(sorted(misfits))} from random weights"
        raise SettingError(f"--init_from {path} is another network: {'; '.join(changes) or 'its layers'}: {remedy}")
    for name in OBJECTIVE_SETTINGS:
        if before.get(name) != settings[name]:
            log.warning("%s was trained with %s %s, not %s", path, name.upper(), before.get(name), settings[name])
    unet.load_state_dict(own | fitting)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pick_classes(asked: Sequence[str], known: Sequence[str]) -> list[int]:
    """The labels of the classes that somebody asked for by name or else by number; "all" alone is all, in order.

    Raises:
        SettingError: a class is not known, or the model knows none.
    """
    if asked and not known:
        raise SettingError("--class is for models that were trained with classes: this one was told none")
    if list(asked) == ["all"]:
        return list(range(len(known)))
    labels = {str(label): label for label in range(len(known))} | {_plain(name): i for i, name in enumerate(known)}
    labels |= {name: label for label, name in enumerate(known)}  # exactly so, before any other spelling
    found = [labels.get(name, labels.get(_plain(name))) for name in asked]
    for name, label in zip(asked, found, strict=True):
        if label is None:
            choice = f"choose from {', '.join(known)} or their numbers, or give all and nothing else"
            raise SettingError(f"--class {name} is unknown: {choice}")
    return found


def _plain(name: str) -> str:
    """A name as people may spell it: without capitals, spaces or underscores."""
    return name.lower().replace(" ", "-").replace("_", "-")


@torch.inference_mode()
def validation_loss(
    unet: UNet,
    diffusion: Diffusion,
    images: Tensor | ImageFiles,
    seed: int,
    batch_size: int,
    on_batch: Callable[[], None],
    world: World,
) -> float:
    """The loss on images (N,C,H,W) uint8 with fixed eps and t, which are spread evenly over all timesteps.

    Each process takes its share of every batch, and all get the same result.

    The network is not told their classes, so the loss compares with that of a network that knows of none.
    """
    n, device = len(images), next(unet.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(seed)
    for first, part in zip(range(0, n, batch_size), images.split(batch_size), strict=True):
        x0 = normalise(part)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.arange(first, first + len(x0)) * diffusion.time_steps // n
        mine = world.share(len(t))
        if len(t[mine]):  # else there are fewer images than processes
            total += diffusion.loss(unet, *(z[mine].to(device) for z in (x0, t, eps))) * len(t[mine])
        on_batch()
    return (world.mean(total) * world.size / n).item()


class Generator:
    """A network and a sampler, ready to make images.

    Args:
        unet, diffusion: as `build` and `restore` return them.
        sampler: a name in SAMPLERS.
        steps: network evaluations an image; 0 means DEFAULT_STEPS, or all timesteps if those are fewer.
        eta: DDIM's share of fresh noise, 0 to 1; the other samplers have none to set.
        precision: of the network's arithmetic; the sampler's own stays float32.
        world: the processes among which every batch is divided; each gets all images in the end.
        classes: the labels of the classes to ask for in turn; none, for images of any.
        guidance_scale: how far to go from the prediction without a class, 0, past the one with it, 1.

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
        world: World | None = None,
        classes: Sequence[int] = (),
        guidance_scale: float = 1.0,
    ) -> None:
        self.unet, self.diffusion, self.precision = unet, diffusion, precision
        self.classes, self.guidance_scale = classes, guidance_scale
        self.shape = (unet.channels, unet.image_size, unet.image_size)
        self.device = next(unet.parameters()).device
        self.world = world or World(self.device)
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
            indices = range(first, min(first + batch_size, count))
            mine = self.world.equal_share(indices)
            draw = ImageNoise(seed, mine, self.shape, self.device)
            yield self.world.gather(self._follow(draw(), draw, self.labels(mine), on_step))[: len(indices)]

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """The classes (B,) that the images of these indices are asked to be of: each in turn; None without classes."""
        if not self.classes:
            return None
        return torch.tensor([self.classes[i % len(self.classes)] for i in indices], device=self.device)

    def interpolate(self, seed: int, frames: int, batch_size: int) -> Tensor:
        """From image 0 of a seed to image 1 in `frames` images, ends included, uint8 (frames,C,H,W).

        All frames are of the first class, if any is asked for.
        Meant for a deterministic sampler: only there are the ends images 0 and 1 of `generate`, and neighbours alike.
        """
        draw = ImageNoise(seed, range(2), self.shape, self.device)
        noises = slerp(*draw(), torch.linspace(0, 1, frames, device=self.device))  # (frames, C, H, W)
        return torch.cat([self._follow(x, draw, self.labels([0] * len(x))) for x in noises.split(batch_size)])

    def _follow(
        self, x_T: Tensor, draw: ImageNoise, y: Tensor | None, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        network = self.network(y)
        for x_t in SAMPLERS[self.sampler](network, self.diffusion, x_T, draw, self.steps, **self.options):
            if on_step is not None:
                on_step(x_t)
        return to_uint8(x_t).cpu()

    def network(self, y: Tensor | None = None) -> Network:
        """The U-Net as samplers call it, for images of classes y (B,), with classifier-free guidance."""

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            with autocast(self.device, self.precision):
                if y is None or self.guidance_scale == 1:
                    return self.unet(x_t, t, y).float()  # (B, C, H, W)
                no_class = torch.full_like(y, self.unet.no_class)
                both = self.unet(torch.cat([x_t, x_t]), t, torch.cat([y, no_class])).float()  # (2B, C, H, W)
            told, untold = both.chunk(2)
            return untold + self.guidance_scale * (told - untold)  # Ho & Salimans 2022, eq. 6, with scale = 1 + w

        return predict


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985) from a at weight 0 to b at weight 1: (C,H,W), (F,) → (F,C,H,W).

    Gaussian noise in many dimensions lies near a sphere. A straight line between two noises leaves it: its middle
    has 0.7 of their norm, unlike any noise that the network was trained on. The arc stays on it.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights[:, None, None, None]
    return (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()
