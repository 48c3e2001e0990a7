"""Who is measured by benchmark.py and race.py: this repository, and others where they are installed."""

import logging
from collections.abc import Callable, Iterator
from copy import deepcopy
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
from src.diffusion import Diffusion
from src.model import autocast
from src.scores import inception
from src.training import learning_rate
from src.utils import devices, flags, settings
from src.utils.distributed import World

log = logging.getLogger("benchmark")


Batches = Iterator[tuple[Tensor, Tensor]]  # x0 (B,C,H,W) in [-1, 1] and classes (B,)


@dataclass
class Contestant:
    """A network, its training step on images x0 in [-1, 1] and their classes, and its prediction from (x_t, t).

    `diffusion` is the process that it is trained for; `averaged` returns the network with averaged weights, with the
    attributes that `Generator` needs.
    """

    name: str
    network: nn.Module
    train_step: Callable[[Tensor, Tensor], object]
    predict: Callable[[Tensor, Tensor], Tensor]
    diffusion: Diffusion
    averaged: Callable[[], nn.Module]
    precision: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def tasks(self, batches: Batches, x_t: Tensor) -> dict[str, Callable[[], object]]:
        """What is timed: a step on the next of `batches`, and a prediction for x_t (B,C,H,W) at various timesteps."""
        t = torch.arange(len(x_t), device=x_t.device)
        return {
            f"training, {self.name}": lambda: self.train_step(*next(batches)),
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
    """train.py's own, with config.py's settings but for `changes`, on as much noise as Fashion-MNIST has images."""
    args = flags.Parser(config, "", settings.of_script("train")).parse_args([])
    vars(args).update(changes)
    data = noise(images, args.channels, args.image_size, args.image_size), torch.zeros(images, dtype=torch.long)
    with mock.patch("src.data.datasets.load", return_value=data):
        return train.Trainer(args, World(devices.pick_device(args.device)))


@cache
def noise(*shape: int) -> Tensor:
    """Images as bytes (N,C,H,W); speed does not depend on what they show."""
    return torch.randint(256, shape, dtype=torch.uint8)


def batches(run: train.Trainer) -> Batches:
    """The batches of a training, epoch after epoch."""
    for epoch in count():
        yield from datasets.batches(run.images, run.labels, run.args.batch_size, run.args.seed, epoch)


def ours(name: str, run: train.Trainer) -> Contestant:
    """This repository: train.py's own step."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        with autocast(run.device, run.precision):
            return run.learner.model(x_t, t)

    def train_step(x0: Tensor, y: Tensor) -> object:
        args, step = run.args, run.learner.steps + 1
        return run.learner.step(
            x0, y, learning_rate(step, run.steps, args.learning_rate, args.lr_warmup, args.lr_decay)
        )

    averaged = lambda: run.learner.ema.model  # noqa: E731
    return Contestant(name, run.learner.model, train_step, predict, run.diffusion, averaged, run.precision)


class Unconditional(nn.Module):
    """A peer's network of (x_t, t) with the attributes and arguments of our U-Net without classes."""

    channels, image_size, label = 1, 32, None

    def __init__(self, network: nn.Module, predict: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.predict = network, predict

    def forward(self, x_t: Tensor, t: Tensor, _y: None = None) -> Tensor:
        """The prediction (B,C,H,W) for x_t (B,C,H,W) and t (B,) or (1,)."""
        return self.predict(self.network, x_t, t.expand(len(x_t)))


def denoising_diffusion_pytorch(device: torch.device) -> Contestant:
    """The package of that name: its defaults at our widths; optimiser, clipping and average as in its Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    diffusion = GaussianDiffusion(Unet(dim=32, dim_mults=(1, 2, 4, 8), channels=1), image_size=32).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)

    process = Diffusion(1000, "cosine", prediction="v", device=device)
    process.alpha_bar = diffusion.alphas_cumprod.double().cpu()  # its own schedule is a sigmoid

    def train_step(x0: Tensor, _y: Tensor) -> None:
        diffusion((x0.to(device) + 1) / 2).backward()  # it takes images in [0, 1]
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    averaged = lambda: Unconditional(ema.ema_model.model, lambda unet, x_t, t: unet(x_t, t))  # noqa: E731
    return Contestant("denoising-diffusion-pytorch", diffusion.model, train_step, diffusion.model, process, averaged)


def diffusers(device: torch.device) -> Contestant:
    """UNet2DModel with our widths, attention at 16×16 and 8×8; optimiser and average of the unconditional example."""
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

    def train_step(x0: Tensor, _y: Tensor) -> None:
        x0 = x0.to(device)
        eps, t = torch.randn_like(x0), torch.randint(1000, (len(x0),), device=device)
        x_t = scheduler.add_noise(x0, eps, t)
        nn.functional.mse_loss(unet(x_t, t).sample, eps).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    def averaged() -> nn.Module:
        ema.copy_to((copy := deepcopy(unet)).parameters())
        return Unconditional(copy.eval(), lambda network, x_t, t: network(x_t, t).sample)

    process = Diffusion(1000, "linear", prediction="noise", device=device)  # the same as that of DDPMScheduler()
    return Contestant("diffusers", unet, train_step, lambda x_t, t: unet(x_t, t).sample, process, averaged)


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


def peers(device: torch.device) -> list[Contestant]:
    """Those of PEERS that are installed."""
    found = []
    for peer in PEERS:
        try:
            found.append(peer(device))
        except ImportError as error:
            log.warning("left out: %s (%s)", peer.__name__, error)
    return found


def name_of(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def gather(default: train.Trainer, settings: dict[str, Any], with_compiled: bool) -> list[Contestant]:
    """This repository, first by `default`, then in the other precision and compiled; and whichever peers are there."""
    name = f"this repository, {name_of(default.precision)}"
    other = "float32" if default.precision != torch.float32 else "bfloat16"
    found = [ours(name, default), ours(f"this repository, {other}", trainer(**settings, precision=other))]
    if with_compiled:
        found.append(ours(f"{name}, compiled", trainer(**settings, compile=True)))
    return found + peers(default.device)
