"""A directory of the user's own images: real pictures, written in common file formats."""

import json
import multiprocessing
import os
import random
import re
import shutil
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, NETWORK, arguments, differences, run_script
from PIL import Image

import eval as evaluate
import sample
import train
from src import generation
from src.data import datasets, folder, images
from src.data.datasets import batches, classes, in_order, load
from src.data.images import ImageFiles, decode
from src.diffusion import Diffusion
from src.model import UNet
from src.scores import copies, evaluation
from src.training import Learner, validation_loss
from src.utils import cache, checkpoint, identity, pictures
from src.utils.distributed import World
from src.utils.errors import SettingError, UserError

CPU = torch.device("cpu")
HUES = [(np.array(rgb) / 255) for rgb in ((230, 60, 60), (60, 200, 60), (70, 90, 240), (240, 220, 60), (200, 80, 220))]


def save(path: Path, array: np.ndarray, **options) -> Path:
    """Write pixels (H, W) or (H, W, C) in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
    return path


@pytest.fixture(scope="session")
def clothes(data) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The bundled images (N, 1, 28, 28) and labels (N,), by split."""
    return {split: load("fashion-mnist-tiny", data, split, 28) for split in ("train", "test")}


@pytest.fixture(scope="session")
def coloured(clothes, tmp_path_factory) -> Path:
    """A directory of 120 real pictures, 40 × 48 pixels, tinted by class: class/*.png or, every other class, *.jpg."""
    root = tmp_path_factory.mktemp("coloured")
    images, labels = clothes["train"]
    for number in (labels < len(HUES)).nonzero().flatten()[:120].tolist():
        label = labels[number].item()
        grey = Image.fromarray(images[number, 0].numpy()).resize((40, 48), Image.Resampling.BICUBIC)
        name = f"{number:05d}.{'jpg' if label % 2 else 'png'}"
        save(root / datasets.ITEMS[label] / name, np.asarray(grey)[:, :, None] * HUES[label], quality=95)
    return root


@pytest.fixture
def streamed(monkeypatch):
    """Always decode images as needed, and in two threads: the order must not depend on which finishes first."""
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(images, "_processors", lambda: 2)


# ---- one image -------------------------------------------------------------------------------------------

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", ["a.png", "A.PNG", "a.bmp", "a.webp"])
def test_exact_pixels_of_lossless_files_of_the_right_size(name, tmp_path):
    x = decode(save(tmp_path / name, PICTURE, lossless=True), 32, 3)
    assert (x.dtype, x.shape, x.is_contiguous()) == (torch.uint8, (3, 32, 32), True)
    np.testing.assert_array_equal(x.permute(1, 2, 0), PICTURE)


def test_grayscale_and_colour_are_made_of_each_other(tmp_path):
    grey = save(tmp_path / "grey.png", PICTURE[:, :, 0])
    assert torch.equal(decode(grey, 32, 1)[0], torch.from_numpy(PICTURE[:, :, 0].copy()))
    assert torch.equal(decode(grey, 32, 3), decode(grey, 32, 1).expand(3, -1, -1))
    luma = decode(save(tmp_path / "colour.png", PICTURE), 32, 1)[0]
    np.testing.assert_allclose(luma, PICTURE @ [0.299, 0.587, 0.114], atol=1)  # ITU-R 601


@pytest.mark.parametrize(("height", "width"), [(48, 40), (40, 48), (20, 64), (100, 33)])
def test_the_middle_is_kept_and_resized(height, width, tmp_path):
    ramp = np.zeros((height, width, 3))
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)
    x = decode(save(tmp_path / "ramp.png", ramp), 16, 3).double()
    side, middle = min(height, width), 127.5
    for axis, length in ((0, height), (1, width)):
        values = x[axis].mean(1 - axis)  # (16,)
        assert abs(values.mean() - middle) < 1  # the same width is cut off on either side
        expected = 255 / (length - 1) * side * 15 / 16  # between the centres of the first and the last pixel
        assert abs(values[-1] - values[0] - expected) < 3


def test_jpeg_is_as_pillow_reads_it(tmp_path):
    path = save(tmp_path / "a.jpeg", PICTURE)
    np.testing.assert_array_equal(decode(path, 32, 3).permute(1, 2, 0), np.asarray(Image.open(path)))


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken in portrait format: to be rotated by 90° clockwise
    path = save(tmp_path / "a.png", PICTURE, exif=exif)
    np.testing.assert_array_equal(decode(path, 32, 3).permute(1, 2, 0), np.rot90(PICTURE, -1))


