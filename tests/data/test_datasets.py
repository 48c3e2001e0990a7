"""Loading and batching real images, and real faults; offline, except where marked slow."""

import errno
import gzip
import hashlib
import http.server
import os
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY

from src.data import fetch
from src.data.datasets import DATASETS, batches, in_order, load, normalise
from src.utils.errors import SettingError, UserError

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES = tuple(DATASETS["fashion-mnist-tiny"].md5)

# The tiny set as if it were published like the whole one, to test downloads offline.
PUBLISHED = replace(
    DATASETS["fashion-mnist-tiny"], name="published", torchvision="FashionMNIST", debian="dataset-published"
)


@pytest.fixture(autouse=True)
def offline(request, tmp_path_factory, monkeypatch):
    """Make every source outside the data folder fail: no installed package, a closed port, an empty PATH."""
    if request.node.get_closest_marker("slow"):
        return
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setattr(fetch, "DEBIAN", empty)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(DATASETS, "published", PUBLISHED)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder for temporary folders; a test checks that none is left in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def original(name: str) -> bytes:
    return gzip.decompress((TINY / f"{name}.gz").read_bytes())


def put_gz(folder: Path) -> Path:
    """Copy the four .gz files into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.copy(TINY / f"{name}.gz", folder)
    return folder


def put_raw(folder: Path) -> Path:
    """Write the four uncompressed files into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes(original(name))
    return folder


