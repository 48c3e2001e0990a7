"""A small classifier of the data set's own classes, and the scores through it.

Inception is slow and was trained on photographs. This network is trained on the data set itself, which takes minutes,
and classifies a thousand images in seconds. Its features give the same scores as Inception's. Its logits also tell
which classes a model generates, and whether they are those that it was asked for. Each training set has one
classifier, which is trained once and cached. Scores through different classifiers (see `Classifier.sha256`) cannot be
compared.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.data.datasets import batches, normalise
from src.data.images import Images
from src.diffusion import send
from src.model import autocast
from src.scores.metrics import Extractor, Scores
from src.scores.rows import Rows
from src.utils import cache
from src.utils.devices import float32_kernels, pick_precision
from src.utils.progress import progress

log = logging.getLogger(__name__)

EPOCHS = 6
BATCH_SIZE = 128
LEARNING_RATE = 4e-3  # peak of the one-cycle schedule (Smith & Topin 2018)
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.05
RECIPE = "classifier of three convolutions, version 1"  # key of the cache: raise it if network or training change

NO_CLASS = -1  # label of an image that was generated without a class

# Name of a score of `metrics.Scores` → its name through the classifier
NAMES = {
    "fid": "classifier_fd",
    "kid_mean": "classifier_kd_mean",
    "kid_std": "classifier_kd_std",
    "precision": "classifier_precision",
    "recall": "classifier_recall",
    "inception_score_mean": "classifier_score_mean",
    "inception_score_std": "classifier_score_std",
}
SCORES = (*NAMES.values(), "class_histogram", "class_accuracy")  # all scores of `ClassifierScores`


class Classifier:
    """A trained classifier as a `metrics.Extractor`: images (B, C, H, W) uint8 → features (B, 128), logits (B, K).

    Args:
        network: with trained weights; its last layer maps features to logits.
    """

    name = RECIPE
    num_features = 128
    has_logits = True

    def __init__(self, network: nn.Sequential) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sha256 = cache.key(self.name, *network.state_dict().values())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = next(self.network.parameters()).device
        with float32_kernels(device, fast=False):
            features = self.network[:-1](_layout(normalise(images.to(device))))
            return features, self.network[-1](features)

    def accuracy(self, images: Images, labels: Tensor) -> float:
        """The share of images (N, C, H, W) uint8 that are classified correctly, given their labels (N,) int64."""
        bar = {"total": -(-len(images) // 256), "desc": "testing the classifier", "unit": " batches"}
        parts = [self(batch)[1].argmax(1).cpu() for batch in progress(log, iterable=images.split(256), **bar)]
        return (torch.cat(parts) == labels).float().mean().item()


def trained(
    images: Images,
    labels: Tensor,
    classes: int,
    device: torch.device,
    cache_folder: Path | None = None,
) -> Classifier:
    """Return the classifier of a training set from the cache, or train and cache it, about 2 minutes on a CPU.

    Training is deterministic to the bit on one machine's CPU with one number of threads.

    Args:
        images: (N, C, H, W) uint8 in [0, 255], H and W at least 16.
        labels: (N,) int64, from 0 to classes - 1.
        classes: their number, at least 2.
        device: of the training and of the classifier.
        cache_folder: directory of the cache; None means `cache.folder()`.
    """
    network = _network(images.shape[1], classes).to(device)

    def fit() -> dict[str, Any]:
        log.info("training the classifier, which is then cached: about two minutes on one core for 60,000 images")
        _train(network, images, labels, device)
        return {"weights": {name: tensor.cpu() for name, tensor in network.state_dict().items()}}

    key = cache.key(f"{RECIPE}, {classes} classes", images, labels)
    network.load_state_dict(cache.recall(f"classifier-{len(images)}", key, fit, cache_folder)["weights"])
    return Classifier(network)


def _network(channels: int, classes: int) -> nn.Sequential:
    """Build the network with random weights, always the same; the last layer but one gives the features."""

    def stage(inward: int, outward: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inward, outward, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outward), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):  # PyTorch draws the weights from the CPU's global generator
        torch.default_generator.manual_seed(0)
        body = nn.Sequential(
            *stage(channels, 32, stride=2),  # (B, 32, H/2, W/2)
            *stage(32, 64),
            nn.MaxPool2d(2),  # (B, 64, H/4, W/4)
            *stage(64, 128),
            nn.AdaptiveMaxPool2d(4),  # (B, 128, 4, 4), whatever H and W
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, Classifier.num_features),
            nn.ReLU(),
        )
        return body.append(nn.Linear(Classifier.num_features, classes)).to(memory_format=torch.channels_last)


def _train(network: nn.Module, images: Images, labels: Tensor, device: torch.device) -> None:
    batch_size = min(BATCH_SIZE, len(images))
    steps = EPOCHS * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    precision = pick_precision("auto", device)
    network.train()
    with (
        float32_kernels(device, fast=False),
        progress(log, total=steps, desc="training the classifier", unit=" batches") as bar,
    ):
        for epoch in range(EPOCHS):
            for x, y in batches(images, labels, batch_size, seed=0, epoch=epoch):
                with autocast(device, precision):
                    loss = loss_of(network(_layout(send(x, device))), send(y, device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


def _layout(x: Tensor) -> Tensor:
    """Put the channels last in memory: the fastest layout for convolutions on a CPU."""
    return x.contiguous(memory_format=torch.channels_last)


class ClassifierScores:
    """Scores of generated images through a classifier, and the classes that it assigns to them.

    Args:
        classifier: any `metrics.Extractor` whose logits are of the data set's classes.
        reference: features of real images, (N, D), from `metrics.reference_features`.
        classes: names of the classes, in the order of the logits.
        seed: of the random subsets and splits in `metrics.Scores`.
    """

    def __init__(self, classifier: Extractor, reference: Tensor, classes: Sequence[str], seed: int = 0) -> None:
        self.scores, self.classes = Scores(classifier, reference, seed), classes
        self.labels = Rows()

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Add generated images (B, C, H, W) uint8 and the classes that were asked for, (B,) int64, if any."""
        self.scores.update(images)
        self.labels.append(torch.full((len(images),), NO_CLASS) if labels is None else labels)

    def compute(self) -> dict[str, Any]:
        """Compute the scores of all images so far.

        `classifier_precision` is meant for images that resemble the data. For others, such as noise, it may be as high
        as for real images, depending on how the processor rounded the classifier's training. It means something only
        if `classifier_fd` is low.

        Returns:
            The scores of `metrics.Scores` under the names in NAMES, and its counts; `class_histogram`, the number of
            images classified as each class, by its name; `class_accuracy`, the share of images that are classified as
            asked, None if no class was asked for; `notes`, a list of sentences.
        """
        scores = self.scores.compute()
        predicted = self.scores.logits.all().argmax(1) if self.scores.logits else torch.empty(0, dtype=torch.long)
        wanted = self.labels.all() if self.labels else predicted
        asked = wanted != NO_CLASS
        counts = predicted.bincount(minlength=len(self.classes)).tolist()
        return {
            **{name: scores[name] for name in ("num_images", "num_reference_images")},
            **{new: scores[old] for old, new in NAMES.items()},
            "class_histogram": dict(zip(self.classes, counts, strict=True)),
            "class_accuracy": (predicted == wanted)[asked].double().mean().item() if asked.any() else None,
            "notes": [f"Through the classifier: {note}" for note in scores["notes"]],
        }
