"""Evaluation of a model: generates images, scores them against real ones, and writes metrics.json and pictures.

Images are generated once. Every scorer sees each batch of them and computes its scores at the end.
"""

import hashlib
import json
import logging
import platform
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.data import datasets
from src.data.images import Images
from src.generation import Generator, restore
from src.scores import classifier, copies, inception, likelihood, metrics, report
from src.utils import checkpoint, devices, directories, errors, flags, identity, pictures
from src.utils.distributed import World
from src.utils.progress import counted, progress, progress_in_steps

log = logging.getLogger(__name__)

MIN_ACCURACY = 0.8  # test accuracy below which the classifier's scores come with a warning
BOUND_IMAGES = 1000  # test images whose bits per dimension are estimated
BOUND_TIMES = 3  # timesteps per image in that estimate
BOUND_BATCH = 50  # images per network evaluation in that estimate


@dataclass(frozen=True)
class Model:
    """A trained model and how it generates images.

    Attributes:
        file: path of the checkpoint, as the user gave it.
        sha256: of the checkpoint.
        settings: with which it was trained (lower-case names), and "classes", the names of its classes.
        generator: with the averaged weights.
        trained_on: the files that it was trained on, as `identity.record` returns them; None if unknown.
    """

    file: str
    sha256: str
    settings: dict[str, Any]
    generator: Generator
    trained_on: dict[str, Any] | None = None

    @property
    def classes(self) -> list[str]:
        """The names of the classes that are generated in turn; empty if classes are drawn, or there are none."""
        return [self.settings["classes"][label] for label in self.generator.classes]

    @property
    def class_choice(self) -> str:
        """How the class of each image is chosen."""
        if self.classes:
            return "in turn"
        return "drawn" if self.generator.class_counts else "none"


@dataclass(frozen=True)
class Options:
    """The extent of an evaluation.

    Attributes:
        num_samples: images to generate.
        batch_size: of their generation.
        seed: of the images, of random subsets in the scores, and of the likelihood estimate.
        data_path: directory of the data set on which the model was trained.
        inception_weights: file of Inception's weights; None downloads them once.
        classifier_only: leave out Inception and bits per dimension, which take most of the time.
        reference: the real images that generated ones are compared with: "test" or "train" for a split, or "held_out"
            for the images of the train split that were held out of the training.
        resize: before Inception, a key of `inception.RESIZES`.
        crop_frame: cut off the black padding before Inception.
    """

    num_samples: int
    batch_size: int
    seed: int
    data_path: str
    inception_weights: str | None = None
    classifier_only: bool = False
    reference: str = "test"
    resize: str = "bilinear"
    crop_frame: bool = False


@dataclass(frozen=True)
class Data:
    """The images of an evaluation.

    Attributes:
        training, training_labels: the train split, in which copies are looked for.
        test, test_labels: the test split.
        reference: the real images with which generated images are compared: of the same classes, or all of them.
        classes: the names of the labels; empty if the data set has no classes.
        notes: sentences on what makes the scores unreliable.
    """

    training: Images
    training_labels: Tensor
    test: Images
    test_labels: Tensor
    reference: Images
    classes: tuple[str, ...]
    notes: list[str]


Scorer = metrics.Scores | classifier.ClassifierScores | copies.Neighbours


@dataclass(frozen=True)
class Scorers:
    """The scorers of an evaluation.

    Attributes:
        inception: scores through Inception; None if it is left out.
        classifier: scores through the classifier; None if the data set has no classes.
        copies: distances to the training images.
        networks: "extractor" and "classifier" → name and SHA-256 of the network in use, for the protocol.
    """

    inception: metrics.Scores | None
    classifier: classifier.ClassifierScores | None
    copies: copies.Neighbours
    networks: dict[str, dict[str, Any]]

    def all(self) -> list[Scorer]:
        """Those that are in use."""
        return [scorer for scorer in (self.inception, self.classifier, self.copies) if scorer is not None]


