"""Copies of training images: the distance of each generated image to its nearest training image.

The same distances of test images, which the model has never seen, show what is usual.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from src.data.images import Images
from src.scores.rows import Rows
from src.utils.pictures import image_grid
from src.utils.progress import progress

log = logging.getLogger(__name__)

CHUNK = 1024  # rows and columns of the distance matrices that are computed at a time
TEST_IMAGES = 2000  # test images whose distances to the training images are computed
RARE = 0.01  # quantile of those distances below which a generated image is flagged
PAIRS = 16  # pairs of a generated and a training image in the picture, the nearest of all
PAIRS_A_ROW = 4
FRAME = 80  # grey level of the frame of each pair


def nearest(images: Tensor, training: Images, what: str = "images") -> tuple[Tensor, Tensor]:
    """Find the nearest training image of each image.

    The training images are read once, however many images there are, since those of a folder have to be decoded.

    Args:
        images: (B, C, H, W) uint8.
        training: (N, C, H, W) uint8.
        what: name of the images in the progress bar.

    Returns:
        Euclidean distances of pixels in [0, 1], (B,) float32, exactly 0 for a copy; and indices, (B,) int64.
    """
    best, distances = torch.full((len(images),), torch.inf), torch.empty(len(images))
    index = torch.zeros(len(images), dtype=torch.long)
    chunks, first = -(-len(training) // CHUNK), 0
    how = {"total": chunks, "desc": f"neighbours of {what}", "unit": " chunks"}
    with progress(log, iterable=training.split(CHUNK), **how) as parts:
        for part in parts:
            rows = part.flatten(1).float() / 255  # (CHUNK, P)
            squares = rows.square().sum(1)  # (CHUNK,)
            for group in torch.arange(len(images)).split(CHUNK):
                queries = images[group].flatten(1).float() / 255  # (CHUNK, P)
                # |q - r|² - |q|², whose second term is the same for every r, needs only a matrix product.
                values, where = torch.addmm(squares, queries, rows.T, alpha=-2).min(1)
                nearer = values < best[group]
                chosen, where = group[nearer], where[nearer]
                best[chosen], index[chosen] = values[nearer], where + first
                # Rounding in the matrix product would give a copy a distance near 0; the norm of the difference is 0.
                distances[chosen] = (queries[nearer] - rows[where]).norm(dim=1)
            first += len(part)
    return distances, index


class Neighbours:
    """Distances of generated images to the nearest training images, and the share that is suspiciously near.

    A generated image is flagged if it is nearer to a training image than all but a fraction RARE of the test images.

    Args:
        training: (N, C, H, W) uint8.
        test: (M, C, H, W) uint8; the first TEST_IMAGES are used.
    """

    def __init__(self, training: Images, test: Images) -> None:
        self.training = training
        (first,) = test[:TEST_IMAGES].split(TEST_IMAGES)
        self.usual, _ = nearest(first, training, "test images")
        self.images = Rows()  # uint8: 10,000 images take a tenth of the memory of their Inception features
        self._nearest: tuple[Tensor, Tensor] | None = None

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Add generated images (B, C, H, W) uint8; labels are ignored."""
        self.images.append(images)
        self._nearest = None

    def compute(self) -> dict[str, Any]:
        """Compute the scores of all images so far.

        Returns:
            `nearest_median` and `nearest_median_test`, the median distances of generated and of test images;
            `nearest_threshold`, below which an image is flagged; `nearest_flagged`, the share of generated images that
            are flagged, which is RARE if they are distributed as the test images; `notes`, a list of sentences.
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
        """Return distances and indices of the nearest training images, as `nearest` does, of all images so far.

        They are kept until the next `update`, since both `compute` and `pairs` need them.
        """
        if self._nearest is None:
            self._nearest = nearest(self.images.all(), self.training, "generated images")
        return self._nearest

    def pairs(self) -> Tensor:
        """Return the PAIRS generated images nearest to a training image, each with it: (PAIRS, 2, C, H, W) uint8."""
        distances, index = self.search()
        order = distances.argsort(stable=True)[:PAIRS]
        return torch.stack([self.images.all()[order], self.training[index[order]]], dim=1)

    def picture(self) -> Tensor:
        """Draw the pairs, nearest first, generated image left and training image right: (C, H', W') uint8.

        Each pair has a grey frame.
        """
        pairs = torch.cat([*self.pairs().unbind(1)], dim=3)  # (PAIRS, C, H, 2W)
        framed = torch.nn.functional.pad(pairs, (1, 1, 1, 1), value=FRAME)
        return image_grid(framed, columns=PAIRS_A_ROW, gap=6)
