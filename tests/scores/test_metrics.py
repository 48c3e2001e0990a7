"""The scores, against closed forms and independent computations; a small linear map stands in for Inception."""

import dataclasses
import logging
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from src.data import datasets
from src.scores import metrics
from src.scores.rows import Rows
from src.utils import cache

FEATURES = 16  # torchmetrics takes eigenvalues of (D, D) matrices: 2048 would need 10 s a test


@dataclasses.dataclass
class LinearExtractor:
    """Features and logits are fixed random projections of the pixels; `calls` counts the images it has seen.

    They are computed in float64 and then rounded to float32, so that they do not depend on an image's batch.
    """

    num_features: int = FEATURES
    has_logits: bool = True
    sha256: str = "0" * 64
    name: str = "linear"
    calls: int = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += len(images)
        pixels = images.flatten(1).double() / 255
        maps = torch.randn(pixels.shape[1], self.num_features + 10, generator=torch.Generator().manual_seed(5))
        features, logits = (pixels @ maps.double()).float().split([self.num_features, 10], dim=1)
        return features, logits if self.has_logits else torch.full_like(logits, torch.nan)


class GivenLogits(LinearExtractor):
    """The logits that the test wants: the first pixel of an image is its class, `sharpness` how sure it is."""

    def __init__(self, classes: int, sharpness: float) -> None:
        super().__init__()
        self.classes, self.sharpness = classes, sharpness

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        label = images[:, 0, 0, 0].long()
        return super().__call__(images)[0], self.sharpness * torch.eye(self.classes)[label]


def points(*rows: float | tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), -1)


def random_images(n: int, seed: int, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)


@pytest.fixture
def reference(tmp_path) -> Tensor:
    return metrics.reference_features(random_images(200, seed=1), LinearExtractor(), tmp_path)


def scores_of(images: Tensor, reference: Tensor, extractor=None, batch_size=50, **settings) -> dict:
    scores = metrics.Scores(extractor or LinearExtractor(), reference, **settings)
    for batch in images.split(batch_size):
        scores.update(batch)
    return scores.compute()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, equation 6, by symmetric square roots (torchmetrics goes another way)."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = root(root(c_a) @ c_b @ root(c_a))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a + c_b - 2 * cross))


