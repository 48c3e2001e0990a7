"""From a checkpoint to pictures: their numbers, which depend on seed and flags alone, and their files."""

import errno
import io
import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import arguments, read_png, read_samples, run_script
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import config
import eval as evaluate
import sample
import train
from src import generation, samplers
from src.data import datasets
from src.diffusion import Diffusion
from src.generation import Generator
from src.utils import checkpoint, errors, pictures, progress
from src.utils.distributed import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def draw(trained, tmp_path) -> Callable[..., Path]:
    """`draw(name, *flags)`: sample.py in this process, from the trained model unless told; the folder it wrote to."""

    def run(name: str, *flags: object, checkpoint: Path = trained.checkpoint) -> Path:
        exact = ("--device", "cpu", "--precision", "float32")
        flags = ("--checkpoint", checkpoint, "--output_dir", tmp_path / name, *exact, *flags)
        assert sample.main(arguments(sample, *flags)) == 0
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint of random weights, unlike config.py's defaults throughout: 28 pixels, linear, 40 timesteps, …"""
    linear = "--schedule_type linear --beta_start 1e-3 --beta_end 0.01 --time_steps 40 --prediction noise".split()
    args = arguments(train, *linear, "--image_size", 28, "--unet_dim", 8, "--unet_dim_mults", 1, 2)
    settings = {**vars(args), "classes": ["circle", "square"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, diffusion = generation.build(settings, torch.device("cpu"))
        nn.init.normal_(unet.conv_out.weight, std=0.1)  # else it would predict zeros
        nn.init.normal_(unet.label.weight[: unet.no_class])  # else all classes would be alike
    path = tmp_path_factory.mktemp("random") / "model.pth"
    checkpoint.save(path, {"settings": settings, "ema": unet.state_dict()})
    return SimpleNamespace(unet=unet.eval(), diffusion=diffusion, path=path)


def starts(monkeypatch, name: str = config.SAMPLER) -> list[Tensor]:
    """The noise (B,C,H,W) that each call of a sampler starts from, from now on."""
    seen = []
    sampler = samplers.SAMPLERS[name]

    def spy(model, diffusion, x_T, *rest, **options):
        seen.append(x_T)
        return sampler.run(model, diffusion, x_T, *rest, **options)

    monkeypatch.setitem(samplers.SAMPLERS, name, replace(sampler, run=spy))
    return seen


# ---- numbers -----------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """A network that knows the one picture x0 (C,H,W) that there is, and so what to predict at any time."""

    def __init__(self, x0: Tensor, diffusion: Diffusion) -> None:
        super().__init__()
        self.x0, self.diffusion = nn.Parameter(x0), diffusion
        self.channels, self.image_size, _ = x0.shape

    def forward(self, x_t: Tensor, t: Tensor, y: None) -> Tensor:
        x0 = self.x0.expand_as(x_t)
        return self.diffusion.target(x0, t, self.diffusion.predict_eps(x_t, t, x0))


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_picture_comes_through_with_its_256_greys_unchanged(sampler, prediction, tmp_path):
    """Data's pixels → [-1, 1] → network → files. Normalised twice, black would be grey; as RGB, not mode L."""
    picture = torch.arange(32 * 32).view(1, 32, 32).div(4, rounding_mode="floor").to(torch.uint8)
    diffusion = Diffusion(50, "cosine", prediction=prediction)
    oracle = Oracle(datasets.normalise(picture), diffusion)
    generator = Generator(oracle, diffusion, sampler, steps=10)
    sample.write_samples(generator, arguments(sample, "--num_samples", 3), tmp_path, World(torch.device("cpu")))

    expected = picture[0].numpy().astype(int)
    assert expected.min() == 0 and expected.max() == 255
    assert np.array_equal(read_samples(tmp_path), np.stack([expected] * 3))
    tile = np.pad(expected, 1)  # a black gap of two pixels between neighbours, one at the rim
    assert np.array_equal(read_png(tmp_path / "grid.png"), np.block([[tile, tile], [tile, 0 * tile]]))


def test_the_ends_of_the_scale_are_black_and_white():
    x = torch.tensor([-7.0, -1.0, -1 + 0.9 / 255, 0.0, 1 - 0.9 / 255, 1.0, 7.0])
    assert generation.to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_a_model_is_sampled_with_its_own_settings_whatever_config_says(random_model, draw, monkeypatch):
    flags = ["--num_samples", 3, "--steps", 6, "--seed", 4, "--class", "none"]
    args = arguments(sample, *flags)
    absurd = {"IMAGE_SIZE": 64, "CHANNELS": 3, "UNET_DIM": 72, "UNET_DIM_MULTS": [3], "TIME_STEPS": 5}
    absurd |= {"SCHEDULE_TYPE": "cosine", "BETA_START": 0.8, "BETA_END": 0.9, "PREDICTION": "v"}
    for name, value in absurd.items():
        monkeypatch.setattr(config, name, value)
    written = read_samples(draw("written", *flags, checkpoint=random_model.path))

    def by_hand(diffusion: Diffusion) -> np.ndarray:
        noise = generation.ImageNoise(args.seed, range(3), (1, 28, 28))
        grid = samplers.time_grid(diffusion, args.steps)
        *_, x0 = samplers.SAMPLERS[config.SAMPLER].run(random_model.unet, diffusion, noise(), noise, grid)
        return generation.to_uint8(x0)[:, 0].numpy().astype(int)

    assert np.abs(written - by_hand(random_model.diffusion)).max() <= 1
    assert np.abs(written - by_hand(Diffusion(40, "cosine"))).max() > 1  # the schedule does make a difference


# ---- precision ---------------------------------------------------------------------------------------------


def test_bfloat16_gives_the_same_pictures_but_for_its_rounding(draw):
    flags = ["--num_samples", 8, "--steps", 20]
    exact, others = read_samples(draw("exact", *flags)), read_samples(draw("others", *flags, "--seed", 1))
    coarse = read_samples(draw("coarse", *flags, "--precision", "bfloat16"))
    assert 0 < np.abs(coarse - exact).mean() < 0.02 * np.abs(others - exact).mean()


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_only_the_network_computes_in_bfloat16(sampler, random_model):
    """Its weights stay float32, as do the x_t that it gets and gives; inside it there is bfloat16."""
    seen, states = [], []
    hook = random_model.unet.middle_in.conv2.register_forward_hook(lambda _, x, y: seen.append(y.dtype))
    generator = Generator(random_model.unet, random_model.diffusion, sampler, 3, precision=torch.bfloat16)
    generator.images(0, range(2), states.append)
    hook.remove()
    assert seen == [torch.bfloat16] * 3
    assert {x_t.dtype for x_t in states} == {p.dtype for p in random_model.unet.parameters()} == {torch.float32}


# ---- seeds and batches -------------------------------------------------------------------------------------


def test_an_image_depends_on_its_seed_and_number_alone(draw):
    """Not on the size of the batch, nor on how many are asked for: the noise is one stream an image."""
    flags = ["--steps", 4, "--seed", 3]
    together = read_samples(draw("together", *flags, "--num_samples", 20, "--batch_size", 20))
    assert len({image.tobytes() for image in together}) == 20  # batches may well be larger than 16
    for name, count, batch_size in ("in batches", 5, 2), ("one by one", 3, 1):
        apart = read_samples(draw(name, *flags, "--num_samples", count, "--batch_size", batch_size))
        assert np.abs(apart - together[:count]).max() <= 1  # float rounding


@pytest.mark.parametrize("flags", ["", "--sampler ddim", "--sampler ddim --eta 0.7", "--sampler dpmpp_2m"])
def test_the_same_seed_gives_the_same_images(flags, draw):
    flags = [*flags.split(), "--steps", 4, "--num_samples", 2]
    one = read_samples(draw("one", *flags))
    torch.manual_seed(99)
    assert np.array_equal(one, read_samples(draw("two", *flags)))


# ---- flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag",
    ["--seed 1", "--steps 6", "--sampler ddim", "--sampler ddim --eta 0.5", "--sampler dpmpp_2m", "--raw_weights"],
)
def test_a_flag_changes_the_images(flag, draw):
    base = ["--num_samples", 2, "--steps", 5]
    one, two = read_samples(draw("base", *base)), read_samples(draw("changed", *base, *flag.split()))
    assert np.abs(one - two).max() > 1


def test_batch_size_is_how_many_images_are_made_at_a_time(draw, monkeypatch):
    seen = starts(monkeypatch)
    draw("samples", "--num_samples", 7, "--batch_size", 3, "--steps", 1)
    assert [len(x_T) for x_T in seen] == [3, 3, 1]


def test_images_of_an_earlier_run_are_left_and_said(draw, caplog):
    folder = draw("again", "--num_samples", 5, "--steps", 1)
    draw("again", "--num_samples", 5, "--steps", 1)
    assert "earlier run" not in caplog.text  # all were replaced
    draw("again", "--num_samples", 2, "--steps", 1)
    assert "3 images of an earlier run" in caplog.text and len(list(folder.glob("sample_*.png"))) == 5


def test_num_samples_and_output_dir_say_how_many_images_and_where(draw):
    folder = draw("a new/folder", "--num_samples", 5, "--steps", 1)
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", *(f"sample_{i:05d}.png" for i in range(5))]
    assert read_samples(folder).shape == (5, 32, 32)
    assert read_png(folder / "grid.png").shape == (2 * 34, 3 * 34)


@pytest.mark.parametrize(
    ("sampler", "time_steps", "steps"),
    [
        ("ddim", 100, 50),
        ("dpmpp_2m", 100, 20),
        ("ddpm", 100, 50),
        ("dpmpp_2m_sde", 100, 50),
        ("dpmpp_2m_sde", 20, 20),
        ("ddim", 40, 40),
        ("dpmpp_2m", 10, 10),
    ],
)
def test_steps_are_the_sampler_s_own_unless_given(sampler, time_steps, steps, random_model):
    assert Generator(random_model.unet, Diffusion(time_steps, "linear"), sampler).steps == steps


# ---- memory ------------------------------------------------------------------------------------------------

# Prints the most memory that the process ever held, in kB: after 256 images of 128 × 128, after 2,048, and after 2,048
# that were all kept for one grid. It asks /proc, for ru_maxrss is never less than what the parent of the process held.
PEAKS = """
import re, sys
from pathlib import Path
import torch
from src import diffusion
from src.generation import Generator
from src.utils import pictures
from src.utils.distributed import World
import sample

class Blank(torch.nn.Linear):
    channels, image_size = 1, 128
    def forward(self, x_t, t, y): return torch.zeros_like(x_t)

generator = Generator(Blank(1, 1), diffusion.Diffusion(10, "linear"), "ddim", steps=1)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
for count in "256", "2048":
    sys.argv[1:] = ["--num_samples", count, "--batch_size", "16"]
    sample.write_samples(generator, sample.parse_args(), Path(), World(torch.device("cpu")))
    print(peak())
grid = pictures.image_grid(torch.cat([generator.images(0, range(i, i + 16)) for i in range(0, 2048, 16)]))
print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory that it took")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    (tmp_path / "peaks.py").write_text(PEAKS)
    done = run_script(tmp_path / "peaks.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("sample_*.png"))) == 2048
    few, many, kept = map(int, done.stdout.split())
    images = 2048 * 128 * 128 / 1024  # kB
    assert many - few < images / 2
    assert kept - many > images / 2  # negative control: were they kept, it would show


def test_a_grid_shows_the_first_sixty_four_images(draw):
    folder = draw("many", "--num_samples", 70, "--batch_size", 50, "--steps", 1, "--gif")
    grid = read_png(folder / "grid.png")
    assert grid.shape == (8 * 34, 8 * 34)
    tiles = grid.reshape(8, 34, 8, 34).swapaxes(1, 2).reshape(64, 34, 34)[:, 1:-1, 1:-1]
    images = read_samples(folder)
    assert len(images) == 70 and np.array_equal(tiles, images[:64])


def test_the_bar_counts_images_as_they_become(draw, monkeypatch, random_model):
    """Also within a batch: after each of its steps, a part of each image is done."""
    counted = []

    class Bar(tqdm):
        def update(self, images: float) -> None:
            super().update(images)
            counted.append(self.n)

    monkeypatch.setattr(progress, "progress", lambda log, **options: Bar(file=io.StringIO(), **options))
    draw("samples", "--num_samples", 5, "--batch_size", 4, "--steps", 10)
    assert counted == pytest.approx([4 * i / 10 for i in range(1, 11)] + [4 + i / 10 for i in range(1, 11)])
    assert counted[-1] == 5  # exactly: tqdm warns of anything above the total


# ---- interpolation -----------------------------------------------------------------------------------------


def frames(folder: Path) -> np.ndarray:
    """The frames of an interpolation's strip, (F, 32, 32)."""
    strip = read_png(folder / "interpolation.png")
    assert strip.shape[0] == 34 and strip.shape[1] % 34 == 0
    return np.stack([strip[1:-1, left + 1 : left + 33] for left in range(0, strip.shape[1], 34)])


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_an_interpolation_leads_from_the_first_image_to_the_second_in_small_steps(sampler, draw):
    flags = ["--num_samples", 2, "--sampler", sampler, "--steps", 10, "--class", "bag"]
    folder = draw("morph", *flags, "--interpolate", "--interp_steps", 9)
    strip, images = frames(folder), read_samples(folder)
    assert len(strip) == 9
    assert np.abs(strip[[0, -1]] - images).max() <= 1
    steps, whole = np.abs(np.diff(strip, axis=0)).mean((1, 2)), np.abs(images[1] - images[0]).mean()
    assert steps.min() > 0 and steps.max() < whole / 2


def test_an_interpolation_keeps_to_the_sphere(draw, monkeypatch):
    """Of two noises mixed linearly, the middle has 0.7 of their norm: no noise that the network knows."""
    seen = starts(monkeypatch, "ddim")
    draw("morph", "--num_samples", 1, "--steps", 1, "--sampler", "ddim", "--interpolate", "--interp_steps", 7)
    noises = seen[-1].flatten(1)
    assert len(noises) == 7
    norms = noises.norm(dim=1)
    assert norms.min() > 0.99 * norms[[0, -1]].min() and norms.max() < 1.01 * norms[[0, -1]].max()
    turns = nn.functional.cosine_similarity(noises[1:], noises[:-1]).arccos()
    assert turns.max() < 1.15 * turns.min()  # at an even pace; a line's middle is passed 1.6 times as fast


def test_two_frames_are_the_ends_and_batches_do_not_matter(draw):
    flags = ["--num_samples", 2, "--steps", 4, "--sampler", "dpmpp_2m", "--interpolate"]
    whole = frames(draw("whole", *flags, "--interp_steps", 5))
    assert np.abs(frames(draw("in batches", *flags, "--interp_steps", 5, "--batch_size", 2)) - whole).max() <= 1
    assert np.abs(frames(draw("ends", *flags, "--interp_steps", 2)) - whole[[0, -1]]).max() <= 1


def test_an_interpolation_is_by_a_deterministic_sampler_unless_one_is_named(monkeypatch):
    assert arguments(sample, "--interpolate").sampler == "dpmpp_2m"
    assert arguments(sample, "--interpolate", "--sampler", "ddpm").sampler == "ddpm"
    assert arguments(sample).sampler == config.SAMPLER
    monkeypatch.setattr(config, "SAMPLER", "ddim")
    assert arguments(sample, "--interpolate", "--eta", 0.5).sampler == "ddim"


# ---- animation ---------------------------------------------------------------------------------------------


def read_gif(path: Path) -> list[np.ndarray]:
    with Image.open(path) as animation:
        assert animation.format == "GIF" and animation.info["loop"] == 0
        pictures = []
        for number in range(animation.n_frames):
            animation.seek(number)
            pictures.append(np.asarray(animation.convert("L")).astype(int))
        return pictures


def shows(picture: np.ndarray, expected: np.ndarray) -> bool:
    """Whether a GIF's picture is this one. Its palette is Pillow's choice: greys may be merged with near ones."""
    return picture.shape == expected.shape and np.abs(picture - expected).mean() < 1


def test_an_animation_leads_from_noise_to_the_grid(draw):
    folder = draw("movie", "--num_samples", 4, "--steps", 8, "--gif")
    pictures, grid = read_gif(folder / "denoising.gif"), read_png(folder / "grid.png")
    assert len(pictures) == 8  # a picture a step
    assert shows(pictures[-1], grid) and not shows(pictures[0], grid)
    to_go = [np.abs(picture - grid).mean() for picture in pictures]
    assert to_go[0] == max(to_go) > 0


def test_an_animation_of_many_batches_shows_the_first(draw):
    folder = draw("movie", "--num_samples", 3, "--batch_size", 2, "--steps", 3, "--gif")
    first_batch = np.block([[np.pad(image, 1) for image in read_samples(folder)[:2]]])
    assert shows(read_gif(folder / "denoising.gif")[-1], first_batch)
    assert not shows(first_batch[:, ::-1], first_batch)  # negative control: the same images, mirrored


def test_an_animation_of_many_steps_stays_short(draw, random_model, monkeypatch):
    """With a terminal or, as here, without: DDPM's thousand steps would make a film of a thousand frames."""
    monkeypatch.setattr(sample, "GIF_FRAMES", 10)
    flags = ["--num_samples", 2, "--sampler", "ddpm", "--gif"]
    folder = draw("movie", *flags, checkpoint=random_model.path)
    assert 5 <= len(read_gif(folder / "denoising.gif")) <= 20


# ---- editing an image --------------------------------------------------------------------------------------

SKETCH = np.add.outer(np.arange(0, 84, 3), np.arange(0, 168, 6)).astype(np.uint8)  # (28, 28), 0 to 243
FRAMED = np.pad(SKETCH.astype(int), 2)  # as a model for 32 × 32 pixels sees it
LEFT = np.where(np.arange(28) < 14, 255, 0).astype(np.uint8) + np.zeros((28, 1), np.uint8)  # white there


@pytest.fixture
def sketch(tmp_path) -> Path:
    Image.fromarray(SKETCH).save(tmp_path / "sketch.png")
    return tmp_path / "sketch.png"


@pytest.fixture
def mask(tmp_path) -> Path:
    Image.fromarray(LEFT).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_strength_0_writes_the_image_itself(sampler, draw, sketch, caplog):
    """No steps: nothing to divide by, neither for the bar nor for the frames of the animation."""
    caplog.set_level("INFO")
    flags = [
        "--num_samples",
        3,
        "--batch_size",
        2,
        "--sampler",
        sampler,
        "--gif",
        "--interpolate",
        "--interp_steps",
        4,
    ]
    folder = draw("same", *flags, "--start_from", sketch, "--strength", 0)
    assert np.array_equal(read_samples(folder), np.stack([FRAMED] * 3))
    assert np.array_equal(frames(folder), np.stack([FRAMED] * 4))
    assert len(read_gif(folder / "denoising.gif")) == 1
    assert f"3 images, {sampler}, 0 steps" in caplog.text
    changed = read_samples(draw("other", "--num_samples", 3, "--start_from", sketch, "--strength", 0.1))
    assert not np.array_equal(changed, np.stack([FRAMED] * 3))  # negative control


def test_a_mask_that_keeps_nothing_costs_a_warning(draw, sketch, tmp_path, caplog):
    Image.new("RGBA", (28, 28)).save(mask := tmp_path / "transparent.png")  # as if on white
    draw("changed", "--num_samples", 1, "--steps", 2, "--start_from", sketch, "--inpaint", mask)
    assert f"every pixel of {mask} is white or transparent: nothing of the image is kept" in caplog.text


def test_strength_1_ignores_the_image(draw, sketch):
    flags = ["--num_samples", 2, "--steps", 4]
    ordinary = read_samples(draw("ordinary", *flags, "--class", "none"))
    assert np.array_equal(read_samples(draw("from", *flags, "--start_from", sketch, "--strength", 1)), ordinary)
    assert not np.array_equal(read_samples(draw("near", *flags, "--start_from", sketch, "--strength", 0.9)), ordinary)


def test_images_come_nearer_to_the_given_one_as_strength_falls(draw, sketch):
    flags = ["--num_samples", 4, "--start_from", sketch]
    strengths = ("0.1", "0.4", "0.7", "1")
    far = [np.abs(read_samples(draw(s, *flags, "--strength", s)) - FRAMED).mean() for s in strengths]
    assert far == sorted(far) and far[-1] > 2 * far[0]


def test_strength_says_how_much_of_the_image_and_of_the_steps(draw, sketch, monkeypatch, caplog):
    caplog.set_level("INFO")
    seen = starts(monkeypatch)
    draw("half", "--num_samples", 2, "--steps", 10, "--start_from", sketch, "--strength", 0.52)
    assert "5 steps" in caplog.text
    noise = generation.ImageNoise(0, range(2), (1, 32, 32))()
    image = datasets.normalise(torch.from_numpy(FRAMED))
    expected = Diffusion(50, "cosine").q_sample(image, torch.tensor([25]), noise)  # 26 of 50 timesteps
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)


