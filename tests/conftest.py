"""What the tests of whole scripts share: small settings, one short training, and ways to look at results."""

import os

# One thread for each process of tests, of which pytest-xdist starts one a core; whatever they start inherits it. It is
# read once, when torch is imported, and so stands above that. Another number may be set from outside.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from src.data import datasets
from src.utils import checkpoint, pictures

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests/images/fashion-mnist-tiny"  # the bundled images
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "1",
}

# A network of 35,000 parameters, and few images: seconds where the defaults take hours.
NETWORK = "--unet_dim 8 --unet_dim_mults 1 2 --time_steps 50".split()
SMALL = "--dataset fashion-mnist-tiny --val_size 600 --batch_size 50 --num_samples 4 --steps 5 --device cpu".split()
# For runs in this process (see `quick`): of the 60 images that are left, 40 are trained on in 4 steps an epoch. With a
# constant learning rate, so that a run of two epochs begins as one of one epoch does.
TINIEST = """
    --dataset fashion-mnist-tiny --image_size 28 --val_size 20 --batch_size 10 --num_samples 2 --steps 3
    --lr_warmup 0 --lr_decay 0 --ema_decay 0.9 --save_every 1 --sample_every 1 --log_every 1 --device cpu
""".split()


def arguments(script: ModuleType, *flags: object) -> argparse.Namespace:
    """What `script` makes of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        return script.parse_args()


def run_script(name: str, *flags: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command line of the README, in the folder `cwd`; stdout and stderr are pipes."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, flags)],
        **{"cwd": cwd, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 1800, **options},
    )


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """The names of all parts in which two nested states are not equal to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{name}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    return [] if type(a) is type(b) and a == b else [name]


def share_apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> float:
    """The share of all weights that differ by more than `tolerance`.

    The weights after a few steps of Adam are to be compared so: it divides a gradient by its size, and where that is
    of the size of its rounding, which a few always are, it makes a whole step of the rounding.
    """
    assert a.keys() == b.keys()
    return torch.cat([(a[name] - b[name]).abs().flatten() > tolerance for name in a]).double().mean().item()


def torchrun_variables(rank: int, size: int) -> dict[str, str]:
    """The environment variables that torchrun sets in process `rank` of `size` on one machine."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    return {name: str(value) for name, value in place.items()}


def read_png(path: Path) -> np.ndarray:
    """An 8-bit grayscale PNG as (H, W) int, so that differences do not wrap around."""
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "L"), f"{path.name} is {image.format}, {image.mode}"
        return np.asarray(image).astype(int)


def read_samples(directory: Path) -> np.ndarray:
    """The single images that sample.py wrote, (N, H, W) int."""
    return np.stack([read_png(path) for path in sorted(directory.glob("sample_*.png"))])


def scalars(log_path: Path) -> dict[str, list[int]]:
    """The steps of every curve that TensorBoard would draw."""
    events = EventAccumulator(str(log_path / "tensorboard")).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def one_thread():
    """Tiny networks are fastest so, and results do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A copy of the bundled images: no test writes into the repository."""
    return shutil.copytree(TINY, tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> SimpleNamespace:
    """A user's session in `folder`, all paths at their defaults: two epochs, then, resumed, two more.

    `first` and `second` are the finished processes, `flags` their common command line.
    """
    folder = tmp_path_factory.mktemp("session")
    shutil.copytree(data, folder / "data/fashion-mnist-tiny")
    steady = "--learning_rate 3e-3 --lr_warmup 0 --lr_decay 0".split()
    often = "--ema_decay 0.9 --log_every 2 --save_every 1 --sample_every 2".split()
    flags = [*SMALL, *NETWORK, *steady, *often]
    first = run_script("train.py", *flags, "--epochs", 2, cwd=folder)
    assert first.returncode == 0, first.stderr
    second = run_script("train.py", *flags, "--epochs", 4, cwd=folder)
    assert second.returncode == 0, second.stderr
    return SimpleNamespace(
        folder=folder, flags=flags, first=first, second=second, checkpoint=folder / "checkpoints/best.pth"
    )


@pytest.fixture
def quick(data, tmp_path, monkeypatch, one_thread) -> Callable[..., int]:
    """`quick(name, *flags)` is train.py in this process on 60 images, writing under tmp_path/name; its status."""
    load = datasets.load
    monkeypatch.setattr(datasets, "load", lambda *where: tuple(part[:60] for part in load(*where)))
    monkeypatch.setattr(pictures, "plot_losses", lambda *curves: None)  # slower than the training itself

    def run(name: str, *flags: object) -> int:
        return train.main(quick_arguments(data, tmp_path / name, *flags))

    return run


def quick_arguments(data: Path, folder: Path, *flags: object) -> argparse.Namespace:
    paths = ["--data_path", data]
    for path in ("checkpoint_path", "output_path", "log_path"):
        paths += [f"--{path}", folder / path.removesuffix("_path")]
    return arguments(train, *TINIEST, *NETWORK, *paths, *flags)


@pytest.fixture
def saved(tmp_path) -> Callable[..., dict[str, Any]]:
    """`saved(name, file)` reads a checkpoint that `quick(name)` wrote."""
    return lambda name, file="latest.pth": checkpoint.load(tmp_path / name / "checkpoint" / file)
