"""`src/utils/checkpoint.py`: what comes back is what was written, and anything else is refused in one line."""

import contextlib
import errno
import io
import os
import pickle
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, differences

from src.utils import checkpoint
from src.utils.errors import SettingError, UserError

STATE = {
    "settings": {"unet_dim_mults": [1, 2], "schedule_type": "cosine", "eta": 0.0, "class_counts": []}
    | checkpoint.UNRECORDED,
    "model": {"weight": torch.arange(600.0).view(20, 30), "bias": torch.tensor([2.0, -0.0])[1:]},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
    "rng": {"cpu": torch.get_rng_state(), "cuda": torch.get_rng_state()},
    "history": {"train": [0.5, 0.25], "val": []},
    "best": float("inf"),
    "step": 7,
}
HEADER = {"program": checkpoint.PROGRAM, "format": checkpoint.FORMAT}


@pytest.fixture
def path(tmp_path) -> Path:
    """A checkpoint of STATE."""
    checkpoint.save(tmp_path / "latest.pth", STATE)
    return tmp_path / "latest.pth"


def refusal(path: Path) -> str:
    """The message with which a file is refused: one line that names it."""
    with pytest.raises(UserError) as refused:
        checkpoint.load(path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    return message


# ---- reading -----------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back_to_the_last_bit(path):
    assert not differences(checkpoint.load(path), {**HEADER, **STATE})


def test_settings_that_older_checkpoints_do_not_record_are_filled_in(tmp_path):
    old, new = {"classes": ["a", "b"]}, {"classes": ["a", "b"], "encoder_attention": True, "class_counts": [5, 3]}
    new["objective"] = "consistency"
    checkpoint.save(tmp_path / "old.pth", {"settings": old})
    added = {"encoder_attention": False, "objective": "denoising", "class_counts": [1, 1]}  # equal frequencies
    assert checkpoint.load(tmp_path / "old.pth")["settings"] == old | added
    checkpoint.save(tmp_path / "new.pth", {"settings": new})
    assert checkpoint.load(tmp_path / "new.pth")["settings"] == new
    checkpoint.save(tmp_path / "cache.pt", {"content": {}})
    assert "settings" not in checkpoint.load(tmp_path / "cache.pt")


def test_weights_that_are_needed_and_absent_are_named(path):
    assert checkpoint.load(path, "model")["step"] == 7
    with pytest.raises(UserError, match=r"latest\.pth holds no averaged weights: give another file, or other weights"):
        checkpoint.load(path, "ema")
    checkpoint.save(path, {"model": STATE["model"]})
    with pytest.raises(UserError, match=r"latest\.pth holds no raw weights"):
        checkpoint.load(path, "model")


@pytest.mark.parametrize("error", [KeyError, RuntimeError, ValueError])
def test_content_that_does_not_fit_is_explained_as_another_version_s(error, path):
    message = rf"{path} was written by another version of this program"
    with pytest.raises(UserError, match=message) as raised, checkpoint.explained(path):
        raise error("size mismatch")
    assert isinstance(raised.value.__cause__, error)
    with pytest.raises(OSError), checkpoint.explained(path):  # no mistake of the file's
        raise OSError


def test_a_full_gpu_is_no_mistake_of_the_file_s(path):
    with pytest.raises(torch.OutOfMemoryError), checkpoint.explained(path):  # which is a RuntimeError
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_read_nor_written(number, path):
    before, ruined = path.read_bytes(), {"ema": {"weight": torch.tensor([1.0, number])}}
    with pytest.raises(UserError, match="not written"):
        checkpoint.save(path, ruined)
    assert path.read_bytes() == before
    torch.save({**HEADER, **ruined}, path)
    assert "not numbers" in refusal(path)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (1.0, x), lambda x: {"a": [{"b": (0, x)}]}])
def test_a_number_that_is_not_finite_is_found_however_deep_it_lies(wrap, path):
    before = path.read_bytes()
    with pytest.raises(UserError, match="not written"):
        checkpoint.save(path, {"parts": wrap(torch.tensor([float("nan")]))})
    assert path.read_bytes() == before
    checkpoint.save(path, {"parts": wrap(torch.tensor([1.0]))})  # negative control


def test_a_leftover_of_a_killed_save_is_ignored_and_overwritten(path):
    leftover = path.with_name("latest.pth.tmp")
    leftover.write_bytes(b"half a file")
    assert checkpoint.load(path)["step"] == 7
    checkpoint.save(path, {"step": 8})
    assert checkpoint.load(path)["step"] == 8
    assert os.listdir(path.parent) == ["latest.pth"]


def test_a_missing_file_is_named_and_so_is_the_remedy(tmp_path):
    assert "train.py" in refusal(tmp_path / "absent.pth")