def test_strength_is_0_7_or_1_with_a_mask_unless_it_is_given():
    assert arguments(sample, "--start_from", "a.png").strength == 0.7
    assert arguments(sample, "--start_from", "a.png", "--inpaint", "b.png").strength == 1
    assert arguments(sample, "--start_from", "a.png", "--inpaint", "b.png", "--strength", 0.4).strength == 0.4
    assert arguments(sample).strength == 1


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("strength", [[], ["--strength", 0.5]])
def test_what_is_black_in_the_mask_is_kept(sampler, strength, draw, sketch, mask):
    flags = ["--num_samples", 3, "--sampler", sampler, "--steps", 6, "--start_from", sketch, *strength]
    kept = np.pad(LEFT, 2) == 0  # the frame, too
    images = read_samples(draw("painted", *flags, "--inpaint", mask))
    assert (images == FRAMED)[:, kept].all()
    assert (images == FRAMED)[:, ~kept].mean() < 0.5
    assert len({image.tobytes() for image in images}) == 3
    assert (read_samples(draw("all", *flags)) != FRAMED)[:, kept].any()  # negative control


def test_a_mask_is_white_above_half(draw, sketch, mask, tmp_path):
    """Its edges may be blurred, and it may be in colour."""
    grey = np.where(LEFT == 255, 128, 127).astype(np.uint8)
    Image.fromarray(grey).convert("RGB").save(tmp_path / "grey.png")
    flags = ["--num_samples", 1, "--steps", 4, "--start_from", sketch]
    by_grey = read_samples(draw("grey", *flags, "--inpaint", tmp_path / "grey.png"))
    assert np.array_equal(by_grey, read_samples(draw("white", *flags, "--inpaint", mask)))