def load_model(
    file: str,
    device: torch.device,
    *,
    given: Collection[str] = ("sampler",),
    sampler: str,
    steps: int,
    eta: float,
    precision: str,
    classes: Sequence[str],
    guidance_scale: float,
) -> Model:
    """Load a checkpoint and prepare it for generating images.

    Args:
        file: path of the checkpoint.
        device: of the network and of the images.
        given: names of the flags on the command line; if "sampler" is not among them, a distilled model is
            sampled by `consistency`.
        sampler, steps, eta, guidance_scale: as for `Generator`.
        precision: "float32", "bfloat16" or "auto".
        classes: as --class: names or numbers of the classes to generate in turn, or "all" or "none" alone; empty for
            classes that are drawn.

    Raises:
        UserError: the checkpoint cannot be read, or the model has no such classes or too few timesteps.
    """
    path = Path(file)
    state, sha256 = checkpoint.load_with_hash(path, "ema")
    with checkpoint.explained(path):
        unet, diffusion = restore(state, device)
    labels, counts = flags.pick_classes(classes, state["settings"])
    dtype = devices.pick_precision(precision, device)
    with errors.setting_errors():
        sampler = flags.pick_sampler(sampler, given, state["settings"])
        generator = Generator(
            unet,
            diffusion,
            sampler=sampler,
            steps=steps,
            eta=eta,
            precision=dtype,
            classes=labels,
            class_counts=counts,
            guidance_scale=flags.pick_guidance(guidance_scale, given, bool(labels or counts)),
        )
    return Model(file, sha256, state["settings"], generator, state.get("trained_on"))


def folder_name(model: Model, options: Options) -> str:
    """Name of the folder for the results, which differs where model, way of sampling or number of images do.

    An example is best-31e22359-ddim-50-eta0.5-class-all-guidance1.5-n1000-seed0, where 31e22359 begins the SHA-256 of
    the checkpoint. eta, classes and guidance are left out where they have no effect. Precision, device, data and
    Inception weights are not in the name.
    """
    generator = model.generator
    parts = [directories.short(Path(model.file).stem), model.sha256[:8], generator.sampler, str(generator.steps)]
    if eta := generator.options.get("eta"):
        parts.append(f"eta{eta:g}")
    if model.classes:
        parts.append(f"class-{_classes_in_short(model.classes, model.settings['classes'])}")
    elif model.settings["classes"] and model.class_choice == "none":
        parts.append("class-none")
    if generator.guidance_scale != 1:
        parts.append(f"guidance{generator.guidance_scale:g}")
    parts += [f"n{options.num_samples}", f"seed{options.seed}"]
    if options.classifier_only:
        parts.append("classifier_only")
    if options.reference != "test":
        parts.append(f"against-{options.reference}")
    if options.resize != "bilinear":
        parts.append(options.resize)
    if options.crop_frame:
        parts.append("cropped")
    return "-".join(parts)


def _classes_in_short(classes: Sequence[str], known: Sequence[str]) -> str:
    if list(classes) == list(known):
        return "all"
    names = "+".join(classes)
    if len(raw := names.encode("utf-8", "surrogateescape")) > 60:  # file systems limit a name to 255 bytes
        return f"{len(classes)}-of-them-{hashlib.sha256(raw).hexdigest()[:8]}"
    return re.sub(r"[^\w+.-]", "_", names)


def run(model: Model, options: Options, directory: Path, world: World) -> None:
    """Evaluate a model: write metrics.json, grid.png and neighbours.png to `directory`, print a table of the scores.

    Processes share the generation of images and the work of the feature networks. The main process does the
    rest and writes the results.

    Raises:
        UserError: the data set or Inception's weights cannot be had, or the results cannot be written.
    """
    generator = model.generator
    machine = devices.describe_device(generator.device, generator.precision)
    work = f"{counted(options.num_samples, 'image')}, {generator.sampler}, {counted(generator.steps, 'step')}"
    log.info("%s on %s: scoring %s", model.file, machine, work)

    frame = 0
    if options.crop_frame and not (frame := datasets.padding(model.settings["dataset"], model.settings["image_size"])):
        raise errors.SettingError("--crop_frame: the images of this model have no frame of padding")
    data = load_data(model, options, world)
    scorers = world.main_first(lambda: make_scorers(data, options, frame, world))  # the main process fills the caches
    hashes = [model.sha256, *(network["weights_sha256"] for network in scorers.networks.values())]
    world.agree(hashes, "the checkpoint or the feature networks")

    start = time.perf_counter()
    shown = generate(generator, options, scorers.all(), world)
    seconds = time.perf_counter() - start
    if not world.is_main:
        return

    scores = collect(scorers)
    scores["notes"] += data.notes
    facts = protocol(model, options, len(data.reference), len(data.test)) | scorers.networks
    save_scores = partial(_save_scores, directory / "metrics.json", seconds)
    try:
        save_scores(scores, facts)  # an hour's work, before the bound takes some minutes more
        pictures.save_png(pictures.image_grid(shown), directory / "grid.png")
        pictures.save_png(scorers.copies.picture(), directory / "neighbours.png")
        if not options.classifier_only:
            bound, extent = bits_per_dim(generator, data.test, data.test_labels, options.seed)
            scores, facts = scores | bound, facts | extent
            save_scores(scores, facts)
    finally:  # if there is no place for it, then at least on the screen
        errors.print_results(report.table(scores, facts))
    log.info("wrote metrics.json, grid.png and neighbours.png to %s", directory)