def test_the_file_that_is_proposed_instead_is_there(tmp_path):
    proposed = re.search(r"such as (\S+)$", refusal(tmp_path / "absent.pth"))[1]
    assert (ROOT / proposed).is_file()
    checkpoint.save(tmp_path / "final.pth", STATE)
    assert refusal(tmp_path / "absent.pth").endswith(f"such as {tmp_path / 'final.pth'}")  # one of the same run first


def test_a_directory_is_no_checkpoint(tmp_path):
    refusal(tmp_path)


class Payload:
    """Unpickled, it creates a file: what a malicious checkpoint would do with more ambition."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["torch.save", "torch.save of long ago", "pickle"])
def test_code_in_a_file_is_never_run(how, tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    state = {**HEADER, "model": Payload(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch.save")
    refusal(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists(), "the payload was harmless, so the test proved nothing"


@pytest.mark.parametrize("text", ["", "\nthe reason\nand what PyTorch thinks of it"], ids=["silent", "wordy"])
@pytest.mark.parametrize("kind", [EOFError, OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError])
def test_whatever_torch_load_raises_becomes_one_line(kind, text, path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise kind(text) if text else kind

    monkeypatch.setattr(torch, "load", fail)
    message = refusal(path)
    if kind is not KeyError:  # whose text is its key in quotation marks
        assert ("(the reason)" if text else f"({kind.__name__})") in message


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"# a text file\n" * 100, b"PK\x03\x04" + bytes(5000)],
    ids=["empty", "two bytes", "text", "a zip's beginning"],
)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    path = tmp_path / "latest.pth"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize(
    "state", [{"state_dict": {"w": torch.ones(3)}}, torch.ones(3), [1, 2]], ids=["dict", "tensor", "list"]
)
def test_another_program_s_checkpoint_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "theirs.pth")
    assert "another program" in refusal(tmp_path / "theirs.pth")


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("photo.txt", "a house")
    refusal(tmp_path / "photos.pth")


def test_a_newer_format_is_refused_with_both_numbers(tmp_path):
    newer = checkpoint.FORMAT + 1
    torch.save({**HEADER, "format": newer}, tmp_path / "future.pth")
    message = refusal(tmp_path / "future.pth")
    assert str(newer) in message and str(checkpoint.FORMAT) in message and "update" in message


@pytest.mark.parametrize("header", [{}, {"format": "2"}, {"format": None}], ids=["none", "text", "nothing"])
def test_a_file_without_a_format_number_is_refused(header, tmp_path):
    torch.save({"program": checkpoint.PROGRAM, **header}, tmp_path / "odd.pth")
    refusal(tmp_path / "odd.pth")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused(share, path):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(path)


def test_a_damaged_byte_is_refused_or_does_no_harm(path):
    """Every 41st byte inverted, so headers, pickle, tensors, padding and directory are all hit."""
    content, refused = path.read_bytes(), 0
    for offset in range(0, len(content), 41):
        damaged = bytearray(content)
        damaged[offset] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert not differences(checkpoint.load(path), {**HEADER, **STATE}), f"byte {offset} changed what is read"
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > len(content) / 41 / 2  # most of the file is content, not padding


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_any_record_s_data_is_refused(bit, path):
    content = path.read_bytes()
    for record in records(path):
        damaged = bytearray(content)
        damaged[content.index(record) + len(record) // 2] ^= 1 << bit
        path.write_bytes(damaged)
        refusal(path)


def records(path: Path) -> list[bytes]:
    """The contents of the zip's entries, which PyTorch leaves uncompressed."""
    with zipfile.ZipFile(path) as archive:
        return [data for name in archive.namelist() if len(data := archive.read(name)) > 1]


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_the_table_of_contents_is_refused_or_does_no_harm(bit, tmp_path):
    """One bit there makes a tensor a folder, for which PyTorch hands out memory that it never filled."""
    state = {"weight": torch.arange(60.0), "step": 7}
    checkpoint.save(path := tmp_path / "small.pth", state)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    for offset in range(start, len(content)):
        damaged = bytearray(content)
        damaged[offset] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            changed = differences(checkpoint.load(path), {**HEADER, **state})
        except UserError:
            continue
        assert not changed, f"byte {offset - start} of the table of contents"


# ---- writing -----------------------------------------------------------------------------------------------


def test_a_save_reaches_the_disk_before_the_old_file_is_replaced(tmp_path, monkeypatch):
    """Bytes, then name, then directory: any other order can lose both files in a power cut."""
    path, calls = tmp_path / "best.pth", []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            calls.append("fsync directory")
        else:
            temporary = path.with_name("best.pth.tmp")
            assert not differences(checkpoint.load(temporary), {**HEADER, **STATE}), "not all was written before"
            calls.append("fsync file")
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent == tmp_path  # only within one file system is it atomic
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    checkpoint.save(path, STATE)
    assert calls == ["fsync file", "rename", "fsync directory"]


