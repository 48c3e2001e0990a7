"""What takes minutes to compute and never changes, kept on disk: features of the test images, a trained classifier."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import checkpoint  # the one place that writes state atomically and reads it checked
from src.errors import UserError  # which checkpoint raises

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where things are kept unless told otherwise: beside what torch.hub downloads (TORCH_HOME moves both)."""
    return Path(torch.hub.get_dir()) / "simple-ddpm"


def key(recipe: str, *tensors: Tensor) -> str:
    """A SHA-256 of how something is made and what it is made from: another recipe or pixel gives another key."""
    digest = hashlib.sha256(recipe.encode())
    for tensor in tensors:
        digest.update(f" {tensor.dtype} {tuple(tensor.shape)}".encode())
        # In parts, for images may lie in files that memory cannot hold at once.
        for part in tensor.split(1024) if len(tensor.shape) else [tensor]:
            digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def recall(name: str, key: str, make: Callable[[], dict[str, Any]], place: Path | None = None) -> dict[str, Any]:
    """What `make` returned when it was last asked under this key; else what it returns now, kept for the next time.

    A file that is damaged, or another key's, is made again; one that cannot be written costs a warning.

    Args:
        name: in plain words, hyphenated; the file's name begins with it.
        key: as the function `key` returns it.
        make: returns a dictionary of tensors, numbers and strings.
        place: the directory; `folder()` unless given.
    """
    file = (place or folder()) / f"{name}-{key[:16]}.pt"
    if file.exists():
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
    except (OSError, UserError) as error:
        log.warning("%s; the next run has to compute it again", error)
    return content
