"""Collected rows, noise, pictures and plots."""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from src.errors import SettingError, writing  # an unwritable place is something the user can mend

GRID_IMAGES = 64  # most that the grid of sample.py and of eval.py shows, 8 × 8
CLASS_COLUMNS = 10  # most images of a class that a grid by class shows


def make_directories(places: Mapping[str, str]) -> list[Path]:
    """Create directories and try that files can be written there, at the start and not after hours of work.

    Args:
        places: setting → the directory it names.

    Raises:
        SettingError: some cannot be used; the text names them all with their settings.
    """
    paths, found = [Path(place) for place in places.values()], []
    for setting, path in zip(places, paths, strict=True):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            found.append(f"--{setting} {path}: {error.strerror}")
    if found:
        raise SettingError(f"{'; '.join(found)}. Name directories that can be written")
    return paths


def progress(log: logging.Logger, **kwargs: Any) -> tqdm:
    """A tqdm bar, shown if `log` speaks of progress (not under --quiet) and stderr is a terminal."""
    return tqdm(disable=None if log.isEnabledFor(logging.INFO) else True, **kwargs)


class Rows:
    """Batches of rows (B, ...) in one tensor, which takes twice the memory whenever it is full.

    A list would keep each batch where the allocator put it, between the tensors of the networks that run meanwhile.
    Memory that is freed on both sides of it cannot be joined, and may be too small for what is allocated next.
    """

    def __init__(self) -> None:
        self._memory, self._count = torch.empty(0), 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Tensor) -> None:
        """Copy rows of any device to the end; all batches have the type of the first."""
        count = self._count + len(rows)
        if not self._count or count > len(self._memory):
            memory = torch.empty(max(count, 2 * len(self._memory)), *rows.shape[1:], dtype=rows.dtype)
            if self._count:
                memory[: self._count] = self.all()
            self._memory = memory
        self._memory[self._count : count] = rows
        self._count = count

    def all(self) -> Tensor:
        """All rows so far, (N, ...) on the CPU; not a copy."""
        return self._memory[: self._count]


class ImageNoise:
    """N(0, I) noise from one random stream an image.

    Stream i depends on (seed, i) alone, so image i of a seed is the same in any batch, beside any others, and on
    any device: the numbers are drawn on the CPU.

    Args:
        seed: of the whole set of images.
        indices: which images of the set this batch holds, B of them.
        shape: of one image, (C, H, W).
        device: where the noise is wanted.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.device = shape, device
        self.streams = [torch.Generator().manual_seed(_stream_seed(seed, i)) for i in indices]

    def __call__(self) -> Tensor:
        """The next noise of every stream, (B, C, H, W) float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.streams]).to(self.device)


def _stream_seed(seed: int, index: int) -> int:
    """Mix two numbers so that neighbouring seeds and indices share no stream."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0])


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest of 256 grey levels, uint8 of the same shape."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Tile images (N,C,H,W) uint8 into one picture (C,H',W'), row by row, as square as can be unless told.

    Gaps are black, and so is what is missing of the last row.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    padding = (gap // 2, gap - gap // 2) * 2 + (0, 0, 0, rows * columns - len(images))
    return rearrange(torch.nn.functional.pad(images, padding), "(r k) c h w -> c (r h) (k w)", k=columns)


def class_grid(images: Tensor, names: Sequence[str], gap: int = 2) -> Tensor:
    """Images (N,C,H,W) uint8 of K classes in turn as a picture (C,H',W'): a row for each class, its name before it."""
    height = images.shape[2] + gap
    font = ImageFont.load_default(12)
    width = math.ceil(max(font.getlength(name) for name in names)) + 8
    labels = Image.new("L", (width, height * len(names)))
    for row, name in enumerate(names):
        ImageDraw.Draw(labels).text((4, height * row + height // 2), name, fill=255, font=font, anchor="lm")
    rows = rearrange(images, "(column row) c h w -> (row column) c h w", row=len(names))
    picture = image_grid(rows, columns=len(images) // len(names), gap=gap)  # (C, H', columns · W)
    strip = torch.from_numpy(np.array(labels)).expand(len(picture), -1, -1)  # (C, H', width)
    return torch.cat([strip, picture], dim=2)


def to_pil(image: Tensor) -> Image.Image:
    """(C,H,W) uint8 to a Pillow image: mode L for one channel, RGB for three."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(rearrange(array, "c h w -> h w c")))


def save_png(image: Tensor, path: Path) -> None:
    """Write (C,H,W) uint8 as an 8-bit PNG, grey or RGB by its channels."""
    with writing(path):
        to_pil(image).save(path)


def save_gif(frames: Sequence[Tensor], path: Path, seconds: float = 4.0, hold: float = 1.5) -> None:
    """Write pictures (C,H,W) uint8 as an endless animation of `seconds`, resting on the last for `hold`."""
    durations = [round(1000 * seconds / len(frames))] * (len(frames) - 1) + [round(1000 * hold)]
    first, *rest = map(to_pil, frames)
    with writing(path):
        # Pillow's optimised palettes shift greys by several levels where a frame has all 256 of them.
        first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=False)


def plot_losses(train: Sequence[float], validation: Sequence[float], path: Path) -> None:
    """Draw both loss curves over the epochs, which count from 1, to a PNG."""
    # here, for it takes a second; Figure needs no display and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(train) + 1)
    marker = "o" if len(train) < 30 else None
    axes.plot(epochs, train, marker=marker, label="training: weights as they were, mean over the epoch")
    axes.plot(epochs, validation, marker=marker, label="validation: averaged (EMA) weights, held-out images")
    axes.set(xlabel="epoch", ylabel="mean squared error of the prediction", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(train) == 1:
        axes.set_xlim(0, 2)  # one point has no width to choose the ticks by
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    with writing(path):
        figure.savefig(path, dpi=120)
