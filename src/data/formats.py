"""Parsers for the file formats of published data sets: the bytes of the files → images and labels.

Each function takes the files of both splits, as returned by `fetch.gather`, and parses those of one. Their MD5 has
been checked, so the contents are not validated again.
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
    """Parse MNIST's format, IDX: a header of big-endian 32-bit integers, then one byte per pixel or label.

    Source: LeCun, Cortes & Burges 1998.

    Returns:
        Images (N, 1, H, W) uint8 in [0, 255]; labels (N,) int64.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    data = files[f"{prefix}-images-idx3-ubyte"]
    _, count, height, width = struct.unpack(">4I", data[:16])
    images = torch.frombuffer(data, dtype=torch.uint8, offset=16).view(count, 1, height, width)
    labels = torch.frombuffer(files[f"{prefix}-labels-idx1-ubyte"], dtype=torch.uint8, offset=8)
    return images, labels.long()


def read_cifar(files: Mapping[str, bytearray], split: Split) -> tuple[Tensor, Tensor]:
    """Parse CIFAR-10's Python batches: pickled dictionaries of "data" (N, 3072) uint8 and "labels", a list.

    A row of "data" holds the red, then the green, then the blue plane of an image. Source: Krizhevsky 2009.

    Returns:
        Images (N, 3, 32, 32) uint8 in [0, 255]; labels (N,) int64.
    """
    prefix = {"train": "data_batch_", "test": "test_batch"}[split]
    # A pickle can run code, but the MD5 shows that these are the files that Krizhevsky published. Python 2 wrote them:
    # its strings are bytes, which need an encoding.
    batches = [pickle.loads(files[name], encoding="latin1") for name in sorted(files) if name.startswith(prefix)]
    images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches]))
    return images.view(-1, 3, 32, 32), torch.tensor([label for batch in batches for label in batch["labels"]])
