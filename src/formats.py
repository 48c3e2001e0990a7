"""The file formats that data sets are published in: the bytes of their files → images and labels.

Each reader takes the files of a whole set, as `fetch.gather` returns them, and picks those of one split. The files
have been checked by MD5 before, so what is read here is what was published.
"""

import pickle
import struct
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "test"]


def read_idx(files: Mapping[str, bytearray], split: Split) -> tuple[Tensor, Tensor]:
    """MNIST's format (LeCun, Cortes & Burges 1998): a header of big-endian numbers, then one byte a pixel or label.

    Returns images (N, 1, H, W) uint8 in [0, 255] and labels (N,) int64.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    data = files[f"{prefix}-images-idx3-ubyte"]
    _, count, height, width = struct.unpack(">4I", data[:16])
    images = torch.frombuffer(data, dtype=torch.uint8, offset=16).view(count, 1, height, width)
    labels = torch.frombuffer(files[f"{prefix}-labels-idx1-ubyte"], dtype=torch.uint8, offset=8)
    return images, labels.long()


def read_cifar(files: Mapping[str, bytearray], split: Split) -> tuple[Tensor, Tensor]:
    """CIFAR-10's Python batches (Krizhevsky 2009): pickled dicts of `data` (N, 3072), plane by plane, and `labels`.

    Returns images (N, 3, 32, 32) uint8 in [0, 255] and labels (N,) int64.
    """
    prefix = {"train": "data_batch_", "test": "test_batch"}[split]
    # A pickle can run code: these are the bytes that Krizhevsky published, by their MD5. Python 2 wrote them, where
    # text was bytes.
    batches = [pickle.loads(files[name], encoding="latin1") for name in sorted(files) if name.startswith(prefix)]
    images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches]))
    return images.view(-1, 3, 32, 32), torch.tensor([label for batch in batches for label in batch["labels"]])
