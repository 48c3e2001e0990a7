"""Score a trained model against the test images: python eval.py. Writes OUTPUT_PATH/eval/metrics.json."""

import argparse

import config
from src import errors, flags

SETTINGS = "NUM_SAMPLES GUIDANCE_SCALE SAMPLER STEPS ETA SEED PRECISION BATCH_SIZE DEVICE DATA_PATH".split()


def parse_args() -> argparse.Namespace:
    parser = flags.Parser(config, __doc__, SETTINGS, NUM_SAMPLES=config.EVAL_SAMPLES, BATCH_SIZE=config.SAMPLE_BATCH)
    parser.add_checkpoint()
    parser.add_class()
    parser.add_output_dir("eval")
    parser.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="Inception-v3's weights (default: fetched once, then kept)",
    )
    parser.add_argument(
        "--classifier_only",
        action="store_true",
        help="leave out Inception, whose weights are then not needed, and bits per dimension: most of the work",
    )
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once
    errors.explain_imports("eval.py")

import hashlib
import json
import logging
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from src import classifier, dataset, inception, likelihood, metrics, neighbours, pipeline, report, utils
from src.diffusion import Diffusion
from src.distributed import World

log = logging.getLogger("eval")

TRUSTED = 0.8  # accuracy of a classifier whose scores mean something
BOUND_IMAGES, BOUND_TIMES = 1000, 3  # test images whose bits per dimension are estimated, and timesteps for each


def protocol(
    args: argparse.Namespace,
    checkpoint_sha256: str,
    generator: pipeline.Generator,
    settings: dict[str, Any],
    reference_count: int,
) -> dict[str, Any]:
    """All that somebody needs who wants to get the same numbers, but for the networks that see the images."""
    asked = [settings["classes"][label] for label in generator.classes]
    return {
        "checkpoint": {"file": str(args.checkpoint), "sha256": checkpoint_sha256, "weights": "ema"},
        "generated": {
            "images": args.num_samples,
            "sampler": generator.sampler,
            "steps": generator.steps,
            **generator.options,
            "classes": asked,
            "guidance_scale": generator.guidance_scale,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "precision": str(generator.precision).removeprefix("torch."),
        },
        "reference": {"dataset": settings["dataset"], "split": "test", "images": reference_count, "classes": asked},
        "kernel_distance": {
            "subsets": metrics.KID_SUBSETS,
            "subset_size": min(metrics.KID_SUBSET_SIZE, args.num_samples, reference_count),
        },
        "precision_and_recall": {
            "k": metrics.MANIFOLD_K,
            "images": "the first of each, as many of either",
            "images_of_each": min(args.num_samples, reference_count),
        },
        "nearest": {
            "distance": "Euclidean, pixels in [0, 1]",
            "training_images": "all of the train split",
            "test_images": min(neighbours.TEST_IMAGES, reference_count),
            "flagged_below_quantile": neighbours.RARE,
        },
        "device": utils.describe_device(generator.device, generator.precision),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "torchvision", "torchmetrics", "torch-fidelity")},
        },
    }


Scorer = metrics.Scores | classifier.ClassifierScores | neighbours.Neighbours


def scorers(
    args: argparse.Namespace,
    settings: dict[str, Any],
    real: torch.Tensor,
    labels: torch.Tensor,
    compared: torch.Tensor,
    about: dict[str, Any],
    world: World,
) -> list[Scorer]:
    """All that is to see the generated images, `Neighbours` last; the networks they look through go into `about`.

    `real` are the test images with their `labels`, `compared` those of them that generated images are compared with.
    """
    device, found = world.device, []
    if not args.classifier_only:
        extractor = inception.Extractor(inception.weights(args.inception_weights)).to(device)
        about["extractor"] = {"network": extractor.name, "weights_sha256": extractor.sha256}
        reference = metrics.reference_features(compared, extractor)
        found.append(metrics.Scores(metrics.Divided(extractor, world), reference, args.seed))

    name, size, channels = (settings[key] for key in ("dataset", "image_size", "channels"))
    training, wanted = dataset.load(name, args.data_path, "train", size, channels)
    classes = dataset.classes(name, args.data_path)
    if len(classes) > 1:
        network = classifier.trained(training, wanted, len(classes), device)
        about["classifier"] = {
            "network": network.name,
            "weights_sha256": network.sha256,
            "test_accuracy": network.accuracy(real, labels),
        }
        reference = metrics.reference_features(compared, network)
        found.append(classifier.ClassifierScores(metrics.Divided(network, world), reference, classes, args.seed))
    return [*found, neighbours.Neighbours(training, real)]


