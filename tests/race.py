"""Who makes better images after the same minutes of training? This repository and its peers, all at their defaults.

    pip install denoising-diffusion-pytorch diffusers    # those that are installed take part
    python tests/race.py --minutes 5 10 20 30            # prints a table, writes outputs/race.json and race.png

Each is trained in turn for the last of these minutes, on the same batches, with its authors' defaults (the networks of
the peers have our widths, see contestants.py). The clock stands still while it is scored: after each of the minutes,
its averaged weights generate images through the noise schedule that it was trained for. All are sampled by this
repository's default sampler, because the thousand steps of the peers' own would take hours. FID is against the test
images. A contestant whose rows are in race.json already is not trained again.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository's root, whatever the working directory
import contestants
from contestants import Batches, Contestant

import config
import train
from src.data import datasets
from src.generation import Generator
from src.scores import inception, metrics
from src.utils import devices, errors, flags, settings
from src.utils.distributed import World
from src.utils.progress import progress

log = logging.getLogger("race")

Score = Callable[[Contestant], float]


def race(contestant: Contestant, batches: Batches, minutes: Sequence[float], score: Score) -> list[dict[str, Any]]:
    """Train a contestant, and score it whenever one of the `minutes`, in ascending order, has passed.

    Returns:
        A row for each of the minutes: the contestant's name, minutes, images seen and score.
    """
    rows, seen, seconds = [], 0, 0.0
    with progress(log, total=round(60 * minutes[-1]), unit=" s", desc=contestant.name) as bar:
        for goal in minutes:
            while seconds < 60 * goal:
                start = time.perf_counter()
                x0, y = next(batches)
                contestant.train_step(x0, y)
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                seen += len(x0)
                bar.update(step := time.perf_counter() - start)
                seconds += step
            rows.append({"name": contestant.name, "minutes": goal, "images": seen, "fid": score(contestant)})
            log.info("%(name)s after %(minutes)g minutes, %(images)d images: FID %(fid).2f", rows[-1])
    return rows


def scorer(run: train.Trainer, count: int) -> Score:
    """The FID of `count` images of a contestant against the test images of this training's data set."""
    extractor, args = inception.Extractor(inception.weights()).to(run.device), run.args
    test, _ = datasets.load(args.dataset, args.data_path, "test", args.image_size, args.channels)
    real = metrics.reference_features(test, extractor)

    def fid(contestant: Contestant) -> float:
        network = contestant.averaged()
        how = {
            "precision": contestant.precision,
            "class_counts": run.values["class_counts"] if network.label is not None else (),
        }
        generator = Generator(network, contestant.diffusion, **how)
        features = []
        with progress(log, total=count, unit=" images", desc="scoring") as bar:
            for indices in torch.arange(count).split(250):
                features.append(extractor(generator.images(0, indices.tolist()))[0].cpu())
                bar.update(len(indices))
        return metrics.frechet_distance(real, torch.cat(features))

    return fid


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each contestant, a column for each of the minutes: FID, and images seen."""
    minutes = sorted({row["minutes"] for row in rows})
    lines = [["FID (images seen) after", *(f"{m:g} minutes" for m in minutes)]]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = {row["minutes"]: f"{row['fid']:.1f} ({row['images']:,})" for row in rows if row["name"] == name}
        lines.append([name, *(cells.get(m, "") for m in minutes)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """FID against minutes of training, a curve for each contestant."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        axes.plot([row["minutes"] for row in mine], [row["fid"] for row in mine], marker="o", label=name)
    axes.set(xlabel="minutes of training", ylabel="FID (lower is better)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: argparse.Namespace) -> int:
    device = devices.pick_device("auto")
    given = ["--data_path", args.data_path] if args.data_path else []
    run = train.Trainer(flags.Parser(config, "", settings.of_script("train")).parse_args(given), World(device))
    score = scorer(run, args.num_samples)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "race.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for make in (lambda _: contestants.ours("this repository", run), *contestants.PEERS):
        try:
            contestant = make(device)
        except ImportError as error:
            log.warning("left out: %s (%s)", make.__name__, error)
            continue
        if contestant.name not in {row["name"] for row in rows}:
            rows += race(contestant, contestants.batches(run), args.minutes, score)
            path.write_text(json.dumps(rows, indent=1) + "\n")  # at once: the next contestant may take an hour
            plot(rows, args.output / "race.png")
    print(f"{devices.describe_device(device, run.precision)}, torch {torch.__version__}\n")
    print(table(rows))
    log.info("results: %s, %s", path, args.output / "race.png")
    return 0


if __name__ == "__main__":
    errors.prepare("race.py")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20, 30], help="of training, ascending")
    parser.add_argument("--num_samples", type=int, default=5000, help="images in each FID (default: %(default)s)")
    parser.add_argument("--data_path", default="", help="directory of Fashion-MNIST (default: that of config.py)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="directory of the results")
    errors.run(lambda: main(parser.parse_args()), "race.py", False)