def test_a_small_file_reaches_the_disk_whole_too(path, monkeypatch):
    """It fits into Python's buffer, which os.fsync does not see."""
    sizes, fsync = [], os.fsync

    def spy(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    checkpoint.save(path, {"step": 8})
    assert sizes == [path.stat().st_size]
    assert sizes[0] < io.DEFAULT_BUFFER_SIZE  # else Python would have written it at once


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_whole_and_nothing_else(call, path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=r"latest\.pth.*No space left"):
        checkpoint.save(path, {"step": 8})
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 7
    assert os.listdir(path.parent) == ["latest.pth"]


@pytest.mark.parametrize(("number", "refused"), [(errno.EIO, True), (errno.EINVAL, False)], ids=["EIO", "EINVAL"])
def test_a_directory_that_cannot_be_forced_to_disk_leaves_the_new_file_whole(number, refused, path, monkeypatch):
    """An error of the disk is told; a file system that does not know the call (EINVAL) must not stop a training."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError) if refused else contextlib.nullcontext():
        checkpoint.save(path, {"step": 8})
    assert checkpoint.load(path)["step"] == 8
    assert os.listdir(path.parent) == ["latest.pth"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_closes_the_directory_that_it_opened(fails, path, monkeypatch):
    opened, closed = [], []
    open_file, close, fsync = os.open, os.close, os.fsync

    def spy_open(*arguments: Any) -> int:
        opened.append(open_file(*arguments))
        return opened[-1]

    def spy_close(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    def spy_fsync(descriptor: int) -> None:
        if fails and descriptor in opened:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "close", spy_close)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        checkpoint.save(path, {"step": 8})
    assert len(opened) == 1 and closed == opened


def test_a_save_that_the_user_interrupts_leaves_the_old_file_whole_and_nothing_else(path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"step": 8})
    assert checkpoint.load(path)["step"] == 7
    assert os.listdir(path.parent) == ["latest.pth"]


def test_a_full_disk_costs_one_line_and_never_the_old_file(path):
    """A limit on the size of files stands in for the disk; the message gives the reason, not PyTorch's innards."""
    code = (
        "import sys, torch, resource; from pathlib import Path; from src.utils import checkpoint, errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "state = {'weights': torch.zeros(1_000_000)}\n"
        "errors.run(lambda: checkpoint.save(Path('latest.pth'), state), 'train.py', quiet=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=path.parent, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: error: cannot write latest.pth") and done.stderr.count("\n") == 1
    assert checkpoint.load(path)["step"] == 7
    assert os.listdir(path.parent) == ["latest.pth"]
    assert os.strerror(errno.EFBIG) in done.stderr


def test_a_place_that_is_no_directory_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        checkpoint.save(tmp_path / "file" / "latest.pth", STATE)


# ---- the files of a run ------------------------------------------------------------------------------------


def test_the_latest_checkpoint_of_a_run_comes_first_and_a_link_to_a_lost_one_counts(tmp_path):
    assert checkpoint.of_run(tmp_path) == []
    for name in ("best.pth", "weights.pth", "other.pth", "final.pth"):
        (tmp_path / name).write_text("")
    assert checkpoint.of_run(tmp_path) == [tmp_path / "final.pth", tmp_path / "best.pth"]
    (tmp_path / "latest.pth").symlink_to(tmp_path / "unplugged.pth")
    assert checkpoint.of_run(tmp_path) == [tmp_path / f"{name}.pth" for name in ("latest", "final", "best")]


@pytest.mark.parametrize("names", [["weights"], ["best"], ["latest", "final", "best", "weights"]])
def test_a_new_run_deletes_the_old_one_s_files_only_when_told(names, tmp_path):
    files, other = [tmp_path / f"{name}.pth" for name in names], tmp_path / "other.pth"
    for path in (*files, other):
        path.write_text("")
    with pytest.raises(SettingError, match=re.escape(f"would lose {', '.join(map(str, files))}: add")):
        checkpoint.clear(tmp_path, overwrite=False)
    assert all(path.exists() for path in files)
    checkpoint.clear(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == [other]
    for overwrite in (False, True):
        checkpoint.clear(tmp_path, overwrite)  # there is nothing left to lose
    assert other.exists()


def test_a_file_of_another_version_is_named_in_an_error_that_the_user_sees(path):
    error = checkpoint.other_version(path)
    assert isinstance(error, UserError) and str(error).startswith(f"{path} was written by another version")