def test_an_image_has_no_class_unless_one_is_given(draw, sketch, random_model):
    """A class that is drawn would seldom be that of the image."""

    def images(name: str, *flags: object) -> np.ndarray:
        flags = ["--num_samples", 4, "--steps", 6, "--start_from", sketch, *flags]
        return read_samples(draw(name, *flags, checkpoint=random_model.path))

    unasked = images("unasked")
    assert np.array_equal(unasked, images("none", "--class", "none"))
    circles = images("circles", "--class", "circle")
    assert np.abs(unasked - circles).max() > 1
    assert np.abs(images("guided", "--class", "circle", "--guidance_scale", 3) - circles).max() > 1


def test_interpolation_and_animation_start_from_the_image(draw, sketch, mask):
    flags = ["--num_samples", 2, "--steps", 8, "--sampler", "dpmpp_2m", "--start_from", sketch, "--inpaint", mask]
    folder = draw("morph", *flags, "--strength", 0.5, "--interpolate", "--interp_steps", 5, "--gif")
    strip, images = frames(folder), read_samples(folder)
    assert np.abs(strip[[0, -1]] - images).max() <= 1
    assert (strip == FRAMED)[:, np.pad(LEFT, 2) == 0].all()
    assert len({frame.tobytes() for frame in strip}) == 5
    assert len(read_gif(folder / "denoising.gif")) == 4


