"""Images → scores: the Fréchet Inception Distance and the Inception Score, in one pass through the network.

Both look at images through Inception-v3, and that look is what costs time. So features are extracted once per image
here and handed to torchmetrics, which holds the formulae; a further metric on the same features (KID, precision and
recall) is one more accumulator in `Scores` and one more function that reads it.

The extractor is passed in: anything that maps images (B, C, H, W), uint8, to features (B, D) and logits (B, K) and
has `num_features`, `has_logits` and `sha256` will do.
"""

import hashlib
import logging
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from tqdm import tqdm

log = logging.getLogger(__name__)

BATCH_SIZE = (
    32  # images through the network at once: on a CPU larger batches fall out of its caches and are slower
)


class FeatureExtractor(Protocol):
    """What this file asks of a network; `src.inception.Extractor` is the real one."""

    num_features: int  # D
    has_logits: bool
    sha256: str  # of its weights: features of other weights must not be mixed

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


def cache_dir() -> Path:
    """Where reference statistics are kept, beside what torch.hub downloads (TORCH_HOME moves both)."""
    return Path(torch.hub.get_dir()) / "simple-ddpm"


def reference_statistics(
    images: Tensor, extractor: FeatureExtractor, cache: Path | None = None, batch_size: int = BATCH_SIZE
) -> dict[str, Tensor]:
    """Moments of the features of the real images (N, C, H, W), uint8: what FID compares against.

    Returns `real_features_sum` (D,), `real_features_cov_sum` (D, D), the sum of outer products, and
    `real_features_num_samples`, in float64 and int64, under torchmetrics' names. Ten thousand images take minutes,
    so the result is kept in the folder `cache` (default `cache_dir()`) and found again by the SHA-256 of the
    extractor's weights and of the images. A damaged file is computed anew; a folder that cannot be written costs
    only a warning.
    """
    key = _key(images, extractor)
    file = (cache or cache_dir()) / f"reference-{len(images)}-{key[:16]}.pt"
    if file.exists():
        try:
            return _read(file, key)
        except Exception as error:  # a damaged pickle can raise almost anything
            log.warning("%s is not usable (%s): computing it again", file, error)
    fid = _fid(extractor)
    with tqdm(total=len(images), desc="reference features", unit="img") as bar:
        for batch in images.split(batch_size):
            features, _ = extractor(batch)
            fid.update(features.cpu().double(), real=True)
            bar.update(len(batch))
    statistics = {name: value for name, value in fid.state_dict().items() if name.startswith("real_")}
    try:
        _write({"key": key, "statistics": statistics}, file)
    except OSError as error:
        log.warning("cannot keep the reference statistics (%s): the next run will compute them again", error)
    return statistics


class Scores:
    """Scores of generated images, which may arrive in batches of any size.

    `reference` comes from `reference_statistics` with the same extractor. The Inception Score shuffles the images
    into `splits` parts by `seed`; the global random state is neither used nor changed.
    """

    def __init__(
        self, extractor: FeatureExtractor, reference: dict[str, Tensor], seed: int = 0, splits: int = 10
    ) -> None:
        self.extractor = extractor
        self.seed = seed
        self.fid = _fid(extractor)
        self.fid.load_state_dict(
            reference, strict=False
        )  # strict would ask for the generated images' sums too
        with warnings.catch_warnings():
            # It keeps all logits, and says so: 40 MB for 10,000 images.
            warnings.filterwarnings("ignore", message=".*InceptionScore.* will save all extracted features")
            self.inception_score = InceptionScore(feature=nn.Identity(), splits=splits)

    def update(self, images: Tensor) -> None:
        """Take in generated images (B, C, H, W), uint8 in [0, 255]."""
        features, logits = self.extractor(images)
        # On the CPU whatever the device: float64 is slow on most GPUs and missing on Apple's.
        self.fid.update(features.cpu().double(), real=False)
        if self.extractor.has_logits:
            self.inception_score.update(logits.cpu())

    def compute(self) -> dict[str, float | int | list[str] | None]:
        """`fid`, `inception_score_mean`, `inception_score_std`, `num_images`, `num_reference_images`, `notes`.

        A score that cannot be had is None, never NaN, and `notes` says in plain words why; it also says what to keep
        in mind about those that can.
        """
        num_images = int(self.fid.fake_features_num_samples)
        num_reference = int(self.fid.real_features_num_samples)
        fid, fid_notes = self._frechet_distance(num_images, num_reference)
        mean, std, score_notes = self._inception_score()
        return {
            "fid": fid,
            "inception_score_mean": mean,
            "inception_score_std": std,
            "num_images": num_images,
            "num_reference_images": num_reference,
            "notes": fid_notes + score_notes,
        }

    def _frechet_distance(self, num_images: int, num_reference: int) -> tuple[float | None, list[str]]:
        """Heusel et al. 2017, equation 6: |m - m_w|² + Tr(C + C_w - 2 (C C_w)^(1/2)), smaller is better."""
        if min(num_images, num_reference) < 2:
            return None, ["FID needs at least two generated and two reference images: one has no covariance."]
        fid = float(self.fid.compute())
        return fid, small_sample_notes(min(num_images, num_reference), self.extractor.num_features)

    def _inception_score(self) -> tuple[float | None, float | None, list[str]]:
        """Salimans et al. 2016, section 4: exp(E_x KL(p(y|x) || p(y))), from 1 to the number of classes."""
        if not self.extractor.has_logits:
            return (
                None,
                None,
                ["No Inception Score: these Inception weights come without the classes' layer."],
            )
        if not self.inception_score.update_called:
            return None, None, ["No Inception Score: no images."]
        with torch.random.fork_rng(devices=[]):  # torchmetrics shuffles by the global generator
            torch.default_generator.manual_seed(self.seed)
            mean, std = map(float, self.inception_score.compute())
        if std != std:  # NaN, from a single part
            return mean, None, ["No deviation of the Inception Score: one part has none."]
        return mean, std, []


def small_sample_notes(num_images: int, num_features: int = 2048) -> list[str]:
    """A warning in plain words where FID has too few images for its covariance; else nothing."""
    if num_images > num_features:
        return []
    return [
        f"FID from {num_images:,} images: with no more images than features ({num_features:,}) the covariance lacks "
        "full rank and FID comes out too high. Compare it only with FIDs of the same number of images."
    ]


def _fid(extractor: FeatureExtractor) -> FrechetInceptionDistance:
    """torchmetrics' FID, fed with features instead of images; its sums are part of its state_dict."""
    passthrough = nn.Identity()
    passthrough.num_features = extractor.num_features
    fid = FrechetInceptionDistance(feature=passthrough)
    fid.persistent(True)
    return fid


def _key(images: Tensor, extractor: FeatureExtractor) -> str:
    digest = hashlib.sha256(f"{extractor.sha256} {tuple(images.shape)} {images.dtype}".encode())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, key: str) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():  # torch.load itself checks no CRC
            raise RuntimeError(f"checksum of {damaged} does not match")
    content = torch.load(file, map_location="cpu", weights_only=True)
    if content["key"] != key:
        raise RuntimeError("made from other images or other weights")
    return content["statistics"]


def _write(content: dict, file: Path) -> None:
    """Atomic: whoever reads at the same time sees the whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        torch.save(content, Path(folder) / file.name)
        os.replace(Path(folder) / file.name, file)
