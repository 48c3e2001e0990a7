"""Images → scores: the Fréchet Inception Distance and the Inception Score, in one pass through the network.

The network's look at an image is what costs time. So it looks once, and what it saw goes to torchmetrics,
which holds the formulae; a further metric (KID, precision and recall) is one more accumulator in `Scores` and
one more function that reads it. The network is passed in; `Extractor` says what is asked of it.
"""

import hashlib
import logging
import math
import warnings
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from src import checkpoint  # the one place that writes state atomically and reads it checked
from src.errors import UserError  # which checkpoint raises
from src.utils import progress  # the one rule of when a bar is shown

log = logging.getLogger(__name__)


class Extractor(Protocol):
    """Images (B, C, H, W), uint8 → features (B, D) and logits (B, K); the real one is in `src.inception`."""

    num_features: int  # D
    has_logits: bool  # else they are no numbers
    name: str  # of the network and of what it does to images first
    sha256: str  # of the weights; features of another network or other weights cannot be compared

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


def cache_dir() -> Path:
    """Where reference statistics are kept: beside what torch.hub downloads (TORCH_HOME moves both)."""
    return Path(torch.hub.get_dir()) / "simple-ddpm"


def reference_statistics(
    images: Tensor, extractor: Extractor, cache: Path | None = None, batch_size: int = 32
) -> dict[str, Tensor]:
    """Moments of the features of real images (N, C, H, W), uint8 in [0, 255]: what FID compares with.

    They take minutes on a CPU, so they are kept in the directory `cache` (`cache_dir()` unless given) and
    found again by the hash of the weights and of the images. A file that cannot be read is made again, and
    one that cannot be written costs a warning.

    Returns:
        Under torchmetrics' names: `real_features_sum` (D,) and `real_features_cov_sum` (D, D), the sums of the
        features and of their outer products, float64; `real_features_num_samples`, int64.
    """
    key = _key(images, extractor)
    file = (cache or cache_dir()) / f"reference-{len(images)}-{key[:16]}.pt"
    if file.exists():
        try:
            return _read(file, key)
        except UserError as error:
            log.warning("%s; the reference statistics are computed again", error)
    fid = _fid(extractor)
    with progress(log, total=len(images), desc="reference images", unit="image") as bar:
        for batch in images.split(batch_size):
            features, _ = extractor(batch)
            fid.update(features.cpu().double(), real=True)
            bar.update(len(batch))
    statistics = {name: value for name, value in fid.state_dict().items() if name.startswith("real_")}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(file, {"key": key, "statistics": statistics})
    except (OSError, UserError) as error:
        log.warning("%s; the next run has to compute the reference statistics again", error)
    return statistics


class Scores:
    """Scores of generated images, which come in batches of any size.

    Args:
        extractor: the one that `reference` was made with.
        reference: as `reference_statistics` returns it.
        seed: of the Inception Score's random split; the global generators are left as they are.
        splits: into which the Inception Score divides the images, for its deviation.
    """

    def __init__(self, extractor: Extractor, reference: dict[str, Tensor], seed: int = 0, splits: int = 10) -> None:
        self.extractor = extractor
        self.seed = seed
        self.fid = _fid(extractor)
        self.fid.load_state_dict(reference, strict=False)  # strict would want the generated images' sums too
        with warnings.catch_warnings():
            # torchmetrics warns that it keeps all logits: 40 MB of them for 10,000 images.
            warnings.filterwarnings("ignore", message=".*InceptionScore. will save all extracted features")
            self.inception_score = InceptionScore(feature=nn.Identity(), splits=splits)

    def update(self, images: Tensor) -> None:
        """Take in generated images (B, C, H, W), uint8 in [0, 255]."""
        features, logits = self.extractor(images)
        # Sums in float64 on the CPU, whatever the device: FID subtracts large sums from each other.
        self.fid.update(features.cpu().double(), real=False)
        if self.extractor.has_logits:
            self.inception_score.update(logits.cpu())

    def compute(self) -> dict[str, float | int | list[str] | None]:
        """The scores of all images so far; seconds of work for 2048 features.

        Returns:
            `fid`, `inception_score_mean` and `inception_score_std`, each None (and never NaN) where it cannot
            be had; `num_images` and `num_reference_images`; `notes`, which say in plain words why a score is
            missing and what to beware of in the others.
        """
        num_images = int(self.fid.fake_features_num_samples)
        num_reference = int(self.fid.real_features_num_samples)
        fid, fid_notes = self._fid(min(num_images, num_reference))
        mean, std, score_notes = self._inception_score(num_images)
        return {
            "fid": fid,
            "inception_score_mean": mean,
            "inception_score_std": std,
            "num_images": num_images,
            "num_reference_images": num_reference,
            "notes": fid_notes + score_notes,
        }

    def _fid(self, num_images: int) -> tuple[float | None, list[str]]:
        """|m - m_w|² + Tr(C + C_w - 2 (C C_w)^½), Heusel et al. 2017, equation 6: smaller is better."""
        if num_images < 2:
            return None, ["FID is missing: it needs two generated and two reference images at the least."]
        return float(self.fid.compute()), small_sample_notes(num_images, self.extractor.num_features)

    def _inception_score(self, num_images: int) -> tuple[float | None, float | None, list[str]]:
        """exp(E_x KL(p(y|x) || p(y))), Salimans et al. 2016, section 4: from 1 to the number of classes."""
        if not self.extractor.has_logits:
            return None, None, ["Inception Score is missing: these weights lack the network's last layer."]
        if num_images == 0:
            return None, None, ["Inception Score is missing: there are no images."]
        with torch.random.fork_rng(devices=[]):  # torchmetrics shuffles by the global generator
            torch.default_generator.manual_seed(self.seed)
            mean, std = map(float, self.inception_score.compute())
        if not math.isfinite(mean):
            return None, None, ["Inception Score is missing: the network's logits are not finite."]
        if not math.isfinite(std):
            return mean, None, ["Inception Score has no deviation: that takes two splits of the images."]
        return mean, std, []


def small_sample_notes(num_images: int, num_features: int = 2048) -> list[str]:
    """What to beware of in an FID of so few images, if anything.

    The covariance of N samples has a rank below N, and FID is biased by a term of order 1 / N, upwards in
    practice (Chong & Forsyth 2020).
    """
    if num_images > num_features:
        return []
    return [
        f"FID of {num_images:,} images: with no more images than features ({num_features:,}), their covariance "
        "lacks full rank and FID comes out too high. Compare it only with FIDs of as many images."
    ]


def _fid(extractor: Extractor) -> FrechetInceptionDistance:
    """torchmetrics' FID, which takes features for images and has its sums in its state_dict."""
    passthrough = nn.Identity()
    passthrough.num_features = extractor.num_features
    fid = FrechetInceptionDistance(feature=passthrough)
    fid.persistent(True)
    return fid


def _key(images: Tensor, extractor: Extractor) -> str:
    digest = hashlib.sha256(f"{extractor.name} {extractor.sha256} {images.dtype} {tuple(images.shape)}".encode())
    for batch in images.split(1024):  # in parts, for they may lie in files that memory cannot hold at once
        digest.update(batch.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, key: str) -> dict[str, Tensor]:
    state = checkpoint.load(file)
    if state.get("key") != key:
        raise UserError(f"{file} belongs to other images or other weights")
    return state["statistics"]
