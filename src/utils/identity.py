"""What a model was trained on, in few bytes: how many files, and short hashes of some of them or of all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOST = 65_536  # hashes that are kept: 512 kB


def record(digests: Tensor) -> dict[str, Any]:
    """Return `count`, the number of `digests` (N,) int64, and `digests`, the MOST smallest of them, sorted.

    The smallest are a random sample, because they are hashes, and of two sets of files they are the same sample.
    """
    return {"count": len(digests), "digests": digests.sort().values[:MOST].clone()}


def known(recorded: Mapping[str, Any], digests: Tensor) -> tuple[int, int]:
    """Return how many of `digests` (N,) int64 are recorded and how many are not, as far as the record tells."""
    kept = recorded["digests"]
    if len(kept) < recorded["count"]:  # of larger hashes it says nothing
        digests = digests[digests <= kept[-1]]
    there = int(torch.isin(digests, kept).sum())
    return there, len(digests) - there
