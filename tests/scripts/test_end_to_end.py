"""The README's commands as a user gives them, and everything that they leave behind, read back."""

import dataclasses
import hashlib
import io
import json
import logging
import math
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, arguments, differences, read_png, read_samples, run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import config
import eval as evaluate
from src.data import datasets
from src.samplers import SAMPLERS
from src.scores import classifier, inception
from src.utils import checkpoint, errors

# What the fixture `trained` did: 400 images in batches of 50, four epochs, stopped after two.
STEPS, EPOCHS = 8, 4


@pytest.fixture(scope="module")
def sampled(trained) -> SimpleNamespace:
    """`python sample.py` after training, in the same folder; `folder` is where the pictures should be."""
    flags = ["--num_samples", 4, "--steps", 5, "--sampler", "dpmpp_2m", "--interpolate", "--gif"]
    done = run_script("sample.py", *flags, cwd=trained.folder)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, folder=trained.folder / "outputs/samples")


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """No trace in the user's cache, but one cache for all tests here, so that the classifier is trained once."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path_factory.getbasetemp() / "hub"))


# ---- training ----------------------------------------------------------------------------------------------


def test_a_first_run_names_its_device_network_data_and_result(trained):
    text = trained.first.stdout
    assert trained.first.stderr == "" and "RESUMING" not in text
    assert "cpu" in text and re.search(r"[\d,]+ parameters", text) and "400 images to train on, 600 held out" in text
    assert re.findall(r"^epoch (\d)/2: loss [\d.]+, validation [\d.]+", text, re.MULTILINE) == ["1", "2"]
    assert text.splitlines()[-1].startswith("done; next: python sample.py --checkpoint checkpoints/best.pth, or")


def test_the_same_command_with_more_epochs_resumes(trained):
    text = trained.second.stdout
    assert f"RESUMING checkpoints/latest.pth: 2 of 4 epochs done, step {2 * STEPS}" in text
    assert re.findall(r"^epoch (\d)/4:", text, re.MULTILINE) == ["3", "4"]


def test_output_into_a_pipe_has_no_debris_of_progress_bars(trained, sampled):
    for done in (trained.first, trained.second, sampled.done):
        assert not re.search(r"\r|\x1b|%\|", done.stdout + done.stderr)


def test_everything_lies_below_the_current_directory(trained, sampled):
    assert {path.name for path in trained.folder.iterdir()} == {"checkpoints", "data", "logs", "outputs"}
    weights = {"best.pth", "latest.pth", "final.pth", "weights.pth"}
    assert {path.name for path in (trained.folder / "checkpoints").iterdir()} == {*weights, ".lock"}
    pictures = {"losses.png", *(f"samples_epoch_000{epoch}.png" for epoch in (1, 2, 4)), "samples"}
    assert {path.name for path in (trained.folder / "outputs").iterdir()} == pictures


def test_the_checkpoints_tell_the_whole_run(trained):
    best, latest, final = (
        checkpoint.load(trained.folder / f"checkpoints/{name}.pth") for name in ("best", "latest", "final")
    )
    assert not differences(latest, final)
    assert (final["epoch"], final["step"]) == (EPOCHS, EPOCHS * STEPS)
    history = final["history"]
    assert len(history["train"]) == len(history["val"]) == EPOCHS
    assert history["train"][-1] < history["train"][0]  # it learns
    assert best["best"] == final["best"] == min(history["val"])
    assert best["epoch"] == 1 + history["val"].index(min(history["val"]))


def test_pictures_of_the_training_are_there_and_grey(trained):
    for epoch in (1, 2, 4):
        assert read_png(trained.folder / f"outputs/samples_epoch_{epoch:04d}.png").shape == (68, 68)
    with Image.open(trained.folder / "outputs/losses.png") as plot:
        assert min(plot.size) > 300 and len(plot.convert("RGB").getcolors(2**24)) > 10


def test_tensorboard_shows_the_whole_run_without_a_seam(trained):
    events = EventAccumulator(str(trained.folder / "logs/tensorboard")).Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    names = {"loss/train", "loss/validation", "learning_rate", "gradient_norm", "images_per_second"}
    assert set(curves) == names
    every_second = list(range(2, EPOCHS * STEPS + 1, 2))  # --log_every 2
    for name in names - {"loss/validation"}:
        assert [event.step for event in curves[name]] == every_second, name
        assert all(0 < event.value < math.inf for event in curves[name]), name
    assert all(event.value == pytest.approx(3e-3) for event in curves["learning_rate"])
    validation = checkpoint.load(trained.folder / "checkpoints/final.pth")["history"]["val"]
    assert [event.step for event in curves["loss/validation"]] == [STEPS * epoch for epoch in (1, 2, 3, 4)]
    assert [event.value for event in curves["loss/validation"]] == pytest.approx(validation)

    pictures = events.Images("samples")
    assert [event.step for event in pictures] == [STEPS, 2 * STEPS, 4 * STEPS]
    with Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as shown:
        on_disk = read_png(trained.folder / "outputs/samples_epoch_0004.png")
        assert np.array_equal(np.asarray(shown.convert("L")), on_disk)


# ---- sampling ----------------------------------------------------------------------------------------------


def test_sampling_writes_what_it_says(sampled):
    assert sampled.done.stderr == ""
    assert sampled.done.stdout.splitlines()[-1] == (
        "wrote grid.png, 4 images, interpolation.png, denoising.gif to outputs/samples"
    )
    assert {path.name for path in sampled.folder.iterdir()} == {
        *(f"sample_{i:05d}.png" for i in range(4)),
        "grid.png",
        "interpolation.png",
        "denoising.gif",
    }


def test_the_grid_is_of_the_single_images(sampled):
    a, b, c, d = (np.pad(image, 1) for image in read_samples(sampled.folder))
    assert np.array_equal(read_png(sampled.folder / "grid.png"), np.block([[a, b], [c, d]]))
    assert len({image.tobytes() for image in (a, b, c, d)}) == 4
    assert read_png(sampled.folder / "interpolation.png").shape == (34, 10 * 34)


def test_pictures_while_training_are_those_of_sample_py(trained, tmp_path):
    """The same model, seed, sampler and steps give the same images, whichever script asks."""
    flags = ["--checkpoint", "checkpoints/final.pth", "--num_samples", 4, "--steps", 5, "--device", "cpu"]
    done = run_script("sample.py", *flags, "--output_dir", tmp_path, "--quiet", cwd=trained.folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # as quiet as asked
    of_training = read_png(trained.folder / "outputs/samples_epoch_0004.png")
    assert np.abs(read_png(tmp_path / "grid.png") - of_training).max() <= 1


def test_importing_the_scripts_runs_nothing_and_makes_nothing(tmp_path):
    code = "import config, train, sample, eval"
    arguments = ["--epochs", "1"]  # to be left alone: an import is no run
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- evaluation --------------------------------------------------------------------------------------------


def check_evaluation(folder: Path, output: str, trained: SimpleNamespace, weights_sha256: str) -> dict[str, Any]:
    """metrics.json, the grid and the table of an evaluation of 16 images in 5 steps, seed 3; returns the scores."""
    report = json.loads((folder / "metrics.json").read_text())
    scores, protocol = report["scores"], report["protocol"]
    assert math.isfinite(scores["fid"]) and scores["fid"] > 0
    assert (scores["num_images"], scores["num_reference_images"]) == (16, 500)
    assert protocol["checkpoint"] == {
        "file": "./checkpoints/best.pth",
        "sha256": hashlib.sha256(trained.checkpoint.read_bytes()).hexdigest(),
        "weights": "ema",
    }
    made = {"images": 16, "sampler": "dpmpp_2m_sde", "steps": 5, "seed": 3, "batch_size": 6}
    made["timesteps"] = [49, 39, 29, 19, 9]
    made |= {"precision": "bfloat16", "class_choice": "drawn", "classes": [], "guidance_scale": 1.0}
    assert protocol["generated"] == made
    assert protocol["reference"] == {"dataset": "fashion-mnist-tiny", "split": "test", "images": 500, "classes": []}
    assert protocol["extractor"]["weights_sha256"] == weights_sha256
    for package in ("numpy", "torch", "torchvision", "torchmetrics", "torch-fidelity"):
        assert protocol["versions"][package] == version(package)
    assert protocol["versions"]["python"] == sys.version.split()[0]
    assert report["seconds"] > 0 and "cpu" in protocol["device"]
    assert 1 < scores["bits_per_dim"] < 20 and 0 < scores["bits_per_dim_error"] < 1
    assert protocol["bits_per_dim"]["images"] == 500

    assert protocol["classifier"].keys() == {"network", "weights_sha256", "test_accuracy"}
    assert protocol["classifier"]["test_accuracy"] > 0.5

    assert sum(scores["class_histogram"].values()) == 16 and 0 <= scores["class_accuracy"] <= 1
    assert 0 <= scores["nearest_flagged"] <= 1 and scores["nearest_median"] > 0
    assert read_png(folder / "grid.png").shape == (4 * 34, 4 * 34)
    assert read_png(folder / "neighbours.png").shape == (4 * 40, 4 * 72)  # pairs, framed in four pixels
    assert f"{scores['fid']:.2f}" in output and "16 images" in output and "500 images" in output
    assert not re.search(r"\r|\x1b", output), "debris of a progress bar"
    return scores


EVALUATION = ["--num_samples", 16, "--steps", 5, "--seed", 3, "--batch_size", 6]
EVALUATION += ["--precision", "bfloat16", "--device", "cpu"]


class FakeExtractor:
    """Stands in for Inception where there is no network to fetch it from: features are the brightness of quarters."""

    name, num_features, sha256 = "quarters", 4, "5" * 64

    def __init__(self, has_logits: bool) -> None:
        self.has_logits = has_logits

    def to(self, device: torch.device) -> "FakeExtractor":
        return self

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return 1.0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quarters = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)  # (B, 4)
        return quarters, quarters * 9


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("has_logits", [True, False], ids=["with logits", "without logits"])
def test_scores_are_written_with_all_that_is_needed_to_get_them_again(
    has_logits, trained, one_thread, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(trained.folder)
    monkeypatch.setattr(inception, "weights", lambda path: path)
    monkeypatch.setattr(inception, "Extractor", lambda *_: FakeExtractor(has_logits))
    args = arguments(evaluate, *EVALUATION, "--output_dir", tmp_path / "eval")
    assert evaluate.main(args) == 0
    printed = capsys.readouterr()
    assert not printed.err
    scores = check_evaluation(tmp_path / "eval", printed.out, trained, "5" * 64)
    if has_logits:
        assert scores["inception_score_mean"] >= 1 and scores["inception_score_std"] >= 0
    else:
        assert scores["inception_score_mean"] is None
        assert any("last layer" in note for note in scores["notes"])


@pytest.mark.usefixtures("own_cache")
def test_without_inception_the_classifier_scores_alone(trained, one_thread, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(trained.folder)
    monkeypatch.setattr(inception, "weights", None)  # a call would fail
    args = arguments(evaluate, *EVALUATION, "--classifier_only", "--output_dir", tmp_path / "eval")
    assert evaluate.main(args) == 0
    report = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    scores, printed = report["scores"], capsys.readouterr().out
    assert "fid" not in scores and "bits_per_dim" not in scores and "extractor" not in report["protocol"]
    assert scores["classifier_fd"] > 0 and f"{scores['classifier_fd']:.2f}" in printed
    assert (scores["num_images"], scores["num_reference_images"]) == (16, 500)
    assert printed.split()[:1] == ["classifier"]  # the one column


@pytest.mark.usefixtures("own_cache")
def test_images_asked_to_be_of_a_class_are_scored_by_it(trained, one_thread, monkeypatch, capsys, tmp_path):
    """The network draws nothing yet that a classifier would know, so the classifier is made to: all bags (8)."""
    monkeypatch.chdir(trained.folder)
    bags = torch.nn.functional.one_hot(torch.tensor(8), 10).float()
    look = classifier.Classifier.__call__
    monkeypatch.setattr(classifier.Classifier, "__call__", lambda *x: (look(*x)[0], bags.repeat(len(x[1]), 1)))
    asked = ["--class", "bag", "coat", "8", "--guidance_scale", 2]
    args = arguments(evaluate, *EVALUATION, "--classifier_only", *asked, "--output_dir", tmp_path / "eval")
    assert evaluate.main(args) == 0
    report = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert report["scores"]["class_accuracy"] == 11 / 16  # images 0, 2, 3, 5, … in batches of six
    assert report["protocol"]["generated"]["classes"] == ["bag", "coat", "bag"]
    assert report["protocol"]["generated"]["guidance_scale"] == 2
    printed = capsys.readouterr().out
    assert "16 images of bag, coat, bag in turn (guidance 2)" in printed and "68.8%" in printed


@pytest.mark.usefixtures("own_cache")
def test_a_data_set_without_classes_has_no_classifier(trained, one_thread, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(trained.folder)
    name = "fashion-mnist-tiny"
    monkeypatch.setitem(datasets.DATASETS, name, dataclasses.replace(datasets.DATASETS[name], classes=()))
    flags = [*EVALUATION, "--classifier_only", "--output_dir", tmp_path / "eval"]
    with pytest.raises(errors.SettingError, match="not those of the model"):
        evaluate.main(arguments(evaluate, *flags))
    assert evaluate.main(arguments(evaluate, *flags, "--class", "none")) == 0
    scores = json.loads((tmp_path / "eval" / "metrics.json").read_text())["scores"]
    assert scores["class_accuracy"] is None
    assert scores["classifier_fd"] is None and scores["class_histogram"] is None
    assert scores["nearest_median"] > 0
    assert "no classifier" in capsys.readouterr().out


def test_results_of_another_model_or_another_sampling_are_not_overwritten(
    trained, data, one_thread, monkeypatch, caplog, tmp_path
):
    """Without --output_dir. The models are two checkpoints of one training, under the same name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(classifier, "trained", lambda *_: FakeExtractor(True))
    models = [tmp_path / folder / "model.pth" for folder in ("one", "other")]
    for path, name in zip(models, ("latest", "weights"), strict=True):
        path.parent.mkdir()
        path.write_bytes((trained.folder / f"checkpoints/{name}.pth").read_bytes())
    common = ["--classifier_only", "--data_path", data, "--device", "cpu", "--batch_size", 4]
    few = ["--num_samples", 2, "--steps", 2]
    runs = [  # the last command is the second one again, which may overwrite its own results
        (models[0], "dpmpp_2m_sde-2-n2-seed0", few),
        (models[1], "dpmpp_2m_sde-2-n2-seed0", few),
        (models[1], "dpmpp_2m_sde-3-n2-seed0", ["--num_samples", 2, "--steps", 3]),
        (models[1], "ddpm-2-n2-seed0", [*few, "--sampler", "ddpm"]),
        (models[1], "ddim-2-eta0.5-n2-seed0", [*few, "--sampler", "ddim", "--eta", 0.5]),
        (models[1], "dpmpp_2m_sde-2-class-bag+coat-n2-seed0", [*few, "--class", 8, "coat"]),
        (models[1], "dpmpp_2m_sde-2-n3-seed4", ["--num_samples", 3, "--steps", 2, "--seed", 4]),
        (models[1], "dpmpp_2m_sde-2-n2-seed0", few),
    ]
    written = {}
    for model, sampling, flags in runs:
        sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert evaluate.main(arguments(evaluate, *common, "--checkpoint", model, *flags)) == 0
        folder = Path(f"outputs/eval/model-{sha256[:8]}-{sampling}-classifier_only")
        assert caplog.messages[-1] == f"wrote metrics.json, grid.png and neighbours.png to {folder}"
        assert {path.name for path in folder.iterdir()} == {"metrics.json", "grid.png", "neighbours.png"}
        protocol = json.loads((folder / "metrics.json").read_text())["protocol"]
        assert (protocol["checkpoint"]["file"], protocol["checkpoint"]["sha256"]) == (str(model), sha256)
        written[folder] = protocol
    assert len(written) == len(runs) - 1
    assert set(Path("outputs/eval").iterdir()) == set(written)
    for folder, protocol in written.items():  # each as it was written
        assert json.loads((folder / "metrics.json").read_text())["protocol"] == protocol


