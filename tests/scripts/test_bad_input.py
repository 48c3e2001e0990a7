"""What a tired user types: every mistake is one line that names the setting, its value and the remedy."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, NETWORK, TINIEST, arguments, run_script
from PIL import Image

import config
import eval as evaluate
import sample
import train
from src.data import datasets
from src.utils import checkpoint, directories, errors, settings
from src.utils.distributed import World

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = {"train.py": train, "sample.py": sample, "eval.py": evaluate}
# Good command lines, which each case below spoils with the flags after it.
GOOD = {
    "train.py": " ".join([*TINIEST, *NETWORK, "--data_path data --epochs 1"]),
    "sample.py": "--checkpoint model.pth --num_samples 2 --steps 2 --device cpu",
    "eval.py": "--checkpoint model.pth --num_samples 2 --steps 2 --device cpu --data_path data",
}
CASES = [  # command, exit status, parts of the line
    # numbers out of range, or none at all
    ("train.py --batch_size 0", 2, "BATCH_SIZE is 0, but must be at least 1"),
    ("train.py --batch_size -3", 2, "BATCH_SIZE is -3, but must be at least 1"),
    ("train.py --batch_size many", 2, "--batch_size: invalid int value: 'many'"),
    ("train.py --batch_size 1.5", 2, "--batch_size: invalid int value: '1.5'"),
    ("train.py --batch_size", 2, "--batch_size: expected one argument"),
    ("train.py --val_size 0", 2, "VAL_SIZE is 0, but must be at least 1"),
    ("train.py --epochs 0", 2, "EPOCHS is 0, but must be at least 1"),
    ("train.py --learning_rate nan", 2, "LEARNING_RATE is nan, but must be above 0 and at most 1"),
    ("train.py --learning_rate -1", 2, "LEARNING_RATE is -1.0, but must be above 0"),
    ("train.py --learning_rate inf", 2, "LEARNING_RATE is inf, but must be above 0 and at most 1"),
    ("train.py --learning_rate 1e38", 2, "LEARNING_RATE is 1e+38, but must be above 0 and at most 1"),
    ("train.py --lr_warmup -1", 2, "LR_WARMUP is -1, but must be 0 or more steps"),
    ("train.py --lr_decay 1.5", 2, "LR_DECAY is 1.5, but must be from 0 to 1"),
    ("train.py --lr_warmup 99999999999999999999", 2, "LR_WARMUP is 99999999999999999999, but must be below 2^32"),
    ("train.py --unet_dim_mults 1 4294967296", 2, "UNET_DIM_MULTS is [1, 4294967296], but must be below 2^32"),
    ("train.py --image_size 4294967288", 1, "out of memory"),
    ("train.py --accumulate 0", 2, "ACCUMULATE is 0, but must be at least 1"),
    ("train.py --dropout 1", 2, "DROPOUT is 1.0, but must be at least 0 and below 1"),
    ("train.py --class_dropout -0.1", 2, "CLASS_DROPOUT is -0.1, but must be above 0"),
    ("train.py --grad_clip 0", 2, "GRAD_CLIP is 0.0, but must be a positive number"),
    ("train.py --grad_clip nan", 2, "GRAD_CLIP is nan, but must be a positive number"),
    ("train.py --ema_decay 1", 2, "EMA_DECAY is 1.0, but must be at least 0 and below 1"),
    ("train.py --ema_decay -0.1", 2, "EMA_DECAY is -0.1, but must be at least 0 and below 1"),
    ("train.py --seed -1", 2, "SEED is -1, but must be from 0 to 2^32 - 1"),
    ("train.py --time_steps 1", 2, "TIME_STEPS is 1, but must be at least 2"),
    ("train.py --steps 51", 2, "STEPS must be at most TIME_STEPS (STEPS is 51, TIME_STEPS is 50)"),
    ("train.py --save_minutes -1", 2, "SAVE_MINUTES is -1.0, but must be 0"),
    ("train.py --save_minutes nan", 2, "SAVE_MINUTES is nan, but must be 0"),
    ("train.py --log_every 0", 2, "LOG_EVERY is 0, but must be at least 1"),
    ("train.py --beta_end 1.5", 2, "BETA_END is 1.5, but must be above 0 and below 1"),
    ("sample.py --num_samples 0", 2, "NUM_SAMPLES is 0, but must be at least 1"),
    ("sample.py --interpolate --interp_steps 1", 2, "INTERP_STEPS is 1, but must be at least 2"),
    ("sample.py --steps -1", 2, "STEPS is -1, but must be at least 1 (or 0"),
    ("sample.py --steps 41", 2, "steps is 41, but must be from 1 to the model's 40 timesteps"),
    ("eval.py --eta 2", 2, "ETA is 2.0, but must be from 0 to 1"),
    ("eval.py --num_samples -5", 2, "NUM_SAMPLES is -5, but must be at least 1"),
    # names that nobody knows
    ("train.py --schedule_type quadratic", 2, "SCHEDULE_TYPE is 'quadratic', but must be linear or cosine"),
    ("train.py --prediction x", 2, "PREDICTION is 'x', but must be noise, x0 or v"),
    ("train.py --objective x", 2, "OBJECTIVE is 'x', but must be denoising or consistency"),
    ("train.py --loss_weight snr", 2, "LOSS_WEIGHT is 'snr', but must be uniform or min_snr"),
    (
        "train.py --time_sampling random",
        2,
        "TIME_SAMPLING is 'random', but must be uniform, stratified or logit_normal",
    ),
    ("sample.py --class hat", 2, "--class hat is unknown: choose from t-shirt, trouser"),
    ("sample.py --class 10", 2, "--class 10 is unknown"),
    ("sample.py --class", 2, "--class: expected at least one argument"),
    ("train.py --precision float16", 2, "PRECISION is 'float16', but must be auto, float32 or bfloat16"),
    ("train.py --device cpu:1", 2, "DEVICE is 'cpu:1', but must be auto, cpu, or a device of torch's, such as cuda"),
    ("train.py --dataset imagenet", 2, "imagenet"),
    ("sample.py --sampler euler", 2, "SAMPLER is 'euler', but must be ddpm, ddim, dpmpp_2m, dpmpp_2m_sde or cons"),
    ("train.py --batch 3", 2, "unrecognized arguments: --batch 3; did you mean --batch_size?"),
    ("train.py -epochs 3", 2, "unrecognized arguments: -epochs 3; did you mean --epochs?"),
    ("train.py epochs=3", 2, "unrecognized arguments: epochs=3; did you mean --epochs?"),
    ("train.py --lr 1e-3", 2, "unrecognized arguments: --lr 1e-3; did you mean --learning_rate?"),
    ("sample.py model.pth", 2, "unrecognized arguments: model.pth; did you mean --checkpoint model.pth? (see --help)"),
    ("sample.py model", 2, "unrecognized arguments: model (see --help)"),
    ("sample.py --gpu", 2, "unrecognized arguments: --gpu (see --help)"),  # nothing is similar enough
    ("sample.py --num-samples 3", 2, "did you mean --num_samples?"),
    # settings that do not go together
    ("train.py --image_size 29 --unet_dim_mults 1 2", 2, "IMAGE_SIZE must be divisible by 2^(levels - 1)"),
    ("train.py --image_size 26", 2, "26"),
    ("train.py --unet_dim 12", 2, "UNET_DIM is 12, but must be a positive multiple of 8, the groups of GroupNorm"),
    ("train.py --unet_dim_mults", 2, "--unet_dim_mults: expected at least one argument"),
    ("train.py --unet_dim_mults 1 0", 2, "UNET_DIM_MULTS is [1, 0], but must be one or more whole numbers"),
    ("train.py --channels 3", 2, "CHANNELS is 3, but must be 1 with DATASET fashion-mnist-tiny"),
    ("train.py --channels 2", 2, "CHANNELS is 2, but must be 1 (grayscale) or 3 (colour)"),
    ("train.py --dataset cifar10 --image_size 32 --channels 1", 2, "CHANNELS is 1, but must be 3 with DATASET"),
    ("train.py --schedule_type linear --beta_start 0.03", 2, "BETA_START must be below BETA_END (BETA_START is 0.03"),
    ("train.py --beta_start 1e-3", 2, "--beta_start is for --schedule_type linear"),
    ("train.py --beta_end 0.02", 2, "--beta_end is for --schedule_type linear"),  # the default's value, but given
    ("train.py --sampler ddpm --eta 0.5", 2, "ETA is for SAMPLER ddim only"),
    ("sample.py --sampler dpmpp_2m --eta 0.5", 2, "ETA is for SAMPLER ddim only"),
    ("train.py --objective consistency --prediction noise", 2, "OBJECTIVE consistency is for PREDICTION v"),
    ("train.py --objective consistency", 2, "OBJECTIVE consistency distils a trained model: give it as --init_from"),
    (
        "train.py --objective consistency --init_from best.pth --ignore_mismatched_sizes",
        2,
        "--ignore_mismatched_sizes is for fine-tuning: what OBJECTIVE consistency distils has to fit the data",
    ),
    ("train.py --overwrite", 2, "--overwrite goes with --fresh"),
    ("train.py --ignore_mismatched_sizes", 2, "--ignore_mismatched_sizes goes with --init_from"),
    ("train.py --init_from nowhere.pth", 1, "no checkpoint at nowhere.pth: train one with"),
    ("sample.py --class none --guidance_scale 2", 2, "--guidance_scale guides towards a class"),
    ("eval.py --class none --guidance_scale 1", 2, "not go with --class none"),  # the default's value, but given
    ("eval.py --classifier_only --crop_frame", 2, "--crop_frame is for Inception"),
    ("eval.py --classifier_only --resize bilinear", 2, "--resize is for Inception"),
    ("eval.py --classifier_only --inception_weights a.pth", 2, "--inception_weights is for Inception"),
    ("train.py --no-class_conditional --class_dropout 0.3", 2, "does not go with --no-class_conditional"),
    ("eval.py --reference all", 2, "invalid choice: 'all'"),
    ("sample.py --class bag --guidance_scale -1", 2, "GUIDANCE_SCALE is -1.0, but must be from 0"),
    ("sample.py --class bag 1 --interpolate --sampler ddim", 2, "--interpolate takes one --class, or none"),
    ("train.py --accumulate 3", 2, "BATCH_SIZE must be a multiple of ACCUMULATE (BATCH_SIZE is 10"),
    ("sample.py --start_from picture.png --strength -0.1", 2, "--strength is -0.1, but must be from 0 to 1"),
    ("sample.py --start_from picture.png --strength 1.1", 2, "--strength is 1.1, but must be from 0 to 1"),
    ("sample.py --start_from picture.png --strength nan", 2, "--strength is nan, but must be from 0 to 1"),
    ("sample.py --start_from picture.png --strength much", 2, "--strength: invalid float value: 'much'"),
    ("sample.py --start_from picture.png --guidance_scale 2", 2, "with --start_from, it goes with --class"),
    ("sample.py --strength 0.5", 2, "--strength goes with --start_from"),
    ("sample.py --inpaint picture.png", 2, "--inpaint goes with --start_from"),
    ("sample.py --interp_steps 5", 2, "--interp_steps goes with --interpolate"),
    ("sample.py --interp_steps 10", 2, "--interp_steps goes with --interpolate"),  # the default's value, but given
    # too much for the data, the machine, or the run that is there
    ("train.py --batch_size 2000", 2, "--batch_size 2000; reduce one of them"),
    ("train.py --val_size 1000", 2, "too few for --val_size 1000"),
    ("train.py --unet_dim 8000000", 1, "out of memory: reduce --batch_size or, in training, the network"),
    ("train.py --device cuda", 2, "--device cuda: torch sees 0 cuda devices; use --device cpu"),
    ("sample.py --device cuda:3", 2, "--device cuda:3: torch sees 0 cuda devices; use --device cpu"),
    ("eval.py --device mps", 2, "--device mps: torch sees 0 mps devices; use --device"),
    ("train.py --device tpu", 2, "--device tpu: torch sees 0 tpu devices; use --device"),
    ("train.py --checkpoint_path run --seed 7", 2, "SEED was 0 and is now 7"),
    ("train.py --checkpoint_path run --fresh", 2, "a new run would lose run/latest.pth: add --fresh --overwrite"),
    # paths: empty, of the wrong kind, or not to be written (as root, too: /proc is nobody's)
    ("train.py --checkpoint_path=", 2, "CHECKPOINT_PATH is '', but must be a directory"),
    ("train.py --data_path=", 2, "DATA_PATH is '', but must be a directory"),
    ("train.py --data_path file", 2, "file"),
    ("train.py --dataset folder --data_path=", 2, "DATA_PATH is '', but must be a directory: --data_path DIR"),
    ("train.py --dataset folder --data_path nowhere", 2, "nowhere, which is no directory: name the one with your im"),
    ("train.py --dataset folder --data_path run", 2, "run holds too few images for training (.png, .jpg, "),
    ("train.py --dataset folder --data_path pictures", 1, "cannot read 2 of 2 images (pictures/"),
    ("train.py --checkpoint_path file", 2, "--checkpoint_path file: File exists"),
    ("train.py --output_path file/below", 2, "--output_path file/below: Not a directory"),
    ("train.py --log_path /proc/logs", 2, "--log_path /proc/logs: No such file or directory"),
    ("sample.py --output_dir=", 2, "--output_dir: is '', but must be a path"),
    ("sample.py --output_dir file", 2, "--output_dir file: File exists"),
    ("eval.py --output_dir file/below", 2, "--output_dir file/below: Not a directory"),
    ("train.py --init_from=", 2, "--init_from: is '', but must be a path"),
    ("eval.py --inception_weights=", 2, "--inception_weights: is '', but must be a path"),
    ("sample.py --start_from=", 2, "--start_from: is '', but must be a path"),
    ("sample.py --start_from nowhere.png", 1, "no image at nowhere.png: give an existing file"),
    ("sample.py --start_from run", 1, "no image at run: give an existing file"),
    ("sample.py --start_from file", 1, "cannot read the image file (cannot identify image file"),
    ("sample.py --start_from picture.png --inpaint nowhere.png", 1, "no image at nowhere.png: give an existing file"),
    ("sample.py --start_from picture.png --inpaint file", 1, "cannot read the image file (cannot identify"),
    ("sample.py --start_from picture.png --inpaint picture.png", 1, "no pixel of picture.png is white"),
    ("sample.py --start_from picture.png --inpaint tall.png", 1, "28 x 32 pixels and picture.png 28 x 28: give the"),
    ("sample.py --class=", 2, "--class '' is unknown: choose from t-shirt"),
    ("sample.py --checkpoint=", 2, "--checkpoint: is '', but must be a path"),
    ("sample.py --checkpoint nowhere.pth", 1, "no checkpoint at nowhere.pth: train one with"),
    ("sample.py --checkpoint .", 1, "no checkpoint at ., which is a directory: train one with"),
    ("sample.py --checkpoint file", 1, "file is no checkpoint, or a truncated one: give another"),
    ("sample.py --checkpoint truncated.pth", 1, "truncated.pth is no checkpoint, or a truncated one: give another"),
    ("eval.py --checkpoint foreign.pth", 1, "foreign.pth is another program's checkpoint"),
    ("eval.py --checkpoint newer.pth", 1, "newer.pth has format 999, unknown to this program"),
    ("eval.py --checkpoint nan.pth", 1, "nan.pth holds weights that are not numbers"),
    ("eval.py --checkpoint old.pth", 1, "old.pth was written by another version of this program"),
    ("sample.py --checkpoint renamed.pth", 1, "renamed.pth was written by another version of this program"),
    ("sample.py --raw_weights", 1, "model.pth holds no raw weights: give another file"),
    ("eval.py --inception_weights nowhere.pth", 1, "no Inception weights at nowhere.pth: give an existing file"),
    ("eval.py --inception_weights file", 1, "file is damaged, or not torch-fidelity's Inception-v3"),
    ("eval.py --inception_weights model.pth", 1, "model.pth is damaged, or not torch-fidelity's Inception-v3"),
]


@pytest.fixture(scope="module")
def template(data, tmp_path_factory) -> Path:
    """A folder with good and bad things in it; `model.pth` is a small network, `run` a training to resume."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(data, folder / "data")
    (folder / "file").write_text("a text\n")
    (folder / "pictures").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (folder / "pictures" / name).write_text("a text\n")
    Image.new("L", (28, 28)).save(folder / "picture.png")
    Image.new("L", (28, 32), 255).save(folder / "tall.png")
    (folder / "run").mkdir()
    flags = f"{GOOD['train.py']} --time_steps 40 --data_path {folder / 'data'} --checkpoint_path {folder / 'run'}"
    with torch.random.fork_rng():
        trainer = train.Trainer(arguments(train, *flags.split()), World(torch.device("cpu")))
    state = checkpoint.load(trainer.checkpoints.save("latest.pth"))
    model = {"settings": state["settings"], "ema": state["ema"]}
    checkpoint.save(folder / "model.pth", model)
    (folder / "truncated.pth").write_bytes((folder / "model.pth").read_bytes()[:9000])
    header = {"program": checkpoint.PROGRAM, "format": checkpoint.FORMAT}
    torch.save(model, folder / "foreign.pth")
    torch.save({**header, **model, "format": 999}, folder / "newer.pth")
    torch.save({**header, **model, "ema": {"weight": torch.tensor([0.0, torch.nan])}}, folder / "nan.pth")
    renamed = {f"{name}_": weight for name, weight in state["ema"].items()}
    torch.save({**header, **model, "ema": renamed}, folder / "renamed.pth")
    older = {name: value for name, value in state["settings"].items() if name != "prediction"}
    torch.save({**header, **model, "settings": older}, folder / "old.pth")
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch) -> Path:
    """A copy of `template`, as the current directory."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[[str], tuple[int, str]]:
    """`call("train.py --epochs 0")`: the exit status and what was written to stderr."""

    def run(command: str) -> tuple[int, str]:
        name, *flags = command.split()
        monkeypatch.setattr("sys.argv", [name, *GOOD[name].split(), *flags])
        with pytest.raises(SystemExit) as stop:
            args = SCRIPTS[name].parse_args()
            errors.run(lambda: SCRIPTS[name].main(args), name, quiet=True)
        return stop.value.code, capsys.readouterr().err

    return run


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(("command", "status", "message"), CASES, ids=[command for command, _, _ in CASES])
def test_a_mistake_is_one_line_that_names_setting_value_and_remedy(command, status, message, place, call):
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type in command:
        pytest.skip("this machine has the device that the case lacks")
    before, directories = listing(place), set(filter(Path.is_dir, place.rglob("*")))
    code, line = call(command)
    assert (code, line.count("\n")) == (status, 1), line
    assert line.startswith(f"{command.split()[0]}: error: ") and message in line
    assert listing(place) == before
    assert set(filter(Path.is_dir, place.rglob("*"))) == directories, "a refused run leaves directories"


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_the_command_lines_are_good_before_they_are_spoilt(name, place, call):
    assert call(name) == (0, "")


def test_there_are_cases_of_every_rule_that_a_flag_can_break():
    commands = " ".join(command for command, _, _ in CASES)
    free = {"SAVE_EVERY", "SAMPLE_EVERY"}  # "at least 1", as ten others
    rules = {name for name, setting in settings.SETTINGS.items() if setting.wording}
    for name in rules - free:
        assert f"--{name.lower()}" in commands or name in {"OUTPUT_PATH", "LOG_PATH"}, name
    assert len(CASES) >= 45


@pytest.mark.parametrize(("flags", "path"), [("", "./data/fashion-mnist-tiny"), (config.DATA_PATH, config.DATA_PATH)])
def test_a_data_path_that_equals_the_default_is_used_as_given(flags, path, place, monkeypatch):
    """Without the flag, the path is that of the checkpoint's data set."""
    asked = []

    def load(name, root, *rest):
        asked.append((name, root))
        raise errors.UserError("far enough")

    monkeypatch.setattr(datasets, "load", load)
    command = f"--checkpoint model.pth --device cpu {flags and '--data_path ' + flags}"
    with pytest.raises(errors.UserError, match="far enough"):
        evaluate.main(arguments(evaluate, *command.split()))
    assert asked == [("fashion-mnist-tiny", path)]