def refusal(root: Path, name: str = "fashion-mnist-tiny", image_size: int = 32) -> str:
    """Return the message, one line, of the UserError that `load` raises."""
    with pytest.raises(UserError) as caught:
        load(name, root, "train", image_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# ---- pixels and labels --------------------------------------------------------------------------------------


def test_table():
    for name, row in DATASETS.items():
        assert row.name == name
        assert len(row.classes) == 10
    assert DATASETS["fashion-mnist"].classes[0] == "t-shirt"
    assert DATASETS["fashion-mnist"].classes[9] == "ankle-boot"
    assert not set(DATASETS["fashion-mnist"].md5.values()) & set(DATASETS["fashion-mnist-tiny"].md5.values())


def test_hashes_are_those_that_torchvision_knows():
    known = torchvision.datasets
    assert DATASETS["kmnist"].md5 == dict(known.KMNIST.resources)
    assert DATASETS["cifar10"].md5 == dict(known.CIFAR10.train_list + known.CIFAR10.test_list)
    for name in (
        "fashion-mnist",
        "fashion-mnist-tiny",
        "mnist",
    ):  # MD5 of uncompressed files, which torchvision does not list
        assert set(DATASETS[name].md5) == set(NAMES)


def test_bundled_files_are_small_and_as_in_the_table():
    assert sum(path.stat().st_size for path in TINY.glob("*.gz")) < 1e6
    assert files_in(TINY) == {f"{name}.gz" for name in NAMES} | {"README.md"}
    for name in NAMES:
        assert hashlib.md5(original(name)).hexdigest() == DATASETS["fashion-mnist-tiny"].md5[name]


@pytest.mark.parametrize(
    ("split", "images_file", "labels_file", "count"),
    [("train", TRAIN_IMAGES, TRAIN_LABELS, 1000), ("test", TEST_IMAGES, TEST_LABELS, 500)],
)
@pytest.mark.parametrize("image_size", [28, 32, 48])
def test_pixels_and_labels_are_exact(tmp_path, split, images_file, labels_file, count, image_size):
    images, labels = load("fashion-mnist-tiny", put_gz(tmp_path), split, image_size)
    assert images.shape == (count, 1, image_size, image_size)
    assert images.dtype == torch.uint8
    assert labels.shape == (count,)
    assert labels.dtype == torch.int64

    pixels = np.frombuffer(original(images_file), np.uint8, offset=16).reshape(count, 28, 28)
    margin = (image_size - 28) // 2
    expected = np.zeros((count, 1, image_size, image_size), np.uint8)
    expected[:, 0, margin : margin + 28, margin : margin + 28] = pixels
    np.testing.assert_array_equal(images.numpy(), expected)
    np.testing.assert_array_equal(labels.numpy(), np.frombuffer(original(labels_file), np.uint8, offset=8))


def test_agrees_with_torchvision(tmp_path):
    put_raw(tmp_path / "FashionMNIST" / "raw")
    theirs = torchvision.datasets.FashionMNIST(tmp_path, train=False)
    images, labels = load("fashion-mnist-tiny", tmp_path, "test", 28)
    assert torch.equal(images[:, 0], theirs.data)
    assert torch.equal(labels, theirs.targets)


def test_normalise_spans_minus_one_to_one():
    x0 = normalise(torch.arange(256, dtype=torch.uint8))
    assert x0.dtype == torch.float32
    assert x0[0] == -1
    assert x0[255] == 1
    assert torch.equal(((x0 + 1) * 127.5).round(), torch.arange(256.0))


@pytest.mark.parametrize("image_size", [27, 29, 33, 0, -2])
def test_size_without_an_equal_frame_is_refused_before_anything_is_fetched(tmp_path, image_size):
    text = refusal(tmp_path / "data", image_size=image_size)
    assert "IMAGE_SIZE" in text
    assert str(image_size) in text
    assert not (tmp_path / "data").exists()


def test_unknown_name_lists_the_known_ones(tmp_path):
    text = refusal(tmp_path, "fashion-mist")
    assert "'fashion-mist'" in text
    assert "fashion-mnist-tiny" in text


# ---- files in the data folder ---------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "deep/down"])
def test_gz_files_are_read_where_they_lie(tmp_path, place):
    """Nothing is written: the folder may be one of a colleague's, or on a read-only drive."""
    before = sorted(put_gz(tmp_path / place).parent.rglob("*"))
    images, _ = load("fashion-mnist-tiny", str(tmp_path), "train", 28)
    assert images.numpy().tobytes() == original(TRAIN_IMAGES)[16:]
    assert sorted((tmp_path / place).parent.rglob("*")) == before


@pytest.mark.parametrize("place", [".", "FashionMNIST/raw", "any/where"])
def test_raw_files_are_read_where_they_lie(tmp_path, place):
    put_raw(tmp_path / place)
    load("fashion-mnist-tiny", tmp_path, "train", 32)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


def test_raw_and_gz_files_may_be_mixed(tmp_path):
    put_gz(tmp_path)
    (tmp_path / TRAIN_LABELS).write_bytes(original(TRAIN_LABELS))
    (tmp_path / f"{TRAIN_LABELS}.gz").unlink()
    load("fashion-mnist-tiny", tmp_path, "train", 32)


@pytest.mark.parametrize("neighbour", ["A-MNIST", "Z-MNIST"])
def test_right_files_are_found_beside_a_foreign_data_set(tmp_path, neighbour):
    """torchvision keeps MNIST and Fashion-MNIST in one folder, under the same four names."""
    put_raw(tmp_path / "FashionMNIST" / "raw")
    put_raw(tmp_path / neighbour)
    for name in NAMES:
        (tmp_path / neighbour / name).write_bytes(b"another data set")
    images, _ = load("fashion-mnist-tiny", tmp_path, "train", 28)
    assert images.numpy().tobytes() == original(TRAIN_IMAGES)[16:]


def test_folder_with_the_name_of_a_file_is_no_file(tmp_path):
    put_raw(tmp_path / TRAIN_IMAGES)  # some archives unpack so
    load("fashion-mnist-tiny", tmp_path, "train", 32)


# ---- faults ----------------------------------------------------------------------------------------------


def test_truncated_gz_is_named(tmp_path):
    path = put_gz(tmp_path) / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:100_000])
    text = refusal(tmp_path)
    assert str(path) in text
    assert "delete" in text
    assert TRAIN_IMAGES not in files_in(tmp_path)


def test_damaged_gz_is_named(tmp_path):
    path = put_gz(tmp_path) / f"{TRAIN_IMAGES}.gz"
    data = bytearray(path.read_bytes())
    data[5000:5100] = bytes(100)
    path.write_bytes(data)
    assert str(path) in refusal(tmp_path)


def test_web_page_instead_of_gz_is_named(tmp_path):
    path = put_gz(tmp_path) / f"{TEST_LABELS}.gz"
    path.write_bytes(b"<!DOCTYPE html><html><body>Sign in to the guest network</body></html>")
    text = refusal(tmp_path)
    assert str(path) in text
    assert "no gzip file" in text


