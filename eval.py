"""Score a trained model against the test images: python eval.py. Writes OUTPUT_PATH/eval/metrics.json."""

import argparse

import config
from src import errors

SETTINGS = "NUM_SAMPLES SAMPLER STEPS ETA SEED PRECISION BATCH_SIZE DEVICE DATA_PATH".split()


def parse_args() -> argparse.Namespace:
    parser = config.Parser(__doc__, SETTINGS, NUM_SAMPLES=config.EVAL_SAMPLES, BATCH_SIZE=config.SAMPLE_BATCH)
    parser.add_checkpoint()
    parser.add_output_dir("eval")
    parser.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="Inception-v3's weights (default: fetched once, then kept)",
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

from src import dataset, inception, metrics, pipeline, utils

log = logging.getLogger("eval")


def protocol(
    args: argparse.Namespace,
    checkpoint_sha256: str,
    generator: pipeline.Generator,
    settings: dict[str, Any],
    reference_count: int,
    extractor: Any,
) -> dict[str, Any]:
    """All that somebody needs who wants to get the same numbers."""
    return {
        "checkpoint": {
            "file": str(args.checkpoint),
            "sha256": checkpoint_sha256,
            "weights": "ema",
        },
        "generated": {
            "images": args.num_samples,
            "sampler": generator.sampler,
            "steps": generator.steps,
            **generator.options,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "precision": str(generator.precision).removeprefix("torch."),
        },
        "reference": {"dataset": settings["dataset"], "split": "test", "images": reference_count},
        "extractor": {"network": extractor.name, "weights_sha256": extractor.sha256},
        "device": utils.describe_device(generator.device, generator.precision),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "torchvision", "torchmetrics", "torch-fidelity")},
        },
    }


def table(scores: dict[str, Any], about: dict[str, Any]) -> str:
    """The scores and how they were had, for people."""
    inception_score = "unavailable"
    if scores["inception_score_mean"] is not None:
        inception_score = f"{scores['inception_score_mean']:.3f}"
    if scores["inception_score_std"] is not None:
        inception_score += f" ± {scores['inception_score_std']:.3f}"
    made, reference = about["generated"], about["reference"]
    rows = [
        ("FID (lower is better)", "unavailable" if scores["fid"] is None else f"{scores['fid']:.2f}"),
        ("Inception Score (higher)", inception_score),
        (
            "generated",
            f"{made['images']:,} images, {made['sampler']}, {made['steps']} steps, seed {made['seed']}",
        ),
        (
            "reference",
            f"{reference['images']:,} images, {reference['split']} split of {reference['dataset']}",
        ),
        ("checkpoint", about["checkpoint"]["file"]),
    ]
    lines = [f"  {name:26}{value}" for name, value in rows]
    return "\n".join(lines + [f"  note: {note}" for note in scores["notes"]])


def main(args: argparse.Namespace) -> int:
    device = utils.pick_device(args.device)
    unet, diffusion, settings = pipeline.restore(Path(args.checkpoint), device)
    sha256 = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()  # now: a training may soon replace it
    precision = utils.pick_precision(args.precision, device)
    generator = pipeline.Generator(unet, diffusion, args.sampler, args.steps, args.eta, precision)
    (directory,) = utils.make_directories({"output_dir": args.output_dir})
    where = utils.describe_device(device, precision)
    log.info("%s on %s: scoring %d images, %s", args.checkpoint, where, args.num_samples, generator.sampler)

    if args.data_path == config.DATA_PATH:  # not given: the default is that of the checkpoint's data set
        args.data_path = config.following(settings["dataset"]).get("data_path", args.data_path)
    real, _ = dataset.load(settings["dataset"], args.data_path, "test", settings["image_size"], settings["channels"])
    extractor = inception.Extractor(inception.weights(args.inception_weights)).to(device)
    about = protocol(args, sha256, generator, settings, len(real), extractor)
    scores = metrics.Scores(extractor, metrics.reference_statistics(real, extractor), seed=args.seed)

    shown, start = torch.empty(0, *generator.shape, dtype=torch.uint8), time.perf_counter()
    with utils.progress(log, total=args.num_samples, unit="image", unit_scale=True, desc="scoring") as bar:

        def on_step(x_t: torch.Tensor) -> None:
            bar.update(len(x_t) / generator.steps)

        for batch in generator.generate(args.seed, args.num_samples, args.batch_size, on_step):
            scores.update(batch)
            shown = torch.cat([shown, batch])[: utils.GRID_IMAGES]  # all others are let go
    seconds = time.perf_counter() - start

    results = scores.compute()
    (directory / "metrics.json").write_text(
        json.dumps({"scores": results, "protocol": about, "seconds": round(seconds, 1)}, indent=2) + "\n"
    )
    utils.save_png(utils.image_grid(shown), directory / "grid.png")
    print(table(results, about))
    log.info("wrote metrics.json and grid.png to %s", directory)
    return 0


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "eval.py", ARGS.quiet)