def test_several_mistakes_are_reported_together(place, call):
    _, line = call("train.py --batch_size 0 --epochs -1 --ema_decay 1.5")
    assert all(name in line for name in ("BATCH_SIZE", "EPOCHS", "EMA_DECAY"))
    _, line = call("train.py --schedule_type linear --beta_start 0.5 --beta_end 0.4 --steps 60")
    assert all(name in line for name in ("BETA_START", "STEPS must be"))
    _, line = call("train.py --checkpoint_path file --output_path file/below --log_path /proc/logs")
    assert all(name in line for name in ("--checkpoint_path", "--output_path", "--log_path"))


@pytest.mark.parametrize(
    ("constant", "value", "kind"),
    [("EPOCHS", 2.5, "int"), ("LEARNING_RATE", None, "float"), ("UNET_DIM_MULTS", [1, 2.5], "list")],
)
def test_a_constant_of_the_wrong_type_is_named(constant, value, kind, place, call, monkeypatch):
    """Whoever edits config.py is told as kindly as who mistypes a flag."""
    monkeypatch.setitem(GOOD, "train.py", "")
    monkeypatch.setattr(config, constant, value)
    code, line = call("train.py --quiet")
    assert (code, line.count("\n")) == (2, 1)
    assert f"{constant} is {value!r}, but must be of type {kind}" in line


