"""Precision and recall of points whose answer can be seen, and nearest neighbours against a search in full."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from src import folder, neighbours
from src.utils import save_png


def points(*rows: float | tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), -1)


def random_images(n: int, seed: int, shape: tuple[int, ...] = (1, 6, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)


# ---- precision and recall ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "precision", "recall"),
    [
        (points(0, 1, 2, 3), 1, 1),  # the real ones themselves
        (points(10, 11, 12, 13), 0, 0),  # elsewhere
        (points(1, 1, 1, 1), 1, 0.25),  # one again and again: balls of radius 0
        (points(0.5, 0.5, 9, 30), 0.5, 0.75),  # two inside; their balls: twice nothing, [0.5, 17.5], [9, 51]
    ],
)
def test_precision_and_recall_on_a_line(generated, precision, recall):
    """Real points at 0, 1, 2, 3 and k = 1: every ball has radius 1, and the manifold is [-1, 4]."""
    found = neighbours.precision_recall(points(0, 1, 2, 3), generated, k=1)
    assert found == pytest.approx((precision, recall))


def test_precision_in_the_plane_counts_the_edge_of_a_ball():
    """The corners of a square: the second nearest is at 1, the third at 1.41."""
    corners = points((0, 0), (0, 1), (1, 0), (1, 1))
    generated = points((0.5, 0.5), (2, 0), (2.1, 0), (3, 0), (0.5, 2.2))
    assert neighbours.precision_recall(corners, generated, k=2)[0] == pytest.approx(2 / 5)
    assert neighbours.precision_recall(corners, generated, k=3)[0] == pytest.approx(4 / 5)


def test_precision_and_recall_in_chunks_are_those_of_the_definition(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(90, 8, generator=generator), 0.7 * torch.randn(110, 8, generator=generator)

    def share(queries: Tensor, points: Tensor) -> float:
        radii = [sorted((p - q).norm().item() for q in points)[3] for p in points]
        inside = [any((q - p).norm() <= r for p, r in zip(points, radii, strict=True)) for q in queries]
        return sum(inside) / len(inside)

    expected = share(generated, real), share(real, generated)
    assert expected[0] > expected[1] + 0.1  # narrower, so less varied: an exchange of the two would show
    for chunk in (7, 1000):
        monkeypatch.setattr(neighbours, "CHUNK", chunk)
        assert neighbours.precision_recall(real, generated, k=3) == pytest.approx(expected)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="more than 3 points"):
        neighbours.precision_recall(points(1, 2, 3), points(1, 2, 3, 4, 5), k=3)


# ---- copies of training images -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_nearest_in_chunks_is_the_nearest_of_all(chunk, monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    images, training = random_images(20, seed=0), random_images(64, seed=1)
    difference = (images.double()[:, None] - training.double()[None]) / 255
    expected, index = difference.flatten(2).norm(dim=2).min(1)
    distances, found = neighbours.nearest(images, training)
    assert torch.equal(found, index)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


def test_a_copy_is_found_at_distance_zero_and_a_changed_pixel_counts():
    training = random_images(50, seed=1, shape=(3, 32, 32))
    images = training[[31, 7]].clone()
    images[1, 0, 0, 0] ^= 128
    distances, index = neighbours.nearest(images, training)
    assert index.tolist() == [31, 7]
    assert distances[0] == 0 and distances[1] == pytest.approx(128 / 255)


@pytest.fixture
def found() -> neighbours.Neighbours:
    return neighbours.Neighbours(random_images(300, seed=1), random_images(400, seed=2))


def test_copies_are_flagged_and_fresh_images_are_not(found):
    fresh = random_images(90, seed=3)
    found.update(fresh)
    before = found.compute()
    assert before["nearest_flagged"] < 0.05  # about as rare as among test images
    assert before["nearest_median"] == pytest.approx(before["nearest_median_test"], rel=0.1)
    found.update(found.training[:10])
    after = found.compute()
    assert after["nearest_flagged"] == pytest.approx(before["nearest_flagged"] * 0.9 + 0.1)
    assert found.usual.lt(after["nearest_threshold"]).float().mean() == pytest.approx(0.01, abs=0.003)


def test_the_picture_shows_the_nearest_pairs_the_nearest_first(found):
    copies = found.training[[5, 17]]
    for batch in (random_images(30, seed=3), copies[:1], random_images(30, seed=4), copies[1:]):
        found.update(batch, labels=torch.zeros(len(batch)))
    pairs = found.pairs()
    assert pairs.shape == (16, 2, 1, 6, 5)
    assert torch.equal(pairs[:2], torch.stack([copies, copies], dim=1))
    distances = (pairs[:, 0].float() - pairs[:, 1].float()).flatten(1).norm(dim=1)
    assert distances.equal(distances.sort().values) and distances[2] > 0
    everything = torch.cat([random_images(30, seed=3), random_images(30, seed=4)])
    assert distances[2] / 255 == pytest.approx(neighbours.nearest(everything, found.training)[0].min().item())
    picture = found.picture()  # 4 × 4 tiles of 6 × 10, each framed in 4
    assert picture.shape == (1, 4 * 14, 4 * 18)
    assert torch.equal(picture[:, 4:10, 4:14], torch.cat([copies[0], copies[0]], dim=2))


def test_images_in_files_are_decoded_once_however_many_are_generated(tmp_path, monkeypatch):
    """A pass for the test images, one for all generated batches together, and the few that the picture shows."""
    for number, image in enumerate(random_images(40, seed=1, shape=(1, 8, 8))):
        save_png(image, tmp_path / f"{number:02}.png")
    files = folder.ImageFiles([str(path) for path in sorted(tmp_path.iterdir())], 8, 1)
    decoded, decode = Counter(), folder.decode
    monkeypatch.setattr(folder, "decode", lambda path, *args: decoded.update([path]) or decode(path, *args))
    monkeypatch.setattr(neighbours, "CHUNK", 16)
    found = neighbours.Neighbours(files, random_images(30, seed=2, shape=(1, 8, 8)))
    for seed in range(3, 13):
        found.update(random_images(20, seed, shape=(1, 8, 8)))
    scores, picture = found.compute(), found.picture()
    assert decoded.total() == 2 * len(files) + neighbours.PAIRS
    in_memory = neighbours.Neighbours(files[range(40)], random_images(30, seed=2, shape=(1, 8, 8)))
    in_memory.update(found.images.all())
    assert in_memory.compute() == scores and torch.equal(in_memory.picture(), picture)


def test_without_images_there_is_a_note_and_no_number(found):
    scores = found.compute()
    assert scores["nearest_median"] is None and scores["nearest_flagged"] is None and scores["notes"]
