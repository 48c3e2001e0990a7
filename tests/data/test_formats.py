"""MNIST, KMNIST and CIFAR-10, read from small files in the published formats, with the MD5s in the table patched.

The real files could not be downloaded where these tests were written. Only Fashion-MNIST is tested on real files.
"""

import gzip
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from src.data import fetch
from src.data.datasets import DATASETS, classes, load
from src.data.fetch import Source
from src.utils.errors import SettingError, UserError

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
COUNT = {"train": 30, "test": 12}  # images in the small files


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    """Make every source outside the data folder fail: no installed package, closed ports, an empty PATH."""
    monkeypatch.setattr(fetch, "DEBIAN", tmp_path_factory.mktemp("empty"))
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("nothing")))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for known in (torchvision.datasets.MNIST, torchvision.datasets.KMNIST):
        monkeypatch.setattr(known, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def expect(monkeypatch, name: str, files: dict[str, bytes]) -> None:
    """Replace the MD5s in the table by those of these files, which have the same names."""
    wanted = {key: md5(files[key]) for key in DATASETS[name].md5}
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], md5=wanted))


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# ---- idx: MNIST and KMNIST -------------------------------------------------------------------------------


@pytest.fixture
def digits() -> dict[str, np.ndarray]:
    """The contents of the four idx files, by name."""
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (n, 28, 28), np.uint8) for n in COUNT.values()]
    labels = [random.integers(0, 10, n, np.uint8) for n in COUNT.values()]
    return dict(zip(IDX, (pixels[0], labels[0], pixels[1], labels[1]), strict=True))


