"""A directory of the user's own images: list the files of a split and their classes, and decode them on demand."""

import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.utils.errors import SettingError, UserError
from src.utils.progress import progress
from src.utils.signals import SIGNALS

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # in lower or upper case
TEST_EVERY = 10  # without folders train/ and test/, every tenth image belongs to the test split
SPLITS = {"train", "test", "val", "valid", "validation"}  # if all folders have such names, they are not classes
FEW = 256  # up to so many images, decoding takes less time than starting worker processes


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Image files with the interface of a tensor (N, C, H, W) uint8: len, shape, dtype, indexing and split.

    Indexing with a slice returns ImageFiles and decodes nothing; indexing with a list decodes those images.
    """

    paths: Sequence[str]  # of length N
    size: int  # H = W, in pixels
    channels: int  # C: 1 for grayscale, 3 for colour

    dtype = torch.uint8

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.paths), self.channels, self.size, self.size))

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, which: slice) -> "ImageFiles": ...

    @overload
    def __getitem__(self, which: Iterable[int]) -> Tensor: ...

    def __getitem__(self, which: slice | Iterable[int]) -> "ImageFiles | Tensor":
        if isinstance(which, slice):
            return replace(self, paths=self.paths[which])
        return torch.stack([decode(self.paths[i], self.size, self.channels) for i in which])  # (B, C, H, W)

    def batches(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) uint8 of each chunk of indices (B,), in order; worker processes decode ahead.

        The global random state is neither read nor changed.

        Raises:
            UserError: an image cannot be read.
        """
        indices = [chunk.tolist() for chunk in chunks]
        count = min(_processors(), len(indices)) if sum(map(len, indices)) > FEW else 0
        # With batch_size=None, each item of `sampler`, the indices of a whole batch, is one index of the data set.
        # Without a generator, the loader would draw its workers' seeds from the global one.
        loader = DataLoader(
            _ErrorsAsItems(self),
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
        """Yield all images in order, (B, C, H, W) uint8 at a time, like `Tensor.split`."""
        return self.batches(torch.arange(len(self)).split(batch_size))

    def read(self) -> Tensor:
        """Decode all images into one tensor (N, C, H, W) uint8."""
        images, first = torch.empty(self.shape, dtype=torch.uint8), 0
        with progress(log, total=len(self), desc="reading images", unit=" images") as bar:
            for batch in self.split(64):
                images[first : first + len(batch)] = batch
                first += len(batch)
                bar.update(len(batch))
        return images


Images = Tensor | ImageFiles  # (N, C, H, W) uint8


class _ErrorsAsItems(Dataset):
    """Returns a UserError instead of raising it: DataLoader would add the worker's traceback to its message."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __getitem__(self, which: list[int]) -> Tensor | UserError:
        try:
            return self.images[which]
        except UserError as error:
            return error


def _ignore_signals(_worker: int) -> None:
    """Make a worker process ignore the signals that stop a training: the main process stops it after saving.

    Terminals and batch systems signal all processes of a group.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _processors() -> int:
    """Return the number of processors that this process may use; on macOS and Windows, of all in the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: str | Path, size: int, channels: int) -> Tensor:
    """Decode an image file to (C, size, size) uint8 in [0, 255], cropped to the central square and resized.

    The EXIF orientation is applied. Transparent pixels are blended with white. 16-bit images are reduced to 8 bits.
    An image that has the right size keeps its exact pixels.

    Raises:
        UserError: the file cannot be read; the message names it.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits: Pillow's conversion would clip instead of scale
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
    """List the image files of one split, "train" or "test", under the directory `root`, with labels and classes.

    If `root` has folders train/ and test/, these are the splits, and classes are named by the folders in them.
    Otherwise every tenth image, sorted by path, belongs to the test split, and classes are named by the folders in
    `root`. If no image is in such a folder, there are no classes.

    The order is a fixed permutation, because training holds out the last images: sorted by path, these would all be of
    one class.

    Returns:
        Paths, a list of length N; labels (N,) int64, indices of classes, all 0 if there are none; names of classes.

    Raises:
        SettingError: the directory does not exist, has no images of the split, or its folders are inconsistent.
    """
    if not root.is_dir():
        raise SettingError(f"DATA_PATH is {root}, which is no directory: name the one with your images")
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    has_splits = {"train", "test"} <= folders
    if not has_splits and "train" in folders and folders <= SPLITS:
        raise SettingError(f"{root} has a folder train, but none called test: add it, or name {root / 'train'} itself")
    images = _images(root / "train" if has_splits else root)
    classes = _classes(images, root)
    if has_splits and split == "test":
        images = _images(root / "test")
    elif not has_splits:
        images = [image for i, image in enumerate(images) if (i % TEST_EVERY == 0) == (split == "test")]
    if not images:
        raise SettingError(f"{root} holds too few images for {split}ing ({', '.join(SUFFIXES)}): add some")
    labels = {name: i for i, name in enumerate(classes)}
    if unknown := {name for name, _ in images} - (labels.keys() or {""}):
        what = f"a class {min(unknown)!r}" if any(unknown) else "images beside the class folders"
        raise SettingError(f"{root / 'test'} has {what}, unlike {root / 'train'}: give both the same folders")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return [images[i][1] for i in order], torch.tensor([labels.get(images[i][0], 0) for i in order]), classes


def _images(base: Path) -> list[tuple[str, str]]:
    """List all images under `base`, sorted by path: (class, path), where class is "" for images directly in `base`."""
    relative_paths: list[Path] = []
    for directory, folders, names in os.walk(base, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # such as .thumbnails
        relative = Path(directory).relative_to(base)
        relative_paths += [relative / n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    relative_paths.sort(key=Path.as_posix)
    return [(path.parts[0] if len(path.parts) > 1 else "", str(base / path)) for path in relative_paths]


def _classes(images: list[tuple[str, str]], root: Path) -> tuple[str, ...]:
    """Return the sorted names of the classes of `images`, (class, path) each; () if none is in a class folder."""
    names = sorted({name for name, _ in images})
    if names == [""]:
        return ()
    if "" in names:
        raise SettingError(f"{root} has images both in class folders and beside them: move those into a folder, too")
    return tuple(names)
