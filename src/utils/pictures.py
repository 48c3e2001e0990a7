"""Pictures: grids, PNG and GIF files, and the plot of the losses."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from src.utils import checkpoint
from src.utils.directories import short

GAP = 2  # pixels between the images of a grid
GRID_IMAGES = 64  # most images in the grid of sample.py and of eval.py, 8 × 8
CLASS_COLUMNS = 10  # most images per class in a grid with one row per class


def image_grid(images: Tensor, columns: int | None = None, gap: int = GAP) -> Tensor:
    """Tile images (N,C,H,W) uint8 row by row into one picture (C,H',W'), by default as square as possible.

    Gaps and the empty cells of the last row are black.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    padding = (gap // 2, gap - gap // 2) * 2 + (0, 0, 0, rows * columns - len(images))
    return rearrange(torch.nn.functional.pad(images, padding), "(r k) c h w -> c (r h) (k w)", k=columns)


def class_grid(images: Tensor, names: Sequence[str], numbers: Sequence[int]) -> Tensor:
    """Tile images (N,C,H,W) uint8 of K classes in turn into a picture (C,H',W') with one labelled row per class.

    The label is the name of the class, or its number if no font on this machine has the characters of all names.
    """
    height = images.shape[2] + GAP
    font = _font("".join(names))
    names = [name[:30] for name in names] if font else list(map(str, numbers))
    font = font or ImageFont.load_default(12)
    width = math.ceil(max(font.getlength(name) for name in names)) + 8
    labels = Image.new("L", (width, height * len(names)))
    for row, name in enumerate(names):
        ImageDraw.Draw(labels).text((4, height * row + height // 2), name, fill=255, font=font, anchor="lm")
    rows = rearrange(images, "(column row) c h w -> (row column) c h w", row=len(names))
    picture = image_grid(rows, columns=len(images) // len(names))  # (C, H', columns · W)
    strip = torch.from_numpy(np.array(labels)).expand(len(picture), -1, -1)  # (C, H', width)
    return torch.cat([strip, picture], dim=2)


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """A font that has all characters of a text, or None: Pillow's own has ASCII, matplotlib's other alphabets too."""
    if text.isascii():
        return ImageFont.load_default(12)
    import matplotlib  # slow to import, and seldom needed
    from matplotlib import font_manager, ft2font

    wanted = set(map(ord, text))
    installed = (file for file in sorted(font_manager.findSystemFonts()) if "LastResort" not in file)  # boxes only
    for file in [f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", *installed]:
        with suppress(OSError, RuntimeError):  # a font that FreeType cannot read
            if wanted <= ft2font.FT2Font(file).get_charmap().keys():
                return ImageFont.truetype(file, 12)
    return None


def to_pil(image: Tensor) -> Image.Image:
    """Convert (C,H,W) uint8 to a Pillow image: mode L for one channel, RGB for three."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(rearrange(array, "c h w -> h w c")))


def save_png(image: Tensor, path: Path) -> None:
    """Write (C,H,W) uint8 as an 8-bit PNG, grayscale for one channel, RGB for three."""
    to_pil(image).save(content := io.BytesIO(), "PNG")
    checkpoint.write(path, content.getbuffer(), durable=False)


class Gallery:
    """Writes generated images as they come: each to a PNG file, and the first of them to a grid.

    Args:
        directory: of the files.
        names, numbers: of the classes that the images have in turn; empty for images without a class.
        share: (rank, size): of several processes, this one writes every image whose number is rank modulo size.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str] = (),
        numbers: Sequence[int] = (),
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.directory, self.names, self.numbers, self.share = directory, names, numbers, share
        self.most = len(names) * CLASS_COLUMNS if len(names) > 1 else GRID_IMAGES
        self.earlier = {path: path.stat().st_mtime_ns for path in directory.glob("sample_*.png")}
        self.count = 0
        self.shown: list[Tensor] = []  # images of the grid; no others are kept

    def add(self, images: Tensor) -> None:
        """Write a batch (B,C,H,W) uint8 to sample_00000.png and so on, with the name of the class if there are any."""
        rank, size = self.share
        for image in images:
            name = f"_{self._label(self.count % len(self.names))}" if self.names else ""
            if self.count % size == rank:
                save_png(image, self.directory / f"sample_{self.count:05d}{name}.png")
            if self.count < self.most:
                self.shown.append(image.clone())  # a view would keep the whole batch in memory
            self.count += 1

    def _label(self, index: int) -> str:
        """The name of a class in a file name, or its number if the file system's encoding lacks a character."""
        try:
            os.fsencode(label := short(self.names[index]))
        except UnicodeEncodeError:
            return str(self.numbers[index])
        return label

    def left_over(self) -> int:
        """How many images of an earlier run are still in the directory, not overwritten by this one."""
        return sum(path.stat().st_mtime_ns == written for path, written in self.earlier.items())

    def grid(self) -> Tensor:
        """The first images as one picture (C,H',W'), with one row per class if there are several."""
        shown = torch.stack(self.shown)
        return class_grid(shown, self.names, self.numbers) if len(self.names) > 1 else image_grid(shown)


def save_gif(frames: Sequence[Tensor], path: Path) -> None:
    """Write pictures (C,H,W) uint8 as a looping GIF of four seconds, then its last frame for one and a half."""
    durations = [round(4000 / len(frames))] * (len(frames) - 1) + [1500]  # ms
    first, *rest = map(to_pil, frames)
    several = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
    # optimize=True would shift grey levels in frames that use all 256 of them.
    first.save(content := io.BytesIO(), "GIF", optimize=False, **several)
    checkpoint.write(path, content.getbuffer(), durable=False)


def plot_losses(history: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plot the losses of each epoch, from epoch 1, to a PNG; `history` holds those of "train" and "val".

    Before the first epoch, the plot is drawn as a trial, and not written.
    """
    # Figure needs no display. A notebook sets MPLBACKEND, also for the programs it starts, which may lack its package.
    os.environ["MPLBACKEND"] = "agg"
    # Imported here because it takes a second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    train, validation = history["train"], history["val"]
    epochs = range(1, len(train) + 1)
    marker = "o" if len(train) < 30 else None
    axes.plot(epochs, train, marker=marker, label="training: mean over the epoch")
    axes.plot(epochs, validation, marker=marker, label="validation: averaged (EMA) weights, timesteps evenly spread")
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")  # 0.1, not 10⁻¹
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.locator_params(axis="x", integer=True)
    if len(train) == 1:
        axes.set_xlim(0, 2)  # a single point gives no range for the ticks
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(content := io.BytesIO(), dpi=120)
    if train:
        checkpoint.write(path, content.getbuffer(), durable=False)