@pytest.mark.parametrize("name", NAMES)
def test_one_altered_byte_is_noticed(tmp_path, name):
    path = put_raw(tmp_path) / name
    data = bytearray(original(name))
    data[-1] ^= 1
    path.write_bytes(data)
    text = refusal(tmp_path)
    assert str(path) in text
    assert DATASETS["fashion-mnist-tiny"].md5[name] in text
    assert "Delete it or move it" in text
    assert path.read_bytes() == data  # the user's file is not touched


def test_hash_decides_and_nothing_else(tmp_path, monkeypatch):
    """Negative control: the altered file is accepted once the table has its MD5."""
    data = bytearray(original(TRAIN_IMAGES))
    data[16] = 77
    (put_raw(tmp_path) / TRAIN_IMAGES).write_bytes(data)
    refusal(tmp_path)
    md5 = DATASETS["fashion-mnist-tiny"].md5 | {TRAIN_IMAGES: hashlib.md5(data).hexdigest()}
    monkeypatch.setitem(DATASETS, "fashion-mnist-tiny", replace(DATASETS["fashion-mnist-tiny"], md5=md5))
    images, _ = load("fashion-mnist-tiny", tmp_path, "train", 28)
    assert images[0, 0, 0, 0] == 77


def test_valid_files_of_another_data_set_are_refused(tmp_path):
    for name in NAMES:  # right header and size, other contents: the values in reverse order
        header = 16 if "images" in name else 8
        data = original(name)
        (tmp_path / name).write_bytes(data[:header] + data[header:][::-1])
    text = refusal(tmp_path)
    assert str(tmp_path / TRAIN_IMAGES) in text
    assert DATASETS["fashion-mnist-tiny"].md5[TRAIN_IMAGES] in text


def test_tiny_never_stands_in_for_the_whole(tmp_path):
    put_gz(tmp_path)
    put_raw(tmp_path)
    assert "fashion-mnist is not whole" in refusal(tmp_path, "fashion-mnist")


def test_file_where_the_data_folder_belongs(tmp_path):
    (tmp_path / "data").write_text("not a folder")
    text = refusal(tmp_path / "data")
    assert "DATA_PATH" in text
    assert str(tmp_path / "data") in text


def test_a_data_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "data").symlink_to("data")  # for whoever runs the tests, root too
    assert refusal(tmp_path / "data") == f"cannot read DATA_PATH {tmp_path / 'data'}: {os.strerror(errno.ELOOP)}"


# ---- sources outside the data folder ---------------------------------------------------------------------


def test_missing_and_offline_tells_all_that_was_tried(tmp_path, scratch):
    root = tmp_path / "data"
    text = refusal(root, "fashion-mnist")
    for part in (str(root), str(fetch.DEBIAN / "fashion-mnist"), "torchvision", "refused", "apt-get"):
        assert part in text
    for name in NAMES:
        assert f"{name}.gz" in text
    assert "apt-get install dataset-fashion-mnist" in text
    assert not root.exists()
    assert not list(scratch.iterdir())


def test_only_missing_files_are_asked_for(tmp_path):
    (put_gz(tmp_path) / f"{TEST_LABELS}.gz").unlink()
    text = refusal(tmp_path)
    assert f"put {TEST_LABELS}.gz into" in text
    assert "apt-get install" not in text  # no package has the tiny set


def test_debians_package_if_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "DEBIAN", tmp_path / "usr")
    put_gz(tmp_path / "usr" / "published")
    load("published", tmp_path / "data", "train", 32)
    assert not (tmp_path / "data").exists()  # the files are read from where the package put them


class Mirror(http.server.SimpleHTTPRequestHandler):
    """Serves the bundled .gz files."""

    def __init__(self, *args):
        super().__init__(*args, directory=TINY)

    def log_message(self, *args):
        pass


class WebPage(Mirror):
    """Answers every request with a web page, as guest networks do."""

    def do_GET(self):
        page = b"<html>Sign in</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)


class HangUp(Mirror):
    """Announces the whole length of a file, sends half of it, and closes the connection."""

    def do_GET(self):
        data = (TINY / self.path.strip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])


