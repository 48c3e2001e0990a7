"""Disk → batches: the table of data sets, one split of any of them, and its shuffled batches.

To add a data set, add a row to DATASETS. Where files come from is `fetch`'s trade, what is in them `formats`';
a directory of your own images is read by `folder`.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src import cache, fetch, folder, formats  # whom this file sends for: it only knows which data set needs whom
from src.devices import send  # batches are wanted on one
from src.errors import SettingError  # the one way in which every file tells the user what to mend
from src.folder import ImageFiles  # what stands in for images that memory cannot hold
from src.formats import Split  # the two names of a split

log = logging.getLogger(__name__)

FOLDER = "folder"  # the name of the data set that is a directory of the user's
MEMORY = 4 * 2**30  # bytes of pixels up to which a directory's images are held in memory: 349,525 of 64×64 in colour
ITEMS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


@dataclass(frozen=True, kw_only=True)
class Dataset(fetch.Source):
    """One row of the table: where the files are had, as `fetch.Source` says, and what is in them."""

    classes: tuple[str, ...]  # in the order of the labels 0, 1, ...
    side: int = 28  # pixels along each side of an image
    channels: int = 1
    read: Callable[[dict[str, bytearray], Split], tuple[Tensor, Tensor]] = formats.read_idx


FASHION_MNIST = Dataset(  # 60,000 train, 10,000 test (Xiao, Rasul & Vollgraf 2017)
    name="fashion-mnist",
    classes=ITEMS,
    md5={
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    torchvision="FashionMNIST",
    debian="dataset-fashion-mnist",
)
FASHION_MNIST_TINY = Dataset(  # its first 1,000 train and first 500 test, in tests/data/fashion-mnist-tiny
    name="fashion-mnist-tiny",
    classes=ITEMS,
    md5={
        "train-images-idx3-ubyte": "0204cfcdbec845c440aaae046f9798d3",
        "train-labels-idx1-ubyte": "8103653fc6c68ec51774aae8930768b8",
        "t10k-images-idx3-ubyte": "4255ad7a7e77f5f027f05fd7644a6d38",
        "t10k-labels-idx1-ubyte": "46aa1f456ad6a5c48b50f4f28b2cc651",
    },
)
MNIST = Dataset(  # handwritten digits, 60,000 train, 10,000 test (LeCun, Cortes & Burges 1998)
    name="mnist",
    classes=tuple("0123456789"),
    md5={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    torchvision="MNIST",
)
KMNIST = Dataset(  # handwritten hiragana, 60,000 train, 10,000 test (Clanuwat et al. 2018)
    name="kmnist",
    classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    md5={  # of the packed files: those are published, in torchvision
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    },
    torchvision="KMNIST",
)
CIFAR10 = Dataset(  # colour photographs, 50,000 train, 10,000 test (Krizhevsky 2009)
    name="cifar10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    archive="cifar-10-python.tar.gz",
    torchvision="CIFAR10",
    side=32,
    channels=3,
    read=formats.read_cifar,
)
DATASETS = {row.name: row for row in (FASHION_MNIST, FASHION_MNIST_TINY, MNIST, KMNIST, CIFAR10)}


def load(
    name: str, root: str | Path, split: Split, image_size: int, channels: int | None = None
) -> tuple[Tensor | ImageFiles, Tensor]:
    """One whole split of data set `name`, found under the folder `root` or fetched into it.

    Args:
        name: a row of DATASETS, or "folder" for the images in the directory `root`.
        root: DATA_PATH.
        split: "train" or "test".
        image_size: of a row of the table, its own size or what an equal black frame makes of it (28 → 32); a
            directory's images are cropped and resized to it.
        channels: 1 or 3; None means as the data set has, and 3 for a directory. Only a directory's can be chosen.

    Returns:
        Images (N, C, image_size, image_size) uint8, a tensor or, if a directory's are more than MEMORY, the files that
        stand in for one; and labels (N,) int64.

    Raises:
        UserError: an unknown name; a size or channels that the set cannot give; a damaged or foreign file; a folder
            that cannot be written; a data set that no source has.
    """
    if name == FOLDER:
        return _load_folder(root, split, image_size, channels or 3)
    row = _row(name)
    frame, odd = divmod(image_size - row.side, 2)
    if frame < 0 or odd:
        larger = 16 * (row.side // 16 + 1)
        raise SettingError(f"IMAGE_SIZE is {image_size}: use {row.side} or a larger even number, such as {larger}")
    if channels not in (None, row.channels):
        raise SettingError(f"CHANNELS is {channels}, but must be {row.channels} with DATASET {name}")
    foreign = {md5 for other in DATASETS.values() if other is not row for md5 in other.md5.values()}
    images, labels = row.read(fetch.gather(row, Path(root), foreign), split)
    return torch.nn.functional.pad(images, (frame, frame, frame, frame)), labels  # (N, C, H, W), (N,)


def classes(name: str, root: str | Path) -> tuple[str, ...]:
    """The names that belong to the labels 0, 1, … of a data set; () if a directory's images have none.

    Args:
        name, root: as `load` takes them.

    Raises:
        UserError: an unknown name, or a directory that `load` would refuse.
    """
    return folder.find(_directory(root), "train")[2] if name == FOLDER else _row(name).classes


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 → float32 in [-1, 1], of the same shape."""
    return images.float() / 127.5 - 1


