"""Images → scores: how far generated images are from real ones, in the features that a network sees in them.

The network's look at an image is what costs time. So it looks once, and what it saw is kept (8 kB an image)
until all scores are read off it. torchmetrics holds the formulae. The network is passed in; `Extractor` says
what is asked of it, and both Inception and the project's own classifier give it.
"""

import logging
import math
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from src import cache  # features of the reference take minutes
from src.distributed import World  # among whose processes the looking is divided
from src.neighbours import precision_recall  # one of the scores
from src.utils import Rows, progress  # features of all images; the one rule of when a bar is shown

log = logging.getLogger(__name__)

KID_SUBSETS = 100  # random ones, over which the kernel distance is averaged
KID_SUBSET_SIZE = 1000  # images in each, or all where they are fewer
ALONE = {"sync_on_compute": False}  # of several processes, each has all the features already
MANIFOLD_K = 3  # neighbours that a ball of precision and recall reaches


class Extractor(Protocol):
    """Images (B, C, H, W), uint8 → features (B, D) and logits (B, K); the real one is in `src.inception`."""

    num_features: int  # D
    has_logits: bool  # else they are no numbers
    name: str  # of the network and of what it does to images first
    sha256: str  # of the weights; features of another network or other weights cannot be compared

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


class Divided:
    """An extractor whose work is divided among processes; in all else it is the extractor itself."""

    def __init__(self, extractor: Extractor, world: World) -> None:
        self._extractor, self._world = extractor, world

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._extractor(images[self._world.equal_share(range(len(images)))])
        return self._world.gather(features)[: len(images)], self._world.gather(logits)[: len(images)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extractor, name)


def reference_features(
    images: Tensor, extractor: Extractor, cache_folder: Path | None = None, batch_size: int = 32
) -> Tensor:
    """What the network sees in real images (N, C, H, W), uint8 in [0, 255]: features (N, D) float32, on the CPU.

    Through Inception they take minutes on a CPU, so they are kept (`cache.folder()` unless told otherwise) and
    found again by the hash of network, weights and images.
    """

    def look() -> dict[str, Tensor]:
        features = torch.empty(len(images), extractor.num_features)  # in one place, as `Rows` explains
        log.info("looking at %d real images first; what is seen there is kept for the next time", len(images))
        with progress(log, total=len(images), desc="reference images", unit="image") as bar:
            for rows, batch in zip(features.split(batch_size), images.split(batch_size), strict=True):
                rows.copy_(extractor(batch)[0])
                bar.update(len(batch))
        return {"features": features}

    key = cache.key(f"{extractor.name} {extractor.sha256}", images)
    return cache.recall(f"features-{len(images)}", key, look, cache_folder)["features"]


