"""Cache on disk for results that take minutes to compute: features of the test images, a trained classifier."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from src.utils import checkpoint
from src.utils.errors import UserError
from src.utils.progress import progress

log = logging.getLogger(__name__)


class TensorLike(Protocol):
    """The part of a tensor's interface that `key` uses. Images in files have it, too."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""

    @property
    def shape(self) -> torch.Size:
        """Sizes of all dimensions."""

    def split(self, size: int, /) -> Iterable[Tensor]:
        """All rows in order, `size` at a time; fewer in the last part."""


def folder() -> Path:
    """The default directory of the cache, within that of torch.hub, which the variable TORCH_HOME sets."""
    return Path(torch.hub.get_dir()) / "simple-ddpm"


def key(recipe: str, *tensors: TensorLike) -> str:
    """Hash a description of a computation and its input tensors to a key (SHA-256, hexadecimal)."""
    digest = hashlib.sha256(recipe.encode())
    for tensor in tensors:
        digest.update(f" {tensor.dtype} {tuple(tensor.shape)}".encode())
        if isinstance(tensor, Tensor):
            parts = tensor.split(1024) if tensor.ndim else [tensor]
        else:  # images in files, which may be larger than memory
            bar = {"total": -(-tensor.shape[0] // 1024), "desc": "hashing images", "unit": " chunks"}
            parts = progress(log, iterable=tensor.split(1024), **bar)
        for part in parts:
            digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def recall(name: str, key: str, make: Callable[[], dict[str, Any]], place: Path | None = None) -> dict[str, Any]:
    """Return the cached value of `key`, or compute and store it.

    The value is computed again if its file is damaged or belongs to another key. If the file cannot be written, a
    warning is logged.

    Args:
        name: start of the file name, in lower case with hyphens.
        key: as returned by the function `key`.
        make: computes the value, a dictionary of tensors, numbers and strings.
        place: directory of the cache; None means `folder()`.
    """
    file = (place or folder()) / f"{name}-{key[:16]}.pt"
    if os.path.exists(file):  # False, too, in a directory that must not be read
        try:
            state = checkpoint.load(file)
            if state.get("key") == key:
                return state["content"]
            log.warning("%s belongs to something else; what belongs there is computed again", file)
        except UserError as error:
            log.warning("%s; it is computed again", error)
    content = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(file, {"key": key, "content": content})
    except OSError as error:
        log.warning("cannot write to %s (%s); the next run has to compute it again", file.parent, error.strerror)
    except UserError as error:
        log.warning("%s; the next run has to compute it again", error)
    return content
