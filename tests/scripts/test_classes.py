"""Class labels: what the network is told and when not, guidance, `sample.py --class` and `eval.py --class`."""

import json

import pytest
import torch
from conftest import arguments, read_png
from torch import Tensor, nn

import eval as evaluate
import sample
import train
from src import generation
from src.data import datasets
from src.diffusion import Diffusion
from src.model import UNet
from src.samplers import SAMPLERS
from src.scores import classifier, copies, inception, likelihood, metrics
from src.training import Learner
from src.utils import checkpoint, flags
from src.utils.distributed import World
from src.utils.errors import SettingError

CPU = torch.device("cpu")


@pytest.fixture
def unet() -> UNet:
    """Random weights, three classes told apart."""
    torch.manual_seed(0)
    unet = UNet(image_size=8, dim=8, dim_mults=(1, 2), num_classes=3).eval().requires_grad_(False)
    nn.init.normal_(unet.conv_out.weight, std=0.1)
    nn.init.normal_(unet.label.weight[:3])
    return unet


def x_t(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# ---- the network -------------------------------------------------------------------------------------------


def test_a_class_changes_the_prediction_and_no_class_is_the_same_as_none(unet):
    x, t = x_t(1), torch.tensor([500])
    outputs = [unet(x, t, torch.tensor([y])) for y in range(4)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert torch.equal(outputs[unet.no_class], unet(x, t))


def test_each_image_is_told_its_own_class(unet):
    x, t, y = x_t(3), torch.tensor([500]), torch.tensor([2, 0, 3])
    together = unet(x, t, y)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], unet(x[i : i + 1], t, y[i : i + 1]))


def test_a_fresh_network_begins_as_the_plain_one():
    """Same weights but for the labels', same output for every class."""
    torch.manual_seed(0)
    told = UNet(image_size=8, dim=8, dim_mults=(1, 2), num_classes=3)
    plain = UNet(image_size=8, dim=8, dim_mults=(1, 2))
    plain.load_state_dict({k: v for k, v in told.state_dict().items() if not k.startswith("label")})
    for net in (told, plain):
        nn.init.constant_(net.conv_out.weight, 0.1)
    for y in range(4):
        assert torch.equal(told(x_t(1), torch.tensor([3]), torch.tensor([y])), plain(x_t(1), torch.tensor([3])))


def test_no_class_stays_0_however_long_it_is_trained(unet):
    unet.requires_grad_(True)
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.1)
    before = unet.label.weight.clone()
    for _ in range(3):
        unet(x_t(4), torch.tensor([500]), torch.tensor([0, 1, 3, 3])).square().mean().backward()
        optimizer.step()
    assert torch.equal(unet.label.weight[3], torch.zeros(32))
    assert all(not torch.equal(unet.label.weight[y], before[y]) for y in (0, 1))
    assert torch.equal(unet.label.weight[2], before[2])  # nobody spoke of class 2


# ---- training ----------------------------------------------------------------------------------------------


def told(monkeypatch, quick, *flags: object) -> Tensor:
    """The labels that the network got in a run of one epoch."""
    seen = []
    forward = UNet.forward

    def spy(self: UNet, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if self.training and y is not None:
            seen.append(y)
        return forward(self, x, t, y)

    monkeypatch.setattr(UNet, "forward", spy)
    quick("run", "--epochs", 10, *flags)
    return torch.cat(seen) if seen else torch.empty(0)


def test_a_share_of_the_labels_is_hidden_and_the_others_are_told(quick, monkeypatch):
    right = []
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, x0, y, *rest: right.append(y) or step(self, x0, y, *rest))
    seen, right = told(monkeypatch, quick, "--class_dropout", 0.25), torch.cat(right)
    hidden = seen == 10
    assert 70 < hidden.sum() < 130  # of 400; 100 ± 8.7
    assert torch.equal(seen[~hidden], right[~hidden])


def test_almost_no_dropout_hides_none_and_the_plain_model_is_told_none(quick, monkeypatch, saved):
    assert (told(monkeypatch, quick, "--class_dropout", 1e-9) < 10).all()
    assert len(saved("run")["settings"]["classes"]) == 10
    assert len(told(monkeypatch, quick, "--no-class_conditional", "--fresh", "--overwrite")) == 0
    assert saved("run")["settings"]["classes"] == []
    assert not any(name.startswith("label") for name in saved("run")["model"])


