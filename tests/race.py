"""Who makes better images after the same minutes of training, this repository or its peers?

    pip install denoising-diffusion-pytorch diffusers    # those that are installed take part
    python tests/race.py --minutes 5 10 20 30            # prints tables, writes outputs/race.json and race.png

They train in turns of ten seconds, on the same batches: whatever else the machine does falls on all alike. This
repository trains as train.py does by default, in bfloat16 where that is fast and with classes. The peers have our
widths and batch size, and otherwise the network, target, schedule, optimiser and average of their authors, in float32,
without classes, and without random flips and changes of the learning rate (contestants.py). After each of the minutes,
the averaged weights of each generate images through the noise schedule that they were trained for. All are sampled by
this repository's default sampler: the thousand steps of the peers' own would take hours. FID is against the test
images."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
Row = dict[str, Any]

TURN = 10.0  # seconds


def race(
    racers: Sequence[Contestant], drawn: Sequence[Batches], minutes: Sequence[float], score: Score
) -> Iterator[list[Row]]:
    """Train the contestants on the batches `drawn` for each, in turns, and score them after each of the `minutes`.

    Yields, after each of the minutes, which ascend, a row for each contestant: name, minutes, images seen and score.
    """
    seconds, seen = [0.0] * len(racers), [0] * len(racers)
    for goal in minutes:
        while min(seconds) < 60 * goal:
            for i, racer in enumerate(racers):
                pause = min(seconds[i] + TURN, 60 * goal)
                while seconds[i] < pause:
                    start = time.perf_counter()
                    x0, y = next(drawn[i])
                    racer.train_step(x0, y)
                    if torch.accelerator.is_available():
                        torch.accelerator.synchronize()
                    seconds[i] += time.perf_counter() - start
                    seen[i] += len(x0)
            log.info(
                "%.1f of %g minutes: %s images", min(seconds) / 60, minutes[-1], ", ".join(f"{n:,}" for n in seen)
            )
        yield [
            {"name": racer.name, "minutes": goal, "images": images, "fid": score(racer)}
            for racer, images in zip(racers, seen, strict=True)
        ]


def scorer(run: train.Trainer, count: int, steps: int) -> Score:
    """The FID of `count` images of a contestant, in so many steps, against the test images of this training's data."""
    extractor, args = inception.Extractor(inception.weights()).to(run.device), run.args
    test, _ = datasets.load(args.dataset, args.data_path, "test", args.image_size, args.channels)
    real = metrics.reference_features(test, extractor)

    def fid(contestant: Contestant) -> float:
        network = contestant.averaged()
        how = {
            "steps": steps,
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


def table(rows: list[Row]) -> str:
    """A line for each contestant, a column for each of the minutes: FID, and images seen."""
    minutes = sorted({row["minutes"] for row in rows})
    lines = [["FID (images seen) after", *(f"{m:g} minutes" for m in minutes)]]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = {row["minutes"]: f"{row['fid']:.1f} ({row['images']:,})" for row in rows if row["name"] == name}
        lines.append([name, *(cells.get(m, "") for m in minutes)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: list[Row], path: Path) -> None:
    """FID against minutes of training, a curve for each contestant."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        axes.plot([row["minutes"] for row in mine], [row["fid"] for row in mine], marker="o", label=name)
    axes.set_yscale("log", subs=(2, 5))  # ticks at 10, 20, 50, ...
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    axes.set(xlabel="minutes of training", ylabel="FID (lower is better)")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: argparse.Namespace) -> int:
    device = devices.pick_device("auto")
    given = ["--data_path", args.data_path] if args.data_path else []
    run = train.Trainer(flags.Parser(config, "", settings.of_script("train")).parse_args(given), World(device))
    score = scorer(run, args.num_samples, args.steps)
    racers = [contestants.ours("this repository", run), *contestants.peers(device)]
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for news in race(racers, [contestants.batches(run) for _ in racers], args.minutes, score):
        rows += news
        (args.output / "race.json").write_text(json.dumps(rows, indent=1) + "\n")
        plot(rows, args.output / "race.png")
        print(table(rows), flush=True)
    print(f"\n{devices.describe_device(device, run.precision)}, torch {torch.__version__}")
    log.info("wrote race.json and race.png to %s", args.output)
    return 0


if __name__ == "__main__":
    errors.prepare("race.py")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20, 30], help="of training, ascending")
    parser.add_argument("--num_samples", type=int, default=5000, help="images in each FID (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="sampling steps (default: the sampler's own)")
    parser.add_argument("--data_path", default="", help="directory of Fashion-MNIST (default: that of config.py)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="directory of the results")
    errors.run(lambda: main(parser.parse_args()), "race.py", False)
