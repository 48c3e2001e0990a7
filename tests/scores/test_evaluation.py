"""The folder of an evaluation's results, whose name tells evaluations apart; a score that does not exist."""

import dataclasses

import pytest
import torch
from conftest import ROOT

from src.generation import Generator, build
from src.scores import evaluation

SETTINGS = {
    "image_size": 8,
    "channels": 1,
    "unet_dim": 8,
    "unet_dim_mults": [1, 2],
    "dropout": 0.0,
    "encoder_attention": True,
    "time_steps": 50,
    "schedule_type": "cosine",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction": "v",
    "loss_weight": "uniform",
    "classes": [f"class/no {i}" for i in range(40)],
}
OPTIONS = evaluation.Options(num_samples=1000, batch_size=64, seed=0, data_path="data")


def name(options: evaluation.Options = OPTIONS, file: str = "weights/fashion-mnist.pth", **sampling: object) -> str:
    model = evaluation.Model(file, "31e22359" + "0" * 56, SETTINGS, Generator(*build(SETTINGS), **sampling))
    return evaluation.folder_name(model, options)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"class_counts": [1] * 40}, "dpmpp_2m_sde-50"),
        ({"class_counts": [1] * 40, "guidance_scale": 1.5}, "dpmpp_2m_sde-50-guidance1.5"),
        ({"sampler": "ddim", "steps": 50}, "ddim-50-class-none"),
        ({"sampler": "ddim", "steps": 20, "eta": 0.5}, "ddim-20-eta0.5-class-none"),
        ({"steps": 5, "classes": range(40)}, "dpmpp_2m_sde-5-class-all"),
        (
            {"steps": 5, "classes": [3, 0, 3]},
            "dpmpp_2m_sde-5-class-class_no_3+class_no_0+class_no_3",
        ),
        ({"steps": 5, "classes": [3], "guidance_scale": 1.5}, "dpmpp_2m_sde-5-class-class_no_3-guidance1.5"),
    ],
)
def test_the_name_tells_checkpoint_sampling_and_extent(sampling, expected):
    assert name(**sampling) == f"fashion-mnist-31e22359-{expected}-n1000-seed0"


def test_many_classes_have_a_short_name_of_their_own():
    names = {name(classes=range(first, first + 20)) for first in range(3)}
    assert len(names) == 3 and all(len(text) < 100 and "class-20-of-them-" in text for text in names)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 10},
        {"seed": 1},
        {"classifier_only": True},
        {"reference": "train"},
        {"reference": "held_out"},
        {"resize": "tensorflow"},
        {"crop_frame": True},
    ],
)
def test_another_extent_has_another_name(change):
    assert name(dataclasses.replace(OPTIONS, **change)) != name()


@pytest.mark.parametrize("count", [1, 2])
def test_the_bound_of_a_single_image_has_no_error(count):
    """Its standard error would be NaN, which JSON does not know."""
    images = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    scores, _ = evaluation.bits_per_dim(Generator(*build(SETTINGS)), images, labels, seed=0)
    assert scores["bits_per_dim"] > 0
    assert (scores["bits_per_dim_error"] is None) == (count == 1)


@pytest.mark.parametrize(("classes", "scale"), [([], 2), (["bag"], 2), (["none"], 1)])
def test_the_guidance_scale_of_config_is_for_images_of_a_class(classes, scale):
    how = {"sampler": "ddim", "steps": 5, "eta": 0.0, "precision": "float32", "guidance_scale": 2.0}
    file = str(ROOT / "weights/fashion-mnist.pth")
    assert evaluation.load_model(file, torch.device("cpu"), classes=classes, **how).generator.guidance_scale == scale