def test_fid_is_the_frechet_distance_between_gaussians(reference):
    generated = random_images(150, seed=2, high=200)
    a, b = (LinearExtractor()(images)[0].double().numpy() for images in (random_images(200, seed=1), generated))
    result = scores_of(generated, reference)
    assert result["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert (result["num_images"], result["num_reference_images"]) == (150, 200)


def test_fid_of_shifted_features_is_the_squared_shift(reference):
    """With equal covariances only |m - m_w|² is left."""

    class Shifted(LinearExtractor):
        def __call__(self, images):
            features, logits = super().__call__(images)
            return features + 0.5, logits

    fid = scores_of(random_images(200, seed=1), reference, Shifted())["fid"]
    assert fid == pytest.approx(FEATURES * 0.25, rel=1e-5)


def test_fid_of_the_reference_itself_is_zero(reference):
    assert scores_of(random_images(200, seed=1), reference)["fid"] == pytest.approx(0, abs=1e-8)


def test_scores_do_not_depend_on_the_batches(reference):
    images = random_images(101, seed=3)
    whole = scores_of(images, reference, batch_size=101)
    for batch_size in (1, 7, 64):
        parts = scores_of(images, reference, batch_size=batch_size)
        assert parts["fid"] == pytest.approx(whole["fid"], rel=1e-6)
        assert parts["inception_score_mean"] == pytest.approx(whole["inception_score_mean"], rel=1e-5)


def test_one_pass_through_the_network_serves_all_scores(reference):
    extractor = LinearExtractor()
    scores_of(random_images(60, seed=3), reference, extractor)
    assert extractor.calls == 60


def test_reference_features_are_computed_once(tmp_path):
    images, extractor = random_images(90, seed=4), LinearExtractor()
    fresh = metrics.reference_features(images, extractor, tmp_path, batch_size=32)
    cached = metrics.reference_features(images, extractor, tmp_path)
    assert extractor.calls == 90
    assert torch.equal(fresh, cached)
    torch.testing.assert_close(fresh, LinearExtractor()(images)[0])
    assert scores_of(random_images(50, 5), fresh) == scores_of(random_images(50, 5), cached)


@pytest.mark.parametrize("collect", ["reference", "generated"])
def test_what_the_network_returns_is_freed_before_it_is_called_again(collect, tmp_path):
    """Kept outputs would fragment the heap between the activations of the network (`Rows`)."""
    returned = []

    class Watched(LinearExtractor):
        def __call__(self, images):
            assert not any(output() is not None for output in returned), "the last batch's output is still there"
            outputs = super().__call__(images)
            returned[:] = map(weakref.ref, outputs)
            return outputs

    images = random_images(40, seed=4)
    if collect == "reference":
        features = metrics.reference_features(images, Watched(), tmp_path, batch_size=8)
    else:
        scores = metrics.Scores(Watched(), torch.empty(0, FEATURES))
        for batch in images.split(8):
            scores.update(batch)
        features = scores.features.all()
    torch.testing.assert_close(features, LinearExtractor()(images)[0])


@pytest.mark.parametrize("sizes", [[5], [1] * 9, [3, 0, 7, 1], [2, 50, 1], [0, 4]])
def test_rows_are_those_of_all_batches_in_order(sizes):
    batches = [random_images(n, seed=n) for n in sizes]
    rows = Rows()
    assert not rows
    for batch in batches:
        rows.append(batch)
    assert len(rows) == sum(sizes) and torch.equal(rows.all(), torch.cat(batches))
    assert rows.all().dtype == torch.uint8
    assert rows.all().untyped_storage().nbytes() <= 2 * rows.all().nbytes


def test_other_images_or_weights_are_not_taken_from_the_cache(tmp_path):
    images = random_images(40, seed=4)
    metrics.reference_features(images, LinearExtractor(), tmp_path)
    one_pixel_off = images.clone()
    one_pixel_off[0, 0, 0, 0] ^= 1
    for changed, sha256 in ((one_pixel_off, "0" * 64), (images, "1" * 64)):
        extractor = LinearExtractor(sha256=sha256)
        metrics.reference_features(changed, extractor, tmp_path)
        assert extractor.calls == 40
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "another's"])
def test_unusable_cache_file_is_made_again_with_a_warning(tmp_path, caplog, damage):
    images = random_images(40, seed=4)
    fresh = metrics.reference_features(images, LinearExtractor(), tmp_path)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "another's":
        metrics.reference_features(random_images(40, seed=9), LinearExtractor(), tmp_path / "other")
        content = next((tmp_path / "other").iterdir()).read_bytes()
    elif damage == "flipped bit":
        content[content.index(fresh.numpy().tobytes()) + 100] ^= 4
    else:
        content = content[: len(content) // 2] if damage == "truncated" else b""
    file.write_bytes(content)
    extractor = LinearExtractor()
    with caplog.at_level(logging.WARNING):
        again = metrics.reference_features(images, extractor, tmp_path)
    assert extractor.calls == 40
    assert file.name in caplog.text
    assert torch.equal(fresh, again)
    metrics.reference_features(images, extractor, tmp_path)
    assert extractor.calls == 40, "the file was not mended"


@pytest.mark.parametrize("place", ["file", "long" * 100])  # of the second one cannot even ask whether it is there
def test_unwritable_cache_costs_only_a_warning(place, tmp_path, caplog):
    (tmp_path / "file").write_text("where the directory belongs")
    with caplog.at_level(logging.WARNING):
        features = metrics.reference_features(random_images(9, 4), LinearExtractor(), tmp_path / place)
    assert features.shape == (9, FEATURES)
    assert "again" in caplog.text


def test_cache_follows_torch_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "hub" / "simple-ddpm"


one_split = pytest.mark.filterwarnings("ignore:std")  # torch's complaint that one number has no deviation


def labelled_images(classes: int, each: int) -> Tensor:
    images = random_images(classes * each, seed=6)
    images[:, 0, 0, 0] = torch.arange(classes).repeat_interleave(each)
    return images


def test_inception_score_of_a_network_that_sees_nothing_is_one(reference):
    result = scores_of(labelled_images(5, 20), reference, GivenLogits(5, sharpness=0))
    assert result["inception_score_mean"] == pytest.approx(1, rel=1e-6)
    assert result["inception_score_std"] == pytest.approx(0, abs=1e-6)


@one_split
def test_inception_score_of_certain_and_balanced_classes_is_their_number(reference):
    result = scores_of(labelled_images(5, 20), reference, GivenLogits(5, sharpness=40), splits=1)
    assert result["inception_score_mean"] == pytest.approx(5, rel=1e-5)
    assert result["inception_score_std"] is None  # one split has no deviation
    assert any("deviation" in note for note in result["notes"])


@one_split
def test_inception_score_by_its_definition(reference):
    """exp(E_x KL(p(y|x) || p(y))), Salimans et al. 2016, over all images."""
    images = random_images(80, seed=7)
    p = LinearExtractor()(images)[1].double().softmax(1).numpy()
    expected = math.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert scores_of(images, reference, splits=1)["inception_score_mean"] == pytest.approx(expected, rel=1e-5)


def test_inception_score_depends_on_its_seed_alone(reference):
    images = random_images(80, seed=7)
    results = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        results.append(scores_of(images, reference, seed=3))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    assert results[0]["inception_score_std"] != scores_of(images, reference, seed=4)["inception_score_std"]


@pytest.mark.parametrize("declared", [True, False])
def test_missing_logits_give_none_and_a_reason(reference, declared):
    class Nan(LinearExtractor):
        def __call__(self, images):
            features, logits = super().__call__(images)
            return features, torch.full_like(logits, torch.nan)

    result = scores_of(random_images(40, seed=8), reference, Nan(has_logits=not declared))
    assert result["inception_score_mean"] is None
    assert result["inception_score_std"] is None
    assert any("Inception Score is missing" in note for note in result["notes"])
    assert math.isfinite(result["fid"])


@one_split
@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_give_none_and_a_reason(reference, n):
    result = (
        scores_of(random_images(n, seed=8), reference) if n else metrics.Scores(LinearExtractor(), reference).compute()
    )
    assert result["fid"] is None
    assert any("FID is missing" in note for note in result["notes"])
    assert not any(isinstance(value, float) and math.isnan(value) for value in result.values())


def test_note_where_images_are_fewer_than_features(reference):
    assert metrics.small_sample_notes(2049) == []
    (note,) = metrics.small_sample_notes(2047)
    assert "2,047" in note and "2,048" in note and "too high" in note
    assert scores_of(random_images(FEATURES + 1, seed=8), reference)["notes"] == []
    assert len(scores_of(random_images(FEATURES, seed=8), reference)["notes"]) == 1


def test_few_reference_images_are_noted_too(tmp_path):
    few = metrics.reference_features(random_images(FEATURES, seed=1), LinearExtractor(), tmp_path)
    assert len(scores_of(random_images(100, seed=2), few)["notes"]) == 1


def test_scores_come_without_warnings(reference, recwarn):
    scores_of(random_images(40, seed=8), reference)
    assert [str(warning.message) for warning in recwarn] == []


# ---- KID ---------------------------------------------------------------------------------------------------


def gaussian(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_is_the_unbiased_estimate_of_squared_mmd():
    """With all images in each subset there is nothing random: Bińkowski et al. 2018, section 3, term by term."""
    x, y = gaussian(30, 0).double(), gaussian(30, 1, shift=0.5).double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / FEATURES + 1) ** 3

    off_diagonal = 1 - torch.eye(30)
    expected = ((kernel(x, x) + kernel(y, y)) * off_diagonal).sum() / (30 * 29) - 2 * kernel(x, y).mean()
    mean, std = metrics.kernel_distance(x.float(), y.float(), seed=0)
    assert mean == pytest.approx(expected.item(), rel=1e-4)
    assert std == pytest.approx(0, abs=1e-5)


def test_kid_of_two_samples_of_one_distribution_is_zero_on_average_where_fid_is_not():
    pairs = [(gaussian(40, seed), gaussian(40, seed + 1000)) for seed in range(30)]
    kids = torch.tensor([metrics.kernel_distance(*pair, seed=0)[0] for pair in pairs])
    error = kids.std() / len(kids) ** 0.5
    assert kids.mean().abs() < 3 * error and kids.min() < 0
    assert metrics.frechet_distance(*pairs[0]) > 1  # biased by few images
    others = [metrics.kernel_distance(x, y + 0.2, seed=0)[0] for x, y in pairs[:10]]
    assert sum(others) / len(others) > 6 * error  # negative control: a shift is seen


def test_kid_depends_on_its_seed_alone(reference):
    images, results = random_images(80, seed=7), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        results.append(scores_of(images, reference, seed=3)["kid_mean"])
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1] != scores_of(images, reference, seed=4)["kid_mean"]


