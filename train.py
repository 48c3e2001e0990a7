"""Train a DDPM: python train.py. Stopped runs go on by themselves from CHECKPOINT_PATH/latest.pth."""

import argparse

import config
from src import errors

SETTINGS = """
    DATASET VAL_SIZE IMAGE_SIZE CHANNELS BATCH_SIZE LEARNING_RATE EPOCHS GRAD_CLIP EMA_DECAY SEED PRECISION COMPILE
    UNET_DIM UNET_DIM_MULTS TIME_STEPS SCHEDULE_TYPE BETA_START BETA_END PREDICTION NUM_SAMPLES SAMPLER STEPS ETA
    SAVE_EVERY SAVE_MINUTES SAMPLE_EVERY LOG_EVERY DEVICE DATA_PATH CHECKPOINT_PATH OUTPUT_PATH LOG_PATH
""".split()


def parse_args() -> argparse.Namespace:
    parser = config.Parser(__doc__, SETTINGS)
    parser.add_argument("--fresh", action="store_true", help="start a new run; refused if there is one already")
    parser.add_argument("--overwrite", action="store_true", help="with --fresh: delete the run that is there")
    args = parser.parse_args()
    if args.overwrite and not args.fresh:
        parser.error("--overwrite goes with --fresh")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once
    errors.explain_imports("train.py")

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from src import checkpoint, dataset, lock, pipeline, utils
from src.ema import EMA
from src.interrupt import Interrupted, StopSignals
from src.monitor import Monitor, describe

log = logging.getLogger("train")


