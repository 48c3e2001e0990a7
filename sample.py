"""Generate images from a trained model: python sample.py --checkpoint checkpoints/best.pth."""

import argparse

import config
from src import errors, flags

SETTINGS = "NUM_SAMPLES GUIDANCE_SCALE SAMPLER STEPS ETA SEED PRECISION BATCH_SIZE INTERP_STEPS DEVICE".split()
STOCHASTIC = ("ddpm", "dpmpp_2m_sde")  # samplers with fresh noise in every step


def parse_args() -> argparse.Namespace:
    parser = flags.Parser(config, __doc__, SETTINGS, BATCH_SIZE=config.SAMPLE_BATCH)
    parser.add_checkpoint()
    parser.add_class()
    parser.add_output_dir("samples")
    parser.add_argument(
        "--interpolate",
        action="store_true",
        help="also morph the first image into the second; all images are then dpmpp_2m's, unless ddim is asked for",
    )
    parser.add_argument("--gif", action="store_true", help="also animate how the first batch emerges from noise")
    parser.add_argument("--raw_weights", action="store_true", help="use the weights themselves, not their average")
    args = parser.parse_args()
    if args.interpolate and "sampler" not in args.given and args.sampler in STOCHASTIC:
        args.sampler = "dpmpp_2m"
    if args.interpolate and (args.sampler in STOCHASTIC or args.eta > 0):
        parser.error("--interpolate needs a deterministic sampler: --sampler ddim or dpmpp_2m, with --eta 0")
    if args.interpolate and (len(args.classes) > 1 or args.classes == ["all"]):
        parser.error("--interpolate takes one --class, or none")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once
    errors.explain_imports("sample.py")

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from src import pipeline, utils
from src.distributed import World

log = logging.getLogger("sample")

GIF_FRAMES = 50  # pictures of an animation, however many steps the sampler takes


def write_samples(
    generator: pipeline.Generator, args: argparse.Namespace, directory: Path, names: Sequence[str] = ()
) -> None:
    """Write NUM_SAMPLES images as they come, the first of them as a grid, and on request how those emerged.

    `names` are those of the generator's classes. Of several processes each writes some of the images.
    """
    rows, world = len(names) > 1, generator.world  # a row of the grid for each class
    most = len(names) * utils.CLASS_COLUMNS if rows else utils.GRID_IMAGES
    shown = torch.empty(0, *generator.shape, dtype=torch.uint8)  # the images of the grid; all others are let go
    animated = min(args.num_samples, args.batch_size, utils.GRID_IMAGES, most)
    frames: list[Tensor] = []  # of the first batch, as grids
    number, step = itertools.count(), itertools.count(1)  # the bar does not count where it is not shown
    with utils.progress(log, total=args.num_samples, unit="image", unit_scale=True, desc="sampling") as bar:

        def on_step(x_t: Tensor) -> None:
            bar.update(len(x_t) * world.size / generator.steps)
            if args.gif and not len(shown) and next(step) % -(-generator.steps // GIF_FRAMES) == 0:
                frames.append(utils.image_grid(utils.to_uint8(world.gather(x_t)[:animated])))

        for batch in generator.generate(args.seed, args.num_samples, args.batch_size, on_step):
            for image, i in zip(batch, number, strict=False):  # in this order, or a number would be lost
                name = f"_{names[i % len(names)]}" if names else ""
                if i % world.size == world.rank:
                    utils.save_png(image, directory / f"sample_{i:05d}{name}.png")
            shown = torch.cat([shown, batch])[:most]
    if world.is_main:
        utils.save_png(utils.class_grid(shown, names) if rows else utils.image_grid(shown), directory / "grid.png")
    if args.gif and world.is_main:
        utils.save_gif([*frames, utils.image_grid(shown[:animated])], directory / "denoising.gif")


def sample(args: argparse.Namespace, world: World) -> int:
    device = world.device
    unet, diffusion, settings = pipeline.restore(Path(args.checkpoint), device, use_ema=not args.raw_weights)
    classes = pipeline.pick_classes(args.classes, settings["classes"])
    names = [settings["classes"][label] for label in classes]
    if classes:
        args.num_samples += -args.num_samples % len(classes)  # as many of each
    precision = utils.pick_precision(args.precision, device)
    generator = pipeline.Generator(
        unet, diffusion, args.sampler, args.steps, args.eta, precision, world, classes, args.guidance_scale
    )
    (directory,) = utils.make_directories({"output_dir": args.output_dir})
    where, of = utils.describe_device(device, precision), f" of {', '.join(names)}" if names else ""
    how = args.num_samples, of, args.sampler, generator.steps
    log.info("%s on %s: %d images%s, %s, %d steps", args.checkpoint, where, *how)

    earlier = {path: path.stat().st_mtime_ns for path in directory.glob("sample_*.png")}
    write_samples(generator, args, directory, names)
    if args.interpolate and world.is_main:
        strip = generator.interpolate(args.seed, args.interp_steps, args.batch_size)
        utils.save_png(utils.image_grid(strip, columns=len(strip)), directory / "interpolation.png")

    extras = ", interpolation.png" * args.interpolate + ", denoising.gif" * args.gif
    log.info("wrote grid.png, %d images%s to %s", args.num_samples, extras, directory)
    left = sum(path.stat().st_mtime_ns == written for path, written in earlier.items())
    if left and world.size == 1:  # else others may be writing still
        log.warning("%d images of an earlier run are still there, too", left)
    return 0


def main(args: argparse.Namespace) -> int:
    with World(utils.pick_device(args.device)) as world:
        return sample(args, world)


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "sample.py", ARGS.quiet)