def test_kid_of_subsets_that_hold_everything_has_no_deviation(reference):
    result = scores_of(random_images(200, seed=2), reference)
    assert result["kid_mean"] is not None and result["kid_std"] is None
    assert any("KID has no deviation" in note for note in result["notes"])


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
    found = metrics.precision_recall(points(0, 1, 2, 3), generated, k=1)
    assert found == pytest.approx((precision, recall))


def test_precision_in_the_plane_counts_the_edge_of_a_ball():
    """The corners of a square: the second nearest is at 1, the third at 1.41."""
    corners = points((0, 0), (0, 1), (1, 0), (1, 1))
    generated = points((0.5, 0.5), (2, 0), (2.1, 0), (3, 0), (0.5, 2.2))
    assert metrics.precision_recall(corners, generated, k=2)[0] == pytest.approx(2 / 5)
    assert metrics.precision_recall(corners, generated, k=3)[0] == pytest.approx(4 / 5)


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
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        assert metrics.precision_recall(real, generated, k=3) == pytest.approx(expected)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="more than 3 points"):
        metrics.precision_recall(points(1, 2, 3), points(1, 2, 3, 4, 5), k=3)


# ---- direction: what a model can do wrong, and which score tells -------------------------------------------


@pytest.fixture(scope="module")
def clothes(data) -> tuple[Tensor, Tensor, Tensor]:
    """1,000 training images, their labels, and 500 test images."""
    images, labels = datasets.load("fashion-mnist-tiny", data, "train", 32)
    return images, labels, datasets.load("fashion-mnist-tiny", data, "test", 32)[0]