def _save_scores(path: Path, seconds: float, scores: dict[str, Any], facts: dict[str, Any]) -> None:
    text = json.dumps({"scores": scores, "protocol": facts, "seconds": round(seconds, 1)}, indent=2)
    checkpoint.write(path, f"{text}\n".encode())


def load_data(model: Model, options: Options, world: World) -> Data:
    """Load both splits of the data set on which the model was trained, in the size and colours of the model.

    Raises:
        SettingError: images have classes, and those of the data set are others, or there is no real image of them.
        UserError: the data set cannot be had.
    """
    settings, labels = model.settings, model.generator.classes
    name, size, channels = settings["dataset"], settings["image_size"], settings["channels"]
    # The main process loads first, since it may have to download the files that the others then find.
    test, test_labels = world.main_first(lambda: datasets.load(name, options.data_path, "test", size, channels))
    classes = datasets.classes(name, options.data_path)
    if model.class_choice != "none" and classes != tuple(settings["classes"]):
        raise errors.SettingError(
            f"the classes in {options.data_path} are not those of the model: give the --data_path of its training, or "
            "--class none"
        )
    notes = world.main_first(lambda: _trained_on(model, options))
    load_training = partial(datasets.load, name, options.data_path, "train", size, channels)
    training, training_labels = world.main_first(load_training)
    if options.reference == "held_out" and model.trained_on:
        now = identity.record(datasets.digests(name, options.data_path, "train"))
        if not torch.equal(now["digests"], model.trained_on["digests"]):
            raise errors.SettingError(
                f"--reference held_out: the images in {options.data_path} are not as in training: "
                "give the --data_path of the training, or another --reference"
            )
    held_out = slice(len(training) - settings["val_size"], None)
    reference, of = {
        "test": (test, test_labels),
        "train": (training, training_labels),
        "held_out": (training[held_out], training_labels[held_out]),
    }[options.reference]
    if labels:
        reference = reference[torch.isin(of, torch.tensor(labels)).nonzero()[:, 0]]
    if not len(reference):
        which = f"{options.reference.replace('_', '-')} images of {', '.join(model.classes)}"
        raise errors.SettingError(f"{options.data_path} has no {which}, to compare with: leave out --class")
    return Data(training, training_labels, test, test_labels, reference, classes, notes)


def _trained_on(model: Model, options: Options) -> list[str]:
    """Warn, and return a note, if some of the test images were in the train split when the model was trained."""
    if not model.trained_on:
        return []
    digests = datasets.digests(model.settings["dataset"], options.data_path, "test")
    if not (seen := identity.known(model.trained_on, digests)[0]):
        return []
    note = f"At least {seen} of the {len(digests)} test images were in the train split: the scores are too good."
    log.warning("%s", note)
    return [note]


def make_scorers(data: Data, options: Options, frame: int, world: World) -> Scorers:
    """Create the scorers. What each must know of real images is computed here or read from the cache.

    `frame` is how many pixels on each side Inception does not see.
    """
    through_inception = through_classifier = None
    networks: dict[str, dict[str, Any]] = {}
    if not options.classifier_only:
        weights = inception.weights(options.inception_weights)
        extractor = inception.Extractor(weights, options.resize, frame).to(world.device)
        reference = metrics.reference_features(data.reference, extractor)
        through_inception = metrics.Scores(metrics.Divided(extractor, world), reference, options.seed)
        networks["extractor"] = {"network": extractor.name, "weights_sha256": extractor.sha256}
    if len(data.classes) > 1:
        network = classifier.trained(data.training, data.training_labels, len(data.classes), world.device)
        reference = metrics.reference_features(data.reference, network)
        divided = metrics.Divided(network, world)
        through_classifier = classifier.ClassifierScores(divided, reference, data.classes, options.seed)
        networks["classifier"] = {
            "network": network.name,
            "weights_sha256": network.sha256,
            "test_accuracy": network.accuracy(data.test, data.test_labels),
        }
    return Scorers(through_inception, through_classifier, copies.Neighbours(data.training, data.test), networks)


