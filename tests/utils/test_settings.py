"""One source for constants, flags and help; every mistake named with its value and its remedy, status 2."""

import argparse
import inspect
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import arguments

import config
import eval as evaluate
import sample
import train
from src import generation, training
from src.data import datasets
from src.diffusion import LOSS_WEIGHTS, PREDICTIONS, SCHEDULES, TIME_SAMPLINGS, Diffusion
from src.ema import EMA
from src.model import UNet
from src.samplers import SAMPLERS
from src.scores import evaluation
from src.utils import checkpoint, devices, fine_tuning, flags, pictures, settings
from src.utils.distributed import World

CONSTANTS = [name for name in vars(config) if re.fullmatch(r"[A-Z0-9_]+", name)]
DOCUMENTED = {
    "BATCH_SIZE": 64,
    "LEARNING_RATE": 2e-3,
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
    used = {name for script in RUNS for name in settings.of_script(script)} | {"EVAL_SAMPLES", "SAMPLE_BATCH"}
    assert used == set(CONSTANTS) == set(flags.comments_of(config))
    assert set(settings.SETTINGS) == used - {"EVAL_SAMPLES", "SAMPLE_BATCH"}


def test_tables_that_are_read_from_source_text_are_those_of_the_modules():
    """--help shall not wait for torch, so settings.py parses these modules; here they are imported."""
    assert settings.SAMPLERS.keys() == SAMPLERS.keys()
    for name, read in settings.SAMPLERS.items():
        assert {"steps", "stochastic"} <= read.keys()
        assert read == {field: getattr(SAMPLERS[name], field) for field in read}
    assert list(settings.DATASETS) == list(datasets.DATASETS) and settings.FOLDER == datasets.FOLDER
    for name, row in datasets.DATASETS.items():
        assert settings.DATASETS[name].get("channels", 1) == row.channels
    tables = {
        "SCHEDULE_TYPE": SCHEDULES,
        "PREDICTION": PREDICTIONS,
        "LOSS_WEIGHT": LOSS_WEIGHTS,
        "TIME_SAMPLING": TIME_SAMPLINGS,
        "SAMPLER": SAMPLERS,
        "DATASET": [*datasets.DATASETS, datasets.FOLDER],
    }
    for name, table in tables.items():
        assert settings.SETTINGS[name].choices == tuple(table)


def test_flags_override_constants_and_keep_their_types(monkeypatch):
    args = parse(train, monkeypatch, "--batch_size", "32", "--schedule_type", "linear", "--unet_dim_mults", "1", "2")
    assert (args.batch_size, args.schedule_type, args.unet_dim_mults) == (32, "linear", [1, 2])
    assert parse(train, monkeypatch).unet_dim_mults == config.UNET_DIM_MULTS == [1, 2, 4, 8]


def test_channels_and_path_follow_from_the_data_set(monkeypatch):
    def chosen(*flags: str) -> tuple[int, str]:
        args = parse(train, monkeypatch, *flags)
        return args.channels, args.data_path

    assert chosen() == (1, "./data/fashion-mnist")
    assert chosen("--dataset", "kmnist") == (1, "./data/kmnist")
    assert chosen("--dataset", "cifar10") == (3, "./data/cifar10")
    assert chosen("--dataset", "folder", "--data_path", "my") == (3, "my")
    assert chosen("--dataset", "folder", "--data_path", "my", "--channels", "1") == (1, "my")  # a flag has its way
    monkeypatch.setattr(config, "DATASET", "cifar10")
    monkeypatch.setattr(config, "DATA_PATH", "/mnt/images")
    assert chosen() == (3, "/mnt/images")  # and so has an edited constant


def test_help_shows_every_flag_with_its_meaning_and_default(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(train, monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name in settings.of_script("train"):
        assert f"--{name.lower()} " in text
    assert "maximum norm of the gradient; larger gradients are scaled down to it (default: 1.0)" in text
    assert "(default: 1 2 4 8)" in text


def test_help_lists_the_choices_of_a_setting(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(train, monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "one of noise, x0, v (default: v)" in text
    assert "one of linear, cosine (default: cosine)" in text
    assert "model: ddpm (50 steps, stochastic), ddim (50 steps, deterministic), dpmpp_2m (20 steps," in text
    for name, setting in settings.SETTINGS.items():
        assert all(choice in text for choice in setting.choices), name


# ---- --run -------------------------------------------------------------------------------------------------


def test_a_run_has_its_checkpoints_outputs_and_logs_in_one_directory(monkeypatch):
    def paths(*flags: str) -> tuple[str, ...]:
        args = parse(train, monkeypatch, *flags)
        return args.checkpoint_path, args.output_path, args.log_path

    assert paths() == ("./checkpoints", "./outputs", "./logs")
    assert paths("--run", "runs/a") == ("runs/a/checkpoints", "runs/a/outputs", "runs/a/logs")
    assert paths("--run", "a", "--log_path", "all/logs") == ("a/checkpoints", "a/outputs", "all/logs")
    args = parse(train, monkeypatch, "--run", "a", "--dataset", "kmnist")
    assert (args.data_path, args.given) == ("./data/kmnist", ["dataset", "run"])  # the data are not the run's
    monkeypatch.setattr(config, "LOG_PATH", "/var/log/ddpm")
    assert paths()[2] == "/var/log/ddpm"
    assert paths("--run", "a")[2] == "a/logs"  # a flag comes before the constants


@pytest.mark.parametrize(("script", "folder"), [(sample, "samples"), (evaluate, "eval")])
def test_a_run_s_best_checkpoint_is_sampled_and_scored_into_its_outputs(script, folder, monkeypatch):
    def paths(*flags: str) -> tuple[str, str]:
        args = parse(script, monkeypatch, *flags)
        return args.checkpoint, args.output_dir

    assert paths() == ("./checkpoints/best.pth", f"./outputs/{folder}")
    assert paths("--run", "a") == ("a/checkpoints/best.pth", f"a/outputs/{folder}")
    assert paths("--run", "a", "--checkpoint", "b.pth") == ("b.pth", f"a/outputs/{folder}")
    assert paths("--output_dir", "c", "--run", "a") == ("a/checkpoints/best.pth", "c")
    assert not hasattr(parse(script, monkeypatch, "--run", "a"), "log_path")
    assert parse(script, monkeypatch, "--run", "a").given == ["run"]


@pytest.mark.parametrize("script", [train, sample, evaluate])
def test_an_empty_run_is_refused(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script, monkeypatch, "--run", "")
    assert stop.value.code == 2
    assert "argument --run: is '', but must be a path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "names"),
    [
        (train, "run data_path checkpoint_path output_path log_path init_from"),
        (sample, "run checkpoint output_dir"),
        (evaluate, "run checkpoint output_dir data_path inception_weights"),
    ],
)
def test_a_tilde_in_a_flag_is_the_home_directory(script, names, monkeypatch):
    """The shell expands it in `--run ~/runs`, but not in `--run=~/runs`."""
    monkeypatch.setenv("HOME", "/home/me")
    for name in names.split():
        args = vars(arguments(script, f"--{name}=~/runs"))
        assert args[name] == "/home/me/runs"
        assert not any(str(value).startswith("~") for value in args.values())


def test_a_tilde_in_config_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("DATA_PATH", "CHECKPOINT_PATH", "OUTPUT_PATH", "LOG_PATH"):
        monkeypatch.setattr(config, name, f"~/{name}")
    args = arguments(train)
    for name in ("data_path", "checkpoint_path", "output_path", "log_path"):
        assert getattr(args, name) == f"/home/me/{name.upper()}"
    assert arguments(sample).checkpoint == "/home/me/CHECKPOINT_PATH/best.pth"
    assert arguments(evaluate).output_dir == "/home/me/OUTPUT_PATH/eval"


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
    refused, noted = settings.changes(saved, wanted)
    assert refused == [
        "PREDICTION was not recorded and is now 'v'",
        "SEED was 0 and is now 1",
        "UNET_DIM was 32 and is now 64",
    ]
    assert noted == ["LEARNING_RATE was 0.001 and is now 0.0001"]


def test_settings_are_compared_on_resume_by_their_names_and_not_by_their_annotations(monkeypatch):
    """`SEED = 5`, written without the annotation, is as much another seed as `SEED: int = 5`."""
    monkeypatch.delitem(config.__annotations__, "SEED")
    assert settings.changes({"seed": 0}, {"seed": 5})[0] == ["SEED was 0 and is now 5"]


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
    code = (
        "import config; from src.utils import flags; print(flags.Parser(config, '', ['EPOCHS']).parse_args([]).epochs)"
    )
    # The edited one comes first.
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(config.__file__).parent}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("20\n", "")


# ---- every flag of every script has its effect -------------------------------------------------------------

# For each script: how it is run, with every setting unlike its default; and the function and its parameter that each
# setting has to reach. A flag that is accepted and then ignored is worse than none.
TRAIN = """
    --dataset mnist --val_size 21 --image_size 8 --channels 3 --batch_size 6 --learning_rate 0.004 --lr_warmup 3
    --lr_decay 0.25 --accumulate 2 --epochs 3 --grad_clip 0.7 --ema_decay 0.8 --seed 11
    --precision bfloat16 --dropout 0.2 --compile --unet_dim 8 --unet_dim_mults 1 2 --no-encoder_attention
    --class_dropout 1 --time_steps 30 --schedule_type linear --beta_start 0.001 --beta_end 0.01 --prediction x0
    --loss_weight min_snr --time_sampling uniform --num_samples 2 --sampler ddim --steps 3 --eta 0.5 --save_every 2
    --save_minutes 50 --sample_every 2 --log_every 4 --device cuda:1 --data_path other/data
    --checkpoint_path other/checkpoints --output_path other/outputs --log_path other/logs
"""
GENERATE = (
    "--num_samples 3 --seed 11 --precision bfloat16 --batch_size 2 --device cuda:1 --class b --guidance_scale 2.5"
)
SCRIPTS: dict[str, ModuleType] = {"train": train, "sample": sample, "eval": evaluate}
RUNS = {
    "train": [
        TRAIN,
        TRAIN.replace("--class_dropout 1", "--no-class_conditional --epochs 1"),
        f"{TRAIN} --objective consistency --init_from model.pth --prediction v --epochs 1",
    ],
    "sample": [
        f"{GENERATE} --sampler ddim --steps 3 --eta 0.5",
        f"{GENERATE} --sampler ddim --steps 3 --interpolate --interp_steps 4",
    ],
    "eval": [f"{GENERATE} --sampler ddim --steps 3 --eta 0.5 --data_path other/data"],
}
GENERATOR = {
    "NUM_SAMPLES": ("World.divide", "count"),
    "SAMPLER": ("Generator.__init__", "sampler"),
    "STEPS": ("Generator.__init__", "steps"),
    "ETA": ("Generator.__init__", "eta"),
    "SEED": ("Generator.images", "seed"),
    "PRECISION": ("Generator.__init__", "precision"),
    "BATCH_SIZE": ("World.divide", "batch_size"),
    "DEVICE": ("devices.pick_device", "name"),
}
PLACES = {
    "sample": {
        **GENERATOR,
        "GUIDANCE_SCALE": ("Generator.__init__", "guidance_scale"),
        "INTERP_STEPS": ("Generator.interpolate", "frames"),
    },
    "eval": {
        **GENERATOR,
        "GUIDANCE_SCALE": ("Generator.__init__", "guidance_scale"),
        "DATA_PATH": ("datasets.load", "root"),
    },
    "train": {
        **GENERATOR,
        "DATASET": ("datasets.load", "name"),
        "DATA_PATH": ("datasets.load", "root"),
        "IMAGE_SIZE": ("UNet.__init__", "image_size"),
        "CHANNELS": ("UNet.__init__", "channels"),
        "UNET_DIM": ("UNet.__init__", "dim"),
        "UNET_DIM_MULTS": ("UNet.__init__", "dim_mults"),
        "DROPOUT": ("UNet.__init__", "dropout"),
        "ENCODER_ATTENTION": ("UNet.__init__", "encoder_attention"),
        "TIME_STEPS": ("Diffusion.__init__", "time_steps"),
        "SCHEDULE_TYPE": ("Diffusion.__init__", "schedule"),
        "BETA_START": ("Diffusion.__init__", "beta_start"),
        "BETA_END": ("Diffusion.__init__", "beta_end"),
        "PREDICTION": ("Diffusion.__init__", "prediction"),
        "LOSS_WEIGHT": ("Diffusion.__init__", "loss_weight"),
        "VAL_SIZE": ("datasets.training_count", "val_size"),
        "BATCH_SIZE": ("datasets.batches", "batch_size"),
        "SEED": ("datasets.batches", "seed"),
        "LEARNING_RATE": ("train.learning_rate", "peak"),
        "LR_WARMUP": ("train.learning_rate", "warmup"),
        "LR_DECAY": ("train.learning_rate", "decay"),
        "GRAD_CLIP": ("utils.clip_grad_norm_", "max_norm"),
        "EMA_DECAY": ("EMA.__init__", "decay"),
        "TIME_SAMPLING": ("training.draw_times", "sampling"),
        "PRECISION": ("training.autocast", "precision"),
        "LOG_EVERY": ("train.Monitor", "log_every"),
    },
}


class Calls(defaultdict):
    """function → its calls, each as parameter → value."""

    def __repr__(self) -> str:
        return f"calls of {len(self)} functions"  # pytest would write out every image


# And what shows where no parameter does. Of 39 images, 36 make 6 batches of 6; the validation loss is always 1.
SHOWN: dict[str, Callable[[Calls], bool]] = {
    "EPOCHS": lambda calls: {call["epoch"] for call in calls["datasets.batches"]} == {0, 1, 2},
    "ACCUMULATE": lambda calls: [len(call["x0"]) for call in calls["Diffusion.loss"][:36]] == [3] * 36,
    "COMPILE": lambda calls: len(calls["UNet.compile"]) == 4,  # in all runs, and that of the teacher in one
    "CLASS_CONDITIONAL": lambda calls: [call["num_classes"] for call in calls["UNet.__init__"]] == [2, 0, 2],
    "OBJECTIVE": lambda calls: len(calls["Diffusion.consistency_loss"]) == 12,  # two parts of each batch, in one run
    "CLASS_DROPOUT": lambda calls: {y for call in trained(calls) for y in asked(call)} == {2},  # none is told
    "SAVE_EVERY": lambda calls: ("latest.pth", 2) in saves(calls),
    "SAVE_MINUTES": lambda calls: 45 < calls["Trainer.run"][0]["minutes"] <= 50,
    "SAMPLE_EVERY": lambda calls: "samples_epoch_0002.png" in drawn(calls),
    "CHECKPOINT_PATH": lambda calls: (
        {call["path"].parent for call in calls["checkpoint.save"]} >= {other("checkpoints")}
    ),
    "OUTPUT_PATH": lambda calls: {call["path"].parent for call in calls["pictures.save_png"]} >= {other("outputs")},
    "LOG_PATH": lambda calls: other("logs") in [call["log_path"] for call in calls["train.Monitor"]],
}


def asked(call: dict[str, Any]) -> list[int]:
    return [] if call["y"] is None else call["y"].tolist()


def trained(calls: Calls) -> list[dict[str, Any]]:
    """The evaluations of the network that is trained, not of the average."""
    return [call for call in calls["UNet.forward"] if call["self"].training]


def saves(calls: Calls) -> list[tuple[str, int]]:
    return [(call["path"].name, call["state"]["epoch"]) for call in calls["checkpoint.save"]]


def drawn(calls: Calls) -> list[str]:
    return [call["path"].name for call in calls["pictures.save_png"]]


def other(folder: str) -> Path:
    return Path("other", folder)


class Done(Exception):
    pass


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict[str, Calls]:
    """What the functions of PLACES and SHOWN were given, by script, when that ran in this process on black images."""
    seen: dict[str, Calls] = {}
    now = Calls(list)

    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: Any, name: str, instead: Callable[..., Any] | None = None) -> None:
            function = getattr(owner, name)
            signature = inspect.signature(function)

            def spy(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(*args, **kwargs)
                given.apply_defaults()
                now[f"{owner.__name__.split('.')[-1]}.{name}"].append(dict(given.arguments))
                return (instead or function)(*args, **kwargs)

            patch.setattr(owner, name, spy)

        def load(
            name: str, root: str, split: str, image_size: int, channels: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(60, channels, image_size, image_size, dtype=torch.uint8), torch.arange(60) % 2

        def run(self: train.Trainer) -> int:
            now["Trainer.run"].append({"minutes": (self.checkpoints.save_due - time.monotonic()) / 60})
            return whole_run(self)

        def stop(*_: Any) -> None:
            raise Done

        whole_run = train.Trainer.run
        patch.setattr(train.Trainer, "run", run)
        patch.setattr(datasets, "classes", lambda *where: ("a", "b"))
        patch.setattr(pictures, "plot_losses", lambda *curves: None)  # slow
        patch.setattr(devices, "can_compile", lambda device: True)  # likewise
        patch.setattr(evaluation, "make_scorers", lambda *_: SimpleNamespace(all=list, networks={}))
        patch.setattr(evaluation, "collect", stop)
        patch.setattr(fine_tuning, "initialise", lambda *_: "the SHA-256 of model.pth")
        watch(datasets, "load", load)
        watch(devices, "pick_device", lambda name: torch.device("cpu"))
        watch(train, "validation_loss", lambda *_, **__: 1.0)
        watch(UNet, "compile", lambda self: None)
        for owner, names in {
            UNet: "__init__ forward",
            Diffusion: "__init__ loss consistency_loss",
            EMA: "__init__",
            torch.optim.Adam: "__init__",
            torch.nn.utils: "clip_grad_norm_",
            training: "draw_times autocast",
            generation.Generator: "__init__ images interpolate",
            World: "divide",
            datasets: "training_count batches",
            train: "learning_rate Monitor",
            checkpoint: "save",
            pictures: "save_png",
        }.items():
            for name in names.split():
                watch(owner, name)

        small = ["--image_size", 8, "--unet_dim", 8, "--unet_dim_mults", 1, "--time_steps", 20]
        values = {**vars(arguments(train, *small)), "classes": ["a", "b"]}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for script, commands in RUNS.items():
            now = seen[script] = Calls(list)
            for command in commands:
                patch.chdir(folder := tmp_path_factory.mktemp(script))
                if script != "train":
                    unet, _ = generation.build(values, torch.device("cpu"))
                    checkpoint.save(folder / "model.pth", {"settings": values, "ema": unet.state_dict()})
                    command += f" --checkpoint {folder}/model.pth --output_dir {folder}"
                try:
                    assert SCRIPTS[script].main(arguments(SCRIPTS[script], *command.split())) == 0
                except Done:
                    assert script == "eval"
        torch.set_num_threads(threads)
    return seen


@pytest.mark.parametrize(("script", "setting"), [(name, s) for name in RUNS for s in settings.of_script(name)])
def test_every_flag_of_a_script_reaches_its_work(script, setting, calls):
    """Not only that of another script: eval.py, too, takes as many steps as it is told."""
    if setting in SHOWN and script == "train":
        assert SHOWN[setting](calls[script])
        return
    function, parameter = PLACES[script][setting]
    run = next(run for run in RUNS[script] if setting.lower() in re.findall(r"--(?:no-)?(\w+)", run))
    value, default = (getattr(arguments(SCRIPTS[script], *flags), setting.lower()) for flags in (run.split(), []))
    assert value != default, "with its default, the flag could be ignored unseen"
    assert str(value) in [str(call[parameter]).removeprefix("torch.") for call in calls[script][function]]
