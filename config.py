"""Every default of the project, once. Change one here, or for one run with its flag: BATCH_SIZE is --batch_size.

The annotation of a constant is the type of its flag, and the comment beside it is its --help text.
"""

import re
from collections.abc import Callable
from typing import Any

# Data
DATASET: str = "fashion-mnist"  # or fashion-mnist-tiny (for tests), mnist, kmnist, cifar10, folder (your own images)
VAL_SIZE: int = 2000  # training images held out for the validation loss
IMAGE_SIZE: int = 32  # pixels a side; 28×28 images are padded with black, a folder's are cropped and resized
CHANNELS: int = 1  # 1 = grayscale, 3 = colour: the default of cifar10 and folder

# Training
BATCH_SIZE: int = 64  # images at a time, trained on or generated
LEARNING_RATE: float = 1e-3  # Adam's step size, at its highest
LR_WARMUP: int = 0  # steps over which the learning rate rises to that
LR_DECAY: float = 0.0  # last share of the steps, 0 to 1, over which it falls to 0: 1 = from the start, 0 = never
ADAM_BETA2: float = 0.999  # weight of the past in Adam's average of squared gradients
ACCUMULATE: int = 1  # parts in which a batch goes through the network, where all of it does not fit into memory
EPOCHS: int = 200  # passes over the training images
GRAD_CLIP: float = 1.0  # largest norm of the gradient
EMA_DECAY: float = 0.995  # weight of the past in the moving average of the weights, updated every step
SEED: int = 0  # of weights, data order and noise
PRECISION: str = "auto"  # of the network: float32, bfloat16, or auto: bfloat16 where the device is fast in it
DROPOUT: float = 0.0  # share of hidden values forgotten in training
COMPILE: bool = False  # of training: let torch.compile fuse the network; costs a minute or two at the start

# U-Net
UNET_DIM: int = 32  # channels at full resolution
UNET_DIM_MULTS: list[int] = [1, 2, 4, 8]  # channels of each level, as multiples of UNET_DIM
ENCODER_ATTENTION: bool = True  # self-attention at 16×16 and 8×8 on the way down, too, not only on the way up

# Classes
CLASS_CONDITIONAL: bool = True  # tell the network the class of an image, so that it can be asked for one
CLASS_DROPOUT: float = 0.1  # share of the images whose class it is not told, so that it can do without
GUIDANCE_SCALE: float = 1.0  # how much a class counts in sampling: 1 = as it was learnt, more = more typical

# Diffusion
TIME_STEPS: int = 1000  # noise levels
SCHEDULE_TYPE: str = "cosine"  # noise schedule: linear or cosine
BETA_START: float = 1e-4  # first beta of the linear schedule
BETA_END: float = 0.02  # last beta of the linear schedule
PREDICTION: str = "v"  # what the network predicts: noise, x0 (the image), or v, a mixture of the two
LOSS_WEIGHT: str = "uniform"  # of the timesteps: uniform, or min_snr, which counts less where little noise is
TIME_SAMPLING: str = "stratified"  # of training timesteps: stratified, evenly over every batch, or uniform

# Sampling
NUM_SAMPLES: int = 64  # images to generate
SAMPLER: str = "dpmpp_2m_sde"  # with fresh noise in every step: ddpm, dpmpp_2m_sde; deterministic: ddim, dpmpp_2m
STEPS: int = 0  # of the sampler, TIME_STEPS at most; 0 = its own number: 50, of dpmpp_2m_sde 30, of dpmpp_2m 20
ETA: float = 0.0  # DDIM's share of fresh noise: 0 = deterministic, 1 = as much as DDPM
INTERP_STEPS: int = 10  # frames of an interpolation, both ends included
SAMPLE_BATCH: int = 64  # sample.py's and eval.py's default for --batch_size, whatever a model was trained with
EVAL_SAMPLES: int = 1000  # eval.py's default for --num_samples

# Saving and logging
SAVE_EVERY: int = 5  # epochs between writes of latest.pth
SAVE_MINUTES: float = 10.0  # most that is lost to a crash: latest.pth is written within an epoch, too
SAMPLE_EVERY: int = 10  # epochs between grids of samples
LOG_EVERY: int = 50  # steps between TensorBoard scalars
DEVICE: str = "auto"  # auto, cpu, cuda, cuda:1 …

# Paths
DATA_PATH: str = "./data/fashion-mnist"  # the data set, fetched here if absent; of another DATASET ./data/<name>
CHECKPOINT_PATH: str = "./checkpoints"  # best.pth, latest.pth, final.pth, weights.pth
OUTPUT_PATH: str = "./outputs"  # pictures and scores
LOG_PATH: str = "./logs"  # TensorBoard's files, in its folder tensorboard/

