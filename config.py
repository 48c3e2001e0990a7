"""Every default of the project, once. Change one here, or for one run with its flag: BATCH_SIZE is --batch_size.

The comment beside a constant is its --help text.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

# Data
DATASET = "fashion-mnist"  # fashion-mnist, or fashion-mnist-tiny: 1,500 of its images, for tests
VAL_SIZE = 2000  # training images held out for the validation loss
IMAGE_SIZE = 32  # pixels a side; the 28×28 images are padded with black
CHANNELS = 1  # 1 = grayscale

# Training
BATCH_SIZE = 64  # images trained on, or generated, at a time
LEARNING_RATE = 1e-3  # Adam's step size
EPOCHS = 200  # passes over the training images
GRAD_CLIP = 1.0  # largest norm of the gradient
EMA_DECAY = 0.995  # weight of the past in the moving average of the weights, updated every step
SEED = 0  # of weights, data order and noise
PRECISION = "auto"  # of training: float32, bfloat16, or auto: bfloat16 where there are matrix units for it

# U-Net
UNET_DIM = 32  # channels at full resolution
UNET_DIM_MULTS = [1, 2, 4, 8]  # channels of each level, as multiples of UNET_DIM

# Diffusion
TIME_STEPS = 1000  # noise levels
SCHEDULE_TYPE = "cosine"  # noise schedule: linear or cosine
BETA_START = 1e-4  # first beta of the linear schedule
BETA_END = 0.02  # last beta of the linear schedule
PREDICTION = "v"  # what the network predicts: noise, or v, a mixture of noise and image

# Sampling
NUM_SAMPLES = 64  # images to generate
SAMPLER = "ddim"  # ddpm (ancestral) or ddim
STEPS = 0  # network evaluations an image; 0 = TIME_STEPS for ddpm, 50 for ddim
ETA = 0.0  # DDIM's share of fresh noise: 0 = deterministic, 1 = as much as DDPM
INTERP_STEPS = 10  # frames of an interpolation, both ends included
EVAL_SAMPLES = 1000  # eval.py's default for --num_samples

# Saving and logging
SAVE_EVERY = 5  # epochs between writes of latest.pth
SAVE_MINUTES = 10.0  # most that is lost to a crash: latest.pth is written within an epoch, too
SAMPLE_EVERY = 10  # epochs between grids of samples
LOG_EVERY = 50  # steps between TensorBoard scalars
DEVICE = "auto"  # auto, cpu, cuda, cuda:1 …

# Paths
DATA_PATH = "./data/fashion-mnist"  # the data set; fetched here if absent
CHECKPOINT_PATH = "./checkpoints"  # best.pth, latest.pth, final.pth
OUTPUT_PATH = "./outputs"  # pictures and scores
LOG_PATH = "./logs"  # TensorBoard's files, in its folder tensorboard/

# What a value must be: a test and its wording. A setting that is absent here has no limits beyond its type.
POSITIVE = (lambda v: v >= 1, "at least 1")
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "VAL_SIZE": POSITIVE,
    "IMAGE_SIZE": POSITIVE,
    "CHANNELS": (lambda v: v == 1, "1: the data sets are grayscale"),
    "BATCH_SIZE": POSITIVE,
    "LEARNING_RATE": (lambda v: 0 < v < math.inf, "a positive number, such as 1e-3"),
    "EPOCHS": POSITIVE,
    "GRAD_CLIP": (lambda v: v > 0, "a positive number (inf = never clip)"),
    "EMA_DECAY": (lambda v: 0 <= v < 1, "at least 0 and below 1, such as 0.995"),
    "SEED": (lambda v: 0 <= v < 2**63, "from 0 to 2^63 - 1"),
    "PRECISION": (lambda v: v in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
    "UNET_DIM": (lambda v: v >= 8 and v % 8 == 0, "a positive multiple of 8, the groups of GroupNorm"),
    "UNET_DIM_MULTS": (lambda v: len(v) > 0 and min(v) >= 1, "one or more whole numbers of at least 1"),
    "TIME_STEPS": (lambda v: v >= 2, "at least 2"),
    "SCHEDULE_TYPE": (lambda v: v in ("linear", "cosine"), "linear or cosine"),
    "BETA_START": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "BETA_END": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "PREDICTION": (lambda v: v in ("noise", "v"), "noise or v"),
    "NUM_SAMPLES": POSITIVE,
    "SAMPLER": (lambda v: v in ("ddpm", "ddim"), "ddpm or ddim"),
    "STEPS": (lambda v: v >= 0, "at least 1 (or 0 for the sampler's own default)"),
    "ETA": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "INTERP_STEPS": (lambda v: v >= 2, "at least 2, the two ends"),
    "SAVE_EVERY": POSITIVE,
    "SAVE_MINUTES": (lambda v: v >= 0, "0 (after every step) or more"),
    "SAMPLE_EVERY": POSITIVE,
    "LOG_EVERY": POSITIVE,
    "DEVICE": (lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?", v) is not None, "auto, cpu, cuda or cuda:N"),
    "DATA_PATH": (bool, "a directory"),
    "CHECKPOINT_PATH": (bool, "a directory"),
    "OUTPUT_PATH": (bool, "a directory"),
    "LOG_PATH": (bool, "a directory"),
}

# Rules between settings: what must hold wherever all of its settings are present.
RELATIONS: list[tuple[tuple[str, ...], Callable[..., bool], str]] = [
    (("BETA_START", "BETA_END"), lambda start, end: start < end, "BETA_START must be below BETA_END"),
    (
        ("IMAGE_SIZE", "UNET_DIM_MULTS"),
        lambda size, mults: size % 2 ** (len(mults) - 1) == 0,
        "IMAGE_SIZE must be divisible by 2^(levels - 1), for each level but the last halves the image",
    ),
    (("STEPS", "TIME_STEPS"), lambda steps, time_steps: steps <= time_steps, "STEPS must be at most TIME_STEPS"),
    (
        ("SCHEDULE_TYPE", "BETA_START", "BETA_END"),
        lambda schedule, *ends: schedule == "linear" or ends == (BETA_START, BETA_END),
        "BETA_START and BETA_END are for SCHEDULE_TYPE linear only",
    ),
    (("SAMPLER", "ETA"), lambda sampler, eta: sampler == "ddim" or eta == 0, "ETA is for SAMPLER ddim only"),
]

# Settings that a resumed run may change; every other one shapes its weights and must stay.
FREE_ON_RESUME = {
    "EPOCHS", "LEARNING_RATE", "GRAD_CLIP", "DEVICE", "SAVE_EVERY", "SAVE_MINUTES", "SAMPLE_EVERY", "LOG_EVERY",
    "NUM_SAMPLES", "SAMPLER", "STEPS", "ETA",
    "DATA_PATH", "CHECKPOINT_PATH", "OUTPUT_PATH", "LOG_PATH",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with this file's constants as flags and errors of one line."""

    def __init__(self, description: str, settings: Iterable[str], **defaults: Any) -> None:
        """Flags for the constants named in `settings`; `defaults` replaces a constant's value for one script."""
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--quiet", action="store_true", help="no progress, only warnings, errors and results")
        comments = _comments()
        for name in settings:
            value = defaults.get(name, globals()[name])
            many = isinstance(value, list)
            kind = type(value[0]) if many else type(value)
            self.add_argument(
                f"--{name.lower()}",
                type=kind,
                nargs="+" if many else None,
                default=value,
                metavar=kind.__name__,
                help=f"{comments[name]} (default: {' '.join(map(str, value)) if many else value})",
            )

    def add_checkpoint(self) -> None:
        self.add_argument(
            "--checkpoint",
            default=f"{CHECKPOINT_PATH}/best.pth",
            metavar="FILE",
            help="the trained model; it carries its own settings (default: %(default)s)",
        )

    def add_output_dir(self, folder: str) -> None:
        self.add_argument(
            "--output_dir",
            default=f"{OUTPUT_PATH}/{folder}",
            metavar="DIR",
            help="where to write (default: %(default)s)",
        )

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        """Parse and check; every setting out of range is reported, with status 2."""
        namespace = super().parse_args(*args, **kwargs)
        found = problems(vars(namespace))
        if found:
            self.error("; ".join(found))
        return namespace

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with these settings (lower-case names), a sentence each."""
    values = {name.upper(): value for name, value in values.items()}
    found = [
        f"{name} is {values[name]!r}, but must be {wording}"
        for name, (holds, wording) in RULES.items()
        if name in values and not holds(values[name])
    ]
    if found:
        return found  # a relation between settings that are themselves wrong would only confuse
    return [
        f"{wording} ({', '.join(f'{name} is {values[name]!r}' for name in names)})"
        for names, holds, wording in RELATIONS
        if values.keys() >= set(names) and not holds(*(values[name] for name in names))
    ]


def changed_settings(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings (lower-case names) that differ and may not on resume, a sentence each with both values."""
    return [
        f"{name.upper()} was {saved[name]!r} and is now {wanted[name]!r}"
        for name in saved
        if name in wanted and saved[name] != wanted[name] and name.upper() not in FREE_ON_RESUME
    ]


def _comments() -> dict[str, str]:
    """The comment beside each constant of this file, read from its source."""
    lines = re.findall(r"^([A-Z_]+) = .+?  # (.+)$", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)
    return {name: comment.replace("%", "%%") for name, comment in lines}
