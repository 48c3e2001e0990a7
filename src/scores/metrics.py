"""FID, KID, precision, recall and Inception Score, from the features of generated and of real images.

Features come from any network that implements `Extractor`: Inception or the classifier. Its evaluation takes most of
the time, so each image passes through it once, and the features (8 kB per image) serve all scores. FID, KID and
Inception Score are computed by torchmetrics.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from src.data.images import Images
from src.scores.rows import Rows
from src.utils import cache
from src.utils.distributed import World
from src.utils.progress import counted, progress

log = logging.getLogger(__name__)

KID_SUBSETS = 100  # random subsets over which the kernel distance is averaged
KID_SUBSET_SIZE = 1000  # images per subset, or all if there are fewer
LOCAL: dict[str, Any] = {"sync_on_compute": False}  # every process already has the features of all of them
CHUNK = 1024  # rows of a distance matrix that are computed at a time: 1024 × 10,000 take 40 MB
MANIFOLD_K = 3  # k of precision and recall: each ball reaches to the k-th nearest neighbour


class Extractor(Protocol):
    """A network that maps images (B, C, H, W) uint8 to features (B, D) and logits (B, K).

    Attributes:
        num_features: D.
        has_logits: whether the weights include the last layer; if not, the logits are NaN.
        name: of the network and its preprocessing.
        sha256: of the weights. Features of different networks or weights cannot be compared.
    """

    num_features: int
    has_logits: bool
    name: str
    sha256: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


class Divided:
    """An extractor that divides each batch among the processes of `world`; its attributes are the extractor's."""

    def __init__(self, extractor: Extractor, world: World) -> None:
        self._extractor, self._world = extractor, world

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._extractor(images[self._world.equal_share(range(len(images)))])
        return self._world.gather(features)[: len(images)], self._world.gather(logits)[: len(images)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extractor, name)


def reference_features(
    images: Images, extractor: Extractor, cache_folder: Path | None = None, batch_size: int = 32
) -> Tensor:
    """Return the features of real images from the cache, or compute and cache them, which takes Inception minutes.

    Args:
        images: (N, C, H, W) uint8 in [0, 255].
        extractor: the network. Its name and weights are part of the cache's key, as are the images.
        cache_folder: directory of the cache; None means `cache.folder()`.
        batch_size: images per network evaluation.

    Returns:
        (N, D) float32, on the CPU.
    """

    def compute() -> dict[str, Tensor]:
        features = torch.empty(len(images), extractor.num_features)  # one tensor, for the reason that `Rows` gives
        log.info("computing the features of %s, cached for the next time", counted(len(images), "real image"))
        with progress(log, total=len(images), desc="reference images", unit=" images") as bar:
            for rows, batch in zip(features.split(batch_size), images.split(batch_size), strict=True):
                rows.copy_(extractor(batch)[0])
                bar.update(len(batch))
        return {"features": features}

    key = cache.key(f"{extractor.name} {extractor.sha256}", images)
    return cache.recall(f"features-{len(images)}", key, compute, cache_folder)["features"]


