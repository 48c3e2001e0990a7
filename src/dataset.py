"""Disk → batches: find a data set (or fetch it), check it, hold it in memory, hand out shuffled batches.

Five sources are tried in turn: the four raw idx files, anywhere under the data folder; the same as .gz;
Debian's package, if installed; torchvision's mirror; Debian's package through apt-get, which needs no
privileges and works where only package mirrors can be reached. Every load checks the MD5 of every file.
"""

import gzip
import hashlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from src.errors import SettingError, UserError  # the one way in which every file tells the user what to mend
from src.utils import progress  # the one rule of when a bar is shown

log = logging.getLogger(__name__)

Split = Literal["train", "test"]

SIDE = 28  # pixels along each side of an image on disk
TIMEOUT = 10  # seconds of silence after which a host counts as blocked
DEBIAN = Path("/usr/share/datasets")  # where Debian's packages of data sets put their .gz files
ITEMS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


@dataclass(frozen=True)
class Dataset:
    """One row of the table; without `torchvision` and `debian` it is fetched from nowhere."""

    name: str
    classes: tuple[str, ...]  # in the order of the labels 0, 1, ...
    md5: dict[str, str]  # file name -> MD5 of its extracted bytes
    torchvision: str | None = None  # the class of torchvision.datasets that knows its mirror
    debian: str | None = None  # the package that puts it into DEBIAN / name


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
DATASETS = {row.name: row for row in (FASHION_MNIST, FASHION_MNIST_TINY)}


