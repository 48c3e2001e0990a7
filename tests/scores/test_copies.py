"""Nearest training images against an exhaustive search, and copies that are flagged."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from src.data import images
from src.scores import copies
from src.utils.pictures import save_png


def random_images(n: int, seed: int, shape: tuple[int, ...] = (1, 6, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_nearest_in_chunks_is_the_nearest_of_all(chunk, monkeypatch):
    monkeypatch.setattr(copies, "CHUNK", chunk)
    images, training = random_images(20, seed=0), random_images(64, seed=1)
    difference = (images.double()[:, None] - training.double()[None]) / 255
    expected, index = difference.flatten(2).norm(dim=2).min(1)
    distances, nearest = copies.nearest(images, training)
    assert torch.equal(nearest, index)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


def test_a_copy_is_found_at_distance_zero_and_a_changed_pixel_counts():
    training = random_images(50, seed=1, shape=(3, 32, 32))
    images = training[[31, 7]].clone()
    images[1, 0, 0, 0] ^= 128
    distances, index = copies.nearest(images, training)
    assert index.tolist() == [31, 7]
    assert distances[0] == 0 and distances[1] == pytest.approx(128 / 255)


@pytest.fixture
def neighbours() -> copies.Neighbours:
    return copies.Neighbours(random_images(300, seed=1), random_images(400, seed=2))


def test_copies_are_flagged_and_fresh_images_are_not(neighbours):
    fresh = random_images(90, seed=3)
    neighbours.update(fresh)
    before = neighbours.compute()
    assert before["nearest_flagged"] < 0.05  # about as rare as among test images
    assert before["nearest_median"] == pytest.approx(before["nearest_median_test"], rel=0.1)
    neighbours.update(neighbours.training[:10])
    after = neighbours.compute()
    assert after["nearest_flagged"] == pytest.approx(before["nearest_flagged"] * 0.9 + 0.1)
    assert neighbours.usual.lt(after["nearest_threshold"]).float().mean() == pytest.approx(0.01, abs=0.003)


def test_the_picture_shows_the_nearest_pairs_the_nearest_first(neighbours):
    copied = neighbours.training[[5, 17]]
    for batch in (random_images(30, seed=3), copied[:1], random_images(30, seed=4), copied[1:]):
        neighbours.update(batch, labels=torch.zeros(len(batch)))
    pairs = neighbours.pairs()
    assert pairs.shape == (16, 2, 1, 6, 5)
    assert torch.equal(pairs[:2], torch.stack([copied, copied], dim=1))
    distances = (pairs[:, 0].float() - pairs[:, 1].float()).flatten(1).norm(dim=1)
    assert distances.equal(distances.sort().values) and distances[2] > 0
    everything = torch.cat([random_images(30, seed=3), random_images(30, seed=4)])
    assert distances[2] / 255 == pytest.approx(copies.nearest(everything, neighbours.training)[0].min().item())
    picture = neighbours.picture()  # 4 × 4 tiles of 6 × 10, each framed in 4
    assert picture.shape == (1, 4 * 14, 4 * 18)
    assert torch.equal(picture[:, 4:10, 4:14], torch.cat([copied[0], copied[0]], dim=2))


def test_images_in_files_are_decoded_once_however_many_are_generated(tmp_path, monkeypatch):
    """A pass for the test images, one for all generated batches together, and the few that the picture shows."""
    for number, image in enumerate(random_images(40, seed=1, shape=(1, 8, 8))):
        save_png(image, tmp_path / f"{number:02}.png")
    files = images.ImageFiles([str(path) for path in sorted(tmp_path.iterdir())], 8, 1)
    decoded, decode = Counter(), images.decode
    monkeypatch.setattr(images, "decode", lambda path, *args: decoded.update([path]) or decode(path, *args))
    monkeypatch.setattr(copies, "CHUNK", 16)
    neighbours = copies.Neighbours(files, random_images(30, seed=2, shape=(1, 8, 8)))
    for seed in range(3, 13):
        neighbours.update(random_images(20, seed, shape=(1, 8, 8)))
    scores, picture = neighbours.compute(), neighbours.picture()
    assert decoded.total() == 2 * len(files) + copies.PAIRS
    in_memory = copies.Neighbours(files[range(40)], random_images(30, seed=2, shape=(1, 8, 8)))
    in_memory.update(neighbours.images.all())
    assert in_memory.compute() == scores and torch.equal(in_memory.picture(), picture)


def test_without_images_there_is_a_note_and_no_number(neighbours):
    scores = neighbours.compute()
    assert scores["nearest_median"] is None and scores["nearest_flagged"] is None and scores["notes"]