def test_a_run_records_the_frequencies_and_validates_and_draws_with_classes(quick, monkeypatch, saved, data):
    """Frequencies of the images trained on, not of those held out, of which the validation has the true classes."""
    seen, forward = [], UNet.forward

    def spy(self: UNet, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if not self.training:
            seen.append(y)
        return forward(self, x, t, y)

    monkeypatch.setattr(UNet, "forward", spy)
    quick("run", "--epochs", 1, "--num_samples", 3, "--steps", 2)
    _, labels = datasets.load("fashion-mnist-tiny", data, "train", 28)  # of which `quick` trains on 40
    counts = saved("run")["settings"]["class_counts"]
    assert (
        counts
        == labels[:40].bincount(minlength=10).tolist()
        == saved("run", "weights.pth")["settings"]["class_counts"]
    )
    *validated, first, last = seen
    assert torch.equal(torch.cat(validated), labels[40:60])
    assert torch.equal(first, generation.draw_classes(counts, 0, range(3))) and torch.equal(first, last)


# ---- guidance ----------------------------------------------------------------------------------------------


def generator(unet: UNet, prediction: str, scale: float, *classes: int, sampler: str = "ddim") -> generation.Generator:
    diffusion = Diffusion(50, "cosine", prediction=prediction)
    return generation.Generator(unet, diffusion, sampler, steps=5, classes=classes, guidance_scale=scale)


def generate(generator: generation.Generator, count: int, batch_size: int) -> Tensor:
    """The first images of seed 0, (count, 1, 8, 8) uint8."""
    batches = World(CPU).divide(lambda indices: generator.images(0, indices), count, batch_size)
    return torch.cat([*batches])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_a_step_from_the_prediction_without_past_that_with_the_class(unet, scale):
    x, t, y = x_t(3), torch.tensor([20]), torch.tensor([2, 0, 1])
    with_class, without = unet(x, t, y), unet(x, t)
    ours = generator(unet, "v", scale).network(y)(x, t)
    torch.testing.assert_close(ours, (1 - scale) * without + scale * with_class, rtol=1e-4, atol=1e-5)


def test_guidance_2_goes_as_far_past_the_prediction_with_the_class_as_that_is_from_the_one_without(unet):
    x, t, y = x_t(3), torch.tensor([20]), torch.tensor([2, 0, 1])
    expected = 2 * unet(x, t, y) - unet(x, t)
    torch.testing.assert_close(generator(unet, "v", 2.0).network(y)(x, t), expected, rtol=1e-4, atol=1e-5)


def test_only_guidance_evaluates_the_network_twice(unet):
    """Scale 1 is the prediction with the class alone; where no class is asked for, no scale has one to guide to."""
    x, t, y, sizes = x_t(3), torch.tensor([20]), torch.tensor([2, 0, 1]), []
    unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    generator(unet, "v", 1.0).network(y)(x, t)
    generator(unet, "v", 2.5).network(y)(x, t)
    without = generator(unet, "v", 2.5).network(None)(x, t)
    assert sizes == [3, 6, 3]
    assert torch.equal(without, unet(x, t))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_predictions_are_float32_whatever_the_network_computes_in(unet, scale):
    diffusion = Diffusion(50, "cosine", prediction="v")
    coarse = generation.Generator(unet, diffusion, "ddim", 5, precision=torch.bfloat16, guidance_scale=scale)
    x, t, y = x_t(2), torch.tensor([20]), torch.tensor([2, 0])
    found, exact = coarse.network(y)(x, t), generator(unet, "v", scale).network(y)(x, t)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)  # negative control: the network did compute in bfloat16


def test_a_generator_adds_no_noise_and_no_guidance_unless_told(unet):
    diffusion = Diffusion(50, "cosine", prediction="v")

    def images(**options: float) -> Tensor:
        ours = generation.Generator(unet, diffusion, "ddim", 5, classes=[2, 0], **options)
        return ours.images(0, range(4))

    assert torch.equal(images(), images(eta=0.0, guidance_scale=1.0))
    for other in ({"eta": 1.0}, {"guidance_scale": 2.0}):
        assert not torch.equal(images(), images(**other))


