"""Generate images with a trained model: python sample.py --checkpoint checkpoints/best.pth."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python does so itself, except with -P or PYTHONSAFEPATH

import config
from src.utils import cores, errors, flags, settings


def parse_args() -> argparse.Namespace:
    parser = flags.Parser(config, __doc__, settings.of_script("sample"), BATCH_SIZE=config.SAMPLE_BATCH)
    parser.add_model_flags("samples")
    parser.add_argument(
        "--interpolate",
        action="store_true",
        help="also interpolate from image 0 to image 1; all images are then by dpmpp_2m, not by dpmpp_2m_sde, unless "
        "the model was trained for consistency",
    )
    parser.add_argument("--gif", action="store_true", help="also animate how the first batch emerges from noise")
    parser.add_argument(
        "--start_from",
        type=flags.path,
        metavar="IMAGE",
        help="image file to change (see --strength); without --class, the result has no class",
    )
    parser.add_argument(
        "--strength",
        type=float,
        metavar="float",
        help="how much of IMAGE is generated anew, from 0 (nothing) to 1 (all of it): noise of that level is added "
        "and then removed, in about strength * steps steps (default: 0.7, or 1 with --inpaint)",
    )
    parser.add_argument(
        "--inpaint",
        type=flags.path,
        metavar="MASK",
        help="image file of the same size, white where IMAGE is generated anew; where it is black, IMAGE is kept",
    )
    parser.add_argument("--raw_weights", action="store_true", help="use the last step's weights, not their average")
    args = parser.parse_args()
    if args.interpolate and "sampler" not in args.given and settings.SAMPLERS[args.sampler]["stochastic"]:
        args.sampler = "dpmpp_2m"  # deterministic, so that the frames change the least
    if args.interpolate and (len(args.classes) > 1 or args.classes == ["all"]):
        parser.error("--interpolate takes one --class, or none")
    if args.start_from and not args.classes and "guidance_scale" in args.given:
        parser.error("--guidance_scale guides towards a class: with --start_from, it goes with --class")
    if args.strength is None:
        args.strength = 0.7 if args.start_from and not args.inpaint else 1.0
    if not 0 <= args.strength <= 1:
        parser.error(f"--strength is {args.strength}, but must be from 0 to 1")
    return args


if __name__ == "__main__":
    errors.prepare("sample.py")
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from src.data import datasets
from src.data.images import upright_size
from src.generation import Generator, restore, to_uint8
from src.utils import checkpoint, devices, directories, pictures
from src.utils.distributed import World
from src.utils.progress import counted, progress_in_steps

log = logging.getLogger("sample")

GIF_FRAMES = 50  # at most this many frames of an animation, before the finished image


def write_samples(
    generator: Generator, args: argparse.Namespace, directory: Path, world: World, names: Sequence[str] = ()
) -> None:
    """Write NUM_SAMPLES images and a grid of the first; with --gif an animation, with --interpolate a strip of frames.

    With classes in turn, called `names`, the number is rounded up so that each gets equally many images.
    """
    count = args.num_samples + (-args.num_samples % len(names) if names else 0)
    of = f" of {', '.join(names)}" if names else ""
    how = f"{counted(count, 'image')}{of}, {args.sampler}, {counted(len(generator.grid), 'step')}"
    log.info("%s on %s: %s", args.checkpoint, devices.describe_device(generator.device, generator.precision), how)
    gallery = pictures.Gallery(directory, names, generator.classes, (world.rank, world.size))
    animated = min(count, args.batch_size, pictures.GRID_IMAGES, gallery.most)
    frames: list[torch.Tensor] = []  # x_t of the first batch, as grids
    step = itertools.count(1)
    with progress_in_steps(log, len(generator.grid), total=count, unit=" images", desc="sampling") as advance:

        def on_step(x_t: torch.Tensor) -> None:
            advance(len(x_t) * world.size)
            if args.gif and not gallery.count and next(step) % -(-len(generator.grid) // GIF_FRAMES) == 0:
                frames.append(pictures.image_grid(to_uint8(world.gather(x_t)[:animated])))

        for images in world.divide(partial(generator.images, args.seed, on_step=on_step), count, args.batch_size):
            gallery.add(images)
    if world.is_main:
        pictures.save_png(gallery.grid(), directory / "grid.png")
        if args.gif:
            frames.append(pictures.image_grid(torch.stack(gallery.shown[:animated])))
            pictures.save_gif(frames, directory / "denoising.gif")
        if args.interpolate:
            size, bar = (args.interp_steps, args.batch_size), {"unit": " frames", "desc": "interpolating"}
            with progress_in_steps(log, len(generator.grid), total=args.interp_steps, **bar) as advance:
                strip = generator.interpolate(args.seed, *size, lambda x_t: advance(len(x_t)))
            pictures.save_png(pictures.image_grid(strip, columns=len(strip)), directory / "interpolation.png")
        extras = ", interpolation.png" * args.interpolate + ", denoising.gif" * args.gif
        log.info("wrote grid.png, %s%s to %s", counted(count, "image"), extras, directory)
        if world.size == 1 and (left := gallery.left_over()):  # with several, others may still be writing
            log.warning("in the same place: %s of an earlier run", counted(left, "image"))


def read_start(args: argparse.Namespace, model: Mapping[str, Any]) -> dict[str, Any]:
    """What --start_from, --strength and --inpaint are to a Generator of a model with these settings."""
    read = partial(datasets.read_image, name=model["dataset"], image_size=model["image_size"])
    start: dict[str, Any] = {"strength": args.strength}
    for path in map(Path, filter(None, (args.start_from, args.inpaint))):
        if path.resolve().parent == Path(args.output_dir).resolve() and path.match("sample_*.png"):
            raise errors.UserError(f"{path} might be overwritten by the results: give another --output_dir")
    if args.start_from:
        start["image"] = datasets.normalise(read(args.start_from, channels=model["channels"]))
    if args.inpaint:
        start["mask"] = read(args.inpaint, channels=1) > 127
        sizes = [" x ".join(map(str, upright_size(path))) for path in (args.inpaint, args.start_from)]
        if sizes[0] != sizes[1]:  # each would be cropped and scaled on its own
            raise errors.UserError(
                f"{args.inpaint} has {sizes[0]} pixels and {args.start_from} {sizes[1]}: "
                "give the mask the size of the image"
            )
        if not start["mask"].any():
            raise errors.UserError(
                f"no pixel of {args.inpaint} is white, in the central square to which it is cropped: nothing would be "
                "generated"
            )
        frame = datasets.padding(model["dataset"], size := model["image_size"])  # around the image
        if start["mask"][:, frame : size - frame, frame : size - frame].all():
            log.warning("every pixel of %s is white or transparent: nothing of the image is kept", args.inpaint)
    return start


def sample(args: argparse.Namespace, world: World) -> int:
    path = Path(args.checkpoint)
    state = checkpoint.load(path, weights := "model" if args.raw_weights else "ema")
    with checkpoint.explained(path):
        unet, diffusion = restore(state, world.device, weights)
    classes, counts = flags.pick_classes(args.classes, state["settings"])
    if args.start_from:
        counts = []  # a class that is drawn would seldom be that of the image
    names = [state["settings"]["classes"][label] for label in classes]
    args.sampler = flags.pick_sampler(args.sampler, args.given, state["settings"])
    precision = devices.pick_precision(args.precision, world.device)
    start = read_start(args, state["settings"])
    with errors.setting_errors():
        generator = Generator(
            unet,
            diffusion,
            sampler=args.sampler,
            steps=args.steps,
            eta=args.eta,
            precision=precision,
            classes=classes,
            class_counts=counts,
            guidance_scale=flags.pick_guidance(args.guidance_scale, args.given, bool(classes or counts)),
            **start,
        )
    with directories.output_directories({"output_dir": args.output_dir}) as (directory,):
        write_samples(generator, args, directory, world, names)
    return 0


def main(args: argparse.Namespace) -> int:
    device = devices.pick_device(args.device)
    cores.share(device)
    with World(device) as world, devices.float32_kernels(device, fast=True):
        return sample(args, world)


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "sample.py", ARGS.quiet)