def fingerprint(images: Tensor | ImageFiles, labels: Tensor) -> str:
    """What tells one set of images from another: a SHA-256 of its shape and labels, which holds for files as well."""
    return cache.key(str(tuple(images.shape)), labels)


def training_count(count: int, val_size: int, batch_size: int) -> int:
    """How many of `count` images are left to train on when the last `val_size` are held out.

    Raises `SettingError` if they are less than one batch.
    """
    if count - val_size < batch_size:
        raise SettingError(
            f"there are {count} training images: too few for --val_size {val_size} and --batch_size {batch_size}; "
            "reduce one of them"
        )
    return count - val_size


def batches(
    images: Tensor | ImageFiles,
    labels: Tensor,
    batch_size: int,
    seed: int,
    epoch: int,
    device: torch.device,
    skip: int = 0,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch as pairs x0 (B, C, H, W) float32 in [-1, 1] and y (B,) int64, both on `device`.

    The order is a function of (seed, epoch) alone, both ≥ 0, whether the images are in memory or in files; the global
    random state is neither read nor changed. An incomplete last batch is dropped. So are the first `skip`: a run
    stopped within an epoch goes on with exactly those it had not seen. Of each batch `part` is handed out, where other
    processes take the rest. Raises `UserError` if one batch needs more images than there are, or at a file that cannot
    be read.
    """
    if batch_size > len(images):
        raise SettingError(f"BATCH_SIZE is {batch_size}, but there are only {len(images)} images: lower it")
    # seed + epoch would shuffle (0, 1) and (1, 0) alike; SeedSequence mixes the two.
    mixed = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).item()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(mixed))
    chunks = [chunk[part] for chunk in order.split(batch_size)[skip : len(images) // batch_size]]  # (B,) each
    pixels = images.batches(chunks) if isinstance(images, ImageFiles) else (images[chosen] for chosen in chunks)
    for chosen, x in zip(chunks, pixels, strict=True):
        # Moved as bytes: a quarter of what the floats would be.
        yield normalise(send(x, device)), send(labels[chosen], device)


def _row(name: str) -> Dataset:
    if name not in DATASETS:
        raise SettingError(f"no data set is called {name!r}: choose from {', '.join([*DATASETS, FOLDER])}")
    return DATASETS[name]


def _directory(root: str | Path) -> Path:
    if not str(root):  # Path("") would be the current directory
        raise SettingError("DATASET folder needs --data_path, the directory of your images")
    return Path(root)


def _load_folder(root: str | Path, split: Split, size: int, channels: int) -> tuple[Tensor | ImageFiles, Tensor]:
    paths, labels, _ = folder.find(_directory(root), split)
    images = ImageFiles(paths, size, channels)
    if images.shape.numel() <= MEMORY:
        return images.read(), labels
    log.info("%d images are more than memory should hold: they are read from %s as they are needed", len(images), root)
    return images, labels
