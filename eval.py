"""Score a trained model against the test images: python eval.py.

Without --output_dir, results go to a folder below OUTPUT_PATH/eval that is named after the model and the sampling.
"""

import argparse

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
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once
    errors.explain_imports("eval.py")

from pathlib import Path

from src.scores import evaluation
from src.utils import devices, directories
from src.utils.distributed import World


def evaluate(args: argparse.Namespace, world: World) -> None:
    model = evaluation.load_model(
        args.checkpoint,
        world.device,
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
        args.num_samples, args.batch_size, args.seed, data_path, args.inception_weights, args.classifier_only
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
