"""A small classifier of the data set's own classes, and the scores that can be had with it.

Inception knows photographs, and is slow; this network knows exactly this data set, takes minutes to train and
seconds for a thousand images. What it sees gives the same scores as Inception's features, and besides which
classes a model makes, and whether it makes those that it was asked for. Each training set has one classifier,
trained once and kept. Scores through different ones (see `sha256`) cannot be compared.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src import cache  # a training takes minutes
from src.dataset import batches, normalise  # every network is fed by them
from src.devices import autocast, float32_kernels, pick_precision  # how each device is to compute
from src.metrics import Extractor, Scores  # which take any network that gives features and logits
from src.utils import Rows, progress  # labels of all images; the one rule of when a bar is shown

log = logging.getLogger(__name__)

EPOCHS = 6
BATCH_SIZE = 128
LEARNING_RATE = 4e-3  # at the peak of one cycle up and down (Smith & Topin 2018)
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.05
RECIPE = "classifier of three convolutions, version 1"  # raise it with any change of network or training

NOT_ASKED = -1  # the label of an image that was made without one

# Scores' names → those of the same scores through the classifier.
NAMES = {
    "fid": "classifier_fd",
    "kid_mean": "classifier_kd_mean",
    "kid_std": "classifier_kd_std",
    "precision": "classifier_precision",
    "recall": "classifier_recall",
    "inception_score_mean": "classifier_score_mean",
    "inception_score_std": "classifier_score_std",
}
SCORES = (*NAMES.values(), "class_histogram", "class_accuracy")  # all that `ClassifierScores` gives


class Classifier:
    """A `metrics.Extractor`: images (B, C, H, W) uint8 → features (B, 128) and logits (B, K), float32.

    Args:
        network: a trained one, as `trained` makes it.
    """

    name = RECIPE
    num_features = 128
    has_logits = True

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sha256 = cache.key(self.name, *network.state_dict().values())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = next(self.network.parameters()).device
        with float32_kernels(device, fast=False):
            features = self.network[:-1](_layout(normalise(images.to(device))))
            return features, self.network[-1](features)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images (N, C, H, W) uint8 that are classified as their labels (N,) say."""
        parts = [self(batch)[1].argmax(1).cpu() for batch in images.split(256)]
        return (torch.cat(parts) == labels).float().mean().item()


def trained(
    images: Tensor, labels: Tensor, classes: int, device: torch.device, cache_folder: Path | None = None
) -> Classifier:
    """The classifier of a training set: trained now, about 2 minutes on a CPU, or found where it was kept.

    On one machine's CPU, with one number of threads, it is the same to the last bit. It is kept in
    `cache.folder()` unless told otherwise, and found again by the hash of images, labels and recipe.

    Args:
        images: (N, C, H, W) uint8 in [0, 255], H and W at least 16.
        labels: (N,) int64, from 0 to classes - 1.
        classes: how many there are, two at the least.
    """
    network = _network(images.shape[1], classes).to(device)

    def fit() -> dict[str, Any]:
        _train(network, images, labels, device)
        return {"weights": {name: tensor.cpu() for name, tensor in network.state_dict().items()}}

    key = cache.key(f"{RECIPE}, {classes} classes", images, labels)
    network.load_state_dict(cache.recall(f"classifier-{len(images)}", key, fit, cache_folder)["weights"])
    return Classifier(network)


def _network(channels: int, classes: int) -> nn.Sequential:
    """Features are what comes out of the last layer but one. The weights are the same every time."""

    def stage(inward: int, outward: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inward, outward, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outward), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):  # weights are drawn from the CPU's global generator
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


def _train(network: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> None:
    batch_size = min(BATCH_SIZE, len(images))
    steps = EPOCHS * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    precision = pick_precision("auto", device)
    network.train()
    with progress(log, total=steps, desc="training the classifier", unit="batch") as bar:
        for epoch in range(EPOCHS):
            for x, y in batches(images, labels, batch_size, seed=0, epoch=epoch, device=device):
                with autocast(device, precision):
                    loss = loss_of(network(_layout(x)), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


def _layout(x: Tensor) -> Tensor:
    """Channels last in memory, in which convolutions are fastest on a CPU."""
    return x.contiguous(memory_format=torch.channels_last)


class ClassifierScores:
    """Scores of generated images through a classifier, and the classes it finds in them.

    Args:
        classifier: any `metrics.Extractor` whose logits are of the data set's classes.
        reference: what it sees in real images (N, D), as `metrics.reference_features` returns it.
        classes: their names, in the order of the logits.
        seed: of random subsets and splits.
    """

    def __init__(self, classifier: Extractor, reference: Tensor, classes: Sequence[str], seed: int = 0) -> None:
        self.scores, self.classes = Scores(classifier, reference, seed), classes
        self.labels = Rows()

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Take in generated images (B, C, H, W), uint8, and which classes (B,) were asked for, if any were."""
        self.scores.update(images)
        self.labels.append(torch.full((len(images),), NOT_ASKED) if labels is None else labels)

    def compute(self) -> dict[str, Any]:
        """The scores of all images so far.

        Returns:
            The scores of `metrics.Scores` under the names in NAMES, and its counts; `class_histogram`, how many
            images are classified as each class, by its name; `class_accuracy`, the share of images that are
            classified as asked, None where nothing was asked; `notes`.

        `classifier_precision` compares images that resemble the data. Far from the data it is unreliable: noise may
        score as high as real images, depending on how the processor rounded the classifier's training. Believe it only
        beside a low `classifier_fd`.
        """
        scores = self.scores.compute()
        found = self.scores.logits.all().argmax(1) if self.scores.logits else torch.empty(0, dtype=torch.long)
        wanted = self.labels.all() if self.labels else found
        asked = wanted != NOT_ASKED
        counts = found.bincount(minlength=len(self.classes)).tolist()
        return {
            **{name: scores[name] for name in ("num_images", "num_reference_images")},
            **{new: scores[old] for old, new in NAMES.items()},
            "class_histogram": dict(zip(self.classes, counts, strict=True)),
            "class_accuracy": (found == wanted)[asked].double().mean().item() if asked.any() else None,
            "notes": [f"Through the classifier: {note}" for note in scores["notes"]],
        }
