"""Train a DDPM: python train.py. Stopped runs go on by themselves from CHECKPOINT_PATH/latest.pth."""

import argparse

import config
from src import errors, flags

SETTINGS = """
    DATASET VAL_SIZE IMAGE_SIZE CHANNELS BATCH_SIZE LEARNING_RATE LR_WARMUP LR_DECAY ADAM_BETA2 ACCUMULATE EPOCHS
    GRAD_CLIP EMA_DECAY SEED PRECISION DROPOUT COMPILE UNET_DIM UNET_DIM_MULTS ENCODER_ATTENTION CLASS_CONDITIONAL
    CLASS_DROPOUT TIME_STEPS SCHEDULE_TYPE BETA_START BETA_END PREDICTION LOSS_WEIGHT TIME_SAMPLING NUM_SAMPLES
    SAMPLER STEPS ETA SAVE_EVERY SAVE_MINUTES SAMPLE_EVERY LOG_EVERY DEVICE DATA_PATH CHECKPOINT_PATH OUTPUT_PATH
    LOG_PATH
""".split()


def parse_args() -> argparse.Namespace:
    parser = flags.Parser(config, __doc__, SETTINGS)
    parser.add_argument("--fresh", action="store_true", help="start a new run; refused if there is one already")
    parser.add_argument("--overwrite", action="store_true", help="with --fresh: delete the run that is there")
    parser.add_argument(
        "--init_from",
        metavar="FILE",
        help="start a new run from the averaged weights of another checkpoint or weights.pth, as for fine-tuning; "
        "optimizer, averages and counters start afresh (default: random weights)",
    )
    parser.add_argument(
        "--ignore_mismatched_sizes",
        action="store_true",
        help="with --init_from: where the data have other channels or another number of classes, start the layers "
        "that depend on them from random weights",
    )
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once
    errors.explain_imports("train.py")

import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from src import checkpoint, dataset, lock, pipeline, utils
from src.distributed import World
from src.interrupt import Interrupted, StopSignals
from src.learner import Learner, learning_rate
from src.monitor import Monitor, Silence, describe

log = logging.getLogger("train")

WEIGHTS_ONLY = (
    "settings",
    "init_from",
    "epoch",
    "step",
    "ema",
)  # of a state, what sampling needs: a quarter of it, to hand on