def test_a_model_trained_for_consistency_edits_in_its_own_steps(draw, sketch, mask, random_model, tmp_path, caplog):
    caplog.set_level("INFO")
    state = checkpoint.load(random_model.path)
    state["settings"] |= {"objective": "consistency", "prediction": "v"}
    checkpoint.save(tmp_path / "fast.pth", {name: state[name] for name in ("settings", "ema")})
    for strength, steps in (0.5, "1 step"), (1, "2 steps"), (0, "0 steps"):
        flags = ["--num_samples", 2, "--start_from", sketch, "--inpaint", mask, "--strength", strength]
        images = read_samples(draw(f"fast {strength}", *flags, checkpoint=tmp_path / "fast.pth"))
        assert f"2 images, consistency, {steps}" in caplog.text
        kept = LEFT == 0
        assert (images == SKETCH)[:, kept].all()
        assert ((images == SKETCH)[:, ~kept].all()) == (strength == 0)


# ---- refusals ----------------------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_one_line_on_stderr_and_status_1(tmp_path):
    done = run_script("sample.py", "--checkpoint", "nowhere/best.pth", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"sample\.py: error: no checkpoint at nowhere/best\.pth: .+\n", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refusal(capsys) -> Callable[..., str]:
    """`refusal(status, script, *flags)` must exit with this status and one line on stderr: that line."""

    def run(status: int, script: ModuleType, *flags: object) -> str:
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: script.main(arguments(script, *flags)), f"{script.__name__}.py", quiet=False)
        error = capsys.readouterr().err
        assert stop.value.code == status
        assert error.startswith(f"{script.__name__}.py: error: ") and error.count("\n") == 1
        return error

    return run


