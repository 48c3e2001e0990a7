"""Nearest neighbours, a chunk at a time: precision and recall of features, and copies of training images."""

import logging

import torch
from torch import Tensor

from src.utils import image_grid, progress  # pairs make a picture; one rule of when a bar is shown

log = logging.getLogger(__name__)

CHUNK = 1024  # rows of a matrix of distances: 1024 × 10,000 take 40 MB
TEST_IMAGES = 2000  # whose distances show what is usual
RARE = 0.01  # the share of them that counts as unusually near
PAIRS = 16  # the nearest, which are shown
PAIRS_A_ROW = 4


def precision_recall(real: Tensor, generated: Tensor, k: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2) of features (N, D) and (M, D).

    A set's manifold is the union of balls around its points, each out to the point's k-th nearest neighbour.
    Precision is the share of generated points in the manifold of the real, recall that of real points in the
    manifold of the generated. Both depend on N and M, which should be equal.

    Raises ValueError if a set has no more than k points.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"want more than {k} points, not {len(real)} and {len(generated)}")
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


def _share_inside(queries: Tensor, points: Tensor, k: int) -> float:
    """The share of the queries that lie in the manifold of the points."""
    # The nearest of k + 1 is the point itself.
    radii = torch.cat([torch.cdist(rows, points).kthvalue(k + 1).values for rows in points.split(CHUNK)])
    inside = torch.cat([(torch.cdist(rows, points) <= radii).any(1) for rows in queries.split(CHUNK)])
    return inside.double().mean().item()


def nearest(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the training images (N, C, H, W) to each of the images (B, C, H, W), both uint8.

    Returns Euclidean distances over pixels in [0, 1], (B,) float32, exactly 0 for a copy, and indices (B,).
    """
    queries = images.flatten(1).float() / 255  # (B, P)
    best, index = torch.full((len(images),), torch.inf), torch.zeros(len(images), dtype=torch.long)
    for number, part in enumerate(training.split(CHUNK)):
        rows = part.flatten(1).float() / 255
        # |q - r|² less |q|², which is the same for every r: one matrix product, and no (B, N, P) of differences.
        values, where = torch.addmm(rows.square().sum(1), queries, rows.T, alpha=-2).min(1)
        nearer = values < best
        best, index = torch.where(nearer, values, best), torch.where(nearer, where + number * CHUNK, index)
    # The product rounds: a copy would come out near 0, not at it.
    return (queries - training[index].flatten(1).float() / 255).norm(dim=1), index


class Neighbours:
    """How near generated images, which come in batches, lie to training images, and whether that is unusual.

    What is usual is how near test images lie, which nobody can have copied. A generated image is flagged that
    lies nearer to a training image than all but RARE of them do.

    Args:
        training: images (N, C, H, W), uint8 in [0, 255].
        test: images (M, C, H, W) of the same kind; the first TEST_IMAGES are used.
    """

    def __init__(self, training: Tensor, test: Tensor) -> None:
        self.training = training
        batches = test[:TEST_IMAGES].split(250)
        with progress(log, iterable=batches, desc="neighbours of test images", unit="batch") as bar:
            self.usual = torch.cat([nearest(batch, training)[0] for batch in bar])
        self.distances: list[Tensor] = []
        self.pairs = torch.empty(0, 2, *training.shape[1:], dtype=torch.uint8)  # generated, training; the nearest
        self.pair_distances = torch.empty(0)

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Take in generated images (B, C, H, W), uint8 in [0, 255]; labels make no difference."""
        distances, index = nearest(images, self.training)
        self.distances.append(distances)
        pairs = torch.cat([self.pairs, torch.stack([images, self.training[index]], dim=1)])
        self.pair_distances, order = torch.cat([self.pair_distances, distances]).sort(stable=True)
        self.pairs, self.pair_distances = pairs[order][:PAIRS], self.pair_distances[:PAIRS]

    def compute(self) -> dict[str, float | list[str] | None]:
        """What has been found in all images so far.

        Returns:
            `nearest_median` and `nearest_median_test`, the median distances of generated and of test images;
            `nearest_threshold`, below which an image is flagged; `nearest_flagged`, the share of generated
            images that are (RARE, if they are as test images); `notes`.
        """
        threshold = self.usual.quantile(RARE).item()
        distances = torch.cat(self.distances) if self.distances else torch.empty(0)
        known = len(distances) > 0
        return {
            "nearest_median": distances.median().item() if known else None,
            "nearest_median_test": self.usual.median().item(),
            "nearest_threshold": threshold,
            "nearest_flagged": (distances < threshold).double().mean().item() if known else None,
            "notes": [] if known else ["Distances to training images are missing: there are no images."],
        }

    def picture(self) -> Tensor:
        """The PAIRS nearest pairs, (C, H', W') uint8: generated left, training image right, the nearest first."""
        return image_grid(torch.cat([*self.pairs.unbind(1)], dim=3), columns=PAIRS_A_ROW, gap=8)
