"""Your own images: find them in a directory, split them, name their classes, and decode them on demand."""

import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.errors import SettingError, UserError  # the one way in which every file tells the user what to mend
from src.interrupt import SIGNALS  # which ones there are
from src.utils import progress  # the one rule of when a bar is shown

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # in capitals, too
TEST_EVERY = 10  # without folders of that name, every tenth image is for the test
SPLITS = {"train", "test", "val", "valid", "validation"}  # folders that are no classes if all that there are
FEW = 256  # images that are decoded before a worker process would have started


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Images on disk that stand in for a tensor (N, C, H, W) uint8: same length, shape, slices and batches.

    A slice is another such collection and costs nothing; a list of indices decodes those images.
    """

    paths: Sequence[str]  # N of them
    size: int  # H = W, in pixels
    channels: int  # C: 1 for grayscale, 3 for colour

    dtype = torch.uint8

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.paths), self.channels, self.size, self.size))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: slice | Iterable[int]) -> "ImageFiles | Tensor":
        if isinstance(which, slice):
            return replace(self, paths=self.paths[which])
        return torch.stack([decode(self.paths[i], self.size, self.channels) for i in which])  # (B, C, H, W)

    def batches(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images (B, C, H, W) uint8 of each chunk of indices (B,), in order, decoded ahead by worker processes.

        Neither reads nor changes the global random state. Raises `UserError` at an image that cannot be read.
        """
        indices = [chunk.tolist() for chunk in chunks]
        count = min(_processors(), len(indices)) if sum(map(len, indices)) > FEW else 0
        # batch_size=None: what the "sampler" gives is a whole batch's indices, and the data set returns that batch.
        # The generator is there because a loader takes its workers' seeds from the global one otherwise.
        loader = DataLoader(
            _Cautious(self),
            sampler=indices,
            batch_size=None,
            num_workers=count,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, (B, C, H, W) uint8 at a time, as a tensor's `split`."""
        return self.batches(torch.arange(len(self)).split(batch_size))

    def read(self) -> Tensor:
        """All images at once, (N, C, H, W) uint8."""
        images, first = torch.empty(self.shape, dtype=torch.uint8), 0
        with progress(log, total=len(self), desc="reading images", unit="image") as bar:
            for batch in self.split(64):
                images[first : first + len(batch)] = batch
                first += len(batch)
                bar.update(len(batch))
        return images


class _Cautious(Dataset):
    """Hands an error over as a value: raised in a worker process it would come out wrapped in its traceback."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __getitem__(self, which: list[int]) -> Tensor | UserError:
        try:
            return self.images[which]
        except UserError as error:
            return error


def _ignore_signals(_worker: int) -> None:
    """A terminal, or a batch system, signals a whole group: only the main process answers, once its state is whole."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _processors() -> int:
    """How many this process may use; macOS and Windows cannot tell and name them all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: str | Path, size: int, channels: int) -> Tensor:
    """One image file as (C, size, size) uint8 in [0, 255]: upright, centre-cropped to a square, and resized.

    EXIF orientation is applied; transparency is laid on white, as a page shows it; 16 bits become 8. An image that has
    the right size already keeps its exact pixels. Raises `UserError`, naming the file, if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the image {path} ({reason}): repair it, or move it away") from None
    return torch.from_numpy(rearrange(np.array(image).reshape(size, size, channels), "h w c -> c h w").copy())


def find(root: Path, split: str) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """The image files of one split, "train" or "test", under the directory `root`.

    The split is that of the folders train/ and test/ if there are both; else every tenth image by path is for the
    test. An image's class is the first folder on its way; where no image lies in a folder, there are no classes.
    The order is fixed but mixed: a training holds out the last images, which by path would all be of one class.

    Returns:
        Paths, N of them; labels (N,) int64, places in the third, all 0 without classes; the names of the classes.

    Raises:
        SettingError: there is no such directory, or not what a split needs.
    """
    if not root.is_dir():
        raise SettingError(f"DATA_PATH is {root}, which is no directory: name the one with your images")
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    divided = {"train", "test"} <= folders
    if not divided and "train" in folders and folders <= SPLITS:
        raise SettingError(f"{root} has a folder train, but none called test: add it, or name {root / 'train'} itself")
    found = _images(root / "train" if divided else root)
    classes = _classes(found, root)
    if divided and split == "test":
        found = _images(root / "test")
    elif not divided:
        found = [image for i, image in enumerate(found) if (i % TEST_EVERY == 0) == (split == "test")]
    if not found:
        raise SettingError(f"{root} holds too few images for {split}ing ({', '.join(SUFFIXES)}): add some")
    numbers = {name: i for i, name in enumerate(classes)}
    if strange := {name for name, _ in found} - (numbers.keys() or {""}):
        what = f"a class {min(strange)!r}" if any(strange) else "images beside the class folders"
        raise SettingError(f"{root / 'test'} has {what}, unlike {root / 'train'}: give both the same folders")
    mixed = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i][1] for i in mixed], torch.tensor([numbers.get(found[i][0], 0) for i in mixed]), classes


def _images(base: Path) -> list[tuple[str, str]]:
    """The class ("" for none) and the path of every image under `base`, sorted by their way from there."""
    found = []
    for place, folders, names in os.walk(base, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # tools hide their own copies there
        way = Path(place).relative_to(base)
        found += [way / n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    found.sort(key=Path.as_posix)
    return [(way.parts[0] if len(way.parts) > 1 else "", str(base / way)) for way in found]


def _classes(found: list[tuple[str, str]], root: Path) -> tuple[str, ...]:
    """The names of the classes, sorted; none if all images lie beside each other."""
    names = sorted({name for name, _ in found})
    if names == [""]:
        return ()
    if "" in names:
        raise SettingError(f"{root} has images both in class folders and beside them: move those into a folder, too")
    return tuple(names)