def collect(found: list[Scorer], about: dict[str, Any]) -> dict[str, Any]:
    """The scores of all in one dictionary, and their notes in one list."""
    results, notes = {}, []
    for scorer in found:
        scores = scorer.compute()
        notes += scores.pop("notes")
        results |= scores
    if about.get("classifier", {}).get("test_accuracy", 1) < TRUSTED:
        notes.append("The classifier is wrong too often, on real images, for its scores to mean much.")
    if "classifier" not in about:
        results |= dict.fromkeys(classifier.SCORES)
        notes.append("There is no classifier: the data set has no classes to tell apart.")
    return results | {"notes": notes}


def generate(args: argparse.Namespace, generator: pipeline.Generator, found: list[Scorer]) -> torch.Tensor:
    """Generate NUM_SAMPLES images, let every scorer see each, and keep but the first (64, C, H, W) for the grid."""
    shown, count = torch.empty(0, *generator.shape, dtype=torch.uint8), 0
    with utils.progress(log, total=args.num_samples, unit="image", unit_scale=True, desc="scoring") as bar:

        def on_step(x_t: torch.Tensor) -> None:
            bar.update(len(x_t) * generator.world.size / generator.steps)

        for batch in generator.generate(args.seed, args.num_samples, args.batch_size, on_step):
            for scorer in found:
                scorer.update(batch, generator.labels(range(count, count + len(batch))))
            count += len(batch)
            shown = torch.cat([shown, batch])[: utils.GRID_IMAGES]
    return shown


def bits_per_dim(
    unet: torch.nn.Module, diffusion: Diffusion, real: torch.Tensor, about: dict[str, Any], seed: int
) -> dict[str, float]:
    """The variational bound of the first test images, in bits per dimension, and its error; `about` learns how."""
    images, times = min(BOUND_IMAGES, len(real)), min(BOUND_TIMES, diffusion.time_steps)
    about["bits_per_dim"] = {
        "images": images,
        "timesteps_of_each": times,
        "network": "float32, told no class; all pixels count, the frame's too",
    }
    with utils.progress(log, total=images * times, unit="image", unit_scale=True, desc="bits per dimension") as bar:
        bits, error = likelihood.bits_per_dim(unet, diffusion, real[:images], seed, times, 50, bar.update)
    return {"bits_per_dim": bits, "bits_per_dim_error": error}


def score(args: argparse.Namespace, world: World) -> int:
    unet, diffusion, settings = pipeline.restore(Path(args.checkpoint), world.device)
    sha256 = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()  # now: a training may soon replace it
    classes = pipeline.pick_classes(args.classes, settings["classes"])
    precision = utils.pick_precision(args.precision, world.device)
    generator = pipeline.Generator(
        unet, diffusion, args.sampler, args.steps, args.eta, precision, world, classes, args.guidance_scale
    )
    (directory,) = utils.make_directories({"output_dir": args.output_dir})
    machine = utils.describe_device(world.device, precision)
    how = args.num_samples, generator.sampler, generator.steps
    log.info("%s on %s: scoring %d images, %s, %d steps", args.checkpoint, machine, *how)

    if "data_path" not in args.given:  # the default is that of the checkpoint's data set
        args.data_path = config.following(settings["dataset"]).get("data_path", args.data_path)
    size, channels = settings["image_size"], settings["channels"]
    where = settings["dataset"], args.data_path
    real, labels = world.main_first(lambda: dataset.load(*where, "test", size, channels))
    if classes and dataset.classes(*where) != tuple(settings["classes"]):
        raise errors.SettingError(f"--class: the classes in {args.data_path} are not those of the model")
    # Images asked to be of some classes are compared with real ones of those.
    compared = real[torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0]] if classes else real
    about = protocol(args, sha256, generator, settings, len(compared))
    found = world.main_first(lambda: scorers(args, settings, real, labels, compared, about, world))
    networks = [about[name]["weights_sha256"] for name in ("extractor", "classifier") if name in about]
    world.agree([sha256, *networks], "the checkpoint or in the networks that look at images")

    start = time.perf_counter()
    shown = generate(args, generator, found)
    seconds = time.perf_counter() - start
    if not world.is_main:
        return 0

    results = collect(found, about)
    if not args.classifier_only:
        results |= bits_per_dim(unet, diffusion, real, about, args.seed)
    text = json.dumps({"scores": results, "protocol": about, "seconds": round(seconds, 1)}, indent=2)
    with errors.writing(directory / "metrics.json"):
        (directory / "metrics.json").write_text(text + "\n")
    utils.save_png(utils.image_grid(shown), directory / "grid.png")
    utils.save_png(found[-1].picture(), directory / "neighbours.png")
    print(report.table(results, about))
    log.info("wrote metrics.json, grid.png and neighbours.png to %s", directory)
    return 0


def main(args: argparse.Namespace) -> int:
    with World(utils.pick_device(args.device)) as world:
        return score(args, world)


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "eval.py", ARGS.quiet)