def test_what_is_transparent_shows_white(tmp_path):
    alpha = np.full((32, 32, 1), 255, np.uint8)
    alpha[:, 16:] = 0
    x = decode(save(tmp_path / "rgba.png", np.concatenate([PICTURE, alpha], 2)), 32, 3).permute(1, 2, 0)
    np.testing.assert_array_equal(x[:, :16], PICTURE[:, :16])
    assert (x[:, 16:] == 255).all()
    (palette := Image.new("P", (32, 32), 3)).putpalette([10, 20, 30] * 4)
    palette.save(tmp_path / "palette.png", transparency=3)
    assert (decode(tmp_path / "palette.png", 32, 1) == 255).all()
    palette.save(tmp_path / "opaque.png")
    assert decode(tmp_path / "opaque.png", 32, 3)[:, 0, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_and_one(tmp_path):
    Image.fromarray(PICTURE[:, :, 0].astype(np.uint16) * 256 + 99).save(tmp_path / "16.png")
    np.testing.assert_array_equal(decode(tmp_path / "16.png", 32, 1)[0], PICTURE[:, :, 0])
    Image.new("1", (32, 32), 1).save(tmp_path / "1.png")
    assert (decode(tmp_path / "1.png", 32, 3) == 255).all()
    Image.new("CMYK", (32, 32)).save(tmp_path / "cmyk.jpg")
    assert decode(tmp_path / "cmyk.jpg", 32, 3).min() > 250  # no ink


@pytest.mark.parametrize("damage", ["empty", "text", "cut png", "cut jpg", "altered"])
def test_a_file_that_cannot_be_read_is_named(damage, tmp_path):
    path = save(tmp_path / f"a.{damage[-3:] if 'cut' in damage else 'png'}", np.tile(PICTURE, (9, 9, 1)))
    data = path.read_bytes()
    altered = data[:99] + bytes(900) + data[999:]
    path.write_bytes({"empty": b"", "text": b"<html>", "altered": altered}.get(damage, data[: len(data) // 2]))
    with pytest.raises(UserError, match=rf"^cannot read the image {re.escape(str(path))} \(.+\): repair it") as caught:
        decode(path, 32, 3)
    assert "\n" not in str(caught.value)


# ---- a directory of images ---------------------------------------------------------------------------------


def names(root: Path, split: str) -> list[str]:
    return sorted(str(Path(path).relative_to(root)) for path in folder.survey(root).files(split)[0])


def test_classes_are_the_first_folders(tmp_path):
    for i in range(40):
        save(tmp_path / ("dog" if i % 2 else "cat/black") / f"{i:02d}.png", PICTURE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat/notes.txt").write_text("no image")
    save(tmp_path / ".thumbnails/x.png", PICTURE)
    save(tmp_path / "dog/._01.png", PICTURE)
    assert classes("folder", tmp_path) == ("cat", "dog")
    for split in ("train", "test"):
        paths, labels = folder.survey(tmp_path).files(split)
        assert [("cat", "dog")[y] for y in labels] == [Path(path).relative_to(tmp_path).parts[0] for path in paths]
        assert labels.dtype == torch.int64
    assert len(names(tmp_path, "test") + names(tmp_path, "train")) == 40
    assert not set(names(tmp_path, "test")) & set(names(tmp_path, "train"))


def test_without_folders_there_are_no_classes(tmp_path):
    for i in range(11):
        save(tmp_path / f"{i:02d}.png", PICTURE)
    assert classes("folder", str(tmp_path)) == ()
    train = folder.survey(tmp_path).files("train")[1]
    assert train.tolist() == [0] * len(train) and len(train) + len(names(tmp_path, "test")) == 11


def test_folders_called_train_and_test_are_the_splits(tmp_path):
    for split, count in (("train", 12), ("test", 3), ("val", 4)):
        for i in range(count):
            save(tmp_path / split / "ab"[i % 2] / f"{i}.png", PICTURE)
    assert classes("folder", tmp_path) == ("a", "b")
    assert names(tmp_path, "test") == ["test/a/0.png", "test/a/2.png", "test/b/1.png"]
    assert len(names(tmp_path, "train")) == 12
    assert sorted(folder.survey(tmp_path).files("test")[1].tolist()) == [0, 0, 1]


def test_held_out_images_are_of_every_class(coloured):
    """Training holds out the last images: sorted by path, these would all be of one class."""
    labels = load("folder", coloured, "train", 16)[1]
    assert len(set(labels[-40:].tolist())) == len(HUES)
    first, again = folder.survey(coloured).files("train"), folder.survey(coloured).files("train")
    assert first[0] == again[0] and torch.equal(first[1], again[1])


def broken(root: Path, case: str) -> None:
    """Make `root` unusable as a directory of images."""
    if case == "file":
        root.write_text("no directory")
    elif case != "absent":
        root.mkdir()
    for name in {
        "one": ["a.png"],
        "beside": ["a.png", "class/b.png"],
        "no test": ["train/cat/a.png", "train/cat/b.png"],
        "strange": ["train/cat/a.png", "train/dog/b.png", "test/cow/c.png"],
        "flat test": ["train/cat/a.png", "train/dog/b.png", "test/c.png"],
        "no images": ["train/cat/a.png", "test/notes.gif"],
        "two": ["train/a.png", "Training/b.png", "test/c.png"],
        "no train": ["test/cat/a.png", "val/cat/b.png"],
        "deep splits": ["data/train/cat/a.png", "data/val/cat/b.png"],
        "splits of classes": ["cat/train/a.png", "cat/test/b.png", "dog/train/a.png", "dog/test/b.png"],
    }.get(case, []):
        save(root / name, PICTURE)


@pytest.mark.parametrize(
    ("case", "split", "message"),
    [
        ("absent", "train", "which is no directory: name the one with your images"),
        ("file", "train", "which is no directory"),
        ("empty", "train", "holds too few images for training (.png, .jpg, .jpeg, .jfif, .webp, .bmp): add some"),
        ("one", "test", "holds too few images for testing"),
        ("beside", "train", "has images both in class folders and beside them: move those into a folder"),
        ("no test", "train", "has a folder train, but none called test with images: add it, or name"),
        ("strange", "test", "test has a class 'cow', unlike"),
        ("flat test", "test", "test has images beside the class folders, unlike"),
        ("no images", "test", "has a folder train, but none called test with images: add it, or name"),
        ("two", "train", "has the folders Training and train: keep one of them"),
        ("no train", "train", "has a folder test, but none called train with images: add it, or name"),
        ("deep splits", "train", "data has folders train, val, but splits are folders of DATA_PATH itself: name"),
        ("splits of classes", "train", "cat has folders test, train, but splits are folders of DATA_PATH itself"),
    ],
)
def test_directories_that_will_not_do(case, split, message, tmp_path):
    broken(tmp_path / "images", case)
    with pytest.raises(SettingError, match=re.escape(message)) as caught:
        load("folder", tmp_path / "images", split, 32)
    assert str(tmp_path / "images") in str(caught.value) and "\n" not in str(caught.value)


def test_the_current_directory_is_no_default():
    with pytest.raises(SettingError, match="needs --data_path"):
        load("folder", "", "train", 32)


# ---- what a directory may look like ----------------------------------------------------------------------------


def fill(root: Path, **counts: int) -> None:
    """Write so many different pictures into each folder below `root`; "/" is written as "__"."""
    for number, (folder_name, count) in enumerate(counts.items()):
        for i in range(count):
            pixels = np.random.default_rng((number, i)).integers(0, 256, (32, 32, 3))
            save(root / folder_name.replace("__", "/") / f"{i:02d}.png", pixels)


@pytest.mark.parametrize(
    "pair", ["Train Test", "training_set test_set", "TRAIN valid", "train-images val", "train dev"]
)
def test_usual_names_of_split_folders(pair, tmp_path):
    train_folder, test_folder = pair.split()
    fill(tmp_path, **{f"{place}__{name}": 3 for place in (train_folder, test_folder) for name in ("cat", "dog")})
    for strange in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "lost+found"):
        save(tmp_path / strange / train_folder / "cat/._00.png", PICTURE)
        save(tmp_path / strange / "00.png", PICTURE)
    assert classes("folder", tmp_path) == ("cat", "dog")
    for split, place in (("train", train_folder), ("test", test_folder)):
        assert {name.split("/")[0] for name in names(tmp_path, split)} == {place}
        assert len(names(tmp_path, split)) == 6
    assert f"the folders {train_folder} and {test_folder}" in folder.survey(tmp_path).describe()


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, car=3, plane=3, train=3)
    assert classes("folder", tmp_path) == ("car", "plane", "train")


def test_each_real_file_counts_once_whatever_links_there_are(tmp_path):
    fill(tmp_path / "data", a=12, b=12)
    fill(tmp_path / "elsewhere", c=5)
    (tmp_path / "data/a/up").symlink_to("..")  # a loop
    (tmp_path / "data/a/out").symlink_to(tmp_path)  # an ancestor
    (tmp_path / "data/a/again.png").symlink_to("00.png")
    (tmp_path / "data/a/b").symlink_to("../b")  # its files stay in the class b
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere/c")  # on another disk, say
    found = names(tmp_path / "data", "train") + names(tmp_path / "data", "test")
    assert sorted(found) == [f"{name}/{i:02d}.png" for name, n in (("a", 12), ("b", 12), ("c", 5)) for i in range(n)]
    (note,) = folder.survey(tmp_path / "data").notes
    assert note == "not used: 4 linked a second time (a/again.png, a/b and 2 more)"


def test_places_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    fill(tmp_path, a=3, b=3)
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read everything
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patch, pytest.raises(SettingError, match=r"/b \(Permission denied\): make it"):
        patch.setattr(os, "scandir", refuse)
        folder.survey(tmp_path)
    (tmp_path / "notes.txt").symlink_to("/media/unplugged")
    assert "not used: 1 unreadable (notes.txt)" in folder.survey(tmp_path).notes
    (tmp_path / "c").symlink_to("/media/unplugged")
    with pytest.raises(SettingError, match=r"cannot read .*/c \(No such file or directory\): make it readable"):
        folder.survey(tmp_path)


def test_what_was_found_and_what_was_passed_over_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    fill(tmp_path, train__many__cat=30, train__many__dog=30, test__many=5, val__many=4)
    for name in ("1.gif", "2.gif", "notes.txt", "LICENSE"):
        (tmp_path / "train/many" / name).write_bytes(b"")
    os.mkfifo(tmp_path / "train/many/pipe.png")  # to open it would take for ever
    load("folder", tmp_path, "train", 16)
    (report, *notes) = (record.message.removeprefix(f"{tmp_path}: ") for record in caplog.records)
    splits = "60 images for training and 5 for testing (the folders train and test)"
    assert report == f"{splits}; 1 class: many 65"
    assert notes == [
        "not used: 2 .gif (train/many/1.gif, train/many/2.gif)",
        "not used: 1 .txt (train/many/notes.txt)",
        "not used: 1 that are no regular files (train/many/pipe.png)",
        "not used: 1 without a suffix (train/many/LICENSE)",
        "not used: 4 images in val",
        f"all images are of one class, many; the folders in {tmp_path}/train/many are no classes",
    ]


def test_many_classes_are_shortened(tmp_path):
    fill(tmp_path, **{f"c{i:02d}": 2 for i in range(20)})
    assert (
        folder.survey(tmp_path)
        .describe()
        .endswith("20 classes: " + "".join(f"c{i:02d} 2, " for i in range(8))[:-2] + " and 12 more")
    )


@pytest.mark.parametrize("share", ["a", "b"])
def test_the_split_of_an_image_does_not_depend_on_the_others(share, tmp_path):
    for name in "ab"[: 1 + (share == "b")]:
        fill(tmp_path, **{name: 40})
    before = {split: names(tmp_path, split) for split in ("train", "test")}
    order = folder.survey(tmp_path).files("train")[0]
    assert before["test"] and before["train"]
    save(tmp_path / "a/!first.png", PICTURE)
    save(tmp_path / "a/zlast.png", PICTURE)
    (tmp_path / "a" / "05.png").unlink()
    for split, other in (("train", "test"), ("test", "train")):
        assert not set(before[split]) & set(names(tmp_path, other))
    new = [path for path in folder.survey(tmp_path).files("train")[0] if path in order]
    assert new == [path for path in order if path in new]  # and so those that are held out stay the same


def test_every_class_has_an_image_to_train_on_and_there_is_one_to_test(tmp_path):
    for i in range(60):
        save(tmp_path / f"class{i}/0.png", PICTURE)
    assert len(names(tmp_path, "train")) == 60  # by their hashes, some would be for testing
    for i in range(2):
        save(tmp_path / f"class{i}/1.png", PICTURE)
    assert len(names(tmp_path, "test")) == 1


# ---- damaged metadata and large images -------------------------------------------------------------------------


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG file."""
    good = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", good if checksum is None else checksum)


LONG = zlib.compress(bytes(2 << 20))
METADATA = {
    "long comment": chunk(b"zTXt", b"k\0\0" + LONG),
    "long international comment": chunk(b"iTXt", b"k\0\1\0\0\0" + LONG),
    "wrong checksum": chunk(b"tEXt", b"Comment\0hello", 0),
    "unknown, wrong checksum": chunk(b"prVt", b"x", 0),
    "cut": chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("case", METADATA)
@pytest.mark.parametrize("place", [33, -12], ids=["before", "after"])  # the pixels
def test_damaged_metadata_do_not_matter(case, place, tmp_path):
    transparent = np.concatenate([PICTURE, PICTURE[:, :, :1]], 2)
    path = save(tmp_path / "a.png", transparent)
    expected, content = decode(path, 32, 3), path.read_bytes()
    path.write_bytes(content[:place] + METADATA[case] + content[place:])
    assert torch.equal(decode(path, 32, 3), expected)


def test_transparency_is_kept_when_metadata_are_ignored(tmp_path):
    Image.fromarray(PICTURE[:, :, 0]).save(path := tmp_path / "a.png", transparency=int(PICTURE[0, 0, 0]))
    expected, content = decode(path, 32, 1), path.read_bytes()
    assert expected[0, 0, 0] == 255
    path.write_bytes(content[:33] + METADATA["wrong checksum"] + content[33:])
    assert torch.equal(decode(path, 32, 1), expected)


def test_damaged_exif_of_a_webp_does_not_matter(tmp_path):
    path = save(tmp_path / "a.webp", PICTURE, lossless=True, exif=b"Exif\0\0garbage")
    np.testing.assert_array_equal(decode(path, 32, 3).permute(1, 2, 0), PICTURE)


def test_damaged_pixels_do_matter_whatever_the_metadata(tmp_path):
    content = save(path := tmp_path / "a.png", PICTURE).read_bytes()
    path.write_bytes(content[:33] + METADATA["wrong checksum"] + content[33:900] + b"\0" * 99 + content[999:])
    with pytest.raises(UserError, match="cannot read the image"):
        decode(path, 32, 3)


def test_180_megapixels_are_no_attack(tmp_path):
    Image.new("1", (18_000, 10_000), 1).save(tmp_path / "large.bmp")
    assert (decode(tmp_path / "large.bmp", 8, 1) == 255).all()


def test_too_many_pixels_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"\(1,024 pixels, more than 1,000: make it smaller\)"):
        decode(save(tmp_path / "a.png", PICTURE), 32, 3)


# ---- the same images in the built-in format ------------------------------------------------------------------------


@pytest.mark.parametrize("side", [28, 32])
def test_fashion_mnist_as_files_gives_the_batches_of_fashion_mnist(side, data, tmp_path):
    """Real images from PNG files and from IDX files: only their order differs, and it is known."""
    expected = {}
    for split, count in (("train", 300), ("test", 40)):
        images, labels = expected[split] = [part[:count] for part in load("fashion-mnist-tiny", data, split, side)]
        for i, (image, y) in enumerate(zip(images, labels, strict=True)):
            save(tmp_path / split / str(y.item()) / f"{i:05d}.png", image[0])
    for split, (images, labels) in expected.items():
        order = torch.tensor([int(Path(path).stem) for path in folder.survey(tmp_path).files(split)[0]])
        assert sorted(order.tolist()) == list(range(len(images)))
        from_files = batches(*load("folder", tmp_path, split, side, 1), 16, 3, 4)
        built_in = batches(images[order], labels[order], 16, 3, 4)
        for (x, y), (x_built_in, y_built_in) in zip(from_files, built_in, strict=True):
            assert torch.equal(x, x_built_in)
            assert torch.equal(y, y_built_in)


# ---- streaming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 2, 6])
def test_streamed_batches_are_those_from_memory(skip, coloured, request):
    images, labels = load("folder", coloured, "train", 24)
    assert isinstance(images, torch.Tensor)
    request.getfixturevalue("streamed")
    files, same_labels = load("folder", coloured, "train", 24)
    assert isinstance(files, ImageFiles)
    assert (files.shape, files.dtype, len(files)) == (images.shape, images.dtype, len(images))
    assert torch.equal(labels, same_labels)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    in_memory = batches(images[10:], labels[10:], 16, 5, 6, skip)
    streamed = batches(files[10:], labels[10:], 16, 5, 6, skip)
    number = 0
    for (x, y), (x_streamed, y_streamed) in zip(in_memory, streamed, strict=True):
        assert torch.equal(x, x_streamed)
        assert torch.equal(y, y_streamed)
        number += 1
    assert number == 6 - skip
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


def test_what_else_reads_images_reads_files_alike(coloured, streamed):
    files, _ = load("folder", coloured, "train", 16)
    images = files.read()
    assert torch.equal(files[torch.tensor([3, 1])], images[[3, 1]])
    assert torch.equal(torch.cat(list(files[:20].split(7))), images[:20])

    assert cache.key("", files) == cache.key("", images)
    distances, index = copies.nearest(images[:3], files)
    assert distances.tolist() == [0, 0, 0] and index.tolist() == [0, 1, 2]
    unet, diffusion, world = UNet(16, 3, 8, (1, 2)), Diffusion(10, "cosine", prediction="v"), World(CPU)
    loss, same = (validation_loss(unet, diffusion, in_order(x, 16), len(x), 0, world) for x in (files, images))
    assert loss == same


@pytest.mark.parametrize("way", ["memory", "threads"])
def test_a_damaged_file_is_named_in_one_line(way, coloured, tmp_path, request):
    for i in range(40):
        save(tmp_path / f"train/{i}.png", PICTURE)
    save(tmp_path / "test/0.png", PICTURE)
    (tmp_path / "train/33.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    if way == "threads":
        request.getfixturevalue("streamed")
    with pytest.raises(UserError, match=r"cannot read the image .*33\.png") as caught:
        for _ in batches(*load("folder", tmp_path, "train", 32), 4, 0, 0):
            pass
    assert "\n" not in str(caught.value)


def test_images_are_decoded_without_other_processes(coloured, streamed, monkeypatch):
    """Those would need shared memory, of which a container has 64 MB, and would outlive a lost signal."""
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", None)
    files, labels = load("folder", coloured, "train", 16)
    before = threading.active_count()
    stream = batches(files, labels, 8, 0, 0)
    next(stream)
    stream.close()  # nothing goes on after that
    assert threading.active_count() == before
    assert len(list(files.split(10))) == -(-len(files) // 10)


def test_all_damaged_files_are_named_before_the_training(tmp_path, streamed, caplog):
    fill(tmp_path, train=40, test=1)
    for i in range(5, 30, 5):
        (tmp_path / f"train/{i:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"^cannot read 5 of 40 images \(.*, and others named above\): repair") as line:
        load("folder", tmp_path, "train", 32)
    assert "\n" not in str(line.value)
    assert {f"{i:02d}.png" for i in range(5, 30, 5)} == set(re.findall(r"\d\d\.png", caplog.text))


def test_many_files_are_checked_once_until_one_of_them_changes(tmp_path, streamed, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "CACHED", 10)
    fill(tmp_path / "d", train=12, test=1)
    checks, check = [], ImageFiles.check
    monkeypatch.setattr(ImageFiles, "check", lambda self: checks.append(check(self)))
    for expected in (1, 1, 2):
        if expected == 2:
            os.utime(tmp_path / "d/train/00.png", (1, 1))
        load("folder", tmp_path / "d", "train", 32)
        assert len(checks) == expected


# ---- the data of a run -------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, one_thread):
    """`run(data_path, *flags)` is train.py in this process, always on the same checkpoints."""
    monkeypatch.setattr(pictures, "plot_losses", lambda history, path: path.touch())  # quicker
    small = [*NETWORK, *"--image_size 16 --num_samples 1 --steps 2 --device cpu".split()]
    places = [f"--{place}_path={tmp_path / 'run' / place}" for place in ("checkpoint", "output", "log")]

    def train_on(data_path: Path, *flags: object) -> dict:
        command = ["--dataset", "folder", "--data_path", data_path, *small, *places, *flags]
        with torch.random.fork_rng():
            train.main(arguments(train, *command))
        return checkpoint.load(tmp_path / "run/checkpoint/latest.pth")

    return train_on


def test_other_images_are_refused_and_missing_ones_are_not(run, tmp_path, caplog):
    data = tmp_path / "data"
    fill(data, **{"": 60})
    run(data, "--epochs", 1)
    files = folder.survey(data).files("train")[0]

    content = Path(files[7]).read_bytes()
    save(Path(files[7]), 255 - PICTURE)
    with pytest.raises(SettingError, match="are not those that it was trained on"):
        run(data, "--epochs", 2)
    Path(files[7]).write_bytes(content)
    new = next(name for name in map(str, range(99)) if folder.number(f"{name}.png") > 2**63)
    save(data / f"{new}.png", 255 - PICTURE)
    with pytest.raises(SettingError, match="are not those that it was trained on"):
        run(data, "--epochs", 2)
    (data / f"{new}.png").unlink()

    for path in files[5:9]:  # as for a damaged image, which the message says to move away
        Path(path).unlink()
    state = run(data, "--epochs", 2)
    assert "without 4 images that have gone" in caplog.text
    assert (state["epoch"], state["trained_on"]["count"]) == (2, len(files) - 4)


def test_images_that_the_program_wrote_are_no_data(run, tmp_path):
    data = tmp_path
    fill(data, a=12, b=12)
    run(data, "--epochs", 1)
    assert run(data, "--epochs", 2)["settings"]["classes"] == ["a", "b"]
    assert list(data.glob("run/output/*.png"))
    assert (
        "not used: 3 with results of this program (run/checkpoint/, run/log/ and 1 more)" in folder.survey(data).notes
    )


def test_what_is_in_memory_of_a_run_is_saved_when_a_file_is_lost(run, tmp_path, streamed, monkeypatch):
    """A disk that fails in mid-training costs no step; the rest goes on when the file has been moved away."""
    fill(tmp_path / "data", **{"": 60})
    lost = Path(folder.survey(tmp_path / "data").files("train")[0][3])
    step = Learner.step

    def lose(self: Learner, *batch: object) -> tuple:
        if self.steps == 3:
            lost.write_bytes(b"")
        return step(self, *batch)

    monkeypatch.setattr(Learner, "step", lose)
    with pytest.raises(UserError, match=f"cannot read the image {lost}"):
        run(tmp_path / "data", "--epochs", 2, "--batch_size", 4)
    state = checkpoint.load(tmp_path / "run/checkpoint/latest.pth")
    assert state["step"] > 3
    lost.unlink()
    assert run(tmp_path / "data", "--epochs", 2, "--batch_size", 4)["step"] > state["step"]


def test_the_evaluation_says_that_test_images_were_trained_on(run, tmp_path, caplog):
    fill(tmp_path / "data", **{"": 60})
    state = run(tmp_path / "data", "--epochs", 1)
    weights = checkpoint.load(tmp_path / "run/checkpoint/weights.pth")
    train_files, test_files = (folder.survey(tmp_path / "data").files(split)[0] for split in ("train", "test"))
    world, options = World(CPU), evaluation.Options(4, 4, 0, str(tmp_path / "data"))
    generator = generation.Generator(*generation.build(state["settings"], CPU))
    model = evaluation.Model("a.pth", "", state["settings"], generator, weights["trained_on"])
    assert evaluation.load_data(model, options, world).notes == []
    for i, path in enumerate(train_files[:3]):
        shutil.copy(path, Path(test_files[0]).parent / f"{i}.png")
        shutil.copy(path, test_files[0])
    (note,) = evaluation.load_data(model, options, world).notes
    assert re.search(r"At least [1-9]\d* of the \d+ test images were in the train split", note) and note in caplog.text


@pytest.mark.parametrize("most", [10, 1000])
def test_a_record_of_many_files_is_a_sample_of_them(most, monkeypatch):
    monkeypatch.setattr(identity, "MOST", most)
    digests = torch.randint(-(2**63), 2**63 - 1, (200,), generator=torch.Generator().manual_seed(0))
    recorded = identity.record(digests[:100])
    assert (recorded["count"], len(recorded["digests"])) == (100, min(most, 100))
    assert identity.known(recorded, digests[:100]) == (min(most, 100), 0)
    known, new = identity.known(recorded, digests)
    assert known == min(most, 100) and new > 0
    assert identity.known(recorded, digests[100:])[0] == 0


@pytest.mark.parametrize(
    ("count", "given", "sizes"),
    [
        (60_000, [], (2000, 64)),
        (20_000, [], (2000, 64)),
        (600, [], (60, 64)),
        (60, [], (6, 32)),
        (5, [], (1, 4)),
        (600, ["val_size"], (2000, 64)),  # which is then refused
        (60, ["batch_size"], (6, 64)),
    ],
)
def test_defaults_fit_small_data(count, given, sizes):
    assert datasets.training_sizes(count, 2000, 64, 1, given) == sizes
    assert datasets.training_sizes(60, 2000, 64, 64, [])[1] == 64  # each of 64 processes needs one


def test_a_hundred_images_need_no_flag_but_their_path(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    fill(tmp_path / "data", a=70, b=30)
    assert run(tmp_path / "data", "--epochs", 1)["step"] == 1
    model = ["--checkpoint", tmp_path / "run/checkpoint/best.pth", "--steps", 2, "--device", "cpu", "--num_samples", 4]
    sample.main(arguments(sample, *model, "--output_dir", tmp_path / "samples"))
    score = [*model, "--data_path", tmp_path / "data", "--classifier_only", "--output_dir", tmp_path / "scores"]
    evaluate.main(arguments(evaluate, *score))
    assert "classifier" in capsys.readouterr().out


def test_classes_without_test_images_are_refused_before_the_work(run, tmp_path, monkeypatch):
    fill(tmp_path / "data", train__a=20, train__rare=5, test__a=5)
    run(tmp_path / "data", "--epochs", 1, "--batch_size", 8)
    monkeypatch.setattr(evaluation, "make_scorers", None)
    score = ["--checkpoint", tmp_path / "run/checkpoint/best.pth", "--data_path", tmp_path / "data", "--device", "cpu"]
    score += ["--class", "rare", "--output_dir", tmp_path / "scores"]
    with pytest.raises(SettingError, match="data has no test images of rare"):
        evaluate.main(arguments(evaluate, *score))


def test_classes_without_images_to_train_on_are_named(run, tmp_path, caplog):
    fill(tmp_path / "data", a=40, rare=1)
    last = min((n for n in map(str, range(200))), key=lambda n: -folder.number(f"rare/{n}.png"))
    (tmp_path / "data/rare/00.png").rename(tmp_path / f"data/rare/{last}.png")  # the last image is held out
    run(tmp_path / "data", "--epochs", 1)
    assert "no image of the class rare is left to train on" in caplog.text


@pytest.mark.parametrize(("script", "flag"), [(train, "--output_path"), (evaluate, "--output_dir")])
def test_pictures_are_not_written_among_the_data(script, flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments(script, "--data_path", tmp_path, flag, f"{tmp_path}/")
    assert f"{flag[2:].upper()} must not be DATA_PATH" in capsys.readouterr().err


# ---- whole scripts ---------------------------------------------------------------------------------------

SHORT = [*NETWORK, *"--val_size 20 --batch_size 8 --num_samples 4 --steps 3 --device cpu --sample_every 1".split()]


def test_training_on_files_is_training_on_memory(coloured, tmp_path, monkeypatch, one_thread, request):
    """The weights are equal to the last bit, also when the run on files is stopped and resumed within the epoch."""

    def state(name: str, *flags: object) -> dict:
        places = [f"--{place}_path={tmp_path / name / place}" for place in ("checkpoint", "output", "log")]
        command = ["--dataset", "folder", "--data_path", coloured, "--image_size", 16, *SHORT, *places, *flags]
        with torch.random.fork_rng():
            train.main(arguments(train, *command))
        return checkpoint.load(tmp_path / name / "checkpoint/latest.pth")

    expected = state("memory", "--epochs", 1)
    assert (expected["settings"]["channels"], expected["settings"]["dataset"]) == (3, "folder")
    request.getfixturevalue("streamed")

    class Stop(Exception):
        pass

    step, trainers, new = Learner.step, [], train.Trainer.__init__

    def stop(self: Learner, *batch: object) -> tuple:
        if self.steps == 5:
            trainers[-1].checkpoints.save("latest.pth")
            raise Stop
        return step(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train.Trainer, "__init__", lambda self, *given: trainers.append(self) or new(self, *given))
        patch.setattr(Learner, "step", stop)
        state("files", "--epochs", 1)
    assert differences(state("files", "--epochs", 1), expected) == []


def test_colour_from_files_to_samples(coloured, tmp_path):
    """train.py and sample.py on the user's own photographs write colour PNGs of 32 × 32 pixels."""
    done = run_script("train.py", "--dataset", "folder", "--data_path", coloured, *SHORT, "--epochs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_script("sample.py", "--num_samples", 9, "--steps", 5, "--gif", cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs/samples"
    assert "wrote grid.png, 9 images, denoising.gif" in done.stdout
    for path in [*folder.glob("*.png"), *(tmp_path / "outputs").glob("samples_epoch_*.png")]:
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("PNG", "RGB"), path
            assert image.size == (32, 32) or not path.name.startswith("sample_0")
    samples = np.stack([np.asarray(Image.open(path)).astype(int) for path in folder.glob("sample_*.png")])
    assert len(samples) == 9
    assert (samples[..., 0] != samples[..., 1]).any()  # not grey in three channels


def in_colour(picture: np.ndarray) -> str:
    """Draw a picture (H, W, 3) for a terminal: each character is two pixels, one above the other."""
    lines = []
    for upper, lower in zip(picture[0::2], picture[1::2], strict=True):
        pairs = zip(upper.tolist(), lower.tolist(), strict=True)
        lines.append("".join("\033[38;2;{};{};{};48;2;{};{};{}m▀".format(*a, *b) for a, b in pairs) + "\033[0m")
    return "\n".join(lines)


@pytest.mark.slow
def test_one_s_own_pictures_trained_on_sampled_and_scored(clothes, tmp_path, capsys):
    """The README's three commands on 484 pictures, tinted by class: samples of a class have its colour."""
    images, labels = clothes["train"]
    tints = dict(zip(datasets.ITEMS, HUES, strict=False))
    for number in (labels < len(HUES)).nonzero().flatten().tolist():
        name = datasets.ITEMS[labels[number]]
        tinted = images[number, 0].numpy()[:, :, None] * tints[name]  # (28, 28, 3)
        save(tmp_path / f"my_images/{name}/{number}.{'png' if number % 2 else 'jpg'}", tinted, quality=95)

    def run(script: str, flags: str) -> None:
        done = run_script(script, *flags.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    small = "--image_size 16 --unet_dim 16 --unet_dim_mults 1 2 4 --batch_size 16 --learning_rate 2e-3 --device cpu"
    run("train.py", f"--dataset folder --data_path my_images --val_size 20 --epochs 20 {small}")
    run("sample.py", "--class all --num_samples 40 --guidance_scale 2")
    run("eval.py", "--data_path my_images --class all --guidance_scale 2 --num_samples 100 --classifier_only")

    samples = [Image.open(path) for path in sorted((tmp_path / "outputs/samples").glob("sample_*.png"))]
    rows = np.stack([np.asarray(sample) for sample in samples]).reshape(8, 5, 16, 16, 3).swapaxes(0, 1)  # by class
    with capsys.disabled():  # so that a reader of the log can judge the pictures
        print("\ncoat, dress, pullover, t-shirt and trouser, after 20 epochs of 416 pictures:")
        print(in_colour(rows.transpose(0, 2, 1, 3, 4).reshape(5 * 16, 8 * 16, 3)))
    colours = rows.reshape(40, -1, 3).astype(float).mean(1)  # (40, 3)
    hues = np.stack([tint for _, tint in sorted(tints.items())])  # classes are sorted by name
    likeness = colours @ hues.T / np.linalg.norm(colours, axis=1)[:, None] / np.linalg.norm(hues, axis=1)  # cosines
    nearest = likeness.argmax(1).reshape(5, 8)
    # By chance a fifth would be right: half of 40 or more has a probability of 2e-5 then.
    assert (nearest == np.arange(5)[:, None]).mean() >= 0.5, nearest
    (report,) = (tmp_path / "outputs/eval").glob("*/metrics.json")
    scores = json.loads(report.read_text())["scores"]
    assert scores["class_accuracy"] >= 0.5
