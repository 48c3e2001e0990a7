"""Score a trained model against real images: python eval.py.

Without --output_dir, results go to a folder below OUTPUT_PATH/eval that is named after the model and the sampling.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python does so itself, except with -P or PYTHONSAFEPATH

import config
from src.utils import cores, errors, flags, settings


def parse_args() -> argparse.Namespace:
    defaults = {"NUM_SAMPLES": config.EVAL_SAMPLES, "BATCH_SIZE": config.SAMPLE_BATCH}
    parser = flags.Parser(config, __doc__, settings.of_script("eval"), **defaults)
    parser.add_model_flags("eval")
    parser.add_argument(
        "--inception_weights",
        type=flags.path,
        metavar="FILE",
        help="weights of Inception-v3 (default: downloaded once and cached)",
    )
    parser.add_argument(
        "--classifier_only",
        action="store_true",
        help="leave out Inception, whose weights are then not needed, and bits per dimension, which take most of the "
        "time",
    )
    parser.add_argument(
        "--reference",
        choices=("test", "train", "held_out"),
        default="test",
        help="real images to compare with: the test split; the whole train split, as in most papers; or the images "
        "held out of training, for choosing settings without the test split (default: %(default)s)",
    )
    parser.add_argument(
        "--resize",
        choices=tuple(settings.read_table("scores/inception.py", "RESIZES")),
        default="bilinear",
        help="resize of images for Inception: bilinear as in pytorch-fid, or tensorflow as in torch-fidelity; scores "
        "of one cannot be compared with those of the other (default: %(default)s)",
    )
    parser.add_argument(
        "--crop_frame",
        action="store_true",
        help="cut off the black padding before Inception, to compare with scores of 28×28 images",
    )
    return parser.parse_args()


if __name__ == "__main__":
    errors.prepare("eval.py")
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once

from src.scores import evaluation
from src.utils import devices, directories
from src.utils.distributed import World


def evaluate(args: argparse.Namespace, world: World) -> None:
    model = evaluation.load_model(
        args.checkpoint,
        world.device,
        given=args.given,
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        precision=args.precision,
        classes=args.classes,
        guidance_scale=args.guidance_scale,
    )
    data_path = args.data_path
    if "data_path" not in args.given:  # the default depends on the data set of the checkpoint
        data_path = settings.defaults_for(config, model.settings["dataset"]).get("data_path", data_path)
    options = evaluation.Options(
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        data_path=data_path,
        inception_weights=args.inception_weights,
        classifier_only=args.classifier_only,
        reference=args.reference,
        resize=args.resize,
        crop_frame=args.crop_frame,
    )
    place = Path(args.output_dir)
    if "output_dir" not in args.given:  # each model and way of sampling has a folder of its own
        place /= evaluation.folder_name(model, options)
    with directories.output_directories({"output_dir": str(place)}) as (directory,):
        evaluation.run(model, options, directory, world)


def main(args: argparse.Namespace) -> int:
    device = devices.pick_device(args.device)
    cores.share(device)
    with World(device) as world, devices.float32_kernels(device, fast=True):
        evaluate(args, world)
    return 0


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "eval.py", ARGS.quiet)