@pytest.fixture
def mirror(request, monkeypatch):
    """Replace torchvision's mirror by a local server with the handler `request.param`."""
    known = torchvision.datasets.FashionMNIST
    md5 = [(f"{name}.gz", hashlib.md5((TINY / f"{name}.gz").read_bytes()).hexdigest()) for name in NAMES]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), request.param) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(known, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(known, "resources", md5)
        yield
        server.shutdown()


@pytest.mark.parametrize("mirror", [Mirror], indirect=True)
def test_download(tmp_path, mirror, scratch, capfd):
    before = socket.getdefaulttimeout()
    load("published", tmp_path / "data", "train", 32)
    assert files_in(tmp_path / "data") == set(NAMES)
    assert not list(scratch.iterdir())
    assert socket.getdefaulttimeout() == before
    assert "\r" not in capfd.readouterr().err  # no bar where stderr is no terminal


@pytest.mark.parametrize("mirror", [Mirror], indirect=True)
def test_a_download_that_cannot_be_kept_costs_a_warning(tmp_path, mirror, scratch, caplog):
    (tmp_path / "published").write_text("where the directory belongs")
    images, _ = load("published", tmp_path, "train", 28)
    assert images.numpy().tobytes() == original(TRAIN_IMAGES)[16:]
    assert f"cannot write to {tmp_path / 'published'} (File exists)" in caplog.text


@pytest.mark.parametrize("mirror", [Mirror], indirect=True)
def test_write_that_stops_half_way_leaves_nothing_that_looks_whole(tmp_path, mirror, monkeypatch, caplog):
    write = Path.write_bytes

    def fill_the_disk(path: Path, data: bytes) -> None:
        write(path, data[:100_000])
        if len(data) > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    load("published", tmp_path, "train", 28)
    assert "cannot write to" in caplog.text
    assert files_in(tmp_path / "published") <= {TRAIN_LABELS, TEST_LABELS}  # those below the limit
    monkeypatch.undo()
    load("fashion-mnist-tiny", put_gz(tmp_path), "train", 28)  # what was kept is whole


@pytest.mark.parametrize("mirror", [WebPage, HangUp], indirect=True)
def test_bad_download_leaves_nothing(tmp_path, mirror, scratch):
    assert "torchvision" in refusal(tmp_path / "data", "published")
    assert not (tmp_path / "data").exists()
    assert not list(scratch.iterdir())


def test_silent_host_costs_only_the_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts the connection and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [url])
        start = time.monotonic()
        text = refusal(tmp_path, "published")
        assert time.monotonic() - start < 60  # on a busy machine; without the timeout it would never end
    assert "no answer within 1 s" in text


APT = shutil.which("apt-get") and shutil.which("dpkg-deb")


