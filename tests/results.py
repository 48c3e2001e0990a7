"""Write the table of scores in the README anew from the files in weights/scores: python tests/results.py

`--pictures` makes the pictures of README and docs, first. `--scores` runs the evaluations of SCORES that are missing,
or whose file is of other weights or another way of sampling; `--scores NAME ...` runs those named. Each file holds the
scores and their whole protocol. With Inception on a CPU they take hours.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository's root, whatever the working directory
import config
from src.diffusion import Diffusion
from src.samplers import SAMPLERS, time_grid

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "weights/scores"
BEGIN, END = "<!-- scores: written by tests/results.py -->\n", "<!-- end of scores -->\n"

PICTURES = {  # file in docs → flags of sample.py, the file that it writes, and how much each pixel is enlarged
    "classes.png": ("--class all --num_samples 100 --guidance_scale 1.5", "grid.png", 3),
    "interpolation.png": ("--class bag --num_samples 1 --interpolate --seed 7", "interpolation.png", 3),
    "denoising.gif": ("--num_samples 16 --gif", "denoising.gif", 2),
}
# For docs/editing.png: corners of polygons, in pixels of 28×28, and the strengths.
SHIRT = ((8, 2), (19, 2), (27, 8), (23, 13), (19, 10), (19, 25), (8, 25), (8, 10), (4, 13), (0, 8))
SIDES = ((0, 0), (7, 0), (7, 27), (0, 27)), ((20, 0), (27, 0), (27, 27), (20, 27))
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
SCORES = {  # file in weights/scores → weights, and flags of eval.py
    "fashion-mnist": ("fashion-mnist.pth", "--num_samples 10000 --batch_size 500"),
    "fashion-mnist-30-steps": ("fashion-mnist.pth", "--num_samples 10000 --batch_size 500 --steps 30"),
    "fashion-mnist-held_out": ("fashion-mnist.pth", "--num_samples 10000 --batch_size 500 --reference held_out"),
    "fashion-mnist-train": ("fashion-mnist.pth", "--num_samples 50000 --batch_size 500 --reference train"),
    "fashion-mnist-fast-1": ("fashion-mnist-fast.pth", "--num_samples 10000 --batch_size 500 --steps 1"),
    "fashion-mnist-fast-2": ("fashion-mnist-fast.pth", "--num_samples 10000 --batch_size 500 --steps 2"),
    "fashion-mnist-fast-4": ("fashion-mnist-fast.pth", "--num_samples 10000 --batch_size 500 --steps 4"),
}
COLUMNS = {  # of the table → score, and digits after the point
    "FID": ("fid", 2),
    "KID": ("kid_mean", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "classifier distance": ("classifier_fd", 2),
    "class accuracy": ("class_accuracy", 3),
}


def sha256(file: str) -> str:
    return hashlib.sha256((ROOT / "weights" / file).read_bytes()).hexdigest()


def run(script: str, weights: str, flags: str, output: str) -> None:
    """Run sample.py or eval.py with the weights."""
    command = [sys.executable, str(ROOT / script), "--checkpoint", f"weights/{weights}", *flags.split()]
    subprocess.run([*command, "--output_dir", output], cwd=ROOT, check=True)


def draw() -> None:
    """Make all pictures."""
    for name, (flags, product, scale) in PICTURES.items():
        with tempfile.TemporaryDirectory() as scratch:
            run("sample.py", "fashion-mnist.pth", flags, scratch)
            enlarge(Path(scratch, product), ROOT / "docs" / name, scale)
    draw_editing()


def enlarge(source: Path, target: Path, scale: int) -> None:
    """Copy a picture or an animation with each pixel as scale × scale: browsers would blur it."""
    with Image.open(source) as picture:
        frames, durations = [], []
        for frame in ImageSequence.Iterator(picture):
            durations.append(frame.info.get("duration", 0))
            size = scale * frame.width, scale * frame.height
            frames.append(frame.convert("L").resize(size, Image.Resampling.NEAREST))
        several = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
        frames[0].save(target, **(several if len(frames) > 1 else {"optimize": True}))


def draw_editing() -> None:
    """Make docs/editing.png: a sketch and what becomes of it by strength; a result, a mask and three inpaintings."""
    with tempfile.TemporaryDirectory() as scratch:
        sketch, mask = Path(scratch, "sketch.png"), Path(scratch, "mask.png")
        polygons(SHIRT, grey=150).save(sketch)
        ImageOps.expand(polygons(*SIDES, grey=255), 2).save(mask)  # padded to the size of the generated shirt

        def edit(image: Path, name: str, flags: str) -> list[Path]:
            run("sample.py", "fashion-mnist.pth", f"--start_from {image} --seed 9 {flags}", f"{scratch}/{name}")
            return sorted(Path(scratch, name).glob("sample_*.png"))

        results = [edit(sketch, f"{s}", f"--strength {s} --class t-shirt --num_samples 1")[0] for s in STRENGTHS]
        shirt = results[STRENGTHS.index(0.7)]
        inpainted = edit(shirt, "inpainted", f"--inpaint {mask} --class pullover --num_samples 3")
        captions = ["sketch", *(f"strength {s}" for s in STRENGTHS), "image", "mask", *["result"] * len(inpainted)]
        picture = captioned([sketch, *results, shirt, mask, *inpainted], captions, columns=5)
        picture.save(ROOT / "docs/editing.png", optimize=True)


def polygons(*corners: tuple[tuple[int, int], ...], grey: int) -> Image.Image:
    """Polygons of one grey level on black, 28×28."""
    image = Image.new("L", (28, 28))
    for polygon in corners:
        ImageDraw.Draw(image).polygon(polygon, fill=grey)
    return image


def captioned(files: list[Path], captions: list[str], columns: int, scale: int = 4, line: int = 22) -> Image.Image:
    """A grid of images of 32×32, or of 28×28 with a frame, each pixel as scale × scale, below its caption."""
    width, height = 34 * scale, 34 * scale + line
    grid = Image.new("L", (width * columns, height * -(-len(files) // columns)))
    for i, (file, caption) in enumerate(zip(files, captions, strict=True)):
        x, y = width * (i % columns), height * (i // columns)
        middle = x + width // 2, y + line // 2
        ImageDraw.Draw(grid).text(middle, caption, fill=200, font=ImageFont.load_default(14), anchor="mm")
        with Image.open(file) as image:
            margin = scale * (34 - image.width) // 2
            size = scale * image.width, scale * image.height
            grid.paste(image.resize(size, Image.Resampling.NEAREST), (x + margin, y + line + margin))
    return grid


def score(names: list[str]) -> None:
    """Run the named evaluations, those that are not up to date if there are no names."""
    known = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in SCORES if there(name)}
    for name in names or [name for name in SCORES if name not in known or not is_current(name, known[name])]:
        weights, flags = SCORES[name]
        with tempfile.TemporaryDirectory() as scratch:
            run("eval.py", weights, flags, scratch)
            shutil.copyfile(Path(scratch, "metrics.json"), FOLDER / f"{name}.json")
            if name == "fashion-mnist":
                enlarge(Path(scratch, "neighbours.png"), ROOT / "docs/neighbours.png", 3)


def there(name: str) -> bool:
    """Whether an evaluation has been run."""
    return (FOLDER / f"{name}.json").is_file()


def is_current(name: str, metrics: dict[str, Any]) -> bool:
    """Whether an evaluation is of the weights in the repository, and by the flags in SCORES."""
    weights, flags = SCORES[name]
    protocol, words = metrics["protocol"], flags.split()
    given = dict(zip(words[::2], words[1::2], strict=True))  # --flag → value
    made = protocol["generated"]
    found = {
        "--num_samples": str(made["images"]),
        "--batch_size": str(made["batch_size"]),
        "--reference": protocol["reference"]["split"],
        "--sampler": made["sampler"],
        "--steps": str(made["steps"]),
        "--guidance_scale": f"{made['guidance_scale']:g}",
        "--seed": str(made["seed"]),
        "--class": made["class_choice"],
    }
    sampler = "consistency" if "fast" in weights else config.SAMPLER
    default = {"--reference": "test", "--sampler": sampler, "--steps": str(SAMPLERS[sampler].steps)}
    default |= {"--guidance_scale": f"{config.GUIDANCE_SCALE:g}", "--seed": str(config.SEED), "--class": "drawn"}
    grid = time_grid(Diffusion(config.TIME_STEPS, config.SCHEDULE_TYPE), made["steps"], power=SAMPLERS[sampler].power)
    same_grid = made["timesteps"] == [t for t, _ in grid]
    return protocol["checkpoint"]["sha256"] == sha256(weights) and found == default | given and same_grid


def table() -> str:
    """The table of all evaluations that have been run."""
    head = ["`eval.py --checkpoint weights/` and", "sampler, steps", *COLUMNS, "device"]
    rows = [head, ["---"] * len(head)]
    for name, (weights, flags) in SCORES.items():
        if not there(name):
            continue
        metrics = json.loads((FOLDER / f"{name}.json").read_text())
        scores, protocol = metrics["scores"], metrics["protocol"]
        how = f"{protocol['generated']['sampler']}, {protocol['generated']['steps']}"
        numbers = [f"{scores[key]:.{digits}f}" for key, digits in COLUMNS.values()]
        flags = flags.replace(" --batch_size 500", "")  # of no consequence but for rounding
        rows.append([f"`{weights} {flags}`", how, *numbers, protocol["device"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def with_table(readme: str) -> str:
    """The README with the table in its place."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="make the pictures")
    parser.add_argument("--scores", nargs="*", choices=SCORES, help="run evaluations")
    args = parser.parse_args()
    if args.pictures:
        draw()
    if args.scores is not None:
        score(args.scores)
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