def load(name: str, root: str | Path, split: Split, image_size: int) -> tuple[Tensor, Tensor]:
    """One whole split of data set `name`, found under the folder `root` or fetched into it.

    Returns images (N, 1, image_size, image_size) uint8, the exact 28×28 pixels framed in zeros, and labels
    (N,) int64. Raises `UserError` for an unknown name, a size that leaves no equal frame, a damaged or
    foreign file, a folder that cannot be written, or a data set that no source can give.
    """
    if name not in DATASETS:
        raise SettingError(f"no data set is called {name!r}: choose from {', '.join(DATASETS)}")
    frame, odd = divmod(image_size - SIDE, 2)
    if frame < 0 or odd:
        raise SettingError(f"IMAGE_SIZE is {image_size}: use {SIDE} or a larger even number, such as 32")
    prefix = {"train": "train", "test": "t10k"}[split]
    files = _gather(DATASETS[name], Path(root))
    # An idx file is a header (16 bytes for images, 8 for labels), which the MD5 has vouched for, then values.
    images = torch.frombuffer(files[f"{prefix}-images-idx3-ubyte"], dtype=torch.uint8, offset=16)
    labels = torch.frombuffer(files[f"{prefix}-labels-idx1-ubyte"], dtype=torch.uint8, offset=8)
    images = torch.nn.functional.pad(images.view(-1, 1, SIDE, SIDE), (frame, frame, frame, frame))
    return images, labels.long()  # (N, 1, H, W), (N,)


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 → float32 in [-1, 1], of the same shape."""
    return images.float() / 127.5 - 1


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
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    seed: int,
    epoch: int,
    device: torch.device,
    skip: int = 0,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch as pairs x0 (B, 1, H, W) float32 in [-1, 1] and y (B,) int64, both on `device`.

    The order is a function of (seed, epoch) alone, both ≥ 0; the global random state is neither read nor
    changed. An incomplete last batch is dropped. So are the first `skip`: a run stopped within an epoch goes
    on with exactly those it had not seen. Of each batch `part` is handed out, where others take the rest.
    Raises `UserError` if one batch needs more images than there are.
    """
    if batch_size > len(images):
        raise SettingError(f"BATCH_SIZE is {batch_size}, but there are only {len(images)} images: lower it")
    # seed + epoch would shuffle (0, 1) and (1, 0) alike; SeedSequence mixes the two.
    mixed = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).item()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(mixed))
    for i in range(skip, len(images) // batch_size):
        chosen = order[i * batch_size : (i + 1) * batch_size][part]  # (B,)
        # Moved as bytes: a quarter of what the floats would be.
        yield normalise(images[chosen].to(device)), labels[chosen].to(device)


def _gather(dataset: Dataset, root: Path) -> dict[str, bytearray]:
    """The checked contents of the four files, which afterwards lie raw under `root`."""
    if root.exists() and not root.is_dir():
        raise SettingError(f"DATA_PATH is {root}, which is a file: name a folder")
    files = _read(dataset, root, dataset.md5)
    raw = set(files)
    for folder in (root, DEBIAN / dataset.name):
        files |= _read(dataset, folder, [name for name in dataset.md5 if name not in files], ".gz")
    if missing := [name for name in dataset.md5 if name not in files]:
        files |= _fetch(dataset, root, missing)
    _write({name: data for name, data in files.items() if name not in raw}, root / dataset.name)
    return files


def _fetch(dataset: Dataset, root: Path, missing: list[str]) -> dict[str, bytearray]:
    """The missing files from another machine; raises `UserError`, telling all that was tried."""
    tried = f"{dataset.name} is not whole in {root}, nor in {DEBIAN / dataset.name}"
    sources = (("torchvision", dataset.torchvision, _download), ("apt-get", dataset.debian, _apt_get))
    for label, known, source in sources:
        if not known:
            continue
        log.info("fetching %s through %s", dataset.name, label)
        try:
            with tempfile.TemporaryDirectory() as scratch:  # removed whatever happens
                source(dataset, Path(scratch))
                files = _read(dataset, Path(scratch), missing, ".gz")
            if len(files) == len(missing):
                return files
            raise FileNotFoundError("some files are missing there")
        except (UserError, OSError, RuntimeError, HTTPException) as error:
            log.info("%s gave no data, going on without it: %s", label, error)
            tried += f", nor through {label} ({error})"
    names = ", ".join(f"{name}.gz" for name in missing)
    install = f", or run 'apt-get install {dataset.debian}'" if dataset.debian else ""
    raise UserError(f"{tried}: put {names} into {root}{install}")


def _download(dataset: Dataset, scratch: Path) -> None:
    """Fill `scratch` with the .gz files from torchvision's first mirror."""
    from torchvision import datasets  # here, because only a first run needs it and it is slow to import

    known = getattr(datasets, dataset.torchvision)
    urls = {known.mirrors[0] + file: md5 for file, md5 in known.resources}
    # A socket's timeout holds for each address of a host, and not for looking up its name: behind a silent
    # firewall they add up to minutes. A process that only asks can be stopped in time.
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
    _run([sys.executable, "-c", ask, next(iter(urls))], scratch, TIMEOUT)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision itself would wait for ever
    try:
        for url, md5 in urls.items():
            datasets.utils.download_url(url, scratch, md5=md5)
    finally:
        socket.setdefaulttimeout(before)


def _apt_get(dataset: Dataset, scratch: Path) -> None:
    """Fetch Debian's package into `scratch` and unpack it there; apt verifies its signature."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    # With lists and cache of its own, apt-get needs no privileges and leaves the system as it was.
    apt = ["apt-get", "-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
    apt += ["-o", f"Acquire::http::Timeout={TIMEOUT}"]
    unpack = ["sh", "-c", "dpkg-deb -x *.deb ."]
    commands = ([*apt, "update"], [*apt, "download", dataset.debian], unpack)
    for command in progress(log, iterable=commands, desc=f"apt-get download {dataset.debian}", unit="command"):
        _run(command, scratch)


def _run(command: list[str], folder: Path, timeout: float = 300) -> None:
    """Run `command` in `folder`; raises `OSError`, with its last words, if it is missing, slow, or fails."""
    try:
        subprocess.run(command, cwd=folder, timeout=timeout, capture_output=True, text=True, check=True)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer within {timeout} s") from None
    except subprocess.CalledProcessError as error:
        raise OSError((error.stderr.strip() or str(error)).splitlines()[-1]) from None


def _read(dataset: Dataset, folder: Path, names: Iterable[str], suffix: str = "") -> dict[str, bytearray]:
    """The checked, extracted contents of those `names` that lie, with `suffix`, anywhere under `folder`.

    A file of another data set in the table is passed over, since they all use the same names; any other
    content is a mistake that the user should know of, unless the right file lies elsewhere in `folder`.
    """
    others = {md5 for row in DATASETS.values() if row is not dataset for md5 in row.md5.values()}
    files = {}
    for name in names:
        wrong = ""
        for path in filter(Path.is_file, sorted(folder.rglob(name + suffix))):
            data = _extract(path)
            md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
            if md5 == dataset.md5[name]:
                files[name] = data
                break
            if md5 not in others:
                wrong = f"{path} is not {dataset.name}'s: MD5 {md5} instead of {dataset.md5[name]}"
        if wrong and name not in files:
            raise UserError(f"{wrong}. Delete it or move it out of {folder}, and run again")
    return files


def _extract(path: Path) -> bytearray:
    """The bytes of `path`, decompressed if it is a .gz; raises `UserError` if it cannot be read."""
    try:
        data = path.read_bytes()
        return bytearray(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut short or no gzip file ({error}): delete it, and run again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _write(files: dict[str, bytearray], folder: Path) -> None:
    """Write each file under another name first, so that an interrupted one never looks whole."""
    for name, data in files.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # same disk, so that the move is atomic
                part = Path(scratch, "part")
                part.write_bytes(data)
                os.replace(part, folder / name)
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}): choose another DATA_PATH") from None