def test_eval_refuses_a_missing_checkpoint_likewise(refusal, tmp_path):
    assert "nowhere.pth" in refusal(1, evaluate, "--checkpoint", "nowhere.pth", "--output_dir", tmp_path / "eval")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [sample, evaluate], ids=["sample", "eval"])
def test_more_steps_than_the_model_has_timesteps_are_refused_with_both_numbers(
    script, refusal, random_model, tmp_path
):
    flags = ["--checkpoint", random_model.path, "--output_dir", tmp_path / "out", "--steps", 41]
    message = refusal(2, script, *flags)
    assert "41" in message and "40" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", ["--start_from", "--inpaint"])
def test_an_image_of_an_earlier_run_is_not_overwritten_by_its_variations(own, refusal, draw, sketch, mask, trained):
    """And the other file may be anywhere."""
    earlier = draw("out", "--num_samples", 1, "--steps", 1) / "sample_00000.png"
    content = earlier.read_bytes()
    files = {"--start_from": sketch, "--inpaint": mask} | {own: earlier}
    flags = ["--checkpoint", trained.checkpoint, "--output_dir", earlier.parent, *chain(*files.items())]
    assert f"{earlier} might be overwritten" in refusal(1, sample, *flags)
    assert earlier.read_bytes() == content

    (elsewhere := earlier.with_name("mine.png")).write_bytes(content)
    draw("out", "--num_samples", 1, "--steps", 2, "--start_from", elsewhere)