class Scores:
    """Scores of generated images, which come in batches of any size.

    Args:
        extractor: the one that `reference` was made with.
        reference: features of real images (N, D), as `reference_features` returns them.
        seed: of random subsets and splits; the global generators are left as they are.
        splits: into which the Inception Score divides the images, for its deviation.
    """

    def __init__(self, extractor: Extractor, reference: Tensor, seed: int = 0, splits: int = 10) -> None:
        self.extractor, self.reference, self.seed, self.splits = extractor, reference, seed, splits
        self.features, self.logits = Rows(), Rows()

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Take in generated images (B, C, H, W), uint8 in [0, 255]; labels make no difference to these scores."""
        features, logits = self.extractor(images)
        self.features.append(features.float())
        self.logits.append(logits.float())

    def compute(self) -> dict[str, Any]:
        """The scores of all images so far; a minute of work for 10,000 of 2048 features.

        Returns:
            `fid`, `kid_mean`, `kid_std`, `precision`, `recall`, `inception_score_mean` and
            `inception_score_std`, each None (and never NaN) where it cannot be had; `num_images` and
            `num_reference_images`; `notes`, which say in plain words why a score is missing and what to beware
            of in the others.
        """
        real = self.reference
        generated = self.features.all() if self.features else real[:0]
        scores = {"num_images": len(generated), "num_reference_images": len(real), "notes": []}
        for part in (self._distances(real, generated), self._manifolds(real, generated), self._inception_score()):
            scores["notes"] += part.pop("notes", [])
            scores |= part
        return scores

    def _distances(self, real: Tensor, generated: Tensor) -> dict[str, Any]:
        n = min(len(real), len(generated))
        if n < 2:
            notes = ["FID is missing, and KID: they need two generated and two reference images at the least."]
            return {"fid": None, "kid_mean": None, "kid_std": None, "notes": notes}
        mean, std = kernel_distance(real, generated, self.seed)
        notes = small_sample_notes(n, real.shape[1])
        if len(real) == len(generated) <= KID_SUBSET_SIZE:
            std = None
            notes.append("KID has no deviation: that takes more images than go into a subset.")
        return {"fid": frechet_distance(real, generated), "kid_mean": mean, "kid_std": std, "notes": notes}

    def _manifolds(self, real: Tensor, generated: Tensor) -> dict[str, Any]:
        n = min(len(real), len(generated))  # both shares depend on the counts, so they are made equal
        try:
            precision, recall = precision_recall(real[:n], generated[:n], MANIFOLD_K)
        except ValueError as error:
            return {"precision": None, "recall": None, "notes": [f"Precision and recall are missing: {error}."]}
        return {"precision": precision, "recall": recall}

    def _inception_score(self) -> dict[str, Any]:
        missing = {"inception_score_mean": None, "inception_score_std": None}
        if not self.extractor.has_logits:
            return missing | {"notes": ["Inception Score is missing: these weights lack the network's last layer."]}
        if not self.logits:
            return missing | {"notes": ["Inception Score is missing: there are no images."]}
        mean, std = inception_score(self.logits.all(), self.seed, self.splits)
        if not math.isfinite(mean):
            return missing | {"notes": ["Inception Score is missing: the network's logits are not finite."]}
        if not math.isfinite(std):
            notes = ["Inception Score has no deviation: that takes two splits of the images."]
            return {"inception_score_mean": mean, "inception_score_std": None, "notes": notes}
        return {"inception_score_mean": mean, "inception_score_std": std}


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """|m - m_w|² + Tr(C + C_w - 2 (C C_w)^½) of features (N, D) and (M, D); Heusel et al. 2017, equation 6."""
    passthrough = nn.Identity()  # torchmetrics takes features for images
    passthrough.num_features = real.shape[1]
    fid = FrechetInceptionDistance(feature=passthrough, **ALONE)
    for is_real, features in ((True, real), (False, generated)):
        for rows in features.split(1000):
            fid.update(rows.double(), real=is_real)  # it subtracts large sums from each other
    return float(fid.compute())


def kernel_distance(real: Tensor, generated: Tensor, seed: int) -> tuple[float, float]:
    """KID of features (N, D) and (M, D), Bińkowski et al. 2018, section 3: mean and deviation over random subsets.

    It is an unbiased estimate of the squared MMD under a cubic kernel, so unlike FID it can be compared between
    different numbers of images, and can come out below zero. The deviation is that of subsets, which overlap:
    not the mean's error.
    """
    size = min(KID_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")  # they are there anyway
        kid = KernelInceptionDistance(feature=nn.Identity(), subsets=KID_SUBSETS, subset_size=size, **ALONE)
    kid.update(real, real=True)
    kid.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws from the global generator
        torch.default_generator.manual_seed(seed)
        mean, std = kid.compute()
    return float(mean), float(std)


def inception_score(logits: Tensor, seed: int, splits: int) -> tuple[float, float]:
    """exp(E_x KL(p(y|x) || p(y))) of logits (N, K), Salimans et al. 2016, section 4: from 1 to K.

    Mean and deviation over splits; the deviation of one is NaN.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        score = InceptionScore(feature=nn.Identity(), splits=splits, **ALONE)
    score.update(logits)
    with torch.random.fork_rng(devices=[]):  # torchmetrics shuffles by the global generator
        torch.default_generator.manual_seed(seed)
        mean, std = score.compute()
    return float(mean), float(std)


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
