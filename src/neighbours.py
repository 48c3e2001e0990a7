"""Nearest neighbours, a chunk at a time: precision and recall of features, and copies of training images."""

import logging

import torch
from torch import Tensor

from src.folder import ImageFiles  # what stands in for images that memory cannot hold
from src.utils import Rows, image_grid, progress  # all images; a picture of pairs; when a bar is shown

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

    Precision is unreliable for points far from the real ones: the ball of a single real outlier is large, and a
    cluster of generated points that lies in it is counted as convincing.

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


def nearest(images: Tensor, training: Tensor | ImageFiles, what: str = "images") -> tuple[Tensor, Tensor]:
    """The nearest of the training images (N, C, H, W) to each of the images (B, C, H, W), both uint8.

    It goes through the training images once, however many images there are: they may have to be decoded. `what` is the
    name of the images in the progress bar.

    Returns Euclidean distances over pixels in [0, 1], (B,) float32, exactly 0 for a copy, and indices (B,).
    """
    best, distances = torch.full((len(images),), torch.inf), torch.empty(len(images))
    index = torch.zeros(len(images), dtype=torch.long)
    chunks, first = -(-len(training) // CHUNK), 0
    with progress(
        log, iterable=training.split(CHUNK), total=chunks, desc=f"neighbours of {what}", unit="chunk"
    ) as bar:
        for part in bar:
            rows = part.flatten(1).float() / 255  # (CHUNK, P)
            squares = rows.square().sum(1)  # (CHUNK,)
            for group in torch.arange(len(images)).split(CHUNK):
                queries = images[group].flatten(1).float() / 255  # (CHUNK, P)
                # |q - r|² less |q|², which is the same for every r: a matrix product, and no (B, N, P) of differences.
                values, where = torch.addmm(squares, queries, rows.T, alpha=-2).min(1)
                nearer = values < best[group]
                chosen, where = group[nearer], where[nearer]
                best[chosen], index[chosen] = values[nearer], where + first
                # The product rounds, and a copy would come out near 0, not at it: the difference itself does not.
                distances[chosen] = (queries[nearer] - rows[where]).norm(dim=1)
            first += len(part)
            bar.update()
    return distances, index


class Neighbours:
    """How near generated images, which come in batches, lie to training images, and whether that is unusual.

    What is usual is how near test images lie, which nobody can have copied. A generated image is flagged that
    lies nearer to a training image than all but RARE of them do.

    Args:
        training: images (N, C, H, W), uint8 in [0, 255].
        test: images (M, C, H, W) of the same kind; the first TEST_IMAGES are used.
    """

    def __init__(self, training: Tensor | ImageFiles, test: Tensor | ImageFiles) -> None:
        self.training = training
        (few,) = test[:TEST_IMAGES].split(TEST_IMAGES)
        self.usual, _ = nearest(few, training, "test images")
        self.answered = 0  # images that the kept answer of `search` is about
        self.images = Rows()  # bytes, so that even 10,000 of them take a tenth of what their features take

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Take in generated images (B, C, H, W), uint8 in [0, 255]; labels make no difference."""
        self.images.append(images)

    def compute(self) -> dict[str, float | list[str] | None]:
        """The scores of all images so far.

        Returns:
            `nearest_median` and `nearest_median_test`, the median distances of generated and of test images;
            `nearest_threshold`, below which an image is flagged; `nearest_flagged`, the share of generated
            images that are (RARE, if they are as test images); `notes`.
        """
        threshold = self.usual.quantile(RARE).item()
        usual = {"nearest_median_test": self.usual.median().item(), "nearest_threshold": threshold}
        if not self.images:
            notes = ["Distances to training images are missing: there are no images."]
            return {"nearest_median": None, "nearest_flagged": None, **usual, "notes": notes}
        distances, _ = self.search()
        flagged = (distances < threshold).double().mean().item()
        return {"nearest_median": distances.median().item(), "nearest_flagged": flagged, **usual, "notes": []}

    def search(self) -> tuple[Tensor, Tensor]:
        """What `nearest` says of all images so far; the answer is kept, since `compute` and `pairs` both need it."""
        if self.answered != len(self.images):
            self.answer = nearest(self.images.all(), self.training, "generated images")
            self.answered = len(self.images)
        return self.answer

    def pairs(self) -> Tensor:
        """The PAIRS generated images that are nearest to a training image, with it: (PAIRS, 2, C, H, W) uint8."""
        distances, index = self.search()
        order = distances.argsort(stable=True)[:PAIRS]
        return torch.stack([self.images.all()[order], self.training[index[order]]], dim=1)

    def picture(self) -> Tensor:
        """The pairs as one picture, (C, H', W') uint8: generated left, training image right, the nearest first."""
        return image_grid(torch.cat([*self.pairs().unbind(1)], dim=3), columns=PAIRS_A_ROW, gap=8)