def test_a_checkpoint_without_raw_weights_says_so(refusal, random_model, tmp_path):
    flags = ["--checkpoint", random_model.path, "--output_dir", tmp_path, "--raw_weights"]
    assert "no raw weights" in refusal(1, sample, *flags)


def test_a_place_that_cannot_be_written_is_refused(refusal, random_model, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--checkpoint", random_model.path, "--output_dir", tmp_path / "file"]
    assert "--output_dir" in refusal(2, sample, *flags)


def test_a_picture_that_cannot_be_written_is_one_line_too(refusal, random_model, tmp_path):
    (tmp_path / "grid.png").mkdir()
    flags = ["--checkpoint", random_model.path, "--output_dir", tmp_path, "--num_samples", 1, "--steps", 1]
    assert "grid.png" in refusal(1, sample, *flags)


def test_a_defect_keeps_its_traceback_and_is_not_taken_for_a_full_disk(monkeypatch, capsys):
    """A file that the program itself should have found, an error in some thread: no advice about disks."""

    def defect() -> int:
        Path("/nowhere/at/all").read_text()

    with pytest.raises(FileNotFoundError):
        errors.run(defect, "sample.py", quiet=True)

    def thread() -> int:
        (worker := threading.Thread(target=lambda: 1 / 0)).start()
        worker.join()
        return 0

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(threading, "excepthook", threading.__excepthook__)
        errors.run(thread, "sample.py", quiet=True)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_tensorboards_thread_is_silent_for_its_error_comes_up_in_the_main_thread(capsys):
    from tensorboard.summary.writer import event_file_writer

    for kind, silent in ((event_file_writer._AsyncWriterThread, True), (threading.Thread, False)):
        thread = kind.__new__(kind)
        threading.Thread.__init__(thread)
        errors._mute_tensorboard(threading.ExceptHookArgs((ValueError, ValueError("x"), None, thread)))
        assert (capsys.readouterr().err == "") is silent


def test_a_disk_that_fills_up_is_named_even_where_the_system_names_no_file(
    refusal, random_model, tmp_path, monkeypatch
):
    """Opening a file tells its name when it fails; writing to it does not."""

    def fail(image: Tensor, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pictures, "save_png", fail)
    flags = ["--checkpoint", random_model.path, "--output_dir", tmp_path, "--num_samples", 1, "--steps", 1]
    message = refusal(1, sample, *flags)
    assert "No space left on device" in message and "None" not in message


def test_an_impatient_user_gets_one_line_and_status_130(random_model, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "to_uint8", interrupt)
    flags = ["--checkpoint", random_model.path, "--output_dir", tmp_path, "--steps", 1]
    with pytest.raises(SystemExit) as stop:
        errors.run(lambda: sample.main(arguments(sample, *flags)), "sample.py", quiet=False)
    assert (stop.value.code, capsys.readouterr().err) == (130, "sample.py: error: interrupted\n")


# ---- names of classes -----------------------------------------------------------------------------------


def labels(*names: str) -> list[np.ndarray]:
    """The rows of a grid of black images, in which only the labels are to be seen."""
    grid = pictures.class_grid(torch.zeros(len(names), 1, 16, 16, dtype=torch.uint8), names, range(len(names)))
    return [row.numpy() for row in grid[0].split(18)]


@pytest.mark.parametrize("names", ["éè", "ЖЯ", "ΩΞ", "猫犬", "가나", "\ue000\ue001"], ids=ascii)
def test_classes_are_told_apart_in_any_script(names):
    """A font without their characters would show the same box for each; without any font, there are numbers."""
    one, two = labels(*names)
    assert one.any() and two.any() and not np.array_equal(one, two)


def test_where_no_font_has_the_characters_classes_are_numbered(monkeypatch):
    numbers = labels("0", "1")
    monkeypatch.setattr(pictures, "_font", lambda text: None)
    assert np.array_equal(labels("猫", "犬"), numbers)


@pytest.mark.parametrize("letter", ["n", "猫"])
def test_names_of_files_are_shortened(letter, tmp_path):
    """File systems allow 255 bytes, and a folder with such a name can be a class."""
    gallery = pictures.Gallery(tmp_path, [letter * 250, "b"], [0, 1])
    gallery.add(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    first, second = sorted(path.name for path in tmp_path.iterdir())
    assert first.startswith(f"sample_00000_{letter * 10}") and second == "sample_00001_b.png"
    assert gallery.grid().shape[2] < 1000


def test_names_that_the_file_system_cannot_encode_are_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii"))
    gallery = pictures.Gallery(tmp_path, ["ü", "b"], [4, 7])
    gallery.add(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample_00000_4.png", "sample_00001_b.png"]


@pytest.mark.parametrize("name", ["grid.png", "denoising.gif"])
def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(name, tmp_path):
    image, path = torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / name
    path.write_text("the earlier one")
    (tmp_path / f"{name}.tmp").mkdir()  # in the way, as a full disk would be
    with pytest.raises(errors.UserError, match=f"cannot write .*{name}"):
        pictures.save_png(image, path) if name.endswith("png") else pictures.save_gif([image, image], path)
    assert path.read_text() == "the earlier one"


def test_one_image_is_not_one_images(draw, caplog):
    caplog.set_level("INFO")
    draw("one", "--num_samples", 1, "--steps", 1)
    assert "1 image, dpmpp_2m_sde, 1 step" in caplog.text and "grid.png, 1 image to" in caplog.text
    assert "1 images" not in caplog.text and "1 steps" not in caplog.text
