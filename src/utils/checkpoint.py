"""Checkpoint files: written atomically, verified when read, and loaded without running code from the file.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries. Apart from the header and the
settings, this module does not depend on its content.
"""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from src.utils.errors import SettingError, UserError, first_line, lacks_memory, writing

PROGRAM = "simple-ddpm"
FORMAT = 1  # to be raised when older versions of the program cannot read the file
# Settings that older checkpoints do not record, with their values there.
UNRECORDED = {"encoder_attention": False, "objective": "denoising"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: after a crash, `path` holds either the complete old file or the complete new one.

    The content goes to a temporary file in the same directory, which is flushed to disk (fsync) and then renamed. The
    directory is flushed as well, because a power failure could otherwise undo the rename.

    Raises:
        UserError: the file cannot be written (no space, no permission, not a directory), or some numbers in `state`
            are not finite.
    """
    if not _finite(state):
        raise UserError(f"{path} was not written: the new weights are not finite. Reduce --learning_rate")
    torch.save({"program": PROGRAM, "format": FORMAT, **state}, content := io.BytesIO())  # in memory
    write(path, content.getbuffer())


def write(path: Path, content: bytes | memoryview, durable: bool = True) -> None:
    """Write a file as `save` does; raises UserError if that is impossible.

    `durable` is whether it must outlast a power failure: flushing each of many files to disk takes long.
    """
    temporary = path.with_name(path.name + ".tmp")  # always the same name, so that the next save replaces a leftover
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
            if durable:
                _fsync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):  # after the rename there is nothing to remove
            temporary.unlink()


def load(path: Path, weights: str | None = None) -> dict[str, Any]:
    """The first of what `load_with_hash` returns."""
    return load_with_hash(path, weights)[0]


def load_with_hash(path: Path, weights: str | None = None) -> tuple[dict[str, Any], str]:
    """Read a checkpoint, with all tensors on the CPU. Settings that an older checkpoint does not record are added.

    Args:
        path: the file, which `save` wrote.
        weights: "ema" or "model", if the caller needs those weights and the settings of their network.

    Raises:
        UserError: the file is missing, damaged, of another program or of a newer version of this one; some of its
            numbers are not finite; or it lacks `weights` or their settings.
    """
    try:
        content = path.read_bytes()  # once: a training may replace the file meanwhile
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # torch.save writes no compressed entries and no directories. For a directory, torch.load would return
            # uninitialised memory.
            odd = [e.filename for e in archive.infolist() if e.external_attr or e.compress_type != zipfile.ZIP_STORED]
            damaged = odd[0] if odd else archive.testzip()  # torch.load does not check the CRC
        if damaged is not None:
            what = "is damaged, or another program's" if odd else "is damaged"
            raise UserError(f"{path} {what} (checksum of {damaged}): restore it from a copy or move it away")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # runs no code
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise _missing(path) from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no checkpoint, or a truncated one: give another file, or move it away") from error
    except (EOFError, OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read ({why}): restore it or move it away") from error
    if not isinstance(state, dict) or state.get("program") != PROGRAM:
        raise UserError(f"{path} is another program's checkpoint: give one that this train.py wrote")
    version = state.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(f"{path} has format {version}, unknown to this program, which reads {FORMAT}: update it")
    if not _finite(state):
        raise UserError(f"{path} holds weights that are not numbers (NaN or infinite): restore an earlier one")
    if weights is not None and (weights not in state or "settings" not in state):
        kind = {"ema": "averaged", "model": "raw"}[weights]
        raise UserError(f"{path} holds no {kind} weights: give another file, or other weights")
    if "settings" in state:
        equal = {"class_counts": [1] * len(state["settings"].get("classes", []))}  # of each class as many images
        state["settings"] = UNRECORDED | equal | state["settings"]
    return state, hashlib.sha256(content).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Context that uses the content of the checkpoint `path`, and explains errors from content that does not fit.

    Raises:
        UserError: instead of the KeyError, RuntimeError or ValueError of settings or weights that are missing or have
            other names or shapes. The file is not damaged: `load` has checked that.
    """
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        if lacks_memory(error) or type(error).__name__ == "AcceleratorError":  # of the device, not of the file
            raise
        raise other_version(path) from error


def of_run(directory: Path) -> list[Path]:
    """The checkpoints in `directory` that a training can resume from, the preferred one first.

    latest.pth is missing if a run was killed before it saved one, or if it was deleted.
    """
    paths = [directory / f"{name}.pth" for name in ("latest", "final", "best")]
    return [path for path in paths if os.path.lexists(path)]  # includes broken links


def clear(directory: Path, overwrite: bool) -> bool:
    """Delete the checkpoints of an earlier run, so that a new one can start; returns whether there were any.

    Raises:
        SettingError: there are checkpoints, and `overwrite` is false.
    """
    weights = directory / "weights.pth"  # a trained model, although no training can resume from it
    left = of_run(directory) + [weights] * os.path.lexists(weights)
    if left and not overwrite:
        names = ", ".join(map(str, left))
        raise SettingError(f"a new run would lose {names}: add --fresh --overwrite, or give other paths")
    for path in left:
        path.unlink()
    return bool(left)


def other_version(path: Path) -> UserError:
    """The error for an undamaged checkpoint whose content does not fit this version of the program."""
    return UserError(f"{path} was written by another version of this program: use that one, or train anew")


def _missing(path: Path) -> UserError:
    """The error for a checkpoint that is not there; it names one that is, if there is any near by."""
    folder = path if os.path.isdir(path) else path.parent
    places = [place / below for place in (folder, folder.parent) for below in (".", "checkpoints")]
    near = [place / f"{name}.pth" for place in places for name in ("best", "latest", "final", "weights")]
    near += [Path("weights", "fashion-mnist.pth")]
    there = [f", or give a file that is there, such as {file}" for file in near if os.path.isfile(file)][:1]
    what = f"{path}, which is a directory" if folder == path else path
    return UserError(f"no checkpoint at {what}: train one with python train.py{''.join(there)}")


def _finite(value: Any) -> bool:
    """Whether all tensors in nested dictionaries and lists are finite."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, (list, tuple)) else True


def _fsync_directory(directory: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open directories
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by some file systems
            raise
    finally:
        os.close(descriptor)
