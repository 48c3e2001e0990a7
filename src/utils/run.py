"""The checkpoints of one training run: what they hold, when latest.pth is due, and how a run goes on from one."""

import argparse
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from src.utils import checkpoint, cores, fine_tuning, identity, settings
from src.utils.distributed import World
from src.utils.errors import SettingError, UserError

log = logging.getLogger("train")

WEIGHTS_ONLY = ("settings", "trained_on", "init_from", "epoch", "step", "ema")  # what weights.pth holds of a state
RESULTS = {  # of a run, beside its checkpoints
    "output_path": ("samples_epoch_*.png", "losses.png"),
    "log_path": ("scalars.jsonl", "tensorboard/events.out.tfevents.*"),
}


class Trainable(Protocol):
    """What is trained; `src.training.Learner` is one."""

    model: Any  # the network
    ema: Any  # its `model` has the averaged weights
    epoch: int  # how many are done
    batch: int  # how many of the next epoch are done
    steps: int

    def synchronize(self) -> None:
        """Raise if the state must not be saved."""

    def state(self) -> dict[str, Any]:
        """Everything that further steps depend on."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""

    def start_from_network(self) -> None:
        """Give the network's present weights to the average and, if there is one, to the teacher."""


class Run:
    """Writes and reads the checkpoints of a run in CHECKPOINT_PATH.

    Args:
        args: of train.py.
        learner: what is trained.
        world: the processes; only the main one writes.
        values: the settings that rebuild the network and that a resumed run must repeat, with
            "classes" and "class_counts".
        data: fingerprint of the training images.
        digests: short hashes of their files, (N,) int64; none (0,) for a data set with files of other kinds.
        precision: of the network's arithmetic, since PRECISION may be auto.

    Attributes:
        save_due: when latest.pth is to be written next, within an epoch, too; as `time.monotonic()`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        learner: Trainable,
        world: World,
        values: Mapping[str, Any],
        data: str,
        digests: torch.Tensor,
        precision: str,
    ) -> None:
        self.args, self.learner, self.world = args, learner, world
        self.values, self.data, self.digests, self.precision = values, data, digests, precision
        self.init_from: dict[str, str] | None = None  # the file that the run started from, and its SHA-256
        self.save_due = time.monotonic() + 60 * args.save_minutes

    def save(self, name: str) -> Path:
        """Write the state of the run, or for weights.pth what sampling needs of it, to CHECKPOINT_PATH/name."""
        path = Path(self.args.checkpoint_path) / name
        self.learner.synchronize()  # in every process: if one alone raised, the others would wait for it
        if self.world.is_main:
            state = {
                "settings": {key: value for key, value in self.values.items() if not key.endswith("_path")},
                "data": self.data,
                "trained_on": identity.record(self.digests),
                "init_from": self.init_from,
                "precision": self.precision,
                "threads": torch.get_num_threads(),
                **self.learner.state(),
            }
            kept = WEIGHTS_ONLY if name == "weights.pth" else state
            checkpoint.save(path, {key: state[key] for key in kept})
        if name == "latest.pth":
            self.save_due = time.monotonic() + 60 * self.args.save_minutes
        return path

    def clear(self) -> None:
        """Delete the earlier run, so that a new one can start: its checkpoints, pictures and logs.

        Raises:
            SettingError: it left checkpoints, and --overwrite is not given.
        """
        earlier = checkpoint.clear(Path(self.args.checkpoint_path), self.args.overwrite)
        for setting, patterns in RESULTS.items() if earlier else ():  # else the pictures are those of another run
            for pattern in patterns:
                for path in filter(Path.is_file, Path(getattr(self.args, setting)).glob(pattern)):
                    path.unlink()

    def start_from(self, path: Path) -> None:
        """Start from the averaged weights in checkpoint `path`; raises as `fine_tuning.initialise` does."""
        ignore = self.args.ignore_mismatched_sizes
        sha256 = fine_tuning.initialise(self.learner.model, self.values, path, ignore)
        self.world.agree(sha256, str(path))
        self.learner.start_from_network()
        self.init_from = {"file": path.name, "sha256": sha256}
        log.info("starting from the averaged weights of %s", path)

    def resume(self, path: Path) -> None:
        """Go on from checkpoint `path`.

        Raises:
            UserError: the file cannot be read, or holds weights only.
            SettingError: it was trained with other settings, images or classes, or from other weights.
        """
        state = checkpoint.load(path)
        self._check(path, state)
        self.init_from = state.get("init_from")
        with checkpoint.explained(path):
            self.learner.load(state)
        learner = self.learner
        if learner.batch and (threads := state.get("threads")):  # another number would add in another order
            cores.use(threads, "as before in this epoch")
            if torch.get_num_threads() != threads:
                log.warning("from here on, %d threads compute, not %d as before", torch.get_num_threads(), threads)
        log.info("RESUMING %s: %d of %d epochs done, step %d", path, learner.epoch, self.args.epochs, learner.steps)

    def _check(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Compare the content of a checkpoint with this run, and warn of the changes that are allowed."""
        args = self.args
        if "model" not in saved or "optimizer" not in saved:
            raise UserError(f"{path} holds no training to resume: move it away, or give another --checkpoint_path")
        before, gone = saved["settings"], self._gone(saved)
        wanted = dict(self.values)
        if "val_size" not in args.given and 0 < before["val_size"] - wanted["val_size"] <= gone:
            del wanted["val_size"]  # a tenth of fewer images
        refused, noted = settings.changes(before, wanted)
        if refused:
            raise SettingError(
                f"{path} cannot be resumed: {'; '.join(refused)}. Use the old values, or for a new run "
                "other paths (--run DIR, or --checkpoint_path, --output_path, --log_path)"
            )
        start = saved.get("init_from") or {}
        if args.init_from and not _same_file(Path(args.init_from), start):
            raise SettingError(
                f"{path} cannot be resumed with --init_from {args.init_from}: it did not start from that file. "
                "Leave the flag out to go on, or start a new run with other paths"
            )
        for change in noted:
            log.warning("from here on, %s", change)
        if gone:
            log.warning("from here on, the training goes on without %d images that have gone", gone)
        if (saved.get("data") != self.data and not gone) or before.get("classes") != self.values["classes"]:
            raise SettingError(
                f"{path} cannot be resumed: the images or classes in {args.data_path} are not those that it was "
                "trained on. Bring them back, or use other paths for a new run"
            )
        if (precision := saved.get("precision", self.precision)) != self.precision:
            log.warning("from here on, the network computes in %s, not in %s as before", self.precision, precision)
        if before["epochs"] != args.epochs and args.lr_decay:
            log.warning("from here on, the learning rate is that of a training of %d epochs", args.epochs)

    def _gone(self, saved: Mapping[str, Any]) -> int:
        """How many of the files that a checkpoint was trained on have gone; 0 if others have come, or if unknown."""
        recorded = saved.get("trained_on", {"count": 0})
        fewer = recorded["count"] - len(self.digests)
        return fewer if 0 < fewer < recorded["count"] and not identity.known(recorded, self.digests)[1] else 0


def _same_file(path: Path, start: Mapping[str, str]) -> bool:
    """Whether a run that began with the weights `start` began with this file; by its name alone if it has gone."""
    if not path.is_file():
        return path.name == start.get("file")
    return checkpoint.sha256(path) == start.get("sha256")