def test_empty_multipliers_in_config_are_named(place, call, monkeypatch):
    monkeypatch.setitem(GOOD, "train.py", "")
    monkeypatch.setattr(config, "UNET_DIM_MULTS", [])
    assert "UNET_DIM_MULTS is [], but must be one or more whole numbers" in call("train.py --quiet")[1]


def test_a_whole_number_will_do_for_a_float(monkeypatch):
    monkeypatch.setattr(config, "GRAD_CLIP", 2)
    assert arguments(train).grad_clip == 2
    assert arguments(train, "--grad_clip", "0.5").grad_clip == 0.5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.54 GB, other allocations: 0.12 GB, max 18.13 GB)."),
    ],
    ids=["OutOfMemoryError", "RuntimeError"],
)
@pytest.mark.parametrize("where", ["training", "sampling"])
def test_a_gpu_without_memory_says_which_setting_to_reduce(where, error, place, call, monkeypatch):
    """Mocked, for want of a GPU: torch's own exceptions, from the place where they would come."""

    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("src.model.UNet.forward", exhausted)
    code, line = call("train.py" if where == "training" else "sample.py")
    assert (code, line.count("\n")) == (1, 1)
    assert "out of memory: reduce --batch_size" in line


@pytest.mark.parametrize(
    ("script", "package"), [("train.py", "torch"), ("sample.py", "einops"), ("eval.py", "torch_fidelity")]
)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(script, package, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})\n")
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    done = run_script(script, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": path})
    assert done.returncode == 1
    assert re.fullmatch(rf"{script}: error: no package {package}: run pip install -r requirements\.txt\n", done.stderr)


def test_an_environment_that_tqdm_cannot_read_is_one_line(tmp_path):
    done = run_script("sample.py", cwd=tmp_path, env={**ENVIRONMENT, "TQDM_MININTERVAL": "abc"})
    line = "an environment variable TQDM_... is wrong (could not convert string to float: 'abc'): unset it"
    assert (done.returncode, done.stderr) == (1, f"sample.py: error: {line}\n")


def test_a_broken_package_is_one_line_likewise(tmp_path):
    (tmp_path / "einops.py").write_text("raise ImportError('libc++.so.1: cannot open shared object file\\n')\n")
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    done = run_script("sample.py", cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": path})
    reason = "a package is broken (libc++.so.1: cannot open shared object file)"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"sample.py: error: {reason}: run pip install -r requirements.txt\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start_where_python_adds_no_directory_to_its_path(script, tmp_path):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    done = run_script(script, "--help", cwd=tmp_path, env={**environment, "PYTHONSAFEPATH": "1"})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_checkpoint_that_the_message_names_is_there(place, call):
    for command, hint in (
        ("sample.py --checkpoint run/nowhere.pth", "run/latest.pth"),
        ("sample.py --checkpoint run", "run/latest.pth"),
        ("sample.py --checkpoint run/checkpoints/best.pth", "run/latest.pth"),
        ("eval.py --checkpoint file/best.pth", None),
        ("eval.py --checkpoint nowhere.pth", None),
    ):
        code, line = call(command)
        assert code == 1
        assert line.endswith(f", or give a file that is there, such as {hint}\n" if hint else "with python train.py\n")


def test_a_directory_is_removed_after_a_refusal_only(tmp_path):
    """The first of several processes to end must not remove one to which the main process is about to write."""
    new, old = tmp_path / "a/new", tmp_path / "old"
    old.mkdir()
    places = {"output_path": str(new), "log_path": str(old)}
    with pytest.raises(errors.SettingError), directories.output_directories(places):
        raise errors.SettingError("refused")
    assert old.is_dir() and not (tmp_path / "a").exists()
    with directories.output_directories(places):
        pass
    assert new.is_dir()
