"""The table of data sets, loading one split of any of them, and shuffled batches for training.

To add a data set, add a row to DATASETS; its key is the value of --dataset. `fetch` finds or downloads the files,
`formats` parses them, and `folder` reads a directory of the user's own images.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.data import fetch, folder, formats
from src.data.formats import Split
from src.data.images import ImageFiles, Images, decode, digest, in_threads
from src.utils import cache
from src.utils.errors import SettingError, UserError
from src.utils.progress import counted, progress
from src.utils.settings import FOLDER

log = logging.getLogger(__name__)

CACHED = 5000  # files from which on it is remembered that they have been read
# A directory's images are kept in memory up to this many bytes of pixels: 349,525 colour images of 64×64.
MEMORY_LIMIT = 4 * 2**30
ITEMS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


@dataclass(frozen=True, kw_only=True)
class Dataset(fetch.Source):
    """A row of DATASETS: the sources of the files (see `fetch.Source`) and the format of their contents."""

    classes: tuple[str, ...]  # names of the labels 0, 1, ...
    side: int = 28  # height and width of an image in pixels
    channels: int = 1
    read: Callable[[dict[str, bytearray], Split], tuple[Tensor, Tensor]] = formats.read_idx


# src/utils/settings.py reads this table from the source text: keep it a literal dictionary.
DATASETS = {
    "fashion-mnist": Dataset(  # 60,000 training and 10,000 test images (Xiao, Rasul & Vollgraf 2017)
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
    ),
    "fashion-mnist-tiny": Dataset(  # its first 1,000 training and 500 test images, in tests/images
        name="fashion-mnist-tiny",
        classes=ITEMS,
        md5={
            "train-images-idx3-ubyte": "0204cfcdbec845c440aaae046f9798d3",
            "train-labels-idx1-ubyte": "8103653fc6c68ec51774aae8930768b8",
            "t10k-images-idx3-ubyte": "4255ad7a7e77f5f027f05fd7644a6d38",
            "t10k-labels-idx1-ubyte": "46aa1f456ad6a5c48b50f4f28b2cc651",
        },
    ),
    "mnist": Dataset(  # handwritten digits, 60,000 training and 10,000 test images (LeCun, Cortes & Burges 1998)
        name="mnist",
        classes=tuple("0123456789"),
        md5={
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        torchvision="MNIST",
    ),
    "kmnist": Dataset(  # handwritten hiragana, 60,000 training and 10,000 test images (Clanuwat et al. 2018)
        name="kmnist",
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        md5={  # of the .gz files: torchvision publishes only those
            "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
            "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
            "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
            "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
        },
        torchvision="KMNIST",
    ),
    "cifar10": Dataset(  # colour photographs, 50,000 training and 10,000 test images (Krizhevsky 2009)
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
    ),
}


def load(
    name: str, root: str | Path, split: Split, image_size: int, channels: int | None = None
) -> tuple[Images, Tensor]:
    """Load one split of a data set; files that are not under `root` are fetched into it.

    Args:
        name: a key of DATASETS, or "folder" for the images in the directory `root`.
        root: the setting DATA_PATH.
        split: "train" or "test".
        image_size: height and width of the returned images. Images of a data set in the table are padded with black,
            equally on all sides; images of a directory are cropped and resized.
        channels: 1 or 3 for a directory, None for its default, 3. Other data sets have a fixed number: pass that
            number or None.

    Returns:
        Images (N, C, image_size, image_size) uint8: a tensor, or ImageFiles if the images of a directory are larger
        than MEMORY_LIMIT. Labels (N,) int64.

    Raises:
        SettingError: the name is unknown, or the data set cannot have this size or number of channels.
        UserError: a file is damaged or unknown, or the data set is unavailable.
    """
    if name == FOLDER:
        return _load_folder(root, split, image_size, channels or 3)
    row, frame = _row(name), padding(name, image_size)
    if channels not in (None, row.channels):
        raise SettingError(f"CHANNELS is {channels}, but must be {row.channels} with DATASET {name}")
    foreign = {md5 for other in DATASETS.values() if other is not row for md5 in other.md5.values()}
    images, labels = row.read(fetch.gather(row, Path(root), foreign), split)
    return torch.nn.functional.pad(images, (frame, frame, frame, frame)), labels  # (N, C, H, W), (N,)


def padding(name: str, image_size: int) -> int:
    """Return how many black pixels `load` adds on each side of an image; 0 for images of a directory.

    Raises:
        SettingError: the name is unknown, or the data set cannot have this size.
    """
    if name == FOLDER:
        return 0
    frame, remainder = divmod(image_size - (side := _row(name).side), 2)
    if frame < 0 or remainder:
        multiple_of_16 = 16 * (side // 16 + 1)
        raise SettingError(f"IMAGE_SIZE is {image_size}: use {side} or a larger even number, such as {multiple_of_16}")
    return frame


def read_image(path: str | Path, name: str, image_size: int, channels: int) -> Tensor:
    """Read an image file in the form that a model of data set `name` was trained on, (C, H, W) uint8.

    An image of image_size × image_size keeps its pixels. Another is cropped to the central square, resized to the
    size of the data set's own images, and padded as they are: so one of 28×28 keeps its pixels, too.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"no image at {path}: give an existing file")
    return decode(path, image_size, channels, padding(name, image_size))


