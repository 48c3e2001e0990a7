"""Who is measured by benchmark.py: this repository in its variants, and others where they are installed."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.image.fid import FrechetInceptionDistance

import config
import train
from src.data import datasets
from src.model import autocast
from src.scores import inception
from src.utils import devices, flags, settings
from src.utils.distributed import World

log = logging.getLogger("benchmark")


@dataclass
class Contestant:
    """A network, its training step on images x0 in [-1, 1], and its prediction from (x_t, t)."""

    name: str
    network: nn.Module
    train_step: Callable[[Tensor], object]
    predict: Callable[[Tensor, Tensor], Tensor]
    precision: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def tasks(self, batches: Iterator[Tensor], x_t: Tensor) -> dict[str, Callable[[], object]]:
        """What is timed: a step on the next of `batches`, and a prediction for x_t (B,C,H,W) at various timesteps."""
        t = torch.arange(len(x_t), device=x_t.device)
        return {
            f"training, {self.name}": lambda: self.train_step(next(batches)),
            f"inference, {self.name}": torch.inference_mode()(lambda: self.predict(x_t, t)),
        }

    def gflop(self, x_t: Tensor) -> float:
        """Billions of operations in a prediction for one image like x_t (B,C,H,W)."""
        x_t, t = x_t[:1], torch.zeros(1, dtype=torch.long, device=x_t.device)
        counter = FlopCounterMode(display=False)
        # The counter sees single operations: attention must be spelled out as two products, and nothing compiled.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), counter:
            self.predict(x_t, t)
        return counter.get_total_flops() / 1e9


def trainer(images: int = 60_000, **changes: Any) -> train.Trainer:
    """train.py's own, with config.py's settings but for `changes`, on as many images as Fashion-MNIST has."""
    args = flags.Parser(config, "", settings.of_script("train")).parse_args([])
    vars(args).update(changes)
    data = noise(images, args.channels, args.image_size, args.image_size), torch.zeros(images, dtype=torch.long)
    with mock.patch("src.data.datasets.load", return_value=data):
        return train.Trainer(args, World(devices.pick_device(args.device)))


@cache
def noise(*shape: int) -> Tensor:
    """Images as bytes (N,C,H,W); speed does not depend on what they show."""
    return torch.randint(256, shape, dtype=torch.uint8)


def batches(run: train.Trainer) -> Iterator[Tensor]:
    """The x0 (B,C,H,W) of a training, epoch after epoch."""
    for epoch in count():
        drawn = datasets.batches(run.images, run.labels, run.args.batch_size, run.args.seed, epoch)
        yield from (x0 for x0, _ in drawn)


def ours(name: str, run: train.Trainer) -> Contestant:
    """This repository: train.py's own step."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        with autocast(run.device, run.precision):
            return run.learner.model(x_t, t)

    def train_step(x0: Tensor) -> object:
        y = torch.zeros(len(x0), dtype=torch.long, device=x0.device)  # any class will do
        return run.learner.step(x0, y, run.args.learning_rate)

    return Contestant(name, run.learner.model, train_step, predict, run.precision)


def denoising_diffusion_pytorch(device: torch.device) -> Contestant:
    """The package of that name: its defaults at our widths; optimiser, clipping and average as in its Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    diffusion = GaussianDiffusion(Unet(dim=32, dim_mults=(1, 2, 4, 8), channels=1), image_size=32).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)

    def train_step(x0: Tensor) -> None:
        diffusion((x0 + 1) / 2).backward()  # it takes images in [0, 1]
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return Contestant("denoising-diffusion-pytorch", diffusion.model, train_step, diffusion.model)


def diffusers(device: torch.device) -> Contestant:
    """UNet2DModel with our widths, attention at 16×16 and 8×8; trained as in diffusers' unconditional example."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    unet = UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, 128, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).to(device)  # fmt: skip
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def train_step(x0: Tensor) -> None:
        eps, t = torch.randn_like(x0), torch.randint(1000, (len(x0),), device=device)
        x_t = scheduler.add_noise(x0, eps, t)
        nn.functional.mse_loss(unet(x_t, t).sample, eps).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return Contestant("diffusers", unet, train_step, lambda x_t, t: unet(x_t, t).sample)


def scorers(device: torch.device) -> dict[str, Callable[[Tensor], object]]:
    """What looks at generated images (B,C,H,W) uint8 for FID: this repository, and torchmetrics as it comes."""
    path = inception.weights()
    extractor = inception.Extractor(path).to(device)
    fid = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(path)).to(device)
    return {
        "this repository": extractor,
        "torchmetrics": lambda images: fid.update(images.to(device).expand(-1, 3, -1, -1), real=False),
    }


PEERS = (denoising_diffusion_pytorch, diffusers)


def name_of(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def gather(default: train.Trainer, settings: dict[str, Any], with_compiled: bool) -> list[Contestant]:
    """This repository, first by `default`, then in the other precision and compiled; and whichever peers are there."""
    name = f"this repository, {name_of(default.precision)}"
    other = "float32" if default.precision != torch.float32 else "bfloat16"
    found = [ours(name, default), ours(f"this repository, {other}", trainer(**settings, precision=other))]
    if with_compiled:
        found.append(ours(f"{name}, compiled", trainer(**settings, compile=True)))
    for peer in PEERS:
        try:
            found.append(peer(default.device))
        except ImportError as error:
            log.warning("left out: %s (%s)", peer.__name__, error)
    return found
