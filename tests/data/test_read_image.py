"""`datasets.read_image`: an image file in the form that a model was trained on; and the size of the file's image."""

import re
import struct
from functools import partial

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from test_folder import METADATA, PICTURE, save

from src.data.datasets import load, read_image
from src.data.images import decode, upright_size
from src.utils.errors import UserError

GREY = PICTURE[..., 0]  # (32, 32)
read = partial(read_image, name="fashion-mnist", image_size=32, channels=1)


def test_an_image_of_the_model_s_size_keeps_its_pixels(tmp_path):
    x = read(save(tmp_path / "a.png", GREY))
    assert (x.dtype, x.shape, x.is_contiguous()) == (torch.uint8, (1, 32, 32), True)
    np.testing.assert_array_equal(x[0], GREY)


def test_an_image_of_the_data_set_s_size_keeps_its_pixels_in_a_black_frame(tmp_path):
    np.testing.assert_array_equal(read(save(tmp_path / "a.png", GREY[:28, :28]))[0], np.pad(GREY[:28, :28], 2))


def test_an_image_of_the_data_set_is_read_as_the_data_set_is(data, tmp_path):
    images, _ = load("fashion-mnist-tiny", data, "test", 28)
    expected, _ = load("fashion-mnist-tiny", data, "test", 32)
    path = save(tmp_path / "a.png", images[3, 0].numpy())
    assert torch.equal(read(path, name="fashion-mnist-tiny"), expected[3])
    assert torch.equal(read(path, name="fashion-mnist-tiny", image_size=28), images[3])


@pytest.mark.parametrize("height, width", [(27, 27), (30, 30), (64, 64), (32, 28), (28, 50), (300, 200), (1, 1)])
def test_any_other_is_cropped_resized_and_framed(height, width, tmp_path):
    path = save(tmp_path / "a.png", np.resize(GREY, (height, width)))
    expected = torch.nn.functional.pad(decode(path, 28, 1), (2, 2, 2, 2))
    assert torch.equal(read(path), expected)
    assert expected.any()


@pytest.mark.parametrize("side", [28, 32, 50])
def test_data_sets_whose_images_are_not_padded_have_no_frame(side, tmp_path):
    path = save(tmp_path / "a.png", np.resize(PICTURE, (side, side, 3)))
    for name in "folder", "cifar10":
        assert torch.equal(read(path, name=name, channels=3), decode(path, 32, 3))
    assert torch.equal(read(path, name="folder", image_size=48), decode(path, 48, 1))


@pytest.mark.parametrize("side", [28, 32, 50])
def test_grayscale_and_colour_are_made_of_each_other(side, tmp_path):
    colour, grey = save(tmp_path / "a.png", PICTURE[:side, :side]), save(tmp_path / "b.png", GREY[:side, :side])
    assert read(colour).shape == (1, 32, 32)
    assert torch.equal(read(grey, channels=3), read(grey).expand(3, -1, -1))


@pytest.mark.parametrize("case", METADATA)
def test_damaged_metadata_do_not_matter(case, tmp_path):
    path = save(tmp_path / "a.png", GREY[:28, :28])
    expected, content = read(path), path.read_bytes()
    path.write_bytes(content[:33] + METADATA[case] + content[33:])
    assert torch.equal(read(path), expected)


@pytest.mark.parametrize("case", METADATA)
def test_damaged_metadata_do_not_hide_the_size(case, tmp_path):
    path = save(tmp_path / "a.png", GREY[:28, :20])
    content = path.read_bytes()
    path.write_bytes(content[:33] + METADATA[case] + content[33:])
    assert upright_size(path) == (20, 28)


ASCII, SHORT = 2, 3  # types of a number or text in EXIF data


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (SHORT, b"\1\0", (20, 28)),
        (SHORT, b"\3\0", (20, 28)),
        (SHORT, b"\6\0", (28, 20)),  # by 90°
        (SHORT, b"\x63\0", (20, 28)),  # no orientation is 99
        (ASCII, b"6\0", (20, 28)),
    ],
)
def test_the_size_is_that_of_the_upright_image(kind, value, expected, tmp_path):
    count = len(value) if kind == ASCII else 1
    entry = struct.pack("<HHI", ExifTags.Base.Orientation, kind, count) + value.ljust(4, b"\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    Image.new("L", (20, 28)).save(tmp_path / "a.png", exif=exif)
    assert upright_size(tmp_path / "a.png") == expected
    assert decode(tmp_path / "a.png", 28, 1).shape == (1, 28, 28)


def test_what_is_transparent_shows_white_within_the_frame(tmp_path):
    Image.new("LA", (28, 28)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png")[0], np.pad(np.full((28, 28), 255), 2))


@pytest.mark.parametrize("content", [b"", b"a text", b"cut"])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path):
    path = save(tmp_path / "a.png", GREY)
    path.write_bytes(path.read_bytes()[:300] if content == b"cut" else content)
    with pytest.raises(UserError, match=rf"^cannot read the image {re.escape(str(path))} \(.+\): repair it"):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    for path in tmp_path / "a.png", tmp_path:
        with pytest.raises(UserError, match=rf"^no image at {re.escape(str(path))}: give an existing file$"):
            read(path)