@pytest.fixture(scope="module")
def honest(clothes) -> dict:
    """The scores of real images that are not the reference's: the best that a model could have."""
    return scores_of(clothes[0][:500], LinearExtractor()(clothes[2])[0])


def test_real_images_have_precision_and_recall(honest):
    assert honest["precision"] > 0.8 and honest["recall"] > 0.8


def test_noise_is_far_away_and_not_convincing(clothes, honest):
    noise = torch.randint(0, 256, (500, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = scores_of(noise, LinearExtractor()(clothes[2])[0])
    assert scores["fid"] > 20 * honest["fid"] and scores["kid_mean"] > 20 * abs(honest["kid_mean"])
    assert scores["precision"] < 0.05 < 0.8 < honest["precision"]


def test_one_image_again_and_again_has_no_recall(clothes, honest):
    repeated = clothes[2][:1].expand(500, -1, -1, -1)
    scores = scores_of(repeated, LinearExtractor()(clothes[2])[0])
    assert scores["precision"] == 1 and scores["recall"] < 0.01
    assert scores["fid"] > 20 * honest["fid"]


def test_one_class_alone_is_convincing_but_not_varied(clothes, honest):
    images, labels, test = clothes
    sneakers = images[labels == 7]
    scores = scores_of(sneakers, LinearExtractor()(test)[0])
    mixed = scores_of(images[: len(sneakers)], LinearExtractor()(test)[0])  # as many, of all classes
    assert scores["precision"] > 0.7
    assert scores["recall"] < 0.5 * mixed["recall"]
    assert scores["fid"] > 5 * mixed["fid"]