# What a value must be: a test and its wording. A setting that is absent here has no limits beyond its type.
POSITIVE = (lambda v: v >= 1, "at least 1")
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "VAL_SIZE": POSITIVE,
    "IMAGE_SIZE": POSITIVE,
    "CHANNELS": (lambda v: v in (1, 3), "1 (grayscale) or 3 (colour)"),
    "BATCH_SIZE": POSITIVE,
    "LEARNING_RATE": (lambda v: 0 < v <= 1, "above 0 and at most 1, such as 1e-3"),
    "ACCUMULATE": POSITIVE,
    "LR_WARMUP": (lambda v: v >= 0, "0 or more steps"),
    "LR_DECAY": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "ADAM_BETA2": (lambda v: 0 <= v < 1, "at least 0 and below 1, such as 0.999"),
    "EPOCHS": POSITIVE,
    "GRAD_CLIP": (lambda v: v > 0, "a positive number (inf = never clip)"),
    "EMA_DECAY": (lambda v: 0 <= v < 1, "at least 0 and below 1, such as 0.995"),
    "SEED": (lambda v: 0 <= v < 2**63, "from 0 to 2^63 - 1"),
    "PRECISION": (lambda v: v in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
    "DROPOUT": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "CLASS_DROPOUT": (lambda v: 0 < v <= 1, "above 0, for the network has to learn to do without, and at most 1"),
    "GUIDANCE_SCALE": (lambda v: 0 <= v <= 100, "from 0 (ignores the class) to 100"),
    "UNET_DIM": (lambda v: v >= 8 and v % 8 == 0, "a positive multiple of 8, the groups of GroupNorm"),
    "UNET_DIM_MULTS": (lambda v: len(v) > 0 and min(v) >= 1, "one or more whole numbers of at least 1"),
    "TIME_STEPS": (lambda v: v >= 2, "at least 2"),
    "SCHEDULE_TYPE": (lambda v: v in ("linear", "cosine"), "linear or cosine"),
    "BETA_START": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "BETA_END": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "PREDICTION": (lambda v: v in ("noise", "x0", "v"), "noise, x0 or v"),
    "LOSS_WEIGHT": (lambda v: v in ("uniform", "min_snr"), "uniform or min_snr"),
    "TIME_SAMPLING": (lambda v: v in ("uniform", "stratified"), "uniform or stratified"),
    "NUM_SAMPLES": POSITIVE,
    "SAMPLER": (
        lambda v: v in ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"),
        "ddpm, ddim, dpmpp_2m or dpmpp_2m_sde",
    ),
    "STEPS": (lambda v: v >= 0, "at least 1 (or 0 for the sampler's own default)"),
    "ETA": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "INTERP_STEPS": (lambda v: v >= 2, "at least 2, the two ends"),
    "SAVE_EVERY": POSITIVE,
    "SAVE_MINUTES": (lambda v: v >= 0, "0 (after every step) or more"),
    "SAMPLE_EVERY": POSITIVE,
    "LOG_EVERY": POSITIVE,
    "DEVICE": (lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?", v) is not None, "auto, cpu, cuda or cuda:N"),
    "DATA_PATH": (bool, "a directory: --data_path DIR"),
    "CHECKPOINT_PATH": (bool, "a directory"),
    "OUTPUT_PATH": (bool, "a directory"),
    "LOG_PATH": (bool, "a directory"),
}

# Rules between settings: what must hold wherever all of its settings are present.
RELATIONS: list[tuple[tuple[str, ...], Callable[..., bool], str]] = [
    (("BETA_START", "BETA_END"), lambda start, end: start < end, "BETA_START must be below BETA_END"),
    (
        ("IMAGE_SIZE", "UNET_DIM_MULTS"),
        lambda size, mults: size % 2 ** (len(mults) - 1) == 0 and size > 2 ** (len(mults) - 1),
        "IMAGE_SIZE must be divisible by 2^(levels - 1), for each level but the last halves the image, and above it",
    ),
    (("STEPS", "TIME_STEPS"), lambda steps, time_steps: steps <= time_steps, "STEPS must be at most TIME_STEPS"),
    (
        ("BATCH_SIZE", "ACCUMULATE"),
        lambda batch, parts: batch % parts == 0,
        "BATCH_SIZE must be a multiple of ACCUMULATE",
    ),
    (("SAMPLER", "ETA"), lambda sampler, eta: sampler == "ddim" or eta == 0, "ETA is for SAMPLER ddim only"),
]

# Flags that would be without effect unless another setting has a certain value: those are refused.
GOES_WITH: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "BETA_START": (
        "SCHEDULE_TYPE",
        lambda schedule: schedule == "linear",
        "--beta_start is for --schedule_type linear",
    ),
    "BETA_END": ("SCHEDULE_TYPE", lambda schedule: schedule == "linear", "--beta_end is for --schedule_type linear"),
    "GUIDANCE_SCALE": ("CLASSES", bool, "--guidance_scale goes with --class"),
    "INTERP_STEPS": ("INTERPOLATE", bool, "--interp_steps goes with --interpolate"),
    "OVERWRITE": ("FRESH", bool, "--overwrite goes with --fresh"),
    "IGNORE_MISMATCHED_SIZES": ("INIT_FROM", bool, "--ignore_mismatched_sizes goes with --init_from"),
}

# Settings that a resumed run may change; every other one must stay, for it shapes the weights.
FREE_ON_RESUME = {
    "EPOCHS", "ACCUMULATE", "DEVICE", "SAVE_EVERY", "SAVE_MINUTES", "SAMPLE_EVERY", "LOG_EVERY", "NUM_SAMPLES",
    "SAMPLER", "STEPS", "ETA", "DATA_PATH", "CHECKPOINT_PATH", "OUTPUT_PATH", "LOG_PATH",
}  # fmt: skip
# These shape them, and may change all the same, but not unseen.
NOTED_ON_RESUME = {"LEARNING_RATE", "LR_WARMUP", "LR_DECAY", "GRAD_CLIP", "COMPILE"}


def following(dataset: str) -> dict[str, Any]:
    """The defaults (lower-case names) that follow from DATASET, but for constants that have been edited."""
    found: dict[str, Any] = {}
    if CHANNELS == 1 and dataset in ("cifar10", "folder"):
        found["channels"] = 3
    if DATA_PATH == "./data/fashion-mnist":
        found["data_path"] = "" if dataset == "folder" else f"./data/{dataset}"  # your own images may lie anywhere
    return found