@pytest.mark.slow
def test_eval_scores_the_trained_model_with_the_real_inception(trained, tmp_path):
    done = run_script("eval.py", *EVALUATION, "--output_dir", tmp_path, cwd=trained.folder, timeout=1800)
    assert done.returncode == 0, done.stderr
    weights = inception.weights()  # where eval.py has put, or found, them
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    scores = check_evaluation(tmp_path, done.stdout, trained, sha256)
    if inception.Extractor(weights).has_logits:
        assert scores["inception_score_mean"] >= 1
    else:
        assert scores["inception_score_mean"] is None
        assert any("Inception Score" in note for note in scores["notes"])
        assert "unavailable" in done.stdout
    assert not re.search(r"\r|\x1b", done.stderr), "debris of a progress bar"


def test_the_published_scores_are_of_the_bundled_weights_by_the_default_sampler():
    published = json.loads((ROOT / "weights/scores/fashion-mnist.json").read_text())
    made, default = published["protocol"]["generated"], SAMPLERS[config.SAMPLER].steps
    assert (made["sampler"], made["steps"], made["seed"]) == (config.SAMPLER, default, config.SEED)
    fid = f"{published['scores']['fid']:.2f}"
    assert f"FID-10k {fid}: " in (ROOT / "weights/README.md").read_text()
    assert f"FID-10k is **{fid}** " in (ROOT / "README.md").read_text()
