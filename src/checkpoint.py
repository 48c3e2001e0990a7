"""Training state on disk: written all or not at all, verified when read, and never executed.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries; what they mean is its user's
affair.
"""

import contextlib
import errno
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from src.errors import SettingError, UserError  # a bad file is something the user can mend

PROGRAM = "simple-ddpm"
FORMAT = 1  # raised whenever an older program could not read the file


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that, whatever happens, `path` holds either the old file or the new one, whole.

    The bytes go to a temporary file beside it and are forced to disk before the rename, which is atomic; the
    directory is forced to disk after it, or a power cut could undo the rename.

    Raises:
        UserError: the file cannot be written (no space, no permission, not a directory), or should not be: some
            of the numbers in `state` are not finite.
    """
    if not _finite(state):
        raise UserError(f"{path} was not written: the new weights are not finite. Reduce --learning_rate")
    torch.save({"program": PROGRAM, "format": FORMAT, **state}, content := io.BytesIO())  # fails only out of memory
    temporary = path.with_name(path.name + ".tmp")  # one name for ever: a leftover is overwritten, not collected
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free space or choose another path") from error
    finally:
        with contextlib.suppress(OSError):  # renamed; or, where nothing can be written, nothing can be removed
            temporary.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read back what `save` wrote, all tensors on the CPU.

    Raises:
        UserError: there is no such file; it is damaged; it is not of this program, or of a newer one;
            its weights are not finite.
    """
    if not path.is_file():
        there = next(filter(Path.is_file, of_run(path.parent)), Path("weights", "fashion-mnist.pth"))
        raise UserError(
            f"no checkpoint at {path}: train one with python train.py, or give a file that is there, such as {there}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing and has no directories; of one, torch.load would give unset memory.
            odd = [e.filename for e in archive.infolist() if e.external_attr or e.compress_type != zipfile.ZIP_STORED]
            damaged = odd[0] if odd else archive.testzip()  # torch.load checks no CRC: a flipped bit is a wrong weight
        if damaged is not None:
            raise UserError(f"{path} is damaged (checksum of {damaged}): restore it from a copy or move it away")
        state = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: no code runs from the file
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no checkpoint, or a truncated one: give another file, or move it away") from error
    except (EOFError, OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}): restore it or move it away") from error
    if not isinstance(state, dict) or state.get("program") != PROGRAM:
        raise UserError(f"{path} is another program's checkpoint: give one that this train.py wrote")
    version = state.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(f"{path} has format {version}, unknown to this program, which reads {FORMAT}: update it")
    if not _finite(state):
        raise UserError(f"{path} holds weights that are not numbers (NaN or infinite): restore an earlier one")
    return state


def of_run(directory: Path) -> list[Path]:
    """The checkpoints of a training in `directory`, each a whole state; the one to resume from comes first.

    latest.pth is missing where a run was killed before it wrote one, or where somebody tidied up.
    """
    paths = [directory / f"{name}.pth" for name in ("latest", "final", "best")]
    return [path for path in paths if os.path.lexists(path)]  # a dangling link is a lost file, not an absent one


def clear(directory: Path, overwrite: bool) -> None:
    """Make room for a new run: delete what an earlier one left in `directory`, if the user said to; else raise."""
    weights = directory / "weights.pth"  # nothing to resume from, but somebody's model
    left = of_run(directory) + [weights] * os.path.lexists(weights)
    if left and not overwrite:
        names = ", ".join(map(str, left))
        raise SettingError(f"a new run would lose {names}: add --fresh --overwrite, or give other paths")
    for path in left:
        path.unlink()


def other_version(path: Path) -> UserError:
    """What to raise where a whole and sound file does not fit this program."""
    return UserError(f"{path} was written by another version of this program: use that one, or train anew")


def _finite(value: Any) -> bool:
    """Whether every number in every tensor, however deep in dictionaries and lists, is finite."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, (list, tuple)) else True


def _fsync_directory(directory: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no directories
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no such thing
            raise
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