def generate(generator: Generator, options: Options, scorers: Sequence[Scorer], world: World) -> Tensor:
    """Generate images and show each batch to all scorers; return the first images, for the grid.

    Returns:
        (N, C, H, W) uint8, N at most GRID_IMAGES. No other images are kept here.
    """
    shown, count = torch.empty(0, *generator.shape, dtype=torch.uint8), 0
    bar = {"total": options.num_samples, "unit": " images", "desc": "scoring"}
    with progress_in_steps(log, generator.steps, **bar) as advance:

        def on_step(x_t: Tensor) -> None:
            advance(len(x_t) * world.size)

        def images(indices: Sequence[int]) -> Tensor:
            return generator.images(options.seed, indices, on_step)

        for batch in world.divide(images, options.num_samples, options.batch_size):
            labels = generator.labels(options.seed, range(count, count + len(batch)))
            for scorer in scorers:
                scorer.update(batch, labels)
            count += len(batch)
            shown = torch.cat([shown, batch])[: pictures.GRID_IMAGES]
    return shown


def collect(scorers: Scorers) -> dict[str, Any]:
    """Compute all scores, under their names in metrics.json, and "notes", a list of sentences on their limits."""
    scores: dict[str, Any] = {}
    notes: list[str] = []
    for scorer in progress(log, iterable=scorers.all(), desc="computing scores", unit=" parts"):
        computed = scorer.compute()
        notes += computed["notes"]
        scores |= {name: value for name, value in computed.items() if name != "notes"}
    if scorers.classifier is None:
        scores |= dict.fromkeys(classifier.SCORES)
        notes.append("There is no classifier: the data set has no classes to tell apart.")
    elif scorers.networks["classifier"]["test_accuracy"] < MIN_ACCURACY:
        notes.append(
            f"The classifier's accuracy on the test images is below {MIN_ACCURACY:.0%}: its scores are unreliable."
        )
    return scores | {"notes": notes}


def bits_per_dim(
    generator: Generator, test: Images, labels: Tensor, seed: int
) -> tuple[dict[str, float | None], dict[str, dict[str, Any]]]:
    """Estimate the variational bound of the first test images, for `ddpm` in all T steps, and say how.

    The network is given the class of each image, if it generates images of classes and was trained on all of them.

    Returns:
        The scores `bits_per_dim` and its standard error `bits_per_dim_error` (None for one image); and the protocol's
        entry `bits_per_dim`.
    """
    unet, diffusion, counts = generator.unet, generator.diffusion, generator.class_counts
    images, times = min(BOUND_IMAGES, len(test)), min(BOUND_TIMES, diffusion.time_steps)
    known = bool(counts) and all(counts[label] for label in labels.tolist())  # else the bound would be infinite
    how = seed, times, BOUND_BATCH
    with progress(log, total=images * times, unit=" evaluations", unit_scale=True, desc="bits per dimension") as bar:
        y = labels[:images] if known else None  # (N,)
        bits, error = likelihood.bits_per_dim(unet, diffusion, test[:images], *how, bar.update, y, counts)
    extent = {
        "images": images,
        "timesteps_of_each": times,
        "network": f"float32, {'class-conditional' if known else 'unconditional'}; padding pixels included",
    }
    # One image has no error: NaN, which JSON does not know.
    return {"bits_per_dim": bits, "bits_per_dim_error": error if images > 1 else None}, {"bits_per_dim": extent}


def protocol(model: Model, options: Options, reference_count: int, test_count: int) -> dict[str, Any]:
    """What decides the scores, beside the code itself; without the feature networks.

    Args:
        model, options: of the evaluation.
        reference_count: real images with which generated images are compared.
        test_count: all test images.
    """
    generator, count = model.generator, options.num_samples
    return {
        "checkpoint": {"file": model.file, "sha256": model.sha256, "weights": "ema"},
        "generated": {
            "images": count,
            "sampler": generator.sampler,
            "steps": generator.steps,
            "timesteps": [t for t, _ in generator.grid],
            **generator.options,
            "class_choice": model.class_choice,
            "classes": model.classes,
            "guidance_scale": generator.guidance_scale,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "precision": str(generator.precision).removeprefix("torch."),
        },
        "reference": {
            "dataset": model.settings["dataset"],
            "split": options.reference,
            "images": reference_count,
            "classes": model.classes,
        },
        "kernel_distance": {
            "subsets": metrics.KID_SUBSETS,
            "subset_size": min(metrics.KID_SUBSET_SIZE, count, reference_count),
        },
        "precision_and_recall": {
            "k": metrics.MANIFOLD_K,
            "images": "the first n of each set; n is the size of the smaller one",
            "images_of_each": min(count, reference_count),
        },
        "nearest": {
            "distance": "Euclidean, pixels in [0, 1]",
            "training_images": "all of the train split",
            "test_images": min(copies.TEST_IMAGES, test_count),
            "flagged_below_quantile": copies.RARE,
        },
        "device": devices.describe_device(generator.device, generator.precision),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "torchvision", "torchmetrics", "torch-fidelity")},
        },
    }