def raw(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Encode as IDX: two zeros, 8 for bytes, the number of dimensions, the dimensions, the values."""
    return {name: struct.pack(f">4B{a.ndim}I", 0, 0, 8, a.ndim, *a.shape) + a.tobytes() for name, a in arrays.items()}


def packed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in files.items()}


def check_digits(name: str, root: Path, arrays: dict[str, np.ndarray]) -> None:
    for split, (pixels, labels) in {"train": IDX[:2], "test": IDX[2:]}.items():
        images, y = load(name, root, split, 32)
        assert images.shape == (COUNT[split], 1, 32, 32)
        np.testing.assert_array_equal(images[:, 0, 2:30, 2:30], arrays[pixels])
        assert images.sum() == arrays[pixels].sum(dtype=np.int64)  # the padding is black
        np.testing.assert_array_equal(y, arrays[labels])


@pytest.mark.parametrize("form", [raw, lambda arrays: packed(raw(arrays))], ids=["raw", "gz"])
def test_mnist(form, digits, tmp_path, monkeypatch):
    expect(monkeypatch, "mnist", raw(digits))
    check_digits("mnist", put(tmp_path / "some/where", form(digits)).parent, digits)
    assert classes("mnist", tmp_path) == tuple("0123456789")


def test_kmnist_is_known_by_its_packed_files(digits, tmp_path, monkeypatch):
    files = packed(raw(digits))
    expect(monkeypatch, "kmnist", files)
    check_digits("kmnist", put(tmp_path / "KMNIST/raw", files | raw(digits)), digits)  # as torchvision stores them
    check_digits("kmnist", put(tmp_path / "packed", files), digits)
    with pytest.raises(UserError, match=r"put train-images-idx3-ubyte\.gz, .* into"):
        load("kmnist", put(tmp_path / "raw", raw(digits)), "train", 32)


def test_altered_packed_file_is_refused_though_it_unpacks(digits, tmp_path, monkeypatch):
    files = packed(raw(digits))
    expect(monkeypatch, "kmnist", files)
    digits[IDX[1]][0] += 1
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz is not kmnist's: MD5"):
        load("kmnist", put(tmp_path, files | {f"{IDX[1]}.gz": gzip.compress(raw(digits)[IDX[1]])}), "train", 32)


def test_mnist_beside_fashion_mnist(digits, tmp_path, monkeypatch):
    """Both data sets in one folder, as torchvision stores them: each `load` finds the right files."""
    other = {name: array // 2 for name, array in digits.items()}
    expect(monkeypatch, "mnist", raw(digits))
    expect(monkeypatch, "fashion-mnist", raw(other))
    put(tmp_path / "MNIST/raw", raw(digits))
    put(tmp_path / "FashionMNIST/raw", raw(other))
    check_digits("mnist", tmp_path, digits)
    check_digits("fashion-mnist", tmp_path, other)
    (tmp_path / "MNIST/raw" / IDX[0]).unlink()
    with pytest.raises(UserError, match="mnist is not whole") as caught:  # not: delete the other data set's file
        load("mnist", tmp_path, "train", 32)
    assert "usr" not in str(caught.value) and "apt-get" not in str(caught.value)  # Debian has no MNIST


# ---- CIFAR-10 --------------------------------------------------------------------------------------------


class Python2(pickle._Pickler):
    """Pickles as Python 2 did: text and bytes are one type, and NumPy's core has its old name."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string

    @classmethod
    def dumps(cls, value: object) -> bytes:
        cls(buffer := io.BytesIO(), protocol=2).dump(value)
        return buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


@pytest.fixture
def photos() -> dict[str, tuple[np.ndarray, list[int]]]:
    """The pixels (6, 3, 32, 32) and labels of each of the six batches, by name."""
    random, names = np.random.default_rng(1), [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {
        name: (random.integers(0, 256, (6, 3, 32, 32), np.uint8), random.integers(0, 10, 6).tolist()) for name in names
    }


@pytest.fixture
def batches(photos, monkeypatch) -> dict[str, bytes]:
    """The contents of the six files, by name; the table has their MD5s."""
    files = {
        name: Python2.dumps({"batch_label": name, "labels": y, "data": x.reshape(6, 3072), "filenames": ["a.png"] * 6})
        for name, (x, y) in photos.items()
    }
    expect(monkeypatch, "cifar10", files)
    return files


def archive(files: dict[str, bytes]) -> dict[str, bytes]:
    """Make cifar-10-python.tar.gz: a folder with the batches and two other files."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
        for name, data in {**files, "batches.meta": b"names", "readme.html": b"<html>"}.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return {"cifar-10-python.tar.gz": buffer.getvalue()}


def check_photos(root: Path, photos: dict) -> None:
    x, y = load("cifar10", root, "train", 32)
    assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    np.testing.assert_array_equal(x, np.concatenate([photos[f"data_batch_{i}"][0] for i in range(1, 6)]))
    assert y.tolist() == [label for i in range(1, 6) for label in photos[f"data_batch_{i}"][1]]
    x, y = load("cifar10", root, "test", 36, 3)
    np.testing.assert_array_equal(x[:, :, 2:34, 2:34], photos["test_batch"][0])
    assert y.tolist() == photos["test_batch"][1]


def test_the_stand_in_is_in_the_published_format(photos, batches, tmp_path, monkeypatch):
    """torchvision reads the same pixels and labels from it."""
    put(tmp_path / "cifar-10-batches-py", batches)
    known = torchvision.datasets.CIFAR10
    monkeypatch.setattr(known, "_check_integrity", lambda self: True)
    monkeypatch.setattr(known, "_load_meta", lambda self: None)
    theirs = known(tmp_path, train=False)
    ours, labels = load("cifar10", tmp_path, "test", 32)
    np.testing.assert_array_equal(ours.permute(0, 2, 3, 1), theirs.data)
    assert labels.tolist() == theirs.targets


def test_cifar10_unpacked_or_in_its_archive(photos, batches, tmp_path):
    check_photos(put(tmp_path / "a/cifar-10-batches-py", batches).parent, photos)
    root = put(tmp_path / "b", archive(batches))
    check_photos(root, photos)
    assert files_in(root) == {"cifar-10-python.tar.gz"}  # nothing is unpacked into the user's folder
    assert classes("cifar10", root)[9] == "truck"


@pytest.mark.parametrize("data", [b"<html>Sign in</html>", gzip.compress(b"no tar", mtime=0), b"\x1f\x8b\x08"])
def test_what_is_no_archive_is_named(data, tmp_path):
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is .*(no gzip file|no archive).*: delete it"):
        load("cifar10", put(tmp_path, {"cifar-10-python.tar.gz": data}), "train", 32)


def test_no_unknown_pickle_is_opened(batches, tmp_path):
    class Trap:
        def __reduce__(self) -> tuple:
            return (tmp_path / "sprung").touch, ()

    for files in (batches | {"data_batch_3": pickle.dumps(Trap())}, archive({"data_batch_3": pickle.dumps(Trap())})):
        with pytest.raises(UserError, match="is not cifar10's: MD5"):
            load("cifar10", put(tmp_path / str(len(files)), files), "train", 32)
    assert not (tmp_path / "sprung").exists()


def test_channels_of_a_data_set_cannot_be_chosen(tmp_path):
    with pytest.raises(SettingError, match="CHANNELS is 1, but must be 3 with DATASET cifar10"):
        load("cifar10", tmp_path / "none", "train", 32, 1)
    with pytest.raises(SettingError, match="IMAGE_SIZE is 28: use 32 or a larger even number, such as 48"):
        load("cifar10", tmp_path / "none", "train", 28)


# ---- download --------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder served by a local server, which replaces torchvision's mirrors."""
    folder = tmp_path / "mirror"

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [url])
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{url}cifar-10-python.tar.gz")
        yield folder
        server.shutdown()


def test_downloads(digits, photos, batches, mirror, tmp_path, monkeypatch):
    files, tar = packed(raw(digits)), archive(batches)
    expect(monkeypatch, "kmnist", files)
    put(mirror, files | tar)
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", [(name, md5(data)) for name, data in files.items()])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(*tar.values()))
    check_digits("kmnist", tmp_path / "k", digits)
    assert files_in(tmp_path / "k") == set(files)
    check_photos(tmp_path / "c", photos)
    assert files_in(tmp_path / "c") == set(batches)


def test_offline_the_archive_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"nor through torchvision \(.*\): put cifar-10-python\.tar\.gz into"):
        load("cifar10", tmp_path, "train", 32)


def test_a_source_needs_no_more_than_names_and_hashes(tmp_path):
    source = Source(name="words", md5={"word": md5(b"abc")})
    assert fetch.gather(source, put(tmp_path, {"word.gz": gzip.compress(b"abc")}), ()) == {"word": b"abc"}