def classes(name: str, root: str | Path) -> tuple[str, ...]:
    """Return the class names of a data set in the order of its labels; () if a directory has no class folders.

    Args:
        name, root: as for `load`.

    Raises:
        SettingError: the name is unknown, or `load` would refuse the directory.
    """
    return folder.survey(_directory(root)).classes if name == FOLDER else _row(name).classes


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 pixels 0..255 to float32 in [-1, 1], in the same shape."""
    return images.float() / 127.5 - 1


def digests(name: str, root: str | Path, split: Split) -> Tensor:
    """Return a short hash of each file of a directory's split, (N,) int64; none (0,) for a data set in the table.

    Args:
        name, root, split: as for `load`.

    Raises:
        SettingError: `load` would refuse the directory.
        UserError: a file cannot be read.
    """
    if name != FOLDER:
        return torch.empty(0, dtype=torch.long)
    paths, _ = folder.survey(_directory(root)).files(split)

    def compute() -> dict[str, Tensor]:
        with progress(
            log, iterable=in_threads(digest, paths), total=len(paths), desc="hashing files", unit=" files"
        ) as bar:
            return {"digests": torch.tensor(list(bar))}

    return _once_read("digests", paths, compute)["digests"]


def fingerprint(images: Images, labels: Tensor, digests: Tensor) -> str:
    """Return a SHA-256 that identifies a data set: of the images' shape, all labels, and `digests`, if any."""
    return cache.key(str(tuple(images.shape)), labels, *([digests] if len(digests) else []))