class Scores:
    """Scores of generated images, added in batches of any size, against real images.

    Args:
        extractor: the network with which `reference` was computed.
        reference: features of real images, (N, D), from `reference_features`.
        seed: of the random subsets of KID and splits of the Inception Score; global generators are not changed.
        splits: parts of the images whose Inception Scores give the mean and standard deviation.
    """

    def __init__(self, extractor: Extractor, reference: Tensor, seed: int = 0, splits: int = 10) -> None:
        self.extractor, self.reference, self.seed, self.splits = extractor, reference, seed, splits
        self.features, self.logits = Rows(), Rows()

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Add generated images (B, C, H, W) uint8; labels are ignored."""
        features, logits = self.extractor(images)
        self.features.append(features.float())
        self.logits.append(logits.float())

    def compute(self) -> dict[str, Any]:
        """Compute the scores of all images so far, which takes a minute for 10,000 images with 2048 features.

        Returns:
            `fid`, `kid_mean`, `kid_std`, `precision`, `recall`, `inception_score_mean` and `inception_score_std`, each
            None (never NaN) if it cannot be computed; `num_images` and `num_reference_images`; `notes`, a list of
            sentences on why a score is missing and on the limits of the others.
        """
        real = self.reference
        generated = self.features.all() if self.features else real[:0]
        parts = [self._distances(real, generated), self._manifolds(real, generated), self._inception_score()]
        scores = {"num_images": len(generated), "num_reference_images": len(real)}
        for part in parts:
            scores |= part
        return scores | {"notes": [note for part in parts for note in part.get("notes", [])]}

    def _distances(self, real: Tensor, generated: Tensor) -> dict[str, Any]:
        n = min(len(real), len(generated))
        if n < 2:
            notes = ["FID is missing, and KID: they need at least two generated and two reference images."]
            return {"fid": None, "kid_mean": None, "kid_std": None, "notes": notes}
        mean, std = kernel_distance(real, generated, self.seed)
        notes = small_sample_notes(n, real.shape[1])
        if one_subset := len(real) == len(generated) <= KID_SUBSET_SIZE:
            notes.append("KID has no deviation: both sets fit into one subset.")
        kid = {"kid_mean": mean, "kid_std": None if one_subset else std}
        return {"fid": frechet_distance(real, generated), **kid, "notes": notes}

    def _manifolds(self, real: Tensor, generated: Tensor) -> dict[str, Any]:
        n = min(len(real), len(generated))  # both scores depend on the counts, which must be equal
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
            notes = ["Inception Score has no deviation: it needs at least two splits of the images."]
            return {"inception_score_mean": mean, "inception_score_std": None, "notes": notes}
        return {"inception_score_mean": mean, "inception_score_std": std}


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """FID of features (N, D) and (M, D): |m - m_w|² + Tr(C + C_w - 2 (C C_w)^½), Heusel et al. 2017, eq. 6."""
    passthrough: Any = nn.Identity()  # torchmetrics expects images and a network; here the images are features already
    passthrough.num_features = real.shape[1]
    fid = FrechetInceptionDistance(feature=passthrough, **LOCAL)
    for is_real, features in ((True, real), (False, generated)):
        for rows in features.split(1000):
            fid.update(rows.double(), real=is_real)  # float64, for the covariance is a difference of large sums
    return float(fid.compute())


def kernel_distance(real: Tensor, generated: Tensor, seed: int) -> tuple[float, float]:
    """KID of features (N, D) and (M, D), Bińkowski et al. 2018, §3: mean and standard deviation over random subsets.

    KID is an unbiased estimate of the squared maximum mean discrepancy under a cubic kernel. Unlike FID, it can be
    compared between different numbers of images, and it may be negative. The subsets overlap, so their standard
    deviation is not the standard error of the mean.
    """
    size = min(KID_SUBSET_SIZE, len(real), len(generated))
    with _no_warning_of_memory():
        kid = KernelInceptionDistance(feature=nn.Identity(), subsets=KID_SUBSETS, subset_size=size, **LOCAL)
    kid.update(real, real=True)
    kid.update(generated, real=False)
    return _compute(kid, seed)


def inception_score(logits: Tensor, seed: int, splits: int) -> tuple[float, float]:
    """Inception Score of logits (N, K), from 1 to K: exp(E_x KL(p(y|x) || p(y))), Salimans et al. 2016, §4.

    Returns:
        Mean and standard deviation over `splits` parts of the images; the standard deviation of one part is NaN.
    """
    with _no_warning_of_memory():
        score = InceptionScore(feature=nn.Identity(), splits=splits, **LOCAL)
    score.update(logits)
    return _compute(score, seed)


@contextlib.contextmanager
def _no_warning_of_memory() -> Iterator[None]:
    """Context without torchmetrics' warning that it keeps all features: they are in memory already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        yield


def _compute(metric: Metric, seed: int) -> tuple[float, float]:
    """Mean and standard deviation by a metric of torchmetrics, which draws from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def precision_recall(real: Tensor, generated: Tensor, k: int) -> tuple[float, float]:
    """Improved precision and recall of features (N, D) and (M, D) (Kynkäänniemi et al. 2019, eq. 1 and 2).

    The manifold of a set is the union of balls around its points, each with the distance to the point's k-th nearest
    neighbour as radius. Precision is the share of generated points in the manifold of the real points, recall the
    share of real points in the manifold of the generated points. Both depend on N and M, which should be equal.

    Precision is unreliable for points far from the real ones. The ball of a single real outlier is large, and a
    cluster of generated points within it counts as precise.

    Raises:
        ValueError: a set has no more than k points.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"want more than {k} points, not {len(real)} and {len(generated)}")
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


def _share_inside(queries: Tensor, points: Tensor, k: int) -> float:
    """The share of `queries` (M, D) that lie in the manifold of `points` (N, D)."""
    # k + 1, since the nearest point to each point is itself
    radii = torch.cat([torch.cdist(rows, points).kthvalue(k + 1).values for rows in points.split(CHUNK)])
    inside = torch.cat([(torch.cdist(rows, points) <= radii).any(1) for rows in queries.split(CHUNK)])
    return inside.double().mean().item()


def small_sample_notes(num_images: int, num_features: int = 2048) -> list[str]:
    """Return a warning about FID as a list of one sentence if there are too few images, else an empty list.

    The covariance of N samples has a rank below N, and the bias of FID is of order 1 / N, upwards in practice
    (Chong & Forsyth 2020).
    """
    if num_images > num_features:
        return []
    return [
        f"FID of {num_images:,} images: with no more images than features ({num_features:,}), their covariance "
        "lacks full rank and FID comes out too high. Compare it only with FIDs of as many images."
    ]
