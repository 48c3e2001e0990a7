"""One source for constants, flags and help; every mistake named with its value and its remedy, status 2."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config
import eval as evaluate
import sample
import train
from src import flags

CONSTANTS = [name for name in vars(config) if re.fullmatch(r"[A-Z0-9_]+", name)]
TABLES = {"POSITIVE", "RULES", "RELATIONS", "GOES_WITH", "FREE_ON_RESUME", "NOTED_ON_RESUME"}
SETTINGS = [name for name in CONSTANTS if name not in TABLES]
DOCUMENTED = {
    "BATCH_SIZE": 64,
    "LEARNING_RATE": 1e-3,
    "EPOCHS": 200,
    "GRAD_CLIP": 1.0,
    "IMAGE_SIZE": 32,
    "CHANNELS": 1,
    "TIME_STEPS": 1000,
    "UNET_DIM": 32,
    "UNET_DIM_MULTS": [1, 2, 4, 8],
    "BETA_START": 1e-4,
    "BETA_END": 0.02,
    "SCHEDULE_TYPE": "cosine",
    "EMA_DECAY": 0.995,
    "NUM_SAMPLES": 64,
    "SAVE_EVERY": 5,
    "SAMPLE_EVERY": 10,
    "DATA_PATH": "./data/fashion-mnist",
    "CHECKPOINT_PATH": "./checkpoints",
    "OUTPUT_PATH": "./outputs",
    "LOG_PATH": "./logs",
}


def parse(script, monkeypatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    return script.parse_args()


def test_the_defaults_that_people_rely_on_have_not_moved():
    assert {name: getattr(config, name) for name in DOCUMENTED} == DOCUMENTED


def test_every_constant_is_a_flag_of_some_script_and_is_documented():
    used = {*train.SETTINGS, *sample.SETTINGS, *evaluate.SETTINGS, "EVAL_SAMPLES", "SAMPLE_BATCH", "GUIDANCE_SCALE"}
    assert used == set(SETTINGS) == set(flags.comments_of(config))


def test_every_setting_is_read_somewhere():
    """A flag that is accepted and then ignored is worse than none."""
    root = Path(config.__file__).parent
    code = "".join(path.read_text() for path in [*root.glob("[tse]*.py"), *root.glob("src/*.py")])
    for name in {*train.SETTINGS, *sample.SETTINGS, *evaluate.SETTINGS}:
        assert re.search(rf"args\.{name.lower()}\b|settings\[\"{name.lower()}\"\]|\"{name.lower()}\"", code), name


def test_flags_override_constants_and_keep_their_types(monkeypatch):
    args = parse(train, monkeypatch, "--batch_size", "32", "--schedule_type", "linear", "--unet_dim_mults", "1", "2")
    assert (args.batch_size, args.schedule_type, args.unet_dim_mults) == (32, "linear", [1, 2])
    assert parse(train, monkeypatch).unet_dim_mults == config.UNET_DIM_MULTS == [1, 2, 4, 8]


def test_channels_and_path_follow_from_the_data_set(monkeypatch):
    def settings(*flags: str) -> tuple[int, str]:
        args = parse(train, monkeypatch, *flags)
        return args.channels, args.data_path

    assert settings() == (1, "./data/fashion-mnist")
    assert settings("--dataset", "kmnist") == (1, "./data/kmnist")
    assert settings("--dataset", "cifar10") == (3, "./data/cifar10")
    assert settings("--dataset", "folder", "--data_path", "my") == (3, "my")
    assert settings("--dataset", "folder", "--data_path", "my", "--channels", "1") == (1, "my")  # a flag has its way
    monkeypatch.setattr(config, "DATASET", "cifar10")
    monkeypatch.setattr(config, "DATA_PATH", "/mnt/images")
    assert settings() == (3, "/mnt/images")  # and so has an edited constant


def test_help_shows_every_flag_with_its_meaning_and_default(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(train, monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name in train.SETTINGS:
        assert f"--{name.lower()} " in text
    assert "largest norm of the gradient (default: 1.0)" in text
    assert "(default: 1 2 4 8)" in text


def test_eval_generates_a_thousand_images_by_default(monkeypatch):
    assert parse(evaluate, monkeypatch).num_samples == 1000


def test_several_mistakes_are_reported_together(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(train, monkeypatch, "--batch_size", "0", "--epochs", "-1", "--ema_decay", "1.5")
    errors = capsys.readouterr().err
    assert all(name in errors for name in ("BATCH_SIZE", "EPOCHS", "EMA_DECAY"))


def test_only_settings_that_leave_the_weights_alone_may_change_on_resume():
    saved = {"epochs": 10, "seed": 0, "unet_dim": 32, "save_every": 5, "learning_rate": 1e-3}
    wanted = {"epochs": 20, "seed": 1, "unet_dim": 64, "save_every": 1, "learning_rate": 1e-4, "prediction": "v"}
    refused, noted = flags.changed_settings(config, saved, wanted)
    assert refused == [
        "PREDICTION was not recorded and is now 'v'",
        "SEED was 0 and is now 1",
        "UNET_DIM was 32 and is now 64",
    ]
    assert noted == ["LEARNING_RATE was 0.001 and is now 0.0001"]


def test_settings_are_compared_on_resume_by_their_names_and_not_by_their_annotations(monkeypatch):
    """`SEED = 5`, written without the annotation, is as much another seed as `SEED: int = 5`."""
    monkeypatch.delitem(config.__annotations__, "SEED")
    assert flags.changed_settings(config, {"seed": 0}, {"seed": 5})[0] == ["SEED was 0 and is now 5"]


def test_what_was_given_is_told_from_what_equals_the_default(monkeypatch):
    args = parse(train, monkeypatch, "--epochs", "200", "--lr_decay", "0.5")
    assert (args.epochs, args.given) == (config.EPOCHS, ["epochs", "lr_decay"])
    assert parse(sample, monkeypatch, "--class", "bag", "--quiet").given == ["classes", "quiet"]
    assert parse(sample, monkeypatch).given == []


@pytest.mark.parametrize("edit", ["EPOCHS = 20", "EPOCHS: int = 20", "EPOCHS = 20 # passes"])
def test_a_constant_may_lose_its_annotation_or_its_comment(edit, tmp_path):
    """People edit this file; not all of them keep its style."""
    text = Path(config.__file__).read_text()
    (tmp_path / "config.py").write_text(re.sub(r"^EPOCHS.*$", edit, text, flags=re.MULTILINE))
    code = "import config; from src import flags; print(flags.Parser(config, '', ['EPOCHS']).parse_args([]).epochs)"
    # The edited one comes first.
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(config.__file__).parent}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("20\n", "")