def training_sizes(count: int, val_size: int, batch_size: int, parts: int, given: Collection[str]) -> tuple[int, int]:
    """Return VAL_SIZE and BATCH_SIZE for `count` images: defaults are reduced for small data sets, flags are not.

    Args:
        count: images of the train split.
        val_size, batch_size: the settings. By default, at most a tenth of the images are held out, and the batch size
            is halved until a batch remains.
        parts: the batch size stays a multiple of this number.
        given: names of the settings that were given as flags.
    """
    if "val_size" not in given:
        val_size = min(val_size, max(1, count // 10))
    rest = count - val_size
    while "batch_size" not in given and 0 < rest < batch_size and batch_size % (2 * parts) == 0:
        batch_size //= 2
    return val_size, batch_size


def left_out(classes: Sequence[str], labels: Tensor) -> list[str]:
    """Return the classes of which there is no image, given the labels (N,) int64 of all images."""
    there = set(labels.tolist())
    return [name for label, name in enumerate(classes) if label not in there]


def class_counts(labels: Tensor, classes: int) -> list[int]:
    """Return how many of `labels` (N,) belong to each class; [] if there are no classes."""
    return labels.bincount(minlength=classes).tolist() if classes else []


def training_count(count: int, val_size: int, batch_size: int) -> int:
    """Return how many of `count` images remain for training when the last `val_size` are held out for validation.

    Raises:
        SettingError: fewer than one batch would remain.
    """
    if count - val_size < batch_size:
        raise SettingError(
            f"{counted(count, 'training image')}: too few for --val_size {val_size} and --batch_size {batch_size}; "
            "reduce one of them or both, or add images"
        )
    return count - val_size


def batches(
    images: Images,
    labels: Tensor,
    batch_size: int,
    seed: int,
    epoch: int,
    skip: int = 0,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the shuffled batches of one epoch, on the CPU: x0 (B, C, H, W) float32 in [-1, 1] and y (B,) int64.

    The order depends on (seed, epoch) alone. The global random state is neither read nor changed. An incomplete last
    batch is dropped.

    Args:
        images, labels: as returned by `load`.
        seed, epoch: at least 0.
        skip: number of batches to leave out at the beginning, when a run is resumed within an epoch.
        part: the share of every batch that this process trains on.

    Raises:
        SettingError: there are fewer images than `batch_size`.
        UserError: an image file cannot be read.
    """
    if batch_size > len(images):
        raise SettingError(f"BATCH_SIZE is {batch_size}, but the images are only {len(images)}: lower it")
    # With seed + epoch, (0, 1) and (1, 0) would have the same order; SeedSequence hashes the pair.
    epoch_seed = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).item()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch_seed))
    chunks = [chunk[part] for chunk in order.split(batch_size)[skip : len(images) // batch_size]]  # (B,) each
    pixels = images.batches(chunks) if isinstance(images, ImageFiles) else (images[indices] for indices in chunks)
    for indices, x in zip(chunks, pixels, strict=True):
        yield normalise(x), labels[indices]


def in_order(images: Images, batch_size: int, labels: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield all images in order, on the CPU, as batches of x0 (B, C, H, W) float32 in [-1, 1] and y (B,).

    The last batch may be smaller. Without `labels`, every y is None.

    Raises:
        UserError: an image file cannot be read.
    """
    y = repeat(None) if labels is None else labels.split(batch_size)
    yield from zip(map(normalise, images.split(batch_size)), y, strict=False)  # strict would exhaust repeat(None)


def _row(name: str) -> Dataset:
    if name not in DATASETS:
        raise SettingError(f"no data set is called {name!r}: choose from {', '.join([*DATASETS, FOLDER])}")
    return DATASETS[name]


def _directory(root: str | Path) -> Path:
    if not str(root):  # Path("") would be the current directory
        raise SettingError("DATASET folder needs --data_path, the directory of your images")
    return Path(root)


def _load_folder(root: str | Path, split: Split, size: int, channels: int) -> tuple[Images, Tensor]:
    content = folder.survey(_directory(root))
    if split == "train":  # once, although eval.py loads both splits
        log.info("%s", content.describe())
        for note in content.notes:
            log.warning("%s: %s", root, note)
    paths, labels = content.files(split)
    images = ImageFiles(paths, size, channels)
    if images.shape.numel() <= MEMORY_LIMIT:
        return images.read(), labels
    log.info("the %d images need too much memory: they are decoded from %s as needed", len(images), root)

    def check() -> dict[str, Tensor]:
        images.check()
        return {}

    _once_read(f"checked-{size}-{channels}", paths, check)  # a damaged file is named now, not in mid-training
    return images, labels


def _once_read(what: str, paths: Sequence[str], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what `compute` returns after reading all files; if there are many, from the cache while none changes.

    Args:
        what: a name for it.
        paths: of the files.
        compute: what is to be done.
    """
    if len(paths) < CACHED:
        return compute()
    files = [(os.path.abspath(path), (status := os.stat(path)).st_size, status.st_mtime_ns) for path in paths]
    return cache.recall(what, cache.key(f"{what} {files}"), compute)