class Trainer:
    """One run: the network and its average, the optimiser, the data, and how far it has come."""

    PROGRESS = ("epoch", "batch", "step", "loss_sum", "best", "history")

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = utils.pick_device(args.device)
        self.precision = utils.pick_precision(args.precision, self.device)
        torch.manual_seed(args.seed)  # decides the initial weights and, from then on, every t and eps

        images, labels = dataset.load(args.dataset, args.data_path, "train", args.image_size, args.channels)
        count = len(images) - args.val_size
        self.batches_per_epoch = count // args.batch_size
        if self.batches_per_epoch < 1:
            raise errors.SettingError(
                f"{args.dataset} has {len(images)} training images: too few for --val_size {args.val_size} and "
                f"--batch_size {args.batch_size}; reduce one of them"
            )
        self.images, self.labels, self.held_out = images[:count], labels[:count], images[count:]

        self.model, self.diffusion = pipeline.build(vars(args), self.device)
        self.ema = EMA(self.model, args.ema_decay)
        if args.compile:
            self.model.compile()  # in place: its state_dict stays that of the plain network
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.learning_rate, fused=True)

        self.epoch = 0  # epochs finished
        self.batch = 0  # batches done of the next epoch
        self.step = 0  # optimiser steps in all
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # over the batches of this epoch
        self.best = math.inf  # lowest validation loss
        self.history: dict[str, list[float]] = {"train": [], "val": []}  # losses, one a finished epoch
        self.save_due = time.monotonic() + 60 * args.save_minutes  # when latest.pth is to be written, come what may

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, and the settings that rebuild the network."""
        return {
            "settings": {k: v for k, v in vars(self.args).items() if k.upper() in SETTINGS and "path" not in k},
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": utils.rng_state(self.device),
            **{name: getattr(self, name) for name in self.PROGRESS},
        }

    def resume(self, path: Path) -> None:
        """Take up the run in checkpoint `path`. Raises SettingError where it was trained with other settings."""
        state = checkpoint.load(path)
        if "model" not in state or "optimizer" not in state:
            raise errors.UserError(
                f"{path} holds no training to resume: move it away, or give another --checkpoint_path"
            )
        refused, noted = config.changed_settings(state["settings"], vars(self.args))
        if refused:
            raise errors.SettingError(
                f"{path} cannot be resumed: {'; '.join(refused)}. Use the old values, or other paths for a new run"
            )
        for change in noted:
            log.warning("from here on, %s", change)
        try:
            self.model.load_state_dict(state["model"])
            self.ema.model.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            utils.set_rng_state(state["rng"], self.device)
            for name in self.PROGRESS:
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise checkpoint.other_version(path) from error
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate  # the one part of the optimiser's state that a flag may change
        self.loss_sum = self.loss_sum.to(self.device)
        log.info("RESUMING %s: %d of %d epochs done, step %d", path, self.epoch, self.args.epochs, self.step)

    def save(self, name: str) -> Path:
        path = Path(self.args.checkpoint_path) / name
        checkpoint.save(path, self.state())
        if name == "latest.pth":
            self.save_due = time.monotonic() + 60 * self.args.save_minutes
        return path

    def train_step(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """One step of Ho et al.'s Algorithm 1 on images x0 (B,C,H,W); returns its loss and gradient norm."""
        t = torch.randint(self.args.time_steps, (len(x0),), device=self.device)  # (B,)
        eps = torch.randn_like(x0)  # (B, C, H, W)
        with utils.autocast(self.device, self.precision):
            loss = self.diffusion.loss(self.model, x0, t, eps)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        if not norm.isfinite():  # clipping has spread it to every gradient: the step would ruin the weights
            raise errors.UserError(
                f"training diverged: the gradient of step {self.step + 1} is {norm.item()}; nothing was saved since "
                f"latest.pth. Reduce --learning_rate (now {self.args.learning_rate:g})"
            )
        self.optimizer.step()
        self.ema.update(self.model)
        return loss.detach(), norm

    def train_epoch(self, monitor: Monitor, signals: StopSignals) -> None:
        """The batches that the epoch still lacks. On a signal raises Interrupted after a step, the state whole."""
        args = self.args
        monitor.start_epoch(self.epoch + 1, args.epochs, self.step)
        batches = dataset.batches(
            self.images, self.labels, args.batch_size, args.seed, self.epoch, self.device, skip=self.batch
        )
        for x0, _ in batches:
            loss, norm = self.train_step(x0)
            self.step += 1
            self.batch += 1
            self.loss_sum += loss
            monitor.count_step(self.step, loss, norm, args.learning_rate)
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
        monitor.show_validation(self.step, val_loss, samples)  # before saving: what a checkpoint counts is on disk
        if improved:
            self.save("best.pth")
        if last:
            self.save("final.pth")
        # Pictures come before latest.pth, for what that counts is never drawn again.
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
            self.ema.model, self.diffusion, self.held_out, args.seed, args.batch_size, look
        )

    def sample_grid(self, signals: StopSignals) -> Tensor:
        """NUM_SAMPLES images of the averaged weights as one picture (C,H,W) uint8, from the same noise every time."""
        model, args = self.ema.model, self.args
        generator = pipeline.Generator(model, self.diffusion, args.sampler, args.steps, args.eta, self.precision)
        batches = generator.generate(args.seed, args.num_samples, args.batch_size, lambda x_t: signals.check())
        return utils.image_grid(torch.cat(list(batches)))

    def run(self) -> int:
        """Train to the last epoch, or until a signal; returns the exit status."""
        args = self.args
        directory, steps = Path(args.log_path) / "tensorboard", args.epochs * self.batches_per_epoch
        with (
            Monitor(directory, self.step, steps, args.batch_size, args.log_every) as monitor,
            logging_redirect_tqdm(),
            StopSignals() as signals,
        ):
            try:
                while self.epoch < args.epochs:
                    self.train_epoch(monitor, signals)
                    self.finish_epoch(monitor, signals)
            except Interrupted as stop:
                latest = self.save("latest.pth")
                log.warning("%s: saved step %d in %s; the same command goes on from there", stop, self.step, latest)
                return 128 + stop.number
            except OSError:  # a curve or a picture could not be written: that must not cost the training
                self.save("latest.pth")
                raise
        log.info("done; next: sample.py or eval.py, with --checkpoint %s", Path(args.checkpoint_path, "best.pth"))
        return 0


def clear(earlier: list[Path], overwrite: bool) -> None:
    """Make room for --fresh: delete an earlier run's checkpoints with --overwrite, refuse without."""
    if earlier and not overwrite:
        names = ", ".join(map(str, earlier))
        raise errors.SettingError(f"--fresh would lose {names}: add --overwrite, or give other paths")
    for path in earlier:
        path.unlink()


def main(args: argparse.Namespace) -> int:
    utils.make_directories({name: getattr(args, name) for name in ("checkpoint_path", "output_path", "log_path")})
    with lock.hold(Path(args.checkpoint_path)):
        trainer = Trainer(args)
        earlier = checkpoint.of_run(Path(args.checkpoint_path))
        if args.fresh:  # only now: a run that cannot start must not cost the old one
            clear(earlier, args.overwrite)
        elif earlier:
            trainer.resume(earlier[0])
        log.info(describe(args, trainer.model, trainer.device, trainer.precision, len(trainer.images)))
        if trainer.epoch >= args.epochs:
            log.info("nothing to do: %d epochs are done; raise --epochs, or start anew with --fresh", trainer.epoch)
            return 0
        return trainer.run()


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "train.py", ARGS.quiet)