def test_guiding_v_is_guiding_the_noise(unet):
    """Ho & Salimans 2022 guide eps (eq. 6). v is linear in it, so both lead to the same x_0 (if none is clipped)."""
    nn.init.normal_(unet.conv_out.weight, std=0.02)
    x, t, y = 0.1 * x_t(2), torch.tensor([10]), torch.tensor([2, 0])
    by_v = generator(unet, "v", 2.5)
    noise = Diffusion(50, "cosine", prediction="noise")
    signal, sigma = noise.signal_and_noise(t)

    def eps(y: Tensor | None) -> Tensor:  # what a network of noise would say that agrees with ours
        return sigma * x + signal * unet(x, t, y)

    guided = eps(None) + 2.5 * (eps(y) - eps(None))
    expected = noise.predict_x0(x, t, guided)
    assert expected.abs().max() < 1
    torch.testing.assert_close(by_v.diffusion.predict_x0(x, t, by_v.network(y)(x, t)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_0_ignores_the_class_and_1_is_the_class_alone(unet, sampler):
    def images(scale: float, *classes: int) -> Tensor:
        return generate(generator(unet, "v", scale, *classes, sampler=sampler), 4, 4)

    assert torch.equal(images(0, 1), images(1))
    assert not torch.equal(images(1, 1), images(1))
    assert not torch.equal(images(3, 1), images(1, 1))


def test_images_are_of_the_classes_in_turn_whatever_the_batch(unet):
    """Image i of classes (2, 0) is image i of class 2 alone where i is even, and of class 0 where it is odd."""
    both, two, zero = (generate(generator(unet, "v", 2.0, *classes), 5, 3) for classes in ((2, 0), (2,), (0,)))
    for i in range(5):
        difference = both[i].int() - (two, zero)[i % 2][i].int()
        assert difference.abs().max() <= 1  # rounding, in batches of another make-up


def test_an_interpolation_is_of_one_class(unet):
    strip = generator(unet, "v", 1.0, 2).interpolate(0, 4, 2)
    ends = generate(generator(unet, "v", 1.0, 2), 2, 2)
    assert (strip[[0, -1]].int() - ends.int()).abs().max() <= 1


def test_an_interpolation_among_several_classes_is_of_the_first(unet):
    several, first, second = (generator(unet, "v", 1.0, *y).interpolate(0, 4, 4) for y in ((2, 0), (2,), (0,)))
    assert torch.equal(several, first)
    assert not torch.equal(several, second)


# ---- classes that are drawn --------------------------------------------------------------------------------


def test_drawn_classes_have_the_frequencies_of_the_counts():
    """Each frequency within 4.5 standard errors; a class without images never comes."""
    n, counts = 5000, [30, 0, 10, 60]
    drawn = generation.draw_classes(counts, 0, range(n)).bincount(minlength=4) / n
    p = torch.tensor(counts) / 100
    assert ((drawn - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt()).all()
    assert not torch.equal(generation.draw_classes(counts, 1, range(n)).bincount(minlength=4) / n, drawn)


def test_a_class_belongs_to_its_image_alone():
    alone = [generation.draw_classes([1, 2, 3], 5, [i]).item() for i in range(20)]
    assert generation.draw_classes([1, 2, 3], 5, range(20)).tolist() == alone
    assert generation.draw_classes([1, 2, 3], 5, [7, 3]).tolist() == [alone[7], alone[3]]


def test_classes_are_independent_of_the_noise_and_leave_it_as_it_is():
    """The mean noise of the images of each class is 0 within 4.5 standard errors."""
    n = 2000
    noise = generation.ImageNoise(0, range(n), (1, 1, 1))().flatten()
    y = generation.draw_classes([1, 1, 1], 0, range(n))
    for label in range(3):
        own = noise[y == label]
        assert abs(own.mean().item()) < 4.5 / len(own) ** 0.5


def test_an_image_of_a_drawn_class_is_that_image_of_that_class(unet):
    diffusion = Diffusion(50, "cosine", prediction="v")
    drawn = generation.Generator(unet, diffusion, "ddim", 5, class_counts=[1, 1, 1])
    labels = drawn.labels(0, range(6)).tolist()
    assert len(set(labels)) == 3  # negative control: else the test would say little
    images = generate(drawn, 6, 4)
    for i, label in enumerate(labels):
        expected = generate(generator(unet, "v", 1.0, label), 6, 4)[i]
        assert (images[i].int() - expected.int()).abs().max() <= 1  # rounding, in batches of another make-up
    strip = drawn.interpolate(0, 3, 2)
    assert torch.equal(strip, generator(unet, "v", 1.0, labels[0]).interpolate(0, 3, 2))


# ---- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def model_file(unet, tmp_path):
    """A checkpoint of `unet`, whose classes are called circle, square and star."""
    settings = vars(arguments(train, "--image_size", 8, "--unet_dim", 8, "--unet_dim_mults", 1, 2, "--time_steps", 50))
    settings["classes"] = ["circle", "square", "star"]
    path = tmp_path / "model.pth"
    checkpoint.save(path, {"settings": settings, "ema": unet.state_dict()})
    return path


@pytest.fixture
def draw(model_file, tmp_path):
    def run(*flags: object) -> list[str]:
        directory = tmp_path / "out"
        args = arguments(sample, "--checkpoint", model_file, "--output_dir", directory, "--steps", 3, *flags)
        assert sample.main(args) == 0
        return sorted(path.name for path in directory.iterdir())

    return run


def test_classes_go_by_name_and_by_number_and_stand_in_the_names_of_the_files(draw):
    names = draw("--class", "star", "0", "--num_samples", 3)
    assert names == ["grid.png", *(f"sample_0000{i}_{c}.png" for i, c in enumerate(["star", "circle"] * 2))]


def test_all_makes_as_many_of_each_and_a_grid_with_a_named_row_for_each(draw, tmp_path):
    names = draw("--class", "all", "--num_samples", 7)
    assert [sum(c in name for name in names) for c in ("circle", "square", "star")] == [3, 3, 3]
    grid = read_png(tmp_path / "out/grid.png")
    tiles = grid[:, -3 * 10 :]  # three columns of 8 pixels and their gaps
    for i, name in enumerate(n for n in names if n.startswith("sample")):
        row, column = i % 3, i // 3
        tile = tiles[10 * row + 1 : 10 * row + 9, 10 * column + 1 : 10 * column + 9]
        assert (tile == read_png(tmp_path / "out" / name)).all()
    for row in range(3):
        assert grid[10 * row : 10 * row + 10, : -3 * 10].max() > 128  # something is written there


def test_one_class_makes_a_square_grid(draw, tmp_path):
    draw("--class", "square", "--num_samples", 9)
    assert read_png(tmp_path / "out/grid.png").shape == (30, 30)


@pytest.fixture
def seen(monkeypatch):
    """The classes that the network is given, a list or None for each evaluation."""
    seen = []

    def forward(self: UNet, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        seen.append(y if y is None else y.tolist())
        return torch.zeros_like(x)

    monkeypatch.setattr(UNet, "forward", forward)
    return seen


def test_without_class_it_draws_one_for_each_image_from_the_training_frequencies(draw, model_file, seen):
    state = checkpoint.load(model_file)
    state["settings"]["class_counts"] = [0, 30, 10]
    checkpoint.save(model_file, state)
    assert draw("--num_samples", 40) == ["grid.png", *(f"sample_{i:05d}.png" for i in range(40))]
    assert seen == [generation.draw_classes([0, 30, 10], 0, range(40)).tolist()] * 3
    assert set(seen[0]) == {1, 2}


def test_a_checkpoint_that_records_no_frequencies_has_equal_ones(draw, seen):
    draw("--num_samples", 60, "--seed", 3)
    assert seen == [generation.draw_classes([1, 1, 1], 3, range(60)).tolist()] * 3
    assert set(seen[0]) == {0, 1, 2}


def test_class_none_asks_for_none(draw, seen):
    assert draw("--class", "none", "--num_samples", 2) == ["grid.png", "sample_00000.png", "sample_00001.png"]
    assert set(seen) == {None}


def test_guidance_needs_a_class(draw, unet):
    with pytest.raises(SystemExit, match="2"):
        draw("--class", "none", "--guidance_scale", 2)
    plain = UNet(image_size=8, dim=8, dim_mults=(1, 2))
    with pytest.raises(ValueError, match="trained with classes"):
        generation.Generator(plain, Diffusion(50, "cosine"), guidance_scale=2.0)


def test_a_guidance_scale_that_nobody_gave_as_a_flag_is_for_images_with_classes():
    assert flags.pick_guidance(2.0, [], has_classes=True) == flags.pick_guidance(2.0, ["guidance_scale"], False) == 2
    assert flags.pick_guidance(2.0, [], has_classes=False) == 1


def test_classes_are_known_by_name_and_number():
    known, counts = ["circle", "square", "star"], [7, 8, 9]

    def pick(asked: list[str], known: list[str] = known) -> list[int]:
        labels, frequencies = flags.pick_classes(asked, {"classes": known, "class_counts": counts[: len(known)]})
        assert frequencies == ([] if asked == ["none"] and "none" not in known else counts[: len(known)])
        return labels

    assert pick(["star", "0"]) == [2, 0]
    assert pick(["T-shirt", "ankle boot"], ["ankle-boot", "t-shirt"]) == [1, 0]
    assert pick(["a", "A"], ["A", "a"]) == [1, 0]  # a folder's may differ so little
    assert pick(["all"]) == [0, 1, 2]
    assert pick([]) == pick([], []) == pick(["none"]) == pick(["none"], []) == []
    assert pick(["none"], ["some", "none"]) == [1]  # a folder's name comes before the word
    assert pick(["1", "0"], ["1", "10", "2"]) == [0, 0]  # names come first: these are digits
    for word in ("all", "none"):
        with pytest.raises(SettingError, match=rf"{word} is unknown.*nothing else"):
            pick([word, "star"])
    with pytest.raises(SettingError, match="this one was not"):
        pick(["all"], [])


# ---- what images of some classes are compared with --------------------------------------------------------


class Eye:
    """Stands in for Inception and for the classifier: features are the brightness of an image's quarters."""

    name, num_features, sha256, has_logits = "quarters", 4, "5" * 64, True

    def to(self, device: torch.device) -> "Eye":
        return self

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return 1.0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quarters = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)  # (B, 4)
        return quarters, quarters.repeat(1, 3)[:, :10]


@pytest.mark.parametrize(
    ("asked", "labels", "reference"),
    [
        (["bag", "coat"], [8, 4], "test"),
        (["all"], [*range(10)], "test"),
        ([], [*range(10)], "test"),
        ([], [*range(10)], "train"),
        (["bag"], [8], "held_out"),
    ],
)
def test_images_of_some_classes_are_compared_with_real_ones_of_those(
    asked, labels, reference, data, tmp_path, monkeypatch
):
    """Of all scores; only copies are looked for among all images, and the test images of all say what is usual."""
    small = ["--dataset", "fashion-mnist-tiny", "--image_size", 28, "--unet_dim", 8, "--unet_dim_mults", 1, 2]
    settings = vars(arguments(train, *small, "--time_steps", 10, "--val_size", 150))
    settings["classes"] = list(datasets.classes("fashion-mnist-tiny", data))
    unet, _ = generation.build(settings, CPU)
    checkpoint.save(tmp_path / "model.pth", {"settings": settings, "ema": unet.state_dict()})

    compared, usual = [], []
    reference_features, init = metrics.reference_features, copies.Neighbours.__init__

    def spy_features(images: Tensor, extractor: Eye) -> Tensor:
        compared.append(images)
        return reference_features(images, extractor, tmp_path / "cache")

    def spy_init(self: copies.Neighbours, training: Tensor, test: Tensor) -> None:
        usual.append(test)
        init(self, training, test)

    seen_how: list[tuple[str, int]] = []
    told, update = [], classifier.ClassifierScores.update

    def spy_update(self: classifier.ClassifierScores, images: Tensor, labels: Tensor | None = None) -> None:
        told.append(labels)
        update(self, images, labels)

    monkeypatch.setattr(classifier.ClassifierScores, "update", spy_update)
    monkeypatch.setattr(metrics, "reference_features", spy_features)
    monkeypatch.setattr(copies.Neighbours, "__init__", spy_init)
    monkeypatch.setattr(inception, "weights", lambda path: path)
    monkeypatch.setattr(inception, "Extractor", lambda *how: seen_how.append(how[1:]) or Eye())
    monkeypatch.setattr(classifier, "trained", lambda *_: Eye())
    monkeypatch.setattr(likelihood, "bits_per_dim", lambda *_: (1.0, 0.1))
    flags = ["--checkpoint", tmp_path / "model.pth", "--data_path", data, "--output_dir", tmp_path, "--device", "cpu"]
    flags += ["--num_samples", 4, "--steps", 1, "--reference", reference, *(["--class", *asked] if asked else [])]
    if reference == "train":  # the way through Inception, too
        flags += ["--resize", "tensorflow"]
    assert evaluate.main(arguments(evaluate, *flags)) == 0
    assert seen_how == [("tensorflow" if reference == "train" else "bilinear", 0)]
    with pytest.raises(SettingError, match="no frame of padding"):  # images of 28×28 are not padded
        evaluate.main(arguments(evaluate, *flags, "--crop_frame"))

    images, _ = datasets.load("fashion-mnist-tiny", data, "test", 28)
    real, classes = datasets.load("fashion-mnist-tiny", data, "test" if reference == "test" else "train", 28)
    if reference == "held_out":
        real, classes = real[-150:], classes[-150:]
    expected = real[[label in labels for label in classes.tolist()]]
    assert len(expected) == {"test": 500, "train": 1000}[reference] if len(labels) == 10 else 5 < len(expected) < 150
    assert [torch.equal(seen, expected) for seen in compared] == [True, True]  # by Inception, by the classifier
    assert [torch.equal(seen, images) for seen in usual] == [True]
    drawn = generation.draw_classes([1] * 10, 0, range(4)).tolist()
    assert told[0].tolist() == ([labels[i % len(labels)] for i in range(4)] if asked else drawn)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["protocol"]["generated"]["class_choice"] == ("in turn" if asked else "drawn")
    assert report["scores"]["num_reference_images"] == report["protocol"]["reference"]["images"] == len(expected)