class Trainer:
    """One run: what learns, from which data, and how far it has come."""

    PROGRESS = ("epoch", "batch", "loss_sum", "best", "history")

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world, self.device = args, world, world.device
        if args.batch_size % (world.size * args.accumulate):
            raise errors.SettingError(
                f"BATCH_SIZE is {args.batch_size}, and must be a multiple of {world.size * args.accumulate}, for each "
                f"of {world.size} processes takes its share of it in {args.accumulate} parts (ACCUMULATE)"
            )
        self.precision = utils.pick_precision(args.precision, self.device)
        torch.manual_seed(args.seed)  # decides the initial weights and, from then on, every t and eps

        where = args.dataset, args.data_path
        images, labels = world.main_first(lambda: dataset.load(*where, "train", args.image_size, args.channels))
        count = dataset.training_count(len(images), args.val_size, args.batch_size)
        self.images, self.labels, self.held_out = images[:count], labels[:count], images[count:]
        self.batches_per_epoch = count // args.batch_size
        self.steps = args.epochs * self.batches_per_epoch  # of the whole run

        self.settings = {name: value for name, value in vars(args).items() if name.upper() in SETTINGS}
        self.settings["classes"] = list(dataset.classes(*where)) if args.class_conditional else []
        self.data = dataset.fingerprint(images, labels)
        model, self.diffusion = pipeline.build(self.settings, self.device)
        self.learner = Learner(model, self.diffusion, world, self.precision, self.settings)

        self.init_from: dict[str, str] | None = None  # the file whose weights the run began with, and its SHA-256
        self.epoch = 0  # epochs finished
        self.batch = 0  # batches done of the next epoch
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # over the batches of this epoch
        self.best = math.inf  # lowest validation loss
        self.history: dict[str, list[float]] = {"train": [], "val": []}  # losses, one a finished epoch
        self.save_due = time.monotonic() + 60 * args.save_minutes  # when latest.pth is to be written, come what may

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, and the settings that rebuild the network."""
        return {
            "settings": {name: value for name, value in self.settings.items() if "path" not in name},
            "data": self.data,
            "init_from": self.init_from,
            "precision": str(self.precision),  # which "auto" does not tell
            **self.learner.state(),
            **{name: getattr(self, name) for name in self.PROGRESS},
        }

    def start_from(self, path: Path) -> None:
        """Begin a new run with the averaged weights in checkpoint `path`; see `pipeline.initialise` for errors."""
        learner = self.learner
        sha256 = pipeline.initialise(learner.model, self.settings, path, self.args.ignore_mismatched_sizes)
        self.world.agree(sha256, str(path))
        learner.ema.model.load_state_dict(learner.model.state_dict())
        self.init_from = {"file": path.name, "sha256": sha256}
        log.info("starting from the averaged weights of %s", path)

    def resume(self, path: Path) -> None:
        """Take up the run in checkpoint `path`. Raises SettingError where it was trained with other settings."""
        state = checkpoint.load(path)
        if "model" not in state or "optimizer" not in state:
            raise errors.UserError(
                f"{path} holds no training to resume: move it away, or give another --checkpoint_path"
            )
        settings = pipeline.UNRECORDED | state["settings"]
        refused, noted = flags.changed_settings(config, settings, vars(self.args))
        if refused:
            raise errors.SettingError(
                f"{path} cannot be resumed: {'; '.join(refused)}. Use the old values, or for a new run "
                "other paths (--checkpoint_path, --output_path, --log_path)"
            )
        self.init_from = state.get("init_from")
        if self.args.init_from and Path(self.args.init_from).name != (self.init_from or {}).get("file"):
            raise errors.SettingError(
                f"{path} cannot be resumed with --init_from {self.args.init_from}: it did not start from that file. "
                "Leave the flag out to go on, or start a new run with other paths"
            )
        for change in noted:
            log.warning("from here on, %s", change)
        if state.get("data") != self.data or settings.get("classes") != self.settings["classes"]:
            raise errors.SettingError(
                f"{path} cannot be resumed: the images or classes in {self.args.data_path} are not those that it was "
                "trained on. Bring them back, or use other paths for a new run"
            )
        if (before := state.get("precision", str(self.precision))) != str(self.precision):
            log.warning("from here on, the network computes in %s, not in %s as before", self.precision, before)
        if self.args.lr_decay and settings["epochs"] != self.args.epochs:
            log.warning("from here on, the learning rate is that of a training of %d epochs", self.args.epochs)
        try:
            self.learner.load(state)
            for name in self.PROGRESS:
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise checkpoint.other_version(path) from error
        self.loss_sum = self.loss_sum.to(self.device)
        log.info("RESUMING %s: %d of %d epochs done, step %d", path, self.epoch, self.args.epochs, self.learner.steps)

    def save(self, name: str) -> Path:
        path = Path(self.args.checkpoint_path) / name
        if self.world.is_main:
            state = self.state()
            kept = WEIGHTS_ONLY if name == "weights.pth" else state
            checkpoint.save(path, {key: state[key] for key in kept})
        if name == "latest.pth":
            self.save_due = time.monotonic() + 60 * self.args.save_minutes
        return path

    def train_epoch(self, monitor: Monitor, signals: StopSignals) -> None:
        """The batches that the epoch still lacks. On a signal raises Interrupted after a step, the state whole."""
        args, learner, share = self.args, self.learner, self.world.share(self.args.batch_size)
        monitor.start_epoch(self.epoch + 1, args.epochs, learner.steps)
        for x0, y in dataset.batches(
            self.images, self.labels, args.batch_size, args.seed, self.epoch, self.device, self.batch, share
        ):
            lr = learning_rate(learner.steps + 1, self.steps, args.learning_rate, args.lr_warmup, args.lr_decay)
            loss, norm = learner.step(x0, y, lr)
            self.batch += 1
            self.loss_sum += loss
            monitor.count_step(learner.steps, loss, norm, lr)
            signals.check()
            if time.monotonic() >= self.save_due and self.batch < self.batches_per_epoch:  # else finish_epoch saves
                monitor.flush()
                self.save("latest.pth")

    def finish_epoch(self, monitor: Monitor, signals: StopSignals) -> None:
        """Validate, draw samples, save. Interrupted on the way, it has changed nothing and is done again on resume."""
        args, epoch = self.args, self.epoch + 1
        last = epoch == args.epochs
        val_loss = self.validate(signals)
        samples = self.sample_grid(signals) if epoch % args.sample_every == 0 or last else None

        self.history["train"].append(self.loss_sum.item() / self.batches_per_epoch)
        self.history["val"].append(val_loss)
        self.epoch, self.batch = epoch, 0
        self.loss_sum.zero_()
        improved = val_loss < self.best
        self.best = val_loss if improved else self.best
        monitor.show_validation(
            self.learner.steps, val_loss, samples
        )  # before saving: what a checkpoint counts is on disk
        if improved:
            self.save("best.pth")
        if last:
            self.save("weights.pth")
            self.save("final.pth")
        if self.world.is_main:  # pictures come before latest.pth, for what that counts is never drawn again
            utils.plot_losses(self.history["train"], self.history["val"], Path(args.output_path, "losses.png"))
            if samples is not None:
                utils.save_png(samples, Path(args.output_path, f"samples_epoch_{epoch:04d}.png"))
        if improved or last or epoch % args.save_every == 0 or time.monotonic() >= self.save_due:
            self.save("latest.pth")  # with every best.pth, too: a resumed run must know what it has to beat
        losses = self.history["train"][-1], val_loss
        log.info("epoch %d/%d: loss %.4f, validation %.4f%s", epoch, args.epochs, *losses, " (best)" * improved)

    def validate(self, signals: StopSignals) -> float:
        """The loss of the averaged weights on the held-out images, with the same t and eps every time."""
        args, look = self.args, signals.check
        return pipeline.validation_loss(
            self.learner.ema.model, self.diffusion, self.held_out, args.seed, args.batch_size, look, self.world
        )

    def sample_grid(self, signals: StopSignals) -> Tensor:
        """NUM_SAMPLES images of the averaged weights as one picture (C,H,W) uint8, from the same noise every time."""
        args = self.args
        generator = pipeline.Generator(
            self.learner.ema.model, self.diffusion, args.sampler, args.steps, args.eta, self.precision, self.world
        )
        batches = generator.generate(args.seed, args.num_samples, args.batch_size, lambda x_t: signals.check())
        return utils.image_grid(torch.cat(list(batches)))

    def run(self) -> int:
        """Train to the last epoch, or until a signal; returns the exit status."""
        args, directory = self.args, Path(self.args.log_path) / "tensorboard"
        progress = self.learner.steps, self.steps, args.batch_size, args.log_every
        with (
            Monitor(directory, *progress) if self.world.is_main else Silence() as monitor,
            logging_redirect_tqdm(),
            StopSignals(self.world.maximum) as signals,
        ):
            try:
                while self.epoch < args.epochs:
                    self.train_epoch(monitor, signals)
                    self.finish_epoch(monitor, signals)
            except Interrupted as stop:
                latest = self.save("latest.pth")
                step = self.learner.steps
                log.warning("%s: saved step %d in %s; the same command goes on from there", stop, step, latest)
                self.world.wait()  # for torchrun ends all as soon as one has left
                return 128 + stop.number
            except (
                OSError,
                errors.WriteError,
            ):  # a curve or a picture could not be written: that must not cost the training
                self.save("latest.pth")
                raise
        best = Path(args.checkpoint_path, "best.pth")
        log.info("done; next, with --checkpoint %s: sample.py, or eval.py --data_path %s", best, args.data_path)
        return 0


def main(args: argparse.Namespace) -> int:
    places = ("checkpoint_path", "output_path", "log_path")
    directory, *_ = utils.make_directories({name: getattr(args, name) for name in places})
    with World(utils.pick_device(args.device)) as world, lock.hold(directory) if world.is_main else nullcontext():
        trainer = Trainer(args, world)
        earlier = checkpoint.of_run(directory)
        world.agree(trainer.data, "the training images")  # and all have looked: now the files may change
        if earlier and not args.fresh:
            trainer.resume(earlier[0])
        else:
            if args.init_from:  # before the old run is deleted, whose weights these may be
                trainer.start_from(Path(args.init_from))
            if world.is_main:  # only now: a run that cannot start must not cost the old one
                checkpoint.clear(directory, args.overwrite)
        world.agree(trainer.learner.steps, "the checkpoint to resume from")
        log.info(describe(args, trainer.learner.model, world, trainer.precision, len(trainer.images)))
        if trainer.epoch >= args.epochs:
            how = "raise --epochs, or start anew with --fresh --overwrite"
            log.info("nothing to do: %d epochs are done; %s", trainer.epoch, how)
            return 0
        return trainer.run()


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "train.py", ARGS.quiet)