@pytest.mark.skipif(not APT, reason="needs apt-get and dpkg-deb")
def test_debians_package_through_apt_get(tmp_path, monkeypatch, scratch):
    """Runs the real apt-get and dpkg-deb on a local archive of one package."""
    monkeypatch.setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    build, archive = tmp_path / "build", tmp_path / "archive"
    put_gz(build / "usr" / "share" / "datasets" / "published")
    (build / "DEBIAN").mkdir()
    archive.mkdir()
    control = "Package: dataset-published\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    (build / "DEBIAN" / "control").write_text(control)
    package = archive / "dataset-published_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", build, package], check=True, capture_output=True)
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    index = f"{control}Filename: ./{package.name}\nSize: {package.stat().st_size}\nSHA256: {sha256}\n"
    (archive / "Packages").write_text(index)
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{archive} ./\n")
    settings = f'Dir::Etc::SourceList "{tmp_path}/sources.list"; Dir::Etc::SourceParts "/dev/null";'
    (tmp_path / "apt.conf").write_text(settings + ' APT::Sandbox::User "root";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))

    images, _ = load("published", tmp_path / "data", "train", 28)
    assert images.numpy().tobytes() == original(TRAIN_IMAGES)[16:]
    assert files_in(tmp_path / "data") == set(NAMES)
    assert not list(scratch.iterdir())

    package.unlink()  # the archive lists a package that is not there
    assert "apt-get" in refusal(tmp_path / "again", "published")
    assert not list(scratch.iterdir())


@pytest.mark.slow
def test_fashion_mnist_from_nothing(tmp_path, scratch, monkeypatch):
    """A user's first run, with whatever source this machine can reach."""
    monkeypatch.setattr(fetch, "DEBIAN", tmp_path / "not installed")
    root = tmp_path / "data"
    for split, count in (("train", 60_000), ("test", 10_000)):
        images, labels = load("fashion-mnist", root, split, 32)
        assert images.shape == (count, 1, 32, 32)
        assert torch.bincount(labels).tolist() == [count // 10] * 10
    assert files_in(root) == set(NAMES)
    assert not list(scratch.iterdir())


# ---- batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return load("fashion-mnist-tiny", put_gz(tmp_path_factory.mktemp("data")), "train", 32)[0]


@pytest.fixture(scope="module")
def numbers():
    """Indices of the images, used as labels: they show which images a batch has."""
    return torch.arange(1000)


def order(numbers, batch_size=64, seed=0, epoch=0, skip=0) -> list[int]:
    """Return the indices of one epoch's images in the order of the batches."""
    dots = torch.zeros(len(numbers), 1, 1, 1, dtype=torch.uint8)
    return torch.cat([y for _, y in batches(dots, numbers, batch_size, seed, epoch, skip)]).tolist()


def test_batch_holds_the_images_it_says(images, numbers):
    for x0, y in batches(images, numbers, 64, 0, 0):
        assert x0.shape == (64, 1, 32, 32)
        assert x0.dtype == torch.float32
        assert y.dtype == torch.int64
        assert torch.equal(x0, images[y].float() / 127.5 - 1)
        assert x0.min() == -1
        assert 0.9 < x0.max() <= 1


def test_every_image_once_an_epoch(numbers):
    assert sorted(order(numbers, batch_size=100)) == list(range(1000))
    seen = order(numbers, batch_size=64)  # 15 batches; the last 40 images are dropped
    assert len(seen) == 960
    assert len(set(seen)) == 960


def test_order_is_a_function_of_seed_and_epoch_alone(numbers):
    torch.manual_seed(1)
    first = order(numbers, seed=3, epoch=4)
    torch.manual_seed(2)
    torch.rand(5)
    assert order(numbers, seed=3, epoch=4) == first
    assert order(numbers, seed=3, epoch=4, batch_size=32)[:960] == first


def test_every_epoch_and_seed_has_its_own_order(numbers):
    pairs = [(seed, epoch) for seed in range(4) for epoch in range(4)]  # (0, 1) and (1, 0) among them
    orders = {tuple(order(numbers, seed=seed, epoch=epoch)) for seed, epoch in pairs}
    assert len(orders) == len(pairs)
    assert tuple(range(960)) not in orders


@pytest.mark.parametrize("skip", [0, 1, 7, 14, 15])
def test_skip_gives_the_rest_of_the_uninterrupted_epoch(images, numbers, skip):
    whole = list(batches(images, numbers, 64, 5, 6))
    rest = list(batches(images, numbers, 64, 5, 6, skip=skip))
    assert len(rest) == 15 - skip
    for (x0, y), (x0_whole, y_whole) in zip(rest, whole[skip:], strict=True):
        assert torch.equal(x0, x0_whole)
        assert torch.equal(y, y_whole)


def test_global_random_states_are_untouched(numbers):
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    order(numbers, seed=9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_batch_larger_than_the_data_set_is_refused(numbers):
    with pytest.raises(UserError, match="BATCH_SIZE is 1001"):
        order(numbers, batch_size=1001)
    assert len(order(numbers, batch_size=1000)) == 1000


def test_in_order_covers_every_image_once(images):
    labels = torch.arange(len(images))
    x0, y = zip(*in_order(images, 64, labels), strict=True)
    assert [len(x) for x in x0] == [64] * 15 + [40]
    assert torch.equal(torch.cat(x0), normalise(images))
    assert torch.equal(torch.cat(y), labels)
    assert [y for _, y in in_order(images, 64)] == [None] * 16


@pytest.mark.parametrize("package", [False, True])
def test_images_of_one_s_own_are_no_place_for_a_data_set(package, tmp_path, monkeypatch):
    """Somebody has forgotten --dataset folder, on a machine with or without Debian's package."""
    monkeypatch.setattr(fetch, "_fetch", None)
    monkeypatch.setattr(
        fetch,
        "_read",
        lambda source, folder, names, foreign, packed=False: (
            dict.fromkeys(names, bytearray()) if package and folder == fetch.DEBIAN / source.name else {}
        ),
    )
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/1.JPG").touch()
    with pytest.raises(SettingError, match=r"has images, such as 1\.JPG, .*: add --dataset folder"):
        load("fashion-mnist", tmp_path, "train", 32)
    assert [path.name for path in tmp_path.iterdir()] == ["cats"]
