"""Train a DDPM: python train.py. A stopped training resumes from CHECKPOINT_PATH/latest.pth by itself."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python does so itself, except with -P or PYTHONSAFEPATH

import config
from src.utils import cores, errors, flags, settings

INIT_FROM = """start a new run from the averaged weights of another checkpoint or weights.pth, as for fine-tuning;
    optimiser state, average and step count start anew (default: random weights). With --objective consistency, it is
    the model to distil"""
IGNORE_MISMATCHED_SIZES = """with --init_from: start the first and last convolution and the class embedding from random
    weights where the data have other channels or another number of classes"""


def parse_args() -> argparse.Namespace:
    parser = flags.Parser(config, __doc__, settings.of_script("train"))
    parser.add_run()
    parser.add_argument("--fresh", action="store_true", help="start a new run, do not resume; see --overwrite")
    parser.add_argument("--overwrite", action="store_true", help="with --fresh: delete the earlier run's files")
    parser.add_argument("--init_from", type=flags.path, metavar="FILE", help=INIT_FROM)
    parser.add_argument("--ignore_mismatched_sizes", action="store_true", help=IGNORE_MISMATCHED_SIZES)
    return parser.parse_args()


if __name__ == "__main__":
    errors.prepare("train.py")
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once

import logging
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from src.data import datasets
from src.data.images import Images
from src.generation import Generator, build
from src.training import Diverged, Learner, learning_rate, validation_loss
from src.utils import checkpoint, devices, directories, lock, pictures
from src.utils.distributed import World
from src.utils.monitor import Monitor, Silence, commands, describe
from src.utils.progress import Pace, counted, duration, progress, progress_in_steps
from src.utils.run import Run
from src.utils.signals import Interrupted, StopSignals

log = logging.getLogger("train")

PLOT_SECONDS = 60  # least time between two plots of the losses; with new samples there is always one


class Trainer:
    """One training run: its data, its learner, and when it validates, samples and saves."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world, self.device = args, world, world.device
        self.pace = Pace()
        self.plot_due = time.monotonic()  # on a GPU an epoch may take two seconds, and the plot half of one
        self.precision = devices.pick_precision(args.precision, self.device)
        self.settle()
        torch.manual_seed(args.seed)  # initial weights and, from then on, every t and eps

        images, labels, digests = world.main_first(self.load)  # the main process may download, or fill a cache
        count = self.settle_sizes(len(images))
        self.images, self.labels = images[:count], labels[:count]
        self.batches_per_epoch = count // args.batch_size
        self.steps = args.epochs * self.batches_per_epoch  # of the whole run
        if "lr_warmup" not in args.given:
            args.lr_warmup = min(args.lr_warmup, self.steps // 10)

        self.values = values = {name: getattr(args, name) for name in map(str.lower, settings.of_script("train"))}
        names = list(datasets.classes(args.dataset, args.data_path)) if args.class_conditional else []
        values["classes"], values["class_counts"] = names, datasets.class_counts(self.labels, len(names))
        self.held_out = images[count:], labels[count:] if names else None
        for name in datasets.left_out(names, self.labels):
            log.warning("no image of the class %s is left to train on: add some", name)
        self.data = datasets.fingerprint(images, labels, digests)
        model, self.diffusion = build(values, self.device)
        self.learner = Learner(model, self.diffusion, world, self.precision, values)
        self.checkpoints = Run(args, self.learner, world, values, self.data, digests, str(self.precision))

    def settle(self) -> None:
        """Set the settings that depend on others or on the machine. Raises SettingError if they do not fit."""
        args, parts = self.args, self.world.size * self.args.accumulate
        if args.batch_size % parts:
            raise errors.SettingError(
                f"BATCH_SIZE is {args.batch_size}, and must be a multiple of {parts} "
                f"({self.world.size} processes, ACCUMULATE {args.accumulate})"
            )
        args.sampler = flags.pick_sampler(args.sampler, args.given, vars(args))
        if args.objective == "consistency" and "time_sampling" not in args.given:
            args.time_sampling = "stratified"  # one step starts at T - 1, which logit_normal hardly ever draws
        if args.compile:
            log.info("trying torch.compile: up to a minute")
            args.compile = not self.world.maximum(int(not devices.can_compile(self.device)))

    def load(self) -> tuple[Images, Tensor, Tensor]:
        """The images of the train split, their classes, and the short hashes of their files."""
        args = self.args
        images, labels = datasets.load(args.dataset, args.data_path, "train", args.image_size, args.channels)
        return images, labels, datasets.digests(args.dataset, args.data_path, "train")

    def settle_sizes(self, available: int) -> int:
        """Set VAL_SIZE and BATCH_SIZE for so many images; returns how many of them are trained on."""
        args, parts = self.args, self.world.size * self.args.accumulate
        args.val_size, args.batch_size = datasets.training_sizes(
            available, args.val_size, args.batch_size, parts, args.given
        )
        return datasets.training_count(available, args.val_size, args.batch_size)

    def train_epoch(self, monitor: Monitor | Silence, signals: StopSignals) -> None:
        """Train on the remaining batches of the epoch. On a signal, raises Interrupted after a complete step."""
        args, learner, share = self.args, self.learner, self.world.share(self.args.batch_size)
        if not (learner.batch or args.compile):  # in mid-epoch, sums would change; compiled, it would compile anew
            cores.share(self.device)
        monitor.start_epoch(learner.epoch + 1, args.epochs, learner.steps)
        self.pace.start()
        batches = datasets.batches(
            self.images, self.labels, args.batch_size, args.seed, learner.epoch, skip=learner.batch, part=share
        )
        for x0, y in batches:
            lr = learning_rate(learner.steps + 1, self.steps, args.learning_rate, args.lr_warmup, args.lr_decay)
            loss, norm = learner.step(x0, y, lr)
            learner.batch += 1
            if learner.steps % args.log_every == 0:  # seldom, because it waits for the device
                learner.synchronize()
            monitor.count_step(learner.steps, loss, norm, lr)
            if seconds := self.pace.count(loss.item):
                log.info(self.forecast(seconds))
            signals.check()
            if time.monotonic() >= self.checkpoints.save_due and learner.batch < self.batches_per_epoch:
                monitor.flush()
                self.checkpoints.save("latest.pth")

    def finish_epoch(self, monitor: Monitor | Silence, signals: StopSignals) -> None:
        """Validate, draw samples, save. A signal interrupts it before anything changes; a resumed run repeats it."""
        args, learner, epoch = self.args, self.learner, self.learner.epoch + 1
        last = epoch == args.epochs
        learner.synchronize()
        val_loss = self.validate(signals)
        samples = self.sample_grid(signals) if self.samples_follow(epoch) else None

        # A run that fails in what follows goes on from latest.pth, which is of an earlier step, and repeats this.
        if not Path(args.checkpoint_path, "latest.pth").exists():
            monitor.flush()
            self.checkpoints.save("latest.pth")
        # In consistency distillation the loss does not measure the quality of images: the last state counts as best.
        lowest = learner.finish_epoch(val_loss)
        improved = lowest or args.objective == "consistency"
        monitor.show_validation(learner.steps, val_loss, samples)
        if improved:
            self.checkpoints.save("best.pth")
        if last:
            self.checkpoints.save("weights.pth")
            self.checkpoints.save("final.pth")
        self.write_pictures(samples)
        if improved or last or epoch % args.save_every == 0 or time.monotonic() >= self.checkpoints.save_due:
            self.checkpoints.save("latest.pth")  # with every best.pth: a resumed run must know the best loss
        of = epoch, args.epochs, learner.history["train"][-1], val_loss, " (best)" if lowest else ""
        log.info("epoch %d/%d: loss %.4f, validation %.4f%s", *of)

    def samples_follow(self, epoch: int) -> bool:
        """Whether a grid of samples follows an epoch, counted from 1: the first, the last, and every SAMPLE_EVERY."""
        return epoch in (1, self.args.epochs) or epoch % self.args.sample_every == 0

    def picture(self, epoch: int) -> Path:
        """The file of the grid of samples that follows an epoch."""
        return Path(self.args.output_path, f"samples_epoch_{epoch:04d}.png")

    def forecast(self, seconds: float) -> str:
        """When the training ends and the next samples come, if each step takes so many seconds."""
        args, learner, begun = self.args, self.learner, self.learner.steps - self.pace.steps
        epochs = f"{counted(args.epochs, 'epoch')} {'takes' if args.epochs == 1 else 'take'}"
        run = f"the rest of the {args.epochs} epochs takes" if begun else epochs
        epoch = next(filter(self.samples_follow, range(learner.epoch + 1, args.epochs + 1)))
        wait = duration((epoch * self.batches_per_epoch - learner.steps) * seconds)
        return (
            f"{run} about {duration((self.steps - begun) * seconds)} at {args.batch_size / seconds:.0f} images/s; "
            f"the {'first' if epoch == 1 else 'next'} samples come in about {wait}: {self.picture(epoch)}"
        )

    def write_pictures(self, samples: Tensor | None = None) -> None:
        """Write the plot of the losses and, unless None, the samples of an epoch (C,H,W) uint8."""
        if not self.world.is_main:
            return
        directory, learner = Path(self.args.output_path), self.learner
        if samples is not None or time.monotonic() >= self.plot_due:
            with errors.by_product(f"{directory}/losses.png"):
                pictures.plot_losses(learner.history, directory / "losses.png")
            self.plot_due = time.monotonic() + PLOT_SECONDS
        if samples is not None:
            with errors.by_product(f"{directory}/samples_epoch_*.png"):
                pictures.save_png(samples, self.picture(learner.epoch))

    def validate(self, signals: StopSignals) -> float:
        """The loss of the averaged weights on the held-out images."""
        args, model, (images, labels) = self.args, self.learner.ema.model, self.held_out
        teacher = self.learner.teacher
        held_out = datasets.in_order(images, args.batch_size, labels)
        bar = {"desc": "validating", "unit": " batches", "total": -(-len(images) // args.batch_size), "leave": False}
        with (
            devices.float32_kernels(self.device, fast=False),
            progress(log, iterable=held_out, **bar) as batches,
        ):
            return validation_loss(
                model,
                self.diffusion,
                batches,
                count=len(images),
                seed=args.seed,
                world=self.world,
                on_batch=signals.check,
                teacher=None if teacher is None else teacher.forward,  # not compiled, like `model`
            )

    def sample_grid(self, signals: StopSignals) -> Tensor:
        """NUM_SAMPLES images of the averaged weights as one picture (C,H,W) uint8, from the same noise every time."""
        args, model = self.args, self.learner.ema.model
        generator = Generator(
            model,
            self.diffusion,
            sampler=args.sampler,
            steps=args.steps,
            eta=args.eta,
            precision=self.precision,
            class_counts=self.values["class_counts"],
        )
        bar = {"desc": "drawing samples", "unit": " images", "total": args.num_samples, "leave": False}
        with progress_in_steps(log, generator.steps, **bar) as advance:

            def on_step(x_t: Tensor) -> None:
                advance(len(x_t) * self.world.size)
                signals.check()

            generate = partial(generator.images, args.seed, on_step=on_step)
            return pictures.image_grid(torch.cat(list(self.world.divide(generate, args.num_samples, args.batch_size))))

    def monitor(self) -> Monitor | Silence:
        """What shows and logs the progress, in the main process only."""
        if not self.world.is_main:
            return Silence()
        args = self.args
        return Monitor(Path(args.log_path), self.learner.steps, self.steps, args.batch_size, args.log_every)

    def run(self) -> int:
        """Train to the last epoch, or until a signal; returns the exit status."""
        args, learner = self.args, self.learner
        with (
            self.monitor() as monitor,
            logging_redirect_tqdm(),
            StopSignals(self.world.maximum) as signals,
        ):
            self.write_pictures()  # now: if it fails, that is to be known before the end of the first epoch
            try:
                while learner.epoch < args.epochs:
                    self.train_epoch(monitor, signals)
                    self.finish_epoch(monitor, signals)
            except Interrupted as stop:
                path = self.checkpoints.save("latest.pth")
                log.warning("%s: saved step %d in %s; the same command goes on from there", stop, learner.steps, path)
                self.world.wait()  # torchrun ends all processes as soon as one has left
                return 128 + stop.number
            except (OSError, errors.UserError):  # a file could not be read or written
                if learner.batch:  # else the end of an epoch failed, and a resumed run is to repeat it
                    self.checkpoints.save("latest.pth")
                raise
        log.info("done; next: %s", commands(args))
        return 0


def train(args: argparse.Namespace, world: World) -> int:
    """Resume the run in CHECKPOINT_PATH, or start a new one; returns the exit status."""
    directory = Path(args.checkpoint_path)
    resume = bool(checkpoint.of_run(directory)) and not args.fresh
    if args.objective == "consistency" and not (args.init_from or resume):
        raise errors.SettingError("OBJECTIVE consistency distils a trained model: give it as --init_from FILE")
    trainer = Trainer(args, world)
    world.agree(trainer.data, "the training images")  # after which every process has looked for checkpoints
    if args.init_from and not resume:  # before the old run is deleted, which may hold these weights
        trainer.checkpoints.start_from(Path(args.init_from))
    with lock.hold(directory) if world.is_main else nullcontext():  # not before: the file stays
        if resume:
            trainer.checkpoints.resume(next(iter(checkpoint.of_run(directory)), directory / "latest.pth"))
        elif world.is_main:  # only now: a run that cannot start must not cost the old one
            trainer.checkpoints.clear()
        world.agree(trainer.learner.steps, "the checkpoint to resume from")
        return go_on(trainer)


def go_on(trainer: Trainer) -> int:
    """Train the epochs that are left; returns the exit status."""
    args, world = trainer.args, trainer.world
    log.info(describe(args, trainer.learner.model, world, trainer.precision, len(trainer.images)))
    if (done := trainer.learner.epoch) >= args.epochs:
        how = "raise --epochs, or start anew with --fresh --overwrite"
        log.info("nothing to do after %s: %s", counted(done, "epoch"), how)
        return 0
    if args.compile:
        log.info("compiling the network: the first step takes a minute or two")
    try:
        return trainer.run()
    except Diverged as error:
        advice = "nothing of it was saved. The same command with a lower --learning_rate goes on from the last save"
        raise errors.UserError(f"training diverged: {error}; {advice}") from error


def main(args: argparse.Namespace) -> int:
    paths = {name: getattr(args, name) for name in ("checkpoint_path", "output_path", "log_path")}
    device = devices.pick_device(args.device)
    cores.share(device)
    with (
        directories.output_directories(paths),
        World(device) as world,
        devices.float32_kernels(device, fast=True),
    ):
        return train(args, world)


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "train.py", ARGS.quiet)
